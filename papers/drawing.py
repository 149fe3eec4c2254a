"""What the figures of all papers share: axes, lines with error bars, images, captions, and what a run holds.

The caption beneath a figure says what is seen, on which data, and whether it can be held against print.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from papers import committed, report
from papers.render import stood_for

if TYPE_CHECKING:
    from papers.planning import Planned
    from papers.runner import Run
    from papers.stages import Stage

__all__ = [
    "ASIDE", "GAPS", "IPC_AXIS", "SHOWN", "axes_of", "captioned", "compared", "datasets", "dodged", "entries", "entry",
    "error_bars", "ipc_axis", "lines", "listed", "name_of", "panels", "show_image", "teacher_of", "title",
    "values", "where",
]  # fmt: skip

IPC_AXIS = "images per class (IPC, log scale)"
SHOWN = {"Random real (ours)": "random real", "Random": "random real"}  # what methods are called in all figures
ASIDE = "Lines are moved sideways a little, so that none hides another."  # what `dodged` does
GAPS = "Where a point is missing nothing was run."
WORDS = {  # the classes of Imagenette by the names of their folders
    "n01440764": "tench", "n02102040": "springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
}  # fmt: skip


def teacher_of(result: Mapping) -> str:
    """When the teacher behind a result was finished, which tells two of the same settings apart; empty without one."""
    return next((s["finished"] for s in result.get("stages", ()) if s["stage"] == "teacher"), "")


def entry(run: Run, planned: Planned, stage: str):
    """The store entry of one stage behind a student, the last of this name: of the first that has it, or None."""
    return next(iter(entries(run, planned, stage)), None)


def entries(run: Run, planned: Planned, stage: str) -> list:
    """Those of all students of a cell, one after the other; a student whose stage has not been made has none."""
    chains = [[s for s in top.all() if s.name == stage] for top in planned.stages]
    found = (_made(run, chain[-1]) for chain in chains if chain)
    return [entry for entry in found if entry is not None]


def _made(run: Run, stage: Stage):
    """The store entry of a stage; a set that is committed with the tables needs no run to be there."""
    if committed.SET in stage.settings:
        return run.lab.entry(stage)
    return run.lab.store.get(stage.name, run.lab.key(stage))


def parts(run: Run, planned: Planned, stage: str) -> list:
    """Those of all stages of one name behind the first student, blocks of classes, in their order; [] if one lacks."""
    keys = dict.fromkeys(run.lab.key(s) for top in planned.stages[:1] for s in top.all() if s.name == stage)
    found = [run.lab.store.get(stage, key) for key in keys]
    return [] if None in found else found


def name_of(folder: str) -> str:
    """What a class is called, by the name of its folder."""
    return WORDS.get(folder, folder)


def datasets(run: Run, data: pd.DataFrame) -> list[str]:
    """The printed data sets of some results, in the order of the paper."""
    return [name for name in dict.fromkeys(p.cell.dataset for p in run.planned) if name in set(data["dataset"])]


def values(run: Run, table: str) -> pd.DataFrame | None:
    """Accuracies of a table or figure, one row a seed; None without any."""
    return pd.DataFrame(run.values(table)) if run.values(table) else None


def axes_of(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of width x height inches and its axes [rows, columns], in the style of all figures."""
    with sns.axes_style("whitegrid"), sns.plotting_context("paper"):
        figure = Figure((width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def show_image(ax, image: Tensor) -> None:
    """Show an image [C, H, W] on the [0, 1] scale."""
    ax.imshow(image.float().clamp(0, 1).permute(1, 2, 0).numpy())
    ax.grid(False)
    ax.set(xticks=[], yticks=[])
    sns.despine(ax=ax, left=True, bottom=True)


def lines(data: pd.DataFrame, ax, **roles) -> None:
    """Mean accuracy with one standard deviation over seeds as error bars."""
    roles.setdefault("style", roles["hue"])
    roles.setdefault("style_order", roles["hue_order"])
    sns.lineplot(
        data, y="accuracy", errorbar="sd", err_style="bars", err_kws={"capsize": 3}, markers=True, ax=ax, **roles
    )
    ax.set_ylabel("top-1 accuracy (%)")


def ipc_axis(ax, ipcs: Iterable[int]) -> None:
    shown = sorted(set(ipcs))
    ax.set(xscale="log", xlabel=IPC_AXIS)
    ax.set_xticks(shown, [str(i) for i in shown])
    ax.minorticks_off()
    if len(shown) == 1:  # methods beside each other would fill the axis
        ax.set_xlim(shown[0] / 3, shown[0] * 3)


def dodged(data: pd.DataFrame, *names: str) -> pd.Series:
    """The IPC of every result, moved a little along a log axis, so that lines (by these columns) do not hide others.

    A result that is alone at its IPC stays where it is.
    """
    line = data[list(names)].apply(tuple, axis=1)
    decades = max(np.log10(data["ipc"].max() / data["ipc"].min()), 0.3)
    step = min(0.03 * decades, 0.15 / max(1, line.nunique() - 1))  # all within a sixth of a decade: IPC 10 is not 20
    order = list(dict.fromkeys(line))
    there = {ipc: [one for one in order if one in set(own)] for ipc, own in line.groupby(data["ipc"])}
    places = [there[ipc].index(one) - (len(there[ipc]) - 1) / 2 for ipc, one in zip(data["ipc"], line, strict=True)]
    return data["ipc"] * 10 ** (step * np.array(places))


# ---------------------------------------------------------------- panels


POINT = ["method", "setting", "arch", "ipc", "metric", "label_regime"]  # of one data set


def panels(run: Run, data: pd.DataFrame) -> list[tuple[list[str], pd.DataFrame]]:
    """Results by data set: its printed name and its rows.

    Printed data sets with one stand-in and the same numbers where both have some are one panel with all their names.
    """
    found: list[tuple[list[str], pd.DataFrame]] = []
    for name in datasets(run, data):
        own = data[data["dataset"] == name]
        for place, (names, rows) in enumerate(found):
            if set(rows["run_on"]) == set(own["run_on"]) and (new := _more(rows, own)) is not None:
                found[place] = ([*names, name], pd.concat([rows, own[new]]))
                break
        else:
            found.append(([name], own))
    return found


def _more(rows: pd.DataFrame, own: pd.DataFrame) -> pd.Series | None:
    """Which rows of `own` are not among `rows`; None where the two disagree, or share nothing."""
    had = rows.groupby(POINT, dropna=False)["accuracy"].apply(list).to_dict()
    mine = own.groupby(POINT, dropna=False)["accuracy"].apply(list).to_dict()
    shared = had.keys() & mine.keys()
    if not shared or any(had[point] != mine[point] for point in shared):
        return None
    return ~own[POINT].apply(tuple, axis=1).isin(shared)


def title(ax, names: Sequence[str], data: pd.DataFrame, width: float, arch: str = "") -> None:
    """What a panel of `width` inches shows: the printed data set, and what it was run on where that is another."""
    run_on = list(dict.fromkeys(data["run_on"]))
    if len(names) == 1 and not any(stood_for(names[0], text) for text in run_on):
        parts = [", ".join((*run_on, arch) if arch else run_on)]
    else:
        named = [*names, arch] if len(names) == 1 else [arch]  # the caption says what it stands in for
        parts = [", ".join(part for part in named if part), f"run on {', '.join(run_on)}"]
    wrapped = [line for part in parts for line in textwrap.wrap(part, round(15 * width))]
    ax.set_title("\n".join(wrapped), fontsize=9)


# ---------------------------------------------------------------- captions


def where(data: pd.DataFrame) -> str:
    """What results were run on, and for which printed data sets where these are others."""
    found: dict[str, list[str]] = {}
    for dataset, run_on in data[["dataset", "run_on"]].drop_duplicates().itertuples(index=False):
        found.setdefault(run_on, []).append(dataset)
    said = [
        run_on if not any(stood_for(name, run_on) for name in names) else f"{run_on} (for {', '.join(names)})"
        for run_on, names in found.items()
    ]
    return "Run on " + "; ".join(said) + "."


def error_bars(data: pd.DataFrame) -> str:
    """Over how many students the error bars of some results are, and that results of one student have none."""
    counts = sorted(set(data.groupby("cell").size()))
    several = [count for count in counts if count > 1]
    if not several:
        return "One student a result."
    over = str(several[0]) if len(several) == 1 else f"{several[0]} to {several[-1]}"
    text = f"Error bars: mean ± standard deviation over {over} students"
    return f"{text}; a result without one is of one student." if counts[0] == 1 else f"{text}."


def compared(data: pd.DataFrame, random: str) -> str:
    """Which images and labels results have, `random` a method: "on random real images under hard labels"."""
    real = data["method"] == random
    images = [words for words, there in (("distilled", ~real), ("random real", real)) if there.any()]
    told = {"soft": "the teacher's soft labels", "hard": "hard labels"}
    labels = [words for regime, words in told.items() if (data["label_regime"] == regime).any()]
    recipe = ", the same recipe," if len(images) > 1 else ""
    return f"on {listed(images)} images{recipe} under {listed(labels)}"


def listed(words: Iterable[str]) -> str:
    """Words as in a sentence: a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def captioned(figure: Figure, text: str, run: Run | None = None, data: pd.DataFrame | None = None) -> Figure:
    """The figure with a caption beneath it, which says where it, or some results that it draws, are not comparable."""
    text += _teachers(run, data) + _not_comparable(run, data) if run else ""
    lines = textwrap.wrap(text, max(60, round(17 * figure.get_figwidth())))
    figure.text(0.5, -0.02, "\n".join(lines), ha="center", va="top", fontsize=8)
    return figure


def _teachers(run: Run, data: pd.DataFrame | None) -> str:
    """That a teacher of the same settings was trained more than once for the results of a figure."""
    made: dict[str, dict[str, float]] = {}
    for cell in () if data is None else dict.fromkeys(data["cell"]):
        for stage in run.results[cell].get("stages", ()):
            if stage["stage"] == "teacher":
                made.setdefault(stage["key"], {})[stage["finished"]] = run.results[cell]["teacher_accuracy"]
    again = [sorted(found.values()) for found in made.values() if len(found) > 1]
    words = "; ".join(" and ".join(f"{accuracy:.1f}" for accuracy in found) + " %" for found in again)
    return f" Teachers of the same settings ({words}) stand behind it, which error bars leave out." if again else ""


def _not_comparable(run: Run, data: pd.DataFrame | None) -> str:
    """What a caption says of print: at scales other than the published one nothing is comparable, else see the rows."""
    if not run.paper.scales[run.args.scale]["comparable"]:
        return f" Scale {run.args.scale}: not comparable with print."
    drawn = [] if data is None else [run.results[cell] for cell in dict.fromkeys(data["cell"])]
    other = sum(not _comparable(run, result) for result in drawn)
    if not other:
        return ""
    which = f"{other} of {len(drawn)} results: not" if other < len(drawn) else "Not"
    return f" {which} comparable with print."


def _comparable(run: Run, result: dict) -> bool:
    """Whether a result stands beside a printed number in its table, made as that was."""
    regime = run.paper.tables.get(result["table"], {}).get("label_regime", "soft")
    key = tuple(result[k] for k in report.KEY)
    return regime in ("any", result["label_regime"]) and any(
        tuple(row[k] for k in report.KEY) == key and not row["status"].startswith("not comparable")
        for row in run.rows(result["table"])
    )
