"""Speed and memory of each method against its plain form, measured in turn in one run.

    python benchmarks/speed.py                                  # everything, about ten minutes on two cores
    python benchmarks/speed.py only=recover64 repeats=5

Every form runs in a process of its own (honest memory peaks, its own allocator settings).  The driver asks them in
turn for one iteration at a time and takes medians: a noisy machine then hits all alike.  The plain form is
benchmarks/plain_wmdd.py: the formulas as the released code builds them.  Results: benchmarks/results/<name>.json and
the table benchmarks/results/README.md.
"""

from __future__ import annotations

import json
import os
import statistics as stats
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import ot
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import plain_wmdd
from common import cli, networks
from common.augment import rng
from common.hardware import commit, hardware, peak_memory, versions
from common.store import Store, write_atomic
from common.train import resolve_device
from methods import wmdd
from papers.stages import forward_flops

ROOT = Path(__file__).resolve().parent.parent
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CASES = {  # name -> network, side in px, images per class of 10 classes
    "recover64": ("resnet18-mod", 64, 10),
    "recover224": ("resnet18", 224, 1),
}
FORMS = {  # name -> plain or ours, tuned allocator, settings of ours
    "plain": ("plain", False, {}),
    "plain, tuned allocator": ("plain", True, {}),
    "ours, fp32": ("ours", True, {"precision": "fp32"}),
    "ours, bf16": ("ours", True, {"precision": "bf16"}),
    "ours, bf16, compiled": ("ours", True, {"precision": "bf16", "compile": True}),
}
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}  # keep freed memory, as run_all.sh does


@dataclass(frozen=True)
class Options:
    only: tuple[str, ...] = field(default=(*CASES, "barycenter"), metadata={"help": "what to measure"})
    repeats: int = field(default=7, metadata={"help": "timed iterations of each form", "minimum": 1})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
    features: str = field(default="", metadata={"help": "a `statistics` entry of a store; empty: made-up clusters"})
    out: str = field(default="benchmarks/results", metadata={"help": "folder of the results"})
    worker: str = field(default="", metadata={"help": "used by the driver itself: case/form"})


# ---------------------------------------------------------------- one form, in its own process


class Stop(Exception):
    """Ends a recover loop that would go on for ever."""


def serve(case: str, form: str, device: torch.device) -> None:
    """Answer each line of standard input with the seconds of one iteration, and its end with the memory peak."""
    begun = [0.0]

    def answer(*_) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        print(time.perf_counter() - begun[0], flush=True)
        if not sys.stdin.readline():
            raise Stop
        begun[0] = time.perf_counter()

    network, size, ipc = CASES[case]
    kind, _, settings = FORMS[form]
    config = wmdd.Config(ipc=ipc, iterations=100_000, **settings)
    teacher = networks.make(network, classes=10, size=size, generator=rng(0)).eval().requires_grad_(False).to(device)
    channels, g = sum(bn.num_features for bn in wmdd.batch_norms(teacher)), rng("statistics")
    mean, var = torch.randn(10, channels, generator=g) / 4, torch.rand(10, channels, generator=g)
    features = torch.randn(200, 512, generator=g).abs()
    real = wmdd.Statistics(features, torch.arange(10).repeat_interleave(20), mean, var)
    atoms, weights = wmdd.barycenters(real, config, g)
    with peak_memory(device) as peak:
        try:
            if kind == "plain":
                run_plain(teacher, real, atoms, config, size, device, answer)
            else:
                wmdd.recover(
                    teacher, real, atoms, weights, config, size=size, mean=MEAN, std=STD, generator=g, on_step=answer
                )
        except Stop:
            pass
    print(peak[0], flush=True)


def run_plain(teacher, real, atoms, config, size: int, device, answer) -> None:
    widths = [bn.num_features for bn in wmdd.batch_norms(teacher)]
    low, high = (torch.tensor([(e - m) / s for m, s in zip(MEAN, STD, strict=True)]).view(-1, 1, 1) for e in (0, 1))
    means, variances = ([list(t.to(device).split(widths, 1))] for t in (real.mean, real.var))
    labels = torch.arange(10).repeat_interleave(config.ipc).to(device)
    noise = torch.randn(len(labels), 3, size, size, generator=rng("noise")).to(device)
    loop = plain_wmdd.recover(
        teacher, [noise], [labels], [atoms.flatten(0, 1).to(device)], means, variances, plain_views(size),
        iterations=config.iterations, lr=config.lr, bn_weight=config.bn_weight, ce_weight=config.ce_weight,
        low=low.to(device), high=high.to(device),
    )  # fmt: skip
    for _ in loop:
        answer()


def plain_views(size: int) -> Iterator[tuple]:
    """Crops of half the area, flips and rolls, for ever."""
    side, generator = round(size / 2**0.5), rng("views")
    while True:
        top, left = torch.randint(size - side, (2,), generator=generator).tolist()
        yield top, left, side, side, bool(top % 2), top % 8, left % 8


# ---------------------------------------------------------------- the driver


def measure_recover(case: str, options: Options, device: torch.device, peak_rate: float) -> dict:
    """Medians of all forms of one case, asked in turn, with ratios to the plain form."""
    workers = {}
    for form, (_, tuned, _) in FORMS.items():
        environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR} | (ALLOCATOR if tuned else {})
        command = [sys.executable, __file__, f"worker={case}/{form}", f"device={options.device}"]
        workers[form] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for form, worker in workers.items():
        read_seconds(worker, form)  # the first iteration, compilation included
    for turn in range(2 + options.repeats):  # two more to warm up
        for form, worker in workers.items():
            worker.stdin.write("\n")
            worker.stdin.flush()
            took = read_seconds(worker, form)
            if turn >= 2:
                seconds[form].append(took)
    peaks = {}
    for form, worker in workers.items():
        worker.stdin.close()
        peaks[form] = int(worker.stdout.readlines()[-1])
        worker.wait()
    network, size, ipc = CASES[case]
    flops = 2 * 10 * ipc * forward_flops(network, size)  # forward and image gradient; the weights are frozen
    median = {form: stats.median(values) for form, values in seconds.items()}
    return {
        "name": case, "what": f"one recover iteration, {10 * ipc} images of {size} px, {network}", "seconds": seconds,
        "median_seconds": median, "ratio_to_plain": {f: median["plain"] / m for f, m in median.items()},
        "ratio_to_plain_tuned": {f: median["plain, tuned allocator"] / m for f, m in median.items()},
        "peak_memory_bytes": peaks, "flops": flops, "flops_per_second": {f: flops / m for f, m in median.items()},
        "share_of_matrix_product": {f: flops / m / peak_rate for f, m in median.items()},
    }  # fmt: skip


def read_seconds(worker: subprocess.Popen, form: str) -> float:
    """The next answer of a worker; RuntimeError with its exit status if it has ended (-9: killed, e.g. for memory)."""
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"the form {form!r} ended before it was asked to, with exit status {worker.wait()}")
    return float(line)


def measure_barycenter(options: Options) -> dict:
    """All classes of Imagenette at IPC 50: ours against POT's solver class by class, from the same start."""
    if options.features:
        entry = Path(options.features)
        real = wmdd.Statistics(**Store(entry.parent.parent).get("statistics", entry.name).tensors())
        what = "features of Imagenette"
    else:
        g = rng("features")
        centres = torch.randn(10, 8, 512, generator=g)
        chosen = torch.randint(8, (10, 947), generator=g)
        points = torch.stack([c[i] for c, i in zip(centres, chosen, strict=True)]) + torch.randn(
            10, 947, 512, generator=g
        )
        real = wmdd.Statistics(
            points.relu().flatten(0, 1), torch.arange(10).repeat_interleave(947), torch.zeros(10, 1), torch.zeros(10, 1)
        )
        what = "made-up clusters, 10 x 947 x 512"
    config = wmdd.Config(ipc=50)
    seconds: dict[str, list[float]] = {"POT, class by class": [], "ours": []}
    for _ in range(options.repeats):
        start = time.perf_counter()
        for k in range(10):
            points = real.of_class(k).double().numpy()
            noise = torch.randn(50, points.shape[1], generator=rng(k), dtype=torch.float64).numpy()
            ot.lp.free_support_barycenter([points], [ot.unif(len(points))], noise, ot.unif(50))
        middle = time.perf_counter()
        wmdd.barycenters(real, config, rng(0))
        seconds["POT, class by class"].append(middle - start)
        seconds["ours"].append(time.perf_counter() - middle)
    median = {form: stats.median(values) for form, values in seconds.items()}
    return {
        "name": "barycenter", "what": f"barycenters of 10 classes at IPC 50, {what}", "seconds": seconds,
        "median_seconds": median, "ratio_to_plain": {f: median["POT, class by class"] / m for f, m in median.items()},
    }  # fmt: skip


def busy_cores() -> float:
    """Cores that other work keeps busy, looked at for two seconds; 0 where the system does not tell."""
    file = Path("/proc/stat")
    if not file.exists():
        return 0.0
    read = lambda: [int(x) for x in file.read_text().split("\n", 1)[0].split()[1:9]]  # noqa: E731
    before = read()
    time.sleep(2)
    spent = [b - a for a, b in zip(before, read(), strict=True)]  # user, nice, system, idle, iowait, ...
    return (os.cpu_count() or 1) * (1 - (spent[3] + spent[4]) / max(sum(spent), 1))


def matrix_product_rate(device: torch.device) -> float:
    """FLOP/s of a 4096 x 4096 bf16 matrix product: what the shares are shares of."""
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * 4096**3 / min(times)


def table(results: list[dict]) -> str:
    """The results as Markdown, one row a form."""
    lines = ["# Speed", "", "Written by `python benchmarks/speed.py`; medians, all forms of a case asked in turn.", ""]
    for result in results:
        where = f"{result['hardware']}, commit {result['commit']}"
        if "busy_cores_before" in result:
            where += f", {result['busy_cores_before']:.1f} cores busy before with other work"
        lines += [f"## {result['name']}: {result['what']}", "", where, ""]
        lines += [
            "| form | seconds | over plain | over plain, tuned | peak memory | TFLOP/s | share of matmul |",
            "|---" * 7 + "|",
        ]
        for form, seconds in result["median_seconds"].items():
            row = [form, f"{seconds:.3f}", f"{result['ratio_to_plain'][form]:.2f}x"]
            if "flops" in result:
                row += [
                    f"{result['ratio_to_plain_tuned'][form]:.2f}x",
                    f"{result['peak_memory_bytes'][form] / 2**30:.2f} GiB",
                ]
                row += [
                    f"{result['flops_per_second'][form] / 1e12:.3f}",
                    f"{100 * result['share_of_matrix_product'][form]:.0f} %",
                ]
            lines.append("| " + " | ".join(row + [""] * (7 - len(row))) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, prog="python benchmarks/speed.py", description="Speed against plain forms.")
    device = resolve_device(options.device)
    if options.worker:
        serve(*options.worker.split("/"), device)
        return
    unknown = set(options.only) - {*CASES, "barycenter"}
    if unknown:
        raise cli.UsageError(
            f"only={','.join(sorted(unknown))} is unknown; allowed: {', '.join((*CASES, 'barycenter'))}"
        )
    busy = busy_cores()
    if busy > 0.2:
        print(f"note: other work keeps {busy:.1f} cores of this machine busy: the ratios may not hold", flush=True)
    rate, folder = matrix_product_rate(device), ROOT / options.out
    for name in options.only:
        found = measure_barycenter(options) if name == "barycenter" else measure_recover(name, options, device, rate)
        found |= {
            "matrix_product_flops_per_second": rate,
            "hardware": hardware(device),
            "busy_cores_before": busy,
            "versions": versions(),
            "commit": commit(),
        }
        write_atomic(folder / f"{name}.json", (json.dumps(found, indent=1) + "\n").encode())
        for form, seconds in found["median_seconds"].items():
            print(f"{name:<12} {form:<24} {seconds:8.3f} s  {found['ratio_to_plain'][form]:5.2f}x", flush=True)
    results = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if "median_seconds" in p.read_text()]
    write_atomic(folder / "README.md", table(results).encode())


if __name__ == "__main__":
    sys.exit(cli.guard(main, sys.argv[1:]))
