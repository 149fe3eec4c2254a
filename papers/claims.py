"""Every number of ours beside the printed one, with what made it: `python -m papers.claims` writes docs/claims.md.

Rendered from the result files under tables/, and a test compares the two, so the page cannot go stale.
"""

from __future__ import annotations

import json
import statistics as stats
import sys
from collections import Counter
from pathlib import Path

from common import cli
from common.store import write_atomic
from papers.cells import ROOT, SCALES, load_paper, papers
from papers.render import stood_for
from papers.report import KEY, TOLERANCE_POINTS, load_cells, load_reported, table_rows
from papers.setups import outdated

PAGE = ROOT.parent / "docs" / "claims.md"
HEAD = f"""# Claims

One row a number that was computed here on real images: the printed number, ours (mean ± standard deviation, how many
students) and what it has over print, what it was run on, and the commit and hardware. First the numbers of a paper that
have a printed one, then its other cells: random images, controls, comparisons of our own. A cell bears the name of the
printed data set, `run on` says what was taken in its place. Numbers of digits (`scale=smoke`) show that everything runs
and claim nothing; they are counted, and lie in `tables/<paper>/smoke`. With published settings a number is `reproduced`
where the means lie within two standard errors of their difference and {TOLERANCE_POINTS:g} point, else it `differs`;
reduced settings or other data are `not comparable`; a printed number of another data set has its name behind it.
Each row's cell is run again by `bash run_all.sh paper=PAPER scale=SCALE only=CELL data=FOLDER`, and leads to its result
file: settings, every seed, seconds of each stage, versions, the command. Figures are drawn from the same files.

Written by `python -m papers.claims`.
"""


def page(tables: Path) -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for name in papers():
        found = {scale: load_cells(tables / name / scale / "cells") for scale in SCALES}
        if any(found.values()):
            parts.append(section(name, found))
    return "\n".join(parts)


def section(name: str, found: dict[str, list]) -> str:
    """One paper: how many numbers it prints and how many were run, then the rows of those on real images."""
    paper, printed = load_paper(name), load_reported(ROOT / name / "reported.csv")
    lines = [f"## {name}", "", f"{len(printed)} printed numbers."]
    beside, alone, drawn = [], [], []
    for scale, cells in found.items():
        if not cells:
            continue
        status = statuses(paper, scale, cells, printed)
        counts = Counter(status[row_key(c)] for c in cells)
        lines.append(f"`{scale}`: {len(cells)} cells run: {', '.join(f'{n} {what}' for what, n in counts.items())}.")
        if scale == "smoke":
            continue
        for c in cells:
            theirs = printed_for(paper, c, printed)
            (beside if theirs else alone).append(row(c, name, scale, status[row_key(c)], theirs))
        drawn += filter(None, (figure(name, scale, *of) for of in paper.figures.items()))
        drawn += evaluations(name, scale)
    made = ("run on", "seconds", "finished", "commit", "hardware")
    lines += listed(("scale", "cell", "printed", "ours", "ours - printed", "status", *made), beside)
    lines += listed(("scale", "cell", "ours", *made), alone)
    lines += listed(("scale", "file", "what it shows"), drawn)
    return "\n".join([*lines, ""])


def listed(heads: tuple[str, ...], rows: list[str]) -> list[str]:
    """A table of Markdown with an empty line before it, or nothing where it has no rows."""
    return ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *rows] if rows else []


def evaluations(paper: str, scale: str) -> list[str]:
    """A line for each file of `python -m common.evaluate` that is committed beside the tables."""
    lines = []
    for path in sorted((ROOT.parent / "tables" / paper / scale / "evaluations").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        values, made = found["accuracies"], found["accuracies_made"]
        mean = f"{stats.fmean(values):.2f}" + (f" ± {stats.stdev(values):.2f}" if len(values) > 1 else "")
        what = f"`common.evaluate` of {Path(found['arguments']['set']).name} by {found['protocol']['name']}"
        told = f"{what}, {found['protocol']['epochs']} epochs: {mean} ({len(values)}), {made['finished'][:10]}"
        told += f", {made['made']['hardware']}"
        lines.append(f"| {scale} | [{path.stem}](../tables/{paper}/{scale}/evaluations/{path.name}) | {told} |")
    return lines


def figure(paper: str, scale: str, name: str, caption: str) -> str:
    """One line of the table of figures, or nothing where it was not drawn."""
    file = f"tables/{paper}/{scale}/{name}.png"
    return f"| {scale} | [{name}](../{file}) | {caption} |" if (ROOT.parent / file).is_file() else ""


def row_key(cell: dict) -> tuple:
    return (*(cell[k] for k in KEY), cell["label_regime"])


def statuses(paper, scale: str, cells: list, printed: list) -> dict[tuple, str]:
    """reproduced, differs or not comparable for each cell; the latter also where the scale has other settings now."""
    comparable, out = paper.scales[scale]["comparable"], {}
    planned = {c.id: c for c in paper.cells_at(scale)}
    for cell in cells:
        layout = paper.tables.get(cell["table"], {})
        chosen = {k: layout[k] for k in ("reported_runs",) if k in layout}
        (found,) = (
            r for r in table_rows(cell["table"], [], [cell], printed, comparable, label_regime="any", **chosen)
            if tuple(r[k] for k in KEY) == tuple(cell[k] for k in KEY)
        )  # fmt: skip
        now = planned.get(cell["cell"])
        other = now is not None and outdated(paper.scales[scale], now, cell)
        out[row_key(cell)] = found["status"] if printed_for(paper, cell, printed) and not other else "not comparable"
    return out


def printed_for(paper, cell: dict, printed: list) -> dict | None:
    """The printed number of a cell, which has the labels of its table: hard labels meet no number of soft ones."""
    regime = paper.tables.get(cell["table"], {}).get("label_regime", "soft")
    if regime not in ("any", cell["label_regime"]):
        return None
    return next((r for r in printed if all(r[k] == cell[k] for k in KEY)), None)


def row(cell: dict, paper: str, scale: str, status: str, theirs: dict | None) -> str:
    """One line of the tables: with the printed number and ours less it, or of a cell without one."""
    number = []
    if theirs:
        text = f"{theirs['value']:g}" + (f" ± {theirs['std']:g}" if theirs["std"] is not None else "")
        other = stood_for(cell["dataset"], cell["run_on"])  # a difference of two data sets would mean nothing
        number = [text + (f" ({other})" if other else ""), "-" if other else f"{cell['mean'] - theirs['value']:+.2f}"]
    count = len(cell["values"])
    ours = f"{cell['mean']:.2f}" + (f" ± {cell['std']:.2f}" if count > 1 else "") + f" ({count})"
    commit, _, changed = (cell.get("commit") or "-").partition("+")
    seconds, commit = sum(cell["seconds"].values()), commit[:10] + ("+" + changed if changed else "")
    file = f"../tables/{paper}/{scale}/cells/{cell['cell'].replace('/', '_')}.json"
    what = (scale, f"[`{cell['cell']}`]({file})", *number[:1], ours, *number[1:], *([status] if theirs else []))
    texts = (*what, cell["run_on"], f"{seconds:.0f}", cell["finished"][:10], commit, cell["hardware"])
    return "| " + " | ".join(texts) + " |"


def main(argv: list[str]) -> None:
    """UsageError for any argument."""
    what = "Writes docs/claims.md, every number of ours beside the printed one, from the committed tables."
    cli.no_arguments(argv, prog="python -m papers.claims", description=what)
    write_atomic(PAGE, page(ROOT.parent / "tables").encode())
    print(f"written: {PAGE.relative_to(ROOT.parent)}")


if __name__ == "__main__":
    sys.exit(cli.guard(main, sys.argv[1:]))
