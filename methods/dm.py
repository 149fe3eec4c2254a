"""DM: dataset distillation by matching class means in the feature spaces of random networks.

Zhao and Bilen, Dataset Condensation with Distribution Matching, WACV 2023 (arXiv 2110.04181;
github.com/VICO-UoE/DatasetCondensation).

    python methods/dm.py dataset=cifar10 ipc=10 data=~/data     # distilled set, student accuracy

Each step draws a fresh random network, which is never trained; psi(x) is the flattened input of its classifier.  It
takes of each class k a real batch B_k and all synthetic images S_k, gives both the same augmentation A_k, and moves the
synthetic images down the gradient of

    L = sum_k | mean_{x in B_k} psi(A_k(x)) - mean_{s in S_k} psi(A_k(s)) |^2       (sum over all features)

by SGD with momentum 0.5.  Real features need no gradient.

How it is computed here, with the same result: the code loops over classes; networks without BatchNorm do not couple
images, so all classes share their forward passes, cut into chunks of one size.  With BatchNorm the statistics span the
classes (train mode), as in the code: one forward of all real images, one of all synthetic ones.

Where this departs from the official code, and why:
  seeds        the code takes seeds from the clock: classes may share an augmentation, runs cannot be repeated; every
               draw here comes from the generator
  iterations   the code makes one update more than asked for, and evaluates before it
  affine maps  corners are aligned, as in the PyTorch release the paper used   (in the augmentation that is passed in)
  small class  the whole class is its batch where it has fewer than `batch_real` images, also with BatchNorm
  dropout      off, where a network has it
Copied alone, as a module, it needs torch; the command line is this repository's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PUBLISHED", "Config", "Embedding", "State", "distill", "matching_loss"]


def _option(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


@dataclass(frozen=True)
class Config:
    """One distillation; the defaults are the released code on CIFAR-10."""

    ipc: int = _option(10, "synthetic images per class", unit="images", minimum=1)
    iterations: int = _option(20_000, "updates of the synthetic set", unit="steps", minimum=1, source="main_DM.py")
    lr: float = _option(1.0, "step size of the images", minimum=0, source="README")
    momentum: float = _option(0.5, "momentum of the images", minimum=0, source="main_DM.py")
    batch_real: int = _option(256, "real images per class and step", unit="images", minimum=1, source="main_DM.py")
    init: str = _option("real", "first images: random real ones, or noise", choices=("real", "noise"))
    chunk: int = _option(0, "images in a pass of the network; 0: 32 on a CPU, else 4096 (with BatchNorm always all)",
                         unit="images", minimum=0)  # fmt: skip
    precision: str = _option("fp32", "of the network: mixed takes real images in bf16, bf16 also the synthetic ones",
                             choices=("fp32", "mixed", "bf16"))  # fmt: skip
    compile: bool = _option(False, "compile the network's passes (needs a C++ compiler on a CPU)")

    def __post_init__(self):
        for f in fields(self):
            value, low, allowed = getattr(self, f.name), f.metadata.get("minimum"), f.metadata.get("choices")
            if allowed and value not in allowed:
                raise ValueError(f"{f.name}={value!r} is unknown; allowed: {', '.join(allowed)}")
            if low is not None and not value >= low:
                raise ValueError(f"{f.name}={value!r} is too small; the least is {low}")


# Published settings by (dataset, ipc or None for every ipc).  Source: readme.md and main_DM.py of
# VICO-UoE/DatasetCondensation.  The readme has commands for CIFAR only, the other rows are the code's defaults;
# Tiny-ImageNet is in the paper, without a setting of its own.
PUBLISHED: dict[tuple[str, int | None], dict] = {
    **{(s, None): {"lr": 1.0} for s in ("cifar10", "cifar100", "svhn", "mnist", "fashion-mnist", "tiny-imagenet")},
    **{("cifar10", ipc): {"lr": 10.0} for ipc in (100, 200, 500, 1000, 1250)},
}


# ---------------------------------------------------------------- features


class Embedding:
    """psi: images [B, C, H, W] -> what enters the last nn.Linear, flattened, [B, D], float32 at least.

    One module that takes the weights of network after network, so that it is compiled once for each shape.
    """

    def __init__(self, net: nn.Module, device: torch.device | str = "cpu", *, compile: bool = False):
        linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(f"the network {type(net).__name__} has no nn.Linear layer to read features from")
        net = copy.deepcopy(net).eval().requires_grad_(False)
        parent, _, name = linear[-1].rpartition(".")
        setattr(net.get_submodule(parent), name, nn.Identity())
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            norm.train()
        self.couples_images = bool(norms)
        # Convolutions are faster in channels_last, but the library's GroupNorm is not, unless it is compiled.
        slow = not compile and any(type(m) is nn.GroupNorm for m in net.modules())
        self.layout = torch.contiguous_format if slow else torch.channels_last
        self.net = net.to(device, memory_format=self.layout)
        self._forward = torch.compile(self.net, dynamic=False) if compile else self.net

    def load(self, net: nn.Module) -> None:
        """Take over the weights of another network of the same kind."""
        weights = net.state_dict()
        self.net.load_state_dict({name: weights[name] for name in self.net.state_dict()})

    def __call__(self, images: Tensor, low: bool = False) -> Tensor:
        """low: in bf16."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=low):
            features = self._forward(images.contiguous(memory_format=self.layout)).flatten(1)
        return features.to(torch.promote_types(features.dtype, torch.float32))


def class_means(
    psi: Embedding, batches: list[Tensor], load: Callable[[Tensor], Tensor], see: Callable[[Tensor, Tensor], Tensor],
    chunk: int, low: bool = False,
) -> Tensor:  # fmt: skip
    """mean psi(A_k(x)) of a real batch of each class: [K, D], without gradient.

    batches: K tensors of image numbers.  load(numbers) -> network input.  see(images, classes [B]): each image under
    its class's augmentation.  `chunk` images go through the network at a time.
    """
    counts = torch.tensor([len(batch) for batch in batches])
    numbers, classes = torch.cat(batches), torch.arange(len(batches)).repeat_interleave(counts)
    total = None
    with torch.no_grad():
        for rows, of in zip(numbers.split(chunk), classes.split(chunk), strict=True):
            features = psi(see(load(rows), of), low)
            if total is None:
                total = features.new_zeros(len(batches), features.shape[1])
            total.index_add_(0, of.to(features.device), features)
    return total / counts.to(total)[:, None]


def matching_loss(real: Tensor, features: Tensor) -> Tensor:
    """L: real class means [K, D], features of the synthetic images [K*I, D], sorted by class -> scalar."""
    synthetic = features.unflatten(0, (len(real), -1)).mean(1)  # [K, D]
    return (real - synthetic).square().sum()


def image_gradient(
    psi: Embedding, images: Tensor, real: Tensor, see: Callable[[Tensor, Tensor], Tensor], block: int, low: bool = False
) -> tuple[Tensor, Tensor]:
    """L and its gradient by images [K*I, C, H, W]; `block` classes at a time, no term of L holds two."""
    each, loss, gradients = len(images) // len(real), real.new_zeros(()), []
    for classes in torch.arange(len(real)).split(block):
        own = images[classes[0] * each : (classes[-1] + 1) * each].detach().requires_grad_()
        part = matching_loss(real[classes.to(real.device)], psi(see(own, classes.repeat_interleave(each)), low))
        gradients += torch.autograd.grad(part, own)
        loss += part.detach()
    return loss, torch.cat(gradients)


# ---------------------------------------------------------------- distillation


def draw_real(by_class: list[Tensor], count: int, generator: torch.Generator) -> list[Tensor]:
    """Numbers of `count` random real images of each class (all of a smaller one), without replacement."""
    return [rows[torch.randperm(len(rows), generator=generator)[:count]] for rows in by_class]


@dataclass
class State:
    """Where a distillation stands; `tensors()` is all that is needed to continue it bit for bit."""

    images: Tensor  # [M, C, H, W], network input
    velocity: Tensor
    generator: Tensor  # its state, uint8
    step: int = 0  # finished iterations
    loss: Tensor | float = math.nan  # of the last of them

    def tensors(self) -> dict[str, Tensor]:
        self.check()
        return {
            "images": self.images.cpu(), "velocity": self.velocity.cpu(), "generator": self.generator,
            "at": torch.tensor(self.step),
        }  # fmt: skip

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> State:
        return cls(tensors["images"], tensors["velocity"], tensors["generator"], int(tensors["at"]))

    def check(self) -> None:
        if not self.images.isfinite().all():
            raise FloatingPointError(
                f"the images are not finite after iteration {self.step} (loss {float(self.loss):.4g}); the last good "
                "state is kept; try a smaller lr or precision=fp32"
            )


def distill(
    images: Tensor,
    labels: Tensor,
    config: Config,
    *,
    make_network: Callable[[torch.Generator], nn.Module],
    prepare: Callable[[Tensor], Tensor] | None = None,
    augment: Any = None,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    state: State | None = None,
    on_step: Callable[[State], None] | None = None,
) -> dict[str, Tensor]:
    """Distil real images [N, C, H, W], labels int64 [N] -> {"images": float32 [M, C, H, W], "labels": int64 [M]}.

    make_network(generator): a fresh network on the CPU, its last nn.Linear the classifier.  prepare: real images, moved
    to the device -> network input; None: they are floats already.  augment: `draw(rows, generator, siamese=True)` and
    `augment(images, draw)`, or None.  `state` continues an earlier run, `on_step` sees the state after each iteration.
    The result is network input, sorted by class and not clipped.  Raises FloatingPointError when the images are not
    finite (looked at every 50 iterations).
    """
    by_class = _classes(images, labels, config, prepare)
    device = torch.device(device)
    psi = Embedding(make_network(torch.Generator()), device, compile=config.compile)  # these weights are never used

    def load(rows: Tensor) -> Tensor:
        chosen = images[rows.to(images.device)].to(device)
        return chosen if prepare is None else prepare(chosen)

    if state is None:
        x = load(torch.cat(draw_real(by_class, config.ipc, generator))) if config.init == "real" else None
        if x is None:
            one = load(torch.zeros(1, dtype=torch.long))
            x = torch.randn(len(by_class) * config.ipc, *one.shape[1:], generator=generator, dtype=one.dtype).to(device)
        state = State(x.contiguous(), torch.zeros_like(x, memory_format=torch.contiguous_format), generator.get_state())
    state.images, state.velocity = state.images.to(device), state.velocity.to(device)
    generator.set_state(state.generator)
    chunk = config.chunk or (32 if device.type == "cpu" else 4096)
    block = max(1, chunk // config.ipc)
    if psi.couples_images:
        chunk, block = len(by_class) * config.batch_real, len(by_class)

    while state.step < config.iterations:
        psi.load(make_network(generator))
        batches = draw_real(by_class, config.batch_real, generator)
        draw = None if augment is None else augment.draw(len(by_class), generator, siamese=True)
        see = _siamese(augment, draw)
        real = class_means(psi, batches, load, see, chunk, low=config.precision != "fp32")
        loss, gradient = image_gradient(psi, state.images, real, see, block, low=config.precision == "bf16")
        state.velocity = config.momentum * state.velocity + gradient
        state.images = state.images - config.lr * state.velocity
        state.loss, state.generator, state.step = loss, generator.get_state(), state.step + 1
        if state.step % 50 == 0 or state.step == config.iterations:
            state.check()
        if on_step:
            on_step(state)
    return {"images": state.images.cpu(), "labels": torch.arange(len(by_class)).repeat_interleave(config.ipc)}


def _siamese(augment: Any, draw: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """(images, their classes) -> the images, each under the row of its class."""
    return lambda x, classes: x if augment is None else augment(x, draw[classes])


def _classes(images: Tensor, labels: Tensor, config: Config, prepare) -> list[Tensor]:
    """The image numbers of each class; ValueError where a distillation could not start."""
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; needs as many of both, and at least one")
    if prepare is None and not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; pass network input as floats, or prepare= that makes it")
    labels = labels.cpu()
    counts = labels.bincount()
    few, least = int(counts.min()), config.ipc if config.init == "real" else 1
    if few < least:
        raise ValueError(
            f"class {int(counts.argmin())} has {few} real images; ipc={config.ipc} with init={config.init!r} needs at "
            f"least {least} in every class"
        )
    return [(labels == k).nonzero().flatten() for k in range(len(counts))]


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from common import cli, script

    sys.exit(
        cli.guard(
            lambda a: script.run_matching(a, "dm", Config, PUBLISHED, State.restore, distill, recipe="dm-2023"),
            sys.argv[1:],
        )
    )
