"""NRR-DD: real patches that the teacher finds hard, refined where they do not matter to their class.

Tran et al., Enhancing Dataset Distillation via Non-Critical Region Refinement, CVPR 2025
(openaccess.thecvf.com/content/CVPR2025; github.com/tmtuan1307/NRR-DD).

    python methods/nrr_dd.py dataset=imagenette ipc=10 data=~/data     # teacher, distilled set, student accuracy

CIDD  crops with the highest class activation C(x, y) = sum_k w_k^y T_k(x) (Eq. 1); of these the ones the teacher is
      least sure of; stitched to images.
NRR   L_org = CE(T(x), y) + a_bn sum_l (|mean_l - running mean_l| + |var_l - running var_l|)        (Eqs 2, 3, 12)
      x <- x - M eta grad L with M = max(0, epsilon - C): critical pixels stay as they are               (Eqs 4, 5)
      L = L_org + a_lr (max(0, d_org - r) + max(0, d_aug - r)), only with label refinement             (Eqs 11, 12)
DBR   students learn a mixed image from two numbers, the distances d = -log softmax T(x_mix) at its two labels:
      max(0, d_org^S - r) + max(0, d_aug^S - r) + a_dbr (|d_org^S - d_org| + |d_aug^S - d_aug|)         (Eqs 8-10)

No code was found and the supplement with the settings was not at hand; what the paper leaves open is a field of
`Config` with the reason of its default.  Where the paper speaks twice, we take:
  CIDD keeps      the lowest confidence (text, Figs 1 and 2), or the lowest cross-entropy (Alg. 1)   -> `confidence`
  tiles           a side of 1/beta (text), of which beta do not fill an image                       -> 1/sqrt(beta)
  DBR labels      one pair an image (Alg. 1); the 0.2 GB it quotes are one pair an image and epoch  -> an epoch
The command trains the teacher by SRe2L's recipes on CIFAR and Tiny-ImageNet and by WMDD's elsewhere, with 50 epochs
(`teacher_epochs`), and the student by RDED's recipe.
Copied alone, as a module, it needs torch; the command line is this repository's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "PUBLISHED", "Config", "Discovery", "State", "boundary_labels", "boundary_loss", "cam", "compact_labels",
    "discover", "distill", "normalised_cam", "refine", "select", "stitch",
]  # fmt: skip


def _option(default, help: str, *choices: str, **facts):
    return field(default=default, metadata={"help": help, **({"choices": choices} if choices else {}), **facts})


# fmt: off
@dataclass(frozen=True)
class Config:
    """One distillation.  The paper states little but ipc: each help text gives the reason of its default."""

    ipc: int = _option(10, "synthetic images per class", unit="images", minimum=1)
    pool: int = _option(300, "real images looked at per class; RDED's, so that only the rule differs", minimum=1)
    crops: int = _option(5, "random crops of each, squares; RDED's", minimum=1)
    crop_area: float = _option(0.08, "least share of the area in a crop; RDED's", minimum=0)
    kept: int = _option(1, "crops kept of each, t in Alg. 1; RDED's", minimum=1)
    cam_score: str = _option("mean", "class activation of a crop; Fig. 2 speaks of a ratio; mass favours large crops, "
                             "max has many ties", "mean", "max", "mass")
    confidence: str = _option("max", "CIDD keeps the low end of: the highest probability (text, Fig. 2), the true "
                              "class's, or the cross-entropy (Alg. 1 to the letter)", "max", "true", "ce_low")
    patches: int = _option(0, "patches in an image, beta; 0: as RDED 1 below 128 px, 4 from there", minimum=0)
    cam_relu: bool = _option(False, "cut class activations at 0 before they are scaled to [0, 1], as Grad-CAM does; "
                             "Eq. 4 has no such cut")
    cam_resize: str = _option("bilinear", "from the map to the image; smooth edges of the mask", "bilinear", "bicubic",
                              "nearest")
    mask_every: int = _option(0, "steps after which the mask is made anew; 0: never, as Alg. 1 has no CAM in its loop, "
                              "and a new one lets what is protected drift", unit="steps", minimum=0)
    epsilon: float = _option(0.5, "in Eq. 4; C is scaled to [0, 1] and M to M/epsilon, so that it fits any teacher")
    mask_steps: str = _option("adam", "what M multiplies: the final step, or the gradient, out of which Adam divides "
                              "a fixed factor", "adam", "gradient")
    optimizer: str = _option("adam", "as in SRe2L; sgd is Eq. 5 to the letter", "adam", "sgd")
    lr: float = _option(0.05, "eta in normalised pixels; EDC's value for a start at real images", minimum=0)
    schedule: str = _option("cosine", "of lr, to 0 over the iterations of a batch; EDC's and SRe2L's", "cosine",
                            "constant")
    iterations: int = _option(1000, "steps of each batch, I in Alg. 1; EDC's at ImageNet-1K", unit="steps", minimum=1)
    bn_weight: float = _option(0.01, "alpha_bn in Eq. 2; SRe2L's and CDA's", minimum=0)
    first_bn_multiplier: float = _option(1.0, "extra weight of the first BatchNorm layer; Eq. 3 has none", minimum=0)
    batch: int = _option(100, "images optimised together, their classes mixed as in running statistics; SRe2L's",
                         unit="images", minimum=1)
    least_area: float = _option(-1, "least share of the area in a step's crop, with flip; 0: neither; -1: none below "
                                "64 px (SRe2L at 32 px), 0.5 from there (EDC)", minimum=-1)
    jitter: int = _option(-1, "largest roll of a step; -1: 4 below 64 px (SRe2L), none from there (EDC)", unit="px",
                          minimum=-1)
    mix: str = _option("cutmix", "A in Eq. 6 while refining; students mix by their own recipe, RDED's cutmix", "cutmix",
                       "mixup")
    partner_gradient: bool = _option(False, "move the partner's pixels of a mixed image too; Alg. 1 updates the image "
                                     "itself alone")
    label_refinement: float = _option(0.0, "alpha_lr in Eq. 11; 1 is DBR+LR, whose weight is not stated", minimum=0)
    threshold: float = _option(math.log(2), "r in Eqs 9 and 12; ln 2 is the least that two labels can meet together, "
                               "as 2 exp(-r) <= 1", minimum=0)
    distance_temperature: float = _option(1.0, "of the softmax in d, Eqs 8 and 10, which have none")
    labels: str = _option("soft", "what students learn from: the teacher's probabilities (SL), its two highest (CL), "
                          "distances to two classes (boundary, DBR), or the classes (hard, OH)", "soft", "hard",
                          "compact", "boundary")
    boundary_weight: float = _option(2.0, "alpha_dbr in Eq. 9; at 1 the loss is flat between r and the teacher's "
                                     "distance, below 1 the teacher is ignored", minimum=0)
    precision: str = _option("fp32", "arithmetic of the convolutions", "bf16", "fp32")
    compile: bool = _option(False, "compile the step (needs a C++ compiler on a CPU)")
    # fmt: on

    def __post_init__(self):
        for f in fields(self):
            value, low, allowed = getattr(self, f.name), f.metadata.get("minimum"), f.metadata.get("choices")
            if allowed and value not in allowed:
                raise ValueError(f"{f.name}={value!r} is unknown; allowed: {', '.join(allowed)}")
            if low is not None and not value >= low:
                raise ValueError(f"{f.name}={value!r} is too small; the least is {low}")
        if self.kept > self.crops:
            raise ValueError(f"kept={self.kept} is more than crops={self.crops}; allowed: 1 to {self.crops}")
        if math.isqrt(self.patches) ** 2 != self.patches:
            raise ValueError(f"patches={self.patches} do not fill a square; allowed: 0 (by size), 1, 4, 9, 16, ...")
        if not 0 < self.crop_area <= 1:
            raise ValueError(f"crop_area={self.crop_area} is no share; allowed: above 0, at most 1")
        if not self.distance_temperature > 0:
            raise ValueError(f"distance_temperature={self.distance_temperature}; allowed: above 0")
        if not self.epsilon > 0:
            raise ValueError(f"epsilon={self.epsilon} leaves no mask; allowed: above 0")
        if self.least_area > 1 or -1 < self.least_area < 0:
            raise ValueError(f"least_area={self.least_area} is no share; allowed: 0 to 1, and -1 (by size)")

    def factor(self, size: int) -> int:
        """Patches along a side of an image."""
        return math.isqrt(self.patches or (1 if size < 128 else 4))

    def view(self, size: int) -> tuple[float | None, tuple[int, int]]:
        """What random_view takes: least area or None, bounds of the roll."""
        small = size < 64
        least = (None if small else 0.5) if self.least_area < 0 else self.least_area or None
        return least, (0, (4 if small else 0) if self.jitter < 0 else self.jitter)


TRANSFER = ("labels", "boundary_weight")  # what students alone read

# By (dataset, ipc or None for every ipc): what depends on the data; patches from RDED, bn_weight from SRe2L and CDA.
# The classes of the embedded digits are smaller than the pool.
PUBLISHED: dict[tuple[str, int | None], dict] = {
    ("digits", None): {"pool": 100},
    **{(name, None): {"patches": 1, "bn_weight": 0.01} for name in ("cifar10", "cifar100")},
    ("tiny-imagenet", None): {"patches": 1, "bn_weight": 0.05},
    **{(name, None): {"patches": 4, "bn_weight": 0.01} for name in ("imagenette", "imagewoof")},
    ("imagenet-1k", None): {"bn_weight": 0.01},  # patches by size: the ConvNet's images have 64 px
}


# ---------------------------------------------------------------- looking into a teacher


# --- begin shared block: teacher (a test keeps its copies equal) ---
def classifier_of(net: nn.Module) -> nn.Linear:
    """The last linear layer; what enters it is the feature f_e(x)."""
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f"the teacher {type(net).__name__} has no nn.Linear layer to read features from")
    return linear[-1]


def batch_norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    """Every BatchNorm2d, in module order (20 in a ResNet-18, 4,800 channels)."""
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    if not layers:
        raise ValueError(f"the teacher {type(net).__name__} has no BatchNorm2d layer to match statistics of")
    if any(bn.running_mean is None for bn in layers):
        raise ValueError(f"a BatchNorm2d layer of the teacher {type(net).__name__} has no running statistics to match")
    return layers


# --- end shared block ---


def _ready(teacher: nn.Module) -> torch.device:
    """Frozen, in eval mode, channels_last; returns its device."""
    return next(teacher.eval().requires_grad_(False).to(memory_format=torch.channels_last).parameters()).device


def _wide(x: Tensor) -> Tensor:
    """float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _channels(mean: tuple[float, ...], std: tuple[float, ...], device, dtype=torch.float32) -> list[Tensor]:
    """Mean and deviation of the teacher's pixels, two [C, 1, 1]."""
    return [torch.tensor(values, dtype=dtype, device=device)[:, None, None] for values in (mean, std)]


def _normalised(pixels: Tensor, shift: Tensor, unit: Tensor) -> Tensor:
    """[B, C, S, S] in [0, 1] -> what a teacher takes."""
    if not len(shift) == len(unit) == pixels.shape[1]:
        given = f"mean has {len(shift)} values, std {len(unit)}"
        raise ValueError(f"{given}; images of {pixels.shape[1]} channels need as many")
    return ((pixels - shift) / unit).contiguous(memory_format=torch.channels_last)


def cam(teacher: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Class activation maps (Eq. 1), raw: normalised images [B, C, S, S], labels [B] -> maps [B, h, w], logits [B, K].

    The last map of more than one pixel that a module hands on is weighted by the classifier's row of the label: per
    channel where the classifier takes one number a channel (where that is the average: mean of the map + bias = logit),
    per position where it takes the flattened map (sum + bias = logit).  ValueError where it takes neither.
    """
    last, entered = [], []

    def keep(_, __, out) -> None:
        if isinstance(out, Tensor) and out.dim() == 4 and out.shape[2:].numel() > 1:
            last[:] = [out]

    classifier = classifier_of(teacher)
    hooks = [m.register_forward_hook(keep) for m in teacher.modules()]
    hooks.append(classifier.register_forward_pre_hook(lambda _, given: entered.append(given[0])))
    try:
        logits = teacher(images)
    finally:
        for hook in hooks:
            hook.remove()
    weight = classifier.weight[labels]  # [B, D]
    if not last:
        raise ValueError(f"the teacher {type(teacher).__name__} has no class activation map: it makes no map at all")
    maps = last[0].to(weight.dtype)  # [B, D', h, w]
    if weight.shape[1] == maps.shape[1]:  # averaged, or pooled in another way
        weight = weight[:, :, None, None]
    elif any(_same(entered[-1].flatten(1), m.flatten(1)) for m in (maps, maps.relu())):  # a ReLU may be no module
        weight = weight.view(-1, *maps.shape[1:])
    else:
        raise ValueError(
            f"the teacher {type(teacher).__name__} has no class activation map: its last map is "
            f"{list(maps.shape[1:])}, its classifier takes {weight.shape[1]} features that are neither that map nor "
            "one number a channel; allowed: a map that is averaged or flattened before the classifier"
        )
    return (weight * maps).sum(1), _wide(logits)


def _same(features: Tensor, other: Tensor) -> bool:
    """Equal but for the rounding of the arithmetic; without numbers (a plan's meta device) of equal shape."""
    if features.shape != other.shape or features.is_meta:
        return features.shape == other.shape
    features, other = _wide(features), _wide(other)
    return not (features - other).norm() > 0.02 * other.norm()  # what is not finite is said elsewhere


def normalised_cam(maps: Tensor, size: int, *, relu: bool = False, resize: str = "bilinear") -> Tensor:
    """Each map scaled to [0, 1] by its least and greatest value, then resized: [B, h, w] -> [B, size, size].

    relu: what is below 0 is 0 first.  resize: bilinear, bicubic or nearest.
    """
    maps = maps.relu() if relu else maps
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
    return F.interpolate(maps[:, None], (size, size), mode=resize)[:, 0].clamp(0, 1)  # bicubic leaves [0, 1]


def noncritical_mask(heat: Tensor, epsilon: float) -> Tensor:
    """M/epsilon of Eq. 4, in [0, 1]: 0 where the scaled activation [B, S, S] reaches epsilon."""
    return (epsilon - heat).clamp(min=0) / epsilon


# ---------------------------------------------------------------- critical-based initial data discovery


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


def crop_scores(heat: Tensor, boxes: Tensor, kind: str) -> Tensor:
    """Mean, max or mass of heat [B, S, S] in boxes [B, k, 4] (top, left, height, width; not always whole) -> [B, k]."""
    pixel, boxes = torch.arange(heat.shape[-1]).to(heat), boxes.to(heat)
    start, end = boxes[..., :2, None], (boxes[..., :2] + boxes[..., 2:])[..., None]  # [B, k, 2, 1]
    rows, columns = (torch.minimum(pixel + 1, end) - torch.maximum(pixel, start)).clamp(min=0).unbind(2)  # [B, k, S]
    if kind == "max":
        touched = (rows > 1e-3)[..., :, None] & (columns > 1e-3)[..., None, :]
        return heat[:, None].where(touched, -math.inf).flatten(2).amax(2)
    mass = torch.einsum("bkh,bhw,bkw->bk", rows, heat, columns)
    return mass if kind == "mass" else mass / (rows.sum(2) * columns.sum(2))


def confidence(logits: Tensor, label: int, kind: str) -> Tensor:
    """What patches are sorted by, ascending: logits [B, K] -> [B]."""
    log_p = _wide(logits).log_softmax(1)
    return {"max": log_p.amax(1).exp(), "true": log_p[:, label].exp(), "ce_low": -log_p[:, label]}[kind]


@torch.no_grad()
def check(config: Config, teacher: nn.Module, labels: Tensor, *, size: int, side: int | None = None) -> None:
    """ValueError that names what cannot work, before any work: a class smaller than the pool, a pool too small for the
    tiles, patches larger than most images (`side`: their median shorter side), a teacher that lacks a class, BatchNorm
    or class activation maps at this size.

    labels int64 [N].  The teacher need not be trained yet.
    """
    counts, known = torch.bincount(labels.cpu()), classifier_of(teacher).out_features
    if known < len(counts):
        raise ValueError(f"the teacher tells {known} classes apart, the images have {len(counts)}: it lacks some")
    batch_norms(teacher)
    if counts.min() < config.pool:
        few = int(counts.argmin())
        raise ValueError(f"pool={config.pool} is more than the {counts[few]} images of class {few}, all it may be")
    _checked(config, size, config.pool, size if side is None else side)
    first, was = next(m for m in teacher.modules() if isinstance(m, nn.Conv2d)), teacher.training
    shades = torch.linspace(-1, 1, first.in_channels * size * size).view(1, first.in_channels, size, size)
    shades = shades.to(first.weight)
    cam(teacher.eval(), shades, torch.zeros(1, dtype=torch.long, device=shades.device))  # says so where there is none
    teacher.train(was)


def _checked(config: Config, size: int, pool: int, side: int) -> tuple[int, int]:
    """Side of a patch and patches that a class needs; ValueError where images of this shorter side cannot give them."""
    patch, needed = size // config.factor(size), config.ipc * config.factor(size) ** 2
    if needed > pool * config.kept:
        raise ValueError(
            f"ipc={config.ipc} takes {needed} patches a class; a pool of {pool} images with kept={config.kept} "
            f"gives {pool * config.kept}"
        )
    if not 0 < patch <= side:  # a few smaller ones are enlarged, as in RDED
        raise ValueError(
            f"patches of {patch} px (size={size}, {config.factor(size)} a side) do not fit images whose shorter side "
            f"is {side} px; pass a size up to {side * config.factor(size)}"
        )
    return patch, needed


def _whole(images: Tensor, sizes: Tensor, size: int, shift: Tensor, unit: Tensor) -> Tensor:
    """Whole images as the teacher takes them: uint8 [n, C, H, W], heights and widths [n, 2] -> [n, C, size, size]."""
    boxes, unflipped = torch.cat([torch.zeros_like(sizes), sizes], 1).cpu(), torch.zeros(len(images), dtype=torch.bool)
    return _normalised(crop_resize(images.to(shift.device), boxes, unflipped, size) / 255, shift, unit)


@torch.no_grad()
def select(
    teacher: nn.Module, images: Tensor, sizes: Tensor | None, label: int, config: Config, *, size: int,
    mean: tuple[float, ...], std: tuple[float, ...], generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """CIDD for one class: of each image the crops with the highest class activation, of these the hardest.

    images: uint8 [n, C, H, W]; sizes: their real heights and widths int64 [n, 2] on a padded canvas, None: H and W.
    Returns patches float32 [I f f, C, p, p] in 0..255 with p = size // f, hardest first, and their scores [I f f].
    """
    device = _ready(teacher)
    sizes = torch.tensor(images.shape[2:]).expand(len(images), 2) if sizes is None else sizes.cpu()
    patch, needed = _checked(config, size, len(images), int(sizes.amin(1).median()))
    boxes = random_boxes(sizes.repeat_interleave(config.crops, 0), generator, (config.crop_area, 1.0), (1.0, 1.0))
    boxes = boxes.unflatten(0, (-1, config.crops))  # [n, k, 4]
    shift, unit = _channels(mean, std, device)
    patches, scores = [], []
    for rows in torch.arange(len(images)).split(config.batch):
        pixels, real = images[rows].to(device), sizes[rows]
        view = _whole(pixels, real, size, shift, unit)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            maps, _ = cam(teacher, view, torch.full((len(rows),), label, device=device))
        in_view = boxes[rows] * (size / real.repeat(1, 2))[:, None]  # both sides become `size`
        heat = normalised_cam(maps, size, relu=config.cam_relu, resize=config.cam_resize)
        score = crop_scores(heat, in_view, config.cam_score)
        best = score.topk(config.kept, 1).indices.cpu()[..., None].expand(-1, -1, 4)
        cut = crop_resize(
            pixels.repeat_interleave(config.kept, 0), boxes[rows].gather(1, best).flatten(0, 1),
            torch.zeros(len(rows) * config.kept, dtype=torch.bool), patch,
        )  # fmt: skip
        edge = (size - patch) // 2, size - patch - (size - patch) // 2
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            framed = F.pad(_normalised(cut / 255, shift, unit), edge * 2)  # by the mean colour, as in RDED
            logits = teacher(framed)
        patches.append(cut)
        scores.append(confidence(logits, label, config.confidence))
    score = torch.cat(scores)
    if not score.isfinite().all():
        raise FloatingPointError(f"scores of class {label} are not finite; look at the teacher or try precision=fp32")
    order = score.argsort(stable=True)[:needed]
    return torch.cat(patches)[order], score[order]


# --- begin shared block: recognises (a test keeps its copies equal) ---
@torch.no_grad()
def recognises(teacher: nn.Module, seen: Callable[[Tensor], Tensor], labels: Tensor) -> None:
    """ValueError where a teacher is near chance on 200 of its images, most often for another order of the classes.

    seen: rows int64 [n] -> real images as the teacher takes them [n, C, S, S]; labels int64 [N].
    """
    rows = torch.linspace(0, len(labels) - 1, min(200, len(labels))).long()
    answers = torch.cat([teacher.eval()(seen(part)) for part in rows.split(50)]).cpu()
    right, chance = (answers.argmax(1) == labels.cpu()[rows]).double().mean().item(), 1 / answers.shape[1]
    if right < chance + min(3 * math.sqrt(chance * (1 - chance) / len(rows)), (1 - chance) / 2):  # 3 standard errors
        raise ValueError(
            f"the teacher recognises {100 * right:.1f} % of {len(rows)} real images, near the {100 * chance:.3g} % of "
            "guessing: are its classes in the order of the labels, and are mean and std those that it was trained with?"
        )


# --- end shared block ---


# --- begin shared block: stitch (a test keeps its copies equal) ---
def stitch(patches: Tensor, factor: int, size: int) -> Tensor:
    """Put factor x factor patches together: [I f f, C, p, p], best first -> [I, C, size, size].

    Tile t (row by row) of image i is patch t I + i, so the first tiles of all images are the best patches.  Where the
    side does not divide, the first tiles are a pixel larger and their patches are resized to the nearest pixel.
    """
    tiles = patches.unflatten(0, (factor, factor, -1))  # [f, f, I, C, p, p]
    sides = [size // factor + (i < size % factor) for i in range(factor)]
    rows = [
        torch.cat([F.interpolate(tiles[r, c], (sides[r], sides[c]), mode="nearest") for c in range(factor)], 3)
        for r in range(factor)
    ]
    return torch.cat(rows, 2)


# --- end shared block ---


# ---------------------------------------------------------------- distances to the two labels


def boundary_labels(logits: Tensor, y: Tensor, y_partner: Tensor, temperature: float = 1.0) -> Tensor:
    """d of Eqs 8 and 10: logits [B, K] of mixed images and their two labels [B] -> [B, 2], -log softmax at each."""
    return -(_wide(logits) / temperature).log_softmax(1).gather(1, torch.stack([y, y_partner], 1))


def hinge(distances: Tensor, threshold: float) -> Tensor:
    """L_sce of Eq. 9 and L_lr of Eq. 12, averaged over the batch: distances [B, 2] -> []."""
    return (distances - threshold).relu().sum(1).mean()


def boundary_loss(
    logits: Tensor, d_teacher: Tensor, y: Tensor, y_partner: Tensor, *, threshold: float, weight: float,
    temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """The student's loss on mixed images (Eqs 9, 10): logits [B, K], the teacher's distances [B, 2] -> []."""
    distances = boundary_labels(logits, y, y_partner, temperature)
    return hinge(distances, threshold) + weight * (distances - d_teacher).abs().sum(1).mean()


def compact_labels(logits: Tensor, temperature: float) -> Tensor:
    """Labels of the variant CL: logits [B, K] -> logits whose softmax(. / T) keeps the two highest probabilities and
    shares the rest evenly among the other K - 2 classes."""
    log_p = (_wide(logits) / temperature).log_softmax(1)
    top = log_p.topk(2, 1)
    others = log_p.scatter(1, top.indices, -math.inf).logsumexp(1, keepdim=True) - math.log(max(logits.shape[1] - 2, 1))
    return temperature * others.expand_as(log_p).scatter(1, top.indices, top.values)


def transfer(
    labels: str, config: Config, temperature: float, kd_loss: Callable[[Tensor, Tensor, float], Tensor]
) -> tuple[Callable | None, Callable | None]:
    """What is kept of the teacher's logits for a kind of labels, and what a student makes of it.

    The first takes logits [B, K], labels and partners' labels [B] -> [B, ...]; the second the student's logits, what
    was kept, labels and partners' labels -> [].  None: the logits themselves, and kd_loss(student, teacher, T).
    """
    if labels == "compact":
        return None, lambda z, kept, y, other: kd_loss(z, compact_labels(kept, temperature), temperature)
    if labels != "boundary":
        return None, None
    softer = {"temperature": config.distance_temperature}
    loss = partial(boundary_loss, threshold=config.threshold, weight=config.boundary_weight, **softer)
    return partial(boundary_labels, **softer), loss


def random_mix(kind: str, size: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A of Eq. 6: partners int64 [count] and the share [size, size] of an image itself; lambda ~ U(0, 1).

    cutmix: 0 in a box of side size sqrt(1 - lambda) around a uniform pixel, cut at the border, else 1; mixup: lambda.
    """
    partner = torch.randperm(count, generator=generator)
    share = torch.rand((), generator=generator, dtype=torch.float64).item()
    if kind == "mixup":
        return partner, torch.full((size, size), share)
    half = int(size * math.sqrt(1 - share)) // 2
    y, x = torch.randint(size, (2,), generator=generator).tolist()
    own = torch.ones(size, size)
    own[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
    return partner, own


# ---------------------------------------------------------------- non-critical region refinement


# --- begin shared block: moments (a test keeps its copies equal) ---
def power_sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of values and of squares over the middle dimension: [G, n, C] -> two [G, C], float32 at least.

    A CPU converts pieces that stay in its cache: four times faster than one wide copy of bf16 rows.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return rows.sum(1, dtype=wide), rows.to(wide).square().sum(1)
    sums = torch.zeros(2, rows.shape[0], rows.shape[2], dtype=wide)
    for group, total, squares in zip(rows, *sums, strict=True):
        for piece in group.split(max(1, 2**18 // rows.shape[2])):
            piece = piece.to(wide)
            total += piece.sum(0)
            squares += piece.square().sum(0)
    return sums[0], sums[1]


class _Moments(torch.autograd.Function):
    """Channel mean and variance of groups of images, with the gradient in closed form and no copy of the input.

    x [B, C, H, W] -> mean, variance [G, C], float32 at least, over the B/G images of a group and all positions.
    d/dx <g_m, mean> + <g_v, variance> = (g_m + 2 (x - mean) g_v) / n, one fused multiply-add over x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, groups: int):
        b, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(groups, -1, c)  # [G, I*H*W, C], a view when channels_last
        total, squares = power_sums(rows)
        mean = total / rows.shape[1]
        ctx.save_for_backward(rows, mean)
        ctx.shape = (b, h, w, c)
        return mean, squares / rows.shape[1] - mean.square()

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor):
        rows, mean = ctx.saved_tensors
        scale = 2 / rows.shape[1] * grad_var  # [G, C]
        shift = grad_mean / rows.shape[1] - mean * scale
        grad = torch.addcmul(shift[:, None].to(rows.dtype), rows, scale[:, None].to(rows.dtype))
        return grad.reshape(ctx.shape).permute(0, 3, 1, 2), None


# --- end shared block ---


# --- begin shared block: view (a test keeps its copies equal) ---
class View(NamedTuple):
    """One crop, flip and roll shared by a whole batch, in pixels."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    down: int
    right: int


def random_view(size: int, least: float | None, roll: tuple[int, int], generator: torch.Generator) -> View:
    """Draws the view of one step.

    Crop: area share U(least, 1), aspect log-uniform in (3/4, 4/3), ten tries, else the whole image; flip with
    probability 1/2; neither where least is None.  Roll by whole pixels, uniform between the two bounds, both included.
    """
    top = left = 0
    height = width = size
    if least is not None:
        for area, aspect in torch.rand(10, 2, generator=generator, dtype=torch.float64).tolist():
            area = size * size * (least + (1 - least) * area)
            ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * aspect)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= size and 0 < h <= size:
                width, height = w, h
                break
        place = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        top, left = int(place[0] * (size - height + 1)), int(place[1] * (size - width + 1))
    flip = least is not None and torch.rand((), generator=generator).item() < 0.5
    down, right = torch.randint(roll[0], roll[1] + 1, (2,), generator=generator).tolist()
    return View(top, left, height, width, flip, down, right)


def view_matrices(view: View, size: int) -> tuple[Tensor, Tensor]:
    """The same view as two matrices [S, S]: rows @ image @ columns.T."""
    rows, columns = resample_matrix(torch.tensor(view[:2]), torch.tensor(view[2:4]), size, size)
    columns = columns.flip(0) if view.flip else columns
    return rows.roll(view.down, 0), columns.roll(view.right, 0)


def see(x: Tensor, view: View) -> Tensor:
    """x [B, C, S, S] through `view`: crop, resize to S x S, flip, roll.

    By matrices on a GPU, where their gradient is deterministic; by the library's resize on a CPU, where it is faster.
    """
    size = x.shape[-1]
    if x.device.type == "cpu":
        x = x[:, :, view.top : view.top + view.height, view.left : view.left + view.width]
        x = F.interpolate(x, (size, size), mode="bilinear")
        return (x.flip(3) if view.flip else x).roll((view.down, view.right), (2, 3))
    rows, columns = (m.to(x.device) for m in view_matrices(view, size))
    return ((x @ columns.T).transpose(2, 3) @ rows.T).transpose(2, 3)


# --- end shared block ---


@contextmanager
def batch_statistics(teacher: nn.Module, parts: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Hooks that append to a list, at each forward, channel mean and variance [1, C] of what enters each BatchNorm:
    those of the first of `parts` equal parts of the batch."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_, entering) -> None:
        seen.append(_Moments.apply(entering[0][: len(entering[0]) // parts], 1))

    hooks = [bn.register_forward_pre_hook(keep) for bn in batch_norms(teacher)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _norm(x: Tensor) -> Tensor:  # any shape -> []; smooth at 0
    return (x.square().sum() + 1e-12).sqrt()


def objective(logits: Tensor, moments: list, running: list, y: Tensor, y_partner: Tensor, config: Config) -> Tensor:
    """Eq. 11: logits [B, K], or [2B, K] with those of the mixed images behind, labels [B] -> []."""
    logits = _wide(logits)
    loss = F.cross_entropy(logits[: len(y)], y)
    for number, ((mean, var), (mean_l, var_l)) in enumerate(zip(moments, running, strict=True)):  # Eq. 3
        multiplier = config.first_bn_multiplier if number == 0 else 1.0
        loss = loss + config.bn_weight * multiplier * (_norm(mean - mean_l) + _norm(var - var_l))
    if config.label_refinement:  # Eq. 12
        distances = boundary_labels(logits[len(y) :], y, y_partner, config.distance_temperature)
        loss = loss + config.label_refinement * hinge(distances, config.threshold)
    return loss


def learning_rate(config: Config, step: int) -> float:
    """Cosine from lr to 0 over the iterations of a batch, or lr."""
    if config.schedule == "constant":
        return config.lr
    return 0.5 * config.lr * (1 + math.cos(math.pi * step / config.iterations))


def adam_step(gradient: Tensor, first: Tensor, second: Tensor, step: int) -> Tensor:
    """Adam's step number 1, 2, ... for a learning rate of 1 and betas (0.5, 0.9); updates both moments in place."""
    first.lerp_(gradient, 0.5)
    second.lerp_(gradient.square(), 0.1)
    return first / (1 - 0.5**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)


@dataclass
class State:
    """Where a refinement stands; `tensors()` is all that is needed to continue it bit for bit."""

    images: Tensor  # float32 [M, C, S, S] in [0, 1], on the CPU; those of later batches are still as they came
    before: Tensor  # as they came
    mask: Tensor  # float32 [M, S, S] in [0, 1]: M/epsilon of Eq. 4
    order: Tensor  # int64 [M]: batches are consecutive pieces of it
    generator: Tensor  # state of the generator, uint8
    number: int = 0  # batch
    step: int = 0  # steps done in this batch
    loss: float = math.nan  # at the last multiple of 50 steps
    live: tuple[Tensor, Tensor, Tensor] | None = None  # images in flight and Adam's two moments, on the device
    rows: Tensor | None = None  # int64 [B], their numbers

    def tensors(self) -> dict[str, Tensor]:
        out = {name: getattr(self, name) for name in ("images", "before", "mask", "order", "generator")}
        out["at"] = torch.tensor([self.number, self.step])
        if self.live is None:
            return out
        x, first, second = (t.detach().cpu() for t in self.live)
        if not x.isfinite().all():
            raise FloatingPointError(
                f"the images are not finite after step {self.step} of batch {self.number}; the last good state is "
                "kept; try a smaller lr or precision=fp32"
            )
        return out | {"images": self.images.index_copy(0, self.rows, x), "first": first, "second": second}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> State:
        kept = {name: t for name, t in tensors.items() if name not in ("at", "first", "second")}
        state = cls(**kept, number=int(tensors["at"][0]), step=int(tensors["at"][1]))
        if "first" in tensors:
            state.live = (torch.empty(0), tensors["first"], tensors["second"])
        return state


@torch.no_grad()
def masks_of(teacher: nn.Module, x: Tensor, labels: Tensor, config: Config) -> Tensor:
    """M/epsilon of Eq. 4 for the teacher's input x [B, C, S, S] -> [B, S, S]."""
    heat = normalised_cam(cam(teacher, x, labels)[0], x.shape[-1], relu=config.cam_relu, resize=config.cam_resize)
    return noncritical_mask(heat, config.epsilon)


@torch.no_grad()
def begin(
    teacher: nn.Module, images: Tensor, labels: Tensor, config: Config, *, mean: tuple[float, ...],
    std: tuple[float, ...], generator: torch.Generator,
) -> State:  # fmt: skip
    """The state before the first step: masks of all images, and which of them share a batch."""
    device = _ready(teacher)
    shift, unit = _channels(mean, std, device, images.dtype)
    masks = [
        masks_of(teacher, _normalised(x.to(device), shift, unit), y.to(device), config).cpu()
        for x, y in zip(images.split(config.batch), labels.split(config.batch), strict=True)
    ]
    order = torch.randperm(len(images), generator=generator)
    return State(images.clone(), images, torch.cat(masks), order, generator.get_state())


def refine(
    teacher: nn.Module, images: Tensor, labels: Tensor, config: Config, *, mean: tuple[float, ...],
    std: tuple[float, ...], generator: torch.Generator, state: State | None = None,
    on_step: Callable[[State], None] | None = None,
) -> Tensor:  # fmt: skip
    """Move the non-critical pixels of images float [M, C, S, S] in [0, 1] down Eq. 11, on the teacher's device.

    labels int64 [M] -> the refined images, in the order of those given, on the CPU.  `state` continues an earlier run,
    `on_step` sees the state after every step.  Raises FloatingPointError when the loss is not finite (looked at every
    50 steps).
    """
    device, size, mixing = _ready(teacher), images.shape[-1], config.label_refinement > 0
    running = [(bn.running_mean, bn.running_var) for bn in batch_norms(teacher)]
    state = state or begin(teacher, images, labels, config, mean=mean, std=std, generator=generator)
    generator.set_state(state.generator)
    shift, unit = _channels(mean, std, device, images.dtype)
    batches = state.order.tensor_split(math.ceil(len(images) / config.batch))
    with batch_statistics(teacher, 2 if mixing else 1) as moments:

        def loss_of(view: Tensor, y: Tensor, y_partner: Tensor) -> Tensor:
            moments.clear()
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                logits = teacher(view)
            return objective(logits, moments, running, y, y_partner, config)

        run = torch.compile(loss_of) if config.compile else loss_of
        while state.number < len(batches):
            rows = batches[state.number]
            x, y = state.images[rows].to(device).requires_grad_(), labels[rows].to(device)
            mask = state.mask[rows, None].to(device)  # [B, 1, S, S]
            begun = state.live[1:] if state.live else (torch.zeros_like(x), torch.zeros_like(x))
            adam = [t.to(device) for t in begun]
            for step in range(state.step, config.iterations):
                if config.mask_every and step and step % config.mask_every == 0:
                    state.mask[rows] = masks_of(teacher, _normalised(x, shift, unit), y, config).cpu()
                    mask = state.mask[rows, None].to(device)
                view, y_partner = see(x, random_view(size, *config.view(size), generator)), y
                if mixing:  # mixed images are the second half of the batch; Alg. 1 updates x_org alone
                    partner, own = (t.to(device) for t in random_mix(config.mix, size, len(rows), generator))
                    other = view if config.partner_gradient else view.detach()
                    mixed = own * view + (1 - own) * other[partner]
                    view, y_partner = torch.cat([view, mixed]), y[partner]
                loss = run(_normalised(view, shift, unit), y, y_partner)
                gradient = torch.autograd.grad(loss, x)[0] * unit  # by normalised pixels, as lr is
                if config.mask_steps == "gradient":
                    gradient = mask * gradient
                way = gradient if config.optimizer == "sgd" else adam_step(gradient, *adam, step + 1)
                if config.mask_steps == "adam":
                    way = mask * way
                with torch.no_grad():
                    x.sub_(learning_rate(config, step) * unit * way).clamp_(0, 1)  # Eq. 5
                if step % 50 == 49 or step + 1 == config.iterations:
                    state.loss = _finite(loss, step, state.number, config)
                state.step, state.rows, state.live = step + 1, rows, (x, *adam)
                state.generator = generator.get_state()
                if on_step:
                    on_step(state)
            state.images[rows] = x.detach().cpu()
            state.live, state.step, state.number = None, 0, state.number + 1
    return state.images


def _finite(loss: Tensor, step: int, number: int, config: Config) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the refinement loss is {value} at step {step} of batch {number} (lr={config.lr}, "
            f"bn_weight={config.bn_weight}); the last good state is kept; try a smaller lr or precision=fp32"
        )
    return value


@dataclass
class Discovery:
    """Where a discovery stands; classes are finished one by one."""

    images: Tensor  # float32 [K*I, C, S, S] in [0, 1]; those of later classes are still zero
    generator: Tensor  # state of the generator, uint8
    number: int = 0  # classes done

    def tensors(self) -> dict[str, Tensor]:
        return {"images": self.images, "generator": self.generator, "at": torch.tensor([self.number])}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> Discovery:
        return cls(tensors["images"], tensors["generator"], int(tensors["at"]))


@torch.no_grad()
def discover(
    images: Tensor | Callable[[Tensor], tuple[Tensor, Tensor]], labels: Tensor, teacher: nn.Module, config: Config, *,
    size: int | None = None, sizes: Tensor | None = None, mean: tuple[float, ...], std: tuple[float, ...],
    generator: torch.Generator, state: Discovery | None = None, on_step: Callable[[Discovery], None] | None = None,
) -> Tensor:  # fmt: skip
    """CIDD of all classes: the hardest patches that hold what the teacher looks at, put together; arguments as for
    `distill` -> float32 [K*I, C, S, S] in [0, 1], on the CPU.  on_step sees the state after every class."""
    labels = labels.cpu()
    if callable(images):
        read, side = images, None
    else:
        size = size or images.shape[2]
        sizes = torch.tensor(images.shape[2:]).expand(len(images), 2) if sizes is None else sizes
        read, side = lambda rows: (images[rows], sizes[rows]), int(sizes.amin(1).median())
    check(config, teacher, labels, size=size, side=side)
    classes = int(labels.max()) + 1
    if state is None:
        shift, unit = _channels(mean, std, _ready(teacher))
        recognises(teacher, lambda rows: _whole(*read(rows), size, shift, unit), labels)
    else:
        generator.set_state(state.generator)
    for k in range(state.number if state else 0, classes):
        own = (labels == k).nonzero().flatten()
        drawn = own[torch.randperm(len(own), generator=generator)[: config.pool]]
        patches, _ = select(teacher, *read(drawn), k, config, size=size, mean=mean, std=std, generator=generator)
        made = stitch(patches, config.factor(size), size).cpu() / 255
        if state is None:
            state = Discovery(made.new_zeros(classes * len(made), *made.shape[1:]), generator.get_state())
        state.images[k * len(made) : (k + 1) * len(made)] = made
        state.number, state.generator = k + 1, generator.get_state()
        if on_step:
            on_step(state)
    return state.images


def distill(
    images: Tensor | Callable[[Tensor], tuple[Tensor, Tensor]], labels: Tensor, teacher: nn.Module, config: Config, *,
    size: int | None = None, sizes: Tensor | None = None, mean: tuple[float, ...], std: tuple[float, ...],
    generator: torch.Generator, state: State | None = None, on_step: Callable[[State], None] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The whole method on images uint8 [N, C, H, W] and labels int64 [N] (0..K-1), with a trained teacher.

    size: side of the synthetic images, None: H.  sizes: real heights and widths int64 [N, 2] on a padded canvas.  Where
    the images do not fit into memory, `images` is a function that reads those of some rows, int64 [n] -> (images,
    sizes), and `size` is given.  Returns images and `before`, their state after CIDD, float32 [K*I, C, S, S] in [0, 1],
    labels [K*I], and `mask` [K*I, S, S] in [0, 1], M/epsilon of Eq. 4.
    """
    facts = {"mean": mean, "std": std, "generator": generator}
    distilled = torch.arange(int(labels.max()) + 1).repeat_interleave(config.ipc)
    if state is None:
        before = discover(images, labels, teacher, config, size=size, sizes=sizes, **facts)
        state = begin(teacher, before, distilled, config, **facts)
    refined = refine(teacher, state.before, distilled, config, state=state, on_step=on_step, **facts)
    return {"images": refined, "labels": distilled, "before": state.before, "mask": state.mask}


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from common import cli, script, teachers
    from methods import rded

    sys.exit(
        cli.guard(
            lambda a: script.run_with_teacher(
                a, "nrr_dd", Config, PUBLISHED, State.restore, distill, check=check, native=True, small="convnet3",
                factor=Config.factor, student=rded.student_recipe, recipes=teachers.SQUEEZE,
                passes=lambda config, classes: math.ceil(classes * config.ipc / config.batch), transfer=transfer,
                students_read=TRANSFER,
            ),
            sys.argv[1:],
        )
    )
