"""Which cells a paper has, what each needs, what is cached or missing, and what it will cost.

A cell is one number of one table or figure.  `paper.yaml` lists cells as products (`ipc: [1, 10]` makes two) and says,
for each scale, what stands in for each printed data set and which settings it runs with.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from papers.report import RANDOM

__all__ = ["SCALES", "Cell", "Paper", "load_paper", "merged", "papers", "select"]

SCALES = ("smoke", "small", "paper")
ROOT = Path(__file__).resolve().parent
NEEDED = ("comparable", "seeds", "why_missing", "data")  # in every scale
WORDS = {"table", "dataset", "method", "setting", "arch", "label_regime", "metric", "protocol", "teacher"}
PRODUCT = ("dataset", "method", "setting", "arch", "ipc", "label_regime", "metric")


@dataclass(frozen=True)
class Cell:
    """One number: where it stands, and the settings that differ from those of its scale."""

    table: str
    dataset: str
    method: str
    arch: str
    ipc: int | None  # None: all training images
    setting: str = ""
    metric: str = "accuracy"
    label_regime: str = "soft"
    algorithm: str = "wmdd"
    distill: Mapping = field(default_factory=dict)
    student: Mapping = field(default_factory=dict)
    protocol: str = ""  # how the students of a matching method are trained; empty: by its own
    mix: Mapping = field(default_factory=dict)  # fields of methods/natural_mixing.py, and `pool`
    # Of students of the matching protocols: `images`, `severities`, `full` and `pgd` (steps, step_size on the scale of
    # [0, 1] pixels, start, restarts: options of common.attacks.pgd), laid over those of the scale.
    measure: Mapping = field(default_factory=dict)
    # Architecture that the images were made with, where it is not the scale's or the student's; for students of the
    # matching protocols, the name of another teacher among the scale's `teachers`.
    teacher: str = ""

    @property
    def id(self) -> str:
        """E.g. table1/imagenette/wmdd/resnet-18/10/soft: names its result file, and what only= and skip= match."""
        method = "random" if self.method == RANDOM else self.method
        metric = "" if self.metric == "accuracy" else self.metric
        ipc = str(self.ipc or "all")
        parts = (self.table, self.dataset, method, self.setting, self.arch, ipc, self.label_regime, metric)
        return "/".join(slug(p) for p in parts if p)

    def key(self) -> dict:
        """The columns that join it with the printed number."""
        return {
            name: getattr(self, name) for name in ("table", "dataset", "method", "setting", "arch", "ipc", "metric")
        }


@dataclass(frozen=True)
class Paper:
    """`paper.yaml` as read: title, scales, cells, table layouts, figures."""

    name: str
    title: str
    scales: Mapping
    cells: tuple[Mapping, ...]
    tables: Mapping
    figures: Mapping
    not_run: Mapping = field(default_factory=dict)  # tables and figures of the print that have no place here, and why
    summaries: Mapping = field(default_factory=dict)  # tables computed of results by functions beside the figures

    def cells_at(self, scale: str) -> list[Cell]:
        """All cells of the paper in printed order; the scale may leave out or change the settings of some."""
        cells = [cell for entry in self.cells for cell in _product(entry, scale)]
        name, times = Counter(cell.id for cell in cells).most_common(1)[0]
        if times > 1:
            raise ValueError(f"papers/{self.name}/paper.yaml lists {name} {times} times")
        return cells


def papers() -> tuple[str, ...]:
    """Names of the papers that have a paper.yaml."""
    return tuple(sorted(p.parent.name for p in ROOT.glob("*/paper.yaml")))


def load_paper(name: str) -> Paper:
    """Read papers/<name>/paper.yaml; ValueError names what is wrong in it."""
    if name not in papers():
        raise ValueError(f"paper={name!r} is unknown; allowed: {', '.join(papers())}")
    path = ROOT / name / "paper.yaml"
    content = _read(path)
    for scale, facts in content["scales"].items():
        if "sets_of" in facts:  # distilled as in another paper: the same store entries serve both
            if facts["sets_of"] == name:
                raise ValueError(f"{path}, scale {scale}: sets_of names the paper itself")
            other = load_paper(facts["sets_of"]).scales[scale]
            shared = {k: merged(other.get(k), facts.get(k)) for k in ("methods", "networks")}
            shared["sets_in"] = other.get("sets_in", f"{facts['sets_of']}/{scale}")  # a folder of the tables
            content["scales"][scale] = {**facts, **shared}
    return Paper(name, **{**content, "cells": tuple(content["cells"])})


def _read(path: Path) -> dict:
    """The content of a paper.yaml whose parts have the right form; ValueError names the part that has not."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ValueError(f"{path}{f', line {mark.line + 1}' if mark else ''} cannot be read: {reason}") from error
    wanted = {"title", "scales", "cells", "tables", "figures"}
    maybe = {"not_run", "summaries"}
    if not isinstance(content, dict) or set(content) - maybe != wanted:
        keys, more = (", ".join(sorted(names)) for names in (wanted, maybe))
        raise ValueError(f"{path} must have exactly the keys {keys}, and maybe {more}")
    for part in ("scales", "tables", "figures", *maybe):
        if not isinstance(content.get(part, {}), dict):
            raise ValueError(f"{path}: {part} must be a mapping, not {content[part]!r}")
    if set(content["scales"]) != set(SCALES):
        raise ValueError(f"{path} must have exactly the scales {', '.join(SCALES)}, not {', '.join(content['scales'])}")
    for scale, facts in content["scales"].items():
        missing = [k for k in NEEDED if not isinstance(facts, dict) or k not in facts]
        if missing:
            raise ValueError(f"{path}, scale {scale}: {', '.join(missing)} must be given")
        seeds = facts["seeds"]
        if not (isinstance(seeds, list) and seeds and all(type(s) is int and s >= 0 for s in seeds)):
            raise ValueError(f"{path}, scale {scale}: seeds must be a list of whole numbers from 0, not {seeds!r}")
        if not isinstance(facts["data"], dict):
            raise ValueError(f"{path}, scale {scale}: data must be a mapping, not {facts['data']!r}")
    if not isinstance(content["cells"], list) or not content["cells"]:
        raise ValueError(f"{path}: cells must be a list with a mapping for each product of cells")
    for number, entry in enumerate(content["cells"], 1):
        if wrong := _wrong(entry):
            raise ValueError(f"{path}, cells, entry {number}: {wrong}")
    return content


def _wrong(entry: object) -> str:
    """What is wrong with an entry of `cells:`, or nothing."""
    if not isinstance(entry, dict):
        return f"a mapping of the fields of a cell is expected, not {entry!r}"
    known = {f.name: f for f in fields(Cell)}
    if unknown := [k for k in entry if k not in known and k not in ("scales", "as_printed")]:
        return f"unknown field {unknown[0]!r}; allowed: {', '.join(known)}, scales, as_printed"
    if missing := [k for k, f in known.items() if f.default is f.default_factory and k not in entry]:
        return f"{missing[0]} must be given"
    for name in WORDS & entry.keys():
        for word in entry[name] if isinstance(entry[name], list) else [entry[name]]:
            if not isinstance(word, str):
                return f"{name} must be text, not {word!r}"
    for ipc in entry["ipc"] if isinstance(entry["ipc"], list) else [entry["ipc"]]:
        if ipc is not None and (type(ipc) is not int or ipc < 1):
            return f"ipc must be whole numbers from 1, or null for all images, not {ipc!r}"
    for name in ("distill", "student", "mix", "measure"):
        if not isinstance(entry.get(name, {}), dict):
            return f"{name} must be a mapping, not {entry[name]!r}"
    return ""


def _product(entry: Mapping, scale: str) -> list[Cell]:
    entry = {k: v for k, v in entry.items() if k != "scales"} if scale in entry.get("scales", SCALES) else None
    if entry is None:
        return []
    axes = {
        name: entry[name] if isinstance(entry.get(name), list) else [entry.get(name)]
        for name in PRODUCT
        if name in entry
    }
    fixed = {k: v for k, v in entry.items() if k not in axes}
    as_printed = fixed.pop("as_printed", False)  # the paper's random images are the same experiment as ours
    cells = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        own = fixed.get("algorithm")
        algorithm = own.get(chosen["method"]) if isinstance(own, Mapping) else own  # one for all, or by method
        if chosen.get("method") == "Random" and not as_printed:  # ours: a row of its own, never in the printed one
            chosen |= {"method": RANDOM}
        algorithm = algorithm or ("random" if chosen["method"] == RANDOM else "wmdd")
        cells.append(Cell(**{**chosen, **fixed, "algorithm": algorithm}))
    return cells


def select(cells: Sequence[Cell], only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[Cell]:
    """The cells that match any pattern of `only` (all without one) and none of `skip`.

    A pattern such as `table1/imagenette/10` matches an id that has its parts in this order; parts may hold * and ?.
    One that is the id of a cell matches that cell alone.
    Raises ValueError for a pattern that matches no cell.
    """
    ids = [cell.id for cell in cells]
    wanted, unwanted = ({name for p in patterns for name in _matched(ids, p)} for patterns in (only, skip))
    return [cell for cell in cells if (not only or cell.id in wanted) and cell.id not in unwanted]


def _matched(ids: Sequence[str], pattern: str) -> list[str]:
    """The ids that a pattern matches; ValueError where it matches none."""
    if pattern in ids:
        return [pattern]
    wanted = pattern.lower().replace("_", "-").strip("/").split("/")
    if not (found := [name for name in ids if _has_in_order(name.split("/"), wanted)]):
        example = ids[0] if ids else "none"
        raise ValueError(f"pattern {pattern!r} matches no cell; cells are named like {example}")
    return found


def _has_in_order(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    left = iter(parts)
    return all(any(fnmatch.fnmatchcase(part, want) for part in left) for want in wanted)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.+=-]+", "-", text.lower()).strip("-")


def merged(*layers: Mapping | None) -> dict:
    """Settings laid over each other, the later ones winning; None counts as empty."""
    out: dict = {}
    for layer in layers:
        out |= layer or {}
    return out
