"""The cells of a run with processes beside it, on one machine: each makes the first stage that nobody is making.

The locks of the store are the whole schedule.  A helper plans the same cells and takes stages in the same order; one
that another process holds is passed over.  A helper that dies costs its time only: what it was making is free again,
and goes on from its last checkpoint.  Helpers end with the run, whatever ended it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from common.hardware import threads_each
from papers import planning, runner
from papers.arguments import Args
from papers.cells import load_paper
from papers.planning import Planned
from papers.runner import Budget
from papers.stages import Lab, Stage

__all__ = ["Ahead", "run_cells"]

ROOT = Path(__file__).resolve().parent.parent
PAUSE = 0.1  # seconds between two looks at what others are making


class Ahead:
    """What this process knows of the stages of a run: those that are done, and (in the lab) those that failed here."""

    def __init__(self, lab: Lab):
        self.lab = lab
        self.done: set[str] = set()

    def make_one(self, cells: Sequence[Planned]) -> bool:
        """Make the first stage whose needs are there and that no other process is making; False where there is none.

        One that fails is passed over from then on; the run tells when its cell has its turn.
        """
        for stage in (stage for p in cells for top in p.stages for stage in top.all()):
            if self._done(stage) or self._hopeless(stage) or not all(self._done(need) for need in stage.needs):
                continue
            try:
                if self.lab.store.make(stage.name, stage.settings, stage.inputs, stage.build, wait=False):
                    return True
            except Exception as error:
                self.lab.failed[self.lab.key(stage)] = error
                return True
        return False

    def wants(self, p: Planned) -> bool:
        """Whether a stage of the cell is missing that may still come."""
        stages = (stage for top in p.stages for stage in top.all())
        return any(not self._done(stage) and not self._hopeless(stage) for stage in stages)

    def _done(self, stage: Stage) -> bool:
        key = self.lab.key(stage)
        if key not in self.done and self.lab.cached(stage):
            self.done.add(key)
        return key in self.done

    def _hopeless(self, stage: Stage) -> bool:
        return self.lab.key(stage) in self.lab.failed or any(self._hopeless(need) for need in stage.needs)


def run_cells(planned: list[Planned], lab: Lab, folder: Path, args: Args) -> None:
    """Like runner.run_cells, with `args.workers` - 1 helpers; cells are finished in the same order."""
    own, threads = torch.get_num_threads(), threads_each(args.workers)
    torch.set_num_threads(threads)
    print(f"stages at once: {args.workers}, threads of each: {threads}", flush=True)
    try:
        budget, ahead = Budget(args, lab), Ahead(lab)
        with helpers(args, lab, threads, budget.start):
            queue = budget.queue(planned)
            for number, p in enumerate(queue, 1):
                if not budget.allows(p):
                    continue
                rest = queue[number:]
                while ahead.wants(p):
                    if not ahead.make_one([p, *affordable(rest, budget)]):  # one that was let in is finished
                        time.sleep(PAUSE)
                runner.finish(p, lab, folder, args, f"[{number}/{len(queue)}]", budget.spent)
    finally:
        torch.set_num_threads(own)


def affordable(cells: list[Planned], budget: Budget) -> list[Planned]:
    """The cells that may start now: all of them without budget=."""
    return [p for p in cells if budget.fits(p)] if budget.limited else cells


# ---------------------------------------------------------------- the helpers


@contextlib.contextmanager
def helpers(args: Args, lab: Lab, threads: int, start: float) -> Iterator[None]:
    """`args.workers` - 1 helpers work in this block, within the budget that counts from `start` on the monotonic clock.

    They listen to a pipe: it closes when this process ends.
    """
    job = {"args": asdict(args) | {"device": str(lab.device), "precision": lab.precision}, "start": start}
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}  # bars of many at once are no progress
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "papers.helpers"]
    settings = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "env": env, "start_new_session": True}
    team = []
    try:
        for _ in range(args.workers - 1):
            team.append(subprocess.Popen(command, **settings))
            with contextlib.suppress(BrokenPipeError):  # it died already: the others do its share
                team[-1].stdin.write(json.dumps(job).encode() + b"\n")
                team[-1].stdin.flush()
        yield
    finally:
        for helper in team:
            with contextlib.suppress(BrokenPipeError):
                helper.stdin.close()
        for helper in team:
            helper.wait()


def help_with(args: Args, start: float) -> None:
    """Make stages of the run's cells until none is left that could be made; `start` is when the run began."""
    lab = runner.lab_of(args)
    planned = planning.make_plan(args, load_paper(args.paper), lab)
    budget, ahead = Budget(args, lab, start), Ahead(lab)
    queue = budget.queue(planned)
    while wanted := [p for p in affordable(queue, budget) if ahead.wants(p)]:
        if not ahead.make_one(wanted):
            time.sleep(PAUSE)


def end_with_the_run() -> None:
    """Wait until the pipe from the run closes, as it does when the run ends or is killed, and end at once."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(0)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_the_run, daemon=True).start()
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in job["args"].items()}
    help_with(Args(**args), job["start"])


if __name__ == "__main__":
    main()
