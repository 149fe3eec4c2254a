"""What benchmarks/speed.py measures of NRR-DD: refine iterations of one batch, with label refinement."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from benchmarks import plain_nrr_dd
from benchmarks.case import Case, Form
from benchmarks.cases_wmdd import MEAN, OURS, STD
from common import networks
from common.augment import rng
from common.networks import forward_flops
from methods import nrr_dd


def refine(network: str, size: int, images: int, settings: dict | None, answer: Callable, device: torch.device) -> None:
    """Refine iterations for ever; settings: those of ours, None for the plain form."""
    config = nrr_dd.Config(ipc=images // 10, iterations=100_000, label_refinement=1.0, **(settings or {}))
    teacher = networks.make(network, classes=10, size=size, generator=rng(0)).eval().requires_grad_(False).to(device)
    pixels, labels = torch.rand(images, 3, size, size, generator=rng("images")), torch.arange(images) % 10
    facts = {"mean": MEAN, "std": STD, "generator": rng("draws")}
    if settings is not None:
        nrr_dd.refine(teacher, pixels, labels, config, **facts, on_step=answer)
        return
    mask = nrr_dd.begin(teacher, pixels, labels, config, **facts).mask
    teacher.to(memory_format=torch.contiguous_format)
    shift, scale, low, high = (
        torch.tensor(v, device=device).view(-1, 1, 1)
        for v in (MEAN, STD, *([(e - m) / s for m, s in zip(MEAN, STD, strict=True)] for e in (0, 1)))
    )

    def draws():
        while True:
            view = nrr_dd.random_view(size, *config.view(size), facts["generator"])
            partner, own = nrr_dd.random_mix(config.mix, size, images, facts["generator"])
            yield view, partner.to(device), own.to(device)

    loop = plain_nrr_dd.refine(
        teacher, [(pixels.to(device) - shift) / scale], [labels.to(device)], [mask.to(device)], draws(),
        iterations=config.iterations, lr=config.lr, bn_weight=config.bn_weight, threshold=config.threshold,
        label_refinement=config.label_refinement, low=low, high=high,
    )  # fmt: skip
    for _ in loop:
        answer()


def _case(network: str, size: int, images: int) -> Case:
    forms = {
        form: Form(
            functools.partial(refine, network, size, images, settings), needs_bf16=settings["precision"] == "bf16"
        )
        for form, settings in OURS.items()
    }
    return Case(
        f"one NRR-DD iteration with label refinement, {images} images of {size} px, {network}",
        functools.partial(refine, network, size, images, None),
        forms,
        flops=lambda: 2 * 2 * images * forward_flops(network, size),  # both halves: forward and image gradient
    )


CASES = {"nrr_dd": _case("convnet3", 32, 100), "nrr_dd128": _case("resnet18", 128, 10)}
