"""What benchmarks/speed.py measures of natural mixing: the mixed set of one epoch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import plain_mixing
from benchmarks.case import Case, Form
from benchmarks.cases_matching import CLASSES, prepare, real_images, synthetic
from common.augment import rng
from methods import natural_mixing

IPC = 50
LABELS = torch.arange(CLASSES).repeat_interleave(IPC)


def plain(answer: Callable, device: torch.device) -> None:
    """Mixed sets for ever; the real images wait as normalised floats, as in the released code."""
    (real, real_labels), generator = real_images(), rng("mix")
    real, real_labels = prepare(real.to(device)), real_labels.to(device)
    images, labels = synthetic(IPC, device), LABELS.to(device)
    while True:
        uniform = torch.rand(len(labels), generator=generator, dtype=torch.float64).tolist()
        alphas = torch.rand(1, generator=generator).tolist() * len(labels)
        plain_mixing.mixed_epoch(images, labels, real, real_labels, uniform, alphas)
        answer()


def ours(answer: Callable, device: torch.device) -> None:
    pool = natural_mixing.Pool.of(*real_images(), device, prepare)
    images, generator = synthetic(IPC, device), rng("mix")
    while True:
        natural_mixing.mixed_epoch(images, LABELS, pool, natural_mixing.Config(), generator)
        answer()


CASES = {
    "mixing50": Case(f"natural mixing, the set of an epoch at IPC {IPC}, CIFAR-10", plain, {"ours, fp32": Form(ours)}),
}
