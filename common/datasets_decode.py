"""Decode image files into one uint8 canvas with a thread pool, and keep the decoded canvas in a cache folder."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from common.datasets_files import Listing
from common.hardware import own_cpus

MAX_ASPECT = 2  # longer images are centre-cropped to 2:1, so that one panorama does not blow up the canvas
SMALL = 64  # px; images up to this side are stretched to a test view, larger ones resized and cropped
BAD_SHARE = 0.001
HOUR = 3600  # s
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for broken files

Size = tuple[int, int]  # height, width in px


class Decoded(NamedTuple):
    """The readable images of a listing, and {name: reason} of the unreadable ones.

    images uint8 [N, C, H, W], labels int64 [N], sizes int64 [N, 2] or None where all are H x W, fingerprint sha256.
    """

    images: torch.Tensor
    labels: torch.Tensor
    sizes: torch.Tensor | None
    fingerprint: str
    bad: dict[str, str]


def open_image(item: str | bytes) -> Image.Image:
    """Open a file or encoded bytes; only the header is read."""
    return Image.open(io.BytesIO(item) if isinstance(item, bytes) else item)


def read_image(item: str | bytes, channels: int) -> Image.Image:
    """Decode a file or encoded bytes to RGB (channels 3) or grey (1); one of `UNREADABLE` for a broken one."""
    with open_image(item) as image:
        return image.convert("RGB" if channels == 3 else "L")


def center_sides(height: int, width: int, size: int, shorter: int | None = None) -> tuple[int, int, int, int]:
    """(new height, new width, top, left) in px of a test view: resize to the first two, then crop from the others.

    The shorter side becomes `shorter`; by default round(size * 8 / 7) (256 for 224), except that images of at most
    64 px are stretched to size x size and images of size x size stay. Roundings are torchvision's (Resize, CenterCrop).
    """
    short = min(height, width)
    if shorter is None and (short <= SMALL or height == width == size):
        return size, size, 0, 0
    shorter = round(size * 8 / 7) if shorter is None else shorter
    if shorter < size:
        raise ValueError(f"a shorter side of {shorter} px cannot hold a crop of {size} px")
    height, width = _shrink((height, width), shorter)
    return height, width, round((height - size) / 2), round((width - size) / 2)


def _shrink(size: Size, shorter: int) -> Size:
    """`size` scaled to a shorter side of `shorter` px, the longer one rounded down as torchvision does."""
    short = min(size)
    height, width = (shorter if side == short else int(shorter * side / short) for side in size)
    return height, width


def _cropped(size: Size) -> Size:
    """`size` cut to an aspect ratio of at most 2:1."""
    height, width = (min(side, MAX_ASPECT * min(size)) for side in size)
    return height, width


def stored_size(size: Size, short_side: int) -> Size:
    """The size an image is stored at: at most 2:1, the shorter side at most `short_side` px."""
    size = _cropped(size)
    return _shrink(size, short_side) if min(size) > short_side else size


def decode(item: str | bytes, channels: int, short_side: int) -> np.ndarray:
    """One image as uint8 [h, w, C] at `stored_size`, resized with antialiased bilinear filtering."""
    image = read_image(item, channels)
    full = (image.height, image.width)
    height, width = _cropped(full)
    stored = stored_size(full, short_side)
    top, left = (image.height - height) // 2, (image.width - width) // 2
    box = (left, top, left + width, top + height)
    if stored == (height, width):
        image = image.crop(box)
    else:
        image = image.resize((stored[1], stored[0]), Image.BILINEAR, box=box)
    return np.asarray(image).reshape(*stored, channels)


def measure(listing: Listing, short_side: int) -> tuple[list[Size | None], dict[str, str]]:
    """Stored size of every image from its header (None where unreadable), and {name: reason} of the unreadable ones."""
    bad: dict[str, str] = {}

    def size(position: int) -> Size | None:
        item = listing.items[position]
        try:
            with open_image(item) as image:
                return stored_size((image.height, image.width), short_side)
        except UNREADABLE as error:
            bad[name_of(item, position)] = reason(error)
            return None

    with ThreadPoolExecutor(_threads()) as pool:
        return list(pool.map(size, range(len(listing.items)))), bad


def canvas_shape(sizes: Sequence[Size | None], channels: int) -> tuple[int, int, int, int]:
    """[N, C, H, W] of the canvas that holds images of these sizes."""
    known = [size for size in sizes if size] or [(1, 1)]
    return len(sizes), channels, max(size[0] for size in known), max(size[1] for size in known)


def decode_all(
    listing: Listing, sizes: Sequence[Size | None], bad: dict[str, str], channels: int, short_side: int
) -> Decoded:
    """Decode a listing into a canvas of zeros, each image at the top left; `sizes` and `bad` come from `measure`."""
    canvas, bad = np.zeros(canvas_shape(sizes, channels), np.uint8), dict(bad)

    def fill(position: int) -> bool:
        item = listing.items[position]
        if sizes[position] is None:
            return False
        try:
            pixels = decode(item, channels, short_side)  # [h, w, C]
        except UNREADABLE as error:
            bad[name_of(item, position)] = reason(error)
            return False
        canvas[position, :, : pixels.shape[0], : pixels.shape[1]] = pixels.transpose(2, 0, 1)
        return True

    with ThreadPoolExecutor(_threads()) as pool:
        good = list(pool.map(fill, range(len(sizes))))
    read = [position for position, readable in enumerate(good) if readable]
    images = torch.from_numpy(canvas if len(read) == len(canvas) else canvas[read])
    labels = listing.labels[read]
    differ = {sizes[position] for position in read} != {images.shape[2:]}
    kept = torch.tensor([sizes[position] for position in read], dtype=torch.int64).reshape(-1, 2) if differ else None
    return Decoded(images, labels, kept, fingerprint(images, labels, kept), bad)


def report_bad(bad: dict[str, str], total: int, bad_share: float) -> None:
    """Warn about unreadable images {name: reason}; ValueError when they are more than `bad_share` of `total`."""
    if not bad:
        return
    first = "; ".join(f"{name} ({why})" for name, why in sorted(bad.items())[:3])
    text = f"{len(bad)} of {total} images cannot be read: {first}{'; ...' if len(bad) > 3 else ''}"
    if len(bad) > bad_share * total:
        raise ValueError(f"{text}: more than the allowed share of {bad_share:g}")
    warnings.warn(f"{text}; they are left out", stacklevel=3)


def fingerprint(images: torch.Tensor, labels: torch.Tensor, sizes: torch.Tensor | None) -> str:
    """sha256 (hex) over shape, pixels, labels and sizes; blocks of images are hashed in parallel."""
    pixels = images.cpu().contiguous().numpy()
    with ThreadPoolExecutor(_threads()) as pool:
        blocks = pool.map(
            lambda start: hashlib.sha256(pixels[start : start + 256]).digest(), range(0, len(pixels), 256)
        )
        digest = hashlib.sha256(repr(pixels.shape).encode() + b"".join(blocks))
    digest.update(labels.cpu().contiguous().numpy())
    if sizes is not None:
        digest.update(sizes.cpu().contiguous().numpy())
    return digest.hexdigest()


def cache_entry(cache: Path, label: str, listing: Listing, channels: int, short_side: int) -> Path:
    """Folder of a decoded listing; its name changes with the files, their sizes and times, and the options."""
    about = json.dumps([listing.classes, listing.labels.tolist(), listing.identity(), channels, short_side, MAX_ASPECT])
    return cache / f"{label}-{hashlib.sha256(about.encode()).hexdigest()[:16]}"


def read_cache(entry: Path) -> Decoded | None:
    """What `write_cache` kept, or None. The pixels are mapped, not read: processes share them, and it is instant."""
    if not entry.is_dir():
        return None
    try:
        images = torch.from_numpy(np.load(entry / "images.npy", mmap_mode="c"))
        about = json.loads((entry / "about.json").read_text(encoding="utf-8"))
        labels = torch.tensor(about["labels"], dtype=torch.int64)
        sizes = None if about["sizes"] is None else torch.tensor(about["sizes"], dtype=torch.int64)
        return Decoded(images, labels, sizes, about["fingerprint"], about["bad"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"{entry} is damaged ({error}); its images are decoded again", stacklevel=3)
        shutil.rmtree(entry, ignore_errors=True)
        return None


def write_cache(entry: Path, decoded: Decoded) -> None:
    """Keep a decoded set: written beside, then renamed, so that an entry is whole or absent. A failure only warns."""
    sizes = None if decoded.sizes is None else decoded.sizes.tolist()
    about = {"labels": decoded.labels.tolist(), "sizes": sizes, "fingerprint": decoded.fingerprint, "bad": decoded.bad}
    scratch = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        for left in entry.parent.glob(f"{entry.name}.tmp-*"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > HOUR:
                shutil.rmtree(left, ignore_errors=True)
        scratch = entry.with_name(f"{entry.name}.tmp-{uuid.uuid4().hex[:8]}")
        scratch.mkdir()
        (scratch / "about.json").write_text(json.dumps(about), encoding="utf-8")
        with open(scratch / "images.npy", "wb") as file:
            np.save(file, decoded.images.numpy())
            file.flush()
            os.fsync(file.fileno())
        os.rename(scratch, entry)
    except OSError as error:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if not entry.is_dir():  # else another process has written the same entry in the meantime
            warnings.warn(f"the decoded images cannot be kept in {entry.parent}: {error}", stacklevel=3)


def name_of(item: str | bytes, index: int) -> str:
    """How an image is called in a message."""
    return f"row {index}" if isinstance(item, bytes) else item


def reason(error: Exception) -> str:
    """Why an image cannot be read, in a few words."""
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


def _threads() -> int:
    return min(32, own_cpus())
