"""The stages behind a cell: teacher -> distill -> relabel -> evaluate, each kept in the store.

This is the one place that ties methods to the shared utilities.  A stage is named by its settings and by the names of
what it is made from, so its key is known before anything runs: the plan, the cache and sharing between cells, tables
and papers all follow from that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import networks, teachers
from common.augment import rng
from common.datasets import SHORT_SIDE, Dataset, Stream, load
from common.datasets_table import INFO
from common.hardware import bf16_is_fast, commit, compiler, precision_name, recorded, resolve_precision
from common.labels import Fixed, Keep, Loss, Online, Stored, kd_loss, relabel
from common.networks import forward_flops
from common.store import Checkpoint, Entry, Product, Store
from common.train import accuracy, fit
from common.views import Recipe, normalise, steps_per_epoch
from methods import nrr_dd
from papers import image_stages, matching_stages, measured_stages, stream_stages
from papers.cells import Cell
from papers.matching_stages import MatchingSetup
from papers.setups import ImageSetup

__all__ = ["Lab", "Stage"]

COMPILED_FROM = 1.5e12  # operations of a network in training: a student of IPC 1 at 32 px, tested on 10,000 images
STREAM_SEED = 42  # one stream of views serves all students of a set, as in the released code
MOST_LABEL_BYTES = 32 * 2**30  # of stored soft labels: they are held in memory, and written again at each checkpoint


@dataclass(frozen=True, eq=False)
class Stage:
    """One cached step: its key is a function of name, settings and inputs; `build` makes it in a scratch folder."""

    name: str
    settings: dict
    inputs: tuple[str, ...]
    build: Callable[[Path], Product]
    flops: float
    what: str
    needs: tuple[Stage, ...] = ()

    def all(self) -> Iterator[Stage]:
        """This stage and all it stands on, in the order to run them."""
        for stage in self.needs:
            yield from stage.all()
        yield self


class Lab:
    """Data, device and store of one run; builds the stages of cells."""

    def __init__(self, store: Store, root: str | None, device: torch.device, precision: str, committed: bool = True):
        self.store, self.root, self.device = store, root, device
        self.committed = committed  # whether sets that are committed with the tables are read, not distilled
        self.dtype = resolve_precision(precision, device)
        self.precision = precision_name(self.dtype)
        commit()  # that of the code which is running: a checkout may move on while it runs
        self.failed: dict[str, Exception] = {}  # stages that were tried ahead, by key
        self._checked: dict[str, tuple[Entry, dict]] = {}  # with the marks of its files

    def arithmetic(self, flops: float) -> dict[str, Any]:
        """How a network of the matching papers trains with so many operations: {dtype, compile}.

        On a CPU that multiplies bf16 in hardware, long ones in bf16 and compiled.  Compiling takes up to a minute, and
        seconds once its cache is warm; it makes each step three times as fast.  bf16 alone makes none faster, as the
        norms of these networks are most of a step.  All others train in fp32, as published.
        """
        low = self.device.type == "cpu" and self.dtype == torch.bfloat16 and bf16_is_fast(self.device)
        if low and flops > COMPILED_FROM and compiler():
            return {"dtype": torch.bfloat16, "compile": True}
        return {"dtype": torch.float32, "compile": False}

    # ---------------------------------------------------------------- data

    @functools.cache  # noqa: B019 (a lab lives as long as the process)
    def data(self, name: str, split: str) -> Dataset | Stream:
        return load(name, self.root, split=split, cache=self.store.root / "cache")

    @functools.cache  # noqa: B019
    def test_views(self, name: str, size: int, shorter: int | None) -> tuple[Tensor, Tensor]:
        """Centre views of the test split, uint8 [N, C, size, size], and their labels [N], without unreadable images."""
        data = self.data(name, "test")
        if isinstance(data, Stream):
            parts = zip(*data.batches(torch.arange(len(data)), 256, size, "center", 0, 0), strict=True)
            views, labels, _ = (torch.cat(part) for part in parts)
            return views, labels
        return data.center(size, shorter=shorter), data.labels

    def class_batches(self, setup: ImageSetup, k: int) -> Iterator[Tensor]:
        """Normalised centre views of class k in file order, in the chunks of 100 of the released code."""
        data = self.data(setup.dataset, "train")
        order = data.class_indices(k)
        if isinstance(data, Stream):
            chunks = (pixels for pixels, _, _ in data.batches(order, 100, setup.size, "center", 0, 0))
        else:
            chunks = (data.center(setup.size, part, shorter=setup.shorter) for part in order.split(100))
        for pixels in chunks:
            yield normalise(pixels.to(self.device), data.mean, data.std)

    # ---------------------------------------------------------------- stages

    def stage(self, name: str, settings: dict, inputs: tuple, build, flops: float, what: str, *needs: Stage) -> Stage:
        """A stage that records where it was made, and its memory peak; inputs: fingerprints, or stages."""
        names = tuple(self.key(i) if isinstance(i, Stage) else i for i in inputs)
        return Stage(name, settings, names, recorded(build, self.device), flops, what, needs)

    @functools.cache  # noqa: B019
    def key(self, stage: Stage) -> str:
        return self.store.key(stage.name, stage.settings, stage.inputs)

    def cached(self, stage: Stage) -> bool:
        """Whether the store has a stage, from names and sizes alone."""
        return self.store.status(stage.name, stage.settings, stage.inputs) == "cached"

    def entry(self, stage: Stage) -> Entry:
        """The finished entry of a stage; made now if it is missing, checked once and again when its files change."""
        key = self.key(stage)
        if key in self.failed:
            raise self.failed[key]
        entry, marks = self._checked.get(key, (None, None))
        if entry is None or entry.marks() != marks:
            entry = self.store.make(stage.name, stage.settings, stage.inputs, stage.build)
            self._checked[key] = entry, entry.marks()
        return entry

    def teacher(self, setup: ImageSetup) -> Stage:
        train, test = (self.data(setup.dataset, split) for split in ("train", "test"))
        settings = teachers.settings(setup.dataset, setup.network, setup.size, setup.teacher, 0, self.precision)
        settings |= {"shorter": setup.shorter} if setup.shorter else {}  # decides the test views

        def build(work: Path) -> Product:
            return teachers.train(
                work,
                train,
                *self.test_views(setup.dataset, setup.size, setup.shorter),
                network=setup.network,
                size=setup.size,
                recipe=setup.teacher,
                seed=0,
                precision=self.precision,
                device=self.device,
            )

        ready = setup.teacher.name == "torchvision"
        cost = 0 if ready else 3 * setup.teacher.epochs * len(train) * forward_flops(setup.network, setup.size)
        known = "torchvision's weights" if ready else f"{setup.teacher.epochs} epochs"
        what = f"{setup.network} teacher, {setup.run_on}, {known}"
        return self.stage("teacher", settings, (train.fingerprint, test.fingerprint), build, cost, what)

    def restored(self, stage: Stage) -> nn.Module:
        entry = self.entry(stage)
        net = teachers.restore(entry.tensors(), entry.meta["network"], len(entry.meta["classes"]), entry.meta["size"])
        return net.to(self.device, memory_format=torch.channels_last)

    def images(self, setup: ImageSetup, algorithm: str, seed: int) -> Stage:
        """The distill stage: a set in pixel space."""
        return (image_stages.IMAGES | stream_stages.IMAGES)[algorithm](self, setup, seed)

    def as_data(self, stage: Stage, jpeg: int = 0) -> tuple[Dataset, Tensor | None]:
        """A distilled set as training data: uint8 by truncation, as the released code stores it, and its weights.

        jpeg: the quality of its files; 0: kept without loss.
        """
        entry = self.entry(stage)
        tensors, meta = entry.tensors(), entry.meta
        pixels = image_stages.as_bytes(tensors["images"])
        pixels = image_stages.through_jpeg(pixels, jpeg) if jpeg else pixels
        mean, std = tuple(meta["mean"]), tuple(meta["std"])
        data = Dataset(stage.what, pixels, tensors["labels"], tuple(meta["classes"]), mean, std, None, entry.key)
        return teachers.resident(data, self.device), tensors.get("weights")

    def labels(self, setup: ImageSetup, images: Stage) -> Stage:
        """What the teacher says of every view of a stream; boundary labels keep two numbers of it."""
        teacher, recipe, (keep, _) = self.teacher(setup), setup.student, _transfer(setup)

        def build(work: Path) -> Product:
            data, _ = self.as_data(images, setup.jpeg)
            kept = relabel(
                self.restored(teacher), data, recipe, size=setup.size, seed=STREAM_SEED, device=self.device,
                dtype=self.dtype, keep=keep, batch_statistics=setup.batch_statistics,
                checkpoint=Checkpoint(work / "labels.safetensors"),
            )  # fmt: skip
            return Product({"logits": kept}, {"bytes": kept.numel() * 2})

        steps, batch = self._steps(setup)
        width = 2 if keep else len(self.data(setup.dataset, "train").classes)
        if (size := 2 * steps * batch * width) > MOST_LABEL_BYTES:
            raise ValueError(
                f"the soft labels of {images.what} would take {size:,} bytes of memory, more than the "
                f"{MOST_LABEL_BYTES:,} that are stored; `labels: recomputed` in paper.yaml, for this data set or IPC, "
                "makes the same student and stores none"
            )
        settings = {
            "recipe": stream_of(recipe), "stream_seed": STREAM_SEED, "size": setup.size, "precision": self.precision,
            "kept": "boundary" if keep else "logits",
        }  # fmt: skip
        if (softer := nrr_dd_config(setup).distance_temperature) != 1 and keep:
            settings["temperature"] = softer
        settings |= {k: v for k, v in setup.released().items() if k != "t_squared"}
        cost = steps * batch * forward_flops(setup.network, setup.size)
        what = f"{'boundary' if keep else 'soft'} labels of {images.what}"
        return self.stage("relabel", settings, (images, teacher), build, cost, what, images, teacher)

    def student(self, setup: ImageSetup, images: Stage, seed: int) -> Stage:
        """One student after its last epoch, and for RDED's recipe the best of the epochs that its code tests.

        setup.labels: "stored" reads the teacher's labels, "recomputed" asks it again for the same views and stores
        nothing, "online" asks it for views that are the student's own, "fixed" asks it once for each image as it is.
        """
        recipe, test, network = setup.student, self.data(setup.dataset, "test"), setup.student_network
        soft, stored = recipe.labels == "soft", setup.labels == "stored"
        needs = [images] + ([self.labels(setup, images) if stored else self.teacher(setup)] if soft else [])
        shared = soft and setup.labels in ("stored", "recomputed")  # the views that the labels are of
        keep, loss = _transfer(setup)
        steps, batch = self._steps(setup)

        def build(work: Path) -> Product:
            data, weights = self.as_data(images, setup.jpeg)
            (views, shown), history = self.test_views(setup.dataset, setup.size, setup.shorter), []
            source = None
            if soft and stored:
                source = Stored(self.entry(needs[1]).tensors()["logits"])
            elif soft and setup.labels == "fixed":
                source = Fixed(self.restored(needs[1]), data, setup.size, self.dtype)
            elif soft:
                source = Online(self.restored(needs[1]), self.dtype, keep, setup.batch_statistics)
            tested = tested_epochs(recipe)

            def top1(net: nn.Module) -> float:
                return accuracy(net, views, shown, data, device=self.device, dtype=self.dtype)

            net = networks.make(network, classes=len(data.classes), size=setup.size, generator=rng(seed, "student"))
            net = fit(
                net, data, recipe, size=setup.size, seed=STREAM_SEED if shared else seed,
                masks=seed, device=self.device, dtype=self.dtype, soft=source, loss=loss,
                weights=weights if soft else None, checkpoint=Checkpoint(work / "state.safetensors"), history=history,
                on_epoch=lambda epoch, net: top1(net) if epoch in tested else None, description=f"student {network}",
            )  # fmt: skip
            meta = {"accuracies": [top1(net)], "seeds": [seed]}
            meta["losses"] = [row[:2] for row in history[:: max(1, len(history) // 50)]]
            if setup.regime == "compact":  # two probabilities and their classes, two bytes each
                meta["label_bytes"] = 8 * steps * batch
            if tested:
                meta["best"] = [max(row[2] for row in history if row[2] is not None)]
            return Product({}, meta)

        settings = {
            "network": network, "recipe": asdict(recipe), "size": setup.size, "seed": seed,
            "precision": self.precision, "labels": setup.labels if soft else "hard", "regime": setup.regime,
        }  # fmt: skip
        if setup.regime == "boundary":
            settings["boundary"] = boundary_settings(setup)
        if setup.shorter:
            settings["shorter"] = setup.shorter
        settings |= setup.released()
        cost = (3 * steps * batch + len(test)) * forward_flops(network, setup.size)
        what = f"{network} student, seed {seed}, {setup.regime} labels, {images.what}"
        return self.stage("evaluate", settings, (*needs, test.fingerprint), build, cost, what, *needs)

    def run_on(self, setup: ImageSetup | MatchingSetup) -> str:
        """What a number was made with, to be said beside it: CIFAR and SVHN kept as JPEG are not the published sets."""
        matching, known, files = isinstance(setup, MatchingSetup), INFO.get(setup.dataset), ""
        train = matching_stages.task_of(self, setup).train if matching else self.data(setup.dataset, "train")
        if known is not None and known.size is None and not isinstance(train, Stream):  # it comes in several editions
            side = self.data(setup.dataset, "train").short_side
            files = f", from files of {side} px{' or more' if side == SHORT_SIDE else ''}"
        lossy = setup.dataset in ("cifar10", "cifar100", "svhn") and "JPEG files" in train.note
        return f"{setup.run_on}{files}{' kept as JPEG files' if lossy else ''}"

    def facts(self, setup: ImageSetup | MatchingSetup) -> dict:
        """The settings part of a result file; epochs are those that students were trained for."""
        if not isinstance(setup, MatchingSetup) or setup.distill["ipc"] is None:
            return setup.facts()
        train = matching_stages.task_of(self, setup).train
        return setup.facts(setup.distill["ipc"] * len(train.classes), len(train))

    def students(self, cell: Cell, setup: ImageSetup | MatchingSetup, seeds: tuple[int, ...]) -> list[Stage]:
        """The last stages of a cell: their results hold one accuracy for each seed."""
        if isinstance(setup, MatchingSetup):
            if cell.metric == "accuracy":
                return matching_stages.students(self, cell, setup, seeds)
            return measured_stages.measured(self, cell, setup, seeds)
        return [self.student(setup, self.images(setup, cell.algorithm, seed), seed) for seed in seeds]

    def _steps(self, setup: ImageSetup) -> tuple[int, int]:
        images = setup.distill["ipc"] * len(self.data(setup.dataset, "train").classes)
        recipe = setup.student
        return recipe.epochs * steps_per_epoch(images, recipe.batch), min(recipe.batch, images)


def stream_of(recipe: Recipe) -> dict:
    """The fields of a recipe that decide which views a stream has: students that differ in others share its labels."""
    return {
        f.name: getattr(recipe, f.name)
        for f in fields(recipe)
        if f.name in ("epochs", "batch", "crop", "flip", "cutmix", "pad", "shuffle")
    }


def tested_epochs(recipe: Recipe) -> set[int]:
    """The epochs after which RDED's code tests the student: every tenth of the last fifth, 249 to 299 of 300."""
    if recipe.name != "rded-2024":
        return set()
    return {e for e in range(recipe.epochs) if (e + 1) % 10 == 0 and e > 0.8 * recipe.epochs} | {recipe.epochs - 1}


def nrr_dd_config(setup: ImageSetup) -> nrr_dd.Config:
    """r and alpha of Eq. 9 of NRR-DD and the temperature of d, from the method's settings where they are among them."""
    own = ("threshold", "boundary_weight", "distance_temperature")
    return nrr_dd.Config(**{k: v for k, v in setup.distill.items() if k in own})


def boundary_settings(setup: ImageSetup) -> dict[str, float]:
    config = nrr_dd_config(setup)
    softer = {} if config.distance_temperature == 1 else {"temperature": config.distance_temperature}
    return {"threshold": config.threshold, "weight": config.boundary_weight, **softer}


def _transfer(setup: ImageSetup) -> tuple[Keep | None, Loss | None]:
    """What is kept of the teacher's logits, and the student's loss; None: the logits, and the KL divergence to them."""
    if setup.t_squared:
        t = setup.student.temperature
        return None, lambda logits, kept, *_: t**2 * kd_loss(logits, kept, t)
    return nrr_dd.transfer(setup.regime, nrr_dd_config(setup), setup.student.temperature, kd_loss)
