"""Every number of ours beside the printed one, with what made it: `python -m papers.claims` writes docs/claims.md.

Rendered from the result files under tables/, and a test compares the two, so the page cannot go stale.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from common import cli
from common.store import write_atomic
from papers.plan import ROOT, SCALES, load_paper, papers
from papers.render import stood_for
from papers.report import KEY, TOLERANCE_POINTS, load_cells, load_reported, table_rows
from papers.setups import outdated

PAGE = ROOT.parent / "docs" / "claims.md"
HEAD = f"""# Claims

One row a number that was computed here on real images: the printed number, ours (mean ± standard deviation, how many
students), what it was run on, and the commit and hardware. Numbers of digits (`scale=smoke`) show that everything runs
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
    """One paper: how many numbers it prints and how many were run, then a row for each on real images."""
    paper, printed = load_paper(name), load_reported(ROOT / name / "reported.csv")
    lines = [f"## {name}", "", f"{len(printed)} printed numbers."]
    rows = []
    for scale, cells in found.items():
        if not cells:
            continue
        status = statuses(paper, scale, cells, printed)
        counts = Counter(status[row_key(c)] for c in cells)
        lines.append(f"`{scale}`: {len(cells)} cells run: {', '.join(f'{n} {what}' for what, n in counts.items())}.")
        if scale != "smoke":
            rows += [row(c, name, scale, status[row_key(c)], printed_for(paper, c, printed)) for c in cells]
    if rows:
        heads = ("scale", "cell", "printed", "ours", "status", "run on", "seconds", "finished", "commit", "hardware")
        lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *rows]
    drawn = [figure(name, scale, *of) for scale in found if scale != "smoke" for of in paper.figures.items()]
    if any(drawn):
        lines += ["", "| scale | figure | what it shows |", "|---|---|---|", *filter(None, drawn)]
    return "\n".join([*lines, ""])


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
    """One line of the table."""
    number = "-" if theirs is None else f"{theirs['value']:g}"
    number += f" ± {theirs['std']:g}" if theirs and theirs["std"] is not None else ""
    number += f" ({other})" if theirs and (other := stood_for(cell["dataset"], cell["run_on"])) else ""
    count = len(cell["values"])
    ours = f"{cell['mean']:.2f}" + (f" ± {cell['std']:.2f}" if count > 1 else "") + f" ({count})"
    commit, _, changed = (cell.get("commit") or "-").partition("+")
    seconds, commit = sum(cell["seconds"].values()), commit[:10] + ("+" + changed if changed else "")
    file = f"../tables/{paper}/{scale}/cells/{cell['cell'].replace('/', '_')}.json"
    what = (scale, f"[`{cell['cell']}`]({file})", number, ours, status, cell["run_on"])
    texts = (*what, f"{seconds:.0f}", cell["finished"][:10], commit, cell["hardware"])
    return "| " + " | ".join(texts) + " |"


def main(argv: list[str]) -> None:
    """UsageError for any argument."""
    what = "Writes docs/claims.md, every number of ours beside the printed one, from the committed tables."
    cli.no_arguments(argv, prog="python -m papers.claims", description=what)
    write_atomic(PAGE, page(ROOT.parent / "tables").encode())
    print(f"written: {PAGE.relative_to(ROOT.parent)}")


if __name__ == "__main__":
    sys.exit(cli.guard(main, sys.argv[1:]))
