"""The device of a run and its precision, and where a result was made: versions, processor, commit, memory peak."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = [
    "autocast", "bf16_is_fast", "commit", "compiler", "hardware", "made", "own_cpus", "peak_memory", "precision_name",
    "recorded", "resolve_device", "resolve_precision", "threads_each", "versions",
]  # fmt: skip

PACKAGES = ("torch", "torchvision", "timm", "POT", "numpy", "scikit-learn")


def resolve_device(device: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"device={device!r} is unknown; allowed: auto, cpu, cuda, cuda:N")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r} was asked for, but this PyTorch sees no CUDA device; use device=cpu")
    if device.startswith("cuda:") and int(device[5:]) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device={device!r} is not there; allowed: cuda:0 to cuda:{count - 1}")
    return torch.device(device)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the device multiplies it in hardware, else fp32 (study: benchmarks/results/precision.md)."""
    table = {"bf16": torch.bfloat16, "fp32": torch.float32}
    if precision != "auto" and precision not in table:
        raise ValueError(f"precision={precision!r} is unknown; allowed: auto, {', '.join(table)}")
    return table.get(precision, torch.bfloat16 if bf16_is_fast(device) else torch.float32)


def precision_name(dtype: torch.dtype) -> str:
    """The name of a resolved precision, as it stands in settings."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def autocast(device: torch.device, dtype: torch.dtype):
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device) -> str:
    """One line: the GPU's name, or the processor's with threads and its bf16 instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = _cpuinfo("model name") or platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' * (threads > 1)}, {_bf16_instructions() or 'no bf16 instructions'}"


def own_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(places: float, cpus: float | None = None) -> int:
    """Threads of one worker: what OMP_NUM_THREADS says, else an equal part of the processors."""
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    return max(1, int((own_cpus() if cpus is None else cpus) // max(1, places)))


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware.  A CPU without does it fifty times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(_bf16_instructions())


def compiler() -> bool:
    """Whether there is what PyTorch compiles with on a CPU: a compiler, and the headers of Python."""
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return headers.exists() and shutil.which(os.environ.get("CXX", "g++")) is not None


def _bf16_instructions() -> str:
    flags = _cpuinfo("flags").split()
    return "AMX" if "amx_bf16" in flags else "AVX-512 bf16" if "avx512_bf16" in flags else ""


@functools.cache
def _cpuinfo(name: str) -> str:
    """The first value of /proc/cpuinfo under this name; empty where there is none."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def made(device: torch.device) -> dict:
    """Where and by what a result was made: goes into the facts of every stage."""
    return {"versions": versions(), "hardware": hardware(device), "commit": commit()}


@functools.cache
def commit() -> str:
    """The commit of the code that runs, with `+changes` where files differ from it; `unknown` outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    try:
        run = lambda *a: subprocess.run(  # noqa: E731
            ["git", *a], cwd=root, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = run("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.yaml")
        return run("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@contextmanager
def peak_memory(device: torch.device):
    """Yields a list that holds, after the block, the peak in bytes: of the GPU's allocations, or of the process.

    On Linux the process's high-water mark is reset first; elsewhere it is that of the process's whole life.
    """
    peak = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    try:
        yield peak
    finally:
        peak[0] = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_peak()


def recorded(build, device: torch.device):
    """`build(work) -> Product` with where it was made and its memory peak in the product's facts."""

    def measured(work: Path):
        with peak_memory(device) as peak:
            product = build(work)
        product.meta |= {"peak_memory_bytes": peak[0], "made": made(device)}
        return product

    return measured


def _resident_peak() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(x.split()[1]) * 1024 for x in status.read_text().splitlines() if x.startswith("VmHWM"))
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
