"""Students of any distilled set by a named protocol, beside random real images: `python -m common.evaluate`.

    python -m common.evaluate set=FILE dataset=cifar10 protocol=hard-truths-soft data=~/data

Random real images, as many of each class and drawn anew for each student, are what a set must beat under the same
protocol. A protocol with a teacher's labels trains one of the students' kind on all training images first. Finished
parts are kept in the store; a result file says how the numbers were made.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from common import cli, matching
from common.hardware import hardware, recorded, resolve_device
from common.protocols import PROTOCOLS
from common.script import WithSet, arg, read_set, say_accuracy, with_dataset
from common.script_selection import own_teacher
from common.store import Entry, Store, digest, write_atomic
from common.views import normalise

__all__ = ["Evaluation", "run"]


@dataclass(frozen=True)
class Evaluation(WithSet):
    """Arguments of an evaluation."""

    protocol: str = arg(
        "hard-truths-hard", "how students are trained; those of Hard Truths at ImageNet scale are cells of its paper",
        choices=tuple(PROTOCOLS),
    )  # fmt: skip
    epochs: int = arg(0, "passes over the set; 0: those of the protocol", unit="epochs", minimum=0)
    students: int = arg(3, "students, each with a seed of its own", minimum=1)
    random: bool = arg(True, "also students of random real images")
    weights: bool = arg(False, "weigh the loss of each image as the set says: CRAIG's and WMDD's have weights")
    teacher_epochs: int = arg(50, "epochs of the teacher, where the protocol has one", unit="epochs", minimum=1)
    precision: str = arg("auto", "arithmetic of the teacher; auto: by the device", choices=("auto", "bf16", "fp32"))
    out: str = arg("out", "folder for the result, a JSON file")


def run(argv: list[str]) -> dict:
    """Train the students that are not in the store, print their accuracies, write the result file and return it."""
    purpose = "Students of a distilled set by a named protocol, beside students of random real images."
    args = with_dataset(cli.parse(Evaluation, argv, prog="python -m common.evaluate", description=purpose))
    device, store = resolve_device(args.device), Store(Path(args.store).expanduser())
    print(f"evaluation on {hardware(device)}\n" + "  ".join(f"{k}={v}" for k, v in asdict(args).items()), flush=True)
    protocol = PROTOCOLS[args.protocol]
    protocol = replace(protocol, epochs=args.epochs or protocol.epochs)
    on, tensors = read_set(args, device, store)
    if protocol.lr is None and "lr" not in tensors:
        raise ValueError(f"protocol={protocol.name} trains with a step size learned with the images; the set has none")
    if protocol.labels == "soft" and "soft_labels" not in tensors:
        raise ValueError(f"protocol={protocol.name} trains on soft labels of the set; the set has none")
    if args.weights and "weights" not in tensors:
        whose = f"the set {args.set}" if args.set else "a set of random real images"
        raise ValueError(f"weights=true, but {whose} has none; allowed there: weights=false")
    if "weights" in tensors and not args.weights:
        del tensors["weights"]
        print("note: the set has weights of its images, which weights=true uses", flush=True)
    counts = tensors["labels"].bincount(minlength=len(on.train.classes)).tolist()
    seeds = list(range(args.seed, args.seed + args.students))
    baseline = args.random and protocol.labels != "soft"
    if baseline:
        try:
            matching.random_subset(on, counts, args.seed)  # as many are there
        except ValueError as error:
            raise ValueError(f"{error}; random=false tests the set alone") from error
    say, inputs, taught = None, [on.train.fingerprint, on.test.fingerprint], {}
    if protocol.labels in ("kl", "online"):
        teacher, entry = own_teacher(store, on, args, device)
        say, inputs = _logits(teacher, on), [*inputs, entry.key]
        taught = {"teacher": {"key": entry.key, **entry.meta}}

    def tested(made: dict[str, Tensor], seeds: list[int]) -> Entry:
        def build(work: Path):
            once = protocol.labels == "kl"
            labels = {"soft_labels": torch.cat([say(x) for x in made["images"].split(100)])} if once else {}
            online = say if protocol.labels == "online" else None
            return matching.students(work, on, {**made, **labels}, protocol, seeds, teacher=online)

        settings = {**matching.facts(on, 0), "protocol": protocol.settings(), "seeds": seeds}
        return store.make("students", settings, (digest(made), *inputs), recorded(build, device))

    print(f"{len(tensors['labels'])} images of {len(counts)} classes, {on.size} px, {on.network}", flush=True)
    result = {"arguments": asdict(args), "protocol": asdict(protocol), "seeds": seeds, "tested_on": len(on.test)}
    result |= taught
    target = Path(args.out).expanduser() / f"evaluate_{args.dataset}_{protocol.name}_{_name(args, tensors)}.json"

    def keep(name: str, key: str, entries: list[Entry]) -> None:
        found = [accuracy for entry in entries for accuracy in entry.meta["accuracies"]]
        result.update({key: found, f"{key}_made": entries[-1].meta})
        say_accuracy(name, found, len(on.test), f"{protocol.name}, last epoch")
        write_atomic(target, (json.dumps(result, indent=1) + "\n").encode())

    if args.set:
        keep(args.set, "accuracies", [tested(tensors, seeds)])
    if baseline or not args.set:
        lr = {"lr": tensors["lr"]} if "lr" in tensors else {}
        drawn = [tested({**matching.random_subset(on, counts, seed), **lr}, [seed]) for seed in seeds]
        keep("random real images, as many", "random_real", drawn)
    elif args.random:
        print(f"random real images: not tested, protocol={protocol.name} wants soft labels that they do not have")
    print(f"result: {target}")
    return result


def _name(args: Evaluation, tensors: dict[str, Tensor]) -> str:
    """Eight letters for what decides the numbers."""
    rest = {k: v for k, v in asdict(args).items() if k not in ("set", "data", "device", "out", "store")}
    return hashlib.sha256(f"{digest(tensors)}{sorted(rest.items())}".encode()).hexdigest()[:8]


def _logits(teacher: torch.nn.Module, on: matching.Task) -> Callable[[Tensor], Tensor]:
    """The teacher on a student's input: back to pixels, and on by the teacher's own normalisation."""

    @torch.no_grad()
    def say(x: Tensor) -> Tensor:
        return teacher(normalise(on.pixels(x.to(on.device)) * 255, on.train.mean, on.train.std)).float()

    return say


if __name__ == "__main__":
    sys.exit(cli.guard(run, sys.argv[1:]))
