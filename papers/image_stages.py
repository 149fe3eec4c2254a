"""How each method with a teacher makes its images, as stages of the store: statistics -> distill, or distill alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common import networks, teachers
from common.augment import rng
from common.datasets import Dataset, Stream
from common.distilled import grid
from common.networks import forward_flops
from common.store import Checkpoint, Product
from common.views import normalise
from methods import nrr_dd, rded, sre2l, wmdd

if TYPE_CHECKING:
    from papers.setups import Setup
    from papers.stages import Lab, Stage

__all__ = ["IMAGES", "random", "statistics", "wmdd_images"]

PREVIEW_PER_CLASS = 10
CHECKED = 200  # real training images that a teacher must not be near chance on
SHOWN_CLASSES = 10  # of which the maps behind the images are kept, for the figures


def random(lab: Lab, setup: Setup, seed: int) -> Stage:
    """Random real images, chosen anew for every seed: the honest baseline."""
    train, ipc = lab.data(setup.dataset, "train"), setup.distill["ipc"]

    def build(work: Path) -> Product:
        check_ipc(train, ipc)
        g = rng(seed, "random")
        rows = [train.class_indices(k) for k in range(len(train.classes))]
        chosen = torch.cat([r[torch.randperm(len(r), generator=g)[:ipc]] for r in rows])
        tensors = {"images": _centre(train, chosen, setup).cpu().float() / 255, "labels": train.labels.cpu()[chosen]}
        return _set(tensors, {"method": "random"}, train)

    settings = {"method": "random", "ipc": ipc, "size": setup.size, "shorter": setup.shorter, "seed": seed}
    what = f"random real images, {setup.run_on}, IPC {ipc}, seed {seed}"
    return lab.stage("distill", settings, (train.fingerprint,), build, 0.0, what)


# ---------------------------------------------------------------- WMDD


def statistics(lab: Lab, setup: Setup, layer: int) -> Stage:
    teacher, train = lab.teacher(setup), lab.data(setup.dataset, "train")

    def build(work: Path) -> Product:
        batches = functools.partial(lab.class_batches, setup)
        stats = wmdd.statistics(lab.restored(teacher), batches, len(train.classes), layer=layer)
        return Product(stats.tensors(), {"layer": layer})

    settings = {"layer": layer, "size": setup.size, "shorter": setup.shorter}
    cost = 4 * len(train) * forward_flops(setup.network, setup.size)  # in fp32
    what = f"features and BatchNorm statistics, {setup.run_on}"
    return lab.stage("statistics", settings, (teacher, train.fingerprint), build, cost, what, teacher)


def wmdd_images(lab: Lab, setup: Setup, _: int = 0) -> Stage:
    """One set serves all seeds of students, as in the paper."""
    config = wmdd.Config(**{"precision": lab.precision, **setup.distill})
    teacher, stats = lab.teacher(setup), statistics(lab, setup, config.layer)
    train = lab.data(setup.dataset, "train")

    def build(work: Path) -> Product:
        check_ipc(train, config.ipc)
        generator = rng(0, "wmdd")
        real = wmdd.Statistics(**lab.entry(stats).tensors())
        atoms, weights = wmdd.barycenters(real, config, generator)
        state, on_step, losses = _resumed(work, wmdd.RecoverState.restore, config.iterations)
        images = wmdd.recover(
            lab.restored(teacher), real, atoms, weights, config, size=setup.size, mean=train.mean, std=train.std,
            generator=generator, state=state, on_step=on_step,
        )  # fmt: skip
        labels = torch.arange(len(train.classes)).repeat_interleave(config.ipc)
        tensors = {"images": images, "labels": labels, "weights": weights.flatten(), "atoms": atoms}
        return _set(tensors, {"method": "wmdd", "losses": losses}, train)

    cost = 3 * len(train.classes) * config.ipc * config.iterations * forward_flops(setup.network, setup.size)
    settings = {"method": "wmdd", "config": asdict(config), "size": setup.size, "seed": 0}
    what = f"WMDD, {setup.run_on}, IPC {config.ipc}"
    return lab.stage("distill", settings, (stats, teacher), build, cost, what, teacher, stats)


# ---------------------------------------------------------------- SRe2L, RDED, NRR-DD


def sre2l_images(lab: Lab, setup: Setup, _: int = 0) -> Stage:
    config = sre2l.Config(**{"precision": lab.precision, **setup.distill})
    train = lab.data(setup.dataset, "train")
    classes = len(train.classes)
    _check(sre2l, config, setup, train)

    def make(teacher: torch.nn.Module, **resumed) -> dict[str, Tensor]:
        images = sre2l.recover(
            teacher, classes, config, size=setup.size, channels=len(train.mean), mean=train.mean, std=train.std,
            generator=rng(0, "sre2l"), **resumed,
        )  # fmt: skip
        return {"images": images, "labels": torch.arange(classes).repeat_interleave(config.ipc)}

    passes = 3 * classes * config.ipc * config.iterations
    return _with_teacher(lab, setup, "sre2l", config, make, sre2l.RecoverState.restore, passes)


def rded_images(lab: Lab, setup: Setup, _: int = 0) -> Stage:
    config = rded.resolved(rded.Config(**{"precision": lab.precision, **setup.distill}), setup.size)
    train = lab.data(setup.dataset, "train")
    _check(rded, config, setup, train)

    def make(teacher: torch.nn.Module, **resumed) -> dict[str, Tensor]:
        made = rded.distill(
            _whole(train), train.labels, teacher, config, size=setup.size, sizes=_sizes(train), mean=train.mean,
            std=train.std, generator=rng(0, "rded"), **resumed,
        )  # fmt: skip
        return {name: made[name] for name in ("images", "labels")}

    passes = len(train.classes) * config.pool * config.crops
    return _with_teacher(lab, setup, "rded", config, make, rded.State.restore, passes)


DISCOVERY = ("ipc", "pool", "crops", "kept", "cam_score", "confidence", "patches", "precision")  # what CIDD reads


LABELS = ("boundary_weight",)  # what students alone read


def cidd_images(lab: Lab, setup: Setup, _: int = 0) -> Stage:
    """The first stage of NRR-DD alone; every refinement of these images starts from it."""
    config = nrr_dd.Config(
        **{k: v for k, v in {"precision": lab.precision, **setup.distill}.items() if k in DISCOVERY}
    )
    train = lab.data(setup.dataset, "train")
    _check(nrr_dd, config, setup, train)

    def make(teacher: torch.nn.Module, **_) -> dict[str, Tensor]:
        images = nrr_dd.discover(
            _whole(train), train.labels, teacher, config, size=setup.size, sizes=_sizes(train), mean=train.mean,
            std=train.std, generator=rng(0, "cidd"),
        )  # fmt: skip
        return {"images": images, "labels": torch.arange(len(train.classes)).repeat_interleave(config.ipc)}

    passes = len(train.classes) * config.pool * (1 + config.kept)
    return _with_teacher(lab, setup, "cidd", config, make, nrr_dd.State.restore, passes)


def nrr_dd_images(lab: Lab, setup: Setup, _: int = 0) -> Stage:
    """Keeps, of the first classes, the images before refinement and their masks too."""
    config = nrr_dd.Config(
        **{k: v for k, v in {"precision": lab.precision, **setup.distill}.items() if k not in LABELS}
    )
    train, start = lab.data(setup.dataset, "train"), cidd_images(lab, setup)
    shown = slice(0, SHOWN_CLASSES * config.ipc, config.ipc)

    def make(teacher: torch.nn.Module, state: nrr_dd.State | None, on_step: Callable) -> dict[str, Tensor]:
        found, facts = lab.entry(start).tensors(), {"mean": train.mean, "std": train.std, "generator": rng(0, "nrr_dd")}
        state = state or nrr_dd.begin(teacher, found["images"], found["labels"], config, **facts)
        before, mask = state.before[shown].clone(), state.mask[shown].clone()
        images = nrr_dd.refine(
            teacher, state.before, found["labels"], config, state=state, on_step=on_step, **facts
        )  # fmt: skip
        return {"images": images, "labels": found["labels"], "before": before, "mask": mask}

    forwards = 2 if config.label_refinement else 1
    passes = 3 * forwards * len(train.classes) * config.ipc * config.iterations
    return _with_teacher(lab, setup, "nrr_dd", config, make, nrr_dd.State.restore, passes, start)


def _with_teacher(
    lab: Lab, setup: Setup, name: str, config, make: Callable, restore: Callable, passes: int, *needs: Stage
) -> Stage:
    """The distill stage of a method that needs a teacher and, at most, the training images.

    make(teacher, state=, on_step=) -> tensors; passes: forward passes of one image, for the estimate of time; needs:
    stages that it starts from.
    """
    teacher, train = lab.teacher(setup), lab.data(setup.dataset, "train")

    def build(work: Path) -> Product:
        net = lab.restored(teacher)
        rows = torch.linspace(0, len(train) - 1, min(CHECKED, len(train))).long()
        views = normalise(_centre(train, rows, setup).to(lab.device), train.mean, train.std)
        teachers.check(net, views, train.labels.cpu()[rows], train.classes)
        state, on_step, losses = _resumed(work, restore, getattr(config, "iterations", 1))
        tensors = make(net, state=state, on_step=on_step)
        return _set(tensors, {"method": name, "losses": losses}, train)

    settings = {"method": name, "config": asdict(config), "size": setup.size, "seed": 0}
    what = f"{name.upper().replace('_', '-')}, {setup.run_on}, IPC {config.ipc}"
    cost = passes * forward_flops(setup.network, setup.size)
    return lab.stage("distill", settings, (teacher, train.fingerprint, *needs), build, cost, what, teacher, *needs)


def _whole(train: Dataset | Stream) -> Tensor | Callable:
    """Pixels as they are stored, or what reads those of some rows."""
    return train.whole if isinstance(train, Stream) else train.images


def _sizes(train: Dataset | Stream) -> Tensor | None:
    return None if isinstance(train, Stream) else train.sizes


@functools.cache
def _untrained(network: str, classes: int, size: int) -> torch.nn.Module:
    return networks.make(network, classes=classes, size=size, generator=rng(0))


def _check(method, config, setup: Setup, train: Dataset | Stream) -> None:
    """ValueError for a cell that cannot work, when it is planned: no teacher has to be trained first."""
    side = None if isinstance(train, Stream) else train.short_side
    net = _untrained(setup.network, len(train.classes), setup.size)
    method.check(config, net, train.labels, size=setup.size, side=side)


def _centre(train: Dataset | Stream, rows: Tensor, setup: Setup) -> Tensor:
    """Centre views uint8 [B, C, size, size] of some training images."""
    if isinstance(train, Stream):
        return torch.cat([pixels for pixels, _, _ in train.batches(rows, 256, setup.size, "center", 0, 0)])
    return train.center(setup.size, rows, shorter=setup.shorter)


def _resumed(work: Path, restore: Callable, iterations: int) -> tuple[object | None, Callable, list]:
    """The state saved in the folder `work` (None at the start), a hook that saves it, and the losses so far."""
    checkpoint = Checkpoint(work / "state.safetensors")
    saved = checkpoint.load()
    losses = saved[1]["losses"] if saved else []

    def on_step(state) -> None:
        step = getattr(state, "step", 0)  # RDED's state counts classes alone
        if step and step % 50 == 0 and math.isfinite(state.loss):
            losses.append([state.number, step, state.loss])
        if checkpoint.due(state.number * iterations + step):
            checkpoint.save(state.tensors(), {"losses": losses})

    return restore(saved[0]) if saved else None, on_step, losses


def _set(tensors: dict[str, Tensor], meta: dict, train: Dataset | Stream) -> Product:
    ipc = len(tensors["labels"]) // len(train.classes)
    show = torch.cat(
        [torch.arange(k * ipc, k * ipc + min(ipc, PREVIEW_PER_CLASS)) for k in range(min(10, len(train.classes)))]
    )
    preview = grid(tensors["images"][show], min(ipc, PREVIEW_PER_CLASS))
    meta |= {"classes": list(train.classes), "mean": list(train.mean), "std": list(train.std)}
    meta["bytes"] = tensors["images"].numel()  # stored as uint8
    return Product(tensors, meta, {"preview.png": preview})


def check_ipc(data: Dataset | Stream, ipc: int) -> None:
    """ValueError for a class with fewer real images than `ipc`."""
    counts = torch.bincount(data.labels.cpu(), minlength=len(data.classes))
    if int(counts.min()) < ipc:
        k = int(counts.argmin())
        raise ValueError(
            f"ipc={ipc} is more than the {int(counts[k])} images of class {data.classes[k]!r} of {data.name}"
        )


IMAGES: dict[str, Callable[[Lab, Setup, int], Stage]] = {
    "random": random, "wmdd": wmdd_images, "sre2l": sre2l_images, "cda": sre2l_images, "rded": rded_images,
    "cidd": cidd_images, "nrr_dd": nrr_dd_images,
}  # fmt: skip
