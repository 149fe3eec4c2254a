"""Makes the tables and figures of a paper: arguments -> plan -> stages -> report.

python -m papers.runner paper=wmdd scale=smoke
python -m papers.runner paper=wmdd scale=paper only=table1/imagenette/10 budget=2h dry_run=true
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import statistics as stats
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import cli
from common.hardware import resolve_device
from common.store import Store, write_atomic
from papers import committed, measured_stages, render, report
from papers.arguments import Args, describe, names_scale, parse, seconds
from papers.cells import ROOT, SCALES, Cell, Paper, load_paper
from papers.planning import Planned, absent, clock, estimate, make_plan, pending, show_plan, speed, taken
from papers.setups import outdated
from papers.stages import Lab, Stage

__all__ = ["Args", "Run", "describe", "main", "names_scale", "parse", "run"]


@dataclass
class Run:
    """A finished run: what the notebook shows and plots."""

    args: Args
    paper: Paper
    lab: Lab
    planned: list[Planned]
    folder: Path
    results: dict[str, dict]

    @property
    def failed(self) -> list[Planned]:
        return [p for p in self.planned if p.why.startswith("failed")]

    def rows(self, table: str) -> list[dict]:
        """The tidy rows of one table: printed numbers, ours, status."""
        whys = (p.why.partition(": looked for ")[0] for p in self.planned)  # without the folders of a machine
        cells = [
            p.cell.key() | {"why": why, "label_regime": p.cell.label_regime}
            for p, why in zip(self.planned, whys, strict=True)
        ]
        comparable, layout = self.paper.scales[self.args.scale]["comparable"], self.paper.tables.get(table, {})
        reported = report.load_reported(ROOT / self.paper.name / "reported.csv")
        chosen = {k: layout[k] for k in ("reported_runs", "label_regime") if k in layout}
        rows = report.table_rows(table, cells, self.results.values(), reported, comparable, **chosen)
        regime = layout.get("label_regime", "soft")
        regimes = ("any", regime) if regime != "any" else {r["label_regime"] for r in self.results.values()}
        outdated = [r for r in self.results.values() if r.get("other_settings") and r["label_regime"] in regimes]
        others = {tuple(r[k] for k in report.KEY) for r in outdated}
        for row in rows:
            if row["seeds"] and tuple(row[k] for k in report.KEY) in others:
                row["status"] = "not comparable, made with other settings than the scale has now"
        for row in rows:
            if row["status"].endswith("no cell planned"):
                row["status"] = f"not run: {self.unplanned(tuple(row[k] for k in report.KEY), layout)}"
        return rows

    @functools.cached_property
    def scales_of(self) -> dict[tuple, list[str]]:
        """The scales that have a cell of a number, by its key."""
        found: dict[tuple, list[str]] = {}
        for scale in SCALES:
            for key in dict.fromkeys(tuple(cell.key().values()) for cell in self.paper.cells_at(scale)):
                found.setdefault(key, []).append(scale)
        return found

    def unplanned(self, key: tuple, layout: Mapping) -> str:
        """Why a printed number has no cell here: it is one of other scales, or what `not_run` says of a part of it."""
        if scales := self.scales_of.get(key):
            return f"planned at scale {' and '.join(scales)}"
        return next((why for part, why in layout.get("not_run", {}).items() if part in key), "no cell planned")

    def check(self) -> None:
        """ValueError for result files, printed numbers, layouts or figures that could not be reported in the end."""
        for table, layout in self.paper.tables.items():
            if rows := self.rows(table):
                report.terminal(rows, layout)
        try:
            figures = figures_of(self.paper)
        except ImportError:  # figures are left out, which is said in the end
            return
        if unknown := [name for name in self.paper.figures if not hasattr(figures, name)]:
            raise ValueError(f"paper.yaml of {self.paper.name} names {unknown[0]}, which its figures.py does not draw")

    def values(self, table: str) -> list[dict]:
        """Result files of one table or figure, one row a seed: for plots."""
        cells = [r for r in self.results.values() if r["table"] == table]
        return [{**r, "accuracy": v, "seed": s} for r in cells for v, s in zip(r["values"], r["seeds"], strict=True)]

    def entry(self, cell_id: str):
        """The store entry of the images behind a cell, or None when it is not there."""
        for planned in self.planned:
            if planned.cell.id == cell_id and planned.stages:
                *_, stage = (s for s in planned.stages[0].all() if s.name == "distill")
                return self.lab.store.get(stage.name, self.lab.key(stage))
        return None


# ---------------------------------------------------------------- run


def lab_of(args: Args) -> Lab:
    """Data, device and store of a run."""
    store, device = Store(Path(args.store).expanduser()), resolve_device(args.device)
    return Lab(store, args.data or None, device, args.precision, args.committed)


def run(args: Args) -> Run:
    """Run the plan, write result files, tables and figures; a failing cell is reported and the others go on."""
    paper = load_paper(args.paper)
    lab = lab_of(args)
    folder = Path(args.out).expanduser() / args.paper / args.scale
    if args.dry_run:
        planned = make_plan(args, paper, lab)
        print(show_plan(planned, lab))
        return Run(args, paper, lab, planned, folder, {})
    with engine(args) as run_planned:
        planned = make_plan(args, paper, lab)
        lacking = Counter(p.why for p in planned if absent(p))
        if lacking and not any(p.stages for p in planned):
            raise FileNotFoundError(f"nothing can run: {'; '.join(lacking)}")
        for why, count in lacking.items():
            print(f"left out, {count} cell{'s' * (count > 1)}: {why}", flush=True)
        if line := taken(planned):
            print(line, flush=True)
        gathered(args, paper, lab, planned, folder).check()
        try:
            run_planned(planned, lab, folder, args)
        finally:
            finished = gathered(args, paper, lab, planned, folder)
            write_report(finished)
            if line := earlier(finished):
                print(line, flush=True)
    return finished


def earlier(finished: Run) -> str:
    """A line on the results that the tables have from earlier runs, or from the project; empty where there are none."""
    own = {p.cell.id for p in finished.planned if p.stages and not p.why}
    others = [result for cell, result in finished.results.items() if cell not in own]
    if not others:
        return ""
    made = sorted({result["finished"][:10] for result in others})
    when = made[0] if len(made) == 1 else f"{made[0]} to {made[-1]}"
    count = f"{len(others)} result{'s' * (len(others) > 1)}"
    return (
        f"of this run: {len(finished.results) - len(others)}; the tables and figures also show {count} that were in "
        f"{finished.folder / 'cells'} before ({when}); out=FOLDER keeps a run by itself"
    )


def gathered(args: Args, paper: Paper, lab: Lab, planned: list[Planned], folder: Path) -> Run:
    """The run with all result files that its folder has now."""
    return Run(args, paper, lab, planned, folder, read_results(planned, folder, paper.scales[args.scale]))


@contextmanager
def engine(args: Args):
    """What runs the cells of a plan in this block: `run_cells`, or its counterpart with helpers or on a cluster."""
    if args.engine == "local":
        from papers import helpers  # which stands on this file

        yield helpers.run_cells if args.workers > 1 else run_cells
        return
    from papers import cluster  # the only way to Ray

    with cluster.connected(args):
        yield cluster.run_cells


class Budget:
    """Which cells may start: all of them without budget=, else the cheapest first until the time is used up."""

    def __init__(self, args: Args, lab: Lab, start: float | None = None):
        """`start`: when the time began to count, on the monotonic clock that all processes share; None is now."""
        self.text, self.limit, self.lab = args.budget, seconds(args.budget), lab
        self.start = time.monotonic() if start is None else start
        self.limited = self.limit < float("inf")
        self.rate = speed(lab) if self.limited else 1.0

    def queue(self, planned: list[Planned]) -> list[Planned]:
        """The cells that have stages, in the order to start them."""
        cells = [p for p in planned if p.stages]
        return sorted(cells, key=self.cost) if self.limited else cells

    def cost(self, p: Planned) -> float:
        """Estimated seconds."""
        return estimate(pending(p, self.lab).values(), self.rate)

    def spent(self) -> float:
        return time.monotonic() - self.start

    def fits(self, p: Planned) -> bool:
        """Whether the cell may start now, as one that is cached always may."""
        return not self.limited or self.spent() + self.cost(p) <= self.limit or not pending(p, self.lab)

    def allows(self, p: Planned) -> bool:
        """Like `fits`; a cell that may not start says why."""
        if fits := self.fits(p):
            return fits
        p.why = f"budget={self.text} was used up (it needs about {clock(self.cost(p))})"
        return False


def run_cells(planned: list[Planned], lab: Lab, folder: Path, args: Args) -> None:
    """Run every cell that has stages; with a budget the cheapest first, until the time is used up."""
    budget = Budget(args, lab)
    queue = budget.queue(planned)
    for number, p in enumerate(queue, 1):
        if budget.allows(p):
            finish(p, lab, folder, args, f"[{number}/{len(queue)}]", budget.spent)


def finish(p: Planned, lab: Lab, folder: Path, args: Args, place: str, spent: Callable[[], float]) -> None:
    """Make the stages of a cell that are missing and write its result file; a failure is said and kept in a log."""
    try:
        result = run_cell(p, lab, args)
    except Exception as error:  # one cell must not take the others down; the log keeps the traceback
        p.why = "failed: " + " ".join(str(error).split())
        log = folder / "logs" / f"{p.cell.id.replace('/', '_')}.log"
        write_atomic(log, traceback.format_exc().encode())
        print(f"{place} {p.cell.id}  FAILED: {error} (traceback in {log})", flush=True)
        return
    write_atomic(result_path(p.cell, folder), (json.dumps(result, indent=1) + "\n").encode())
    spread = "" if result["std"] is None else f" ± {result['std']:.2f}"
    number = f"{result['mean']:.4f} h" if p.cell.metric == "time" else f"{result['mean']:.2f}{spread}"
    print(f"{place} {p.cell.id}  {number}  ({clock(spent())})", flush=True)


def run_cell(p: Planned, lab: Lab, args: Args) -> dict:
    """Make the stages of one cell and gather its result."""
    chain = {lab.key(s): s for top in p.stages for s in top.all()}
    entries = {key: lab.entry(stage) for key, stage in chain.items()}
    stages = [
        {"stage": stage.name, "key": key, **arithmetic_of(stage), **committed.origin(entries[key].meta)}
        for key, stage in chain.items()
    ]
    spent: dict[str, float] = {}
    for record in stages:
        spent[record["stage"]] = round(spent.get(record["stage"], 0.0) + record["seconds"], 3)
    if p.cell.metric == "time":
        own = ("statistics", "barycenters", "recover", "distill")  # what the method does with a teacher
        values, seeds = [sum(spent.get(stage, 0.0) for stage in own) / 3600], [0]
    else:
        last = [entries[lab.key(top)].meta for top in p.stages]
        which = "accuracies" if p.cell.metric == "accuracy" else p.cell.metric
        values, seeds = ([value for meta in last for value in meta[name]] for name in (which, "seeds"))
    by_name = {stage.name: entries[key].meta for key, stage in chain.items()}
    last_meta = entries[lab.key(p.stages[-1])].meta
    best = [value for top in p.stages for value in entries[lab.key(top)].meta.get("best", ())]
    made = by_name.get("distill", {"bytes": 0})  # real images alone make no set
    stored = by_name.get("relabel", {}).get("bytes", made.get("label_bytes", 0))
    label_bytes = last_meta.get("label_bytes", stored)  # a student may use less of them
    run_on, known = lab.run_on(p.setup), {record["run_on"] for record in stages if "run_on" in record}
    run_on += "".join(f", a set distilled on {other}" for other in sorted(known - {run_on}))
    return {
        "cell": p.cell.id, **p.cell.key(), "label_regime": p.cell.label_regime, "values": values, "seeds": seeds,
        "mean": stats.fmean(values), "std": stats.stdev(values) if len(values) > 1 else None,
        **measured_stages.details([entries[lab.key(top)].meta for top in p.stages], p.cell.metric),
        "best": best, "teacher_accuracy": by_name.get("teacher", {}).get("accuracy"), "run_on": run_on,
        "settings": {**lab.facts(p.setup), "algorithm": p.cell.algorithm, "precision": lab.precision},
        "seconds": spent, "peak_memory_bytes": max(e.meta["peak_memory_bytes"] for e in entries.values()),
        "bytes": {"images": made["bytes"], "labels": label_bytes},
        **stages[-1]["made"], "finished": stages[-1]["finished"], "stages": stages,
        "command": f"bash run_all.sh paper={args.paper} scale={args.scale} only={p.cell.id}"
        + ("" if args.committed else " committed=false"),
    }  # fmt: skip


def arithmetic_of(stage: Stage) -> dict[str, str]:
    """The precision that a stage's settings, or those of its scoring run, name; students without one are in fp32."""
    precision = stage.settings.get("precision") or stage.settings.get("run", {}).get("precision")
    return {"precision": precision} if precision else {}


def result_path(cell: Cell, folder: Path) -> Path:
    return folder / "cells" / f"{cell.id.replace('/', '_')}.json"


def read_results(planned: list[Planned], folder: Path, scale: Mapping) -> dict[str, dict]:
    """The result files of planned cells, also those of earlier runs, by cell id and in the order of the plan.

    One whose settings are not those that the scale has now is kept and has `other_settings`, which the tables say.
    """
    found = {r["cell"]: r for r in report.load_cells(folder / "cells")}
    results = {p.cell.id: found[p.cell.id] for p in planned if p.cell.id in found}
    for p in planned:
        if p.cell.id in results:
            results[p.cell.id]["other_settings"] = outdated(scale, p.cell, results[p.cell.id])
    return results


# ---------------------------------------------------------------- report


def write_report(finished: Run) -> None:
    """Tables as CSV, Markdown and LaTeX, extras beside them, and the figures where plotting packages are there."""
    for table, layout in finished.paper.tables.items():
        rows = finished.rows(table)
        if not rows:  # nothing printed, and no cells at this scale
            continue
        report.write_table(rows, layout, finished.folder)
        if "label_regime" in layout:  # one regime only: nothing to set soft against hard labels
            continue
        extras = report.extras_rows(r for r in finished.results.values() if r["table"] == table)
        if extras:
            report.write_extras(extras, finished.folder)
    if finished.paper.not_run:
        write_atomic(finished.folder / "not_run.md", render.not_run(finished.paper.not_run).encode())
    write_summaries(finished)
    figures = draw_figures(finished)
    print(f"\ntables in {finished.folder}; figures: {', '.join(figures) or 'none'}", flush=True)


def write_summaries(finished: Run) -> None:
    """Tables computed of the results, as CSV and Markdown; nothing where the plotting packages are not there."""
    for name, caption in finished.paper.summaries.items():
        with contextlib.suppress(ImportError):
            rows = getattr(figures_of(finished.paper), name)(finished).to_dict("records")
            if rows:
                report.write_summary(name, caption, rows, finished.folder)


def draw_figures(finished: Run) -> list[str]:
    """Draw every figure whose results are there; returns their names."""
    try:
        figures = figures_of(finished.paper)
    except ImportError as error:
        print(f"figures are left out: {error}")
        return []
    drawn = []
    for name in finished.paper.figures:
        figure = getattr(figures, name)(finished)
        if figure is None:
            continue
        for kind in ("png", "pdf"):
            figure.savefig(picture := io.BytesIO(), format=kind, dpi=150, bbox_inches="tight")
            write_atomic(finished.folder / f"{name}.{kind}", picture.getvalue())
        drawn.append(name)
    return drawn


def figures_of(paper: Paper):
    """The module that draws a paper's figures; ImportError where the plotting packages are not there."""
    return importlib.import_module(f"papers.{paper.name}.figures")


def show(finished: Run) -> str:
    """All tables for a terminal of 100 columns."""
    found = ((finished.rows(table), layout) for table, layout in finished.paper.tables.items())
    return "\n\n".join(report.terminal(rows, layout) for rows, layout in found if rows)


def main(argv: list[str]) -> int:
    """Exit status 0: all cells that could run did; 1: a cell failed; 2: wrong usage."""
    status: list[int] = []

    def body(rest: list[str]) -> None:
        args = parse(rest)
        print(describe(args, asked=names_scale(rest)), flush=True)
        finished = run(args)
        if not args.dry_run:
            print(show(finished))
        for p in finished.failed:
            print(f"failed: {p.cell.id}: {p.why}", file=sys.stderr)
        status.append(1 if finished.failed else 0)

    code = cli.guard(body, argv)
    return code or (status[0] if status else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
