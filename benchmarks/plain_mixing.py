"""Natural mixing in plain form, built as the released code is built: partners looked up class by class, one by one.

Real images are normalised floats, images are mixed one at a time and stacked.  It is what methods/natural_mixing.py is
timed and checked against; it takes the same draws, so both compute the same images.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mixed_epoch"]


def mixed_epoch(
    images: Tensor, labels: Tensor, real: Tensor, real_labels: Tensor, uniform: list[float], alphas: list[float]
) -> Tensor:
    """images [M, C, H, W], real [N, C, H, W], both network input; in 0..1 which partner and which share each has."""
    numbers = {label: (real_labels == label).nonzero().flatten() for label in labels.unique().tolist()}
    mixed = []
    for i in range(len(images)):
        own = numbers[int(labels[i])]
        partner = real[own[int(uniform[i] * len(own))]]
        mixed.append((1 - alphas[i]) * images[i] + alphas[i] * partner)
    return torch.stack(mixed)
