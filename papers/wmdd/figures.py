"""The figures of WMDD, drawn from the results and the images of a run.

Each function takes a finished `papers.runner.Run` and returns a matplotlib Figure, or None where nothing that it shows
has been made.  The caption beneath a figure says what is seen, on which data, and whether it can be held against print.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor

from methods.wmdd import Config
from papers import drawing
from papers.image_stages import real_views
from papers.report import RANDOM
from papers.wmdd import toy

if TYPE_CHECKING:
    from papers.runner import Run

__all__ = ["figure1", "figure2", "figure4", "figure5a", "figure5b", "figure_labels"]


def figure1(run: Run, per_class: int = 3, classes: int = 10) -> Figure | None:
    """Synthetic images of some classes, each above the real training image nearest to the atom it is tied to.

    Nearest in the teacher's feature space, among the images of the class.  The images are those of Table 1, at IPC 10
    where they are there, and those of ImageNet-1K, as printed, before others.
    """
    cells = [p for p in run.planned if p.cell.table == "table1" and p.cell.algorithm == "wmdd"]
    for planned in sorted(cells, key=lambda p: (p.cell.ipc != 10, -p.cell.ipc, p.cell.dataset != "ImageNet-1K")):
        made, real = drawing.entry(run, planned, "distill"), drawing.parts(run, planned, "statistics")
        if made and real:
            break
    else:
        return None
    tensors, names, ipc = made.tensors(), made.meta["classes"], planned.cell.ipc
    chosen = torch.linspace(0, len(names) - 1, min(classes, len(names))).long().tolist()
    shown = min(per_class, ipc)
    features = [block.tensors("features", "labels") for block in real]
    seen = {name: torch.cat([own[name] for own in features]) for name in ("features", "labels")}
    pairs = nearest_real(tensors["atoms"][chosen, :shown], chosen, **seen)
    figure, axes = drawing.axes_of(0.85 * len(chosen) + 0.4, 1.75 * shown + 0.3, 2 * shown, len(chosen))
    train = run.lab.data(planned.setup.dataset, "train")
    for column, k in enumerate(chosen):
        views = real_views(train, train.class_indices(k)[pairs[column]], planned.setup).cpu()
        for j in range(shown):
            drawing.show_image(axes[2 * j, column], tensors["images"][k * ipc + j])
            drawing.show_image(axes[2 * j + 1, column], views[j] / 255)
        axes[0, column].set_title("\n".join(textwrap.wrap(drawing.name_of(names[k]), 10)), fontsize=8)
    for row in range(2 * shown):
        axes[row, 0].set_ylabel("real" if row % 2 else "synthetic", fontsize=8)
    text = (
        f"WMDD images of {run.lab.run_on(planned.setup)}, IPC {ipc},"
        f" {len(chosen)} of {len(names)} classes. Beneath each, the"
        " real training image whose feature is nearest to the barycenter atom that the synthetic one was pulled to."
    )
    return drawing.captioned(figure, text, run)


def nearest_real(atoms: Tensor, classes: Sequence[int], *, features: Tensor, labels: Tensor) -> Tensor:
    """Position among the images of its class of the feature nearest to each atom.

    atoms [classes, I, D], features [N, D] and their labels [N] class by class -> int64 [classes, I].
    """
    found = [torch.cdist(own, features[labels == k]).argmin(1) for own, k in zip(atoms, classes, strict=True)]
    return torch.stack(found)


def figure2(run: Run, points: int = 150, side: int = 120) -> Figure:
    """Outlines of circles and crosses, and their barycenters under KL, MMD and Wasserstein, computed here."""
    generator = torch.Generator().manual_seed(0)
    figure, axes = drawing.axes_of(8.4, 4.6, 2, 4, sharex=True, sharey=True)
    places, edge = toy.grid(side), (-toy.EXTENT, toy.EXTENT)
    titles = ("(a) inputs", "(b) KL divergence", "(c) MMD", "(d) Wasserstein")
    for row, (kind, label, hue) in enumerate((("circle", "circles", "Blues"), ("cross", "crosses", "Greens"))):
        clouds = toy.clouds(kind, points, generator)
        start = 0.5 * torch.randn(points, 2, generator=generator, dtype=torch.float64)
        atoms = toy.mmd_barycenter(clouds, start), toy.wasserstein_barycenter(clouds, start)
        mixture = toy.kl_barycenter(torch.stack([toy.density(cloud, places) for cloud in clouds]))
        mixture = mixture.view(side, side).numpy()
        colour = sns.color_palette(hue, 6)
        for number, cloud in enumerate(clouds):
            axes[row, 0].scatter(*cloud.T.numpy(), s=3, color=colour[2 + number])
        axes[row, 1].imshow(mixture, extent=(*edge, *edge), origin="lower", cmap=hue, aspect="auto")
        for ax, found in zip(axes[row, 2:], atoms, strict=True):
            density = toy.density(found, places).view(side, side).numpy()
            ax.imshow(density, extent=(*edge, *edge), origin="lower", cmap=hue, aspect="auto", alpha=0.6)
            ax.scatter(*found.T.numpy(), s=4, color=colour[-1])
        for ax, title in zip(axes[row], titles, strict=True):
            ax.set(xlim=edge, ylim=edge, box_aspect=1, title="" if row else title, xlabel="x (no unit)" if row else "")
            ax.grid(False)
        axes[row, 0].set_ylabel(f"{label}\ny (no unit)")
    text = (
        f"Outlines of four circles and of four crosses, {points} points each, and the barycenter of each kind. Darker"
        " is denser. KL gives the mixture of the densities; squared MMD (Gaussian kernel, points moved by gradient)"
        " settles on all outlines at once; Wasserstein (free support, exact transport) gives one shape of mean place"
        " and size. Computed from the definitions without any image data; the shapes are ours, not those of print."
    )
    return drawing.captioned(figure, text)


def figure4(run: Run) -> Figure | None:
    """Accuracy over IPC of images made with the Wasserstein and with the MMD target, everything else equal."""
    data = drawing.values(run, "figure4")
    if data is None:
        return None
    figure, axes = drawing.axes_of(4.6, 3.4)
    ax = axes[0, 0]
    order = [s for s in ("Wasserstein", "MMD") if s in set(data["setting"])]
    drawing.lines(data, ax, x="ipc", hue="setting", hue_order=order)
    drawing.ipc_axis(ax, data["ipc"])
    ax.get_legend().set_title("target of the features")
    text = (
        f"Student accuracy with hard labels and without crops, flips or CutMix. {drawing.where(data)}"
        f" {drawing.error_bars(data)} The MMD target is the mean feature of a class in the same teacher; print"
        " has DM, which uses many random networks."
    )
    return drawing.captioned(figure, text, run, data)


def figure5a(run: Run) -> Figure | None:
    """Accuracy over lambda, the weight of the BatchNorm term."""
    data = drawing.values(run, "figure5a")
    if data is None:
        return None
    data["lambda"] = [_lambda(settings["distill"]) for settings in data["settings"]]
    if data["lambda"].nunique() < 2:  # no curve
        return None
    figure, axes = drawing.axes_of(4.6, 3.4)
    ax = axes[0, 0]
    drawing.lines(data, ax, x="lambda", hue="dataset", hue_order=drawing.datasets(run, data))
    ax.set(xscale="log", xlabel="λ, weight of the BatchNorm term (no unit, log scale)")
    ax.get_legend().set_title("data set as printed")
    ipc = ", ".join(str(i) for i in sorted(set(data["ipc"])))
    text = f"Student accuracy (soft labels) against λ at IPC {ipc}. {drawing.where(data)} {drawing.error_bars(data)}"
    return drawing.captioned(figure, text, run, data)


def figure5b(run: Run) -> Figure | None:
    """One image of two classes for each lambda of Figure 5a."""
    sweeps: dict[str, dict[float, tuple]] = {}
    for planned in run.planned:
        if planned.cell.table == "figure5a" and (entry := drawing.entry(run, planned, "distill")):
            sweeps.setdefault(planned.cell.dataset, {})[_lambda(planned.cell.distill)] = (planned, entry)
    if not sweeps:
        return None
    sweep = dict(sorted(max(sweeps.values(), key=len).items()))
    planned, entry = next(iter(sweep.values()))
    names, ipc = entry.meta["classes"], planned.cell.ipc
    chosen = [0, len(names) // 2]
    figure, axes = drawing.axes_of(1.25 * len(sweep) + 0.4, 2.9, 2, len(sweep))
    for column, (weight, (_, entry)) in enumerate(sweep.items()):
        images = entry.tensors()["images"]
        for row, k in enumerate(chosen):
            drawing.show_image(axes[row, column], images[k * ipc])
            axes[row, 0].set_ylabel(drawing.name_of(names[k]), fontsize=9)
        axes[0, column].set_title(f"λ = {weight:g}", fontsize=9)
    text = (
        f"The first WMDD image of two classes of {run.lab.run_on(planned.setup)} (IPC {ipc}), from the same noise,"
        " as the"
        " weight λ of the BatchNorm term grows."
    )
    return drawing.captioned(figure, text, run)


def figure_labels(run: Run) -> Figure | None:
    """Beyond the paper: distilled and random real images over IPC, under soft and under hard labels."""
    data = drawing.values(run, "table1")
    if data is None:
        return None
    data["images"] = ["random real" if method == RANDOM else method for method in data["method"]]
    data["labels"] = data["label_regime"]
    data = data.sort_values("method", key=lambda methods: methods == RANDOM, kind="stable")  # these come last
    kinds = list(dict.fromkeys(data["images"]))
    panels = drawing.panels(run, data)
    figure, axes = drawing.axes_of(2.6 * len(panels) + 1.6, 3.2, 1, len(panels), sharey=True)
    for ax, (names, own) in zip(axes[0], panels, strict=True):
        own = own.assign(place=drawing.dodged(own, "images", "labels"))
        drawing.lines(own, ax, x="place", hue="images", hue_order=kinds, style="labels", style_order=["soft", "hard"])
        drawing.ipc_axis(ax, own["ipc"])
        ax.set_xlabel("")
        drawing.title(ax, names, own, 2.3)
        ax.get_legend().remove()
    figure.supxlabel(drawing.IPC_AXIS, fontsize=9)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    text = (
        f"Student accuracy {drawing.compared(data, RANDOM)}, on test images of the same data set. {drawing.ASIDE}"
        f" {drawing.where(data)} {drawing.error_bars(data)} {drawing.GAPS}"
    )
    return drawing.captioned(figure, text, run, data)


# ---------------------------------------------------------------- what a run holds


def _lambda(distill) -> float:
    """The weight of the BatchNorm term; the method's default where a cell does not set it."""
    return float(distill.get("bn_weight", Config.bn_weight))
