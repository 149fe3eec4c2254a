"""DiffAugment in plain form: batch by batch as the released code is built, affine matrices as Python lists.

It takes the draw of `common.augment.DiffAugment`, so both compute the same numbers; tests compare them, and the plain
forms of the methods are timed with it.  Rows with different operations (siamese draws of several classes) go one after
the other, as a loop over classes does.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["augment"]


def color(x: Tensor, u: list[list[float]]) -> Tensor:
    brightness, saturation, contrast = (x.new_tensor(column).view(-1, 1, 1, 1) for column in zip(*u, strict=True))
    x = x + (brightness - 0.5)
    mean = x.mean(dim=1, keepdim=True)
    x = (x - mean) * (saturation * 2) + mean
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + 0.5) + mean


def crop(x: Tensor, u: list[list[float]]) -> Tensor:
    height, width = x.shape[2:]
    most_y, most_x = int(height * 0.125 + 0.5), int(width * 0.125 + 0.5)
    padded = F.pad(x, (most_x, most_x, most_y, most_y))
    images = []
    for image, (v, w, _) in zip(padded, u, strict=True):
        top, left = math.floor(v * (2 * most_y + 1)), math.floor(w * (2 * most_x + 1))
        images.append(image[:, top : top + height, left : left + width])
    return torch.stack(images)


def cutout(x: Tensor, u: list[list[float]]) -> Tensor:
    height, width = x.shape[2:]
    tall, wide = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
    mask = torch.ones_like(x)
    for i, (v, w, _) in enumerate(u):
        centre_y, centre_x = math.floor(v * (height + (1 - tall % 2))), math.floor(w * (width + (1 - wide % 2)))
        top, left = centre_y - tall // 2, centre_x - wide // 2
        mask[i, :, max(top, 0) : top + tall, max(left, 0) : left + wide] = 0
    return x * mask


def flip(x: Tensor, u: list[list[float]]) -> Tensor:
    return torch.stack([image.flip(2) if v < 0.5 else image for image, (v, _, _) in zip(x, u, strict=True)])


def scale(x: Tensor, u: list[list[float]]) -> Tensor:
    low, high = 1 / 1.2, 1.2
    matrices = [[[low + (high - low) * v, 0, 0], [0, low + (high - low) * w, 0]] for v, w, _ in u]
    return affine(x, matrices)


def rotate(x: Tensor, u: list[list[float]]) -> Tensor:
    angles = [(v - 0.5) * 2 * 15 / 180 * math.pi for v, _, _ in u]
    return affine(x, [[[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0]] for a in angles])


def affine(x: Tensor, matrices: list) -> Tensor:
    grid = F.affine_grid(x.new_tensor(matrices), x.shape, align_corners=True)
    return F.grid_sample(x, grid, align_corners=True)


OPERATIONS = {"color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate}


def augment(images: Tensor, draw, strategy: str = "color_crop_cutout_flip_scale_rotate") -> Tensor:
    """images [B, C, H, W], draw of R rows -> [B, C, H, W]; one call a row, or one in all where the operation is one."""
    each = len(images) // len(draw.operation)
    names = [strategy.split("_")[k] for k in draw.operation.tolist()]
    values = [row for row in draw.values.tolist() for _ in range(each)]
    if len(set(names)) == 1:
        return OPERATIONS[names[0]](images, values)
    rows = [slice(r * each, (r + 1) * each) for r in range(len(names))]
    return torch.cat([OPERATIONS[name](images[row], values[row]) for name, row in zip(names, rows, strict=True)])
