"""The figures of Hard Truths: how far label regimes spread the sets, selectors, scores, and what is chosen.

Each function takes a finished `papers.runner.Run` and returns a matplotlib Figure, or None where nothing that it shows
has been made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from common.augment import rng
from common.matching import tested_images
from common.scaling import GRIDS, fit_scaling_law
from methods import coresets
from papers import drawing
from papers.hard_truths.analyses import DCS, dcs, el2n_sl, spearman, very_poor
from papers.matching_stages import task_of, teacher_logits
from papers.measured_stages import GRID, OBJECTIVES, TRAJECTORY
from papers.setups import ImageSetup

if TYPE_CHECKING:
    from papers.runner import Run

__all__ = [
    "common_sets", "convergence", "correlations", "figure1", "figure3", "figure4", "figure5", "figure_regimes",
    "figure_scaling", "figure_scores", "figure_selectors", "figure_sets", "scaling_fits",
]  # fmt: skip

REGIMES = ("HL", "SL", "SL+KD")
MADE = ("CA2D", "DM")  # images that no camera took
OBJECTIVE_WORDS = {
    "BN loss": "BN loss is SRe2L's", "DWA loss": "DWA loss counts the variances more",
    "DM loss": "DM loss is that of random networks",
    "TM loss": "TM loss is MTT's, the mean over start epochs of an expert",
}  # fmt: skip
FAMILIES = ("EL2N", "forgetting", "CAL", "GraphCut")  # sets by one and the same score
TWICE = ", half of it twice"  # ends the name of a degenerate set: half of the images of another one, each twice


def common_sets(data: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """Mean accuracy by IPC: one row a set that has every regime which at least two sets have, one column a regime."""
    found = {}
    for ipc, own in data.groupby("ipc"):
        means = own.groupby(["method", "setting"], sort=False)["accuracy"].mean().unstack("setting")
        regimes = [r for r in REGIMES if r in means and means[r].count() > 1]
        means = means[regimes].dropna()
        if len(means) > 1:
            found[ipc] = means
    return found


def spreads(data: pd.DataFrame) -> pd.DataFrame:
    """Largest minus smallest mean accuracy (points) of `common_sets`, by IPC and regime; nan where there is none."""
    found = {ipc: means.max() - means.min() for ipc, means in common_sets(data).items()}
    spread = pd.DataFrame(found).T.rename_axis("ipc")
    return spread[[r for r in REGIMES if r in spread]]


def figure_regimes(run: Run) -> Figure | None:
    """Accuracy of every set under each regime, one line a set, one panel an IPC; the spread above each regime."""
    data = drawing.values(run, "regimes")
    if data is None or not len(data := data[data["setting"].isin(REGIMES)]):
        return None
    sets = data[data["ipc"].notna()].assign(method=lambda d: d["method"].replace(drawing.SHOWN))
    ipcs, methods = sorted(set(sets["ipc"])), list(dict.fromkeys(sets["method"]))
    hues = sns.color_palette("tab10") if len(methods) <= 10 else sns.color_palette("husl", len(methods))
    palette = dict(zip(methods, hues, strict=False))
    figure, axes = drawing.axes_of(2.6 * len(ipcs) + 2.2, 3.6, 1, len(ipcs), sharey=True)
    spread = spreads(sets)
    for ax, ipc in zip(axes[0], ipcs, strict=True):
        own = sets[sets["ipc"] == ipc]
        there = [regime for regime in REGIMES if regime in set(own["setting"])]
        here = [method for method in methods if method in set(own["method"])]
        aside = own["method"].map(here.index) - (len(here) - 1) / 2  # so that none hides another
        own = own.assign(place=own["setting"].map(there.index) + 0.03 * aside)
        drawing.lines(own, ax, x="place", hue="method", hue_order=methods, palette=palette)
        ax.set(xlabel="label regime", title=f"IPC {int(ipc)}", xticks=range(len(there)), xticklabels=there)
        ax.set_xlim(-0.4, len(there) - 0.6)
        ax.margins(y=0.12)  # room for the spreads
        ax.get_legend().remove()
        for place, regime in enumerate(there):
            if ipc in spread.index and pd.notna(spread.loc[ipc].get(regime)):
                counted, every = len(common_sets(sets)[ipc]), own[own["setting"] == regime]["method"].nunique()
                text = f"{spread.loc[ipc, regime]:.1f}" + (f"\n({counted} of {every})" if counted < every else "")
                ax.annotate(text, (place, own["accuracy"].max()), (0, 6), textcoords="offset points", ha="center")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    told = {
        "HL": "hard labels (HL)", "SL": "one teacher label an image (SL)", "SL+KD": "a teacher label a view (SL+KD)"
    }  # fmt: skip
    words = drawing.listed(text for regime, text in told.items() if regime in set(sets["setting"]))
    text = f"The same sets under {words}, nearly the same number of steps."
    if len(spread):
        text += f" Above each regime: largest minus smallest mean accuracy, in points, {_over(sets)}."
    text += f" {drawing.ASIDE} {drawing.where(sets)} {drawing.error_bars(sets)}"
    return drawing.captioned(figure, text, run, sets)


def _over(sets: pd.DataFrame) -> str:
    """Over which sets the spreads are, for the caption."""
    words, whole = [], True
    for ipc, means in common_sets(sets).items():
        every = list(dict.fromkeys(sets[sets["ipc"] == ipc]["method"]))
        without = [name for name in every if name not in means.index]
        few = len(means) <= len(without)
        text = drawing.listed(means.index) if few else "all" + (f" but {drawing.listed(without)}" if without else "")
        words.append(f"at IPC {int(ipc)} {text}")
        whole &= not without
    return "over all sets" if whole else f"over the sets that have every regime of their panel ({', '.join(words)})"


def figure_selectors(run: Run) -> Figure | None:
    """Every selector under hard labels at each IPC, best first, with random images as a line."""
    data = drawing.values(run, "selectors")
    if data is None or not len(data := data[data["metric"] == "accuracy"]):
        return None
    data = data.assign(method=data["method"].replace(drawing.SHOWN))
    ipcs = sorted(set(data["ipc"]))
    figure, axes = drawing.axes_of(3.6 * len(ipcs) + 1.2, 0.19 * data["method"].nunique() + 1.0, 1, len(ipcs))
    for ax, ipc in zip(axes[0], ipcs, strict=True):
        own = data[data["ipc"] == ipc]
        order = own.groupby("method")["accuracy"].mean().sort_values(ascending=False).index
        sns.barplot(
            own, x="accuracy", y="method", order=order, errorbar="sd", color="C0", ax=ax, err_kws={"linewidth": 1}
        )
        if "random real" in order:
            ax.axvline(own[own["method"] == "random real"]["accuracy"].mean(), color="0.3", linestyle="--", linewidth=1)
        ax.set(xlabel="top-1 accuracy (%)", ylabel="", title=f"IPC {int(ipc)}")
        ax.set_ylim(data["method"].nunique() - 0.5, -0.5)  # bars are as high where there are fewer
        ax.tick_params(labelsize=7)
    dashed = "; dashed: random real images" if "random real" in set(data["method"]) else ""
    text = f"Sets of each kind under hard labels, best first{dashed}. {drawing.where(data)} {drawing.error_bars(data)}"
    return drawing.captioned(figure, text, run, data)


def figure1(run: Run) -> Figure | None:
    """Accuracy of students of a teacher over the views they may see, in training sets, one panel a teacher."""
    data = drawing.values(run, "figure1")
    if data is None:
        return None
    data["passes"] = [settings["budget"] for settings in data["settings"]]
    data["set"] = data["method"].replace(drawing.SHOWN) + ", IPC " + data["ipc"].astype(int).astype(str)
    data["teacher"] = data["setting"].str.split(",").str[0]
    sets, shown = list(dict.fromkeys(data["set"])), list(dict.fromkeys(data["teacher"]))
    palette = dict(zip(sets, sns.color_palette("husl", len(sets)), strict=True))
    figure, axes = drawing.axes_of(3.2 * len(shown) + 1.8, 3.4, 1, len(shown), sharey=True)
    for ax, name in zip(axes[0], shown, strict=True):
        own = data[data["teacher"] == name]
        drawing.lines(own, ax, x="passes", hue="set", hue_order=sets, palette=palette)
        right = sorted(set(own["teacher_accuracy"].dropna()))
        ax.set(xscale="log", title=f"{name}, {' and '.join(f'{a:.1f} %' for a in right)}")
        ax.set(xlabel="budget (passes over the training set)")
        ax.set_xticks(sorted(set(own["passes"])), [f"{x:g}" for x in sorted(set(own["passes"]))])
        ax.minorticks_off()
        ax.get_legend().remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    text = (
        "Students that learn what a teacher says of each view (SL+KD): do sets of other images and sizes end alike once"
        " their students see as many views? The budget counts views in training sets; a smaller set is seen more often,"
        " and where it is smaller than a batch its students take more steps."
        f" {drawing.where(data)} {drawing.error_bars(data)}"
    )
    return drawing.captioned(figure, text, run, data)


def figure4(run: Run) -> Figure | None:
    """MTT's loss of each set over the epoch of an expert that its student starts from, one panel a data set and IPC."""
    cells = [p for p in run.planned if p.cell.table == "figure4" and drawing.entry(run, p, "objective")]
    if not cells:
        return None
    panels = list(dict.fromkeys((run.lab.run_on(p.setup), p.cell.ipc) for p in cells))
    colors = {name: f"C{place}" for place, name in enumerate(dict.fromkeys(p.cell.method for p in cells))}
    figure, axes = drawing.axes_of(3.4 * len(panels) + 1.6, 3.2, 1, len(panels), sharey=True)
    drawn = {}
    for ax, panel in zip(axes[0], panels, strict=True):
        for planned in (p for p in cells if (run.lab.run_on(p.setup), p.cell.ipc) == panel):
            made, name, arch = drawing.entry(run, planned, "objective"), planned.cell.method, planned.cell.arch
            starts, losses = made.meta["settings"]["starts"], made.tensors()["losses"]
            label = drawing.SHOWN.get(name, name) + ("" if arch == "ConvNet" else f", {arch}")
            style = {"color": colors[name], "linestyle": "-" if arch == "ConvNet" else "--", "label": label}
            (drawn[label],) = ax.plot(starts, losses, marker="o", **style)
        ax.set(xlabel="start epoch of the expert", title=f"{panel[0]}, IPC {panel[1]}")
        ax.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("TM loss (no unit)")
    figure.legend(handles=list(drawn.values()), loc="outside right upper", frameon=False, fontsize=8)
    steps = cells[0].setup.measure["trajectory"]
    others = " Dashed: the expert and the student are of another network than the ConvNet."
    text = (
        f"How far a student ends from an expert {steps['epochs']} epochs on, after {steps['steps']} steps on each set,"
        " by the epoch of the expert that it starts from; 1 is where it started. One expert, full batches, no"
        f" augmentation, step size {steps['lr']:g}.{others if any(p.cell.arch != 'ConvNet' for p in cells) else ''} Run"
        f" on {' and '.join(dict.fromkeys(run_on for run_on, _ in panels))}."
    )
    return drawing.captioned(figure, text, run)


def convergence(run: Run) -> pd.DataFrame | None:
    """Results of figure 5, one row a student, with the epochs it was trained for."""
    data = drawing.values(run, "figure5")
    if data is not None:
        data["epochs"] = [settings["protocol"]["epochs"] for settings in data["settings"]]
        data["error"] = 100 - data["accuracy"]
    return data


def figure5(run: Run) -> Figure | None:
    """Error of students under hard labels over their epochs, a complete schedule each, one panel an IPC.

    One number of epochs shows no curve: None until there are two.
    """
    data = convergence(run)
    if data is None:
        return None
    data = data[data.groupby("ipc")["epochs"].transform("nunique") > 1]
    if not len(data):
        return None
    data = data.assign(
        method=data["method"].replace(drawing.SHOWN),
        images=["made" if method in MADE else "real" for method in data["method"]],
    )
    ipcs, methods = sorted(set(data["ipc"])), list(dict.fromkeys(data["method"]))
    figure, axes = drawing.axes_of(3.4 * len(ipcs) + 1.8, 3.4, 1, len(ipcs), sharey=True)
    for ax, ipc in zip(axes[0], ipcs, strict=True):
        sns.lineplot(
            data[data["ipc"] == ipc], x="epochs", y="error", hue="method", hue_order=methods, style="images",
            style_order=["made", "real"], errorbar="sd", err_style="bars", err_kws={"capsize": 3}, markers=True, ax=ax,
        )  # fmt: skip
        ticks = sorted(set(data["epochs"]))
        ax.set(xscale="log", xlabel="epochs of a student (log scale)", title=f"IPC {int(ipc)}")
        ax.set_ylabel("top-1 error, hard labels (%)")
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.get_legend().remove()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=7)
    text = "The same sets, students that train for longer"
    if data["images"].nunique() > 1:
        text += ": real images (dashed) are used up earlier than made ones if their lines turn flat earlier"
    return drawing.captioned(figure, f"{text}. {drawing.where(data)} {drawing.error_bars(data)}", run, data)


def figure_scaling(run: Run) -> Figure | None:
    """Mean error of students after each pass, and the scaling law fitted to it, one panel a label regime."""
    cells = [p for p in run.planned if p.cell.table == "scaling" and p.cell.metric == "b"]
    found = [(p, made) for p in cells if (made := drawing.entry(run, p, "law")) is not None]
    if not found:
        return None
    regimes = [regime for regime in REGIMES if any(p.cell.setting == regime for p, _ in found)]
    ends, failed, above = GRIDS[GRID][1][[0, -1]], [], False
    figure, axes = drawing.axes_of(3.6 * len(regimes) + 2.0, 3.4, 1, len(regimes), sharey=True)
    for ax, regime in zip(axes[0], regimes, strict=True):
        for color, (planned, made) in enumerate((p, made) for p, made in found if p.cell.setting == regime):
            tensors, meta = made.tensors(), made.meta
            name = f"{drawing.SHOWN.get(planned.cell.method, planned.cell.method)}, IPC {planned.cell.ipc}"
            tau = meta["tau"][0]
            at_end = min(abs(ends - tau)) < 1e-6
            if at_end:
                failed.append(f"{name} under {regime}")
            above |= bool((tensors["law"] > 1).any())
            label = f"{name}: b {meta['b'][0]:.2f}, tau {tau:.1f}"
            ax.plot(tensors["epochs"], 100 * tensors["errors"], "o", color=f"C{color}", markersize=3)
            ax.plot(tensors["epochs"], 100 * tensors["law"], color=f"C{color}", label=label)
            if at_end:
                n, curve = meta["settings"]["images"], [tensors[k].tolist() for k in ("errors", "epochs")]
                wide = fit_scaling_law(n, *curve, "wide")
                label = f"tau up to {GRIDS['wide'][1][-1]:,.0f}: b {wide.b:.2f}, tau {wide.tau:.0f}"
                ax.plot(tensors["epochs"], 100 * wide.curve, "--", color=f"C{color}", label=label)
        ax.set(xscale="log", xlabel="passes over the set (log scale)", title=regime)
        ax.legend(frameon=False, fontsize=7)
    axes[0, 0].set_ylabel("top-1 error (%)")
    axes[0, 0].set_ylim(top=min(axes[0, 0].get_ylim()[1], 100))  # shared
    text = (
        "Mean error of students after their passes (points), and Eqs 7 and 8 fitted to it (lines): y = a n^b prod_j"
        " (n_j / n_{j-1})^(b_j) + d, where b_j = b 2^(-(j-1)/tau). A lower b is a more useful set, a larger tau one"
        f" that is used up more slowly. Run on {run.lab.run_on(found[0][0].setup)}."
    )
    if failed:
        which = "every line" if len(failed) == len(found) else drawing.listed(failed)
        text += (
            f" The fit fails for {which}: tau lies at the end of the grid that is searched, {ends[0]:g} to"
            f" {ends[1]:g} passes, so neither it nor b can be read; dashed: the same law with a larger tau."
        )
    if above:
        text += " A fitted error above 100 %, which no student can have, is cut off."
    return drawing.captioned(figure, text, run)


def scaling_fits(run: Run) -> pd.DataFrame:
    """One row a fitted curve: b and tau with the range of 95 % of each, d and R^2; "(end)": the last of the grid."""
    found = {
        (r["method"], r["setting"], r["ipc"], r["metric"]): r
        for r in run.results.values()
        if r["table"] == "scaling" and "interval" in r
    }
    ends = {"b": GRIDS[GRID][0][[0, -1]], "tau": GRIDS[GRID][1][[0, -1]]}
    rows = []
    for method, labels, ipc in dict.fromkeys(key[:3] for key in found):
        row, fit = {"method": method, "labels, IPC": f"{labels}, {ipc}"}, {}
        for name, digits in (("b", 3), ("tau", 1)):
            result = found.get((method, labels, ipc, name))
            if result is None:
                continue
            fit = result["fit"]

            def told(value: float, ends=ends[name], digits=digits) -> str:
                return f"{value:.{digits}f}" + (" (end)" if min(abs(ends - value)) < 1e-6 else "")

            low, high = result["interval"]
            row |= {name: told(result["mean"]), f"{name}, 95 %": f"{told(low)} to {told(high)}"}
        rows.append(row | {"d (%)": f"{100 * fit['d']:.1f}", "R2": f"{fit['r2']:.3f}"})
    return pd.DataFrame(rows)


def subsets(run: Run, objective: str) -> pd.DataFrame:
    """One row a set of the table of selectors: method, IPC, mean error of its students (%), loss, very poor or not."""
    rows = [r for r in run.results.values() if r["table"] == "selectors"]
    judges = {drawing.teacher_of(r) for r in rows if r["metric"] == objective}
    if len(judges) > 1:  # teachers of several runs: losses of one alone can be compared
        last = drawing.teacher_of(max((r for r in rows if r["metric"] == objective), key=lambda r: r["finished"]))
        rows = [r for r in rows if r["metric"] != objective or drawing.teacher_of(r) == last]
    found = {(r["method"], r["ipc"], r["metric"]): r["mean"] for r in rows}
    sets = [s for s in dict.fromkeys((m, i) for m, i, _ in found) if {(*s, "accuracy"), (*s, objective)} <= set(found)]
    data = pd.DataFrame(
        [(m, i, 100 - found[m, i, "accuracy"], found[m, i, objective]) for m, i in sets],
        columns=["method", "ipc", "error", "loss"],
    )
    return data.assign(poor=very_poor(100 - data["error"], data["ipc"]) if len(data) else False)


def correlations(run: Run, *, poor: bool = False) -> dict[str, DCS]:
    """DCS of every objective on the sets of the table of selectors, where there are enough of them.

    poor: with the sets that are left out for their accuracy, see `very_poor`.  The bootstrap draws all sets of a
    selector, or of those that share a score, together.
    """
    found = {}
    for objective in (*OBJECTIVES, TRAJECTORY):
        data = subsets(run, objective)
        data = data if poor else data[~data["poor"].astype(bool)]
        groups = [next((f for f in FAMILIES if name.startswith(f)), name) for name in data["method"]]
        if len(set(groups)) >= 4:  # fewer say nothing, and a bootstrap over them less
            found[objective] = dcs(data["loss"], data["error"], data["ipc"], groups, generator=rng(0, "dcs"))
    return found


def figure3(run: Run) -> Figure | None:
    """Error of students over the loss of an objective, one point a set, one panel an objective."""
    found = correlations(run)
    if not found:
        return None
    columns = 2 if len(found) == 4 else len(found)
    lines = len(found) // columns
    figure, axes = drawing.axes_of(3.8 * columns + 0.8, 3.3 * lines, lines, columns, sharey=True)
    for ax, (objective, score) in zip(axes.flat, found.items(), strict=True):
        data = subsets(run, objective)
        sns.scatterplot(data, x="loss", y="error", hue="ipc", style="ipc", palette="viridis", s=24, ax=ax)
        poor, twice = data[data["poor"]], data[data["method"].str.endswith(TWICE)]
        ax.plot(poor["loss"], poor["error"], "x", color="C3", markersize=8)
        ax.plot(twice["loss"], twice["error"], "o", color="C1", markersize=10, fillstyle="none")
        wide = data["loss"].max() > 5 * data["loss"].min() > 0
        ax.set(xlabel=f"{objective} of the images (no unit)", xscale="log" if wide else "linear")
        ax.set_ylabel("error of students, hard labels (%)")
        ax.get_legend().set_title("IPC")
        given = f"{score.partial:.2f} [{score.low:.2f}, {score.high:.2f}]"
        ax.set_title(f"rho {score.rho:.2f}, given IPC {given}", fontsize=9)
    count = next(iter(found.values())).subsets
    left_out = any(subsets(run, objective)["poor"].any() for objective in found)
    crossed = left_out * " Crossed out, and not counted: accuracy below 70 % of the best at that IPC."
    degenerate = any(subsets(run, objective)["method"].str.endswith(TWICE).any() for objective in found)
    ringed = degenerate * " Ringed: half of a set, every image twice."
    text = (
        f"{count} sets of real images, chosen in different ways: does a lower loss go with a lower error (rho near 1)?"
        f" {'; '.join(OBJECTIVE_WORDS[name] for name in found)};"
        " rank correlation of all sets, and given IPC with its 95 % interval from the bootstrap over selectors."
        f"{crossed}{ringed} {drawing.where(drawing.values(run, 'selectors'))}"
    )
    return drawing.captioned(figure, text, run)


def figure_scores(run: Run, most: int = 5000) -> Figure | None:
    """EL2N against EL2N-SL of `most` training images, evenly spaced: distributions, and how the two rank."""
    cells = [p for p in run.planned if p.cell.algorithm == "coreset" and p.stages and not p.cell.teacher]
    cells = [p for p in cells if not isinstance(p.setup, ImageSetup)]  # a bank of a stream has no errors of each class
    cells.sort(key=lambda p: coresets.METHODS[p.setup.distill["method"]] != "early")  # EL2N's own run, if there
    for planned in cells:
        bank, on = drawing.entry(run, planned, "bank"), task_of(run.lab, planned.setup)
        teacher = run.lab.teacher(planned.setup.taught_by(on)) if planned.setup.teacher_network else None
        if bank is not None and teacher is not None and run.lab.store.get(teacher.name, run.lab.key(teacher)):
            break
    else:
        return None
    tensors = bank.tensors()
    total = len(tensors["labels"])
    rows = torch.linspace(0, total - 1, min(most, total)).long()
    error, labels = tensors["err_final"][rows], tensors["labels"][rows]
    p = error + torch.nn.functional.one_hot(labels, error.shape[1])
    logits = teacher_logits(run.lab, planned.setup, on, on.train.images[rows])
    hard, soft = error.norm(dim=1), el2n_sl(p.clamp(min=1e-12).log(), logits)
    rho = spearman(hard.numpy(), soft.numpy())
    figure, axes = drawing.axes_of(7.6, 3.0, 1, 2)
    for values, name in ((hard / hard.max(), "EL2N"), (soft / soft.max(), "EL2N-SL")):
        sns.kdeplot(values.numpy(), ax=axes[0, 0], label=name, clip=(0, 1), fill=True, alpha=0.3)
    axes[0, 0].set(xlabel="score (share of its largest)", ylabel="density")
    axes[0, 0].legend(frameon=False)
    hexagons = axes[0, 1].hexbin(hard.numpy(), soft.numpy(), gridsize=40, cmap="viridis", bins="log", mincnt=1)
    axes[0, 1].set(xlabel="EL2N (no unit)", ylabel="EL2N-SL, T = 20 (no unit)", title=f"rank correlation {rho:.2f}")
    figure.colorbar(hexagons, ax=axes[0, 1], label="training images in a hexagon (log scale)")
    text = (
        f"Scores of {len(rows)} of the {total} training images ({run.lab.run_on(planned.setup)}), evenly spaced, at the"
        " end of the scoring run: distance of the prediction from the label (EL2N), and from the teacher's prediction,"
        " both at temperature 20, divided by 20 (EL2N-SL, Lemma 1)."
    )
    return drawing.captioned(figure, text, run)


def figure_sets(run: Run, classes: int = 10) -> Figure | None:
    """The first image of some classes in each set of the comparison, at the smallest IPC that most sets have."""
    cells = [p for p in run.planned if p.cell.table == "regimes" and p.cell.setting == "HL" and p.cell.ipc == 10]
    found = [(p, made) for p in cells if (made := drawing.entry(run, p, "distill")) is not None]
    if not found:
        return None
    first = task_of(run.lab, found[0][0].setup)
    shown = torch.linspace(0, len(first.train.classes) - 1, min(classes, len(first.train.classes))).long()
    figure, axes = drawing.axes_of(0.75 * len(shown) + 1.6, 0.8 * len(found) + 0.3, len(found), len(shown))
    for row, (planned, made) in enumerate(found):
        tensors = made.tensors()
        images = tested_images(tensors)[[int((tensors["labels"] == k).nonzero()[0]) for k in shown]]
        for column, image in enumerate(task_of(run.lab, planned.setup).pixels(images)):
            drawing.show_image(axes[row, column], image.expand(3, -1, -1))
        name = drawing.SHOWN.get(planned.cell.method, planned.cell.method)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    for column, k in enumerate(shown.tolist()):
        axes[0, column].set_title(first.train.classes[k], fontsize=8)
    run_on = run.lab.run_on(found[0][0].setup)
    text = f"The first image of each class, that of the best score where images are scored. {run_on}, IPC 10."
    return drawing.captioned(figure, text, run)
