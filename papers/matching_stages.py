"""The stages behind a cell of the matching methods: experts -> distill -> students, each kept in the store."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from common import matching
from common.protocols import PROTOCOLS, Protocol
from common.store import Product
from methods import dc, dm, dsa, mtt
from papers.plan import Cell, merged

if TYPE_CHECKING:
    from papers.stages import Lab, Stage

__all__ = ["ALGORITHMS", "MatchingSetup", "images", "matching_setup", "setting_of", "students"]

RANDOM = "random-subset"  # real images drawn at random, tested by a protocol of the matching papers
ALGORITHMS: dict[str, ModuleType | None] = {
    RANDOM: None, "dc": dc, "dsa": dsa, "dm": dm, "mtt": mtt, "ftd": mtt, "att": mtt, "datm": mtt,
}  # fmt: skip
OWN_PROTOCOL = {
    RANDOM: "dsa-2021", "dc": "dc-2021", "dsa": "dsa-2021", "dm": "dm-2023", "mtt": "mtt-2022", "ftd": "mtt-2022",
    "att": "mtt-2022", "datm": "datm-2024",
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

    def facts(self) -> dict:
        """The settings part of a result file."""
        return {
            "size": self.size, "network": self.network, "distill": dict(self.distill),
            "protocol": asdict(self.protocol),
        }  # fmt: skip


def matching_setup(scale: Mapping, cell: Cell) -> MatchingSetup | None:
    """The settings of `cell`: the published ones, then the scale's, then its own.  None: not in this scale."""
    data = scale["data"].get(cell.dataset)
    if data is None or cell.ipc in data.get("leave_out", ()):
        return None
    by_ipc, by_method = data.get("by_ipc", {}).get(cell.ipc, {}), scale.get("methods", {}).get(cell.algorithm, {})
    layers = [scale, data, by_ipc, by_method, by_method.get("by_ipc", {}).get(cell.ipc, {})]
    distill = merged(_published(cell, data["dataset"]), *(x.get("distill") for x in layers), cell.distill)
    student = merged(*(x.get("student") for x in layers), cell.student)
    protocol = replace(PROTOCOLS[OWN_PROTOCOL[cell.algorithm]], **student)
    size = data.get("size", 0)
    network = scale.get("networks", {}).get(cell.arch, "")
    return MatchingSetup(data["dataset"], size, network, data["run_on"], protocol, distill | {"ipc": cell.ipc})


def _published(cell: Cell, dataset: str) -> dict:
    method = ALGORITHMS[cell.algorithm]
    if method is None:
        return {}
    if method is mtt:
        row = mtt.TABLES[cell.algorithm].get((dataset, cell.ipc))
        return merged({"zca": mtt.Config.zca}, mtt.METHODS[cell.algorithm], row)
    return merged(*(method.PUBLISHED.get((dataset, ipc)) for ipc in (None, cell.ipc)))


@functools.cache
def _setting(lab: Lab, dataset: str, size: int, network: str, zca: bool) -> matching.Setting:
    return matching.setting(
        dataset, lab.root, device=lab.device, size=size, network=network, zca=zca, store=lab.store
    )


def setting_of(lab: Lab, setup: MatchingSetup) -> matching.Setting:
    return _setting(lab, setup.dataset, setup.size, setup.network, bool(setup.distill.get("zca", False)))


def _config(lab: Lab, setup: MatchingSetup, algorithm: str):
    fast = lab.precision == "bf16"
    return ALGORITHMS[algorithm].Config(**{"precision": "mixed" if fast else "fp32", **setup.distill})


def images(lab: Lab, setup: MatchingSetup, algorithm: str, seed: int) -> Stage:
    """The distill stage: a set in network-input space."""
    on = setting_of(lab, setup)
    ipc, facts = setup.distill["ipc"], matching.facts(on, seed)
    what = f"{algorithm.upper()}, {setup.run_on}, IPC {ipc}"
    if algorithm == RANDOM:

        def draw(work: Path) -> Product:
            tensors = matching.random_subset(on, ipc, seed)
            return Product(tensors, matching.size_of(tensors), {"preview.png": matching.preview(on, tensors, ipc)})

        settings = {**facts, "method": RANDOM, "ipc": ipc}
        return lab.stage("distill", settings, (on.train.fingerprint,), draw, 0.0, f"random images, {setup.run_on}")
    method, config = ALGORITHMS[algorithm], _config(lab, setup, algorithm)
    needs = (_experts(lab, setup, on, config, seed),) if method is mtt else ()

    def build(work: Path) -> Product:
        arguments = [list(lab.entry(stage).tensors().values()) for stage in needs]
        return matching.distil(
            work, on, config, method.distill, method.State.restore, seed, *arguments, augmented=method is not dc
        )

    settings = {**facts, "method": method.__name__.rsplit(".", 1)[-1], "config": asdict(config)}
    inputs, cost = (on.train.fingerprint, *needs), _cost(config, method, on)
    return lab.stage("distill", settings, inputs, build, cost, what, *needs)


def _experts(lab: Lab, setup: MatchingSetup, on: matching.Setting, config, seed: int) -> Stage:
    chosen = mtt.ExpertConfig.of(config)

    def build(work: Path) -> Product:
        return matching.experts(work, on, chosen, mtt.train_experts, mtt.ExpertState.restore, seed)

    settings = {**matching.facts(on, seed), "config": asdict(chosen)}
    steps = chosen.experts * chosen.epochs * len(on.train) * (2 if chosen.rho else 1)
    what = f"{chosen.experts} experts, {setup.run_on}, {chosen.epochs} epochs"
    return lab.stage("experts", settings, (on.train.fingerprint,), build, 3.0 * steps * on.flops, what)


def students(lab: Lab, cell: Cell, setup: MatchingSetup, seeds: tuple[int, ...]) -> list[Stage]:
    """The students of a cell: side by side on one distilled set, or one on each random subset."""
    if cell.algorithm == RANDOM:
        return [_students(lab, setup, images(lab, setup, RANDOM, seed), (seed,)) for seed in seeds]
    return [_students(lab, setup, images(lab, setup, cell.algorithm, 0), seeds)]


def _students(lab: Lab, setup: MatchingSetup, made: Stage, seeds: tuple[int, ...]) -> Stage:
    on, protocol = setting_of(lab, setup), setup.protocol

    def build(work: Path) -> Product:
        return matching.students(work, on, lab.entry(made).tensors(), protocol, seeds)

    settings = {**matching.facts(on, 0), "protocol": asdict(protocol), "seeds": list(seeds)}
    count = setup.distill["ipc"] * len(on.train.classes)
    cost = len(seeds) * (3 * (protocol.epochs + 1) * count + len(on.test)) * on.flops
    what = f"{len(seeds)} students by {protocol.name}, {made.what}"
    return lab.stage("students", settings, (made, on.test.fingerprint), build, cost, what, made)


def _cost(config, method: ModuleType, on: matching.Setting) -> float:
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
