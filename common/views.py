"""What a network sees in training: recipes, and the stream of augmented batches that a recipe makes of a set.

Each step's view (which images, patches, crops, flips, CutMix partner and box) is a pure function of (seed, epoch,
batch), so a run resumes bit for bit, and a teacher's labels of a stream of views can be stored or recomputed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from common.augment import apply_cutmix, crop_resize, cutmix_box, random_boxes, rng, shuffle_patches
from common.datasets import Dataset, Stream

__all__ = ["Recipe", "View", "augmented", "learning_rate", "normalise", "sides", "steps_per_epoch", "views"]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the student of WMDD and SRe2L on ImageNet-like sets."""

    name: str = field(default="fkd-300", metadata={"help": "name of the recipe"})
    epochs: int = field(default=300, metadata={"help": "passes over the set", "unit": "epochs"})
    batch: int = field(default=100, metadata={"help": "batch size", "unit": "images"})
    optimizer: str = field(default="adamw", metadata={"help": "optimiser", "choices": ("adamw", "sgd")})
    lr: float = field(default=1e-3, metadata={"help": "highest learning rate"})
    schedule: str = field(
        default="cosine",
        metadata={"help": "per epoch: to 0, or half the way, to lr/2", "choices": ("cosine", "half-cosine")},
    )
    warmup: int = field(default=0, metadata={"help": "first epochs, linear from 1 % of lr", "unit": "epochs"})
    momentum: float = field(default=0.9, metadata={"help": "SGD momentum"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay"})
    decay_all: bool = field(default=False, metadata={"help": "decay every parameter, not only the weight matrices"})
    labels: str = field(
        default="soft", metadata={"help": "teacher logits or class numbers", "choices": ("soft", "hard")}
    )
    temperature: float = field(default=20.0, metadata={"help": "temperature of the KL loss"})
    bn_momentum: float = field(default=0.1, metadata={"help": "share of a batch in the running statistics"})
    shuffle: int = field(default=1, metadata={"help": "strips each way that are permuted (RDED); 1: none"})
    pad: int = field(default=0, metadata={"help": "zeros around the image before a crop of its own size", "unit": "px"})
    crop: float = field(default=0.08, metadata={"help": "smallest area share of the random resized crop; 1: no crop"})
    flip: bool = field(default=True, metadata={"help": "horizontal flip with probability 1/2"})
    cutmix: bool = field(default=True, metadata={"help": "CutMix with one box a batch"})

    def __post_init__(self):
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata.get("choices")
            if allowed and value not in allowed:
                raise ValueError(f"recipe.{f.name}={value!r} is unknown; allowed: {', '.join(allowed)}")
        if self.epochs < 1 or self.batch < 1 or self.shuffle < 1:
            raise ValueError(
                f"recipe.epochs={self.epochs}, recipe.batch={self.batch} and recipe.shuffle={self.shuffle} must be at "
                "least 1"
            )
        if self.pad and self.crop < 1:
            raise ValueError(f"recipe.pad={self.pad} and recipe.crop={self.crop} are two crops; allowed: one of them")


def learning_rate(recipe: Recipe, epoch: int) -> float:
    """The step size of an epoch: linear warm-up, then a cosine to 0 or to half of lr."""
    if epoch < recipe.warmup:
        return recipe.lr * (0.01 + 0.99 * epoch / recipe.warmup)
    turn = math.pi * (epoch - recipe.warmup) / (recipe.epochs - recipe.warmup)
    return recipe.lr * 0.5 * (1 + math.cos(turn / 2 if recipe.schedule == "half-cosine" else turn))


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8-scaled pixels [B, C, H, W] (0..255, any dtype) -> float32 normalised images, channels_last."""
    mean_, std_ = _on(pixels.device, mean), _on(pixels.device, std)
    return ((pixels / 255 - mean_) / std_).contiguous(memory_format=torch.channels_last)


@functools.cache
@torch.inference_mode(False)  # first asked for by a test of a student, they are differentiated through later
def _on(device: torch.device, values: tuple[float, ...]) -> Tensor:
    """Constants [C, 1, 1], copied to a device once: every copy makes a GPU wait."""
    return torch.tensor(values, device=device)[:, None, None]


@dataclass(frozen=True)
class View:
    """One training step: augmented pixels and what they are made of."""

    step: int
    epoch: int
    indices: Tensor  # int64 [B]
    pixels: Tensor  # float32 [B, C, size, size], 0..255
    permutation: Tensor  # int64 [B], CutMix partner within the batch
    share: float  # share of pixels that come from the partner


def steps_per_epoch(n: int, batch: int) -> int:
    """A rest of a single image is left out: batch statistics of one image are not defined."""
    rest = n % batch
    return n // batch + (rest > 1 or n == 1)


def views(
    data: Dataset | Stream, recipe: Recipe, size: int, seed: int, start: int = 0, rows: slice = slice(None)
) -> Iterator[View]:
    """The stream of augmented batches of `recipe`, from step `start` on; every draw depends on (seed, epoch, batch).

    rows: those of each batch that a `Stream` decodes; a `Dataset` gives whole batches, for CutMix pairs any two images.
    Raises ValueError for a recipe whose views a `Stream` does not give.
    """
    if isinstance(data, Stream):
        _check_streamed(data, recipe)
    n, per_epoch = len(data.labels), steps_per_epoch(len(data.labels), recipe.batch)
    for epoch in range(start // per_epoch, recipe.epochs):
        order = torch.randperm(n, generator=rng(seed, "order", epoch))
        first = start - epoch * per_epoch if epoch == start // per_epoch else 0
        chunks = order.split(recipe.batch)[first:per_epoch]
        for batch, (pixels, indices) in enumerate(_pixels(data, chunks, recipe, size, seed, epoch, first, rows), first):
            if not len(indices):  # of a stream, none of whose images could be read
                continue
            g = rng(seed, "mix", epoch, batch)
            permutation = torch.randperm(len(indices), generator=g)
            share = 0.0
            if recipe.cutmix:
                box = cutmix_box(size, g)
                pixels = apply_cutmix(pixels, permutation, box)
                share = (box[1] - box[0]) * (box[3] - box[2]) / size**2
            yield View(epoch * per_epoch + batch, epoch, indices, pixels, permutation, share)


def _check_streamed(data: Stream, recipe: Recipe) -> None:
    """ValueError that names what a recipe asks of the decoding workers and they cannot do."""
    wanted = {"pad": 0, "flip": True, "shuffle": 1}
    wrong = [f"{k}={getattr(recipe, k)!r}" for k, v in wanted.items() if getattr(recipe, k) != v]
    if wrong:
        allowed = ", ".join(f"{k}={v!r}" for k, v in wanted.items())
        raise ValueError(
            f"recipe {recipe.name!r} has {', '.join(wrong)}, but {data.name} is streamed from disk, and a stream gives "
            f"random resized crops (crop) and flips alone; allowed: {allowed}"
        )


def _pixels(
    data, chunks, recipe: Recipe, size: int, seed: int, epoch: int, first: int, rows: slice
) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, Stream):  # crops and flips are drawn in the decoding workers, from (seed, epoch, image)
        order = torch.cat([chunk[rows] for chunk in chunks]) if chunks else torch.empty(0, dtype=torch.long)
        batches = data.batches(
            order, len(range(recipe.batch)[rows]), size, "random", seed, epoch, scale=(recipe.crop, 1.0),
            gaps="keep" if rows == slice(None) else "refuse",
        )  # fmt: skip
        yield from ((p, i) for p, _, i in batches)
        return
    sizes = sides(data)
    for batch, indices in enumerate(chunks, first):
        g = rng(seed, "view", epoch, batch)
        yield augmented(data.images, sizes[indices], indices, recipe, size, g), indices


def sides(data: Dataset) -> Tensor:
    """Height and width of each image, int64 [N, 2], on the CPU."""
    sizes = data.sizes if data.sizes is not None else torch.tensor(data.images.shape[2:]).expand(len(data.labels), 2)
    return sizes.cpu()


def augmented(
    images: Tensor, wanted: Tensor, indices: Tensor, recipe: Recipe, size: int, g: torch.Generator
) -> Tensor:
    """Training views float32 [B, C, size, size], 0..255, of some images uint8 [N, C, H, W], without CutMix.

    indices: which, int64 [B]; wanted: their heights and widths, int64 [B, 2], on the CPU.
    """
    h, w = wanted.amax(0).tolist()
    images = images[indices.to(images.device), :, :h, :w]
    if recipe.shuffle > 1:
        images = shuffle_patches(images, recipe.shuffle, g)
    if recipe.crop < 1:
        boxes = random_boxes(wanted, g, (recipe.crop, 1.0))
    else:
        images = F.pad(images, [recipe.pad] * 4)
        boxes = torch.cat([torch.randint(2 * recipe.pad + 1, wanted.shape, generator=g), wanted], 1)
    flip = torch.rand(len(indices), generator=g) < (0.5 if recipe.flip else 0.0)
    return crop_resize(images, boxes, flip, size)
