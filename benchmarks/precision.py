"""Does bf16 change results?  Accuracy of whole pipelines in fp32 and bf16 on real images, three seeds each.

    python benchmarks/precision.py dataset=imagenette size=64 data=~/data

Three questions, each answered by accuracies on the test split (percent, one per seed), not by losses:
teacher   a ResNet-18 trained in fp32 and in bf16, the same seeds and views
recover   students of images recovered in fp32 and in bf16 (same teacher, atoms, noise and views per seed)
student   students trained in fp32 and in bf16 on the same images
Writes benchmarks/results/precision.json, the file behind `precision=auto`, and precision.md beside it.
"""

from __future__ import annotations

import json
import math
import statistics as stats
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli, networks, teachers
from common.augment import rng
from common.datasets import Dataset, load
from common.distilled_set import to_uint8
from common.hardware import made, resolve_device, resolve_precision
from common.labels import Online
from common.store import write_atomic
from common.train import accuracy, fit
from common.views import Recipe, normalise
from methods import wmdd

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Options:
    dataset: str = field(default="imagenette", metadata={"help": "real data set"})
    data: str = field(default="", metadata={"help": "folder of the data sets; empty: DD_DATA"})
    size: int = field(default=64, metadata={"help": "side of the images", "unit": "px"})
    teacher_epochs: int = field(default=3, metadata={"help": "epochs of each teacher"})
    iterations: int = field(default=100, metadata={"help": "recover iterations"})
    student_epochs: int = field(default=60, metadata={"help": "epochs of each student"})
    ipc: int = field(default=10, metadata={"help": "images per class"})
    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"help": "seeds"})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
    out: str = field(default="benchmarks/results/precision.json", metadata={"help": "result file"})


class Study:
    """One data set, centre views and device; each method returns an accuracy in percent."""

    def __init__(self, options: Options):
        self.options, self.device = options, resolve_device(options.device)
        self.train, self.test = (load(options.dataset, options.data or None, split=s) for s in ("train", "test"))
        self.views, self.test_views = self.train.center(options.size), self.test.center(options.size)
        self.recipe = replace(teachers.WMDD_TEACHER, epochs=options.teacher_epochs)

    def score(self, net, precision: str) -> float:
        dtype = resolve_precision(precision, self.device)
        return accuracy(net, self.test_views, self.test.labels, self.train, device=self.device, dtype=dtype)

    def network(self, seed: int, name: str):
        return networks.make(
            "resnet18", classes=len(self.train.classes), size=self.options.size, generator=rng(seed, name)
        )

    def teacher(self, seed: int, precision: str):
        net = self.network(seed, "teacher")
        return fit(
            net, self.train, self.recipe, size=self.options.size, seed=seed, device=self.device,
            dtype=resolve_precision(precision, self.device), description=f"teacher {precision} {seed}",
        )  # fmt: skip

    def images(self, teacher, real: wmdd.Statistics, seed: int, precision: str) -> Dataset:
        config = wmdd.Config(ipc=self.options.ipc, iterations=self.options.iterations, precision=precision)
        generator = rng(seed, "recover")
        atoms, weights = wmdd.barycenters(real, config, generator)
        pixels = wmdd.recover(
            teacher, real, atoms, weights, config, size=self.options.size, mean=self.train.mean, std=self.train.std,
            generator=generator,
        )  # fmt: skip
        labels = torch.arange(len(self.train.classes)).repeat_interleave(config.ipc)
        return replace(self.train, images=to_uint8(pixels), labels=labels, sizes=None)

    def student(self, teacher, images: Dataset, seed: int, precision: str) -> float:
        dtype = resolve_precision(precision, self.device)
        net = fit(
            self.network(seed, "student"), images.to(self.device), Recipe(epochs=self.options.student_epochs),
            size=self.options.size, seed=seed, device=self.device, dtype=dtype, soft=Online(teacher, dtype),
            description=f"student {precision} {seed}",
        )  # fmt: skip
        return self.score(net, precision)

    def class_batches(self, k: int) -> Iterator[torch.Tensor]:
        for rows in self.train.class_indices(k).split(100):
            yield normalise(self.views[rows].to(self.device), self.train.mean, self.train.std)


def compare(study: Study) -> dict[str, dict[str, list[float]]]:
    """Accuracies by question and precision, one per seed."""
    out = {question: {p: [] for p in PRECISIONS} for question in ("teacher", "recover", "student")}
    nets = {}
    for seed in study.options.seeds:
        for precision in PRECISIONS:
            nets[precision, seed] = study.teacher(seed, precision)
            out["teacher"][precision].append(study.score(nets[precision, seed], precision))
            print("teacher", precision, seed, out["teacher"][precision][-1], flush=True)
    teacher = nets["fp32", study.options.seeds[0]]
    real = wmdd.statistics(teacher, study.class_batches, range(len(study.train.classes)))
    for seed in study.options.seeds:
        sets = {p: study.images(teacher, real, seed, p) for p in PRECISIONS}
        both = study.student(teacher, sets["fp32"], seed, "fp32")
        out["recover"]["fp32"].append(both)
        out["student"]["fp32"].append(both)
        out["recover"]["bf16"].append(study.student(teacher, sets["bf16"], seed, "fp32"))
        out["student"]["bf16"].append(study.student(teacher, sets["fp32"], seed, "bf16"))
        print("recover, student", seed, {q: {p: v[-1] for p, v in out[q].items()} for q in ("recover", "student")})
    return out


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, prog="python benchmarks/precision.py", description="Accuracy in fp32 and bf16.")
    study = Study(options)
    found = compare(study)
    rows = {}
    for question, values in found.items():
        difference = [b - a for a, b in zip(values["fp32"], values["bf16"], strict=True)]
        spread = stats.stdev(difference) if len(difference) > 1 else 0.0
        rows[question] = {**values, "difference_mean": stats.fmean(difference), "difference_std": spread}
        print(
            f"{question}: bf16 - fp32 = {stats.fmean(difference):+.2f} ± {spread:.2f} points, {len(difference)} seeds"
        )
    chosen = {k: v for k, v in asdict(options).items() if k not in ("data", "out")}
    facts = {"options": chosen, "run_on": study.train.note, **made(study.device)}
    result = {"accuracy": rows, **facts}
    write_atomic(options.out, (json.dumps(result, indent=1) + "\n").encode())
    write_atomic(Path(options.out).with_suffix(".md"), page(result).encode())


def page(result: dict) -> str:
    """The study as Markdown."""
    chosen = "  ".join(f"{name}={value}" for name, value in result["options"].items())
    heads = ("what runs in", "fp32", "bf16", "bf16 - fp32", "two standard errors", "a loss")
    names = {
        "teacher": "the teacher's training", "recover": "the recovery of images", "student": "the students' training",
    }  # fmt: skip
    lines = []
    for question, row in result["accuracy"].items():
        each = (", ".join(f"{value:.1f}" for value in row[precision]) for precision in PRECISIONS)
        difference = f"{row['difference_mean']:+.1f} ± {row['difference_std']:.1f}"
        seen = 2 * row["difference_std"] / math.sqrt(len(row["fp32"]))
        loss = "yes" if row["difference_mean"] < -seen else "not seen"
        lines.append(f"| {names[question]} | " + " | ".join((*each, difference, f"{seen:.1f}", loss)) + " |")
    table = "\n".join(["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *lines])
    return f"""\
# Does bf16 change results?

Written by `python benchmarks/precision.py`. WMDD on {result["options"]["dataset"]} ({result["run_on"]}): test accuracy
in percent, one a seed, where one part runs in fp32 or in bf16 and the rest is the same; the mean difference ± standard
deviation over seeds. A loss of less than two standard errors of that mean cannot be seen with so few seeds.

{table}

{result["hardware"]}, commit {result["commit"]}; {chosen}
"""


if __name__ == "__main__":
    sys.exit(cli.guard(main, sys.argv[1:]))
