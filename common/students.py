"""Students of the matching papers: networks trained from scratch on a distilled set, by named protocols.

    found = train_students(
        images, labels, test_images, test_labels, make_network=make, protocol="dm-2023", seeds=range(5), augment=augment
    )
    print(found.accuracies)

Every draw is a pure function of (seed, epoch, batch), so a student is the same alone or beside others, and a killed
run continues bit for bit.  Several students train side by side with stacked parameters: SGD and Adam are elementwise,
so one optimiser on the stack does what one each would do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from common.augment import rng
from common.store import Checkpoint
from common.train import autocast

__all__ = ["PROTOCOLS", "Protocol", "Students", "train_students"]

SGD, ADAM = {"momentum": 0.9, "weight_decay": 5e-4}, {"momentum": 0.0, "weight_decay": 0.0}


@dataclass(frozen=True)
class Protocol:
    """How students are trained.  lr=0 stands for the step size that was learned with the images."""

    name: str
    epochs: int  # E; "step-half" makes E + 1 passes, as the released code does
    batch: int = 256  # images
    optimizer: str = "sgd"  # sgd, adam or adamw
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "step-half"  # a tenth of lr with a new optimiser after pass E // 2 + 1; or constant, or cosine
    augment: bool = True  # one operation a batch, parameters of its own for each image
    labels: str = "hard"  # hard: class numbers; soft: softmax of logits; kl: logits at a temperature
    temperature: float = 1.0
    source: str = ""

    def __post_init__(self):
        for name, allowed in (
            ("optimizer", ("sgd", "adam", "adamw")), ("schedule", ("step-half", "constant", "cosine")),
            ("labels", ("hard", "soft", "kl")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"protocol.{name}={getattr(self, name)!r} is unknown; allowed: {', '.join(allowed)}")
        if self.epochs < 1 or self.batch < 1 or self.lr < 0:
            raise ValueError(f"protocol {self.name}: epochs and batch must be at least 1 and lr not negative: {self}")

    @property
    def passes(self) -> int:
        return self.epochs + (self.schedule == "step-half")

    def rate(self, epoch: int, lr: float) -> float:
        """Learning rate of pass `epoch`, counted from 0."""
        if self.schedule == "cosine":
            return lr * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return lr * (0.1 if self.schedule == "step-half" and epoch > self.epochs // 2 + 1 else 1.0)


PROTOCOLS: dict[str, Protocol] = {
    p.name: p
    for p in (
        Protocol("dc-2021", 300, augment=False, source="VICO-UoE/DatasetCondensation, main.py; CIFAR, SVHN, Fashion"),
        Protocol("dsa-2021", 1000, source="VICO-UoE/DatasetCondensation, main.py"),
        Protocol("dm-2023", 1000, source="VICO-UoE/DatasetCondensation, main_DM.py"),
        Protocol("mtt-2022", 1000, lr=0.0, source="GeorgeCazenavette/mtt-distillation, distill.py"),
        Protocol("datm-2024", 1000, batch=128, lr=0.0, labels="soft", source="NUS-HPC-AI-Lab/DATM, configs"),
        Protocol("dcbench-2022", 1000, source="justincui03/dc_benchmark, evaluator.py: lr 0.01 for every method"),
        Protocol(
            "mixing-2025", 300, optimizer="adam", lr=1e-3, **ADAM, schedule="constant", augment=False,
            source="IanPons/Enhancing-Distilled-Datasets, load_train_compare.py",
        ),
        Protocol("hard-truths-hard", 300, source="Hard Truths, supplement: DC-Bench's loop with E = 300"),
        Protocol(
            "hard-truths-soft", 300, optimizer="adamw", lr=1e-3, momentum=0.0, weight_decay=0.01, schedule="cosine",
            labels="kl", temperature=20.0, source="Hard Truths, supplement; AdamW's default weight decay",
        ),
    )
}  # fmt: skip


@dataclass
class Students:
    """What came of the students, in the order of their seeds."""

    accuracies: list[float]  # percent, after the last pass
    best: list[float] = field(default_factory=list)  # best on test among the looks of eval_every: a side column only
    losses: list[list[float]] = field(default_factory=list)  # of some passes, mean over the students of a group
    seconds: float = 0.0


def train_students(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    *,
    make_network: Callable[[torch.Generator], nn.Module],
    protocol: Protocol | str,
    seeds: Sequence[int],
    prepare: Callable[[Tensor], Tensor] | None = None,
    augment: Any = None,
    lr: float | None = None,
    soft_labels: Tensor | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    side_by_side: int = 0,
    eval_every: int = 0,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Students:
    """Train one student a seed on images [M, C, H, W] (network input) and test it on test_images by `prepare`.

    labels [M] class numbers; soft_labels [M, K] logits where the protocol wants them; lr: the learned step size.
    augment: `draw(rows, generator, siamese=False)` and `augment(images, draw)`.  side_by_side: students that share a
    stack; 0: all on a GPU, one after the other on a CPU, where a grouped convolution is no faster.  eval_every: also
    look at the test set every so many passes, for `best`.  Raises FloatingPointError when the loss is not finite.
    """
    protocol = _checked(protocol, images, labels, augment, lr, soft_labels)
    device, begun = torch.device(device), time.perf_counter()
    target = labels if soft_labels is None or protocol.labels == "hard" else soft_labels
    images, target = images.to(device).contiguous(), target.to(device)
    width = side_by_side or (len(seeds) if device.type == "cuda" else 1)
    if not _stackable(make_network(rng(0))):
        width = 1
    found = Students([])
    saved = checkpoint.load() if checkpoint else None
    if saved:
        found = Students(**saved[1]["found"])
    for group in [tuple(seeds)[i : i + width] for i in range(len(found.accuracies), len(seeds), width)]:
        students = _Group(group, make_network, protocol, protocol.lr or lr, device, dtype)
        first = students.restore(*saved) if saved and "params/0" in saved[0] else 0
        saved, best = None, [0.0] * len(group)
        for epoch in range(first, protocol.passes):
            loss = students.run_pass(images, target, epoch, augment if protocol.augment else None)
            last = epoch + 1 == protocol.passes
            if epoch % 50 == 49 or last:
                _check_finite(loss, epoch, protocol)
                found.losses.append([epoch, float(loss)])
            if eval_every and (epoch % eval_every == eval_every - 1 or last):
                tested = students.test(test_images, test_labels, prepare)
                best = [max(pair) for pair in zip(best, tested, strict=True)]
            if on_epoch:
                on_epoch(epoch, loss)
            if checkpoint and not last and checkpoint.due(epoch + 1):
                checkpoint.save(students.tensors(), {"epoch": epoch + 1, "best": best, "found": vars(found)})
        found.accuracies += students.test(test_images, test_labels, prepare)
        found.best += best if eval_every else []
        if checkpoint and len(found.accuracies) < len(seeds):
            checkpoint.save({"done": torch.tensor(len(found.accuracies))}, {"found": vars(found)})
    found.seconds += time.perf_counter() - begun
    return found


class _Group:
    """Some students with one stack of parameters [G, ...] each name; G = 1 is a plain network."""

    def __init__(self, seeds, make_network, protocol: Protocol, lr: float, device: torch.device, dtype: torch.dtype):
        self.seeds, self.protocol, self.lr, self.device, self.dtype = seeds, protocol, lr, device, dtype
        nets = [make_network(rng(seed, "student")).to(device).train() for seed in seeds]
        self.net, self.stacked = nets[0], len(nets) > 1
        if self.stacked:
            self.stack, self.buffers = stack_module_state(nets)
            self.params = [p.detach().requires_grad_() for p in self.stack.values()]
            self.stack = dict(zip(self.stack, self.params, strict=True))
        else:
            self.params = list(self.net.parameters())
        self._renew()

    def _renew(self) -> None:
        p = self.protocol
        if p.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.params, self.lr, momentum=p.momentum, weight_decay=p.weight_decay)
        else:
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[p.optimizer]
            self.optimizer = kind(self.params, self.lr, weight_decay=p.weight_decay)

    def logits(self, x: Tensor, shared: bool = False) -> Tensor:
        """x [G, B, C, H, W], or [B, C, H, W] for all of them (shared) -> float32 [G, B, K]."""
        with autocast(self.device, self.dtype):
            if not self.stacked:
                out = self.net(x if shared else x[0])[None]
            else:
                one = lambda params, buffers, own: functional_call(self.net, (params, buffers), (own,))  # noqa: E731
                out = vmap(one, in_dims=(0, 0, None if shared else 0))(self.stack, self.buffers, x)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def run_pass(self, images: Tensor, target: Tensor, epoch: int, augment: Any) -> Tensor:
        """One pass over the set; returns the mean loss of its last batch over the students."""
        half = self.protocol.epochs // 2 + 2
        if self.protocol.schedule == "step-half" and epoch == half:
            self._renew()  # the released code forgets the momentum here
        for group in self.optimizer.param_groups:
            group["lr"] = self.protocol.rate(epoch, self.lr)
        self.net.train()
        orders = torch.stack([torch.randperm(len(images), generator=rng(s, "order", epoch)) for s in self.seeds])
        for number, rows in enumerate(orders.split(self.protocol.batch, 1)):  # [G, B]
            rows = rows.to(self.device)
            x = images[rows]
            if augment is not None:
                places = [rng(seed, "augment", epoch, number) for seed in self.seeds]
                draws = [augment.draw(rows.shape[1], place, siamese=False) for place in places]
                x = torch.stack([augment(own, draw) for own, draw in zip(x, draws, strict=True)])
            losses = self._loss(self.logits(x), target[rows])
            self.optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()
            self.optimizer.step()
        return losses.detach().mean()

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """[G, B, K], targets [G, B] or [G, B, K] -> [G], means over the batch."""
        if self.protocol.labels == "hard":
            return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape).mean(1)
        t = self.protocol.temperature
        log_p, log_q = (logits / t).log_softmax(2), (target / t).log_softmax(2)
        if self.protocol.labels == "soft":
            return -(log_q.exp() * log_p).sum(2).mean(1)
        return (log_q.exp() * (log_q - log_p)).sum(2).mean(1)

    @torch.inference_mode()
    def test(self, images: Tensor, labels: Tensor, prepare: Callable | None, batch: int = 500) -> list[float]:
        """Top-1 accuracy of each student in percent."""
        self.net.eval()
        right = torch.zeros(len(self.seeds), device=self.device)
        for x, y in zip(images.split(batch), labels.split(batch), strict=True):
            x = x.to(self.device) if prepare is None else prepare(x.to(self.device))
            right += (self.logits(x, shared=True).argmax(2) == y.to(self.device)).sum(1)
        return (100 * right / len(labels)).tolist()

    def tensors(self) -> dict[str, Tensor]:
        out = {f"params/{i}": p.detach() for i, p in enumerate(self.params)}
        out |= {f"buffers/{name}": b for name, b in self.net.named_buffers()}
        for i, p in enumerate(self.params):
            out |= {f"slots/{i}/{k}": torch.as_tensor(v) for k, v in self.optimizer.state[p].items() if v is not None}
        return out

    def restore(self, tensors: dict[str, Tensor], meta: dict) -> int:
        """Continue from `tensors`; returns the next pass."""
        with torch.no_grad():
            for i, p in enumerate(self.params):
                p.copy_(tensors[f"params/{i}"])
            for name, b in self.net.named_buffers():
                b.copy_(tensors[f"buffers/{name}"])
        for key, value in tensors.items():
            if key.startswith("slots/"):
                _, i, name = key.split("/")
                own = self.params[int(i)]
                self.optimizer.state[own][name] = value.to(own.device) if value.ndim else value
        return meta["epoch"]


def _stackable(net: nn.Module) -> bool:
    """Running statistics and dropout do not stack: such students train one after the other."""
    alone = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return not any(isinstance(m, alone) for m in net.modules())


def _checked(protocol, images: Tensor, labels: Tensor, augment, lr: float | None, soft: Tensor | None) -> Protocol:
    """The protocol itself; ValueError for what does not fit."""
    if isinstance(protocol, str):
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol={protocol!r} is unknown; allowed: {', '.join(PROTOCOLS)}")
        protocol = PROTOCOLS[protocol]
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels; needs as many of both, and at least one")
    if protocol.augment and augment is None:
        raise ValueError(f"protocol {protocol.name!r} augments its batches: pass augment=")
    if not protocol.lr and not (lr is not None and lr > 0):
        raise ValueError(f"protocol {protocol.name!r} trains with the learned step size: lr={lr} must be above 0")
    if protocol.labels != "hard" and soft is None:
        raise ValueError(f"protocol {protocol.name!r} has labels={protocol.labels!r}: pass soft_labels=, logits [M, K]")
    return protocol


def _check_finite(loss: Tensor, epoch: int, protocol: Protocol) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss of the students is not finite at pass {epoch} of protocol {protocol.name!r} (lr={protocol.lr}); "
            "a smaller learning rate may help"
        )
