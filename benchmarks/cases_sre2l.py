"""What benchmarks/speed.py measures of SRe2L: recover iterations of one batch, one image of each class."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks import plain_sre2l
from benchmarks.case import Case, Form
from benchmarks.cases_wmdd import MEAN, OURS, STD, plain_views
from common import networks
from common.augment import rng
from common.networks import forward_flops
from methods import sre2l


def recover(
    network: str, size: int, classes: int, settings: dict | None, answer: Callable, device: torch.device
) -> None:
    """Recover iterations for ever; settings: those of ours, None for the plain form."""
    config = sre2l.Config(ipc=1, iterations=100_000, **(settings or {}))
    teacher = networks.make(network, classes=classes, size=size, generator=rng(0)).eval().requires_grad_(False)
    teacher = teacher.to(device)
    if settings is not None:
        sre2l.recover(
            teacher, classes, config, size=size, channels=3, mean=MEAN, std=STD, generator=rng("noise"), on_step=answer
        )
        return
    low, high = (torch.tensor([(e - m) / s for m, s in zip(MEAN, STD, strict=True)]).view(-1, 1, 1) for e in (0, 1))
    noise = torch.randn(classes, 3, size, size, generator=rng("noise")).to(device)
    loop = plain_sre2l.recover(
        teacher, [noise], [torch.arange(classes, device=device)], plain_views(size), iterations=config.iterations,
        lr=config.lr, bn_weight=config.bn_weight, first_bn_multiplier=config.first_bn_multiplier, low=low.to(device),
        high=high.to(device),
    )  # fmt: skip
    for _ in loop:
        answer()


def _case(network: str, size: int, classes: int) -> Case:
    forms = {
        form: Form(
            functools.partial(recover, network, size, classes, settings), needs_bf16=settings["precision"] == "bf16"
        )
        for form, settings in OURS.items()
    }
    return Case(
        f"one SRe2L recover iteration, {classes} images of {size} px, {network}",
        functools.partial(recover, network, size, classes, None),
        forms,
        flops=lambda: 2 * classes * forward_flops(network, size),  # forward and image gradient; the weights are frozen
    )


CASES = {"sre2l64": _case("resnet18-mod", 64, 100), "sre2l224": _case("resnet18", 224, 10)}
