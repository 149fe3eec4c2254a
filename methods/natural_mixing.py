"""Natural data mixing: students of a distilled set see it blended with real images, drawn anew each epoch.

Ian Pons, Guilherme B. Stern, Anna H. Reali Costa and Artur Jordao, Enhancing Distilled Datasets via Natural Data Mixing
(github.com/IanPons/Enhancing-Distilled-Datasets).

    python methods/natural_mixing.py set=out/dm_cifar10_ipc10.safetensors dataset=cifar10 data=~/data

Before each epoch every synthetic image s of class y meets a random real image x of the same class,

    s_bar = (1 - alpha) s + alpha x,    alpha ~ U[0, 1]      (Eq. 2)

and the student trains one epoch on (s_bar, y).  The distilled set itself never changes, but training reads real
images: at 300 epochs each s meets up to 300 of them.  The control with the same sampling and nothing synthetic is
alpha=fixed share=1; share=0 is the set alone, with the same first weights and the same order of images.

Where paper and official code differ or leave something open, and what is taken:
  alpha         "for all samples at every epoch" reads like a draw for each sample; the released script draws one an
                epoch, which presumably made the tables: alpha=epoch.  alpha=sample is the other reading
  augmentation  the paper keeps each author's settings; the script augments nothing, not even sets made under DSA, and
                its baselines lie below the published ones: off.  augment=true augments the mixed batches, as the
                evaluation in the released utilities does
  optimiser     Adam in the script, the SGD of DC in the utilities: optimizer=adam or sgd
  space         the script mixes normalised images, which is mixing pixels, as normalisation is affine and the shares
                sum to 1.  Sets in another space (whitened) need a `prepare` that takes real images there.  No clamping
  seed          the script trains with and without mixing from one fixed seed: here from one `generator`
  soft labels   not in the paper: the label of s stays, hard or soft, and its largest entry is the class of x

Copied alone, as a module, it needs torch; the command line is this repository's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Config", "Pool", "State", "fractal_pool", "mix", "mixed_epoch", "train"]


def _option(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


@dataclass(frozen=True)
class Config:
    """One student; the defaults are the official script, which has one recipe for every data set and ipc."""

    alpha: str = _option("epoch", "real share: from U[0, 1], drawn once an epoch or for each sample, or always `share`",
                         choices=("epoch", "sample", "fixed"), source="load_train_compare.py")  # fmt: skip
    share: float = _option(0.5, "real share with alpha=fixed; 1: real images only, 0: the set alone", minimum=0,
                           maximum=1)  # fmt: skip
    partner: str = _option("class", "the real image: of the same class, or any", choices=("class", "any"))
    epochs: int = _option(300, "passes over the set (sgd: one more)", unit="epochs", minimum=1,
                          source="load_train_compare.py")  # fmt: skip
    batch: int = _option(256, "images of a step", unit="images", minimum=1, source="load_train_compare.py")
    optimizer: str = _option("adam", "adam: constant step size; sgd: momentum 0.9, weight decay 5e-4, after pass "
                             "epochs // 2 + 1 a tenth of lr and a new optimiser", choices=("adam", "sgd"),
                             source="load_train_compare.py; utils.py")  # fmt: skip
    lr: float = _option(0.0, "step size; 0: 0.001 for adam, 0.01 for sgd", minimum=0)
    augment: bool = _option(False, "augment the mixed batches", source="utils.py has it, load_train_compare.py not")
    precision: str = _option("fp32", "arithmetic of the network", choices=("fp32", "bf16"))

    def __post_init__(self):
        for f in fields(self):
            value, facts = getattr(self, f.name), f.metadata
            if facts.get("choices") and value not in facts["choices"]:
                raise ValueError(f"{f.name}={value!r} is unknown; allowed: {', '.join(facts['choices'])}")
            if "minimum" in facts and not facts["minimum"] <= value <= facts.get("maximum", math.inf):
                most = f" and at most {facts['maximum']}" if "maximum" in facts else ""
                raise ValueError(f"{f.name}={value!r} must be at least {facts['minimum']}{most}")
        if self.alpha != "fixed" and self.share != Config.share:
            raise ValueError(f"share={self.share} and alpha={self.alpha!r}: share is that of alpha='fixed' alone; "
                             f"allowed: alpha='fixed', or share={Config.share}")  # fmt: skip

    @property
    def passes(self) -> int:
        return self.epochs + (self.optimizer == "sgd")

    def restarts(self, epoch: int) -> bool:
        """Whether pass `epoch`, counted from 0, begins with a new optimiser, which forgets its moments."""
        return epoch == 0 or (self.optimizer == "sgd" and epoch == self.epochs // 2 + 2)

    def rate(self, epoch: int) -> float:
        """Step size of pass `epoch`, counted from 0."""
        first = self.lr or {"adam": 0.001, "sgd": 0.01}[self.optimizer]
        return first * (0.1 if self.optimizer == "sgd" and epoch > self.epochs // 2 + 1 else 1.0)


def rng(*path: int | str) -> torch.Generator:
    """A CPU generator that depends only on `path`, so that a draw does not depend on how many came before it."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(path).encode()).digest()[:7], "big"))


# ---------------------------------------------------------------- mixing


@dataclass(frozen=True, eq=False)
class Pool:
    """Real images to mix in, sorted by class; class k has `count[k]` of them from row `offset[k]` on."""

    images: Tensor  # [N, C, H, W], uint8 or network input, on the device
    offset: Tensor  # int64 [K], on the CPU like count; both empty without labels
    count: Tensor
    prepare: Callable[[Tensor], Tensor] | None

    @classmethod
    def of(
        cls, images: Tensor, labels: Tensor | None, device: torch.device | str = "cpu",
        prepare: Callable[[Tensor], Tensor] | None = None,
    ) -> Pool:  # fmt: skip
        """images: [N, C, H, W], kept as they are; prepare: some of them, on the device -> network input, None if they
        are that.  labels: int64 [N], or None (another data set, fractals), which serves partner=any alone."""
        if images.dim() != 4 or not len(images) or (labels is not None and len(labels) != len(images)):
            given = f"{list(images.shape)} with {'no' if labels is None else len(labels)} labels"
            raise ValueError(f"real images are {given}; allowed: [N, C, H, W], and N labels or None")
        if prepare is None and not images.is_floating_point():
            raise ValueError(f"real images are {images.dtype}; pass network input as floats, or prepare= that makes it")
        count = torch.zeros(0, dtype=torch.long)
        if labels is not None:
            labels = labels.cpu()
            images, count = images[labels.argsort(stable=True).to(images.device)], labels.bincount()
        return cls(images.to(device), count.cumsum(0) - count, count, prepare)

    def check(self, images: Tensor, labels: Tensor, partner: str) -> None:
        """ValueError where the images [M, C, H, W] of a set, labels [M], find no partners here."""
        if len(labels) != len(images) or labels.is_floating_point() or int(labels.min()) < 0:
            given = f"{len(labels)} labels of {labels.dtype}, the least of them {labels.min()}"
            raise ValueError(f"{len(images)} images of the set have {given}; allowed: one class from 0 on for each")
        own, wanted = list(self.images.shape[1:]), list(images.shape[1:])
        if own != wanted:
            raise ValueError(f"real images are {own} (C, H, W) and those of the set {wanted}; they must be the same")
        if partner == "class":
            self.counts(labels.cpu())

    def counts(self, labels: Tensor) -> Tensor:
        """How many real images there are of the class of each label, [M]; ValueError where there is none."""
        found = F.pad(self.count, (0, int(labels.max()) + 1))[labels]
        if not found.all():
            missing = int(labels[found == 0].min())
            raise ValueError(f"class {missing} of the set has no real image; give one, or take partner='any'")
        return found

    def draw(self, labels: Tensor, generator: torch.Generator, partner: str = "class") -> Tensor:
        """A random real image for each label [M], with replacement: network input [M, C, H, W]."""
        uniform = torch.rand(len(labels), generator=generator, dtype=torch.float64)  # on the CPU: same on all devices
        if partner == "any":
            rows = (uniform * len(self.images)).long()
        else:
            labels = labels.cpu()
            rows = (uniform * self.counts(labels)).long() + self.offset[labels]
        chosen = self.images[rows.to(self.images.device)]
        return chosen if self.prepare is None else self.prepare(chosen)


def mix(images: Tensor, real: Tensor, alpha: Tensor | float) -> Tensor:
    """Eq. 2: images [M, C, H, W], real [M, C, H, W], alpha a number or [M] -> [M, C, H, W]."""
    alpha = torch.as_tensor(alpha).to(images).view(-1, 1, 1, 1)
    return torch.lerp(images, real.to(images), alpha)  # (1 - alpha) s + alpha x


def mixed_epoch(images: Tensor, labels: Tensor, pool: Pool, config: Config, generator: torch.Generator) -> Tensor:
    """What a student sees in one epoch in place of images [M, C, H, W], network input with labels int64 [M].

    Every reading of alpha draws the same partners.
    """
    pool.check(images, labels, config.partner)
    real = pool.draw(labels, generator, config.partner)
    alpha = torch.tensor(config.share)
    if config.alpha != "fixed":
        alpha = torch.rand(1 if config.alpha == "epoch" else len(images), generator=generator)
    return mix(images, real, alpha)


# ---------------------------------------------------------------- a student


@dataclass
class State:
    """Where a training stands after `epoch` passes; `tensors()` is all that is needed to continue it bit for bit."""

    seed: int  # of every draw
    network: dict[str, Tensor]  # parameters and buffers; empty before the first pass
    moments: dict[str, Tensor]  # of the optimiser, "kind/parameter"
    epoch: int = 0
    loss: Tensor | float = math.nan  # mean over the last pass

    def tensors(self) -> dict[str, Tensor]:
        self.check()
        groups = {"network": self.network, "moments": self.moments}
        kept = {f"{group}/{name}": t for group, named in groups.items() for name, t in named.items()}
        kept = {name: t.detach().to("cpu", copy=True) for name, t in kept.items()}  # training goes on in place
        numbers = {"seed": self.seed, "at": self.epoch, "loss": float(self.loss)}
        return {**{name: torch.tensor(value) for name, value in numbers.items()}, **kept}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> State:
        network, moments = (
            {key.removeprefix(group): t for key, t in tensors.items() if key.startswith(group)}
            for group in ("network/", "moments/")
        )
        return cls(int(tensors["seed"]), network, moments, int(tensors["at"]), float(tensors["loss"]))

    def check(self) -> None:
        if not math.isfinite(self.loss):
            raise FloatingPointError(
                f"the loss is {float(self.loss)} after pass {self.epoch}; the last good state is kept; try a smaller lr"
            )


def train(
    images: Tensor,
    labels: Tensor,
    real_images: Tensor | None,
    real_labels: Tensor | None,
    config: Config,
    *,
    make_network: Callable[[torch.Generator], nn.Module],
    prepare: Callable[[Tensor], Tensor] | None = None,
    augment: Any = None,
    soft_labels: Tensor | None = None,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    state: State | None = None,
    on_step: Callable[[State], None] | None = None,
    pool: Pool | None = None,
) -> dict[str, Tensor]:
    """Train a student on images [M, C, H, W] (network input), labels int64 [M], mixed with real images.

    real_images [N, C, H, W], real_labels [N] and prepare: see `Pool.of`; `pool` in their place serves many students.
    make_network(generator): a fresh network on the CPU.  augment: `draw(rows, generator, siamese=False)` and
    `augment(images, draw)`, with config.augment alone.  soft_labels: logits [M, K], learned by cross-entropy with their
    softmax; their largest is the class of the partner.  `state` continues an earlier run, `on_step` sees the state
    after each epoch.  Returns the parameters and buffers after the last epoch.  One number is drawn from `generator`;
    from it follow the first weights and each epoch's order, partners, alpha, augmentation and dropout, each apart from
    the others.  Raises FloatingPointError when the loss is not finite (looked at every 50 epochs).
    """
    device = torch.device(device)
    target, classes = _targets(images, labels, soft_labels, augment, config)
    if pool is None:
        if real_images is None:
            raise ValueError("real_images=None and pool=None; allowed: images [N, C, H, W] with real_labels, or a Pool")
        pool = Pool.of(real_images, real_labels, device, prepare)
    pool.check(images, classes, config.partner)
    state = state or State(int(torch.randint(2**62, (), generator=generator)), {}, {})
    images, target = images.to(device), target.to(device)
    # Faster in channels_last on a GPU; on a CPU the library's GroupNorm is slow in it.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    net = make_network(rng(state.seed, "network"))
    if state.network:
        net.load_state_dict(state.network)
    net = net.to(device, images.dtype, memory_format=layout).train()
    optimizer = _optimizer(net, config, state.moments)

    while state.epoch < config.passes:
        epoch, seed = state.epoch, state.seed
        if config.restarts(epoch):
            optimizer = _optimizer(net, config)
        optimizer.param_groups[0]["lr"] = config.rate(epoch)
        mixed = mixed_epoch(images, classes, pool, config, rng(seed, "mix", epoch))
        order = torch.randperm(len(images), generator=rng(seed, "order", epoch)).to(device)
        total = 0
        with seeded(device, rng(seed, "dropout", epoch)):
            for batch, rows in enumerate(order.split(config.batch)):
                x = mixed[rows]
                if augment is not None:
                    x = augment(x, augment.draw(len(rows), rng(seed, "augment", epoch, batch), siamese=False))
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    logits = net(x.contiguous(memory_format=layout))
                # Class numbers, or probabilities where the labels are soft.
                loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total = total + loss.detach() * len(rows)
        state.network, state.moments = net.state_dict(), _moments(net, optimizer)
        state.loss, state.epoch = total / len(images), epoch + 1
        if state.epoch % 50 == 0 or state.epoch == config.passes:
            state.check()
        if on_step:
            on_step(state)
    return {name: t.detach().cpu() for name, t in net.state_dict().items()}


def _optimizer(net: nn.Module, config: Config, moments: dict[str, Tensor] | None = None) -> torch.optim.Optimizer:
    """A new optimiser, or one that goes on from `moments`."""
    params = dict(net.named_parameters())
    if config.optimizer == "adam":
        optimizer = torch.optim.Adam(params.values(), lr=config.rate(0))
    else:
        optimizer = torch.optim.SGD(params.values(), lr=config.rate(0), momentum=0.9, weight_decay=5e-4)
    for key, value in (moments or {}).items():
        kind, name = key.split("/", 1)
        own = params[name]  # what has its shape lies on its device and in its memory order; counts of steps do not
        optimizer.state[own][kind] = torch.empty_like(own).copy_(value) if value.shape == own.shape else value
    return optimizer


def _moments(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {f"{kind}/{name}": t for name, p in net.named_parameters() for kind, t in optimizer.state[p].items()}


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


def _targets(
    images: Tensor, labels: Tensor, soft: Tensor | None, augment: Any, config: Config
) -> tuple[Tensor, Tensor]:
    """What the student learns, class numbers [M] or probabilities [M, K], and the class of each partner [M]."""
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; needs as many of both, and at least one")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; pass network input as floats")
    if config.augment != (augment is not None):
        given = "none is" if augment is None else "one is"
        raise ValueError(f"augment={config.augment}, but {given} passed; config.augment=True goes with augment=, only")
    if soft is None:
        return labels, labels.cpu()
    if soft.dim() != 2 or len(soft) != len(labels):
        raise ValueError(f"soft_labels={tuple(soft.shape)}; allowed: [{len(labels)}, classes]")
    return soft.to(images.dtype).softmax(1), soft.argmax(1).cpu()


# ---------------------------------------------------------------- another source of images: procedural fractals

MAPS = 6  # most affine maps of a fractal, 3 at least
BINS = 2  # of the histogram to a pixel, each way
WALKERS, SETTLE = 1024, 12  # points that walk at a time, and their steps before they are on the attractor
PER_BIN = 12  # points that are counted, mean over the bins


def fractal_pool(count: int, size: int, generator: torch.Generator, channels: int = 3) -> Tensor:
    """`count` random fractal flames, uint8 [count, channels, size, size], for a `Pool` without labels.

    Points of an iterated function system of 3 to 6 affine contractions, counted on a grid; brightness is the logarithm
    of the count, the colour follows which maps led there, through a random palette.  Procedural fractals, a stand-in
    for the mixing set of PixMix, which they are not.
    """
    if count < 1 or size < 1 or channels < 1:
        raise ValueError(f"count={count}, size={size} and channels={channels} must be at least 1")
    steps = math.ceil(PER_BIN * (BINS * size) ** 2 / WALKERS)
    most = max(1, 16 * 48 // steps)  # at once, few enough to stay in the cache
    blocks = (min(most, count - first) for first in range(0, count, most))
    return torch.cat([_fractals(block, size, steps, generator, channels) for block in blocks])


def _fractals(count: int, size: int, steps: int, generator: torch.Generator, channels: int) -> Tensor:
    maps = random_maps(count, generator)
    points, colours = attractor(*maps, steps, generator)  # [count, P, 2], [count, P]
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    side = size * BINS
    cells = ((points - low) / (high - low).clamp(min=1e-6) * (side - 1e-3)).long()  # [count, P, 2] in 0..side - 1
    flat = (torch.arange(count)[:, None] * side**2 + cells[..., 0] * side + cells[..., 1]).flatten()
    hits = flat.bincount(minlength=count * side**2)
    hue = flat.bincount(colours.flatten(), minlength=len(hits)) / hits.clamp(min=1)
    shape = (count, 1, side, side)
    light = hits.view(shape).float().log1p()
    light = light / light.amax((2, 3), keepdim=True)
    pixels = light * _palette(hue.view(shape).float(), torch.rand(count, 4, channels, generator=generator))
    return (F.avg_pool2d(pixels, BINS) * 255).round().to(torch.uint8)


def random_maps(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Contractions z -> A z + b: A [count, 6, 2, 2], b [count, 6, 2], their probabilities [count, 6], which go as
    |det A|; those a fractal does not have are 0."""
    turn = 2 * math.pi * torch.rand(2, count, MAPS, generator=generator)
    cos, sin = turn.cos(), turn.sin()
    left, right = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # rotations
    singular = 0.3 + 0.6 * torch.rand(count, MAPS, 2, generator=generator)  # spectral norm below 0.9
    shifts = 2 * torch.rand(count, MAPS, 2, generator=generator) - 1
    present = torch.arange(MAPS) < torch.randint(3, MAPS + 1, (count, 1), generator=generator)
    weights = singular.prod(-1) * present  # |det A|
    return left * singular[..., None, :] @ right, shifts, weights / weights.sum(1, keepdim=True)


def attractor(
    matrices: Tensor, shifts: Tensor, weights: Tensor, steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """P = steps WALKERS points of each fractal by the chaos game, [count, P, 2], and a colour in 0..1, [count, P].

    Walkers apply a map drawn anew at each step; the colour moves half the way to that of the map.
    """
    count = len(weights)
    edges = weights.cumsum(1)[:, :-1, None]  # [count, MAPS - 1, 1]
    numbers = torch.cat([matrices.flatten(2), shifts, torch.rand(count, MAPS, 1, generator=generator)], 2)
    numbers = numbers.transpose(1, 2).contiguous()  # [count, 7, MAPS]: a, b, c, d, x, y, colour
    x, y, colour = torch.zeros(3, count, WALKERS)
    kept = []
    for step in range(SETTLE + steps):
        chosen = (torch.rand(count, 1, WALKERS, generator=generator) > edges).sum(1, keepdim=True)
        a, b, c, d, dx, dy, own = numbers.gather(2, chosen.expand(-1, 7, -1)).unbind(1)
        x, y = a * x + b * y + dx, c * x + d * y + dy
        colour = (colour + own) / 2
        if step >= SETTLE:
            kept.append(torch.stack([x, y, colour]))
    x, y, colour = torch.cat(kept, 2)  # [count, P] each
    return torch.stack([x, y], 2), colour


def _palette(hue: Tensor, anchors: Tensor) -> Tensor:
    """Colours between anchors [B, A, C] at hue [B, 1, H, W] in 0..1 -> [B, C, H, W]."""
    place = torch.linspace(0, 1, anchors.shape[1])
    near = (1 - (hue - place[:, None, None]).abs() * (len(place) - 1)).clamp(min=0)  # [B, A, H, W], two are above 0
    return torch.einsum("bahw,bac->bchw", near, anchors)


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from common import cli, script_mixing

    sys.exit(cli.guard(lambda a: script_mixing.run_mixing(a, sys.modules[__name__]), sys.argv[1:]))
