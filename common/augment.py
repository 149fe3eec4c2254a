"""Batched augmentation on the device: crops, flips, CutMix, DiffAugment and ZCA, every draw from a generator.

A crop with resize and flip is separable: one small matrix for the rows and one for the columns of each image,
`A_y x A_x^T`.  The same matrices serve training, relabelling and evaluation, on any device, without workers.
Draws are made on the CPU (a few numbers an image), so that the same seed gives the same views on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ZCA", "CropResizeFlip", "DiffAugment", "Draw", "apply_cutmix", "crop_resize", "cutmix_box", "random_boxes",
    "resample_matrix", "rng", "seeded", "shuffle_patches",
]  # fmt: skip


def rng(*path: int | str) -> torch.Generator:
    """A CPU generator that depends only on `path` (e.g. seed, "stream", epoch): counter-based, order-free seeding."""
    import hashlib

    digest = hashlib.sha256(repr(path).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


# --- begin shared block: seeded (a test keeps its copies equal) ---
@contextmanager
def seeded(device: torch.device, generator: torch.Generator) -> Iterator[None]:
    """Dropout takes no generator: its draws are seeded for the block, the global state is put back after it."""
    seed, cuda = int(torch.randint(2**62, (), generator=generator)), [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


# --- end shared block ---


# --- begin shared block: resample_matrix (a test keeps its copies equal) ---
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


# --- begin shared block: boxes (a test keeps its copies equal) ---
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
    top = torch.where(none, (height - h) / 2, place[:, 0] * (height - h + 1)).floor()
    left = torch.where(none, (width - w) / 2, place[:, 1] * (width - w + 1)).floor()
    return torch.stack([top, left, h, w], 1).long()


# --- end shared block ---


# --- begin shared block: crop_resize (a test keeps its copies equal) ---
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


# --- end shared block ---


# --- begin shared block: shuffle (a test keeps its copies equal) ---
def shuffle_patches(images: Tensor, factor: int, generator: torch.Generator) -> Tensor:
    """Permute the factor column strips of each image, then its factor row strips: [B, C, H, W] -> same shape.

    For factor 2 that reaches 4 of the 24 orders of the tiles.  Where a side does not divide, the first strips are a
    pixel wider.
    """

    def moved(size: int) -> Tensor:  # for each image, the old place of each new row or column [B, size]
        widths = torch.tensor([size // factor + (i < size % factor) for i in range(factor)])
        strip = torch.arange(factor).repeat_interleave(widths)  # the strip of each pixel [size]
        place = torch.rand(len(images), factor, generator=generator).argsort(1)  # new place of each strip [B, f]
        return place[:, strip].argsort(dim=1, stable=True).to(images.device)

    columns, rows = moved(images.shape[3]), moved(images.shape[2])
    images = images.gather(3, columns[:, None, None].expand_as(images))
    return images.gather(2, rows[:, None, :, None].expand_as(images))


# --- end shared block ---


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


# ---------------------------------------------------------------- differentiable siamese augmentation (DSA)


@dataclass(frozen=True)
class Draw:
    """What DiffAugment does to R rows: operation int64 [R], values float32 [R, 3], uniform in [0, 1), on the CPU."""

    operation: Tensor
    values: Tensor

    def __getitem__(self, rows: Tensor | slice) -> Draw:
        return Draw(self.operation[rows], self.values[rows])

    def tensors(self) -> dict[str, Tensor]:
        return {"operation": self.operation, "values": self.values}


# Each operation takes images [B, C, H, W] and u float64 [B, 3] on the CPU, uniform in [0, 1).


def _column(values: Tensor, x: Tensor) -> Tensor:
    """One value an image, ready to meet x: [B] -> [B, 1, 1, 1] with its type, on its device."""
    return values.to(x.device, x.dtype)[:, None, None, None]


def _integer(u: Tensor, choices: int) -> Tensor:
    """Uniform in 0 .. choices - 1."""
    return (u * choices).floor().long()


def _color(x: Tensor, u: Tensor) -> Tensor:
    """Brightness +-0.5, then saturation x0..2 about the mean over C, then contrast x0.5..1.5 about the image's mean."""
    x = x + _column(u[:, 0] - 0.5, x)
    x = torch.lerp(x.mean(1, keepdim=True), x, _column(2 * u[:, 1], x))
    return torch.lerp(x.mean((1, 2, 3), keepdim=True), x, _column(u[:, 2] + 0.5, x))


def _crop(x: Tensor, u: Tensor) -> Tensor:
    """Shift by whole pixels, up to 1/8 of the side, zeros moving in."""
    (height, width), most = x.shape[2:], [int(side / 8 + 0.5) for side in x.shape[2:]]
    padded = F.pad(x, (most[1], most[1], most[0], most[0]))
    # Rows and columns of the padded image that are kept: [B, H, 1] and [B, 1, W].
    top, left = (_integer(u[:, i], 2 * most[i] + 1).to(x.device)[:, None] for i in (0, 1))
    rows, columns = (torch.arange(side, device=x.device) for side in (height, width))
    rows, columns = (top + rows)[:, :, None], (left + columns)[:, None]
    index = (rows * padded.shape[3] + columns).flatten(1)[:, None]  # [B, 1, H W]
    return padded.flatten(2).gather(2, index.expand(-1, x.shape[1], -1)).view(x.shape)


def _cutout(x: Tensor, u: Tensor) -> Tensor:
    """Black out a rectangle of half the height and width; its centre is anywhere, so the border may cut it."""
    inside = []
    for i, side in enumerate(x.shape[2:]):
        length = int(side / 2 + 0.5)
        first = _integer(u[:, i], side + 1 - length % 2) - length // 2
        place = torch.arange(side) - first[:, None]  # [B, side]
        inside.append(((place >= 0) & (place < length)).to(x.device))
    return x.masked_fill(inside[0][:, None, :, None] & inside[1][:, None, None, :], 0)


def _flip(x: Tensor, u: Tensor) -> Tensor:
    """Mirror left and right with probability 1/2."""
    return torch.where((u[:, 0] < 0.5).to(x.device)[:, None, None, None], x.flip(3), x)


def _affine(x: Tensor, xx: Tensor, xy: Tensor, yx: Tensor, yy: Tensor) -> Tensor:
    """Pixel (x, y) becomes what lies at (xx x + xy y, yx x + yy y): bilinear, zeros outside, -1 and 1 at the centres of
    the outer pixels.  The four coefficients: [B] each."""
    wide, zero = x.to(torch.promote_types(x.dtype, torch.float32)), torch.zeros_like(xx)
    matrices = torch.stack([xx, xy, zero, yx, yy, zero], 1).view(-1, 2, 3).to(wide)
    grid = F.affine_grid(matrices, x.shape, align_corners=True)
    return F.grid_sample(wide, grid, mode="bilinear", padding_mode="zeros", align_corners=True).to(x.dtype)


def _scale(x: Tensor, u: Tensor) -> Tensor:
    """Height and width by independent factors, looked up at 1/1.2 .. 1.2 times the distance from the centre."""
    factor = 1 / 1.2 + (1.2 - 1 / 1.2) * u[:, :2]
    zero = torch.zeros_like(u[:, 0])
    return _affine(x, factor[:, 0], zero, zero, factor[:, 1])


def _rotate(x: Tensor, u: Tensor) -> Tensor:
    """By -15 .. 15 degrees about the centre."""
    angle = math.radians(15) * (2 * u[:, 0] - 1)
    return _affine(x, angle.cos(), -angle.sin(), angle.sin(), angle.cos())


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "color": _color, "crop": _crop, "cutout": _cutout, "flip": _flip, "scale": _scale, "rotate": _rotate,
}  # fmt: skip

STRATEGY = "color_crop_cutout_flip_scale_rotate"  # of DSA; sets of digits leave "flip" out


class DiffAugment:
    """Differentiable siamese augmentation (Zhao and Bilen, ICML 2021): one operation, drawn uniformly, a row.

    strategy: names joined by "_"; data sets of digits leave "flip" out.  A row of a draw is a class (siamese: every
    image of the class, real or synthetic, meets the same operation with the same values) or an image.  Every operation
    is linear in the pixels up to a constant, acts on normalised or whitened images, and clamps nothing.

        draw = augment.draw(10, generator, siamese=True)
        real, synthetic = augment(real, draw), augment(synthetic, draw)     # both sorted by class
    """

    def __init__(self, strategy: str = STRATEGY):
        self.strategy, self.operations = strategy, tuple(strategy.split("_"))
        for name in self.operations:
            if name not in OPERATIONS:
                raise ValueError(f"strategy={strategy!r}: {name!r} is unknown; allowed: {', '.join(OPERATIONS)}")

    def draw(self, rows: int, generator: torch.Generator, *, siamese: bool) -> Draw:
        """siamese: an operation for each row, else one for all of them; values are each row's own in both cases."""
        operation = torch.randint(len(self.operations), (rows if siamese else 1,), generator=generator)
        return Draw(operation.expand(rows).clone(), torch.rand(rows, 3, generator=generator))

    def __call__(self, images: Tensor, draw: Draw) -> Tensor:
        """images: [B, C, H, W], row r of the R in `draw` serves images r B/R .. (r + 1) B/R - 1 -> [B, C, H, W].

        Differentiable, but for torch.func.jvp of a gradient, which PyTorch lacks for scale and rotate.
        """
        rows = len(draw.operation)
        if rows == 0 or len(images) % rows:
            raise ValueError(f"{len(images)} images cannot be shared evenly among {rows} rows of a draw")
        each, kinds, values = len(images) // rows, draw.operation.tolist(), draw.values.cpu().double()
        operations = {kind: OPERATIONS[self.operations[kind]] for kind in set(kinds)}
        if len(operations) == 1:
            out = operations[kinds[0]](images, values.repeat_interleave(each, 0))
        else:
            blocks = list(images.split(each))  # one a row
            for kind, operation in operations.items():
                mine = [row for row, own in enumerate(kinds) if own == kind]
                x = torch.cat([blocks[row] for row in mine])
                x = operation(x, values[mine].repeat_interleave(each, 0))
                for row, block in zip(mine, x.split(each), strict=True):
                    blocks[row] = block
            out = torch.cat(blocks)
        channels_last = images.shape[1] > 1 and images.stride(1) == 1
        return out.contiguous(memory_format=torch.channels_last) if channels_last else out


# ---------------------------------------------------------------- whitening


@dataclass(frozen=True, eq=False)
class ZCA:
    """Whitening of images [B, C, H, W] as in MTT: (x - mean) whiten, with D = C H W and all tensors float32.

    mean: [D].  whiten: [D, D], U (s + eps)^-1/2 U^T of the covariance U s U^T.  colour: [D, D], its inverse.
    Fit it on the training images and give the same one to the test images.
    """

    mean: Tensor
    whiten: Tensor
    colour: Tensor

    @classmethod
    def fit(cls, images: Tensor, eps: float = 0.1, chunk: int = 4096) -> ZCA:
        """images: [N, C, H, W], uint8 or float in [0, 1], on the device that does the work; `chunk` images at a time.

        In float64 throughout; takes about N D^2 + 10 D^3 operations.
        """
        if len(images) < 2:
            raise ValueError(f"whitening needs at least two images, got {len(images)}")
        chunks = images.flatten(1).split(chunk)
        mean = sum(_unit(x, torch.float64).sum(0) for x in chunks) / len(images)  # [D]
        covariance = mean.new_zeros(len(mean), len(mean))
        for x in chunks:
            centred = _unit(x, torch.float64) - mean
            covariance.addmm_(centred.T, centred)
        variance, axes = torch.linalg.eigh(covariance / (len(images) - 1))  # [D], [D, D]
        root = (variance.clamp(min=0) + eps).sqrt()
        return cls(mean.float(), (axes / root @ axes.T).float(), (axes * root @ axes.T).float())

    def __call__(self, images: Tensor) -> Tensor:
        """images: [B, C, H, W], uint8 or float in [0, 1] -> whitened, float32 (float64 of float64)."""
        x = _unit(images, torch.promote_types(images.dtype, torch.float32)).flatten(1)
        return ((x - self.mean.to(x)) @ self.whiten.to(x)).view(images.shape)

    def inverse(self, whitened: Tensor) -> Tensor:
        """Whitened images [B, C, H, W] -> pixels, in [0, 1] where they came from there."""
        x = whitened.flatten(1)
        return (x @ self.colour.to(x) + self.mean.to(x)).view(whitened.shape)

    def to(self, device: torch.device | str) -> ZCA:
        return ZCA(self.mean.to(device), self.whiten.to(device), self.colour.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """For a file; ZCA(**tensors) is the way back."""
        return {"mean": self.mean, "whiten": self.whiten, "colour": self.colour}


def _unit(images: Tensor, dtype: torch.dtype) -> Tensor:
    return images.to(dtype) / 255 if images.dtype == torch.uint8 else images.to(dtype)


class CropResizeFlip:
    """Random resized crops and flips, drawn for each image, in the form of DiffAugment."""

    def draw(self, rows: int, generator: torch.Generator, *, siamese: bool) -> Tensor:
        return torch.rand(rows, 2, generator=generator, dtype=torch.float64) * 2**31  # a seed of boxes, a coin

    def __call__(self, images: Tensor, draw: Tensor) -> Tensor:
        sizes = torch.tensor([images.shape[2:]]).expand(len(images), 2)
        boxes = random_boxes(sizes, rng(int(draw[0, 0]), "boxes"))
        return crop_resize(images, boxes, draw[:, 1] < 2**30, images.shape[-1])
