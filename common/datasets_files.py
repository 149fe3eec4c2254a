"""Find the image files of a data set: every folder layout that people have, read into one `Listing`.

Nothing is decoded here. `find(name, root, split)` returns the files of one split in a fixed order (classes by their
sorted names, files by name within a class), so that the same files give the same indices anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

from common.datasets_table import INFO

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")
FOLDERS = {  # name -> folder names under the root, the first that exists is used
    "cifar10": ("cifar10", "cifar-10"),
    "cifar100": ("cifar100", "cifar-100"),
    "tiny-imagenet": ("tiny-imagenet", "tiny-imagenet-200", "tiny_imagenet", "tiny_imagenet_200"),
    "imagenette": ("imagenette", "imagenette2", "imagenette2-320", "imagenette2-160"),
    "imagewoof": ("imagewoof", "imagewoof2", "imagewoof2-320", "imagewoof2-160"),
    "imagenet-1k": ("imagenet-1k", "imagenet1k", "imagenet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC"),
    "imagenet-21k": ("imagenet-21k", "imagenet21k", "imagenet21k_resized"),
}
TRAIN_FOLDERS = ("train", "training", "imagenet21k_train")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation", "imagenet21k_val")
VAL_FIRST = ("tiny-imagenet", "imagenet-1k", "imagenet-21k")  # their published `test` folders carry no labels
ANNOTATIONS = "val_annotations.txt"
PARQUET = "parquet"


@dataclass(frozen=True, eq=False)
class Listing:
    """The images of one split, undecoded. `items` are file paths (str), or encoded image bytes (parquet dumps)."""

    folder: Path
    layout: str
    classes: tuple[str, ...]
    items: Sequence[str | bytes]
    labels: torch.Tensor  # int64 [N]

    def kinds(self) -> str:
        """The kinds of files in words, e.g. "JPEG files"; empty for encoded bytes, whose kind is not looked at."""
        suffixes = {Path(item).suffix.lower().lstrip(".") for item in self.items if isinstance(item, str)}
        names = sorted({"JPEG" if s in ("jpg", "jpeg") else s.upper() for s in suffixes})
        return f"{' and '.join(names)} files" if names else ""

    def identity(self) -> list[tuple[str, int, int]]:
        """(name relative to the set, bytes, modification time in ns) per image; changes whenever a file does."""
        rows = []
        for position, item in enumerate(self.items):
            if isinstance(item, bytes):
                rows.append((str(position), len(item), 0))
            else:
                stat = os.stat(item)
                rows.append((os.path.relpath(item, self.folder), stat.st_size, stat.st_mtime_ns))
        return rows


def set_folder(name: str, root: Path) -> Path:
    """The folder of set `name` under `root`; FileNotFoundError says where it was looked for and how to get it.

    ValueError for a name that is a path: it also names files that are written.
    """
    if not name or name in (".", "..") or Path(name).name != name:
        raise ValueError(f"data set '{name}' must be the plain name of a folder, without a path")
    candidates = [root / folder for folder in FOLDERS.get(name, (name,))]
    for folder in candidates:
        if folder.is_dir():
            return folder
    looked = ", ".join(str(folder) for folder in candidates)
    raise FileNotFoundError(f"data set '{name}' is not there: looked for {looked}; {advice(name)}")


def advice(name: str) -> str:
    """How to get a set."""
    if name in INFO:
        return INFO[name].source
    near = get_close_matches(name, INFO, 1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    return f"{meant}put train/<class>/<image> and test/<class>/<image> there; known by name are {', '.join(INFO)}"


def find(name: str, root: Path, split: str) -> Listing:
    """List one split ("train" or "test") of the image-file set `name` under `root`.

    Raises FileNotFoundError (set or split missing) or ValueError (half-unpacked: classes missing or without images).
    """
    folder = set_folder(name, root)
    listing = list_split(name, folder, split)
    found = problems(name, listing, train_classes(name, folder, listing))
    if found:
        raise ValueError(found[0])
    return listing


def train_classes(name: str, folder: Path, listing: Listing) -> tuple[str, ...]:
    """Classes of the training split that belongs to `listing` (a parquet dump names them all in each of its files)."""
    if listing.layout == PARQUET:
        return listing.classes
    return tuple(class_folders(split_folder(name, folder, "train")))


def list_split(name: str, folder: Path, split: str) -> Listing:
    """List a split of the set in `folder`, in whichever layout it has, without judging its completeness."""
    parquet = parquet_files(folder, split)
    return _list_parquet(folder, parquet) if parquet else list_tree(split_folder(name, folder, split))


def problems(name: str, listing: Listing, classes: Sequence[str]) -> list[str]:
    """What makes a split unusable: empty classes, classes unlike `classes` (the training split's) or the published."""
    found = []
    empty = [label for label, count in zip(listing.classes, counts(listing), strict=True) if count == 0]
    if empty:
        found.append(f"{listing.folder}: no images in class folder {_some(empty)}: the set is half-unpacked")
    if listing.classes != tuple(classes):
        missing = sorted(set(classes) - set(listing.classes))
        extra = sorted(set(listing.classes) - set(classes))
        found.append(
            f"{listing.folder}: its classes differ from those of the training split (missing: {_some(missing)}; "
            f"only here: {_some(extra)}): the set is half-unpacked"
        )
    known = INFO.get(name)
    if known and (len(listing.classes) != known.classes or (known.folders and known.folders != listing.classes)):
        missing = sorted(set(known.folders) - set(listing.classes))
        found.append(
            f"{listing.folder} has {len(listing.classes)} classes and {name} has {known.classes}"
            f"{f' (missing: {_some(missing)})' if missing else ''}: half-unpacked, or another set"
        )
    return found


def odd_count(name: str, listing: Listing, split: str) -> str | None:
    """A sentence when the number of images is none of the published ones, else None."""
    published = {pair[split == "test"] for pair in INFO[name].counts.values()} if name in INFO else {len(listing.items)}
    if len(listing.items) in published:
        return None
    numbers = " or ".join(f"{number:,}" for number in sorted(published))
    return (
        f"{listing.folder} has {len(listing.items):,} images, {name} has {numbers}: half-unpacked, or another edition"
    )


def split_folder(name: str, folder: Path, split: str) -> Path:
    """The folder of a split, under any of the names in use; FileNotFoundError lists what was looked for."""
    names = TRAIN_FOLDERS if split == "train" else TEST_FOLDERS
    if split == "test" and name in VAL_FIRST:
        names = sorted(names, key=lambda label: "val" not in label)
    for label in names:
        if (folder / label).is_dir():
            return folder / label
    present = sorted(entry.name for entry in folder.iterdir()) or ["nothing"]
    raise FileNotFoundError(
        f"{folder} has no {split} split: looked for {', '.join(names)}, found {_some(present)}: "
        "the set is half-unpacked or of another layout"
    )


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the class folders (hidden ones left out); WordNet ids sort in ascending order."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def counts(listing: Listing) -> list[int]:
    """Images per class, in class order."""
    return torch.bincount(listing.labels, minlength=len(listing.classes)).tolist()


def other_files(listing: Listing) -> list[str]:
    """Files beside the images that are not read as images."""
    folders = sorted({os.path.dirname(item) for item in listing.items if isinstance(item, str)})
    entries = [entry for folder in folders for entry in os.scandir(folder) if entry.is_file()]
    return sorted(entry.path for entry in entries if not _is_image(entry.name))


def list_tree(folder: Path) -> Listing:
    """List `<class>/*`, `<class>/images/*`, or the flat Tiny-ImageNet `images/*` with its annotation file."""
    if (folder / ANNOTATIONS).is_file() and (folder / "images").is_dir() and class_folders(folder) == ["images"]:
        return _list_annotated(folder)
    classes = class_folders(folder)
    if not classes:
        flat = len(_images_in(folder))
        what = f"{flat} images that no class folder holds" if flat else "neither class folders nor images"
        raise ValueError(f"{folder} holds {what}; expected one folder per class: <class>/<image>")
    items: list[str] = []
    labels: list[int] = []
    nested = False
    for label, name in enumerate(classes):
        files = _images_in(folder / name)
        if not files and (folder / name / "images").is_dir():
            files, nested = _images_in(folder / name / "images"), True
        items += files
        labels += [label] * len(files)
    layout = "<class>/images/<image>" if nested else "<class>/<image>"
    return Listing(folder, layout, tuple(classes), items, torch.tensor(labels, dtype=torch.int64))


def _images_in(folder: Path) -> list[str]:
    """Sorted paths of the images directly in a folder."""
    return sorted(entry.path for entry in os.scandir(folder) if _is_image(entry.name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _list_annotated(folder: Path) -> Listing:
    """Tiny-ImageNet as published: val/images/<image>, with name and WordNet id in the rows of val_annotations.txt."""
    lines = (folder / ANNOTATIONS).read_text(encoding="utf-8").splitlines()
    class_of = dict(line.split("\t")[:2] for line in lines if line.count("\t"))
    classes = sorted(set(class_of.values()))
    position = {name: label for label, name in enumerate(classes)}
    files = _images_in(folder / "images")
    unnamed = [os.path.basename(file) for file in files if os.path.basename(file) not in class_of]
    if unnamed:
        raise ValueError(f"{folder / ANNOTATIONS} gives no class for {_some(unnamed)}")
    pairs = sorted((position[class_of[os.path.basename(file)]], file) for file in files)
    labels = torch.tensor([label for label, _ in pairs], dtype=torch.int64)
    return Listing(folder, f"images/<image> + {ANNOTATIONS}", tuple(classes), [file for _, file in pairs], labels)


def parquet_files(folder: Path, split: str) -> list[Path]:
    """Parquet files of a split: `data/train-*.parquet`, `valid*.parquet` and the like; empty where there are none."""
    names = TRAIN_FOLDERS if split == "train" else tuple(sorted(TEST_FOLDERS, key=lambda label: "val" not in label))
    for name in names:
        found = sorted({*folder.glob(f"{name}*.parquet"), *folder.glob(f"data/{name}*.parquet")})
        if found:
            return found
    return []


def _list_parquet(folder: Path, files: list[Path]) -> Listing:
    """A dump with columns `image` (struct with `bytes`) and `label` (integer, or class name)."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{files[0]} is a parquet dump and reading it needs pyarrow: pip install pyarrow") from error
    encoded: list[bytes] = []
    raw: list[int | str] = []
    names: list[str] | None = None
    for file in files:
        table = parquet.read_table(file)
        missing = {"image", "label"} - set(table.column_names)
        if missing:
            raise ValueError(f"{file} has no column {_some(sorted(missing))}; found {_some(table.column_names)}")
        encoded += [row["bytes"] if isinstance(row, dict) else row for row in table.column("image").to_pylist()]
        raw += table.column("label").to_pylist()
        about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        names = names or about.get("info", {}).get("features", {}).get("label", {}).get("names")
    width = len(str(max((value for value in raw if isinstance(value, int)), default=0)))
    given = [value if isinstance(value, str) else names[value] if names else f"{value:0{width}d}" for value in raw]
    classes = sorted(names) if names else sorted(set(given))
    position = {name: label for label, name in enumerate(classes)}
    order = sorted(range(len(given)), key=lambda row: (position[given[row]], row))
    labels = torch.tensor([position[given[row]] for row in order], dtype=torch.int64)
    return Listing(folder, PARQUET, tuple(classes), [encoded[row] for row in order], labels)


def _some(names: Sequence[str], most: int = 5) -> str:
    """Up to `most` names and how many more there are; "none" for an empty list."""
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
