"""Files that are wrong in one way each: distilled sets, image folders, data sets, paper.yaml."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from common.distilled_set import FORMAT, DistilledSet
from common.store import digest
from papers import cells

MARKER = "marker"  # what a file that runs code would leave in the folder of the test
Make = Callable[[Path], object]


class Attack:
    """Reading this pickle makes a folder: the plain form of an attack."""

    def __init__(self, place: Path):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


# ---- distilled sets --------------------------------------------------------------------------------------------------


def whole() -> DistilledSet:
    """4 images of 2 classes."""
    return DistilledSet(torch.full((4, 3, 8, 8), 0.5), torch.tensor([0, 0, 1, 1]), ("a", "b"), (0.5,) * 3, (0.5,) * 3)


def tensor_file(facts: Mapping | str | None = None, drop: tuple[str, ...] = (), **tensors: torch.Tensor) -> Make:
    """A .safetensors file in our format whose digest is right, with facts and tensors that need not be."""

    def make(folder: Path) -> None:
        good = whole()
        kept = {"images": good.images, "labels": good.labels, **tensors}
        kept = {name: tensor for name, tensor in kept.items() if name not in drop}
        text = facts
        if not isinstance(text, str):
            known = {"classes": good.classes, "mean": good.mean, "std": good.std, "student_lr": None, "settings": {}}
            given = {**known, "whitening": None, **(facts or {})}
            text = json.dumps(without(given))
        metadata = {"format": FORMAT, "facts": text, "sha256": digest(kept, text)}
        (folder / "set.safetensors").write_bytes(save(kept, metadata=metadata))

    return make


def good_set(folder: Path) -> None:
    whole().save(folder / "set.safetensors")


def altered_set(change: Callable[[bytes], bytes]) -> Make:
    """A set whose bytes were changed after it was written."""

    def make(folder: Path) -> None:
        good_set(folder)
        path = folder / "set.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return make


def flipped(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 4]) + data[-4:]


def raw(name: str, data: bytes) -> Make:
    return lambda folder: (folder / name).write_bytes(data)


def pt(content: object, name: str = "res.pt", legacy: bool = False) -> Make:
    """A .pt file with any content; a function is called with the folder first."""

    def make(folder: Path) -> None:
        held = content(folder) if callable(content) and not isinstance(content, torch.Tensor) else content
        torch.save(held, folder / name, _use_new_zipfile_serialization=not legacy)

    return make


def dc(images: torch.Tensor | None = None, labels: torch.Tensor | None = None) -> Make:
    """A file in the DC layout with one pair."""
    pair = [torch.zeros(4, 3, 8, 8) if images is None else images,
            torch.tensor([0, 0, 1, 1]) if labels is None else labels]  # fmt: skip
    return pt({"data": [pair], "accs_all_exps": {}})


def mtt(labels: object = None, lr: object = None) -> Make:
    """An MTT folder; labels=False leaves its labels out."""

    def make(folder: Path) -> None:
        torch.save(torch.zeros(4, 3, 8, 8), folder / "images_best.pt")
        if labels is not False:
            torch.save(torch.tensor([0, 0, 1, 1]) if labels is None else labels, folder / "labels_best.pt")
        if lr is not None:
            torch.save(lr, folder / "lr_best.pt")

    return make


def attack(name: str, legacy: bool = False) -> Make:
    return pt(lambda folder: {"data": Attack(folder / MARKER)}, name, legacy)


def plain_attack(name: str) -> Make:
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Attack(folder / MARKER)))


def attack_in_npz(name: str) -> Make:
    def make(folder: Path) -> None:
        np.savez(folder / name, images=np.array([Attack(folder / MARKER)], dtype=object))

    return make


def climbing_zip(name: str) -> Make:
    """A zip file whose member would land beside the folder if it were unpacked."""

    def make(folder: Path) -> None:
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr(f"../{MARKER}", "climbed")
            archive.writestr(f"archive/../../{MARKER}", "climbed")

    return make


def climbing_tar(name: str) -> Make:
    def make(folder: Path) -> None:
        with tarfile.open(folder / name, "w") as archive:
            about = tarfile.TarInfo(f"../{MARKER}")
            about.size = 7
            archive.addfile(about, io.BytesIO(b"climbed"))

    return make


def several(*makes: Make) -> Make:
    def make(folder: Path) -> None:
        for each in makes:
            each(folder)

    return make


# ---- folders of images -----------------------------------------------------------------------------------------------


def image(path: Path, side: int = 8, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (side, side), 1).save(path)


def huge_png() -> bytes:
    """A PNG of a few bytes whose header claims 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def pictures(change: Callable[[Path], object] | None = None, names: tuple[str, str] = ("a", "b")) -> Make:
    """A distilled set as a folder, `set/<class>/<n>.png`, changed by `change(folder of the set)`."""

    def make(folder: Path) -> None:
        for name in names:
            for number in range(2):
                image(folder / "set" / name / f"{number}.png")
        if change:
            change(folder / "set")

    return make


def truncated_jpeg(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:1500])


# ---- data sets -------------------------------------------------------------------------------------------------------


def data(change: Callable[[Path], object] | None = None, side: int = 16, count: int = 3) -> Make:
    """A data set `data/own/{train,test}/{a,b}/<n>.png`, changed by `change(folder of the set)`."""

    def make(folder: Path) -> None:
        for split in ("train", "test"):
            for name in "ab":
                for number in range(count):
                    image(folder / "data" / "own" / split / name / f"{number}.png", side)
        if change:
            change(folder / "data" / "own")

    return make


def emptied(folder: Path) -> None:
    """Takes all files out of a folder and leaves it there."""
    for path in folder.iterdir():
        path.unlink()


def flat(split: Path) -> None:
    """Moves the images of a split out of their class folders."""
    for path in list(split.glob("*/*.png")):
        path.rename(split / f"{path.parent.name}{path.name}")
    for folder in list(split.iterdir()):
        if folder.is_dir():
            folder.rmdir()


def as_file(path: Path) -> None:
    """Puts a file where a folder was."""
    for inner in sorted(path.rglob("*"), reverse=True):
        inner.unlink() if inner.is_file() else inner.rmdir()
    path.rmdir()
    path.write_text("a file")


# ---- papers ----------------------------------------------------------------------------------------------------------

PAPER = cells.ROOT / "matching"
CELL = {"table": "table1", "dataset": "CIFAR-10", "method": "Random", "arch": "ConvNet", "ipc": 1,
        "label_regime": "own", "algorithm": "random-subset"}  # fmt: skip


def paper(change: Callable[[dict], object] | bytes | None = None, reported: bytes | None = None) -> Make:
    """`papers/matching/` with a changed paper.yaml (a function of its content, or other bytes) or reported.csv."""

    def make(folder: Path) -> None:
        place = folder / "papers" / "matching"
        place.mkdir(parents=True)
        content = yaml.safe_load((PAPER / "paper.yaml").read_text(encoding="utf-8"))
        if callable(change):
            change(content)
        text = change if isinstance(change, bytes) else yaml.safe_dump(content).encode()
        (place / "paper.yaml").write_bytes(text.replace(b"MARKER", str(folder / MARKER).encode()))
        (place / "reported.csv").write_bytes(reported or (PAPER / "reported.csv").read_bytes())

    return make


def without(facts: Mapping) -> dict:
    """The facts but those that are "left out"."""
    return {name: value for name, value in facts.items() if value != "left out"}


def cell(**changes: object) -> Make:
    """A paper of one cell, random images at IPC 1, with some of its fields changed."""
    return one_cell(cells=[without({**CELL, **changes})])


def one_cell(reported: bytes | None = None, **changes: object) -> Make:
    """A paper of one cell with other parts changed."""
    return paper(lambda content: content.update({"cells": [CELL], **changes}), reported)


def smoke(fields: Mapping | None = None, **changes: object) -> Make:
    """A paper of one cell whose scale smoke is changed."""

    def change(content: dict) -> None:
        content["cells"] = [{**CELL, **(fields or {})}]
        content["scales"]["smoke"] = without({**content["scales"]["smoke"], **changes})

    return paper(change)
