"""Kills Ray workers, Ray nodes and drivers under engine=ray, and counts what came out otherwise than in a serial run.

    python -m tests.faults.ray_campaign kills=30 nodes=10 apart=5 drivers=20

The cells run once with engine=local: the reference; and once with engine=ray, whose length the times between kills are
drawn from. Then in rounds, each with a store of its own, one of these is killed (SIGKILL) again and again:

- worker: a process that is executing a stage; engine=ray workers=2.
- node: a raylet that is not the head of a cluster of three on this machine, chosen among those that execute a stage:
  in half of the cases the raylet alone, else all its processes at once. Another joins in its place.
- node, stores apart: the same with shared_store=false, every node with a store of its own, which is lost with it.
- driver: the run itself, as in tests.faults.campaign, with the Ray that it has started; then it is started again.

Workers and nodes are not the run: it has to finish without being started again. A stage that was killed more often than
it is tried fails by design; the run says so, and one more run has to finish. All else is held against the reference as
tests.faults.campaign does.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from common import cli
from papers import cluster, runner
from papers.cells import load_paper
from tests.faults import campaign, reliability
from tests.faults.campaign import WRONG, Run, compare, ended, finish, remade

CELLS = tuple(f"table1/cifar-10/{name}" for name in ("random/convnet/1", "dm/convnet/1"))
TOO_OFTEN = "worker died unexpectedly|node it was running on is dead"
OWN, APART = "workers=2", "shared_store=false"


def _arg(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


@dataclass(frozen=True)
class Options:
    """What is run and how often something is killed."""

    paper: str = _arg("matching", "paper whose cells run at smoke")
    only: tuple[str, ...] = _arg(CELLS, "cells to run")
    seeds: tuple[int, ...] = _arg((0, 1), "student seeds", minimum=0)
    kills: int = _arg(30, "kills of a worker", minimum=0)
    nodes: int = _arg(10, "kills of a node, with a store that all share", minimum=0)
    apart: int = _arg(5, "kills of a node, each with a store of its own", minimum=0)
    drivers: int = _arg(20, "kills of the driver", minimum=0)
    dense: float = _arg(4.0, "kills of workers or nodes in the length of a run, about", minimum=1.0)
    minutes: float = _arg(60.0, "stop starting rounds after this time", unit="minutes", minimum=0.1)
    steps: int = _arg(5, "half-done work is kept so often", unit="steps", minimum=1)
    seed: int = _arg(0, "seed of the moments and of the choice", minimum=0)
    report: str = _arg(reliability.PAGE, "page of the counts, with a folder of its name; empty: printed only")
    figures: bool = _arg(False, "draw the figures too")


# ---------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    pid: int
    born: int
    parent: int = field(compare=False)
    session: int = field(compare=False)
    command: str = field(compare=False)

    @property
    def works(self) -> bool:
        """Whether it is a worker that executes a stage."""
        return self.command.startswith(f"ray::{cluster.work.__name__}")

    @property
    def raylet(self) -> bool:
        return "/raylet/raylet " in self.command


def processes() -> list[Process]:
    """Everything that runs on this machine."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            facts = (folder / "stat").read_text().rpartition(")")[2].split()  # those after the name, which has spaces
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            if command:  # a kernel thread or a zombie has none
                found.append(Process(int(folder.name), int(facts[19]), int(facts[1]), int(facts[3]), command))
    return found


def below(pid: int) -> set[Process]:
    """The children of a process, and theirs."""
    everything, family = processes(), {pid}
    while more := {p.pid for p in everything if p.parent in family} - family:
        family |= more
    return {p for p in everything if p.pid in family - {pid}}


def kill(processes: set[Process]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


class Nodes:
    """A Ray cluster started by hand on this machine: a head and two more, one processor each."""

    def __init__(self, log: Path, size: int = 3):
        self.log, self.started = log, []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.head = self._start("--head", f"--port={self.address.split(':')[1]}", "--include-dashboard=false")
        self._await(1)
        for raylets in range(2, size + 1):  # one after the other: two at once can take the same names for sockets
            self.add()
            self._await(raylets)

    def _start(self, *more: str) -> int:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *more, "--block", "--num-cpus=1"]
        command += ["--object-store-memory=200000000", "--disable-usage-stats"]
        with self.log.open("ab") as log:  # a session of its own: its number is that of all processes of the node
            self.started.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
        return self.started[-1].pid

    def _await(self, raylets: int, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while sum(p.raylet for p in self._all()) < raylets:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the Ray cluster is not there after {seconds} s: {self.log.read_text()[-500:]}")
            time.sleep(0.2)

    def _all(self) -> set[Process]:
        sessions = {process.pid for process in self.started}
        return {p for p in processes() if p.session in sessions}

    def add(self) -> None:
        """Starts another node; it joins some seconds later."""
        self._start(f"--address={self.address}")

    def strike(self, chance: random.Random) -> set[Process]:
        """Kills a node that executes a stage, and starts another; its processes, none where only the head executes."""
        everything = self._all()
        if not (busy := sorted({p.session for p in everything if p.works} - {self.head})):
            return set()
        node, whole = chance.choice(busy), chance.random() < 0.5
        lost = {p for p in everything if p.session == node}
        kill({p for p in lost if whole or p.raylet})
        self.add()
        return lost


def work(args: runner.Args, threads: int, cell: str, key: str, parcels, *needs):
    """Stands in for cluster.work in the workers: half-done work is kept often; stores apart are each a node's own."""
    import ray

    campaign.keep_often(int(os.environ["CAMPAIGN_STEPS"]))
    if not args.shared_store:
        args = replace(args, store=f"{args.store}-{ray.get_runtime_context().get_node_id()[:8]}")
    return cluster.work(args, threads, cell, key, parcels, *needs)


# ---------------------------------------------------------------- rounds


@dataclass
class Kind:
    """One kind of fault."""

    most: int  # kills
    longest: float  # seconds between kills
    arguments: tuple[str, ...]  # further ones of the run
    strike: Callable[[int], set[Process]]  # kills something of the run with this process id: what has to be gone then
    kills_driver: bool = False


def kinds(options: Options, length: float, nodes: Nodes, chance: random.Random) -> dict[str, Kind]:
    """The kinds of faults; `length` is that of an undisturbed run with engine=ray."""

    def worker(driver: int) -> set[Process]:
        if not (busy := sorted((p for p in below(driver) if p.works), key=lambda p: p.pid)):
            return set()
        kill({chosen := chance.choice(busy)})
        return {chosen}

    def node(driver: int) -> set[Process]:
        return nodes.strike(chance)

    def itself(driver: int) -> set[Process]:
        family = {p for p in processes() if p.pid == driver} | below(driver)
        if os.waitid(os.P_PID, driver, os.WEXITED | os.WNOHANG | os.WNOWAIT):  # ended just now
            return set()
        os.kill(driver, signal.SIGKILL)
        return family

    often = 2 * length / options.dense
    there = f"address={nodes.address}"
    all_of_them = {
        "worker": Kind(options.kills, often, (OWN,), worker),
        "node": Kind(options.nodes, often, (there,), node),
        "driver": Kind(options.drivers, length, (OWN,), itself, kills_driver=True),
        "node, stores apart": Kind(options.apart, often, (there, APART), node),
    }
    return {name: kind for name, kind in all_of_them.items() if kind.most}


def round_of(options: Options, kind: Kind, place: Path, chance: random.Random, count: Counter) -> None:
    """One store from empty to finished; counts kills, starts, what was made twice and what ended otherwise."""
    place.mkdir()
    log, whole, gone, status = place / "log", {}, set(), None
    while status != 0:
        before = log.stat().st_size if log.exists() else 0
        process = campaign.start(options, place, "engine=ray", *kind.arguments)
        count["starts"] += 1
        status = None
        while status is None and count["kills"] < kind.most:
            status = ended(process, chance.uniform(0, kind.longest))
            while status is None and not (struck := kind.strike(process)):
                status = ended(process, 0.02)
            if status is None:
                count["kills"] += 1
                gone |= struck
                whole = remade(whole, place, count)
        status = finish(process) if status is None else status
        whole = remade(whole, place, count)
        said = log.read_bytes()[before:].decode()
        failures = [line for line in said.splitlines() if "FAILED: " in line]
        if status == 1 and failures and all(re.search(TOO_OFTEN, line) for line in failures):
            count["given up"] += 1
        elif status and not (status == -signal.SIGKILL and kind.kills_driver):
            count["failed"] += 1
            print(f"exit status {status}\n{said[-3000:]}", flush=True)
            break
    count["left"] += left(gone)


def left(gone: set[Process], seconds: float = 60) -> int:
    """How many of these processes still run after a while; they are ended."""
    deadline = time.monotonic() + seconds
    while (still := gone & set(processes())) and time.monotonic() < deadline:
        time.sleep(0.5)
    if still:
        print(f"left over: {still}", flush=True)
    kill(still)
    return len(still)


def run(options: Options) -> tuple[dict[str, Counter], Run, float]:
    """All rounds of all kinds; counts by kind, the reference, and the seconds of an undisturbed run with Ray."""
    begun, chance, counts = time.monotonic(), random.Random(options.seed), {}
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ |= {"CAMPAIGN_STEPS": str(options.steps), "OMP_NUM_THREADS": "1"}  # the last bits of sums
        reference, _ = campaign.undisturbed(options, Path(folder, "reference"))
        _, length = campaign.undisturbed(options, Path(folder, "ray"), "engine=ray", OWN)
        try:
            nodes = Nodes(Path(folder, "nodes"))
            for name, kind in kinds(options, length, nodes, chance).items():
                count = counts[name] = Counter()
                while count["kills"] < kind.most and time.monotonic() - begun < 60 * options.minutes:
                    count["rounds"] += 1
                    place = Path(folder, f"{name}-{count['rounds']}".replace(", ", "-").replace(" ", "-"))
                    round_of(options, kind, place, chance, count)
                    compare(reference, place, count)
                    shutil.rmtree(place)
                    print(f"{time.monotonic() - begun:.0f} s, {name}: {dict(count)}", flush=True)
        finally:
            kill(below(os.getpid()))  # the cluster, and a driver where the campaign is interrupted
    return counts, reference, length


# ---------------------------------------------------------------- report

ROWS = {
    **{name: campaign.ROWS[name] for name in ("rounds", "starts", "kills")},
    "given up": "runs that said that a stage was killed too often, finished by the next",
    **{name: campaign.ROWS[name] for name in ("resumed", "cells", "tensors", *WRONG)},
    "left": "processes of Ray left behind a minute after",
}  # fmt: skip


KINDS = {
    "worker": f"Worker: a process that was executing a stage, {OWN}; the run went on",
    "node": "Node: one that was executing a stage, of a cluster of three raylets on one machine, not the head: the"
    " raylet alone or all its processes at once; another one joined, and the run went on",
    "driver": "Driver: the run with the Ray that it had started; it was started again until it finished",
    "node, stores apart": f"Stores apart: a node of such a cluster, the raylet alone or all its processes, with {APART}"
    " and a store of its own, lost with it; another one joined, and the run went on",
}


def section(options: Options, counts: dict[str, Counter], reference: Run, length: float) -> dict:
    """What the page says of a campaign."""
    kinds = " ".join(f"{words}, after up to {length if name == 'driver' else 2 * length / options.dense:.1f} s."
                     for name, words in KINDS.items() if name in counts)  # fmt: skip
    how = f"""A run of {len(reference.results)} cells of paper={options.paper} at scale=smoke with engine=ray
({length:.1f} s undisturbed, most of it until Ray and its workers are there) was disturbed by SIGKILL, each round in an
empty store, and compared with a run of engine=local. {kinds} The times are random. Half-done work was kept every
{options.steps} steps; figures were left out."""
    return {
        "title": title_of(counts), "command": reliability.command("tests.faults.ray_campaign", options),
        "how": " ".join(how.split()),
        "counts": {name: {words: count[row] for row, words in ROWS.items()} for name, count in counts.items()},
        "cells": list(reference.results),
        "limits": "Raylets of one machine with a local disk: no network between them that fails, no lost head.",
    }  # fmt: skip


def title_of(counts: dict[str, Counter]) -> str:
    """Of a campaign without some kinds of faults, its kinds too: it is kept beside that of all."""
    return "Ray" if len(counts) == len(KINDS) else f"Ray: {', '.join(counts)}"


def main(argv: list[str]) -> None:
    """RuntimeError where something was lost, differs, was made twice or was left behind."""
    options = cli.parse(Options, argv, prog="python -m tests.faults.ray_campaign", description=__doc__.split("\n")[0])
    if importlib.util.find_spec("ray") is None:
        raise RuntimeError("Ray is not installed here: requirements-cluster.txt")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the cluster ends with the campaign
    torch.set_num_threads(1)  # a fork must not inherit the threads of another process
    importlib.import_module(f"papers.{load_paper(options.paper).name}.figures")  # before the forks
    cluster.work = work
    begun = time.monotonic()
    counts, reference, length = run(options)
    reliability.keep(options.report, section(options, counts, reference, length), time.monotonic() - begun)
    wrong = [f"{count[row]} {ROWS[row]} ({name})" for name, count in counts.items() for row in (*WRONG, "left")
             if count[row]]  # fmt: skip
    if wrong:
        raise RuntimeError("; ".join(wrong))


if __name__ == "__main__":
    sys.exit(cli.guard(main, sys.argv[1:]))
