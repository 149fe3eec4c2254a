"""Students of the matching papers: networks trained from scratch on a distilled set, by named protocols.

    found = train_students(
        images, labels, test_images, test_labels, make_network=make, protocol="dm-2023", seeds=range(5), prepare=prepare
    )
    print(found.accuracies)

Every draw is a pure function of (seed, epoch, batch), so a killed run continues bit for bit (on a CPU), and a student
is the same alone or beside others.  Several train side by side with stacked parameters: SGD and Adam are elementwise,
so one optimiser on the stack does what one for each would do.  Accuracy is that after the last pass; nothing is chosen
on the test set.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from common.augment import DiffAugment, rng, seeded
from common.hardware import autocast
from common.protocols import PROTOCOLS, Protocol
from common.store import Checkpoint

__all__ = ["Students", "train_students"]


@dataclass(frozen=True)
class Students:
    """What came of the students, in the order of their seeds."""

    accuracies: list[float] = field(default_factory=list)  # percent of the test images, after the last pass
    best: list[float] = field(default_factory=list)  # best at any look; only with looks, and only as a side column
    curves: list[list[float]] = field(default_factory=list)  # accuracy at each look; only with looks
    losses: list[float] = field(default_factory=list)  # mean over the last pass
    seconds: float = 0.0
    networks: list[dict[str, Tensor]] = field(default_factory=list)  # parameters and buffers; only with keep=True


def train_students(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    make_network: Callable[[torch.Generator], nn.Module],
    protocol: str | Protocol,
    seeds: Sequence[int],
    prepare: Callable[[Tensor], Tensor] | None = None,
    augment: Any = None,
    lr: float | None = None,
    soft_labels: Tensor | None = None,
    weights: Tensor | None = None,
    teacher: Callable[[Tensor], Tensor] | None = None,
    mix: Callable[[int, int], Tensor] | None = None,
    keep: bool = False,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    side_by_side: int = 0,
    looks: int | Sequence[int] = 0,
    compile: bool = False,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[int, int], None] | None = None,
) -> Students:
    """Train one student a seed on images [M, C, H, W] (network input), labels int64 [M], and test it.

    test_images: [N, C, H, W], through `prepare` (on the device) to network input; None: they are that already.
    augment: in place of the protocol's own strategy (`draw(rows, generator, siamese=False)`, `augment(images, draw)`).
    lr, soft_labels (logits [M, K]), teacher (network input [B, C, H, W] -> logits [B, K]): read where the protocol
    wants them.  weights [M]: of the images in the loss of a batch, sum w l / sum w (CRAIG's coresets); None: all alike.
    mix(seed, epoch): the images [M, C, H, W] of a student's pass, in place of `images`.  keep: return the networks too.
    dtype: bfloat16 is autocast.
    side_by_side: students stacked together; 0: up to ten on a GPU, one on a CPU, where grouped convolutions are slower.
    Networks that vmap cannot take (running statistics, dropout) train one after the other.  looks: also test after
    every so many passes, or after those named, and after the last.  compile: on a CPU it needs a C++ compiler and the
    headers of Python.
    on_epoch(passes done, of how many) after each pass of each group.  Raises FloatingPointError when a loss is not
    finite.
    """
    protocol = _resolve(protocol)
    target = _checked(protocol, images, labels, test_images, test_labels, augment, lr, soft_labels, teacher, seeds)
    if side_by_side < 0 or (looks if isinstance(looks, int) else min(looks, default=1) - 1) < 0:
        raise ValueError(f"side_by_side={side_by_side} and looks={looks} are not allowed: at least 0, passes from 1")
    looks = range(0, protocol.passes, looks) if looks and isinstance(looks, int) else looks or ()
    if protocol.augment and augment is None:
        augment = DiffAugment(protocol.augment)
    device, begun = torch.device(device), time.perf_counter()
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    images, target = images.to(device, wide), target.to(device)
    if weights is not None:
        if weights.shape != labels.shape or not (weights >= 0).all() or not weights.any():
            needs = f"one for each of {len(labels)} images, none below 0, not all of them 0"
            raise ValueError(f"weights {list(weights.shape)}: needs {needs}")
        weights = weights.to(device, wide)
    model = _Model(make_network, images[:2], device, dtype, compile)
    model.check_rest(images, protocol.batch)
    test = _Test(test_images, test_labels, prepare, device, wide)
    rate = lr if protocol.lr is None else protocol.lr

    tensors, meta = (checkpoint and checkpoint.load()) or ({}, {})
    found = Students(**meta.get("found", {}))
    kept = {name: tensors.pop(name) for name in list(tensors) if name.startswith("network")}  # of finished groups
    together = meta.get("together", side_by_side or (10 if device.type == "cuda" else 1))
    together = together if model.stackable else 1
    groups = [tuple(seeds)[i : i + together] for i in range(0, len(seeds), together)]
    before = found.seconds

    def save(tensors: dict[str, Tensor], epoch: int, curves: list[list[float]]) -> None:
        so_far = asdict(replace(found, seconds=before + time.perf_counter() - begun, networks=[]))
        facts = {"found": so_far, "together": together, "epoch": epoch, "curves": curves}
        checkpoint.save({**tensors, **kept}, facts)

    for number, seeds_ in enumerate(groups):
        if number * together < len(found.accuracies):
            continue
        group = _Group(model, seeds_, protocol, rate)
        epoch, curves = meta.get("epoch", 0), meta.get("curves") or [[] for _ in seeds_]
        if tensors:
            group.restore(tensors)
        tensors, meta = {}, {}
        while epoch < protocol.passes:
            group.run_pass(images, target, weights, epoch, augment, teacher, mix)
            epoch += 1
            last = epoch == protocol.passes
            due = checkpoint is not None and not last and checkpoint.due(number * protocol.passes + epoch)
            if due or last or epoch % 50 == 0:
                group.check(epoch)
            if looks and (epoch in looks or last):
                for curve, accuracy in zip(curves, test(group), strict=True):
                    curve.append(accuracy)
            if due:
                save(group.tensors(), epoch, curves)
            if on_epoch:
                on_epoch(number * protocol.passes + epoch, len(groups) * protocol.passes)
        found.accuracies.extend(test(group))
        if looks:
            found.curves.extend(curves)
            found.best.extend(map(max, curves))
        found.losses.extend(group.losses.tolist())
        if keep:
            first = number * together
            kept |= {f"network{first + i}/{n}": v for i in range(len(seeds_)) for n, v in group.network(i).items()}
        if checkpoint is not None:
            save({}, 0, [])
    networks: list[dict[str, Tensor]] = [{} for _ in seeds] if keep else []
    for name, value in kept.items():
        which, name = name.split("/", 1)
        networks[int(which.removeprefix("network"))][name] = value
    return replace(found, seconds=before + time.perf_counter() - begun, networks=networks)


# ---------------------------------------------------------------- a group of students


class _Model:
    """A network as a function of the parameters and buffers of one student, or of the stacks of several."""

    def __init__(self, make_network, images: Tensor, device: torch.device, dtype: torch.dtype, compile: bool):
        self.device, self.dtype = device, dtype
        # Faster in channels_last where convolutions are: in bf16 and on a GPU, and where a compiler fuses the norms.
        fast = compile or dtype == torch.bfloat16 or device.type == "cuda"
        self.layout = torch.channels_last if fast else torch.contiguous_format
        self.make = lambda seed: self._placed(make_network(rng(seed, "student")))
        self.net = self.make(0)
        if compile:
            torch.compiler.reset()  # earlier calls fill a table of eight; a ninth form would run in eager mode
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compile else (lambda f: f)
        self._one = wrap(self._call)
        self._each = wrap(vmap(self._call, randomness="error"))
        self._same = wrap(vmap(self._call, in_dims=(0, 0, None), randomness="error"))
        self.stackable = self._stacks(images)

    def _placed(self, net: nn.Module) -> nn.Module:
        wide = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        return net.to(self.device, wide, memory_format=self.layout).train()

    def check_rest(self, images: Tensor, batch: int) -> None:
        """ValueError where the last batch is one image and a BatchNorm layer sees it as one pixel."""
        if len(images) % batch != 1 % batch:
            return
        net = copy.deepcopy(self.net)  # its running statistics move
        try:
            with torch.no_grad(), autocast(self.device, self.dtype):
                net(images[:1].contiguous(memory_format=self.layout))
        except ValueError as error:
            raise ValueError(
                f"{len(images)} images in batches of {batch} leave a last one of a single image, of which a BatchNorm "
                f"layer of the network has no statistics ({error}); pass another batch size or number of images"
            ) from error

    def _call(self, params: dict, buffers: dict, x: Tensor) -> Tensor:
        return functional_call(self.net, (params, buffers), (x,))

    def _stacks(self, images: Tensor) -> bool:
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.net.modules()):
            return False
        try:
            with torch.no_grad():
                stacks = stack_module_state([self.net] * 2)
                vmap(self._call, randomness="error")(*stacks, torch.stack([images] * 2))
        except RuntimeError:
            return False
        return True

    def __call__(self, params: dict, buffers: dict, x: Tensor, students: int) -> Tensor:
        """x [G, B, C, H, W], or [B, C, H, W] shared by all -> float32 or float64 [G, B, K]."""
        with autocast(self.device, self.dtype):
            if students == 1:
                own = x.flatten(0, -4).contiguous(memory_format=self.layout)
                logits = self._one(params, buffers, own)[None]
            else:
                logits = (self._each if x.dim() == 5 else self._same)(params, buffers, x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Group:
    """Students that train together: parameters [G, ...] where there are several, those of a network where it is one."""

    def __init__(self, model: _Model, seeds: tuple[int, ...], protocol: Protocol, lr: float):
        self.model, self.seeds, self.protocol, self.lr = model, seeds, protocol, lr
        nets = [model.make(seed) for seed in seeds]
        if len(nets) == 1:
            params, buffers = dict(nets[0].named_parameters()), dict(nets[0].named_buffers())
        else:
            params, buffers = stack_module_state(nets)
        self.params = {name: p.detach().requires_grad_() for name, p in params.items()}
        self.buffers = buffers
        self.optimizer: torch.optim.Optimizer
        self.losses = torch.full((len(seeds),), math.nan)  # of the last pass, on the device

    def _renew(self) -> None:
        """A new optimiser."""
        p, params = self.protocol, list(self.params.values())
        options = {"lr": self.lr, "weight_decay": p.weight_decay, "fused": True}
        if p.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(params, momentum=p.momentum, **options)
        else:
            self.optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[p.optimizer](params, **options)

    def run_pass(
        self, images: Tensor, target: Tensor, weights: Tensor | None, epoch: int, augment: Any, teacher: Any, mix: Any
    ) -> None:
        """One pass over the set, each student in its own order and with its own augmentation and mixture."""
        if self.protocol.restarts(epoch):
            self._renew()
        self.optimizer.param_groups[0]["lr"] = self.protocol.rate(self.lr, epoch)
        self.model.net.train()
        orders = torch.stack([torch.randperm(len(images), generator=rng(s, "order", epoch)) for s in self.seeds])
        own = [images if mix is None else mix(seed, epoch).to(images) for seed in self.seeds]
        total = 0
        for batch, rows in enumerate(orders.to(images.device).split(self.protocol.batch, 1)):  # [G, B]
            x = torch.cat([images[some] for images, some in zip(own, rows, strict=True)])
            if augment is not None:
                x = augment(x, self._draw(augment, rows.shape[1], epoch, batch))
            with torch.no_grad():
                wanted = target[rows] if teacher is None else teacher(x).unflatten(0, rows.shape)
            logits = self._logits(x.unflatten(0, rows.shape), epoch, batch)
            losses = student_losses(logits, wanted, self.protocol, None if weights is None else weights[rows])
            self.optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()
            self.optimizer.step()
            total = total + losses.detach() * rows.shape[1]
        self.losses = total / len(images)

    def _draw(self, augment: Any, rows: int, epoch: int, batch: int) -> Any:
        """One augmentation for the images of all students: an operation each, values for every image."""
        draws = [augment.draw(rows, rng(seed, "augment", epoch, batch), siamese=False) for seed in self.seeds]
        parts = [draw.tensors() for draw in draws]
        return type(draws[0])(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def _logits(self, x: Tensor, epoch: int, batch: int) -> Tensor:
        if len(self.seeds) > 1:
            return self.model(self.params, self.buffers, x, len(self.seeds))
        with seeded(self.model.device, rng(self.seeds[0], "network", epoch, batch)):  # dropout
            return self.model(self.params, self.buffers, x, 1)

    def check(self, epoch: int) -> None:
        for seed, loss in zip(self.seeds, self.losses.tolist(), strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of student {seed} is {loss} after pass {epoch} of {self.protocol.passes} of protocol "
                    f"{self.protocol.name!r} (lr={self.lr:.4g}); the last good state is kept; a smaller lr may help"
                )

    def tensors(self) -> dict[str, Tensor]:
        """All that is needed to continue after a pass."""
        out = {f"params/{name}": p for name, p in self.params.items()}
        out |= {f"buffers/{name}": b for name, b in self.buffers.items()}
        for name, p in self.params.items():
            out |= {f"{k}/{name}": v for k, v in self.optimizer.state[p].items() if isinstance(v, Tensor)}
        return out

    def network(self, student: int) -> dict[str, Tensor]:
        """Parameters and buffers of one student, on the CPU."""
        alone = len(self.seeds) == 1
        values = {**self.params, **self.buffers}
        return {n: (v if alone else v[student]).detach().cpu().clone(memory_format=torch.contiguous_format)
                for n, v in values.items()}  # fmt: skip

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue with what `tensors()` gave."""
        self._renew()
        with torch.no_grad():
            for key, value in tensors.items():
                kind, name = key.split("/", 1)
                if kind == "params":
                    self.params[name].copy_(value)
                elif kind == "buffers":
                    self.buffers[name].copy_(value)
                else:  # the optimiser wants what has the parameter's shape in its memory order too
                    own = self.params[name]
                    moved = torch.empty_like(own).copy_(value) if value.shape == own.shape else value.to(own.device)
                    self.optimizer.state[own][kind] = moved


def student_losses(logits: Tensor, target: Tensor, protocol: Protocol, weights: Tensor | None = None) -> Tensor:
    """Mean loss of each student, or sum w l / sum w: logits [G, B, K], class numbers [G, B] or logits [G, B, K] -> [G].

    weights: [G, B].
    """
    if protocol.labels == "hard":
        each = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)  # [G, B]
    else:
        kl = protocol.labels in ("kl", "online")
        t = protocol.temperature if kl else 1.0
        log_p, log_q = (logits / t).log_softmax(2), (target.to(logits) / t).log_softmax(2)
        entropy = log_q if kl else 0  # soft: without the entropy of the labels, which is constant
        each = (log_q.exp() * (entropy - log_p)).sum(2) * (t**2 if protocol.t_squared else 1)
    if weights is None:
        return each.mean(1)
    return (weights * each).sum(1) / weights.sum(1).clamp(min=1e-12)  # a batch of images that weigh nothing: 0


@dataclass(frozen=True)
class _Test:
    """Top-1 accuracies of a group on the test images."""

    images: Tensor
    labels: Tensor
    prepare: Callable[[Tensor], Tensor] | None
    device: torch.device
    dtype: torch.dtype

    @torch.inference_mode()
    def __call__(self, group: _Group) -> list[float]:
        model, students = group.model, len(group.seeds)
        model.net.eval()
        right = torch.zeros(students, dtype=torch.long, device=self.device)
        batch = 100 if self.device.type == "cpu" else _batch_on_gpu(self.images, students)
        for x, y in zip(self.images.split(batch), self.labels.split(batch), strict=True):
            x = x.to(self.device) if self.prepare is None else self.prepare(x.to(self.device))
            logits = model(group.params, group.buffers, x.to(self.dtype), students)
            right += (logits.argmax(2) == y.to(self.device)).sum(1)
        return (100 * right.double() / len(self.labels)).tolist()


def _batch_on_gpu(images: Tensor, students: int) -> int:
    """Test images at once: 1,000 of 32 px for five students, fewer the larger they are and the more students."""
    return max(1, min(1000, 5000 * 32**2 // (students * images.shape[-2] * images.shape[-1])))


# ---------------------------------------------------------------- checks


def _resolve(protocol: str | Protocol) -> Protocol:
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r} is unknown; allowed: {', '.join(PROTOCOLS)}")
    return PROTOCOLS[protocol]


def _checked(
    protocol: Protocol, images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, augment: Any,
    lr: float | None, soft: Tensor | None, teacher: Any, seeds: Sequence[int],
) -> Tensor:  # fmt: skip
    """What the students learn: class numbers or logits.  ValueError for what does not fit."""
    name = protocol.name
    for what, x, y in (("images", images, labels), ("test images", test_images, test_labels)):
        if len(x) != len(y) or not len(x):
            raise ValueError(f"{len(x)} {what} and {len(y)} labels; needs as many of both, and at least one")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; pass network input as floats")
    if not len(seeds):
        raise ValueError("seeds are empty; needs one for each student")
    if augment is not None and not protocol.augment:
        raise ValueError(f"protocol {name!r} trains without augmentation; pass augment=None or another protocol")
    if protocol.lr is None and (lr is None or not 0 < lr < math.inf):
        raise ValueError(f"protocol {name!r} trains with the step size learned with the images; lr={lr} is not above 0")
    if (protocol.labels == "online") != (teacher is not None):
        raise ValueError(f"protocol {name!r} has labels={protocol.labels!r}; a teacher goes with labels='online' alone")
    if protocol.labels in ("hard", "online"):
        return labels
    if soft is None or soft.shape[:1] != labels.shape or soft.dim() != 2:
        got = None if soft is None else tuple(soft.shape)
        raise ValueError(f"protocol {name!r} learns label logits; soft_labels={got}, allowed: [{len(labels)}, classes]")
    return soft
