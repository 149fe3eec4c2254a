"""What a printed data set means at a scale: from `paper.yaml` and the published settings to the `ImageSetup` of a cell.

Settings are laid over each other, the later ones winning: those of the method, of the scale, of its data set, of the
IPC, of the cell.  `distill:` in the yaml is meant for the paper's own method, `methods: {NAME: {distill: ...}}` for the
others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from common import teachers
from common.datasets import info
from common.protocols import LARGE_SCALE, large_scale
from common.views import Recipe
from methods import cad, coresets, nrr_dd, rded, sre2l
from papers import matching_stages
from papers.cells import Cell, merged
from papers.matching_stages import MatchingSetup

__all__ = ["ARCHITECTURES", "ImageSetup", "setup_of"]

ARCHITECTURES = {  # as printed -> common.networks
    "ResNet-18": "resnet18",
    "ResNet-50": "resnet50",
    "ResNet-101": "resnet101",
    "ViT-Tiny": "vit-tiny",
    "ViT-Small": "vit-small",
    "MobileNetV2": "mobilenet_v2",
    "EfficientNet-B0": "efficientnet_b0",
}
PUBLISHED = {
    "sre2l": sre2l.PUBLISHED, "cda": sre2l.PUBLISHED_CDA, "dwa": sre2l.PUBLISHED_DWA, "rded": rded.PUBLISHED,
    "nrr_dd": nrr_dd.PUBLISHED, "cad": cad.PUBLISHED,
}  # fmt: skip
LABELS = ("stored", "recomputed", "online", "fixed")  # where a teacher's soft labels come from
SELECTIONS = ("coreset", "cad")  # made at ImageNet scale too, as the methods of image_stages are
RELEASED = ("jpeg", "batch_statistics", "t_squared")  # of `student:`, what released code does and no recipe says
STITCHED = ("rded", "cidd", "nrr_dd")  # made of patches, which the student's view may exchange


@dataclass(frozen=True)
class ImageSetup:
    """What a printed data set means at a scale, for one number of images per class."""

    dataset: str
    size: int
    network: str  # of the teacher
    student_network: str
    run_on: str
    teacher: Recipe
    student: Recipe
    distill: Mapping  # fields of the method's Config
    regime: str = "soft"  # soft, hard, compact or boundary labels
    labels: str = "stored"  # soft ones: of each view, stored, recomputed from the seed or online (of the student's own
    # views), or one for each image, fixed
    shorter: int | None = None
    jpeg: int = 0  # quality at which the images are kept, as RDED and SRe2L do with 75; 0: without loss
    batch_statistics: bool = False  # the teacher's BatchNorm when it labels, as SRe2L's script for CIFAR has it
    t_squared: bool = False  # the loss of soft labels times T^2, as usual elsewhere

    @property
    def sets(self) -> tuple[str, ...]:
        """The data sets it needs."""
        return (self.dataset,)

    def facts(self) -> dict:
        """The settings part of a result file."""
        return {
            "size": self.size, "network": self.network, "student_network": self.student_network,
            "distill": dict(self.distill), "student": asdict(self.student), "teacher": asdict(self.teacher),
            "regime": self.regime, "labels": self.labels,
            **{name: getattr(self, name) for name in RELEASED},
        }  # fmt: skip

    def released(self) -> dict:
        """What is done as in released code where the default is another."""
        return {name: value for name in RELEASED if (value := getattr(self, name))}

    known = facts


def outdated(scale: Mapping, cell: Cell, result: Mapping) -> bool:
    """Whether a result was made with other settings than the scale has now for its cell; needs no data."""
    try:
        setup = setup_of(scale, cell)
    except (AttributeError, KeyError, TypeError, ValueError):  # settings that no method has: the plan says so
        return False
    if setup is None:
        return False
    now = json.loads(json.dumps(setup.known()))
    if cell.algorithm in ("random", "random-subset"):  # no method reads its options
        now["distill"] = {"ipc": cell.ipc}
        result = {**result, "settings": {**result["settings"], "distill": {"ipc": cell.ipc}}}
    return not _agree(now, result["settings"])


def _agree(now: Mapping, then: Mapping) -> bool:
    """Whether settings are the same.

    A field that only one side has came later, and was then what is now its default.  `distill`, `mix` and `measure`
    name only what is not a default, so there it counts.
    """
    return all(
        _agree(now[k], then[k])
        if isinstance(now[k], dict) and isinstance(then[k], dict) and k not in ("distill", "mix", "measure")
        else now[k] == then[k]
        for k in now.keys() & then.keys()
    )


def setup_of(scale: Mapping, cell: Cell) -> ImageSetup | MatchingSetup | None:
    """The settings of `cell`: the scale's, those of its data set, of its IPC, its own.  None: not in this scale."""
    data = scale["data"].get(cell.dataset) or {}
    protocol = data.get("protocols", {}).get(cell.protocol, cell.protocol)
    large = cell.algorithm in SELECTIONS and (data.get("streamed") or protocol in LARGE_SCALE)
    if cell.algorithm in matching_stages.ALGORITHMS and not large:
        return matching_stages.matching_setup(scale, cell)
    if not data or cell.ipc in data.get("leave_out", ()):
        return None
    cell = replace(cell, protocol=protocol)
    layers = [scale, data, data.get("by_ipc", {}).get(cell.ipc, {})]
    made_with = cell.teacher or scale.get("made_with") or cell.arch
    networks = merged(ARCHITECTURES, scale.get("networks"), data.get("networks"))
    size = data.get("sizes", {}).get(made_with, data["size"])
    own = data.get("teachers", {}).get(made_with)  # a recipe for this architecture
    recipe = teachers.RECIPES[data.get("teacher_recipe", "wmdd")]
    teacher = replace(recipe, **merged(*(x.get("teacher") for x in layers), own))
    distill = _distill(layers, cell, data["dataset"], networks[made_with], scale.get("method", "wmdd"))
    factor = _factor(cell.algorithm, distill, size)
    student, released = _student(scale, layers, cell, data["dataset"], networks[cell.arch], factor)
    labels = "fixed" if cell.protocol == "hard-truths-large-soft" else _labels(layers)
    if labels == "fixed" and cell.label_regime != "hard" and (student.cutmix or cell.label_regime == "boundary"):
        raise ValueError(
            f"labels='fixed' gives one label an image, which neither cutmix=True nor label_regime='boundary' can use; "
            f"allowed there: {', '.join(name for name in LABELS if name != 'fixed')}"
        )
    shorter = data.get("shorter")
    shorter = shorter.get(size) if isinstance(shorter, Mapping) else shorter  # one number, or one for each size
    return ImageSetup(
        data["dataset"],
        size,
        networks[made_with],
        networks[cell.arch],
        data["run_on"].format(size=size),
        teacher,
        student,
        distill,
        cell.label_regime,
        labels,
        shorter,
        **released,
    )


def _distill(layers: list[Mapping], cell: Cell, dataset: str, network: str, method: str) -> dict:
    algorithm = "nrr_dd" if cell.algorithm == "cidd" else cell.algorithm  # its first stage
    published = PUBLISHED.get(algorithm, {})
    rows = [published.get((dataset, ipc)) for ipc in (None, cell.ipc)]
    if algorithm == "coreset":
        rows = [coresets.published(dataset, cell.distill["method"], network)]
    if algorithm == method:
        rows += [x.get("distill") for x in layers]
    rows += [x.get("methods", {}).get(algorithm, {}).get("distill") for x in layers]
    return merged(*rows, cell.distill, {"ipc": cell.ipc})


def _factor(algorithm: str, distill: Mapping, size: int) -> int:
    """Patches along a side of an image; for methods that make none, of RDED's, whose students all then resemble."""
    if algorithm in ("cidd", "nrr_dd"):
        return nrr_dd.Config(**distill).factor(size)
    if distill.get("method") == "ca2d":
        return cad.resolved(cad.Config(**distill), size).factor
    return rded.resolved(rded.Config(**distill) if algorithm == "rded" else rded.Config(), size).factor


def _labels(layers: list[Mapping]) -> str:
    chosen = merged(*({"labels": x["labels"]} for x in layers if "labels" in x)).get("labels", "stored")
    if chosen not in LABELS:
        raise ValueError(f"labels={chosen!r} is unknown; allowed: {', '.join(LABELS)}")
    return chosen


def _student(
    scale: Mapping, layers: list[Mapping], cell: Cell, dataset: str, network: str, factor: int
) -> tuple[Recipe, dict]:
    """The student's recipe, and what of `student:` is none of a recipe."""
    base: dict = {}
    if cell.protocol:
        base = large_scale(cell.protocol, cell.ipc, info(dataset).classes)
        if cell.algorithm in STITCHED or cell.distill.get("method") == "ca2d":
            base |= {"shuffle": factor, "crop": 1 / factor}
    elif scale.get("protocol") == "rded-2024":
        base = rded.student_recipe(dataset, info(dataset).classes, network, factor, cell.ipc)
        if cell.algorithm not in STITCHED:
            base |= {"shuffle": 1}
    student = merged(base, *(x.get("student") for x in layers), cell.student)
    released = {name: student.pop(name) for name in RELEASED if name in student}
    if not 0 <= released.get("jpeg", 0) <= 100:
        raise ValueError(f"student.jpeg={released['jpeg']} is no quality; allowed: 1 to 100, 0: none")
    if cell.label_regime == "hard":
        student |= {"labels": "hard"} | ({"cutmix": False} if base else {})
    return Recipe(**student), released
