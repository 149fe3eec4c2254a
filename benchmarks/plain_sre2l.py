"""SRe2L's recover loop in plain form: the formulas one after the other, built as the released code is built.

One batch at a time, fp32, NCHW, hooks that make a permuted contiguous copy of what enters each BatchNorm, crops by
`F.interpolate`, one `.item()` an iteration.  It is what `methods/sre2l.py` is timed and checked against; it takes the
same draws, so both compute the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.plain_wmdd import augment

__all__ = ["hook", "objective", "recover", "total_variation"]


class _Hook:
    """Keeps the BatchNorm term of one layer: |variance gap| + |mean gap| of the whole batch."""

    def __init__(self, bn: nn.BatchNorm2d):
        self.loss = torch.zeros(())
        self.handle = bn.register_forward_hook(self)

    def __call__(self, bn: nn.BatchNorm2d, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0]
        mean = x.mean((0, 2, 3))
        var = x.permute(1, 0, 2, 3).contiguous().flatten(1).var(1, unbiased=False)
        self.loss = (var - bn.running_var).norm() + (mean - bn.running_mean).norm()


def total_variation(x: Tensor) -> Tensor:
    """Norms of the horizontal, vertical and two diagonal differences of a batch [B, C, S, S]."""
    return (
        (x[:, :, :, :-1] - x[:, :, :, 1:]).norm()
        + (x[:, :, :-1, :] - x[:, :, 1:, :]).norm()
        + (x[:, :, 1:, :-1] - x[:, :, :-1, 1:]).norm()
        + (x[:, :, :-1, :-1] - x[:, :, 1:, 1:]).norm()
    )


def hook(teacher: nn.Module) -> list[_Hook]:
    """One hook for each BatchNorm layer, in module order."""
    return [_Hook(m) for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]


def objective(
    view: Tensor, logits: Tensor, y: Tensor, hooks: list[_Hook],
    *, bn_weight: float, first_bn_multiplier: float, tv_weight: float = 0.0, l2_weight: float = 0.0,
) -> Tensor:  # fmt: skip
    """CE + r_bn R_BN + r_tv R_tv + r_l2 R_l2 of one batch; terms with weight 0 are not computed."""
    loss = F.cross_entropy(logits, y)
    loss = loss + bn_weight * (first_bn_multiplier * hooks[0].loss + sum(hook.loss for hook in hooks[1:]))
    if tv_weight:
        loss = loss + tv_weight * total_variation(view)
    if l2_weight:
        loss = loss + l2_weight * view.flatten(1).norm(dim=1).mean()
    return loss


def recover(
    teacher: nn.Module, noise: Iterable[Tensor], labels: list[Tensor], views: Iterator[tuple],
    *, iterations: int, lr: float, low: Tensor, high: Tensor, **weights: float,
) -> Iterator[tuple[Tensor, float]]:  # fmt: skip
    """Yields (images [B, C, S, S], loss) after every step, batch after batch.

    Lists run over batches: start noise [B, C, S, S] and class numbers [B].  low, high: clip bounds [C, 1, 1].
    weights: those of `objective`.
    """
    hooks = hook(teacher)
    for start, y in zip(noise, labels, strict=True):
        x = start.clone().requires_grad_()
        adam = torch.optim.Adam([x], lr=lr, betas=(0.5, 0.9), eps=1e-8)
        for step in range(iterations):
            adam.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * step / iterations))
            adam.zero_grad()
            view = augment(x, next(views))
            loss = objective(view, teacher(view), y, hooks, **weights)
            loss.backward()
            adam.step()
            x.data = torch.minimum(torch.maximum(x.data, low), high)
            yield x.detach(), loss.item()
    for one in hooks:
        one.handle.remove()
