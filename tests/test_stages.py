"""Stages of cells: what is said when they are planned, and images that a stream cannot read."""

from dataclasses import replace

import pytest
import torch

from common import networks
from common.augment import rng
from common.datasets import info, load
from common.store import Store
from common.views import steps_per_epoch
from methods import wmdd
from papers import image_stages, setups, stages
from papers.cells import load_paper
from papers.stages import Lab
from tests.image_trees import damage, tree


def setup(paper: str, scale: str, name: str) -> setups.ImageSetup:
    loaded = load_paper(paper)
    (cell,) = (c for c in loaded.cells_at(scale) if c.id == name)
    return setups.setup_of(loaded.scales[scale], cell)


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(Store(tmp_path / "runs"), None, torch.device("cpu"), "fp32")


def in_bf16(tmp_path) -> Lab:
    return Lab(Store(tmp_path / "runs"), None, torch.device("cpu"), "bf16")


def of_a_student(lab: Lab, **changes) -> dict:
    """The settings of the first student of random images at IPC 1, on digits."""
    cell = next(c for c in load_paper("matching").cells_at("smoke") if c.id == "table1/cifar-10/random/convnet/1/own")
    planned = setups.setup_of(load_paper("matching").scales["smoke"], cell)
    (student,) = lab.students(cell, replace(planned, **changes), (0,))
    return student.settings


def test_only_long_students_on_processors_with_bf16_are_compiled(lab, tmp_path, monkeypatch):
    fast = in_bf16(tmp_path)
    monkeypatch.setattr(stages, "bf16_is_fast", lambda _: True)
    monkeypatch.setattr(stages, "compiler", lambda: True)
    assert "precision" not in of_a_student(fast)
    assert of_a_student(fast, times=1e6) == of_a_student(lab, times=1e6) | {"precision": "bf16"}
    monkeypatch.setattr(stages, "compiler", lambda: False)
    assert of_a_student(fast, times=1e6) == of_a_student(lab, times=1e6)


# ---------------------------------------------------------------- before anything runs


@pytest.mark.parametrize(
    ("changes", "network", "words"),
    [
        ({"ipc": 143}, "resnet18-bn-w8", "ipc=143 is more than the 1.. real images of a class"),
        ({"layer": 18}, "resnet18-bn-w8", "layer=18 does not exist: the teacher has 17"),
        ({}, "convnet3-instance", "no BatchNorm2d"),
    ],
)
def test_what_wmdd_cannot_do_is_said_when_it_is_planned(lab, changes, network, words):
    planned = setup("wmdd", "smoke", "table1/imagenette/wmdd/resnet-18/10/soft")
    wrong = replace(planned, network=network, distill={**planned.distill, **changes})
    with pytest.raises(ValueError, match=words):
        image_stages.wmdd_images(lab, wrong)


def test_labels_too_many_to_be_stored_are_named_with_the_remedy(lab, monkeypatch):
    planned = setup("wmdd", "smoke", "table1/imagenette/random/resnet-18/10/soft")
    assert lab.student(planned, lab.images(planned, "random", 0), 0)
    monkeypatch.setattr(stages, "MOST_LABEL_BYTES", 40_000)  # 24 epochs of two batches of 50, ten fp16 logits an image
    with pytest.raises(ValueError, match=r"would take 48,000 bytes.*more than the 40,000.*labels: recomputed"):
        lab.student(planned, lab.images(planned, "random", 0), 0)
    assert lab.student(replace(planned, labels="recomputed"), lab.images(planned, "random", 0), 0)


@pytest.mark.parametrize("paper", ["wmdd", "nrr_dd"])
def test_the_labels_of_every_published_cell_fit_or_are_recomputed(paper):
    loaded, largest = load_paper(paper), 0
    for cell in loaded.cells_at("paper"):
        found = setups.setup_of(loaded.scales["paper"], cell)
        if found.labels == "stored" and found.student.labels == "soft":
            classes, recipe = info(found.dataset).classes, found.student
            steps = recipe.epochs * steps_per_epoch(classes * cell.ipc, recipe.batch)
            largest = max(largest, 2 * steps * recipe.batch * classes)
    assert 0 < largest < 10e9 < stages.MOST_LABEL_BYTES


def test_labels_are_given_for_a_data_set_or_an_ipc():
    names = [f"table1/imagenet-1k/wmdd/resnet-18/{ipc}/soft" for ipc in (10, 50)]
    assert [setup("wmdd", "paper", name).labels for name in names] == ["stored", "recomputed"]
    assert setup("wmdd", "paper", "table1/imagenet-21k/wmdd/resnet-18/10/soft").labels == "recomputed"
    loaded = load_paper("wmdd")
    (cell,) = (c for c in loaded.cells_at("smoke") if c.id == "table1/imagenette/wmdd/resnet-18/10/soft")
    with pytest.raises(ValueError, match=r"labels='fixed' gives one label an image.*there: stored, recomputed, online"):
        setups.setup_of({**loaded.scales["smoke"], "labels": "fixed"}, cell)
    with pytest.raises(ValueError, match="labels='kept' is unknown; allowed: stored, recomputed, online, fixed"):
        setups.setup_of({**loaded.scales["smoke"], "labels": "kept"}, cell)


def test_what_a_student_sees_follows_the_patches_of_its_images():
    loaded = load_paper("nrr_dd")
    for name, own, factor in (("rded", {"factor": 3}, 3), ("nrr-dd", {"patches": 9}, 3), ("random", {}, 2)):
        (cell,) = (c for c in loaded.cells_at("paper") if c.id == f"table1/imagenette/{name}/resnet-18/10/soft")
        recipe = setups.setup_of(loaded.scales["paper"], replace(cell, distill=own)).student
        assert (recipe.crop, recipe.shuffle) == (1 / factor, 1 if name == "random" else factor)


def test_features_of_another_layer_have_another_name_in_the_store(lab):
    """Layers are numbered along the main path of a network: the name of the module goes into the key."""
    planned = setup("wmdd", "smoke", "table5/tiny-imagenet/wmdd/layer-10/resnet-18/10/soft")
    (stage,) = image_stages.statistics(lab, planned, 10)
    assert stage.settings["module"] == "features.7.path.1"
    (stage,) = image_stages.statistics(lab, planned, 0)
    assert "module" not in stage.settings


# ---------------------------------------------------------------- streams


def test_wmdd_in_blocks_of_classes_is_wmdd_at_once(lab, monkeypatch):
    """Statistics and barycenters of a block of classes are stages of their own: a kill loses a block."""
    planned = setup("wmdd", "smoke", "table1/imagenette/wmdd/resnet-18/10/soft")
    net = networks.make(planned.network, classes=10, size=planned.size, generator=rng("teacher")).eval()
    monkeypatch.setattr(image_stages, "checked", lambda *_: net)
    config = wmdd.Config(**{**planned.distill, "precision": "fp32"})

    def made(count: int) -> dict:
        stats = image_stages.statistics(lab, planned, config.layer)
        blocks = image_stages.barycenters(lab, planned, config)
        assert len(stats) == len(blocks) == count
        found = [lab.entry(stage).tensors() for stage in (*stats, *blocks)]
        return {name: torch.cat([t[name] for t in found if name in t]) for name in ("features", "labels", "atoms")} | (
            image_stages._moments(lab, stats)
        )

    whole = made(1)
    assert whole["labels"].unique().tolist() == list(range(10)) and whole["mean"].shape[0] == 10
    monkeypatch.setattr(image_stages, "BLOCK", 4)
    for name, tensor in made(3).items():
        torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=1e-5)


@pytest.fixture
def gaps(tmp_path, monkeypatch) -> Lab:
    """A lab whose set is a stream in which two of six images of each split cannot be read."""
    tree(tmp_path, sizes=((40, 40), (60, 50)))
    for split in ("train", "test"):
        damage(tmp_path / "own" / split)
    found = {s: load("own", tmp_path, split=s, resident_bytes=0, bad_share=0.5) for s in ("train", "test")}
    monkeypatch.setattr(Lab, "data", lambda self, name, split: found[split])
    return Lab(Store(tmp_path / "runs"), None, torch.device("cpu"), "fp32")


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_labels_stay_with_the_test_images_that_can_be_read(gaps):
    views, labels = gaps.test_views("own", 32, None)
    assert views.shape == (4, 3, 32, 32) and labels.tolist() == [0, 0, 1, 1]  # a/1 and b/2 are left out


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_an_image_of_a_set_that_cannot_be_read_is_named(gaps):
    train, planned = gaps.data("own", "train"), setup("wmdd", "smoke", "table1/imagenette/wmdd/resnet-18/10/soft")
    assert image_stages.real_views(train, torch.tensor([4, 0]), planned).shape == (2, 3, 16, 16)
    for rows in ([0, 1, 2], [1]):
        with pytest.raises(ValueError, match=r"1 of the \d images asked of own cannot be read \(.*a/1.png\)"):
            image_stages.real_views(train, torch.tensor(rows), planned)
