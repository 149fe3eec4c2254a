"""Sets committed with the tables of a paper: they stand for their stages in papers that test them, or are refused."""

import json
from dataclasses import replace

import pytest
import torch

from common import distilled
from papers import committed, export, matching_stages, runner
from papers.plan import load_paper

RUN = ["scale=smoke", "seeds=0", "device=cpu"]
MATCHING = ["paper=matching", "only=table1/cifar-10/dm/convnet/1", *RUN]
MIXING = ["paper=natural_mixing", "only=table1/cifar-10/dm/baseline/convnet/1/own", *RUN]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with the tables that a run of paper=matching and an export of its set leave, and with its store."""
    root = tmp_path_factory.mktemp("project")
    assert runner.main([*MATCHING, f"out={root / 'tables'}", f"store={root / 'runs'}"]) == 0
    sets = root / "tables" / "matching" / "smoke" / "sets"
    assert export.main([*MATCHING, f"store={root / 'runs'}", f"out={sets}"]) == 0
    return root


@pytest.fixture
def tables(project, tmp_path, monkeypatch):
    """The sets and result files of that run, as if they were committed here."""
    for kind in ("sets", "cells"):
        folder = tmp_path / "tables" / "matching" / "smoke" / kind
        folder.mkdir(parents=True)
        for file in (project / "tables" / "matching" / "smoke" / kind).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(committed, "TABLES", tmp_path / "tables")
    for cached in (committed._facts, committed._stages):
        cached.cache_clear()
    return tmp_path / "tables" / "matching" / "smoke"


def planned(tmp_path, *more: str, change=None) -> tuple:
    """The lab and the distill stage of a cell of natural_mixing, which tests the sets of matching."""
    args = runner.parse([*MIXING, f"store={tmp_path / 'own'}", f"out={tmp_path / 'out'}", *more])
    lab = runner.lab_of(args)
    (p,) = (p for p in runner.make_plan(args, load_paper(args.paper), lab) if p.stages)
    return lab, matching_stages.images(lab, change(p.setup) if change else p.setup, "dm", 0)


def made_before(project) -> tuple[str, dict]:
    (path,) = (project / "runs" / "distill").glob("*/meta.json")
    return path.parent.name, json.loads(path.read_text())


@pytest.mark.slow
def test_a_committed_set_stands_for_its_stage(project, tables, tmp_path, capsys):
    assert runner.main([*MIXING, f"store={tmp_path / 'own'}", f"out={tmp_path / 'out'}"]) == 0
    said = capsys.readouterr().out
    assert "1 distilled set taken as committed with the tables; committed=false distils anew" in said
    key, meta = made_before(project)
    (result,) = (json.loads(f.read_text()) for f in (tmp_path / "out").rglob("cells/*.json"))
    stage = next(s for s in result["stages"] if s["stage"] == "distill")
    assert stage["key"] == key and stage["set"].startswith("tables/matching/smoke/sets/")
    assert all(stage[name] == meta[name] for name in ("seconds", "finished", "made"))
    lab, again = planned(tmp_path)
    own, was = (lab.entry(again).tensors(), runner.Store(project / "runs").get("distill", key).tensors())
    assert own.keys() == was.keys() and torch.equal(own["labels"], was["labels"])
    assert torch.allclose(own["images"], was["images"], atol=1e-5)


@pytest.mark.slow
def test_how_a_set_is_computed_does_not_matter_and_which_one_does(project, tables, tmp_path):
    key, _ = made_before(project)
    assert planned(tmp_path)[1].kept == key

    def distilled_with(**settings):
        return lambda setup: replace(setup, distill={**setup.distill, **settings})

    assert planned(tmp_path, change=distilled_with(compile=True, chunk=5, precision="mixed"))[1].kept == key
    assert not planned(tmp_path, change=distilled_with(iterations=31))[1].kept
    assert not planned(tmp_path, change=distilled_with(init="noise"))[1].kept
    assert not planned(tmp_path, change=lambda setup: replace(setup, network="convnet3-w32"))[1].kept
    assert not planned(tmp_path, "committed=false")[1].kept


@pytest.mark.slow
def test_sets_of_other_classes_or_without_a_result_are_not_taken(project, tables, tmp_path):
    (path,) = (tables / "sets").iterdir()
    own = distilled.load(path)
    replace(own, classes=tuple(reversed(own.classes))).save(path)
    assert not planned(tmp_path)[1].kept
    own.save(path)
    committed._facts.cache_clear()
    assert planned(tmp_path)[1].kept
    for file in (tables / "cells").iterdir():
        file.unlink()
    committed._stages.cache_clear()
    assert not planned(tmp_path)[1].kept


@pytest.mark.slow
def test_a_whitened_set_serves_the_images_it_was_whitened_on(project, tables, tmp_path):
    lab, stage = planned(tmp_path)
    on = matching_stages._setting(lab, *(stage.settings[k] for k in ("dataset", "size", "network", "zca")))
    facts = {"classes": list(on.train.classes), "whitening": {"fitted_on": on.train.fingerprint}}
    assert committed._fits(facts, on) and committed._fits({**facts, "whitening": None}, on)
    assert not committed._fits({**facts, "whitening": {"fitted_on": "other images"}}, on)


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["cut", "altered"])
def test_a_damaged_set_is_named_with_the_way_around_it(project, tables, tmp_path, capsys, harm):
    (path,) = (tables / "sets").iterdir()
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:100] if harm == "cut" else bytes([*data[:-4], *(255 - b for b in data[-4:])]))
    assert runner.main([*MIXING, f"store={tmp_path / 'own'}", f"out={tmp_path / 'out'}"]) == 1
    said = capsys.readouterr().out
    if harm == "cut":  # seen by the plan, and so told as a row's status, in lines of a terminal's width
        said = said.replace("\n  ", " ")
    assert f"tables/matching/smoke/sets/{path.name}" in said and "committed=false distils without it" in said
