"""Distilled sets in the layouts of the official repositories: read what they publish, write what they read.

| layout | made by | images | labels |
|---|---|---|---|
| `res_*.pt`: {"data": [[images, labels], ...], "accs_all_exps"} | DC, DSA, DM | normalised | int64 |
| `images_*.pt`, `labels_*.pt`, `lr_*.pt` | MTT, DATM | normalised, or ZCA-whitened | int64, or logits [M, K] |
| `new000/class000_id000.jpg`, `sample_weights.txt` | SRe2L, WMDD | pixels | the folder |
| `00000/class00000_id00000.jpg` | RDED | pixels | the folder |
| `epoch_0/batch_0.tar`: one list a batch | SRe2L, CDA, WMDD | none: crops, flips and mixes of stored images | logits |

A `.pt` file is a pickle and may run code when it is read; these readers accept tensors, plain containers and NumPy
numbers (the official files hold accuracies as such), and refuse a file with anything else.
"""

import io
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.datasets_table import IMAGENET_MEAN, IMAGENET_STD
from common.distilled_set import DistilledSet
from common.store import replacing, write_atomic

SUFFIXES = (".png", ".jpg", ".jpeg")
WEIGHTS, CLASSES, SPACE = "sample_weights.txt", "classes.txt", "normalisation.json"
MOST_CLASSES = 1_000_000  # a larger class number is a mistake: ImageNet-21k has 21,843


@dataclass(frozen=True, eq=False)
class FKDRecord:
    """One batch of a relabelled epoch, in the order of the sampler that made it (B images, K classes).

    boxes: float32 [B, 4], top/H, left/W, height/H, width/W of the crop of each stored image. flips: bool [B].
    mix_index: int64 [B], the partner of each image; mix_share: the part of the image itself (Mixup);
    mix_box: (a, b, c, d): rows a..c and columns b..d, in px, come from the partner (CutMix). None where not mixed.
    logits: floating point [B, K], the teacher's on the mixed batch. weights: [B], WMDD only.
    """

    boxes: Tensor
    flips: Tensor
    mix_index: Tensor | None
    mix_share: float | None
    mix_box: tuple[int, int, int, int] | None
    logits: Tensor
    weights: Tensor | None = None


def load_dc_pt(path: str | Path, mean: Sequence[float], std: Sequence[float], *, classes: Sequence[str] | None = None,
               experiment: int = 0) -> DistilledSet:
    """Set number `experiment` of a DC, DSA or DM file, its images taken back to pixels by `mean` and `std`.

    The file does not say by which constants its images were normalised, nor the names of its classes. Its accuracies
    go to `settings`. ValueError for another content, FileNotFoundError for no file.
    """
    content = _load_pt(path)
    pairs = content.get("data") if isinstance(content, dict) else None
    if not isinstance(pairs, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"{path} is not in the DC layout: it needs 'data', a list of [images, labels]")
    if not 0 <= experiment < len(pairs):
        raise ValueError(f"experiment={experiment}: {path} holds {len(pairs)}, numbered from 0")
    try:
        accuracies = {name: list(map(float, values)) for name, values in content.get("accs_all_exps", {}).items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{path}: 'accs_all_exps' must hold a list of numbers for each network") from None
    settings = {"layout": "dc", "experiment": experiment, "experiments": len(pairs), "accuracies": accuracies}
    return _from_normalised(path, *pairs[experiment], mean, std, classes, settings)


def load_mtt_pt(path: str | Path, mean: Sequence[float], std: Sequence[float], *,
                classes: Sequence[str] | None = None) -> DistilledSet:
    """An MTT or DATM set: a folder with `images_best.pt` and `labels_best.pt`, or one `images_<which>.pt` file.

    Labels [M, K] are DATM's logits (hard labels are their largest); `lr_<which>.pt` gives the student's learning rate.
    Sets distilled under ZCA are whitened in `images_<which>.pt`, for which no mean and std lead back to pixels;
    `images_zca_<which>.pt` holds the same images as pixels (mean 0, std 1).
    """
    path = Path(path)
    images = path / "images_best.pt" if path.is_dir() else path
    match = re.fullmatch(r"images_(?:zca_)?(\w+)\.pt", images.name)
    if not match:
        raise ValueError(f"{path} is not in the MTT layout: a folder with images_best.pt, or a file images_<which>.pt")
    labels, rate = (images.with_name(f"{name}_{match[1]}.pt") for name in ("labels", "lr"))
    settings = {"layout": "mtt", "file": images.name}
    student_lr = _number(rate) if rate.exists() else None
    return _from_normalised(path, _load_pt(images), _load_pt(labels), mean, std, classes, settings, student_lr)


def load_image_folder(path: str | Path, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, *,
                      classes: Sequence[str] | None = None) -> DistilledSet:
    """A tree `<class>/<image>` of PNG or JPEG files of one size, as SRe2L, WMDD and RDED write it.

    Folders named by a number (`new007`, `00007`) hold that class; others are classes in the order of their names.
    Names come from `classes`, `classes.txt` or the folders; weights from `sample_weights.txt` (a line for each class);
    mean, std and whitening, where not given, from `normalisation.json`, which `write_image_folder` leaves, else those
    of ImageNet, as the released code of these methods has them.
    """
    path = Path(path)
    space = _space(path / SPACE) if mean is None or std is None else {"mean": mean, "std": std}
    folders = sorted((item for item in path.iterdir() if item.is_dir()), key=_natural)
    files = {folder: sorted((f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES), key=_natural)
             for folder in folders}
    if not any(files.values()):
        raise ValueError(f"{path} has no images in class folders (<class>/<image>.png or .jpg)")
    numbers = [re.fullmatch(r"(?:new)?(\d+)", folder.name) for folder in folders]
    order = [int(number[1]) for number in numbers] if all(numbers) else list(range(len(folders)))
    if classes is None and (path / CLASSES).exists():
        classes = _lines(path / CLASSES).split("\n")[:-1]
    if classes is None and not all(numbers):
        classes = [folder.name for folder in folders]
    pixels = [_pixels(file) for folder in folders for file in files[folder]]
    shapes = {tuple(image.shape) for image in pixels}
    if len(shapes) > 1:
        raise ValueError(f"{path} holds images of different shapes (C, H, W): {sorted(shapes)}; a set has one")
    names = _names(path, classes, 1 + max(k for k, folder in zip(order, folders, strict=True) if files[folder]))
    labels = torch.tensor([order[k] for k, folder in enumerate(folders) for _ in files[folder]])
    weights = None
    if (path / WEIGHTS).exists():
        rows = _weights(path / WEIGHTS)
        counts = [len(files[folder]) for folder in folders]
        if [len(rows[k]) if k < len(rows) else 0 for k in order] != counts:
            raise ValueError(f"{path / WEIGHTS} must have a line for each class with a weight for each of its images")
        weights = torch.tensor([weight for k in order for weight in rows[k]], dtype=torch.float64)
    known = space or {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    settings = {"layout": "images"} | ({} if space else {"normalisation": "of ImageNet: the folder does not say"})
    return DistilledSet(torch.stack(pixels).float() / 255, labels, names, tuple(known["mean"]), tuple(known["std"]),
                        weights=weights, whitening=known.get("whitening"), settings=settings)


def load_fkd(path: str | Path, epoch: int) -> list[FKDRecord]:
    """The records of one epoch of soft labels, `<path>/epoch_<epoch>/batch_<n>.tar`, in the order of the batches.

    FileNotFoundError when the epoch is not there or a batch is missing in between; ValueError for another content.
    """
    folder = Path(path) / f"epoch_{epoch}"
    files = sorted(folder.glob("batch_*.tar"), key=_natural)
    for number, file in enumerate(files or [folder / "batch_0.tar"]):
        if not files or file.name != f"batch_{number}.tar":
            raise FileNotFoundError(f"soft labels: {folder / f'batch_{number}.tar'} is missing")
    return [_fkd_record(file) for file in files]


def write_image_folder(distilled: DistilledSet, path: str | Path) -> None:
    """Writes `<class number>/class<k>_id<j>.png`, `classes.txt`, `normalisation.json` and any `sample_weights.txt`.

    Pixels as `DistilledSet.uint8`; class folders are numbered, so that every ImageFolder reader keeps the order. Soft
    labels and the learning rate have no place in this layout. FileExistsError when `path` is there and not empty.
    """
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(f"{path} is there and not empty; images are written to a new folder only")
    if broken := [name for name in distilled.classes if len(name.splitlines()) > 1 or name.endswith("\n")]:
        raise ValueError(f"the class name {broken[0]!r} has more than one line, which {CLASSES} cannot hold")
    pixels, counts = distilled.uint8(), [0] * len(distilled.classes)
    rows: list[list[str]] = [[] for _ in distilled.classes]
    with replacing(path) as folder:
        folder.mkdir()
        for position, label in enumerate(distilled.labels.tolist()):
            file = folder / f"{label:05d}" / f"class{label:05d}_id{counts[label]:05d}.png"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(png(pixels[position]))
            counts[label] += 1
            if distilled.weights is not None:
                rows[label].append(repr(float(distilled.weights[position])))
        space = {name: getattr(distilled, name) for name in ("mean", "std", "whitening")}
        (folder / SPACE).write_text(json.dumps(space) + "\n")
        (folder / CLASSES).write_text("".join(f"{name}\n" for name in distilled.classes), encoding="utf-8")
        if distilled.weights is not None:
            (folder / WEIGHTS).write_text("".join(" ".join(row) + "\n" for row in rows))


def write_dc_pt(distilled: DistilledSet, path: str | Path) -> None:
    """Writes the set as the one experiment of a DC file: images normalised by its mean and std, hard labels only."""
    data = [[distilled.normalised().cpu().contiguous(), distilled.labels.cpu().contiguous()]]
    buffer = io.BytesIO()
    torch.save({"data": data, "accs_all_exps": {}}, buffer)
    write_atomic(path, buffer.getvalue())


def write_mtt_pt(distilled: DistilledSet, folder: str | Path, whiten: Callable[[Tensor], Tensor] | None = None) -> None:
    """Writes `images_best.pt`, `labels_best.pt` (class numbers, or logits [M, K]) and, if learned, `lr_best.pt`.

    Images as networks are fed them: normalised, or, for a set distilled under ZCA, whitened by `whiten` (the
    `common.augment.ZCA` of its training images), with `images_zca_best.pt` for the pixels as MTT has it. ValueError
    for such a set without `whiten`.
    """
    if distilled.whitening is not None and whiten is None:
        raise ValueError("the set was distilled under ZCA: the MTT layout needs whiten=ZCA.fit(training images)")
    labels = distilled.labels if distilled.soft_labels is None else distilled.soft_labels
    inputs = distilled.normalised() if whiten is None else whiten(distilled.images)
    tensors = {"images_best": inputs, "labels_best": labels}
    if whiten is not None:
        tensors["images_zca_best"] = distilled.images
    if distilled.student_lr is not None:
        tensors["lr_best"] = torch.tensor(distilled.student_lr)
    for name in ("images_best", "labels_best", "images_zca_best", "lr_best"):
        if name not in tensors:  # of a set that was there before
            Path(folder, f"{name}.pt").unlink(missing_ok=True)
            continue
        buffer = io.BytesIO()
        torch.save(tensors[name].detach().cpu().clone(), buffer)
        write_atomic(Path(folder) / f"{name}.pt", buffer.getvalue())


def png(image: Tensor) -> bytes:
    """uint8 [C, H, W] with 1 or 3 channels as the bytes of a PNG file."""
    if image.shape[0] not in (1, 3):
        raise ValueError(f"a PNG holds images of 1 or 3 channels, not {image.shape[0]}")
    array = image.cpu().permute(1, 2, 0).contiguous().numpy()  # [H, W, C]
    buffer = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(buffer, format="PNG")
    return buffer.getvalue()


def _load_pt(path: str | Path) -> object:
    """The content of a .pt file that holds tensors, plain containers and NumPy numbers; ValueError for any other."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([np.dtype, *kinds, *names]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecated storages in old files
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {found[1]}" if found else "it is not a plain pickle"
        raise ValueError(f"{path} is refused: {what}, and only tensors and plain containers are read") from None
    except Exception as error:  # a broken file can fail in any way
        raise ValueError(
            f"{path} is not a readable .pt file ({type(error).__name__}): cut short or damaged; copy it again"
        ) from None


def _from_normalised(path: str | Path, images: object, labels: object, mean: Sequence[float], std: Sequence[float],
                     classes: Sequence[str] | None, settings: dict, student_lr: float | None = None) -> DistilledSet:
    images, labels = _tensor(path, images), _tensor(path, labels)
    for name, tensor in (("images", images), ("labels", labels)):
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized or tensor.numel() == 0:
            kind = f"{str(tensor.layout)[6:]} {str(tensor.dtype)[6:]} {list(tensor.shape)}"
            raise ValueError(f"{path}: {name} must be a dense tensor of real numbers, not empty, not {kind}")
    images = images.float()
    if images.ndim != 4 or images.shape[1] != len(mean) or len(mean) != len(std):
        raise ValueError(f"{path}: images {list(images.shape)} do not go with mean {mean} and std {std}")
    if labels.ndim == 2:  # DATM learns logits
        soft_labels, labels = labels.float(), labels.argmax(1)
    else:
        soft_labels = None
        if not torch.equal(labels, labels.long().to(labels.dtype)):
            raise ValueError(f"{path}: labels must be class numbers or logits [M, K]")
    constants = [torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1) for values in (mean, std)]
    count = soft_labels.shape[1] if soft_labels is not None else int(labels.max()) + 1
    return DistilledSet(images * constants[1] + constants[0], labels.long(), _names(path, classes, count), tuple(mean),
                        tuple(std), soft_labels=soft_labels, student_lr=student_lr, settings=settings)


def _fkd_record(path: Path) -> FKDRecord:
    content = _load_pt(path)
    if not isinstance(content, (list, tuple)) or len(content) not in (6, 7):
        raise ValueError(f"{path} is not a soft-label record: it needs a list of 6 or (with weights) 7 parts")
    boxes, flips, index, share, box, logits, *weights = content
    boxes, flips, logits = (_tensor(path, part) for part in (boxes, flips, logits))
    index = None if index is None else _tensor(path, index)
    weights = _tensor(path, weights[0]) if weights else None
    count = len(boxes) if boxes.ndim else 0
    shapes_fit = boxes.shape == (count, 4) and logits.ndim == 2 and len(logits) == count and all(
        part is None or part.shape == (count,) for part in (flips, index, weights))
    if not shapes_fit:
        raise ValueError(f"{path} is not a soft-label record: its parts disagree on the number of images")
    try:
        share = None if share is None else float(share)
        if box is not None:
            top, left, bottom, right = box
            box = (int(top), int(left), int(bottom), int(right))
    except (TypeError, ValueError):
        raise ValueError(f"{path} is not a soft-label record: its mix is not a number and a box") from None
    return FKDRecord(boxes.float(), flips.bool(), None if index is None else index.long(), share, box, logits, weights)


def _tensor(path: str | Path, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{path} holds a {type(value).__name__} where a tensor is needed")
    return value.detach()


def _names(path: str | Path, classes: Sequence[str] | None, count: int) -> tuple[str, ...]:
    """The names of the classes, or their numbers where there are none."""
    if count > MOST_CLASSES:
        raise ValueError(f"{path} numbers its classes up to {count - 1}; at most {MOST_CLASSES} are read")
    return tuple(classes) if classes is not None else tuple(str(k) for k in range(count))


def _number(path: Path) -> float:
    """The one number in a .pt file."""
    value = _tensor(path, _load_pt(path))
    if value.numel() != 1 or value.is_complex():
        raise ValueError(f"{path} must hold one number, not {str(value.dtype)[6:]} {list(value.shape)}")
    return float(value)


def _lines(path: Path) -> str:
    """The content of a text file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None


def _space(path: Path) -> dict:
    """mean, std and whitening of a folder of images, or nothing where its file is not there."""
    if not path.exists():
        return {}
    try:
        found = json.loads(_lines(path))
        return {"mean": tuple(map(float, found["mean"])), "std": tuple(map(float, found["std"])),
                "whitening": found.get("whitening")}
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} must hold mean and std, a list of numbers each: {error}") from None


def _weights(path: Path) -> list[list[float]]:
    """A line of numbers for each class."""
    try:
        return [list(map(float, line.split())) for line in _lines(path).splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} must hold numbers alone: {error}") from None


def _pixels(path: Path) -> Tensor:
    """uint8 [C, H, W]: one channel for grey files, else three."""
    try:
        with Image.open(path) as image:
            array = np.array(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def _natural(path: Path) -> list[tuple[float, str]]:
    """Sorts by the numbers inside a name as numbers: new999 before new1000."""
    return [(int(part) if part.isdecimal() else math.inf, part) for part in re.split(r"(\d+)", path.name)]
