"""Distilled sets that are committed with the tables of a paper: papers that test its sets (`sets_of`) read them.

A set serves a cell whose distillation has the settings that its file names, those of its teacher among them, on a data
set of the same classes and normalisation (for a whitened one: on the same images). The stage that reads it is named by
its content, so a set that a run distils itself is another one.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from common import matching
from common.distilled_set import DistilledSet, read
from common.store import Product
from papers.cells import ROOT

if TYPE_CHECKING:
    from papers.stages import Lab, Stage

__all__ = ["SET", "alike", "found", "named", "origin", "stage"]

TABLES = ROOT.parent / "tables"
HOW = {"precision", "compile", "memory", "in_flight", "chunk"}  # of a config: how a set is computed, not which
SET = "committed set"  # in the settings of a stage that reads one: its fingerprint
RECORD = ("seconds", "finished", "made", "run_on")  # what a result says of the distillation


def found(
    folder: str, on: matching.Task, settings: Mapping, pixels: bool = False
) -> tuple[Path, DistilledSet] | None:
    """The committed set that was distilled with these settings, or None.

    folder: <paper>/<scale>.  settings: those of the distill stage (`named`).  pixels: the images are wanted as pixels,
    whatever normalisation they were made under.  ValueError for a file that cannot be read.
    """
    for path, own in _sets(TABLES / folder / "sets"):
        fits = own.classes == on.train.classes and own.whitening is None if pixels else _fits(own, on)
        if fits and alike(own.settings, settings):
            return path, own
    return None


def named(stage: Stage) -> dict:
    """The settings of a distill stage, and of the teacher that it asks."""
    teachers = [needed.settings for needed in stage.all() if needed.name == "teacher"]
    return stage.settings | ({"teacher": teachers[0]} if teachers else {})


def alike(made: Mapping, settings: Mapping) -> bool:
    """Whether a set whose file says `made` is the one that a distill stage with `settings` would make."""

    def which(value: object) -> object:
        value = json.loads(json.dumps(value))  # as it comes from a file: tuples are lists
        return {k: v for k, v in value.items() if k not in HOW} if isinstance(value, dict) else value

    recorded = all(name in made for name in (*RECORD, "config"))
    return recorded and all(name in made and which(made[name]) == which(value) for name, value in settings.items())


def stage(lab: Lab, path: Path, own: DistilledSet, on: matching.Task, what: str) -> Stage:
    """The stage that reads a set in the place of the one that distils it."""
    return lab.stage("distill", {SET: own.fingerprint()}, (), lambda _: _product(path, own, on), 0.0, what)


def _product(path: Path, own: DistilledSet, on: matching.Task) -> Product:
    """A set as a distill stage leaves it, images as network input; meta["set"]: file and origin."""
    tensors = {"images": on.inputs(own.images.to(on.device)).cpu().contiguous(), "labels": own.labels}
    tensors |= {"soft_labels": own.soft_labels} if own.soft_labels is not None else {}
    tensors |= {"lr": torch.tensor(own.student_lr)} if own.student_lr is not None else {}
    told = {"set": _name(path), "precision": own.settings["config"].get("precision", "")}
    told |= {name: own.settings[name] for name in RECORD}
    return Product(tensors, {"set": told, **matching.size_of(tensors)}, {"preview.png": matching.preview(on, tensors)})


def origin(meta: Mapping) -> Mapping:
    """When, where and in how many seconds the product of a stage was made; for a committed set, distilled."""
    return meta.get("set") or {name: meta[name] for name in ("seconds", "finished", "made")}


def _name(path: Path) -> str:
    """A file of the project, as it is called on every machine."""
    return path.relative_to(TABLES.parent).as_posix()


def _fits(own: DistilledSet, on: matching.Task) -> bool:
    """Whether networks see the images as they did when the set was made."""
    train = on.train
    same = (own.classes, own.mean, own.std) == (train.classes, tuple(train.mean), tuple(train.std))
    return same and (own.whitening is None or own.whitening["fitted_on"] == train.fingerprint)


@functools.cache
def _sets(folder: Path) -> list[tuple[Path, DistilledSet]]:
    sets = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            sets.append((path, read(path)))
        except (OSError, ValueError) as error:
            said = str(error).replace(str(path), _name(path))
            raise ValueError(f"{said}; committed=false distils without it") from error
    return sets
