"""The figures of the survey: what it collects, as printed, and the leaderboard of our own runs.

Each function takes a finished `papers.runner.Run` and returns a matplotlib Figure, or None where nothing that it shows
has been made.  Numbers whose note begins with "doubtful:" are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from common import scaling
from papers import drawing, report
from papers.cells import ROOT

if TYPE_CHECKING:
    from papers.runner import Run

__all__ = [
    "figure_compression", "figure_ipc", "figure_leaderboard", "figure_years", "leaderboard_printed",
    "leaderboard_scores",
]  # fmt: skip

TRAIN_IMAGES = {"CIFAR-10": 50_000, "CIFAR-100": 50_000, "Tiny ImageNet": 100_000, "ImageNet-1K": 1_281_167}
CLASSES = {"CIFAR-10": 10, "CIFAR-100": 100, "Tiny ImageNet": 200, "ImageNet-1K": 1000}
SETTINGS = ("HL", "HL, no augmentation", "SL", "SL+KD")


def collected() -> pd.DataFrame:
    """The accuracies of Table 2 that are not doubtful, with family and year of their method."""
    data = pd.DataFrame(report.load_reported(ROOT / "survey" / "reported.csv"))
    data = data[(data["table"] == "table2") & ~data["note"].str.startswith("doubtful:")]
    methods = _methods()
    years = methods["cited_year"].fillna(methods["year"])
    return data.assign(family=data["setting"], year=data["method"].map(years), accuracy=data["value"])


def _methods() -> pd.DataFrame:
    """Family, network and years of the survey's methods, by name."""
    return pd.read_csv(ROOT / "survey" / "methods.csv").drop_duplicates("method").set_index("method")


def _left_out() -> str:
    """How many numbers the figures leave out."""
    every = [r for r in report.load_reported(ROOT / "survey" / "reported.csv") if r["table"] == "table2"]
    return f"; {len(every) - len(collected())} of {len(every)}, doubtful by their notes, are left out"


def _looks(families: list[str]) -> dict[str, dict]:
    """A colour and a marker of its own for each family, up to twenty and fourteen: strong colours first, then pale."""
    pairs, markers = sns.color_palette("tab20"), "os^Dv<>PX*dph8"
    colours = [*pairs[::2], *pairs[1::2]]
    return {f: {"color": colours[n % 20], "marker": markers[n % len(markers)]} for n, f in enumerate(families)}


def _legend_aside(figure: Figure, axes) -> None:
    """One legend for all panels."""
    handles: dict = {}
    for ax in axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
        if ax.get_legend():
            ax.get_legend().remove()
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=7)


def figure_ipc(run: Run) -> Figure:
    """Every printed accuracy over images per class, coloured by family, one panel a data set."""
    data = collected()
    families = sorted(set(data["family"]))
    looks = _looks(families)
    figure, axes = drawing.axes_of(11.5, 3.2, 1, len(CLASSES))
    for ax, dataset in zip(axes[0], CLASSES, strict=True):
        own = data[data["dataset"] == dataset]
        for family in (f for f in families if f in set(own["family"])):
            for _, one in own[own["family"] == family].groupby(["method", "arch"]):
                one = one.sort_values("ipc")
                ax.plot(one["ipc"], one["accuracy"], markersize=3.5, linewidth=0.7, label=family, **looks[family])
        drawing.ipc_axis(ax, own["ipc"].astype(int))
        ax.tick_params(axis="x", labelsize=6)
        ax.set(title=dataset, ylabel="printed top-1 accuracy (%)" if ax is axes[0, 0] else "")
    _legend_aside(figure, axes[0])
    text = (
        f"Accuracies as the survey prints them, one line a method and network{_left_out()}. Each is another"
        " paper's claim under a protocol of its own: networks, labels and epochs differ, so lines do not rank methods."
    )
    return drawing.captioned(figure, text)


def figure_years(run: Run) -> Figure:
    """The best printed accuracy up to each year, by data set and images per class."""
    data = collected().dropna(subset=["year"])
    figure, axes = drawing.axes_of(11.5, 3.0, 1, len(CLASSES))
    for ax, dataset in zip(axes[0], CLASSES, strict=True):
        own = data[data["dataset"] == dataset]
        for number, ipc in enumerate((1, 10, 50)):
            best = own[own["ipc"] == ipc].groupby("year")["accuracy"].max()
            best = best.reindex(sorted(set(own["year"]))).cummax().ffill().dropna()
            if len(best):
                look = {"where": "post", "marker": "o", "markersize": 3, "color": f"C{number}"}
                ax.step(best.index, best, label=f"IPC {ipc}", **look)
        ax.set(title=dataset, xlabel="year of the reference")
        ax.set_xticks(sorted(set(own["year"].astype(int))))
        ax.tick_params(axis="x", labelsize=7)
    axes[0, 0].set_ylabel("best printed accuracy so far (%)")
    _legend_aside(figure, axes[0])
    text = (
        f"Best accuracy that the survey prints up to each year{_left_out()}. Soft labels of a teacher and larger"
        " networks came with the decoupled methods, so part of the rise is the protocol."
    )
    return drawing.captioned(figure, text)


def figure_compression(run: Run) -> Figure:
    """Printed accuracy over the share of the training images that is kept, one panel a data set."""
    data = collected()
    kept = data["ipc"] * data["dataset"].map(CLASSES) / data["dataset"].map(TRAIN_IMAGES)
    data = data.assign(kept=100 * kept)
    families = sorted(set(data["family"]))
    looks = _looks(families)
    figure, axes = drawing.axes_of(11.5, 3.2, 1, len(CLASSES))
    for ax, dataset in zip(axes[0], CLASSES, strict=True):
        for family, own in data[data["dataset"] == dataset].groupby("family"):
            ax.plot(own["kept"], own["accuracy"], linestyle="", markersize=4, label=family, **looks[family])
        ax.set(xscale="log", xlabel="images kept (%, log scale)", title=dataset)
        ax.set_ylabel("printed top-1 accuracy (%)" if ax is axes[0, 0] else "")
    _legend_aside(figure, axes[0])
    text = (
        "Accuracies as printed over how much of the training set is kept; the bytes of soft labels are not counted."
        " Each is another paper's claim under a protocol of its own, so points do not rank methods."
    )
    return drawing.captioned(figure, text)


def figure_leaderboard(run: Run) -> Figure | None:
    """Our runs: every set under one recipe for each kind of label, one panel an IPC."""
    data = drawing.values(run, "leaderboard")
    if data is None or not len(data := data[data["ipc"].notna()]):
        return None
    ipcs, shown = sorted(set(data["ipc"])), [s for s in SETTINGS if s in set(data["setting"])]
    palette = dict(zip(SETTINGS, sns.color_palette("colorblind"), strict=False))
    figure, axes = drawing.axes_of(4.4 * len(ipcs) + 1.2, 3.4, 1, len(ipcs), sharey=True)
    for ax, ipc in zip(axes[0], ipcs, strict=True):
        own = data[data["ipc"] == ipc].assign(method=lambda d: d["method"].replace(drawing.SHOWN))
        order = own[own["setting"] == "HL"].groupby("method")["accuracy"].mean().sort_values(ascending=False).index
        sns.barplot(
            own, x="method", y="accuracy", order=order, hue="setting", hue_order=shown, errorbar="sd",
            palette=palette, capsize=0.15, err_kws={"linewidth": 1}, ax=ax,
        )  # fmt: skip
        ax.set(xlabel="", ylabel="top-1 accuracy (%)", title=f"IPC {int(ipc)}")
        ax.tick_params(axis="x", rotation=40, labelsize=7)
    _legend_aside(figure, axes[0])
    told = {"SL": "one teacher label an image", "SL+KD": "a teacher label a view"}
    words = "".join(f"; {setting}: {text}" for setting, text in told.items() if setting in shown)
    text = (
        "The same student and recipe for every set, ordered by accuracy under hard labels (HL)"
        f"{words}. Compare bars of a colour: hard labels are learned with SGD, soft ones with AdamW."
        " Where a bar is missing nothing was run."
        f" {drawing.where(data)} {drawing.error_bars(data)}"
    )
    return drawing.captioned(figure, text, run, data)


def leaderboard_scores(run: Run) -> pd.DataFrame:
    """One row a set and IPC: accuracies, hard-label recovery, improvement over random, robust scores, seconds, bytes.

    Scores are percentage points and percent, each with the deviation that follows from its accuracies; one whose
    accuracies were not all run is missing.
    """
    found = {(r["method"], r["ipc"], r["setting"]): r for r in run.results.values() if r["table"] == "leaderboard"}
    full = next((r for (m, _, _), r in found.items() if m == "All training images"), None)

    def of(method: str, ipc: int, setting: str) -> list[float] | None:
        return [v / 100 for v in found[method, ipc, setting]["values"]] if (method, ipc, setting) in found else None

    rows = []
    for method, ipc in sorted(dict.fromkeys((m, i) for m, i, _ in found if i is not None), key=lambda key: key[1]):
        hard, plain, soft = (of(method, ipc, s) for s in ("HL", "HL, no augmentation", "SL+KD"))
        rivals = {s: of("Random", ipc, s) for s in SETTINGS}
        whole = [v / 100 for v in full["values"]] if full else None
        scores: dict[str, scaling.Score | None] = {}
        scores["hard-label recovery"] = scaling.hard_label_recovery(whole, hard) if whole and hard else None
        for setting in SETTINGS:
            both = method != "Random" and (ours := of(method, ipc, setting)) and rivals[setting]
            scores[f"over random, {setting}"] = scaling.improvement_over_random(ours, rivals[setting]) if both else None
        both = method != "Random" and whole and hard and soft and rivals["SL+KD"]
        scores["label robust score"] = scaling.label_robust_score(soft, rivals["SL+KD"], whole, hard) if both else None
        both = method != "Random" and hard and plain and rivals["HL"] and rivals["HL, no augmentation"]
        four = hard, rivals["HL"], plain, rivals["HL, no augmentation"]
        scores["augmentation robust score"] = scaling.augmentation_robust_score(*four) if both else None
        cell = found.get((method, ipc, "HL")) or next(r for (m, i, _), r in found.items() if (m, i) == (method, ipc))
        seconds = {name: s for name, s in cell["seconds"].items() if name not in ("students", "evaluate")}
        row = {"method": method, "ipc": ipc}
        row |= {s: found[method, ipc, s]["mean"] if (method, ipc, s) in found else None for s in SETTINGS}
        for name, score in scores.items():
            row |= {name: score and 100 * score.value, f"{name} std": score and 100 * score.std}
        row |= {"seconds of a teacher": seconds.pop("teacher", 0.0), "seconds to make": sum(seconds.values())}
        row |= {"image bytes": cell["bytes"]["images"]}
        soft_cell = found.get((method, ipc, "SL"))  # under SL+KD none are stored, and the teacher itself is needed
        rows.append(row | {"label bytes, SL": soft_cell and soft_cell["bytes"]["labels"]})
    return pd.DataFrame(rows)


def leaderboard_printed(run: Run) -> pd.DataFrame:
    """One row a set and IPC whose method the survey has: our accuracies, and what it prints of the method's family.

    Every printed number is of the protocol and network of its own paper, so none is to be subtracted from ours.
    """
    data = collected()
    data = data[data["dataset"] == "CIFAR-10"]
    families = _methods()["family"]
    rows = []
    for ours in leaderboard_scores(run).to_dict("records"):
        method, ipc = ours["method"], ours["ipc"]
        if method not in families:
            continue
        kin = data[(data["family"] == families[method]) & (data["ipc"] == ipc)].set_index("method")["accuracy"]
        row = {"method": method, "ipc": ipc} | {f"ours, {setting}": ours[setting] for setting in ("HL", "SL+KD")}
        row |= {"printed": kin.get(method), "family": families[method], "methods": len(kin)}
        words = {"least": "min", "median": "median", "most": "max"}
        row |= {f"family, {word}": kin.agg(what) if len(kin) else None for word, what in words.items()}
        rows.append(row | {"which has most": kin.idxmax() if len(kin) else "-"})
    return pd.DataFrame(rows)
