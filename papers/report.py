"""Results beside printed numbers: joins the cells of a run with what a paper reports, and writes its tables.

A printed number and a cell meet when all of `KEY` agree.  In the tidy CSV they have columns of their own; in the tables
laid out as in the paper (`papers.render`) they stand in separate blocks and share neither column nor row.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from common.store import write_atomic
from common.views import Recipe
from papers.render import KEY, Row, extras_markdown, latex, markdown, panels_of, terminal

__all__ = [
    "COLUMNS", "EXTRAS_COLUMNS", "KEY", "RANDOM", "REPORTED_COLUMNS", "TOLERANCE_POINTS", "extras_rows", "load_cells",
    "load_reported", "table_rows", "terminal", "write_extras", "write_table",
]  # fmt: skip

REPORTED_COLUMNS = (*KEY, "value", "std", "note")
COLUMNS = (*KEY, "reported", "reported_std", "ours", "ours_std", "seeds", "status")
EXTRAS_COLUMNS = (
    "table", "dataset", "method", "setting", "arch", "ipc", "soft", "soft_std", "soft_best", "hard", "hard_std",
    "random_soft", "random_hard", "over_random", "seeds", "image_bytes", "label_bytes", "seconds", "peak_memory_bytes",
    "run_on",
)  # fmt: skip
CELL_FIELDS = ("cell", *KEY, "label_regime", "values", "seeds", "mean", "std", "run_on", "settings")

OLDER = re.compile(r"^(\w+) \((\d+ px) files\), (\d+ px)$")  # how the first results named the same data
RANDOM = "Random real (ours)"  # the method name of cells that use random real images under the same recipe
TOLERANCE_POINTS = 1.0  # percentage points allowed beyond two standard errors: other hardware, libraries, teachers


# Reading


def load_reported(path: str | Path) -> list[Row]:
    """The printed numbers of a paper: rows of `REPORTED_COLUMNS`, ipc int or None, value float, std float or None.

    ValueError names the file and line of a malformed, impossible (accuracy outside 0 to 100, negative std) or repeated
    number.
    """
    rows, lines = [], {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if tuple(header) != REPORTED_COLUMNS:
            raise ValueError(f"{path}, line 1: columns are {','.join(header)}; expected {','.join(REPORTED_COLUMNS)}")
        for record in reader:
            where = f"{path}, line {reader.line_num}"
            if len(record) != len(header):
                raise ValueError(f"{where}: {len(record)} values; expected {len(header)}")
            row = _checked(dict(zip(header, record, strict=True)), where)
            first = lines.setdefault(_key(row), reader.line_num)
            if first != reader.line_num:
                raise ValueError(f"{where}: repeats the number of line {first} ({', '.join(record[:7])})")
            rows.append(row)
    return rows


def _checked(row: Row, where: str) -> Row:
    for name, kind in (("ipc", int), ("value", float), ("std", float)):
        text = row[name]
        try:
            row[name] = kind(text) if text or name == "value" else None
        except ValueError:
            raise ValueError(f"{where}: {name} is {text!r}; expected a number") from None
    for name in ("table", "method", "metric"):
        if not row[name]:
            raise ValueError(f"{where}: {name} is empty")
    if row["ipc"] is not None and row["ipc"] < 1:
        raise ValueError(f"{where}: ipc is {row['ipc']}; expected 1 or more")
    if not math.isfinite(row["value"]) or (row["metric"] == "accuracy" and not 0 <= row["value"] <= 100):
        raise ValueError(f"{where}: value is {row['value']}; expected a finite number, 0 to 100 for an accuracy")
    if row["std"] is not None and not 0 <= row["std"] < math.inf:
        raise ValueError(f"{where}: std is {row['std']}; expected 0 or more")
    return row


def load_cells(folder: str | Path) -> list[Row]:
    """Every cell result `*.json` below `folder`, in order of path; none when the folder is missing.

    ValueError names a file that is not a complete cell, or two files that hold the same one.
    """
    cells, paths = [], {}
    for path in sorted(Path(folder).rglob("*.json")):
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); delete it and run its cell again") from error
        missing = [name for name in CELL_FIELDS if not isinstance(cell, dict) or name not in cell]
        if missing:
            raise ValueError(f"{path} is not a result of a cell: it lacks {', '.join(missing)}")
        if not cell["values"] or not isinstance(cell["mean"], int | float) or not math.isfinite(cell["mean"]):
            raise ValueError(f"{path}: mean is {cell['mean']} over {len(cell['values'])} seeds; expected a finite mean")
        first = paths.setdefault((_key(cell), cell["label_regime"]), path)
        if first != path:
            raise ValueError(f"{path} and {first} hold the same cell")
        cell["run_on"] = OLDER.sub(r"\1, \3, from files of \2", cell["run_on"])
        cells.append(cell if len(cell["values"]) > 1 else cell | {"std": None})  # one value has no spread
    return cells


def _key(item: Mapping) -> tuple:
    return tuple(item[name] for name in KEY)


# Joining


def table_rows(
    table_id: str,
    planned_cells: Iterable[Mapping],
    results: Iterable[Mapping],
    reported: Iterable[Mapping],
    comparable: bool,
    *,
    reported_runs: int = 1,
    label_regime: str = "soft",
) -> list[Row]:
    """One row for each number of a table that is printed, planned or measured: `COLUMNS`, note and run_on.

    planned_cells hold `KEY` and, where a cell cannot or did not run, `why`.  results come from `load_cells`; only those
    of `label_regime`, behind the printed numbers ("any": all of them), belong in the table.  comparable says that the
    run used the published settings.  reported_runs is the number of runs behind a printed std; 1 where that is already
    a standard error, as in Table 3 of WMDD.  seeds counts our runs.  Rows come in the printed order, then as planned.
    """

    def of_table(items: Iterable[Mapping]) -> dict[tuple, Mapping]:
        regimes = ("any", label_regime)  # printed numbers have none
        return {
            _key(item): item for item in items
            if item["table"] == table_id and (label_regime == "any" or item.get("label_regime", "any") in regimes)
        }  # fmt: skip

    printed, planned, ours = of_table(reported), of_table(planned_cells), of_table(results)
    rows = []
    for key in dict.fromkeys([*printed, *planned, *ours]):
        number, cell = printed.get(key, {}), ours.get(key, {})
        row = dict(zip(KEY, key, strict=True), reported=number.get("value"), reported_std=number.get("std"))
        row |= {"ours": cell.get("mean"), "ours_std": cell.get("std"), "seeds": len(cell.get("values", ()))}
        why = (planned[key].get("why") or "no result yet") if key in planned else "no cell planned"
        row["status"] = _status(row, comparable, reported_runs) if cell else f"not run: {why}"
        row |= {"teachers": [stage for stage in cell.get("stages", ()) if stage["stage"] == "teacher"]}
        row |= {"teacher_accuracy": cell.get("teacher_accuracy")}
        rows.append(row | {"note": number.get("note", ""), "run_on": cell.get("run_on", "")})
    return rows


def _status(row: Row, comparable: bool, reported_runs: int) -> str:
    """reproduced: the means differ by at most two standard errors of their difference and `TOLERANCE_POINTS`."""
    if not comparable or row["reported"] is None or row["metric"] not in ("accuracy", "gain"):
        return "not comparable"
    ours, theirs = (row["ours_std"] or 0) ** 2 / row["seeds"], (row["reported_std"] or 0) ** 2 / reported_runs
    allowed = 2 * math.sqrt(ours + theirs) + TOLERANCE_POINTS
    return "reproduced" if abs(row["ours"] - row["reported"]) <= allowed else "differs"


def _recipe(pair: Mapping[str, Mapping]) -> str:
    """How the students of a cell are trained, soft labels before others; random images have no patches to shuffle.

    What stands at its default is left out: an older result lacks the fields of a recipe that came later.
    """
    settings = (pair.get("soft") or next(iter(pair.values()))).get("settings", {})
    recipe, usual = settings.get("student") or settings.get("protocol") or {}, asdict(Recipe())
    told = {k: v for k, v in recipe.items() if k not in ("name", "shuffle", "labels") and v != usual.get(k)}
    return json.dumps(told, sort_keys=True)


def extras_rows(cells: Iterable[Mapping]) -> list[Row]:
    """What the paper does not print: one row of `EXTRAS_COLUMNS` for the images of each accuracy cell.

    Accuracies (percent) of the same images under soft and hard labels, of random real images at the same table,
    dataset, network, IPC and recipe of students, and over_random, the gain over these under soft labels; soft_best,
    the mean of each student's best of six epochs, chosen on test images as RDED's code does; bytes of images and
    labels; seconds summed over the stages of the cell and its highest memory peak.
    """
    regimes: dict[tuple, dict[str, Mapping]] = {}
    for cell in cells:
        if cell["metric"] == "accuracy":
            regimes.setdefault(_key(cell), {})[cell["label_regime"]] = cell
    random = {(t, d, a, i, _recipe(p)): p for (t, d, method, _, a, i, _), p in regimes.items() if method == RANDOM}
    rows = []
    for (table, dataset, method, setting, arch, ipc, _), pair in regimes.items():
        soft, hard = pair.get("soft", {}), pair.get("hard", {})
        cell = soft or hard
        base = random.get((table, dataset, arch, ipc, _recipe(pair)), {}) if method != RANDOM else {}
        random_soft, random_hard = (base.get(regime, {}).get("mean") for regime in ("soft", "hard"))
        row = {"table": table, "dataset": dataset, "method": method, "setting": setting, "arch": arch, "ipc": ipc}
        row |= {"soft": soft.get("mean"), "soft_std": soft.get("std")}
        best = soft.get("best") or []
        row |= {"soft_best": sum(best) / len(best) if best else None}
        row |= {"hard": hard.get("mean"), "hard_std": hard.get("std")}
        row |= {"random_soft": random_soft, "random_hard": random_hard, "seeds": len(cell["values"])}
        row["over_random"] = soft["mean"] - random_soft if soft and random_soft is not None else None
        row |= {f"{kind[:-1]}_bytes": cell.get("bytes", {}).get(kind) for kind in ("images", "labels")}
        row |= {"seconds": sum(cell.get("seconds", {}).values()), "peak_memory_bytes": cell.get("peak_memory_bytes")}
        rows.append(row | {"run_on": cell["run_on"]})
    return rows


# Writing


def write_table(rows: Sequence[Row], layout: Mapping, folder: str | Path) -> list[Path]:
    """Writes <table>.csv (tidy), .md and .tex (laid out as in the paper) of `table_rows`; returns their paths.

    ValueError when the rows are not those of one table, or the layout does not give each number a place of its own.
    """
    name = _table_id(rows)
    texts = {"csv": _csv(COLUMNS, rows), "md": markdown(rows, layout), "tex": latex(rows, layout)}
    return _write(folder, name, texts)


def write_extras(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Writes <table>_extras.csv and .md of the `extras_rows` of one table; returns their paths."""
    name = f"{_table_id(rows)}_extras"
    return _write(folder, name, {"csv": _csv(EXTRAS_COLUMNS, rows), "md": extras_markdown(rows)})


def write_summary(name: str, caption: str, rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Writes <name>.csv and .md of computed rows; in the latter a column "x std" stands behind ± in that of "x".

    The first two columns name a row.
    """
    columns = list(rows[0])
    shown = [c for c in columns if not c.endswith(" std")]

    def text(row: Row, column: str) -> str:
        value, std = row.get(column), row.get(f"{column} std")
        if value is None or value != value:  # nan
            return "-"
        if not isinstance(value, (int, float)):
            return str(value)
        spread = f" ± {std:.1f}" if std is not None and std == std else ""
        return f"{value:,.{0 if column in whole else 1}f}{spread}"

    numbers = {c: [v for row in rows if isinstance(v := row.get(c), (int, float)) and v == v] for c in shown}
    counts = {c: values for c, values in numbers.items() if all(float(v).is_integer() for v in values)}
    whole = {c for c, values in counts.items() if max(values, default=0) > 100 or all(type(v) is int for v in values)}
    grid = [shown, *([text(row, column) for column in shown] for row in rows)]
    lines = [f"# {name}: {caption}", *panels_of(grid, keys=2)]
    given = [{c: None if row.get(c) != row.get(c) else row.get(c) for c in columns} for row in rows]
    return _write(folder, name, {"csv": _csv(columns, given), "md": "\n\n".join(lines) + "\n"})


def _table_id(rows: Sequence[Row]) -> str:
    tables = sorted({row["table"] for row in rows})
    if len(tables) != 1:
        raise ValueError(f"rows of {', '.join(tables) or 'no table'}; expected those of one table")
    return tables[0]


def _csv(columns: Sequence[str], rows: Sequence[Row]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()})
    return file.getvalue()


def _write(folder: str | Path, name: str, texts: Mapping[str, str]) -> list[Path]:
    paths = [Path(folder) / f"{name}.{kind}" for kind in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_atomic(path, text.encode())
    return paths
