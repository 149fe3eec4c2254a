"""Distilled sets: load, save, look at, convert.

    distilled = load("set.safetensors")
    network_input, labels = distilled.normalised(), distilled.labels

    python -m common.distilled info set.safetensors
    python -m common.distilled grid res_CIFAR10_ConvNet_10ipc.pt out.png normalisation=cifar10
    python -m common.distilled convert logged_files/run7 images/ layout=images normalisation=cifar10
"""

import json
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common import distilled_set
from common.cli import HELP, WIDTH, HelpShown, UsageError, guard, help_text, parse
from common.datasets_table import NORMALISATION
from common.distilled_layouts import (
    FKDRecord,
    load_dc_pt,
    load_fkd,
    load_image_folder,
    load_mtt_pt,
    png,
    write_dc_pt,
    write_image_folder,
    write_mtt_pt,
)
from common.distilled_set import DistilledSet, to_uint8
from common.store import write_atomic

__all__ = ["SUFFIX", "DistilledSet", "FKDRecord", "class_grid", "described", "grid", "load", "load_dc_pt", "load_fkd",
           "load_image_folder", "load_mtt_pt", "png", "write", "write_dc_pt", "write_image_folder", "write_mtt_pt"]

GAP = 2  # px between the images of a grid
SUFFIX = {"safetensors": ".safetensors", "images": "", "dc": ".pt", "mtt": ""}  # of what `write` makes, by layout


def load(path: str | Path, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
         classes: Sequence[str] | None = None, experiment: int = 0) -> DistilledSet:
    """Whatever is found at `path`: our .safetensors, a DC or MTT .pt, an MTT folder, a folder of images.

    mean, std, classes, experiment: for layouts that do not say (`load_dc_pt` and its neighbours); .pt files need mean
    and std. ValueError for what cannot be read, FileNotFoundError for nothing there.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no distilled set at {path}")
    mtt = (path / "images_best.pt").exists() or (path.suffix == ".pt" and path.name.startswith("images_"))
    if mtt or path.suffix == ".pt":
        if mean is None or std is None:
            known = ", ".join(NORMALISATION)
            raise ValueError(
                f"{path} does not say how its images were normalised: give mean and std, on the command line "
                f"normalisation= (one of {known})"
            )
        if mtt:
            return load_mtt_pt(path, mean, std, classes=classes)
        return load_dc_pt(path, mean, std, classes=classes, experiment=experiment)
    if path.is_dir():
        constants = {} if mean is None or std is None else {"mean": mean, "std": std}
        return load_image_folder(path, **constants, classes=classes)
    if path.suffix == ".safetensors":
        return distilled_set.read(path)
    raise ValueError(f"{path} is not a known layout: .safetensors, .pt, or a folder of images or of images_best.pt")


def write(distilled: DistilledSet, path: str | Path, layout: str = "safetensors", *,
          whiten: Callable[[Tensor], Tensor] | None = None) -> None:
    """Writes a set in a layout of `SUFFIX`: a file, or a folder for images and mtt. Only safetensors keeps all of it.

    whiten: for a set distilled under ZCA in the mtt layout (`write_mtt_pt`). ValueError for what a layout cannot hold.
    """
    if layout == "mtt":
        write_mtt_pt(distilled, path, whiten)
        return
    writers = {"safetensors": DistilledSet.save, "images": write_image_folder, "dc": write_dc_pt}
    if layout not in writers:
        raise ValueError(f"layout={layout!r} is unknown; allowed: {', '.join(SUFFIX)}")
    writers[layout](distilled, path)


def grid(images: Tensor, columns: int) -> bytes:
    """A PNG of images [M, C, H, W], uint8 or floats on the [0, 1] scale, `columns` in a row, 2 px of white between."""
    if images.ndim != 4 or images.shape[0] == 0 or columns < 1:
        raise ValueError(f"a grid needs images [M, C, H, W], columns above 0; not {list(images.shape)}, {columns}")
    pixels = images.cpu() if images.dtype == torch.uint8 else to_uint8(images.cpu())
    count, channels, height, width = pixels.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    height, width = height + GAP, width + GAP
    canvas = torch.full((channels, rows * height - GAP, columns * width - GAP), 255, dtype=torch.uint8)
    for position, image in enumerate(pixels):
        top, left = position // columns * height, position % columns * width
        canvas[:, top:top + height - GAP, left:left + width - GAP] = image
    return png(canvas)


def class_grid(images: Tensor, labels: Tensor, most: int = 10) -> bytes:
    """A PNG with a row for each of the first ten classes, at most `most` images; a class of fewer leaves its row open.

    images as of `grid`, labels int64 [M].
    """
    labels = labels.cpu()
    shown = [(labels == k).nonzero().flatten()[:most] for k in range(min(10, int(labels.max()) + 1))]
    columns, white = max(map(len, shown)), 255 if images.dtype == torch.uint8 else 1.0
    found = [images[own.to(images.device)].cpu() for own in shown]
    rows = [F.pad(own, (0, 0) * 3 + (0, columns - len(own)), value=white) for own in found]
    return grid(torch.cat(rows), columns)


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    layout: str = field(default="safetensors", metadata={
        "help": "what convert writes", "choices": tuple(SUFFIX)})
    normalisation: str = field(default="auto", metadata={
        "help": "mean and std of files that do not say", "choices": ("auto", *NORMALISATION)})
    experiment: int = field(default=0, metadata={"help": "which set of a DC file", "minimum": 0})
    columns: int = field(default=10, metadata={"help": "width of the grid", "unit": "images", "minimum": 1})


def described(distilled: DistilledSet) -> str:
    """Lines of at most 100 columns: shapes, ranges, classes, what is there beside the images, settings, sha256."""
    images, counts = distilled.images, distilled.labels.bincount(minlength=len(distilled.classes))
    soft, weights = distilled.soft_labels, distilled.weights
    each = str(counts.min().item()) if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    facts = {
        "images": f"float32 {list(images.shape)}, pixels {images.min():.3f} to {images.max():.3f}",
        **_space(distilled),
        "classes": f"{len(distilled.classes)}, images of each: {each}; "
                   + ", ".join(distilled.classes[:10]) + (", ..." if len(distilled.classes) > 10 else ""),
        "soft labels": "none" if soft is None else f"{str(soft.dtype)[6:]} {list(soft.shape)}",
        "weights": "none" if weights is None else f"{weights.min():.4g} to {weights.max():.4g}",
        "student lr": distilled.student_lr or "none",
        "sha256": distilled.fingerprint(),
        "settings": "" if distilled.settings else "none",
        **{f"  {name}": json.dumps(value).strip('"') for name, value in distilled.settings.items()},
    }
    width = 2 + max(map(len, facts))
    wrapper = textwrap.TextWrapper(WIDTH, subsequent_indent=" " * width, break_on_hyphens=False)
    return "\n".join(wrapper.fill(f"{name:<{width}}{value}").rstrip() for name, value in facts.items())


def _space(distilled: DistilledSet) -> dict[str, str]:
    """A line on what networks are fed."""
    if distilled.whitening is None:
        return {"normalised": f"mean {distilled.mean}, std {distilled.std}"}
    return {"whitened": f"{json.dumps(distilled.whitening)}: networks are fed ZCA.fit(training images)(images)"}


def lost(distilled: DistilledSet, layout: str) -> list[str]:
    """What of a set a layout does not keep, besides its settings."""
    if layout == "safetensors":
        return []
    words = []
    if layout == "images":
        if outside := ((distilled.images < 0) | (distilled.images > 1)).double().mean().item():
            words.append(f"values outside [0, 1], {100 * outside:.1f} % of all: cut")
        words.append("more than 8 bits of a pixel")
    else:
        words.append("mean and std: to be given when it is read, as by normalisation=")
    if layout != "mtt":
        words += ["soft labels"] * (distilled.soft_labels is not None)
        words += ["the learned learning rate"] * (distilled.student_lr is not None)
    if layout != "images":
        words += ["weights"] * (distilled.weights is not None)
    return words


def main(argv: list[str]) -> None:
    """`info FILE`, `grid FILE OUT.png`, `convert FILE OUT`, each with key=value options."""
    places = {"info": 1, "grid": 2, "convert": 2}
    prog = "python -m common.distilled info FILE | grid FILE OUT.png | convert FILE OUT"
    purpose = "Describes, draws or converts a distilled set in any known layout."
    if not argv or any(argument in HELP for argument in argv):
        print(help_text(Options, prog=prog, description=purpose))
        raise HelpShown
    action, rest = argv[0], argv[1:]
    if action not in places:
        raise UsageError(f"unknown action '{action}'; allowed: {', '.join(places)}")
    if len(rest) < places[action]:
        raise UsageError(f"{action} needs {'FILE' if places[action] == 1 else 'FILE and OUT'}")
    for path in rest[:places[action]]:
        if "=" in path and not Path(path).exists():
            needs = "FILE" if places[action] == 1 else "FILE and OUT"
            raise UsageError(f"{path} stands where a path belongs; {action} needs {needs}")
    paths, options = rest[:places[action]], parse(Options, rest[places[action]:], prog=prog, description=purpose)
    mean, std = NORMALISATION.get(options.normalisation, (None, None))
    distilled = load(paths[0], mean=mean, std=std, experiment=options.experiment)
    if action == "info":
        print(described(distilled))
    elif action == "grid":
        if Path(paths[1]).suffix != ".png":
            raise UsageError(f"grid writes a PNG; {paths[1]} must end in .png")
        write_atomic(paths[1], grid(distilled.images, options.columns))
        print(f"picture: {paths[1]}")
    else:
        belongs = {".safetensors": "safetensors", ".pt": "dc"}.get(Path(paths[1]).suffix, options.layout)
        if belongs != options.layout:
            raise UsageError(f"{paths[1]} is the name of a file of layout={belongs}, not of layout={options.layout}")
        if Path(paths[1]).suffix != SUFFIX[options.layout] and SUFFIX[options.layout]:
            raise UsageError(f"layout={options.layout} is a file; {paths[1]} must end in {SUFFIX[options.layout]}")
        if distilled.whitening is not None and options.layout in ("dc", "mtt"):
            raise UsageError(
                f"{paths[0]} was distilled under ZCA; layout={options.layout} holds what networks are fed, which takes "
                "its training images; allowed here: safetensors, images; from Python: "
                "write(distilled, path, 'mtt', whiten=ZCA.fit(training images))"
            )
        write(distilled, paths[1], options.layout)
        print(f"written: {paths[1]}")
        if words := lost(distilled, options.layout):
            print("\n  ".join([f"not kept by layout={options.layout}:", *words]))


if __name__ == "__main__":
    sys.exit(guard(main, sys.argv[1:]))
