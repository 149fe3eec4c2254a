"""Sets committed with the tables of a paper: papers that test its sets read them, or say why not."""

import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from common import distilled, matching
from common.distilled import write
from papers import committed, export, image_stages, matching_stages, planning, runner, setups
from papers.cells import ROOT, load_paper

RUN = ["scale=smoke", "seeds=0", "device=cpu"]
MATCHING = ["paper=matching", "only=table1/cifar-10/dm/convnet/1", *RUN]
MIXING = ["paper=natural_mixing", "only=table1/cifar-10/dm/baseline/convnet/1/own", *RUN]
COMMITTED = sorted((ROOT.parent / "tables" / "matching" / "small" / "sets").glob("*.safetensors"))
TAUGHT = sorted((ROOT.parent / "tables" / "nrr_dd" / "small" / "sets").glob("*.safetensors"))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the set that a run of paper=matching leaves, and with its store."""
    root = tmp_path_factory.mktemp("project")
    assert runner.main([*MATCHING, f"out={root / 'tables'}", f"store={root / 'runs'}"]) == 0
    sets = root / "tables" / "matching" / "smoke" / "sets"
    assert export.main([*MATCHING, f"store={root / 'runs'}", f"out={sets}"]) == 0
    return root


@pytest.fixture
def path(project, tmp_path, monkeypatch):
    """The file of that set, as if it were committed here."""
    folder = tmp_path / "tables" / "matching" / "smoke" / "sets"
    folder.mkdir(parents=True)
    (file,) = (project / "tables" / "matching" / "smoke" / "sets").iterdir()
    (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(committed, "TABLES", tmp_path / "tables")
    committed._sets.cache_clear()
    yield folder / file.name
    committed._sets.cache_clear()


def reads(tmp_path, *more: str, change=None) -> bool:
    """Whether a cell of natural_mixing, which tests the sets of matching, reads a committed one."""
    args = runner.parse([*MIXING, f"store={tmp_path / 'own'}", f"out={tmp_path / 'out'}", *more])
    lab = runner.lab_of(args)
    (p,) = (p for p in planning.make_plan(args, load_paper(args.paper), lab) if p.stages)
    stage = matching_stages.images(lab, change(p.setup) if change else p.setup, "dm", 0)
    return committed.SET in stage.settings


def run_of(tmp_path, *more: str) -> dict:
    out = tmp_path / "".join(["out", *more])
    assert runner.main([*MIXING, f"store={tmp_path / 'own'}", f"out={out}", *more]) == 0
    (result,) = (json.loads(file.read_text()) for file in out.rglob("cells/*.json"))
    return result


def distilled_in(result: dict) -> dict:
    return next(stage for stage in result["stages"] if stage["stage"] == "distill")


@pytest.mark.slow
def test_a_committed_set_is_read_and_its_origin_told(project, path, tmp_path, capsys):
    result = run_of(tmp_path)
    assert "1 distilled set read from tables/matching/smoke/sets; committed=false" in capsys.readouterr().out
    (was,) = (project / "runs" / "distill").glob("*/meta.json")
    meta, told = json.loads(was.read_text()), distilled_in(result)
    assert told["set"] == f"tables/matching/smoke/sets/{path.name}" and told["run_on"] == "digits, 32 px"
    assert all(told[name] == meta[name] for name in ("seconds", "finished", "made"))
    assert result["seconds"]["distill"] == meta["seconds"] and result["run_on"] == "digits, 32 px"
    store = runner.Store(tmp_path / "own")
    (own,) = (store.get("distill", file.name) for file in (tmp_path / "own" / "distill").iterdir() if file.is_dir())
    before = runner.Store(project / "runs").get("distill", was.parent.name)
    assert own.tensors().keys() == before.tensors().keys()
    assert torch.allclose(own.tensors()["images"], before.tensors()["images"], atol=1e-5)


@pytest.mark.slow
def test_a_set_distilled_here_is_another_one(path, tmp_path):
    read, made = run_of(tmp_path), run_of(tmp_path, "committed=false")  # in one store
    assert "set" in distilled_in(read) and "set" not in distilled_in(made)
    assert distilled_in(read)["key"] != distilled_in(made)["key"]
    assert made["command"].endswith(" committed=false") and not read["command"].endswith("false")
    assert "a set distilled on" not in made["run_on"]


@pytest.mark.slow
def test_a_result_says_that_its_set_was_distilled_on_other_files(path, tmp_path):
    own = distilled.load(path)
    replace(own, settings={**own.settings, "run_on": "digits kept as JPEG files"}).save(path)
    assert run_of(tmp_path)["run_on"] == "digits, 32 px, a set distilled on digits kept as JPEG files"


@pytest.mark.slow
def test_how_a_set_is_computed_does_not_matter_and_which_one_does(path, tmp_path):
    def distilled_with(**settings):
        return lambda setup: replace(setup, distill={**setup.distill, **settings})

    assert reads(tmp_path)
    assert reads(tmp_path, change=distilled_with(compile=True, chunk=5, precision="mixed"))
    assert not reads(tmp_path, change=distilled_with(iterations=31))
    assert not reads(tmp_path, change=distilled_with(init="noise"))
    assert not reads(tmp_path, change=lambda setup: replace(setup, network="convnet3-w32"))
    assert not reads(tmp_path, "committed=false")


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"classes": tuple("9876543210")},
    {"mean": (0.4,)},
    {"std": (0.9,)},
    {"whitening": {"zca_eps": 0.1, "fitted_on": "other images"}},
    {"settings": {}},
])  # fmt: skip
def test_sets_that_networks_would_see_otherwise_are_not_read(path, tmp_path, change):
    replace(distilled.load(path), **change).save(path)
    assert not reads(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["cut", "altered", "gone"])
def test_a_damaged_set_is_named_with_the_way_around_it(path, tmp_path, capsys, harm):
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_bytes(data[:100] if harm == "cut" else bytes([*data[:-4], *(255 - b for b in data[-4:])]))
    assert runner.main([*MIXING, f"store={tmp_path / 'own'}", f"out={tmp_path / 'out'}"]) == 1
    said = " ".join(capsys.readouterr().out.split())  # a status comes in lines of a terminal's width
    assert f"tables/matching/smoke/sets/{path.name}" in said and "committed=false distils without it" in said


@pytest.mark.slow
def test_a_set_that_is_a_file_already_is_not_exported_again(path, tmp_path, capsys):
    run_of(tmp_path)
    assert export.main([*MIXING, f"store={tmp_path / 'own'}", f"out={tmp_path / 'sets'}"]) == 1
    assert "a file of the project already" in capsys.readouterr().out
    run_of(tmp_path, "committed=false")
    assert export.main([*MIXING, f"store={tmp_path / 'own'}", f"out={tmp_path / 'sets'}", "committed=false"]) == 0


@pytest.mark.slow
def test_learned_step_sizes_and_soft_labels_come_along(path, tmp_path):
    own = distilled.load(path)
    soft = torch.randn(len(own.labels), 10, generator=torch.Generator().manual_seed(0))
    args = runner.parse([*MIXING, f"store={tmp_path / 'own'}"])
    lab = runner.lab_of(args)
    on = matching.task("digits", None, device=lab.device, zca=True, store=lab.store)
    whitened = replace(own, soft_labels=soft, student_lr=0.03, whitening={"fitted_on": on.train.fingerprint})
    tensors = committed._product(path, whitened, on).tensors
    assert torch.equal(tensors["soft_labels"], soft) and float(tensors["lr"]) == pytest.approx(0.03)
    assert torch.allclose(on.pixels(tensors["images"]), own.images, atol=1e-4)


@pytest.mark.slow
def test_a_set_made_with_a_teacher_is_read_where_the_teacher_is_that_of_the_cell(tmp_path, monkeypatch):
    """RDED's images from the smoke scale of nrr_dd, as a cell of another paper borrows them."""
    lab = runner.lab_of(runner.parse(["paper=survey", "scale=smoke", f"store={tmp_path / 'runs'}", "device=cpu"]))
    name, survey, lender = "table1/cifar-10/rded/convnet/1/soft", load_paper("survey"), load_paper("nrr_dd")
    shown = next(cell for cell in survey.cells_at("smoke") if cell.id == "leaderboard/cifar-10/dm/hl/convnet/1/own")
    chosen = setups.setup_of(survey.scales["smoke"], shown)
    wanted = {"paper": "nrr_dd", "scale": "smoke", "cell": name, "ipc": 1}
    chosen = replace(chosen, size=16, distill=wanted)
    theirs = setups.setup_of(lender.scales["smoke"], next(c for c in lender.cells_at("smoke") if c.id == name))

    def stage():
        return matching_stages.images(lab, chosen, "image-set", 0)

    made = image_stages.IMAGES["rded"](lab, theirs, 0)
    found = export.Found(made, theirs, [name], "set")
    monkeypatch.setattr(committed, "TABLES", tmp_path / "tables")
    committed._sets.cache_clear()
    assert committed.SET not in stage().settings
    own = lab.entry(stage()).tensors()
    folder = tmp_path / "tables" / "nrr_dd" / "smoke" / "sets"
    folder.mkdir(parents=True)
    kept = export.as_set(lab, found, lab.entry(made), paper="nrr_dd", scale="smoke")
    write(kept, folder / "set.safetensors", "safetensors")
    committed._sets.cache_clear()
    read = stage()
    assert committed.SET in read.settings and not read.needs
    tensors = lab.entry(read).tensors()
    assert torch.equal(tensors["labels"], own["labels"])
    torch.testing.assert_close(tensors["images"], own["images"])
    other = {**kept.settings["teacher"], "seed": 7}
    write(replace(kept, settings={**kept.settings, "teacher": other}), folder / "set.safetensors", "safetensors")
    committed._sets.cache_clear()
    assert committed.SET not in stage().settings
    committed._sets.cache_clear()


@pytest.mark.slow
def test_sets_made_with_a_teacher_are_those_that_small_would_make(tmp_path):
    if not os.environ.get("DD_DATA"):
        pytest.skip("the stages that make the sets are named by real images: set DD_DATA to a folder with cifar10")
    lab = runner.lab_of(runner.parse(["paper=nrr_dd", "scale=small", f"store={tmp_path / 'runs'}", "device=cpu"]))
    paper = load_paper("nrr_dd")
    cells = {cell.id: cell for cell in paper.cells_at("small")}
    for file in TAUGHT:
        own = distilled.load(file).settings
        cell = next(cells[name] for name in own["cells"] if name.endswith("soft"))
        made = image_stages.IMAGES[cell.algorithm](lab, setups.setup_of(paper.scales["small"], cell), 0)
        assert committed.alike(own, committed.named(made)), file.name


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_the_sets_of_the_project_are_those_that_small_would_distil(file: Path):
    """With another setting, or one more, papers would not find their set any longer: it is to be made again."""
    own = distilled.load(file)
    scale = load_paper("survey").scales["small"]
    ids = own.settings["cells"]
    cell = next(cell for cell in load_paper("matching").cells_at("small") if cell.id == ids[0])
    setup = matching_stages.matching_setup(scale, cell)
    config = asdict(matching_stages.ALGORITHMS[cell.algorithm].Config(**setup.distill))
    facts = {name: own.settings[name] for name in ("dataset", "size", "network", "seed", "method")}
    assert scale["sets_in"] == "matching/small" and facts["dataset"] == setup.dataset and facts["seed"] == 0
    assert (facts["size"], facts["network"]) == (32, "convnet3-instance")
    assert own.settings["zca"] == bool(setup.distill.get("zca", False))
    assert committed.alike(own.settings, {**facts, "config": config})


def test_no_text_waits_for_a_number():
    """A committed page whose @NAME@ was to be replaced by a result."""
    pages = [page for kind in ("md", "ipynb") for part in ("tables", "papers", "docs")
             for page in (ROOT.parent / part).rglob(f"*.{kind}")]  # fmt: skip
    assert pages and not [page for page in pages if re.search(r"@[A-Z0-9_]+@", page.read_text(encoding="utf-8"))]


def test_the_project_has_sets():
    assert len(COMMITTED) >= 6 and len(TAUGHT) >= 6
