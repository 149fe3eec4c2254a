"""The survey as a user meets it: its leaderboard's cells and scores, figures of what it collects."""

import csv
from dataclasses import replace
from types import SimpleNamespace

import pytest

from papers import planning, render, report, runner, setups
from papers.cells import ROOT, SCALES, load_paper
from papers.survey import figures

PAPER = load_paper("survey")


@pytest.mark.parametrize("scale", SCALES)
def test_one_protocol_for_every_set(scale):
    """Within a column of the leaderboard nothing but the images differs."""
    columns: dict[tuple, set] = {}
    for cell in PAPER.cells_at(scale):
        setup = setups.setup_of(PAPER.scales[scale], cell)
        if setup is not None:
            made = (setup.protocol, setup.teacher, setup.teacher_network, setup.student_network, setup.network)
            columns.setdefault((cell.setting, cell.ipc), set()).add(made)
    assert columns and all(len(made) == 1 for made in columns.values())


def test_sets_and_teacher_are_those_of_the_other_papers():
    """So that nothing is made twice."""
    for name in ("dm", "cad-prune"):
        ours = next(c for c in PAPER.cells_at("small") if c.id == f"leaderboard/cifar-10/{name}/sl/convnet/10/own")
        hard = load_paper("hard_truths")
        theirs = next(c for c in hard.cells_at("small") if c.id == f"regimes/cifar-100/{name}/sl/convnet/10/own")
        ours, theirs = (setups.setup_of(p.scales["small"], c) for p, c in ((PAPER, ours), (hard, theirs)))
        assert ours.keeps == theirs.keeps and ours == replace(theirs, measure=ours.measure)


def test_borrowed_sets_are_there():
    for cell in PAPER.cells_at("small"):
        if cell.algorithm == "image-set":
            lender = load_paper(cell.distill["paper"])
            found = [c for c in lender.cells_at(cell.distill["scale"]) if c.id == cell.distill["cell"]]
            assert len(found) == 1 and found[0].ipc == cell.ipc, cell.id


def test_a_set_of_another_size_is_refused(tmp_path):
    args = ["paper=survey", "scale=smoke", f"store={tmp_path}/runs", "device=cpu", "precision=fp32"]
    args = runner.parse([*args, "only=leaderboard/rded/hl/convnet/1"])
    scale = {k: v for k, v in PAPER.scales["smoke"].items() if k != "skip"}
    from dataclasses import replace

    from papers.stages import Lab, Store

    lab = Lab(Store(tmp_path / "runs"), None, runner.resolve_device("cpu"), "fp32")
    paper = replace(PAPER, scales={**PAPER.scales, "smoke": scale})
    (planned,) = (p for p in planning.make_plan(args, paper, lab) if p.stages or p.why.startswith("failed"))
    assert "'table1/cifar-10/rded/convnet/1/soft' of paper=nrr_dd scale=small is no set of digits" in planned.why


# ---------------------------------------------------------------- scores and figures


def result(method, ipc, setting, *values, seconds=None):
    mean = sum(values) / len(values)
    facts = {"seconds": seconds or {"distill": 3.0, "students": 9.0}, "bytes": {"images": 123, "labels": 400}}
    return {"table": "leaderboard", "method": method, "ipc": ipc, "setting": setting, "values": list(values),
            "mean": mean, **facts}  # fmt: skip


def test_scores_are_differences_and_rescaled_sums():
    rows = [
        result("Random", 10, "HL", 30.0), result("Random", 10, "SL+KD", 50.0), result("Random", 10, "SL", 40.0),
        result("Random", 10, "HL, no augmentation", 20.0), result("DM", 10, "HL", 45.0),
        result("DM", 10, "HL, no augmentation", 25.0), result("DM", 10, "SL+KD", 52.0),
        result("All training images", None, "HL", 85.0),
    ]  # fmt: skip
    found = figures.leaderboard_scores(SimpleNamespace(results=dict(enumerate(rows)))).set_index("method")
    dm = found.loc["DM"]
    assert dm["hard-label recovery"] == pytest.approx(40) and dm["over random, HL"] == pytest.approx(15)
    assert dm["over random, SL+KD"] == pytest.approx(2) and "over random, SL" not in dm.dropna()
    assert (dm["seconds to make"], dm["image bytes"]) == (3.0, 123)
    assert found["label bytes, SL"].to_dict() == pytest.approx({"Random": 400, "DM": float("nan")}, nan_ok=True)
    assert (dm["hard-label recovery std"], dm["seconds of a teacher"]) == (0, 0)
    assert 0 < dm["label robust score"] < 100 and 0 < dm["augmentation robust score"] < 100
    assert found.loc["Random"].isna()["over random, HL"] and "All training images" not in found.index
    better = [*rows[:-2], result("DM", 10, "SL+KD", 60.0), rows[-1]]
    more = figures.leaderboard_scores(SimpleNamespace(results=dict(enumerate(better)))).set_index("method").loc["DM"]
    assert more["label robust score"] > dm["label robust score"]


def test_scores_are_written_with_their_spreads(tmp_path):
    rows = [result("Random", 10, "HL", 30.0, 32.0), result("DM", 10, "HL", 45.0, 47.0)]
    found = figures.leaderboard_scores(SimpleNamespace(results=dict(enumerate(rows)))).to_dict("records")
    report.write_summary("leaderboard_scores", "Scores (points)", found, tmp_path)
    text = (tmp_path / "leaderboard_scores.md").read_text()
    assert text.startswith("# leaderboard_scores: Scores (points)\n") and " std" not in text
    assert all(len(line) <= render.WIDTH for line in text.splitlines())
    dm = {}
    for piece in text.strip().split("\n\n")[1:]:  # the columns in pieces, each with the method and IPC before them
        heads, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in piece.splitlines())
        dm |= dict(zip(heads, rows[1], strict=True))
    assert (dm["method"], dm["HL"], dm["SL"], dm["over random, HL"]) == ("DM", "46.0", "-", "15.0 ± 2.0")
    (_, second) = csv.DictReader((tmp_path / "leaderboard_scores.csv").open())
    assert second["over random, HL std"] == "2.0" and second["label robust score"] == ""


def test_the_leaderboard_stands_beside_what_is_printed_of_each_family():
    rows = [result("DM", 10, "HL", 45.0), result("WMDD", 1, "HL", 11.0), result("K-centers", 10, "HL", 30.0)]
    found = figures.leaderboard_printed(SimpleNamespace(results=dict(enumerate(rows)))).set_index("method")
    dm, wmdd = found.loc["DM"], found.loc["WMDD"]
    assert (dm["ours, HL"], dm["printed"], dm["family"], dm["methods"]) == (45.0, 48.9, "distribution", 9)
    assert dm["family, least"] <= dm["family, median"] <= dm["family, most"] == 70.8 and dm["which has most"] == "DANCE"
    assert wmdd["family"] == "distribution" and not wmdd["printed"] > 0  # its family is known, a number on CIFAR-10 not
    assert "K-centers" not in found.index


def test_collected_numbers_leave_the_doubtful_ones_out():
    rows = report.load_reported(ROOT / "survey" / "reported.csv")
    data = figures.collected()
    doubtful = [r for r in rows if r["table"] == "table2" and r["note"].startswith("doubtful:")]
    assert len(doubtful) == 9 and len(data) == sum(r["table"] == "table2" for r in rows) - 9
    assert data["year"].notna().mean() > 0.95
    for draw in (figures.figure_ipc, figures.figure_years, figures.figure_compression):
        figure = draw(None)
        assert len(figure.axes) >= 1 and figure.texts


def test_the_teachers_of_the_leaderboard_are_named():
    """The accuracy of each teacher behind a committed cell stands in the quirks: one recipe is not one run."""
    cells = report.load_cells(ROOT.parent / "tables" / "survey" / "small" / "cells")
    used = {f"{cell['teacher_accuracy']:.1f} %" for cell in cells if cell["teacher_accuracy"]}
    text = (ROOT / "survey" / "quirks.md").read_text(encoding="utf-8").partition("## The leaderboard")[2]
    assert used and {accuracy for accuracy in used if accuracy not in text} == set()
