"""Do the losses of distillation methods know which subset is good?  And what does an image teach under soft labels?

Rethinking Dataset Distillation: Hard Truths about Soft Labels (arXiv 2604.18811), supplement:

EL2N-SL  Section 4: the norm of an image's gradient under the labels of a teacher (`el2n_sl`)
DCS      Section 7: rank correlation between the loss that an objective gives to a subset and the error of a student
         trained on that subset (`dcs`); +1 for an objective that orders subsets as their students do
losses   Eqs 1, 2, 4 and 5 evaluated on a given subset, nothing is optimised (`bn_gaps` with `bn_loss` and `dwa_loss`,
         `tm_loss`, `dm_loss`)

The tables run DCS of two losses on the sets of the table of selectors: Eq. 1 on exact statistics of the whole subset
(`bn_loss`) and Eq. 5 of five random networks, images as they are (`dm_loss`); Eq. 4 is figure 4a's, without DCS.  In
no table, for experiments of your own: `dwa_loss` with `LAMBDA_VAR`, `doubled`, and the batches of `bn_gaps`.

Where the paper is silent, and what is taken here:
  size of a subset   "adjusted for", without a formula  -> partial Spearman: ranks of loss and error, each freed of what
                     a line in the rank of IPC explains, then Pearson; beside it the plain one and one for each IPC
  batch of Eq. 1     not given  -> exact statistics of the whole subset; or batches of mixed classes, as SRe2L has them
  poor subsets       "extremely poor" ones are left out  -> more than 30 % below the best accuracy at their IPC
  doubled subsets    "repeating the elements twice"  -> half of each class, twice, of unchanged size; or all of it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from common.augment import rng
from methods import dm, mtt, sre2l

__all__ = [
    "DCS", "LAMBDA_VAR", "TM_STARTS", "BNGaps", "bn_gaps", "bn_loss", "dcs", "dm_loss", "doubled", "dwa_loss",
    "el2n_sl", "tm_loss", "very_poor",
]  # fmt: skip


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


def doubled(rows: Tensor, labels: Tensor, *, keep_size: bool = True) -> Tensor:
    """A degenerate subset, image numbers int64: everything in it stands there twice.

    rows, labels [M]: image numbers and classes of the subset.  keep_size: of each class the first half of its rows, so
    that the size is still M; otherwise all rows, which makes 2 M.
    """
    if not keep_size:
        return rows.repeat_interleave(2)
    place, counts = _place_in_class(labels), labels.bincount()
    if (counts % 2).any():
        odd = int((counts % 2).nonzero()[0])
        raise ValueError(f"class {odd} has {int(counts[odd])} images; half of them, twice, needs an even number")
    return rows[place < counts[labels] // 2].repeat_interleave(2)


def _place_in_class(labels: Tensor) -> Tensor:
    """How many images of the same class stand before each one: int64 [M]."""
    place = torch.empty_like(labels)
    for k in labels.unique():
        own = (labels == k).nonzero().flatten()
        place[own] = torch.arange(len(own), device=labels.device)
    return place


# ---------------------------------------------------------------- BatchNorm statistics: SRe2L and DWA


LAMBDA_VAR = {"imagenet-1k": 2.0, "cifar100": 11.0, "tiny-imagenet": 11.0}  # DWA, its scripts; lambda_var in Eq. 2


class BNGaps(NamedTuple):
    """|mean - running mean|_2 and |variance - running variance|_2 at the input of each BatchNorm layer: float64 [L]."""

    mean: Tensor
    variance: Tensor


def bn_loss(gaps: BNGaps) -> float:
    """Eq. 1, SRe2L: both gaps, summed over the layers."""
    return float(gaps.mean.sum() + gaps.variance.sum())


def dwa_loss(gaps: BNGaps, lambda_var: float) -> float:
    """Eq. 2, DWA: gaps of the means plus lambda_var times those of the variances.

    As in its code the first layer counts ten times and the whole is multiplied by 0.01.
    """
    layers = gaps.mean + lambda_var * gaps.variance
    return float(0.01 * (layers.sum() + 9 * layers[0]))


@torch.no_grad()
def bn_gaps(
    teacher: nn.Module, images: Tensor, labels: Tensor | None = None, *, batch: int = 0, chunk: int = 256,
    prepare: Callable[[Tensor], Tensor] | None = None,
) -> BNGaps:  # fmt: skip
    """Gaps between the statistics of a subset, images [M, C, H, W], and those that the teacher (in eval mode) holds.

    batch=0: exact statistics of the whole subset, `chunk` images a pass.  Otherwise the mean over batches of that many
    images, weighted by their size; image after image of every class in turn, so each holds all classes or as many as
    it can.  prepare: images, moved to the teacher's device -> network input.
    """
    if any(module.training for module in teacher.modules()):
        raise ValueError("the teacher is in training mode, its running statistics would change; call teacher.eval()")
    if not len(images):
        raise ValueError("the subset has no images; needs at least one")
    if not batch:
        return _gaps_of(teacher, images.split(chunk), prepare)
    if labels is None:
        raise ValueError(f"batch={batch} mixes classes and needs labels; batch=0 does without")
    turn = (_place_in_class(labels) * (int(labels.max()) + 1) + labels).argsort()
    batches = [rows.to(images.device) for rows in turn.split(batch)]
    each = [_gaps_of(teacher, [images[rows]], prepare) for rows in batches]
    weights = torch.tensor([len(rows) / len(images) for rows in batches], dtype=torch.float64)
    return BNGaps(*(weights.to(layers[0].device) @ torch.stack(layers) for layers in zip(*each, strict=True)))


def _gaps_of(teacher: nn.Module, chunks: Iterable[Tensor], prepare: Callable | None) -> BNGaps:
    """Gaps of the statistics over all chunks together."""
    layers = sre2l.batch_norms(teacher)
    device = layers[0].running_mean.device
    sums = {layer: [0, 0.0, 0.0] for layer in layers}  # values a channel, their sum [C], that of their squares [C]

    def count(layer: nn.BatchNorm2d, entering: tuple[Tensor]) -> None:
        x = entering[0].double()  # [B, C, H, W]; the variance is a small difference of large sums
        held = sums[layer]
        held[0] += x.numel() // x.shape[1]
        held[1] = held[1] + x.sum((0, 2, 3))
        held[2] = held[2] + x.square().sum((0, 2, 3))

    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        for chunk in chunks:
            chunk = chunk.to(device)
            teacher(chunk if prepare is None else prepare(chunk))
    finally:
        for hook in hooks:
            hook.remove()
    gaps = []
    for layer, (total, first, second) in sums.items():
        mean = first / total
        variance = second / total - mean.square()  # biased, as in the code of SRe2L
        gaps.append(torch.stack([(mean - layer.running_mean).norm(), (variance - layer.running_var).norm()]))
    return BNGaps(*torch.stack(gaps, 1))


# ---------------------------------------------------------------- class means: DM


def dm_loss(
    real: tuple[Tensor, Tensor], subsets: Sequence[tuple[Tensor, Tensor]], *,
    make_network: Callable[[torch.Generator], nn.Module], seeds: Sequence[int] = range(5), per_class: int = 0,
    augment: Any = None, prepare: Callable[[Tensor], Tensor] | None = None, device: torch.device | str = "cpu",
    chunk: int = 256,
) -> Tensor:  # fmt: skip
    """Eq. 5 class by class, of each subset: sum_k |mean psi(real of class k) - mean psi(subset of class k)|^2.

    real and subsets: (images [N, C, H, W], labels int64 [N]) each; the result, float64 [len(subsets)], is the mean over
    one random network for each seed.  per_class: real images that a seed draws of each class, 0 for all.  augment as in
    methods/dm.py: all images of a class meet the same one.  With BatchNorm a pass holds all images, as there: set
    per_class to what the memory holds.
    """
    counts = real[1].bincount()
    for images, labels in (real, *subsets):
        own = labels.bincount(minlength=len(counts))
        if len(images) != len(labels) or len(own) > len(counts) or not own.all():
            raise ValueError(f"{len(images)} images with {own.tolist()} of the classes; needs each class of the real "
                             f"ones, {len(counts)} in all, and as many labels as images")  # fmt: skip
    psi = dm.Embedding(make_network(torch.Generator()), device)
    total = torch.zeros(len(subsets), dtype=torch.float64)
    for seed in seeds:
        generator = rng(seed, "dcs", "dm")
        psi.load(make_network(generator))
        draw = None if augment is None else augment.draw(len(counts), generator, siamese=True)
        see = partial(_under_class_draw, augment, draw)
        rows = _by_class(real[1])
        rows = dm.draw_real(rows, per_class, generator) if per_class else rows
        goal = _means(psi, real[0], rows, see, prepare, device, chunk)  # [K, D]
        for i, (images, labels) in enumerate(subsets):
            own = _means(psi, images, _by_class(labels), see, prepare, device, chunk)
            total[i] += float(dm.matching_loss(goal, own))
    return total / len(seeds)


def _under_class_draw(augment: Any, draw: Any, images: Tensor, classes: Tensor) -> Tensor:
    return images if augment is None else augment(images, draw[classes])


def _means(psi: dm.Embedding, images: Tensor, by_class: list[Tensor], see, prepare, device, chunk: int) -> Tensor:
    """Mean feature of the images of each class, [K, D]."""

    def load(rows: Tensor) -> Tensor:
        chosen = images[rows.to(images.device)].to(device)
        return chosen if prepare is None else prepare(chosen)

    return dm.class_means(psi, by_class, load, see, sum(map(len, by_class)) if psi.couples_images else chunk)


def _by_class(labels: Tensor) -> list[Tensor]:
    return [(labels.cpu() == k).nonzero().flatten() for k in range(int(labels.max()) + 1)]


# ---------------------------------------------------------------- trajectories: TM


TM_STARTS = range(20, 36)  # T- to T+ of Section 7.1, both included; N = 80 and M = 2 are the defaults below


def tm_loss(
    trajectory: Tensor, images: Tensor, labels: Tensor, *, make_network: Callable[[torch.Generator], nn.Module],
    lr: float, starts: Sequence[int] = TM_STARTS, steps: int = 80, epochs: int = 2, batch: int = 0, augment: Any = None,
    generator: torch.Generator, device: torch.device | str = "cpu", chunk: int = 0,
) -> Tensor:  # fmt: skip
    """Eq. 4 at each start epoch: |theta_N - theta_{t+M}|^2 / |theta_t - theta_{t+M}|^2: [len(starts)].

    trajectory [S+1, P]: an expert's snapshots, make_network its network.  A student takes `steps` (N) SGD steps of size
    lr on the subset, images [M, C, H, W] as network input, labels int64 [M] or logits [M, K], `batch` images each or 0
    for all, and is compared with the expert `epochs` (M) later.  Every start sees the same batches and augmentations.
    """
    if not starts or min(starts) < 0 or max(starts) + epochs >= len(trajectory):
        raise ValueError(
            f"starts={list(starts)} with epochs={epochs} do not lie in a trajectory of {len(trajectory)} snapshots; "
            f"allowed: 0 to {len(trajectory) - 1 - epochs}"
        )
    student = mtt.Student(make_network(torch.Generator()), device, chunk=chunk)
    if trajectory.shape[1] != sum(student.sizes):
        raise ValueError(
            f"the trajectory has {trajectory.shape[1]} parameters, the network {sum(student.sizes)}; make_network must "
            "make the expert's network"
        )
    images, labels, trajectory = images.to(device), labels.to(device), trajectory.to(device)
    batches = []
    for _, rows in zip(range(steps), _batches(len(images), batch, generator), strict=False):
        draw = None if augment is None else augment.draw(len(rows), generator, siamese=False)
        batches.append((rows.to(device), draw))

    losses = []
    for t in starts:
        match = mtt.Match(trajectory[t], trajectory[t + epochs], batches)
        theta = match.start
        for rows, draw in match.batches:
            theta = theta - lr * student.gradient(theta, mtt.seen(images[rows], draw, augment), labels[rows])
        losses.append((theta - match.goal).square().sum() / match.distance)
        if not losses[-1].isfinite():
            raise FloatingPointError(f"the trajectory loss is {float(losses[-1])} at start epoch {t} after {steps} "
                                     f"steps; try a smaller lr than {lr}, or leave this start out")  # fmt: skip
    return torch.stack(losses).cpu()


def _batches(total: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Image numbers without end: one random order of all after the other, cut into batches."""
    while True:
        yield from torch.randperm(total, generator=generator).split(batch or total)
