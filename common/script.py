"""Runs one method file alone: `python methods/wmdd.py dataset=imagenette ipc=10 data=~/data`.

Data, teacher, distilled set, picture and student in one go: the block under `if __name__ == "__main__"` of every method
file that needs a teacher calls `run_with_teacher`.  Teachers are shared with the papers through the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common import cli, networks, teachers
from common.augment import rng
from common.datasets import Dataset, Stream, info, load
from common.distilled import DistilledSet, grid
from common.hardware import hardware
from common.store import Checkpoint, Product, Store, write_atomic
from common.train import Online, Recipe, accuracy, fit, resolve_device, resolve_precision

__all__ = ["Common", "run_with_teacher"]


def _arg(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


@dataclass(frozen=True)
class Common:
    """Arguments that every method shares."""

    dataset: str = _arg("digits", "data set by name, or the folder name of an ImageFolder tree under data=")
    data: str = _arg("", "folder of the data sets; empty: the environment variable DD_DATA")
    size: int = _arg(0, "side of the images; 0: native, 224 for sets of larger images", unit="px", minimum=0)
    network: str = _arg("resnet18", "teacher and student", choices=networks.names())
    teacher_epochs: int = _arg(50, "epochs of the teacher", unit="epochs", minimum=1)
    student_epochs: int = _arg(300, "epochs of the student on the distilled set", unit="epochs", minimum=1)
    seed: int = _arg(0, "seed of everything that is drawn", minimum=0)
    device: str = _arg("auto", "auto, cpu, cuda or cuda:N")
    out: str = _arg("out", "folder for the distilled set and its picture")
    store: str = _arg("runs", "folder that caches teachers and half-done work")


def run_with_teacher(
    argv: list[str],
    name: str,
    config_class: type,
    published: Mapping,
    restore: Callable[[dict], object],
    distill: Callable,
) -> None:
    """Parse, train or read the teacher, distil (resumable), save, train one student and print its accuracy.

    published: settings by (dataset, ipc or None); they fill fields that were not given.  restore: tensors -> state of
    the method.  distill: the method's function.
    """
    taken = {f.name for f in fields(Common)}
    own = [(f.name, f.type, f) for f in fields(config_class) if f.name not in taken]
    both = make_dataclass("Arguments", own, bases=(Common,), frozen=True, namespace={"__module__": __name__})
    args = cli.parse(both, argv, prog=f"python methods/{name}.py", description=f"{name.upper()}: distil one data set.")
    given = {a.split("=", 1)[0] for a in argv}
    rows = {**published.get((args.dataset, None), {}), **published.get((args.dataset, args.ipc), {})}
    args = replace(args, **{k: v for k, v in rows.items() if k not in given})
    config = config_class(**{f.name: getattr(args, f.name) for f in fields(config_class)})
    device, dtype = resolve_device(args.device), resolve_precision(args.precision)
    print(f"{name} on {hardware(device)}\n" + "  ".join(f"{k}={v}" for k, v in asdict(args).items()), flush=True)

    store = Store(Path(args.store).expanduser())
    train, test = (
        load(args.dataset, args.data or None, split=s, cache=store.root / "cache") for s in ("train", "test")
    )
    if isinstance(train, Stream):
        raise ValueError(f"{args.dataset} does not fit into memory; distil it with run_all.sh paper={name} scale=paper")
    size = args.size or min(224, native_size(args.dataset, train))
    views, test_views = train.center(size), test.center(size)
    recipe = replace(teachers.WMDD_TEACHER, epochs=args.teacher_epochs)
    entry = store.make(
        "teacher",
        teachers.settings(args.dataset, args.network, size, recipe, args.seed, args.precision),
        (train.fingerprint, test.fingerprint),
        lambda work: teachers.train(
            work, train, test_views, test.labels, network=args.network, size=size, recipe=recipe, seed=args.seed,
            precision=args.precision, device=device,
        ),
    )  # fmt: skip
    teacher = teachers.restore(entry.tensors(), args.network, len(train.classes), size).to(device)
    print(f"teacher: {entry.meta['accuracy']:.2f} % on {len(test)} test images", flush=True)

    made = store.make(
        name,
        {"config": asdict(config), "size": size, "seed": args.seed},
        (entry.key, train.fingerprint),
        lambda work: _distilled(work, config, train, views, teacher, args.seed, restore, distill),
    )
    tensors = made.tensors()
    facts = {"method": name, "dataset": args.dataset, "size": size, "config": asdict(config), "teacher": entry.key}
    result = DistilledSet(
        tensors["images"],
        tensors["labels"],
        train.classes,
        train.mean,
        train.std,
        weights=tensors.get("weights"),
        settings=facts,
    )
    target = Path(args.out).expanduser() / f"{name}_{args.dataset}_ipc{args.ipc}.safetensors"
    result.save(target)
    write_atomic(target.with_suffix(".png"), grid(result.images[: 10 * args.ipc], args.ipc if args.ipc <= 10 else 10))
    print(f"distilled set: {target}\npicture: {target.with_suffix('.png')}", flush=True)
    top1 = student_accuracy(
        result, teacher, args.network, args.student_epochs, args.seed, test_views, test, device, dtype
    )
    print(f"student: {top1:.2f} % on {len(test)} test images (last epoch, soft labels of the teacher)")


def native_size(name: str, data: Dataset) -> int:
    """Published side of a set in px, or that of its images."""
    try:
        return info(name).size or data.short_side
    except ValueError:
        return data.short_side


def _distilled(work: Path, config, train: Dataset, views: Tensor, teacher, seed: int, restore, distill) -> Product:
    checkpoint = Checkpoint(work / "state.safetensors")
    saved = checkpoint.load()
    bar = tqdm(desc="distil", unit="step", initial=saved[1]["steps"] if saved else 0, disable=None)

    def on_step(state) -> None:
        bar.update()
        if checkpoint.due(bar.n):
            checkpoint.save(state.tensors(), {"steps": bar.n})

    made = distill(
        views, train.labels, teacher, config, mean=train.mean, std=train.std, generator=rng(seed, "distill"),
        state=restore(saved[0]) if saved else None, on_step=on_step,
    )  # fmt: skip
    bar.close()
    return Product(made, {})


def student_accuracy(
    distilled: DistilledSet, teacher, network: str, epochs: int, seed: int, test_views: Tensor, test: Dataset,
    device: torch.device, dtype: torch.dtype,
) -> float:  # fmt: skip
    """Top-1 accuracy (percent) of one student trained on the set with the teacher's labels, recomputed at each step."""
    size = distilled.images.shape[-1]
    recipe = Recipe(epochs=epochs, batch=min(100, max(10, len(distilled.labels))))
    data = Dataset(
        "distilled", distilled.uint8(), distilled.labels, distilled.classes, distilled.mean, distilled.std, None, ""
    ).to(device)
    net = networks.make(network, classes=len(distilled.classes), size=size, generator=rng(seed, "student"))
    net = fit(
        net, data, recipe, size=size, seed=seed, device=device, dtype=dtype, soft=Online(teacher, dtype),
        weights=distilled.weights, description="student",
    )  # fmt: skip
    return accuracy(net, test_views, test.labels, data, device=device, dtype=dtype)
