"""Runs methods/coresets.py and methods/cad.py alone: choose, save, train students on what was chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from common import matching, teachers
from common.augment import rng
from common.distilled import DistilledSet
from common.hardware import precision_name, recorded, resolve_precision
from common.protocols import PROTOCOLS, Protocol
from common.resume import resumable
from common.script import Common, Matching, arg, keep, parse, train_and_test
from common.selection import Scored, augment_of, scored, trial
from common.store import Checkpoint, Entry, Product, Store
from common.train import accuracy, fit

__all__ = ["own_teacher", "run_cad", "run_selection"]

CHOOSE = "choose real images of one data set"


# ---------------------------------------------------------------- coresets


def run_selection(argv: list[str], method: ModuleType) -> None:
    """Train the scoring network (resumably), choose, save, train students on what was chosen, print accuracies.

    method: the module methods/coresets.py.
    """
    given = dict(a.partition("=")[::2] for a in argv)
    dataset, name = given.get("dataset", Common.dataset), given.get("method", method.Config.method)
    network = given.get("network") or "convnet"  # empty: the ConvNet of the papers
    run = method.published(dataset, name, network) if name in method.METHODS else {"augment": "none"}
    kind = run.pop("augment")
    args, config, device = parse(argv, "coresets", Matching, method.Config, {(dataset, None): run}, CHOOSE)
    store = Store(Path(args.store).expanduser())
    on = matching.task(args.dataset, args.data or None, device=device, size=args.size, network=args.network,
                          store=store)  # fmt: skip
    method.check(config, on.train.labels)
    augment = augment_of(kind, on, method)
    protocol = PROTOCOLS[args.protocol or "hard-truths-hard"]
    _needs_classes(protocol)
    facts, inputs, bank = matching.facts(on, args.seed), (on.train.fingerprint,), method.Bank(on.train.labels.cpu())
    if config.method != "random":

        def score(work: Path) -> Product:
            bank = scored(work, Scored.of(on), method, config, augment, args.seed, config.trained)
            return Product(bank.tensors(), {})

        settings = {**facts, "augment": kind, "run": {f: getattr(config, f) for f in method.RUN_FIELDS}}
        entry = store.make("bank", settings, inputs, recorded(score, device))
        bank, inputs = method.Bank.restore(entry.tensors()), (*inputs, entry.key)
    pixels, labels = on.train.images, on.train.labels

    def choose(work: Path) -> Product:
        tried = trial(work, on, protocol, args.seed)
        found = method.select(bank, labels, config, generator=rng(args.seed, "select"), device=device, accuracy=tried)
        return Product({k: t.contiguous() for k, t in found.items()}, {})

    facts = {**facts, "config": asdict(config)}
    settings = facts | ({"protocol": protocol.settings()} if config.method == "el2n_best" else {})
    settings |= {"weighted": True} if config.method == "craig" else {}  # its students use the weights
    made = store.make("coreset", settings, inputs, recorded(choose, device))
    tensors = made.tensors()
    chosen, train = pixels[tensors["indices"].to(pixels.device)], on.train
    result = DistilledSet(chosen.cpu().float() / 255, tensors["labels"], train.classes, train.mean, train.std,
                          weights=tensors.get("weights"), settings=facts)  # fmt: skip
    keep(result, args, config.method)
    images = {"images": on.prepare(chosen).cpu().contiguous()}
    images |= {name: tensors[name] for name in ("labels", "weights") if name in tensors}
    train_and_test(store, made, on, images, protocol, args, device)


# ---------------------------------------------------------------- CAD-Prune, CA2D


@dataclass(frozen=True)
class Pruning(Matching):
    """Arguments of CAD-Prune and CA2D."""

    teacher_epochs: int = arg(50, "epochs of the teacher of method=ca2d", unit="epochs", minimum=1)


def run_cad(argv: list[str], method: ModuleType) -> None:
    """Score (resumably) and choose, or train a teacher and cut crops too; save, train students, print accuracies.

    method: the module methods/cad.py.
    """
    args, config, device = parse(argv, "cad", Pruning, method.Config, method.PUBLISHED, CHOOSE)
    store = Store(Path(args.store).expanduser())
    on = matching.task(args.dataset, args.data or None, device=device, size=args.size, network=args.network,
                          store=store)  # fmt: skip
    method.check(config, on.train.images, on.train.labels, on.make_network(rng(args.seed)))
    protocol = PROTOCOLS[args.protocol or "hard-truths-hard"]
    _needs_classes(protocol)
    teacher, inputs = None, (on.train.fingerprint,)
    if config.method == "ca2d":
        teacher, entry = own_teacher(store, on, args, device)
        inputs = (*inputs, entry.key)
    kind = method.augmentation(args.dataset)
    facts = {**matching.facts(on, args.seed), "config": asdict(config)} | ({} if kind == "dsa" else {"augment": kind})
    made = store.make(
        config.method, facts, inputs,
        recorded(lambda work: _chosen(work, on, config, method, teacher, args.seed, kind), device),
    )  # fmt: skip
    tensors = made.tensors()
    train, pixels = on.train, tensors["images"]
    result = DistilledSet(pixels, tensors["labels"], train.classes, train.mean, train.std,
                          settings={**facts, "method": config.method})  # fmt: skip
    keep(result, args, config.method)
    inputs_of_students = {"images": on.prepare(pixels * 255).cpu(), "labels": tensors["labels"]}
    if not args.protocol:  # the budget that was matched
        protocol = replace(protocol, epochs=config.student_epochs)
    elif protocol.epochs != config.student_epochs:
        print(f"protocol={protocol.name}: {protocol.epochs} epochs of a student, while the scoring run matches "
              f"student_epochs={config.student_epochs}", flush=True)  # fmt: skip
    train_and_test(store, made, on, inputs_of_students, protocol, args, device)


def _needs_classes(protocol: Protocol) -> None:
    """ValueError for a protocol that wants more of a set than images and classes."""
    if protocol.labels != "hard" or protocol.lr is None:
        raise ValueError(f"protocol={protocol.name} wants labels or a step size that a coreset does not bring")


def own_teacher(store: Store, on: matching.Task, args, device: torch.device) -> tuple[nn.Module, Entry]:
    """A network of the students' kind, trained on the whole set for args.teacher_epochs."""
    recipe = replace(teachers.WMDD_TEACHER, epochs=args.teacher_epochs)
    dtype = resolve_precision(args.precision, device)

    def build(work: Path) -> Product:
        net = fit(
            on.make_network(rng(args.seed, "teacher")), on.train, recipe, size=on.size, seed=args.seed, device=device,
            dtype=dtype, checkpoint=Checkpoint(work / "state.safetensors"), description=f"teacher {on.network}",
        )  # fmt: skip
        top1 = accuracy(net, on.test.images, on.test.labels, on.train, device=device, dtype=dtype)
        return Product({k: v.cpu() for k, v in net.state_dict().items()}, {"accuracy": top1})

    settings = teachers.settings(on.train.name, on.network, on.size, recipe, args.seed, precision_name(dtype))
    settings |= {"views": "centre", "mean": on.train.mean, "std": on.train.std}  # not those of the papers' teachers
    entry = store.make(
        "teacher", settings, (on.train.fingerprint, on.test.fingerprint), recorded(build, device),
    )  # fmt: skip
    net = on.make_network(rng(args.seed))
    net.load_state_dict(entry.tensors())
    print(f"teacher: {entry.meta['accuracy']:.2f} % on {len(on.test)} test images", flush=True)
    return net.to(device).eval().requires_grad_(False), entry


def _chosen(work: Path, on: matching.Task, config, method: ModuleType, teacher, seed: int, kind: str) -> Product:
    """What the method makes, its images on the [0, 1] scale; kind: the augmentation of the scoring run."""
    train = on.train
    *_, total = method.schedule(config, len(train.classes), len(train))
    with resumable(work, method.State.restore, total, name="score") as (state, on_step, _):
        made = method.distill(
            train.images, train.labels, config, make_network=on.make_network, teacher=teacher, prepare=on.prepare,
            augment=augment_of(kind, on, method), mean=train.mean, std=train.std, generator=rng(seed, "distill"),
            device=on.device, state=state, on_step=on_step,
        )  # fmt: skip
    if config.method == "cad":
        made["images"] = made["images"] / 255
    return Product(made, {})
