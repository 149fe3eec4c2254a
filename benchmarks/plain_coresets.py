"""Greedy coresets in plain form: distances to all centres again at each step, gradients written out, gains one by one.

It is what `methods/coresets.py` is timed and checked against; it takes the same first centre, so both choose the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["facility_location", "kcenter"]


def kcenter(features: Tensor, count: int, first: int) -> list[int]:
    """Farthest points: features [n, D] of a class -> `count` numbers in it, from `first` on."""
    chosen = [first]
    while len(chosen) < count:
        nearest = torch.cdist(features, features[chosen]).min(1).values
        chosen.append(int(nearest.argmax()))
    return chosen


def facility_location(error: Tensor, features: Tensor, count: int) -> list[int]:
    """Greedy on sum_i max_{j in S} (1 + cos(g_i, g_j)) / 2, g the gradients of the last layer: [n, K], [n, D]."""
    gradients = (error[:, :, None] * F.pad(features, (1, 0), value=1.0)[:, None]).flatten(1)  # [n, K (1 + D)]
    unit = F.normalize(gradients)
    similar = 0.5 + 0.5 * unit @ unit.T
    chosen, covered = [], torch.zeros(len(error), dtype=error.dtype)
    for _ in range(count):
        gains = [-1.0 if x in chosen else float((similar[x] - covered).relu().sum()) for x in range(len(error))]
        chosen.append(max(range(len(gains)), key=gains.__getitem__))
        covered = covered.maximum(similar[chosen[-1]])
    return chosen
