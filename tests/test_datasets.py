"""Data sets in memory: exact pixels, test views as torchvision makes them, the cache, and bad input in one sentence."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from common import datasets, doctor
from common.datasets import Dataset, load
from common.datasets_decode import center_sides, fingerprint
from tests.image_trees import damage, on_disk, picture, tree, write

# --- in memory --------------------------------------------------------------------------------------------------------


def test_digits_split_is_stratified_disjoint_and_fixed():
    train, test = load("digits"), load("digits", split="test")
    assert train.images.shape == (1437, 3, 32, 32) and train.images.dtype == torch.uint8
    assert test.labels.bincount().tolist() == [36] * 10 and train.labels.dtype == torch.int64
    rows = torch.cat([train.images, test.images]).flatten(1)
    assert len(rows) == 1797 and len(rows.unique(dim=0)) == 1797  # no scan is in both, none is lost
    assert load("digits").fingerprint == train.fingerprint != test.fingerprint
    grey = load("digits", channels=1)
    assert torch.equal(grey.images.expand(-1, 3, -1, -1), train.images) and len(grey.mean) == len(grey.std) == 1


def test_digits_are_the_scans_of_scikit_learn():
    from sklearn.datasets import load_digits

    scans = torch.from_numpy(load_digits().images).float()[:, None] * 255 / 16
    big = torch.nn.functional.interpolate(scans, (32, 32), mode="bilinear").round().to(torch.uint8).flatten(1)
    both = torch.cat([load("digits", channels=1, split=split).images for split in ("train", "test")]).flatten(1)
    assert {row.numpy().tobytes() for row in both} == {row.numpy().tobytes() for row in big}


def test_tree_has_sorted_classes_and_exact_pixels(tmp_path):
    tree(tmp_path)
    paths = sorted((tmp_path / "own" / "train").rglob("*.png"))
    (tmp_path / "own" / "train" / "a" / "._0.png").write_text("what a Mac leaves beside a file")
    data = load("own", tmp_path)
    assert isinstance(data, Dataset) and data.classes == ("a", "b") and data.sizes is None and len(data) == 6
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.class_indices(1).tolist() == [3, 4, 5]
    for row, path in enumerate(paths):
        assert torch.equal(data.images[row], on_disk(path))
    assert (data.mean, data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(ValueError, match="class 2 does not exist"):
        data.class_indices(2)


def test_grey_and_colour_files_follow_channels(tmp_path):
    tree(tmp_path)
    write(tmp_path / "own" / "train" / "a" / "0.png", picture(0, 40, 40)[:, :, 0])
    colour, grey = load("own", tmp_path), load("own", tmp_path, channels=1)
    assert torch.equal(colour.images[0, 0], colour.images[0, 2]) and torch.equal(colour.images[0, :1], grey.images[0])
    assert grey.images.shape[1] == 1 and grey.mean == pytest.approx((0.449,))


def test_images_of_different_sizes_share_a_canvas(tmp_path):
    tree(tmp_path, sizes=((40, 50), (60, 30), (45, 45)))
    data = load("own", tmp_path)
    assert data.images.shape == (6, 3, 60, 50) and data.sizes.tolist()[:3] == [[40, 50], [60, 30], [45, 45]]
    for row, path in enumerate(sorted((tmp_path / "own" / "train").rglob("*.png"))):
        height, width = data.sizes[row]
        assert torch.equal(data.images[row, :, :height, :width], on_disk(path))
        assert data.images[row, :, height:].sum() == 0 and data.images[row, :, :, width:].sum() == 0


def test_long_images_are_cut_to_two_to_one_and_large_ones_shrunk(tmp_path):
    tree(tmp_path, sizes=((30, 100), (90, 120)))
    data = load("own", tmp_path, native_short_side=60)
    files = sorted((tmp_path / "own" / "train").rglob("*.png"))
    for row, path in enumerate(files):
        image = on_disk(path)
        expected = v2.functional.center_crop(image, [30, 60]) if image.shape[1] == 30 else v2.Resize(60)(image)
        height, width = expected.shape[1:]
        assert data.sizes[row].tolist() == [height, width]
        assert (data.images[row, :, :height, :width].int() - expected.int()).abs().max() <= 1


def test_subset_and_fingerprint(tmp_path):
    data = load("own", tree(tmp_path, sizes=((40, 50), (60, 30))))
    part = data.subset([4, 1])
    assert torch.equal(part.images, data.images[[4, 1]]) and part.sizes.tolist() == data.sizes[[4, 1]].tolist()
    assert part.labels.tolist() == [1, 0] and part.fingerprint not in (
        data.fingerprint,
        data.subset([1, 4]).fingerprint,
    )
    write(tmp_path / "own" / "train" / "a" / "1.png", 255 - picture(4, 60, 30))
    changed = load("own", tmp_path)
    assert changed.fingerprint != data.fingerprint
    assert changed.subset([4, 1]).fingerprint != part.fingerprint
    marks = {fingerprint(data.images, data.labels, sizes) for sizes in (None, data.sizes, data.sizes + 1)}
    assert len(marks) == 3 and data.fingerprint in marks
    with pytest.raises(ValueError, match="not a mask"):
        data.subset(data.labels == 1)


def test_normalisation_is_chosen_by_name(tmp_path):
    tree(tmp_path)
    assert load("own", tmp_path, normalisation="cifar10").std == (0.2023, 0.1994, 0.2010)
    with pytest.raises(ValueError, match="unknown normalisation 'zca': allowed are imagenet"):
        load("own", tmp_path, normalisation="zca")
    assert datasets.info("imagenette").counts["v2"] == (9_469, 3_925)
    with pytest.raises(ValueError, match="unknown data set 'imagenete'"):
        datasets.info("imagenete")


# --- test views -------------------------------------------------------------------------------------------------------


@example(128, 128, 128)
@settings(max_examples=60, deadline=None)
@given(st.integers(65, 180), st.integers(65, 180), st.sampled_from([32, 64, 100, 128]))
def test_center_view_is_torchvisions_resize_and_crop(height, width, size):
    image = torch.from_numpy(picture(height * width, height, width).copy()).permute(2, 0, 1)
    data = Dataset("one", image[None], torch.zeros(1, dtype=torch.int64), ("a",), (0.5,), (0.5,), None, "")
    expected = v2.CenterCrop(size)(v2.Resize(round(size * 8 / 7))(image))
    if (height, width) == (size, size):
        expected = image
    assert torch.equal(data.center(size)[0], expected)


@pytest.mark.parametrize(("size", "shorter"), [(224, 256), (128, 146), (64, 73)])
def test_center_view_is_pillows_up_to_one_level(size, shorter):
    pixels = picture(1, 375, 500)
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    data = Dataset("one", image[None], torch.zeros(1, dtype=torch.int64), ("a",), (0.5,), (0.5,), None, "")
    resized = v2.Resize(shorter)(Image.fromarray(pixels))
    expected = torch.from_numpy(np.array(v2.CenterCrop(size)(resized))).permute(2, 0, 1)
    assert (data.center(size)[0].int() - expected.int()).abs().max() <= 1


def test_center_views_on_a_canvas_depend_on_the_image_alone(tmp_path):
    data = load("own", tree(tmp_path, sizes=((80, 110), (120, 90), (100, 100))))
    views = data.center(64, [5, 0, 1, 5])
    for view, row in zip(views, (5, 0, 1, 5), strict=True):
        path = sorted((tmp_path / "own" / "train").rglob("*.png"))[row]
        assert torch.equal(view, v2.CenterCrop(64)(v2.Resize(73)(on_disk(path))))
    assert torch.equal(data.center(64)[[5, 0, 1, 5]], views) and data.center(64, []).shape == (0, 3, 64, 64)


def test_small_images_are_stretched_unless_a_shorter_side_is_asked(tmp_path):
    data = load("own", tree(tmp_path, sizes=((32, 32),)))
    assert torch.equal(data.center(32), data.images)
    assert torch.equal(data.center(48), v2.Resize((48, 48))(data.images))
    assert torch.equal(data.center(28, shorter=32), data.images[:, :, 2:30, 2:30])
    with pytest.raises(ValueError, match="shorter side of 20 px cannot hold a crop of 28"):
        data.center(28, shorter=20)
    assert center_sides(375, 500, 224) == (256, 341, 16, 58)


# --- cache ------------------------------------------------------------------------------------------------------------


def test_cache_gives_the_same_set_without_decoding(tmp_path, monkeypatch):
    tree(tmp_path, sizes=((40, 50), (60, 30)))
    first = load("own", tmp_path, cache=tmp_path / "cache")
    monkeypatch.setattr(datasets.decoding, "decode", None)
    again = load("own", tmp_path, cache=tmp_path / "cache")
    assert torch.equal(first.images, again.images) and torch.equal(first.sizes, again.sizes)
    assert torch.equal(first.labels, again.labels) and again.fingerprint == first.fingerprint


@pytest.mark.parametrize("change", ["pixels", "time", "short side", "channels", "split"])
def test_cache_follows_files_and_options(tmp_path, change):
    first = load("own", tree(tmp_path), cache=tmp_path / "cache")
    if change == "pixels":
        write(tmp_path / "own" / "train" / "a" / "0.png", picture(99, 40, 40))
    if change == "time":
        os.utime(tmp_path / "own" / "train" / "a" / "0.png", (0, 0))
    options = {"short side": {"native_short_side": 20}, "channels": {"channels": 1}, "split": {"split": "test"}}
    other = load("own", tmp_path, cache=tmp_path / "cache", **options.get(change, {}))
    assert (other.fingerprint == first.fingerprint) == (change == "time")
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("file", ["images.npy", "about.json"])
def test_damaged_cache_is_named_and_made_again(tmp_path, file):
    first = load("own", tree(tmp_path), cache=tmp_path / "cache")
    path = next((tmp_path / "cache").iterdir()) / file
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="is damaged"):
        again = load("own", tmp_path, cache=tmp_path / "cache")
    assert torch.equal(first.images, again.images)
    assert load("own", tmp_path, cache=tmp_path / "cache").fingerprint == first.fingerprint


def test_cache_that_cannot_be_written_only_warns(tmp_path):
    tree(tmp_path)
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert len(load("own", tmp_path, cache=tmp_path / "file" / "cache")) == 6


# --- bad input --------------------------------------------------------------------------------------------------------


def test_unreadable_images_are_named_counted_and_left_out(tmp_path):
    clean = load("own", tree(tmp_path))
    damage(tmp_path / "own" / "train")
    with pytest.raises(
        ValueError, match=r"2 of 6 images cannot be read: .*a/1.png .*b/2.png \(not an image\)"
    ) as error:
        load("own", tmp_path)
    assert "allowed share of 0.001" in str(error.value)
    for _ in range(2):  # decoded, then from the cache
        with pytest.warns(UserWarning, match="2 of 6 images cannot be read"):
            data = load("own", tmp_path, bad_share=0.4, cache=tmp_path / "cache")
        assert torch.equal(data.images, clean.images[[0, 2, 3, 4]]) and data.labels.tolist() == [0, 0, 1, 1]


def remove(*parts: str):
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def empty(root: Path) -> None:
    for path in (root / "own" / "train" / "b").iterdir():
        path.unlink()


def flat(root: Path) -> None:
    for path in list((root / "own" / "test").rglob("*.png")):
        path.rename(root / "own" / "test" / f"{path.parent.name}{path.name}")
    remove("own", "test", "a")(root)
    remove("own", "test", "b")(root)


@pytest.mark.parametrize(
    ("breakage", "split", "kind", "words"),
    [
        (remove("own"), "train", FileNotFoundError, r"'own' is not there: looked for .*own; put train/.*by name are"),
        (remove("own", "test"), "test", FileNotFoundError, "has no test split: looked for test, .*found train"),
        (remove("own", "train"), "train", FileNotFoundError, "has no train split"),
        (remove("own", "test", "b"), "test", ValueError, r"missing: b; only here: none\): the set is half-unpacked"),
        (empty, "train", ValueError, "no images in class folder b"),
        (flat, "test", ValueError, "6 images that no class folder holds"),
    ],
)
def test_half_unpacked_sets_are_named(tmp_path, breakage, split, kind, words):
    breakage(tree(tmp_path))
    with pytest.raises(kind, match=words):
        load("own", tmp_path, split=split)


def test_known_sets_know_their_classes_and_counts(tmp_path):
    names = datasets.INFO["imagenette"].folders
    tree(tmp_path, "imagenette", names[:9], count=1)
    with pytest.raises(ValueError, match=r"has 9 classes and imagenette has 10 .missing: n03888257"):
        load("imagenette", tmp_path)
    tree(tmp_path, "imagenette2-160", names, count=1)
    shutil.rmtree(tmp_path / "imagenette")
    with pytest.warns(UserWarning, match="has 10 images, imagenette has 9,469 or 12,894"):
        assert load("imagenette", tmp_path).classes == names
    assert any("has 10 images" in problem for problem in doctor.check("imagenette", tmp_path).problems)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "val"}, "unknown split 'val': allowed are train, test"),
        ({"channels": 4}, "channels=4 is not possible"),
        ({"native_short_side": 0}, "native_short_side=0 is not possible"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        load("digits", **arguments)


def test_the_root_is_needed_and_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("DD_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="'imagenette' needs a root folder: pass data=FOLDER or set DD_DATA"):
        load("imagenette")
    monkeypatch.setenv("DD_DATA", str(tree(tmp_path)))
    assert len(load("own")) == 6
