"""Streams give the views of the set in memory, whatever the workers; the doctor names all that is wrong."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch

from common import cli, doctor
from common.datasets import Dataset, Stream, load
from common.views import Recipe, views
from tests.image_trees import damage, tree

# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path) -> tuple[Dataset, Stream]:
    """The same files in memory and streamed."""
    tree(tmp_path, sizes=((80, 110), (120, 90), (100, 100)), count=8)
    return load("own", tmp_path), load("own", tmp_path, resident_bytes=0)


def gather(stream: Stream, indices, **arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.cat(parts) for parts in zip(*stream.batches(indices, **arguments), strict=True))


def test_large_sets_stream(pair):
    data, stream = pair
    assert isinstance(stream, Stream) and len(stream) == len(data) == 16 and stream.classes == data.classes
    assert torch.equal(stream.labels, data.labels) and stream.class_indices(1).tolist() == list(range(8, 16))


def test_stream_center_views_are_those_of_the_set_in_memory(pair):
    data, stream = pair
    order = [3, 15, 0, 7, 8]
    images, labels, indices = gather(stream, order, batch=2, size=64, workers=0)
    assert indices.tolist() == order and torch.equal(labels, data.labels[order])
    assert (images.int() - data.center(64, order).int()).abs().max() <= 1


def test_whole_images_are_those_of_the_set_in_memory(pair):
    data, stream = pair
    order = torch.tensor([3, 15, 0])
    canvas, sizes = stream.whole(order)
    assert torch.equal(sizes, data.sizes[order])
    height, width = sizes.amax(0).tolist()
    assert torch.equal(canvas, data.images[order, :, :height, :width])


def test_stream_random_views_depend_on_seed_epoch_and_image_alone(pair):
    _, stream = pair
    asked = {"size": 32, "view": "random", "seed": 1, "epoch": 2}
    images, _, _ = gather(stream, range(16), batch=16, workers=0, **asked)
    again, _, indices = gather(stream, torch.arange(16).flip(0), batch=3, workers=2, **asked)
    assert torch.equal(again.flip(0), images) and indices.tolist() == list(range(15, -1, -1))
    for change in ({"seed": 2}, {"epoch": 3}):
        other, _, _ = gather(stream, range(16), batch=16, workers=0, **asked | change)
        assert (other != images).flatten(1).any(1).all()


def test_stream_random_view_of_the_whole_square_is_the_image_or_its_mirror(tmp_path):
    tree(tmp_path, sizes=((40, 40),), count=10)
    data, stream = load("own", tmp_path), load("own", tmp_path, resident_bytes=0)
    views, _, _ = gather(stream, range(20), batch=20, size=40, view="random", workers=0, scale=(1.0, 1.0))
    whole = [torch.equal(view, image) for view, image in zip(views, data.images, strict=True)]
    mirror = [torch.equal(view, image.flip(2)) for view, image in zip(views, data.images, strict=True)]
    square = [a or b for a, b in zip(whole, mirror, strict=True)]
    assert any(whole) and any(mirror) and all(square)


def test_stream_leaves_out_unreadable_images(tmp_path):
    tree(tmp_path)
    damage(tmp_path / "own" / "train")
    stream = load("own", tmp_path, resident_bytes=0, bad_share=0.4)
    with pytest.warns(UserWarning, match="2 of 6 images cannot be read"):
        _, labels, indices = gather(stream, range(6), batch=2, size=32, workers=0)
    assert indices.tolist() == [0, 2, 3, 4] and labels.tolist() == [0, 0, 1, 1]
    strict = load("own", tmp_path, resident_bytes=0)
    with pytest.raises(ValueError, match=r"a/1.png .*allowed share"):
        gather(strict, range(6), batch=2, size=32, workers=0)
    with pytest.raises(ValueError, match="unknown view 'left': allowed are center, random"):
        next(strict.batches(range(6), 2, 32, "left"))


@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_steps_keep_their_numbers_where_no_image_of_a_batch_can_be_read(tmp_path):
    """Also when training is resumed behind such a batch: each image is met once an epoch."""
    tree(tmp_path)
    damage(tmp_path / "own" / "train")
    stream, recipe = load("own", tmp_path, resident_bytes=0, bad_share=0.4), Recipe(epochs=2, batch=1, cutmix=False)
    whole = {v.step: (v.indices.tolist(), v.pixels) for v in views(stream, recipe, 32, 0)}
    assert len(whole) == 8 and max(whole) == 11  # four of six images, twice
    for start in range(12):
        for view in views(stream, recipe, 32, 0, start):
            assert view.step >= start and view.indices.tolist() == whole[view.step][0]
            assert torch.equal(view.pixels, whole[view.step][1])


@pytest.mark.parametrize("asked", [{"pad": 4, "crop": 1.0}, {"flip": False}, {"shuffle": 2}])
def test_a_recipe_that_asks_more_than_a_stream_gives_is_named(pair, asked):
    data, stream = pair
    (name, value), *_ = asked.items()
    recipe = Recipe(epochs=1, batch=8, **asked)
    assert next(views(data, recipe, 32, 0)).pixels.shape == (8, 3, 32, 32)
    with pytest.raises(ValueError, match=f"{name}={value}, but own is streamed.*allowed: pad=0, flip=True, shuffle=1"):
        next(views(stream, recipe, 32, 0))


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_of_a_sound_set(tmp_path, capsys):
    tree(tmp_path, sizes=((40, 50), (60, 30)))
    (tmp_path / "own" / "train" / "a" / "notes.txt").touch()
    assert cli.guard(doctor.main, ["check", "own", f"data={tmp_path}"]) == 0
    out = capsys.readouterr().out
    mark = hashlib.sha256((tmp_path / "own" / "train" / "a" / "0.png").read_bytes()).hexdigest()[:16]
    assert "6 images, 2 classes, layout <class>/<image>" in out and "height 40 / 60 / 60 px, width 30 / 50 / 50" in out
    assert mark in out and "not images: 1 .txt" in out and out.rstrip().endswith("nothing is wrong")
    assert (
        cli.guard(doctor.main, ["check", "digits"]) == 0
        and "0                            142" in capsys.readouterr().out
    )


def test_doctor_lists_everything_that_is_wrong(tmp_path, capsys):
    tree(tmp_path, classes=("a", "b", "c"))
    damage(tmp_path / "own" / "train")
    shutil.rmtree(tmp_path / "own" / "test" / "c")
    empty_folder = tmp_path / "own" / "test" / "b"
    for path in empty_folder.iterdir():
        path.unlink()
    assert cli.guard(doctor.main, ["check", "own", f"data={tmp_path}"]) == 1
    captured = capsys.readouterr()
    assert "problem: 2 of 9 images cannot be read" in captured.out and "missing: c" in captured.out
    assert "no images in class folder b" in captured.out and "3 problem(s) found" in captured.err
    assert cli.guard(doctor.main, ["check", "other", f"data={tmp_path}"]) == 1
    assert "'other' is not there" in capsys.readouterr().err


def test_doctor_command_line(capsys):
    assert cli.guard(doctor.main, []) == 0 and "check NAME" in capsys.readouterr().out
    assert (
        cli.guard(doctor.main, ["chek", "digits"]) == 2 and "'chek digits' is not understood" in capsys.readouterr().err
    )
