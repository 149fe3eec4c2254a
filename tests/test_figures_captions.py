"""Captions and panels of the figures of all papers: they hold only what is drawn, and what is missing is said."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from papers import drawing, runner
from papers.cells import load_paper
from papers.hard_truths import figures as hard_truths
from papers.matching import figures as matching
from papers.natural_mixing import figures as natural_mixing
from papers.render import stood_for
from papers.report import RANDOM


def captions(figure):
    return " ".join(" ".join(text.get_text() for text in figure.texts).split())


def results(paper, scale, *rows):
    """A run that has nothing but results; a row: table, method, setting, IPC, and what else differs."""
    found = {}
    for table, method, setting, ipc, *more in rows:
        own = {"dataset": "CIFAR-10", "arch": "ConvNet", "metric": "accuracy", "label_regime": "own"}
        own |= {"values": [30.0, 32.0], "run_on": "CIFAR-10 kept as JPEG files", "settings": {}}
        own |= {"table": table, "method": method, "setting": setting, "ipc": ipc} | dict(*more)
        own |= {"seeds": list(range(len(own["values"]))), "mean": sum(own["values"]) / len(own["values"]), "std": 1.0}
        name = f"cell {len(found)}"
        found[name] = own | {"cell": name}
    args = runner.parse([f"paper={paper}", f"scale={scale}", "device=cpu"])
    planned = [SimpleNamespace(cell=SimpleNamespace(dataset=r["dataset"])) for r in found.values()]
    run = runner.Run(args, load_paper(paper), None, planned, Path("nowhere"), found)
    run.rows = lambda table: [
        r | {"status": "reproduced" if r["method"] == "DC" else "not comparable"} for r in found.values()
    ]
    return run


def test_data_sets_are_named_where_others_stand_for_them():
    pairs = [("CIFAR-10", "CIFAR-10 kept as JPEG files"), ("ImageNette", "Imagenette (224 px files), 128 px"),
             ("CIFAR-10", "CIFAR-100"), ("CIFAR-100", "digits"), ("SVHN", "digits")]  # fmt: skip
    assert [not stood_for(*pair) for pair in pairs] == [True, True, False, False, False]
    said = drawing.where(pd.DataFrame(pairs, columns=["dataset", "run_on"]))
    assert said == (
        "Run on CIFAR-10 kept as JPEG files; Imagenette (224 px files), 128 px; CIFAR-100 (for CIFAR-10);"
        " digits (for CIFAR-100, SVHN)."
    )


@pytest.mark.parametrize(
    ("counts", "words"),
    [((1, 1), "One student a result."), ((3, 3), "mean ± standard deviation over 3 students."),
     ((1, 3, 5), "over 3 to 5 students; a result without one is of one student.")],
)  # fmt: skip
def test_error_bars_are_over_the_students_of_a_result(counts, words):
    data = pd.DataFrame({"cell": [str(place) for place, count in enumerate(counts) for _ in range(count)]})
    assert drawing.error_bars(data).endswith(words)


def test_accuracies_of_the_matching_methods_name_random_images_and_print_only_as_they_are():
    rows = [("table1", "DC", "", 1), ("table1", RANDOM, "", 1), ("table1", RANDOM, "", 10, {"values": [32.0]})]
    words = captions(matching.figure_accuracy(results("matching", "small", rows[0])))
    assert "random" not in words and words.endswith("Scale small: not comparable with print.")
    words = captions(matching.figure_accuracy(results("matching", "paper", *rows[1:])))
    assert "distilled" not in words and "one student." in words and words.endswith(" Not comparable with print.")
    words = captions(matching.figure_accuracy(results("matching", "paper", *rows)))
    assert words.endswith(" 2 of 3 results: not comparable with print.")
    assert "print" not in captions(matching.figure_accuracy(results("matching", "paper", rows[0])))


def test_all_training_images_are_told_of_where_they_have_a_bar():
    rows = [("table1", "DC", arm, 1) for arm in ("baseline", "mixed")]
    figure = natural_mixing.figure1(results("natural_mixing", "small", *rows))
    assert "all training images" not in captions(figure) and len(figure.axes[0].patches) == 2
    rows.append(("figure1", "Full data", "", None))
    figure = natural_mixing.figure1(results("natural_mixing", "small", *rows))
    assert "all training images" in captions(figure) and len(figure.axes[0].patches) == 3


def test_arms_of_the_controls_have_a_row_each():
    arms = [f"arm {place}, mixed" for place in range(12)]
    figure = natural_mixing.figure_controls(
        results("natural_mixing", "small", *(("controls", "DM", arm, 1) for arm in arms))
    )
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == arms
    assert "fresh" not in captions(figure)


def test_gains_say_where_they_are_ours():
    row = ("table1", "DC", "gain", 1, {"metric": "gain", "run_on": "digits, 32 px"})
    words = captions(natural_mixing.figure_gain(results("natural_mixing", "smoke", row)))
    assert "printed for CIFAR-10. Run on digits, 32 px (for CIFAR-10)." in words


def test_released_corruptions_are_told_beside_those_made_here():
    arms = [("robustness", "DM", arm, 1) for arm in ("baseline", "mixed")]
    rows = [(*row, {"metric": metric}) for metric in ("sample accuracy", "corruption accuracy") for row in arms]
    assert "CIFAR-10-C" not in captions(natural_mixing.figure_robustness(results("natural_mixing", "small", *rows)))
    rows[2][-1]["compared"] = {"released": [30.0, 32.0], "generated": [31.0, 34.0], "difference": 1.5}
    rows[3][-1]["compared"] = {"released": [40.0], "generated": [38.0], "difference": -2.0}
    words = captions(natural_mixing.figure_robustness(results("natural_mixing", "small", *rows)))
    assert "have 34.0 % on them and 34.3 % on images made here, means that differ by 2.0 points at most" in words
    rows.append(("robustness", "DM", "mixed, 20 steps, 5 starts", 1, {"metric": "pgd-8 accuracy"}))
    assert "attacks" not in captions(natural_mixing.figure_robustness(results("natural_mixing", "small", *rows)))


def test_robustness_drops_sets_with_clean_images_alone_and_marks_what_was_not_run():
    clean = {"metric": "sample accuracy"}
    sets = (("DC", 1), ("DM", 1), ("DM", 10))
    rows = [("robustness", method, arm, ipc, clean) for method, ipc in sets for arm in ("baseline", "mixed")]
    assert natural_mixing.figure_robustness(results("natural_mixing", "small", *rows)) is None
    rows.append(("robustness", "DM", "baseline", 1, {"metric": "pgd-8 accuracy"}))
    figure = natural_mixing.figure_robustness(results("natural_mixing", "small", *rows))
    assert [ax.get_title() for ax in figure.axes] == ["DM, IPC 1"]
    assert [(t.get_text(), t.get_position()[0]) for t in figure.axes[0].texts] == [("not run", pytest.approx(1.2))]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["set alone", "mixed with real images"]
    assert "PGD: 10 steps" in captions(figure) and "corruptions" not in captions(figure)


def test_teachers_of_the_same_settings_are_named_in_the_caption():
    def taught(*finished):
        stages = [[{"stage": "teacher", "key": "k", "finished": when}] for when in finished]
        own = [{"stages": stage, "teacher_accuracy": 75.0} for stage in stages]
        rows = [("regimes", name, "SL", 10, more) for name, more in zip("ab", own, strict=True)]
        return results("hard_truths", "small", *rows)

    words = "Teachers of the same settings (75.0 and 75.0 %) stand behind it"
    assert words in captions(hard_truths.figure_regimes(taught("monday", "tuesday")))
    assert words not in captions(hard_truths.figure_regimes(taught("monday", "monday")))


def test_controls_have_the_arms_that_were_run_for_table_1_alone():
    controls = [("controls", "DC", arm, 10) for arm in ("no augmentation", "DiffAugment")]
    table1 = [("table1", method, arm, 10, {"values": [50.0, 51.0]}) for method in ("DC", "DM", "ATT")
              for arm in ("baseline", "mixed")]  # fmt: skip
    run = results("natural_mixing", "small", *controls, ("controls", "DM", "DiffAugment", 10), *table1)
    drawn = natural_mixing._with_table1(run, pd.DataFrame(run.values("controls")))
    means = drawn.groupby(["method", "setting"])["accuracy"].mean().to_dict()
    assert means["DC", "no augmentation"] == 31 and means["DC", "no augmentation, mixed"] == 50.5
    assert means["DM", "no augmentation"] == 50.5 and "ATT" not in set(drawn["method"])


def test_a_point_alone_at_its_ipc_stays_on_its_tick():
    data = pd.DataFrame({"method": ["a", "b", "c", "a"], "ipc": [1, 1, 1, 50]})
    places = drawing.dodged(data, "method").tolist()
    assert places[3] == 50 and places[0] < places[1] == 1 < places[2]


def test_spreads_are_over_the_sets_that_have_every_regime_of_their_panel():
    rows = [("regimes", name, regime, 10, {"values": [value, value + 2]}) for name, regime, value in (
        ("Random", "HL", 30), ("Random", "SL", 38), ("DM", "HL", 45), ("DM", "SL", 44), ("CAD-Prune", "HL", 10),
        ("DM", "SL+KD", 50),
    )]  # fmt: skip
    run = results("hard_truths", "small", *rows)
    spread = hard_truths.spreads(pd.DataFrame(run.values("regimes")))
    assert spread.loc[10].to_dict() == {"HL": 15, "SL": 6}
    figure = hard_truths.figure_regimes(run)
    assert [(t.get_text(), t.xy[0]) for t in figure.axes[0].texts] == [("15.0\n(2 of 3)", 0), ("6.0", 1)]
    assert len({x for line in figure.axes[0].containers for x in line.lines[0].get_xdata()}) > 3  # none hides another
    assert "(at IPC 10 all but CAD-Prune)" in captions(figure)
    figure = hard_truths.figure_regimes(results("hard_truths", "small", rows[0], rows[4]))
    assert "(SL)" not in captions(figure) and "over all sets" in captions(figure)


def test_one_number_of_epochs_is_no_curve():
    def rows(*counts):
        epochs = [{"settings": {"protocol": {"epochs": count}}} for count in counts]
        return [("figure5", "DM", f"x {place}", 10, own) for place, own in enumerate(epochs)]

    assert hard_truths.figure5(results("hard_truths", "small", *rows(30))) is None
    figure = hard_truths.figure5(results("hard_truths", "small", *rows(30, 60)))
    assert "real images" not in captions(figure)  # there are none


def test_a_law_whose_tau_is_at_the_end_of_its_grid_is_said_to_fail(monkeypatch):
    def law(tau):
        epochs = torch.arange(1, 7)
        tensors = {"epochs": epochs, "errors": 0.9 * epochs.double() ** -0.3, "law": 1.1 * epochs.double() ** -0.4}
        meta = {"b": [-0.5], "tau": [tau], "settings": {"images": 100}}
        return SimpleNamespace(tensors=lambda: tensors, meta=meta)

    run = results("hard_truths", "smoke")
    run.lab = SimpleNamespace(run_on=lambda setup: setup.run_on)
    own = {"table": "scaling", "metric": "b", "method": "DM", "ipc": 10}
    cells = [own | {"setting": regime} for regime in ("HL", "SL")]
    run.planned = [SimpleNamespace(cell=SimpleNamespace(**c), setup=SimpleNamespace(run_on="digits")) for c in cells]
    monkeypatch.setattr(drawing, "entry", lambda _, p, stage: law(10.0 if p.cell.setting == "SL" else 4.0))
    figure = hard_truths.figure_scaling(run)
    assert figure.axes[0].get_ylim()[1] == 100
    assert "fails for DM, IPC 10 under SL: tau lies at the end" in captions(figure)
    assert "above 100 %" in captions(figure)
    dashed = [sum(line.get_linestyle() == "--" for line in ax.lines) for ax in figure.axes]
    assert dashed == [0, 1] and "dashed: the same law with a larger tau" in captions(figure)


def test_hexagons_of_the_scores_have_a_key(monkeypatch):
    images, labels = torch.rand(50, 3, 4, 4), torch.arange(50) % 10
    error = torch.rand(50, 10, generator=torch.Generator().manual_seed(0)).softmax(1)
    bank = SimpleNamespace(tensors=lambda: {"labels": labels, "err_final": error - torch.eye(10)[labels]})
    setup = SimpleNamespace(distill={"method": "el2n_easy"}, run_on="digits", taught_by=lambda on: on)
    setup.teacher_network = "convnet3"
    run = results("hard_truths", "smoke")
    cell = SimpleNamespace(algorithm="coreset", teacher="")
    run.planned = [SimpleNamespace(cell=cell, stages=(1,), setup=setup)]
    teacher, store = SimpleNamespace(name="teacher"), SimpleNamespace(get=lambda *_: 1)
    run.lab = SimpleNamespace(teacher=lambda on: teacher, key=lambda stage: "", store=store, run_on=lambda _: "digits")
    monkeypatch.setattr(drawing, "entry", lambda *_: bank)
    monkeypatch.setattr(hard_truths, "task_of", lambda *_: SimpleNamespace(train=SimpleNamespace(images=images)))
    monkeypatch.setattr(hard_truths, "teacher_logits", lambda *_: torch.eye(10)[labels])
    figure = hard_truths.figure_scores(run)
    assert "training images in a hexagon (log scale)" in [ax.get_ylabel() for ax in figure.axes]
