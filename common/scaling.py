"""How accuracy grows with compute: the data-aware scaling law, compute matching, and scores at equal compute.

Rethinking Dataset Distillation: Hard Truths about Soft Labels (arXiv 2604.18811), supplement, Section 3, after Goyal et
al., Scaling Laws for Data Filtering, CVPR 2024.  The error y_k of a student after k passes over n images is

    y_k = a n_1^{b_1} prod_{j=2..k} (n_j / n_{j-1})^{b_j} + d        n_j = j n                        (Eq. 7)
    b_{j+1} = b 2^{-j/tau} = b delta^j,  b_1 = b                                                     (Eq. 8)

b < 0 is the utility of an image, which halves every tau passes; d is the error that no training removes.  The logarithm
of the product is b times a number L_k that depends on tau alone, so a grid of (b, tau) costs one matrix; (a, d) >= 0
are least squares at each point of it.

The paper prints "delta" of 2.8947, 5.2632 and 1.9474, which Eq. 8 cannot give (delta < 1).  They are the points 4, 9
and 2 of 20 between 1 and 10, and its b are points of 200 between -1 and 0: its delta is our tau, and the b of 0.05
in the text is -0.0503.  `grid="paper"` is that grid.
With few passes and d free, b and tau trade against d: look at the ranges, and fit again with d given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "GRIDS", "LEAST_EPOCHS", "ScalingLaw", "Score", "SharedB", "augmentation_robust_score", "epochs_for",
    "epochs_to_reach", "fit_scaling_law", "fitted_epochs", "hard_label_recovery", "improvement_over_random",
    "label_robust_score", "law_product", "shared_b_test",
]  # fmt: skip

GRIDS = {  # b without 0, where the law is constant, and tau in passes
    "paper": (np.linspace(-1, 0, 200)[:-1], np.linspace(1, 10, 20)),
    "fine": (np.linspace(-1, 0, 400)[:-1], np.linspace(1, 50, 100)),
    "wide": (np.linspace(-1, 0, 400)[:-1], np.geomspace(1, 1000, 200)),
}


LEAST_EPOCHS = 5  # one more than b, tau, a and d

# ---------------------------------------------------------------- the law and its fit


@dataclass(frozen=True)
class ScalingLaw:
    """The best point of the grid, and how far from it a curve is still likely."""

    b: float
    tau: float  # passes
    a: float
    d: float
    r2: float
    b_range: tuple[float, float]  # of all points with at least `likelihood` times the greatest one
    tau_range: tuple[float, float]
    curve: np.ndarray  # the law at the fitted epochs, [E]
    residual: float  # sum of squares

    @property
    def delta(self) -> float:
        """What a pass leaves of the utility: 2^(-1/tau)."""
        return 2 ** (-1 / self.tau)


def fitted_epochs(last: int) -> list[int]:
    """The epochs a curve is read at: each of the first ten, then every fifth."""
    return [epoch for epoch in range(1, last + 1) if epoch <= 10 or epoch % 5 == 0]


def law_product(n: int, epochs: Sequence[int], b: np.ndarray, tau: np.ndarray) -> np.ndarray:
    """n_1^{b_1} prod_j (n_j / n_{j-1})^{b_j} after each of `epochs` [E] for all b [B] and tau [T]: [B, T, E]."""
    j = np.arange(2, max(epochs) + 1)
    growth = np.log(j / (j - 1)) * 2.0 ** (-(j - 1) / np.asarray(tau)[:, None])  # [T, last - 1]
    logs = np.log(n) + np.pad(growth.cumsum(1), ((0, 0), (1, 0)))  # L_k, [T, last]
    return np.exp(np.asarray(b)[:, None, None] * logs[None, :, np.asarray(epochs) - 1])


def fit_scaling_law(
    n: int, errors: Sequence[float], epochs: Sequence[int], grid: str = "paper", d: float | None = None, *,
    likelihood: float = 0.5,
) -> ScalingLaw:  # fmt: skip
    """Fit Eqs 7-8 to errors [E] of a student after `epochs` [E] passes (from 1) over n images.

    d: irreducible error where it is known, such as the error after training on the full data; None: fitted.
    likelihood: what the ranges of b and tau hold, for normal errors of unknown spread: SSE^(-E/2) relative to the best
    point.  0.5 is the half-likelihood region, 0.147 the 95 % region of one parameter.
    """
    errors, epochs = _curve(n, errors, epochs, d)
    if not 0 < likelihood <= 1:
        raise ValueError(f"likelihood={likelihood} is not allowed; it lies in 0 to 1")
    b, tau = _grid(grid)
    product = law_product(n, epochs, b, tau)
    a_, d_, sse = _least_squares(product, errors, d)
    best = np.unravel_index(sse.argmin(), sse.shape)
    limit = sse[best] * likelihood ** (-2 / len(errors))
    likely = [axis[rows] for axis, rows in zip((b, tau), np.nonzero(sse <= limit), strict=True)]
    b_range, tau_range = ((float(values.min()), float(values.max())) for values in likely)
    spread = np.square(errors - errors.mean()).sum()
    return ScalingLaw(
        b=float(b[best[0]]), tau=float(tau[best[1]]), a=float(a_[best]), d=float(d_[best]),
        r2=float(1 - sse[best] / spread) if spread else math.nan, b_range=b_range, tau_range=tau_range,
        curve=a_[best] * product[best] + d_[best], residual=float(sse[best]),
    )  # fmt: skip


def _least_squares(product: np.ndarray, y: np.ndarray, d: float | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """a >= 0, d >= 0 that minimise |a product + d - y|^2 and that sum, over the last dimension of product [..., E].

    d given: a alone.  Otherwise, where the free solution leaves the quadrant, the better of its two edges.
    """

    def scale(level: float) -> np.ndarray:
        return np.maximum((product * (y - level)).sum(-1) / np.square(product).sum(-1), 0)

    def sse(a: np.ndarray, d: np.ndarray) -> np.ndarray:
        return np.square(a[..., None] * product + d[..., None] - y).sum(-1)

    if d is not None:
        a = scale(d)
        level = np.full_like(a, d)
        return a, level, sse(a, level)
    centred = product - product.mean(-1, keepdims=True)
    a = (centred * (y - y.mean())).sum(-1) / np.square(centred).sum(-1)
    level = y.mean() - a * product.mean(-1)
    free = sse(a, level)
    edges = [(scale(0.0), np.zeros_like(a)), (np.zeros_like(a), np.full_like(a, max(y.mean(), 0)))]
    inside = (a >= 0) & (level >= 0)
    found = (np.where(inside, a, 0), np.where(inside, level, 0), np.where(inside, free, np.inf))
    for edge in edges:
        better = ~inside & (sse(*edge) < found[2])
        found = tuple(np.where(better, new, old) for new, old in zip((*edge, sse(*edge)), found, strict=True))
    return found


def _grid(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name not in GRIDS:
        raise ValueError(f"grid={name!r} is unknown; allowed: {', '.join(GRIDS)}")
    return GRIDS[name]


def _curve(n: int, errors, epochs, d: float | None) -> tuple[np.ndarray, np.ndarray]:
    """A checked curve; ValueError where the law cannot be fitted to it."""
    errors, epochs = np.asarray(errors, float), np.asarray(epochs)
    least = LEAST_EPOCHS - (d is not None)
    if errors.shape != epochs.shape or errors.ndim != 1 or len(errors) < least:
        raise ValueError(f"{errors.shape} errors at {epochs.shape} epochs; needs as many of both, and at least {least}")
    if n < 1:
        raise ValueError(f"n={n} is too small; a pass holds at least 1 image")
    if epochs[0] < 1 or not np.issubdtype(epochs.dtype, np.integer) or (np.diff(epochs) <= 0).any():
        raise ValueError(f"epochs={epochs.tolist()} must be whole numbers from 1 on, each greater than the one before")
    if not (np.isfinite(errors).all() and (errors >= 0).all()):
        raise ValueError(f"errors={errors.tolist()} must be finite and not negative")
    if d is not None and not d >= 0:
        raise ValueError(f"d={d} is too small; the least is 0")
    return errors, epochs


@dataclass(frozen=True)
class SharedB:
    """F test of one b for all curves against one for each; tau, a and d are each curve's own in both."""

    statistic: float
    p: float  # small: the curves do not share b
    b: float  # the shared one
    own: tuple[float, ...]  # the best b of each curve
    freedom: tuple[int, int]


def shared_b_test(
    curves: Sequence[tuple[int, Sequence[float], Sequence[int]]], grid: str = "paper", d: float | None = None
) -> SharedB:
    """Does one b serve all curves (n, errors, epochs)?

    F = ((SSE_shared - SSE_own) / (curves - 1)) / (SSE_own / freedom).  Errors of neighbouring epochs are alike, so p is
    too small for a curve with many epochs.
    """
    from scipy.stats import f  # takes a second to import, and every run imports this file

    if len(curves) < 2:
        raise ValueError(f"{len(curves)} curves cannot share b; the least is 2")
    b, tau = _grid(grid)
    profiles, points = [], 0  # of each curve the least SSE at every b [B]
    for n, errors, epochs in curves:
        errors, epochs = _curve(n, errors, epochs, d)
        profiles.append(_least_squares(law_product(n, epochs, b, tau), errors, d)[2].min(1))
        points += len(errors)
    together, own = sum(profiles), sum(p.min() for p in profiles)
    freedom = len(curves) - 1, points - (4 if d is None else 3) * len(curves)
    gain, noise = (together.min() - own) / freedom[0], own / freedom[1]
    statistic = float(gain / noise) if noise else (math.inf if gain else 0.0)
    return SharedB(
        statistic, float(f.sf(statistic, *freedom)), float(b[together.argmin()]),
        tuple(float(b[p.argmin()]) for p in profiles), freedom,
    )  # fmt: skip


# ---------------------------------------------------------------- equal compute, and convergence (Figs 1 and 5)


def epochs_for(budget: float, total: int, n: int) -> int:
    """Epochs over n images that cost `budget` passes over the `total` images of the full data: budget total / n."""
    if budget <= 0 or not 1 <= n <= total:
        raise ValueError(f"budget={budget}, total={total}, n={n}: needs a budget above 0 and 1 <= n <= total")
    return max(1, round(budget * total / n))


def epochs_to_reach(curve: Mapping[int, float], share: float = 0.95, *, chance: float = 0.0) -> float:
    """Epochs at which `share` of the final gain over `chance` is first reached; nan where nothing was gained.

    curve: accuracy of a student by the epochs it was trained for, a complete schedule each.  Between two of them the
    accuracy is taken as a line in log epochs; where the first one is enough it is the answer, an upper bound.
    """
    if not curve or not 0 < share <= 1 or min(curve) < 1:
        raise ValueError(f"curve={dict(curve)}, share={share}: needs accuracies by epochs from 1 on, share in 0 to 1")
    epochs = sorted(curve)
    final = curve[epochs[-1]]
    if final <= chance:
        return math.nan
    goal = chance + share * (final - chance)
    after = next(i for i, epoch in enumerate(epochs) if curve[epoch] >= goal)
    if after == 0:
        return float(epochs[0])
    low, high = epochs[after - 1], epochs[after]
    return float(low * (high / low) ** ((goal - curve[low]) / (curve[high] - curve[low])))


# ---------------------------------------------------------------- scores that part images from labels


@dataclass(frozen=True)
class Score:
    """A value from mean accuracies, and its deviation from their sample deviations over seeds, taken as independent."""

    value: float
    std: float


def hard_label_recovery(full, hard) -> Score:
    """HLR = acc(full data, hard labels) - acc(distilled images, hard labels); low is good.

    Here and below an accuracy is a fraction in 0 to 1, or one for each seed; all of a score with the same student,
    epochs and compute.  Source: README.md of NUS-HPC-AI-Lab/DD-Ranking.
    """
    return _combined((1, full), (-1, hard))


def improvement_over_random(distilled, random) -> Score:
    """IOR = acc(distilled, the method's own evaluation) - acc(as many random real images, the same evaluation)."""
    return _combined((1, distilled), (-1, random))


def label_robust_score(distilled, random, full, hard, weight: float = 0.5) -> Score:
    """LRS = (e^s - e^-1) / (e - e^-1) with s = weight IOR - (1 - weight) HLR, in 0 to 1; high is good.

    DD-Ranking; its package puts percent into the exponential and so leaves 0 to 1, and picks epochs on the test set.
    """
    other = 1 - _weight(weight)
    return _rescaled(_combined((weight, distilled), (-weight, random), (-other, full), (other, hard)))


def augmentation_robust_score(distilled, random, distilled_plain, random_plain, weight: float = 0.5) -> Score:
    """ARS, on the same scale: s = weight IOR + (1 - weight) IOR_plain, of training with and without augmentation."""
    other = 1 - _weight(weight)
    terms = (weight, distilled), (-weight, random), (other, distilled_plain), (-other, random_plain)
    return _rescaled(_combined(*terms))


def _combined(*terms: tuple[float, float | Sequence[float]]) -> Score:
    """Sum of factor times mean accuracy."""
    value = variance = 0.0
    for factor, accuracies in terms:
        accuracies = np.asarray(accuracies, float)
        if not accuracies.size or not ((accuracies >= 0) & (accuracies <= 1)).all():
            raise ValueError(f"accuracy {accuracies.tolist()} is not allowed; needs fractions in 0 to 1, not percent")
        value += factor * accuracies.mean()
        variance += factor**2 * accuracies.var(ddof=1) if accuracies.size > 1 else 0.0
    return Score(float(value), math.sqrt(variance))


def _rescaled(s: Score) -> Score:
    width = math.e - math.exp(-1)
    return Score((math.exp(s.value) - math.exp(-1)) / width, math.exp(s.value) / width * s.std)


def _weight(weight: float) -> float:
    if not 0 <= weight <= 1:
        raise ValueError(f"weight={weight} is not allowed; it lies in 0 to 1")
    return weight
