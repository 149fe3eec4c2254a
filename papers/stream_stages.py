"""Coresets, CAD-Prune and CA2D at ImageNet scale; a set that stays on disk is scored as a stream."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common import networks, teachers
from common.augment import rng
from common.datasets import Dataset, Stream
from common.networks import forward_flops
from common.protocols import large_scale
from common.resume import passes_done, resumable
from common.selection import Scored, scored
from common.store import Checkpoint, Product
from common.train import accuracy, fit
from common.views import Recipe, augmented, normalise, sides
from methods import cad, coresets
from papers.image_stages import checked, distilled_set, readable, real_views, sizes, untrained, whole
from papers.selection_stages import SELECTS

if TYPE_CHECKING:
    from papers.setups import ImageSetup
    from papers.stages import Lab, Stage

__all__ = ["IMAGES"]

HARD = "hard-truths-large-hard"  # the protocol of students that EL2N-Best is chosen by
AUGMENT = "rrc-flip"  # the one augmentation that a stream has
WHOLE = ("features", "gradients")  # kinds of selectors that read features and errors of the last epoch
RANKS = ("dyn_unc", "dual", "dual_beta", "el2n", "el2n_best", "grand", "entropy")  # by scores that are 0 if not read
READS = ("window", "windows", "include_last")  # the snapshots that a scoring run of cad.py looks at here
AT_ONCE = 4096  # held-out images in memory


def seen(lab: Lab, setup: ImageSetup) -> Scored:
    """What a scoring run sees of a set: centre views, in training random resized crops with flips."""
    train = lab.data(setup.dataset, "train")

    def read(rows: Tensor, batch: int, epoch: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(train, Stream):
            view, gaps = ("center", "skip") if epoch is None else ("random", "refuse")  # steps are counted
            for images, _, chosen in train.batches(rows, batch, setup.size, view, 0, epoch or 0, gaps=gaps):
                yield images, chosen
            return
        for part in rows.split(batch):
            if epoch is None:
                yield train.center(setup.size, part, shorter=setup.shorter), part
            else:  # a batch is named by its first image, also in a run that was stopped
                g = rng(0, "view", epoch, int(part[0]))
                yield augmented(train.images, sides(train)[part], part, Recipe(), setup.size, g), part

    def make(generator: torch.Generator) -> torch.nn.Module:
        return networks.make(setup.network, classes=len(train.classes), size=setup.size, generator=generator)

    return Scored(read, train.labels, make, lambda x: normalise(x, train.mean, train.std), lab.device)


@functools.cache  # seconds with a million labels, and cells share them
def _checked(config: coresets.Config, train: Dataset | Stream) -> None:
    coresets.check(config, train.labels)


@functools.cache
def _checked_cad(config: cad.Config, train: Dataset | Stream, network: str, size: int) -> None:
    net = untrained(network, len(train.classes), size) if config.method == "ca2d" else None
    cad.check(config, whole(train), train.labels, net, size=size)


def coreset_images(lab: Lab, setup: ImageSetup, _: int = 0) -> Stage:
    """One set serves all seeds of students."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in setup.distill.items()}
    if (kind := options.pop("augment", AUGMENT)) != AUGMENT:
        raise ValueError(f"augment={kind!r}: a scoring run at ImageNet scale sees {AUGMENT} alone")
    config, train = coresets.Config(**{"precision": lab.precision, **options}), lab.data(setup.dataset, "train")
    if isinstance(train, Stream) and config.method not in RANKS:
        raise ValueError(
            f"method={config.method!r} compares images with each other, or takes one that cannot be read for good; "
            f"{setup.dataset} is streamed from disk; allowed: {', '.join(RANKS)}"
        )
    if config.method == "craig":
        raise ValueError("method='craig' weighs its images, and students at ImageNet scale do not; take another one")
    _checked(config, train)
    on, flops = seen(lab, setup), forward_flops(setup.network, setup.size)
    run = {name: value for name, value in asdict(config).items() if name in coresets.RUN_FIELDS}

    kind = coresets.METHODS[config.method]
    final = kind in WHOLE
    looks = {"early": (config.epoch,), "dual": (), "dynamics": None}.get(kind, (config.trained,))  # None: every epoch

    def score(work: Path) -> Product:
        bank = scored(work, on, coresets, config, None, 0, config.trained, looks=looks, final=final)
        return Product(bank.tensors(), {})

    settings = {"network": setup.network, "size": setup.size, "seed": 0, "run": run, "augment": AUGMENT}
    settings |= {"shorter": setup.shorter, "looks": looks} | ({"final": True} if final else {})
    passes = 3.0 * config.trained + (config.trained if looks is None else len(looks))
    what = f"scores of {setup.run_on}, {config.trained} epochs"
    bank = lab.stage("bank", settings, (train.fingerprint,), score, passes * len(train) * flops, what)
    tries = len(coresets.BETAS) if config.method == "el2n_best" else 0

    def build(work: Path) -> Product:
        found = coresets.select(
            coresets.Bank.restore(lab.entry(bank).tensors()), train.labels, config, generator=rng(0, "selection"),
            device=lab.device, accuracy=_trial(lab, setup, train, recipe, work),
        )  # fmt: skip
        tried = {"betas": coresets.BETAS, "accuracies": found["accuracies"].tolist()} if tries else {}
        return _chosen(train, found["indices"], setup, {"method": "coresets", **tried})

    settings = {"method": "coresets", "config": asdict(config), "seed": 0}
    settings |= {"size": setup.size, "shorter": setup.shorter}
    recipe = Recipe(**large_scale(HARD, config.ipc, len(train.classes)))  # the same set under every label regime
    recipe = replace(recipe, epochs=setup.student.epochs)
    if setup.student.labels == "hard":
        recipe = replace(recipe, batch=setup.student.batch)
    settings |= {"network": setup.network, "student": asdict(recipe)} if tries else {}
    views = 3 * recipe.epochs * config.ipc * len(train.classes) + len(train) / 10
    what = f"{config.method} images, {setup.run_on}, IPC {config.ipc}"
    return lab.stage("distill", settings, (train.fingerprint, bank), build, tries * views * flops, what, bank)


def _trial(
    lab: Lab, setup: ImageSetup, train: Dataset | Stream, recipe: Recipe, work: Path
) -> Callable[[Tensor, Tensor], float]:
    """accuracy(chosen, held out) of a student under hard labels, resumable: what EL2N-Best asks for each window."""
    asked = itertools.count()

    def test(chosen: Tensor, held: Tensor) -> float:
        own = Dataset("window", real_views(train, chosen, setup), train.labels[chosen], train.classes, train.mean,
                      train.std, None, "")  # fmt: skip
        net = networks.make(setup.network, classes=len(train.classes), size=setup.size, generator=rng(0, "student"))
        number = next(asked)
        net = fit(
            net, teachers.resident(own, lab.device), recipe, size=setup.size, seed=0, device=lab.device,
            dtype=lab.dtype, description=f"window {number}",
            checkpoint=Checkpoint(work / f"window{number}.safetensors"),
        )  # fmt: skip
        right, seen = 0.0, 0
        for rows in held.split(AT_ONCE):
            pixels, found = readable(train, rows, setup)
            share = accuracy(net, pixels, train.labels[found], train, device=lab.device, dtype=lab.dtype)
            right, seen = right + share * len(found), seen + len(found)
        return right / seen

    return test


def cad_images(lab: Lab, setup: ImageSetup, _: int = 0) -> Stage:
    """CAD-Prune and CA2D; one set serves all seeds of students."""
    budget = {"student_epochs": setup.student.epochs}  # that is matched, whatever the published students have
    config = cad.Config(**{"precision": lab.precision, **setup.distill, **budget})
    train = lab.data(setup.dataset, "train")
    on, crops = seen(lab, setup), config.method == "ca2d"
    _checked_cad(config, train, setup.network, setup.size)
    teacher = (lab.teacher(setup),) if crops else ()
    _, window, windows, steps = cad.schedule(config, len(train.classes), len(train))

    def score(work: Path) -> Product:
        return Product(scored(work, on, cad, config, None, 0, steps, every=False), {})

    run = {name: value for name, value in asdict(config).items() if name not in SELECTS or name in READS}
    settings = {"network": setup.network, "size": setup.size, "shorter": setup.shorter, "seed": 0}
    settings |= {"run": run, "augment": AUGMENT}
    cost = (3.0 * steps * config.batch + (window + windows - 1) * len(train)) * forward_flops(setup.network, setup.size)
    what = f"compute-matched scores, {setup.run_on}, {steps} steps"
    scores = lab.stage("trajectory", settings, (train.fingerprint,), score, cost, what)

    def build(work: Path) -> Product:
        found = lab.entry(scores).tensors()["p_true" if config.score == "prob" else "el2n"]
        score = cad.dynamic_score(found, window, windows, config.include_last)
        if not crops:
            return _chosen(train, cad.prune(score, train.labels, config.ipc), setup, {"method": "cad"})
        with resumable(work, cad.Synthesis.restore, len(train.classes), done=passes_done()) as (state, on_step, _):
            images, labels = cad.synthesise(
                checked(lab, setup, teacher[0]), whole(train), train.labels, score, config, size=setup.size,
                sizes=sizes(train), mean=train.mean, std=train.std, generator=rng(0, "crops"), state=state,
                on_step=on_step,
            )  # fmt: skip
        return distilled_set({"images": images, "labels": labels}, {"method": "ca2d"}, train)

    settings = {"method": "cad", "config": asdict(config), "size": setup.size, "shorter": setup.shorter, "seed": 0}
    what, needs = f"{'CA2D' if crops else 'CAD-Prune'}, {setup.run_on}, IPC {config.ipc}", (scores, *teacher)
    looked = crops * len(train.classes) * cad.resolved(config, setup.size).pool * config.crops
    cost = looked * forward_flops(setup.network, setup.size)
    return lab.stage("distill", settings, (train.fingerprint, *needs), build, cost, what, *needs)


def _chosen(train: Dataset | Stream, rows: Tensor, setup: ImageSetup, meta: dict) -> Product:
    """The set of these training images, as bytes: five hundred of each class of ImageNet-1K are 75 GB."""
    tensors = {"images": real_views(train, rows, setup), "labels": train.labels[rows], "indices": rows}
    return distilled_set(tensors, meta, train)


IMAGES: dict[str, Callable[[Lab, ImageSetup, int], Stage]] = {"coreset": coreset_images, "cad": cad_images}
