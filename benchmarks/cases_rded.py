"""What benchmarks/speed.py measures of RDED: scoring the crops of real images, and the student with its teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks import plain_rded
from benchmarks.case import Case, Form
from common import networks
from common.augment import rng
from common.datasets import Dataset
from common.labels import Online
from common.networks import forward_flops
from common.train import fit, make_optimizer
from common.views import Recipe
from methods import rded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORK, SIZE, IMAGES = "resnet18", 224, 100
CONFIG = rded.Config(factor=2, ipc=1, pool=IMAGES)
OURS = {  # form -> settings
    "ours, fp32": {"precision": "fp32"},
    "ours, fp32, compiled": {"precision": "fp32", "compile": True},
    "ours, bf16": {"precision": "bf16"},
    "ours, bf16, compiled": {"precision": "bf16", "compile": True},
}


def select(settings: dict | None, answer: Callable, device: torch.device) -> None:
    """Pools of 100 images for ever; settings: those of ours, None for the plain form."""
    teacher = networks.make(NETWORK, classes=10, size=SIZE, generator=rng(0)).eval().to(device)
    images = torch.randint(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8, generator=rng("images"))
    batch = CONFIG.batch if device.type == "cuda" else 10  # a CPU gains nothing from more, and needs the memory
    config, generator = replace(CONFIG, batch=batch, **(settings or {})), rng("crops")
    while True:
        if settings is None:
            sizes = torch.full((IMAGES * CONFIG.crops, 2), SIZE)
            boxes = rded.random_boxes(sizes, generator, ratio=(1.0, 1.0)).unflatten(0, (IMAGES, CONFIG.crops)).tolist()
            scored = plain_rded.score(teacher, images, boxes, 0, factor=CONFIG.factor, size=SIZE, mean=MEAN, std=STD)
            plain_rded.select(scored, CONFIG.ipc * CONFIG.factor**2)
        else:
            rded.select(teacher, images, None, 0, config, size=SIZE, mean=MEAN, std=STD, generator=generator)
        answer()


STUDENT = Recipe(**rded.student_recipe("imagenette", 10, NETWORK, 2, 10) | {"epochs": 10**6})
SEEN = 128  # px


def student(dtype: torch.dtype | None, answer: Callable, device: torch.device) -> None:
    """Epochs of one student on 100 images of 128 px, a teacher beside it, for ever; dtype: None for the plain form."""
    teacher, net = (
        networks.make(NETWORK, classes=10, size=SEEN, generator=rng(seed)).to(device) for seed in (0, 1)
    )
    images = torch.randint(0, 256, (100, 3, SEEN, SEEN), dtype=torch.uint8, generator=rng("images"))
    data = Dataset("100 images", images, torch.arange(100) % 10, tuple("abcdefghij"), MEAN, STD, None, "")
    if dtype is not None:
        label = Online(teacher.to(memory_format=torch.channels_last), dtype)
        fit(net, data, STUDENT, size=SEEN, seed=0, device=device, dtype=dtype, soft=label, on_epoch=lambda *_: answer())
    optimizer, teacher = make_optimizer(net.train(), STUDENT), teacher.eval()
    while dtype is None:
        plain_rded.student_epoch(
            net, teacher, optimizer, images, batch=STUDENT.batch, crop=STUDENT.crop, factor=STUDENT.shuffle,
            temperature=STUDENT.temperature, mean=MEAN, std=STD,
        )  # fmt: skip
        answer()


CASES = {
    "rded_student": Case(
        f"one epoch of RDED's student on 100 images of {SEEN} px with a teacher beside it, {NETWORK}",
        functools.partial(student, None),
        {
            "ours, fp32": Form(functools.partial(student, torch.float32)),
            "ours, bf16": Form(functools.partial(student, torch.bfloat16), needs_bf16=True),
        },
        flops=lambda: 4 * 100 * forward_flops(NETWORK, SEEN),
    ),
    "rded": Case(
        f"scoring {IMAGES} real images of {SIZE} px with {CONFIG.crops} crops each, {NETWORK}",
        functools.partial(select, None),
        {
            form: Form(functools.partial(select, settings), needs_bf16=settings["precision"] == "bf16")
            for form, settings in OURS.items()
        },
        flops=lambda: IMAGES * CONFIG.crops * forward_flops(NETWORK, SIZE),
    ),
}
