"""NRR-DD in plain form: its equations one after the other, built as the released code of SRe2L and RDED is built.

No code of NRR-DD was released.  Discovery takes one image at a time; refinement one batch at a time, with a forward of
its own for the mixed images and hooks that make a permuted contiguous copy of what enters each BatchNorm; both in fp32
and NCHW.  It is what `methods/nrr_dd.py` is timed and checked against; it takes the same draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import Normalize
from torchvision.transforms.functional import convert_image_dtype, resize, resized_crop

from benchmarks.plain_wmdd import augment

__all__ = ["cam", "discover", "refine"]


def cam(maps: Tensor, weight: Tensor, size: int) -> Tensor:
    """Eq. 1 of one image, scaled to [0, 1], at size x size: maps [C, h, w], weight [C] or [C h w]."""
    heat = torch.zeros(maps.shape[1:], dtype=maps.dtype, device=maps.device)
    for k, one in enumerate(maps):
        heat = heat + one * (weight[k] if len(weight) == len(maps) else weight.view_as(maps)[k])
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    return F.interpolate(heat[None, None], (size, size), mode="bilinear", align_corners=False)[0, 0]


def discover(
    teacher: nn.Module, last: nn.Module, images: Iterable[Tensor], boxes: Iterable[list], label: int, count: int, *,
    factor: int, size: int, mean: tuple[float, ...], std: tuple[float, ...],
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """The crop with the highest mean activation of each image uint8 [C, H, W], and of these the `count` the teacher is
    least sure of: pixels [count, C, p, p] in [0, 1], confidences.  last: the module that hands on the last map."""
    maps: list[Tensor] = []
    hook = last.register_forward_hook(lambda _, __, out: maps.append(out))
    weight = [m for m in teacher.modules() if isinstance(m, nn.Linear)][-1].weight[label]
    side, normalise, pooled = size // factor, Normalize(mean, std), []
    before = (size - side) // 2
    after = size - side - before
    for image, own in zip(images, boxes, strict=True):
        pixels = convert_image_dtype(image, torch.float32)
        whole = resize(pixels, [size, size], antialias=True)
        with torch.no_grad():
            maps.clear()
            teacher(normalise(whole)[None])
            heat = cam(maps[0][0], weight, size)
        high, wide = (size / s for s in image.shape[1:])
        values = []
        for top, left, height, width in own:
            rows = slice(round(top * high), round((top + height) * high))
            columns = slice(round(left * wide), round((left + width) * wide))
            values.append(heat[rows, columns].mean().item())
        crop = resized_crop(pixels, *own[max(range(len(own)), key=lambda c: values[c])], [side, side], antialias=True)
        with torch.no_grad():
            logits = teacher(F.pad(normalise(crop), (before, after, before, after))[None])
        pooled.append((logits.softmax(1).max().item(), crop))
    hook.remove()
    pooled.sort(key=lambda pair: pair[0])
    return torch.stack([crop for _, crop in pooled[:count]]), [value for value, _ in pooled[:count]]


class _Hook:
    """Keeps the term of one BatchNorm layer in Eq. 3."""

    def __init__(self, bn: nn.BatchNorm2d):
        self.loss = torch.zeros(())
        self.handle = bn.register_forward_hook(self)

    def __call__(self, bn: nn.BatchNorm2d, inputs: tuple[Tensor], output: Tensor) -> None:
        rows = inputs[0].permute(1, 0, 2, 3).contiguous().flatten(1)  # [C, B*H*W]
        self.loss = (rows.mean(1) - bn.running_mean).norm() + (rows.var(1, unbiased=False) - bn.running_var).norm()


def refine(
    teacher: nn.Module, batches: Iterable[Tensor], labels: list[Tensor], masks: list[Tensor], draws: Iterator[tuple],
    *, iterations: int, lr: float, bn_weight: float, label_refinement: float, threshold: float, low: Tensor,
    high: Tensor, optimizer: str = "adam",
) -> Iterator[tuple[Tensor, float]]:  # fmt: skip
    """Yields (normalised images [B, C, S, S], loss) after every step of Eqs 5 and 11, batch after batch.

    Lists run over batches: normalised images, class numbers [B], masks [B, S, S].  draws: (view, partners [B], share of
    an image itself [S, S]) for every step.  low, high: clip bounds [C, 1, 1].
    """
    hooks = [_Hook(m) for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    for start, y, mask in zip(batches, labels, masks, strict=True):
        x = start.clone().requires_grad_()
        adam = torch.optim.SGD([x], lr=lr) if optimizer == "sgd" else torch.optim.Adam([x], lr=lr, betas=(0.5, 0.9))
        for step in range(iterations):
            adam.param_groups[0]["lr"] = 0.5 * lr * (1 + math.cos(math.pi * step / iterations))
            adam.zero_grad()
            view, partner, own = next(draws)
            seen = augment(x, view)
            loss = F.cross_entropy(teacher(seen), y) + bn_weight * sum(hook.loss for hook in hooks)
            if label_refinement:
                logits = teacher(own * seen + (1 - own) * seen.detach()[partner])
                for target in (y, y[partner]):
                    distance = F.cross_entropy(logits, target, reduction="none")
                    loss = loss + label_refinement * (distance - threshold).clamp(min=0).mean()
            loss.backward()
            old = x.detach().clone()
            adam.step()
            x.data = old + mask[:, None] * (x.data - old)
            x.data = torch.minimum(torch.maximum(x.data, low), high)
            yield x.detach(), loss.item()
    for hook in hooks:
        hook.handle.remove()
