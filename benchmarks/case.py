"""One thing that benchmarks/speed.py measures: a plain form and ours, each a loop that answers after each iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Loop = Callable[[Callable, torch.device], None]  # loop(answer, device) calls answer() after each iteration, for ever


@dataclass(frozen=True)
class Form:
    """One form of ours."""

    loop: Loop
    needs_bf16: bool = False  # left out where the device has no bf16 arithmetic


@dataclass(frozen=True)
class Case:
    """What an iteration is, the plain form of it, ours by name, and the arithmetic behind it."""

    what: str
    plain: Loop | None  # None: it does not fit into the memory of a common machine, and is not tried
    forms: dict[str, Form]
    flops: Callable[[], float] | None = None  # of one iteration
    one_at_a_time: bool = False  # the forms together do not fit: a process ends before the next one starts
