"""The figures of NRR-DD, drawn from the results and the images of a run.

Each function takes a finished `papers.runner.Run` and returns a matplotlib Figure, or None where nothing that it shows
has been made.  The caption beneath a figure says what is seen, on which data, and whether it can be held against print.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from common.datasets import info
from methods.nrr_dd import Config
from papers import drawing
from papers.report import RANDOM

if TYPE_CHECKING:
    from papers.planning import Planned
    from papers.runner import Run

__all__ = [
    "figure1", "figure3", "figure_epsilon", "figure_labels", "figure_random", "figure_steps", "figure_storage",
    "figure_weight",
]  # fmt: skip

METHODS = ("SRe2L", "RDED", "NRR-DD")
LABELS = ("RDED SL", "NRR-DD SL", "RDED OH", "RDED CL", "NRR-DD DBR", "NRR-DD DBR+LR")  # the columns of Table 2
TOLD = {  # what students are told of an image
    "SL": "the teacher's soft labels", "OH": "one-hot labels", "CL": "the teacher's two highest probabilities",
    "DBR": "the teacher's two distances", "DBR+LR": "these, on images that were refined for them too",
}  # fmt: skip
COLUMNS = 5  # panels in a row, one a printed data set
IPC, EPOCHS = 10, 300  # of the storage figure


# ---------------------------------------------------------------- images


def figure1(run: Run, classes: int = 10) -> Figure | None:
    """The first image of some classes by each method, from Table 1: same data set, same network, same IPC.

    Shown is where most methods have images; of these IPC 10, ImageNette and ResNet-18 before others.
    """
    groups: dict[tuple[str, str, int], dict] = {}
    for planned in run.planned:
        cell = planned.cell
        if cell.table == "table1" and cell.method in METHODS and (made := drawing.entry(run, planned, "distill")):
            groups.setdefault((cell.dataset, _made_with(planned), cell.ipc), {})[cell.method] = planned, made
    if not groups:
        return None
    rank = {key: (len(own), key[2] == 10, key[2], *_preferred(key[0], key[1])) for key, own in groups.items()}
    _, network, ipc = best = max(rank, key=rank.__getitem__)
    found = {method: groups[best][method] for method in METHODS if method in groups[best]}
    planned, made = next(iter(found.values()))
    names = made.meta["classes"]
    chosen = torch.linspace(0, len(names) - 1, min(classes, len(names))).long().tolist()
    figure, axes = drawing.axes_of(0.9 * len(chosen) + 0.5, 0.95 * len(found) + 0.4, len(found), len(chosen))
    for row, (method, (_, made)) in enumerate(found.items()):
        images = made.tensors()["images"]
        for ax, k in zip(axes[row], chosen, strict=True):
            drawing.show_image(ax, images[k * ipc])
        axes[row, 0].set_ylabel(method, fontsize=9)
    _title(axes[0], [names[k] for k in chosen])
    where = f"{run.lab.run_on(planned.setup)}, IPC {ipc}, made with {network}"
    text = (
        f"The first image of {len(chosen)} of {len(names)} classes by each method: {where}."
        " SRe2L optimises noise, RDED cuts the patches its teacher is surest of out of real"
        " images, NRR-DD starts from the patches it is least sure of and changes what matters little to the class."
    )
    return drawing.captioned(figure, text, run)


def figure3(run: Run) -> Figure | None:
    """One set of NRR-DD: the first image of each class before refinement, its activation, its mask, and after.

    With default settings, IPC 10, ImageNette and ResNet-18 before others.
    """
    cells = [p for p in run.planned if p.cell.algorithm == "nrr_dd" and not p.cell.distill]
    cells.sort(key=lambda p: (p.cell.ipc == 10, p.cell.ipc, *_preferred(p.cell.dataset, _made_with(p))), reverse=True)
    for planned in cells:
        if made := drawing.entry(run, planned, "distill"):
            break
    else:
        return None
    tensors, ipc = made.tensors(), planned.cell.ipc
    epsilon = float(planned.setup.distill.get("epsilon", Config.epsilon))
    before, mask = tensors["before"].float(), tensors["mask"].float()
    shown = len(mask)
    figure, axes = drawing.axes_of(0.9 * shown + 1.2, 4.3, 4, shown)
    for k in range(shown):
        drawing.show_image(axes[0, k], before[k])
        drawing.show_image(axes[3, k], tensors["images"][k * ipc])
        heat = _map(axes[1, k], epsilon * (1 - mask[k]), epsilon, "inferno")  # Eq. 4 read backwards
        weight = _map(axes[2, k], mask[k], 1, "gray")
    for row, name in enumerate(("before", "activation", "mask", "after")):
        axes[row, 0].set_ylabel(name, fontsize=9)
    _title(axes[0], made.meta["classes"][:shown])
    figure.colorbar(heat, ax=list(axes[1]), label="C (no unit)", ticks=[0, epsilon])
    figure.colorbar(weight, ax=list(axes[2]), label="M/ε (no unit)", ticks=[0, 1])
    where = f"{run.lab.run_on(planned.setup)}, IPC {ipc}, made with {_made_with(planned)}"
    text = (
        f"NRR-DD on {where}: the first image of the first {shown} classes before refinement; its"
        f" class activation C, scaled to [0, 1] and cut at ε = {epsilon:g},"
        " which is all that the mask keeps of it; the mask, white where a pixel moves freely and black where it stays;"
        " the image after refinement."
    )
    return drawing.captioned(figure, text, run)


# ---------------------------------------------------------------- accuracies


def figure_labels(run: Run) -> Figure | None:
    """Table 2 as curves: accuracy over IPC by what students are told of an image."""
    data = drawing.values(run, "table2")
    if data is None:
        return None
    data["labels"] = data["method"] + " " + data["setting"]
    kinds = [kind for kind in LABELS if kind in set(data["labels"])]
    figure = _curves(run, data, hue="labels", hue_order=kinds)
    told = "; ".join(f"{name}: {words}" for name, words in TOLD.items() if name in set(data["setting"]))
    text = f"Student accuracy by type of label. {told}. {drawing.where(data)} {drawing.error_bars(data)} {drawing.GAPS}"
    return drawing.captioned(figure, text, run, data)


def figure_random(run: Run) -> Figure | None:
    """Beyond the paper: every method and random real images over IPC, under soft and under hard labels."""
    data = drawing.values(run, "table1")
    if data is None:
        return None
    data["images"] = ["random real" if method == RANDOM else method for method in data["method"]]
    data["labels"] = data["label_regime"]
    there = dict.fromkeys((*METHODS, *data["images"]))  # in this order
    kinds = [kind for kind in there if kind in set(data["images"]) - {"random real"}]
    kinds += ["random real"] if "random real" in set(data["images"]) else []
    figure = _curves(
        run, data, ("images", "labels"), hue="images", hue_order=kinds, style="labels", style_order=["soft", "hard"]
    )
    text = (
        f"Student accuracy {drawing.compared(data, RANDOM)}. {drawing.ASIDE} {drawing.where(data)}"
        f" {drawing.error_bars(data)} {drawing.GAPS}"
    )
    return drawing.captioned(figure, text, run, data)


def figure_epsilon(run: Run) -> Figure | None:
    """Beyond the paper: accuracy over the threshold of the mask."""
    words = "ε, from where on the scaled class activation makes a pixel critical"
    return _sweep(run, "figure_epsilon", "ε, threshold of the mask (no unit)", words)


def figure_steps(run: Run) -> Figure | None:
    """Beyond the paper: accuracy over the number of refinement steps; none is CIDD alone."""
    words = "the number of refinement steps; 0 are the chosen real patches as they are (CIDD)"
    return _sweep(run, "figure_steps", "refinement steps (log scale above 10)", words, linear_to=10)


def figure_weight(run: Run) -> Figure | None:
    """Beyond the paper: accuracy over the weight of the distances in the student's loss, Eq. 9."""
    words = "α of the distance loss (Eq. 9), on the same images; above 1 the teacher's distances win over the hinge"
    return _sweep(run, "figure_weight", "weight of the distances, α (no unit, log scale)", words, linear_to=0)


# ---------------------------------------------------------------- storage


def storage(classes: int, ipc: int, epochs: int, size: int) -> dict[str, int]:
    """Bytes of a distilled set: fp16 logits or two fp16 distances for each image and epoch, and RGB pixels once."""
    images = classes * ipc
    return {
        "soft labels": images * epochs * classes * 2,
        "distance pairs": images * epochs * 2 * 2,
        "images": images * 3 * size**2,
    }


REPLAY = 25  # bytes a sample of crop, flip and partner in SRe2L's label files; a seed takes none here
TEACHER = 4 * 11_689_512  # bytes of a ResNet-18 for 1,000 classes in fp32


def storage_table(run: Run, ipcs: Sequence[int] = (10, 50, 200)) -> str:
    """Markdown: bytes by formula for the printed data sets, and how many times less the distances are, three ways."""
    heads = ("data set", "IPC", "images", "soft labels", "distances", "labels alone", "with replay records",
             "with the images")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, own in run.paper.scales["paper"]["data"].items():
        for ipc in ipcs:
            classes = info(own["dataset"]).classes
            found = storage(classes, ipc, EPOCHS, own["size"])
            soft, pairs, images = found["soft labels"], found["distance pairs"], found["images"]
            record = classes * ipc * EPOCHS * REPLAY
            factors = (soft / pairs, (soft + record) / (pairs + record), (soft + images) / (pairs + images))
            cells = [name, str(ipc), *(_size(v) for v in (images, soft, pairs)), *(f"{f:.3g}x" for f in factors)]
            lines.append("| " + " | ".join(cells) + " |")
    facts = f"{EPOCHS} epochs, fp16 labels, images as bytes of pixels."
    return "\n".join([*lines, "", f"{facts} A ResNet-18 teacher, which can give its labels again: {_size(TEACHER)}."])


def figure_storage(run: Run) -> Figure:
    """Bytes by formula for the printed data sets, and what this run has stored."""
    sets = run.paper.scales["paper"]["data"]
    classes = {name: info(own["dataset"]).classes for name, own in sets.items()}
    figure, axes = drawing.axes_of(1.9 * len(sets) + 1.6, 3.6)
    ax = axes[0, 0]
    found = {name: storage(classes[name], IPC, EPOCHS, own["size"]) for name, own in sets.items()}
    kinds, width = list(storage(1, 1, 1, 1)), 0.27
    places = {(name, kind): i + width * (j - 1) for i, name in enumerate(sets) for j, kind in enumerate(kinds)}
    for kind in kinds:
        values = [found[name][kind] for name in sets]
        bars = ax.bar([places[name, kind] for name in sets], values, width, label=kind)
        ax.bar_label(bars, [_size(value) for value in values], fontsize=6, padding=6)
    marks = sorted(_stored(run, list(sets)))
    if marks:
        x, y = zip(*((places[name, kind], size) for name, kind, size in marks), strict=True)
        ax.scatter(x, y, marker="x", color="black", zorder=3, label="stored by this run")
    ax.set(yscale="log", ylabel="bytes (log scale)", xlabel="data set as printed")
    ax.set_xticks(range(len(sets)), [f"{name}\n{classes[name]:,} classes, {own['size']} px" for name, own in
                                     sets.items()])  # fmt: skip
    ax.margins(y=0.1)
    ax.grid(False, axis="x")
    figure.legend(loc="outside right upper", frameon=False)
    text = (
        f"By formula, for the printed data sets at IPC {IPC} and {EPOCHS} epochs: soft labels as one fp16 logit a"
        " class, or two fp16 distances, for each image and epoch; images as bytes of pixels. Distances take classes/2"
        " times less than logits: 5 on ImageNette, 500 on ImageNet-1K. That leaves out the images, whatever names crop,"
        " flip and partner of each mixed image (here a seed for both kinds of label), and that a stored teacher can"
        " give its labels again."
    )
    if marks:
        text += " Crosses: bytes this run has stored at that IPC, on the data and with the epochs of its scale."
    return drawing.captioned(figure, text, run if marks else None)


def _stored(run: Run, datasets: Sequence[str]) -> set[tuple[str, str, int]]:
    """(printed data set, kind, bytes) of the results at the IPC of the figure; recomputed labels take none."""
    regimes = {"soft": "soft labels", "boundary": "distance pairs"}
    found = set()
    for result in run.results.values():
        if result["table"] in ("table1", "table2") and result["ipc"] == IPC and result["dataset"] in datasets:
            found.add((result["dataset"], "images", result["bytes"]["images"]))
            if (kind := regimes.get(result["label_regime"])) and result["bytes"]["labels"]:
                found.add((result["dataset"], kind, result["bytes"]["labels"]))
    return found


# ---------------------------------------------------------------- what a run holds, and panels


def _made_with(planned: Planned) -> str:
    """The network behind the images, as printed."""
    return planned.cell.teacher or planned.cell.arch


def _preferred(dataset: str, network: str) -> tuple[bool, bool]:
    return dataset == "ImageNette", network == "ResNet-18"


def _title(axes: np.ndarray, folders: Sequence[str]) -> None:
    for ax, folder in zip(axes, folders, strict=True):
        ax.set_title("\n".join(textwrap.wrap(drawing.name_of(folder), 10)), fontsize=8)


def _map(ax, values: torch.Tensor, top: float, colours: str):
    """Show a map [S, S] from 0 to `top`; returns what a colour bar needs."""
    shown = ax.imshow(values.numpy(), vmin=0, vmax=top, cmap=colours)
    ax.grid(False)
    ax.set(xticks=[], yticks=[])
    return shown


def _curves(run: Run, data: pd.DataFrame, dodge: Sequence[str] = (), **roles) -> Figure:
    """Accuracy over IPC, one panel for each network and data set that has results, one legend beside them.

    dodge: columns whose lines are moved sideways.
    """
    networks = dict.fromkeys(p.cell.arch for p in run.planned)
    panels = [(a, *panel) for a in networks for panel in drawing.panels(run, data[data["arch"] == a])]
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = drawing.axes_of(2.4 * columns + 1.5, 2.5 * rows + 0.7, rows, columns)
    for ax, (arch, names, own) in zip(axes.flat, panels, strict=False):
        own = own.assign(place=drawing.dodged(own, *dodge) if dodge else own["ipc"])
        drawing.lines(own, ax, x="place", **roles)
        drawing.ipc_axis(ax, own["ipc"])
        ax.set(xlabel="", ylabel="")
        drawing.title(ax, names, own, 1.9, arch)
        ax.get_legend().remove()
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    figure.supxlabel(drawing.IPC_AXIS, fontsize=9)
    figure.supylabel("top-1 accuracy (%)", fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _sweep(run: Run, table: str, axis: str, words: str, linear_to: float = math.inf) -> Figure | None:
    """Accuracy over the number in the setting of each cell, with RDED of Table 4 as a level if its teacher is theirs.

    linear_to: from where on the axis is logarithmic.

    None where fewer than two numbers have a result.
    """
    data = drawing.values(run, table)
    if data is None or data["setting"].nunique() < 2:
        return None
    data["value"] = [float(setting.split()[-1]) for setting in data["setting"]]
    where = {name: data[name].iloc[0] for name in ("dataset", "arch", "ipc", "label_regime")}  # one in a sweep
    told = {"soft": "soft labels", "boundary": "labels of two distances"}[where["label_regime"]]
    figure, axes = drawing.axes_of(4.6, 3.4)
    ax = axes[0, 0]
    drawing.lines(data, ax, x="value", hue="method", hue_order=list(dict.fromkeys(data["method"])))
    text = (
        f"Student accuracy ({told}) of {where['arch']} at IPC {where['ipc']} against {words}."
        f" {drawing.where(data)} {drawing.error_bars(data)}"
    )
    where |= {"method": "RDED", "setting": ""}
    level = [r for r in run.values("table4") if where.items() <= r.items()]
    same = {drawing.teacher_of(run.results[cell]) for cell in data["cell"]}
    level = [r["accuracy"] for r in level if {drawing.teacher_of(run.results[r["cell"]])} == same]
    if level:
        ax.axhline(fmean(level), color="0.4", linestyle="--", label="RDED (Table 4)")
        text += " Dashed: RDED with the same data, network, teacher and IPC"
        if len(level) > 1:
            ax.axhspan(fmean(level) - stdev(level), fmean(level) + stdev(level), color="0.4", alpha=0.15, linewidth=0)
            text += ", with its standard deviation"
        text += "."
    ax.set_xlabel(axis)
    if linear_to == 0:
        ax.set_xscale("log")
    elif linear_to < math.inf:
        ax.set_xscale("symlog", linthresh=linear_to, linscale=0.5)
        ax.margins(x=0.05)
    numbers = sorted(set(data["value"]))
    ax.set_xticks(numbers, [f"{number:g}" for number in numbers])
    ax.minorticks_off()
    ax.legend()
    return drawing.captioned(figure, text, run, data)


def _size(count: int) -> str:
    """Bytes with three digits: 600 kB."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= u), (1, "B"))
    return f"{count / unit:.3g} {name}"
