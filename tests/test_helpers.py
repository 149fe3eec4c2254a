"""Helpers beside a run: which stage they take, what a failure or a dead helper costs, that they end with the run."""

import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from common import hardware
from common.store import Product, Store
from papers import arguments, helpers, runner
from papers.planning import Planned
from papers.stages import Lab, Stage

ROOT = Path(__file__).resolve().parent.parent
RANDOM = "table1/cifar-10/random/convnet/1/own"


def given(place, *more) -> runner.Args:
    start = ["paper=matching", "scale=smoke", f"store={place}/runs", f"out={place}/tables", "device=cpu"]
    return runner.parse([*start, f"only={RANDOM}", *more])


@pytest.fixture
def lab(tmp_path):
    return Lab(Store(tmp_path / "runs"), None, torch.device("cpu"), "fp32")


class Factory:
    """Stages that note their name when they are made."""

    def __init__(self, lab):
        self.lab, self.made = lab, []

    def stage(self, name: str, *needs: Stage, error: Exception | None = None) -> Stage:
        def build(work: Path) -> Product:
            self.made.append(name)
            if error:
                raise error
            return Product({}, {})

        return Stage("stage", {"name": name}, tuple(map(self.lab.key, needs)), build, 1.0, name, needs)


def cell(*stages: Stage) -> Planned:
    return Planned(cell=None, stages=stages)


def lock(lab: Lab, stage: Stage) -> FileLock:
    place = lab.store.root / stage.name
    place.mkdir(parents=True, exist_ok=True)
    return FileLock(place / f"{lab.key(stage)}.lock")


# Which stage is next


def test_stages_are_made_in_the_order_of_the_cells_and_after_those_they_need(lab):
    factory, ahead = Factory(lab), helpers.Ahead(lab)
    teacher = factory.stage("teacher")
    cells = [cell(factory.stage("a", teacher), factory.stage("b", teacher)), cell(factory.stage("c", teacher))]
    while ahead.make_one(cells):
        pass
    assert factory.made == ["teacher", "a", "b", "c"]
    assert not any(map(ahead.wants, cells))


def test_a_stage_that_another_process_makes_is_passed_over(lab):
    factory, ahead = Factory(lab), helpers.Ahead(lab)
    teacher, other = factory.stage("teacher"), factory.stage("other")
    first, second = cell(factory.stage("a", teacher)), cell(other)
    with lock(lab, teacher):
        assert ahead.make_one([first, second]) and factory.made == ["other"]
        assert not ahead.make_one([first, second])  # all there is to do stands on the teacher
        assert ahead.wants(first) and not ahead.wants(second)
    assert ahead.make_one([first, second]) and factory.made == ["other", "teacher"]


def test_what_another_process_has_made_is_not_made_again(lab):
    factory, ahead = Factory(lab), helpers.Ahead(lab)
    stage = factory.stage("a")
    lab.entry(stage)
    assert not ahead.make_one([cell(stage)]) and factory.made == ["a"]


def test_after_a_failure_the_stages_that_need_it_are_given_up_and_others_go_on(lab):
    factory, ahead = Factory(lab), helpers.Ahead(lab)
    broken = factory.stage("teacher", error=FloatingPointError("the loss is nan"))
    first, second = cell(factory.stage("b", factory.stage("a", broken))), cell(factory.stage("c"))
    while ahead.make_one([first, second]):
        pass
    assert factory.made == ["teacher", "c"]  # once each
    assert not ahead.wants(first)  # the run goes on to tell that it failed
    with pytest.raises(FloatingPointError, match="nan"):
        lab.entry(broken)
    assert factory.made == ["teacher", "c"]  # what it failed of is known


# Whole runs


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    return runner.run(given(tmp_path_factory.mktemp("serial"), "seeds=0,1", "workers=1"))


@pytest.mark.slow
@pytest.mark.parametrize("who", ["both", "the helper alone", "the run alone"])
def test_a_run_with_a_helper_has_the_numbers_of_one_without(serial, tmp_path, monkeypatch, capsys, who):
    if who == "the helper alone":
        monkeypatch.setattr(helpers.Ahead, "make_one", lambda self, cells: False)
    if who == "the run alone":
        monkeypatch.setattr(helpers.sys, "executable", "false")  # a helper that dies at once
    run = runner.run(given(tmp_path, "seeds=0,1", "workers=2"))
    assert not run.failed
    assert run.results[RANDOM]["values"] == serial.results[RANDOM]["values"]
    assert f"[1/1] {RANDOM}" in capsys.readouterr().out
    assert len(list((tmp_path / "runs" / "students").glob("*/manifest.json"))) == 2
    assert torch.get_num_threads() == 1


@pytest.mark.slow
def test_helpers_end_when_the_run_is_killed(tmp_path):
    command = [sys.executable, "-m", "papers.runner", "paper=matching", "scale=smoke", "device=cpu", "workers=3"]
    process = subprocess.Popen(
        [*command, f"only={RANDOM}", f"store={tmp_path}/runs", f"out={tmp_path}/tables"], cwd=ROOT,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while "stages at once: 3" not in (line := process.stdout.readline()):
        assert line
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(team := children.read_text().split()) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 120  # they listen once their imports are done
    while any(alive(int(pid)) for pid in team) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(int(pid)) for pid in team)


def alive(pid: int) -> bool:
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


# How many


def test_the_default_is_one_stage_a_core_at_smoke_on_a_cpu_and_one_elsewhere(monkeypatch):
    monkeypatch.setattr(arguments, "own_cpus", lambda: 16)
    smoke = ["paper=matching", "scale=smoke", "device=cpu"]
    assert runner.parse(smoke).workers == 1  # the tests set OMP_NUM_THREADS
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert runner.parse(smoke).workers == arguments.MOST_WORKERS
    assert runner.parse([*smoke, "workers=3"]).workers == 3
    assert runner.parse(["paper=matching", "scale=small", "device=cpu"]).workers == 1
    assert "workers=3" in runner.describe(runner.parse([*smoke, "workers=3"]), asked=True)
    monkeypatch.setattr(hardware, "own_cpus", lambda: 16)
    assert hardware.threads_each(3) == 5


@pytest.mark.slow
def test_a_cell_beyond_the_budget_is_left_to_later_by_all(tmp_path):
    run = runner.run(given(tmp_path, "workers=2", "budget=0.001s"))
    assert next(p.why for p in run.planned if p.cell.id == RANDOM).startswith("budget=0.001s was used up")
    assert not list((tmp_path / "runs").glob("*/*/manifest.json"))
    assert os.listdir(tmp_path / "tables")


def test_the_budget_of_a_helper_counts_from_the_start_of_the_run(tmp_path):
    args = given(tmp_path, "budget=1h")
    helpers.help_with(args, start=time.monotonic() - 3601)  # the run began an hour ago: nothing may start
    assert not list((tmp_path / "runs").glob("*/*/manifest.json"))
    helpers.help_with(args, start=time.monotonic())
    assert list((tmp_path / "runs").glob("*/*/manifest.json"))


def test_a_cell_that_was_let_in_is_finished_beyond_the_budget(lab, monkeypatch):
    """Its stages take longer than estimated: it is not offered as one that may start, and goes on all the same."""
    factory = Factory(lab)
    p = cell(factory.stage("b", factory.stage("a")))
    budget = runner.Budget(given(lab.store.root, "budget=100s"), lab)
    monkeypatch.setattr(helpers, "helpers", lambda *_: nullcontext())
    monkeypatch.setattr(helpers, "Budget", lambda *_: budget)
    monkeypatch.setattr(budget, "fits", lambda p: not factory.made)  # nothing fits once the first stage is there
    finished = []
    monkeypatch.setattr(runner, "finish", lambda p, *_: finished.append(p))
    helpers.run_cells([p], lab, Path(), given(lab.store.root, "workers=2"))
    assert factory.made == ["a", "b"] and finished == [p]
