"""Writes the results of the README, and docs/results.md, from the committed result files: `python -m papers.readme`.

The block between the two markers is generated and a test compares it with the files, so it cannot go stale.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from common import cli
from common.store import write_atomic
from papers.cells import ROOT, SCALES, Paper, load_paper, papers
from papers.claims import printed_for, row_key, statuses
from papers.report import KEY, RANDOM, TOLERANCE_POINTS, load_cells, load_reported
from papers.setups import setup_of

README = ROOT.parent / "README.md"
PAGE = ROOT.parent / "docs" / "results.md"  # which has the tables that the README has no room for
STATUS = f"""\
How many printed numbers have one of ours beside them: at `smoke`, on digits; at `small`, on the same data set, reduced;
at `paper`, as published (reproduced: to two standard errors and {TOLERANCE_POINTS:g} point); no cell: this repository
has no run for it."""
NOTE = (
    "Top-1 accuracy (%) after the last epoch, mean ± deviation (number of students; each on random images has its own"
    " draw)"
)
BEGIN, END = "<!-- results: written by python -m papers.readme -->", "<!-- end of results -->"


def results(tables: Path) -> str:
    """All results that the README shows, as Markdown."""
    more = "the other papers, mixing and all sets under equal recipes: [docs/results.md](docs/results.md)"
    note = f"{NOTE}; {more}; where each number comes from: [docs/claims.md](docs/claims.md)."
    shown = (wmdd(tables), matching(tables, "paper"), matching(tables, "small"))
    return "\n\n".join(filter(None, (status(tables), *shown, note)))


def page(tables: Path) -> str:
    """docs/results.md: what every paper has on real images."""
    head = "# Results on real images\n\nWritten by `python -m papers.readme` from the result files under `tables/`."
    note = f"{NOTE}; where each number comes from: [claims.md](claims.md). What was found in words, and why: the pages"
    pages = (f"[{name}](../papers/{name}/quirks.md)" for name in sorted(papers()))
    note += f" of {', '.join(pages)}, and the notebooks under `tables/<paper>/small/`."
    real = {
        "WMDD": wmdd(tables), "Matching": both(matching, tables), "NRR-DD": both(nrr_dd, tables),
        "Mixing with real images": mixing(tables),
        "All sets under equal recipes": leaderboard(tables),
    }  # fmt: skip
    return "\n\n".join([f"{head} {note}", *(f"## {title}\n\n{table}" for title, table in real.items() if table)]) + "\n"


def both(shown: Callable[[Path, str], str], tables: Path) -> str:
    """What was run at published settings, then at reduced ones."""
    return "\n\n".join(filter(None, (shown(tables, scale) for scale in ("paper", "small"))))


def status(tables: Path) -> str:
    """One row a paper: how many of its printed numbers have one of ours beside them, by scale, and how near that is."""
    heads = ("`paper=`", "printed", "smoke", "small", "within 2 points", "paper", "reproduced", "differs")
    heads = "| " + " | ".join((*heads, "to run", "no cell")) + " |\n" + "|---" * (2 + len(heads)) + "|"
    lines, totals = [], Counter()
    for name in papers():
        paper, printed, beside, words = load_paper(name), load_reported(ROOT / name / "reported.csv"), {}, {}
        for scale in SCALES:
            cells = load_cells(tables / name / scale / "cells")
            pairs = [(c, theirs) for c in cells if (theirs := printed_for(paper, c, printed))]
            beside[scale] = {tuple(theirs[k] for k in KEY): (c, theirs) for c, theirs in pairs}
            words = statuses(paper, scale, cells, printed)  # of the last scale, the published settings
        beside["small"] = {k: (c, theirs) for k, (c, theirs) in beside["small"].items() if on_printed_data(paper, c)}
        distances = [abs(c["mean"] - t["value"]) for c, t in beside["small"].values() if t["metric"] == "accuracy"]
        near = sum(distance <= 2 for distance in distances)
        found = [words[row_key(c)] for c, _ in beside["paper"].values()]
        left = len(planned(paper, printed) - set(beside["paper"]))
        numbers = (
            len(printed), len(beside["smoke"]), len(beside["small"]), near, len(found), found.count("reproduced"),
            found.count("differs"), left, len(printed) - len(found) - left,
        )  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(map(str, numbers)) + " |")
        totals.update(printed=len(printed), small=len(beside["small"]), near=near, paper=len(found), left=left)
        totals.update(accuracies=len(distances))
    sum_of = (
        f"**{totals['printed']} printed numbers; {totals['small']} have one of ours on the same data set, reduced"
        f" ({totals['near']} of {totals['accuracies']} accuracies within 2 points); {totals['paper']} run at published"
        f" settings, {totals['left']} ready to.**"
    )
    return "\n".join([sum_of, "", STATUS, "", heads, *lines])


def planned(paper: Paper, printed: list[dict]) -> set[tuple]:
    """Keys of the printed numbers that have a cell at scale paper."""
    cells = [c for c in paper.cells_at("paper") if setup_of(paper.scales["paper"], c)]
    cells = [c.key() | {"label_regime": c.label_regime} for c in cells]
    return {tuple(theirs[k] for k in KEY) for cell in cells if (theirs := printed_for(paper, cell, printed))}


def on_printed_data(paper: Paper, cell: dict, scale: str = "small") -> bool:
    """Whether a scale runs a cell on the data set that it is printed for, and not on one that stands in for it."""
    run, printed = (paper.scales[s]["data"].get(cell["dataset"], {}).get("dataset") for s in (scale, "paper"))
    return run == printed is not None


def matching(tables: Path, scale: str) -> str:
    """The matching methods on CIFAR-10 at a scale, one row a method; empty before the first result of a method."""
    cells = [c for c in load_cells(tables / "matching" / scale / "cells") if c["dataset"] == "CIFAR-10"]
    if all(c["method"] == RANDOM for c in cells):
        return ""
    printed = {(r["dataset"], r["method"], r["ipc"]): r["value"] for r in load_reported(ROOT / "matching/reported.csv")}
    found = {(c["method"], c["ipc"]): c for c in cells}
    ipcs = sorted({ipc for _, ipc in found})
    heads = ["method", *(f"IPC {ipc}, {whose}" for ipc in ipcs for whose in ("ours", "printed"))]
    after = "the last iterate, of so many iterations (it.)"
    head = f"`paper=matching scale={scale}`, {made_on(cells)}, ConvNet, {after}:"
    lines = [head, "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method in dict.fromkeys(m for m, _ in found):
        row = [method]
        for ipc in ipcs:
            cell = found.get((method, ipc))
            name = "Random" if method == RANDOM else method
            steps = cell and cell["settings"]["distill"].get("iterations")
            row += [(spread(cell) + (f", {steps:,} it." if steps else "")) if cell else "not run"]
            row += [str(printed.get(("CIFAR-10", name, ipc), "-")) + ", other protocol" * (method == RANDOM)]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def mixing(tables: Path) -> str:
    """Gains of natural mixing on CIFAR-10 at scale small, without and with augmentation; empty before the first."""
    cells = [c for c in load_cells(tables / "natural_mixing" / "small" / "cells") if c["dataset"] == "CIFAR-10"]
    found = {(c["table"], c["method"], c["setting"], c["ipc"]): c for c in cells}
    reported = load_reported(ROOT / "natural_mixing" / "reported.csv")
    printed = {(r["method"], r["ipc"]): r["value"] for r in reported if (r["table"], r["metric"]) == ("table1", "gain")}
    heads = ["set", "IPC", "alone", "mixed", "gain", "gain as printed", "alone, augmented", "mixed, augmented"]
    lines = []
    for (table, method, setting, ipc), gain in sorted(found.items(), key=lambda item: (item[0][3] or 0, item[0][1])):
        if (table, setting) != ("table1", "gain"):
            continue
        arms = [("table1", arm) for arm in ("baseline", "mixed")]
        arms += [("controls", arm) for arm in ("DiffAugment", "DiffAugment, mixed")]
        texts = [spread(c) if (c := found.get((t, method, s, ipc))) else "not run" for t, s in arms]
        gains = (f"{gain['mean']:+.1f}", f"{printed.get((method, ipc), math.nan):+.1f}")
        row = [method, str(ipc), *texts[:2], *gains, *texts[2:]]
        lines.append("| " + " | ".join(row).replace("+nan", "-") + " |")
    if not lines:
        return ""
    alone = [c for c in cells if c["table"] == "controls" and c["setting"].endswith("fresh real images alone")]
    real = "; ".join(f"{c['setting']}, IPC {c['ipc']}: {spread(c)}" for c in alone)
    note = f" What the mixture has to beat: {real}." if real else ""
    head = [f"`paper=natural_mixing scale=small`, {made_on(cells)}, ConvNet, the sets above.{note}", ""]
    return "\n".join([*head, "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|", *lines])


def leaderboard(tables: Path) -> str:
    """All sets under one recipe a kind of label, CIFAR-10 at scale small, best first; empty before the first result."""
    cells = load_cells(tables / "survey" / "small" / "cells")
    cells = [c for c in cells if (c["table"], c["dataset"]) == ("leaderboard", "CIFAR-10") and c["ipc"]]
    if not cells:
        return ""
    found = {(c["method"], c["ipc"], c["setting"]): c for c in cells}
    run, regimes = {key[1:] for key in found}, ("HL", "HL, no augmentation", "SL", "SL+KD")
    columns = [(ipc, r) for ipc in sorted({ipc for ipc, _ in run}) for r in regimes if (ipc, r) in run]
    methods = list(dict.fromkeys(c["method"] for c in cells))
    hard = {(m, ipc): c["mean"] for (m, ipc, setting), c in found.items() if setting == "HL"}
    most = Counter(ipc for _, ipc in hard).most_common(1)[0][0] if hard else columns[0][0]
    methods.sort(key=lambda m: -hard.get((m, most), -1))
    words = {"SL": "SL: what a teacher says of each image", "SL+KD": "SL+KD: what it says of each view"}
    words = {"HL": "HL: hard labels"} | {k: text for k, text in words.items() if any(r == k for _, r in columns)}
    said = ", ".join(words.values())
    head = (
        f"`paper=survey scale=small`, {made_on(cells)}: sets under one student recipe for each kind of label, to be"
        f" compared down a column ({said}{taught_by(cells)}), the best under hard labels at IPC {most} first:"
    )
    heads = ["set", *(f"IPC {ipc}, {regime}" for ipc, regime in columns)]
    lines = [head, "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method in methods:
        row = [spread(c) if (c := found.get((method, *column))) else "not run" for column in columns]
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def nrr_dd(tables: Path, scale: str) -> str:
    """Table 1 of NRR-DD on CIFAR-10 with the ConvNet at a scale; empty before the first result."""
    cells = [c for c in load_cells(tables / "nrr_dd" / scale / "cells") if c["table"] in ("table1", "table2")]
    cells = [c for c in cells if (c["dataset"], c["arch"]) == ("CIFAR-10", "ConvNet")]
    if not cells:
        return ""
    what = f"ConvNet{taught_by(cells)}"
    head = f"`paper=nrr_dd scale={scale}`, {made_on(cells)}, {what}:"
    methods = (RANDOM, "SRe2L", "WMDD", "RDED", "NRR-DD")
    table = by_label(cells, methods, printed_in_table1("nrr_dd", "CIFAR-10", "ConvNet"))
    return "\n".join([head, "", *table])


def wmdd(tables: Path) -> str:
    """Table 1's ImageNette column at scale small; empty before the first result."""
    cells = [c for c in load_cells(tables / "wmdd" / "small" / "cells") if c["table"] == "table1"]
    if not cells:
        return ""
    head = f"`paper=wmdd scale=small`, {made_on(cells)}, ResNet-18, a fraction of the iterations:"
    table = by_label(cells, (RANDOM, "SRe2L", "RDED", "WMDD"), printed_in_table1("wmdd", "ImageNette", "ResNet-18"))
    return "\n".join([head, "", *table])


def printed_in_table1(paper: str, dataset: str, arch: str) -> dict[tuple[str, int], str]:
    """The printed numbers of a data set and network, by method and IPC."""
    reported = load_reported(ROOT / paper / "reported.csv")
    mine = (r for r in reported if (r["table"], r["dataset"], r["arch"]) == ("table1", dataset, arch))
    found = {(r["method"], r["ipc"]): f"{r['value']} ± {r['std']}" for r in mine}
    other = {(RANDOM, ipc): f"{text}, other protocol" for (method, ipc), text in found.items() if method == "Random"}
    return found | other


def by_label(cells: list[dict], methods: tuple[str, ...], printed: dict[tuple[str, int], str]) -> list[str]:
    """A table with a row a method and a column for each kind of label that was run at an IPC, the printed one last."""
    found = {}
    for cell in cells:
        kind = cell["setting"] if cell["setting"] in ("DBR", "DBR+LR") else cell["label_regime"]
        found[cell["method"], cell["ipc"], kind] = cell
    kinds = {"soft": "soft", "hard": "hard", "DBR": "two distances", "DBR+LR": "two distances, refined"}
    run = {(ipc, kind) for _, ipc, kind in found}
    columns = {ipc: [k for k in kinds if (ipc, k) in run] for ipc in sorted({ipc for ipc, _ in run})}
    heads = [f"IPC {i}, {words}" for i, own in columns.items() for words in (*map(kinds.get, own), "soft as printed")]
    lines = ["| " + " | ".join(["method", *heads]) + " |", "|---" * (1 + len(heads)) + "|"]
    for method in (m for m in methods if any(m == name for name, _, _ in found)):
        row = [method]
        for ipc, own in columns.items():
            row += [spread(found[method, ipc, kind]) if (method, ipc, kind) in found else "not run" for kind in own]
            row.append(printed.get((method, ipc), "-"))
        lines.append("| " + " | ".join(row) + " |")
    return lines


def taught_by(cells: list[dict]) -> str:
    """The accuracies of the teachers behind some results: ", teacher 75.6 %"."""
    found = sorted({f"{c['teacher_accuracy']:.1f} %" for c in cells if c["teacher_accuracy"]})
    return f", teacher{'s' * (len(found) > 1)} {' or '.join(found)}" if found else ""


def made_on(cells: list[dict]) -> str:
    """What the results were made with; of several wordings for the same data and size, the last one."""
    words = {re.sub(r" \(.*?\)|, from files.*", "", cell["run_on"]): cell["run_on"] for cell in cells}
    return "; ".join(words.values())


def spread(cell: dict) -> str:
    """Mean, deviation and number of students; one student has no deviation."""
    if len(cell["seeds"]) == 1:
        return f"{cell['mean']:.1f} (1)"
    return f"{cell['mean']:.1f} ± {cell['std']:.1f} ({len(cell['seeds'])})"


def updated(text: str, block: str) -> str:
    """README text with the generated block in its place; ValueError when the markers are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{README.name} must hold {BEGIN!r} and {END!r} once each")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    return f"{head}{BEGIN}\n{block}\n{END}{tail}"


def main(argv: list[str]) -> None:
    """UsageError for any argument."""
    what = "Writes the results of README.md and docs/results.md from the committed tables."
    cli.no_arguments(argv, prog="python -m papers.readme", description=what)
    text = README.read_text(encoding="utf-8")
    write_atomic(README, updated(text, results(ROOT.parent / "tables")).encode())
    write_atomic(PAGE, page(ROOT.parent / "tables").encode())


if __name__ == "__main__":
    sys.exit(cli.guard(main, sys.argv[1:]))
