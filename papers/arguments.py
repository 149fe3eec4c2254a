"""The arguments of a run, `paper=wmdd scale=smoke`: checked, completed, and described in one line."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from common import cli
from common.hardware import own_cpus, precision_name, resolve_device, resolve_precision
from papers.cells import SCALES, load_paper, papers, select

MOST = 2**63 - 1  # largest seed of a generator
MOST_WORKERS = 8  # of the default: each takes up to 2 GiB at smoke

__all__ = ["Args", "completed", "describe", "names_scale", "parse", "seconds"]


def _arg(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


@dataclass(frozen=True)
class Args:
    """What to run and where."""

    paper: str = field(metadata={"help": "paper to reproduce", "choices": papers()})
    scale: str = _arg(
        "auto", "smoke: digits, minutes; small: real images, hours; paper: as published", choices=("auto", *SCALES)
    )
    only: tuple[str, ...] = _arg((), "cells to run, e.g. table1/imagenette/10 (parts in order, * allowed)")
    skip: tuple[str, ...] = _arg((), "cells to leave out, same patterns")
    seeds: tuple[int, ...] = _arg((), "student seeds; empty: those of the scale", minimum=0)
    budget: str = _arg("", "stop starting cells after this time, cheapest first (90s, 30m, 2h); empty: no limit")
    device: str = _arg("auto", "auto, cpu, cuda or cuda:N")
    precision: str = _arg(
        "auto", "arithmetic of the networks; auto is bf16 where the device has it", choices=("auto", "bf16", "fp32")
    )
    data: str = _arg("", "folder of the data sets; empty: the environment variable DD_DATA")
    out: str = _arg("tables", "folder for tables, figures and result files")
    store: str = _arg("runs", "folder that caches teachers, distilled sets and students")
    engine: str = _arg("local", "local: this machine; ray: also many machines", choices=("local", "ray"))
    workers: int = _arg(
        0, "stages at once on this machine; 0: one, at smoke on a CPU one a core; engine=ray: as many as fit", minimum=0
    )
    address: str = _arg("", "HOST:PORT of a running Ray cluster; empty: one of this run's own, on this machine")
    shared_store: bool = _arg(True, "false where the machines of a cluster share no folder: results then travel by Ray")
    committed: bool = _arg(True, "read sets of another paper that are committed with its tables; false: distil")
    dry_run: bool = _arg(False, "print the plan and stop")

    def __post_init__(self):
        resolve_device(self.device)
        seconds(self.budget)
        check_seeds(self.seeds)
        check_engine(self)


def seconds(text: str) -> float:
    """'90s', '30m', '2h' or '' (no limit) in seconds; ValueError otherwise."""
    if not text:
        return float("inf")
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)):
        raise ValueError(f"budget={text!r} is not a time; allowed: a number with s, m or h, e.g. 90s, 30m, 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def check_seeds(seeds: tuple[int, ...]) -> None:
    """ValueError for a seed that generators do not take, or one given twice: it would count as two students."""
    given = ",".join(map(str, seeds))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={given}: a seed is given twice")
    if any(seed > MOST for seed in seeds):
        raise ValueError(f"seeds={given}: must be at most {MOST}")


def check_engine(args: Args) -> None:
    """ValueError for arguments of the engine that do not go together, or where Ray is wanted and not installed."""
    if args.engine == "local":
        given = {"address": args.address, "shared_store": not args.shared_store}
        if named := [name for name, value in given.items() if value]:
            raise ValueError(f"{named[0]}= needs engine=ray; engine=local is this machine alone")
        return
    if importlib.util.find_spec("ray") is None:
        fill = "bash run_all.sh python -m pip install -r requirements-cluster.txt -c constraints.txt"
        raise ValueError(f"engine=ray needs Ray, which is not installed here: `{fill}` installs it")
    if args.address and not re.fullmatch(r"[^\s:/]+:[1-9]\d{0,4}", args.address):
        raise ValueError(f"address={args.address!r} is no place of a Ray cluster; allowed: HOST:PORT, e.g. node-1:6379")
    if args.address and args.workers:
        raise ValueError(f"workers={args.workers} is for this machine; on the cluster at address= as many run as fit")
    if args.device.startswith("cuda:"):
        raise ValueError(f"device={args.device} with engine=ray: Ray deals out the GPUs; allowed: auto, cpu, cuda")


def parse(argv: list[str]) -> Args:
    """Arguments as a checked `Args` with the scale decided; UsageError names what is wrong and what is allowed."""
    description = "Regenerates the tables and figures of a paper. Papers: " + ", ".join(papers()) + "."
    return completed(cli.parse(Args, argv, prog="bash run_all.sh", description=description))


def completed(args: Args) -> Args:
    """`args` with scale and workers decided.

    UsageError for a pattern that matches no cell, and for data= that is no folder.
    """
    if args.data and args.engine == "local" and not args.dry_run and not Path(args.data).expanduser().is_dir():
        raise cli.UsageError(f"data={args.data} is no folder here; docs/data.md says what belongs in it")
    if args.scale == "auto":
        args = replace(args, scale=default_scale(args.device)[0])
    if args.engine == "local" and not args.workers:
        args = replace(args, workers=default_workers(args))
    paper = load_paper(args.paper)
    try:
        select(paper.cells_at(args.scale), args.only, args.skip)
    except ValueError as error:
        raise cli.UsageError(str(error)) from error
    return args


def names_scale(argv: list[str]) -> bool:
    return any(argument.startswith("scale=") and argument != "scale=auto" for argument in argv)


def default_scale(device: str = "auto") -> tuple[str, str]:
    """The scale without `scale=`, and why."""
    if resolve_device(device).type == "cuda":
        return "paper", "the default where a CUDA device is found"
    return "smoke", "the default on a CPU" if torch.cuda.is_available() else "the default where no CUDA device is found"


def default_workers(args: Args) -> int:
    """Stages at once with engine=local: one; at smoke on a CPU, where one core is enough for a stage, as many as cores.

    Where OMP_NUM_THREADS is set, the cores are dealt out already.
    """
    tiny = args.scale == "smoke" and resolve_device(args.device).type == "cpu"
    return min(own_cpus(), MOST_WORKERS) if tiny and not os.environ.get("OMP_NUM_THREADS") else 1


def describe(args: Args, *, asked: bool) -> str:
    """The first line printed: what runs at which scale, and why (asked: scale= was given)."""
    why = "asked for" if asked else default_scale(args.device)[1]
    device = resolve_device(args.device)
    precision = precision_name(resolve_precision(args.precision, device))
    place = f"device={device}, precision={precision}, out={args.out}, store={args.store}"
    if args.engine != "local":
        place += f", engine={args.engine}"
    if args.workers > 1:
        place += f", workers={args.workers}"
    return f"{args.paper}: scale={args.scale} ({why}), {place}"
