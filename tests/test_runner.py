"""The runner on digits: plan, cells, caching, budget, failures, kills.  One smoke column serves most tests."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from common.cli import UsageError
from methods import wmdd
from papers import cells, planning, runner, setups
from papers.cells import Cell, load_paper, select

ROOT = Path(__file__).resolve().parent.parent
COLUMN = "only=table1/imagenette/random/soft,table1/imagenette/wmdd/soft"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def column(place):
    """Table 1's ImageNette column at smoke: random and WMDD at IPC 1, 10, 50, 100 under soft labels."""
    return runner.run(arguments(place, COLUMN))


def arguments(place, *more: str, scale: str = "smoke", out: str = "tables") -> runner.Args:
    start = ["paper=wmdd", f"scale={scale}", f"store={place}/runs", f"out={place}/{out}", "device=cpu"]
    return runner.parse([*start, *more])


def accuracies(run, method: str) -> list[float]:
    cells = [r for r in run.results.values() if r["cell"].startswith(f"table1/imagenette/{method}/")]
    return [r["mean"] for r in sorted(cells, key=lambda r: r["ipc"])]


@pytest.mark.slow
def test_students_get_better_with_more_images_and_the_teacher_is_good(column):
    assert not column.failed
    for method in ("wmdd", "random"):
        values = accuracies(column, method)
        assert len(values) == 4
        assert values[-1] > values[0] + 25, (method, values)
        assert all(b > a - 5 for a, b in pairwise(values)), (method, values)  # two students differ by more than this
        assert values[0] > 20 and values[-1] > 60, (method, values)  # chance is 10
    assert all(r["teacher_accuracy"] > 95 for r in column.results.values() if r["teacher_accuracy"])


@pytest.mark.slow
def test_a_result_file_says_how_it_was_made(column):
    folder = column.folder / "cells"
    result = json.loads((folder / "table1_imagenette_wmdd_resnet-18_10_soft.json").read_text())
    assert result["seeds"] == [0, 1] and len(result["values"]) == 2
    assert result["mean"] == pytest.approx(sum(result["values"]) / 2)
    assert set(result["seconds"]) == {"teacher", "statistics", "barycenters", "distill", "relabel", "evaluate"}
    assert result["settings"]["distill"]["ipc"] == 10 and result["settings"]["student"]["labels"] == "soft"
    epochs = 24  # of two batches of 50 images, ten fp16 logits an image
    assert result["settings"]["student"]["epochs"] == epochs
    assert result["bytes"] == {"images": 100 * 3 * 16 * 16, "labels": epochs * 2 * 50 * 10 * 2}
    assert result["peak_memory_bytes"] > 1e8 and result["hardware"] and "torch" in result["versions"]


@pytest.mark.slow
def test_tables_keep_printed_and_own_numbers_apart(column):
    rows = list(csv.DictReader((column.folder / "table1.csv").open()))
    ours = [r for r in rows if r["ours"]]
    assert len(ours) == 8 and {r["status"] for r in ours} == {"not comparable"}
    wmdd = next(r for r in ours if r["method"] == "WMDD" and r["ipc"] == "10")
    assert float(wmdd["reported"]) == 64.8 and wmdd["ours"] != wmdd["reported"]
    assert any(r["status"].startswith("not run") for r in rows)
    for kind in ("md", "tex"):
        assert "64.8" in (column.folder / f"table1.{kind}").read_text()
    assert (column.folder / "figure2.png").stat().st_size > 10_000


@pytest.mark.parametrize("scale", cells.SCALES)
@pytest.mark.parametrize("name", cells.papers())
def test_tables_of_every_scale_are_written_and_shown_without_a_result(name, scale, tmp_path, monkeypatch):
    paper = cells.load_paper(name)
    planned = [planning.Planned(cell, why="not yet") for cell in paper.cells_at(scale)]
    args = runner.parse([f"paper={name}", f"scale={scale}"])
    monkeypatch.setattr(runner, "draw_figures", lambda finished: [])
    finished = runner.Run(args, paper, None, planned, tmp_path, {})
    runner.write_report(finished)
    shown = runner.show(finished)
    for table in paper.tables:
        assert (tmp_path / f"{table}.md").is_file() == bool(finished.rows(table))
    assert "not run: not yet" in shown


@pytest.mark.slow
def test_a_result_of_other_settings_is_kept_and_named(column, tmp_path):
    file = "table1_imagenette_wmdd_resnet-18_10_soft.json"
    result = json.loads((column.folder / "cells" / file).read_text())
    cell, planned = result["cell"], column.planned
    for changes, other in (({}, False), ({"epochs": 25}, True), ({"epochs": 24, "one that came later": 1}, False)):
        then = result | {"settings": {**result["settings"], "student": {**result["settings"]["student"], **changes}}}
        (tmp_path / "cells").mkdir(exist_ok=True)
        (tmp_path / "cells" / file).write_text(json.dumps(then))
        found = runner.read_results(planned, tmp_path, column.paper.scales["smoke"])
        assert list(found) == [cell] and found[cell]["other_settings"] == other
        rows = dataclasses.replace(column, results=found).rows("table1")
        (row,) = (r for r in rows if (r["method"], r["dataset"], r["ipc"]) == ("WMDD", "ImageNette", 10))
        assert row["ours"] == result["mean"]
        assert row["status"].endswith("made with other settings than the scale has now") == other


@pytest.mark.slow
def test_a_second_run_makes_nothing_again(column, place):
    before = {p: p.stat().st_mtime_ns for p in (place / "runs").glob("*/*/manifest.json")}
    assert all(
        "cached" in line for line in planning.show_plan(column.planned, column.lab).splitlines() if "/soft " in line
    )
    again = runner.run(arguments(place, COLUMN))
    assert {p: p.stat().st_mtime_ns for p in (place / "runs").glob("*/*/manifest.json")} == before
    assert {k: r["values"] for k, r in again.results.items()} == {k: r["values"] for k, r in column.results.items()}


@pytest.mark.slow
def test_results_of_earlier_runs_are_told_apart(column, place, capsys):
    assert not runner.earlier(column)
    run = runner.run(arguments(place, "only=table1/imagenette/wmdd/1/soft"))
    assert len(run.results) == 8  # what the folder has stays in the tables
    assert "of this run: 1; the tables and figures also show 7 results that were in" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failing_cell_is_reported_and_the_others_go_on(column, place, monkeypatch):
    def broken(*_):
        raise FloatingPointError("the recover loss is nan at step 7")

    monkeypatch.setattr(wmdd, "barycenters", broken)
    run = runner.run(arguments(place, "only=table3/imagenette/ce+pcbn/soft,table3/imagenette/random/soft"))
    assert [p.cell.id for p in run.failed] == ["table3/imagenette/wmdd/ce+pcbn/resnet-18/10/soft"]
    assert "nan at step 7" in run.failed[0].why
    assert "Traceback" in (run.folder / "logs" / (run.failed[0].cell.id.replace("/", "_") + ".log")).read_text()
    assert "table3/imagenette/random/resnet-18/10/soft" in run.results
    assert any("nan at step 7" in r["status"] for r in run.rows("table3"))


@pytest.mark.slow
def test_a_killed_run_continues_bit_for_bit(column, tmp_path):
    command = [
        sys.executable,
        "-m",
        "papers.runner",
        "paper=wmdd",
        "scale=smoke",
        "device=cpu",
        f"store={tmp_path}/runs",
    ]
    command += [f"out={tmp_path}/tables", "only=table1/imagenette/random/1/soft", "seeds=0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list((tmp_path / "runs" / "teacher").glob("*.work/state.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "runs").glob("teacher/*/manifest.json"))
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (ours,) = (tmp_path / "runs" / "teacher").glob("*/manifest.json")
    meta = json.loads((ours.parent / "meta.json").read_text())
    assert meta["resumed"]
    reference = column.lab.store.get("teacher", ours.parent.name).tensors()
    resumed = runner.Store(tmp_path / "runs").get("teacher", ours.parent.name).tensors()
    assert all(torch.equal(reference[k], resumed[k]) for k in reference)


@pytest.mark.slow
def test_two_runs_at_once_share_one_store(column, place, tmp_path):
    """Both finish with the same numbers; the students are made once."""
    command = [sys.executable, "-m", "papers.runner", "paper=wmdd", "scale=smoke", "device=cpu", f"store={place}/runs"]
    command += ["only=table1/imagenette/random/1/hard", "seeds=5"]
    runs = [subprocess.Popen([*command, f"out={tmp_path}/{n}"], cwd=ROOT, stdout=subprocess.DEVNULL) for n in "ab"]
    assert [r.wait(timeout=300) for r in runs] == [0, 0]
    name = "wmdd/smoke/cells/table1_imagenette_random_resnet-18_1_hard.json"
    first, second = (json.loads((tmp_path / n / name).read_text()) for n in "ab")
    assert first["values"] == second["values"] and first["seconds"] == second["seconds"]  # one and the same entry


@pytest.mark.slow
def test_with_a_budget_the_cheapest_cells_run_first(column, place):
    run = runner.run(arguments(place, "only=table5,table1/imagenette/wmdd/1/soft", "budget=1s", out="budget"))
    assert "table1/imagenette/wmdd/resnet-18/1/soft" in run.results  # cached: costs nothing
    left = [p for p in run.planned if "budget=1s" in p.why]
    assert left and all(p.cell.table == "table5" for p in left)
    again = runner.run(arguments(place, "only=table1/imagenette/wmdd/1/soft", "budget=0.001s", out="budget"))
    assert again.results  # however late it is


def test_a_run_without_any_of_its_data_is_an_error_and_writes_nothing(tmp_path, capsys):
    given = ["paper=wmdd", "scale=small", f"data={tmp_path}", f"out={tmp_path}/tables", f"store={tmp_path}/runs"]
    assert runner.main([*given, "dry_run=true"]) == 0
    said = capsys.readouterr().out
    assert said.count("looked for") == 1 and said.count("see below") == 32  # the explanation once, not once a cell
    assert runner.main(given) == 1
    assert "error: nothing can run: missing data: data set 'imagenette' is not there" in capsys.readouterr().err
    assert not (tmp_path / "tables").exists()


def test_cells_that_the_scale_has_not_are_an_error_and_write_nothing(tmp_path, capsys):
    given = ["paper=survey", "scale=smoke", "device=cpu", f"out={tmp_path}/tables", f"store={tmp_path}/runs"]
    assert runner.main([*given, "only=leaderboard/cifar-10/rded"]) == 1
    words = "scale=smoke has none of the 8 cells that only=leaderboard/cifar-10/rded names: not part of smoke"
    assert words in capsys.readouterr().err
    assert not (tmp_path / "tables").exists()


def test_a_dry_run_prints_the_plan_and_makes_nothing(tmp_path, capsys):
    runner.run(arguments(tmp_path, "dry_run=true", "only=table1/imagenette/10"))
    text = capsys.readouterr().out
    assert "6 cells to run" in text and "stages to run, about" in text
    assert not list(tmp_path.glob("runs/*/*/manifest.json")) and not (tmp_path / "tables").exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("paper=wmd", "wmdd"),
        ("scale=tiny", "smoke"),
        ("budget=2x", "90s"),
        ("device=tpu", "cuda"),
        ("only=table9", "table9"),
        ("skip=nothing/here", "nothing/here"),
        ("seeds=-1", "-1"),
        ("speed=1", "speed"),
        ("precision=fp16", "bf16"),
        ("data=/nowhere", "data=/nowhere is no folder here"),
    ],
)
def test_wrong_arguments_name_what_is_allowed(argument, words, capsys):
    argv = [argument] if argument.startswith("paper=") else ["paper=wmdd", argument]
    assert runner.main(argv) == 2
    assert words in capsys.readouterr().err
    with pytest.raises(UsageError):
        runner.parse(argv)


def test_patterns_match_parts_in_order():
    cells = load_paper("wmdd").cells_at("smoke")
    assert {c.id for c in select(cells, ["table1/imagenette/10"])} == {
        *(f"table1/imagenette/{m}/resnet-18/10/{r}" for m in ("random", "wmdd") for r in ("soft", "hard")),
        *(f"table1/imagenette/{m}/resnet-18/10/soft" for m in ("sre2l", "rded")),
    }
    assert all(c.ipc == 1 for c in select(cells, ["table1/1"]))
    assert len(select(cells, [], ["table*", "figure*"])) == 0
    with pytest.raises(ValueError, match="figure9"):
        select(cells, ["figure9"])
    steps = load_paper("nrr_dd").cells_at("smoke")
    assert all(select(steps, [cell.id]) == [cell] for cell in steps)  # also where others have its parts in this order
    assert select(steps, ["figure_steps"]) == select(steps, ["figure-steps"]) != []  # ids have no underscore


def test_every_cell_of_every_scale_has_settings():
    paper = load_paper("wmdd")
    for scale, settings in paper.scales.items():
        cells = paper.cells_at(scale)
        assert len({c.id for c in cells}) == len(cells)
        made = [setups.setup_of(settings, c) for c in cells]
        assert any(made)
        for cell, setup in zip(cells, made, strict=True):
            if setup:
                assert setup.distill["ipc"] == cell.ipc and setup.student.labels == cell.label_regime
    one = [c for c in paper.cells_at("paper") if c.table == "table3" and c.setting == "CE+BN"]
    assert {c.dataset for c in one} == {"ImageNette", "Tiny ImageNet", "ImageNet-1K"}


def test_published_settings_at_scale_paper():
    paper = load_paper("wmdd")
    cell = Cell("table1", "Tiny ImageNet", "WMDD", "ResNet-18", 10)
    setup = setups.setup_of(paper.scales["paper"], cell)
    assert (setup.size, setup.shorter, setup.network) == (224, 256, "resnet18-wmdd-tiny")
    assert setup.distill == {"lr": 0.1, "bn_weight": 500, "ipc": 10}
    assert (setup.student.epochs, setup.student.batch, setup.student.temperature) == (300, 100, 20.0)
    one = setups.setup_of(paper.scales["paper"], Cell("table1", "ImageNette", "WMDD", "ResNet-18", 1))
    assert one.student.batch == 10 and one.teacher.epochs == 50
