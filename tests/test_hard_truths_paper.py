"""The paper on hard truths as a user meets it: settings of its cells, label regimes, and a part of the smoke run."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import matching, scaling
from common.hardware import compiler
from common.protocols import PROTOCOLS, large_scale
from common.store import Store
from common.views import Recipe
from methods import cad, coresets
from papers import drawing, matching_stages, planning, report, runner, setups, show, stages
from papers.cells import ROOT, load_paper
from papers.hard_truths import figures
from papers.selection_stages import doubled
from papers.stages import Lab
from tests.notebook_cells import code_cells, load_notebook

PAPER = load_paper("hard_truths")
ONLY = "regimes/random/10,regimes/cad-prune/10,regimes/ca2d/hl/10,selectors/margin/10,figure4/random/convnet"
ONLY += ",figure5/random/x-0.25,figure5/random/x-1,figure1/random/own-teacher-0.5-passes/1,scaling/random/hl"


def setup(scale: str, name: str):
    (cell,) = (c for c in PAPER.cells_at(scale) if c.id == name)
    return cell, setups.setup_of(PAPER.scales[scale], cell)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("hard_truths")


@pytest.fixture(scope="module")
def lab(place):
    return Lab(Store(place / "runs"), None, torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def run(place):
    args = ["paper=hard_truths", "scale=smoke", f"store={place}/runs", f"out={place}/tables", "device=cpu"]
    return runner.run(runner.parse([*args, f"only={ONLY}", "precision=fp32"]))


# ---------------------------------------------------------------- settings


def test_the_regimes_are_those_of_the_supplement():
    hard, soft, online = (
        setup("paper", f"regimes/cifar-100/dm/{name}/convnet/50/own")[1].protocol for name in ("hl", "sl", "sl+kd")
    )
    assert [hard, soft, online] == [PROTOCOLS[f"hard-truths-{name}"] for name in ("hard", "soft", "online")]
    assert (hard.passes, hard.lr, hard.batch) == (301, 0.01, 256)
    assert (soft.labels, online.labels, soft.temperature) == ("kl", "online", 20.0)
    assert soft.passes == online.passes == 300  # nearly as many as under hard labels, says the caption


@pytest.mark.parametrize(("ipc", "batch"), [(1, 50), (10, 50), (50, 128), (100, 200), (500, 200)])
def test_the_regimes_at_imagenet_scale_are_those_of_the_supplement(ipc, batch):
    hard, soft, online = (
        Recipe(**large_scale(f"hard-truths-large-{name}", ipc, 1000)) for name in ("hard", "soft", "online")
    )
    assert (hard.batch, hard.epochs, hard.optimizer, hard.lr, hard.labels) == (batch, 200, "sgd", 0.5, "hard")
    for recipe in (soft, online):
        assert (recipe.batch, recipe.epochs, recipe.optimizer, recipe.lr) == (128, 200, "adamw", 1e-3)
        assert (recipe.temperature, recipe.warmup, recipe.labels, recipe.schedule) == (20.0, 5, "soft", "cosine")
    assert (hard.cutmix, soft.cutmix, online.cutmix) == (False, False, True)
    with pytest.raises(ValueError, match="'hard-truths-hard' is unknown at ImageNet scale; allowed: hard-truths-large"):
        large_scale("hard-truths-hard", ipc, 1000)


def test_cells_of_imagenet_scale_get_them():
    _, random = setup("paper", "table9/imagenet-1k/random/hl/resnet-50/100/own")
    _, crops = setup("paper", "table9/imagenet-1k/rded/hl/resnet-50/100/own")
    assert (random.network, random.student_network, random.size) == ("resnet18", "resnet50", 224)
    assert (random.student.shuffle, random.student.crop, crops.student.shuffle, crops.student.crop) == (1, 0.08, 2, 0.5)
    labels = [setup("paper", f"regimes-large/imagenette/sre2l/{r}/resnet-18/10/own")[1] for r in ("hl", "sl", "sl+kd")]
    assert [s.student.labels for s in labels] == ["hard", "soft", "soft"]
    assert [s.labels for s in labels[1:]] == ["fixed", "online"]
    assert [(s.student.batch, s.student.lr) for s in labels] == [(50, 0.1), (50, 1e-3), (50, 1e-3)]
    whole, cut = (setup("paper", f"table9/imagenet-1k/{name}/hl/resnet-50/50/own")[1] for name in ("cad-prune", "ca2d"))
    assert [(s.student.shuffle, s.student.crop) for s in (whole, cut)] == [(1, 0.08), (2, 0.5)]
    assert whole.student == setup("paper", "table9/imagenet-1k/random/hl/resnet-50/50/own")[1].student


@pytest.mark.parametrize("name", ["k-centers", "cad-prune", "ca2d"])
@pytest.mark.parametrize("scale", ["large-hard", "hard"])  # by either name: at this size there is one
def test_real_images_of_imagenette_have_students_of_imagenet_scale(name, scale):
    cell, _ = setup("paper", f"regimes-large/imagenette/{name}/hl/resnet-18/10/own")
    chosen = setups.setup_of(PAPER.scales["paper"], replace(cell, protocol=f"hard-truths-{scale}"))
    assert (chosen.size, chosen.student_network, chosen.student.name) == (224, "resnet18", "hard-truths-large-hard")
    assert (chosen.student.batch, chosen.student.lr, chosen.student.labels) == (50, 0.1, "hard")
    assert chosen.student.shuffle == (2 if name == "ca2d" else 1)
    soft, online = (setup("paper", f"regimes-large/imagenette/{name}/{r}/resnet-18/10/own")[1] for r in ("sl", "sl+kd"))
    assert (soft.labels, online.labels, soft.student.cutmix, online.student.cutmix) == ("fixed", "online", False, True)


@pytest.mark.slow
def test_the_three_regimes_at_imagenet_scale_on_digits(lab):
    scale = {**PAPER.scales["paper"], "teacher": {"epochs": 1}, "student": {"epochs": 6}}
    digits = {"dataset": "digits", "size": 16, "run_on": "digits", "networks": {"ResNet-18": "convnet2-w32"}}
    losses = {}
    for cell in PAPER.cells_at("paper"):
        if cell.table == "regimes_large" and (cell.method, cell.ipc) == ("Random", 10):
            chosen = setups.setup_of({**scale, "data": {"ImageNette": digits}}, cell)
            (stage,) = lab.students(cell, chosen, (0,))
            assert ("teacher" in [s.name for s in stage.all()]) == (cell.setting != "HL")
            made = lab.entry(stage).meta
            losses[cell.setting] = made["losses"][0][1]
            assert 0 <= made["accuracies"][0] <= 100 and made["settings"]["recipe"]["name"] == cell.protocol
    assert len(set(losses.values())) == 3 == len(losses)


def test_a_law_of_too_few_epochs_is_named_when_it_is_planned(lab):
    (cell,) = (c for c in PAPER.cells_at("smoke") if c.table == "scaling" and c.id.endswith("hl/convnet/10/own/b")
               and c.algorithm == "random-subset")  # fmt: skip
    chosen = setups.setup_of(PAPER.scales["smoke"], cell)
    for epochs, fine in ((3, False), (4, True)):  # of a protocol that makes one pass more
        few = replace(chosen, times=1.0, budget=0.0, protocol=replace(chosen.protocol, epochs=epochs))
        if fine:
            assert lab.students(cell, few, (0,))
        else:
            with pytest.raises(ValueError, match=r"at least 5 epochs; these students train for 4"):
                lab.students(cell, few, (0,))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("el2n-hardest", {"epoch": 40}, "epoch=40"),
        ("cad-prune", {"ipc": 200}, "ipc=200"),
        ("ca2d", {"ipc": 40, "factor": 2}, "ipc=40 with factor=2 takes 160 crops"),
    ],
)
def test_selections_that_cannot_work_are_named_when_they_are_planned(lab, name, changes, words):
    cell, planned = setup("smoke", f"regimes/cifar-100/{name}/hl/convnet/10/own")
    planned = replace(planned, distill={**planned.distill, **changes})
    with pytest.raises(ValueError, match=words):
        matching_stages.images(lab, planned, cell.algorithm, 0)


def test_published_settings_reach_the_selections():
    _, pruned = setup("paper", "table8/cifar-100/cad-prune/hl/convnet/50/own")
    config = cad.Config(**pruned.distill)
    looks, window, windows, _ = cad.schedule(config, 100, 50_000)
    assert (len(looks), window, windows) == (30, 28, 2)  # K = 30 at IPC 50
    _, centers = setup("paper", "table3/cifar-100/k-centers/hl/convnet/10/own")
    config = coresets.Config(**{k: v for k, v in centers.distill.items() if k != "augment"})
    assert (config.method, config.epochs, config.lr, config.batch) == ("kmeans", 100, 0.01, 256)
    assert centers.distill["augment"] == "dsa" and centers.teacher_network == "convnet3"
    _, transfer = setup("paper", "table4/cifar-100/dm/sl/average-transfer/10/own")
    assert transfer.transfer == ("mlp", "resnet18-dcbench", "resnet152-dcbench")


def test_students_train_for_as_long_as_their_cell_says():
    lengths = {}
    for times in ("0.25", "1", "4"):
        _, chosen = setup("paper", f"figure5/cifar-100/cad-prune/x-{times}/convnet/10/own")
        lengths[times] = chosen.trained_by(1000, 50_000).epochs
        assert chosen.protocol.epochs == 300  # the budget that CAD-Prune is matched to is that of the paper
    assert lengths == {"0.25": 75, "1": 300, "4": 1200}
    _, chosen = setup("paper", "figure1/cifar-100/random/weak-teacher-2-passes/convnet/10/own")
    assert chosen.trained_by(1000, 50_000).epochs == 100 and chosen.teacher.epochs == 10


def test_every_printed_number_of_small_data_sets_has_a_cell():
    cells = {tuple(c.key().values()) for c in PAPER.cells_at("paper")}
    printed = report.load_reported(ROOT / "hard_truths" / "reported.csv")
    small = [r for r in printed if r["table"] in ("table3", "table4", "table5", "table8")]
    assert len(small) > 60 and not [r for r in small if tuple(r[k] for k in report.KEY) not in cells]


@pytest.mark.parametrize("scale", PAPER.scales)
def test_what_is_printed_and_not_run_says_why(scale, tmp_path, monkeypatch):
    planned = [planning.Planned(cell, why="not yet") for cell in PAPER.cells_at(scale)]
    args = runner.parse(["paper=hard_truths", f"scale={scale}"])
    finished = runner.Run(args, PAPER, None, planned, tmp_path, {})
    printed = report.load_reported(ROOT / "hard_truths" / "reported.csv")
    whys = {t: {r["method"]: r["status"] for r in finished.rows(t)} for t in dict.fromkeys(r["table"] for r in printed)}
    assert not [words for own in whys.values() for words in own.values() if "no cell planned" in words]
    assert whys["table6"]["D4M"] == "not run: needs a pretrained diffusion model"
    elsewhere = "not run: not yet" if scale == "paper" else "not run: planned at scale paper"
    assert whys["table6"]["SRe2L"] == whys["table6"]["RDED"] == elsewhere
    monkeypatch.setattr(runner, "draw_figures", lambda finished: [])
    runner.write_report(finished)
    page = (tmp_path / "not_run.md").read_text(encoding="utf-8")
    assert "- figure4c: as figure4b" in page and max(map(len, page.splitlines())) <= 100


def test_every_table_and_figure_of_the_supplement_has_a_place_or_a_reason():
    whole = {f"table{i}" for i in range(1, 12)} | {f"figure{i}" for i in (1, 2, *range(5, 11))}
    whole |= {"figure3a", "figure3b", "figure4a", "figure4b", "figure4c"}
    assert whole <= {*PAPER.tables, *PAPER.not_run} and not PAPER.tables.keys() & PAPER.not_run.keys()


def test_selectors_of_one_run_share_it(lab):
    names = ("margin", "glister", "forgetting-most", "herding")
    banks = set()
    for name in names:
        _, chosen = setup("smoke", f"selectors/cifar-100/{name}/hl/convnet/10/own")
        stage = matching_stages.images(lab, chosen, "coreset", 0)
        banks.add(lab.key(stage.needs[0]))
    assert len(banks) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind", "scores"), [("margin", "coreset", "p_true"), ("cad-prune", "cad", "el2n")])
def test_compiled_scoring_runs_give_the_scores_of_eager_ones(lab, tmp_path, monkeypatch, name, kind, scores):
    if not compiler():
        pytest.skip("compiling needs a C++ compiler and the headers of Python")
    _, chosen = setup("smoke", f"selectors/cifar-100/{name}/hl/convnet/10/own")
    fast = Lab(Store(tmp_path / "runs"), None, torch.device("cpu"), "bf16")
    monkeypatch.setattr(stages, "COMPILED_FROM", 0)
    monkeypatch.setattr(stages, "bf16_is_fast", lambda _: True)
    found = []
    for which in (lab, fast):
        run = matching_stages.images(which, chosen, kind, 0).needs[0]
        assert run.settings["run"]["precision"] == which.precision
        found.append(which.entry(run).tensors())
    (name,) = (n for n in found[0] if n.rpartition(".")[2] == scores)
    exact, near = (f[name].flatten() for f in found)
    assert not torch.equal(exact, near) and torch.corrcoef(torch.stack([exact, near]))[0, 1] > 0.9


@pytest.mark.parametrize("name", ["random", "craig", "cad-prune"])
def test_the_loss_of_mtt_is_asked_of_the_set_whose_students_are_tested(lab, name):
    """All by one expert, that of figure 4."""
    keys = {}
    for metric in ("", "/tm-loss"):
        cell, chosen = setup("smoke", f"selectors/cifar-100/{name}/hl/convnet/10/own{metric}")
        (stage,) = lab.students(cell, chosen, (0,))
        keys[metric] = {s.name: lab.key(s) for s in stage.all()}
    cell, chosen = setup("smoke", "figure4/cifar-100/random/hl/convnet/10/own/tm-loss")
    (figure4,) = lab.students(cell, chosen, (0,))
    assert keys[""]["distill"] == keys["/tm-loss"]["distill"] and "objective" in keys["/tm-loss"]
    assert keys["/tm-loss"]["experts"] == next(lab.key(s) for s in figure4.all() if s.name == "experts")


def test_every_selector_has_every_objective_at_every_scale():
    for scale in PAPER.scales:
        found = {}
        for c in PAPER.cells_at(scale):
            if c.table == "selectors":
                found.setdefault((c.method, c.ipc), set()).add(c.metric)
        twice = {method for method, _ in found if method.endswith(figures.TWICE)}
        assert len(found) == (46 if scale == "smoke" else 52) and len(twice) == (0 if scale == "smoke" else 3)
        assert {*map(frozenset, found.values())} == {frozenset(("accuracy", *figures.OBJECTIVE_WORDS))}


def test_soft_regimes_want_a_teacher(lab):
    cell, chosen = setup("smoke", "regimes/cifar-100/random/sl/convnet/10/own")
    with pytest.raises(ValueError, match="'hard-truths-soft' and CA2D want a teacher"):
        matching_stages.students(lab, cell, replace(chosen, teacher_network=""), (0,))


def test_a_teacher_sees_pixels_as_it_was_trained_on(lab):
    """The student's normalisation is undone: the same logits as on the teacher's own centre views."""
    _, chosen = setup("smoke", "regimes/cifar-100/random/sl/convnet/10/own")
    on = matching_stages.task_of(lab, chosen)
    quick = replace(chosen, teacher=replace(chosen.teacher, epochs=1))
    logits = matching_stages.teacher_logits(lab, quick, on, on.train.images[:40])
    net, data = lab.restored(lab.teacher(quick.taught_by(on))), lab.data("digits", "train")
    views = data.center(on.size)[:40].float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (data.mean, data.std))
    torch.testing.assert_close(logits, net((views - mean) / std).detach(), rtol=1e-4, atol=1e-4)


def test_el2n_best_is_chosen_by_students_on_training_images_that_are_held_out(lab):
    _, chosen = setup("smoke", "selectors/cifar-100/el2n-best/hl/convnet/10/own")
    quick = replace(chosen, protocol=replace(chosen.protocol, epochs=2), distill={**chosen.distill, "epochs": 3})
    stage = matching_stages.images(lab, quick, "coreset", 0)
    made = lab.entry(stage)
    betas, found = made.meta["betas"], made.meta["accuracies"]
    assert betas == list(coresets.BETAS) and len(set(found)) > 1
    plain = {**quick.distill, "method": "el2n", "beta": betas[found.index(max(found))]}
    same = lab.entry(matching_stages.images(lab, replace(quick, distill=plain), "coreset", 0))
    assert torch.equal(made.tensors()["indices"], same.tensors()["indices"])
    soft = replace(quick, protocol=replace(PROTOCOLS["hard-truths-soft"], epochs=2, batch=quick.protocol.batch))
    assert lab.key(matching_stages.images(lab, soft, "coreset", 0)) == lab.key(stage)  # one set for all regimes


def test_degenerate_sets_are_the_better_half_of_a_selection_twice(lab):
    _, chosen = setup("smoke", "selectors/cifar-100/graphcut/hl/convnet/10/own")
    quick = replace(chosen, distill={**chosen.distill, "epochs": 3})
    twice = replace(quick, distill={**quick.distill, "twice": True})
    own, half = (lab.entry(matching_stages.images(lab, s, "coreset", 0)).tensors() for s in (quick, twice))
    assert half["labels"].bincount().tolist() == [10] * 10
    for k in range(10):
        best = own["indices"][own["labels"] == k][:5].tolist()
        assert half["indices"][half["labels"] == k].tolist() == [i for i in best for _ in range(2)]
    again = [int((own["indices"] == i).nonzero()) for i in half["indices"]]
    assert torch.equal(half["images"], own["images"][again])


def test_degenerate_sets_want_classes_of_an_even_number():
    found = {"indices": torch.tensor([7, 3, 9, 5, 1, 8]), "labels": torch.tensor([0, 1, 0, 1, 0, 0])}
    assert doubled(found)["indices"].tolist() == [7, 7, 9, 9, 3, 3]
    with pytest.raises(ValueError, match="class 1 has 1 images"):
        doubled({name: values[:3] for name, values in found.items()})


# ---------------------------------------------------------------- a part of the smoke run


def test_very_poor_sets_are_left_out_of_the_correlations(monkeypatch):
    """Four sets in line, and one so poor that it turns the order."""
    sets = {"a": (90.0, 1.0), "b": (88.0, 2.0), "c": (86.0, 3.0), "d": (84.0, 4.0), "poor": (40.0, 0.5)}
    results = {
        f"{name}/{metric}": {"table": "selectors", "method": name, "ipc": 10, "metric": metric, "mean": value}
        for name, both in sets.items() for metric, value in zip(("accuracy", "DM loss"), both, strict=True)
    }  # fmt: skip
    run = type("Run", (), {"results": results})()
    assert figures.subsets(run, "DM loss").query("poor")["method"].tolist() == ["poor"]
    assert figures.correlations(run)["DM loss"].rho == pytest.approx(1)
    assert figures.correlations(run, poor=True)["DM loss"].rho < 0.5 and "BN loss" not in figures.correlations(run)


@pytest.mark.slow
def test_sets_under_every_regime(run, lab):
    assert not run.failed
    found = {(r["method"], r["setting"]): r for r in run.results.values() if r["table"] == "regimes"}
    assert len(found) == 7 and all(r["mean"] > 15 for r in found.values())
    soft, online = found["CAD-Prune", "SL"], found["CAD-Prune", "SL+KD"]
    assert soft["bytes"]["labels"] == 100 * 10 * 4 and online["bytes"]["labels"] == 0
    assert soft["teacher_accuracy"] == online["teacher_accuracy"] > 80
    assert {s["stage"] for s in found["CAD-Prune", "HL"]["stages"]} == {"trajectory", "distill", "students"}
    assert {s["stage"] for s in found["CA2D", "HL"]["stages"]} == {"trajectory", "teacher", "distill", "students"}


@pytest.mark.slow
def test_chosen_images_are_training_images_of_their_class(run):
    made = run.entry("regimes/cifar-100/cad-prune/hl/convnet/10/own").tensors()
    _, chosen = setup("smoke", "regimes/cifar-100/cad-prune/hl/convnet/10/own")
    on = matching.task("digits", None, device=torch.device("cpu"), network=chosen.network)
    assert torch.equal(on.prepare(on.train.images[made["indices"]]), made["images"])
    assert torch.equal(on.train.labels[made["indices"]], made["labels"])
    assert made["labels"].bincount().tolist() == [10] * 10 and len(made["indices"].unique()) == 100


@pytest.mark.slow
def test_figures_and_spreads(run):
    import pandas as pd

    drawn = {path.stem for path in run.folder.glob("*.png")}
    assert {"figure_regimes", "figure_selectors", "figure_scores", "figure_sets"} <= drawn
    assert {"figure1", "figure4", "figure5", "figure_scaling"} <= drawn
    data = pd.DataFrame(run.values("regimes"))
    spread = figures.spreads(data)
    sets = data[data["method"] != "CA2D"].groupby(["method", "setting"])["accuracy"].mean().unstack()
    for regime in figures.REGIMES:
        assert spread.loc[10, regime] == pytest.approx(sets[regime].max() - sets[regime].min())


@pytest.mark.slow
def test_objectives_stand_beside_the_accuracy_of_their_set(run):
    found = {r["metric"]: r for r in run.results.values() if r["cell"].startswith("selectors/cifar-100/margin/")}
    assert set(found) == {"accuracy", *figures.OBJECTIVE_WORDS}
    assert all(len(found[m]["values"]) == 1 and found[m]["mean"] > 0 for m in figures.OBJECTIVE_WORDS)
    made = {m: next(s["key"] for s in r["stages"] if s["stage"] == "distill") for m, r in found.items()}
    assert len(set(made.values())) == 1
    data = figures.subsets(run, "DM loss")
    assert data[["method", "ipc"]].values.tolist() == [["margin", 10]]
    assert data["error"][0] == pytest.approx(100 - found["accuracy"]["mean"])
    assert figures.correlations(run) == {}  # one set orders nothing


@pytest.mark.slow
def test_longer_training_changes_the_students_alone(run):
    cells = [r for r in run.results.values() if r["table"] == "figure5"]
    sets = {tuple(s["key"] for s in r["stages"] if s["stage"] == "distill") for r in cells}
    assert len(cells) == 2 and len(sets) == 1
    data = figures.convergence(run)
    assert sorted(set(data["epochs"])) == [8, 30]
    as_long = next(r for r in cells if r["setting"] == "x 1")
    same = next(r for r in run.results.values() if r["cell"] == "regimes/cifar-100/random/hl/convnet/10/own")
    assert as_long["values"] == same["values"]


@pytest.mark.slow
def test_a_fitted_law_is_that_of_the_mean_curve(run, lab):
    from common.scaling import fit_scaling_law

    found = {r["metric"]: r["mean"] for r in run.results.values() if r["table"] == "scaling"}
    (planned, *_) = (p for p in run.planned if p.cell.table == "scaling" and p.stages)
    made = lab.entry(planned.stages[0])
    curves = [lab.entry(stage).meta["curves"][0] for stage in planned.stages[0].needs]
    assert len(curves) == 2 and all(len(curve) == len(made.tensors()["epochs"]) for curve in curves)
    errors = [1 - sum(pair) / 200 for pair in zip(*curves, strict=True)]
    law = fit_scaling_law(100, errors, made.tensors()["epochs"].tolist())
    assert found == pytest.approx({"b": law.b, "tau": law.tau})
    wide = fit_scaling_law(100, errors, made.tensors()["epochs"].tolist(), likelihood=0.147)
    told = {r["metric"]: r for r in run.results.values() if r["table"] == "scaling"}
    assert told["b"]["interval"] == pytest.approx(list(wide.b_range))
    assert told["tau"]["interval"] == pytest.approx(list(wide.tau_range))
    assert told["b"]["fit"] == pytest.approx({"a": law.a, "d": law.d, "r2": law.r2})
    (row,) = figures.scaling_fits(run).to_dict("records")
    assert row["b"].split()[0] == f"{law.b:.3f}" and row["d (%)"] == f"{100 * law.d:.1f}"


def test_a_fit_at_the_end_of_the_grid_is_marked():
    def result(metric, mean, low, high):
        return {"table": "scaling", "method": "Random", "setting": "HL", "ipc": 10, "metric": metric, "mean": mean,
                "interval": [low, high], "fit": {"a": 1.0, "d": 0.25, "r2": 0.9}}  # fmt: skip

    results = {"b": result("b", -0.5, -1.0, -0.25), "tau": result("tau", 10.0, 2.5, 10.0)}
    (row,) = figures.scaling_fits(SimpleNamespace(results=results)).to_dict("records")
    assert row == {
        "method": "Random", "labels, IPC": "HL, 10", "b": "-0.500", "b, 95 %": "-1.000 (end) to -0.250",
        "tau": "10.0 (end)", "tau, 95 %": "2.5 to 10.0 (end)", "d (%)": "25.0", "R2": "0.900",
    }  # fmt: skip


@pytest.mark.slow
def test_real_images_lead_a_student_towards_its_expert(run, lab):
    (found,) = (r for r in run.results.values() if r["table"] == "figure4")
    (planned,) = (p for p in run.planned if p.cell.table == "figure4" and p.stages)
    losses = lab.entry(planned.stages[0]).tensors()["losses"]
    assert len(losses) == 3 and found["mean"] == pytest.approx(float(losses.mean()))
    assert ((losses > 0) & (losses < 0.9)).all() and len(losses.unique()) == 3  # 1 is where it started


def test_a_loss_for_another_network_has_an_expert_of_its_own(lab):
    networks = {}
    for arch in ("convnet", "resnet-18"):
        cell, chosen = setup("smoke", f"figure4/cifar-100/random/hl/{arch}/10/own/tm-loss")
        (stage,) = lab.students(cell, chosen, (0,))
        networks[arch] = [s.settings["network"] for s in stage.all() if s.name in ("distill", "experts")]
    assert networks["convnet"] == ["convnet3-instance-w32"] * 2
    assert networks["resnet-18"] == ["convnet3-instance-w32", "resnet18-bn-w8"]


def test_the_bootstrap_draws_the_sets_of_a_selector_together(monkeypatch):
    asked = []
    monkeypatch.setattr(figures, "dcs", lambda *given, generator: asked.append(list(given[3])))
    names = ("EL2N, hardest", "EL2N-Best", "forgetting, most", "forgetting, least", "DUAL", "Random")
    results = {
        f"{name}/{ipc}/{metric}": {"table": "selectors", "method": name, "ipc": ipc, "metric": metric, "mean": 50.0}
        for name in names for ipc in (10, 50) for metric in ("accuracy", "DM loss")
    }  # fmt: skip
    figures.correlations(type("Run", (), {"results": results})())
    drawn = dict(zip([name for name in names for _ in (10, 50)], asked[0], strict=True))
    assert drawn == {"EL2N, hardest": "EL2N", "EL2N-Best": "EL2N", "forgetting, most": "forgetting",
                     "forgetting, least": "forgetting", "DUAL": "DUAL", "Random": "Random"}  # fmt: skip


def test_sets_of_unequal_classes_are_drawn_by_their_labels(monkeypatch):
    """A class of fewer than IPC images must not shift those behind it."""
    labels = torch.arange(10).repeat_interleave(torch.tensor([3, 10, 2, 10, 10, 10, 10, 10, 10, 10]))
    on = SimpleNamespace(
        train=SimpleNamespace(classes=[*"abcdefghij"]), pixels=lambda images: images.expand(-1, 1, 2, 2)
    )
    made = SimpleNamespace(tensors=lambda: {"images": labels[:, None, None, None].float(), "labels": labels})
    cell = SimpleNamespace(table="regimes", setting="HL", ipc=10, method="DM")
    planned, shown = SimpleNamespace(cell=cell, setup=SimpleNamespace(run_on="digits")), []
    monkeypatch.setattr(figures, "task_of", lambda *_: on)
    monkeypatch.setattr(figures.drawing, "entry", lambda *_: made)
    monkeypatch.setattr(figures.drawing, "show_image", lambda _, image: shown.append(int(image[0, 0, 0])))
    monkeypatch.setattr(figures.drawing, "captioned", lambda figure, *_: figure)
    figures.figure_sets(SimpleNamespace(planned=[planned], lab=SimpleNamespace(run_on=lambda setup: setup.run_on)))
    assert shown == list(range(10))


# ---------------------------------------------------------------- cells of the notebook


def notebook_cell(text: str) -> str:
    """The source of the code cell that has some text."""
    (source,) = (source for source in code_cells(load_notebook("hard_truths")) if text in source)
    return source


def test_the_notebook_shows_what_no_cell_has():
    assert 'table("not_run")' in notebook_cell("not_run")


@pytest.mark.parametrize(("scale", "words"), [("small", "| MTT  "), ("paper", "not made at this scale")])
def test_the_notebook_shows_the_leaderboard_of_all_methods(scale, words, monkeypatch):
    monkeypatch.chdir(ROOT.parent)
    said, given = [], SimpleNamespace(scale=scale)
    monkeypatch.setattr(show, "display", said.append)
    exec(notebook_cell("leaderboard.md"), {"args": given, "Path": Path, "shown": show.Shown(None)})
    assert words in said[0].data and "\n# " not in f"\n{said[0].data}"


@pytest.mark.parametrize(("shift", "answers"), [(0.0, ["yes"] * 4), (3e-4, ["yes", "yes", "no", "no"])])
def test_printed_values_are_on_a_grid_to_all_their_digits(shift, answers, monkeypatch):
    """0.05 has two digits, the others four: a grid that is off by 3e-4 has the former alone."""
    b, tau = scaling.GRIDS["paper"]
    monkeypatch.setitem(scaling.GRIDS, "paper", (b + shift, tau))
    said = []
    exec(notebook_cell("printed as delta"), {"display": said.append, "Markdown": str})
    assert [line.split("|")[-2].strip() for line in said[0].splitlines()[2:]] == answers


def test_only_curves_under_hard_labels_are_fitted_to_the_error_of_all_images(monkeypatch):
    epochs = torch.arange(1, 11)
    meta = {"settings": {"images": 100}, "b": [-0.2], "tau": [2.0], "b_range": [-0.3, -0.1], "tau_range": [1, 3],
            "d": 0.1, "r2": 0.99}  # fmt: skip
    tensors = {"epochs": epochs, "errors": 0.3 + 0.5 * epochs.double() ** -0.3}
    entry = SimpleNamespace(meta=meta, tensors=lambda: tensors)
    monkeypatch.setattr(drawing, "entry", lambda *_: entry)
    cells = [SimpleNamespace(table="scaling", metric="b", method="Random", setting=setting, ipc=10)
             for setting in ("HL", "SL+KD")]  # fmt: skip
    said = []
    exec(notebook_cell('table("scaling")'), {
        "display": said.append, "Markdown": str, "table": str, "figure": str,
        "accuracies": lambda *_, **__: [{"mean": 80.0}],
        "finished": SimpleNamespace(planned=[SimpleNamespace(cell=cell) for cell in cells]),
    })  # fmt: skip
    hard, soft = (line.split("|")[-2].strip() for line in said[0].splitlines()[2:])
    assert hard != "-" and soft == "-"


def test_correlations_of_made_up_sets():
    def result(method, ipc, metric, mean):
        return {"table": "selectors", "method": method, "ipc": ipc, "metric": metric, "mean": mean}

    rows = [
        result(f"set {i}", ipc, metric, value)
        for i in range(6)
        for ipc in (10, 50)
        for metric, value in {"accuracy": 30 + i + ipc / 2, "BN loss": 100 - i - ipc, "DM loss": 5 + i,
                              "TM loss": i % 2}.items()
    ]
    found = figures.correlations(SimpleNamespace(results=dict(enumerate(rows))))
    assert found["BN loss"].partial == pytest.approx(1) and found["DM loss"].within == pytest.approx(-1)
    assert found["BN loss"].subsets == 12 and abs(found["TM loss"].partial) < 0.5
