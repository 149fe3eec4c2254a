"""The plan of a run: every cell with the stages it needs, or with why it has none, and what they will cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from common.hardware import autocast, hardware
from papers import committed, image_stages, matching_stages
from papers.arguments import Args
from papers.cells import Cell, Paper, select
from papers.setups import ImageSetup, setup_of
from papers.stages import Lab, Stage

ALGORITHMS = (*image_stages.IMAGES, *matching_stages.ALGORITHMS)
LEFT_OUT = "planned, not run yet"
STAGE_SECONDS = 1.5  # that a stage takes besides its arithmetic, by the stages of smoke


@dataclass
class Planned:
    """A cell with the stages it needs, or the reason why it has none."""

    cell: Cell
    setup: ImageSetup | None = None
    stages: tuple[Stage, ...] = ()  # one evaluate stage a seed, or the stages that are timed
    why: str = ""


def make_plan(args: Args, paper: Paper, lab: Lab) -> list[Planned]:
    """Every selected cell with its stages, or with why it cannot run (missing data, settings, not in this scale).

    ValueError where the scale has none of the cells that `only` names.
    """
    scale = paper.scales[args.scale]
    seeds = args.seeds or tuple(scale["seeds"])
    out, missing = [], {}
    cells = paper.cells_at(args.scale)
    chosen = {cell.id for cell in select(cells, args.only, args.skip)}
    kept = {cell.id for cell in select(cells, skip=scale.get("skip", ()))}
    for cell in cells:
        try:
            setup = usable(setup_of, scale, cell) if cell.id in kept else None
        except ValueError as error:
            setup, wrong = None, f"failed: {error}"
        else:
            wrong = ""
        if setup is None and not wrong:
            out.append(Planned(cell, why=scale["why_missing"]))
        elif cell.id not in chosen:
            out.append(Planned(cell, setup, why=LEFT_OUT))
        elif wrong:
            out.append(Planned(cell, why=wrong))
        elif setup.sets in missing:
            out.append(Planned(cell, setup, why=missing[setup.sets]))
        else:
            try:
                out.append(Planned(cell, setup, tuple(usable(stages_of, cell, setup, lab, seeds))))
            except OSError as error:
                kind = "missing" if isinstance(error, FileNotFoundError) else "unreadable"
                missing[setup.sets] = f"{kind} data: {error}"
                out.append(Planned(cell, setup, why=missing[setup.sets]))
            except ValueError as error:  # of this cell alone
                out.append(Planned(cell, setup, why=f"failed: {error}"))
    named = [p for p in out if p.cell.id in chosen]
    if args.only and all(p.setup is None and p.why == scale["why_missing"] for p in named):
        count = f"none of the {len(named)} cells" if len(named) > 1 else "no cell"
        only = ",".join(args.only)
        raise ValueError(f"scale={args.scale} has {count} that only={only} names: {scale['why_missing']}")
    return out


def usable(make: Callable, *arguments):
    """`make(*arguments)`; ValueError where the settings in paper.yaml are not those that a method or a student has."""
    try:
        cell = next(a for a in arguments if isinstance(a, Cell))
        if cell.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm {cell.algorithm!r} is unknown; allowed: {', '.join(ALGORITHMS)}")
        return make(*arguments)
    except (AttributeError, KeyError, TypeError) as error:
        reason = f"{error} is missing or unknown" if isinstance(error, KeyError) else error
        raise ValueError(f"its settings in paper.yaml cannot be used: {reason}") from error


def stages_of(cell: Cell, setup: ImageSetup, lab: Lab, seeds: tuple[int, ...]) -> list[Stage]:
    """The last stages of a cell; FileNotFoundError for missing data, ValueError for settings that cannot work."""
    return [lab.images(setup, cell.algorithm, 0)] if cell.metric == "time" else lab.students(cell, setup, seeds)


def pending(planned: Planned, lab: Lab) -> dict[str, Stage]:
    """The stages of a cell that are not in the store, by key, in the order to run them."""
    stages = {lab.key(s): s for top in planned.stages for s in top.all()}
    return {k: s for k, s in stages.items() if not lab.cached(s)}


def speed(lab: Lab) -> float:
    """Floating-point operations a second of a convolution of the networks' kind on this device, for the estimates."""
    conv = torch.nn.Conv2d(128, 128, 3, padding=1, bias=False).to(lab.device, memory_format=torch.channels_last)
    x = torch.randn(32, 128, 28, 28, device=lab.device).contiguous(memory_format=torch.channels_last)
    times = []
    with torch.no_grad(), autocast(lab.device, lab.dtype):
        for _ in range(4):
            start = time.perf_counter()
            conv(x).sum().item()
            times.append(time.perf_counter() - start)
    return 2 * 32 * 28 * 28 * 128 * 128 * 9 / min(times) / 2  # whole networks reach about half of a lone convolution


def estimate(stages: Iterable[Stage], rate: float) -> float:
    """Seconds: arithmetic at `rate` operations a second, and what a stage that has some takes besides."""
    return sum(stage.flops / rate + STAGE_SECONDS for stage in stages if stage.flops)


def show_plan(planned: list[Planned], lab: Lab) -> str:
    """The plan as text for a terminal: cells by state, stages to run, estimated time."""
    rate, todo = speed(lab), {}
    states: dict[str, int] = {}
    lines = []
    for p in planned:
        if not p.stages:
            state = p.why
        else:
            wanted = pending(p, lab)
            todo |= wanted
            state = (
                f"to run, {len(wanted)} stages, about {clock(estimate(wanted.values(), rate))}"
                if wanted
                else "cached"
            )
        kind = "to run" if state.startswith("to run") else state
        states[kind] = states.get(kind, 0) + 1
        if told(p):
            lines.append(f"  {p.cell.id:<58} {'its data are not there: see below' if absent(p) else state}")
    total = clock(estimate(todo.values(), rate))
    head = [f"{n} cell{'s' * (n > 1)} {state}" for state, n in states.items()]
    head += filter(None, [taken(planned)])
    return "\n".join([*lines, "", *head, f"{len(todo)} stages to run, about {total} on {hardware(lab.device)}"])


def taken(planned: list[Planned]) -> str:
    """A line on the committed sets that are read; empty where there are none."""
    stages = ((p.setup, s) for p in planned for top in p.stages for s in top.all() if committed.SET in s.settings)
    sets = {(setup.read_from, stage.settings[committed.SET]) for setup, stage in stages}
    where = " and ".join(f"tables/{folder}/sets" for folder in sorted({folder for folder, _ in sets}))
    count = f"{len(sets)} distilled set{'s' * (len(sets) > 1)}"
    return f"{count} read from {where}; committed=false distils them here" if sets else ""


def absent(p: Planned) -> bool:
    """Whether a cell cannot run for want of its data."""
    return p.why.startswith(("missing data", "unreadable data"))


def told(p: Planned) -> bool:
    """Whether a cell has a line of its own in a list: not where it was left out or is no part of the scale."""
    return p.why.startswith("failed") or (p.setup is not None and not p.why.startswith(LEFT_OUT))


def clock(s: float) -> str:
    return f"{s:.0f} s" if s < 100 else f"{s / 60:.0f} min" if s < 6000 else f"{s / 3600:.1f} h"
