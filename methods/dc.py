"""DC: dataset condensation with gradient matching.

Zhao, Mopuri, Bilen, Dataset Condensation with Gradient Matching, ICLR 2021 (arXiv 2006.05929;
github.com/VICO-UoE/DatasetCondensation).

    python methods/dc.py dataset=cifar10 ipc=10 data=~/data     # distilled set, student accuracy

Synthetic images X are moved so that a network gets the same weight gradients from them as from real images:

    g_T = d/dtheta CE(net(B_c), c)     B_c: 256 random real images of class c
    g_S = d/dtheta CE(net(S_c), c)     S_c: the I synthetic images of class c
    D(g_S, g_T) = sum over layers, sum over output rows i of  1 - <gS_i, gT_i> / (|gS_i| |gT_i| + 1e-6)
    X <- SGD with momentum on  d/dX  sum over c of D

Each of the `iterations` takes a fresh random network.  It makes `outer` steps on X and, between two of them, trains the
network for `inner` epochs on X.  Biases and norm parameters (1-D tensors) do not enter D.  At ipc=1 there is one outer
step, so the network is never trained.

Paper against released code, and what we take:
  image step      Alg. 1 updates the images of a class at a time; the code all of them at once (the same step)
  last update     the code evaluates after 1000 updates and saves after 1001        -> 1000, what it evaluated
  random numbers  the code reseeds from the clock whenever it builds a network      -> `generator` alone
  BatchNorm       as in the code: statistics of 16 real images per class, then frozen while gradients are matched
  dropout         off, where a network has it

How it is computed: the synthetic side, a few images of each class with a double backward, is one `vmap` over classes;
the real side, hundreds of images of each, plain autograd class by class in pieces of one size, which a `vmap` slows.
Copied alone, as a module, it needs torch; the command line is this repository's.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

__all__ = ["LOOPS", "PUBLISHED", "Config", "State", "distance", "distill", "image_gradient"]


def _option(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


# Published outer steps and inner epochs by ipc, the same for every data set.  Source: utils.py of the released code.
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}


@dataclass(frozen=True)
class Config:
    """One distillation; the defaults are the released code at CIFAR-10."""

    ipc: int = _option(10, "synthetic images per class", unit="images", minimum=1)
    iterations: int = _option(1000, "random networks, one after the other", unit="steps", minimum=1, source="main.py")
    outer: int = _option(0, "steps on the images per network; 0: published for this ipc", unit="steps", minimum=0)
    inner: int = _option(0, "epochs of the network between them; 0: published for this ipc", unit="epochs", minimum=0)
    lr: float = _option(0.1, "step size of the images (0.01 when the network is an MLP)", minimum=0, source="main.py")
    momentum: float = _option(0.5, "momentum of the images", minimum=0, source="main.py")
    network_lr: float = _option(0.01, "step size of the network, plain SGD", minimum=0, source="main.py")
    batch_train: int = _option(256, "images per step of the network", unit="images", minimum=1, source="main.py")
    batch_real: int = _option(256, "real images per class and outer step", unit="images", minimum=1, source="main.py")
    distance: str = _option(
        "ours", "row-wise cosine as in the paper, or squared difference or one cosine of all gradients (1-D ones too)",
        choices=("ours", "mse", "cos"),
    )  # fmt: skip
    init: str = _option("noise", "first images: standard normal or random real ones", choices=("noise", "real"))
    memory: str = _option(
        "all", "synthetic classes at once: all, or one after the other (same update, lower peak)",
        choices=("all", "class"),
    )  # fmt: skip
    in_flight: int = _option(0, "most real images in one pass; 0: 32 on a CPU, else 256", unit="images", minimum=0)
    precision: str = _option(
        "fp32", "arithmetic of the network; mixed: bf16 in the real side and the inner training only",
        choices=("fp32", "mixed", "bf16"),
    )  # fmt: skip
    compile: bool = _option(False, "compile the gradient functions (needs a C++ compiler on a CPU)")

    def __post_init__(self):
        for f in fields(self):
            value, low, allowed = getattr(self, f.name), f.metadata.get("minimum"), f.metadata.get("choices")
            if allowed and value not in allowed:
                raise ValueError(f"{f.name}={value!r} is unknown; allowed: {', '.join(allowed)}")
            if low is not None and not value >= low:
                raise ValueError(f"{f.name}={value!r} is too small; the least is {low}")
        if self.ipc not in LOOPS and not (self.outer and self.inner):
            raise ValueError(
                f"ipc={self.ipc} has no published loops; allowed: {', '.join(map(str, LOOPS))}, or give outer and inner"
            )

    @property
    def loops(self) -> tuple[int, int]:
        """Outer steps and inner epochs that run."""
        outer, inner = LOOPS.get(self.ipc, (0, 0))
        return self.outer or outer, self.inner or inner


# Published settings by (dataset, ipc).  Source: main.py and utils.py of the released code; at CIFAR-100 ipc 50 it has
# loops but the authors report no number.
PUBLISHED: dict[tuple[str, int | None], dict] = {
    (name, ipc): {"outer": outer, "inner": inner}
    for name in ("mnist", "fashion-mnist", "svhn", "cifar10", "cifar100")
    for ipc, (outer, inner) in LOOPS.items()
}


# --- begin shared block: distance (a test keeps its copies equal) ---
def distance(synthetic: dict[str, Tensor], real: dict[str, Tensor], kind: str = "ours") -> Tensor:
    """D(g_S, g_T) of one class: gradients {name: [rows, ...]} -> scalar."""
    if kind == "ours":
        return sum(_rows(synthetic[n], real[n]) for n in real if real[n].ndim > 1)
    a, b = (torch.cat([g[n].flatten() for n in real]) for g in (synthetic, real))  # [P]
    return (a - b).square().sum() if kind == "mse" else 1 - a @ b / (a.norm() * b.norm() + 1e-6)


def _rows(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.flatten(1), b.flatten(1)  # [rows, weights of one output]
    return (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()


# --- end shared block ---


# --- begin shared block: network (a test keeps its copies equal) ---
class Network:
    """The random network of an iteration: parameters theta and buffers as tensors, run through one template module.

    A compiled function therefore serves all networks.
    """

    def __init__(self, make_network: Callable[[torch.Generator], nn.Module], config: Config, device: torch.device):
        self.module = make_network(torch.Generator()).to(device).eval()  # a template: its weights are never used
        norms = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d
        self.norms = [m for m in self.module.modules() if isinstance(m, norms)]
        if self.norms and config.precision == "bf16":
            raise ValueError("precision='bf16' cannot take a network with BatchNorm; allowed: fp32, mixed")
        self.config, self.device = config, device
        # Convolutions are fastest in channels_last, but eager norms are not: it pays where a compiler fuses them.
        self.layout = torch.channels_last if config.compile else torch.contiguous_format
        self.theta: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.matched: list[str] = []  # names of the parameters whose gradients are compared
        match = vmap(grad_and_value(self._distance), in_dims=(0, 0, 0, None, None))
        self.loss = torch.compile(self._loss, dynamic=False) if config.compile else self._loss
        self.match = torch.compile(match, dynamic=False) if config.compile else match

    def renew(self, net: nn.Module) -> None:
        """Take over a copy of the weights of a fresh network."""
        net = copy.deepcopy(net).to(self.device, memory_format=self.layout)
        self.theta = {n: p.detach().requires_grad_() for n, p in net.named_parameters()}
        self.buffers = dict(net.named_buffers())
        self.matched = [n for n, p in self.theta.items() if p.ndim > 1 or self.config.distance != "ours"]

    def bf16(self, enabled: bool) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def freeze(self, frozen: bool) -> None:
        """BatchNorm with running statistics (frozen) or with those of the batch."""
        for norm in self.norms:
            norm.train(not frozen)

    def measure(self, images: Tensor) -> None:
        """Move the running statistics of BatchNorm layers by one pass, then freeze them."""
        self.freeze(False)
        with torch.no_grad():
            functional_call(self.module, (self.theta, self.buffers), (images,))
        self.freeze(True)

    def _loss(self, theta: dict, buffers: dict, images: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy of images [B, C, H, W], summed with weights [B]."""
        logits = functional_call(self.module, (theta, buffers), (images,)).to(images.dtype)
        return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()

    def _distance(self, images: Tensor, label: Tensor, real: dict, theta: dict, buffers: dict) -> Tensor:
        """D of one class as a function of its synthetic images [I, C, H, W]."""
        matched = {n: theta[n] for n in real}
        others = {n: p for n, p in theta.items() if n not in real}
        labels, weights = label.expand(len(images)), images.new_full((len(images),), 1 / len(images))
        loss = lambda matched: self._loss({**matched, **others}, buffers, images, labels, weights)  # noqa: E731
        return distance(grad(loss)(matched), real, self.config.distance)

    def cross_entropy(self, images: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The loss of what needs no second derivative: the real side and the training of the network."""
        with self.bf16(self.config.precision != "fp32"):
            images = images.contiguous(memory_format=self.layout)
            return self.loss(self.theta, self.buffers, images, labels, weights)

    def real_gradient(self, pieces: Iterable[tuple[Tensor, Tensor]], label: int) -> dict[str, Tensor]:
        """g_T of one class, summed over pieces (images [B, C, H, W], weights [B])."""
        theta = [self.theta[n] for n in self.matched]
        total = [torch.zeros_like(p) for p in theta]
        for images, weights in pieces:
            loss = self.cross_entropy(images, torch.full((len(images),), label, device=self.device), weights)
            for sum_, part in zip(total, torch.autograd.grad(loss, theta), strict=True):
                sum_ += part
        return dict(zip(self.matched, total, strict=True))

    def synthetic_gradient(self, images: Tensor, labels: Tensor, real: dict) -> tuple[Tensor, Tensor]:
        """images [k, I, C, H, W], labels [k], g_T {name: [k, ...]} -> dD/dX [k, I, C, H, W], D [k] of k classes."""
        theta = {n: p.detach() for n, p in self.theta.items()}
        images = images.flatten(0, 1).contiguous(memory_format=self.layout).unflatten(0, images.shape[:2])
        with self.bf16(self.config.precision == "bf16"):
            return self.match(images, labels.to(self.device), real, theta, self.buffers)

    def step(self, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
        """One training step on images [B, C, H, W]."""
        loss = self.cross_entropy(images, labels, images.new_full((len(images),), 1 / len(images)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# --- end shared block ---


# --- begin shared block: real (a test keeps its copies equal) ---
class Real:
    """The real images by class, as network input on `device`."""

    def __init__(
        self, images: Tensor, labels: Tensor, config: Config, prepare: Callable[[Tensor], Tensor] | None, device
    ):
        self.images, self.prepare, self.device = images, prepare or (lambda x: x), device
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images but {len(labels)} labels; there must be one label an image")
        self.classes = int(labels.max()) + 1
        self.rows = [(labels.cpu() == k).nonzero().flatten() for k in range(self.classes)]  # image numbers by class
        least = config.ipc if config.init == "real" else 1
        for k, rows in enumerate(self.rows):
            if len(rows) < least:
                raise ValueError(f"class {k} has {len(rows)} images; init={config.init} needs at least {least} of each")
        some = self.load(torch.zeros(1, dtype=torch.long))
        if not some.is_floating_point():
            raise ValueError(f"network input is {some.dtype}; pass float images, or prepare= to normalise them")
        self.shape, self.dtype = some.shape[1:], some.dtype
        most = min(config.batch_real, max(map(len, self.rows)))
        in_flight = config.in_flight or (32 if device.type == "cpu" else 256)
        self.piece = math.ceil(most / math.ceil(most / in_flight))  # near-equal pieces of at most `in_flight` images

    def load(self, rows: Tensor) -> Tensor:  # [B] -> [B, C, H, W]
        return self.prepare(self.images[rows.to(self.images.device)].to(self.device))

    def draw(self, count: int, generator: torch.Generator) -> list[Tensor]:
        """Numbers of up to `count` random images of each class, without repetition."""
        return [rows[torch.randperm(len(rows), generator=generator)[:count]] for rows in self.rows]

    def pieces(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [piece, C, H, W] and weights [piece] that make the mean over `rows`.

        All of one shape, so that nothing is compiled twice: a short piece is filled up with images of weight 0.
        """
        for part in rows.split(self.piece):
            filled = torch.cat([part, part[:1].expand(self.piece - len(part))])
            weights = torch.zeros(self.piece, dtype=self.dtype)
            weights[: len(part)] = 1 / len(rows)
            yield self.load(filled), weights.to(self.device)


# --- end shared block ---


# --- begin shared block: state (a test keeps its copies equal) ---
@dataclass
class State:
    """Where a run stands after `step` iterations; `tensors()` is all that is needed to continue it bit for bit."""

    images: Tensor  # [M, C, H, W] in network-input space, on the device
    velocity: Tensor  # [M, C, H, W], momentum buffer of the images
    generator: Tensor  # state of the generator, uint8
    step: int = 0
    loss: Tensor | float = math.nan  # D per class, mean over the outer steps of the last iteration

    def tensors(self) -> dict[str, Tensor]:
        images, velocity = self.images.cpu(), self.velocity.cpu()
        if not images.isfinite().all():
            raise FloatingPointError(
                f"the images are not finite after iteration {self.step}; the last good state is kept; try a smaller lr"
            )
        return {
            "images": images, "velocity": velocity, "generator": self.generator, "step": torch.tensor(self.step),
        }  # fmt: skip

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> State:
        return cls(tensors["images"], tensors["velocity"], tensors["generator"], int(tensors["step"]))

    @classmethod
    def start(cls, real: Real, config: Config, generator: torch.Generator) -> State:
        if config.init == "real":
            images = real.load(torch.cat(real.draw(config.ipc, generator)))
        else:
            shape = (real.classes * config.ipc, *real.shape)
            images = torch.randn(shape, generator=generator).to(real.device, real.dtype)
        return cls(images, torch.zeros_like(images), generator.get_state())

    def move(self, gradient: Tensor, config: Config) -> None:
        """SGD with momentum on the images."""
        self.velocity = config.momentum * self.velocity + gradient
        self.images = self.images - config.lr * self.velocity

    def check(self, config: Config) -> None:
        if not math.isfinite(self.loss):
            raise FloatingPointError(
                f"the matching loss is {float(self.loss)} at iteration {self.step} (lr={config.lr}, "
                f"network_lr={config.network_lr}); the last good state is kept; try a smaller lr or precision=fp32"
            )


# --- end shared block ---


def image_gradient(
    network: Network, real: Real, images: Tensor, config: Config, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """L = sum over classes of D, and dL/dX: images [K*I, C, H, W] -> scalar, [K*I, C, H, W].

    Images of one class meet those of no other, so gradients are exact class by class (`memory`).
    """
    chosen = real.draw(config.batch_real, generator)
    x = images.unflatten(0, (real.classes, -1))  # [K, I, C, H, W]
    losses, gradients = [], []
    for classes in torch.arange(real.classes).split(real.classes if config.memory == "all" else 1):
        each = [network.real_gradient(real.pieces(chosen[k]), int(k)) for k in classes]
        targets = {n: torch.stack([g[n] for g in each]) for n in network.matched}
        gradient, loss = network.synthetic_gradient(x[classes], classes, targets)
        gradients.append(gradient)
        losses.append(loss)
    return torch.cat(losses).sum(), torch.cat(gradients).flatten(0, 1)


def train(
    network: Network, images: Tensor, labels: Tensor, epochs: int, config: Config, generator: torch.Generator
) -> None:
    """Train the network on the synthetic set: plain SGD, shuffled, the short last batch kept."""
    network.freeze(False)
    optimizer = torch.optim.SGD(network.theta.values(), config.network_lr)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for rows in order.split(config.batch_train):
            network.step(optimizer, images[rows], labels[rows])


def distill(
    images: Tensor,
    labels: Tensor,
    config: Config,
    *,
    make_network: Callable[[torch.Generator], nn.Module],
    prepare: Callable[[Tensor], Tensor] | None = None,
    augment: None = None,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    state: State | None = None,
    on_step: Callable[[State], None] | None = None,
) -> dict[str, Tensor]:
    """The whole method on images [N, C, H, W] and labels int64 [N] (0..K-1).

    make_network(generator) is a fresh random network on the CPU; prepare(batch) maps images to its input (None: they
    are already).  Returns images float32 [K*I, C, H, W] in that input space and labels int64 [K*I], by class.
    `state` continues an earlier run, `on_step` sees the state after each iteration.  Raises FloatingPointError when the
    loss is not finite (looked at every ten iterations).
    """
    if augment is not None:
        raise ValueError(f"augment={augment!r}: DC has no augmentation, pass None; with one it is DSA (dsa.py)")
    device = torch.device(device)
    real = Real(images, labels, config, prepare, device)
    network = Network(make_network, config, device)
    state = state or State.start(real, config, generator)
    state.images, state.velocity = state.images.to(device), state.velocity.to(device)
    generator.set_state(state.generator)
    synthetic_labels = torch.arange(real.classes).repeat_interleave(config.ipc)
    outer, inner = config.loops
    while state.step < config.iterations:
        network.renew(make_network(generator))
        losses = []
        for turn in range(outer):
            if network.norms:
                network.measure(real.load(torch.cat(real.draw(16, generator))))
            loss, gradient = image_gradient(network, real, state.images, config, generator)
            state.move(gradient, config)
            losses.append(loss)
            if turn + 1 < outer:
                train(network, state.images, synthetic_labels.to(device), inner, config, generator)
        state.step, state.loss = state.step + 1, torch.stack(losses).mean() / real.classes
        state.generator = generator.get_state()
        if state.step % 10 == 0 or state.step == config.iterations:
            state.check(config)
        if on_step:
            on_step(state)
    return {"images": state.images.cpu(), "labels": synthetic_labels}


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from common import cli, script

    sys.exit(
        cli.guard(
            lambda a: script.run_matching(
                a, "dc", Config, PUBLISHED, State.restore, distill, recipe="dc-2021", augmented=False
            ),
            sys.argv[1:],
        )
    )
