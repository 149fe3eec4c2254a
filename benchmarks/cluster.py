"""What engine=ray costs: seconds a stage beyond the stage itself, and the driver's time for a grid of stages.

    python benchmarks/cluster.py
    python benchmarks/cluster.py stages=2000 workers=4

1. Real stages (random images of digits, milliseconds each), one after the other in this process and then by one warm
   worker, each in a fresh store: the difference is what Ray, the driver and planning again in the worker cost.
2. The plan of `paper=matching` with so many seeds that it has the wanted number of stages, each with its true key and
   dependencies, handed to workers that do nothing: time to plan, to hand out, and until the last is done.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli
from common.hardware import hardware
from papers import cluster, runner
from papers.plan import load_paper

CELLS = ("table1/cifar-10/random/1", "table1/cifar-10/random/10")
WARM_UP = 5  # stages that are not counted: the worker starts, imports and loads the images
REPEATED = 60


@dataclass(frozen=True)
class Options:
    stages: int = field(default=10_000, metadata={"help": "stages of the grid, rounded down to fours", "minimum": 4})
    workers: int = field(default=2, metadata={"help": "workers for the grid", "minimum": 1})


@contextmanager
def timed(what: str):
    wall, own = time.perf_counter(), time.process_time()
    yield
    wall, own = time.perf_counter() - wall, time.process_time() - own
    print(f"  {what:<46} {wall:7.2f} s   ({own:.2f} s of this process's processor time)", flush=True)


def given(folder: str, *more: str) -> runner.Args:
    cells = "only=" + ",".join(CELLS)
    return runner.parse(["paper=matching", "scale=smoke", "device=cpu", "engine=ray", f"store={folder}", cells, *more])


def overhead(folder: str) -> float:
    """Seconds a stage that go beyond making it in this process."""
    spent = {}
    seeds = "seeds=" + ",".join(map(str, range(WARM_UP + REPEATED)))
    for who in ("here", "worker"):
        args = given(f"{folder}/{who}", seeds, "workers=1")
        lab = runner.lab_of(args)
        cell = next(p for p in runner.make_plan(args, load_paper(args.paper), lab) if p.stages)
        images = {lab.key(stage): stage for top in cell.stages for stage in top.needs}
        first = dict(list(images.items())[:WARM_UP])
        crew = cluster.Crew(lab, args) if who == "worker" else None
        for stages in (first, {key: stage for key, stage in images.items() if key not in first}):
            start = time.perf_counter()
            if crew is None:
                for stage in stages.values():
                    lab.entry(stage)
            else:
                crew.submit(cell.cell.id, stages, False)
                for _ in stages:
                    _, outcome = crew.next()
                    if outcome.error:
                        raise RuntimeError(outcome.error)
            spent[who] = (time.perf_counter() - start) / len(stages)
    print(f"  a stage here {spent['here']:.3f} s, by a warm worker {spent['worker']:.3f} s", flush=True)
    return spent["worker"] - spent["here"]


def nothing(args, threads, cell, key, parcels, *needs):
    return cluster.Outcome(key), None


def grid(folder: str, options: Options) -> None:
    seeds = range(options.stages // (2 * len(CELLS)))
    args = replace(given(folder), seeds=tuple(seeds), workers=options.workers)
    lab = runner.lab_of(args)
    with timed("plan: cells, stages, keys, what is missing"):
        planned = [p for p in runner.make_plan(args, load_paper(args.paper), lab) if p.stages]
        stages = [runner.pending(p, lab) for p in planned]
    print(f"  {sum(map(len, stages))} stages")
    with mock.patch.object(cluster, "work", nothing):
        crew = cluster.Crew(lab, args)
        with timed("until all of them are done"):
            with timed("hand out"):
                for p, missing in zip(planned, stages, strict=True):
                    crew.submit(p.cell.id, missing, cluster.is_large(p, lab))
            for _ in crew.refs:
                crew.done.get()


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, prog="python benchmarks/cluster.py", description=__doc__.split("\n")[0])
    with tempfile.TemporaryDirectory() as folder:
        args = given(folder, "workers=1")
        print(f"{hardware(runner.lab_of(args).device)}, {cluster.own_cpus()} processors")
        with cluster.connected(args):
            print(f"overhead a stage: {overhead(folder):.3f} s")
        args = replace(args, workers=options.workers)
        with cluster.connected(args):
            grid(f"{folder}/grid", options)


if __name__ == "__main__":
    sys.exit(cli.guard(main, sys.argv[1:]))
