"""The figures of NRR-DD and its notebook on made-up results: what is drawn, what the notebook computes and checks."""

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from common.store import Product, Store
from papers import planning, runner
from papers.cells import ROOT, load_paper
from papers.nrr_dd import figures
from papers.report import RANDOM
from papers.stages import Lab
from tests.notebook_cells import code_cells, load_notebook, tagged

SKIP = "table1/cifar-100,table1/tiny-imagenet,table1/imagenet-1k,table2/imagenet-1k,table3,table4/imagenet-1k"


@pytest.fixture(scope="module")
def plan():
    """A smoke plan with two printed data sets and its lab."""
    args = runner.parse(["paper=nrr_dd", "scale=smoke", "device=cpu", f"skip={SKIP}"])
    paper, lab = load_paper("nrr_dd"), Lab(Store(Path("nowhere")), None, torch.device("cpu"), "auto")
    return args, paper, lab, planning.make_plan(args, paper, lab)


@pytest.fixture
def smoke(plan, tmp_path):
    """A run of that plan whose store and results are empty."""
    args, paper, lab, planned = plan
    lab.store, lab._checked = Store(tmp_path / "store"), {}
    return runner.Run(args, paper, lab, [dataclasses.replace(p) for p in planned], tmp_path / "out", {})


def planned_of(run, table, **wanted):
    return [p for p in run.planned if p.stages and p.cell.table == table and wanted.items() <= vars(p.cell).items()]


BASE = {"SRe2L": 15, RANDOM: 25, "RDED": 30, "CIDD": 33, "NRR-DD": 40, "CIDD+NRR": 40}
OWN = {"OH": -15, "CL": -5, "DBR": -10, "DBR+LR": -4}


def value_of(cell):
    sweep = float(cell.setting.split()[-1]) if cell.table in ("figure_epsilon", "figure_steps", "figure_weight") else 0
    hard = -10 if cell.label_regime == "hard" and cell.table == "table1" else 0
    return BASE[cell.method] + OWN.get(cell.setting, 0) + cell.ipc / 2 + hard + sweep / 100


def fill(run, *tables):
    """Give every cell of some tables or figures a result of two seeds."""
    for table in tables:
        for p in planned_of(run, table):
            values = [value_of(p.cell), value_of(p.cell) + 1]
            run.results[p.cell.id] = {
                "cell": p.cell.id, **p.cell.key(), "label_regime": p.cell.label_regime, "values": values,
                "seeds": [0, 1], "mean": sum(values) / 2, "std": 0.7, "run_on": p.setup.run_on,
                "settings": {**p.setup.facts(), "algorithm": p.cell.algorithm}, "teacher_accuracy": 98.0,
                "bytes": {"images": 307_200, "labels": {"soft": 120_000, "boundary": 24_000}.get(p.setup.regime, 0)},
            }  # fmt: skip


def keep(run, planned, tensors, **meta):
    """Put the images of a cell into the store of the run: NRR-DD's own, not those of CIDD before it."""
    stage = [s for s in planned.stages[0].all() if s.name == "distill"][-1]
    run.lab.store.make(stage.name, stage.settings, stage.inputs, lambda _: Product(tensors, meta))


def captions(figure):
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def bars_of(container):
    """Mean, abscissa and error bars of one line."""
    middle, _, (bars,) = container
    lengths = [high - low for (_, low), (_, high) in bars.get_segments()]
    return list(middle.get_xdata()), list(middle.get_ydata()), lengths


# Figures


def test_every_figure_of_the_paper_has_a_function_and_the_other_way_round():
    assert set(load_paper("nrr_dd").figures) == set(figures.__all__)


def test_figures_without_results_are_none(smoke):
    for name in set(figures.__all__) - {"figure_storage"}:
        assert getattr(figures, name)(smoke) is None, name


def test_only_what_is_there_is_drawn_and_saved(smoke):
    fill(smoke, "figure_steps")
    without = {name: text for name, text in smoke.paper.figures.items() if name != "figure_storage"}  # always there
    smoke.paper = dataclasses.replace(smoke.paper, figures=without)
    assert runner.draw_figures(smoke) == ["figure_steps"]
    assert {f.name for f in smoke.folder.iterdir()} == {"figure_steps.png", "figure_steps.pdf"}


def shown(ax):
    return torch.tensor(ax.images[0].get_array()).permute(2, 0, 1)


def test_figure1_has_a_row_a_method_at_one_data_set_network_and_ipc(smoke):
    names, made = [str(k) for k in range(10)], {}
    generator = torch.Generator().manual_seed(0)
    for arch, ipc, methods in (
        ("ResNet-18", 10, figures.METHODS), ("ResNet-18", 50, figures.METHODS), ("ConvNet", 10, figures.METHODS[1:])
    ):  # fmt: skip
        for method in methods:
            cell = {"dataset": "ImageNette", "method": method, "arch": arch, "ipc": ipc, "label_regime": "soft"}
            (planned,) = planned_of(smoke, "table1", **cell)
            made[method, arch, ipc] = torch.rand(10 * ipc, 3, 8, 8, generator=generator)
            keep(smoke, planned, {"images": made[method, arch, ipc]}, classes=names)
    figure = figures.figure1(smoke)
    for row, method in enumerate(figures.METHODS):
        assert figure.axes[10 * row].get_ylabel() == method
        for k in range(10):
            assert torch.equal(shown(figure.axes[10 * row + k]), made[method, "ResNet-18", 10][10 * k])
    assert "digits, 16 px, slim networks, IPC 10, made with ResNet-18" in captions(figure)
    assert "Scale smoke: not comparable with print" in captions(figure)


def test_figure1_makes_do_with_the_methods_there_are(smoke):
    (planned,) = planned_of(smoke, "table1", dataset="CIFAR-10", method="RDED", arch="ConvNet", ipc=1,
                            label_regime="hard")  # fmt: skip
    keep(smoke, planned, {"images": torch.rand(10, 3, 8, 8)}, classes=[str(k) for k in range(10)])
    figure = figures.figure1(smoke, classes=4)
    assert len(figure.axes) == 4 and [ax.get_title() for ax in figure.axes] == ["0", "3", "6", "9"]


def test_figure3_reads_the_activation_out_of_the_mask(smoke):
    (planned,) = planned_of(smoke, "table1", dataset="ImageNette", method="NRR-DD", arch="ResNet-18", ipc=10,
                            label_regime="soft")  # fmt: skip
    heat = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    epsilon = 0.5
    mask = (epsilon - heat).clamp(min=0) / epsilon
    images, before = torch.rand(100, 3, 8, 8), torch.rand(3, 3, 8, 8)  # of the first three classes
    keep(smoke, planned, {"images": images, "before": before, "mask": mask}, classes=[str(k) for k in range(10)])
    figure = figures.figure3(smoke)
    for k in range(3):
        assert torch.equal(shown(figure.axes[k]), before[k])
        drawn = torch.tensor(figure.axes[3 + k].images[0].get_array())
        assert torch.allclose(drawn, heat[k].clamp(max=epsilon), atol=1e-6)
        assert torch.equal(torch.tensor(figure.axes[6 + k].images[0].get_array()), mask[k])
        assert torch.equal(shown(figure.axes[9 + k]), images[10 * k])
    assert [ax.get_ylabel() for ax in figure.axes[:12:3]] == ["before", "activation", "mask", "after"]
    assert figure.axes[3].images[0].get_clim() == (0, epsilon) and figure.axes[6].images[0].get_clim() == (0, 1)
    assert "cut at ε = 0.5" in captions(figure)


def test_figure3_does_not_take_images_of_cidd_for_refined_ones(smoke):
    (planned,) = planned_of(smoke, "table4", dataset="CIFAR-10", method="CIDD", setting="", arch="ConvNet")
    keep(smoke, planned, {"images": torch.rand(100, 3, 8, 8)}, classes=[str(k) for k in range(10)])
    assert figures.figure3(smoke) is None


def test_label_types_have_a_line_each_and_a_panel_for_each_network_and_data_set(smoke):
    fill(smoke, "table2")
    figure = figures.figure_labels(smoke)
    assert isinstance(figure, Figure)
    titles = [" ".join(ax.get_title().split()) for ax in figure.axes]
    assert titles == [f"ImageNette, {arch} run on digits, 16 px, slim networks" for arch in ("ConvNet", "ResNet-18")]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(figures.LABELS)
    expected = [30, 40, 15, 25, 30, 36]
    for container, start in zip(figure.axes[0].containers, expected, strict=True):
        x, y, bars = bars_of(container)
        assert x == [1, 10, 50] and y == pytest.approx([start + 0.5 + ipc / 2 for ipc in x])
        assert bars == pytest.approx([2 * 0.5**0.5] * 3)  # one standard deviation of two seeds, up and down
    words = captions(figure)
    assert figure.get_supylabel() == "top-1 accuracy (%)" and figure.axes[0].get_xscale() == "log"
    assert "digits, 16 px" in words and "over 2 students" in words and "not comparable with print" in words


def test_random_images_stand_beside_every_method_under_both_labels(smoke):
    fill(smoke, "table1")
    figure = figures.figure_random(smoke)
    titles = [ax.get_title().split("\n")[0] for ax in figure.axes]
    assert titles == ["ConvNet", "ResNet-18", "ResNet-101"]  # one panel for both data sets, which the digits stand for
    assert "digits, 16 px, slim networks (for CIFAR-10, ImageNette)" in captions(figure)
    places = [container[0].get_xdata()[0] for container in figure.axes[0].containers]
    assert len(set(places)) == len(places) and max(places) < 2 / min(places) < 4  # side by side, about IPC 1
    ends = sorted(round(bars_of(c)[1][-1] - 25.5) for c in figure.axes[0].containers)  # at IPC 50
    assert ends == [5, 15, 15, 20, 25, 30, 30, 40]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [entry for entry in legend if entry not in ("images", "labels")] == [
        "SRe2L", "RDED", "NRR-DD", "random real", "soft", "hard",
    ]  # fmt: skip


def test_stand_ins_with_other_numbers_keep_a_panel_each(smoke):
    fill(smoke, "table1")
    for result in smoke.results.values():
        if result["dataset"] == "ImageNette":
            result["values"] = [value + 1 for value in result["values"]]
    titles = [ax.get_title().split("\n")[0] for ax in figures.figure_random(smoke).axes if ax.axison]
    assert titles == [f"{d}, {a}" for a in ("ConvNet", "ResNet-18", "ResNet-101") for d in ("CIFAR-10", "ImageNette")]


def test_captions_tell_of_the_labels_that_are_drawn_alone(smoke):
    fill(smoke, "table2")
    assert "DBR+LR: these, on images" in captions(figures.figure_labels(smoke))
    smoke.results = {name: result for name, result in smoke.results.items() if result["setting"] != "DBR+LR"}
    assert "DBR:" in captions(figures.figure_labels(smoke)) and "DBR+LR" not in captions(figures.figure_labels(smoke))


def test_captions_say_which_results_are_of_one_student_and_which_labels_they_have(smoke):
    fill(smoke, "table1")
    for result in smoke.results.values():
        if result["ipc"] == 50:
            result |= {"values": result["values"][:1], "seeds": [0]}
    words = captions(figures.figure_random(smoke))
    assert "on distilled and random real images, the same recipe, under the teacher's soft labels and hard" in words
    assert "deviation over 2 students; a result without one is of one student." in words
    smoke.results = {k: r for k, r in smoke.results.items() if r["ipc"] == 50 and r["label_regime"] == "soft"}
    words = captions(figures.figure_random(smoke))
    assert "under the teacher's soft labels." in words and "One student a result." in words


def test_comparable_scales_do_not_call_themselves_incomparable(smoke, monkeypatch):
    fill(smoke, "table2")
    monkeypatch.setitem(smoke.paper.scales["smoke"], "comparable", True)
    assert "not comparable" not in captions(figures.figure_labels(smoke))


@pytest.mark.parametrize(("name", "scale"), [("epsilon", "linear"), ("steps", "symlog"), ("weight", "log")])
def test_sweeps_are_drawn_over_their_number_with_rded_as_a_level(smoke, name, scale):
    numbers = [float(p.cell.setting.split()[1]) for p in planned_of(smoke, f"figure_{name}")]
    assert len(numbers) > 3 and numbers == sorted(numbers)
    fill(smoke, f"figure_{name}")
    draw = getattr(figures, f"figure_{name}")
    assert "RDED" not in captions(draw(smoke))
    fill(smoke, "table4")
    for p in planned_of(smoke, "table4", arch="ResNet-18") + planned_of(smoke, "table4", dataset="CIFAR-100"):
        smoke.results[p.cell.id]["values"] = [99.0, 99.0]  # elsewhere
    figure = draw(smoke)
    ax = figure.axes[0]
    x, y, _ = bars_of(ax.containers[0])
    assert x == numbers and y == pytest.approx([45.5 + number / 100 for number in numbers])
    assert ax.get_xscale() == scale and [t.get_text() for t in ax.get_xticklabels()] == [f"{n:g}" for n in numbers]
    levels = [set(line.get_ydata()) for line in ax.lines if line.get_label() == "RDED (Table 4)"]
    soft = name != "weight"  # whose students learn of two distances, which RDED's of Table 4 do not
    assert levels == [{35.5}] * soft  # CIFAR-10, ConvNet, IPC 10, as the sweep
    assert ("Dashed: RDED" in captions(figure)) == soft and ("soft labels" in captions(figure)) == soft
    assert "(%)" in ax.get_ylabel()


def test_one_number_is_no_sweep(smoke):
    planned = planned_of(smoke, "figure_weight")
    fill(smoke, "figure_weight")
    for p in planned[1:]:
        del smoke.results[p.cell.id]
    assert figures.figure_weight(smoke) is None


# Storage


@pytest.mark.parametrize(("classes", "factor"), [(10, 5), (1000, 500)])
def test_pairs_take_half_the_classes_times_less_than_logits(classes, factor):
    found = figures.storage(classes, 10, 300, 224)
    assert found["soft labels"] == factor * found["distance pairs"]
    assert found["images"] == classes * 10 * 224 * 224 * 3


def test_storage_agrees_with_the_sizes_of_the_paper():
    found = figures.storage(1000, 200, 300, 224)  # more than 120 GB and 0.2 GB
    assert found["soft labels"] == 120_000_000_000 and found["distance pairs"] == 240_000_000


def test_storage_is_drawn_by_formula_and_what_was_stored_is_marked(smoke):
    figure = figures.figure_storage(smoke)
    ax = figure.axes[0]
    assert [t.get_text().split("\n")[0] for t in ax.get_xticklabels()] == [
        "CIFAR-10", "CIFAR-100", "Tiny ImageNet", "ImageNette", "ImageNet-1K",
    ]  # fmt: skip
    assert [bar.get_height() for bar in ax.containers[0]] == [k * k * 10 * 300 * 2 for k in (10, 100, 200, 10, 1000)]
    assert ax.get_yscale() == "log" and "bytes" in ax.get_ylabel() and not ax.collections
    assert "classes/2" in captions(figure) and "5 on ImageNette, 500 on ImageNet-1K" in captions(figure)
    assert "Scale smoke" not in captions(figure)
    fill(smoke, "table2")
    figure = figures.figure_storage(smoke)
    points = figure.axes[0].collections[0].get_offsets().tolist()
    bars = [container[3] for container in figure.axes[0].containers]  # ImageNette's
    centres = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    assert sorted(points) == [pytest.approx(pair) for pair in zip(centres, (120_000, 24_000, 307_200), strict=True)]
    assert "Crosses" in captions(figure) and "Scale smoke" in captions(figure)


def test_recomputed_labels_are_not_marked_as_stored(smoke):
    fill(smoke, "table2")
    for result in smoke.results.values():
        result["bytes"]["labels"] = 0
    assert len(figures.figure_storage(smoke).axes[0].collections[0].get_offsets()) == 1


# Notebook


@pytest.fixture
def notebook():
    return load_notebook("nrr_dd")


def test_notebook_shows_what_stands_beside_each_table_of_one_regime(notebook):
    code = "\n".join(code_cells(notebook))
    for name, layout in load_paper("nrr_dd").tables.items():
        assert (f'table("{name}_extras")' in code) == ("label_regime" not in layout)  # those have no extras


@pytest.fixture
def names(notebook, smoke):
    """What cells of the notebook find when they start: the shared helpers, and what display() was given."""
    said: list[str] = []
    code = next("".join(c["source"]) for c in notebook["cells"] if "Shown(finished)" in "".join(c["source"]))
    found = {"finished": smoke, "display": said.append, "Markdown": str, "said": said, "pairwise": pairwise}
    exec(code, found)
    return found


def run_checks(notebook, names):
    exec(tagged(notebook, "teachers"), names)
    exec(tagged(notebook, "checks"), names)


def test_notebook_checks_pass_on_plausible_results(notebook, names, smoke, capsys):
    fill(smoke, "table1", "table2")
    run_checks(notebook, names)
    assert "checks hold" in capsys.readouterr().out


def test_notebook_without_results_has_nothing_to_check(notebook, names, capsys):
    run_checks(notebook, names)
    assert "no result to check" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "change", "words"),
    [({"ipc": 50, "method": "NRR-DD"}, {"mean": 30.0}, "NRR-DD on CIFAR-10 with ConvNet falls from"),
     ({"ipc": 50, "method": "RDED"}, {"mean": 30.0}, "RDED on CIFAR-10 with ConvNet falls from"),
     ({"method": "RDED"}, {"mean": 12.0}, "reaches 12.0 %, expected 20.0 %"),
     ({"arch": "ResNet-18"}, {"teacher_accuracy": 94.0}, "ResNet-18 teacher of digits.* 94.0 %, expected 95 %")],
)  # fmt: skip
def test_notebook_checks_fail_on_implausible_results(notebook, names, smoke, wanted, change, words):
    fill(smoke, "table1")
    for result in smoke.results.values():
        if wanted.items() <= result.items():
            result |= change
    with pytest.raises(RuntimeError, match=words):
        run_checks(notebook, names)


def test_weak_stand_ins_of_other_networks_and_the_order_of_methods_are_no_failure(notebook, names, smoke):
    fill(smoke, "table1", "table2")
    for result in smoke.results.values():
        if result["arch"] == "ResNet-101":
            result["teacher_accuracy"] = 60.0
        if result["method"] in ("SRe2L", RANDOM):
            result["mean"] = 90.0 - result["ipc"]
    run_checks(notebook, names)


def test_notebook_fails_when_a_cell_failed(notebook, names, smoke):
    smoke.planned[0].why = "failed: the loss is not finite"
    with pytest.raises(RuntimeError, match="loss is not finite"):
        run_checks(notebook, names)


def test_recover_is_the_share_of_the_gap_between_one_hot_and_soft_labels(notebook, names, smoke):
    exec(tagged(notebook, "recover"), names)
    assert "No set" in names["said"].pop()
    fill(smoke, "table2")
    next(r for r in smoke.results.values() if r["setting"] == "DBR" and r["ipc"] == 50)["mean"] = math.pi
    exec(tagged(notebook, "recover"), names)
    rows = names["said"].pop().splitlines()[2:]
    assert len(rows) == 6  # ImageNette, two networks, three IPC
    assert rows[0].startswith("| ImageNette | ConvNet | 1 |")
    assert rows[0].endswith(f"| {100 * 21 / 25:.0f} |")  # (36 - 15) / (40 - 15)
    for result in smoke.results.values():
        if result["setting"] == "OH":
            result["mean"] += 21
    exec(tagged(notebook, "recover"), names)
    assert all(row.endswith("| - |") for row in names["said"].pop().splitlines()[2:])  # 4 points: too small a gap


def test_order_of_methods_is_shown_as_it_came_out(notebook, names, smoke):
    fill(smoke, "table1", "table2")
    smoke.results["table1/imagenette/rded/convnet/50/soft"]["mean"] = 99.0
    smoke.results["table2/imagenette/nrr-dd/dbr+lr/convnet/1/boundary"]["mean"] = 99.0
    exec(tagged(notebook, "order"), names)
    rows = {tuple(row.split(" | ")[0:2]): row.split(" | ")[2:] for row in names["said"].pop().splitlines()[2:]}
    assert rows["| ImageNette", "ConvNet"] == [
        "holds at 1, 10; not at 50", "holds at 1, 10, 50", "holds at 10, 50; not at 1 |",
    ]  # fmt: skip
    assert rows["| CIFAR-10", "ConvNet"] == ["holds at 1, 10, 50", "holds at 1, 10, 50", "- |"]


def test_quirks_have_no_long_lines_outside_tables_and_no_sign_of_a_machine():
    text = Path(ROOT, "nrr_dd", "quirks.md").read_text(encoding="utf-8")
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("|"))
    assert "/tmp" not in text and "/home" not in text


def test_the_storage_table_computes_the_claims_of_the_paper(smoke):
    rows = [line.strip("| ").split(" | ") for line in figures.storage_table(smoke).splitlines()[2:] if "x |" in line]
    found = {(row[0], row[1]): row for row in rows}
    assert found["ImageNet-1K", "200"][3:6] == ["120 GB", "240 MB", "500x"]
    assert found["ImageNette", "10"][5] == "5x" and found["ImageNet-1K", "50"][6] == "69.8x"
    assert float(found["ImageNette", "50"][7].rstrip("x")) < 1.1  # the images weigh more than either kind of label
