"""Distilled sets: what is written comes back, in our file and in the official layouts; nothing is unpickled."""

import io
import os
import re
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from common.cli import UsageError
from common.distilled import (
    DistilledSet,
    class_grid,
    described,
    grid,
    load,
    load_dc_pt,
    load_fkd,
    load_image_folder,
    load_mtt_pt,
    main,
    write,
    write_dc_pt,
    write_image_folder,
    write_mtt_pt,
)

CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(**changes) -> DistilledSet:
    """6 images of 3 classes, with pixels outside [0, 1]."""
    images = torch.randn(6, 3, 8, 8, generator=generator()) * 0.3 + 0.5
    made = DistilledSet(images, torch.tensor([0, 0, 1, 1, 2, 2]), ("cat", "dog", "bird"), MEAN, STD,
                        soft_labels=torch.randn(6, 3, generator=generator(1)), weights=torch.rand(6).double(),
                        student_lr=0.02, settings={"method": "dm", "ipc": 2})
    return replace(made, **changes)


def assert_same(one: DistilledSet, other: DistilledSet) -> None:
    for name in ("images", "labels", "soft_labels", "weights"):
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None), name
        assert left is None or (left.dtype == right.dtype and torch.equal(left, right)), name
    for name in ("classes", "mean", "std", "student_lr", "settings"):
        assert getattr(one, name) == getattr(other, name), name


# ---- the set itself -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"soft_labels": None, "weights": None, "student_lr": None, "settings": {}},
                                     {"soft_labels": torch.zeros(6, 3, dtype=torch.float16)}])
def test_our_file_round_trips(tmp_path, changes):
    made, path = example(**changes), tmp_path / "new" / "set.safetensors"
    made.save(path)
    back = load(path)
    assert_same(made, back)
    assert back.fingerprint() == made.fingerprint()


def test_truncation_not_rounding():
    values = torch.tensor([-0.2, 0.0, 0.5, 253.99, 254.0, 254.9, 255.0, 300.0]) / 255
    made = example(images=values.view(1, 1, 1, 8).expand(6, 3, 8, 8).contiguous())
    assert made.uint8()[0, 0, 0].tolist() == [0, 0, 0, 253, 254, 254, 255, 255] and made.uint8().dtype == torch.uint8


def test_normalised_is_the_formula():
    made = example()
    assert torch.allclose(made.normalised()[4, 2, 3, 5], (made.images[4, 2, 3, 5] - MEAN[2]) / STD[2])


def test_fingerprint_sees_all_but_the_settings():
    made = example()
    changed = [replace(made, **change) for change in (
        {"images": made.images + 1e-6}, {"labels": made.labels.flip(0)}, {"classes": ("cat", "dog", "bee")},
        {"mean": (0.5, 0.5, 0.5)}, {"std": (0.5, 0.5, 0.5)}, {"soft_labels": None}, {"weights": None},
        {"student_lr": 0.03})]
    assert len({each.fingerprint() for each in [made, *changed]}) == 9
    assert replace(made, settings={}).fingerprint() == made.fingerprint()
    assert replace(made, images=made.images.contiguous(memory_format=torch.channels_last)).fingerprint() \
        == made.fingerprint()


@pytest.mark.parametrize("changes, words", [
    ({"images": torch.zeros(6, 3, 8, 8, dtype=torch.uint8)}, "float32 .*not uint8"),
    ({"images": torch.zeros(6, 3, 8)}, r"\[M, C, H, W\].*\[6, 3, 8\]"),
    ({"images": torch.zeros(0, 3, 8, 8)}, "M > 0"),
    ({"images": torch.full((6, 3, 8, 8), float("nan"))}, "images hold numbers that are not finite"),
    ({"labels": torch.tensor([0, 0, 1, 1, 2])}, r"labels must be int64 \[6\], not int64 \[5\]"),
    ({"labels": torch.zeros(6)}, "labels must be int64"),
    ({"labels": torch.tensor([0, 0, 1, 1, 2, 3])}, r"labels lie in 0\.\.3, not in 0\.\.2"),
    ({"labels": torch.tensor([-1, 0, 1, 1, 2, 2])}, r"labels lie in -1\.\.2"),
    ({"classes": ["cat", "dog", "bird"]}, "classes must be a tuple"),
    ({"mean": (0.5,)}, "mean must hold 3 finite numbers"),
    ({"mean": (0.5, 0.5, float("nan"))}, "mean must hold 3 finite numbers"),
    ({"std": (0.5, 0.5, 0.0)}, "std must be above 0"),
    ({"soft_labels": torch.zeros(6, 4)}, r"soft_labels must be floating point \[6, 3\], not float32 \[6, 4\]"),
    ({"soft_labels": torch.zeros(6, 3).long()}, "soft_labels must be floating point"),
    ({"weights": torch.zeros(5)}, r"weights must be floating point \[6\]"),
    ({"weights": torch.tensor([1.0, 1, 1, 1, 1, -1])}, "weights must not be negative"),
    ({"weights": torch.tensor([1.0, 1, 1, 1, 1, float("inf")])}, "weights hold numbers that are not finite"),
    ({"student_lr": 0.0}, "student_lr must be a finite number above 0"),
    ({"settings": {"made by": object()}}, "settings.made by"),
])
def test_what_does_not_fit_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        example(**changes)


@settings(CALM, max_examples=60)
@given(bit=st.integers(0, 10**6))
def test_a_flipped_bit_is_noticed(tmp_path_factory, bit):
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    example(images=torch.zeros(6, 3, 1, 1)).save(path)
    data = bytearray(path.read_bytes())
    data[(bit // 8) % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"flipped.safetensors"):
        load(path)


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import save_file
    save_file({"images": torch.zeros(1)}, tmp_path / "weights.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, words in (("weights.safetensors", "not a distilled set"), ("notes.txt", "not a known layout"),
                        ("empty", "no images in class folders")):
        with pytest.raises(ValueError, match=words):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there is no distilled set at .*absent"):
        load(tmp_path / "absent.safetensors")


# ---- DC, DSA, DM --------------------------------------------------------------------------------------------------

def official_dc(path: Path, experiments: int = 2) -> list[torch.Tensor]:
    """A file as the official script leaves it: detached CPU tensors, accuracies as NumPy numbers."""
    normalised = [torch.randn(6, 3, 8, 8, generator=generator(seed)) for seed in range(experiments)]
    data = [[images, torch.tensor([0, 0, 1, 1, 2, 2])] for images in normalised]
    accuracies = {"ConvNet": [np.mean([0.5, 0.25]), np.float64(0.75)]}
    torch.save({"data": data, "accs_all_exps": accuracies}, path)
    return normalised


def test_dc_file(tmp_path):
    path = tmp_path / "res_DM_CIFAR10_ConvNet_2ipc.pt"
    normalised = official_dc(path)
    for experiment in (0, 1):
        made = load_dc_pt(path, MEAN, STD, experiment=experiment)
        assert torch.allclose(made.normalised(), normalised[experiment], atol=1e-5)
        expected = normalised[experiment][3, 1, 2, 2] * STD[1] + MEAN[1]
        assert torch.allclose(made.images[3, 1, 2, 2], expected)
    assert made.classes == ("0", "1", "2") and made.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert made.settings["accuracies"] == {"ConvNet": [0.375, 0.75]} and made.settings["experiments"] == 2
    made.save(tmp_path / "again.safetensors")  # the NumPy numbers have become plain ones
    with pytest.raises(ValueError, match=r"experiment=2: .* holds 2, numbered from 0"):
        load_dc_pt(path, MEAN, STD, experiment=2)
    with pytest.raises(ValueError, match="on the command line normalisation="):
        load(path)
    with pytest.raises(ValueError, match=r"do not go with mean \(0.5,\)"):
        load(path, mean=(0.5,), std=(0.5,))
    assert load(path, mean=MEAN, std=STD, classes=("a", "b", "c", "d")).classes == ("a", "b", "c", "d")


def test_dc_round_trip_and_legacy_format(tmp_path):
    made, path = example(), tmp_path / "res.pt"
    write_dc_pt(made, path)
    content = torch.load(path, weights_only=True)
    assert torch.equal(content["data"][0][0], made.normalised()) and content["data"][0][1].dtype == torch.int64
    back = load(path, mean=MEAN, std=STD, classes=made.classes)
    assert torch.allclose(back.images, made.images, atol=1e-6) and torch.equal(back.labels, made.labels)
    torch.save(content, path, _use_new_zipfile_serialization=False)  # what old versions of torch wrote
    assert torch.equal(load(path, mean=MEAN, std=STD).images, back.images)


# ---- MTT, DATM ----------------------------------------------------------------------------------------------------

def test_mtt_folder(tmp_path):
    images = torch.randn(6, 3, 8, 8, generator=generator(), requires_grad=True)
    torch.save(images, tmp_path / "images_best.pt")
    torch.save(torch.tensor([0, 0, 1, 1, 2, 2]), tmp_path / "labels_best.pt")
    made = load(tmp_path, mean=MEAN, std=STD)
    assert torch.allclose(made.normalised(), images.detach(), atol=1e-5) and not made.images.requires_grad
    assert made.soft_labels is None and made.student_lr is None and made.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_mtt_layout_there_and_back(tmp_path):
    made = DistilledSet(
        torch.randn(6, 3, 8, 8, generator=generator(5)), torch.arange(6) // 2, ("a", "b", "c"), MEAN, STD,
        soft_labels=torch.randn(6, 3, generator=generator(6)), student_lr=0.02,
    )  # fmt: skip
    write_mtt_pt(made, tmp_path / "set")
    plain = torch.load(tmp_path / "set" / "images_best.pt", weights_only=True)
    assert torch.equal(plain, made.normalised())
    back = load(tmp_path / "set", mean=MEAN, std=STD)
    assert torch.allclose(back.images, made.images, atol=1e-6) and back.student_lr == pytest.approx(0.02)
    assert torch.equal(back.soft_labels, made.soft_labels)
    write_mtt_pt(replace(made, student_lr=None), tmp_path / "set")  # in its place: its rate must not stay behind
    assert load(tmp_path / "set", mean=MEAN, std=STD).student_lr is None


def test_a_whitened_set_says_so(tmp_path):
    whitening = {"zca_eps": 0.1, "fitted_on": "0" * 64}
    made = DistilledSet(
        torch.rand(2, 3, 8, 8, generator=generator(5)), torch.arange(2), ("a", "b"), MEAN, STD, whitening=whitening
    )
    made.save(tmp_path / "set.safetensors")
    assert load(tmp_path / "set.safetensors").whitening == whitening
    with pytest.raises(ValueError, match="ZCA"):
        made.normalised()
    with pytest.raises(ValueError, match="whiten"):
        write_mtt_pt(made, tmp_path / "mtt")
    write_mtt_pt(made, tmp_path / "mtt", whiten=lambda images: images * 2 - 1)
    assert torch.equal(torch.load(tmp_path / "mtt" / "images_best.pt", weights_only=True), made.images * 2 - 1)
    assert torch.equal(torch.load(tmp_path / "mtt" / "images_zca_best.pt", weights_only=True), made.images)


def test_a_folder_of_images_keeps_the_space_of_its_set(tmp_path):
    whitening = {"zca_eps": 0.1, "fitted_on": "0" * 64}
    images = torch.rand(2, 3, 8, 8, generator=generator(5))
    for name, white in (("plain", None), ("white", whitening)):
        made = DistilledSet(images, torch.arange(2), ("a", "b"), MEAN, STD, whitening=white)
        write(made, tmp_path / name, "images")
        back = load(tmp_path / name)
        assert (back.mean, back.std, back.whitening) == (MEAN, STD, white)
        assert ("whitened" in described(back)) == ("normalised" not in described(back)) == bool(white)
    assert load(tmp_path / "plain", mean=(0.1,) * 3, std=(0.2,) * 3).mean == (0.1,) * 3
    (tmp_path / "plain" / "normalisation.json").unlink()
    guessed = load(tmp_path / "plain")
    assert guessed.mean == (0.485, 0.456, 0.406) and "ImageNet" in guessed.settings["normalisation"]
    for damaged in ("{", "[]", '{"mean": [0.1]}', '{"mean": 3, "std": 1}'):
        (tmp_path / "plain" / "normalisation.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"normalisation\.json must hold mean and std"):
            load(tmp_path / "plain")


def test_datm_file_with_logits_and_learning_rate(tmp_path):
    logits = torch.randn(6, 4, generator=generator(2), requires_grad=True)
    torch.save(torch.zeros(6, 3, 8, 8), tmp_path / "images_500.pt")
    torch.save(torch.ones(6, 3, 8, 8), tmp_path / "images_zca_500.pt")
    torch.save(logits, tmp_path / "labels_500.pt")
    torch.save(torch.tensor(0.01), tmp_path / "lr_500.pt")
    made = load(tmp_path / "images_500.pt", mean=MEAN, std=STD)
    assert torch.equal(made.soft_labels, logits.detach()) and torch.equal(made.labels, logits.argmax(1))
    assert made.student_lr == pytest.approx(0.01) and len(made.classes) == 4
    assert load(tmp_path / "images_zca_500.pt", mean=(0.0,) * 3, std=(1.0,) * 3).images.min() == 1
    (tmp_path / "labels_500.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels_500.pt"):
        load_mtt_pt(tmp_path / "images_500.pt", MEAN, STD)
    with pytest.raises(ValueError, match="not in the MTT layout"):
        load_mtt_pt(tmp_path / "labels_500.pt", MEAN, STD)


def test_float_labels_become_numbers_only_if_they_are(tmp_path):
    torch.save(torch.zeros(2, 3, 8, 8), tmp_path / "images_best.pt")
    torch.save(torch.tensor([0.0, 1.0]), tmp_path / "labels_best.pt")
    assert load(tmp_path, mean=MEAN, std=STD).labels.tolist() == [0, 1]
    torch.save(torch.tensor([0.0, 0.5]), tmp_path / "labels_best.pt")
    with pytest.raises(ValueError, match="class numbers or logits"):
        load(tmp_path, mean=MEAN, std=STD)


# ---- refusal ------------------------------------------------------------------------------------------------------

class Marker:
    """Reading this pickle makes a folder: the plain form of an attack."""

    def __init__(self, place: Path):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["res.pt", "images_best.pt"])
def test_pickled_objects_are_refused_unrun(tmp_path, name, legacy):
    place = tmp_path / "made by the pickle"
    torch.save({"data": Marker(place)}, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=f"{name} is refused: it asks for .*mkdir, and only tensors"):
        load(tmp_path / name, mean=MEAN, std=STD)
    assert not place.exists()


def test_pickled_networks_are_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "res.pt")
    with pytest.raises(ValueError, match=r"refused: it asks for torch.nn"):
        load(tmp_path / "res.pt", mean=MEAN, std=STD)


@pytest.mark.parametrize("content", [
    [], {"data": 3}, {"data": [torch.zeros(1)]}, {"data": [[1, 2]]}, OrderedDict(weight=torch.zeros(2)),
    {"data": [[torch.zeros(2, 3, 8, 8), torch.zeros(2).long()]], "accs_all_exps": 3},
    {"data": [[torch.zeros(2, 3, 8, 8), torch.zeros(3).long()]]}, {"data": [[torch.zeros(2, 3), torch.zeros(2)]]}])
def test_other_tensors_are_not_a_set(tmp_path, content):
    torch.save(content, tmp_path / "res.pt")
    with pytest.raises(ValueError):
        load(tmp_path / "res.pt", mean=MEAN, std=STD)


@settings(CALM, max_examples=60)
@given(cut=st.integers(0, 5000) | st.none(), bit=st.integers(0, 50000))
def test_broken_pt_gives_a_value_error_or_a_set(tmp_path_factory, cut, bit):
    path = tmp_path_factory.getbasetemp() / "broken.pt"
    official_dc(path, experiments=1)
    data = bytearray(path.read_bytes())
    data[(bit // 8) % len(data)] ^= 1 << bit % 8
    path.write_bytes(data[:cut])
    try:
        assert load(path, mean=MEAN, std=STD).images.shape[1] == 3
    except ValueError as error:
        assert "\n" not in str(error)


# ---- folders of images --------------------------------------------------------------------------------------------

def test_png_folder_round_trip_is_exact(tmp_path):
    images = (torch.arange(6 * 3 * 8 * 8) % 256).view(6, 3, 8, 8).float() / 255
    made = example(images=images, soft_labels=None, student_lr=None)
    write_image_folder(made, tmp_path / "out")
    back = load(tmp_path / "out", mean=MEAN, std=STD)
    assert torch.equal(back.uint8(), made.uint8()) and torch.equal(back.images, images)
    assert_same(replace(back, settings=made.settings), made)
    names = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.png"))
    assert names[:3] == ["00000/class00000_id00000.png", "00000/class00000_id00001.png", "00001/class00001_id00000.png"]
    with pytest.raises(FileExistsError, match="out is there and not empty"):
        write_image_folder(made, tmp_path / "out")


def test_grey_images_round_trip(tmp_path):
    made = example(images=torch.rand(6, 1, 8, 8), mean=(0.5,), std=(0.5,), weights=None)
    write_image_folder(made, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out", mean=(0.5,), std=(0.5,)).uint8(), made.uint8())


def official_tree(root: Path, folder: str, name: str, counts: dict[int, int]) -> None:
    for label, count in counts.items():
        (root / folder.format(label)).mkdir(parents=True)
        for number in range(count):
            color = (label * 20 % 256, number * 10, 200)
            Image.new("RGB", (16, 16), color).save(root / folder.format(label) / name.format(label, number), quality=95)


@pytest.mark.parametrize("folder, name", [("new{:03d}", "class{:03d}_id{:03d}.jpg"),
                                          ("{:05d}", "class{:05d}_id{:05d}.jpg")])
def test_official_trees(tmp_path, folder, name):
    official_tree(tmp_path, folder, name, {0: 12, 3: 1, 999: 1, 1000: 2})  # new1000 sorts before new999 as text
    made = load_image_folder(tmp_path)
    assert made.labels.tolist() == [0] * 12 + [3, 999, 1000, 1000] and len(made.classes) == 1001
    assert made.mean == (0.485, 0.456, 0.406) and made.std == (0.229, 0.224, 0.225)
    middle = made.images[:, :, 8, 8] * 255
    assert (middle[:12, 1] - torch.arange(12) * 10).abs().max() < 4  # files in the order of their numbers
    assert middle[13, 0] == pytest.approx(999 * 20 % 256, abs=4)


def test_wmdd_weights(tmp_path):
    official_tree(tmp_path, "new{:03d}", "class{:03d}_id{:03d}.jpg", {0: 2, 1: 2})
    (tmp_path / "sample_weights.txt").write_text("0.25 0.75\n0.5 0.5\n")
    assert load(tmp_path).weights.tolist() == [0.25, 0.75, 0.5, 0.5]
    (tmp_path / "sample_weights.txt").write_text("0.25 0.75\n1.0\n")
    with pytest.raises(ValueError, match=r"sample_weights.txt must have a line for each class"):
        load(tmp_path)


def test_named_folders_and_bad_images(tmp_path):
    for name, size in (("n02", 8), ("n01", 8)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (size, size), "red").save(tmp_path / name / "a.PNG")
    made = load(tmp_path)
    assert made.classes == ("n01", "n02") and made.labels.tolist() == [0, 1]
    Image.new("RGB", (9, 8)).save(tmp_path / "n02" / "b.png")
    with pytest.raises(ValueError, match=r"different shapes .*\(3, 8, 8\), \(3, 8, 9\)"):
        load(tmp_path)
    (tmp_path / "n02" / "b.png").write_bytes((tmp_path / "n01" / "a.PNG").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"b.png cannot be read as an image"):
        load(tmp_path)


# ---- soft labels --------------------------------------------------------------------------------------------------

def official_records(root: Path, parts: int) -> None:
    for batch in range(11):
        record = [torch.rand(4, 4), torch.tensor([True, False, True, False]), torch.randperm(4), 0.5 if parts == 6
                  else np.float64(0.5), [np.int64(batch), 2, np.int64(9), 10], torch.randn(4, 3).half(),
                  torch.full((4,), 0.25).double()]
        (root / "epoch_0").mkdir(exist_ok=True, parents=True)
        torch.save(record[:parts], root / "epoch_0" / f"batch_{batch}.tar")


@pytest.mark.parametrize("parts", [6, 7])
def test_fkd_records(tmp_path, parts):
    official_records(tmp_path, parts)
    records = load_fkd(tmp_path, 0)
    assert [record.mix_box[0] for record in records] == list(range(11))  # batch_10 after batch_9
    first = records[0]
    assert first.boxes.shape == (4, 4) and first.flips.dtype == torch.bool and first.logits.dtype == torch.float16
    assert first.mix_share == 0.5 and type(first.mix_share) is float and first.mix_box == (0, 2, 9, 10)
    assert (first.weights is None) == (parts == 6) and sorted(first.mix_index.tolist()) == [0, 1, 2, 3]
    with pytest.raises(FileNotFoundError, match=r"epoch_1.batch_0.tar is missing"):
        load_fkd(tmp_path, 1)
    (tmp_path / "epoch_0" / "batch_4.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"batch_4.tar is missing"):
        load_fkd(tmp_path, 0)


@pytest.mark.parametrize("change, words", [
    ((5, torch.zeros(3, 3)), "disagree"), ((0, torch.zeros(4, 3)), "disagree"), ((0, torch.tensor(3)), "disagree"),
    ((1, None), "NoneType where a tensor"), ((3, "half"), "its mix"), ((4, 7), "its mix"), ((4, [1, 2, 3]), "its mix")])
def test_broken_fkd_records(tmp_path, change, words):
    official_records(tmp_path, 6)
    path = tmp_path / "epoch_0" / "batch_0.tar"
    record = torch.load(path, weights_only=False)
    record[change[0]] = change[1]
    torch.save(record, path)
    with pytest.raises(ValueError, match=words):
        load_fkd(tmp_path, 0)


def test_fkd_without_mix_and_with_an_object(tmp_path):
    (tmp_path / "epoch_2").mkdir()
    path = tmp_path / "epoch_2" / "batch_0.tar"
    torch.save([torch.rand(4, 4), torch.zeros(4).bool(), None, None, None, torch.zeros(4, 3)], path)
    record = load_fkd(tmp_path, 2)[0]
    assert (record.mix_index, record.mix_share, record.mix_box) == (None, None, None)
    torch.save([Marker(tmp_path / "run")], path)
    with pytest.raises(ValueError, match="refused"):
        load_fkd(tmp_path, 2)
    assert not (tmp_path / "run").exists()


# ---- pictures and the command line --------------------------------------------------------------------------------

@pytest.mark.parametrize("channels", [1, 3])
def test_grid_places_every_image(channels):
    images = torch.stack([torch.full((channels, 4, 5), value / 255) for value in (10, 20, 30, 40.9, 50)])
    picture = np.array(Image.open(io.BytesIO(grid(images, 3))))
    assert picture.shape[:2] == (4 + 2 + 4, 5 + 2 + 5 + 2 + 5) and picture.ndim == (2 if channels == 1 else 3)
    corners = picture.reshape(10, 19, -1)[[0, 0, 0, 6, 6, 6], [0, 7, 14, 0, 7, 14], 0]
    assert corners.tolist() == [10, 20, 30, 40, 50, 255] and (picture[4:6] == 255).all()
    assert grid(images, 3) == grid((images * 255).to(torch.uint8), 3) != grid(images, 2)
    assert Image.open(io.BytesIO(grid(images, 99))).size == (5 * 7 - 2, 4)


@pytest.mark.parametrize("images, columns", [(torch.zeros(0, 3, 4, 4), 1), (torch.zeros(3, 4, 4), 1),
                                             (torch.zeros(1, 3, 4, 4), 0), (torch.zeros(1, 2, 4, 4), 1)])
def test_grid_refuses(images, columns):
    with pytest.raises(ValueError):
        grid(images, columns)


def test_command_line(tmp_path, capsys):
    source, made = tmp_path / "res.pt", example()
    official_dc(source)
    main(["info", str(source), "normalisation=cifar10", "experiment=1"])
    text = capsys.readouterr().out
    assert "float32 [6, 3, 8, 8]" in text and "3, images of each: 2; 0, 1, 2" in text
    assert re.search(r"sha256 +[0-9a-f]{64}", text)
    main(["info", str(source), "normalisation=none"])
    assert "std (1.0, 1.0, 1.0)" in capsys.readouterr().out
    made.save(tmp_path / "set.safetensors")
    main(["grid", str(tmp_path / "set.safetensors"), str(tmp_path / "out.png"), "columns=2"])
    assert Image.open(tmp_path / "out.png").size == (18, 28)
    main(["convert", str(tmp_path / "set.safetensors"), str(tmp_path / "tree"), "layout=images"])
    main(["convert", str(tmp_path / "set.safetensors"), str(tmp_path / "dc.pt"), "layout=dc"])
    main(["convert", str(tmp_path / "tree"), str(tmp_path / "tree.safetensors")])
    said = capsys.readouterr().out
    assert said.count("not kept by layout=") == 2 and "written: " in said.splitlines()[-1]
    assert "mean and std" in said and ("soft labels" in said) == (made.soft_labels is not None)
    assert torch.equal(load(tmp_path / "tree.safetensors").uint8(), made.uint8())
    safe = str(tmp_path / "set.safetensors")
    replace(made, whitening={"zca_eps": 0.1}).save(tmp_path / "white.safetensors")
    for command, words in (
        (["grid", safe, "columns=2"], "columns=2 stands where a path belongs; grid needs FILE and OUT"),
        (["convert", safe, str(tmp_path / "x.pt")], "is the name of a file of layout=dc, not of layout=safetensors"),
        (["convert", safe, safe, "layout=images"], "of layout=safetensors, not of layout=images"),
        (["convert", safe, str(tmp_path / "plain")], "layout=safetensors is a file; "),
        (["convert", safe, str(tmp_path / "plain"), "layout=dc"], "must end in .pt"),
        (["convert", str(tmp_path / "white.safetensors"), str(tmp_path / "mtt"), "layout=mtt"], "distilled under ZCA"),
        (["grid", safe, str(tmp_path / "out.jpg")], "out.jpg must end in .png"),
    ):
        with pytest.raises(UsageError, match=re.escape(words)):
            main(command)
    assert not (tmp_path / "x.pt").exists() and not Path("columns=2").exists()
    for wrong in (["draw", "x"], ["info"], ["grid", "x"], ["info", str(source), "layout=jpeg"], ["info", "x", "y"]):
        with pytest.raises(UsageError):
            main(wrong)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_row_for_each_class(dtype):
    """Three images of class 0, one of class 1, whose row is white where it has none."""
    shades = torch.tensor([10, 20, 30, 200]).view(4, 1, 1, 1).expand(4, 1, 4, 4)
    images = shades.to(torch.uint8) if dtype == torch.uint8 else shades / 255
    labels = torch.tensor([0, 1, 0, 0])
    picture = np.array(Image.open(io.BytesIO(class_grid(images, labels))))
    assert picture.shape == (10, 16)
    assert picture[0, [0, 6, 12]].tolist() == [10, 30, 200] and picture[6, [0, 6, 12]].tolist() == [20, 255, 255]
    assert np.array(Image.open(io.BytesIO(class_grid(images, labels, most=1)))).shape == (10, 4)
