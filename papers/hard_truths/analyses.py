"""Do the losses of distillation methods know which subset is good?  And what does an image teach under soft labels?

Rethinking Dataset Distillation: Hard Truths about Soft Labels (arXiv 2604.18811), supplement:

EL2N-SL  Section 4: the norm of an image's gradient under the labels of a teacher (`el2n_sl`)
DCS      Section 7: rank correlation between the loss that an objective gives to a subset and the error of a student
         trained on that subset (`dcs`); +1 for an objective that orders subsets as their students do

The losses are those of papers/objectives.py.  The tables run DCS of four on the sets of the table of selectors: Eqs 1
and 2 on exact statistics of the whole subset (`bn_loss`, `dwa_loss`), Eq. 4 from the start epochs of one expert
(`tm_loss`) and Eq. 5 of five random networks, images as they are (`dm_loss`).

Where the paper is silent, and what is taken here:
  size of a subset   "adjusted for", without a formula  -> partial Spearman: ranks of loss and error, each freed of what
                     a line in the rank of IPC explains, then Pearson; beside it the plain one and one for each IPC
  poor subsets       "extremely poor" ones are left out  -> more than 30 % below the best accuracy at their IPC
  doubled subsets    "repeating the elements twice"  -> half of each class, twice, of unchanged size
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

__all__ = ["DCS", "dcs", "el2n_sl", "partial_spearman", "spearman", "very_poor"]


# ---------------------------------------------------------------- EL2N under soft labels


def el2n_sl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 20.0) -> Tensor:
    """(1/T) E |p - q|_2 of each image, p and q softmax at temperature T of student and teacher: float32 [N].

    student_logits [R, N, K], the mean is over R training runs, or [N, K]; teacher_logits [N, K].  Lemma 1: with logits
    whose parameter gradients are orthogonal and of one length c, c times this is the length of the gradient of
    KL(q | p).  At T = 20 both are nearly uniform and the values tiny: compare ranks, not thresholds.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} is not allowed; it must be above 0")
    if student_logits.dim() not in (2, 3) or student_logits.shape[-2:] != teacher_logits.shape:
        raise ValueError(
            f"student_logits are {list(student_logits.shape)} and teacher_logits {list(teacher_logits.shape)}; needs "
            "[R, N, K] or [N, K], and [N, K]"
        )
    p, q = ((logits.double() / temperature).softmax(-1) for logits in (student_logits, teacher_logits))
    distance = (p - q).norm(dim=-1)  # [N] or [R, N]
    return ((distance.mean(0) if distance.dim() == 2 else distance) / temperature).float()


# ---------------------------------------------------------------- DCS: does a loss order subsets as students do?


@dataclass(frozen=True)
class DCS:
    """Spearman correlations between the losses and the errors of subsets; nan where `reason` says why."""

    rho: float  # all subsets together, whatever their size
    partial: float  # given IPC
    low: float  # 95 % interval of `partial`, from the bootstrap
    high: float
    resamples: int  # of the bootstrap, those that have a correlation
    within: float  # mean of the correlations in `per_ipc`
    per_ipc: dict[int, tuple[float, int]]  # IPC -> correlation, subsets
    subsets: int
    reason: str  # empty where everything is a number


def dcs(losses, errors, ipc, groups=None, *, generator: torch.Generator, resamples: int = 1000, least: int = 3) -> DCS:
    """DCS of an objective: its losses on m subsets, the errors of students trained on them, images per class; [m] each.

    ValueError for fewer than 4 subsets, or a number that is not finite.
    groups [m]: subsets with one name depend on each other (such as one and its doubled form) and are drawn together by
    the bootstrap; None: each is drawn alone.  An IPC with fewer than `least` subsets has no correlation of its own.
    """
    losses, errors, ipc = (np.asarray(values, float) for values in (losses, errors, ipc))
    m = len(losses)
    groups = np.arange(m) if groups is None else np.asarray(groups)
    if not (losses.shape == errors.shape == ipc.shape == groups.shape == (m,)):
        shapes = [v.shape for v in (losses, errors, ipc, groups)]
        raise ValueError(f"losses, errors, ipc and groups have shapes {shapes}; needs one number a subset in each")
    if m < 4:
        raise ValueError(f"{m} subsets are too few for a partial correlation; the least is 4")
    for name, values in (("losses", losses), ("errors", errors), ("ipc", ipc)):
        if not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"{name}[{bad}]={values[bad]} is not finite; leave that subset out")

    per_ipc = {}
    for size in np.unique(ipc):
        own = ipc == size
        per_ipc[int(size)] = (spearman(losses[own], errors[own]) if own.sum() >= least else math.nan, int(own.sum()))
    defined = [rho for rho, _ in per_ipc.values() if not math.isnan(rho)]
    rho, partial = spearman(losses, errors), partial_spearman(losses, errors, ipc)
    drawn = np.array([partial_spearman(losses[rows], errors[rows], ipc[rows])
                      for rows in _bootstrap(groups, resamples, generator)])  # fmt: skip
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.quantile(drawn, (0.025, 0.975)) if len(drawn) > resamples / 2 else (math.nan, math.nan)
    return DCS(
        rho, partial, float(low), float(high), len(drawn), float(np.mean(defined)) if defined else math.nan, per_ipc, m,
        _reason(losses, errors, ipc, len(drawn), resamples),
    )  # fmt: skip


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of ranks, equal values share the mean of theirs; nan where x or y is constant."""
    return _pearson(rankdata(x), rankdata(y))


def partial_spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray) -> float:
    """Correlation of what a line in rank(given) leaves of rank(x) and of rank(y).

    Ranks make log IPC and IPC the same.  nan where nothing is left of x or y.
    """
    z = rankdata(given)
    z -= z.mean()

    def rest(values: np.ndarray) -> np.ndarray:
        ranks = rankdata(values)
        return ranks - (ranks @ z) / (z @ z or 1.0) * z  # the intercept falls out of the correlation

    return _pearson(rest(x), rest(y))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    lengths = np.linalg.norm(x), np.linalg.norm(y)
    if min(lengths) < 1e-9 * len(x):  # ranks are whole or half numbers: this is rounding
        return math.nan
    return float(x @ y / (lengths[0] * lengths[1]))


def _bootstrap(groups: np.ndarray, resamples: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    """Rows of each resample: as many groups as there are, drawn with replacement, all rows of each."""
    members = [np.flatnonzero(groups == name) for name in np.unique(groups)]
    for drawn in torch.randint(len(members), (resamples, len(members)), generator=generator).tolist():
        yield np.concatenate([members[i] for i in drawn])


def _reason(losses: np.ndarray, errors: np.ndarray, ipc: np.ndarray, found: int, resamples: int) -> str:
    """Why a correlation or its interval is nan; empty where both are numbers."""
    for name, values in (("losses", losses), ("errors", errors)):
        if (values == values[0]).all():
            return f"all {name} are equal"
        if math.isnan(partial_spearman(values, values, ipc)):
            return f"the order of the {name} follows from IPC alone"
    return "" if found > resamples / 2 else f"only {found} of {resamples} resamples have a correlation"


def very_poor(accuracies, ipc, share: float = 0.3) -> np.ndarray:
    """The subsets that are left out: accuracy below (1 - share) times the best one at the same IPC, bool [m]."""
    accuracies, ipc = np.asarray(accuracies, float), np.asarray(ipc)
    if accuracies.shape != ipc.shape or accuracies.ndim != 1:
        raise ValueError(f"accuracies {accuracies.shape} and ipc {ipc.shape}; needs one number a subset in both")
    if not 0 <= share <= 1:
        raise ValueError(f"share={share} is not allowed; it lies in 0 to 1")
    best = np.array([accuracies[ipc == size].max() for size in ipc])
    return accuracies < (1 - share) * best
