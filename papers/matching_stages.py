"""The stages behind a cell of the matching methods: experts -> distill -> students, each kept in the store."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common import matching, teachers
from common.augment import rng
from common.hardware import autocast, compiler
from common.protocols import PROTOCOLS, Protocol
from common.scaling import epochs_for, fitted_epochs
from common.store import Product
from common.views import Recipe, normalise
from methods import coresets, dc, dm, dsa, mtt
from papers import committed, mixing_stages, selection_stages
from papers.cells import Cell, merged

if TYPE_CHECKING:
    from papers.stages import Lab, Stage

__all__ = [
    "ALGORITHMS", "MatchingSetup", "experts", "images", "matching_setup", "students", "task_of", "teacher_logits",
]  # fmt: skip

FULL = "full-data"  # all training images
UNTRAINED = "untrained"  # none: networks as students begin, a reference for what is measured on them
RANDOM = "random-subset"  # real images drawn at random, tested by a protocol of the matching papers
ALGORITHMS: dict[str, ModuleType | None] = {
    **selection_stages.SELECTIONS, FULL: None, UNTRAINED: None, RANDOM: None,
    "dc": dc, "dsa": dsa, "dm": dm, "mtt": mtt, "ftd": mtt, "att": mtt, "datm": mtt,
}  # fmt: skip
OWN_PROTOCOL = {
    FULL: "mixing-2025", UNTRAINED: "mixing-2025", RANDOM: "dsa-2021", "dc": "dc-2021", "dsa": "dsa-2021",
    "dm": "dm-2023", "mtt": "mtt-2022", "ftd": "mtt-2022", "att": "mtt-2022", "datm": "datm-2024",
    **dict.fromkeys(selection_stages.SELECTIONS, "hard-truths-hard"),
}  # fmt: skip


@dataclass(frozen=True)
class MatchingSetup:
    """What a printed data set means at a scale, for one method and number of images per class."""

    dataset: str
    size: int
    network: str
    run_on: str
    protocol: Protocol
    distill: Mapping  # fields of the method's Config: published ones, then those of the scale
    mix: Mapping = field(default_factory=dict)  # natural mixing while students train
    measure: Mapping = field(default_factory=dict)  # what is measured on students or images, and how
    teacher_network: str = ""  # whose logits are the labels of protocols that want soft ones, and who scores crops
    teacher: Recipe | None = None
    student_network: str = ""  # empty: that of the set
    transfer: tuple[str, ...] = ()  # students whose mean accuracy is the number
    times: float = 1.0  # students train that many times as long as the protocol says
    budget: float = 0.0  # or for as many views as so many passes over the training set have
    sets_in: str = ""  # <paper>/<scale> whose committed sets are read where they are those distilled here
    looks: bool = False  # students are also tested on the way, at the epochs that the scaling law is fitted to

    @property
    def sets(self) -> tuple[str, ...]:
        """The data sets it needs."""
        return (self.dataset, self.mix.get("pool", ""))

    @property
    def read_from(self) -> str:
        """<paper>/<scale> whose committed sets are looked through: that of a set of another paper names it."""
        return "{paper}/{scale}".format_map(self.distill) if "cell" in self.distill else self.sets_in

    @property
    def keeps(self) -> bool:
        """Whether the networks of its students are kept, which is part of their name in the store."""
        return bool(self.measure.keys() - {"per_class", "trajectory"})

    def facts(self, images: int = 0, total: int = 0) -> dict:
        """The settings part of a result file, for students of some of `total` images, or by default of all."""
        return {
            "size": self.size, "network": self.network, "distill": dict(self.distill),
            "protocol": asdict(self.trained_by(images, total) if total else self.on_everything), "mix": dict(self.mix),
            "measure": dict(self.measure),
            "teacher_network": self.teacher_network, "teacher": self.teacher and asdict(self.teacher),
            "student_network": self.student_network or self.network, "transfer": list(self.transfer),
            "times": self.times, "budget": self.budget,
        }  # fmt: skip

    def known(self) -> dict:
        """Those of the settings part that need no data: with a budget the epochs are not known."""
        found = self.facts() if self.distill["ipc"] is None else self.facts(1, 1)
        del found["protocol"]["source"]  # words
        if self.budget:
            del found["protocol"]["epochs"]
        return found

    def trained_by(self, images: int, total: int) -> Protocol:
        """The protocol for a set of some of `total` images, with the epochs of its students."""
        epochs = epochs_for(self.budget, total, images) if self.budget else round(self.times * self.protocol.epochs)
        return replace(self.protocol, epochs=max(1, epochs))

    @property
    def on_everything(self) -> Protocol:
        """The protocol for all training images, with the epochs that the scale gives such students."""
        return replace(self.protocol, **self.measure.get("full", {}))

    def taught_by(self, on: matching.Task) -> TeacherSetup:
        """What the teacher is trained with; ValueError where the scale names none."""
        if not self.teacher_network or self.teacher is None:
            raise ValueError(f"protocol {self.protocol.name!r} and CA2D want a teacher, and this scale names none")
        return TeacherSetup(self.dataset, self.teacher_network, on.size, self.run_on, self.teacher)


@dataclass(frozen=True)
class TeacherSetup:
    """The part of a setup that decides a teacher."""

    dataset: str
    network: str
    size: int
    run_on: str
    teacher: Recipe
    shorter: int | None = None



def matching_setup(scale: Mapping, cell: Cell) -> MatchingSetup | None:
    """The settings of `cell`: the published ones, then the scale's, then its own.  None: not in this scale."""
    data = scale["data"].get(cell.dataset)
    if data is None or data.get("streamed") or cell.ipc in data.get("leave_out", ()):
        return None  # a stream: images are matched in memory
    by_ipc, by_method = data.get("by_ipc", {}).get(cell.ipc, {}), scale.get("methods", {}).get(cell.algorithm, {})
    layers = [scale, data, by_ipc, by_method, by_method.get("by_ipc", {}).get(cell.ipc, {})]
    distill = merged(_published(cell, data["dataset"]), *(x.get("distill") for x in layers), cell.distill)
    student = merged(*(x.get("student") for x in layers), cell.student)
    length = {k: student.pop(k) for k in ("times", "budget") if k in student}
    name = cell.protocol or OWN_PROTOCOL[cell.algorithm]
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r} is unknown; allowed: {', '.join(PROTOCOLS)}")
    protocol = replace(PROTOCOLS[name], **student)
    size = data.get("size", 0)
    network = merged(scale.get("networks"), data.get("networks")).get("ConvNet", "")  # what the sets are made with
    mix = {k: data.get("pools", {}).get(v, v) if k == "pool" else v for k, v in cell.mix.items()}
    others = scale.get("teachers", {})
    if cell.teacher and cell.teacher not in others:
        raise ValueError(f"teacher {cell.teacher!r} is unknown at this scale; allowed: {', '.join(others) or 'none'}")
    taught = merged(scale.get("teacher"), data.get("teacher"), others.get(cell.teacher))
    teacher_network = taught.pop("network", "")
    base = teachers.RECIPES[taught.pop("recipe", "cifar")]
    students_of, student_network = scale.get("transfer", {}), ""
    if cell.arch != "ConvNet" and cell.arch not in students_of:
        return None
    transfer = students_of.get(cell.arch, "")
    if isinstance(transfer, str):
        transfer, student_network = (), transfer
    return MatchingSetup(
        data["dataset"], size, network, data["run_on"], protocol, distill | {"ipc": cell.ipc}, mix,
        merged(scale.get("measure"), cell.measure), teacher_network,
        replace(base, **taught) if teacher_network else None, student_network, tuple(transfer),
        sets_in=scale.get("sets_in", ""), **length,
    )  # fmt: skip


def _published(cell: Cell, dataset: str) -> dict:
    method = ALGORITHMS[cell.algorithm]
    if method is None:
        return {}
    if method is coresets:
        return coresets.published(dataset, cell.distill["method"], "convnet")
    if method is mtt:
        row = mtt.TABLES[cell.algorithm].get((dataset, cell.ipc))
        return merged({"zca": mtt.Config.zca}, mtt.METHODS[cell.algorithm], row)
    return merged(*(method.PUBLISHED.get((dataset, ipc)) for ipc in (None, cell.ipc)))


@functools.cache
def _task(lab: Lab, dataset: str, size: int, network: str, zca: bool) -> matching.Task:
    return matching.task(
        dataset, lab.root, device=lab.device, size=size, network=network, zca=zca, store=lab.store
    )


def task_of(lab: Lab, setup: MatchingSetup) -> matching.Task:
    return _task(lab, setup.dataset, setup.size, setup.network, bool(setup.distill.get("zca", False)))


def _config(lab: Lab, setup: MatchingSetup, algorithm: str):
    """The settings of a distillation; a long one is compiled where the students of such a set are."""
    method = ALGORITHMS[algorithm]
    config = method.Config(**{"precision": "mixed" if lab.precision == "bf16" else "fp32", **setup.distill})
    if "compile" not in setup.distill:
        return replace(config, compile=lab.arithmetic(_cost(config, method, task_of(lab, setup)))["compile"])
    return config if lab.device.type != "cpu" or compiler() else replace(config, compile=False)


def images(lab: Lab, setup: MatchingSetup, algorithm: str, seed: int) -> Stage:
    """The distill stage: a set in network-input space."""
    on = task_of(lab, setup)
    ipc, facts = setup.distill["ipc"], matching.facts(on, seed)
    what = f"{algorithm.upper()}, {setup.run_on}, IPC {ipc}"
    if algorithm == RANDOM:

        def draw(work: Path) -> Product:
            tensors = matching.random_subset(on, ipc, seed)
            return Product(tensors, matching.size_of(tensors), {"preview.png": matching.preview(on, tensors)})

        settings = {**facts, "method": RANDOM, "ipc": ipc}
        return lab.stage("distill", settings, (on.train.fingerprint,), draw, 0.0, f"random images, {setup.run_on}")
    if algorithm in selection_stages.SELECTIONS:
        return selection_stages.images(lab, setup, on, algorithm, seed)
    method, config = ALGORITHMS[algorithm], _config(lab, setup, algorithm)
    settings = {**facts, "method": method.__name__.rsplit(".", 1)[-1], "config": asdict(config)}
    if lab.committed and setup.sets_in and (known := committed.found(setup.sets_in, on, settings)):
        return committed.stage(lab, *known, on, what)
    needs = experts(lab, setup, on, mtt.ExpertConfig.of(config), seed) if method is mtt else ()

    def build(work: Path) -> Product:
        arguments = [[path for part in needs for path in lab.entry(part).tensors().values()]] if needs else []
        return matching.distil(
            work, on, config, method.distill, method.State.restore, seed, *arguments, augmented=method is not dc
        )

    inputs, cost = (on.train.fingerprint, *needs), _cost(config, method, on)
    return lab.stage("distill", settings, inputs, build, cost, what, *needs)


def experts(
    lab: Lab, setup: MatchingSetup, on: matching.Task, chosen: mtt.ExpertConfig, seed: int
) -> tuple[Stage, ...]:
    """Expert trajectories: a stage for each, or for the few that a GPU trains side by side."""

    def part(numbers: range) -> Stage:
        def build(work: Path) -> Product:
            return matching.experts(work, on, chosen, mtt.train_experts, mtt.ExpertState.restore, seed, numbers)

        alike = {k: v for k, v in asdict(chosen).items() if k != "experts"}  # what an expert of any number is made by
        settings = {**matching.facts(on, seed), "config": alike, "numbers": list(numbers)}
        steps = len(numbers) * chosen.epochs * len(on.train) * (2 if chosen.rho else 1)
        named = f"expert {numbers[0]}" if len(numbers) == 1 else f"experts {numbers[0]} to {numbers[-1]}"
        what = f"{named}, {setup.run_on}, {chosen.epochs} epochs"
        return lab.stage("experts", settings, (on.train.fingerprint,), build, 3.0 * steps * on.flops, what)

    return tuple(part(numbers) for numbers in _together(lab, setup, range(chosen.experts)))


def students(lab: Lab, cell: Cell, setup: MatchingSetup, seeds: tuple[int, ...]) -> list[Stage]:
    """The students of a cell, each a stage, or the few that a GPU trains side by side; a random subset has one each."""
    if setup.transfer:
        each = [students(lab, cell, replace(setup, student_network=n, transfer=()), seeds) for n in setup.transfer]
        return [_mean(lab, same) for same in zip(*each, strict=True)]
    if cell.algorithm == FULL:
        return [full_data(lab, setup, few) for few in _together(lab, setup, seeds)]
    if cell.algorithm == UNTRAINED:
        return [_untrained(lab, setup, seeds)]
    if cell.algorithm == RANDOM:
        return [_students(lab, setup, images(lab, setup, RANDOM, seed), (seed,)) for seed in seeds]
    made = images(lab, setup, cell.algorithm, 0)
    return [_students(lab, setup, made, few) for few in _together(lab, setup, seeds)]


def _together(lab: Lab, setup: MatchingSetup, numbers: Sequence[int]) -> list[Sequence[int]]:
    """Seeds or experts, divided into those that are one stage."""
    group = matching.side_by_side(lab.device, task_of(lab, setup).size)
    return [numbers[first : first + group] for first in range(0, len(numbers), group)]


def tested_on(lab: Lab, setup: MatchingSetup) -> matching.Task:
    """The task with the network of the students."""
    on = task_of(lab, setup)
    return replace(on, network=setup.student_network) if setup.student_network else on


def _students(lab: Lab, setup: MatchingSetup, made: Stage, seeds: Sequence[int]) -> Stage:
    on = task_of(lab, setup)
    count = setup.distill["ipc"] * len(on.train.classes)
    protocol = setup.trained_by(count, len(on.train))
    looks, on = fitted_epochs(protocol.passes) if setup.looks else (), tested_on(lab, setup)
    soft = protocol.labels in ("kl", "online")  # what the teacher says, whatever labels the set brings
    needs = (made, lab.teacher(setup.taught_by(on))) if soft else (made,)
    views, tests = protocol.passes * count, (1 + len(looks)) * len(on.test)
    cost = ((4 if protocol.labels == "online" else 3) * views + tests) * on.flops  # of one student
    arithmetic = lab.arithmetic(cost)

    def build(work: Path) -> Product:
        tensors, teacher = lab.entry(made).tensors(), None
        if soft:
            teacher = _teacher(lab, setup, on, arithmetic["dtype"] if protocol.labels == "online" else torch.float32)
        if soft and protocol.labels != "online":
            tensors["soft_labels"] = torch.cat([teacher(x) for x in matching.tested_images(tensors).split(100)])
            teacher = None
        mix = mixing_stages.mixture(lab, setup, on, tensors) if setup.mix else None
        made_by = matching.students(
            work, on, tensors, protocol, seeds, mix=mix, teacher=teacher, keep=setup.keeps, looks=looks, **arithmetic
        )
        return replace(made_by, meta={**made_by.meta, "label_bytes": matching.size_of(tensors)["label_bytes"]})

    settings = {**matching.facts(on, 0), "protocol": protocol.settings(), "seeds": list(seeds)}
    settings |= {"mix": dict(setup.mix)} if setup.mix else {}
    settings |= {"kept": True} if setup.keeps else {}
    settings |= {"looks": looks} if looks else {}
    settings |= {"precision": "bf16"} if arithmetic["compile"] else {}
    inputs = (*needs, on.test.fingerprint, *mixing_stages.pool_inputs(lab, setup, on))
    what = f"{_seeds(seeds)} by {protocol.name}{', mixed' if setup.mix else ''}, {made.what}"
    return lab.stage("students", settings, inputs, build, len(seeds) * cost, what, *needs)


def _seeds(seeds: Sequence[int]) -> str:
    return f"student of seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} students"


def teacher_logits(lab: Lab, setup: MatchingSetup, on: matching.Task, pixels: Tensor) -> Tensor:
    """What the teacher says of images as they are: uint8 [N, C, H, W] -> float32 [N, K], on the CPU."""
    teacher = _teacher(lab, setup, on)
    return torch.cat([teacher(on.prepare(x)).cpu() for x in pixels.split(500)])


def _teacher(
    lab: Lab, setup: MatchingSetup, on: matching.Task, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor], Tensor]:
    """The teacher on a student's input: back to pixels, and on by the teacher's own normalisation."""
    net, data = lab.restored(lab.teacher(setup.taught_by(on))), lab.data(setup.dataset, "train")

    @torch.no_grad()
    def logits(x: Tensor) -> Tensor:
        seen = normalise(on.pixels(x.to(on.device)) * 255, data.mean, data.std)
        with autocast(on.device, dtype):
            return net(seen).float()

    return logits


def _mean(lab: Lab, each: tuple[Stage, ...]) -> Stage:
    """The mean accuracy of students of several networks, seed by seed."""

    def build(work: Path) -> Product:
        found = [lab.entry(stage).meta for stage in each]
        means = [sum(values) / len(values) for values in zip(*(m["accuracies"] for m in found), strict=True)]
        return Product({}, {"accuracies": means, "seeds": found[0]["seeds"]})

    return lab.stage("mean", {}, each, build, 0.0, f"mean of {len(each)} networks, {each[0].what}", *each)


def full_data(lab: Lab, setup: MatchingSetup, seeds: Sequence[int]) -> Stage:
    """Students on all training images, for the epochs that the scale gives them."""
    on, protocol = tested_on(lab, setup), setup.on_everything
    cost = (3 * protocol.passes * len(on.train) + len(on.test)) * on.flops  # of one student
    arithmetic = lab.arithmetic(cost)

    def build(work: Path) -> Product:
        tensors = {"images": on.prepare(on.train.images), "labels": on.train.labels}
        return matching.students(work, on, tensors, protocol, seeds, keep=True, **arithmetic)

    settings = {**matching.facts(on, 0), "protocol": protocol.settings(), "seeds": list(seeds), "kept": True}
    settings |= {"precision": "bf16"} if arithmetic["compile"] else {}
    what = f"{_seeds(seeds)} by {protocol.name}, all of {setup.run_on}, {protocol.epochs} epochs"
    return lab.stage("students", settings, (on.train.fingerprint, on.test.fingerprint), build, len(seeds) * cost, what)


def _untrained(lab: Lab, setup: MatchingSetup, seeds: Sequence[int]) -> Stage:
    """The networks that students of these seeds begin as, kept as those are; they have no accuracies."""
    on = tested_on(lab, setup)

    def build(work: Path) -> Product:
        begun = [on.make_network(rng(seed, "student")).state_dict() for seed in seeds]
        kept = {f"{place}/{name}": v for place, state in enumerate(begun) for name, v in state.items()}
        return Product(kept, {"seeds": list(seeds)})

    settings = {**matching.facts(on, 0), "seeds": list(seeds)}
    return lab.stage("untrained", settings, (), build, 0.0, f"untrained {on.network}")


def _cost(config, method: ModuleType, on: matching.Task) -> float:
    """Floating-point operations of a distillation: the counts that the methods' arithmetic gives, good to a fifth."""
    classes = len(on.train.classes)
    synthetic = classes * config.ipc
    if method is mtt:
        batch = min(config.batch or synthetic, synthetic)
        return 12.0 * config.iterations * config.student_steps * batch * on.flops
    real = classes * config.batch_real
    if method is dm:
        return float(config.iterations) * (real + 3 * synthetic) * on.flops
    outer, inner = config.loops
    step = 3 * real + 9 * synthetic
    return float(config.iterations) * (outer * step + (outer - 1) * inner * 3 * synthetic) * on.flops
