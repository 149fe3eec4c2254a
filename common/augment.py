"""Batched augmentation on the device: crops, flips and CutMix as arithmetic on tensors, every draw from a generator.

A crop with resize and flip is separable: one small matrix for the rows and one for the columns of each image,
`A_y x A_x^T`.  The same matrices serve training, relabelling and evaluation, on any device, without workers.
Draws are made on the CPU (a few numbers an image), so that the same seed gives the same views on every device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["apply_cutmix", "crop_resize", "cutmix_box", "random_boxes", "resample_matrix", "rng"]


def rng(*path: int | str) -> torch.Generator:
    """A CPU generator that depends only on `path` (e.g. seed, "stream", epoch): counter-based, order-free seeding."""
    import hashlib

    digest = hashlib.sha256(repr(path).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# --- begin shared block: resample_matrix (copied in methods/wmdd.py; a test keeps the copies equal) ---
def resample_matrix(start: Tensor, length: Tensor, out: int, size: int) -> Tensor:
    """Rows that crop [start, start + length) from `size` pixels and resize it to `out` pixels.

    start, length: [B] in whole pixels -> [B, out, size] float32, each row sums to 1.  Bilinear with half-pixel centres,
    widened to a triangle filter when the crop shrinks (as PIL and torchvision's antialias do).
    """
    start, length = start.float()[:, None, None], length.float()[:, None, None]  # [B, 1, 1]
    scale = length / out
    pixel = torch.arange(size, device=start.device) + 0.5  # centres of the source pixels [size]
    centre = start + (torch.arange(out, device=start.device)[:, None] + 0.5) * scale  # [B, out, 1]
    weight = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)  # [B, out, size]
    weight = weight * ((pixel > start) & (pixel < start + length))
    return weight / weight.sum(-1, keepdim=True)


# --- end shared block ---


def random_boxes(
    sizes: Tensor, generator: torch.Generator, scale: tuple[float, float] = (0.08, 1.0), ratio=(3 / 4, 4 / 3)
) -> Tensor:
    """Boxes of RandomResizedCrop (Inception crops), with torchvision's law: ten tries, then the central crop.

    sizes: int64 [B, 2] heights and widths -> int64 [B, 4] (top, left, height, width), on the CPU.
    """
    tries = 10
    height, width = (sizes[:, i, None].double() for i in (0, 1))  # [B, 1]
    uniform = torch.rand(len(sizes), tries, 2, generator=generator, dtype=torch.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[..., 0])  # [B, tries]
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * uniform[..., 1])
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)  # first try that fits; 0 where none does
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    height, width = height[:, 0], width[:, 0]
    # Fallback: the largest central crop within the ratio bounds.
    fallback_h = torch.minimum(height, (width / ratio[0]).round())
    fallback_w = torch.minimum(width, (height * ratio[1]).round())
    none = ~fits.any(1)
    h, w = torch.where(none, fallback_h, h), torch.where(none, fallback_w, w)
    place = torch.rand(len(sizes), 2, generator=generator, dtype=torch.float64)
    place = torch.where(none[:, None], torch.full_like(place, 0.5), place)
    top = (place[:, 0] * (height - h + 1)).floor()
    left = (place[:, 1] * (width - w + 1)).floor()
    return torch.stack([top, left, h, w], 1).long()


def crop_resize(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Cut `boxes` out of `images`, resize them to size x size and flip where asked.

    images: uint8 or float [B, C, H, W]; boxes: int64 [B, 4]; flip: bool [B] -> float32 [B, C, size, size], in the
    units of `images`.  Same result on every device; the CPU takes the library's resize, image by image, because its
    small batched matrix products are twenty times slower.
    """
    if images.device.type == "cpu":
        out = torch.empty(*images.shape[:2], size, size)
        for i, (top, left, height, width) in enumerate(boxes.tolist()):
            crop = images[i : i + 1, :, top : top + height, left : left + width].float()
            crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
            out[i] = crop[0].flip(-1) if flip[i] else crop[0]
        return out
    boxes, flip = boxes.to(images.device), flip.to(images.device)
    rows = resample_matrix(boxes[:, 0], boxes[:, 2], size, images.shape[2])  # [B, size, H]
    cols = resample_matrix(boxes[:, 1], boxes[:, 3], size, images.shape[3])  # [B, size, W]
    cols = torch.where(flip[:, None, None], cols.flip(1), cols)
    return rows[:, None] @ images.float() @ cols[:, None].transpose(-1, -2)


def cutmix_box(size: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """One CutMix box for a batch: lambda ~ Beta(1, 1), side int(size * sqrt(1 - lambda)), uniform centre, clipped.

    Returns (top, bottom, left, right) in pixels.
    """
    lam = torch.rand((), generator=generator, dtype=torch.float64).item()
    half = int(size * math.sqrt(1 - lam)) // 2
    cy, cx = torch.randint(size, (2,), generator=generator).tolist()
    return max(cy - half, 0), min(cy + half, size), max(cx - half, 0), min(cx + half, size)


def apply_cutmix(images: Tensor, permutation: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """Replace the pixels of `box` in every image i by those of image permutation[i].  images: [B, C, H, W]."""
    top, bottom, left, right = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[permutation.to(images.device), :, top:bottom, left:right]
    return mixed
