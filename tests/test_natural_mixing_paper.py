"""The paper on natural mixing as a user meets it: settings of its cells, shared sets, and a part of the smoke run."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import corruptions, matching
from common.datasets import load
from common.hardware import compiler
from common.protocols import PROTOCOLS
from common.store import Store
from papers import matching_stages, measured_stages, mixing_stages, planning, runner, setups
from papers.cells import SCALES, load_paper
from papers.natural_mixing import figures
from papers.stages import Lab
from tests.image_trees import tree

PAPER = load_paper("natural_mixing")
ONLY = "robustness/*/dm/*/1,table1/*/dm/*/1,figure2/*/dm/*/1,figure2/*/all,figure1/full-data,controls/*/random/*/1"


def setup(scale: str, name: str):
    (cell,) = (c for c in PAPER.cells_at(scale) if c.id == name)
    return cell, setups.setup_of(PAPER.scales[scale], cell)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("mixing")


@pytest.fixture(scope="module")
def lab(place):
    return Lab(Store(place / "runs"), None, torch.device("cpu"), "fp32")


@pytest.fixture(scope="module")
def run(place):
    args = ["paper=natural_mixing", "scale=smoke", f"store={place}/runs", f"out={place}/tables", "device=cpu"]
    return runner.run(runner.parse([*args, f"only={ONLY}", "precision=fp32"]))


# ---------------------------------------------------------------- settings


def test_all_real_images_are_learned_by_the_network_of_the_cell(lab):
    """A student of another network than the sets' is another result, with all images and untrained too."""
    cell, found = setup("smoke", "figure1/cifar-10/full-data/convnet/all/own")
    for algorithm in (cell.algorithm, matching_stages.UNTRAINED):
        asked = replace(cell, algorithm=algorithm)
        make = lambda planned, asked=asked: matching_stages.students(lab, asked, planned, (0,))  # noqa: E731
        (own,), (other,) = make(found), make(replace(found, student_network="mlp"))
        assert lab.key(own) != lab.key(other)
        assert (own.settings["network"], other.settings["network"]) == (found.network, "mlp")
        (mean,) = make(replace(found, transfer=("mlp", "lenet")))
        assert (mean.name, len(mean.needs)) == ("mean", 2)


def test_students_train_by_the_released_script():
    for name in ("dc", "dm", "dsa", "random"):
        _, found = setup("paper", f"table1/cifar-10/{name}/mixed/convnet/50/own")
        assert found.protocol == PROTOCOLS["mixing-2025"]
        assert (found.protocol.epochs, found.protocol.lr, found.protocol.augment) == (300, 1e-3, "")
        assert found.mix == {"alpha": "epoch"}
    _, att = setup("paper", "table1/cifar-10/att/mixed/convnet/10/own")
    assert att.protocol == PROTOCOLS["mtt-2022"] and att.distill["zca"]
    assert not setup("paper", "table1/cifar-10/dc/baseline/convnet/50/own")[1].mix


@pytest.mark.parametrize("scale", SCALES)
def test_the_sets_are_those_of_the_matching_paper(scale):
    """Down to the last setting, so that both papers find them under one name in the store."""
    matching_paper = load_paper("matching")
    theirs = {c.id: c for c in matching_paper.cells_at(scale)}
    for cell in PAPER.cells_at(scale):
        twin = theirs.get(f"table1/cifar-10/{cell.algorithm}/convnet/{cell.ipc}/own")
        if cell.table == "table1" and twin is not None:
            ours = setups.setup_of(PAPER.scales[scale], cell)
            other = setups.setup_of(matching_paper.scales[scale], twin)
            assert ours is None or other is not None  # no cell without a set to stand on
            if ours is not None:
                assert (ours.distill, ours.network, ours.size) == (other.distill, other.network, other.size)


def test_every_printed_number_of_a_method_that_runs_has_a_cell():
    cells = {tuple(c.key().values()) for c in PAPER.cells_at("paper")}
    from papers import report

    printed = report.load_reported(Path(runner.__file__).parent / "natural_mixing" / "reported.csv")
    left = [r for r in printed if r["table"].startswith("table") and tuple(r[k] for k in report.KEY) not in cells]
    assert {r["method"] for r in left} == {"GLaD"}


@pytest.mark.parametrize(("scale", "epochs"), [("smoke", 30), ("small", 300), ("paper", 300)])
def test_controls_train_for_as_many_epochs(scale, epochs):
    found = [setups.setup_of(PAPER.scales[scale], c) for c in PAPER.cells_at(scale) if c.table == "controls"]
    assert {s.protocol.epochs for s in found if s} == {epochs}
    assert {s.protocol.optimizer for s in found if s} == {"adam", "sgd"}


def test_a_printed_number_without_a_cell_says_why():
    args = runner.parse(["paper=natural_mixing", "scale=paper", "device=cpu"])
    planned = [planning.Planned(cell) for cell in PAPER.cells_at("paper")]
    rows = runner.Run(args, PAPER, None, planned, Path("nowhere"), {}).rows
    told = {(r["method"], r["metric"]): r["status"] for name in PAPER.tables for r in rows(name) if r["reported"]}
    assert not [where for where, status in told.items() if "no cell" in status]
    assert "attack is not named" in told["DC", "attack-1 accuracy"] and "no result" in told["DC", "corruption accuracy"]


# ---------------------------------------------------------------- stages


def test_a_missing_pool_takes_its_own_cell_down_alone(tmp_path):
    args = ["paper=natural_mixing", "scale=smoke", f"store={tmp_path}/runs", "device=cpu", "precision=fp32"]
    args = runner.parse([*args, "only=controls/random/1"])
    scale = {**PAPER.scales["smoke"]}
    scale["data"] = {k: {**v, "pools": {"cifar100": "cifar100"}} for k, v in scale["data"].items()}
    paper = replace(PAPER, scales={**PAPER.scales, "smoke": scale})
    lab = Lab(Store(tmp_path / "runs"), str(tmp_path), torch.device("cpu"), "fp32")
    planned = [p for p in planning.make_plan(args, paper, lab) if p.stages or p.why.startswith("missing data")]
    missing = [p for p in planned if p.why.startswith("missing data") and "cifar100" in p.why]
    assert [p.cell.setting for p in missing] == ["no augmentation, mixed with any class"]
    assert len([p for p in planned if p.stages]) == len(planned) - 1
    rows = runner.Run(args, paper, lab, planned, tmp_path, {}).rows("controls")
    (said,) = {row["status"] for row in rows if "missing" in row["status"]}
    assert said == "not run: missing data: data set 'cifar100' is not there"  # and not where this machine looked


def test_a_pool_that_is_streamed_is_named_when_it_is_planned(lab, tmp_path, monkeypatch):
    cell, chosen = setup("smoke", "table1/cifar-10/random/mixed/convnet/10/own")
    tree(tmp_path)
    pool = load("own", tmp_path, resident_bytes=0)
    monkeypatch.setattr(mixing_stages, "_other", lambda *_: pool)
    with pytest.raises(ValueError, match=r"mix\.pool='own' is streamed from disk"):
        matching_stages.students(lab, cell, replace(chosen, mix={"partner": "any", "pool": "own"}), (0,))


def test_mixtures_change_with_student_and_epoch_and_stay_in_the_class(lab):
    _, chosen = setup("smoke", "table1/cifar-10/random/mixed/convnet/10/own")
    on = matching_stages.task_of(lab, chosen)
    tensors = matching.random_subset(on, 10, 0)
    see = mixing_stages.mixture(lab, chosen, on, tensors)
    assert torch.equal(see(0, 0), see(0, 0))
    assert not torch.equal(see(0, 0), see(0, 1)) and not torch.equal(see(0, 0), see(1, 0))
    real = mixing_stages.mixture(lab, replace(chosen, mix={"alpha": "fixed", "share": 1.0}), on, tensors)(0, 0)
    everything = on.prepare(on.train.images)
    for image, label in zip(real[::17], tensors["labels"][::17], strict=True):
        same = (everything - image).abs().flatten(1).amax(1) < 1e-6
        assert label in on.train.labels[same]
    fractal = mixing_stages.mixture(lab, replace(chosen, mix={"partner": "any", "pool": "fractals"}), on, tensors)
    assert fractal(0, 0).shape == tensors["images"].shape


def test_partners_are_of_the_label_that_is_learned(lab):
    """What a teacher says of an image does not change its class; labels that were learned with it do."""
    _, chosen = setup("smoke", "table1/cifar-10/random/mixed/convnet/10/own")
    on = matching_stages.task_of(lab, chosen)
    tensors = {"images": on.prepare(on.train.images[:10]), "labels": torch.zeros(10, dtype=torch.long)}
    tensors["soft_labels"] = torch.eye(10)[torch.full((10,), 3)]
    for labels, wanted in (("kl", 0), ("hard", 0), ("soft", 3)):
        protocol = replace(chosen.protocol, labels=labels)
        changed = replace(chosen, mix={"alpha": "fixed", "share": 1.0}, protocol=protocol)
        real, own = mixing_stages.mixture(lab, changed, on, tensors)(0, 0), on.train.labels == wanted
        near = (on.prepare(on.train.images[own])[None] - real[:, None]).abs().flatten(2).amax(2).amin(1)
        assert near.max() < 1e-6, labels


def test_options_of_an_attack_are_used_and_named_only_where_they_are_given(lab, monkeypatch):
    cell, chosen = setup("smoke", "robustness/cifar-10/dm/baseline/convnet/1/own/pgd-8-accuracy")
    options, seen = {"steps": 20, "restarts": 5}, []
    monkeypatch.setattr(measured_stages, "robust_accuracy", lambda *_, **given: seen.append(given) or 1.0)
    monkeypatch.setattr(measured_stages, "networks_of", lambda *_: [None])
    harder = setups.setup_of(PAPER.scales["smoke"], replace(cell, measure={"pgd": options}))
    plain, given, fgsm = (
        measured_stages.measured(lab, replace(cell, metric=metric), found, (0,))[0]
        for metric, found in ((cell.metric, chosen), (cell.metric, harder), ("fgsm-8 accuracy", harder))
    )
    assert plain.settings == {"attack": "pgd", "eps255": 8, "sample": 100, "stop": "at the first miss"}
    assert given.settings == {**plain.settings, **options} and given.flops == 10 * plain.flops
    assert fgsm.settings == {"attack": "fgsm", "eps255": 8, "sample": 100} and plain.inputs == given.inputs
    monkeypatch.setattr(lab, "entry", lambda _: SimpleNamespace(meta={"seeds": [0]}))
    for stage in (plain, given, fgsm):
        stage.build(Path("nowhere"))
    assert ["steps" in one for one in seen] == [False, True, False] and options.items() <= seen[1].items()


@pytest.mark.parametrize(("scale", "ipcs"), [("smoke", []), ("small", [10]), ("paper", [10, 50])])
def test_harder_attacks_are_planned_alone_and_mixed(scale, ipcs):
    found = [c for c in PAPER.cells_at(scale) if c.measure and setups.setup_of(PAPER.scales[scale], c)]
    assert [(c.metric, c.ipc, bool(c.mix)) for c in found] == [
        ("pgd-8 accuracy", ipc, mixed) for mixed in (False, True) for ipc in ipcs
    ]
    for cell in found:
        measure = setups.setup_of(PAPER.scales[scale], cell).measure
        assert measure == {**PAPER.scales[scale]["measure"], "pgd": {"steps": 20, "restarts": 5}}


@pytest.mark.filterwarnings("ignore:.*half-unpacked")
def test_released_corruptions_are_compared_with_those_made_here(tmp_path, monkeypatch):
    """A released set of ten images, each as clean as the test images, beside an image tree of ten classes."""
    tree(tmp_path, "cifar10", tuple("0123456789"), ((32, 32),), 1)
    cell, chosen = setup("small", "robustness/cifar-10/random/baseline/convnet/1/own/sample-accuracy")
    cell, protocol = replace(cell, metric="corruption accuracy"), replace(chosen.protocol, epochs=20)
    chosen = replace(chosen, network="mlp", measure={"severities": [5]}, protocol=protocol)

    def measured():
        lab = Lab(Store(tmp_path / "runs"), str(tmp_path), torch.device("cpu"), "fp32")
        (stage,) = measured_stages.measured(lab, cell, chosen, (0,))
        return lab, stage, [need for need in stage.needs if need.name == "corruptions"]

    lab, alone, made = measured()
    (generated,) = lab.entry(alone).meta[cell.metric]
    assert not measured_stages.details([lab.entry(alone).meta], cell.metric)
    clean = matching_stages.task_of(lab, chosen).test.images.permute(0, 2, 3, 1).numpy()
    monkeypatch.setattr(corruptions, "COUNT", 10)
    (tmp_path / "CIFAR-10-C").mkdir()
    for name in corruptions.CORRUPTIONS:
        np.save(tmp_path / "CIFAR-10-C" / f"{name}.npy", np.tile(clean, (5, 1, 1, 1)))
    np.save(tmp_path / "CIFAR-10-C" / "labels.npy", np.tile(np.arange(10), 5))
    lab, beside, both = measured()
    assert len(made) == 1 and [stage.settings["released"] for stage in both] == [True, False]
    assert lab.key(both[1]) == lab.key(made[0]) and lab.key(beside) != lab.key(alone)
    on, meta = matching_stages.task_of(lab, chosen), lab.entry(beside).meta
    (net,) = measured_stages.networks_of(lab, chosen, beside.needs[0])
    logits = measured_stages._logits(net, on, torch.float32, compile=False)
    right = measured_stages._accuracy(logits, on.test.images, on.test.labels)
    found = measured_stages.details([meta], cell.metric)["compared"]
    assert meta[cell.metric] == found["released"] == [pytest.approx(right)] and meta["left_out"] == []
    assert found["generated"] == [generated] and found["difference"] == generated - found["released"][0] != 0
    by_corruption = measured_stages.details([meta], "corruption-19 accuracy")["by_corruption"]
    assert meta["sample accuracy"] == [right] and by_corruption == {name: [right] for name in corruptions.CORRUPTIONS}


@pytest.mark.parametrize("count", [7, 20, 100])
def test_a_sample_of_the_test_images_has_as_many_of_each_class(count):
    labels = torch.arange(10).repeat_interleave(10)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    on = SimpleNamespace(test=SimpleNamespace(images=torch.arange(100)[:, None], labels=labels))
    images, found, rows = measured_stages._sample.__wrapped__(on, count)
    sizes = found.bincount(minlength=10)
    assert sizes.sum() == count and sizes.max() - sizes.min() <= 1
    assert torch.equal(images[:, 0], rows) and torch.equal(found, labels[rows]) and len(rows.unique()) == count


@pytest.mark.filterwarnings("ignore:.*half-unpacked")
def test_corrupted_images_are_seen_compiled_in_bf16_where_students_are(tmp_path, monkeypatch):
    """The same accuracies to a few images, under another key that names the precision."""
    tree(tmp_path, "cifar10", tuple("0123456789"), ((32, 32),), 2)
    cell, chosen = setup("small", "robustness/cifar-10/random/baseline/convnet/1/own/sample-accuracy")
    cell, protocol = replace(cell, metric="corruption accuracy"), replace(chosen.protocol, epochs=20)
    chosen = replace(chosen, network="convnet1", measure={"severities": [3]}, protocol=protocol)
    lab = Lab(Store(tmp_path / "runs"), str(tmp_path), torch.device("cpu"), "fp32")
    (plain,) = measured_stages.measured(lab, cell, chosen, (0,))
    expected = lab.entry(plain).tensors()["accuracy"]
    fast = {"dtype": torch.bfloat16, "compile": compiler()}
    monkeypatch.setattr(Lab, "arithmetic", lambda self, flops: fast)
    again = measured_stages._corrupted(lab, chosen, plain.needs[0])
    found = lab.entry(again).tensors()["accuracy"]
    assert (found - expected).abs().mean() < 5  # 20 images: one is 5 points
    assert again.settings == ({"precision": "bf16"} if compiler() else {})


def test_a_long_distillation_is_compiled_where_its_students_are(lab, monkeypatch):
    """Unless the settings say otherwise."""
    _, short = setup("smoke", "table1/cifar-10/dm/mixed/convnet/1/own")

    def compiled(**own) -> bool:
        return matching_stages._config(lab, replace(short, distill={**short.distill, **own}), "dm").compile

    monkeypatch.setattr(Lab, "arithmetic", lambda self, flops: {"compile": flops > 1e12})
    long = {"iterations": 100_000}
    assert [compiled(), compiled(**long), compiled(**long, compile=False)] == [False, True, False]


def test_published_settings_read_the_sets_that_are_committed_at_small():
    for name, scale in (("natural_mixing", "paper"), ("matching", "paper")):
        assert load_paper(name).scales[scale]["sets_in"] == "matching/small"


def test_a_mixture_is_checked_before_anything_runs(lab):
    _, chosen = setup("smoke", "table1/cifar-10/dm/mixed/convnet/1/own")
    on = matching_stages.task_of(lab, chosen)
    for mix, words in (
        ({"alpha": "epoch", "epochs": 3}, "mix.epochs is unknown; allowed: alpha, share, partner, pool"),
        ({"alpha": "often"}, "alpha='often' is unknown"),
        ({"pool": "fractals"}, "mix.pool='fractals' has no images of the set's classes; allowed: with mix.partner=any"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            mixing_stages.pool_inputs(lab, replace(chosen, mix=mix), on)


def test_an_unknown_metric_is_named(lab):
    cell, chosen = setup("smoke", "table1/cifar-10/dm/gain/convnet/1/own/gain")
    with pytest.raises(ValueError, match="'speed' is unknown; allowed: accuracy, gain, sample accuracy"):
        measured_stages.measured(lab, replace(cell, metric="speed"), chosen, (0,))


# ---------------------------------------------------------------- a part of the smoke run


def results(run, table, **wanted):
    return [r for r in run.results.values() if r["table"] == table and wanted.items() <= r.items()]


@pytest.mark.slow
def test_the_gain_is_a_difference_for_each_student(run):
    assert not run.failed
    (gain,), (plain,), (mixed,) = (results(run, "table1", setting=s) for s in ("gain", "baseline", "mixed"))
    assert gain["values"] == [b - a for a, b in zip(plain["values"], mixed["values"], strict=True)]
    told = {r["status"] for r in run.rows("table1") if r["method"] == "GLaD"}
    assert told == {"not run: needs a pretrained generator"}
    assert plain["values"] != mixed["values"] and gain["settings"]["mix"] == {"alpha": "epoch"}
    rows = {(r["setting"], r["method"]): r for r in run.rows("table1") if r["ipc"] == 1}
    assert rows["gain", "DM"]["ours"] == pytest.approx(gain["mean"]) and rows["gain", "DM"]["reported"] == 17.89


@pytest.mark.slow
def test_robustness_has_every_metric_and_attacks_hurt(run):
    found = {(r["setting"], r["metric"]): r["mean"] for r in results(run, "robustness")}
    metrics = ["sample accuracy", "corruption accuracy", "corruption-19 accuracy", "frost accuracy"]
    metrics += [f"{attack}-{step} accuracy" for attack in ("fgsm", "pgd") for step in (1, 8)]
    assert set(found) == {(arm, metric) for arm in ("baseline", "mixed") for metric in metrics}
    for arm in ("baseline", "mixed"):
        assert found[arm, "corruption accuracy"] < found[arm, "sample accuracy"]
        assert found[arm, "fgsm-1 accuracy"] <= found[arm, "sample accuracy"]
        assert found[arm, "pgd-8 accuracy"] <= found[arm, "fgsm-8 accuracy"] + 1
        assert found[arm, "fgsm-8 accuracy"] <= found[arm, "fgsm-1 accuracy"]


@pytest.mark.slow
def test_the_whole_set_teaches_most_and_similarity_is_a_share(run):
    (full,) = results(run, "figure1", method="Full data")
    assert full["mean"] > max(r["mean"] for r in results(run, "table1", metric="accuracy"))
    values = {r["method"]: r["mean"] for r in results(run, "figure2")}
    assert len(results(run, "figure2")) == 4 and all(0 < v < 1 for v in values.values())
    assert values["Untrained"] < values["Full data"]
    titles = [ax.get_title() for ax in figures.figure2(run).axes]
    for name in ("other networks of all images", "untrained networks"):
        assert len([title for title in titles if title.startswith(name)]) == 1
    assert full["bytes"]["images"] == 0 and full["ipc"] is None


@pytest.mark.slow
def test_controls_and_figures(run):
    arms = {r["setting"]: r["mean"] for r in results(run, "controls")}
    plain, dsa = "no augmentation", "DiffAugment"
    wanted = {plain, f"{plain}, mixed", f"{plain}, fresh real images alone", dsa, f"{dsa}, mixed"}
    assert wanted < set(arms) and len(arms) == len({r["setting"] for r in run.rows("controls") if r["ipc"] == 1})
    assert arms["no augmentation, fresh real images alone"] > arms["no augmentation"]
    drawn = {path.stem for path in run.folder.glob("*.png")}
    assert {"figure2", "figure_gain", "figure_controls", "figure_robustness", "figure_mixtures"} <= drawn
    assert figures.figure1(run) is None  # DC was left out
    text = json.loads((run.folder / "cells" / "figure1_cifar-10_full-data_convnet_all_own.json").read_text())
    assert text["settings"]["measure"]["full"]["epochs"] == 5
