"""Natural mixing while students train: which real images, and the set of each student and epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from common import matching
from common.augment import rng
from common.datasets import Stream, load
from methods import natural_mixing

if TYPE_CHECKING:
    from papers.matching_stages import MatchingSetup
    from papers.stages import Lab

__all__ = ["mixture", "pool_inputs"]

FRACTALS = "fractals"
CHOICES = ("alpha", "share", "partner")  # of `natural_mixing.Config`: all else is the students' protocol


@functools.cache
def _other(lab: Lab, name: str, channels: int):
    return load(name, lab.root, split="train", channels=channels, cache=lab.store.root / "cache")


def pool_inputs(lab: Lab, setup: MatchingSetup, on: matching.Task) -> tuple[str, ...]:
    """Fingerprints of the images that are mixed in.

    Before anything runs, FileNotFoundError says what is missing, and ValueError that a set is too large to mix in, or
    which choice of `mix` is none.
    """
    if not setup.mix:
        return ()
    if unknown := [key for key in setup.mix if key not in (*CHOICES, "pool")]:
        raise ValueError(f"mix.{unknown[0]} is unknown; allowed: {', '.join(CHOICES)}, pool")
    name, config = setup.mix.get("pool", ""), _config(setup)
    if name and config.partner != "any":
        raise ValueError(f"mix.pool={name!r} has no images of the set's classes; allowed: with mix.partner=any")
    if name == FRACTALS:
        return (FRACTALS,)
    channels = on.train.images.shape[1]
    other = _other(lab, name, channels) if name else on.train
    if isinstance(other, Stream):
        raise ValueError(f"mix.pool={name!r} is streamed from disk; images are mixed in from memory; take a small set")
    return (other.fingerprint,)


def _config(setup: MatchingSetup) -> natural_mixing.Config:
    return natural_mixing.Config(**{key: setup.mix[key] for key in CHOICES if key in setup.mix})


def mixture(
    lab: Lab, setup: MatchingSetup, on: matching.Task, tensors: dict[str, Tensor]
) -> Callable[[int, int], Tensor]:
    """(seed of the student, epoch) -> the set mixed with real images, as network input [M, C, H, W]."""
    name, channels, labels = setup.mix.get("pool", ""), on.train.images.shape[1], None
    if name == FRACTALS:
        pixels = natural_mixing.fractal_pool(1000, on.size, rng(0, "fractals"), channels)
    elif name:
        pixels = _other(lab, name, channels).center(on.size)
    else:
        pixels, labels = on.train.images, on.train.labels
    pool = natural_mixing.Pool.of(pixels, labels, on.device, on.prepare)
    config = _config(setup)
    images, own = matching.tested_images(tensors).to(on.device), tensors["labels"]
    if setup.protocol.labels == "soft" and "soft_labels" in tensors:  # learned with the images; a teacher's are not
        own = tensors["soft_labels"].argmax(1)
    return lambda seed, epoch: natural_mixing.mixed_epoch(images, own, pool, config, rng(seed, "mix", epoch))
