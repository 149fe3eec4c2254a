"""Writes the distilled sets of a run as files: `python -m papers.export paper=matching scale=smoke out=sets`.

The sets are those behind the cells that only= and skip= choose, read from the store; nothing is distilled.  Cells that
share a set have one file, named by the first of them.  What is not there is named; exit status 1 where no set is.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path

from common import cli
from common.distilled import SUFFIX, DistilledSet, write
from common.store import Entry
from papers import committed, matching_stages, planning, runner
from papers.arguments import Args, completed
from papers.cells import load_paper
from papers.matching_stages import MatchingSetup
from papers.planning import Planned
from papers.setups import ImageSetup
from papers.stages import Lab, Stage

__all__ = ["Found", "as_set", "export", "main", "parse", "wanted"]

KEYS = (  # of a run: they name sets
    "paper", "scale", "only", "skip", "seeds", "device", "precision", "data", "store", "committed",
)  # fmt: skip
DRAWN = ("random", matching_stages.RANDOM)  # algorithms with a set for each seed
PURPOSE = (
    "Writes the distilled sets of a paper as files, from the store of the runs that made them; distils nothing. "
    "scale=, device= and precision= are those of these runs."
)


@dataclass(frozen=True)
class Found:
    """A set and the cells that stand on it."""

    stage: Stage
    setup: ImageSetup | MatchingSetup
    cells: list[str]
    name: str  # of its file, without a suffix


def parse(argv: list[str]) -> tuple[Args, Path, str]:
    """(arguments of the run, folder, layout); UsageError names what is wrong and what is allowed."""
    own = [(f.name, f.type, f) for f in fields(Args) if f.name in KEYS]
    layouts = {"help": "form of the files; only safetensors holds the settings", "choices": tuple(SUFFIX)}
    own += [("out", str, field(default="sets", metadata={"help": "folder for the files"}))]
    own += [("layout", str, field(default="safetensors", metadata=layouts))]
    options = make_dataclass("Options", own, frozen=True, namespace={"__module__": __name__})
    given = cli.parse(options, argv, prog="python -m papers.export", description=PURPOSE)
    try:
        args = Args(**{name: getattr(given, name) for name in KEYS})
    except ValueError as error:
        raise cli.UsageError(str(error)) from error
    return completed(args), Path(given.out).expanduser(), given.layout


def wanted(planned: list[Planned], lab: Lab) -> dict[str, Found]:
    """The sets that the cells of a plan stand on, by the key of their stage."""
    sets: dict[str, Found] = {}
    for p in planned:
        for top in p.stages:
            chain = [stage for stage in top.all() if stage.name == "distill"]
            if not chain:  # all training images
                continue
            made = chain[-1]  # those before it are what it starts from
            seed = f"_seed{made.settings['seed']}" if p.cell.algorithm in DRAWN else ""
            found = sets.setdefault(lab.key(made), Found(made, p.setup, [], p.cell.id.replace("/", "_") + seed))
            if p.cell.id not in found.cells:
                found.cells.append(p.cell.id)
    return sets


def as_set(lab: Lab, found: Found, entry: Entry, **facts) -> DistilledSet:
    """A finished distill stage as a set in pixels that says how it was made; facts: further settings."""
    setup, tensors, meta = found.setup, entry.tensors(), entry.meta
    settings = {
        **facts, "cells": found.cells, "dataset": setup.dataset, "network": setup.network,
        **committed.named(found.stage), "run_on": lab.run_on(setup), "stage": entry.key,
        **{k: meta[k] for k in ("made", "seconds", "finished")},
    }  # fmt: skip
    if "indices" in tensors:
        settings["training_images"] = tensors["indices"].tolist()
    if isinstance(setup, MatchingSetup):  # kept as network input
        return matching_stages.task_of(lab, setup).distilled(tensors, settings)
    classes, mean, std = (tuple(meta[name]) for name in ("classes", "mean", "std"))
    images = tensors["images"]
    images = images if images.is_floating_point() else images / 255  # real ones are kept as they are
    return DistilledSet(
        images, tensors["labels"], classes, mean, std, weights=tensors.get("weights"), settings=settings
    )


def export(args: Args, out: Path, layout: str = "safetensors") -> list[Path]:
    """Write every set that is in the store, and print where; the others are named with the reason.

    RuntimeError where there is none.
    """
    lab = runner.lab_of(args)
    planned = planning.make_plan(args, load_paper(args.paper), lab)
    sets, written, lacking = wanted(planned, lab), [], defaultdict(list)
    for p in planned:
        if not p.stages and planning.told(p):
            lacking[p.why].append(p.cell.id)
    for key, found in sets.items():
        if committed.SET in found.stage.settings:
            lacking["a file of the project already, which committed=true reads"].append(found.cells[0])
            continue
        entry = lab.store.get(found.stage.name, key)
        if entry is None:
            lacking[f"not in {args.store} yet"].append(found.cells[0])
            continue
        made, path = as_set(lab, found, entry, paper=args.paper, scale=args.scale), out / (found.name + SUFFIX[layout])
        whiten = matching_stages.task_of(lab, found.setup).zca if made.whitening else None
        try:
            write(made, path, layout, whiten=whiten)
        except ValueError as error:  # what this layout has no place for
            lacking[str(error)].append(found.cells[0])
            continue
        print(path, flush=True)
        written.append(path)
    for why, cells in lacking.items():
        print(f"{why}:", *dict.fromkeys(cells), sep="\n  ")
    if not written:
        asked = f"paper={args.paper} scale={args.scale}"
        raise RuntimeError(f"no set was written; `bash run_all.sh {asked}` with the same only= and store= makes them")
    print(f"{len(written)} of {len(sets)} sets written to {out}")
    return written


def main(argv: list[str]) -> int:
    """Exit status 0: at least one set was written; 1: none; 2: wrong usage."""
    return cli.guard(lambda rest: export(*parse(rest)), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
