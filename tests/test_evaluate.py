"""`python -m common.evaluate`: any set, any protocol, beside random real images."""

import json
import re

import pytest
import torch

from common import cli, evaluate, matching
from common.augment import rng
from common.distilled import DistilledSet

SHORT = ["dataset=digits", "size=16", "network=convnet2-w32", "device=cpu", "epochs=2", "students=2"]
SHORT += ["teacher_epochs=1"]


@pytest.fixture
def place(tmp_path):
    """A set of two images a class in a file, and where results go."""
    on = matching.setting("digits", None, device="cpu", size=16, network="convnet2-w32")
    tensors = matching.random_subset(on, 2, 7)
    on.distilled(tensors, {}).save(tmp_path / "set.safetensors")
    return tmp_path


def run(place, *arguments):
    return evaluate.run([*SHORT, f"store={place}/runs", f"out={place}/out", f"set={place}/set.safetensors", *arguments])


@pytest.mark.parametrize("protocol", ["hard-truths-hard", "hard-truths-soft", "hard-truths-online", "mixing-2025"])
def test_a_set_is_tested_beside_random_images(place, protocol, capsys):
    result = run(place, f"protocol={protocol}")
    said = capsys.readouterr().out
    assert ("teacher: " in said) == (protocol in ("hard-truths-soft", "hard-truths-online"))
    assert re.search(rf"set.safetensors: [0-9.]+ ± [0-9.]+ % on 360 test images \(2 students, {protocol}", said)
    assert "random real images, 2 a class: " in said
    (file,) = (place / "out").glob("*.json")
    kept = json.loads(file.read_text())
    assert kept["accuracies"] == result["accuracies"] and len(kept["random_real"]) == 2
    assert kept["protocol"]["name"] == protocol and kept["protocol"]["epochs"] == 2 and kept["seeds"] == [0, 1]
    before = {p: p.stat().st_mtime_ns for p in (place / "runs").glob("*/*/manifest.json")}
    assert run(place, f"protocol={protocol}")["accuracies"] == result["accuracies"]
    assert {p: p.stat().st_mtime_ns for p in (place / "runs").glob("*/*/manifest.json")} == before  # nothing again


def test_the_numbers_are_those_of_the_students(place):
    on = matching.setting("digits", None, device="cpu", size=16, network="convnet2-w32")
    protocol = evaluate.replace(evaluate.PROTOCOLS["dm-2023"], epochs=2)
    expected = matching.students(place, on, matching.random_subset(on, 2, 7), protocol, [0, 1]).meta["accuracies"]
    assert run(place, "protocol=dm-2023", "random=false")["accuracies"] == expected


def test_random_images_alone(place):
    result = evaluate.run([*SHORT, f"store={place}/runs", f"out={place}/out", "ipc=3"])
    assert result["set"] == "random real images" and "random_real" not in result


def test_a_set_of_another_size_takes_the_data_set_along(place, capsys):
    images = torch.rand(10, 1, 24, 24, generator=rng(0))
    names = tuple(map(str, range(10)))
    DistilledSet(images, torch.arange(10), names, (0.5,), (0.5,)).save(place / "set.safetensors")
    arguments = [a for a in SHORT if not a.startswith("size")]
    evaluate.run([*arguments, f"store={place}/runs", f"out={place}/out", f"set={place}/set.safetensors"])
    assert "10 images of 10 classes, 24 px" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"has images \[C, H, W\] \[1, 24, 24\], here \[1, 16, 16\]"):
        run(place)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("protocol=mtt-2022", "a step size learned with the images; the set has none"),
        ("protocol=datm-2024", "the set has none"),
        ("protocol=dm2023", "did you mean 'dm-2023'"),
        ("set=nothing.safetensors", "no distilled set at nothing.safetensors"),
        ("students=0", "students=0: must be at least 1"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(place, argument, words, capsys):
    name = argument.partition("=")[0]
    rest = [a for a in (*SHORT, f"set={place}/set.safetensors") if not a.startswith(f"{name}=")]
    assert cli.guard(evaluate.run, [*rest, f"store={place}/runs", argument]) in (1, 2)
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1
    assert not list((place / "runs").glob("students/*"))
