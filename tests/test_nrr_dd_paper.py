"""The NRR-DD paper as a user meets it: settings of its cells, label types, a part of the smoke run, scripts alone."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common import networks, script, teachers
from common.augment import rng
from common.datasets import info, load
from common.labels import kd_loss
from common.views import Recipe, normalise
from methods import nrr_dd, rded, sre2l, wmdd
from papers import image_stages, runner, setups, stages
from papers.cells import SCALES, load_paper
from tests.image_trees import tree

ROOT = Path(__file__).resolve().parent.parent
PAPER = load_paper("nrr_dd")


def setup(scale: str, name: str) -> setups.ImageSetup:
    (cell,) = (c for c in PAPER.cells_at(scale) if c.id == name)
    return setups.setup_of(PAPER.scales[scale], cell)


# ---------------------------------------------------------------- settings


def test_published_settings_reach_the_cells():
    rded = setup("paper", "table1/imagenette/rded/resnet-18/10/soft")
    assert (rded.network, rded.size, rded.distill["pool"], rded.distill["factor"]) == ("resnet18", 224, 300, 2)
    student = rded.student
    assert (student.epochs, student.batch, student.lr, student.schedule) == (300, 50, 1e-3, "half-cosine")
    assert (student.crop, student.shuffle, student.cutmix, student.bn_momentum) == (0.5, 2, True, 0.19)
    small = setup("paper", "table1/imagenette/nrr-dd/convnet/1/soft")
    assert (small.size, small.shorter, rded.shorter) == (128, 144, None)
    assert setup("paper", "table1/tiny-imagenet/nrr-dd/resnet-18/10/soft").shorter == 72
    cifar = setup("paper", "table1/cifar-10/sre2l/convnet/10/soft")
    assert cifar.distill["iterations"] == 1000 and not cifar.distill["crop"] and cifar.network == "convnet3"
    assert (cifar.teacher.pad, cifar.teacher.lr, cifar.teacher.batch) == (4, 0.1, 128)
    assert setup("paper", "table1/tiny-imagenet/nrr-dd/resnet-18/10/soft").distill["bn_weight"] == 0.05


def test_who_distils_for_whom():
    made = {m: setup("paper", f"table1/cifar-10/{m}/resnet-101/10/soft") for m in ("sre2l", "rded", "nrr-dd")}
    assert {m: s.network for m, s in made.items()} == {
        "sre2l": "resnet18-mod", "rded": "resnet18-mod", "nrr-dd": "resnet101-mod",
    }  # fmt: skip
    assert {s.student_network for s in made.values()} == {"resnet101-mod"}
    crossed = setup("paper", "table3/imagenet-1k/nrr-dd/from-mobilenetv2/efficientnet-b0/10/soft")
    assert (crossed.network, crossed.student_network) == ("mobilenet_v2", "efficientnet_b0")
    assert crossed.student.lr == 2e-3


def test_label_types():
    soft = setup("paper", "table2/imagenette/rded/sl/resnet-18/10/soft")
    hard = setup("paper", "table2/imagenette/rded/oh/resnet-18/10/hard")
    assert (soft.student.labels, soft.student.cutmix) == ("soft", True)
    assert (hard.student.labels, hard.student.cutmix) == ("hard", False)  # one-hot: images are not mixed
    plain, refined = (
        setup("paper", f"table2/imagenette/nrr-dd/{s}/resnet-18/10/boundary") for s in ("dbr", "dbr+lr")
    )
    assert plain.distill.get("label_refinement", 0) == 0 and refined.distill["label_refinement"] == 1
    assert plain.regime == refined.regime == "boundary"


def test_what_released_code_does_can_be_had():
    """JPEG, the teacher's BatchNorm and T^2 are of the student's part of a cell; keys name them where asked for."""
    arms = {"kept-as-jpeg-of-quality-75": {"jpeg": 75}, "labels-by-batch-statistics": {"batch_statistics": True},
            "loss-times-t-squared": {"t_squared": True}}  # fmt: skip
    plain = setup("paper", "table4/cifar-10/rded/convnet/10/soft")
    assert plain.released() == {} and plain.facts()["jpeg"] == 0
    for name, released in arms.items():
        found = setup("paper", f"table4/cifar-10/rded/{name}/convnet/10/soft")
        assert found.released() == released and replace(found, **{k: type(v)() for k, v in released.items()}) == plain
    logits, kept = torch.randn(2, 5, 10, generator=rng(0))
    _, loss = stages._transfer(found)
    assert loss(logits, kept, None, None) == 400 * kd_loss(logits, kept, 20.0)
    (cell,) = (c for c in PAPER.cells_at("paper") if c.id == "table4/cifar-10/rded/convnet/10/soft")
    with pytest.raises(ValueError, match=r"student\.jpeg=101 is no quality; allowed: 1 to 100"):
        setups.setup_of(PAPER.scales["paper"], replace(cell, student={"jpeg": 101}))


def test_jpeg_files_lose_detail_and_keep_what_is_even():
    even = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    assert torch.equal(image_stages.through_jpeg(even, 75), even)
    noise = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=rng(0))
    lost = [(image_stages.through_jpeg(noise, q).float() - noise.float()).abs().mean() for q in (100, 75, 10)]
    assert 0 < lost[0] < lost[1] < lost[2]


def test_images_that_are_not_made_of_patches_keep_them_in_place():
    shuffled = {
        m: setup("paper", f"table1/imagenette/{m}/resnet-18/10/soft").student.shuffle
        for m in ("random", "sre2l", "rded", "nrr-dd")
    }
    assert shuffled == {"random": 1, "sre2l": 1, "rded": 2, "nrr-dd": 2}


def test_a_teacher_of_another_class_order_is_named():
    data = load("digits", None, split="train")
    net = networks.make("convnet2", classes=10, size=32, generator=rng(0))
    views, labels = normalise(data.images[:200], data.mean, data.std), data.labels[:200]
    oracle = type("Oracle", (torch.nn.Module,), {"forward": lambda self, x: self.answers})()
    oracle.answers = torch.nn.functional.one_hot(labels, 10).float()
    teachers.check(oracle, views, labels, data.classes)
    oracle.answers = torch.nn.functional.one_hot((labels + 1) % 10, 10).float()
    with pytest.raises(ValueError, match=r"recognises 0\.0 % of 200 real training images.*class order"):
        teachers.check(oracle, views, labels, data.classes)
    with pytest.raises(ValueError, match="near the 10 % of guessing"):
        teachers.check(net.eval(), views, labels, data.classes)


def test_two_classes_need_no_perfect_teacher():
    labels = torch.arange(200) % 2
    oracle = type("Oracle", (torch.nn.Module,), {"forward": lambda self, x: self.answers})()
    for wrong, fine in ((20, True), (90, False)):
        answers = torch.where(torch.arange(200) < wrong, 1 - labels, labels)
        oracle.answers = torch.nn.functional.one_hot(answers, 2).float()
        if fine:
            teachers.check(oracle, torch.zeros(200, 3, 8, 8), labels, ("a", "b"))
        else:
            with pytest.raises(ValueError, match=r"recognises 55\.0 %"):
                teachers.check(oracle, torch.zeros(200, 3, 8, 8), labels, ("a", "b"))


def test_the_epochs_that_rdeds_code_tests():
    assert stages.tested_epochs(Recipe(name="rded-2024", epochs=300)) == {249, 259, 269, 279, 289, 299}
    assert stages.tested_epochs(Recipe(name="rded-2024", epochs=40)) == {39}
    assert stages.tested_epochs(Recipe(epochs=300)) == set()


METHODS = {"sre2l": sre2l, "cda": sre2l, "rded": rded, "cidd": nrr_dd, "nrr_dd": nrr_dd, "wmdd": wmdd}


@pytest.mark.slow
@pytest.mark.parametrize("paper", ["nrr_dd", "wmdd"])
@pytest.mark.parametrize("scale", SCALES)
def test_no_cell_is_planned_that_cannot_work(paper, scale):
    """Pools, patches, class activation maps and BatchNorm of every cell, on the sizes of the published sets."""
    loaded, seen = load_paper(paper), set()
    for cell in loaded.cells_at(scale):
        method = METHODS.get(cell.algorithm)
        found = setups.setup_of(loaded.scales[scale], cell)
        if method is None or found is None:
            continue
        facts = info(found.dataset)
        config = method.Config(**found.distill)
        key = (method, config, found.network, found.size, facts.classes)
        if key in seen:
            continue
        seen.add(key)
        each = 140 if found.dataset == "digits" else min(next(iter(facts.counts.values()))[0] // facts.classes, 500)
        labels = torch.arange(facts.classes).repeat_interleave(each)
        net = image_stages.untrained(found.network, facts.classes, found.size)
        method.check(config, net, labels, size=found.size, side=facts.size or 300)
    assert seen


def test_curricula_roll_as_far_as_their_neighbours():
    wmdd = load_paper("wmdd")
    cells = {c.id: c for c in wmdd.cells_at("paper")}
    for method in ("sre2l", "cda"):
        cell = cells[f"table1/tiny-imagenet/{method}/resnet-18/10/soft"]
        distill = setups.setup_of(wmdd.scales["paper"], cell).distill
        assert distill["jitter"] == -1 and not distill.get("jitter_both"), method  # 32 px at 224, not 4


# ---------------------------------------------------------------- a part of the smoke run


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Every label type at IPC 10, and what the images are made from."""
    place = tmp_path_factory.mktemp("nrr_dd")
    only = "only=table2/imagenette/convnet/10,table4/cifar-10/convnet,table1/cifar-10/convnet/10/soft"
    places = [f"store={place}/runs", f"out={place}/tables", "device=cpu"]
    return runner.run(runner.parse(["paper=nrr_dd", "scale=smoke", only, *places]))


@pytest.mark.slow
def test_every_label_type_makes_a_student(smoke):
    assert not smoke.failed, [p.why for p in smoke.failed]
    found = {(r["method"], r["setting"]): r for r in smoke.results.values() if r["table"] == "table2"}
    assert len(found) == 6
    for name, result in found.items():
        assert len(result["values"]) == 2 and result["mean"] > 25, (name, result["mean"])  # chance is 10
        assert result["teacher_accuracy"] > 95 and len(result["best"]) == 2
        assert all(best >= last for best, last in zip(result["best"], result["values"], strict=True))
    samples = 24 * 100  # epochs x images
    stored = {name: r["bytes"]["labels"] for name, r in found.items()}
    assert stored["RDED", "SL"] == stored["NRR-DD", "SL"] == samples * 10 * 2
    assert stored["NRR-DD", "DBR"] == stored["NRR-DD", "DBR+LR"] == samples * 2 * 2
    assert stored["RDED", "CL"] == samples * 8 and stored["RDED", "OH"] == 0


@pytest.mark.slow
def test_refinement_starts_from_the_images_of_cidd(smoke):
    entries = {}
    for planned in smoke.planned:
        if planned.stages and planned.cell.table == "table4" and not planned.cell.setting:
            made = [smoke.lab.entry(s) for s in planned.stages[0].all() if s.name == "distill"]
            entries[planned.cell.method] = list({entry.key: entry for entry in made}.values())
    assert [len(entries[m]) for m in ("RDED", "CIDD", "CIDD+NRR")] == [1, 1, 2]
    assert entries["CIDD"][0].key == entries["CIDD+NRR"][0].key
    before, after = (e.tensors() for e in entries["CIDD+NRR"])
    assert torch.equal(after["before"], before["images"][::10]) and not torch.equal(after["images"], before["images"])
    still = (after["mask"] == 0)[:, None].expand_as(after["before"])
    assert still.any() and torch.equal(after["images"][::10][still], after["before"][still])


@pytest.mark.slow
def test_tables_name_what_was_made(smoke):
    text = (smoke.folder / "table2.md").read_text()
    assert "DBR+LR" in text and "not comparable" in text
    assert (smoke.folder / "figure3.png").stat().st_size > 0 and (smoke.folder / "figure_storage.png").is_file()


@pytest.mark.slow
def test_labels_stored_recomputed_and_online(smoke):
    """Stored and recomputed labels give the same student; a student online has views of its own."""
    (planned,) = (p for p in smoke.planned if p.cell.id == "table1/cifar-10/rded/convnet/10/soft")
    images = smoke.lab.images(planned.setup, "rded", 0)
    accuracies = {}
    for labels in ("stored", "recomputed", "online"):
        student = replace(planned.setup.student, epochs=10)
        stages = [smoke.lab.student(replace(planned.setup, labels=labels, student=student), images, s) for s in (0, 1)]
        accuracies[labels] = [smoke.lab.entry(stage).meta["losses"][0][1] for stage in stages]
    assert accuracies["stored"] == accuracies["recomputed"] != accuracies["online"]


# ---------------------------------------------------------------- one method alone


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sre2l", "rded", "nrr_dd"])
def test_a_method_alone(method, tmp_path):
    settings = ["dataset=digits", "ipc=1", "size=16", "network=convnet3", "teacher_epochs=2", "student_epochs=2"]
    settings += [] if method == "rded" else ["iterations=3"]
    command = [sys.executable, str(ROOT / "methods" / f"{method}.py"), *settings, f"out={tmp_path}", "device=cpu"]
    done = subprocess.run([*command, f"store={tmp_path}/runs"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "teacher: " in done.stdout and "student: " in done.stdout
    assert (tmp_path / f"{method}_digits_ipc1.safetensors").is_file()
    metas = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/*/meta.json")]
    assert len(metas) == 3  # teacher, images, student: with the facts that a paper's run reads
    assert all({"seconds", "finished", "made", "peak_memory_bytes"} <= meta.keys() for meta in metas)


@pytest.mark.slow
def test_the_student_of_the_script_learns_from_the_labels_it_is_given(tmp_path):
    """The set is made once: neither labels nor boundary_weight are its settings."""
    settings = ["dataset=digits", "ipc=1", "size=16", "network=convnet3", "teacher_epochs=1", "student_epochs=1"]
    settings += ["iterations=1", f"out={tmp_path}", f"store={tmp_path}/runs", "device=cpu"]
    said = {"hard": "labels of the classes", "boundary boundary_weight=5": "boundary labels of the teacher",
            "compact": "compact labels of the teacher", "soft": "soft labels of the teacher"}  # fmt: skip
    for labels, words in said.items():
        command = [sys.executable, str(ROOT / "methods" / "nrr_dd.py"), *settings, *f"labels={labels}".split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"(last epoch, {words})" in done.stdout
    made = [path.parent.parent.name for path in (tmp_path / "runs").glob("*/*/meta.json")]
    assert sorted(made) == ["nrr_dd", *["student"] * 4, "teacher"]


TEN = tuple("abcdefghij")


@pytest.mark.filterwarnings("ignore:.*has 20 images")
@pytest.mark.parametrize(
    ("method", "dataset", "network", "recipe"),
    [
        ("sre2l", "cifar10", "resnet18-mod", "cifar-teacher"),
        ("rded", "cifar10", "resnet18-mod", "cifar-teacher"),
        ("rded", "own", "resnet18-mod", "wmdd-teacher"),
        ("nrr_dd", "cifar10", "convnet3", "cifar-teacher"),
        ("wmdd", "cifar10", "resnet18", "wmdd-teacher"),
    ],
)
def test_a_script_chooses_network_and_teacher_by_the_data_set(method, dataset, network, recipe, tmp_path, monkeypatch):
    tree(tmp_path, dataset, TEN, sizes=((32, 32),), count=2)
    seen = []
    monkeypatch.setattr(teachers, "settings", lambda *given: seen.append(given) or 1 / 0)
    keys = [f"dataset={dataset}", f"data={tmp_path}", "ipc=1", f"store={tmp_path}/runs", "device=cpu"]
    keys += [] if method in ("sre2l", "wmdd") else ["pool=2"]
    monkeypatch.setattr(sys, "argv", [method, *keys])
    with pytest.raises(ZeroDivisionError):
        runpy.run_path(str(ROOT / "methods" / f"{method}.py"), run_name="__main__")
    ((_, found, size, chosen, *_),) = seen
    assert (found, size, chosen.name, chosen.epochs) == (network, 32, recipe, 50)


def test_the_student_of_a_script_sees_the_patches_of_its_images(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(script, "Recipe", lambda **given: seen.append(given) or 1 / 0)
    for method, option in (("rded", "factor=3"), ("nrr_dd", "patches=9"), ("rded", "factor=0")):
        keys = ["dataset=digits", option, "ipc=1", "size=24", f"store={tmp_path}/runs", "device=cpu"]
        monkeypatch.setattr(sys, "argv", [method, *keys])
        with pytest.raises(ZeroDivisionError):
            runpy.run_path(str(ROOT / "methods" / f"{method}.py"), run_name="__main__")
    assert [(r["shuffle"], r["crop"]) for r in seen] == [(3, 1 / 3), (3, 1 / 3), (1, 1)]


def test_an_unknown_student_of_rded_is_named_before_any_work(tmp_path):
    command = [sys.executable, str(ROOT / "methods" / "rded.py"), "dataset=digits", "network=mlp", "device=cpu"]
    done = subprocess.run([*command, f"store={tmp_path}/runs"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "no learning rate is published for student='mlp'" in done.stderr
    assert not (tmp_path / "runs" / "teacher").exists()


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("sre2l", ["network=lenet"], "no BatchNorm2d"),
        ("rded", ["pool=1000"], "pool=1000 is more than the 142 images of class 0"),
        ("rded", ["size=128", "pool=100", "factor=2"], "patches of 64 px"),
        ("nrr_dd", ["network=resnet18"], "no class activation map"),
        ("nrr_dd", ["ipc=101"], "a pool of 100 images"),
        ("wmdd", ["network=lenet"], "no BatchNorm2d"),
        ("wmdd", ["layer=18"], "layer=18 does not exist"),
    ],
)
def test_what_cannot_work_is_named_before_a_teacher_is_trained(method, settings, words, tmp_path):
    command = [sys.executable, str(ROOT / "methods" / f"{method}.py"), "dataset=digits", *settings, "device=cpu"]
    done = subprocess.run([*command, f"store={tmp_path}/runs"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and words in done.stderr, done.stderr
    assert not (tmp_path / "runs" / "teacher").exists()


def test_recipes_know_their_limits():
    with pytest.raises(ValueError, match=r"pad=4 and recipe\.crop=0\.5"):
        Recipe(pad=4, crop=0.5)
