"""Runs methods/natural_mixing.py alone: students of a distilled set, alone and mixed with real images."""

from __future__ import annotations

import statistics as stats
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
from common.hardware import hardware, recorded, resolve_device
from common.resume import resumable
from common.script import WithSet, arg, read_set
from common.store import Product, Store, digest, write_atomic

__all__ = ["run_mixing"]


@dataclass(frozen=True)
class Mixing(WithSet):
    """Arguments of natural mixing, which trains on a set that is there already."""

    pool: str = arg("", "what is mixed in: the training set (empty), fractals, or another data set by name")
    students: int = arg(1, "students of each kind", minimum=1)
    cross: bool = arg(False, "all four: with and without mixing, with and without augmentation")
    out: str = arg("out", "folder for a picture of mixed images")


def run_mixing(argv: list[str], method: ModuleType) -> None:
    """Train students on a set, alone and mixed with real images, resumably; print accuracies, keep a picture.

    method: the module methods/natural_mixing.py.
    """
    own = [(f.name, f.type, f) for f in fields(method.Config)]
    both = make_dataclass("Arguments", own, bases=(Mixing,), frozen=True, namespace={"__module__": __name__})
    purpose = "Natural mixing: students of a distilled set, alone and mixed with real images."
    args = cli.parse(both, argv, prog="python methods/natural_mixing.py", description=purpose)
    config = method.Config(**{f.name: getattr(args, f.name) for f in fields(method.Config)})
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
    for augment in (False, True) if args.cross else (config.augment,):
        for name, kind in (("set alone", alone), ("mixed", config)):
            kind, found = replace(kind, augment=augment), []
            for seed in range(args.seed, args.seed + args.students):
                train = partial(
                    _mixed_student, on=on, tensors=tensors, pool=pool, config=kind, method=method, seed=seed
                )
                settings = {**matching.facts(on, seed), "config": asdict(kind), "pool": args.pool}
                tested = store.make("mixing", settings, inputs, recorded(train, device))
                found.append(tested.meta["accuracy"])
            spread = f" ± {stats.stdev(found):.2f}" if len(found) > 1 else ""
            print(
                f"{name + ', augmented' * augment}: {stats.fmean(found):.2f}{spread} % on {len(on.test)} test images "
                f"({len(found)} students, last epoch)",
                flush=True,
            )


def _real_to_mix(args: Mixing, on: matching.Setting, method: ModuleType) -> tuple[Tensor, Tensor | None]:
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
    work: Path, on: matching.Setting, tensors: dict[str, Tensor], pool, config, method: ModuleType, seed: int
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
def _top1(net: nn.Module, on: matching.Setting) -> float:
    """Percent of the test images."""
    labels = on.test.labels.to(on.device)
    found = torch.cat([net(on.prepare(x)).argmax(1) for x in on.test.images.split(200)])
    return 100 * (found == labels).double().mean().item()
