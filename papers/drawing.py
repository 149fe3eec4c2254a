"""What the figures of all papers share: axes, lines with error bars, images, captions, and what a run holds.

The caption beneath a figure says what is seen, on which data, and whether it can be held against print.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

if TYPE_CHECKING:
    from papers.runner import Planned, Run

__all__ = [
    "IPC_AXIS", "axes_of", "captioned", "datasets", "entries", "entry", "error_bars", "ipc_axis", "lines", "name_of",
    "show_image", "values", "where",
]  # fmt: skip

IPC_AXIS = "images per class (IPC, log scale)"
WORDS = {  # the classes of Imagenette by the names of their folders
    "n01440764": "tench", "n02102040": "springer", "n02979186": "cassette player", "n03000684": "chain saw",
    "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck", "n03425413": "gas pump",
    "n03445777": "golf ball", "n03888257": "parachute",
}  # fmt: skip


def entry(run: Run, planned: Planned, stage: str):
    """The store entry of one stage behind a student, the last of this name: of the first that has it, or None."""
    return next(iter(entries(run, planned, stage)), None)


def entries(run: Run, planned: Planned, stage: str) -> list:
    """Those of all students of a cell, one after the other; a student whose stage has not been made has none."""
    chains = [[s for s in top.all() if s.name == stage] for top in planned.stages]
    found = (run.lab.store.get(stage, run.lab.key(chain[-1])) for chain in chains if chain)
    return [entry for entry in found if entry is not None]


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
    ax.set(xscale="log", xlabel=IPC_AXIS)
    ax.set_xticks(sorted(set(ipcs)), [str(i) for i in sorted(set(ipcs))])
    ax.minorticks_off()


def where(data: pd.DataFrame) -> str:
    pairs = data[["dataset", "run_on"]].drop_duplicates().itertuples(index=False)
    return "Run on " + "; ".join(f"{run_on} (for {dataset})" for dataset, run_on in pairs) + "."


def error_bars(data: pd.DataFrame) -> str:
    seeds = len(set(data["seed"]))
    return f"Error bars: standard deviation over {seeds} student seeds." if seeds > 1 else "One student seed."


def captioned(figure: Figure, text: str, run: Run | None = None) -> Figure:
    """The figure with a caption beneath it; at scales other than the published one it says so."""
    if run and not run.paper.scales[run.args.scale]["comparable"]:
        text += f" Scale {run.args.scale}: not comparable with print."
    lines = textwrap.wrap(text, max(60, round(17 * figure.get_figwidth())))
    figure.text(0.5, -0.02, "\n".join(lines), ha="center", va="top", fontsize=8)
    return figure
