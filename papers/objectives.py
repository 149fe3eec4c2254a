"""What the objectives of distillation methods give to a set of images; nothing is optimised.

Rethinking Dataset Distillation: Hard Truths about Soft Labels (arXiv 2604.18811), supplement, Section 7:

Eqs 1, 2  gaps to the BatchNorm statistics of a teacher: SRe2L (`bn_loss`) and DWA (`dwa_loss`)
Eq. 4     end points of student and expert after some steps, by start epoch: trajectory matching (`tm_loss`)
Eq. 5     means of the features of random networks: DM (`dm_loss`)

The batch of Eqs 1 and 2 is not given: exact statistics of the whole subset here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.augment import rng
from methods import dm, mtt, sre2l

__all__ = [
    "LAMBDA_VAR", "TM_STARTS", "BNGaps", "bn_gaps", "bn_loss", "dm_loss", "dwa_loss", "tm_loss",
]  # fmt: skip


# ---------------------------------------------------------------- BatchNorm statistics: SRe2L and DWA


LAMBDA_VAR = 11.0  # lambda_var of Eq. 2 in DWA's scripts for CIFAR-100 and Tiny-ImageNet; ImageNet-1K has 2 there


class BNGaps(NamedTuple):
    """|mean - running mean|_2 and |variance - running variance|_2 at the input of each BatchNorm layer: float64 [L]."""

    mean: Tensor
    variance: Tensor


def bn_loss(gaps: BNGaps) -> float:
    """Eq. 1, SRe2L: both gaps, summed over the layers."""
    return float(gaps.mean.sum() + gaps.variance.sum())


def dwa_loss(gaps: BNGaps, lambda_var: float = LAMBDA_VAR) -> float:
    """Eq. 2, DWA: gaps of the means plus lambda_var times those of the variances.

    As in its code the first layer counts ten times and the whole is multiplied by 0.01.
    """
    layers = gaps.mean + lambda_var * gaps.variance
    return float(0.01 * (layers.sum() + 9 * layers[0]))


@torch.no_grad()
def bn_gaps(
    teacher: nn.Module, images: Tensor, *, chunk: int = 256, prepare: Callable[[Tensor], Tensor] | None = None
) -> BNGaps:
    """Gaps between the statistics of a subset, images [M, C, H, W], and those that the teacher (in eval mode) holds.

    The statistics are those of the whole subset, `chunk` images a pass.  prepare: images, moved to the teacher's
    device -> network input.
    """
    if any(module.training for module in teacher.modules()):
        raise ValueError("the teacher is in training mode, its running statistics would change; call teacher.eval()")
    if not len(images):
        raise ValueError("the subset has no images; needs at least one")
    layers = sre2l.batch_norms(teacher)
    device = layers[0].running_mean.device
    sums = {layer: [0, 0.0, 0.0] for layer in layers}  # values a channel, their sum [C], that of their squares [C]

    def count(layer: nn.BatchNorm2d, entering: tuple[Tensor]) -> None:
        x = entering[0].double()  # [B, C, H, W]; the variance is a small difference of large sums
        held = sums[layer]
        held[0] += x.numel() // x.shape[1]
        held[1] = held[1] + x.sum((0, 2, 3))
        held[2] = held[2] + x.square().sum((0, 2, 3))

    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        for part in images.split(chunk):
            part = part.to(device)
            teacher(part if prepare is None else prepare(part))
    finally:
        for hook in hooks:
            hook.remove()
    gaps = []
    for layer, (total, first, second) in sums.items():
        mean = first / total
        variance = second / total - mean.square()  # biased, as in the code of SRe2L
        gaps.append(torch.stack([(mean - layer.running_mean).norm(), (variance - layer.running_var).norm()]))
    return BNGaps(*torch.stack(gaps, 1))


# ---------------------------------------------------------------- class means: DM


def dm_loss(
    real: tuple[Tensor, Tensor], subsets: Sequence[tuple[Tensor, Tensor]], *,
    make_network: Callable[[torch.Generator], nn.Module], seeds: Sequence[int] = range(5), per_class: int = 0,
    augment: Any = None, prepare: Callable[[Tensor], Tensor] | None = None, device: torch.device | str = "cpu",
    chunk: int = 256,
) -> Tensor:  # fmt: skip
    """Eq. 5 class by class, of each subset: sum_k |mean psi(real of class k) - mean psi(subset of class k)|^2.

    real and subsets: (images [N, C, H, W], labels int64 [N]) each; the result, float64 [len(subsets)], is the mean over
    one random network for each seed.  per_class: real images that a seed draws of each class, 0 for all.  augment as in
    methods/dm.py: all images of a class meet the same one.  With BatchNorm a pass holds all images, as there: set
    per_class to what the memory holds.
    """
    counts = real[1].bincount()
    for images, labels in (real, *subsets):
        own = labels.bincount(minlength=len(counts))
        if len(images) != len(labels) or len(own) > len(counts) or not own.all():
            raise ValueError(f"{len(images)} images with {own.tolist()} of the classes; needs each class of the real "
                             f"ones, {len(counts)} in all, and as many labels as images")  # fmt: skip
    psi = dm.Embedding(make_network(torch.Generator()), device)
    total = torch.zeros(len(subsets), dtype=torch.float64)
    for seed in seeds:
        generator = rng(seed, "dcs", "dm")
        psi.load(make_network(generator))
        draw = None if augment is None else augment.draw(len(counts), generator, siamese=True)
        see = partial(_under_class_draw, augment, draw)
        rows = _by_class(real[1])
        rows = dm.draw_real(rows, per_class, generator) if per_class else rows
        goal = _means(psi, real[0], rows, see, prepare, device, chunk)  # [K, D]
        for i, (images, labels) in enumerate(subsets):
            own = _means(psi, images, _by_class(labels), see, prepare, device, chunk)
            total[i] += float(dm.matching_loss(goal, own))
    return total / len(seeds)


def _under_class_draw(augment: Any, draw: Any, images: Tensor, classes: Tensor) -> Tensor:
    return images if augment is None else augment(images, draw[classes])


def _means(psi: dm.Embedding, images: Tensor, by_class: list[Tensor], see, prepare, device, chunk: int) -> Tensor:
    """Mean feature of the images of each class, [K, D]."""

    def load(rows: Tensor) -> Tensor:
        chosen = images[rows.to(images.device)].to(device)
        return chosen if prepare is None else prepare(chosen)

    return dm.class_means(psi, by_class, load, see, sum(map(len, by_class)) if psi.couples_images else chunk)


def _by_class(labels: Tensor) -> list[Tensor]:
    return [(labels.cpu() == k).nonzero().flatten() for k in range(int(labels.max()) + 1)]


# ---------------------------------------------------------------- trajectories: TM


TM_STARTS = range(20, 36)  # T- to T+ of Section 7.1, both included; N = 80 and M = 2 are the defaults below


def tm_loss(
    trajectory: Tensor, images: Tensor, labels: Tensor, *, make_network: Callable[[torch.Generator], nn.Module],
    lr: float, starts: Sequence[int] = TM_STARTS, steps: int = 80, epochs: int = 2, batch: int = 0, augment: Any = None,
    generator: torch.Generator, device: torch.device | str = "cpu", chunk: int = 0,
) -> Tensor:  # fmt: skip
    """Eq. 4 at each start epoch: |theta_N - theta_{t+M}|^2 / |theta_t - theta_{t+M}|^2: [len(starts)].

    trajectory [S+1, P]: an expert's snapshots, make_network its network.  A student takes `steps` (N) SGD steps of size
    lr on the subset, images [M, C, H, W] as network input, labels int64 [M] or logits [M, K], `batch` images each or 0
    for all, and is compared with the expert `epochs` (M) later.  Every start sees the same batches and augmentations.
    """
    if not starts or min(starts) < 0 or max(starts) + epochs >= len(trajectory):
        raise ValueError(
            f"starts={list(starts)} with epochs={epochs} do not lie in a trajectory of {len(trajectory)} snapshots; "
            f"allowed: 0 to {len(trajectory) - 1 - epochs}"
        )
    student = mtt.Student(make_network(torch.Generator()), device, chunk=chunk)
    if trajectory.shape[1] != sum(student.sizes):
        raise ValueError(
            f"the trajectory has {trajectory.shape[1]} parameters, the network {sum(student.sizes)}; make_network must "
            "make the expert's network"
        )
    images, labels, trajectory = images.to(device), labels.to(device), trajectory.to(device)
    batches = []
    for _, rows in zip(range(steps), _batches(len(images), batch, generator), strict=False):
        draw = None if augment is None else augment.draw(len(rows), generator, siamese=False)
        batches.append((rows.to(device), draw))

    losses = []
    for t in starts:
        match = mtt.Match(trajectory[t], trajectory[t + epochs], batches)
        theta = match.start
        for rows, draw in match.batches:
            theta = theta - lr * student.gradient(theta, mtt.seen(images[rows], draw, augment), labels[rows])
        losses.append((theta - match.goal).square().sum() / match.distance)
        if not losses[-1].isfinite():
            raise FloatingPointError(f"the trajectory loss is {float(losses[-1])} at start epoch {t} after {steps} "
                                     f"steps; try a smaller lr than {lr}, or leave this start out")  # fmt: skip
    return torch.stack(losses).cpu()


def _batches(total: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Image numbers without end: one random order of all after the other, cut into batches."""
    while True:
        yield from torch.randperm(total, generator=generator).split(batch or total)
