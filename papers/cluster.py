"""The plan of papers.runner on a Ray cluster: every stage is one Ray task, started when the stages it needs are done.

A stage holds closures over data and does not travel.  A worker is told the arguments of the run, a cell and the key of
a stage, plans that cell itself, and finds the stage by its key: a machine with other code or other data has no stage of
that key and says so.  Results go into the store, which all machines share, or (shared_store=false) travel as files.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import queue
import socket
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.hardware import own_cpus, threads_each
from common.store import write_atomic
from papers import matching_stages, planning, runner
from papers.arguments import Args
from papers.cells import Cell, load_paper
from papers.matching_stages import MatchingSetup
from papers.planning import Planned
from papers.setups import setup_of
from papers.stages import Lab, Stage

__all__ = ["Crew", "Outcome", "connected", "run_cells"]

ROOT = Path(__file__).resolve().parent.parent
RETRIES = 2  # of a stage whose worker died; one that raises is not tried again
SMALL_SIDE = 64  # pixels; up to here several stages share a GPU
GPU_SHARE = 0.25
MEMORY = {False: 2 << 30, True: 8 << 30}  # bytes by "is large": peaks were 2.0 GiB at 32 px and 4.0 GiB at 128 px
SECONDS_TO_ANSWER = 10


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    key: str
    seconds: float = 0.0
    worker: str = ""
    error: str = ""
    log: str = ""  # what the stage printed, and the traceback of a failure
    cause: str = ""  # key of the stage that failed: this one, or one that it needs


@dataclass(frozen=True)
class Share:
    """What a stage takes of a machine."""

    cpus: int
    gpus: float
    memory: int


# ---------------------------------------------------------------- the cluster


@contextlib.contextmanager
def connected(args: Args) -> Iterator[None]:
    """Ray is there in this block: the cluster at address=, or one of our own.  One that is there already is used.

    ConnectionError where nothing answers at the address.
    """
    logging.getLogger("ray.widgets.util").setLevel(logging.ERROR)  # in a notebook it asks for more packages on import
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to anyone unasked
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # `Crew.next` tells of every one
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray puts its workers behind every other program of the machine
    logging.getLogger("ray").setLevel(logging.ERROR)  # also for what is said before init reads its own level
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if args.address:
        host, port = args.address.rsplit(":", 1)
        try:  # Ray itself would wait for minutes and then end the process
            socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(f"no Ray cluster answers at address={args.address}: {error}") from error
        try:
            ray.init(address=args.address, **quiet)
        except ConnectionError as error:  # also what a missing token looks like
            advice = "where it wants a token, RAY_AUTH_MODE=token must be set here as on its machines"
            raise ConnectionError(f"address={args.address} did not let this run in: {advice} ({error})") from error
    else:
        cpus = args.workers * threads_each(args.workers, own_cpus()) if args.workers else None  # None: Ray counts
        ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


def shares(nodes: list[Mapping[str, float]], workers: int, cuda: bool) -> tuple[int, dict[bool, Share]]:
    """How many small stages run at once, and what a small (False) and a large (True) stage take; nodes: resources.

    ValueError where device=cuda is wanted and no machine has a GPU.
    """
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU"))
    if cuda and not gpus:
        raise ValueError("device=cuda with engine=ray: no machine of the Ray cluster has a GPU; use device=cpu")
    part = 0.0
    if cuda:
        part = min(1.0, int(10_000 * gpus / workers) / 10_000) if workers else GPU_SHARE  # Ray counts ten-thousandths
    places = workers or int(gpus / part if cuda else cpus)
    threads = threads_each(places, cpus)
    memory = int(max(node.get("memory", 0) for node in nodes) / max(1, workers))  # more could never be had
    small, large = (Share(threads, g, min(MEMORY[big], memory)) for big, g in ((False, part), (True, float(cuda))))
    return max(1, places), {False: small, True: large}


# ---------------------------------------------------------------- in a worker


def work(args: Args, threads: int, cell: str, key: str, parcels: Mapping, *needs: Outcome):
    """One task: make a stage, unless one that it needs failed; gives its outcome, and its files where they travel."""
    for need in needs:
        if need.error:
            return replace(need, key=key, log=""), None
    start, printed, worker = time.perf_counter(), io.StringIO(), f"{socket.gethostname()}:{os.getpid()}"
    torch.set_num_threads(threads)  # with other numbers of threads the last bits of sums can differ
    outcome, files = functools.partial(Outcome, key, worker=worker), None
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            entry = make(args, cell, key, parcels)
            files = None if args.shared_store else entry.files()
    except Exception as error:  # told to the driver as text: an exception of any kind need not survive the way
        log = printed.getvalue() + traceback.format_exc()
        reason = " ".join(str(error).split()) or type(error).__name__
        return outcome(time.perf_counter() - start, error=reason, log=log, cause=key), None
    return outcome(time.perf_counter() - start, log=printed.getvalue()), files


def make(args: Args, cell: str, key: str, parcels: Mapping):
    """The store's entry of a stage, found again by its key in this worker's own plan of the cell."""
    lab, stages = bench(args)[0], cell_stages(args, cell)
    if key not in stages:
        host = socket.gethostname()
        raise RuntimeError(f"{host} plans {cell} with other stages: its code, packages or data are not the driver's")
    for need in stages[key].needs:
        if not there(lab, need):
            fetch(lab, need, parcels)
    return lab.entry(stages[key])


def fetch(lab: Lab, stage: Stage, parcels: Mapping) -> None:
    import ray

    key = lab.key(stage)
    if key not in parcels:
        raise RuntimeError(
            f"{stage.what} is finished, but {socket.gethostname()} does not find it in store={lab.store.root}: put the"
            " store on a file system that all machines share, or use shared_store=false"
        )
    lab.store.receive(stage.name, key, ray.get(parcels[key]))


@functools.cache
def bench(args: Args) -> tuple[Lab, Mapping, dict[str, Cell]]:
    """Lab, scale and cells, once in the life of a worker: data sets stay loaded."""
    lab, paper = runner.lab_of(args), load_paper(args.paper)
    return lab, paper.scales[args.scale], {cell.id: cell for cell in paper.cells_at(args.scale)}


@functools.cache
def cell_stages(args: Args, name: str) -> dict[str, Stage]:
    lab, scale, cells = bench(args)
    tops = planning.stages_of(cells[name], setup_of(scale, cells[name]), lab, args.seeds or tuple(scale["seeds"]))
    return {lab.key(stage): stage for top in tops for stage in top.all()}


def there(lab: Lab, stage: Stage) -> bool:
    """Whether the store holds a stage that another machine may just have made."""
    if (folder := lab.store.root / stage.name).is_dir():
        os.listdir(folder)  # a network file system may remember an absence: listing makes it ask again
    return lab.cached(stage)


# ---------------------------------------------------------------- in the driver


class Crew:
    """The workers, seen from the driver: `submit` stages, `next` gives the outcome of whichever is done."""

    def __init__(self, lab: Lab, args: Args):
        import ray

        self.ray, self.lab, self.args = ray, lab, args
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.places, self.shares = shares(nodes, args.workers, lab.device.type == "cuda")
        self.threads = self.shares[False].cpus
        env = {"env_vars": self._env()}
        self.tasks = {
            # All at once, not by .options(): Ray then gives each stage on a GPU a process of its own, which alone makes
            # sure that its memory is freed and that the next stage is on the GPU it was given.
            large: ray.remote(
                num_returns=2, max_retries=RETRIES, runtime_env=env, num_cpus=share.cpus, num_gpus=share.gpus,
                memory=share.memory,
            )(work)
            for large, share in self.shares.items()
        }  # fmt: skip
        self.job = ray.put(for_workers(args, lab))
        self.done: queue.SimpleQueue = queue.SimpleQueue()
        self.refs: dict[str, tuple] = {}  # key -> its outcome and its files, there or to come
        self.sent: dict[str, object] = {}  # key -> files of an entry that was there before
        self.flying: dict[str, Stage] = {}
        self.failed: dict[str, Outcome] = {}

    def _env(self) -> dict[str, str]:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        env |= {"OMP_NUM_THREADS": str(self.threads), "TQDM_DISABLE": "1"}  # bars of many at once are no progress
        if os.environ.get("DD_DATA"):
            env["DD_DATA"] = absolute(os.environ["DD_DATA"])
        return env

    def submit(self, cell: str, stages: Mapping[str, Stage], large: bool) -> None:
        """Hand out those stages of a cell that are not handed out yet; `stages` has each after those it needs."""
        for key, stage in stages.items():
            if key in self.refs:
                continue
            needs = {self.lab.key(need): need for need in stage.needs}
            parcels = {} if self.args.shared_store else {k: self._parcel(k, need) for k, need in needs.items()}
            outcomes = [self.refs[k][0] for k in needs if k in self.refs]
            self.refs[key] = self.tasks[large].remote(self.job, self.threads, cell, key, parcels, *outcomes)
            self.flying[key] = stage
            self.refs[key][0].future().add_done_callback(functools.partial(self._landed, key))

    def _landed(self, key: str, future) -> None:
        self.done.put((key, future))

    def _parcel(self, key: str, stage: Stage):
        if key in self.refs:
            return self.refs[key][1]
        if key not in self.sent:
            self.sent[key] = self.ray.put(self.lab.entry(stage).files())
        return self.sent[key]

    def next(self) -> tuple[Stage, Outcome]:
        """The next stage that is done, with its result in the driver's store, or with why it is not."""
        key, future = self.done.get()
        stage = self.flying.pop(key)
        try:
            outcome = future.result()
            if not outcome.error:
                self._keep(key, stage, outcome)
        except (self.ray.exceptions.RayError, OSError, RuntimeError) as error:
            before = [self.failed[k] for k in map(self.lab.key, stage.needs) if k in self.failed]
            cause = getattr(error, "cause", None) or error  # of one that the worker raised: without Ray's headline
            reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
            lost = Outcome(key, error=f"{stage.what}: {reason}", log=f"{error}\n", cause=key)
            outcome = replace(before[0], key=key) if before else lost
        if outcome.error:
            self.failed[key] = outcome
        return stage, outcome

    def _keep(self, key: str, stage: Stage, outcome: Outcome) -> None:
        if not self.args.shared_store:
            self.lab.store.receive(stage.name, key, self.ray.get(self.refs[key][1]))
        elif not there(self.lab, stage):
            raise RuntimeError(
                f"{outcome.worker} finished it, but it is not in store={self.lab.store.root} here: put the store on a"
                " file system that all machines share, or use shared_store=false"
            )

    def dismiss(self) -> None:
        """Stop what is not done; the store keeps what is, and checkpoints of what is not."""
        for key in self.flying:
            self.ray.cancel(self.refs[key][0], force=True)


def for_workers(args: Args, lab: Lab) -> Args:
    """The arguments as a worker needs them: what the driver chose, paths that mean the same everywhere."""
    return replace(
        args, device=lab.device.type, precision=lab.precision, store=absolute(args.store),
        data=args.data and absolute(args.data), only=(), skip=(), budget="", out="",
    )  # fmt: skip


def absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def is_large(p: Planned, lab: Lab) -> bool:
    """Whether the stages of a cell work on images of ImageNet's kind, and so want a GPU for themselves."""
    own = isinstance(p.setup, MatchingSetup) and not p.setup.size  # as the data set has them
    return (matching_stages.task_of(lab, p.setup).size if own else p.setup.size) > SMALL_SIDE


def run_cells(planned: list[Planned], lab: Lab, folder: Path, args: Args) -> None:
    """Like runner.run_cells, with all stages at once that fit; with a budget cells start as workers become free."""
    crew = Crew(lab, args)
    own = torch.get_num_threads()
    torch.set_num_threads(crew.threads)  # the estimates are those of one worker
    budget = runner.Budget(args, lab)
    torch.set_num_threads(own)
    run = _Progress(crew, lab, folder, args, budget)
    cells = deque(budget.queue(planned))
    run.total = len(cells)
    print(f"stages at once: {crew.places}, threads of each: {crew.threads}", flush=True)
    try:
        while cells or crew.flying:
            while cells and (not budget.limited or len(crew.flying) < crew.places):
                if budget.allows(cells[0]):
                    run.start(cells[0])
                cells.popleft()
            if crew.flying:
                run.settle(*crew.next())
    finally:
        crew.dismiss()


class _Progress:
    """Which cells wait for which stages; prints a line for every stage and cell that is done."""

    def __init__(self, crew: Crew, lab: Lab, folder: Path, args: Args, budget):
        self.crew, self.lab, self.folder, self.args, self.budget = crew, lab, folder, args, budget
        self.total = self.cells = self.stages = 0
        self.waiting: dict[str, list[Planned]] = {}  # key of a stage -> the cells that stand on it
        self.left: dict[str, int] = {}  # cell -> stages it still waits for

    def start(self, p: Planned) -> None:
        missing = planning.pending(p, self.lab)
        self.crew.submit(p.cell.id, missing, is_large(p, self.lab))
        self.left[p.cell.id] = 0
        for key in missing:
            if key in self.crew.flying:
                self.waiting.setdefault(key, []).append(p)
                self.left[p.cell.id] += 1
            elif key in self.crew.failed and not p.why:
                self._fail(p, self.crew.failed[key])
        self._finish(p)

    def settle(self, stage: Stage, outcome: Outcome) -> None:
        self.stages += 1
        known = self.stages + len(self.crew.flying)
        line = f"stage {self.stages}/{known}  {stage.name}, {outcome.seconds:.1f} s on {outcome.worker or 'no worker'}"
        if not outcome.error:
            print(f"{line}  {stage.what}", flush=True)
            if outcome.log:
                print(outcome.log.rstrip(), flush=True)
        elif outcome.cause == outcome.key:
            write_atomic(self._log(outcome), outcome.log.encode())
            print(f"{line}  FAILED: {outcome.error} (log in {self._log(outcome)})", flush=True)
        for p in self.waiting.pop(outcome.key, ()):
            self.left[p.cell.id] -= 1
            if outcome.error and not p.why:
                self._fail(p, outcome)
            self._finish(p)

    def _fail(self, p: Planned, outcome: Outcome) -> None:
        p.why = f"failed: {outcome.error}"
        self.cells += 1
        print(f"[{self.cells}/{self.total}] {p.cell.id}  FAILED: {outcome.error} ({self._log(outcome)})", flush=True)

    def _finish(self, p: Planned) -> None:
        if not p.why and not self.left[p.cell.id]:
            self.cells += 1
            place = f"[{self.cells}/{self.total}]"
            runner.finish(p, self.lab, self.folder, self.args, place, self.budget.spent)

    def _log(self, outcome: Outcome) -> Path:
        return self.folder / "logs" / f"stage_{outcome.cause}.log"
