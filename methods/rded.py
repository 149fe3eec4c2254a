"""RDED: distilled images put together from the crops of real images that a teacher finds most realistic.

Sun et al., On the Diversity and Realism of Distilled Dataset: An Efficient Dataset Distillation Paradigm, CVPR 2024
(arXiv 2312.03526; github.com/LINs-lab/RDED).

    python methods/rded.py dataset=imagenette ipc=10 data=~/data     # teacher, distilled set, student accuracy

Nothing is optimised.  With f = `factor` and a teacher T, for each class y of a random pool of its images:

    s(x) = -log softmax(T(pad(x)))_y                  how far a crop x of S/f pixels is from being recognised as y
    x_i  = argmin over `crops` random square crops x of image i of s(x)               one crop an image: diversity
    the I f f crops x_i with the lowest s, best first                                 realism
    f x f of them make a distilled image; tile t of image i is the crop of rank t I + i

pad() adds a border of the mean colour up to S x S.  Labels are the teacher's, on the views the student is trained on.

Paper against released code, and what we take:
  labels      the paper speaks of labels of regions; the code labels whole views      -> as the code
  pool        the code lists files in an order without a seed                         -> drawn from `generator`
  storage     the code writes JPEG of quality 75                                      -> uint8 levels, truncated alike
  student     the code runs each training batch twice through the student             -> BatchNorm momentum 0.19, once
  result      the code prints the best of six tests                                   -> both, in papers/
  pool size   a default of 600 in the code is more than a class of CIFAR-100 has      -> 300, as in its scripts
  teacher     published weights by a recipe that is not; torchvision's on ImageNet-1K -> trained by the command: SRe2L's
              recipes on CIFAR and Tiny-ImageNet, WMDD's elsewhere, `teacher_epochs`=50
Copied alone, as a module, it needs torch; the command line is this repository's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "CIFAR100_CONVNET3", "LEARNING_RATES", "PUBLISHED", "Config", "State", "batch_size", "check", "distill",
    "learning_rate", "pool_of", "resolved", "score", "select", "shuffle_patches", "stitch", "student_recipe",
]  # fmt: skip


def _option(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


@dataclass(frozen=True)
class Config:
    """One distillation; the defaults are the released scripts at ImageNette, 224 px."""

    ipc: int = _option(10, "synthetic images per class", unit="images", minimum=1)
    factor: int = _option(
        0, "tiles along each side of an image; 0: 1 below 128 px, else 2", unit="tiles", minimum=0, source="scripts"
    )
    crops: int = _option(5, "random crops of each image that are looked at", unit="crops", minimum=1, source="scripts")
    pool: int = _option(300, "real images looked at per class", unit="images", minimum=1, source="scripts: mipc")
    batch: int = _option(100, "crops per forward; changes memory and speed alone", unit="crops", minimum=1)
    precision: str = _option("fp32", "arithmetic of the teacher", choices=("bf16", "fp32"))
    compile: bool = _option(False, "compile the teacher (needs a C++ compiler on a CPU)")

    def __post_init__(self):
        for f in fields(self):
            value, low, allowed = getattr(self, f.name), f.metadata.get("minimum"), f.metadata.get("choices")
            if allowed and value not in allowed:
                raise ValueError(f"{f.name}={value!r} is unknown; allowed: {', '.join(allowed)}")
            if low is not None and not value >= low:
                raise ValueError(f"{f.name}={value!r} is too small; the least is {low}")


# Published settings by (dataset, ipc or None for every ipc).  Source: scripts/ and argument.py of LINs-lab/RDED; the
# classes of the embedded digits are smaller than the published pool.
PUBLISHED: dict[tuple[str, int | None], dict] = {
    ("digits", None): {"pool": 100},
    ("cifar10", None): {"factor": 1, "crops": 5, "pool": 300},
    ("cifar100", None): {"factor": 1, "crops": 5, "pool": 300},
    ("tiny-imagenet", None): {"factor": 1, "crops": 5, "pool": 300},
    ("imagenette", None): {"factor": 2, "crops": 5, "pool": 300},
    ("imagewoof", None): {"factor": 2, "crops": 5, "pool": 300},
    ("imagenet-1k", None): {"crops": 5, "pool": 300},  # factor by size: the ConvNet's images have 64 px
}


# ---------------------------------------------------------------- the student's recipe

# First AdamW learning rate by student; over E epochs it falls as lr (1 + cos(pi e / 2E)) / 2, to half.  Source:
# argument.py, where a student outside the list silently trains with 0.
LEARNING_RATES: dict[str, float] = {
    **dict.fromkeys(("convnet3", "convnet4", "convnet5", "convnet6", "resnet18", "resnet50", "resnet101"), 1e-3),
    "mobilenet_v2": 2.5e-3,
    "efficientnet_b0": 2e-3,
    "vgg11": 5e-4,
    **dict.fromkeys(("alexnet", "vit_b_16", "swin_v2_t"), 1e-4),
}
CIFAR100_CONVNET3 = {"batch": 25, "lr": 2e-3}  # the scripts' own values where ConvNet-3 is teacher and student


def learning_rate(student: str) -> float:
    """The published learning rate of a student; a stem or norm behind a hyphen (resnet18-mod) changes nothing."""
    family = student.split("-")[0]
    if family not in LEARNING_RATES:
        raise ValueError(f"no learning rate is published for student={student!r}; known: {', '.join(LEARNING_RATES)}")
    return LEARNING_RATES[family]


def batch_size(classes: int, ipc: int, dataset: str = "") -> int:
    """The published batch of the student, never more than the distilled set; only IPC 1, 10 and 50 have one."""
    rows = {10: (10, 50, 100), 100: (20, 100, 200), 1000: (20, 100, 200)}
    row = (100, 100, 100) if dataset == "tiny-imagenet" else rows.get(classes)
    if row is None or ipc not in (1, 10, 50):
        raise ValueError(
            f"no batch size is published for classes={classes} and ipc={ipc} ({dataset or 'any set'}); known: 10, 100 "
            "or 1000 classes or tiny-imagenet, and ipc 1, 10 or 50; set it by hand"
        )
    return min(row[(1, 10, 50).index(ipc)], ipc * classes)


def _nearest(value: int, *known: int) -> int:
    return min(known, key=lambda n: abs(math.log(n / value)))


def student_recipe(dataset: str, classes: int, network: str, factor: int, ipc: int) -> dict:
    """The released evaluation as fields of a recipe: half a cosine, patch shuffle, crops of at least a tile, CutMix.

    bn_momentum: the code runs each batch through the student twice, 1 - 0.9^2 in one pass leaves the same statistics.
    Where no batch is published, it is that of the nearest IPC and number of classes.
    """
    batch = batch_size(_nearest(classes, 10, 100, 1000), _nearest(ipc, 1, 10, 50), dataset)
    own = {"batch": min(batch, ipc * classes), "lr": learning_rate(network)}
    if (dataset, network) == ("cifar100", "convnet3"):
        own = {**CIFAR100_CONVNET3, "batch": min(CIFAR100_CONVNET3["batch"], ipc * classes)}
    return own | {
        "name": "rded-2024", "epochs": 300, "schedule": "half-cosine", "bn_momentum": 0.19, "crop": 1 / factor,
        "shuffle": factor,
    }  # fmt: skip


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


# ---------------------------------------------------------------- crops


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


# ---------------------------------------------------------------- what is looked at


def resolved(config: Config, size: int) -> Config:
    """The same settings with `factor` decided: 0 becomes 1 below 128 px, else 2."""
    return replace(config, factor=config.factor or (1 if size < 128 else 2))


def check(config: Config, teacher: nn.Module, labels: Tensor, *, size: int, side: int | None = None) -> None:
    """ValueError that names what cannot work, before any work: a class smaller than the pool, a pool too small for the
    tiles, patches larger than most images (`side`: their median shorter side), a teacher that lacks a class.

    labels int64 [N].  The teacher need not be trained yet.
    """
    config, counts = resolved(config, size), torch.bincount(labels.cpu())
    for label, available in enumerate(counts.tolist()):
        _check_pool(config, label, available)
    if side is not None:
        _check_side(config, side, size)
    linear = [m for m in teacher.modules() if isinstance(m, nn.Linear)]
    if linear and (known := linear[-1].out_features) < len(counts):
        raise ValueError(f"the teacher tells {known} classes apart, the images have {len(counts)}: it lacks some")


def _check_pool(config: Config, label: int, available: int) -> None:
    """ValueError where a class cannot fill the pool, or the pool cannot fill the tiles (not known at factor 0)."""
    if config.pool > available:
        raise ValueError(
            f"pool={config.pool} is more than the {available} images of class {label}; pass pool={available} or less"
        )
    need = config.ipc * config.factor**2
    if need > config.pool:
        raise ValueError(
            f"ipc={config.ipc} with factor={config.factor} takes {need} patches of class {label}, one an image, more "
            f"than pool={config.pool} gives; pass pool={need} or more, or a smaller ipc or factor"
        )


def _check_side(config: Config, side: int, size: int) -> None:
    """ValueError where most images are smaller than a patch; a few are enlarged, as the released code does."""
    patch = size // config.factor
    if side < patch or patch == 0:
        raise ValueError(
            f"patches of {patch} px (size={size}, factor={config.factor}) cannot be cut from images whose shorter side "
            f"is {side} px (median); pass a size from {config.factor} to {side * config.factor}"
        )


def _sides(images: Tensor, sizes: Tensor | None) -> Tensor:
    """Height and width of each image, int64 [N, 2] on the CPU."""
    return torch.tensor(images.shape[2:]).expand(len(images), 2) if sizes is None else sizes.cpu()


def _whole(
    images: Tensor, sizes: Tensor, size: int, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> Tensor:
    """Whole images as the teacher takes them: uint8 [n, C, H, W], heights and widths [n, 2] -> [n, C, size, size]."""
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(f"mean={mean} and std={std} must have one value for each of the {images.shape[1]} channels")
    boxes, unflipped = torch.cat([torch.zeros_like(sizes), sizes], 1).cpu(), torch.zeros(len(images), dtype=torch.bool)
    mean_, std_ = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
    return (crop_resize(images.to(device), boxes, unflipped, size) / 255 - mean_) / std_


def pool_of(labels: Tensor, k: int, config: Config, generator: torch.Generator) -> Tensor:
    """Which images of class k are looked at: int64 [pool], random order, none twice."""
    members = (labels == k).nonzero().flatten().cpu()
    _check_pool(config, k, len(members))
    return members[torch.randperm(len(members), generator=generator)[: config.pool]]


# ---------------------------------------------------------------- the method


@torch.no_grad()
def score(
    teacher: nn.Module,
    images: Tensor,
    boxes: Tensor,
    label: int,
    config: Config,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Tensor:
    """s = -log softmax(T(pad(crop)))_label of every box: images uint8 [n, C, H, W], boxes [n, crops, 4] -> [n, crops].

    The border is added to normalised crops: it has the mean colour.
    """
    device, patch = next(teacher.parameters()).device, size // config.factor
    teacher = teacher.eval().to(memory_format=torch.channels_last)
    run = torch.compile(teacher) if config.compile else teacher
    mean_, std_ = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
    before, after = (size - patch) // 2, size - patch - (size - patch) // 2
    scores = []
    for rows in torch.arange(len(images)).split(max(1, config.batch // config.crops)):
        pixels, unflipped = images[rows].to(device), torch.zeros(len(rows), dtype=torch.bool)
        crops = torch.stack([crop_resize(pixels, box, unflipped, patch) for box in boxes[rows].unbind(1)], 1)
        x = (crops.flatten(0, 1) / 255 - mean_) / std_  # [n crops, C, p, p]
        x = F.pad(x, (before, after, before, after)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = run(x)
        if label >= logits.shape[1]:
            raise ValueError(f"label={label} is none of the {logits.shape[1]} classes of the teacher")
        scores.append(-F.log_softmax(logits.float(), 1)[:, label].view(len(rows), -1))
    return torch.cat(scores).cpu()


def select(
    teacher: nn.Module,
    images: Tensor,
    sizes: Tensor | None,
    label: int,
    config: Config,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The most realistic patches of a pool of images of one class, at most one an image.

    images uint8 [n, C, H, W]; sizes int64 [n, 2], height and width of each on its canvas, or None -> patches float32
    [I f f, C, p, p] in 0..255 with p = size // f, best first, and their scores [I f f], ascending; on the CPU.
    """
    config = replace(resolved(config, size), pool=len(images))
    sizes = _sides(images, sizes)
    _check_pool(config, label, len(images))
    boxes = random_boxes(sizes.repeat_interleave(config.crops, 0), generator, (0.08, 1.0), (1.0, 1.0))
    boxes = boxes.unflatten(0, (-1, config.crops))  # [n, crops, 4]
    scores = score(teacher, images, boxes, label, config, size=size, mean=mean, std=std)
    if not scores.isfinite().all():
        bad = int((~scores.isfinite()).sum())
        raise FloatingPointError(
            f"{bad} of {scores.numel()} scores of class {label} are not finite; look at the teacher's weights, or try "
            "precision=fp32"
        )
    lowest, best = scores.min(1)  # the best crop of each image [n]
    order = lowest.argsort(stable=True)[: config.ipc * config.factor**2]
    unflipped = torch.zeros(len(order), dtype=torch.bool)
    patches = crop_resize(images[order], boxes[order, best[order]], unflipped, size // config.factor)
    return patches.cpu(), lowest[order]


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


@dataclass
class State:
    """Where a run stands; classes are finished one by one."""

    images: Tensor  # uint8 [M, C, S, S]; those of later classes are still zero
    scores: Tensor  # float32 [M f f]
    generator: Tensor  # state of the generator, uint8
    number: int = 0  # classes done

    def tensors(self) -> dict[str, Tensor]:
        at = torch.tensor([self.number])
        return {"images": self.images, "scores": self.scores, "generator": self.generator, "at": at}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> State:
        return cls(tensors["images"], tensors["scores"], tensors["generator"], int(tensors["at"]))


def distill(
    images: Tensor | Callable[[Tensor], tuple[Tensor, Tensor]],
    labels: Tensor,
    teacher: nn.Module,
    config: Config,
    *,
    size: int | None = None,
    sizes: Tensor | None = None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    generator: torch.Generator,
    state: State | None = None,
    on_step: Callable[[State], None] | None = None,
) -> dict[str, Tensor]:
    """The whole method on images uint8 [N, C, H, W] and labels int64 [N] (0..K-1), with a trained teacher.

    size: side of the distilled images, H by default; crops are cut from images of any size.  sizes: int64 [N, 2],
    height and width where the images lie on a canvas.  Where they do not fit into memory, `images` is a function that
    reads those of some rows, int64 [n] -> (images, sizes), and `size` is given.  `state` continues an earlier run,
    `on_step` sees the state after every class.  Returns images float32 [K*I, C, size, size] in [0, 1], truncated to 8
    bits, labels [K*I] and scores [K*I*f*f], of class k from row k*I*f*f on, ascending.
    """
    if callable(images):
        read, side = images, None
    else:
        size, sizes = size or images.shape[2], _sides(images, sizes)
        read, side = lambda rows: (images[rows.to(images.device)], sizes[rows]), int(sizes.amin(1).median())
    config, classes = resolved(config, size), int(labels.max()) + 1
    check(config, teacher, labels, size=size, side=side)
    ipc, each = config.ipc, config.ipc * config.factor**2
    if state is None:
        device = next(teacher.parameters()).device
        recognises(teacher, lambda rows: _whole(*read(rows), size, mean, std, device), labels)
        made = torch.zeros(classes * ipc, len(mean), size, size, dtype=torch.uint8)
        state = State(made, torch.zeros(classes * each), generator.get_state())
    generator.set_state(state.generator)
    for k in range(state.number, classes):
        rows = pool_of(labels, k, config, generator)
        patches, scores = select(
            teacher, *read(rows), k, config, size=size, mean=mean, std=std, generator=generator
        )
        # 1e-3: weights that add up to a little less than 1 must not cost an even area a level.
        state.images[k * ipc : (k + 1) * ipc] = (stitch(patches, config.factor, size) + 1e-3).to(torch.uint8)
        state.scores[k * each : (k + 1) * each] = scores
        state.number, state.generator = k + 1, generator.get_state()
        if on_step:
            on_step(state)
    made_of = torch.arange(classes).repeat_interleave(ipc)
    return {"images": state.images / 255, "labels": made_of, "scores": state.scores}


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from common import cli, script, teachers

    sys.exit(
        cli.guard(
            lambda a: script.run_with_teacher(
                a, "rded", Config, PUBLISHED, State.restore, distill, check=check, native=True, small="resnet18-mod",
                factor=lambda config, size: resolved(config, size).factor, student=student_recipe,
                recipes=teachers.SQUEEZE, passes=lambda config, classes: classes,
            ),
            sys.argv[1:],
        )
    )
