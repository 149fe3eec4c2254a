"""Training and testing of classifiers: teachers on real images, students on distilled ones, by named recipes.

One loop, `fit`, serves both.  Each step's view (which images, crops, flips, CutMix partner and box) is a pure function
of (seed, epoch, batch), so a run resumes bit for bit, and the teacher's soft labels of a stream of views can be stored
(`relabel`) or recomputed on the fly (`Online`) with the same student as result.  This is fast knowledge distillation
(FKD, as SRe2L and WMDD use it) with one integer in place of the stored crops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.augment import apply_cutmix, crop_resize, cutmix_box, random_boxes, rng
from common.datasets import Dataset, Stream
from common.hardware import bf16_is_fast
from common.store import Checkpoint

__all__ = [
    "Online", "Recipe", "Stored", "View", "accuracy", "fit", "kd_loss", "normalise", "parameter_groups",
    "precision_name", "relabel", "resolve_device", "resolve_precision", "views",
]  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the student of WMDD and SRe2L on ImageNet-like sets."""

    name: str = field(default="fkd-300", metadata={"help": "name of the recipe"})
    epochs: int = field(default=300, metadata={"help": "passes over the set", "unit": "epochs"})
    batch: int = field(default=100, metadata={"help": "batch size", "unit": "images"})
    optimizer: str = field(default="adamw", metadata={"help": "optimiser", "choices": ("adamw", "sgd")})
    lr: float = field(default=1e-3, metadata={"help": "first learning rate; cosine to 0, one step an epoch"})
    momentum: float = field(default=0.9, metadata={"help": "SGD momentum"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay"})
    decay_all: bool = field(default=False, metadata={"help": "decay every parameter, not only the weight matrices"})
    labels: str = field(
        default="soft", metadata={"help": "teacher logits or class numbers", "choices": ("soft", "hard")}
    )
    temperature: float = field(default=20.0, metadata={"help": "temperature of the KL loss"})
    crop: float = field(default=0.08, metadata={"help": "smallest area share of the random resized crop; 1: no crop"})
    flip: bool = field(default=True, metadata={"help": "horizontal flip with probability 1/2"})
    cutmix: bool = field(default=True, metadata={"help": "CutMix with one box a batch"})

    def __post_init__(self):
        for name, allowed in (("optimizer", ("adamw", "sgd")), ("labels", ("soft", "hard"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"recipe.{name}={getattr(self, name)!r} is unknown; allowed: {', '.join(allowed)}")
        if self.epochs < 1 or self.batch < 1:
            raise ValueError(f"recipe.epochs={self.epochs} and recipe.batch={self.batch} must be at least 1")


# ---------------------------------------------------------------- device, precision


def resolve_device(device: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU."""
    if device not in ("auto", "cpu", "cuda") and not device.startswith("cuda:"):
        raise ValueError(f"device={device!r} is unknown; allowed: auto, cpu, cuda, cuda:N")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r} was asked for, but this PyTorch sees no CUDA device; use device=cpu")
    return torch.device(device)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the device multiplies it in hardware, else fp32 (benchmarks/precision.py: the study)."""
    table = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if precision != "auto" and precision not in table:
        raise ValueError(f"precision={precision!r} is unknown; allowed: auto, {', '.join(table)}")
    return table.get(precision, torch.bfloat16 if bf16_is_fast(device) else torch.float32)


def precision_name(dtype: torch.dtype) -> str:
    """The name of a resolved precision, as it stands in settings."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8-scaled pixels [B, C, H, W] (0..255, any dtype) -> float32 normalised images, channels_last."""
    mean_ = torch.tensor(mean, device=pixels.device)[:, None, None]
    std_ = torch.tensor(std, device=pixels.device)[:, None, None]
    return ((pixels / 255 - mean_) / std_).contiguous(memory_format=torch.channels_last)


# ---------------------------------------------------------------- losses, optimiser


def kd_loss(student: Tensor, teacher: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)), mean over the batch, without the T^2 factor (as SRe2L, WMDD).

    student, teacher: logits [B, K]; weights: [B] or None, rescaled to mean 1.
    """
    log_p = F.log_softmax(student.float() / temperature, 1)
    log_q = F.log_softmax(teacher.float() / temperature, 1)
    per_sample = (log_q.exp() * (log_q - log_p)).sum(1)  # [B]
    return per_sample.mean() if weights is None else (per_sample * weights / weights.mean()).mean()


def hard_loss(logits: Tensor, labels: Tensor, partner: Tensor, share: float) -> Tensor:
    """Cross-entropy with CutMix labels: `share` of the pixels come from the partner image."""
    logits = logits.float()
    return (1 - share) * F.cross_entropy(logits, labels) + share * F.cross_entropy(logits, partner)


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on parameters named `weight` with more than one dimension; none on biases and norms."""
    decay, rest = [], []
    for name, p in net.named_parameters():
        (decay if "weight" in name and p.ndim > 1 else rest).append(p)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def make_optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    params = net.parameters() if recipe.decay_all else parameter_groups(net, recipe.weight_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            params, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
        )
    return torch.optim.AdamW(params, recipe.lr, weight_decay=recipe.weight_decay, fused=True)


# ---------------------------------------------------------------- stream of views


@dataclass(frozen=True)
class View:
    """One training step: augmented pixels and what they are made of."""

    step: int
    epoch: int
    indices: Tensor  # int64 [B]
    pixels: Tensor  # float32 [B, C, size, size], 0..255
    permutation: Tensor  # int64 [B], CutMix partner within the batch
    share: float  # share of pixels that come from the partner


def steps_per_epoch(n: int, batch: int) -> int:
    """A rest of a single image is left out: batch statistics of one image are not defined."""
    rest = n % batch
    return n // batch + (rest > 1 or n == 1)


def views(data: Dataset | Stream, recipe: Recipe, size: int, seed: int, start: int = 0) -> Iterator[View]:
    """The stream of augmented batches of `recipe`, from step `start` on; every draw depends on (seed, epoch, batch)."""
    n, per_epoch = len(data.labels), steps_per_epoch(len(data.labels), recipe.batch)
    for epoch in range(start // per_epoch, recipe.epochs):
        order = torch.randperm(n, generator=rng(seed, "order", epoch))
        first = start - epoch * per_epoch if epoch == start // per_epoch else 0
        chunks = order.split(recipe.batch)[first:per_epoch]
        for batch, (pixels, indices) in enumerate(_pixels(data, chunks, recipe, size, seed, epoch, first), first):
            g = rng(seed, "mix", epoch, batch)
            permutation = torch.randperm(len(indices), generator=g)
            share = 0.0
            if recipe.cutmix:
                box = cutmix_box(size, g)
                pixels = apply_cutmix(pixels, permutation, box)
                share = (box[1] - box[0]) * (box[3] - box[2]) / size**2
            yield View(epoch * per_epoch + batch, epoch, indices, pixels, permutation, share)


def _pixels(
    data, chunks, recipe: Recipe, size: int, seed: int, epoch: int, first: int
) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(data, Stream):  # crops and flips are drawn in the decoding workers, from (seed, epoch, image)
        order = torch.cat(chunks) if chunks else torch.empty(0, dtype=torch.long)
        yield from (
            (p.float(), i)
            for p, _, i in data.batches(order, recipe.batch, size, "random", seed, epoch, scale=(recipe.crop, 1.0))
        )
        return
    sizes = data.sizes if data.sizes is not None else torch.tensor(data.images.shape[2:]).expand(len(data.labels), 2)
    sizes = sizes.cpu()
    for batch, indices in enumerate(chunks, first):
        g = rng(seed, "view", epoch, batch)
        wanted = sizes[indices]
        if recipe.crop < 1:
            boxes = random_boxes(wanted, g, (recipe.crop, 1.0))
        else:
            boxes = torch.cat([torch.zeros_like(wanted), wanted], 1)
        flip = torch.rand(len(indices), generator=g) < (0.5 if recipe.flip else 0.0)
        h, w = wanted.amax(0).tolist()
        yield crop_resize(data.images[indices.to(data.images.device), :, :h, :w], boxes, flip, size), indices


# ---------------------------------------------------------------- soft labels


class Labels(Protocol):
    """Where the soft labels of a step come from."""

    def __call__(self, step: int, images: Tensor) -> Tensor: ...


class Stored:
    """Logits kept from `relabel`: fp16 [steps, B, K] on any device."""

    def __init__(self, logits: Tensor):
        self.logits = logits

    def __call__(self, step: int, images: Tensor) -> Tensor:
        return self.logits[step, : len(images)].to(images.device)


class Online:
    """Logits recomputed by the teacher at each step: no bytes stored, one third more arithmetic.

    Rounded to fp16 as the stored ones are, so that both give the same student.
    """

    def __init__(self, teacher: nn.Module, dtype: torch.dtype = torch.bfloat16):
        self.teacher, self.dtype = teacher.eval().requires_grad_(False), dtype

    @torch.no_grad()
    def __call__(self, step: int, images: Tensor) -> Tensor:
        with autocast(images.device, self.dtype):
            return self.teacher(images).half()


def relabel(
    teacher: nn.Module,
    data: Dataset,
    recipe: Recipe,
    *,
    size: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    checkpoint: Checkpoint | None = None,
) -> Tensor:
    """Teacher logits of every view of the stream: fp16 [steps, B, K] on the CPU (FKD, SRe2L section 3)."""
    label = Online(teacher.to(device), dtype)
    logits: Tensor | None = None
    start = 0
    if checkpoint and (state := checkpoint.load()):
        logits, start = state[0]["logits"], state[1]["step"]
    total = recipe.epochs * steps_per_epoch(len(data.labels), recipe.batch)
    bar = tqdm(total=total, initial=start, desc="relabel", unit="step", leave=False, disable=None)
    for view in views(data, recipe, size, seed, start):
        z = label(view.step, normalise(view.pixels.to(device), data.mean, data.std)).cpu()
        if logits is None:
            logits = torch.zeros(total, min(recipe.batch, len(data.labels)), z.shape[1], dtype=torch.half)
        logits[view.step, : len(z)] = z
        bar.update()
        if checkpoint and checkpoint.due(view.step + 1):
            checkpoint.save({"logits": logits}, {"step": view.step + 1})
    bar.close()
    return logits


# ---------------------------------------------------------------- the loop


def fit(
    net: nn.Module,
    data: Dataset | Stream,
    recipe: Recipe,
    *,
    size: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    soft: Labels | None = None,
    weights: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[int, nn.Module, float], None] | None = None,
    description: str = "train",
) -> nn.Module:
    """Train `net` on `data` by `recipe` and return it after the last epoch.

    soft: the teacher's logits where recipe.labels is "soft"; weights: [M] sample weights or None.  With a checkpoint,
    a killed run continues bit for bit.  Raises FloatingPointError when the loss is not finite, naming the step; the
    last good state stays in the checkpoint.
    """
    if (recipe.labels == "soft") != (soft is not None):
        raise ValueError(f"recipe {recipe.name!r} has labels={recipe.labels!r}, but soft labels were "
                         f"{'given' if soft is not None else 'not given'}")  # fmt: skip
    net = net.to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(net, recipe)
    start = _resume(checkpoint, net, optimizer)
    labels = data.labels.to(device)
    total = recipe.epochs * steps_per_epoch(len(labels), recipe.batch)
    bar = tqdm(total=total, initial=start, desc=description, unit="step", leave=False, disable=None)
    epoch, running = start * recipe.epochs // total, []
    for view in views(data, recipe, size, seed, start):
        if view.epoch != epoch:
            _end_epoch(epoch, net, running, on_epoch, bar)
            epoch, running = view.epoch, []
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * 0.5 * (1 + math.cos(math.pi * view.epoch / recipe.epochs))
        net.train()
        images = normalise(view.pixels.to(device), data.mean, data.std)
        with autocast(device, dtype):
            logits = net(images)
        if soft is not None:
            w = None if weights is None else weights.to(device)[view.indices.to(device)]
            loss = kd_loss(logits, soft(view.step, images), recipe.temperature, w)
        else:
            y = labels[view.indices.to(device)]
            loss = hard_loss(logits, y, y[view.permutation.to(device)], view.share)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        running.append(loss.detach())
        bar.update()
        save = checkpoint is not None and checkpoint.due(view.step + 1)
        if save or view.step % 50 == 49 or view.step + 1 == total:
            _check_finite(loss, view.step, recipe)
        if save:
            _save(checkpoint, net, optimizer, view.step + 1)
    _end_epoch(epoch, net, running, on_epoch, bar)
    bar.close()
    return net.eval()


def _end_epoch(epoch: int, net: nn.Module, losses: list[Tensor], on_epoch, bar) -> None:
    if not losses:
        return
    mean = torch.stack(losses).mean().item()
    bar.set_postfix(epoch=epoch, loss=f"{mean:.4g}")
    if on_epoch:
        on_epoch(epoch, net, mean)


def _check_finite(loss: Tensor, step: int, recipe: Recipe) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the training loss is not finite at step {step} of recipe {recipe.name!r} (lr={recipe.lr}); the last good "
            "state is kept; a smaller learning rate or precision=fp32 may help"
        )


def _save(checkpoint: Checkpoint, net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {f"net/{k}": v for k, v in net.state_dict().items()}
    for i, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{k}": torch.as_tensor(v) for k, v in slots.items() if v is not None}
    checkpoint.save(tensors, {"step": step})


def _resume(checkpoint: Checkpoint | None, net: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the checkpoint into net and optimiser; returns the next step (0 without one)."""
    saved = checkpoint.load() if checkpoint else None
    if saved is None:
        return 0
    tensors, meta = saved
    net.load_state_dict({k.removeprefix("net/"): v for k, v in tensors.items() if k.startswith("net/")})
    params = [p for group in optimizer.param_groups for p in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, i, name = key.split("/", 2)
            if value.shape == params[int(i)].shape:  # the fused optimiser wants the parameter's own memory order
                value = torch.empty_like(params[int(i)]).copy_(value)
            slots.setdefault(int(i), {})[name] = value
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "state": slots})
    return meta["step"]


@torch.inference_mode()
def accuracy(
    net: nn.Module, images: Tensor, labels: Tensor, data: Dataset | Stream, *, device: torch.device,
    dtype: torch.dtype = torch.bfloat16, batch: int = 256,
) -> float:  # fmt: skip
    """Top-1 accuracy in percent on centre views: images uint8 [N, C, size, size], labels [N]."""
    net.eval()
    right = 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        with autocast(device, dtype):
            z = net(normalise(x.to(device), data.mean, data.std))
        right += (z.argmax(1) == y.to(device)).sum()
    return 100 * int(right) / len(labels)
