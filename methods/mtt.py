"""MTT and its successors: synthetic images that lead a student along the parameter trajectory of experts.

MTT   Cazenavette et al., Dataset Distillation by Matching Training Trajectories, CVPR 2022 (arXiv 2203.11932)
FTD   Du et al., Minimizing the Accumulated Trajectory Error, CVPR 2023 (arXiv 2211.11004): flat experts, mean images
DATM  Guo et al., Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching, ICLR 2024
      (arXiv 2310.05773): a moving window of start epochs, learned soft labels, images that the experts get right
ATT   Liu et al., Dataset Distillation by Automatic Training Trajectories, ECCV 2024 (arXiv 2407.14245): the student's
      own number of steps
TESLA Cui et al., Scaling Up Dataset Distillation to ImageNet-1K with Constant Memory, ICML 2023 (arXiv 2211.10586)

    python methods/mtt.py dataset=cifar10 ipc=10 data=~/data           # experts, distilled set, student accuracy
    python methods/mtt.py dataset=cifar10 ipc=10 method=datm

Experts are trained on the real data and leave a snapshot of all parameters after each epoch.  An iteration takes an
expert's snapshot t as theta_0 and its snapshot t + M as theta*, trains a student on the synthetic set for N steps with
the learned step size alpha, and compares where both arrive:

    theta_{i+1} = theta_i - alpha g_i,  g_i = grad_theta CE(net(A(X_i); theta_i), y_i)
    loss = |theta_N - theta*|^2 / |theta_0 - theta*|^2

X, alpha (and in DATM the label logits Y) follow the gradient of that loss through all N steps, here at the memory of
one step.  With lambda_N = d loss / d theta_N the chain rule reads, from the last step to the first (`exact_gradient`):

    s_i = <lambda_{i+1}, g_i>;  dX_i -= alpha ds_i/dX_i;  dY_i alike;  dalpha -= s_i
    lambda_i = lambda_{i+1} - alpha ds_i/dtheta_i

Where this departs from the official code, and why:
  gradient        the code keeps the graphs of all N steps; the recursion gives the same numbers    -> `gradient`
  TESLA           leaves out the last line above, so only the last step's images get their true gradient; its released
                  code also halves it by a slip, ours does not                                      -> `gradient=tesla`
  ATT             the running minimum of the code starts at 10000, ours at infinity                 -> `select=nearest`
  iterations      the code runs one more than asked for
  step size       the code lets alpha turn negative and the run end in NaN; here that stops         -> `min_student_lr`
  published rows  ambiguous ones say so beside the table
  selection       papers print the best evaluation on the test set; here the last iterate is the result
Copied alone, as a module, it needs torch; the command line is this repository's.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap

__all__ = [
    "METHODS", "PUBLISHED", "PUBLISHED_ATT", "PUBLISHED_DATM", "PUBLISHED_FTD", "TABLES", "Config", "ExpertConfig",
    "ExpertState", "State", "Student", "distill", "train_experts",
]  # fmt: skip


def _option(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


def _check(config) -> None:
    for f in fields(config):
        value, low, allowed = getattr(config, f.name), f.metadata.get("minimum"), f.metadata.get("choices")
        if allowed and value not in allowed:
            raise ValueError(f"{f.name}={value!r} is unknown; allowed: {', '.join(allowed)}")
        if low is not None and not value >= low:
            raise ValueError(f"{f.name}={value!r} is too small; the least is {low}")


PRECISIONS = ("fp32", "mixed", "bf16")


@dataclass(frozen=True)
class Config:
    """One distillation; the defaults are MTT on CIFAR-10 at 10 images per class.

    The fields from `zca` on say what the trajectories and images that are passed in were made with.
    """

    method: str = _option("mtt", "whose published settings a script starts from", choices=("mtt", "ftd", "att", "datm"))
    ipc: int = _option(10, "synthetic images per class", unit="images", minimum=1)
    iterations: int = _option(5000, "updates of the synthetic set", unit="steps", minimum=1, source="MTT")
    student_steps: int = _option(30, "steps of the student in an iteration: N", unit="steps", minimum=1)
    expert_epochs: int = _option(2, "epochs of the expert that the student is to cover: M", unit="epochs", minimum=1)
    min_start: int = _option(0, "first start epoch: T-", unit="epochs", minimum=0)
    start: int = _option(0, "end of the window at iteration 0: T (read when it grows)", unit="epochs", minimum=0)
    max_start: int = _option(20, "end of the window of start epochs, itself left out: T+", unit="epochs", minimum=1)
    expansion_end: int = _option(0, "iteration at which the window has grown to max_start; 0: full at once",
                                 unit="steps", minimum=0)  # fmt: skip
    batch: int = _option(0, "images of a student step; 0: all", unit="images", minimum=0)
    lr: float = _option(100.0, "step size of the images", minimum=0)
    momentum: float = _option(0.5, "momentum of the images and of the student's step size", minimum=0)
    student_lr: float = _option(0.001, "first step size of the student: alpha_0", minimum=0)
    lr_lr: float = _option(1e-5, "step size of the student's step size", minimum=0)
    min_student_lr: float = _option(0.0, "least alpha; 0: stop when it is not positive (not in any paper)", minimum=0)
    labels: str = _option("hard", "class numbers, or learned logits (DATM)", choices=("hard", "soft"))
    lr_labels: float = _option(2.0, "step size of the label logits", minimum=0, source="DATM")
    label_momentum: float = _option(0.9, "momentum of the label logits", minimum=0, source="DATM")
    threshold: float = _option(0.0, "leave out updates at a loss above this; 0: none", minimum=0, source="DATM")
    init: str = _option("real", "first images: random real ones, noise, or real ones that experts classify correctly",
                        choices=("real", "noise", "correct"))  # fmt: skip
    select: str = _option("last", "compare the student's last step, or the one nearest to theta* in L1 (ATT)",
                          choices=("last", "nearest"))  # fmt: skip
    ema: float = _option(0.0, "decay of the averaged images; 0: none", minimum=0, source="FTD, ATT")
    gradient: str = _option("exact", "exact at the memory of one step, unrolled graph, or TESLA's approximation",
                            choices=("exact", "unrolled", "tesla"))  # fmt: skip
    keep: int = _option(0, "last steps of the student whose graph is kept for the way back (exact, tesla): a quarter "
                        "less work for them, at the memory of each; mixed has them in fp32", unit="steps",
                       minimum=0)  # fmt: skip
    chunk: int = _option(0, "images in a pass of the network; 0: all of a step (one that couples images wants 0)",
                         unit="images", minimum=0)  # fmt: skip
    precision: str = _option("fp32", "of the network: mixed takes the student's steps in bf16 and what is "
                             "differentiated to the pixels in fp32; bf16 both", choices=PRECISIONS)  # fmt: skip
    compile: bool = _option(False, "compile the network's passes (needs a C++ compiler on a CPU)")
    zca: bool = _option(True, "whiten the real images, for experts, distillation and evaluation (the caller does it)")
    experts: int = _option(100, "experts", minimum=1, source="MTT")
    train_epochs: int = _option(50, "epochs of an expert", unit="epochs", minimum=1, source="MTT")
    expert_batch: int = _option(256, "images of an expert's step", unit="images", minimum=1, source="MTT")
    expert_lr: float = _option(0.01, "step size of an expert", minimum=0, source="MTT")
    rho: float = _option(0.0, "radius of an expert's GSAM ascent; 0: plain SGD", minimum=0, source="FTD: 0.01")
    gap: float = _option(0.3, "weight of GSAM's surrogate gap: a", minimum=0, source="FTD, DATM")

    def __post_init__(self):
        _check(self)
        first = self.start if self.expansion_end else self.max_start
        if not self.min_start < first <= self.max_start:
            raise ValueError(
                f"no start epoch to draw: min_start={self.min_start}, start={self.start}, max_start={self.max_start}; "
                "needs min_start < max_start, with expansion_end also min_start < start <= max_start"
            )
        if self.labels == "soft" and self.init == "noise":
            raise ValueError("labels=soft starts from what experts say of real images; init='noise' allows labels=hard")


@dataclass(frozen=True)
class ExpertConfig:
    """Training of the experts; the defaults are MTT's."""

    experts: int = _option(100, "trajectories", minimum=1)
    epochs: int = _option(50, "epochs, each leaves a snapshot: S", unit="epochs", minimum=1)
    batch: int = _option(256, "images of a step", unit="images", minimum=1)
    lr: float = _option(0.01, "step size, constant; no momentum, no weight decay", minimum=0)
    rho: float = _option(0.0, "radius of the GSAM ascent; 0: plain SGD", minimum=0)
    gap: float = _option(0.3, "weight of GSAM's surrogate gap: a", minimum=0)
    precision: str = _option("fp32", "of the network; mixed and bf16 are the same here", choices=PRECISIONS)
    compile: bool = _option(False, "compile the gradient (needs a C++ compiler on a CPU)")

    def __post_init__(self):
        _check(self)

    @classmethod
    def of(cls, config: Config) -> ExpertConfig:
        """The experts that a distillation asks for."""
        return cls(
            experts=config.experts, epochs=config.train_epochs, batch=config.expert_batch, lr=config.expert_lr,
            rho=config.rho, gap=config.gap, precision=config.precision, compile=config.compile,
        )  # fmt: skip


# ---------------------------------------------------------------- published settings

# What each method sets on every data set, then one table a method, by (data set, ipc).
METHODS: dict[str, dict] = {
    "mtt": {"method": "mtt"},
    "ftd": {"method": "ftd", "rho": 0.01, "gap": 1.0},
    "att": {"method": "att", "select": "nearest", "expert_batch": 512},  # 512: default of its released code
    "datm": {
        "method": "datm", "labels": "soft", "init": "correct", "threshold": 1.0, "iterations": 10_000,
        "student_lr": 0.01, "rho": 0.01, "gap": 0.3, "train_epochs": 100, "zca": True,
    },
}  # fmt: skip


def _table(method: str, columns: str, rows: dict[tuple[str, int], tuple]) -> dict[tuple[str, int], dict]:
    names = columns.split()
    return {key: {**METHODS[method], **dict(zip(names, values, strict=True))} for key, values in rows.items()}


# MTT: the authors' commands, collected by justincui03/dc_benchmark (methods/tm/readme.md).  Ambiguous: the paper prints
# another row for CIFAR-10 at 10, whose pixel rate the author calls a typo; FTD and ATT use max_start 40 for CIFAR-100
# at 10; lr and lr_lr of ImageNet subsets (128 px) differ in four sources.
PUBLISHED = _table("mtt", "student_steps expert_epochs max_start lr lr_lr student_lr batch zca", {
    ("cifar10", 1): (50, 2, 2, 100.0, 1e-7, 0.01, 0, True),
    ("cifar10", 10): (30, 2, 20, 100.0, 1e-5, 0.001, 0, True),
    ("cifar10", 50): (30, 2, 40, 1000.0, 1e-5, 0.001, 0, False),
    ("cifar100", 1): (20, 3, 20, 1000.0, 1e-5, 0.01, 0, True),
    ("cifar100", 10): (20, 2, 20, 1000.0, 1e-5, 0.01, 0, False),
    ("cifar100", 50): (80, 2, 40, 1000.0, 1e-5, 0.01, 125, True),
    ("tiny-imagenet", 1): (10, 2, 10, 10_000.0, 1e-4, 0.01, 0, False),
    ("tiny-imagenet", 10): (20, 2, 40, 10_000.0, 1e-4, 0.01, 200, False),
    ("tiny-imagenet", 50): (20, 2, 40, 10_000.0, 1e-4, 0.01, 300, False),
    ("imagenette", 1): (20, 2, 10, 10_000.0, 1e-6, 0.01, 0, False),
    ("imagenette", 10): (20, 2, 10, 10_000.0, 1e-6, 0.01, 20, False),
    ("imagewoof", 1): (20, 2, 10, 10_000.0, 1e-6, 0.01, 0, False),
    ("imagewoof", 10): (20, 2, 10, 10_000.0, 1e-6, 0.01, 20, False),
})  # fmt: skip

# FTD: docs/parameters.png of AngusDujw/FTD-distillation; zca is not in it and taken from MTT's row.  It evaluates the
# averaged images on a network already trained on the raw ones: start anew and expect a little less.
PUBLISHED_FTD = _table("ftd", "student_steps expert_epochs max_start batch lr lr_lr student_lr gap ema zca", {
    ("cifar10", 1): (50, 2, 2, 0, 100.0, 1e-7, 0.01, 0.3, 0.9999, True),
    ("cifar10", 10): (30, 2, 20, 0, 100.0, 1e-5, 0.001, 0.3, 0.9995, True),
    ("cifar10", 50): (30, 2, 40, 0, 1000.0, 1e-5, 0.01, 1.0, 0.999, False),
    ("cifar100", 1): (40, 3, 20, 0, 1000.0, 1e-5, 0.01, 1.0, 0.9995, True),
    ("cifar100", 10): (20, 2, 40, 0, 1000.0, 1e-5, 0.01, 1.0, 0.9995, False),
    ("cifar100", 50): (80, 2, 40, 1000, 1000.0, 1e-5, 0.01, 1.0, 0.999, True),
    ("tiny-imagenet", 1): (30, 2, 10, 0, 10_000.0, 1e-4, 0.01, 1.0, 0.999, False),
    ("tiny-imagenet", 10): (20, 2, 40, 500, 10_000.0, 1e-4, 0.01, 1.0, 0.999, False),
})  # fmt: skip

# ATT: figures/table.png of NiaLiu/ATT.  Ambiguous: CIFAR-10 at 50 has 30 steps in a README command; Tiny-ImageNet at 10
# has lr_lr 1e-6 and student_lr 1e-3 there.
PUBLISHED_ATT = _table("att", "student_steps expert_epochs max_start lr lr_lr student_lr zca ema iterations batch", {
    ("cifar10", 1): (80, 4, 2, 100.0, 1e-7, 0.01, True, 0.9999, 6_000, 0),
    ("cifar10", 10): (30, 2, 20, 10_000.0, 1e-4, 0.01, True, 0.9999, 60_000, 0),
    ("cifar10", 50): (50, 2, 40, 100.0, 1e-5, 0.001, False, 0.999, 1_000_000, 0),
    ("cifar100", 1): (50, 4, 20, 500.0, 1e-5, 0.01, True, 0.9995, 3_000, 0),
    ("cifar100", 10): (20, 2, 40, 1000.0, 1e-5, 0.01, False, 0.9995, 200_000, 0),
    ("cifar100", 50): (80, 2, 40, 1000.0, 1e-5, 0.01, True, 0.999, 100_000, 1200),
    ("tiny-imagenet", 1): (30, 2, 10, 10_000.0, 1e-4, 0.01, False, 0.999, 10_000, 0),
    ("tiny-imagenet", 10): (20, 2, 40, 10_000.0, 1e-5, 1e-4, False, 0.999, 80_000, 0),
    ("imagenette", 1): (20, 2, 10, 10_000.0, 5e-8, 0.01, False, 0.9999, 10_000, 0),
    ("imagenette", 10): (20, 2, 10, 10_000.0, 1e-4, 0.01, False, 0.999, 100_000, 0),
    ("imagewoof", 1): (20, 2, 10, 10_000.0, 5e-8, 0.01, False, 0.9999, 10_000, 0),
    ("imagewoof", 10): (20, 2, 10, 10_000.0, 1e-4, 0.01, False, 0.999, 100_000, 0),
})  # fmt: skip

# DATM: configs/ of NUS-HPC-AI-Lab/DATM after the correction of April 2024.  Ambiguous: the author prefers the paper's
# table where the two differ; earlier configs of CIFAR-100 held zca both true and false.
PUBLISHED_DATM = _table(
    "datm",
    "student_steps expert_epochs min_start start max_start expansion_end batch lr lr_labels lr_lr threshold init",
    {
        ("cifar10", 1): (80, 2, 0, 0, 4, 0, 0, 100.0, 5.0, 1e-7, 1.1, "correct"),
        ("cifar10", 10): (80, 2, 0, 10, 20, 1000, 0, 100.0, 2.0, 1e-5, 1.0, "correct"),
        ("cifar10", 50): (80, 2, 0, 20, 40, 2000, 0, 1000.0, 2.0, 1e-5, 1.0, "correct"),
        ("cifar10", 500): (40, 2, 40, 0, 60, 0, 1000, 50.0, 10.0, 1e-5, 1.0, "correct"),
        ("cifar10", 1000): (100, 2, 40, 0, 60, 0, 1000, 50.0, 10.0, 1e-5, 1.0, "correct"),
        ("cifar100", 1): (40, 3, 0, 10, 20, 1000, 0, 1000.0, 10.0, 1e-5, 1.0, "correct"),
        ("cifar100", 10): (80, 2, 0, 30, 50, 2000, 0, 1000.0, 10.0, 1e-5, 1.0, "correct"),
        ("cifar100", 50): (80, 2, 20, 0, 70, 0, 1000, 1000.0, 10.0, 1e-5, 1.0, "real"),
        ("cifar100", 100): (80, 2, 30, 0, 70, 0, 1000, 50.0, 10.0, 1e-5, 1.0, "correct"),
        ("tiny-imagenet", 1): (40, 2, 0, 15, 20, 2000, 0, 10_000.0, 10.0, 1e-4, 1.0, "correct"),
        ("tiny-imagenet", 10): (40, 2, 10, 0, 50, 0, 500, 100.0, 10.0, 1e-4, 1.0, "correct"),
        ("tiny-imagenet", 50): (20, 2, 40, 0, 70, 0, 1000, 100.0, 10.0, 1e-4, 1.0, "correct"),
    },
)  # fmt: skip

TABLES = {"mtt": PUBLISHED, "ftd": PUBLISHED_FTD, "att": PUBLISHED_ATT, "datm": PUBLISHED_DATM}


# ---------------------------------------------------------------- a network as a function of its parameters


def flatten(net: nn.Module) -> Tensor:
    """All parameters in the order of registration, as trajectories hold them: [P]."""
    return torch.cat([p.detach().flatten() for p in net.parameters()])


class Student:
    """A network as a function of one parameter vector theta [P]; BatchNorm layers use the statistics of their batch.

    low: bf16 for a gradient, and for one that is differentiated again.  chunk: images in a pass, 0 for all.
    """

    def __init__(
        self, net: nn.Module, device: torch.device | str, *, low: tuple[bool, bool] = (False, False), chunk: int = 0,
        compile: bool = False,
    ):  # fmt: skip
        self.net = replace_all_batch_norm_modules_(net).to(device).train().requires_grad_(False)
        self.names, parameters = zip(*self.net.named_parameters(), strict=True)
        self.shapes, self.sizes = [p.shape for p in parameters], [p.numel() for p in parameters]
        self.low, self.chunk = low, chunk
        self._gradient = torch.compile(self._composed, dynamic=False) if compile else self._taped

    def logits(self, theta: Tensor, x: Tensor, low: bool = False) -> Tensor:
        parts = zip(self.names, theta.split(self.sizes), self.shapes, strict=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low, cache_enabled=False):
            out = functional_call(self.net, {name: part.view(shape) for name, part, shape in parts}, (x,))
        return out.to(theta.dtype)

    def loss(self, theta: Tensor, x: Tensor, y: Tensor, low: bool) -> Tensor:
        """Mean cross-entropy with class numbers y [B] or label logits y [B, K]; theta [G, P]: sum over G networks."""
        if theta.dim() == 2:
            return vmap(partial(self.loss, low=low))(theta, x, y).sum()
        return F.cross_entropy(self.logits(theta, x, low), y.softmax(1) if y.is_floating_point() else y)

    def _taped(self, theta: Tensor, x: Tensor, y: Tensor, low: bool) -> Tensor:
        again = theta.requires_grad  # the gradient is to be differentiated
        theta = theta if again else theta.detach().requires_grad_()
        return torch.autograd.grad(self.loss(theta, x, y, low), theta, create_graph=again)[0]

    def _composed(self, theta: Tensor, x: Tensor, y: Tensor, low: bool) -> Tensor:
        """The same as a composition of functions: it compiles, but keeps twice the memory where it does not."""
        if x.dim() == 4:  # the faster layout of convolutions once everything between them is fused
            x = x.contiguous(memory_format=torch.channels_last)
        return grad(partial(self.loss, low=low))(theta, x, y)

    def parts(self, *tensors: Tensor) -> Iterator[tuple]:
        """(weight in the mean, rows of each tensor) of every pass."""
        total = len(tensors[0])
        for pieces in zip(*(t.split(self.chunk or total) for t in tensors), strict=True):
            yield len(pieces[0]) / total, *pieces

    @torch.no_grad()
    def predict(self, theta: Tensor, x: Tensor) -> Tensor:
        """Logits [B, K], without a graph."""
        return torch.cat([self.logits(theta, part) for _, part in self.parts(x)])

    def gradient(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """g = grad_theta of the mean loss, like theta; differentiable where theta requires a gradient.

        theta [G, P] with x [G, B, C, H, W] and y [G, B]: G networks, in one pass.
        """
        low = self.low[theta.requires_grad]
        if theta.dim() == 2:
            return self._gradient(theta, x, y, low)
        return sum(weight * self._gradient(theta, *rows, low) for weight, *rows in self.parts(x, y))

    def tapes(self, theta: Tensor, x: Tensor, y: Tensor) -> Iterator[Tape]:
        """The graph of g, pass by pass."""
        theta = theta.detach().clone().requires_grad_()  # a copy: the path it comes from is still being written
        for weight, *rows in self.parts(x, y):
            rows = [r.detach().requires_grad_(r.is_floating_point()) for r in rows]
            leaves = [theta, *(r for r in rows if r.requires_grad)]
            yield Tape(weight * self._gradient(theta, *rows, self.low[1]), leaves)


class Tape(NamedTuple):
    """One pass's part of g [P] with its graph, and what it hangs on: theta [P], x [B, C, H, W], label logits [B, K]."""

    g: Tensor
    leaves: list[Tensor]


def second_order(tapes: Iterable[Tape], direction: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """s = <direction, g> and its derivatives by theta, x and (None for class numbers) label logits."""
    s, by_theta, by_rows = 0.0, 0.0, []
    for g, leaves in tapes:
        part = g @ direction
        d_theta, *d_rows = torch.autograd.grad(part, leaves)
        s, by_theta = s + part.detach(), by_theta + d_theta
        by_rows.append(d_rows)
    by_x, *by_y = (torch.cat(d) for d in zip(*by_rows, strict=True))
    return s, by_theta, by_x, by_y[0] if by_y else None


# ---------------------------------------------------------------- the gradient of one iteration


class Match(NamedTuple):
    """What one iteration matches: a piece of an expert's trajectory, and the student's batches on the way."""

    start: Tensor  # theta_0 [P], snapshot t
    goal: Tensor  # theta* [P], snapshot t + M
    batches: list[tuple[Tensor, Any]]  # rows int64 [B] and augmentation (or None) of each step

    @property
    def distance(self) -> Tensor:
        return (self.start - self.goal).square().sum()


class Gradient(NamedTuple):
    """The loss and its derivatives, the student's path [N+1, P] and which step of it was compared."""

    loss: Tensor
    images: Tensor
    labels: Tensor | None  # None where they are class numbers
    lr: Tensor
    path: Tensor
    last: int


def seen(images: Tensor, draw: Any, augment: Callable | None) -> Tensor:
    """A(X): what the network sees of the images."""
    return images if augment is None else augment(images, draw)


def nearest(path: Tensor, goal: Tensor) -> int:
    """ATT: the step j >= 1 of path [N+1, P] nearest to theta* in the L1 norm, the later one of a tie."""
    distances = (path[1:] - goal).abs().sum(1)
    return len(distances) - int(distances.flip(0).argmin())


def exact_gradient(
    student: Student, match: Match, images: Tensor, labels: Tensor, lr: Tensor, augment, select: str = "last",
    *, keep: int = 0, frozen: bool = False,
) -> Gradient:  # fmt: skip
    """The recursion of the docstring: walk forwards, then backwards one step at a time.

    images [M, C, H, W], labels int64 [M] or logits [M, K], lr scalar.  keep: last steps whose graph the way back takes
    from the walk and need not make again.  frozen: TESLA, which keeps lambda as it starts.
    """
    steps, kept = len(match.batches), {}
    path = match.start.new_empty(steps + 1, len(match.start))
    path[0] = match.start
    for i, (rows, draw) in enumerate(match.batches):
        given = path[i], seen(images[rows], draw, augment), labels[rows]
        if i < steps - keep:
            g = student.gradient(*given)
        else:
            kept[i] = list(student.tapes(*given))
            g = sum(tape.g.detach() for tape in kept[i])
        path[i + 1] = path[i] - lr * g

    last = nearest(path, match.goal) if select == "nearest" else steps
    gap = path[last] - match.goal
    direction = 2 * gap / match.distance  # lambda_N
    by_images, by_lr = torch.zeros_like(images), torch.zeros_like(lr)
    by_labels = torch.zeros_like(labels) if labels.is_floating_point() else None
    for i in reversed(range(last)):
        rows, draw = match.batches[i]
        pixels = images[rows].requires_grad_()
        view = seen(pixels, draw, augment)
        tapes = kept.pop(i, None) or student.tapes(path[i], view, labels[rows])
        s, by_theta, by_view, by_y = second_order(tapes, direction)
        by_images[rows] -= lr * torch.autograd.grad(view, pixels, by_view)[0]
        if by_labels is not None:
            by_labels[rows] -= lr * by_y
        by_lr -= s
        if not frozen:
            direction = direction - lr * by_theta
    return Gradient(gap.square().sum() / match.distance, by_images, by_labels, by_lr, path, last)


def unrolled_gradient(
    student: Student, match: Match, images: Tensor, labels: Tensor, lr: Tensor, augment, select: str = "last"
) -> Gradient:
    """The same through the graph of all steps, as the papers' code has it; memory grows with N."""
    leaves = [t.detach().requires_grad_() for t in (images, lr, labels) if t.is_floating_point()]
    images, lr, labels = (*leaves, labels)[:3]
    thetas = [match.start.detach().requires_grad_()]
    for rows, draw in match.batches:
        g = student.gradient(thetas[-1], seen(images[rows], draw, augment), labels[rows])
        thetas.append(thetas[-1] - lr * g)
    path = torch.stack([theta.detach() for theta in thetas])
    last = nearest(path, match.goal) if select == "nearest" else len(match.batches)
    loss = (thetas[last] - match.goal).square().sum() / match.distance
    by_images, by_lr, *by_labels = torch.autograd.grad(loss, leaves)
    return Gradient(loss.detach(), by_images, by_labels[0] if by_labels else None, by_lr, path, last)


def gradient_of(config: Config) -> Callable[..., Gradient]:
    """The function for `gradient`, with `select` and `keep` filled in."""
    if config.gradient == "unrolled":
        return partial(unrolled_gradient, select=config.select)
    return partial(exact_gradient, select=config.select, keep=config.keep, frozen=config.gradient == "tesla")


# ---------------------------------------------------------------- experts


def take(images: Tensor, rows: Tensor, prepare: Callable[[Tensor], Tensor] | None, device) -> Tensor:
    """Real images by number, as network input on the device."""
    if prepare is None and not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; pass network input as floats, or prepare= that makes it")
    chosen = images[rows.to(images.device)].to(device)
    return chosen if prepare is None else prepare(chosen)


def draws(*path: int) -> torch.Generator:
    """A CPU generator that depends on nothing but `path`: (seed, expert, epoch, step)."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(path).encode()).digest()[:7], "big"))


def expert_step(student: Student, theta: Tensor, x: Tensor, y: Tensor, config: ExpertConfig) -> Tensor:
    """One step of each expert, theta [P] or [G, P]: SGD, or adaptive GSAM around it (Zhuang et al. 2022).

    g at theta; ascent e = rho theta^2 g / | |theta| g |; g' at theta + e; the step goes along g' - a (part of g
    perpendicular to g').
    """
    g = student.gradient(theta, x, y)
    if not config.rho:
        return theta - config.lr * g
    norm = (theta.abs() * g).norm(dim=-1, keepdim=True)
    ascended = student.gradient(theta + config.rho * theta.square() * g / (norm + 1e-12), x, y)
    share = (g * ascended).sum(-1, keepdim=True) / (ascended.square().sum(-1, keepdim=True) + 1e-24)
    return theta - config.lr * (ascended - config.gap * (g - share * ascended))


@dataclass
class ExpertState:
    """Where the training of the experts stands; `tensors()` is all that is needed to continue it bit for bit."""

    trajectories: Tensor  # [E, S+1, P] on the CPU; what is still to come is not filled
    seed: int
    first: int = 0  # experts that are finished
    epoch: int = 0  # of those in training
    batch: int = 0  # steps they did in this epoch
    theta: Tensor | None = None  # [G, P], those in training

    @property
    def step(self) -> int:
        """Finished epochs, those of all experts together."""
        training = 0 if self.theta is None else len(self.theta)
        return self.first * (self.trajectories.shape[1] - 1) + training * self.epoch

    def tensors(self) -> dict[str, Tensor]:
        out = {
            "finished": self.trajectories[: self.first],
            "shape": torch.tensor(self.trajectories.shape),
            "at": torch.tensor([self.seed, self.first, self.epoch, self.batch]),
        }
        if self.theta is None:
            return out
        self.check()
        group = self.trajectories[self.first : self.first + len(self.theta)]
        return out | {"begun": group[:, : self.epoch + 1], "theta": self.theta.cpu()}

    def check(self) -> None:
        if not self.theta.isfinite().all():
            raise FloatingPointError(
                f"an expert is not finite in epoch {self.epoch}, step {self.batch}; the last good state is kept; try a "
                "smaller lr or rho"
            )

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> ExpertState:
        seed, first, epoch, batch = tensors["at"].tolist()
        finished = tensors["finished"]
        trajectories = finished.new_empty(tensors["shape"].tolist())
        trajectories[:first] = finished
        if "theta" in tensors:
            trajectories[first : first + len(tensors["theta"]), : epoch + 1] = tensors["begun"]
        return cls(trajectories, seed, first, epoch, batch, tensors.get("theta"))


def train_experts(
    images: Tensor, labels: Tensor, config: ExpertConfig, *, make_network: Callable[[torch.Generator], nn.Module],
    prepare: Callable[[Tensor], Tensor] | None = None, augment: Any = None, generator: torch.Generator,
    device: torch.device | str = "cpu", only: range | None = None, side_by_side: int = 1,
    state: ExpertState | None = None, on_step: Callable[[ExpertState], None] | None = None,
) -> Tensor:  # fmt: skip
    """Train experts on real images [N, C, H, W], labels int64 [N] -> trajectories [E, S+1, P] on the CPU.

    Snapshot 0 is the fresh network, snapshot s the parameters after epoch s.  only: the numbers of the experts to
    train, all of config.experts by default; side_by_side: experts trained together with stacked parameters; what an
    expert draws depends on neither.  The whole result is held in memory: for 100 experts of a ConvNet-3 and 50 epochs
    6.5 GB.  on_step sees the state after each step.
    """
    if side_by_side < 1:
        raise ValueError(f"side_by_side={side_by_side} is too small; the least is 1")
    numbers = range(config.experts) if only is None else only
    seed = int(torch.randint(2**62, (), generator=generator)) if state is None else state.seed
    template = make_network(draws(seed, 0))
    if state is None:
        start = flatten(template)
        state = ExpertState(start.new_empty(len(numbers), config.epochs + 1, len(start)), seed)
    student = Student(template, device, low=(config.precision != "fp32",) * 2, compile=config.compile)
    labels = labels.to(device)
    while state.first < len(numbers):
        if state.theta is None:
            group = numbers[state.first : state.first + side_by_side]
            state.theta = torch.stack([flatten(make_network(draws(seed, e))) for e in group])
            state.trajectories[state.first : state.first + len(group), 0] = state.theta
        group = numbers[state.first : state.first + len(state.theta)]
        while state.epoch < config.epochs:
            _expert_epoch(student, images, labels, config, state, group, prepare, augment, device, on_step)
        state.first, state.epoch, state.theta = state.first + len(group), 0, None
    return state.trajectories


def _expert_epoch(
    student: Student, images: Tensor, labels: Tensor, config: ExpertConfig, state: ExpertState, group: range,
    prepare, augment, device, on_step,
) -> None:  # fmt: skip
    orders = torch.stack([torch.randperm(len(images), generator=draws(state.seed, e, state.epoch)) for e in group])
    batches = orders.split(config.batch, 1)  # [G, B] each
    theta = state.theta.to(device)
    for batch in range(state.batch, len(batches)):
        rows = batches[batch]
        x = take(images, rows.flatten(), prepare, device).unflatten(0, rows.shape)  # [G, B, C, H, W]
        if augment is not None:
            places = [draws(state.seed, e, state.epoch, batch) for e in group]
            x = torch.stack([
                augment(one, augment.draw(len(one), place, siamese=False)) for one, place in zip(x, places, strict=True)
            ])  # fmt: skip
        y = labels[rows.to(device)]
        if len(group) == 1:
            theta = expert_step(student, theta[0], x[0], y[0], config)[None]
        else:
            theta = expert_step(student, theta, x, y, config)
        state.theta, state.batch = theta, batch + 1
        if state.batch == len(batches):
            state.check()
            state.trajectories[state.first : state.first + len(group), state.epoch + 1] = theta.cpu()
            state.epoch, state.batch = state.epoch + 1, 0
        if on_step:
            on_step(state)


# ---------------------------------------------------------------- where the synthetic set starts


def random_rows(labels: Tensor, ipc: int, classes: int, generator: torch.Generator) -> Tensor:
    """Numbers of `ipc` random images of each class, int64 [M], by class."""
    rows = [(labels == k).nonzero().flatten() for k in range(classes)]
    return torch.cat([r[torch.randperm(len(r), generator=generator)[:ipc]] for r in rows])


def correct_rows(
    labels: Tensor, ipc: int, classes: int, predict: Callable[[int, Tensor], Tensor], experts: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """DATM: of each class in random order the first `ipc` images that expert 0 classifies correctly, int64 [M].

    predict(expert, rows) -> logits.  Where expert 0 knows too little of a class, the next one goes on with the rest.
    """
    chosen = []
    for k in range(classes):
        order = (labels == k).nonzero().flatten()
        order, found = order[torch.randperm(len(order), generator=generator)], order[:0]
        for expert in range(experts):
            for rows in order[~torch.isin(order, found)].split(256):
                found = torch.cat([found, rows[predict(expert, rows).argmax(1).cpu() == k]])
                if len(found) >= ipc:
                    break
            if len(found) >= ipc:
                break
        if len(found) < ipc:
            raise ValueError(
                f"the {experts} experts classify {len(found)} of {len(order)} images of class {k} correctly, ipc={ipc} "
                "asks for more; allowed: init=real, a smaller ipc, or experts trained for longer"
            )
        chosen.append(found[:ipc])
    return torch.cat(chosen)


def label_logits(student: Student, trajectories: Sequence[Tensor], images: Tensor, hard: Tensor, init: str) -> Tensor:
    """DATM: first label logits [M, K] of images [M, C, H, W].

    init "correct": the mean logits of the experts that classify the image correctly; "real": those of expert 0.
    """
    last = [t[-1] for t in (trajectories if init == "correct" else trajectories[:1])]
    total = count = 0.0
    for theta in last:
        out = torch.cat([student.predict(theta.to(images.device), x) for x in images.split(256)])
        right = (out.argmax(1) == hard)[:, None] | (init != "correct")
        weight = torch.where(right, 1.0, 1e-9).to(out)  # not 0: rounding may leave an image without an expert
        total, count = total + weight * out, count + weight
    return total / count


# ---------------------------------------------------------------- distillation


@dataclass
class State:
    """Where a distillation stands; `tensors()` is all that is needed to continue it bit for bit."""

    images: Tensor  # [M, C, H, W], network input
    images_velocity: Tensor
    lr: Tensor  # alpha, scalar
    lr_velocity: Tensor
    labels: Tensor | None  # logits [M, K]; None: class numbers
    labels_velocity: Tensor | None
    ema: Tensor | None  # averaged images
    experts: Tensor  # int64, still to come in this round
    generator: Tensor  # its state, uint8
    step: int = 0  # finished iterations
    skipped: int = 0  # of them, those above the threshold
    loss: float = math.nan

    def tensors(self) -> dict[str, Tensor]:
        held = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return {name: t.detach().cpu() for name, t in held.items()} | {"at": torch.tensor([self.step, self.skipped])}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> State:
        optional = {"labels": None, "labels_velocity": None, "ema": None}
        step, skipped = tensors["at"].tolist()
        return cls(**optional | {k: t for k, t in tensors.items() if k != "at"}, step=step, skipped=skipped)

    def to(self, device: torch.device | str) -> State:
        for name in ("images", "images_velocity", "lr", "lr_velocity", "labels", "labels_velocity", "ema"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).to(device))
        return self

    def update(self, gradient: Gradient, config: Config) -> None:
        """SGD with momentum on images, alpha and label logits; nothing moves where the loss is above the threshold."""
        self.loss = float(gradient.loss)
        if config.threshold and not self.loss <= config.threshold:  # a loss that is not finite is left out, too
            self.skipped += 1
            return
        self.images_velocity = config.momentum * self.images_velocity + gradient.images
        self.images = self.images - config.lr * self.images_velocity
        self.lr_velocity = config.momentum * self.lr_velocity + gradient.lr
        self.lr = self.lr - config.lr_lr * self.lr_velocity
        if config.min_student_lr:
            self.lr = self.lr.clamp(min=config.min_student_lr)
        if self.labels is not None:
            self.labels_velocity = config.label_momentum * self.labels_velocity + gradient.labels
            self.labels = self.labels - config.lr_labels * self.labels_velocity
        if self.ema is not None:
            self.ema = config.ema * self.ema + (1 - config.ema) * self.images

    def check(self, config: Config) -> None:
        """FloatingPointError where the run cannot go on."""
        facts = f"at iteration {self.step} (lr={config.lr}, lr_lr={config.lr_lr}, student lr {float(self.lr):.3g})"
        bad = not math.isfinite(self.loss) and not config.threshold
        if bad or not (self.images.isfinite().all() and self.lr.isfinite()):
            raise FloatingPointError(
                f"the trajectory loss is {self.loss} or the images are not finite {facts}; the last good state is "
                "kept; try a smaller lr or lr_lr"
            )
        if self.lr <= 0:
            raise FloatingPointError(
                f"the student's step size is not positive {facts}; the last good state is kept; try a smaller lr_lr or "
                "lr, or min_student_lr=1e-4"
            )


def start(
    images: Tensor, labels: Tensor, trajectories: Sequence[Tensor], config: Config, student: Student, prepare, device,
    generator: torch.Generator,
) -> State:  # fmt: skip
    """The synthetic set before the first iteration."""
    classes = int(labels.max()) + 1
    labels = labels.cpu()
    if config.init == "correct":
        last = lambda expert: trajectories[expert][-1].to(device)  # noqa: E731
        predict = lambda expert, rows: student.predict(last(expert), take(images, rows, prepare, device))  # noqa: E731
        rows = correct_rows(labels, config.ipc, classes, predict, len(trajectories), generator)
    else:
        rows = random_rows(labels, config.ipc, classes, generator)
    x = take(images, rows, prepare, device).clone(memory_format=torch.contiguous_format)
    if config.init == "noise":
        x = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device)
    y = None
    if config.labels == "soft":
        y = label_logits(student, trajectories, x, labels[rows].to(device), config.init)
    lr = torch.tensor(config.student_lr, dtype=trajectories[0].dtype, device=device)
    return State(
        x, torch.zeros_like(x), lr, torch.zeros_like(lr), y, None if y is None else torch.zeros_like(y),
        x if config.ema else None, torch.empty(0, dtype=torch.int64), generator.get_state(),
    )  # fmt: skip


def window(config: Config, iteration: int) -> tuple[int, int]:
    """The start epochs of an iteration: the first, and the one behind the last."""
    if not config.expansion_end:
        return config.min_start, config.max_start
    grown = int((config.max_start - config.start) * iteration / config.expansion_end)
    return config.min_start, min(config.max_start, config.start + grown)


def draw_match(
    state: State, trajectories: Sequence[Tensor], config: Config, augment, device, generator: torch.Generator
) -> Match:
    """The next expert (in random order, each once a round), a start epoch, and the student's batches.

    A random order of all synthetic images is cut into batches that are taken from its end; then comes the next order.
    """
    if not len(state.experts):
        state.experts = torch.randperm(len(trajectories), generator=generator)
    expert, state.experts = int(state.experts[0]), state.experts[1:]
    t = int(torch.randint(*window(config, state.step), (), generator=generator))
    total, batches, left = len(state.images), [], []
    for _ in range(config.student_steps):
        left = left or list(torch.randperm(total, generator=generator).split(config.batch or total))
        rows = left.pop()
        draw = None if augment is None else augment.draw(len(rows), generator, siamese=False)
        batches.append((rows.to(device), draw))
    trajectory = trajectories[expert]
    return Match(trajectory[t].to(device), trajectory[t + config.expert_epochs].to(device), batches)


def _check_inputs(labels: Tensor, trajectories: Sequence[Tensor], config: Config) -> None:
    counts = torch.bincount(labels.cpu())
    if int(counts.min()) < config.ipc:
        raise ValueError(f"ipc={config.ipc} is more than the {int(counts.min())} real images of the smallest class")
    needed = config.max_start + config.expert_epochs
    if not len(trajectories):
        raise ValueError("trajectories are empty; train_experts makes them")
    shortest = min(len(t) for t in trajectories)
    if shortest < needed:
        raise ValueError(
            f"max_start={config.max_start} with expert_epochs={config.expert_epochs} reads {needed} snapshots, the "
            f"shortest trajectory has {shortest}; allowed: max_start up to {shortest - config.expert_epochs}"
        )


def distill(
    images: Tensor, labels: Tensor, trajectories: Sequence[Tensor], config: Config, *,
    make_network: Callable[[torch.Generator], nn.Module], prepare: Callable[[Tensor], Tensor] | None = None,
    augment: Any = None, generator: torch.Generator, device: torch.device | str = "cpu", state: State | None = None,
    on_step: Callable[[State], None] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Distil real images [N, C, H, W], labels int64 [N] along expert trajectories, each [S+1, P].

    make_network: the network of the experts.  augment: `draw(rows, generator, siamese=False)` and `(images, draw)`.
    Returns images [M, C, H, W] (network input), labels int64 [M], lr scalar; soft_labels [M, K] (logits) and
    ema_images where asked for.  FloatingPointError when the loss, the images or alpha leave the usable range.
    """
    _check_inputs(labels, trajectories, config)
    low = config.precision != "fp32", config.precision == "bf16"
    student = Student(make_network(generator), device, low=low, chunk=config.chunk, compile=config.compile)
    if trajectories[0].shape[1] != sum(student.sizes):
        raise ValueError(
            f"the trajectories have {trajectories[0].shape[1]} parameters, the network {sum(student.sizes)}; "
            "make_network must make the experts' network"
        )
    if state is None:
        state = start(images, labels, trajectories, config, student, prepare, device, generator)
    state, gradient = state.to(device), gradient_of(config)
    generator.set_state(state.generator)
    hard = torch.arange(int(labels.max()) + 1).repeat_interleave(config.ipc)
    classes = hard.to(device)
    while state.step < config.iterations:
        match = draw_match(state, trajectories, config, augment, device, generator)
        y = classes if state.labels is None else state.labels
        state.update(gradient(student, match, state.images, y, state.lr, augment), config)
        state.check(config)
        state.step, state.generator = state.step + 1, generator.get_state()
        if on_step:
            on_step(state)
    if state.skipped:
        share = f"{state.skipped} of {state.step} updates were left out"
        warnings.warn(f"{share}: their loss was above threshold={config.threshold}", stacklevel=2)
    out = {"images": state.images, "lr": state.lr, "soft_labels": state.labels, "ema_images": state.ema}
    return {"labels": hard} | {name: t.detach().cpu() for name, t in out.items() if t is not None}


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from common import cli, script

    def main(argv: list[str]) -> None:
        given = dict(a.split("=", 1) for a in argv if "=" in a)
        method = given.get("method") if given.get("method") in METHODS else "mtt"  # a wrong name is refused below
        rows = {(given.get("dataset", "digits"), None): METHODS[method], **TABLES[method]}
        script.run_matching(
            argv, "mtt", Config, rows, State.restore, distill, recipe="datm-2024" if method == "datm" else "mtt-2022",
            experts=(ExpertConfig, train_experts, ExpertState.restore),
        )  # fmt: skip

    sys.exit(cli.guard(main, sys.argv[1:]))
