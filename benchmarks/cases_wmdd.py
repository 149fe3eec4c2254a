"""What benchmarks/speed.py measures of WMDD: recover iterations, and the barycenters of a whole data set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import ot
import torch

from benchmarks import plain_wmdd
from benchmarks.case import Case, Form
from common import networks
from common.augment import rng
from common.networks import forward_flops
from methods import wmdd

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS = {  # form -> settings
    "ours, fp32": {"precision": "fp32"},
    "ours, fp32, compiled": {"precision": "fp32", "compile": True},
    "ours, bf16": {"precision": "bf16"},
    "ours, bf16, compiled": {"precision": "bf16", "compile": True},
}


def recover(network: str, size: int, ipc: int, settings: dict | None, answer: Callable, device: torch.device) -> None:
    """Recover iterations for ever; settings: those of ours, None for the plain form."""
    config = wmdd.Config(ipc=ipc, iterations=100_000, **(settings or {}))
    teacher = networks.make(network, classes=10, size=size, generator=rng(0)).eval().requires_grad_(False).to(device)
    channels, g = sum(bn.num_features for bn in wmdd.batch_norms(teacher)), rng("statistics")
    mean, var = torch.randn(10, channels, generator=g) / 4, torch.rand(10, channels, generator=g)
    features = torch.randn(200, 512, generator=g).abs()
    real = wmdd.Statistics(features, torch.arange(10).repeat_interleave(20), mean, var)
    atoms, weights = wmdd.barycenters(real, config, g)
    if settings is not None:
        wmdd.recover(
            teacher, real, atoms, weights, config, size=size, mean=MEAN, std=STD, generator=g, on_step=answer
        )
        return
    widths = [bn.num_features for bn in wmdd.batch_norms(teacher)]
    low, high = (torch.tensor([(e - m) / s for m, s in zip(MEAN, STD, strict=True)]).view(-1, 1, 1) for e in (0, 1))
    means, variances = ([list(t.to(device).split(widths, 1))] for t in (real.mean, real.var))
    labels = torch.arange(10).repeat_interleave(ipc).to(device)
    noise = torch.randn(len(labels), 3, size, size, generator=rng("noise")).to(device)
    loop = plain_wmdd.recover(
        teacher, [noise], [labels], [atoms.flatten(0, 1).to(device)], means, variances, plain_views(size),
        iterations=config.iterations, lr=config.lr, bn_weight=config.bn_weight, ce_weight=config.ce_weight,
        low=low.to(device), high=high.to(device),
    )  # fmt: skip
    for _ in loop:
        answer()


def plain_views(size: int) -> Iterator[tuple]:
    """Crops of half the area, flips and rolls, for ever."""
    side, generator = round(size / 2**0.5), rng("views")
    while True:
        top, left = torch.randint(size - side, (2,), generator=generator).tolist()
        yield top, left, side, side, bool(top % 2), top % 8, left % 8


def barycenters(ours: bool, answer: Callable, device: torch.device) -> None:
    """All classes of a set of Imagenette's size at IPC 50, for ever; plain: POT's solver, class by class."""
    g = rng("features")
    centres, chosen = torch.randn(10, 8, 512, generator=g), torch.randint(8, (10, 947), generator=g)
    points = torch.stack([c[i] for c, i in zip(centres, chosen, strict=True)])
    points = (points + torch.randn(10, 947, 512, generator=g)).relu().flatten(0, 1)
    none = torch.zeros(10, 1)
    real = wmdd.Statistics(points, torch.arange(10).repeat_interleave(947), none, none)
    while True:
        if ours:
            wmdd.barycenters(real, wmdd.Config(ipc=50), rng(0))
        else:
            for k in range(10):
                own = real.of_class(k).double().numpy()
                noise = torch.randn(50, own.shape[1], generator=rng(k), dtype=torch.float64).numpy()
                ot.lp.free_support_barycenter([own], [ot.unif(len(own))], noise, ot.unif(50))
        answer()


def _recover_case(network: str, size: int, ipc: int) -> Case:
    forms = {
        form: Form(functools.partial(recover, network, size, ipc, settings), needs_bf16=settings["precision"] == "bf16")
        for form, settings in OURS.items()
    }
    return Case(
        f"one recover iteration, {10 * ipc} images of {size} px, {network}",
        functools.partial(recover, network, size, ipc, None),
        forms,
        flops=lambda: 2 * 10 * ipc * forward_flops(network, size),  # forward and image gradient; the weights are frozen
    )


CASES = {
    "recover64": _recover_case("resnet18-mod", 64, 10),
    "recover224": _recover_case("resnet18", 224, 1),
    "barycenter": Case(
        "barycenters of 10 classes at IPC 50, made-up clusters, 10 x 947 x 512; plain: POT, class by class",
        functools.partial(barycenters, False),
        {"ours": Form(functools.partial(barycenters, True))},
    ),
}
