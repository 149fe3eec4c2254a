"""The stages behind a cell: teacher -> statistics -> distill -> relabel -> evaluate, each kept in the store.

This is the one place that ties methods to the shared utilities.  A stage is named by its settings and by the names of
what it is made from, so its key is known before anything runs: the plan, the cache and sharing between cells, tables
and papers all follow from that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import networks, teachers
from common.augment import rng
from common.datasets import Dataset, Stream, load
from common.distilled import grid
from common.hardware import recorded
from common.store import Checkpoint, Entry, Product, Store
from common.train import (
    Online,
    Recipe,
    Stored,
    accuracy,
    fit,
    normalise,
    precision_name,
    relabel,
    resolve_precision,
    steps_per_epoch,
)  # fmt: skip
from methods import wmdd
from papers import matching_stages
from papers.matching_stages import MatchingSetup
from papers.plan import Cell, merged

__all__ = ["ARCHITECTURES", "Lab", "Setup", "Stage", "setup_of"]

ARCHITECTURES = {  # as printed -> common.networks
    "ResNet-18": "resnet18",
    "ResNet-50": "resnet50",
    "ResNet-101": "resnet101",
    "ViT-Tiny": "vit-tiny",
    "ViT-Small": "vit-small",
}
STREAM_SEED = 42  # one stream of views serves all students of a set, as in the released code
PREVIEW_PER_CLASS = 10


@dataclass(frozen=True)
class Setup:
    """What a printed data set means at a scale, for one number of images per class."""

    dataset: str
    size: int
    network: str
    run_on: str
    teacher: Recipe
    student: Recipe
    distill: Mapping
    labels: str = "stored"
    shorter: int | None = None

    def facts(self) -> dict:
        """The settings part of a result file."""
        return {
            "size": self.size, "network": self.network, "distill": dict(self.distill),
            "student": asdict(self.student), "teacher": asdict(self.teacher), "labels": self.labels,
        }  # fmt: skip


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


def setup_of(scale: Mapping, cell: Cell) -> Setup | MatchingSetup | None:
    """The settings of `cell`: the scale's, those of its data set, of its IPC, its own.  None: not in this scale."""
    if cell.algorithm in matching_stages.ALGORITHMS:
        return matching_stages.matching_setup(scale, cell)
    data = scale["data"].get(cell.dataset)
    if data is None or cell.ipc in data.get("leave_out", ()):
        return None
    by_ipc = data.get("by_ipc", {}).get(cell.ipc, {})
    layers = [scale, data, by_ipc]
    student = merged(*(x.get("student") for x in layers), scale.get("architectures", {}).get(cell.arch), cell.student)
    if cell.label_regime == "hard":
        student |= {"labels": "hard"}
    distill = merged(*(x.get("distill") for x in layers), cell.distill, {"ipc": cell.ipc})
    teacher = replace(teachers.WMDD_TEACHER, **merged(*(x.get("teacher") for x in layers)))
    return Setup(
        data["dataset"],
        data["size"],
        data.get("network", "resnet18"),
        data["run_on"],
        teacher,
        Recipe(**student),
        distill,
        scale.get("labels", "stored"),
        data.get("shorter"),
    )


class Lab:
    """Data, device and store of one run; builds the stages of cells."""

    def __init__(self, store: Store, root: str | None, device: torch.device, precision: str):
        self.store, self.root, self.device = store, root, device
        self.dtype = resolve_precision(precision, device)
        self.precision = precision_name(self.dtype)
        self._checked: dict[str, Entry] = {}

    # ---------------------------------------------------------------- data

    @functools.cache  # noqa: B019 (a lab lives as long as the process)
    def data(self, name: str, split: str) -> Dataset | Stream:
        return load(name, self.root, split=split, cache=self.store.root / "cache")

    @functools.cache  # noqa: B019
    def test_views(self, name: str, size: int, shorter: int | None) -> Tensor:
        """Centre views of the test split: uint8 [N, C, size, size]."""
        data = self.data(name, "test")
        if isinstance(data, Stream):
            order = torch.arange(len(data))
            return torch.cat([pixels for pixels, _, _ in data.batches(order, 256, size, "center", 0, 0)])
        return data.center(size, shorter=shorter)

    def _class_batches(self, setup: Setup, k: int) -> Iterator[Tensor]:
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

    def key(self, stage: Stage) -> str:
        return self.store.key(stage.name, stage.settings, stage.inputs)

    def entry(self, stage: Stage) -> Entry:
        """The finished entry of a stage; made now if it is missing, checked once in the life of a lab."""
        key = self.key(stage)
        if key not in self._checked:
            self._checked[key] = self.store.make(stage.name, stage.settings, stage.inputs, stage.build)
        return self._checked[key]

    def teacher(self, setup: Setup) -> Stage:
        train, test = (self.data(setup.dataset, split) for split in ("train", "test"))
        settings = teachers.settings(setup.dataset, setup.network, setup.size, setup.teacher, 0, self.precision)

        def build(work: Path) -> Product:
            return teachers.train(
                work,
                train,
                self.test_views(setup.dataset, setup.size, setup.shorter),
                test.labels,
                network=setup.network,
                size=setup.size,
                recipe=setup.teacher,
                seed=0,
                precision=self.precision,
                device=self.device,
            )

        cost = 3 * setup.teacher.epochs * len(train) * forward_flops(setup.network, setup.size)
        what = f"{setup.network} teacher, {setup.run_on}, {setup.teacher.epochs} epochs"
        return self.stage("teacher", settings, (train.fingerprint, test.fingerprint), build, cost, what)

    def restored(self, stage: Stage) -> nn.Module:
        entry = self.entry(stage)
        net = teachers.restore(entry.tensors(), entry.meta["network"], len(entry.meta["classes"]), entry.meta["size"])
        return net.to(self.device, memory_format=torch.channels_last)

    def statistics(self, setup: Setup, layer: int) -> Stage:
        teacher, train = self.teacher(setup), self.data(setup.dataset, "train")

        def build(work: Path) -> Product:
            batches = functools.partial(self._class_batches, setup)
            stats = wmdd.statistics(self.restored(teacher), batches, len(train.classes), layer=layer)
            return Product(stats.tensors(), {"layer": layer})

        settings = {"layer": layer, "size": setup.size, "shorter": setup.shorter}
        cost = 4 * len(train) * forward_flops(setup.network, setup.size)  # in fp32
        what = f"features and BatchNorm statistics, {setup.run_on}"
        return self.stage("statistics", settings, (teacher, train.fingerprint), build, cost, what, teacher)

    def wmdd(self, setup: Setup, seed: int = 0) -> Stage:
        config = wmdd.Config(**{"precision": self.precision, **setup.distill})
        teacher, stats, train = (
            self.teacher(setup),
            self.statistics(setup, config.layer),
            self.data(setup.dataset, "train"),
        )
        classes = train.classes

        def build(work: Path) -> Product:
            check_ipc(train, config.ipc)
            generator = rng(seed, "wmdd")
            real = wmdd.Statistics(**self.entry(stats).tensors())
            atoms, weights = wmdd.barycenters(real, config, generator)
            checkpoint = Checkpoint(work / "recover.safetensors")
            saved = checkpoint.load()
            state = wmdd.RecoverState.restore(saved[0]) if saved else None
            steps = [] if saved is None else saved[1]["losses"]

            def on_step(state: wmdd.RecoverState) -> None:
                if state.step % 50 == 0:
                    steps.append([state.number, state.step, state.loss])
                if checkpoint.due(state.number * config.iterations + state.step):
                    checkpoint.save(state.tensors(), {"losses": steps})

            images = wmdd.recover(
                self.restored(teacher),
                real,
                atoms,
                weights,
                config,
                size=setup.size,
                mean=train.mean,
                std=train.std,
                generator=generator,
                state=state,
                on_step=on_step,
            )
            labels = torch.arange(len(classes)).repeat_interleave(config.ipc)
            tensors = {"images": images, "labels": labels, "weights": weights.flatten(), "atoms": atoms}
            return self._set(tensors, {"method": "wmdd", "losses": steps}, train)

        passes = sum(len(number) for number, _ in wmdd.passes(len(classes), config))
        cost = 3 * passes * config.iterations * forward_flops(setup.network, setup.size)
        settings = {"method": "wmdd", "config": asdict(config), "size": setup.size, "seed": seed}
        what = f"WMDD, {setup.run_on}, IPC {config.ipc}"
        return self.stage("distill", settings, (stats, teacher), build, cost, what, teacher, stats)

    def random(self, setup: Setup, seed: int) -> Stage:
        """Random real images, chosen anew for every seed: the honest baseline."""
        train, ipc = self.data(setup.dataset, "train"), setup.distill["ipc"]

        def build(work: Path) -> Product:
            check_ipc(train, ipc)
            g = rng(seed, "random")
            rows = [train.class_indices(k) for k in range(len(train.classes))]
            chosen = torch.cat([r[torch.randperm(len(r), generator=g)[:ipc]] for r in rows])
            if isinstance(train, Stream):
                pixels = torch.cat([p for p, _, _ in train.batches(chosen, 256, setup.size, "center", 0, 0)])
            else:
                pixels = train.center(setup.size, chosen, shorter=setup.shorter)
            labels = train.labels.cpu()[chosen]
            return self._set({"images": pixels.cpu().float() / 255, "labels": labels}, {"method": "random"}, train)

        settings = {"method": "random", "ipc": ipc, "size": setup.size, "shorter": setup.shorter, "seed": seed}
        what = f"random real images, {setup.run_on}, IPC {ipc}, seed {seed}"
        return self.stage("distill", settings, (train.fingerprint,), build, 0.0, what)

    def _set(self, tensors: dict[str, Tensor], meta: dict, train: Dataset | Stream) -> Product:
        ipc = len(tensors["labels"]) // len(train.classes)
        show = torch.cat(
            [torch.arange(k * ipc, k * ipc + min(ipc, PREVIEW_PER_CLASS)) for k in range(min(10, len(train.classes)))]
        )
        preview = grid(tensors["images"][show], min(ipc, PREVIEW_PER_CLASS))
        meta |= {"classes": list(train.classes), "mean": list(train.mean), "std": list(train.std)}
        meta["bytes"] = tensors["images"].numel()  # stored as uint8
        return Product(tensors, meta, {"preview.png": preview})

    def as_data(self, stage: Stage) -> tuple[Dataset, Tensor | None]:
        """A distilled set as training data: uint8 by truncation, as the released code stores it, and its weights."""
        entry = self.entry(stage)
        tensors, meta = entry.tensors(), entry.meta
        pixels = (tensors["images"].clamp(0, 1) * 255).to(torch.uint8)
        mean, std = tuple(meta["mean"]), tuple(meta["std"])
        data = Dataset(stage.what, pixels, tensors["labels"], tuple(meta["classes"]), mean, std, None, entry.key)
        return data.to(self.device), tensors.get("weights")

    def labels(self, setup: Setup, images: Stage) -> Stage:
        teacher, recipe = self.teacher(setup), setup.student

        def build(work: Path) -> Product:
            data, _ = self.as_data(images)
            logits = relabel(
                self.restored(teacher),
                data,
                recipe,
                size=setup.size,
                seed=STREAM_SEED,
                device=self.device,
                dtype=self.dtype,
                checkpoint=Checkpoint(work / "labels.safetensors"),
            )
            return Product({"logits": logits}, {"bytes": logits.numel() * 2})

        steps, batch = self._steps(setup)
        settings = {
            "recipe": stream_of(recipe),
            "stream_seed": STREAM_SEED,
            "size": setup.size,
            "precision": self.precision,
        }
        cost = steps * batch * forward_flops(setup.network, setup.size)
        return self.stage(
            "relabel", settings, (images, teacher), build, cost, f"soft labels of {images.what}", images, teacher
        )

    def student(self, setup: Setup, arch: str, images: Stage, seed: int) -> Stage:
        """One student after its last epoch.  labels="recomputed" asks the teacher at every step and stores nothing."""
        recipe, test = setup.student, self.data(setup.dataset, "test")
        network = setup.network if arch == "ResNet-18" else ARCHITECTURES[arch]  # Tiny-ImageNet has a stem of its own
        soft, stored = recipe.labels == "soft", setup.labels == "stored"
        needs = [images] + ([self.labels(setup, images) if stored else self.teacher(setup)] if soft else [])

        def build(work: Path) -> Product:
            data, weights = self.as_data(images)
            source = None
            if soft:
                source = (
                    Stored(self.entry(needs[1]).tensors()["logits"])
                    if stored
                    else Online(self.restored(needs[1]), self.dtype)
                )
            losses: list = []
            net = networks.make(network, classes=len(data.classes), size=setup.size, generator=rng(seed, "student"))
            net = fit(
                net,
                data,
                recipe,
                size=setup.size,
                seed=STREAM_SEED if soft else seed,
                device=self.device,
                dtype=self.dtype,
                soft=source,
                weights=weights if soft else None,
                checkpoint=Checkpoint(work / "state.safetensors"),
                on_epoch=lambda epoch, _, loss: losses.append([epoch, loss]),
                description=f"student {network}",
            )
            views = self.test_views(setup.dataset, setup.size, setup.shorter)
            top1 = accuracy(net, views, test.labels, data, device=self.device, dtype=self.dtype)
            return Product({}, {"accuracies": [top1], "seeds": [seed], "losses": losses[:: max(1, len(losses) // 50)]})

        steps, batch = self._steps(setup)
        settings = {
            "network": network,
            "recipe": asdict(recipe),
            "size": setup.size,
            "seed": seed,
            "precision": self.precision,
            "labels": setup.labels if soft else "hard",
        }
        cost = (3 * steps * batch + len(test)) * forward_flops(network, setup.size)
        what = f"{network} student, seed {seed}, {recipe.labels} labels, {images.what}"
        return self.stage("evaluate", settings, (*needs, test.fingerprint), build, cost, what, *needs)

    def run_on(self, setup: Setup | MatchingSetup) -> str:
        """What a number was made with, to be said beside it."""
        return matching_stages.run_on(self, setup) if isinstance(setup, MatchingSetup) else setup.run_on

    def students(self, cell: Cell, setup: Setup | MatchingSetup, seeds: tuple[int, ...]) -> list[Stage]:
        """The last stages of a cell: their results hold one accuracy for each seed."""
        if isinstance(setup, MatchingSetup):
            return matching_stages.students(self, cell, setup, seeds)
        makers = {"wmdd": lambda seed: self.wmdd(setup), "random": lambda seed: self.random(setup, seed)}
        return [self.student(setup, cell.arch, makers[cell.algorithm](seed), seed) for seed in seeds]

    def _steps(self, setup: Setup) -> tuple[int, int]:
        images = setup.distill["ipc"] * len(self.data(setup.dataset, "train").classes)
        recipe = setup.student
        return recipe.epochs * steps_per_epoch(images, recipe.batch), min(recipe.batch, images)


def stream_of(recipe: Recipe) -> dict:
    """The fields of a recipe that decide which views a stream has: students that differ in others share its labels."""
    return {
        f.name: getattr(recipe, f.name)
        for f in fields(recipe)
        if f.name in ("epochs", "batch", "crop", "flip", "cutmix")
    }


def check_ipc(data: Dataset | Stream, ipc: int) -> None:
    """ValueError for a class with fewer real images than `ipc`."""
    counts = torch.bincount(data.labels.cpu(), minlength=len(data.classes))
    if int(counts.min()) < ipc:
        k = int(counts.argmin())
        raise ValueError(
            f"ipc={ipc} is more than the {int(counts[k])} images of class {data.classes[k]!r} of {data.name}"
        )


@functools.cache
def forward_flops(network: str, size: int) -> float:
    """Floating-point operations of one image's forward pass (two per multiply-add), counted on a real network."""
    net = networks.make(network, classes=10, size=size, generator=rng(0)).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, size, size))
    return float(counter.get_total_flops())
