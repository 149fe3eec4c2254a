"""Scoring runs of the coreset methods, for their scripts and for the papers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from common import matching
from common.augment import CropResizeFlip, rng
from common.protocols import Protocol
from common.resume import resumable
from common.store import Checkpoint
from common.students import train_students

__all__ = ["Scored", "augment_of", "scored", "trial"]


@dataclass(frozen=True)
class Scored:
    """What a scoring run sees: all training images, or a function that reads them, and whom it trains on them."""

    images: Tensor | Callable
    labels: Tensor
    make_network: Callable[[torch.Generator], nn.Module]
    prepare: Callable[[Tensor], Tensor]
    device: torch.device

    @classmethod
    def of(cls, on: matching.Task) -> Scored:
        return cls(on.train.images, on.train.labels, on.make_network, on.prepare, on.device)


def augment_of(kind: str, on: matching.Task, method: ModuleType) -> Any:
    """The augmentation of a scoring run by its name in methods/coresets.py or cad.py; only the former has CropFlip."""
    match kind:
        case "none":
            return None
        case "dsa":
            return on.augment
        case "rrc-flip":
            return CropResizeFlip()
        case "crop" | "crop-flip":
            return method.CropFlip(on.size // 8, flip=kind == "crop-flip")
    raise ValueError(f"augment={kind!r} is unknown; allowed: none, dsa, crop, crop-flip, rrc-flip")


def scored(work: Path, on: Scored, method: ModuleType, config, augment: Any, seed: int, total: int, **more):
    """What the scoring run of a method leaves, resumable in the folder `work`; total: its steps as it counts them.

    more: further arguments of the method's `score`.
    """
    with resumable(work, method.State.restore, total, name="score") as (state, on_step, _):
        return method.score(
            on.images, on.labels, config, make_network=on.make_network, prepare=on.prepare, augment=augment,
            generator=rng(seed, "scoring run"), device=on.device, state=state, on_step=on_step, **more,
        )  # fmt: skip


def trial(work: Path, on: matching.Task, protocol: Protocol, seed: int) -> Callable[[Tensor, Tensor], float]:
    """accuracy(chosen, held out) on training images, of one student: what EL2N-Best asks for each of its windows.

    A run that was stopped goes on from the folder `work`, as the windows are asked for in the same order.
    """
    asked = itertools.count()

    def accuracy(chosen: Tensor, held: Tensor) -> float:
        own, checkpoint = on.train, Checkpoint(work / f"window{next(asked)}.safetensors")
        return train_students(
            on.prepare(own.images[chosen]), own.labels[chosen], own.images[held], own.labels[held], protocol=protocol,
            make_network=on.make_network, seeds=[seed], prepare=on.prepare, device=on.device,
            augment=on.augmentation(protocol.augment), checkpoint=checkpoint,
        ).accuracies[0]  # fmt: skip

    return accuracy
