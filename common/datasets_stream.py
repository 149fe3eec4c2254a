"""Image sets too large for memory: worker processes decode them while the training loop runs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from common import datasets_decode as decoding
from common.augment import random_boxes, rng
from common.datasets_files import Listing
from common.distributed import beside
from common.hardware import own_cpus

VIEWS = ("center", "random")
PREFETCH = 4  # batches each worker keeps ready
MAX_WORKERS = 16


@dataclass(frozen=True, eq=False)
class Stream:
    """One split of a set whose images stay on disk.

    name, labels (int64 [N]), classes, mean, std, note: as in `Dataset`. channels: 3 or 1. bad_share: as in `load`.
    fingerprint: sha256 over file names, file sizes and labels (pixels are not read).
    items: file names as fixed-width bytes (one buffer, which forked workers share without copying), or encoded images.
    """

    name: str
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    note: str
    channels: int
    bad_share: float
    items: np.ndarray

    @classmethod
    def of(
        cls,
        name: str,
        listing: Listing,
        channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        bad_share: float,
    ) -> Stream:
        """The stream over the files of a listing."""
        digest = hashlib.sha256(repr([(path, size) for path, size, _ in listing.identity()]).encode())
        digest.update(listing.labels.numpy())
        encoded = any(isinstance(item, bytes) for item in listing.items)
        items = np.array(
            listing.items if encoded else [os.fsencode(item) for item in listing.items],
            dtype=object if encoded else None,
        )
        note = f"streamed from disk, {len(items)} images, layout {listing.layout} in {listing.folder.name}/"
        return cls(
            name, listing.labels, listing.classes, mean, std, digest.hexdigest(), note, channels, bad_share, items
        )

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, index: int) -> str | bytes:
        """The file name of an image, or the encoded image itself."""
        return self.items[index] if self.items.dtype == object else os.fsdecode(self.items[index])

    def class_indices(self, label: int) -> Tensor:
        """int64 [n_k]: the positions of the images of class `label`, ascending."""
        return class_positions(self, label)

    def batches(
        self,
        indices: Tensor | Sequence[int],
        batch: int,
        size: int,
        view: str = "center",
        seed: int = 0,
        epoch: int = 0,
        workers: int | None = None,
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        gaps: str = "skip",
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (images uint8 [B, C, size, size], labels int64 [B], indices int64 [B]) on the CPU, in the given order.

        view: "center" is the test view of `Dataset.center`; "random" a random resized crop (area share in `scale`,
            aspect 3/4 to 4/3) and a flip with probability 1/2, drawn from (seed, epoch, index of the image), so that
            neither the number of workers nor the batch size changes a view.
        workers: decoding processes; by default one a core, at most 16, shared among the processes of a training. 0
            decodes in this process.
        gaps: a batch of which no image can be read is left out ("skip"), comes empty ("keep": steps stay numbered), or
            is a ValueError ("refuse": for processes that count steps together).

        Unreadable images are left out of their batch and named in a warning at the end; ValueError once they are more
        than `bad_share` of the set.
        """
        if view not in VIEWS:
            raise ValueError(f"unknown view '{view}': allowed are {', '.join(VIEWS)}")
        rows = torch.as_tensor(indices, dtype=torch.int64).cpu()
        if workers is None:
            workers = max(1, min(MAX_WORKERS, own_cpus() // beside()))
        views = _Views(self, size, (seed, epoch, scale) if view == "random" else None)
        loader = DataLoader(
            views,
            batch_size=batch,
            sampler=rows.tolist(),
            num_workers=workers,
            collate_fn=_collate,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        bad: dict[str, str] = {}
        for images, chosen, failed in loader:
            bad |= failed
            if len(bad) > self.bad_share * len(self):
                break
            if len(chosen) or gaps == "keep":
                yield images, self.labels[chosen], chosen
            elif gaps == "refuse":
                raise ValueError(f"no image of this process's part of a batch can be read: {', '.join(failed)}")
        decoding.report_bad(bad, len(self), self.bad_share)

    def whole(self, indices: Tensor, short_side: int = 512) -> tuple[Tensor, Tensor]:
        """Images as they are, their shorter side at most `short_side` px: int64 [n] -> canvas uint8 [n, C, H, W], sizes
        int64 [n, 2].  ValueError for one that cannot be read."""
        pixels = []
        for index in indices.tolist():
            item = self.item(index)
            try:
                pixels.append(torch.from_numpy(decoding.decode(item, self.channels, short_side).copy()))  # [h, w, C]
            except decoding.UNREADABLE as error:
                raise ValueError(f"{decoding.name_of(item, index)} cannot be read: {decoding.reason(error)}") from error
        sizes = torch.tensor([image.shape[:2] for image in pixels])
        canvas = torch.zeros(len(pixels), self.channels, *sizes.amax(0).tolist(), dtype=torch.uint8)
        for place, image in zip(canvas, pixels, strict=True):
            place[:, : image.shape[0], : image.shape[1]] = image.permute(2, 0, 1)
        return canvas, sizes


def class_positions(data, label: int) -> Tensor:
    """`class_indices` of a `Dataset` or a `Stream`."""
    if not 0 <= label < len(data.classes):
        raise ValueError(f"class {label} does not exist: {data.name} has classes 0 to {len(data.classes) - 1}")
    return (data.labels == label).nonzero().squeeze(1)


class _Views(TorchDataset):
    """Single views of a stream, for the workers: (pixels [C, size, size] or None, index, name, reason)."""

    def __init__(self, stream: Stream, size: int, draw: tuple[int, int, tuple[float, float]] | None) -> None:
        self.items, self.channels, self.size, self.draw = stream.items, stream.channels, size, draw
        self.encoded = stream.items.dtype == object

    def __getitem__(self, index: int) -> tuple[Tensor | None, int, str, str]:
        item = self.items[index] if self.encoded else os.fsdecode(self.items[index])
        try:
            image = decoding.read_image(item, self.channels)
        except decoding.UNREADABLE as error:
            return None, index, decoding.name_of(item, index), decoding.reason(error)
        image = center_view(image, self.size) if self.draw is None else random_view(image, self.size, index, *self.draw)
        pixels = np.array(image).reshape(self.size, self.size, self.channels)
        return torch.from_numpy(pixels).permute(2, 0, 1), index, "", ""


def center_view(image: Image.Image, size: int) -> Image.Image:
    """The test view of one image, as `Dataset.center` makes it."""
    height, width, top, left = decoding.center_sides(image.height, image.width, size)
    return image.resize((width, height), Image.BILINEAR).crop((left, top, left + size, top + size))


def random_view(
    image: Image.Image, size: int, index: int, seed: int, epoch: int, scale: tuple[float, float]
) -> Image.Image:
    """A random resized crop with a flip, drawn from (seed, epoch, index)."""
    generator = rng(seed, "stream", epoch, index)
    top, left, height, width = random_boxes(torch.tensor([[image.height, image.width]]), generator, scale)[0].tolist()
    image = image.resize((size, size), Image.BILINEAR, box=(left, top, left + width, top + height))
    flip = torch.rand((), generator=generator) < 0.5
    return image.transpose(Image.FLIP_LEFT_RIGHT) if flip else image


def _collate(views: list[tuple[Tensor | None, int, str, str]]) -> tuple[Tensor, Tensor, dict[str, str]]:
    """(images uint8 [B, C, size, size], indices int64 [B], {name: reason} of the unreadable ones)."""
    good = [(pixels, index) for pixels, index, _, _ in views if pixels is not None]
    images = torch.stack([pixels for pixels, _ in good]) if good else torch.empty(0, dtype=torch.uint8)
    failed = {name: why for pixels, _, name, why in views if pixels is None}
    return images, torch.tensor([index for _, index in good], dtype=torch.int64), failed
