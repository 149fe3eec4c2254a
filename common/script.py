"""Runs one method file alone: `python methods/wmdd.py dataset=imagenette ipc=10 data=~/data`.

Data, teacher or expert trajectories where the method has them, distilled set, picture and students in one go: what the
block under `if __name__ == "__main__"` of every method file calls.  Finished stages are found again in the store.
"""

from __future__ import annotations

import statistics as stats
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import cli, distilled, matching, networks, teachers
from common.augment import rng
from common.datasets import Dataset, Stream, info, load
from common.datasets_table import NORMALISATION
from common.distilled import DistilledSet, class_grid
from common.hardware import bf16_is_fast, hardware, precision_name, recorded, resolve_device, resolve_precision
from common.labels import Loss, Online, kd_loss
from common.protocols import PROTOCOLS, Protocol
from common.resume import passes_done, resumable
from common.store import Checkpoint, Entry, Product, Store, write_atomic
from common.train import accuracy, fit
from common.views import Recipe, normalise

__all__ = [
    "Common", "Matching", "WithSet", "arg", "keep", "parse", "read_set", "run_matching", "run_with_teacher",
    "say_accuracy", "train_and_test", "with_dataset",
]  # fmt: skip


def arg(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


@dataclass(frozen=True)
class Common:
    """Arguments that every method shares."""

    dataset: str = arg("digits", "data set by name, or the folder name of an ImageFolder tree under data=")
    data: str = arg("", "folder of the data sets; empty: the environment variable DD_DATA")
    size: int = arg(0, "side of the images; 0: native", unit="px", minimum=0)
    seed: int = arg(0, "seed of everything that is drawn", minimum=0)
    device: str = arg("auto", "auto, cpu, cuda or cuda:N")
    out: str = arg("out", "folder for the distilled set and its picture")
    store: str = arg("runs", "folder that caches finished stages and half-done work")


@dataclass(frozen=True)
class WithTeacher(Common):
    """Arguments of the methods that read a trained teacher."""

    network: str = arg("", "teacher and student; empty: as the method prefers", choices=("", *networks.names()))
    teacher_epochs: int = arg(50, "epochs of the teacher", unit="epochs", minimum=1)
    student_epochs: int = arg(300, "epochs of the student on the distilled set", unit="epochs", minimum=1)


@dataclass(frozen=True)
class Matching(Common):
    """Arguments of the methods that match gradients, features or trajectories."""

    network: str = arg("", "network that is matched and tested; empty: the ConvNet of the papers for this size")
    students: int = arg(5, "students trained on the distilled set", minimum=1)
    protocol: str = arg("", "how students are trained; empty: the method's own", choices=("", *PROTOCOLS))


@dataclass(frozen=True)
class WithSet(Common):
    """Arguments of what trains students on a set that is there already."""

    dataset: str = arg(
        "", "data set by name, or the folder name of an ImageFolder tree under data=; empty: what the set names, "
        "digits where it names none"
    )  # fmt: skip
    set: str = arg("", "distilled set, a file or folder of any known layout; empty: random real images")
    ipc: int = arg(10, "images per class where set= is empty", unit="images", minimum=1)
    normalisation: str = arg("", "constants of a .pt file; empty: the data set's own", choices=("", *NORMALISATION))
    zca: bool = arg(False, "whiten set and real images; files of white pixels (images_zca_*): with normalisation=none")
    network: str = arg("", "the student; empty: the ConvNet of the papers for this size")


def parse(
    argv: list[str], name: str, shared: type, config_class: type, published: Mapping,
    purpose: str = "distil one data set",
):  # fmt: skip
    """(arguments, config, device) with published settings in the fields that were not given, precision resolved."""
    taken = {f.name for f in fields(shared)}
    own = []
    for f in fields(config_class):
        if f.name == "precision":
            choices = ("auto", *f.metadata["choices"])
            own.append((f.name, f.type, arg("auto", f.metadata["help"] + "; auto: by the device", choices=choices)))
        elif f.name not in taken:
            own.append((f.name, f.type, f))
    both = make_dataclass("Arguments", own, bases=(shared,), frozen=True, namespace={"__module__": __name__})
    told = f"{name.upper()}: {purpose}."
    if published:
        told += " Published settings of dataset= and ipc= replace defaults; the run prints what it takes."
    args = cli.parse(both, argv, prog=f"python methods/{name}.py", description=told)
    given = {a.split("=", 1)[0] for a in argv}
    rows = {**published.get((args.dataset, None), {}), **published.get((args.dataset, args.ipc), {})}
    args = replace(args, **{k: v for k, v in rows.items() if k not in given})
    device = resolve_device(args.device)
    if args.precision == "auto":
        choices = next(f for f in fields(config_class) if f.name == "precision").metadata["choices"]
        fast = "mixed" if "mixed" in choices else "bf16"
        args = replace(args, precision=fast if bf16_is_fast(device) else "fp32")
    config = config_class(**{f.name: getattr(args, f.name) for f in fields(config_class)})
    print(f"{name} on {hardware(device)}\n" + "  ".join(f"{k}={v}" for k, v in asdict(args).items()), flush=True)
    return args, config, device


def keep(result: DistilledSet, args, name: str) -> None:
    """Write the set and its picture, and say where."""
    target = Path(args.out).expanduser() / f"{name}_{args.dataset}_ipc{args.ipc}.safetensors"
    result.save(target)
    write_atomic(target.with_suffix(".png"), class_grid(result.images, result.labels))
    print(f"distilled set: {target}\npicture: {target.with_suffix('.png')}", flush=True)


def with_dataset(args: WithSet) -> WithSet:
    """The arguments with a data set: the given one, or that which a .safetensors file says it was distilled from."""
    if args.dataset:
        return args
    of_set = distilled.load(args.set).settings.get("dataset") if args.set.endswith(".safetensors") else None
    return replace(args, dataset=of_set or "digits")


def read_set(args: WithSet, device: torch.device, store: Store) -> tuple[matching.Task, dict[str, Tensor]]:
    """The data set, brought to the size, channels and space of the distilled one, and the latter as network input."""
    task = partial(
        matching.task, args.dataset, args.data or None, device=device, network=args.network, zca=args.zca,
        store=store,
    )  # fmt: skip
    on = task(size=args.size)
    if not args.set:
        return on, matching.random_subset(on, args.ipc, args.seed)
    constants = NORMALISATION.get(args.normalisation, (on.train.mean, on.train.std))
    channels = on.train.images.shape[1]
    own = distilled.load(args.set, mean=constants[0][:channels], std=constants[1][:channels])
    channels, height, width = own.images.shape[1:]
    if height != width or args.size not in (0, height):
        raise ValueError(f"{args.set} has images of {height} x {width} px; allowed: square ones, of size={args.size}")
    if (channels, height) != (on.train.images.shape[1], on.size):
        on = task(size=height, channels=channels)
    labels, soft_labels = _renumbered(own, on.train.classes, args)
    if own.whitening and own.whitening["fitted_on"] != on.train.fingerprint:
        raise ValueError(f"{args.set} was whitened on other images than the training set of {args.dataset} found here")
    if args.zca or own.whitening:
        on = replace(on, whitened=True)
        images = on.zca(own.images.to(device)).cpu()
    else:
        on = replace(on, train=replace(on.train, mean=own.mean, std=own.std))
        images = own.normalised()
    lr = None if own.student_lr is None else torch.tensor(own.student_lr)
    tensors = {"images": images, "labels": labels, "soft_labels": soft_labels, "weights": own.weights, "lr": lr}
    return on, {name: t.contiguous() for name, t in tensors.items() if t is not None}


def _renumbered(own: DistilledSet, classes: tuple[str, ...], args: WithSet) -> tuple[Tensor, Tensor | None]:
    """Labels and soft labels of a set in the class order of the data set; ValueError where these are other classes."""
    if len(own.classes) != len(classes):
        raise ValueError(f"{args.set} has {len(own.classes)} classes, {args.dataset} {len(classes)}")
    if set(own.classes) == set(classes):
        to = torch.tensor([classes.index(name) for name in own.classes])
        soft = None if own.soft_labels is None else own.soft_labels[:, to.argsort()]
        return to[own.labels], soft
    for k, (theirs, ours) in enumerate(zip(own.classes, classes, strict=True)):
        if theirs != ours and (theirs in classes or ours in own.classes):
            raise ValueError(f"class {k} is {theirs!r} in {args.set} and {ours!r} in {args.dataset}: other classes")
    if own.classes != tuple(map(str, range(len(classes)))):  # a layout without names
        print(f"note: classes have other names: {own.classes[0]!r} in the set, {classes[0]!r} in the data", flush=True)
    return own.labels, own.soft_labels


# ---------------------------------------------------------------- DC, DSA, DM, MTT, DATM


def run_matching(
    argv: list[str],
    name: str,
    config_class: type,
    published: Mapping,
    restore: Callable[[dict], object],
    distill: Callable,
    *,
    recipe: str,
    augmented: bool = True,
    experts: tuple[type, Callable, Callable] | None = None,
) -> None:
    """Parse, train the experts where the method has some, distil (resumable), save, train students, print accuracies.

    recipe: the method's own evaluation protocol.  augmented: whether the images are augmented while they are matched.
    experts: their config class, `train_experts`, and its tensors -> state.
    """
    args, config, device = parse(argv, name, Matching, config_class, published)
    store = Store(Path(args.store).expanduser())
    zca = bool(getattr(config, "zca", False))
    on = matching.task(args.dataset, args.data or None, device=device, size=args.size, network=args.network,
                          zca=zca, store=store)  # fmt: skip
    facts = matching.facts(on, args.seed)
    arguments, inputs = [], (on.train.fingerprint,)
    if experts is not None:
        expert_class, train_experts, restore_experts = experts
        expert_config = expert_class.of(config)
        entry = store.make(
            "experts", {**facts, "config": asdict(expert_config)}, inputs,
            recorded(
                lambda work: matching.experts(work, on, expert_config, train_experts, restore_experts, args.seed),
                device,
            ),
        )  # fmt: skip
        arguments, inputs = [list(entry.tensors().values())], (*inputs, entry.key)
    made = store.make(
        "distill", {**facts, "method": name, "config": asdict(config)}, inputs,
        recorded(
            lambda work: matching.distil(
                work, on, config, distill, restore, args.seed, *arguments, augmented=augmented
            ),
            device,
        ),
    )  # fmt: skip
    tensors = made.tensors()
    result = on.distilled(tensors, {**facts, "method": name, "config": asdict(config)})
    keep(result, args, getattr(args, "method", name))
    train_and_test(store, made, on, tensors, PROTOCOLS[args.protocol or recipe], args, device)


def train_and_test(
    store: Store, made: Entry, on: matching.Task, tensors: dict[str, Tensor], protocol: Protocol, args,
    device: torch.device,
) -> None:  # fmt: skip
    """Train students on what an entry made, as network input, and print their accuracies."""
    seeds = range(args.seed, args.seed + args.students)
    facts = {**matching.facts(on, args.seed), "protocol": protocol.settings(), "seeds": list(seeds)}
    tested = store.make(
        "students", facts, (made.key, on.test.fingerprint),
        recorded(lambda work: matching.students(work, on, tensors, protocol, seeds), device),
    )  # fmt: skip
    say_accuracy("students", tested.meta["accuracies"], len(on.test), f"protocol {protocol.name}, last epoch")


def say_accuracy(name: str, found: Sequence[float], images: int, how: str) -> None:
    """Print the mean of students' accuracies (%), their deviation, on how many test images, and how they trained."""
    spread = f" ± {stats.stdev(found):.2f}" if len(found) > 1 else ""
    students = f"{len(found)} student{'s' * (len(found) > 1)}"
    print(f"{name}: {stats.fmean(found):.2f}{spread} % on {images} test images ({students}, {how})", flush=True)


# ---------------------------------------------------------------- WMDD and the other methods with a teacher


def run_with_teacher(
    argv: list[str],
    name: str,
    config_class: type,
    published: Mapping,
    restore: Callable[[dict], object],
    distill: Callable,
    *,
    passes: Callable[[Any, int], int],
    check: Callable | None = None,
    native: bool = False,
    small: str = "resnet18",
    recipes: Mapping[str, Recipe] | None = None,
    factor: Callable[[Any, int], int] = lambda *_: 1,
    student: Callable[[str, int, str, int, int], Mapping] = lambda *_: {},
    kept: str = "",
    transfer: Callable | None = None,
    students_read: Sequence[str] = (),
) -> None:
    """Parse, train or read the teacher, distil (resumable), save, train one student and print its accuracy.

    published: settings by (dataset, ipc or None); they fill fields that were not given.  restore: tensors -> state of
    the method.  distill: the method's function; native: it cuts its own views from whole images (`size`, `sizes`).
    passes: (config, classes) -> how many batches, or classes, it makes one after the other.
    check: (config, untrained teacher, labels, size=, side=) raises for what cannot work; a trained teacher near chance
    is refused then too.  small: the network below 128 px, ResNet-18 else.  recipes: the teacher's by data set, WMDD's
    for others.  factor: (config, size) -> patches along a side of an image.  student: (dataset, classes, network,
    factor, ipc) -> the method's own fields of the recipe.  kept: what the set is called, where a file has several
    methods.  transfer: (config.labels, config, temperature, kd_loss) -> what is kept of the teacher's logits, and the
    student's loss.  students_read: fields of config that the set does not depend on.
    """
    args, config, device = parse(argv, name, WithTeacher, config_class, published)
    dtype = resolve_precision(args.precision, device)
    store = Store(Path(args.store).expanduser())
    train, test = (
        load(args.dataset, args.data or None, split=s, cache=store.root / "cache") for s in ("train", "test")
    )
    if isinstance(train, Stream):
        raise ValueError(f"{args.dataset} does not fit into memory; distil it with run_all.sh paper={name} scale=paper")
    size = args.size or min(224, native_size(args.dataset, train))
    args = replace(args, network=args.network or (small if size < 128 else "resnet18"))
    if check is not None:
        net = networks.make(args.network, classes=len(train.classes), size=size, generator=rng(args.seed, "teacher"))
        check(config, net, train.labels, size=size, side=train.short_side)
    views, test_views = train.center(size), test.center(size)
    recipe = (recipes or {}).get(args.dataset, teachers.WMDD_TEACHER)
    recipe = replace(recipe, epochs=args.teacher_epochs)
    own = student(args.dataset, len(train.classes), args.network, factor(config, size), args.ipc)
    batch = min(100, max(10, args.ipc * len(train.classes)))
    labels = config.labels if transfer else "soft"
    own |= {"labels": "hard", "cutmix": False} if labels == "hard" else {}
    taught = Recipe(**{"batch": batch, **own, "epochs": args.student_epochs})
    kept_of, loss = transfer(labels, config, taught.temperature, kd_loss) if transfer else (None, None)
    entry = store.make(
        "teacher",
        teachers.settings(args.dataset, args.network, size, recipe, args.seed, precision_name(dtype)),
        (train.fingerprint, test.fingerprint),
        recorded(
            lambda work: teachers.train(
                work, train, test_views, test.labels, network=args.network, size=size, recipe=recipe, seed=args.seed,
                precision=args.precision, device=device,
            ),
            device,
        ),
    )  # fmt: skip
    teacher = teachers.restore(entry.tensors(), args.network, len(train.classes), size).to(device)
    print(f"teacher: {entry.meta['accuracy']:.2f} % on {len(test)} test images", flush=True)

    if check is not None:
        rows = torch.linspace(0, len(train) - 1, min(200, len(train))).long()
        seen = normalise(views[rows].to(device), train.mean, train.std)
        teachers.check(teacher, seen, train.labels[rows], train.classes)
    if native:
        views, distill = train.images, partial(distill, size=size, sizes=train.sizes)
    own = {k: v for k, v in asdict(config).items() if k not in students_read}
    made = store.make(
        name,
        {"config": own, "size": size, "seed": args.seed},
        (entry.key, train.fingerprint),
        recorded(
            lambda work: _distilled(
                work, config, train, views, teacher, args.seed, restore, distill, passes(config, len(train.classes))
            ),
            device,
        ),
    )
    tensors = made.tensors()
    name = kept or name
    facts = {"method": name, "dataset": args.dataset, "size": size, "config": asdict(config), "teacher": entry.key}
    result = DistilledSet(
        tensors["images"], tensors["labels"], train.classes, train.mean, train.std, weights=tensors.get("weights"),
        settings=facts,
    )  # fmt: skip
    keep(result, args, name)
    facts = {"network": args.network, "recipe": asdict(taught), "seed": args.seed, "precision": precision_name(dtype)}
    if loss:
        facts |= {k: v for k, v in asdict(config).items() if k in students_read}
    by = {"soft": Online(teacher, dtype, kept_of) if labels != "hard" else None, "loss": loss}
    tested = store.make(
        "student",
        facts,
        (made.key, entry.key, test.fingerprint),
        recorded(lambda work: _student(work, result, args, taught, test_views, test, device, dtype, **by), device),
    )
    top1 = tested.meta["accuracy"]
    said = "labels of the classes" if labels == "hard" else f"{labels} labels of the teacher"
    print(f"student: {top1:.2f} % on {len(test)} test images (last epoch, {said})")


def native_size(name: str, data: Dataset) -> int:
    """Published side of a set in px, or that of its images."""
    try:
        return info(name).size or data.short_side
    except ValueError:
        return data.short_side


def _distilled(
    work: Path, config, train: Dataset, views: Tensor, teacher, seed: int, restore, distill, passes: int
) -> Product:
    each = getattr(config, "iterations", 1)
    with resumable(work, restore, passes * each, done=passes_done(each)) as (state, on_step, _):
        made = distill(
            views, train.labels, teacher, config, mean=train.mean, std=train.std, generator=rng(seed, "distill"),
            state=state, on_step=on_step,
        )  # fmt: skip
    return Product(made, {})


def _student(
    work: Path, distilled: DistilledSet, args, recipe: Recipe, test_views: Tensor, test: Dataset,
    device: torch.device, dtype: torch.dtype, *, soft: Online | None, loss: Loss | None,
) -> Product:  # fmt: skip
    """One student, resumable, trained on the set: with the teacher's labels, asked at each step, or its classes."""
    size = distilled.images.shape[-1]
    data = Dataset(
        "distilled", distilled.uint8(), distilled.labels, distilled.classes, distilled.mean, distilled.std, None, ""
    ).to(device)
    net = networks.make(args.network, classes=len(distilled.classes), size=size, generator=rng(args.seed, "student"))
    net = fit(
        net, data, recipe, size=size, seed=args.seed, device=device, dtype=dtype, soft=soft, loss=loss,
        weights=distilled.weights if soft else None, checkpoint=Checkpoint(work / "state.safetensors"),
        description="student",
    )  # fmt: skip
    return Product({}, {"accuracy": accuracy(net, test_views, test.labels, data, device=device, dtype=dtype)})
