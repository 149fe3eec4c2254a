"""SRe2L: squeeze a data set into a teacher, recover images from it, relabel them with its soft labels.

Yin, Xing and Shen, Squeeze, Recover and Relabel, NeurIPS 2023 (arXiv 2306.13092; github.com/VILA-Lab/SRe2L).
CDA: Yin and Shen, Dataset Distillation via Curriculum Data Synthesis, TMLR 2024 (arXiv 2311.18838; same repository).
DWA: Du et al., Diversity-Driven Synthesis: Enhancing Dataset Distillation through Directed Weight Adjustment, NeurIPS
2024 (arXiv 2409.17612; github.com/AngusDujw/Diversity-Driven-Synthesis).

    python methods/sre2l.py dataset=imagenette ipc=10 data=~/data     # teacher, distilled set, student accuracy
    python methods/sre2l.py dataset=tiny-imagenet ipc=50 curriculum=cosine data=~/data     # CDA
    python methods/sre2l.py dataset=cifar10 ipc=10 perturb=0.015 data=~/data     # DWA

This file is the middle step.  Images start as noise and are moved by Adam, through random crops, until the teacher
reads their class in them and its BatchNorm layers see the statistics of the real data:

    loss  = CE(teacher(x), y) + r_bn R_BN + r_tv R_tv + r_l2 R_l2
    R_BN  = sum_l k_l (|mean_l(x) - running mean_l| + |var_l(x) - running var_l|),   k_1 = 10, k_l = 1 further on
    R_tv  = |dx| + |dy| + the same along both diagonals, norms of differences of neighbours over the batch
    R_l2  = mean length of an image

The norms are not squared; the published runs have r_tv = r_l2 = 0.  A batch holds one image of each of up to 100
consecutive classes and is a problem of its own.  CDA lets the smallest crop shrink from the whole image to 0.08 of it.
DWA starts from real images, weighs variances more than means, and first moves the teacher of each batch up the loss of
what it starts from, so that batches meet different teachers:

    theta <- theta + rho / n g / |g|,  g = d CE(teacher(x_0), y) / d theta,  n times

Paper against released code, and what we take:
  batches         classes in random order is switched off in the code             -> consecutive classes
  result          the code keeps a best image and overwrites it with the last     -> the last
  batches again   one after the other in the code                                 -> `in_flight` images a forward; each
                  batch keeps its own statistics, so its gradients are the same; they share the random crops
  crops           CIFAR has none; Tiny-ImageNet alone rolls both ways             -> `crop`, `jitter_both`
  files           the code writes JPEG, which all later steps read                -> tensors
  DWA             the moved weights are kept for later blocks of classes, the     -> put back after each batch; images
                  gradients of these passes stay in the images' first step           begin with an empty gradient
What this file does not hold, and the command adds (papers/nrr_dd has the tables):
  teacher         CIFAR for 200 epochs, Tiny-ImageNet for 50, each by a recipe    -> their recipes, `teacher_epochs`=50;
                  of its own; none is given for Imagenette                        WMDD's for every other set
  student         400 epochs, Mixup, T=30 on CIFAR; 100 epochs, SGD, T=20 with    -> that of ImageNet-1K everywhere: 300
                  T^2 on Tiny-ImageNet; batches of 1,024 on ImageNet-1K           epochs, AdamW, CutMix, batches of 100
  normalisation   CIFAR-100 and Tiny-ImageNet by constants of their own           -> ImageNet's everywhere
Copied alone, as a module, it needs torch; the command line is this repository's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PUBLISHED", "PUBLISHED_CDA", "PUBLISHED_DWA", "Config", "RecoverState", "check", "distill", "recover"]


def _option(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


@dataclass(frozen=True)
class Config:
    """One distillation; the defaults are the released script for ImageNet-1K."""

    ipc: int = _option(50, "synthetic images per class", unit="images", minimum=1)
    iterations: int = _option(4000, "recover iterations per batch", unit="steps", minimum=1, source="recover.sh")
    lr: float = _option(0.25, "first Adam step size in normalised pixels, cosine to 0", minimum=0, source="recover.sh")
    bn_weight: float = _option(0.01, "weight of the BatchNorm term: r_bn", minimum=0, source="recover.sh")
    first_bn_multiplier: float = _option(10.0, "extra weight of the first BatchNorm layer", minimum=0)
    var_weight: float = _option(1.0, "weight of variances beside means in a layer: r_var", minimum=0, source="DWA: 11")
    tv_weight: float = _option(0.0, "weight of the total variation of the views", minimum=0, source="recover.sh")
    l2_weight: float = _option(0.0, "weight of the mean length of the views", minimum=0, source="recover.sh")
    curriculum: str = _option(
        "none", "how the smallest crop shrinks from the whole image to 0.08 of its area (CDA: cosine)",
        choices=("none", "cosine", "linear", "step"),
    )  # fmt: skip
    milestone: float = _option(
        1.0, "curriculum: share of the iterations after which the smallest crop is 0.08", minimum=0, maximum=1
    )
    init: str = _option("noise", "first images: standard normal or random real ones", choices=("noise", "real"),
                        source="DWA: real")  # fmt: skip
    perturb: float = _option(0.0, "how far the teacher's weights are moved before each batch: rho; 0: not at all",
                             minimum=0, source="DWA: 0.015")  # fmt: skip
    perturb_steps: int = _option(12, "steps of that move", unit="steps", minimum=1, source="DWA; ImageNet-1K: 15")
    crop: bool = _option(True, "random resized crop and flip of the images at each step; not for CIFAR")
    jitter: int = _option(
        -1, "largest roll of the images; -1: 4 up to 64 px, else 1/7 of the side (32 at 224 px)", unit="px", minimum=-1
    )
    jitter_both: bool = _option(False, "roll both ways, as for Tiny-ImageNet, or only down and right")
    batch: int = _option(100, "classes optimised together, one image each", unit="classes", minimum=1)
    in_flight: int = _option(100, "images per pass; batches are grouped up to here", unit="images", minimum=1)
    precision: str = _option("fp32", "arithmetic of the convolutions", choices=("bf16", "fp32"))
    compile: bool = _option(False, "compile the step (needs a C++ compiler on a CPU)")

    def __post_init__(self):
        for f in fields(self):
            value, allowed = getattr(self, f.name), f.metadata.get("choices")
            low, high = f.metadata.get("minimum"), f.metadata.get("maximum")
            if allowed and value not in allowed:
                raise ValueError(f"{f.name}={value!r} is unknown; allowed: {', '.join(allowed)}")
            if low is not None and not value >= low:
                raise ValueError(f"{f.name}={value!r} is too small; the least is {low}")
            if high is not None and not value <= high:
                raise ValueError(f"{f.name}={value!r} is too large; the most is {high}")
        if self.curriculum != "none" and not self.crop:
            raise ValueError(f"curriculum={self.curriculum!r} schedules the crops and needs crop=True")


# Published settings by (dataset, ipc or None for every ipc).  Source: recover.sh, recover_tiny.sh and recover_cifar.sh
# of VILA-Lab/SRe2L.  CIFAR-10 and Imagenette have no released script: theirs are those of CIFAR-100 and ImageNet-1K,
# where their ten classes make a batch of ten.
_CIFAR = {"lr": 0.25, "bn_weight": 0.01, "iterations": 1000, "crop": False, "jitter": 4}
PUBLISHED: dict[tuple[str, int | None], dict] = {
    ("cifar10", None): _CIFAR,
    ("cifar100", None): _CIFAR,
    ("tiny-imagenet", None): {"lr": 0.1, "bn_weight": 1.0, "iterations": 4000, "jitter": 4, "jitter_both": True},
    ("imagenette", None): {"lr": 0.25, "bn_weight": 0.01, "iterations": 4000},
    ("imagenet-1k", None): {"lr": 0.25, "bn_weight": 0.01, "iterations": 4000},
}

# The same for CDA.  Source: CDA/README.md and CDA/recover_cda_*.py.
PUBLISHED_CDA: dict[tuple[str, int | None], dict] = {
    ("tiny-imagenet", None): {
        "lr": 0.4, "bn_weight": 0.05, "iterations": 4000, "jitter": 4, "curriculum": "cosine",
    },
    ("imagenet-1k", None): {"lr": 0.25, "bn_weight": 0.01, "iterations": 4000, "curriculum": "cosine"},
    ("imagenet-21k", None): {"lr": 0.05, "bn_weight": 0.25, "iterations": 2000, "curriculum": "cosine"},
}  # fmt: skip

# The same for DWA.  Source: readme.md and distillation/ of AngusDujw/Diversity-Driven-Synthesis.
_DWA = {"init": "real", "perturb": 0.015, "bn_weight": 0.01, "var_weight": 11.0}
PUBLISHED_DWA: dict[tuple[str, int | None], dict] = {
    ("cifar10", None): {**_CIFAR, **_DWA},
    ("cifar100", None): {**_CIFAR, **_DWA},
    ("tiny-imagenet", None): {**_DWA, "lr": 0.1, "iterations": 2000, "jitter": 4, "batch": 200, "in_flight": 200},
    **{(name, None): {**_DWA, "lr": 0.25, "iterations": 2000, "var_weight": 2.0, "perturb_steps": 15}
       for name in ("imagenet-1k", "imagenette", "imagewoof")},
    ("digits", None): {**_CIFAR, **_DWA},  # ours, as CIFAR
}  # fmt: skip


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


# --- begin shared block: norm (a test keeps its copies equal) ---
def _norm(x: Tensor) -> Tensor:  # [..., D] -> [...]; smooth at 0
    return (x.square().sum(-1) + 1e-12).sqrt()


# --- end shared block ---


def bn_gap(bn: nn.BatchNorm2d, x: Tensor, groups: int, var_weight: float = 1.0) -> Tensor:
    """R_l of each group [G]: the statistics of what enters a layer, x [B, C, H, W], against its running ones."""
    mean, var = _Moments.apply(x, groups)
    return _norm(mean - bn.running_mean) + var_weight * _norm(var - bn.running_var)


@contextmanager
def bn_gaps(net: nn.Module, config: Config, groups: Callable[[], int]) -> Iterator[list[Tensor]]:
    """Hooks that add k_l R_l [G] of every BatchNorm layer to a list at each forward."""
    found: list[Tensor] = []
    layers = batch_norms(net)

    def keep(bn: nn.BatchNorm2d, entering: tuple[Tensor]) -> None:
        multiplier = config.first_bn_multiplier if bn is layers[0] else 1.0
        found.append(multiplier * bn_gap(bn, entering[0], groups(), config.var_weight))

    hooks = [bn.register_forward_pre_hook(keep) for bn in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def perturbed(teacher: nn.Module, views: Iterator[Tensor], labels: Tensor, config: Config) -> Iterator[None]:
    """The teacher with its weights moved up the loss of some views, rho / n a step; put back at the end."""
    weights = list(teacher.parameters()) if config.perturb else []
    before = [w.detach().clone() for w in weights]
    try:
        for view in views:
            teacher.requires_grad_(True)
            with torch.autocast(view.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                logits = teacher(view)
            loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
            ascent = torch.autograd.grad(loss, weights)
            teacher.requires_grad_(False)
            length = torch.stack([g.norm() for g in ascent]).norm().clamp(min=1e-12)  # one for all weights
            for w, g in zip(weights, ascent, strict=True):
                w.add_(g * (config.perturb / config.perturb_steps / length))
        yield
    finally:
        with torch.no_grad():
            for w, old in zip(weights, before, strict=True):
                w.copy_(old)


# ---------------------------------------------------------------- what the images are seen through


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


def least_area(config: Config, step: int) -> float | None:
    """Smallest area share of a crop at a step, None without crops.  CDA: 1 at first, 0.08 from the milestone on."""
    if not config.crop:
        return None
    end = config.milestone * config.iterations
    if config.curriculum == "none" or step >= end:
        return 0.08
    done = step / end
    large = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "step": 1.0}[config.curriculum]
    return 0.08 + 0.92 * large


# ---------------------------------------------------------------- recover


def passes(classes: int, config: Config) -> list[Tensor]:
    """The image numbers [G, k] of each forward; image k*I + j is image j of class k.

    A row is one batch: image j of each of up to `batch` consecutive classes.  Rows are independent; as many share a
    forward as `in_flight` images allow, but one alone where each has a teacher of its own (perturb).
    """
    number = torch.arange(classes * config.ipc).view(classes, config.ipc)  # [K, I]
    blocks, most = number.split(config.batch), 0 if config.perturb else config.in_flight
    return [rows for block in blocks for rows in block.T.split(max(1, most // len(block)))]


def total_variation(views: Tensor) -> Tensor:
    """R_tv of each batch: views [G, k, C, S, S] -> [G]."""
    right, down = views[..., :, 1:] - views[..., :, :-1], views[..., 1:, :] - views[..., :-1, :]
    diagonals = views[..., 1:, 1:] - views[..., :-1, :-1], views[..., 1:, :-1] - views[..., :-1, 1:]
    return sum(_norm(gap.flatten(1)) for gap in (right, down, *diagonals))


def objective(view: Tensor, logits: Tensor, gaps: list[Tensor], labels: Tensor, config: Config) -> Tensor:
    """The loss of one forward, summed over its batches: labels [G, k], view [G k, C, S, S], logits [G k, K]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = len(labels) * F.cross_entropy(logits, labels.flatten())  # equally long rows: the sum of their means
    loss = loss + config.bn_weight * sum(gaps).sum()
    views = view.unflatten(0, labels.shape)  # [G, k, C, S, S]
    if config.tv_weight:
        loss = loss + config.tv_weight * total_variation(views).sum()
    if config.l2_weight:
        loss = loss + config.l2_weight * _norm(views.flatten(2)).mean(1).sum()
    return loss


# --- begin shared block: recover_state (a test keeps its copies equal) ---
@dataclass
class RecoverState:
    """Where a recover run stands; `tensors()` is all that is needed to continue it bit for bit."""

    images: Tensor  # float32 [M, C, S, S], normalised, on the CPU, pass after pass; later ones are still 0
    seeds: Tensor  # int64, one a pass
    number: int = 0  # pass
    step: int = 0  # steps done in this pass
    loss: float = math.nan  # at the last multiple of 50 steps
    live: tuple[Tensor, Tensor, Tensor] | None = None  # images in flight and Adam's two moments, on the device
    generator: Tensor | None = None  # state of this pass's generator, uint8
    first: int = 0  # place in `images` of the first one in flight

    def tensors(self) -> dict[str, Tensor]:
        out = {"images": self.images, "seeds": self.seeds, "at": torch.tensor([self.number, self.step, self.first])}
        if self.live is None:
            return out
        x, mean, square = (t.detach().cpu() for t in self.live)
        if not x.isfinite().all():
            raise FloatingPointError(
                f"the images are not finite after step {self.step} of pass {self.number}; the last good state is kept; "
                "try a smaller lr or precision=fp32"
            )
        images = self.images.clone()
        images[self.first : self.first + len(x)] = x
        return out | {"images": images, "mean": mean, "square": square, "generator": self.generator}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> RecoverState:
        number, step, first = tensors["at"].tolist()
        state = cls(tensors["images"], tensors["seeds"], number, step, first=first)
        if "generator" in tensors:
            state.live = (torch.empty(0), tensors["mean"], tensors["square"])
            state.generator = tensors["generator"]
        return state

    def begin(self) -> torch.Generator:
        """The generator of this pass, where it stands."""
        generator = torch.Generator().manual_seed(int(self.seeds[self.number]))
        return generator if self.generator is None else generator.set_state(self.generator)


# --- end shared block ---


def learning_rate(config: Config, step: int) -> float:
    """Cosine from lr to 0 over the iterations of a batch."""
    return 0.5 * config.lr * (1 + math.cos(math.pi * step / config.iterations))


def recover(
    teacher: nn.Module,
    classes: int,
    config: Config,
    *,
    size: int,
    channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    generator: torch.Generator,
    start: Callable[[Tensor], Tensor] | None = None,
    part: slice = slice(None),
    state: RecoverState | None = None,
    on_step: Callable[[RecoverState], None] | None = None,
) -> Tensor:
    """Optimise the images on the teacher's device: float32 [K*I, C, size, size] in [0, 1] pixel space, on the CPU.

    start: for init=real what gives the first images of some numbers, int64 [n] -> [n, C, size, size] in [0, 1].
    part: the passes to do, all by default; then the images are those of these passes, by ascending number.
    `state` continues an earlier run, `on_step` sees the state after every step.  Raises FloatingPointError when the
    loss is not finite (looked at every 50 steps).
    """
    _check(teacher, classes)
    shift, scale = _channels(mean, std, channels)
    if (start is None) != (config.init == "noise"):
        raise ValueError(f"init={config.init!r}, but first images were {'not ' if start is None else ''}given: start=")
    device = next(teacher.parameters()).device
    teacher = teacher.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    low, high = (-shift / scale).to(device), ((1 - shift) / scale).to(device)
    jitter = (4 if size <= 64 else round(size / 7)) if config.jitter < 0 else config.jitter
    roll = (-jitter if config.jitter_both else 0, jitter)
    plan = passes(classes, config)
    seeds = torch.randint(2**62, (len(plan),), generator=generator)[part]
    plan = plan[part]
    rows = torch.cat([number.flatten() for number in plan])
    state = state or RecoverState(torch.zeros(len(rows), channels, size, size), seeds)
    with bn_gaps(teacher, config, lambda: len(labels)) as gaps:

        def loss_of(view: Tensor, labels: Tensor) -> Tensor:
            gaps.clear()
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                logits = teacher(view)
            return objective(view, logits, gaps, labels, config)

        def ascents(first: Tensor) -> Iterator[Tensor]:
            """What DWA moves the teacher of a batch by: views of its first images, the same when a run continues."""
            draws = torch.Generator().manual_seed(int(state.seeds[state.number]) ^ 1)
            for _ in range(config.perturb_steps if config.perturb else 0):
                yield see(first, random_view(size, least_area(config, 0), roll, draws))
                gaps.clear()  # what these passes leave

        run = torch.compile(loss_of, dynamic=False) if config.compile else loss_of
        while state.number < len(plan):
            number = plan[state.number].flatten()
            labels = (plan[state.number] // config.ipc).to(device)  # [G, k]
            here = slice(state.first, state.first + len(number))
            fresh, begun = state.live is None, torch.Generator().manual_seed(int(state.seeds[state.number]))
            if start is None:
                first = torch.randn(len(number), channels, size, size, generator=begun)
            else:
                first = (start(number) - shift) / scale
            generator = begun if fresh else state.begin()
            x = (first if fresh else state.images[here]).clone().to(device).requires_grad_()
            adam = torch.optim.Adam([x], betas=(0.5, 0.9))
            if not fresh:
                mean_, square = (t.to(device) for t in state.live[1:])
                adam.state[x] = {"step": torch.tensor(float(state.step)), "exp_avg": mean_, "exp_avg_sq": square}
            with perturbed(teacher, ascents(first.to(device)), labels.flatten(), config):
                for step in range(state.step, config.iterations):
                    adam.param_groups[0]["lr"] = learning_rate(config, step)
                    view = see(x, random_view(size, least_area(config, step), roll, generator))
                    adam.zero_grad()
                    loss = run(view.contiguous(memory_format=torch.channels_last), labels)
                    loss.backward()
                    adam.step()
                    with torch.no_grad():
                        x.clamp_(low, high)
                    if step % 50 == 49 or step + 1 == config.iterations:
                        state.loss = _finite(loss / len(labels), step, state.number, config)
                    state.step, state.generator = step + 1, generator.get_state()
                    state.live = (x, adam.state[x]["exp_avg"], adam.state[x]["exp_avg_sq"])
                    if on_step:
                        on_step(state)
            state.images[here] = x.detach().cpu()
            state.live, state.generator, state.step = None, None, 0
            state.number, state.first = state.number + 1, here.stop
    return (shift + state.images[rows.argsort()] * scale).clamp(0, 1)


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


# --- begin shared block: finite (a test keeps its copies equal) ---
def _finite(loss: Tensor, step: int, number: int, config: Config) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the recover loss is {value} at step {step} of pass {number} (lr={config.lr}, "
            f"bn_weight={config.bn_weight}); the last good state is kept; try a smaller lr or precision=fp32"
        )
    return value


# --- end shared block ---


def check(config: Config, teacher: nn.Module, labels: Tensor, *, size: int, side: int | None = None) -> None:
    """ValueError before any work where the teacher has no BatchNorm or other classes than the labels int64 [N]."""
    _check(teacher, int(labels.max()) + 1)
    if config.init == "real":
        drawn(labels.cpu(), config.ipc, torch.Generator())


def _channels(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> tuple[Tensor, Tensor]:
    if not len(mean) == len(std) == channels:
        raise ValueError(f"mean={mean} and std={std} must have one value for each of the {channels} channels")
    return torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)


def _check(teacher: nn.Module, classes: int) -> None:
    batch_norms(teacher)  # says so when there is none
    if (known := classifier_of(teacher).out_features) != classes:
        raise ValueError(f"the teacher tells {known} classes apart, asked for are {classes}; both must be the same")


def drawn(labels: Tensor, ipc: int, generator: torch.Generator) -> Tensor:
    """Random real images that images start from: rows int64 [K*I] of the labels int64 [N], class after class."""
    counts = labels.bincount()
    if counts.min() < ipc:
        raise ValueError(f"init=real with ipc={ipc}: class {int(counts.argmin())} has {int(counts.min())} images")
    rows = [(labels == k).nonzero().flatten() for k in range(len(counts))]
    return torch.cat([own[torch.randperm(len(own), generator=generator)[:ipc]] for own in rows])


def distill(
    images: Tensor,
    labels: Tensor,
    teacher: nn.Module,
    config: Config,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    generator: torch.Generator,
    state: RecoverState | None = None,
    on_step: Callable[[RecoverState], None] | None = None,
) -> dict[str, Tensor]:
    """Images for the classes of images uint8 [N, C, S, S] and labels int64 [N] (0..K-1), with a trained teacher.

    The real data live in the teacher: `images` give the shape, 200 of them try the teacher, and with init=real some are
    the first ones.  Returns images float32 [K*I, C, S, S] in [0, 1] and labels [K*I].
    """
    classes, start = int(labels.max()) + 1, None
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images of {images.shape[2]} x {images.shape[3]} px are not square: crop or resize them")
    check(config, teacher, labels, size=images.shape[-1])
    if state is None:
        device = next(teacher.parameters()).device
        shift, unit = (t.to(device) for t in _channels(mean, std, images.shape[1]))
        recognises(teacher, lambda rows: (images[rows.to(images.device)].to(device) / 255 - shift) / unit, labels)
    if config.init == "real":
        rows = drawn(labels.cpu(), config.ipc, generator)
        start = lambda number: images[rows[number].to(images.device)].cpu().float() / 255  # noqa: E731
    pixels = recover(
        teacher, classes, config, size=images.shape[-1], channels=images.shape[1], mean=mean, std=std,
        generator=generator, start=start, state=state, on_step=on_step,
    )  # fmt: skip
    return {"images": pixels, "labels": torch.arange(classes).repeat_interleave(config.ipc)}


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from common import cli, script, teachers

    def main(arguments: list[str]) -> None:
        given = {name: value for name, _, value in (a.partition("=") for a in arguments)}
        scheduled = given.get("curriculum", "none") not in ("", "none")
        try:
            moved = float(given.get("perturb") or 0) > 0
        except ValueError:
            moved = False  # no number, which is refused below
        if moved and scheduled:
            raise cli.UsageError("perturb= (DWA) and curriculum= (CDA) are two methods; pass one of them")
        name, published = "sre2l", PUBLISHED
        if scheduled:
            name, published = "cda", PUBLISHED_CDA
        elif moved:  # sets without a row take that of ImageNet-1K
            dataset = given.get("dataset", script.Common.dataset)
            name, published = "dwa", {(dataset, None): PUBLISHED_DWA["imagenet-1k", None]} | PUBLISHED_DWA
        script.run_with_teacher(
            arguments, "sre2l", Config, published, RecoverState.restore, distill, check=check, small="resnet18-mod",
            recipes=teachers.SQUEEZE, kept=name, passes=lambda config, classes: len(passes(classes, config)),
        )  # fmt: skip

    sys.exit(cli.guard(main, sys.argv[1:]))
