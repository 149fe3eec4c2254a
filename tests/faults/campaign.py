"""Kills a run of a paper again and again, damages what it kept, and counts what came out otherwise.

    python -m tests.faults.campaign kills=100 paper=matching only=table1/cifar-10/random/convnet/1,table1/cifar-10/dm

The cells run once undisturbed: the reference. Then in rounds, each with a store of its own: the driver is started,
killed after a random time (SIGKILL, in every `term`th round SIGTERM), started again, until it finishes; between
restarts, in every `damage`th round, one finished entry is truncated, bit-flipped or loses a file. A round is held
against the reference: every cell has its result, values and stages are the same, every tensor is the same bit for bit,
and no entry that was whole and finished has been made a second time.

The times between kills are drawn from [0, 2/`dense`] of the reference run's length: about `dense` kills fall into the
length of a run, spread over all of it, however long it is. Each driver is a process of its own, forked after the
imports, so that the kills fall into the run and not into them. Counts go to the page `report=`.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from common import cli
from common.store import Checkpoint, sha256_of
from papers import runner
from tests.faults import reliability


def _arg(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


@dataclass(frozen=True)
class Options:
    """What is run and how often it is killed."""

    paper: str = _arg("matching", "paper whose cells run at smoke")
    only: tuple[str, ...] = _arg((), "cells to run; empty: all of the paper")
    seeds: tuple[int, ...] = _arg((0,), "student seeds", minimum=0)
    kills: int = _arg(100, "stop once so many kills were made", minimum=1)
    dense: float = _arg(20.0, "kills in the length of one run, about; 2 for a run of seconds", minimum=1.0)
    minutes: float = _arg(600.0, "stop starting rounds after this time", unit="minutes", minimum=0.1)
    term: int = _arg(4, "every so many rounds SIGTERM in place of SIGKILL", unit="rounds", minimum=1)
    damage: int = _arg(2, "every so many rounds entries are damaged between restarts", unit="rounds", minimum=1)
    steps: int = _arg(5, "half-done work is kept so often; 100 in use, more than smoke has", unit="steps", minimum=1)
    figures: bool = _arg(False, "draw the figures too, a third of the time of a small run")
    seed: int = _arg(0, "seed of the moments and of the damage", minimum=0)
    report: str = _arg(reliability.PAGE, "page of the counts, with a folder of its name; empty: printed only")


@dataclass
class Run:
    """What a store and its tables hold once a run has finished."""

    results: dict[str, dict]  # cell -> what must not depend on how often it was killed
    tensors: dict[str, str]  # stage/key/file -> sha256
    resumed: int = field(default=0, compare=False)  # entries that were continued from half-done work


def start(options: Options, place: Path, *more: str) -> int:
    """A driver in a process of its own, `more` its further arguments; returns its id. place/log gets what it says."""
    process = os.fork()
    if process:
        return process
    arguments = [f"paper={options.paper}", "scale=smoke", "device=cpu"]
    arguments += [f"store={place}/runs", f"out={place}/tables"]
    arguments += [f"seeds={','.join(map(str, options.seeds))}"] if options.seeds else []
    arguments += [f"only={','.join(options.only)}"] if options.only else []
    arguments += more
    keep_often(options.steps)
    if not options.figures:
        runner.draw_figures = lambda finished: []
    drive(arguments, place / "log")


def keep_often(steps: int) -> None:
    """Half-done work of this process is kept every so many steps."""
    Checkpoint.__init__.__defaults__ = (Checkpoint.__init__.__defaults__[0], steps)


def drive(arguments: list[str], log: Path, largest: int | None = None) -> NoReturn:
    """Runs papers.runner in this process and ends it with the exit status; what it says is added to `log`.

    largest: bytes that a file may have, for a disk that is full.
    """
    status = 70
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        place = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(place, 1)
        os.dup2(place, 2)
        if largest is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        status = runner.main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def finish(process: int) -> int:
    """The exit status of a process, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def ended(process: int, seconds: float) -> int | None:
    """The exit status of a process that ends within `seconds`; None for one that still runs then."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(min(left, 0.005))
    return None


def entries(place: Path) -> list[Path]:
    """The finished entries of a store, apart from those that were set aside."""
    found = (path.parent for path in (place / "runs").glob("*/*/manifest.json"))
    return sorted(path for path in found if re.fullmatch(r"[0-9a-f]{16}", path.name))


def marks(place: Path) -> dict[str, int]:
    """stage/key -> the time its entry was written, in ns."""
    return {f"{e.parent.name}/{e.name}": (e / "manifest.json").stat().st_mtime_ns for e in entries(place)}


def read(place: Path) -> Run:
    """What a finished run left: of each result the parts that a kill must not change, and all tensors."""
    results = {}
    for path in sorted((place / "tables").glob("*/smoke/cells/*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        kept = {k: result[k] for k in ("values", "seeds", "mean", "std", "best", "settings", "bytes")}
        results[result["cell"]] = {**kept, "stages": [[s["stage"], s["key"]] for s in result["stages"]]}
    files = (file for entry in entries(place) for file in entry.iterdir())
    kept = (file for file in files if file.name not in ("meta.json", "manifest.json"))  # these say when and how long
    resumed = sum(json.loads((entry / "meta.json").read_text())["resumed"] for entry in entries(place))
    return Run(results, {str(file.relative_to(place / "runs")): sha256_of(file) for file in kept}, resumed)


def remade(whole: dict[str, int], place: Path, count: Counter) -> dict[str, int]:
    """Counts what was `whole` and has been made a second time since; returns what is whole now."""
    now = marks(place)
    count["made twice"] += sum(now.get(name) != mark for name, mark in whole.items())
    return now


def harm(place: Path, chance: random.Random) -> str | None:
    """Truncates, bit-flips or removes one file of one finished entry; returns stage/key, None where there is none."""
    if not (found := entries(place)):
        return None
    entry = chance.choice(found)
    file = chance.choice(sorted(file for file in entry.iterdir() if file.stat().st_size))
    kind = chance.choice(("truncated", "flipped", "missing"))
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        os.truncate(file, chance.randrange(file.stat().st_size))
    else:
        data = bytearray(file.read_bytes())
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
    return f"{entry.parent.name}/{entry.name}"


def round_of(
    options: Options, place: Path, number: int, length: float, chance: random.Random, count: Counter
) -> None:  # fmt: skip
    """One store from empty to finished, the driver killed on the way; counts kills, starts and what was made twice."""
    sort = signal.SIGTERM if number % options.term == 0 else signal.SIGKILL
    damaging = number % options.damage == 0
    place.mkdir()
    whole: dict[str, int] = {}
    while True:
        process = start(options, place)
        count["starts"] += 1
        pause = chance.uniform(0, 2 * length / options.dense)
        status = ended(process, pause) if count["kills"] < options.kills else finish(process)
        if status is None:
            os.kill(process, sort)
            status = finish(process)
        whole = remade(whole, place, count)
        if status == -sort:
            count["kills"] += 1
            count[sort.name] += 1
        elif status == 0:
            return
        else:
            count["failed"] += 1
            print(f"round {number}: exit status {status}\n{(place / 'log').read_text()[-2000:]}", flush=True)
            return
        if damaging and (hit := harm(place, chance)):
            count["damaged"] += 1
            whole.pop(hit)  # has to be made again


def compare(reference: Run, place: Path, count: Counter) -> None:
    """Counts what a finished run lacks, what differs, and the tracebacks it has shown."""
    run = read(place)
    count["tracebacks"] += (place / "log").read_text().count("Traceback (most recent call last)")
    count["cells"] += len(run.results)
    count["tensors"] += len(run.tensors)
    count["resumed"] += run.resumed
    for kind, wanted, found in (("cells", reference.results, run.results), ("tensors", reference.tensors, run.tensors)):
        count[f"lost {kind}"] += len(wanted.keys() - found.keys())
        count[f"different {kind}"] += sum(found[name] != wanted.get(name) for name in found)


def undisturbed(options: Options, place: Path, *more: str) -> tuple[Run, float]:
    """What a run with `more` arguments leaves, and its seconds; RuntimeError where it fails."""
    place.mkdir()
    begun = time.monotonic()
    if status := finish(start(options, place, *more)):
        raise RuntimeError(f"the undisturbed run ended with status {status}: {(place / 'log').read_text()[-500:]}")
    seconds, run = time.monotonic() - begun, read(place)
    print(f"undisturbed: {len(run.results)} cells, {len(marks(place))} entries, {seconds:.1f} s", flush=True)
    return run, seconds


def campaign(options: Options) -> tuple[Counter, list[str], float]:
    """Reference, then rounds until the kills are made or the time is up; the counts, the cells, and the seconds of
    the reference."""
    begun, count, chance = time.monotonic(), Counter(), random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="campaign-") as folder:
        reference, length = undisturbed(options, Path(folder, "reference"))
        while count["kills"] < options.kills and time.monotonic() - begun < 60 * options.minutes:
            count["rounds"] += 1
            place = Path(folder, f"round-{count['rounds']}")
            round_of(options, place, count["rounds"], length, chance, count)
            compare(reference, place, count)
            count["named"] += len(re.findall(r"is damaged.*to be made again", (place / "log").read_text()))
            shutil.rmtree(place)
            print(dict(count), flush=True)
    return count, list(reference.results), length


def section(options: Options, count: Counter, cells: list[str], length: float) -> dict:
    """What the page says of a campaign."""
    signals = "The signal is SIGKILL." if not count["SIGTERM"] else f"""The signal is SIGTERM in rounds whose number is
divisible by {options.term}, else SIGKILL."""
    damage = "" if not count["damaged"] else f"""In rounds divisible by {options.damage} one finished entry of the store
was truncated, bit-flipped or lost a file after each kill, where there was one."""
    how = f"""A run of {len(cells)} cells of paper={options.paper} at scale=smoke ({length:.1f} s undisturbed) was
started, killed after random times of up to {2 * length / options.dense:.1f} s and started again until it finished, each
round in an empty store, and compared with the undisturbed run. Drivers are processes forked after the imports.
{signals} {damage} Half-done work was kept every {options.steps} steps; figures were
{"drawn" if options.figures else "left out"}."""
    return {
        "title": f"Kills of the driver{f', {len(cells)} cells' if options.only else ''}",
        "command": reliability.command("tests.faults.campaign", options),
        "how": " ".join(how.split()), "counts": {"count": {words: count[name] for name, words in ROWS.items()}},
        "cells": cells,
        "limits": "One process on one machine with a local disk: no power cut, no network file system, no other paper.",
    }  # fmt: skip


ROWS = {
    "rounds": "rounds, each from an empty store to a finished run",
    "starts": "starts of the driver",
    "kills": "kills",
    "SIGKILL": "of these SIGKILL",
    "SIGTERM": "of these SIGTERM",
    "damaged": "entries damaged between restarts",
    "named": "damaged entries named by the next run and made again",
    "resumed": "entries continued from half-done work",
    "cells": "results compared",
    "tensors": "stored files compared, bit for bit",
    "failed": "runs that ended with an error",
    "lost cells": "results lost",
    "lost tensors": "stored files lost",
    "different cells": "results that differ",
    "different tensors": "stored files that differ",
    "made twice": "finished, whole entries made a second time",
    "tracebacks": "tracebacks shown",
}
WRONG = ("failed", "lost cells", "lost tensors", "different cells", "different tensors", "made twice", "tracebacks")


def main(argv: list[str]) -> None:
    """RuntimeError where something was lost, differs or was made twice."""
    options = cli.parse(Options, argv, prog="python -m tests.faults.campaign", description=__doc__.split("\n")[0])
    torch.set_num_threads(1)  # a fork must not inherit the threads of another process
    importlib.import_module(f"papers.{runner.load_paper(options.paper).name}.figures")  # before the forks
    begun = time.monotonic()
    count, cells, length = campaign(options)
    reliability.keep(options.report, section(options, count, cells, length), time.monotonic() - begun)
    if wrong := [f"{count[name]} {ROWS[name]}" for name in WRONG if count[name]]:
        raise RuntimeError("; ".join(wrong))


if __name__ == "__main__":
    sys.exit(cli.guard(main, sys.argv[1:]))
