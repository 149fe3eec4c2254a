"""Stages as Ray tasks on this machine: numbers of the serial run, failures, dead workers, Ctrl-C, no shared store."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from common import matching
from common.cli import UsageError
from common.store import Damaged, Store
from papers import arguments, cluster, planning, runner

ROOT = Path(__file__).resolve().parent.parent
RANDOM, DM = "table1/cifar-10/random/convnet/1/own", "table1/cifar-10/dm/convnet/1/own"
BOTH = "only=table1/cifar-10/random/1,table1/cifar-10/dm/1"


def given(place, *more) -> runner.Args:
    start = ["paper=matching", "scale=smoke", f"store={place}/runs", f"out={place}/tables", "device=cpu"]
    return runner.parse([*start, *more])


def values(run) -> dict:
    return {name: result["values"] for name, result in run.results.items()}


def made(place) -> dict:
    """The entries of a store and when they were written; not the leavings of a stage that was interrupted."""
    found = [p for p in Path(place).glob("*/*/manifest.json") if ".tmp-" not in p.parent.name]
    return {str(p.parent.relative_to(place)): p.stat().st_mtime_ns for p in found}


@pytest.fixture(scope="module")
def ray():
    """Two workers of one thread, for all tests here: `connected` uses a cluster that is there."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: requirements-cluster.txt")
    with cluster.connected(runner.parse(["paper=matching", "scale=smoke", "engine=ray", "workers=2"])):
        yield ray


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """The run that all others are compared with, one stage after the other."""
    place = tmp_path_factory.mktemp("serial")
    return place, runner.run(given(place, BOTH, "seeds=0,1"))


# Numbers


@pytest.mark.slow
def test_values_are_those_of_the_serial_run(ray, serial, tmp_path, capsys):
    _, alone = serial
    run = runner.run(given(tmp_path, BOTH, "seeds=0,1", "engine=ray", "workers=2", "budget=1h"))
    assert not run.failed
    assert values(run) == values(alone) and set(values(run)) == {RANDOM, DM}
    names = made(alone.lab.store.root)
    assert set(made(tmp_path / "runs")) == set(names)
    for name in names:
        stage, key = name.split("/")
        ours, theirs = (store.get(stage, key).path for store in (run.lab.store, alone.lab.store))
        assert (ours / "tensors.safetensors").read_bytes() == (theirs / "tensors.safetensors").read_bytes()
    said = capsys.readouterr().out
    assert said.count("\nstage ") == len(names) and "stages at once: 2, threads of each: 1" in said
    assert said.index(RANDOM) < said.index(DM)  # with a budget the cheapest cell first
    again = runner.run(given(tmp_path, BOTH, "seeds=0,1", "engine=ray"))
    assert values(again) == values(alone) and "stage 1" not in capsys.readouterr().out


@pytest.mark.slow
def test_without_a_shared_store_results_travel(ray, serial, tmp_path, monkeypatch):
    """The workers' store is another one; the driver's holds the images of seed 0 before the start."""
    place, alone = serial
    shutil.copytree(place / "runs" / "distill", tmp_path / "runs" / "distill")
    planned = next(p for p in alone.planned if p.cell.id == RANDOM)
    shutil.rmtree(tmp_path / "runs" / "distill" / alone.lab.key(next(planned.stages[1].all())))
    here = cluster.for_workers
    monkeypatch.setattr(cluster, "for_workers", lambda *a: replace(here(*a), store=f"{tmp_path}/elsewhere"))
    run = runner.run(given(tmp_path, f"only={RANDOM}", "seeds=0,1", "engine=ray", "shared_store=false"))
    assert values(run) == {RANDOM: values(alone)[RANDOM]}
    assert len(made(tmp_path / "elsewhere")) == 4 and set(made(tmp_path / "elsewhere")) < set(made(tmp_path / "runs"))
    refused = runner.run(given(tmp_path / "other", f"only={RANDOM}", "seeds=0", "engine=ray"))
    assert "all machines share" in refused.failed[0].why and not refused.results


@pytest.mark.parametrize("paper", ["matching", "natural_mixing", "wmdd"])
def test_a_worker_finds_every_stage_of_the_plan_by_its_key(paper, tmp_path):
    args = runner.parse([f"paper={paper}", "scale=smoke", "device=cpu", "seeds=3", f"store={tmp_path}"])
    lab = runner.lab_of(args)
    planned = [p for p in planning.make_plan(args, runner.load_paper(paper), lab) if p.stages]
    job = cluster.for_workers(args, lab)
    for p in planned:
        assert set(cluster.cell_stages(job, p.cell.id)) == set(planning.pending(p, lab))
        assert not cluster.is_large(p, lab)
    with pytest.raises(RuntimeError, match="its code, packages or data are not the driver's"):
        cluster.make(job, planned[0].cell.id, "another key", {})


def test_an_entry_that_did_not_arrive_whole_is_refused(tmp_path):
    there, here = Store(tmp_path / "there"), Store(tmp_path / "here")
    entry = there.make("note", {"a": 1}, (), lambda _: matching.Product({}, {"b": 2}, {"c.txt": b"text"}))
    files = entry.files()
    with pytest.raises(Damaged, match=r"c\.txt"):
        here.receive("note", entry.key, {**files, "c.txt": b"tex"})
    assert here.get("note", entry.key) is None and not list((tmp_path / "here").glob("*/*.tmp-*"))
    for _ in range(2):
        here.receive("note", entry.key, files)
    assert here.get("note", entry.key).files() == files


# Failures


@pytest.mark.slow
def test_failing_stages_leave_a_log_and_the_others_go_on(ray, serial, tmp_path, monkeypatch, capsys):
    """Images at IPC 10 raise; the worker of DM dies; images at IPC 1 are well."""

    def fragile(args, threads, cell, key, parcels, *needs):
        if "/dm/" in cell and not needs:
            os.kill(os.getpid(), signal.SIGKILL)

        def broken(on, ipc, seed):
            if ipc == 10:
                print("ten images")
                raise FloatingPointError("the loss is nan at step 7")
            return draw(on, ipc, seed)

        draw = matching.random_subset
        with mock.patch.object(matching, "random_subset", broken):
            return cluster.work(args, threads, cell, key, parcels, *needs)

    monkeypatch.setattr(cluster, "work", fragile)
    monkeypatch.setattr(cluster, "RETRIES", 0)
    run = runner.run(given(tmp_path, f"{BOTH},table1/cifar-10/random/10", "seeds=0", "engine=ray", "workers=2"))
    ten = RANDOM.replace("/1/", "/10/")
    whys = {p.cell.id: p.why for p in run.failed}
    assert set(whys) == {DM, ten} and whys[ten] == "failed: the loss is nan at step 7" and "DM" in whys[DM]
    assert values(run) == {RANDOM: values(serial[1])[RANDOM][:1]}
    logs = [log.read_text() for log in (run.folder / "logs").iterdir()]
    assert len(logs) == 2  # of the stages that failed, not of those that need them
    (log,) = (log for log in logs if "nan at step 7" in log)
    assert log.startswith("ten images\n") and "Traceback" in log
    assert capsys.readouterr().out.count("FAILED") == 4
    assert any("nan at step 7" in row["status"] for row in run.rows("table1"))


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True], ids=["before", "after its entry is finished"])
def test_a_stage_whose_worker_is_killed_is_done_by_another(ray, serial, tmp_path, monkeypatch, finished):
    def killed_once(args, threads, cell, key, parcels, *needs):
        first = Path(args.store, key)
        if needs and not first.exists():
            if finished:
                cluster.work(args, threads, cell, key, parcels, *needs)
            for entry in Path(args.store).glob("students/*/manifest.json"):
                first.write_text(str(entry.stat().st_mtime_ns))
            first.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return cluster.work(args, threads, cell, key, parcels, *needs)

    monkeypatch.setattr(cluster, "work", killed_once)
    run = runner.run(given(tmp_path, f"only={RANDOM}", "seeds=0", "engine=ray", "workers=2"))
    assert not run.failed and values(run) == {RANDOM: values(serial[1])[RANDOM][:1]}
    (first,) = (p for p in (tmp_path / "runs").iterdir() if p.is_file())
    (students,) = (tmp_path / "runs" / "students").glob("*/manifest.json")
    assert first.read_text() == (str(students.stat().st_mtime_ns) if finished else "")  # it is not made a second time


@pytest.mark.slow
def test_after_ctrl_c_the_next_run_continues(ray, serial, tmp_path):
    command = [sys.executable, "-m", "papers.runner", "paper=matching", "scale=smoke", "device=cpu", "engine=ray"]
    command += [f"only={RANDOM}", "seeds=0,1", f"store={tmp_path}/runs", f"out={tmp_path}/tables", "workers=1"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # deaf in the background
    )  # fmt: skip
    while not (line := process.stdout.readline()).startswith("stage 1/"):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and said.strip().endswith("interrupted") and "Traceback" not in said
    before = made(tmp_path / "runs")
    assert before
    run = runner.run(given(tmp_path, f"only={RANDOM}", "seeds=0,1", "engine=ray", "workers=2"))
    assert values(run) == {RANDOM: values(serial[1])[RANDOM]}
    assert before.items() <= made(tmp_path / "runs").items()  # nothing that was there is made again


# Resources and arguments


def test_shares_of_a_machine(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    gib = 2**30
    cpu = [{"CPU": 16, "memory": 64 * gib}]
    assert cluster.shares(cpu, 0, False)[1][False] == cluster.Share(1, 0.0, 2 * gib)
    assert cluster.shares(cpu, 4, False) == (4, {b: cluster.Share(4, 0.0, [2, 8][b] * gib) for b in (False, True)})
    assert cluster.shares(cpu, 32, False)[1][True] == cluster.Share(1, 0.0, 2 * gib)  # so that 32 do fit
    gpus = [{"CPU": 32, "GPU": 4, "memory": 64 * gib}] * 2
    both = {False: cluster.Share(2, 0.25, 2 * gib), True: cluster.Share(2, 1.0, 8 * gib)}
    assert cluster.shares(gpus, 0, True) == (32, both)
    assert cluster.shares(gpus[:1], 12, True)[1][False].gpus == 0.3333
    assert cluster.shares(gpus[:1], 2, True)[1][False] == cluster.Share(16, 1.0, 2 * gib)
    with pytest.raises(ValueError, match="no machine of the Ray cluster has a GPU; use device=cpu"):
        cluster.shares(cpu, 0, True)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as PyTorch read it at its start
    assert cluster.shares(cpu, 4, False)[1][False].cpus == 1


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["engine=dask"], "allowed: local, ray"),
        (["workers=-2"], "at least 0"),
        (["address=node:6379"], "address= needs engine=ray"),
        (["shared_store=false"], "shared_store= needs engine=ray"),
        (["engine=ray", "workers=-1"], "-1"),
        (["engine=ray", "workers=two"], "whole number"),
        (["engine=ray", "address=node"], "HOST:PORT"),
        (["engine=ray", "address=ray://node:10001"], "HOST:PORT"),
        (["engine=ray", "address=node:6379", "workers=2"], "workers=2 is for this machine"),
    ],
)
def test_wrong_arguments_of_the_engine_name_what_is_allowed(more, words, monkeypatch, capsys):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: name)  # whether Ray is here or not
    assert runner.main(["paper=matching", *more]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_without_ray_one_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"not installed here: .*pip install -r requirements-cluster\.txt"):
        runner.parse(["paper=matching", "engine=ray"])


def test_ray_is_imported_only_where_it_is_asked_for():
    program = "import sys; from papers import cluster, runner; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_an_address_where_nothing_answers_is_named_at_once(tmp_path, monkeypatch, capsys):
    ray = pytest.importorskip("ray", reason="Ray is not installed: requirements-cluster.txt")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray would wait for minutes"))
    place = [f"out={tmp_path}", f"store={tmp_path}"]
    assert runner.main(["paper=matching", "scale=smoke", "engine=ray", "address=127.0.0.1:1", *place]) == 1
    assert "no Ray cluster answers at address=127.0.0.1:1" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []

