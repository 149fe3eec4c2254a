"""Printed numbers, their join with our cells, and the tables written from both.

Counting rule of WMDD's reported.csv: each accuracy and each time of Tables 1-5 is one number (118), its error bar none.
Of the text count the accuracies of Section 5.2 and the values given for lambda and K (10); the protocol (IPC, number of
runs, share held out) does not.
"""

import csv
import functools
import json
import math
from collections import Counter
from pathlib import Path

import pytest

from papers import cells, render, report

WMDD = Path(report.__file__).parent / "wmdd" / "reported.csv"
HEADER = ",".join(report.REPORTED_COLUMNS)
LAYOUT = {"caption": "Methods & budgets", "rows": ["method"], "columns": ["dataset", "ipc"]}


def cell(method="WMDD", ipc=10, mean=50.0, std=1.0, seeds=4, **other):
    values = {"table": "table1", "dataset": "ImageNette", "method": method, "setting": "", "arch": "ResNet-18"}
    values |= {"ipc": ipc, "metric": "accuracy", "label_regime": "soft", "values": [mean] * seeds, "mean": mean}
    values |= {"cell": f"{values['table']}/{method}/{ipc}", "seeds": list(range(seeds)), "settings": {}}
    return values | {"std": std, "run_on": "digits 32 px"} | other


def printed(method="WMDD", ipc=10, value=50.0, std=None, note="", **other):
    identity = {name: cell(method, ipc)[name] for name in report.KEY}
    return identity | {"value": value, "std": std, "note": note} | other


def rows_of(cells=(), numbers=(), planned=(), comparable=True, **options):
    return report.table_rows("table1", planned, cells, numbers, comparable, **options)


def written(folder, text):
    path = folder / "reported.csv"
    path.write_text(f"{text}\n", encoding="utf-8")
    return path


# reported.csv


def test_every_number_of_the_paper_is_there_once():
    counts = Counter(row["table"] for row in report.load_reported(WMDD))
    assert counts == {"table1": 68, "table2": 20, "table3": 12, "table4": 12, "table5": 6, "text": 10}


def test_numbers_that_the_paper_prints_twice_agree():
    numbers = report.load_reported(WMDD)

    def find(**wanted):
        (row,) = [row for row in numbers if all(row[name] == value for name, value in wanted.items())]
        return row["value"]

    def headline(dataset, ipc):
        return find(table="table1", method="WMDD", dataset=dataset, ipc=ipc)

    for dataset in ("ImageNette", "Tiny ImageNet", "ImageNet-1K"):
        assert find(table="text", method="WMDD", dataset=dataset) == headline(dataset, 100)
        assert find(table="text", method="Full data", dataset=dataset) > headline(dataset, 100)
        whole = find(table="table3", setting="Wass.+PCBN", dataset=dataset)
        assert whole == pytest.approx(headline(dataset, 10), abs=0.11)
    for ipc in (1, 10, 50):
        assert find(table="table4", method="WMDD", ipc=ipc, metric="accuracy") == headline("Tiny ImageNet", ipc)
    assert find(table="table5", setting="layer 18") == headline("Tiny ImageNet", 10)


def test_error_bars_stand_where_the_paper_prints_them():
    missing = Counter(row["table"] for row in report.load_reported(WMDD) if row["std"] is None)
    assert missing == {"table1": 4, "table2": 20, "table4": 12, "table5": 6, "text": 10}
    assert {row["method"] for row in report.load_reported(WMDD) if row["note"].startswith("double dagger")} == {"CDA"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("table1,Nette,WMDD,,ResNet-18,10,accuracy,64,8,0.4,", "line 3: 11 values; expected 10"),
        ("table1,Nette,WMDD,,ResNet-18,10,accuracy,64.8±0.4,,", "line 3: value is '64.8±0.4'; expected a number"),
        ("table1,Nette,WMDD,,ResNet-18,10,accuracy,,0.4,", "line 3: value is ''"),
        ("table1,Nette,WMDD,,ResNet-18,10,accuracy,nan,,", "line 3: value is nan; expected a finite"),
        ("table1,Nette,WMDD,,ResNet-18,10,accuracy,648,0.4,", "line 3: value is 648.0; .* 0 to 100"),
        ("table1,Nette,WMDD,,ResNet-18,10,accuracy,64.8,-0.4,", "line 3: std is -0.4; expected 0 or more"),
        ("table1,Nette,WMDD,,ResNet-18,ten,accuracy,64.8,,", "line 3: ipc is 'ten'; expected a number"),
        ("table1,Nette,WMDD,,ResNet-18,0,accuracy,64.8,,", "line 3: ipc is 0; expected 1 or more"),
        ("table1,Nette,,,ResNet-18,10,accuracy,64.8,,", "line 3: method is empty"),
        ("table1,Nette,DM,,ResNet-18,1,accuracy,1.5,,", r"line 3: repeats the number of line 2 \(table1, Nette, DM"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = written(tmp_path, f"{HEADER}\ntable1,Nette,DM,,ResNet-18,1,accuracy,1.4,0.1,\n{line}")
    with pytest.raises(ValueError, match=message):
        report.load_reported(path)


def test_wrong_columns_are_named(tmp_path):
    with pytest.raises(ValueError, match="line 1: columns are table,value; expected table,dataset"):
        report.load_reported(written(tmp_path, "table,value"))


# Cells


def test_cells_are_found_in_nested_folders(tmp_path):
    for ipc in (1, 10):
        path = tmp_path / "table1" / "wmdd" / f"{ipc}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(cell(ipc=ipc)), encoding="utf-8")
    assert [found["ipc"] for found in report.load_cells(tmp_path)] == [1, 10]
    assert report.load_cells(tmp_path / "nothing") == []


def test_one_value_has_no_spread(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(cell(seeds=1, std=0.0)), encoding="utf-8")
    (found,) = report.load_cells(tmp_path)
    assert found["std"] is None and rows_of([found])[0]["ours_std"] is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"table": "table1"', "a.json is not JSON .* run its cell again"),
        ('{"table": "table1"}', "a.json is not a result of a cell: it lacks cell, dataset, method"),
        ("[]", "a.json is not a result of a cell: it lacks cell, table"),
        (json.dumps(cell(mean=math.nan)), "a.json: mean is nan over 4 seeds"),
        (json.dumps(cell(seeds=0)), "a.json: mean is 50.0 over 0 seeds"),
    ],
)
def test_a_damaged_cell_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        report.load_cells(tmp_path)


def test_two_files_of_one_cell_are_refused_but_other_labels_are_another_cell(tmp_path):
    for name, regime in (("a", "soft"), ("b", "hard")):
        (tmp_path / f"{name}.json").write_text(json.dumps(cell(label_regime=regime)), encoding="utf-8")
    assert len(report.load_cells(tmp_path)) == 2
    (tmp_path / "c.json").write_text(json.dumps(cell()), encoding="utf-8")
    with pytest.raises(ValueError, match=r"c.json and .*a.json hold the same cell"):
        report.load_cells(tmp_path)


# Joining


def test_rows_join_on_the_whole_identity():
    other = printed(ipc=1, value=40.0, std=0.6, note="dagger")
    rows = rows_of([cell(), cell(report.RANDOM), cell(table="table2")], [printed(), other, printed(table="table3")])
    assert [(row["method"], row["ipc"], row["reported"], row["ours"], row["seeds"]) for row in rows] == [
        ("WMDD", 10, 50.0, 50.0, 4),
        ("WMDD", 1, 40.0, None, 0),
        (report.RANDOM, 10, None, 50.0, 4),
    ]
    assert rows[1]["note"] == "dagger" and rows[0]["run_on"] == "digits 32 px"
    assert set(report.COLUMNS) <= rows[0].keys()


def test_a_number_without_result_says_why():
    planned = [cell(ipc=1), cell(ipc=50) | {"why": "ImageNette is missing"}]
    rows = rows_of([], [printed(ipc=ipc) for ipc in (1, 10, 50)], planned)
    assert [row["status"] for row in rows] == [
        "not run: no result yet",
        "not run: no cell planned",
        "not run: ImageNette is missing",
    ]


@pytest.mark.parametrize(
    ("ours", "number", "options", "status"),
    [
        (cell(mean=50.99, std=0.0), printed(), {}, "reproduced"),
        (cell(mean=51.01, std=0.0), printed(), {}, "differs"),
        (cell(mean=48.99, std=0.0), printed(), {}, "differs"),
        (cell(mean=51.99, std=1.0), printed(), {}, "reproduced"),  # 2 * 1 / sqrt(4 seeds) + 1 = 2
        (cell(mean=52.01, std=1.0), printed(), {}, "differs"),
        (cell(mean=53.99, std=0.0), printed(std=1.5), {}, "reproduced"),  # 2 * 1.5 + 1 = 4
        (cell(mean=53.99, std=0.0), printed(std=1.5), {"reported_runs": 3}, "differs"),
        (cell(mean=52.74, std=0.0), printed(std=1.5), {"reported_runs": 3}, "differs"),
        (cell(mean=52.73, std=0.0), printed(std=1.5), {"reported_runs": 3}, "reproduced"),  # 3 / sqrt(3) + 1 = 2.732
        (cell(mean=50.0, std=None), printed(), {}, "reproduced"),
        (cell(mean=50.0), printed(), {"comparable": False}, "not comparable"),
        (cell(metric="time"), printed(metric="time"), {}, "not comparable"),
    ],
)
def test_status(ours, number, options, status):
    (row,) = rows_of([ours], [number], **options)
    assert row["status"] == status


def test_only_the_label_regime_of_the_paper_belongs_in_its_table():
    cells = [cell(mean=60.0), cell(mean=30.0, label_regime="hard")]
    assert [row["ours"] for row in rows_of(cells)] == [60.0]
    assert [row["ours"] for row in rows_of(cells, label_regime="hard")] == [30.0]


def test_extras_set_each_method_beside_random_images():
    size = {"bytes": {"images": 3000, "labels": 5_000_000}, "seconds": {"teacher": 60.5, "distill": 100.0}}
    cells = [
        cell(mean=60.0, peak_memory_bytes=2_500_000_000, best=[62.0, 61.0], **size),
        cell(mean=30.0, label_regime="hard"),
        cell(report.RANDOM, mean=57.5),
        cell(report.RANDOM, mean=35.0, label_regime="hard"),
        cell(ipc=1, mean=20.0),
        cell(metric="time"),
        cell(setting="longer", mean=70.0, settings={"student": {"epochs": 3000}}),  # than the random ones
        cell(report.RANDOM, setting="crops", mean=50.0, settings={"student": {"crop": 0.5, "shuffle": 1}}),
        cell(setting="crops", mean=70.0, settings={"student": {"crop": 0.5, "shuffle": 2, "schedule": "cosine"}}),
    ]  # the last: of a later version, which names what was usual before
    first, random, single, longer, _, cropped = report.extras_rows(cells)
    assert first["soft_best"] == 61.5 and single["soft_best"] is None
    assert longer["over_random"] is None and cropped["over_random"] == 20
    assert set(first) == set(report.EXTRAS_COLUMNS)
    assert (first["soft"], first["hard"], first["random_soft"], first["random_hard"]) == (60.0, 30.0, 57.5, 35.0)
    assert (first["over_random"], first["seconds"], first["label_bytes"]) == (2.5, 160.5, 5_000_000)
    assert (random["soft"], random["hard"], random["random_soft"]) == (57.5, 35.0, None)
    assert (single["ipc"], single["over_random"], single["hard"], single["image_bytes"]) == (1, None, None, None)


# Tables


@pytest.fixture
def mixed():
    numbers = [printed("DM", 1, 32.8, 0.5), printed("WMDD", 10, 64.8, 0.4, note="dagger"), printed("WMDD", 1, 40.0)]
    return rows_of([cell(mean=64.04, std=0.26), cell(report.RANDOM, 10, 61.0)], numbers, [cell(ipc=1)], False)


MARKDOWN = """\
# table1: Methods & budgets

## Printed in the paper

| method | ImageNette IPC 1 | ImageNette IPC 10 |
| ------ | ---------------: | ----------------: |
| DM     |       32.8 ± 0.5 |                 - |
| WMDD   |             40.0 |        64.8 ± 0.4 |

WMDD (ImageNette IPC 10): dagger.

## Ours (digits 32 px in place of ImageNette, not comparable with the printed numbers)

| method             | ImageNette IPC 10 |
| ------------------ | ----------------: |
| WMDD               |        64.0 ± 0.3 |
| Random real (ours) |        61.0 ± 1.0 |

Mean ± standard deviation over 4 seeds.

## Status

- not comparable: 2 (WMDD; Random real (ours))
- not run: no cell planned: 1 (DM)
- not run: no result yet: 1 (ImageNette IPC 1 of WMDD)
"""

CSV = """\
table,dataset,method,setting,arch,ipc,metric,reported,reported_std,ours,ours_std,seeds,status
table1,ImageNette,DM,,ResNet-18,1,accuracy,32.8,0.5,,,0,not run: no cell planned
table1,ImageNette,WMDD,,ResNet-18,10,accuracy,64.8,0.4,64.04,0.26,4,not comparable
table1,ImageNette,WMDD,,ResNet-18,1,accuracy,40.0,,,,0,not run: no result yet
table1,ImageNette,Random real (ours),,ResNet-18,10,accuracy,,,61.0,1.0,4,not comparable
"""

TABULAR = r"""
\caption{Methods \& budgets}
\medskip
Printed in the paper\\[2pt]
\begin{tabular}{lrr}
\toprule
 & \multicolumn{2}{c}{ImageNette} \\
\cmidrule(lr){2-3}
method & IPC 1 & IPC 10 \\
\midrule
DM & 32.8 $\pm$ 0.5 & - \\
WMDD & 40.0 & 64.8 $\pm$ 0.4 \\
\bottomrule
\end{tabular}
"""


def test_written_tables(mixed, tmp_path):
    tidy, markdown, latex = report.write_table(mixed, LAYOUT, tmp_path / "new folder")
    assert (tidy.name, markdown.name, latex.name) == ("table1.csv", "table1.md", "table1.tex")
    assert tidy.read_text(encoding="utf-8") == CSV
    assert markdown.read_text(encoding="utf-8") == MARKDOWN
    text = latex.read_text(encoding="utf-8")
    assert TABULAR in text and text.count("\\begin{tabular}") == text.count("\\end{tabular}") == 2


def test_terminal_holds_the_same_blocks(mixed):
    text = report.terminal(mixed, LAYOUT)
    assert "=== Printed in the paper ===\n\nmethod  ImageNette IPC 1  ImageNette IPC 10\nDM            32.8" in text
    assert "\nWMDD                       64.0 ± 0.3\nRandom real (ours)         61.0 ± 1.0\n" in text
    assert "61.0 ± 1.0" in report.terminal(rows_of([cell(mean=61.04)]), LAYOUT)  # nothing printed: one decimal


def test_the_tables_of_the_paper_fit_a_terminal_and_come_out_complete():
    layouts = {
        "table1": LAYOUT,
        "table2": {"caption": "", "rows": ["method"], "columns": ["arch"]},
        "table3": {"caption": "", "rows": ["setting"], "columns": ["dataset"]},
        "table4": {"caption": "", "rows": ["method"], "columns": ["metric", "ipc"]},
        "table5": {"caption": "", "rows": ["method"], "columns": ["setting"]},
    }
    numbers = report.load_reported(WMDD)
    for table, layout in layouts.items():
        rows = report.table_rows(table, [], [], numbers, True)
        text = report.terminal(rows, layout)
        assert max(map(len, text.splitlines())) <= 100
        assert "=== Ours" not in text and f"not run: no cell planned: {len(rows)} (" in text
    assert "\nImageNet-21K\n\nmethod      IPC 10      IPC 20\n" in report.terminal(
        report.table_rows("table1", [], [], numbers, True), LAYOUT
    )
    times = report.terminal(report.table_rows("table4", [], [], numbers, True), layouts["table4"])
    assert "WMDD           0.71    2.30    5.27" in times and "WMDD            7.6    41.8    59.4" in times


def test_teachers_of_the_same_settings_are_told_apart():
    def taught(finished, accuracy):
        stage = {"stage": "teacher", "key": "one recipe", "finished": finished}
        return {"stages": [stage], "teacher_accuracy": accuracy}

    both = [cell(ipc=1, **taught("monday", 75.6)), cell(ipc=10, **taught("tuesday", 75.4)),
            cell("RDED", **taught("tuesday", 75.4))]  # fmt: skip
    text = " ".join(render.markdown(rows_of(both), LAYOUT).split())
    first = "one of 75.6 % behind WMDD (ImageNette IPC 1)"
    second = "one of 75.4 % behind WMDD (ImageNette IPC 10); RDED."
    assert f"which the deviations leave out: {first}. And {second}" in text
    assert "Teachers of the same settings" not in render.markdown(rows_of(both[1:]), LAYOUT)


def test_a_small_number_keeps_its_spread():
    text = render.markdown(rows_of([cell(mean=0.0833, std=0.1041)]), LAYOUT)
    assert "0.08 ± 0.1" in text


def test_a_wide_table_is_cut_until_it_fits():
    layout = {"caption": "Wide", "rows": ["method"], "columns": ["dataset", "ipc", "setting"]}
    cells = [cell(ipc=ipc, setting=f"a long setting {n}", cell=f"{ipc}/{n}") for ipc in (1, 10) for n in range(4)]
    text = render.markdown(rows_of(cells), layout).split("## Status")[0]
    assert all(len(line) <= render.WIDTH for line in text.splitlines()) and "**ImageNette IPC 10**" in text
    assert text.count("50.0 ± 1.0") == 8


def test_columns_go_by_budget_and_a_missing_setting_is_named():
    numbers = [printed(ipc=ipc, setting=setting) for ipc, setting in ((50, "layer 5"), (1, "layer 5"), (10, ""))]
    text = report.terminal(rows_of([], numbers), LAYOUT | {"columns": ["setting", "ipc"]})
    assert "method  layer 5 IPC 1  layer 5 IPC 50  any IPC 10" in text


def test_a_layout_that_hides_a_number_is_refused(mixed, tmp_path):
    with pytest.raises(ValueError, match="table1 puts two numbers at WMDD, ImageNette"):
        report.write_table(mixed, LAYOUT | {"columns": ["dataset"]}, tmp_path)
    with pytest.raises(ValueError, match="table1 names budget; allowed are table, dataset"):
        report.write_table(mixed, LAYOUT | {"columns": ["budget"]}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_of_no_or_two_tables_are_refused(tmp_path):
    with pytest.raises(ValueError, match="rows of no table"):
        report.write_table([], LAYOUT, tmp_path)
    rows = rows_of([cell()]) + report.table_rows("table2", [], [cell(table="table2")], [], True)
    with pytest.raises(ValueError, match="rows of table1, table2; expected those of one table"):
        report.write_table(rows, LAYOUT, tmp_path)


def test_written_extras(tmp_path):
    size = {"bytes": {"images": 3072, "labels": 999}, "seconds": {"distill": 7260.0}, "peak_memory_bytes": 1.5e9}
    rows = report.extras_rows([cell(mean=60.0, **size), cell(report.RANDOM, mean=60.04, seconds={"evaluate": 90.0})])
    tidy, markdown = report.write_extras(rows, tmp_path)
    assert (tidy.name, markdown.name) == ("table1_extras.csv", "table1_extras.md")
    with open(tidy, newline="", encoding="utf-8") as file:
        assert [row["over_random"] for row in csv.DictReader(file)] == ["-0.04", ""]
    text = markdown.read_text(encoding="utf-8")
    assert "## ImageNette (digits 32 px)" in text
    lines = ["".join(line.split(" ")) for line in text.splitlines() if line.startswith("| ")]
    assert lines[2:] == [
        "|WMDD|10|60.0±1.0|-|+0.0|3.1kB|999B|2.0h|1.5GB|",
        "|Randomreal(ours)|10|60.0±1.0|-|-|-|-|90s|-|",
    ]


def test_committed_tables_say_the_statuses_of_their_rows():
    """Whoever changes how a status is said writes the tables again."""
    stale, load = [], functools.cache(cells.load_paper)
    for file in sorted(cells.ROOT.parent.glob("tables/*/*/*.csv")):
        layout = load(file.parts[-3]).tables.get(file.stem)
        if layout is None:
            continue
        with open(file, newline="", encoding="utf-8") as text:
            rows = [{k: v if v != "" else None for k, v in row.items()} for row in csv.DictReader(text)]
        page = file.with_suffix(".md").read_text(encoding="utf-8")
        lines = [render._wrapped(f"- {line}") for line in render._statuses(rows, layout)]
        stale += [] if all(line in page for line in lines) else [str(file)]
    assert not stale


@pytest.mark.parametrize("scale", ["smoke", "small", "paper"])
@pytest.mark.parametrize("name", cells.papers())
def test_every_table_has_a_place_for_every_number_of_its_scale(name, scale):
    """A layout too narrow for the cells would show only when all of them have run."""
    loaded = cells.load_paper(name)
    of_tables = [c for c in loaded.cells_at(scale) if c.table in loaded.tables]
    results = [
        cell(**c.key(), label_regime=c.label_regime, cell=c.id)
        for c in of_tables if c.dataset in loaded.scales[scale]["data"]
    ]  # fmt: skip
    planned = [c.key() | {"label_regime": c.label_regime} for c in of_tables]
    numbers = report.load_reported(cells.ROOT / name / "reported.csv")
    assert results
    for table, layout in loaded.tables.items():
        options = {k: layout[k] for k in ("reported_runs", "label_regime") if k in layout}
        rows = report.table_rows(table, planned, results, numbers, True, **options)
        assert not rows or report.terminal(rows, layout)
