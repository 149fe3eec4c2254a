"""What benchmarks/speed.py measures of the matching methods: an update of each, an epoch of an expert and of a student.

On real CIFAR-10 where DD_DATA names a folder with it, else on noise of the same shape: the arithmetic is the same.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import plain_augment, plain_dc, plain_dm, plain_mtt, plain_students
from benchmarks.case import Case, Form
from common import networks
from common.augment import DiffAugment, rng
from common.datasets import load
from common.protocols import PROTOCOLS
from common.students import train_students
from methods import dc, dm, dsa, mtt

CLASSES, SIZE, REAL = 10, 32, 256
FORWARD = 0.1015e9  # floating-point operations of one image through ConvNet-3
MEAN, STD = (torch.tensor(v).view(-1, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
FORMS = {  # form -> settings of ours
    "ours, fp32": {},
    "ours, fp32, compiled": {"compile": True},
    "ours, mixed, compiled": {"precision": "mixed", "compile": True},
    "ours, bf16, compiled": {"precision": "bf16", "compile": True},
}


def make_network(generator: torch.Generator) -> torch.nn.Module:
    return networks.make("convnet3-instance", classes=CLASSES, size=SIZE, generator=generator)


@functools.cache
def real_images() -> tuple[Tensor, Tensor]:
    """images uint8 [N, 3, 32, 32] and labels int64 [N]."""
    try:
        train = load("cifar10", os.environ.get("DD_DATA") or None)
    except FileNotFoundError:
        noise = torch.randint(0, 256, (5_000, 3, SIZE, SIZE), generator=rng("noise"), dtype=torch.uint8)
        return noise, torch.arange(5_000) % CLASSES
    return train.images, train.labels


def prepare(images: Tensor) -> Tensor:
    return (images.float() / 255 - MEAN.to(images.device)) / STD.to(images.device)


def synthetic(ipc: int, device: torch.device) -> Tensor:
    return torch.randn(CLASSES * ipc, 3, SIZE, SIZE, generator=rng("start")).to(device)


def distil(method, settings: dict, form: dict, augment, answer: Callable, device: torch.device) -> None:
    """Iterations of DC, DSA or DM for ever."""
    images, labels = real_images()
    method.distill(
        images.to(device), labels, method.Config(iterations=10**9, **settings, **form), make_network=make_network,
        prepare=prepare, augment=augment, generator=rng(0), device=device, on_step=answer,
    )  # fmt: skip


def plain_distil(loop: Callable, ipc: int, options: dict, answer: Callable, device: torch.device) -> None:
    images, labels = real_images()
    for _ in loop(
        prepare(images).to(device), labels, synthetic(ipc, device), make_network=make_network, generator=rng(0),
        **options,
    ):  # fmt: skip
        answer()


def trajectories() -> list[Tensor]:
    """A made-up expert: small random steps from a fresh network."""
    start = mtt.flatten(make_network(rng(0)))
    steps = torch.randn(5, len(start), generator=rng("steps")) * 1e-3
    return [torch.cat([start[None], start + steps.cumsum(0)])]


def trajectory(settings: dict, form: dict, answer: Callable, device: torch.device) -> None:
    """Iterations of MTT or DATM for ever."""
    images, labels = real_images()
    config = mtt.Config(iterations=10**9, max_start=2, lr=1e-6, lr_lr=0.0, zca=False, **settings, **form)
    mtt.distill(
        images, labels, trajectories(), config, make_network=make_network, prepare=prepare, augment=DiffAugment(),
        generator=rng(0), device=device, on_step=answer,
    )  # fmt: skip


def plain_trajectory(ipc: int, steps: int, answer: Callable, device: torch.device) -> None:
    expert, augment, generator = trajectories()[0].to(device), DiffAugment(), rng(0)
    rows = torch.arange(CLASSES * ipc)

    def matches():
        while True:
            draws = [(rows, augment.draw(len(rows), generator, siamese=False)) for _ in range(steps)]
            yield expert[0], expert[2], draws

    labels = torch.arange(CLASSES).repeat_interleave(ipc).to(device)
    for _ in plain_mtt.distill(
        make_network(rng(0)).to(device), matches(), synthetic(ipc, device), labels, 0.01, lr_images=1e-6, lr_lr=0.0,
        augment=plain_augment.augment,
    ):  # fmt: skip
        answer()


EXPERT_IMAGES = 2560  # ten steps of 256 stand for an epoch


def expert(form: dict, answer: Callable, device: torch.device) -> None:
    """Epochs of one expert on 2,560 images, for ever."""
    images, labels = (t[:EXPERT_IMAGES] for t in real_images())
    config, done = mtt.ExpertConfig(experts=1, epochs=10**4, **form), itertools.count()

    def on_step(state) -> None:
        if state.batch == 0 and next(done) >= 0:
            answer()

    mtt.train_experts(
        images.to(device), labels, config, make_network=make_network, prepare=prepare, augment=DiffAugment(),
        generator=rng(0), device=device, on_step=on_step,
    )  # fmt: skip


def plain_expert(answer: Callable, device: torch.device) -> None:
    images, labels = (t[:EXPERT_IMAGES] for t in real_images())
    images, labels, augment, generator = prepare(images).to(device), labels.to(device), DiffAugment(), rng(0)
    net = make_network(rng(0)).to(device).train()
    draws = (augment.draw(REAL, generator, siamese=False) for _ in itertools.count())
    while True:
        order = torch.randperm(EXPERT_IMAGES, generator=generator)
        for _ in plain_mtt.expert_epoch(net, images, labels, order, draws, augment=plain_augment.augment):
            pass
        answer()


STUDENT_IMAGES = 500


def student(form: dict, answer: Callable, device: torch.device) -> None:
    """Epochs of one student on 500 images under DSA, for ever."""
    ipc = STUDENT_IMAGES // CLASSES
    images, labels = synthetic(ipc, device), torch.arange(CLASSES).repeat_interleave(ipc)
    protocol = replace(PROTOCOLS["dsa-2021"], epochs=10**6)
    train_students(
        images, labels, images[:10], labels[:10], make_network=make_network, protocol=protocol, seeds=(0,),
        augment=DiffAugment(), device=device, on_epoch=answer, **form,
    )  # fmt: skip


def plain_student(answer: Callable, device: torch.device) -> None:
    ipc = STUDENT_IMAGES // CLASSES
    images, labels = synthetic(ipc, device), torch.arange(CLASSES).repeat_interleave(ipc)
    net, augment, generator = make_network(rng(0)).to(device), DiffAugment(), rng(0)
    draws = (augment.draw(n, generator, siamese=False) for n in itertools.cycle((256, 244)))
    while True:
        order = torch.randperm(STUDENT_IMAGES, generator=generator)
        plain_students.epoch(net, images, labels.to(device), order, draws)
        answer()


# ---------------------------------------------------------------- the cases


def _synthetic_flops(method: str, ipc: int) -> float:
    """Arithmetic of an update: K classes of 256 real images and of `ipc` synthetic ones."""
    per_class = {"dm": REAL + 3 * ipc, "dc": 3 * REAL + 8 * ipc, "dsa": 3 * REAL + 8 * ipc}[method]
    return CLASSES * per_class * FORWARD


def _matching(method, ipc: int, what: str) -> Case:
    name = method.__name__.rsplit(".", 1)[-1]
    settings, plain = {"ipc": ipc}, {"augment": plain_augment.augment}
    if method is dm:
        loop, augment = plain_dm.distill, DiffAugment()
        plain["draw"] = lambda rows, generator: augment.draw(rows, generator, siamese=True)
    else:
        loop, augment = plain_dc.distill, DiffAugment() if method is dsa else None
        settings |= {"outer": 1, "inner": 1}
        plain |= {"outer": 1, "inner": 1, "draw": augment.draw if augment else None}
    forms = {
        form: Form(functools.partial(distil, method, settings, chosen, augment), _needs_bf16(chosen))
        for form, chosen in FORMS.items()
    }
    loop = functools.partial(plain_distil, loop, ipc, plain)
    return Case(what, loop, forms, flops=lambda: _synthetic_flops(name, ipc))


def _needs_bf16(form: dict) -> bool:
    return form.get("precision", "fp32") != "fp32"


def _trajectory(ipc: int, steps: int, what: str, **options) -> Case:
    settings = {"ipc": ipc, "student_steps": steps}
    all_kept = {"ours, fp32, compiled, graphs kept": {"compile": True, "keep": steps}}  # the memory of the plain form
    found = FORMS if "plain" in options else FORMS | all_kept
    forms = {form: Form(functools.partial(trajectory, settings, f), _needs_bf16(f)) for form, f in found.items()}
    count = steps * ipc * CLASSES
    plain = functools.partial(plain_trajectory, ipc, steps)
    return Case(what, **{"plain": plain, "forms": forms, "flops": lambda: 9 * count * FORWARD, **options})


CASES = {
    "dm1": _matching(dm, 1, "DM, one update at IPC 1"),
    "dm10": _matching(dm, 10, "DM, one update at IPC 10"),
    "dm50": _matching(dm, 50, "DM, one update at IPC 50"),
    "dc1": _matching(dc, 1, "DC, one outer step at IPC 1"),
    "dsa10": _matching(dsa, 10, "DSA, one outer step at IPC 10"),
    "mtt1": _trajectory(1, 50, "MTT, one iteration at IPC 1, 50 student steps"),
    "mtt10": _trajectory(10, 30, "MTT, one iteration at IPC 10, 30 student steps", one_at_a_time=True),
    "datm10": _trajectory(  # a graph of 80 steps is about 30 GiB
        10, 80, "DATM, one iteration at IPC 10, 80 student steps", plain=None, one_at_a_time=True
    ),
    "expert": Case(
        "one epoch of an expert on 2,560 images (a twentieth of CIFAR-10)", plain_expert,
        {form: Form(functools.partial(expert, f), _needs_bf16(f)) for form, f in FORMS.items() if "mixed" not in form},
        flops=lambda: 3 * EXPERT_IMAGES * FORWARD,
    ),
    "student": Case(
        "one epoch of a student on 500 images under DSA's augmentation", plain_student,
        {
            "ours, fp32": Form(functools.partial(student, {})),
            "ours, fp32, compiled": Form(functools.partial(student, {"compile": True})),
            "ours, bf16, compiled": Form(functools.partial(student, {"dtype": torch.bfloat16, "compile": True}), True),
        },
        flops=lambda: 3 * STUDENT_IMAGES * FORWARD,
    ),
}  # fmt: skip
