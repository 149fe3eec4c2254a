"""The figures of natural data mixing: gains, controls, robustness, similarity, and what students see.

Each function takes a finished `papers.runner.Run` and returns a matplotlib Figure, or None where nothing that it shows
has been made.
"""

from __future__ import annotations

import statistics as stats
from typing import TYPE_CHECKING

import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from common.matching import tested_images
from papers import drawing, report
from papers.cells import ROOT
from papers.matching_stages import task_of
from papers.mixing_stages import mixture

if TYPE_CHECKING:
    from papers.planning import Planned
    from papers.runner import Run

__all__ = [
    "figure1", "figure2", "figure_controls", "figure_gain", "figure_mixtures", "figure_robustness",
]  # fmt: skip

ARMS = {"baseline": "set alone", "mixed": "mixed with real images"}
REFERENCES = {"Full data": "other networks of all images", "Untrained": "untrained networks"}  # of similarity
METRICS = {
    "sample accuracy": "clean", "corruption accuracy": "corrupted", "fgsm-1 accuracy": "FGSM 1/255",
    "pgd-1 accuracy": "PGD 1/255", "fgsm-8 accuracy": "FGSM 8/255", "pgd-8 accuracy": "PGD 8/255",
}  # fmt: skip
COLOURS, MARKERS = sns.color_palette("colorblind"), ("o", "s", "^", "D", "v", "P")


def _bars(data: pd.DataFrame, ax, **roles) -> None:
    sns.barplot(data, y="accuracy", errorbar="sd", err_kws={"linewidth": 1}, capsize=0.15, ax=ax, **roles)


def figure1(run: Run) -> Figure | None:
    """The whole training set against DC's images, without and with real images mixed in, at the largest IPC run."""
    full, sets = drawing.values(run, "figure1"), drawing.values(run, "table1")
    if sets is None or not len(own := sets[(sets["method"] == "DC") & sets["setting"].isin(ARMS)]):
        return None
    ipc = own["ipc"].max()
    own = own[own["ipc"] == ipc]
    words = {"baseline": "alone", "mixed": "mixed with real images"}
    text = f"DC's images at IPC {ipc}, {drawing.listed(words[arm] for arm in words if arm in set(own['setting']))}"
    own = own.assign(arm=own["setting"].map({"baseline": "distilled\nalone", "mixed": "mixed with\nreal images"}))
    if full is not None and len(full := full[full["method"] == "Full data"]):
        own = pd.concat([full.assign(arm="all training\nimages"), own])
        text += f", beside all training images ({run.paper.scales[run.args.scale]['measure']['full']['epochs']} epochs)"
    figure, ((ax,),) = drawing.axes_of(4.2, 3.2)
    _bars(own, ax, x="arm", color=COLOURS[0])
    ax.set(xlabel="what the ConvNet trains on", ylabel="top-1 accuracy (%)")
    return drawing.captioned(figure, f"{text}. {drawing.where(own)} {drawing.error_bars(own)}", run, own)


def figure2(run: Run) -> Figure | None:
    """CKA of the layers of a full-data network (rows) with those of students (columns): alone, mixed, difference.

    Below, where they were made, the references: another full-data network, and untrained ones.
    """
    found: dict[tuple[str, int], dict[str, Planned]] = {}
    made = [p for p in run.planned if p.cell.table == "figure2" and drawing.entry(run, p, "similarity") is not None]
    references = [p for p in made if p.cell.method in REFERENCES]
    for planned in made:
        found.setdefault((planned.cell.method, planned.cell.ipc), {})[planned.cell.setting] = planned
    found = {key: arms for key, arms in found.items() if len(arms) == 2}
    if not found:
        return None
    chosen = max(found, key=lambda key: (key[1], key[0] == "DSA"))  # the paper shows DSA at IPC 50
    alone, mixed = (_similarity(run, found[chosen][arm]) for arm in ARMS)
    layers = drawing.entry(run, found[chosen]["mixed"], "similarity").meta["layers"]
    shown = [(alone, "distilled alone"), (mixed, "mixed"), (mixed - alone, "difference")]
    shown += [(_similarity(run, p), REFERENCES[p.cell.method]) for p in references]
    figure, axes = drawing.axes_of(10.5, 3.6 * (1 + bool(references)), 1 + bool(references), 3)
    for ax in axes.flat[len(shown) :]:
        ax.axis("off")
    for ax, (matrix, name) in zip(axes.flat, shown, strict=False):
        most = max(float(matrix.abs().max()), 0.01)
        low, high, colours = (-most, most, "vlag") if name == "difference" else (0, 1, "magma")
        sns.heatmap(
            matrix.numpy(), vmin=low, vmax=high, cmap=colours, ax=ax, square=True,
            xticklabels=layers, yticklabels=layers if ax in axes[:, 0] else False, cbar_kws={"label": "CKA (no unit)"},
        )  # fmt: skip
        ax.set_title(f"{name}\nmean of diagonal {float(matrix.diagonal().mean()):.2f}", fontsize=9)
        ax.set(xlabel=f"layer of the {'student' if ax in axes[0] else 'network'}")
        ax.set(ylabel="layer, all images" if ax in axes[:, 0] else "")
        ax.tick_params(labelsize=6)
    text = (
        "Linear CKA (unbiased, minibatches of test images) between the layers of a network trained on all images"
        f" ({run.paper.scales[run.args.scale]['measure']['full']['epochs']} epochs) and of students of {chosen[0]}'s"
        f" images at IPC {chosen[1]}, mean of the students."
    )
    if references:
        text += f" Below, for scale: {drawing.listed(REFERENCES[p.cell.method] for p in references)}."
    return drawing.captioned(figure, f"{text} The paper prints no values.", run)


def _similarity(run: Run, planned: Planned) -> torch.Tensor:
    """Mean over the networks of a cell."""
    entries = drawing.entries(run, planned, "similarity")
    return torch.cat([entry.tensors()["similarity"] for entry in entries]).mean(0)


def figure_gain(run: Run) -> Figure | None:
    """Gain over images per class: as printed on the left, ours on the right."""
    ours = drawing.values(run, "table1")
    if ours is None or not len(ours := ours[ours["metric"] == "gain"]):
        return None
    printed = pd.DataFrame(report.load_reported(ROOT / run.paper.name / "reported.csv"))
    printed = printed[(printed["table"] == "table1") & (printed["metric"] == "gain")]
    printed = printed.rename(columns={"value": "accuracy"})
    ours = ours.assign(method=ours["method"].replace(drawing.SHOWN))
    methods = list(dict.fromkeys([*printed["method"], *ours["method"]]))
    palette = dict(zip(methods, sns.color_palette(n_colors=len(methods)), strict=True))
    figure, axes = drawing.axes_of(8.6, 3.2, 1, 2, sharex=True, sharey=True)
    panels = ((printed, "as printed"), (ours, f"ours ({ours['run_on'].iloc[0]})"))
    for ax, (data, title) in zip(axes[0], panels, strict=True):
        order = [m for m in methods if m in set(data["method"])]
        data = data.assign(place=drawing.dodged(data, "method"))
        drawing.lines(data, ax, x="place", hue="method", hue_order=order, palette=palette)
        drawing.ipc_axis(ax, printed["ipc"].astype(int))
        ax.axhline(0, color="0.5", linewidth=0.8)
        ax.set_ylabel("gain (percentage points)")
        ax.set_title(title, fontsize=9)
        ax.get_legend().remove()
    handles = {}
    for ax in axes[0]:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    text = "What mixing with real images adds to test accuracy, printed for CIFAR-10."
    text += f" {drawing.where(ours)} {drawing.ASIDE} {drawing.error_bars(ours)}"
    return drawing.captioned(figure, text, run, ours)


def figure_controls(run: Run) -> Figure | None:
    """Augmentation and mixture, each with and without, and other images: a row an arm, one panel an IPC."""
    data = drawing.values(run, "controls")
    if data is None:
        return None
    data = _with_table1(run, data)
    data = data.assign(method=data["method"].replace(drawing.SHOWN))
    arms, ipcs = list(dict.fromkeys(data["setting"])), sorted(set(data["ipc"]))
    sets = list(dict.fromkeys(data["method"]))
    figure, axes = drawing.axes_of(2.6 + 3.4 * len(ipcs), 1.0 + 0.27 * len(arms), 1, len(ipcs), sharey=True)
    for ax, ipc in zip(axes[0], ipcs, strict=True):
        sns.pointplot(
            data[data["ipc"] == ipc], x="accuracy", y="setting", order=arms, hue="method", hue_order=sets,
            palette=COLOURS[: len(sets)], markers=[*MARKERS[: len(sets)]], markersize=4, linestyle="none",
            errorbar="sd", err_kws={"linewidth": 1}, dodge=0.45 if len(sets) > 1 else False, ax=ax,
        )  # fmt: skip
        ax.set(xlabel="top-1 accuracy (%)", ylabel="", title=f"IPC {ipc}")
        ax.tick_params(labelsize=7)
        ax.get_legend().remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    words = ["with and without augmentation"] if len({arm.split(", ")[0] for arm in arms}) > 1 else []
    words += ["with and without real images mixed in"] if any(arm.endswith("mixed") for arm in arms) else []
    words += ["by Adam and by SGD"] if any(arm.startswith("SGD") for arm in arms) else []
    words += ["a share of the mixture for each image"] if any("a share per image" in arm for arm in arms) else []
    others = {"fractals": "fractals", "any class": "images of any class"}
    others = [what for name, what in others.items() if any(f"mixed with {name}" in arm for arm in arms)]
    words += [f"{' or '.join(others)} mixed in"] if others else []
    fresh = any("alone" in arm for arm in arms)
    words += ["fresh real images of the classes in place of the set"] if fresh else []
    text = "The same sets under the same number of steps" + (f": {drawing.listed(words)}." if words else ".")
    if fresh:
        text += (
            " Mixing reads real images while students train, so what it must beat is real images alone (they stand"
            " with the random real ones)."
        )
    pairs = data.groupby(["ipc", "method"]).ngroups
    if data.groupby(["ipc", "method", "setting"]).ngroups < pairs * len(arms):
        text += " Where a point is missing nothing was run."
    return drawing.captioned(figure, f"{text} {drawing.where(data)} {drawing.error_bars(data)}", run, data)


def _with_table1(run: Run, data: pd.DataFrame) -> pd.DataFrame:
    """The controls with the results of Table I that are the same arms, where these were run for Table I alone."""
    more = drawing.values(run, "table1")
    if more is None:
        return data
    arms = {"baseline": "no augmentation", "mixed": "no augmentation, mixed"}
    more = more[(more["metric"] == "accuracy") & more["setting"].isin(arms) & more["ipc"].isin(set(data["ipc"]))]
    more = more[more["dataset"].isin(set(data["dataset"])) & more["method"].isin(set(data["method"]))]
    more = more.assign(setting=more["setting"].map(arms))
    had = set(zip(data["method"], data["ipc"], data["setting"], strict=True))
    new = [key not in had for key in zip(more["method"], more["ipc"], more["setting"], strict=True)]
    return pd.concat([data, more[new]])


def figure_robustness(run: Run) -> Figure | None:
    """Clean, corrupted and attacked accuracy, without and with mixing, one panel a method at its largest IPC.

    Sets whose students met clean images alone are left out.
    """
    data = drawing.values(run, "robustness")
    if data is None:
        return None
    data = data[data["metric"].isin(METRICS) & data["setting"].isin(ARMS)]
    data = data.assign(arm=data["setting"].map(ARMS), kind=data["metric"].map(METRICS))
    data = data[data.groupby(["method", "ipc"])["metric"].transform("nunique") > 1]
    data = data[data["ipc"] == data.groupby("method")["ipc"].transform("max")]
    if not len(data):
        return None
    methods = list(dict.fromkeys(data["method"]))
    figure, axes = drawing.axes_of(3.0 * len(methods) + 1.6, 3.4, 1, len(methods), sharey=True)
    for ax, method in zip(axes[0], methods, strict=True):
        own = data[data["method"] == method]
        order = [name for name in METRICS.values() if name in set(own["kind"])]
        _bars(own, ax, x="kind", order=order, hue="arm", hue_order=list(ARMS.values()), palette="colorblind")
        there = set(zip(own["kind"], own["arm"], strict=True))
        for place, kind in enumerate(order):
            for side, arm in zip((-0.2, 0.2), ARMS.values(), strict=True):
                if (kind, arm) not in there:  # which would read as 0
                    ax.text(place + side, 0.5, "not run", rotation=90, fontsize=7, ha="center", va="bottom")
        ax.set(xlabel="test images", ylabel="top-1 accuracy (%)")
        ax.set_title(f"{drawing.SHOWN.get(method, method)}, IPC {own['ipc'].iloc[0]}", fontsize=9)
        ax.tick_params(axis="x", rotation=40, labelsize=7)
        ax.get_legend().remove()
    axes[0, 0].set_ylim(bottom=0)  # of all panels, now that they have their bars
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    text = f"{_tests(run, set(data['metric']))}{_compared(run, data)} {drawing.where(data)} {drawing.error_bars(data)}"
    return drawing.captioned(figure, text, run, data)


def _compared(run: Run, data: pd.DataFrame) -> str:
    """How the corrupted images made here compare with the released ones, where students saw both."""
    both = [found for cell in data["cell"].unique() if (found := run.results[cell].get("compared"))]
    if not both:
        return ""
    released, ours = (stats.fmean(v for each in both for v in each[kind]) for kind in ("released", "generated"))
    most = max(abs(each["difference"]) for each in both)
    return (
        f" Corrupted images are those of CIFAR-10-C; without frost the same students have {released:.1f} % on them and"
        f" {ours:.1f} % on images made here, means that differ by {most:.1f} points at most."
    )


def _tests(run: Run, metrics: set[str]) -> str:
    """What the test images of some metrics are, for the caption."""
    words = ["on clean test images"] if "sample accuracy" in metrics else []
    if "corruption accuracy" in metrics:
        severities = run.paper.scales[run.args.scale]["measure"].get("severities", range(1, 6))
        words.append(
            f"under the standard corruptions (mean over severities {', '.join(map(str, severities))}; without frost"
            " where its textures are procedural)"
        )
    if attacks := metrics - {"sample accuracy", "corruption accuracy"}:
        pgd = any(metric.startswith("pgd") for metric in attacks)
        steps = " (PGD: 10 steps of a quarter of it, random start)"
        words.append("under attacks that move a pixel by the given share of its range" + pgd * steps)
    few = run.paper.scales[run.args.scale].get("measure", {}).get("images")
    sample = f" All are measured on the same {few:,} test images, as many of each class." if few else ""
    return f"Students of the same sets {drawing.listed(words)}.{sample}"


def figure_mixtures(run: Run, classes: int = 10, epochs: int = 3) -> Figure | None:
    """One image of each class of a distilled set, and what a student sees of it in its first epochs."""
    cells = [p for p in run.planned if p.cell.table == "table1" and p.cell.setting == "mixed" and p.stages]
    cells = [p for p in cells if p.cell.algorithm != "random-subset" and drawing.entry(run, p, "distill")]
    if not cells:
        return None
    planned = max(cells, key=lambda p: (p.cell.method == "DM", -p.cell.ipc))
    on, tensors = task_of(run.lab, planned.setup), drawing.entry(run, planned, "distill").tensors()
    see = mixture(run.lab, planned.setup, on, tensors)
    rows = [tested_images(tensors).to(on.device), *(see(0, epoch) for epoch in range(epochs))]
    shown = torch.arange(min(classes, len(on.train.classes))) * planned.cell.ipc
    figure, axes = drawing.axes_of(0.75 * len(shown) + 1, 0.8 * len(rows) + 0.3, len(rows), len(shown))
    for r, images in enumerate(rows):
        for column, image in enumerate(on.pixels(images.cpu()[shown])):
            drawing.show_image(axes[r, column], image.expand(3, -1, -1))
        name = f"epoch {r}" if r else f"{planned.cell.method}, alone"
        axes[r, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for column, k in enumerate((shown // planned.cell.ipc).tolist()):
        axes[0, column].set_title(on.train.classes[k], fontsize=8)
    text = (
        f"{run.lab.run_on(planned.setup)},"
        f" {planned.cell.method} at IPC {planned.cell.ipc}: the first image of each class, and"
        " what a student sees of it in its first three epochs. One share for all images of an epoch, another real image"
        " for each."
    )
    return drawing.captioned(figure, text, run)
