"""CAD-Prune and CA2D: real images chosen by how they are learned within the student's own budget, and crops of them.

Rethinking Dataset Distillation: Hard Truths about Soft Labels, CVPR 2026 (arXiv 2604.18811); there is no official code.

    python methods/cad.py dataset=cifar10 ipc=50 data=~/data                 # CAD-Prune: chosen set, student accuracy
    python methods/cad.py dataset=cifar10 ipc=50 data=~/data method=ca2d     # CA2D: a teacher as well

A scoring network is trained on all N images for as long as a student will be on the chosen I images of each of C
classes: E epochs of I C images are K epochs of N,

    K = E I C / N                    (in the shapes below K are the classes and C the channels, as in all files here)

with a whole learning-rate schedule in them (the beginning of a longer one is worse: Table 11; full_epochs=90).  After
each epoch k the network theta^k says how well it knows the label of each image, S(y|x, theta^k), on clean images in
eval mode.  What is being learned right now moves most:

    U_k(x) = sqrt( 1/(J-1) sum_{j<J} (S(y|x, theta^{k+j}) - mean_j S(y|x, theta^{k+j}))^2 )          (Eq. 1)
    CAD(x) = 1/W sum_{k=K-J-W}^{K-J-1} U_k(x)                                                         (Eq. 2)

CAD-Prune keeps the I images of each class with the highest CAD.  CA2D takes a pool of them, cuts random crops, keeps of
each image the crop that a trained teacher recognises best, and puts the best of these together, factor x factor an
image, as RDED does: easy parts of images that are worth learning.

What the paper leaves open, and what we take:
  S              true class probability, or EL2N |p - y|, as reimplementations have it    -> probability; score=el2n
  last snapshot  Eq. 2 as it stands ends at theta^{K-2}, counted from 0                   -> as it stands; include_last
  J and W        6 and 2, said of ImageNet-1K                -> W = 2; J = 6 on its subsets too, K - W on small sets
  small K        K = 1.56 at IPC 10 has no window, yet the paper has results              -> 8 snapshots within the run
  scoring run    network, recipe and seeds are not said    -> the students' network, one seed; the recipe of hard labels
                                                              in Table 1, see PUBLISHED and `augmentation`
  pool of CA2D   not said                                                                 -> RDED's 300, more if needed
On small sets this recipe is the students' own (DSA, no Nesterov, batch 256).  On ImageNet and its subsets it has random
resized crops and flips, batch 128 at every IPC (students: 50, 128 and 200 at IPC 10, 50 and 100; fewer on subsets)
and Nesterov's momentum (students: without).  The script's own students train by hard-truths-hard, with DSA, always.
Copied alone, as a module, it needs torch; the command line is this repository's.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "PUBLISHED", "Config", "State", "Synthesis", "check", "distill", "dynamic_score", "prune", "schedule", "score",
    "scoring_epochs", "synthesise",
]  # fmt: skip


def _option(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


@dataclass(frozen=True)
class Config:
    """One selection; the defaults are those of CIFAR and Tiny-ImageNet (supplement, table 1, hard labels)."""

    method: str = _option("cad", "cad: whole images; ca2d: crops of them", choices=("cad", "ca2d"))
    ipc: int = _option(10, "images per class: I", unit="images", minimum=1)
    student_epochs: int = _option(300, "epochs of the student whose budget is matched: E", unit="epochs", minimum=1,
                                  source="table 1")  # fmt: skip
    score: str = _option("prob", "S: probability of the true class, or |p - y|", choices=("prob", "el2n"))
    window: int = _option(0, "snapshots in a window: J; 0: as many as there are, less windows", unit="snapshots",
                          minimum=0)  # fmt: skip
    windows: int = _option(2, "windows that are averaged: W", minimum=1, source="main text")
    include_last: bool = _option(False, "windows end with the last snapshot, not before it")
    whole_epochs: int = _option(5, "least K for a snapshot an epoch; below, `snapshots` in the run", unit="epochs",
                                minimum=1)  # fmt: skip
    snapshots: int = _option(8, "snapshots where K is smaller than that", minimum=2)
    # The scoring run.
    lr: float = _option(0.01, "first learning rate of the scoring run", minimum=0, source="table 1")
    schedule: str = _option("step", "a tenth after 151/300 of the run, or a cosine to 0", choices=("step", "cosine"),
                            source="table 1")  # fmt: skip
    full_epochs: int = _option(0, "epochs of the longer run whose beginning is scored; 0: a run of its own",
                               unit="epochs", minimum=0, source="table 11")  # fmt: skip
    batch: int = _option(256, "images of a step", unit="images", minimum=1, source="table 1")
    momentum: float = _option(0.9, "momentum of SGD", minimum=0, source="DC-Bench")
    nesterov: bool = _option(False, "Nesterov's momentum")
    weight_decay: float = _option(5e-4, "weight decay, on all parameters", minimum=0, source="DC-Bench")
    precision: str = _option("fp32", "arithmetic of the networks", choices=("bf16", "fp32"))
    # CA2D.
    factor: int = _option(0, "tiles along each side of an image; 0: 1 below 128 px, else 2", unit="tiles", minimum=0)
    crops: int = _option(5, "random crops of each image that are looked at", unit="crops", minimum=1, source="RDED")
    crop: float = _option(0.08, "smallest area share of a crop", minimum=0, source="RDED")
    pool: int = _option(300, "images looked at per class; at least one a tile, at most the class", unit="images",
                        minimum=1, source="RDED")  # fmt: skip

    def __post_init__(self):
        for f in fields(self):
            value, low, allowed = getattr(self, f.name), f.metadata.get("minimum"), f.metadata.get("choices")
            if allowed and value not in allowed:
                raise ValueError(f"{f.name}={value!r} is unknown; allowed: {', '.join(allowed)}")
            if low is not None and not value >= low:
                raise ValueError(f"{f.name}={value!r} is too small; the least is {low}")
        if self.window == 1:
            raise ValueError("window=1 has no deviation; allowed: 0 (auto) or at least 2")
        if self.crop > 1:
            raise ValueError(f"crop={self.crop} is a share of the image; allowed: 0 to 1")


# Settings by (dataset, ipc or None for every ipc) where they are not the defaults.  Source: table 1 of the supplement
# (epochs, rate, schedule, batch) and J = 6 of the main text; momentum and decay are the usual ones.  The paper has no
# ten-class subsets: a set of a few hundred images wants a smaller rate.
_LARGE = {
    "student_epochs": 200, "lr": 0.5, "schedule": "cosine", "batch": 128, "nesterov": True, "weight_decay": 1e-4,
    "window": 6, "whole_epochs": 8,
}  # fmt: skip
PUBLISHED: dict[tuple[str, int | None], dict] = {
    ("cifar10", None): {},
    ("cifar100", None): {},
    ("tiny-imagenet", None): {},
    ("imagenet-1k", None): _LARGE,
    ("imagenette", None): {**_LARGE, "lr": 0.1},
    ("imagewoof", None): {**_LARGE, "lr": 0.1},
}


def augmentation(dataset: str) -> str:
    """What `score` is to be given, by name: DSA on small sets, random resized crops and flips on ImageNet's."""
    return "rrc-flip" if dataset in ("imagenet-1k", "imagenette", "imagewoof") else "dsa"


# ---------------------------------------------------------------- how long, and when to look


def scoring_epochs(student_epochs: int, ipc: int, classes: int, count: int) -> float:
    """K: epochs over all `count` images that see as many images as the student's epochs over ipc a class."""
    return student_epochs * ipc * classes / count


def schedule(config: Config, classes: int, count: int) -> tuple[list[int], int, int, int]:
    """Steps after which a snapshot is taken, J, W and the number of steps of the scoring run.

    K rounded to whole epochs with a snapshot after each, where that is at least `whole_epochs`; else K N / batch steps
    with `snapshots` at equal distances, at most one a step.  ValueError where this leaves no run or no window.
    """
    exact = scoring_epochs(config.student_epochs, config.ipc, classes, count)
    epochs, per_epoch = _whole_epochs(config, classes, count), math.ceil(count / config.batch)
    total = epochs * per_epoch or round(exact * count / config.batch)
    if total == 0:
        raise ValueError(
            f"student_epochs={config.student_epochs} with ipc={config.ipc} are {exact:.3g} epochs of {count} images, "
            f"no step of batch={config.batch}; pass more student_epochs or a smaller batch"
        )
    looks = epochs or min(config.snapshots, total)
    window = config.window or max(2, looks - config.windows)
    _first(looks, window, config.windows, config.include_last)
    return [round(total * (i + 1) / looks) for i in range(looks)], window, config.windows, total


def _whole_epochs(config: Config, classes: int, count: int) -> int:
    """K in whole epochs, 0 where the run is too short for a snapshot an epoch."""
    epochs = round(scoring_epochs(config.student_epochs, config.ipc, classes, count))
    return epochs if epochs >= config.whole_epochs else 0


def drop_step(config: Config, classes: int, count: int) -> int:
    """The step at which schedule="step" drops: epoch 151 of 300, scaled; after a whole epoch where there are any."""
    *_, total = schedule(config, classes, count)
    epochs = _whole_epochs(config, classes, count)
    if config.full_epochs:
        epochs, total = config.full_epochs, whole_steps(config, classes, count)
    return round(epochs * 151 / 300) * (total // epochs) if epochs else round(total * 151 / 300)


def whole_steps(config: Config, classes: int, count: int) -> int:
    """Steps of the whole learning-rate schedule: those of the run, unless it is the beginning of a longer one."""
    *_, total = schedule(config, classes, count)
    whole = config.full_epochs * math.ceil(count / config.batch) or total
    if whole < total:
        raise ValueError(f"full_epochs={config.full_epochs} are {whole} steps, shorter than the run of {total} steps")
    return whole


def learning_rate(config: Config, step: int, whole: int, drop: int) -> float:
    """Learning rate of a step, counted from 0, in a schedule of so many."""
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * step / whole))
    return config.lr * (0.1 if step >= drop else 1.0)


# ---------------------------------------------------------------- the scoring run


@dataclass
class State:
    """Where a scoring run stands; `tensors()` is all that is needed to continue it bit for bit."""

    weights: dict[str, Tensor]  # parameters and buffers of the network, by name
    velocity: dict[str, Tensor]  # of its parameters
    order: Tensor  # int64 [N], of the epoch it is in
    p_true: Tensor  # float32 [S, N]; those of later snapshots are still zero
    el2n: Tensor  # float32 [S, N]
    generator: Tensor  # its state, uint8
    step: int = 0  # finished steps
    loss: Tensor | float = math.nan  # of the last of them

    def tensors(self) -> dict[str, Tensor]:
        self.check()
        named = {f"weights/{name}": v for name, v in self.weights.items()}
        named |= {f"velocity/{name}": v for name, v in self.velocity.items()}
        named |= {"order": self.order, "p_true": self.p_true, "el2n": self.el2n, "generator": self.generator}
        # Copies: the run goes on in the same memory.
        return {name: v.detach().cpu().clone() for name, v in named.items()} | {"at": torch.tensor(self.step)}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> State:
        weights, velocity = (
            {name.removeprefix(part): v for name, v in tensors.items() if name.startswith(part)}
            for part in ("weights/", "velocity/")
        )
        rest = (tensors[name] for name in ("order", "p_true", "el2n", "generator"))
        return cls(weights, velocity, *rest, int(tensors["at"]))

    def check(self) -> None:
        if not all(v.isfinite().all() for v in self.weights.values()):
            raise FloatingPointError(
                f"the scoring network is not finite after step {self.step} (loss {float(self.loss):.4g}); the last "
                "good state is kept; try a smaller lr or precision=fp32"
            )


class _Network:
    """A network on its device, and how it is moved down its loss."""

    def __init__(self, net: nn.Module, labels: Tensor, config: Config, prepare, device: torch.device):
        # Convolutions are faster in channels_last, but the library's GroupNorm is not.
        slow = any(type(m) is nn.GroupNorm for m in net.modules())
        self.layout = torch.contiguous_format if slow else torch.channels_last
        self.net = net.to(device, memory_format=self.layout)
        self.labels, self.prepare, self.config, self.device = labels.to(device), prepare, config, device
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay,
            nesterov=config.nesterov, fused=True,
        )  # fmt: skip

    def adopt(self, state: State) -> None:
        """Continue from a state, whose tensors are the network's own from now on."""
        self.net.load_state_dict(state.weights)
        for name, p in self.net.named_parameters():
            # The fused optimiser wants the parameter's memory order.
            velocity = torch.empty_like(p, requires_grad=False).copy_(state.velocity[name])
            self.optimizer.state[p]["momentum_buffer"] = state.velocity[name] = velocity
        state.weights = self.net.state_dict()

    def logits(self, x: Tensor, see: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """Images [B, C, H, W] as they are read -> [B, K], float32 at least."""
        x = see(x if self.prepare is None else self.prepare(x)).contiguous(memory_format=self.layout)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            out = self.net(x)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def learn(
        self, x: Tensor, rows: Tensor, see: Callable[[Tensor], Tensor], lr: float, generator: torch.Generator
    ) -> Tensor:
        """One step on the images of these rows; their mean loss before it."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.net.train()
        with seeded(self.device, generator):
            loss = F.cross_entropy(self.logits(x, see), self.labels[rows.to(self.device)])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def scores(self, pieces: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """p_y and |p - y| of every image as it is, in eval mode: two of float32 [N], on the CPU; 0 of one not read."""
        self.net.eval()
        chosen, p_true, el2n = [], [], []
        for x, rows in pieces:
            p, y = self.logits(x).softmax(1), self.labels[rows.to(self.device), None]
            chosen.append(rows)
            p_true.append(p.gather(1, y)[:, 0])
            el2n.append(p.scatter_add(1, y, -torch.ones_like(p)).norm(dim=1))
        found = torch.zeros(2, len(self.labels))
        found[:, torch.cat(chosen)] = torch.stack([torch.cat(p_true), torch.cat(el2n)]).float().cpu()
        return found[0], found[1]


# --- begin shared block: reader (a test keeps its copies equal) ---
def reader(images: Tensor | Callable, device: torch.device) -> Callable:
    """read(rows, batch, epoch): the images of these rows on the device, a batch at a time, with the rows they are of.

    Images that do not fit into memory come from a function of the same arguments instead: it yields pixels and rows
    int64 [B], in epoch None as they are, else the augmented views of that epoch, and may leave out what is unreadable.
    """

    def held(rows: Tensor, batch: int, epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        return ((images[part.to(images.device)], part) for part in rows.split(batch))

    source = images if callable(images) else held
    return lambda rows, batch, epoch: ((x.to(device), part) for x, part in source(rows, batch, epoch))


# --- end shared block ---


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


def score(
    images: Tensor | Callable,
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
    every: bool = True,
) -> dict[str, Tensor]:
    """The compute-matched run on images [N, C, H, W] and labels int64 [N] -> {"p_true", "el2n"}: float32 [S, N] each.

    make_network(generator): a fresh network on the CPU.  prepare: images, moved to the device -> network input; None:
    they are floats already.  augment: `draw(rows, generator, siamese=False)` and `augment(images, draw)`, or None.
    Where they do not fit into memory, `images` is a function that reads them (see `reader`), and augments them itself;
    every=False leaves zeros in place of the snapshots that `dynamic_score` will not read.  `state` continues an earlier
    run, `on_step` sees the state after each step.  Raises FloatingPointError when the weights are not finite (looked at
    every 50 steps and at each snapshot).
    """
    if prepare is None and not callable(images) and not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; pass network input as floats, or prepare= that makes it")
    count, labels = len(labels), labels.cpu()
    classes, per_epoch = int(labels.max()) + 1, math.ceil(count / config.batch)
    looks, window, windows, total = schedule(config, classes, count)
    first = 0 if every else _first(len(looks), window, windows, config.include_last)
    wanted = range(len(looks) if every else first + window + windows - 1)[first:]
    drop, whole = drop_step(config, classes, count), whole_steps(config, classes, count)
    run = _Network(make_network(generator), labels, config, prepare, torch.device(device))
    read = reader(images, run.device)
    if state is None:
        weights, still = run.net.state_dict(), {n: torch.zeros_like(p) for n, p in run.net.named_parameters()}
        empty = torch.zeros(2, len(looks), count)
        state = State(weights, still, torch.arange(count), *empty, generator.get_state())
    run.adopt(state)
    generator.set_state(state.generator)

    while state.step < total:
        epoch, done = divmod(state.step, per_epoch)
        if done == 0:
            state.order = torch.randperm(count, generator=generator)
        left, before = state.order[done * config.batch : (done + total - state.step) * config.batch], state.step
        for x, rows in read(left, config.batch, epoch):
            if state.step == drop and config.schedule == "step":  # students get a new optimiser here, without velocity
                for velocity in state.velocity.values():
                    velocity.zero_()
            draw = None if augment is None else augment.draw(len(rows), generator, siamese=False)
            see = lambda x, draw=draw: x if draw is None else augment(x, draw)  # noqa: E731
            state.loss = run.learn(x, rows, see, learning_rate(config, state.step, whole, drop), generator)
            state.step, state.generator = state.step + 1, generator.get_state()
            if state.step % 50 == 0 or state.step in looks:
                state.check()
            if state.step in looks and (number := looks.index(state.step)) in wanted:
                scores = run.scores(read(torch.arange(count), config.batch, None))
                state.p_true[number], state.el2n[number] = scores
            if on_step:
                on_step(state)
        if state.step == before:
            raise ValueError(f"none of the {len(left)} images left of epoch {epoch} could be read")
    return {"p_true": state.p_true, "el2n": state.el2n}


# ---------------------------------------------------------------- CAD-Prune


def dynamic_score(trajectory: Tensor, window: int, windows: int, include_last: bool = False) -> Tensor:
    """CAD (Eqs 1 and 2) of S at every snapshot, [S, N] -> float32 [N]."""
    first = _first(len(trajectory), window, windows, include_last)
    kept = trajectory[first : first + window + windows - 1].double()  # U_k is small beside S
    return kept.unfold(0, window, 1).std(-1).mean(0).float()  # [W, N, J] -> [W, N] -> [N]


def _first(snapshots: int, window: int, windows: int, include_last: bool) -> int:
    """The first snapshot that CAD looks at; ValueError where there are too few, or no deviation."""
    first = snapshots - window - windows + include_last
    if window < 2 or first < 0:
        raise ValueError(
            f"{snapshots} snapshots are too few for windows={windows} of window={window}; a window holds at least 2 "
            f"and window + windows may be {snapshots + include_last} at most"
        )
    return first


def prune(scores: Tensor, labels: Tensor, ipc: int) -> Tensor:
    """The ipc images of each class with the highest scores [N], highest first, ties by index: int64 [K*I].

    A class of fewer images gives all, with a warning.
    """
    if len(scores) != len(labels):
        raise ValueError(f"{len(scores)} scores and {len(labels)} labels; needs as many of both")
    counts = labels.bincount()
    if small := (counts < ipc).nonzero().flatten().tolist():
        warnings.warn(f"ipc={ipc}: classes {small} have fewer images and are kept whole", stacklevel=2)
    return torch.cat([ranked(scores, labels, k)[:ipc] for k in range(len(counts))])


def ranked(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """The images of class k, highest score first, ties by index: int64 [n]; ValueError for scores that rank nothing."""
    rows = (labels == k).nonzero().flatten()
    if not scores[rows].isfinite().all():
        raise ValueError(f"the scores of class {k} have a NaN or an infinity: the scoring run went astray")
    return rows[scores[rows].argsort(descending=True, stable=True)]


# ---------------------------------------------------------------- CA2D


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


@torch.no_grad()
def best_crops(
    teacher: nn.Module,
    images: Tensor,
    sizes: Tensor,
    label: int,
    config: Config,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Of each image the crop x with the lowest loss -log softmax(T(pad(x)))_label, and of these the lowest I f f.

    images uint8 [n, C, H, W]; sizes int64 [n, 2], height and width of each on its canvas -> patches float32
    [I f f, C, p, p] in 0..255 with p = size // f, lowest loss first, and their losses [I f f]; on the CPU.  pad() adds
    a border of the mean colour up to the size the teacher knows.
    """
    device, patch = next(teacher.parameters()).device, size // config.factor
    teacher = teacher.eval().to(memory_format=torch.channels_last)
    mean_, std_ = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
    edge = (size - patch) // 2, size - patch - (size - patch) // 2
    boxes = random_boxes(sizes.repeat_interleave(config.crops, 0), generator, (config.crop, 1.0), (1.0, 1.0))
    patches, losses = [], []
    for rows in torch.arange(len(images)).split(max(1, config.batch // config.crops)):
        pixels = images[rows].to(device).repeat_interleave(config.crops, 0)
        own = boxes.unflatten(0, (-1, config.crops))[rows].flatten(0, 1)
        cut = crop_resize(pixels, own, torch.zeros(len(own), dtype=torch.bool), patch)  # [n crops, C, p, p]
        x = F.pad((cut / 255 - mean_) / std_, edge * 2).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = teacher(x)
        lowest, best = (-logits.float().log_softmax(1)[:, label]).view(len(rows), -1).min(1)
        patches.append(cut.unflatten(0, (len(rows), -1))[torch.arange(len(rows)), best.cpu()].cpu())
        losses.append(lowest.cpu())
    loss = torch.cat(losses)
    if not loss.isfinite().all():
        raise FloatingPointError(
            f"losses of class {label} are not finite; look at the teacher's weights, or try precision=fp32"
        )
    order = loss.argsort(stable=True)[: config.ipc * config.factor**2]
    return torch.cat(patches)[order], loss[order]


def resolved(config: Config, size: int) -> Config:
    """The same settings with what depends on the size decided: 0 tiles a side become 1 below 128 px, else 2, and the
    pool holds an image a tile at least."""
    factor = config.factor or (1 if size < 128 else 2)
    return replace(config, factor=factor, pool=max(config.pool, config.ipc * factor**2))


@dataclass
class Synthesis:
    """Where CA2D's images stand; classes are finished one by one."""

    images: Tensor  # uint8 [K*I, C, S, S]; those of later classes are still zero
    generator: Tensor  # state of the generator, uint8
    number: int = 0  # classes done

    def tensors(self) -> dict[str, Tensor]:
        return {"images": self.images, "generator": self.generator, "at": torch.tensor([self.number])}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> Synthesis:
        return cls(tensors["images"], tensors["generator"], int(tensors["at"]))


def synthesise(
    teacher: nn.Module,
    images: Tensor | Callable[[Tensor], tuple[Tensor, Tensor]],
    labels: Tensor,
    scores: Tensor,
    config: Config,
    *,
    size: int | None = None,
    sizes: Tensor | None = None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    generator: torch.Generator,
    state: Synthesis | None = None,
    on_step: Callable[[Synthesis], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Images made of the best crops of the highest-scored images of each class.

    images uint8 [N, C, H, W], labels int64 [N], scores [N]; size: side of what is made, H by default; sizes: int64
    [N, 2], height and width where the images lie on a canvas.  Where they do not fit into memory, `images` is a
    function that reads those of some rows, int64 [n] -> (images, sizes), and `size` is given.  `state` continues an
    earlier run, `on_step` sees the state after every class.  Returns images uint8 [K*I, C, size, size], truncated, and
    labels int64 [K*I].
    """
    labels = labels.cpu()
    if callable(images):
        read, dtype = images, torch.uint8
    else:
        size, dtype = size or images.shape[2], images.dtype
        sizes = torch.tensor(images.shape[2:]).expand(len(images), 2) if sizes is None else sizes.cpu()
        read = lambda rows: (images[rows.to(images.device)], sizes[rows])  # noqa: E731
    config, classes = resolved(config, size), int(labels.max()) + 1
    _check_crops(config, teacher, dtype, labels, size)
    if state is not None:
        generator.set_state(state.generator)
    for k in range(state.number if state else 0, classes):
        rows = ranked(scores, labels, k)[: config.pool]
        patches, _ = best_crops(
            teacher, *read(rows), k, config, size=size, mean=mean, std=std, generator=generator
        )
        # 1e-3: weights that add up to a little less than 1 must not cost an even area a level.
        made = (stitch(patches, config.factor, size) + 1e-3).to(torch.uint8)
        if state is None:
            state = Synthesis(made.new_zeros(classes * len(made), *made.shape[1:]), generator.get_state())
        state.images[k * len(made) : (k + 1) * len(made)] = made
        state.number, state.generator = k + 1, generator.get_state()
        if on_step:
            on_step(state)
    return state.images, torch.arange(classes).repeat_interleave(config.ipc)


# ---------------------------------------------------------------- both


def check(
    config: Config, images: Tensor | Callable, labels: Tensor, teacher: nn.Module | None = None, *, size: int = 0
) -> None:
    """ValueError that names what cannot work, before any work.  The teacher need not be trained yet; size: of what
    is made, H by default."""
    if not callable(images) and (len(images) != len(labels) or not len(images)):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; needs as many of both, and at least one")
    counts = labels.cpu().bincount()
    if not counts.all():
        raise ValueError(f"class {int(counts.argmin())} has 0 images; number the classes from 0 without a gap")
    if config.ipc > counts.max():
        raise ValueError(f"ipc={config.ipc}: no class has so many images, the largest has {int(counts.max())}")
    whole_steps(config, len(counts), len(labels))
    if config.method != "ca2d":
        return
    if teacher is None:
        raise ValueError("method=ca2d scores crops with a trained teacher; pass teacher=, or method=cad")
    size, dtype = (size, torch.uint8) if callable(images) else (size or images.shape[2], images.dtype)
    _check_crops(resolved(config, size), teacher, dtype, labels, size)


def _check_crops(config: Config, teacher: nn.Module, dtype: torch.dtype, labels: Tensor, size: int) -> None:
    """ValueError for what crops cannot be made of; the config is a resolved one."""
    counts = labels.cpu().bincount()
    few, needed = int(counts.min()), config.ipc * config.factor**2
    if few < needed:
        raise ValueError(
            f"ipc={config.ipc} with factor={config.factor} takes {needed} crops of each class, one an image; class "
            f"{int(counts.argmin())} has {few} images; pass a smaller ipc or factor"
        )
    if dtype != torch.uint8:
        raise ValueError(f"images are {dtype}; crops are cut from pixels, pass them as torch.uint8")
    if size < config.factor:
        raise ValueError(f"factor={config.factor} tiles do not fit a side of {size} px; pass a smaller factor")
    linear = [m for m in teacher.modules() if isinstance(m, nn.Linear)]
    if linear and (known := linear[-1].out_features) < len(counts):
        raise ValueError(f"the teacher tells {known} classes apart, the images have {len(counts)}: it lacks some")


def distill(
    images: Tensor,
    labels: Tensor,
    config: Config,
    *,
    make_network: Callable[[torch.Generator], nn.Module],
    teacher: nn.Module | None = None,
    prepare: Callable[[Tensor], Tensor] | None = None,
    augment: Any = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    state: State | None = None,
    on_step: Callable[[State], None] | None = None,
) -> dict[str, Tensor]:
    """The whole method on images [N, C, H, W] and labels int64 [N] (0..K-1), sorted by class.

    CAD-Prune returns images as they were passed [K*I, C, H, W], labels [K*I], indices int64 [K*I] and scores float32
    [N]; CA2D, which takes uint8 images, a teacher and its mean and std, float images in [0, 1], labels and scores.  The
    other arguments are those of `score`; a run that is continued after its last step only chooses and cuts again.
    """
    check(config, images, labels, teacher)
    if config.method == "ca2d" and (mean is None or std is None):
        raise ValueError("method=ca2d needs mean= and std=, those the teacher was trained with")
    found = score(
        images, labels, config, make_network=make_network, prepare=prepare, augment=augment, generator=generator,
        device=device, state=state, on_step=on_step,
    )  # fmt: skip
    _, window, windows, _ = schedule(config, int(labels.max()) + 1, len(labels))
    scores = dynamic_score(found["p_true" if config.score == "prob" else "el2n"], window, windows, config.include_last)
    if config.method == "ca2d":
        made, of = synthesise(teacher, images, labels, scores, config, mean=mean, std=std, generator=generator)
        return {"images": made / 255, "labels": of, "scores": scores}
    indices = prune(scores, labels.cpu(), config.ipc)
    return {
        "images": images[indices.to(images.device)].cpu(), "labels": labels.cpu()[indices], "indices": indices,
        "scores": scores,
    }  # fmt: skip


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from common import cli, script_selection

    sys.exit(cli.guard(lambda a: script_selection.run_cad(a, sys.modules[__name__]), sys.argv[1:]))
