"""The figures of the matching methods: what the images look like, and what they are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from common import distilled
from common.matching import random_subset, tested_images
from papers import drawing
from papers.matching_stages import task_of
from papers.report import RANDOM

if TYPE_CHECKING:
    from papers.planning import Planned
    from papers.runner import Run

__all__ = ["figure_accuracy", "figure_images"]


def figure_images(run: Run, classes: int = 10) -> Figure | None:
    """One image of each class by each method, at one image per class, on the first data set that has some."""
    cells = [p for p in run.planned if p.cell.table == "table1" and p.cell.ipc == 1]
    for dataset in dict.fromkeys(p.cell.dataset for p in cells):
        found = [(p, _pixels(run, p)) for p in cells if p.cell.dataset == dataset]
        found = [(p, pixels) for p, pixels in found if pixels is not None]
        if any(p.cell.method != RANDOM for p, _ in found):
            break
    else:
        return None
    first = task_of(run.lab, found[0][0].setup)
    shown = torch.linspace(0, len(first.train.classes) - 1, min(classes, len(first.train.classes))).long()
    figure, axes = drawing.axes_of(0.75 * len(shown) + 1, 0.8 * len(found) + 0.3, len(found), len(shown))
    for row, (planned, pixels) in enumerate(found):
        for column, image in enumerate(pixels[shown]):
            drawing.show_image(axes[row, column], image.expand(3, -1, -1))
        method = drawing.SHOWN.get(planned.cell.method, planned.cell.method)
        axes[row, 0].set_ylabel(method, rotation=0, ha="right", va="center", fontsize=8)
    for column, k in enumerate(shown.tolist()):
        axes[0, column].set_title(first.train.classes[k], fontsize=8)
    where = run.lab.run_on(found[0][0].setup)
    text = (
        f"The one image of each class that each method makes of {where} (IPC 1), clipped to the"
        " range of pixels; whitened sets are shown as pixels."
    )
    if found[0][0].cell.method == RANDOM:
        text += " The first row is real."
    return drawing.captioned(figure, text, run)


def _pixels(run: Run, planned: Planned) -> Tensor | None:
    """The set behind a cell's number, as pixels [M, C, H, W]: kept beside the results, or in the store; or None."""
    result = run.results.get(planned.cell.id, {})
    keys = {stage["key"] for stage in result.get("stages", ()) if stage["stage"] == "distill"}
    for path in sorted((run.folder / "sets").glob("*.safetensors")):
        kept = distilled.load(path)
        if kept.settings.get("stage") in keys:
            return kept.images
    made = drawing.entry(run, planned, "distill")
    if made is not None:
        return task_of(run.lab, planned.setup).pixels(tested_images(made.tensors()))
    if planned.cell.method == RANDOM and planned.stages:  # drawn again, of the images that are there
        on = task_of(run.lab, planned.setup)
        return on.pixels(random_subset(on, planned.cell.ipc, result.get("seeds", (0,))[0])["images"])
    return None


def figure_accuracy(run: Run) -> Figure | None:
    """Test accuracy over images per class, one panel a data set, one line a method."""
    data = drawing.values(run, "table1")
    if data is None:
        return None
    distilled, real = set(data["method"]) != {RANDOM}, RANDOM in set(data["method"])
    data = data.assign(method=data["method"].replace(drawing.SHOWN))
    panels, methods = drawing.panels(run, data), list(dict.fromkeys(data["method"]))
    palette = sns.color_palette(n_colors=len(methods))
    figure, axes = drawing.axes_of(2.8 * len(panels) + 1.6, 3.2, 1, len(panels))
    for ax, (names, own) in zip(axes[0], panels, strict=True):
        own = own.assign(place=drawing.dodged(own, "method"))
        drawing.lines(own, ax, x="place", hue="method", hue_order=methods, palette=palette)
        drawing.ipc_axis(ax, own["ipc"])
        drawing.title(ax, names, own, 2.2)
        ax.get_legend().remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    words = ["on distilled images, each method by its own protocol"] if distilled else []
    words += ["on random real images by the protocol of DSA"] if real else []
    text = f"Test accuracy of ConvNets trained from scratch {', and '.join(words)}."
    text += f" {drawing.ASIDE} {drawing.where(data)} {drawing.error_bars(data)}"
    return drawing.captioned(figure, text, run, data)
