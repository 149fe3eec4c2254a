"""What engine=ray costs and gains: seconds a stage beyond the stage itself, the driver's time for a grid, scaling.

    python benchmarks/cluster.py
    python benchmarks/cluster.py only=grid stages=2000 workers=4
    python benchmarks/cluster.py only=scaling repeats=3

1. Real stages (random images of digits, milliseconds each), one after the other in this process and then by one warm
   worker, each in a fresh store: the difference is what Ray, the driver and planning again in the worker cost.
2. The plan of `paper=matching` with so many seeds that it has the wanted number of stages, each with its true key and
   dependencies, handed to workers that do nothing: time to plan, to hand out, and until the last is done.
3. Whole runs of some cells at scale=smoke, each a process of its own with a fresh store and one thread a stage, with
   engine=local and with 1, 2 and 4 workers, in turn: seconds from the command to its end, the start of Ray and the
   figures included. Kept as benchmarks/results/cluster.json and in the table there.
"""

from __future__ import annotations

import json
import os
import statistics as stats
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import speed
from common import cli
from common.hardware import hardware, made
from common.store import write_atomic
from papers import cluster, planning, runner
from papers.cells import load_paper

ROOT = Path(__file__).resolve().parent.parent
CELLS = ("table1/cifar-10/random/1", "table1/cifar-10/random/10")
SCALING = tuple(
    f"table1/cifar-10/{name}" for name in ("random/1", "random/10", "dm/1", "dm/10", "dc/1", "dsa/1", "dsa/10")
)  # about 75 s one after the other, the longest stage 17 s
ENGINES = ("engine=local", *(f"engine=ray workers={n}" for n in (1, 2, 4)))
PARTS = ("overhead", "grid", "scaling")
WARM_UP = 5  # stages that are not counted: the worker starts, imports and loads the images
REPEATED = 60


@dataclass(frozen=True)
class Options:
    only: tuple[str, ...] = field(default=PARTS, metadata={"help": "what to measure", "choices": PARTS})
    stages: int = field(default=10_000, metadata={"help": "stages of the grid, rounded down to fours", "minimum": 4})
    workers: int = field(default=2, metadata={"help": "workers for the grid", "minimum": 1})
    cells: tuple[str, ...] = field(default=SCALING, metadata={"help": "cells of matching for the scaling"})
    repeats: int = field(default=1, metadata={"help": "runs with each engine, whose median counts", "minimum": 1})
    out: str = field(default="benchmarks/results", metadata={"help": "folder of the result of the scaling"})


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
        cell = next(p for p in planning.make_plan(args, load_paper(args.paper), lab) if p.stages)
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
        planned = [p for p in planning.make_plan(args, load_paper(args.paper), lab) if p.stages]
        stages = [planning.pending(p, lab) for p in planned]
    print(f"  {sum(map(len, stages))} stages")
    with mock.patch.object(cluster, "work", nothing):
        crew = cluster.Crew(lab, args)
        with timed("until all of them are done"):
            with timed("hand out"):
                for p, missing in zip(planned, stages, strict=True):
                    crew.submit(p.cell.id, missing, cluster.is_large(p, lab))
            for _ in crew.refs:
                crew.done.get()


def scaling(folder: str, options: Options) -> dict:
    """Seconds of whole runs with each engine, and how many times faster than engine=local that is."""
    busy = speed.busy_cores()
    seconds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for turn in range(options.repeats):
        for number, engine in enumerate(ENGINES):
            place = f"{folder}/scaling-{turn}-{number}"
            command = [sys.executable, "-m", "papers.runner", "paper=matching", "scale=smoke", "device=cpu"]
            command += [f"only={','.join(options.cells)}", f"store={place}/runs", f"out={place}/tables"]
            command += engine.split()
            begun = time.perf_counter()
            run = subprocess.run(
                command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
            )
            seconds[engine].append(time.perf_counter() - begun)
            if run.returncode:
                raise RuntimeError(f"the run with {engine} failed: {run.stderr[-500:]}")
    median = {engine: stats.median(times) for engine, times in seconds.items()}
    return {
        "name": "cluster", "what": f"a run of {len(options.cells)} cells of matching at smoke; plain is engine=local",
        "cells": options.cells, "seconds": seconds, "median_seconds": median,
        "ratio_to_plain": {engine: median[ENGINES[0]] / m for engine, m in median.items()},
        "processors": cluster.own_cpus(), "busy_cores_before": busy, **made(torch.device("cpu")),
    }  # fmt: skip


def keep(found: dict, folder: Path) -> None:
    """Writes the result of the scaling and, as benchmarks/speed.py does, the table of all results."""
    write_atomic(folder / "cluster.json", (json.dumps(found, indent=1) + "\n").encode())
    results = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if "median_seconds" in p.read_text()]
    write_atomic(folder / "README.md", speed.table(results).encode())


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, prog="python benchmarks/cluster.py", description=__doc__.split("\n")[0])
    with tempfile.TemporaryDirectory() as folder:
        args = given(folder, "workers=1")
        print(f"{hardware(runner.lab_of(args).device)}, {cluster.own_cpus()} processors")
        if "overhead" in options.only:
            with cluster.connected(args):
                print(f"overhead a stage: {overhead(folder):.3f} s")
        if "grid" in options.only:
            with cluster.connected(replace(args, workers=options.workers)):
                grid(f"{folder}/grid", options)
        if "scaling" in options.only:
            found = scaling(folder, options)
            keep(found, ROOT / options.out)
            for engine, median in found["median_seconds"].items():
                print(f"  {engine:<46} {median:7.2f} s   {found['ratio_to_plain'][engine]:5.2f}x", flush=True)


if __name__ == "__main__":
    sys.exit(cli.guard(main, sys.argv[1:]))
