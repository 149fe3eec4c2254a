"""Sets of the store as files: the images students saw, the settings, nothing made, what is missing named."""

from dataclasses import replace

import pytest
import torch

from common import distilled, matching
from common.hardware import recorded
from common.store import Product
from papers import export, image_stages, matching_stages, planning, runner
from papers.cells import load_paper

MATCHING = ["paper=matching", "scale=smoke", "only=table1/cifar-10/dm/1,table1/cifar-10/random/1", "seeds=0,1"]
MIXING = ["paper=natural_mixing", "scale=smoke", "only=table1/cifar-10/dm/convnet/1"]
WMDD = ["paper=wmdd", "scale=smoke", "only=table1/imagenette/wmdd/1", "seeds=0"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store that holds the sets of a few cells, without students."""
    return tmp_path_factory.mktemp("runs")


def planned(store, arguments: list[str]) -> tuple:
    """The lab and the sets behind some cells, with their keys."""
    args = runner.parse([*arguments, f"store={store}", "device=cpu"])
    lab = runner.lab_of(args)
    return lab, list(export.wanted(planning.make_plan(args, load_paper(args.paper), lab), lab).items())


def made(store, arguments: list[str]) -> tuple:
    """The same with the sets in the store, made where they are missing."""
    lab, sets = planned(store, arguments)
    for _, found in sets:
        lab.entry(found.stage)
    return lab, sets


def written(store, out, arguments: list[str], *more: str) -> dict:
    assert export.main([*arguments, f"store={store}", f"out={out}", "device=cpu", *more]) == 0
    return {path.stem: distilled.load(path) for path in out.glob("*.safetensors")}


@pytest.mark.slow
def test_matching_sets_are_what_students_were_fed(store, tmp_path):
    lab, sets = made(store, MATCHING)
    files = written(store, tmp_path, MATCHING)
    assert set(files) == {found.name for _, found in sets} and len(files) == 3  # random has one for each seed
    for key, found in sets:
        tensors, file = lab.store.get("distill", key).tensors(), files[found.name]
        assert torch.allclose(file.normalised(), matching.tested_images(tensors), atol=1e-5)
        assert torch.equal(file.labels, tensors["labels"])
        assert file.settings["stage"] == key and file.settings["paper"] == "matching"
        assert file.settings["made"]["versions"]["torch"] == torch.__version__.split("+")[0]
        assert found.stage.settings.items() <= file.settings.items()
    assert files["table1_cifar-10_dm_convnet_1_own"].settings["config"]["iterations"] == 30
    pair = [files[f"table1_cifar-10_random_convnet_1_own_seed{seed}"].images for seed in (0, 1)]
    assert not torch.equal(*pair)


@pytest.mark.slow
def test_cells_that_share_a_set_share_a_file(store, tmp_path):
    made(store, MATCHING)
    made(store, MIXING)
    (file,) = written(store, tmp_path, MIXING).values()
    arms = {cell.split("/")[3] for cell in file.settings["cells"]}
    assert arms == {"baseline", "mixed", "gain"} and file.settings["run_on"] == "digits, 32 px"


@pytest.mark.slow
def test_sets_in_pixels_stay_as_they_are(store, tmp_path):
    def noise(_) -> Product:
        images = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        tensors = {"images": images, "labels": torch.arange(10), "weights": torch.full((10,), 0.5)}
        return image_stages.distilled_set(tensors, {"method": "noise"}, lab.data("digits", "train"))

    lab, ((key, found),) = planned(store, WMDD)
    lab.store.make("distill", found.stage.settings, found.stage.inputs, recorded(noise, lab.device))  # no teacher
    (file,), tensors = written(store, tmp_path, WMDD).values(), lab.store.get("distill", key).tensors()
    assert torch.equal(file.images, tensors["images"]) and torch.equal(file.labels, tensors["labels"])
    assert torch.equal(file.weights, tensors["weights"]) and file.mean == lab.data("digits", "train").mean
    assert file.settings["network"] == found.setup.network and file.settings["config"]["ipc"] == 1


def another(store, algorithm: str, **settings) -> tuple:
    """The lab, a setting on digits, and the entry and the exported set of a method with settings of its own."""
    lab, sets = planned(store, MATCHING)
    found = sets[0][1]
    setup = replace(found.setup, distill={"ipc": 1, **settings})
    stage = matching_stages.images(lab, setup, algorithm, 0)
    entry = lab.entry(stage)
    result = export.as_set(lab, replace(found, stage=stage, setup=setup), entry)
    return matching_stages.task_of(lab, setup), entry.tensors(), result


@pytest.mark.slow
def test_selected_images_are_named(store):
    on, tensors, result = another(store, "coreset", method="herding", epochs=1)
    assert result.settings["training_images"] == tensors["indices"].tolist()
    chosen = on.train.images[result.settings["training_images"]]
    assert torch.allclose(result.images, chosen.float() / 255, atol=1e-5)
    assert torch.equal(result.labels, on.train.labels[tensors["indices"]])


@pytest.mark.slow
def test_whitened_sets_with_learned_labels_lead_back_to_what_students_were_fed(store, tmp_path):
    few = {"iterations": 1, "experts": 1, "train_epochs": 2, "start": 0, "expansion_end": 0, "max_start": 1}
    on, tensors, result = another(store, "datm", zca=True, labels="soft", student_steps=2, **few)
    assert result.whitening["fitted_on"] == on.train.fingerprint
    assert torch.allclose(on.zca(result.images), matching.tested_images(tensors), atol=1e-3)
    assert torch.equal(result.soft_labels, tensors["soft_labels"])
    assert result.student_lr == pytest.approx(float(tensors["lr"]))
    with pytest.raises(ValueError, match="distilled under ZCA"):
        distilled.write(result, tmp_path / "set.pt", "dc")
    distilled.write(result, tmp_path / "set", "mtt", whiten=on.zca)
    assert torch.allclose(torch.load(tmp_path / "set" / "images_best.pt"), on.zca(result.images))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["images", "dc", "mtt"])
def test_layouts_of_others(store, tmp_path, layout):
    lab, sets = made(store, MATCHING)
    written(store, tmp_path, MATCHING, f"layout={layout}")
    for key, found in sets:
        path = tmp_path / (found.name + distilled.SUFFIX[layout])
        own = export.as_set(lab, found, lab.store.get("distill", key))
        read = distilled.load(path, mean=own.mean, std=own.std)
        assert (read.uint8().int() - own.uint8().int()).abs().max() <= 1 and torch.equal(read.labels, own.labels)


@pytest.mark.slow
def test_nothing_is_made_and_what_is_missing_is_named(store, tmp_path, monkeypatch, capsys):
    made(store, MATCHING)
    before = {path: path.stat().st_mtime_ns for path in store.glob("distill/*/*")}
    monkeypatch.setattr(runner.Lab, "entry", lambda *_: pytest.fail("a stage was made"))
    files = written(store, tmp_path, ["paper=matching", "scale=smoke", "only=table1/cifar-10/dm", "seeds=0"])
    assert list(files) == ["table1_cifar-10_dm_convnet_1_own"]
    said = capsys.readouterr().out
    assert "table1/cifar-10/dm/convnet/10/own" in said and "1 of 2 sets" in said
    assert "convnet/50" not in said  # no part of smoke
    assert export.main(["paper=matching", "scale=smoke", "only=*/dc", f"store={store}", f"out={tmp_path}/none"]) == 1
    refused = capsys.readouterr()
    assert refused.err.startswith("error: no set was written") and len(refused.err.splitlines()) == 1
    assert not (tmp_path / "none").exists()
    assert {path: path.stat().st_mtime_ns for path in store.glob("distill/*/*")} == before


def test_missing_data_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DD_DATA", str(tmp_path))
    assert export.main(["paper=matching", "scale=paper", f"store={tmp_path}", "only=svhn"]) == 1
    said = capsys.readouterr().out
    assert said.count("data set 'svhn' is not there") == 1 and said.count("table2/svhn/") == 9


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("layout=zip", "allowed: safetensors, images, dc, mtt"), ("only=table9", "matches no cell"),
        ("seeds=1,1", "a seed is given twice"), ("budget=1h", "unknown key 'budget'"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_sentence(argument, words, capsys):
    assert export.main(["paper=matching", "scale=smoke", argument]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1


def test_help_fits_a_terminal(capsys):
    assert export.main(["help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and any(line.split()[:2] == ["out", "sets"] for line in lines)
