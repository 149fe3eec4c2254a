"""Trains the teachers behind some cells of a paper, each on all the processes that torchrun starts, into the store.

torchrun --nproc-per-node=8 -m papers.teacher paper=wmdd scale=paper only=table1/imagenet-1k data=/data store=runs

An ordinary run with the same store then finds them: the entries have the same names.  The first process plans, holds
the lock of an entry and writes it; the others wait for its calls to train with it.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import field, fields, make_dataclass, replace
from pathlib import Path

from common import cli, distributed, teachers
from common.store import Product
from common.views import Recipe
from papers import arguments, planning, runner
from papers.cells import load_paper, select
from papers.stages import Lab, Stage

KEYS = ("paper", "scale", "only", "skip", "device", "precision", "data", "store")  # of a run, that decide on a teacher
Args = make_dataclass(
    "Args",
    [(f.name, f.type, field(default=f.default, metadata=f.metadata)) for f in fields(arguments.Args) if f.name in KEYS],
    frozen=True,
)
DESCRIPTION = "Trains the teachers behind some cells, each on N processes, into the store that `run_all.sh` reads."


def parse(argv: list[str]) -> arguments.Args:
    """The arguments of a run, from those that decide on a teacher; UsageError names what is wrong."""
    cli.parse(Args, argv, prog="torchrun --nproc-per-node=N -m papers.teacher", description=DESCRIPTION)
    return arguments.parse(argv)


@functools.cache  # data sets stay loaded
def lab_of(args: arguments.Args) -> Lab:
    """The lab of a run, on the device of this process."""
    return runner.lab_of(replace(args, device=str(distributed.own_device(args.device))))


def teacher_stages(args: arguments.Args) -> dict[str, Stage]:
    """The teacher stages of the cells that can run, by key; ValueError where there are none."""
    lab = lab_of(args)
    planned = planning.make_plan(args, load_paper(args.paper), lab)
    stages = {lab.key(s): s for p in planned for top in p.stages for s in top.all() if s.name == "teacher"}
    if not stages:
        asked = {cell.id for cell in select([p.cell for p in planned], args.only, args.skip)}
        whys = {p.why for p in planned if p.cell.id in asked}
        reason = "the cells asked for have none" if "" in whys else "; ".join(sorted(whys))
        raise ValueError(f"no teacher to train: {reason}")
    return stages


def lead(argv: list[str]) -> None:
    """The first process: makes every teacher that is not in the store, and calls the others to each training."""
    waiting = True  # the others, for a call; not while they train

    def build(work: Path, stage: Stage) -> Product:
        nonlocal waiting
        if stage.settings["recipe"]["name"] == teachers.TORCHVISION.name:  # nothing to train together
            return stage.build(work)
        waiting = False
        distributed.from_first((args, stage.settings, stage.inputs[0]))
        product = stage.build(work)
        product.meta["processes"] = distributed.world()
        waiting = True
        return product

    try:
        args = parse(argv)
        store = lab_of(args).store
        for key, stage in teacher_stages(args).items():
            entry = store.get(stage.name, key)
            state = "made" if entry is None else "already there"
            if entry is None:
                print(f"{stage.what}: training, processes: {distributed.world()}", flush=True)
                entry = store.make(stage.name, stage.settings, stage.inputs, functools.partial(build, stage=stage))
            print(f"{stage.what}: {state}, {entry.meta['accuracy']:.2f} %, {entry.path}", flush=True)
    finally:
        if waiting:
            distributed.from_first(None)


def follow() -> None:
    """Every other process: trains when it is called, until the first one has no more to do."""
    while call := distributed.from_first(None):
        args, settings, fingerprint = call
        lab = lab_of(args)
        data = lab.data(settings["dataset"], "train")
        if data.fingerprint != fingerprint:
            raise ValueError(f"{settings['dataset']} is not the same here as where the first process runs: {data.note}")
        names = ("network", "size", "seed", "precision")
        chosen = {name: settings[name] for name in names}
        teachers.trained(data, recipe=Recipe(**settings["recipe"]), device=lab.device, **chosen)


def main(argv: list[str]) -> int:
    """Exit status 0: the teachers are in the store; 1: failed; 2: wrong usage."""
    with distributed.started():
        return cli.guard(lead if distributed.is_first() else lambda _: follow(), argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
