"""Every layout on disk gives the same tensors; the real files, where they are there, give torchvision's views."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as torchvision_sets
from torchvision.transforms import v2

from common import datasets
from common.datasets import load
from tests.image_trees import picture, write

# --- layouts ----------------------------------------------------------------------------------------------------------


def tiny_imagenet(root: Path, layout: str) -> Path:
    """200 classes of one image a split, as `layout`: flat, by class, nested or parquet."""
    rows = {split: [(f"n{label:08d}", picture(label, 8, 8)) for label in range(200)] for split in ("train", "val")}
    folder = root / "tiny-imagenet-200"
    if layout == "parquet":
        import pyarrow
        from pyarrow import parquet

        names = [name for name, _ in rows["train"]][::-1]  # a dump may number its classes in another order
        features = {"info": {"features": {"label": {"names": names}}}}
        for split, stem in (("train", "data/train-00000-of-00001"), ("val", "data/valid-00000-of-00001")):
            columns: dict[str, list] = {"image": [], "label": []}
            for name, pixels in rows[split]:
                Image.fromarray(pixels).save(encoded := io.BytesIO(), "PNG")
                columns["image"].append({"bytes": encoded.getvalue(), "path": None})
                columns["label"].append(names.index(name))
            table = pyarrow.table(columns).replace_schema_metadata({"huggingface": json.dumps(features)})
            (folder / "data").mkdir(parents=True, exist_ok=True)
            parquet.write_table(table, folder / f"{stem}.parquet")
        return root
    (folder / "test" / "images").mkdir(parents=True)  # the published test part has no labels
    for name, pixels in rows["train"]:
        write(folder / "train" / name / "images" / f"{name}_0.png", pixels)
        (folder / "train" / name / f"{name}_boxes.txt").touch()
    for number, (name, pixels) in enumerate(reversed(rows["val"])):
        inner = {"flat": "images", "by class": name, "nested": f"{name}/images"}[layout]
        write(folder / "val" / inner / f"val_{number}.png", pixels)
    if layout == "flat":
        lines = [f"val_{number}.png\t{name}\t0\t0\t7\t7" for number, (name, _) in enumerate(reversed(rows["val"]))]
        (folder / "val" / "val_annotations.txt").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("layout", ["flat", "by class", "nested", "parquet"])
@pytest.mark.filterwarnings("ignore:.*another edition")
def test_tiny_imagenet_layouts_agree(tmp_path, layout):
    if layout == "parquet":
        pytest.importorskip("pyarrow", reason="pyarrow is optional: it only reads parquet dumps")
    root = tiny_imagenet(tmp_path, layout)
    for split in ("train", "test"):
        data = load("tiny-imagenet", root, split=split)
        assert data.classes == tuple(f"n{label:08d}" for label in range(200)) and data.labels.tolist() == [*range(200)]
        for row in (0, 7, 199):
            assert torch.equal(data.images[row].permute(1, 2, 0), torch.from_numpy(picture(row, 8, 8).copy()))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "train.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        load("own", tmp_path)


def cifar10_files(root: Path, monkeypatch) -> np.ndarray:
    """CIFAR-10 as torchvision keeps it, 2 images a batch; returns the training pixels [10, 32, 32, 3]."""
    folder = root / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.stack([picture(seed, 32, 32) for seed in range(12)])
    listed = []
    for batch in range(6):
        rows = pixels[2 * batch : 2 * batch + 2].transpose(0, 3, 1, 2).reshape(2, -1)
        content = pickle.dumps({"data": rows, "labels": [batch, 9]})
        name = f"data_batch_{batch + 1}" if batch < 5 else "test_batch"
        (folder / name).write_bytes(content)
        listed.append([name, hashlib.md5(content).hexdigest()])
    content = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(content)
    meta = {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(content).hexdigest()}
    monkeypatch.setattr(torchvision_sets.CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(torchvision_sets.CIFAR10, "test_list", listed[5:])
    monkeypatch.setattr(torchvision_sets.CIFAR10, "meta", meta)
    return pixels[:10]


def test_cifar10_from_torchvision_files(tmp_path, monkeypatch):
    pixels = cifar10_files(tmp_path, monkeypatch)
    data = load("cifar10", tmp_path)
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), pixels) and data.classes == tuple("abcdefghij")
    assert data.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9] and len(load("cifar10", tmp_path, split="test")) == 2
    grey = load("cifar10", tmp_path, channels=1).images[:, 0]
    pillow = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in pixels])
    assert np.abs(grey.numpy().astype(int) - pillow).max() <= 1
    (tmp_path / "cifar10" / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match=r"cifar-10-batches-py is incomplete or damaged"):  # and is never unpickled
        load("cifar10", tmp_path)


def test_svhn_from_torchvision_files(tmp_path, monkeypatch):
    from scipy.io import savemat

    pixels = np.stack([picture(seed, 32, 32) for seed in range(4)], axis=3)  # [32, 32, 3, N]
    savemat(tmp_path / "train_32x32.mat", {"X": pixels, "y": np.array([[10], [1], [2], [9]], np.uint8)})
    mark = hashlib.md5((tmp_path / "train_32x32.mat").read_bytes()).hexdigest()
    monkeypatch.setattr(torchvision_sets.SVHN, "split_list", {"train": ["", "train_32x32.mat", mark]})
    data = load("svhn", tmp_path)
    assert data.labels.tolist() == [0, 1, 2, 9] and data.classes == tuple("0123456789")  # the digit 0 is stored as 10
    assert np.array_equal(data.images.permute(2, 3, 1, 0).numpy(), pixels)


# --- real images ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (Path(os.environ.get("DD_DATA") or "nowhere") / "imagenette").is_dir(),
    reason="real images: set DD_DATA to a folder that holds imagenette",
)
def test_real_imagenette_views_are_torchvisions():
    data = load("imagenette", split="test", native_short_side=4096, resident_bytes=64 * 2**30)
    assert data.classes == datasets.INFO["imagenette"].folders
    folder = datasets.files.set_folder("imagenette", Path(os.environ["DD_DATA"]))
    listing = datasets.files.list_split("imagenette", folder, "test")
    assert len(listing.items) == len(data) in (3_925, 500)
    for row in range(0, len(data), len(data) // 10):
        assert Path(listing.items[row]).parent.name == data.classes[data.labels[row]]
        with Image.open(listing.items[row]) as file:
            view = v2.CenterCrop(128)(v2.Resize(146)(file.convert("RGB")))
        expected = torch.from_numpy(np.array(view)).permute(2, 0, 1).int()
        assert (data.center(128, [row])[0].int() - expected).abs().max() <= 1
