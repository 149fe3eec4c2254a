"""Real data sets by name, as uint8 tensors that live on the device.

    train = load("imagenette", "~/data", split="train")      # Dataset: images uint8 [N, C, H, W], labels int64 [N]
    views = train.to("cuda").center(128, range(100))          # uint8 [100, 3, 128, 128]
    python -m common.datasets check imagenette data=~/data    # what is there, and what is wrong with it

Sets that do not fit into memory (imagenet-1k, imagenet-21k, own sets over 8 GB) come as a `Stream`. Files are read from
`root/<name>/`: an ImageFolder tree (train/ and test/ or val/, one folder per class) works for every name; cifar10,
cifar100 and svhn are also read as torchvision stores them, tiny-imagenet in its four usual layouts.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional

from common import datasets_decode as decoding
from common import datasets_files as files
from common.datasets_stream import Stream, class_positions
from common.datasets_table import INFO, NORMALISATION, DataInfo

SPLITS = ("train", "test")
SHORT_SIDE = 256  # px; resizing to it and cropping 224 is the usual test view of ImageNet-size images
RESIDENT_BYTES = 8 * 2**30
CHUNK = 256  # images resized at a time
TORCHVISION = {  # name -> class of torchvision.datasets, and the file or folder it keeps
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "svhn": ("SVHN", "{split}_32x32.mat"),
}


class _Tensors(NamedTuple):
    """A set that is read as tensors: images uint8 [N, C, H, W], labels int64 [N]."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    note: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set in memory.

    images: uint8 [N, C, H, W]. Where the images differ in size, a canvas: image i fills the top left sizes[i] pixels.
    labels: int64 [N], positions in `classes`. classes: names, in the order of the sorted class folders.
    mean, std: per channel, on the [0, 1] scale. sizes: int64 [N, 2], height and width in px; None when all are H x W.
    fingerprint: sha256 over pixels, labels and sizes. note: edition and layout, to be said beside results.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sizes: torch.Tensor | None
    fingerprint: str
    note: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def short_side(self) -> int:
        """The shorter side in px, the median where the images differ."""
        if self.sizes is None:
            return min(self.images.shape[-2:])
        return int(self.sizes.min(1).values.median())

    def to(self, device: torch.device | str) -> Dataset:
        """The same set with its tensors on `device`."""
        sizes = None if self.sizes is None else self.sizes.to(device)
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), sizes=sizes)

    def subset(self, indices: torch.Tensor | Sequence[int]) -> Dataset:
        """The images at `indices` (int [B]), in that order; classes and their numbering stay."""
        rows = self._rows(indices)
        digest = hashlib.sha256(f"{self.fingerprint}{rows.tolist()}".encode()).hexdigest()
        sizes = None if self.sizes is None else self.sizes[rows]
        return replace(self, images=self.images[rows], labels=self.labels[rows], sizes=sizes, fingerprint=digest)

    def class_indices(self, label: int) -> torch.Tensor:
        """int64 [n_k]: the positions of the images of class `label`, ascending."""
        return class_positions(self, label)

    def center(
        self, size: int, indices: torch.Tensor | Sequence[int] | None = None, *, shorter: int | None = None
    ) -> torch.Tensor:
        """Test views uint8 [B, C, size, size] of the images at `indices` (all by default), on the device of the set.

        Images that are size x size already stay as they are. Images with a shorter side over 64 px are resized
        (antialiased bilinear, shorter side to round(size * 8 / 7): 256 for 224) and centre-cropped; smaller ones are
        resized to size x size without a crop. `shorter` sets the side before the crop for any image: 256 at size 224
        is what WMDD does to Tiny-ImageNet. On a CPU the pixels are torchvision's; elsewhere they differ by 1 at most.
        """
        rows = self._rows(torch.arange(len(self)) if indices is None else indices)
        out = self.images.new_empty(len(rows), self.images.shape[1], size, size)
        if self.sizes is None:
            groups = [(tuple(self.images.shape[-2:]), torch.arange(len(rows), device=rows.device))]
        else:
            unique, group = self.sizes[rows].unique(dim=0, return_inverse=True)
            groups = [(tuple(unique[i].tolist()), (group == i).nonzero().squeeze(1)) for i in range(len(unique))]
        for (height, width), places in groups:
            for chunk in places.split(CHUNK):
                images = self.images[:, :, :height, :width][rows[chunk]]
                out[chunk] = _center_view(images, size, shorter)
        return out

    def _rows(self, indices: torch.Tensor | Sequence[int]) -> torch.Tensor:
        rows = torch.as_tensor(indices, device=self.labels.device)
        if rows.dtype == torch.bool:
            raise ValueError("indices are positions (integers), not a mask: pass mask.nonzero().squeeze(1)")
        return rows.to(torch.int64)


def _center_view(images: torch.Tensor, size: int, shorter: int | None) -> torch.Tensor:
    """`Dataset.center` for images uint8 [B, C, H, W] of one size."""
    height, width = images.shape[-2:]
    new_height, new_width, top, left = decoding.center_sides(height, width, size, shorter)
    if (new_height, new_width) != (height, width):
        if images.device.type != "cpu":  # only CPUs resize uint8, and about ten times as fast as float32
            images = images.float()
        images = functional.interpolate(images, (new_height, new_width), mode="bilinear", antialias=True)
        images = images.round().clamp(0, 255).to(torch.uint8)
    return images[:, :, top : top + size, left : left + size]


def info(name: str) -> DataInfo:
    """What is known about a set without its files; ValueError for a name that is not in the table."""
    if name not in INFO:
        raise ValueError(f"unknown data set '{name}': known are {', '.join(INFO)}")
    return INFO[name]


def load(
    name: str,
    root: str | Path | None = None,
    *,
    split: str = "train",
    channels: int = 3,
    native_short_side: int | None = None,
    normalisation: str = "imagenet",
    cache: str | Path | None = None,
    bad_share: float = decoding.BAD_SHARE,
    resident_bytes: int = RESIDENT_BYTES,
    download: bool = False,
) -> Dataset | Stream:
    """Load one split of a data set.

    name: one of `INFO`, or the name of any ImageFolder tree under `root`.
    root: the folder that holds the sets; by default the environment variable DD_DATA.
    split: "train" or "test" (where there is only a val folder, it is the test split).
    channels: 3 (grey images are repeated) or 1 (colour images become grey, mean and std their averages).
    native_short_side: larger images are resized to this shorter side when decoded (px; default 256). Images longer
        than 2:1 are centre-cropped to 2:1.
    normalisation: a row of `NORMALISATION`; WMDD and RDED use ImageNet's constants for every set.
    cache: a folder that keeps the decoded images, so that the next load maps them instead of decoding.
    bad_share: unreadable images are named, counted and left out up to this share of the set; the default 0.001
        means that sets under 1,000 images tolerate none.
    resident_bytes: sets whose decoded images take more come as a `Stream`.
    download: let torchvision fetch cifar10, cifar100 or svhn where they are missing.

    Raises ValueError (an argument; a half-unpacked or unreadable set) and FileNotFoundError (nothing there: what was
    looked for, and how to get it).
    """
    _check_arguments(split, channels, native_short_side, normalisation)
    mean, std = NORMALISATION[normalisation]
    if channels == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    if name == "digits":
        return _dataset(name, _digits(split), channels, mean, std)
    root = root_folder(name, root)
    found = _torchvision(name, root, split, download) if name in TORCHVISION else None
    if found is not None:
        return _dataset(name, found, channels, mean, std)
    listing = files.find(name, root, split)
    odd = files.odd_count(name, listing, split)
    if odd:
        warnings.warn(odd, stacklevel=2)
    short_side = SHORT_SIDE if native_short_side is None else native_short_side
    if name in INFO and INFO[name].streamed:
        resident_bytes = 0
    decoded = _decoded(f"{name}-{split}", listing, channels, short_side, cache, resident_bytes)
    if decoded is None:
        return Stream.of(name, listing, channels, mean, std, bad_share)
    decoding.report_bad(decoded.bad, len(listing.items), bad_share)
    facts = (_sides(decoded), f"{len(decoded.labels)} images", listing.kinds())
    note = ", ".join([*filter(None, facts), f"layout {listing.layout} in {listing.folder.name}/"])
    return Dataset(
        name, decoded.images, decoded.labels, listing.classes, mean, std, decoded.sizes, decoded.fingerprint, note
    )


def _decoded(
    label: str, listing: files.Listing, channels: int, short_side: int, cache: str | Path | None, resident_bytes: int
) -> decoding.Decoded | None:
    """The images of a listing from the cache or its files; None where they take more than `resident_bytes`."""
    if resident_bytes == 0:
        return None
    entry = decoding.cache_entry(Path(cache).expanduser(), label, listing, channels, short_side) if cache else None
    decoded = decoding.read_cache(entry) if entry else None
    if decoded is None:
        sizes, bad = decoding.measure(listing, short_side)
        if math.prod(decoding.canvas_shape(sizes, channels)) > resident_bytes:
            return None
        decoded = decoding.decode_all(listing, sizes, bad, channels, short_side)
        if entry:
            decoding.write_cache(entry, decoded)
    return decoded if decoded.images.numel() <= resident_bytes else None


def _check_arguments(split: str, channels: int, native_short_side: int | None, normalisation: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}': allowed are {', '.join(SPLITS)}")
    if channels not in (1, 3):
        raise ValueError(f"channels={channels} is not possible: allowed are 1 and 3")
    if native_short_side is not None and native_short_side < 1:
        raise ValueError(f"native_short_side={native_short_side} is not possible: allowed are sizes from 1 px")
    if normalisation not in NORMALISATION:
        raise ValueError(f"unknown normalisation '{normalisation}': allowed are {', '.join(NORMALISATION)}")


def root_folder(name: str, root: str | Path | None) -> Path:
    """The folder of all sets: the argument, else DD_DATA."""
    root = root or os.environ.get("DD_DATA")
    if not root:
        raise FileNotFoundError(
            f"data set '{name}' needs a root folder: pass data=FOLDER or set DD_DATA; {files.advice(name)}"
        )
    return Path(root).expanduser()


def _digits(split: str) -> _Tensors:
    """scikit-learn's 8x8 digits at 32x32 px; the first 36 of a seeded order of each class are the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    scans = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)  # [1797, 1, 8, 8]
    images = functional.interpolate(scans, (32, 32), mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for label in range(10):
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        rows.append(members[:36] if split == "test" else members[36:])
    chosen = torch.cat(rows).sort().values
    note = "embedded in scikit-learn, 8x8 scans resized to 32x32"
    return _Tensors(images[chosen], labels[chosen], tuple("0123456789"), note)


def _dataset(name: str, found: _Tensors, channels: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Dataset:
    """The `Dataset` of a set that is read as tensors, with the channels asked for (grey: ITU-R 601, as Pillow does)."""
    images = found.images
    if images.shape[1] < channels:
        images = images.repeat(1, channels, 1, 1)
    elif images.shape[1] > channels:
        luma = torch.tensor([0.299, 0.587, 0.114])
        images = torch.cat([(block * luma[:, None, None]).sum(1, keepdim=True) for block in images.split(CHUNK)])
        images = images.round().to(torch.uint8)
    mark = decoding.fingerprint(images, found.labels, None)
    return Dataset(name, images, found.labels, found.classes, mean, std, None, mark, found.note)


def torchvision_folder(name: str, root: Path, split: str) -> Path | None:
    """Where torchvision's files of a set lie: root/<name>/ or root/; None where they do not."""
    if name not in TORCHVISION:
        return None
    stored = TORCHVISION[name][1].format(split=split)
    return next((folder for folder in (root / name, root) if (folder / stored).exists()), None)


def _torchvision(name: str, root: Path, split: str, download: bool) -> _Tensors | None:
    """A set as torchvision stores it, in root/<name>/ or root/; None where it is not there and not to be fetched."""
    import torchvision

    kind, stored = TORCHVISION[name]
    folder = torchvision_folder(name, root, split)
    if folder is None and (not download or (root / name / "train").is_dir()):
        return None
    folder = folder or root / name
    which = {"split": split} if name == "svhn" else {"train": split == "train"}
    try:
        loaded = getattr(torchvision.datasets, kind)(str(folder), download=download, **which)
    except RuntimeError as error:  # torchvision compares checksums before it reads anything
        raise ValueError(f"{folder / stored.format(split=split)} is incomplete or damaged: {error}") from error
    pixels = torch.from_numpy(loaded.data)
    images = pixels if name == "svhn" else pixels.permute(0, 3, 1, 2).contiguous()  # [N, C, H, W]
    labels = torch.as_tensor(loaded.labels if name == "svhn" else loaded.targets, dtype=torch.int64)
    classes = tuple("0123456789") if name == "svhn" else tuple(loaded.classes)
    return _Tensors(images, labels, classes, f"32 x 32 px, {len(labels)} images, torchvision files in {folder.name}/")


def _sides(decoded: decoding.Decoded) -> str:
    """The size of the images in words, e.g. "shorter side 160 px"."""
    if decoded.sizes is None:
        return "{} x {} px".format(*decoded.images.shape[2:])
    short = decoded.sizes.min(dim=1).values
    low, high = int(short.min()), int(short.max())
    return f"shorter side {low} px" if low == high else f"shorter side {low} to {high} px"


if __name__ == "__main__":
    from common import cli, doctor

    sys.exit(cli.guard(doctor.main, sys.argv[1:]))
