"""WMDD's recover loop in plain form: the formulas one after the other, built as the released code is built.

One batch at a time, fp32, NCHW, hooks that make a permuted contiguous copy of what enters each BatchNorm, crops by
`F.interpolate`, one `.item()` an iteration.  It is what `methods/wmdd.py` is timed and checked against; it takes the
same draws, so both compute the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["augment", "recover"]


def augment(images: Tensor, view: tuple[int, int, int, int, bool, int, int]) -> Tensor:
    """Crop, resize, flip, roll: images [B, C, S, S], view (top, left, height, width, flip, dy, dx)."""
    top, left, height, width, flip, dy, dx = view
    crop = images[:, :, top : top + height, left : left + width]
    crop = F.interpolate(crop, images.shape[2:], mode="bilinear", align_corners=False)
    crop = crop.flip(3) if flip else crop
    return torch.roll(crop, (dy, dx), (2, 3))


class _Hook:
    """Keeps the PCBN term of one BatchNorm layer: mean over classes of |variance gap| and of |mean gap|."""

    def __init__(self, bn: nn.BatchNorm2d, mean: Tensor, var: Tensor):
        self.mean, self.var, self.loss = mean, var, torch.zeros(())  # targets [k, C] of the classes in the batch
        self.handle = bn.register_forward_hook(self)

    def __call__(self, bn: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].unflatten(0, (len(self.mean), -1))  # [k, I, C, H, W]
        rows = x.permute(0, 2, 1, 3, 4).contiguous().flatten(2)  # [k, C, I*H*W]
        mean_gap = (rows.mean(2) - self.mean).norm(dim=1)
        self.loss = (rows.var(2, unbiased=False) - self.var).norm(dim=1).mean() + mean_gap.mean()


def recover(
    teacher: nn.Module, noise: Iterable[Tensor], labels: list[Tensor], atoms: list[Tensor],
    means: list[list[Tensor]], variances: list[list[Tensor]], views: Iterator[tuple],
    *, iterations: int, lr: float, bn_weight: float, ce_weight: float, low: Tensor, high: Tensor,
) -> Iterator[tuple[Tensor, float]]:  # fmt: skip
    """Yields (images [B, C, S, S], loss) after every step, batch after batch, with the official loss.

    Lists run over batches: start noise [B, C, S, S], class numbers [B], atoms [B, D], and per BatchNorm layer the class
    means and variances [classes in the batch, channels].  low, high: clip bounds [C, 1, 1].
    """
    layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    linear = [m for m in teacher.modules() if isinstance(m, nn.Linear)][-1]
    features: list[Tensor] = []
    feature_hook = linear.register_forward_hook(lambda _, inputs, __: features.append(inputs[0]))
    for x, y, b, mean, var in zip(noise, labels, atoms, means, variances, strict=True):
        x = x.clone().requires_grad_()
        adam = torch.optim.Adam([x], lr=lr, betas=(0.5, 0.9), eps=1e-8)
        hooks = [_Hook(*parts) for parts in zip(layers, mean, var, strict=True)]
        for step in range(iterations):
            adam.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * step / iterations))
            features.clear()
            adam.zero_grad()
            logits = teacher(augment(x, next(views)))
            loss = ce_weight * F.cross_entropy(logits, y) + (features[0] - b).norm()
            loss = loss + bn_weight * sum(hook.loss for hook in hooks)
            loss.backward()
            adam.step()
            x.data = torch.minimum(torch.maximum(x.data, low), high)
            yield x.detach(), loss.item()
        for hook in hooks:
            hook.handle.remove()
    feature_hook.remove()
