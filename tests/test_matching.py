"""The matching methods as a user meets them: the paper's plan and smoke run, one method's script, the kept sets."""

import csv
import io
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from common import matching
from common.distilled import load
from common.protocols import PROTOCOLS
from methods import mtt
from papers import drawing, export, matching_stages, planning, runner, setups
from papers.cells import load_paper
from papers.matching import figures
from papers.report import load_reported

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Every method once, on digits at one image per class."""
    place = tmp_path_factory.mktemp("matching")
    places = [f"store={place}/runs", f"out={place}/tables", "device=cpu"]
    return runner.run(runner.parse(["paper=matching", "scale=smoke", "only=table1/1", *places]))


@pytest.mark.slow
def test_every_method_makes_a_number(smoke):
    assert not smoke.failed, [p.why for p in smoke.failed]
    found = {r["method"]: r for r in smoke.results.values()}
    assert set(found) == {"Random real (ours)", "DC", "DSA", "DM", "MTT", "FTD", "ATT", "DATM"}
    for name, result in found.items():
        assert len(result["values"]) == len(result["seeds"]) == 2 and result["mean"] > 20, (name, result["mean"])
        assert result["settings"]["protocol"]["name"] in PROTOCOLS and result["hardware"] and result["commit"]
    assert found["DATM"]["bytes"]["labels"] == 10 * 10 * 4 and found["DC"]["bytes"]["labels"] == 0


@pytest.mark.slow
def test_tables_and_figures_of_the_smoke_run(smoke):
    rows = list(csv.DictReader((smoke.folder / "table1.csv").open()))
    row = next(r for r in rows if (r["dataset"], r["method"], r["ipc"]) == ("CIFAR-10", "DC", "1"))
    assert float(row["reported"]) == 28.3 and row["ours"] and row["status"] == "not comparable"
    for name in ("figure_images.png", "figure_accuracy.png", "table1.md", "table1.tex", "table2.md"):
        assert (smoke.folder / name).stat().st_size > 0


@pytest.mark.slow
def test_a_set_kept_beside_the_results_is_drawn_without_the_store(smoke, tmp_path, monkeypatch):
    shown = {}  # the first image of each row
    monkeypatch.setattr(drawing, "show_image", lambda ax, x: shown.setdefault(ax.get_subplotspec().rowspan.start, x))
    assert figures.figure_images(smoke) is not None
    before = dict(shown)
    shown.clear()
    kept, empty = tmp_path / "smoke", runner.Lab(runner.Store(tmp_path / "runs"), None, CPU, smoke.lab.precision)
    export.main(["paper=matching", "scale=smoke", "device=cpu", f"store={smoke.args.store}", f"out={kept}/sets",
                 "only=table1/cifar-10/dm/1,table1/cifar-10/dc/1"])  # fmt: skip
    assert figures.figure_images(replace(smoke, lab=empty, folder=kept)) is not None
    assert len(before) == 8 and len(shown) == 3  # random real images, drawn again, DC and DM: first, second and fourth
    torch.testing.assert_close(torch.stack([*shown.values()]), torch.stack([before[0], before[1], before[3]]))


def test_plan_of_the_published_scale_names_the_missing_sets(tmp_path):
    args = runner.parse(["paper=matching", "scale=paper", f"data={tmp_path}", f"store={tmp_path}/runs"])
    planned = planning.make_plan(args, load_paper("matching"), _lab(args))
    assert planned and all(p.why.startswith("missing data") for p in planned)
    assert Counter(p.cell.dataset for p in planned)["CIFAR-10"] == 24


def _lab(args):
    return runner.Lab(runner.Store(Path(args.store)), args.data, CPU, "fp32")


def test_published_settings_reach_the_cells():
    paper = load_paper("matching")
    made = {c.id: setups.setup_of(paper.scales["paper"], c) for c in paper.cells_at("paper")}
    datm = made["table1/cifar-10/datm/convnet/1/own"]
    assert datm.distill["student_steps"] == 80 and datm.distill["threshold"] == 1.1
    assert datm.protocol.name == "datm-2024"
    mtt = made["table1/cifar-10/mtt/convnet/1/own"]
    assert mtt.distill["lr_lr"] == 1e-7 and mtt.distill["zca"] is True and mtt.protocol.lr is None
    assert made["table1/cifar-100/att/convnet/50/own"].distill["iterations"] == 100_000


@pytest.mark.parametrize("scale", ["smoke", "small", "paper"])
def test_settings_of_every_cell_make_a_config(scale):
    """What a scale lays over the published settings is allowed by the method and fits its experts."""
    paper = load_paper("matching")
    for cell in paper.cells_at(scale):
        setup = setups.setup_of(paper.scales[scale], cell)
        method = matching_stages.ALGORITHMS[cell.algorithm]
        if setup is None or method is None:
            continue
        config = method.Config(**setup.distill)
        assert bool(setup.distill.get("zca", False)) == getattr(config, "zca", False), cell.id
        if cell.algorithm in mtt.TABLES:
            assert config.max_start - 1 + config.expert_epochs <= config.train_epochs, cell.id
        assert setup.protocol.labels == ("soft" if cell.method == "DATM" else "hard")


def test_printed_numbers():
    rows = load_reported(ROOT / "papers" / "matching" / "reported.csv")
    assert Counter(r["table"] for r in rows) == {"table1": 66, "table2": 6}
    value = {(r["dataset"], r["method"], r["ipc"]): (r["value"], r["std"]) for r in rows}
    assert value["CIFAR-10", "DATM", 50] == (76.1, 0.3) and value["Tiny ImageNet", "MTT", 1] == (8.8, 0.3)


def test_pixels_and_network_input_are_inverse():
    for zca in (False, True):
        on = matching.task("digits", None, device=CPU, size=8, network="mlp", zca=zca)
        some = on.train.images[:5]
        assert torch.allclose(on.pixels(on.prepare(some)), some.float() / 255, atol=1e-4)
        made = on.distilled({"images": on.prepare(some), "labels": on.train.labels[:5]}, {})
        assert (made.whitening is not None) == zca


@pytest.mark.parametrize("zca", [False, True])
def test_pixels_can_be_attacked_after_a_student_was_tested(zca):
    """What is kept from the first look, in inference mode, serves a gradient later."""
    on = matching.task("digits", None, device=CPU, size=8, network="mlp", zca=zca)
    pixels = on.test.images[:2].float() / 255
    with torch.inference_mode():
        on.prepare(on.test.images[:2])
    on.inputs(pixels.requires_grad_()).square().sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_students_see_the_strategy_of_their_protocol(tmp_path, monkeypatch):
    """Without what turns one digit into another."""
    on, seen = matching.task("digits", None, device=CPU, size=8, network="mlp"), []

    def spy(*arguments, augment, **options):
        seen.append(augment and augment.operations)
        return train_students(*arguments, augment=augment, **options)

    train_students = matching.train_students
    monkeypatch.setattr(matching, "train_students", spy)
    tensors = matching.random_subset(on, 1, 0)
    for strategy in ("color_flip_cutout", "", "crop"):
        protocol = replace(PROTOCOLS["dc-2021"], epochs=1, augment=strategy)
        matching.students(tmp_path / strategy, on, tensors, protocol, [0])
    assert seen == [("color", "cutout"), None, ("crop",)]
    assert on.augmentation("flip") is None and on.augment.operations == ("color", "crop", "cutout", "scale", "rotate")


def test_the_preview_has_a_row_a_class_whatever_its_size():
    on = matching.task("digits", None, device=CPU, size=8, network="mlp")
    labels = torch.cat([torch.full((2 if k == 1 else 3,), k) for k in range(10)])
    shades = torch.stack([torch.full((1, 8, 8), (20 * k + 0.5) / 255) for k in labels.tolist()])
    picture = Image.open(io.BytesIO(matching.preview(on, {"images": on.inputs(shades), "labels": labels}))).convert("L")
    rows = [[picture.getpixel((x, y)) for x in (0, 10, 20)] for y in range(0, 100, 10)]
    assert rows == [[20 * k, 20 * k, 255 if k == 1 else 20 * k] for k in range(10)]


def test_random_subset_wants_enough_images():
    on = matching.task("digits", None, device=CPU)
    tensors = matching.random_subset(on, 3, seed=0)
    assert tensors["labels"].bincount().tolist() == [3] * 10 and len(tensors["images"].unique(dim=0)) == 30
    assert not torch.equal(tensors["images"], matching.random_subset(on, 3, seed=1)["images"])
    with pytest.raises(ValueError, match="ipc=5000"):
        matching.random_subset(on, 5000, seed=0)


@pytest.mark.slow
def test_a_method_alone(tmp_path):
    command = [
        sys.executable, "methods/dm.py", "dataset=digits", "ipc=1", "iterations=3", "batch_real=8", "students=2",
        "protocol=mixing-2025", "device=cpu", f"store={tmp_path}/runs", f"out={tmp_path}/out",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"students: \d+\.\d\d ± \d+\.\d\d % on 360 test images \(2 students, protocol mixing", done.stdout)
    made = load(tmp_path / "out" / "dm_digits_ipc1.safetensors")
    assert made.images.shape == (10, 1, 32, 32) and made.settings["config"]["iterations"] == 3
    metas = [json.loads(path.read_text()) for path in (tmp_path / "runs").glob("*/*/meta.json")]
    stages = [meta for meta in metas if "seconds" in meta]  # a paper's run may find them: with the facts it reads
    assert len(stages) == 2 and all({"finished", "made", "peak_memory_bytes"} <= meta.keys() for meta in stages)


@pytest.mark.parametrize("method", ["dc", "dsa", "dm", "mtt"])
def test_a_wrong_argument_is_named(method):
    done = subprocess.run(
        [sys.executable, f"methods/{method}.py", "ipcs=1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "ipcs" in done.stderr and "Traceback" not in done.stderr
