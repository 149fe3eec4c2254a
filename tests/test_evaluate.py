"""`python -m common.evaluate`: any set, any protocol, beside random real images."""

import json
import re

import pytest
import torch

from common import cli, evaluate, matching
from common.augment import rng
from common.distilled import DistilledSet, load

SHORT = ["dataset=digits", "size=16", "network=convnet2-w32", "device=cpu", "epochs=2", "students=2"]
SHORT += ["teacher_epochs=1"]


@pytest.fixture
def place(tmp_path):
    """A set of two images a class in a file, and where results go."""
    on = matching.task("digits", None, device="cpu", size=16, network="convnet2-w32")
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
    assert "random real images, as many: " in said
    (file,) = (place / "out").glob("*.json")
    kept = json.loads(file.read_text())
    assert kept["accuracies"] == result["accuracies"] and len(kept["random_real"]) == 2
    assert ("accuracy" in kept.get("teacher", {})) == ("teacher: " in said)
    assert kept["protocol"]["name"] == protocol and kept["protocol"]["epochs"] == 2 and kept["seeds"] == [0, 1]
    before = {p: p.stat().st_mtime_ns for p in (place / "runs").glob("*/*/manifest.json")}
    assert run(place, f"protocol={protocol}")["accuracies"] == result["accuracies"]
    assert {p: p.stat().st_mtime_ns for p in (place / "runs").glob("*/*/manifest.json")} == before  # nothing again


def test_the_data_set_is_the_one_that_the_set_names(tmp_path):
    on = matching.task("digits", None, device="cpu", size=16, network="convnet2-w32")
    tensors = matching.random_subset(on, 2, 7)
    on.distilled(tensors, {"dataset": "cifar10"}).save(tmp_path / "set.safetensors")
    given = evaluate.Evaluation(set=str(tmp_path / "set.safetensors"))
    assert evaluate.with_dataset(given).dataset == "cifar10"
    assert evaluate.with_dataset(evaluate.replace(given, dataset="svhn")).dataset == "svhn"
    on.distilled(tensors, {}).save(tmp_path / "set.safetensors")
    assert evaluate.with_dataset(given).dataset == evaluate.with_dataset(evaluate.Evaluation()).dataset == "digits"


def test_the_numbers_are_those_of_the_students(place):
    on = matching.task("digits", None, device="cpu", size=16, network="convnet2-w32")
    protocol = evaluate.replace(evaluate.PROTOCOLS["dm-2023"], epochs=2)
    expected = matching.students(place, on, matching.random_subset(on, 2, 7), protocol, [0, 1]).meta["accuracies"]
    assert run(place, "protocol=dm-2023", "random=false")["accuracies"] == expected


def test_random_images_alone(place):
    result = evaluate.run([*SHORT, f"store={place}/runs", f"out={place}/out", "ipc=3"])
    assert len(set(result["random_real"])) > 1 and "accuracies" not in result  # each student has images of its own
    beside = [*SHORT, f"store={place}/runs", f"out={place}/out", f"set={place}/set.safetensors"]
    assert evaluate.run([*beside])["random_real"] != result["random_real"]  # two a class, not three


def test_a_set_of_another_size_takes_the_data_set_along(place, capsys):
    images = torch.rand(10, 1, 24, 24, generator=rng(0))
    names = tuple(map(str, range(10)))
    DistilledSet(images, torch.arange(10), names, (0.5,), (0.5,)).save(place / "set.safetensors")
    arguments = [a for a in SHORT if not a.startswith("size")]
    evaluate.run([*arguments, f"store={place}/runs", f"out={place}/out", f"set={place}/set.safetensors"])
    assert "10 images of 10 classes, 24 px" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has images of 24 x 24 px; allowed: square ones, of size=16"):
        run(place)


def test_a_set_in_colour_of_grey_data(place):
    names = tuple(map(str, range(10)))
    images = torch.rand(10, 3, 16, 16, generator=rng(0))
    DistilledSet(images, torch.arange(10), names, (0.5,) * 3, (0.5,) * 3).save(place / "set.safetensors")
    assert len(run(place)["accuracies"]) == 2


def test_classes_in_another_order_are_put_right(place):
    own, straight = load(place / "set.safetensors"), run(place)["accuracies"]
    turned = DistilledSet(own.images, 9 - own.labels, own.classes[::-1], own.mean, own.std)
    turned.save(place / "set.safetensors")
    assert run(place)["accuracies"] == straight
    DistilledSet(own.images, own.labels, ("a", *own.classes[:-1]), own.mean, own.std).save(place / "set.safetensors")
    with pytest.raises(ValueError, match=f"class 0 is 'a' in .* and '{own.classes[0]}' in digits: other classes"):
        run(place)


def test_as_many_random_images_of_each_class(place, monkeypatch):
    own = load(place / "set.safetensors")
    DistilledSet(own.images[1:], own.labels[1:], own.classes, own.mean, own.std).save(place / "set.safetensors")
    counts, real = [], matching.random_subset

    def seen(on, ipc, seed):
        made = real(on, ipc, seed)
        counts.append(made["labels"].bincount(minlength=10).tolist())
        return made

    monkeypatch.setattr(matching, "random_subset", seen)
    run(place)
    assert counts == [[1, *[2] * 9]] * 3  # once to see that they are there
    many = own.images[:1].repeat(300, 1, 1, 1)
    DistilledSet(many, own.labels[:1].repeat(300), own.classes, own.mean, own.std).save(place / "set.safetensors")
    with pytest.raises(ValueError, match=r"of digits are asked for, which has 1.*random=false tests the set alone"):
        run(place)


def test_results_of_other_arguments_lie_beside_each_other(place):
    for epochs in (2, 3):
        arguments = [a for a in SHORT if not a.startswith("epochs")]
        evaluate.run([*arguments, f"epochs={epochs}", f"out={place}/out", f"store={place}/runs"])
    assert len(list((place / "out").glob("*.json"))) == 2


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("protocol=mtt-2022", "a step size learned with the images; the set has none"),
        ("protocol=datm-2024", "the set has none"),
        ("protocol=dm2023", "did you mean 'dm-2023'"),
        ("set=nothing.safetensors", "no distilled set at nothing.safetensors"),
        ("students=0", "students=0: must be at least 1"),
        ("weights=true", "set.safetensors has none"),
    ],
)
def test_what_cannot_work_is_said_in_one_sentence(place, argument, words, capsys):
    name = argument.partition("=")[0]
    rest = [a for a in (*SHORT, f"set={place}/set.safetensors") if not a.startswith(f"{name}=")]
    assert cli.guard(evaluate.run, [*rest, f"store={place}/runs", argument]) in (1, 2)
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1
    assert not list((place / "runs").glob("students/*"))
