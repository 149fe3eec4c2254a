"""Tables laid out as in a paper, as Markdown, LaTeX and text for a terminal, from rows of `papers.report`.

Printed numbers and ours stand in separate blocks and share neither column nor row.  A layout describes one table:

    {"caption": str, "rows": ["method"], "columns": ["dataset", "ipc"]}    # fields of `KEY`, outermost first
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby

__all__ = ["KEY", "WIDTH", "Row", "extras_markdown", "latex", "markdown", "not_run", "panels_of", "terminal"]

KEY = ("table", "dataset", "method", "setting", "arch", "ipc", "metric")
WIDTH = 100  # characters of a terminal; a wider table is cut into one panel per outermost column
MOST_COLUMNS = 4  # that a status names; more are counted
MOST_ROWS = 6  # the same for rows: the .csv has a line for each number
UNITS = {"accuracy": "accuracy (%)", "time": "time (hours)"}

Row = dict[str, object]
Column = tuple[str, ...]  # its labels, outermost first


def markdown(rows: Sequence[Row], layout: Mapping) -> str:
    """A heading, the printed block, our block and the status of every number; readable as plain text."""
    parts = [f"# {rows[0]['table']}: {layout['caption']}"]
    for block in _blocks(rows, layout):
        parts += [f"## {block.title}", *_panels(block, "**{}**", _pipes), *map(_wrapped, block.remarks)]
    statuses = "\n".join(_wrapped(f"- {line}") for line in _statuses(rows, layout))
    return "\n\n".join([*parts, "## Status", statuses]) + "\n"


def terminal(rows: Sequence[Row], layout: Mapping) -> str:
    """The same without markup, at most `WIDTH` characters wide unless one panel alone is wider."""
    parts = [_wrapped(f"{rows[0]['table']}: {layout['caption']}")]
    for block in _blocks(rows, layout):
        parts += [f"=== {block.title} ===", *_panels(block, "{}", _plain), *map(_wrapped, block.remarks)]
    return "\n\n".join([*parts, "\n".join(map(_wrapped, _statuses(rows, layout)))]) + "\n"


def latex(rows: Sequence[Row], layout: Mapping) -> str:
    """A floating table of one booktabs tabular a block, each as wide as in the paper."""
    parts = [
        "% needs \\usepackage{booktabs} and \\usepackage{graphicx}\n\\begin{table*}\n\\centering",
        f"\\caption{{{_tex(layout['caption'])}}}",
    ]
    for block in _blocks(rows, layout):
        parts += [f"\\medskip\n{_tex(block.title)}\\\\[2pt]", _tabular(block)]
        parts += [f"\n{{\\footnotesize {_tex(remark)}\\par}}" for remark in block.remarks]
    return "\n".join([*parts, "\\end{table*}"]) + "\n"


def extras_markdown(rows: Sequence[Row]) -> str:
    """What the paper does not print, one panel a data set, random real images beside each method at the same IPC."""
    intro = (
        "All numbers are ours: student accuracy (%) on the same images under soft and hard labels, how far soft is over"
        " random real images under the same recipe, stored bytes, time of all stages (also those shared with other"
        " cells) and peak memory. Times depend on machine and load: those of different runs do not compare."
    )
    if any(row["soft_best"] is not None for row in rows):
        intro += " Best of six: of the epochs that RDED's code tests, chosen on test images as in print."
    parts = [f"# {rows[0]['table']}: beyond the paper", _wrapped(intro)]
    several = len({row["arch"] for row in rows}) > 1
    names = ("method", "setting", "arch") if several else ("method", "setting")
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        mine = sorted((row for row in rows if row["dataset"] == dataset), key=lambda row: row["ipc"] or 0)
        grid = [["method", "IPC", "soft", "best of six", "hard", "over random", "images", "labels", "time", "memory"]]
        for row in mine:
            stds = {"soft": row["soft_std"], "soft_best": None, "hard": row["hard_std"]}
            accuracies = ["-" if row[name] is None else _number(row[name], std, 1) for name, std in stds.items()]
            gain = "-" if row["over_random"] is None else f"{round(row['over_random'], 1) + 0.0:+.1f}"  # never -0.0
            sizes = [_size(row[f"{name}_bytes"]) for name in ("image", "label", "peak_memory")]
            line = [_label(row, names), str(row["ipc"] or "-"), *accuracies, gain, *sizes[:2]]
            grid.append([*line, _duration(row["seconds"]), sizes[2]])
        if all(row["soft_best"] is None for row in mine):
            grid = [line[:3] + line[4:] for line in grid]
        where = "; ".join(dict.fromkeys(row["run_on"] for row in mine))
        parts += [f"## {dataset} ({where})", *panels_of(grid, keys=2)]
    return "\n\n".join(parts) + "\n"


def not_run(reasons: Mapping[str, str]) -> str:
    """What a paper prints and no table or figure here has, and why."""
    lines = [_wrapped(f"- {name}: {why}") for name, why in reasons.items()]
    return "\n".join(["# not run: tables and figures of the paper that have no place here\n", *lines]) + "\n"


def stood_for(dataset: str, run_on: str) -> str:
    """The printed data set where a result was made with another one, else nothing: "ImageNette" for digits."""
    used = re.split(r",| kept as | \(| at ", run_on)[0]  # e.g. of "Imagenette (224 px files), 128 px"
    return "" if _letters(used) == _letters(dataset) else dataset


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


# Blocks


@dataclass(frozen=True)
class Block:
    """One laid-out table, printed or ours; `texts` holds its numbers by row and column."""

    title: str
    corner: str
    remarks: list[str]
    rows: list[str]
    columns: list[Column]
    texts: dict[tuple[str, Column], str]

    def body(self, columns: Sequence[Column]) -> list[list[str]]:
        """Row label and texts of these columns, without rows that are empty there."""
        lines = [[row, *(self.texts.get((row, column), "-") for column in columns)] for row in self.rows]
        return [line for line in lines if set(line[1:]) != {"-"}]


def _blocks(rows: Sequence[Row], layout: Mapping) -> list[Block]:
    unknown = [name for name in (*layout["rows"], *layout["columns"]) if name not in KEY]
    if unknown:
        raise ValueError(f"the layout of {rows[0]['table']} names {', '.join(unknown)}; allowed are {', '.join(KEY)}")
    blocks = [_block(rows, layout, "reported", "Printed in the paper", _notes(rows, layout))]
    ours = [row for row in rows if row["ours"] is not None]
    title = f"Ours ({'; '.join(dict.fromkeys(row['run_on'] for row in ours))}"
    if others := list(dict.fromkeys(filter(None, (stood_for(row["dataset"], row["run_on"]) for row in ours)))):
        title += f" in place of {', '.join(others)}"
    if all(row["status"].startswith("not comparable") for row in ours):
        title += ", not comparable with the printed numbers"
    seeds = " or ".join(str(count) for count in sorted({row["seeds"] for row in ours}))
    remark = f"Mean ± standard deviation over {seeds} seeds." if seeds != "1" else "One value each."
    blocks.append(_block(rows, layout, "ours", f"{title})", [remark, *_teachers(ours, layout)]))
    return [block for block in blocks if block.texts]


def _block(rows: Sequence[Row], layout: Mapping, field: str, title: str, remarks: list[str]) -> Block:
    texts: dict[tuple[str, Column], str] = {}
    for row in rows:
        if row[field] is None:
            continue
        place = _label(row, layout["rows"]), _column(row, layout["columns"])
        if place in texts:
            raise ValueError(f"the layout of {row['table']} puts two numbers at {place[0]}, {' '.join(place[1])}")
        texts[place] = _number(row[field], row[f"{field}_std"], _decimals(rows, row["metric"]))
    used = {column for _, column in texts}
    columns = [column for column in _columns(rows, layout["columns"]) if column in used]
    corner = ", ".join(layout["rows"])
    return Block(title, corner, remarks, list(dict.fromkeys(label for label, _ in texts)), columns, texts)


def _columns(rows: Sequence[Row], names: Sequence[str]) -> list[Column]:
    """Columns in order of first appearance level by level, IPC by size."""
    seen = {name: list(dict.fromkeys(row[name] for row in rows)) for name in names}

    def rank(row: Row) -> list[int]:
        return [(row[name] or 0) if name == "ipc" else seen[name].index(row[name]) for name in names]

    return list(dict.fromkeys(_column(row, names) for row in sorted(rows, key=rank)))


def _column(row: Row, names: Sequence[str]) -> Column:
    def label(name: str, value: object) -> str:
        if not value:
            return "no IPC" if name == "ipc" else "any"  # e.g. all images; random images, which know no feature layer
        return f"IPC {value}" if name == "ipc" else UNITS.get(value, value)

    return tuple(label(name, row[name]) for name in names)


def _label(row: Row, names: Sequence[str]) -> str:
    return ", ".join(str(row[name]) for name in names if row[name])


def _notes(rows: Sequence[Row], layout: Mapping) -> list[str]:
    printed = [row for row in rows if row["reported"] is not None]
    remarks = []
    for note in dict.fromkeys(row["note"] for row in printed if row["note"]):
        noted = [row for row in printed if row["note"] == note]
        labels: dict[str, list[str]] = {}
        for row in noted:
            labels.setdefault(_label(row, layout["rows"]), []).append(" ".join(_column(row, layout["columns"])))
        whole = Counter(_label(row, layout["rows"]) for row in printed)
        texts = [
            label if len(columns) == whole[label] or len(columns) > MOST_COLUMNS else f"{label} ({', '.join(columns)})"
            for label, columns in labels.items()
        ]
        remarks.append(f"{'All' if len(noted) == len(printed) else '; '.join(texts)}: {note}.")
    return remarks


def _teachers(rows: Sequence[Row], layout: Mapping) -> list[str]:
    """Which numbers have which teacher, where one of the same settings was trained more than once."""
    made: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        for stage in row["teachers"]:
            made.setdefault(stage["key"], {}).setdefault(stage["finished"], []).append(row)
    remarks = []
    for found in (found for found in made.values() if len(found) > 1):
        places = [[(_label(row, layout["rows"]), row) for row in own] for own in found.values()]
        texts = []
        for own in places:
            others = {label for other in places if other is not own for label, _ in other}
            columns: dict[str, list[str]] = {}
            for label, row in own:
                columns.setdefault(label, []).append(" ".join(_column(row, layout["columns"])))
            named = [f"{label} ({', '.join(c)})" if label in others else label for label, c in columns.items()]
            texts.append(f"one of {own[0][1]['teacher_accuracy']:.1f} % behind {'; '.join(named)}")
        remarks.append(f"Teachers of the same settings, which the deviations leave out: {'. And '.join(texts)}.")
    return remarks


def _statuses(rows: Sequence[Row], layout: Mapping) -> list[str]:
    """A line a status: how many numbers have it, and which rows of the table, with their columns where they differ.

    A row is named by its columns where others of it have another status, or by how many they are; one that has numbers
    needs none for having others that were not run.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    for row in sorted(rows, key=lambda row: row["ours"] is None):
        columns = groups.setdefault(row["status"], {}).setdefault(_label(row, layout["rows"]), [])
        columns.append(" ".join(_column(row, layout["columns"])))
    own = {row["status"] for row in rows if row["ours"] is not None}
    lines = []
    for status, found in groups.items():
        others = [g for other, g in groups.items() if other != status and (other in own or status not in own)]
        clauses: dict[str, list[str]] = {}  # columns -> labels
        for label, columns in found.items():
            split = any(label in other for other in others)
            named = ", ".join(columns) if len(columns) <= MOST_COLUMNS else f"{len(columns)} columns"
            clauses.setdefault(named if split else "", []).append(label)
        whole = clauses.pop("", None)
        texts = [_listed(whole)] if whole else []
        texts += [f"{columns} of {_listed(labels)}" for columns, labels in clauses.items()]
        lines.append(f"{status}: {sum(map(len, found.values()))} ({'; and '.join(texts)})")
    return lines


def _listed(labels: list[str]) -> str:
    """Rows by name; of many the first ones and how many more there are."""
    more = len(labels) - MOST_ROWS
    return "; ".join(labels) if more <= 1 else f"{'; '.join(labels[:MOST_ROWS])}; and {more} more rows"


# Numbers


def _decimals(rows: Sequence[Row], metric: str) -> int:
    """As many decimals as the paper prints for this metric in this table; else three for losses below 1."""
    own = [row for row in rows if row["metric"] == metric]
    printed = [row["reported"] for row in own if row["reported"] is not None]
    values = [row[k] for row in own for k in ("reported", "ours") if row[k] is not None]
    if metric != "accuracy" and all(float(value).is_integer() for value in values):
        return 0  # years, counts
    small = "accuracy" not in metric and all(abs(row["ours"]) <= 1 for row in own if row["ours"] is not None)
    return max((-Decimal(repr(value)).as_tuple().exponent for value in printed), default=3 if small else 1)


def _number(value: float, std: float | None, decimals: int) -> str:
    if 0 < abs(value) < 10**-decimals:
        return f"{value:.1g}" + (f" ± {std:.1g}" if std else "")  # hours of a run that takes seconds
    return f"{value:.{decimals}f}" + (f" ± {std:.{decimals}f}" if std is not None else "")


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def _duration(seconds: float) -> str:
    for unit, scale in (("h", 3600), ("min", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.1f} {unit}"
    return f"{seconds:.0f} s"


# Text


def _wrapped(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="  " if text.startswith("- ") else "", break_on_hyphens=False)


def _panels(
    block: Block, heading: str, draw: Callable[[list[list[str]]], str], above: Column = (),
    columns: Sequence[Column] | None = None,
) -> list[str]:  # fmt: skip
    """The block as one text, or where it is wider than `WIDTH` as one with a heading for each outermost column.

    above: the labels that stand in the heading already; columns: those below them, all where None.
    """
    columns, level = columns or block.columns, len(above)
    whole = draw([[block.corner, *(" ".join(c[level:]) for c in columns)], *block.body(columns)])
    if len(whole.splitlines()[0]) <= WIDTH or len(columns[0]) - level == 1:
        return [heading.format(" ".join(above)), whole] if above else [whole]
    panels = []
    for outermost, group in groupby(columns, key=lambda column: column[level]):
        panels += _panels(block, heading, draw, (*above, outermost), list(group))
    return panels


def _aligned(grid: list[list[str]]) -> list[list[str]]:
    """Texts padded to the width of their column, the first to the left, the others to the right."""
    widths = [max(len(text) for text in column) for column in zip(*grid, strict=True)]
    return [
        [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        for line in grid
    ]


def _plain(grid: list[list[str]]) -> str:
    return "\n".join("  ".join(line).rstrip() for line in _aligned(grid))


def _pipes(grid: list[list[str]]) -> str:
    header, *body = _aligned(grid)
    rule = ["-" * len(header[0]), *("-" * (len(text) - 1) + ":" for text in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *body))


def panels_of(grid: list[list[str]], keys: int) -> list[str]:
    """A grid as Markdown, its columns in as many pieces as `WIDTH` asks for, the first `keys` columns before each."""
    pieces, columns = [], list(range(keys))
    for column in range(keys, len(grid[0])):
        wider = [*columns, column]
        if len(columns) > keys and len(_pipes([[line[c] for c in wider] for line in grid]).splitlines()[0]) > WIDTH:
            pieces.append(columns)
            wider = [*range(keys), column]
        columns = wider
    return [_pipes([[line[c] for c in columns] for line in grid]) for columns in (*pieces, columns)]


def _tabular(block: Block) -> str:
    levels = len(block.columns[0])
    lines = [f"\\begin{{tabular}}{{l{'r' * len(block.columns)}}}", "\\toprule"]
    for level in range(levels - 1):
        spans, rules, first = [], [], 2
        for prefix, group in groupby(block.columns, key=lambda column: column[: level + 1]):
            width = len(list(group))
            spans.append(f"\\multicolumn{{{width}}}{{c}}{{{_tex(prefix[-1])}}}")
            rules.append(f"\\cmidrule(lr){{{first}-{first + width - 1}}}")
            first += width
        lines += [f" & {' & '.join(spans)} \\\\", " ".join(rules)]
    lines += [" & ".join(map(_tex, [block.corner, *(column[-1] for column in block.columns)])) + " \\\\", "\\midrule"]
    lines += [" & ".join(map(_tex, line)) + " \\\\" for line in block.body(block.columns)]
    tabular = "\n".join([*lines, "\\bottomrule", "\\end{tabular}"])
    return f"\\resizebox{{\\textwidth}}{{!}}{{%\n{tabular}}}" if len(block.columns) > 8 else tabular


def _tex(text: str) -> str:
    special = {character: f"\\{character}" for character in "&%$#_{}"}
    special |= {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$"}
    return "".join(special.get(character, character) for character in text)
