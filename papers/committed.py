"""Distilled sets that are committed with the tables of a paper: papers that test its sets (`sets_of`) take them.

A set stands for the stage that made it, and has its key: students trained on it before are found again.  It serves
where its file says the same method and settings, its classes and whitening are those of the data at hand, and a result
file of the paper names the stage.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from common import matching
from common.distilled_set import DistilledSet, read
from common.store import Product
from papers.plan import ROOT

__all__ = ["found", "taken"]

TABLES = ROOT.parent / "tables"
HOW = {"precision", "compile", "memory", "in_flight", "chunk"}  # of a config: how a set is computed, not which


def found(folder: str, on: matching.Setting, settings: Mapping) -> tuple[str, Callable[[Path], Product]] | None:
    """(key, build) of the committed set that has these settings, or None.

    folder: <paper>/<scale>.  settings: those of a distill stage.  ValueError for a file that cannot be read.
    """
    stages = _stages(TABLES / folder / "cells")
    for path, facts in _facts(TABLES / folder / "sets"):
        stage = stages.get(facts["settings"].get("stage"))
        if stage and _fits(facts, on) and _same(facts["settings"], settings):
            return stage["key"], lambda work, path=path, stage=stage: _product(path, on, stage)
    return None


def taken(sets: int) -> str:
    """What a run says of the sets that it takes."""
    return f"{sets} distilled set{'s' * (sets > 1)} taken as committed with the tables; committed=false distils anew"


def _fits(facts: Mapping, on: matching.Setting) -> bool:
    """Whether networks see the images as they did when the set was made."""
    whitening = facts["whitening"]
    known = whitening is None or whitening["fitted_on"] == on.train.fingerprint
    return known and tuple(facts["classes"]) == on.train.classes


def _same(made: Mapping, settings: Mapping) -> bool:
    def which(config: Mapping) -> dict:
        return {k: v for k, v in config.items() if k not in HOW}

    facts = all(made.get(name) == value for name, value in settings.items() if name != "config")
    return facts and which(made.get("config", {})) == which(settings["config"])


@functools.cache
def _facts(folder: Path) -> list[tuple[Path, dict]]:
    """What every set of a folder says of itself, from the heads of the files."""
    heads = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                heads.append((path, json.loads(file.metadata()["facts"])))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{_name(path)} cannot be read: {error}; committed=false distils without it") from error
    return heads


@functools.cache
def _stages(folder: Path) -> dict[str, dict]:
    """The distill stages that the result files of a paper name, by key."""
    results = [json.loads(path.read_bytes()) for path in sorted(folder.glob("*.json"))]
    peak = "peak_memory_bytes"
    return {s["key"]: {**s, peak: r[peak]} for r in results for s in r["stages"] if s["stage"] == "distill"}


def _product(path: Path, on: matching.Setting, stage: Mapping) -> Product:
    try:
        own = read(path)
    except ValueError as error:
        said = str(error).replace(str(path), _name(path))
        raise ValueError(f"{said}; committed=false distils without it") from error
    tensors = _inputs(own, on)
    told = {k: stage[k] for k in ("made", "seconds", "finished", "peak_memory_bytes")}
    told |= {"set": _name(path), "settings": own.settings, "inputs": [], "resumed": False}
    return Product(tensors, {**matching.size_of(tensors), **told}, {"preview.png": matching.preview(on, tensors)})


def _name(path: Path) -> str:
    """A file of the project, as it is called on every machine."""
    return path.relative_to(TABLES.parent).as_posix()


def _inputs(own: DistilledSet, on: matching.Setting) -> dict[str, Tensor]:
    """A set as the distill stage kept it: images as network input."""
    images = on.inputs(own.images.to(on.device)).cpu().contiguous()
    tensors = {"images": images, "labels": own.labels, "soft_labels": own.soft_labels, "weights": own.weights}
    tensors["lr"] = None if own.student_lr is None else Tensor([own.student_lr])[0]
    return {name: t for name, t in tensors.items() if t is not None}
