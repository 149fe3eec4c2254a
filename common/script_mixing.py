"""Runs methods/natural_mixing.py alone: students of a distilled set, alone and mixed with real images."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from common import cli, matching
from common.augment import rng
from common.datasets import Stream, load
from common.distilled import grid
from common.hardware import hardware, recorded, resolve_device, resolve_precision
from common.protocols import PROTOCOLS
from common.resume import resumable
from common.script import WithSet, arg, read_set, say_accuracy, with_dataset
from common.store import Product, Store, digest, write_atomic

__all__ = ["run_mixing"]

TAUGHT_BY_SET = tuple(p.name for p in PROTOCOLS.values() if p.labels in ("hard", "soft"))  # the others have a teacher
RECIPE = ("epochs", "batch", "optimizer", "lr", "augment")  # options of natural mixing that a protocol has too


@dataclass(frozen=True)
class Mixing(WithSet):
    """Arguments of natural mixing, which trains on a set that is there already."""

    pool: str = arg("", "what is mixed in: the training set (empty), fractals, or another data set by name")
    students: int = arg(1, "students of each kind", minimum=1)
    cross: bool = arg(False, "all four: with and without mixing, with and without augmentation")
    protocol: str = arg("", "train by a named protocol in place of epochs, batch, optimizer, lr and augment",
                        choices=("", *TAUGHT_BY_SET))  # fmt: skip
    out: str = arg("out", "folder for a picture of mixed images")


def run_mixing(argv: list[str], method: ModuleType) -> None:
    """Train students on a set, alone and mixed with real images, resumably; print accuracies, keep a picture.

    method: the module methods/natural_mixing.py.
    """
    own = [(f.name, f.type, f) for f in fields(method.Config)]
    both = make_dataclass("Arguments", own, bases=(Mixing,), frozen=True, namespace={"__module__": __name__})
    purpose = "Natural mixing: students of a distilled set, alone and mixed with real images."
    args = with_dataset(cli.parse(both, argv, prog="python methods/natural_mixing.py", description=purpose))
    config = method.Config(**{f.name: getattr(args, f.name) for f in fields(method.Config)})
    if args.protocol:
        changed = [f"{k}={getattr(config, k)}" for k in RECIPE if getattr(config, k) != getattr(method.Config(), k)]
        if changed or args.cross:
            raise cli.UsageError(
                f"protocol={args.protocol} has its own recipe; leave out {', '.join(changed) or 'cross=true'}"
            )
    device = resolve_device(args.device)
    print(f"natural mixing on {hardware(device)}\n" + "  ".join(f"{k}={v}" for k, v in asdict(args).items()))
    store = Store(Path(args.store).expanduser())
    on, tensors = read_set(args, device, store)
    pool = method.Pool.of(*_real_to_mix(args, on, method), device, on.prepare)
    mixed = method.mixed_epoch(tensors["images"].to(device), tensors["labels"], pool, config, rng(args.seed, "picture"))
    target = Path(args.out).expanduser() / f"natural_mixing_{args.dataset}.png"
    shown = torch.linspace(0, len(mixed) - 1, min(100, len(mixed))).long()
    write_atomic(target, grid(on.pixels(mixed.cpu()[shown]), 10))
    print(f"mixed images: {target}", flush=True)
    alone = replace(config, alpha="fixed", share=0.0)
    inputs = (digest(tensors), digest({"pool": pool.images.cpu()}), on.train.fingerprint, on.test.fingerprint)
    seeds = range(args.seed, args.seed + args.students)
    if args.protocol:
        _by_protocol(args, store, inputs, on, tensors, pool, config, method, seeds)
        return
    for augment in (False, True) if args.cross else (config.augment,):
        for name, kind in (("set alone", alone), ("mixed", config)):
            kind, found = replace(kind, augment=augment), []
            for seed in seeds:
                train = partial(
                    _mixed_student, on=on, tensors=tensors, pool=pool, config=kind, method=method, seed=seed
                )
                settings = {**matching.facts(on, seed), "config": asdict(kind), "pool": args.pool}
                tested = store.make("mixing", settings, inputs, recorded(train, device))
                found.append(tested.meta["accuracy"])
            say_accuracy(name + ", augmented" * augment, found, len(on.test), "last epoch")


def _by_protocol(
    args: Mixing, store: Store, inputs: tuple[str, ...], on: matching.Task, tensors: dict[str, Tensor], pool,
    config, method: ModuleType, seeds: range,
) -> None:  # fmt: skip
    """Students by a named protocol, of the set and of what it is mixed to at each pass."""
    protocol, dtype = PROTOCOLS[args.protocol], resolve_precision(config.precision, on.device)
    images, labels = matching.tested_images(tensors).to(on.device), tensors["labels"]
    if protocol.labels == "soft" and "soft_labels" in tensors:
        labels = tensors["soft_labels"].argmax(1)

    def mix(seed: int, epoch: int) -> Tensor:
        return method.mixed_epoch(images, labels, pool, config, method.rng(seed, "mix", epoch))

    facts = {**matching.facts(on, args.seed), "protocol": protocol.settings(), "seeds": list(seeds)}
    facts |= {"precision": config.precision}
    for name, own, how in (("set alone", None, {}), ("mixed", mix, {"mix": asdict(config), "pool": args.pool})):
        train = partial(matching.students, on=on, tensors=tensors, protocol=protocol, seeds=seeds, dtype=dtype, mix=own)
        tested = store.make("mixing", facts | how, inputs, recorded(train, on.device))
        say_accuracy(name, tested.meta["accuracies"], len(on.test), f"protocol {protocol.name}, last epoch")


def _real_to_mix(args: Mixing, on: matching.Task, method: ModuleType) -> tuple[Tensor, Tensor | None]:
    """Images uint8 [N, C, H, W] and, where they are of the data set itself, their labels."""
    channels = on.train.images.shape[1]
    if not args.pool:
        return on.train.images, on.train.labels
    if args.pool == "fractals":
        return method.fractal_pool(1000, on.size, rng(args.seed, "fractals"), channels), None
    other = load(args.pool, args.data or None, channels=channels, cache=Path(args.store).expanduser() / "cache")
    if isinstance(other, Stream):
        raise ValueError(f"pool={args.pool} does not fit into memory; take a smaller one")
    return other.center(on.size), None


def _mixed_student(
    work: Path, on: matching.Task, tensors: dict[str, Tensor], pool, config, method: ModuleType, seed: int
) -> Product:
    with resumable(
        work, method.State.restore, config.passes, done=lambda state: state.epoch, name="student", unit="epoch"
    ) as (state, on_step, _):
        weights = method.train(
            tensors["images"], tensors["labels"], None, None, config, make_network=on.make_network,
            augment=on.augment if config.augment else None, soft_labels=tensors.get("soft_labels"),
            generator=rng(seed, "mixing"), device=on.device, state=state, on_step=on_step, pool=pool,
        )  # fmt: skip
    net = on.make_network(rng(0))
    net.load_state_dict(weights)
    return Product({}, {"accuracy": _top1(net.to(on.device).eval(), on)})


@torch.inference_mode()
def _top1(net: nn.Module, on: matching.Task) -> float:
    """Percent of the test images."""
    labels = on.test.labels.to(on.device)
    found = torch.cat([net(on.prepare(x)).argmax(1) for x in on.test.images.split(200)])
    return 100 * (found == labels).double().mean().item()
