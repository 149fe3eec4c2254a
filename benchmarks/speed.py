"""Speed and memory of each method against its plain form, measured in turn in one run.

    python benchmarks/speed.py                                  # everything
    python benchmarks/speed.py only=recover64,dm10 repeats=5

Every form runs in a process of its own (honest memory peaks, its own allocator settings).  The driver asks them in
turn for one iteration at a time and takes medians: a noisy machine then hits all alike.  The plain forms,
benchmarks/plain_*.py, are the formulas as the released code builds them.  Results: benchmarks/results/<name>.json and
the table benchmarks/results/README.md.
"""

from __future__ import annotations

import json
import os
import statistics as stats
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import cases_coresets, cases_matching, cases_mixing, cases_nrr_dd, cases_rded, cases_sre2l, cases_wmdd
from benchmarks.case import Case
from common import cli
from common.hardware import bf16_is_fast, made, peak_memory, resolve_device
from common.store import write_atomic

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    **cases_wmdd.CASES, **cases_matching.CASES, **cases_sre2l.CASES, **cases_rded.CASES, **cases_nrr_dd.CASES,
    **cases_mixing.CASES, **cases_coresets.CASES,
}  # fmt: skip
PLAIN, TUNED = "plain", "plain, tuned allocator"
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}  # keep freed memory, as run_all.sh does


HEAD = """\
# Speed

Written by `python benchmarks/speed.py`. Seconds of an iteration: medians, each form of a case in a process of its own,
one iteration of each in turn. *Plain* is the method as its formulas are usually written: a loop over classes or
batches, fp32, NCHW, hooks that copy. *Tuned allocator*: with the two settings of the C library's memory that
`run_all.sh` makes, which keep freed memory. *Over plain* is how many times faster a form is. The share is of the rate
of one large matrix product, measured before the case in bf16 where the processor has it, else in fp32; a convolution
that is not done as a product, or cores that were busy with other work meanwhile, can take it above 100 %.

Where it comes from: our forms run with the tuned allocator, so on processors without bf16 arithmetic much of *over
plain* is the allocator's, and *over plain, tuned* is what the rest is worth. Of the matching methods *ours, fp32* does
the arithmetic of plain in its time: all classes in one pass, one batched resampling and no copies in hooks give memory,
not speed, where convolutions fill the processor. Speed is elementwise work fused (*compiled*) and convolutions in bf16
and channels_last (*mixed*, *bf16*). MTT and DATM walk back through the student's steps one at a time: constant memory
for a third more arithmetic than the graph of all steps (so slower than plain where the processor is the limit), which
*graphs kept* spends instead. DATM at IPC 10 has no plain form: its graphs want about 30 GiB. A form or a ratio that a
table lacks was not measured there. Whether bf16 changes
accuracies: [precision.md](precision.md).
"""


@dataclass(frozen=True)
class Options:
    only: tuple[str, ...] = field(default=tuple(CASES), metadata={"help": "what to measure", "choices": tuple(CASES)})
    repeats: int = field(default=7, metadata={"help": "timed iterations of each form", "minimum": 1})
    device: str = field(default="auto", metadata={"help": "auto, cpu or cuda"})
    out: str = field(default="benchmarks/results", metadata={"help": "folder of the results"})
    worker: str = field(default="", metadata={"help": "used by the driver itself: case/form"})


# ---------------------------------------------------------------- one form, in its own process


class Stop(Exception):
    """Ends a loop that would go on for ever."""


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

    chosen = CASES[case]
    loop = chosen.plain if form in (PLAIN, TUNED) else chosen.forms[form].loop
    with peak_memory(device) as peak, suppress(Stop):
        loop(answer, device)
    print(peak[0], flush=True)


# ---------------------------------------------------------------- the driver


class Worker:
    """The process of one form."""

    def __init__(self, case: str, form: str, device: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR} | (ALLOCATOR if form != PLAIN else {})
        command = [sys.executable, __file__, f"worker={case}/{form}", f"device={device}"]
        self.form = form
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def first(self) -> None:
        """Wait for the first iteration, which begins by itself and compiles."""
        self._line()

    def ask(self) -> float:
        """Seconds of one more iteration."""
        with suppress(BrokenPipeError):  # it has ended, which `_line` says
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return float(self._line())

    def end(self) -> int:
        """Its memory peak in bytes."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        peak = int(self._line())
        self.process.wait()
        return peak

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:  # -9: killed, e.g. for memory
            raise RuntimeError(f"the form {self.form!r} ended early, with exit status {self.process.wait()}")
        return line

    def kill(self) -> None:
        """Ends it, wherever it is; nothing where it has ended."""
        self.process.kill()
        self.process.wait()


Turns = tuple[dict[str, list[float]], dict[str, int]]  # seconds and memory peak of each form


def side_by_side(start: Callable[[str], Worker], forms: list[str], repeats: int) -> Turns:
    """All forms alive, asked in turn; two turns more to warm up."""
    workers = {form: start(form) for form in forms}
    try:
        for worker in workers.values():
            worker.first()
        turns = [{form: worker.ask() for form, worker in workers.items()} for _ in range(2 + repeats)]
        return {form: [turn[form] for turn in turns[2:]] for form in forms}, {f: w.end() for f, w in workers.items()}
    finally:  # those that one that failed leaves behind
        for worker in workers.values():
            worker.kill()


def one_at_a_time(start: Callable[[str], Worker], forms: list[str], repeats: int) -> Turns:
    """A fresh process for each turn of each form, its second iteration timed."""
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    peaks = dict.fromkeys(forms, 0)
    for _ in range(repeats):
        for form in forms:
            worker = start(form)
            worker.first()
            seconds[form].append(worker.ask())
            peaks[form] = max(peaks[form], worker.end())
    return seconds, peaks


def measure(name: str, case: Case, options: Options, device: torch.device, peak_rate: float) -> dict:
    """Medians of all forms of one case, asked in turn, with ratios to the plain form."""
    left_out = [f for f, form in case.forms.items() if form.needs_bf16 and not bf16_is_fast(device)]
    forms = [*([PLAIN, TUNED] if case.plain else []), *(f for f in case.forms if f not in left_out)]
    turns = one_at_a_time if case.one_at_a_time else side_by_side
    seconds, peaks = turns(lambda form: Worker(name, form, options.device), forms, options.repeats)
    median = {form: stats.median(values) for form, values in seconds.items()}
    found = {
        "name": name, "what": case.what, "seconds": seconds, "median_seconds": median,
        "peak_memory_bytes": peaks, "left_out_without_bf16": left_out, "one_at_a_time": case.one_at_a_time,
    }  # fmt: skip
    if case.plain:
        found |= {
            "ratio_to_plain": {f: median[PLAIN] / m for f, m in median.items()},
            "ratio_to_plain_tuned": {f: median[TUNED] / m for f, m in median.items()},
        }
    if case.flops is not None:
        flops = case.flops()
        found |= {
            "flops": flops, "flops_per_second": {f: flops / m for f, m in median.items()},
            "share_of_matrix_product": {f: flops / m / peak_rate for f, m in median.items()},
        }  # fmt: skip
    return found


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
    """FLOP/s of a large matrix product, in bf16 where the device has it, else fp32: what the shares are shares of."""
    dtype, side = (torch.bfloat16, 4096) if bf16_is_fast(device) else (torch.float32, 2048)
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def table(results: list[dict]) -> str:
    """The results as Markdown, one row a form."""
    lines = [HEAD]
    for result in results:
        where = f"{result['hardware']}, commit {result['commit']}"
        if "busy_cores_before" in result:
            where += f", {result['busy_cores_before']:.1f} cores busy before with other work"
        if result.get("left_out_without_bf16"):
            where += "; forms in bf16 were left out: the processor has no bf16 arithmetic"
        if result.get("one_at_a_time"):
            where += "; the forms do not fit beside each other: a process of its own each turn, its second iteration"
        lines += [f"## {result['name']}: {result['what']}", "", where, ""]
        lines += [
            "| form | seconds | over plain | over plain, tuned | peak memory | TFLOP/s | share of matmul |",
            "|---" * 7 + "|",
        ]
        for form, seconds in result["median_seconds"].items():
            row = [form, f"{seconds:.3f}"]
            for ratio in ("ratio_to_plain", "ratio_to_plain_tuned"):
                row.append(f"{result[ratio][form]:.2f}x" if ratio in result else "")
            if "peak_memory_bytes" in result:
                row += [f"{result['peak_memory_bytes'][form] / 2**30:.2f} GiB"]
            if "flops" in result:
                row += [f"{result['flops_per_second'][form] / 1e12:.3f}"]
                row += [f"{100 * result['share_of_matrix_product'][form]:.0f} %"]
            lines.append("| " + " | ".join(row + [""] * (7 - len(row))) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, prog="python benchmarks/speed.py", description="Speed against plain forms.")
    device = resolve_device(options.device)
    if options.worker:
        serve(*options.worker.split("/"), device)
        return
    folder, failed = ROOT / options.out, []
    for name in options.only:
        busy, rate = busy_cores(), matrix_product_rate(device)
        if busy > 0.2:
            print(f"note: other work keeps {busy:.1f} cores of this machine busy: the ratios may not hold", flush=True)
        try:
            found = measure(name, CASES[name], options, device, rate)
        except RuntimeError as error:  # the other cases still run
            failed.append(name)
            print(f"{name}: {error}", flush=True)
            continue
        found |= {"matrix_product_flops_per_second": rate, "busy_cores_before": busy, **made(device)}
        write_atomic(folder / f"{name}.json", (json.dumps(found, indent=1) + "\n").encode())
        for form, seconds in found["median_seconds"].items():
            ratio = f"{found['ratio_to_plain'][form]:5.2f}x" if "ratio_to_plain" in found else "not tried: plain"
            print(f"{name:<12} {form:<24} {seconds:8.3f} s  {ratio}", flush=True)
    results = [json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if "median_seconds" in p.read_text()]
    write_atomic(folder / "README.md", table(results).encode())
    if failed:
        raise RuntimeError(f"not measured: {', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(cli.guard(main, sys.argv[1:]))
