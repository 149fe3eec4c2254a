"""What benchmarks/speed.py measures of coresets: choosing images of CIFAR-10, of one class or all, given the bank."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks import plain_coresets
from benchmarks.case import Case, Form
from common.augment import rng
from methods import coresets

IPC, COUNT, CLASSES, WIDTH, EPOCHS = 50, 5000, 10, 2048, 200  # WIDTH: of the ConvNet
WHAT = f"of {COUNT:,} images of a class with {WIDTH:,} features, a tenth of CIFAR-10"
METHODS = tuple(name for name in coresets.METHODS if name != "el2n_best")  # whose time is that of its students


@functools.cache
def bank(classes: int = 1) -> coresets.Bank:
    """Of the first classes: every array, at random."""
    g, labels = rng("bank"), torch.arange(classes).repeat_interleave(COUNT)
    rand = lambda *shape: torch.rand(*shape, generator=g)  # noqa: E731
    error = (4 * rand(len(labels), CLASSES)).softmax(1)
    error[torch.arange(len(labels)), labels] -= 1
    over_epochs = ("p_true", "p_true_train", "el2n", "correct", "margin", "entropy", "conf", "logit", "h_norm")
    forgets = torch.randint(-1, 9, labels.shape, generator=g, dtype=torch.int16)
    return coresets.Bank(
        labels, **{name: rand(EPOCHS, len(labels)) for name in over_epochs},
        forget_train=forgets, h_final=rand(len(labels), WIDTH).half(), err_final=error,
    )  # fmt: skip


def ours(method: str, classes: int, answer: Callable, device: torch.device) -> None:
    config, known, generator = coresets.Config(method=method, ipc=IPC), bank(classes), rng("choice")
    while True:
        coresets.select(known, known.labels, config, generator=generator, device=device)
        answer()


def plain_kcenter(answer: Callable, device: torch.device) -> None:
    features, generator = bank().h_final.float().to(device), rng("choice")
    while True:
        plain_coresets.kcenter(features, IPC, int(torch.randint(COUNT, (), generator=generator)))
        answer()


def plain_facility(answer: Callable, device: torch.device) -> None:
    error, features = bank().err_final.to(device), bank().h_final.float().to(device)
    while True:
        plain_coresets.facility_location(error, features, IPC)
        answer()


def form(method: str, classes: int = 1) -> Form:
    return Form(functools.partial(ours, method, classes))


CASES = {
    "kcenter50": Case(f"the {IPC} farthest points {WHAT}", plain_kcenter, {"ours, fp32": form("kcenter")}),
    "facility50": Case(
        f"facility location, {IPC} {WHAT}", plain_facility, {"ours, fp32": form("facility_location")},
        one_at_a_time=True,
    ),
    "coresets50": Case(
        f"every selector, {IPC} {WHAT}", None, {method: form(method) for method in METHODS}, one_at_a_time=True
    ),
    "coresets500": Case(
        f"every selector, {IPC} of each of ten classes, the size of CIFAR-10, with {WIDTH:,} features", None,
        {method: form(method, CLASSES) for method in METHODS}, one_at_a_time=True,
    ),
}
