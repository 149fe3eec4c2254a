"""RDED's scoring, stitching and student in plain form: the formulas one after the other, built as the released code is.

Crops cut one image at a time, then as many in a forward as there are images, fp32, NCHW, torchvision's transforms,
everything kept in lists, tiles pasted one by one.  It is what `methods/rded.py` is timed and checked against; it takes
the same boxes, so both compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import Compose, Normalize, RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms.functional import convert_image_dtype, resize, resized_crop

__all__ = ["score", "select", "stitch", "student_epoch"]


def score(
    teacher: nn.Module, images: Iterable[Tensor], boxes: Iterable[list], label: int, *, factor: int, size: int,
    mean: tuple[float, ...], std: tuple[float, ...],
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yields (scores [crops], normalised crops [crops, C, p, p]) of each image uint8 [C, H, W] and its boxes."""
    side, normalise = size // factor, Normalize(mean, std)
    device = next(teacher.parameters()).device
    before = (size - side) // 2
    after = size - side - before
    crops, scores = [], []
    for image, own in zip(images, boxes, strict=True):
        pixels = convert_image_dtype(image, torch.float32)
        crops.append(torch.stack([normalise(resized_crop(pixels, *b, [side, side], antialias=True)) for b in own]))
    with torch.no_grad():
        for part in F.pad(torch.cat(crops), (before, after, before, after)).split(len(crops)):
            labels = torch.full((len(part),), label, device=device)
            scores.append(F.cross_entropy(teacher(part.to(device)), labels, reduction="none").cpu())
    yield from zip(torch.cat(scores).split([len(own) for own in crops]), crops, strict=True)


def select(scored: Iterable[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, list[float]]:
    """The crop with the lowest score of each image, and of these the `count` lowest: [count, C, p, p], their scores."""
    kept = []
    for scores, crops in scored:
        best = min(range(len(scores)), key=lambda c: scores[c].item())
        kept.append((scores[best].item(), crops[best]))
    kept.sort(key=lambda pair: pair[0])
    return torch.stack([crop for _, crop in kept[:count]]), [value for value, _ in kept[:count]]


def stitch(patches: Tensor, factor: int, size: int) -> Tensor:
    """Patches [I f f, C, p, p], best first -> [I, C, size, size], tile by tile."""
    ipc = len(patches) // factor**2
    images = torch.zeros(ipc, patches.shape[1], size, size)
    for i in range(ipc):
        top = 0
        for row in range(factor):
            height = size // factor + (1 if row < size % factor else 0)
            left = 0
            for column in range(factor):
                width = size // factor + (1 if column < size % factor else 0)
                patch = patches[(row * factor + column) * ipc + i]
                if patch.shape[1:] != (height, width):
                    patch = resize(patch, [height, width], interpolation=0)  # nearest
                images[i, :, top : top + height, left : left + width] = patch
                left += width
            top += height
    return images


def student_epoch(
    student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, *, batch: int,
    crop: float, factor: int, temperature: float, mean: tuple[float, ...], std: tuple[float, ...],
) -> None:  # fmt: skip
    """An epoch of the student on images uint8 [M, C, S, S]: strips permuted, crop, flip, CutMix, the mixed batch twice
    through the student, the first time for nothing but a training accuracy."""
    size, device = images.shape[-1], next(student.parameters()).device
    view = Compose([RandomResizedCrop(size, (crop, 1)), RandomHorizontalFlip(), Normalize(mean, std)])
    for rows in torch.randperm(len(images)).split(batch):
        shown = []
        for image in convert_image_dtype(images[rows], torch.float32):
            strips = list(image.chunk(factor, 1))
            image = torch.cat([strips[i] for i in torch.randperm(factor)], 1)
            strips = list(image.chunk(factor, 2))
            shown.append(view(torch.cat([strips[i] for i in torch.randperm(factor)], 2)))
        mixed = torch.stack(shown).to(device)
        half = int(size * (1 - torch.rand(())).sqrt()) // 2
        y, x = torch.randint(size, (2,)).tolist()
        box = slice(max(y - half, 0), y + half), slice(max(x - half, 0), x + half)
        mixed[:, :, box[0], box[1]] = mixed[torch.randperm(len(mixed))][:, :, box[0], box[1]]
        student(mixed).argmax(1)
        with torch.no_grad():
            told = F.softmax(teacher(mixed) / temperature, 1)
        loss = F.kl_div(F.log_softmax(student(mixed) / temperature, 1), told, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
