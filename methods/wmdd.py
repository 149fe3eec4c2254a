"""WMDD: dataset distillation by Wasserstein barycenters in a teacher's feature space.

Liu et al., Dataset Distillation via the Wasserstein Metric, ICCV 2025 (arXiv 2311.18531; github.com/Liu-Hy/WMDD).

    python methods/wmdd.py dataset=imagenette ipc=10 data=~/data     # teacher, distilled set, student accuracy

Each class k is summarised twice by a trained teacher: its features by the atoms of a Wasserstein barycenter b_kj
(Eqs 5-11), its activations by per-class BatchNorm statistics (PCBN).  Synthetic images start as noise and are moved by
Adam until feature j of class k meets atom b_kj and the class's synthetic statistics meet the real ones (Eqs 12-15).

Paper against released code, and what we take (docs: papers/wmdd/quirks.md):
  feature loss    Eq. 12 sums squares; the code takes one Frobenius norm per batch     -> `loss=official` | `paper`
  cross-entropy   none in Eq. 15; the code adds it with weight 1                      -> `ce_weight`
  PCBN            Eq. 13 sums squares over classes; the code averages plain norms     -> `loss`
  weights         learned (Eqs 7-10); the code runs with uniform ones                 -> `weights`
  resolution      the code distils Tiny-ImageNet at 224 px                            -> `size` of what you pass in
Copied alone, as a module, it needs torch and POT; the command line is this repository's.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "PUBLISHED", "Config", "RecoverState", "Statistics", "barycenter", "check", "distill", "layer_of", "recover",
    "statistics",
]  # fmt: skip

if importlib.util.find_spec("ot") is None:  # loaded where it is used: it takes longer to import than torch
    raise ImportError("wmdd.py computes barycenters with POT: python -m pip install POT")


def _option(default, help: str, **facts):
    return field(default=default, metadata={"help": help, **facts})


@dataclass(frozen=True)
class Config:
    """One distillation; the defaults are the released code at ImageNette."""

    ipc: int = _option(10, "synthetic images per class", unit="images", minimum=1)
    iterations: int = _option(2000, "recover iterations per batch", unit="steps", minimum=1, source="run.sh")
    lr: float = _option(0.25, "first Adam step size in normalised pixels, cosine to 0", source="run.sh")
    bn_weight: float = _option(10.0, "weight of the BatchNorm term: lambda in Eq. 15", minimum=0, source="README")
    ce_weight: float = _option(1.0, "weight of the cross-entropy of the teacher; 0 in Eq. 15", minimum=0)
    first_bn_multiplier: float = _option(1.0, "extra weight of the first BatchNorm layer", minimum=0)
    loss: str = _option(
        "official", "plain norms as released, or squares as in Eqs 12-15", choices=("official", "paper")
    )
    feature: str = _option(
        "wasserstein", "target of the features; mmd: class means (Eq. 4 of DM), ce: none",
        choices=("wasserstein", "sliced", "mmd", "ce"),
    )  # fmt: skip
    bn: str = _option("class", "statistics per class (PCBN) or over all classes", choices=("class", "global"))
    weights: str = _option(
        "uniform", "atom weights: equal, by dual subgradients (Eqs 7-10), or the exact optimum (k-means)",
        choices=("uniform", "subgradient", "learned"),
    )  # fmt: skip
    layer: int = _option(0, "feature: 0 what enters the classifier, n the pooled n-th convolution", minimum=0)
    batch: int = _option(100, "images optimised together (the statistics couple them)", unit="images", minimum=1)
    in_flight: int = _option(100, "images per pass; batches are grouped up to here", unit="images", minimum=1)
    crop: bool = _option(True, "random resized crop and flip of the images at each step")
    jitter: int = _option(-1, "largest roll of the images; -1: 1/7 of the side (32 at 224 px)", unit="px", minimum=-1)
    precision: str = _option("fp32", "arithmetic of the convolutions", choices=("bf16", "fp32"))
    compile: bool = _option(False, "compile the step (needs a C++ compiler on a CPU)")

    def __post_init__(self):
        for f in fields(self):
            value, low, allowed = getattr(self, f.name), f.metadata.get("minimum"), f.metadata.get("choices")
            if allowed and value not in allowed:
                raise ValueError(f"{f.name}={value!r} is unknown; allowed: {', '.join(allowed)}")
            if low is not None and not value >= low:
                raise ValueError(f"{f.name}={value!r} is too small; the least is {low}")


# Published settings by (dataset, ipc or None for every ipc).  Source: README and run.sh of Liu-Hy/WMDD; lambda of
# ImageNet-1K is not stated anywhere, 10 is where Fig. 5a flattens.
PUBLISHED: dict[tuple[str, int | None], dict] = {
    ("imagenette", None): {"lr": 0.25, "bn_weight": 10.0},
    ("tiny-imagenet", None): {"lr": 0.1, "bn_weight": 500.0},
    ("imagenet-1k", None): {"lr": 0.25, "bn_weight": 10.0},
    ("imagenet-21k", None): {"lr": 0.25, "bn_weight": 10.0},
}


# ---------------------------------------------------------------- looking into a teacher


# --- begin shared block: teacher (a test keeps its copies equal) ---
def classifier_of(net: nn.Module) -> nn.Linear:
    """The last linear layer; what enters it is the feature f_e(x)."""
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError(f"the teacher {type(net).__name__} has no nn.Linear layer to read features from")
    return linear[-1]


def batch_norms(net: nn.Module) -> list[nn.BatchNorm2d]:
    """Every BatchNorm2d, in module order (20 in a ResNet-18, 4,800 channels)."""
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    if not layers:
        raise ValueError(f"the teacher {type(net).__name__} has no BatchNorm2d layer to match statistics of")
    if any(bn.running_mean is None for bn in layers):
        raise ValueError(f"a BatchNorm2d layer of the teacher {type(net).__name__} has no running statistics to match")
    return layers


# --- end shared block ---


def main_path(net: nn.Module) -> list[nn.BatchNorm2d]:
    """The BatchNorm layers behind the convolutions 1, 2, ... of a ResNet, shortcuts left out (17 in a ResNet-18).

    A shortcut is known by its name, as torchvision (`downsample`) and others (`shortcut`) call it.
    """
    return [
        m for name, m in net.named_modules()
        if isinstance(m, nn.BatchNorm2d) and not {"downsample", "shortcut"} & set(name.split("."))
    ]  # fmt: skip


def layer_of(net: nn.Module, layer: int) -> nn.BatchNorm2d:
    """The module whose pooled output is the feature, for a layer from 1 on."""
    path = main_path(net)
    if layer > len(path):
        raise ValueError(
            f"layer={layer} does not exist: the teacher has {len(path)} convolutions; 0 is the last feature"
        )
    return path[layer - 1]


@contextmanager
def probe(
    net: nn.Module, layer: int, moments: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> Iterator[tuple[list, list]]:
    """Hooks that fill two lists at each forward: the feature [B, D], and (mean, variance) of each BatchNorm input."""
    features: list[Tensor] = []
    statistics: list[tuple[Tensor, Tensor]] = []
    hooks = [bn.register_forward_pre_hook(lambda _, x: statistics.append(moments(x[0]))) for bn in batch_norms(net)]
    if layer == 0:
        hooks.append(classifier_of(net).register_forward_pre_hook(lambda _, x: features.append(x[0].float())))
    else:
        take = lambda _, __, y: features.append(y.float().mean((2, 3)))  # noqa: E731
        hooks.append(layer_of(net, layer).register_forward_hook(take))
    try:
        yield features, statistics
    finally:
        for hook in hooks:
            hook.remove()


# --- begin shared block: moments (a test keeps its copies equal) ---
def power_sums(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of values and of squares over the middle dimension: [G, n, C] -> two [G, C], float32 at least.

    A CPU converts pieces that stay in its cache: four times faster than one wide copy of bf16 rows.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return rows.sum(1, dtype=wide), rows.to(wide).square().sum(1)
    sums = torch.zeros(2, rows.shape[0], rows.shape[2], dtype=wide)
    for group, total, squares in zip(rows, *sums, strict=True):
        for piece in group.split(max(1, 2**18 // rows.shape[2])):
            piece = piece.to(wide)
            total += piece.sum(0)
            squares += piece.square().sum(0)
    return sums[0], sums[1]


class _Moments(torch.autograd.Function):
    """Channel mean and variance of groups of images, with the gradient in closed form and no copy of the input.

    x [B, C, H, W] -> mean, variance [G, C], float32 at least, over the B/G images of a group and all positions.
    d/dx <g_m, mean> + <g_v, variance> = (g_m + 2 (x - mean) g_v) / n, one fused multiply-add over x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, groups: int):
        b, c, h, w = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(groups, -1, c)  # [G, I*H*W, C], a view when channels_last
        total, squares = power_sums(rows)
        mean = total / rows.shape[1]
        ctx.save_for_backward(rows, mean)
        ctx.shape = (b, h, w, c)
        return mean, squares / rows.shape[1] - mean.square()

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_var: Tensor):
        rows, mean = ctx.saved_tensors
        scale = 2 / rows.shape[1] * grad_var  # [G, C]
        shift = grad_mean / rows.shape[1] - mean * scale
        grad = torch.addcmul(shift[:, None].to(rows.dtype), rows, scale[:, None].to(rows.dtype))
        return grad.reshape(ctx.shape).permute(0, 3, 1, 2), None


# --- end shared block ---


def group_moments(x: Tensor, groups: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A_mean and A_var of Eq. 14: x [B, C, H, W], weights [G, I] or None for equal ones -> two [G, C]."""
    if weights is None:
        return _Moments.apply(x, groups)
    x = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (groups, -1))  # [G, I, C, H, W]
    w = (weights / weights.sum(1, keepdim=True)).to(x)
    mean = torch.einsum("gi,gic->gc", w, x.mean((3, 4)))
    centred = (x - mean[:, None, :, None, None]).square().mean((3, 4))
    return mean, torch.einsum("gi,gic->gc", w, centred)


# ---------------------------------------------------------------- one pass over real data


@dataclass(frozen=True)
class Statistics:
    """What the method keeps of the real data (Alg. 1, lines 2-6)."""

    features: Tensor  # float32 [N, D], class by class
    labels: Tensor  # int64 [N], ascending
    mean: Tensor  # float32 [K, channels of all BatchNorm layers]
    var: Tensor  # float32 [K, channels of all BatchNorm layers]

    def of_class(self, k: int) -> Tensor:
        return self.features[self.labels == k]

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@torch.no_grad()
def statistics(
    teacher: nn.Module, batches: Callable[[int], Iterable[Tensor]], classes: Iterable[int], *, layer: int = 0
) -> Statistics:
    """Features and BatchNorm statistics of each of some classes in one pass, in fp32.

    batches(k) yields normalised images [B, C, H, W] of class k, in the order and chunks (100 officially) that count:
    the variance of a class is the mean of its chunks' variances weighted by their size, as in the released code.
    """
    teacher = teacher.eval().to(memory_format=torch.channels_last)
    features, labels, means, variances = [], [], [], []
    with probe(teacher, layer, lambda x: group_moments(x, 1)) as (feature, moments):
        for k in classes:
            total, mean, var = 0, 0.0, 0.0
            for images in batches(k):
                feature.clear(), moments.clear()
                teacher(images)
                n = len(images)
                total += n
                features.append(feature[0].cpu())
                mean = mean + n * torch.cat([m[0] for m, _ in moments]).double()
                var = var + n * torch.cat([v[0] for _, v in moments]).double()
            if total == 0:
                raise ValueError(f"class {k} has no image; WMDD needs at least one image of every class")
            labels += [k] * total
            means.append(mean / total)
            variances.append(var / total)
    stacked = [torch.stack(x).float().cpu() for x in (means, variances)]
    return Statistics(torch.cat(features), torch.tensor(labels), *stacked)


# ---------------------------------------------------------------- barycenters


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """c_ij = |a_i - b_j|^2 as one matrix product: [m, D], [n, D] -> [m, n]."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def transport_cost(atoms: Tensor, weights: Tensor, points: Tensor) -> float:
    """f(X, w) of Eq. 6 for p = 2: the exact squared Wasserstein distance between atoms and the uniform points."""
    import ot

    return float(ot.emd2(_mass(weights), _mass(None, len(points)), squared_distances(atoms, points).double().numpy()))


def _mass(weights: Tensor | None, n: int = 0) -> np.ndarray:
    mass = np.full(n, 1 / n) if weights is None else weights.double().numpy()
    return mass / mass.sum()


def uniform_barycenter(points: Tensor, atoms: Tensor, iterations: int = 100, weights: Tensor | None = None) -> Tensor:
    """Free-support barycenter with fixed weights: Eq. 11 to its fixed point (Lloyd with clusters of given mass).

    points [n, D], atoms [m, D] -> atoms [m, D].  Each atom moves to the mean of the mass that the exact plan sends it.
    """
    import ot

    share, mass = _mass(weights, len(atoms)), _mass(None, len(points))
    for _ in range(iterations):
        plan = ot.emd(share, mass, squared_distances(atoms, points).numpy())  # [m, n]
        moved = torch.from_numpy(plan / share[:, None]).to(points) @ points
        shift, atoms = (moved - atoms).square().sum(), moved
        if shift <= 1e-7:
            break
    return atoms


def subgradient_barycenter(points: Tensor, atoms: Tensor, iterations: int = 10) -> tuple[Tensor, Tensor]:
    """Alternate weights by dual subgradients (Eqs 7-10) and positions (Eq. 11), as the released weighted path does.

    Step sizes are its own: exp(-10 dual) on costs scaled to 1, and 0.2 of the way to the new positions.  Unstable: the
    dual is not unique, a change of 1e-9 in the features moves the weights by 0.1.
    """
    import ot

    mass, m = _mass(None, len(points)), len(atoms)
    weights = np.full(m, 1 / m)
    for _ in range(iterations):
        cost = squared_distances(atoms, points).numpy()
        cost, before, weights = cost / cost.max(), weights, np.full(m, 1 / m)
        for _ in range(100):
            dual = ot.emd(weights, mass, cost, log=True)[1]["u"]  # beta_j in Eq. 9
            step = weights * np.exp(-10 * dual)
            step /= step.sum()
            shift, weights = np.abs(step - weights).sum(), step
            if shift < 1e-9:
                break
        if np.linalg.norm(weights - before) < 1e-6:
            weights = before
            break
        weights = np.maximum(weights, 1e-12)
        target = uniform_barycenter(points, atoms, weights=torch.from_numpy(weights / weights.sum()))
        atoms = 0.8 * atoms + 0.2 * target
    return atoms, torch.from_numpy(weights)


def learned_barycenter(points: Tensor, atoms: Tensor, iterations: int = 300) -> tuple[Tensor, Tensor]:
    """Positions and weights of Eq. 5 with both free: k-means, started from `atoms`.

    For given positions the best weights need no transport solver: each point goes to its nearest atom and w_j is the
    share it gets.  The cost never rises, so it ends at or below that of any (atoms, weights) it is started from.
    An atom that gets no point moves to the point farthest from its own atom.
    """
    points_mean = points.mean(0)
    points, atoms = points - points_mean, atoms - points_mean  # smaller numbers, same distances
    owner = None
    for _ in range(iterations):
        distance, nearest = squared_distances(points, atoms).min(1)
        count = torch.bincount(nearest, minlength=len(atoms))
        for empty in (count == 0).nonzero().flatten().tolist():
            farthest = torch.where(count[nearest] > 1, distance, -1).argmax()
            count[nearest[farthest]] -= 1
            nearest[farthest], count[empty], distance[farthest] = empty, 1, 0
        if owner is not None and torch.equal(owner, nearest):
            break
        owner = nearest
        atoms = torch.zeros_like(atoms).index_add_(0, nearest, points) / count[:, None]
    return atoms + points_mean, count.double() / len(points)


def sliced_barycenter(points: Tensor, atoms: Tensor, generator: torch.Generator, iterations: int = 50) -> Tensor:
    """Free-support barycenter under the sliced Wasserstein distance (Table 4): match sorted projections.

    In each round the D axes of a random rotation are the slices; on each, the sorted atoms go towards the means of the
    m equal-mass quantile blocks of the points.  The step 1/sqrt(round) averages the slices out.
    """
    n, d = points.shape
    m = len(atoms)
    # Share of point i (sorted) in quantile block j: overlap of [i/n, (i+1)/n] with [j/m, (j+1)/m], rows sum to 1.
    edges_m, edges_n = torch.arange(m + 1).double() / m, torch.arange(n + 1).double() / n
    overlap = torch.minimum(edges_m[1:, None], edges_n[1:]) - torch.maximum(edges_m[:-1, None], edges_n[:-1])
    block = overlap.clamp(min=0) * m  # [m, n]
    for round_ in range(iterations):
        rotation = torch.linalg.qr(torch.randn(d, d, generator=generator))[0].to(points)
        target = block.to(points) @ (points @ rotation).sort(0).values  # [m, D] quantile means per slice
        projected = atoms @ rotation
        rank = projected.argsort(0).argsort(0)
        atoms = atoms + (target.gather(0, rank) - projected) @ rotation.T / math.sqrt(1 + round_)
    return atoms


def barycenter(points: Tensor, ipc: int, generator: torch.Generator, *, kind="wasserstein", weights="uniform"):
    """Atoms float32 [I, D] and weights float64 [I] for the features [n, D] of one class (Eq. 5).

    kind: "wasserstein", "sliced" or "mmd" (every atom is the class mean: what the mean embedding asks for).
    weights: "uniform" (starts at N(0, 1) as released), "subgradient" (starts at real features), "learned" (k-means from
    the uniform solution).
    """
    _check_ipc(ipc, len(points))
    points = points.double()
    share = torch.full((ipc,), 1 / ipc, dtype=torch.float64)
    if kind in ("mmd", "ce"):
        return points.mean(0).expand(ipc, -1).float(), share
    noise = torch.randn(ipc, points.shape[1], generator=generator, dtype=torch.float64)
    if kind == "sliced":
        return sliced_barycenter(points, noise, generator).float(), share
    if weights == "subgradient":
        chosen = torch.randperm(len(points), generator=generator)[:ipc]
        atoms, share = subgradient_barycenter(points, points[chosen])
    else:
        centre = points.mean(0)  # smaller numbers: single precision is then exact to 1e-6, and twice as fast
        atoms = uniform_barycenter((points - centre).float(), (noise - centre).float()).double() + centre
        if weights == "learned":
            atoms, share = learned_barycenter(points, atoms)
    return atoms.float(), share


def barycenters(
    stats: Statistics, config: Config, generator: torch.Generator, classes: slice = slice(None)
) -> tuple[Tensor, Tensor]:
    """Atoms [K, I, D] and weights [K, I] of all classes or of some; classes are independent and share the cores."""
    seeds = torch.randint(2**62, (len(stats.mean),), generator=generator).tolist()

    def one(k: int):
        own = torch.Generator().manual_seed(seeds[k])
        return barycenter(stats.of_class(k), config.ipc, own, kind=config.feature, weights=config.weights)

    own_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(own_cpus) as pool:
        atoms, weights = zip(*pool.map(one, range(len(seeds))[classes]), strict=True)
    return torch.stack(atoms), torch.stack(weights).float()


# ---------------------------------------------------------------- recover


# --- begin shared block: resample_matrix (a test keeps its copies equal) ---
def resample_matrix(start: Tensor, length: Tensor, out: int, size: int) -> Tensor:
    """Rows that crop [start, start + length) from `size` pixels and resize it to `out` pixels.

    start, length: [B] in whole pixels -> [B, out, size] float32, each row sums to 1.  Bilinear with half-pixel centres,
    widened to a triangle filter when the crop shrinks (as PIL and torchvision's antialias do).
    """
    start, length = start.float()[:, None, None], length.float()[:, None, None]  # [B, 1, 1]
    scale = length / out
    pixel = torch.arange(size, device=start.device) + 0.5  # centres of the source pixels [size]
    centre = start + (torch.arange(out, device=start.device)[:, None] + 0.5) * scale  # [B, out, 1]
    weight = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)  # [B, out, size]
    weight = weight * ((pixel > start) & (pixel < start + length))
    return weight / weight.sum(-1, keepdim=True)


# --- end shared block ---


# --- begin shared block: view (a test keeps its copies equal) ---
class View(NamedTuple):
    """One crop, flip and roll shared by a whole batch, in pixels."""

    top: int
    left: int
    height: int
    width: int
    flip: bool
    down: int
    right: int


def random_view(size: int, least: float | None, roll: tuple[int, int], generator: torch.Generator) -> View:
    """Draws the view of one step.

    Crop: area share U(least, 1), aspect log-uniform in (3/4, 4/3), ten tries, else the whole image; flip with
    probability 1/2; neither where least is None.  Roll by whole pixels, uniform between the two bounds, both included.
    """
    top = left = 0
    height = width = size
    if least is not None:
        for area, aspect in torch.rand(10, 2, generator=generator, dtype=torch.float64).tolist():
            area = size * size * (least + (1 - least) * area)
            ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * aspect)
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= size and 0 < h <= size:
                width, height = w, h
                break
        place = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        top, left = int(place[0] * (size - height + 1)), int(place[1] * (size - width + 1))
    flip = least is not None and torch.rand((), generator=generator).item() < 0.5
    down, right = torch.randint(roll[0], roll[1] + 1, (2,), generator=generator).tolist()
    return View(top, left, height, width, flip, down, right)


def view_matrices(view: View, size: int) -> tuple[Tensor, Tensor]:
    """The same view as two matrices [S, S]: rows @ image @ columns.T."""
    rows, columns = resample_matrix(torch.tensor(view[:2]), torch.tensor(view[2:4]), size, size)
    columns = columns.flip(0) if view.flip else columns
    return rows.roll(view.down, 0), columns.roll(view.right, 0)


def see(x: Tensor, view: View) -> Tensor:
    """x [B, C, S, S] through `view`: crop, resize to S x S, flip, roll.

    By matrices on a GPU, where their gradient is deterministic; by the library's resize on a CPU, where it is faster.
    """
    size = x.shape[-1]
    if x.device.type == "cpu":
        x = x[:, :, view.top : view.top + view.height, view.left : view.left + view.width]
        x = F.interpolate(x, (size, size), mode="bilinear")
        return (x.flip(3) if view.flip else x).roll((view.down, view.right), (2, 3))
    rows, columns = (m.to(x.device) for m in view_matrices(view, size))
    return ((x @ columns.T).transpose(2, 3) @ rows.T).transpose(2, 3)


# --- end shared block ---


def passes(classes: int, config: Config) -> list[tuple[Tensor, int]]:
    """What is optimised together: (image numbers [B], groups G) for each forward; image k*I + j is image j of class k.

    bn="class": a group holds all I images of min(batch // I, K) consecutive classes, as released.  bn="global": one
    image per class of up to `batch` classes.  Groups are independent; up to `in_flight` images share a forward.
    """
    number = torch.arange(classes * config.ipc).view(classes, config.ipc)  # [K, I]
    if config.bn == "class":
        groups = list(number.split(max(1, min(config.batch // config.ipc, classes))))
    else:
        groups = [block for j in range(config.ipc) for block in number[:, j : j + 1].split(config.batch)]
    together: list[list[Tensor]] = []
    for group in groups:
        last = together[-1] if together else None
        if last and last[0].shape == group.shape and (len(last) + 1) * group.numel() <= config.in_flight:
            last.append(group)
        else:
            together.append([group])
    return [(torch.cat([g.flatten() for g in block]), len(block)) for block in together]


@dataclass
class Targets:
    """What the images of one forward are pulled to."""

    groups: int
    labels: Tensor  # int64 [B]
    atoms: Tensor  # [B, D]
    weights: Tensor | None  # [classes in flight, I], None when uniform
    mean: list[Tensor]  # per layer, [classes in flight, C] or [1, C]
    var: list[Tensor]

    @property
    def sets(self) -> int:
        """Sets of images with statistics of their own: classes in flight or groups."""
        return max(self.groups, len(self.mean[0]))


# --- begin shared block: norm (a test keeps its copies equal) ---
def _norm(x: Tensor) -> Tensor:  # [..., D] -> [...]; smooth at 0
    return (x.square().sum(-1) + 1e-12).sqrt()


# --- end shared block ---


def objective(logits: Tensor, feature: Tensor, moments: list, target: Targets, config: Config) -> Tensor:
    """The loss of one forward, summed over its groups.  official: CE + |F - B|_F + lambda PCBN; paper: Eq. 15."""
    squares = config.loss == "paper"
    loss = feature.new_zeros(())
    if config.ce_weight:
        per_image = F.cross_entropy(logits.float(), target.labels, reduction="none").view(target.groups, -1)
        loss = loss + config.ce_weight * (per_image.sum() if squares else per_image.mean(1).sum())
    if config.feature != "ce":
        gap = feature - target.atoms
        if config.feature == "mmd":  # compare class means: [classes in flight, D]
            gap = gap.unflatten(0, (-1, config.ipc if config.bn == "class" else 1)).mean(1)
        loss = loss + (gap.square().sum() if squares else _norm(gap.reshape(target.groups, -1)).sum())  # Eq. 12
    for number, (mean, var) in enumerate(moments):  # Eq. 13
        multiplier = config.bn_weight * (config.first_bn_multiplier if number == 0 else 1.0)
        for have, want in ((mean, target.mean[number]), (var, target.var[number])):
            gap = have - want
            term = gap.square().sum() if squares else _norm(gap).view(target.groups, -1).mean(1).sum()
            loss = loss + multiplier * term
    return loss


# --- begin shared block: recover_state (a test keeps its copies equal) ---
@dataclass
class RecoverState:
    """Where a recover run stands; `tensors()` is all that is needed to continue it bit for bit."""

    images: Tensor  # float32 [M, C, S, S], normalised, on the CPU, pass after pass; later ones are still 0
    seeds: Tensor  # int64, one a pass
    number: int = 0  # pass
    step: int = 0  # steps done in this pass
    loss: float = math.nan  # at the last multiple of 50 steps
    live: tuple[Tensor, Tensor, Tensor] | None = None  # images in flight and Adam's two moments, on the device
    generator: Tensor | None = None  # state of this pass's generator, uint8
    first: int = 0  # place in `images` of the first one in flight

    def tensors(self) -> dict[str, Tensor]:
        out = {"images": self.images, "seeds": self.seeds, "at": torch.tensor([self.number, self.step, self.first])}
        if self.live is None:
            return out
        x, mean, square = (t.detach().cpu() for t in self.live)
        if not x.isfinite().all():
            raise FloatingPointError(
                f"the images are not finite after step {self.step} of pass {self.number}; the last good state is kept; "
                "try a smaller lr or precision=fp32"
            )
        images = self.images.clone()
        images[self.first : self.first + len(x)] = x
        return out | {"images": images, "mean": mean, "square": square, "generator": self.generator}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> RecoverState:
        number, step, first = tensors["at"].tolist()
        state = cls(tensors["images"], tensors["seeds"], number, step, first=first)
        if "generator" in tensors:
            state.live = (torch.empty(0), tensors["mean"], tensors["square"])
            state.generator = tensors["generator"]
        return state

    def begin(self) -> torch.Generator:
        """The generator of this pass, where it stands."""
        generator = torch.Generator().manual_seed(int(self.seeds[self.number]))
        return generator if self.generator is None else generator.set_state(self.generator)


# --- end shared block ---


def learning_rate(config: Config, step: int) -> float:
    """Cosine from lr to 0 over the iterations of a batch."""
    return 0.5 * config.lr * (1 + math.cos(math.pi * step / config.iterations))


def _targets(
    teacher: nn.Module, stats: Statistics, atoms: Tensor, weights: Tensor, config: Config, number: Tensor, groups: int
) -> Targets:
    classes = (number // config.ipc)[:: config.ipc] if config.bn == "class" else number // config.ipc
    layers = batch_norms(teacher)
    device = next(teacher.parameters()).device
    if config.bn == "class":
        widths = [bn.num_features for bn in layers]
        mean, var = ([t.to(device) for t in s[classes].split(widths, 1)] for s in (stats.mean, stats.var))
    else:
        mean, var = (
            [b[None].float() for b in s] for s in zip(*((m.running_mean, m.running_var) for m in layers), strict=True)
        )
    weighted = config.weights != "uniform" and config.loss == "paper" and config.bn == "class"
    return Targets(
        groups, (number // config.ipc).to(device), atoms.flatten(0, 1)[number].to(device),
        weights[classes].to(device) if weighted else None, mean, var,
    )  # fmt: skip


def recover(
    teacher: nn.Module,
    stats: Statistics,
    atoms: Tensor,
    weights: Tensor,
    config: Config,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    generator: torch.Generator,
    part: slice = slice(None),
    state: RecoverState | None = None,
    on_step: Callable[[RecoverState], None] | None = None,
) -> Tensor:
    """Optimise the images (Alg. 1, line 9; Eq. 15) on the teacher's device.

    atoms [K, I, D], weights [K, I] -> images float32 [K*I, C, size, size] in [0, 1] pixel space, on the CPU.
    part: the passes to do, all by default; then the images are those of these passes, by ascending number.
    `state` continues an earlier run, `on_step` sees the state after every step.  Raises FloatingPointError when the
    loss is not finite (looked at every 50 steps).
    """
    device, channels = next(teacher.parameters()).device, len(mean)
    teacher = teacher.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    low, high = (
        torch.tensor([(edge - m) / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1) for edge in (0, 1)
    )
    clip = low.to(device), high.to(device)
    jitter = round(size / 7) if config.jitter < 0 else config.jitter
    plan = passes(len(atoms), config)
    seeds = torch.randint(2**62, (len(plan),), generator=generator)[part]
    plan = plan[part]
    rows = torch.cat([number for number, _ in plan])
    state = state or RecoverState(torch.zeros(len(rows), channels, size, size), seeds)
    with probe(teacher, config.layer, lambda entering: group_moments(entering, target.sets, target.weights)) as seen:

        def loss_of(view: Tensor, target: Targets) -> Tensor:
            seen[0].clear(), seen[1].clear()
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                logits = teacher(view)
            return objective(logits, seen[0][0], seen[1], target, config)

        run = torch.compile(loss_of) if config.compile else loss_of
        while state.number < len(plan):
            number, groups = plan[state.number]
            target = _targets(teacher, stats, atoms, weights, config, number, groups)
            generator, here = state.begin(), slice(state.first, state.first + len(number))
            fresh = state.live is None
            x = torch.randn(len(number), channels, size, size, generator=generator) if fresh else state.images[here]
            x = x.to(device).requires_grad_()
            adam = torch.optim.Adam([x], betas=(0.5, 0.9))
            if not fresh:
                first, second = (t.to(device) for t in state.live[1:])
                adam.state[x] = {"step": torch.tensor(float(state.step)), "exp_avg": first, "exp_avg_sq": second}
            for step in range(state.step, config.iterations):
                adam.param_groups[0]["lr"] = learning_rate(config, step)
                view = see(x, random_view(size, 0.08 if config.crop else None, (0, jitter), generator))
                adam.zero_grad()
                loss = run(view.contiguous(memory_format=torch.channels_last), target)
                loss.backward()
                adam.step()
                with torch.no_grad():
                    x.clamp_(*clip)
                if step % 50 == 49 or step + 1 == config.iterations:
                    state.loss = _finite(loss, step, state.number, config)
                state.step, state.generator = step + 1, generator.get_state()
                state.live = (x, adam.state[x]["exp_avg"], adam.state[x]["exp_avg_sq"])
                if on_step:
                    on_step(state)
            state.images[here] = x.detach().cpu()
            state.live, state.generator, state.step = None, None, 0
            state.number, state.first = state.number + 1, here.stop
    pixels = torch.tensor(mean).view(-1, 1, 1) + state.images[rows.argsort()] * torch.tensor(std).view(-1, 1, 1)
    return pixels.clamp(0, 1)


# --- begin shared block: recognises (a test keeps its copies equal) ---
@torch.no_grad()
def recognises(teacher: nn.Module, seen: Callable[[Tensor], Tensor], labels: Tensor) -> None:
    """ValueError where a teacher is near chance on 200 of its images, most often for another order of the classes.

    seen: rows int64 [n] -> real images as the teacher takes them [n, C, S, S]; labels int64 [N].
    """
    rows = torch.linspace(0, len(labels) - 1, min(200, len(labels))).long()
    answers = torch.cat([teacher.eval()(seen(part)) for part in rows.split(50)]).cpu()
    right, chance = (answers.argmax(1) == labels.cpu()[rows]).double().mean().item(), 1 / answers.shape[1]
    if right < chance + min(3 * math.sqrt(chance * (1 - chance) / len(rows)), (1 - chance) / 2):  # 3 standard errors
        raise ValueError(
            f"the teacher recognises {100 * right:.1f} % of {len(rows)} real images, near the {100 * chance:.3g} % of "
            "guessing: are its classes in the order of the labels, and are mean and std those that it was trained with?"
        )


# --- end shared block ---


# --- begin shared block: finite (a test keeps its copies equal) ---
def _finite(loss: Tensor, step: int, number: int, config: Config) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the recover loss is {value} at step {step} of pass {number} (lr={config.lr}, "
            f"bn_weight={config.bn_weight}); the last good state is kept; try a smaller lr or precision=fp32"
        )
    return value


# --- end shared block ---


def check(config: Config, teacher: nn.Module, labels: Tensor, *, size: int, side: int | None = None) -> None:
    """ValueError that names what cannot work, before any work: a teacher without BatchNorm, without the layer or with
    other classes, a class of fewer images than `ipc`.

    labels int64 [N].  The teacher need not be trained yet.
    """
    counts = torch.bincount(labels.cpu())
    batch_norms(teacher)  # says so when there is none
    known = classifier_of(teacher).out_features
    if known != len(counts):
        raise ValueError(f"the teacher tells {known} classes apart, the images have {len(counts)}; it must be the same")
    if config.layer:
        layer_of(teacher, config.layer)
    _check_ipc(config.ipc, int(counts.min()))


def _check_ipc(ipc: int, available: int) -> None:
    if ipc > available:
        raise ValueError(f"ipc={ipc} is more than the {available} real images of a class; allowed: 1 to {available}")


def distill(
    images: Tensor,
    labels: Tensor,
    teacher: nn.Module,
    config: Config,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    generator: torch.Generator,
    state: RecoverState | None = None,
    on_step: Callable[[RecoverState], None] | None = None,
) -> dict[str, Tensor]:
    """The whole method on images uint8 [N, C, S, S] and labels int64 [N] (0..K-1), with a trained teacher.

    Returns images float32 [K*I, C, S, S] in [0, 1], labels [K*I], weights [K*I] (mean 1/I), atoms [K, I, D].
    """
    device, classes = next(teacher.parameters()).device, int(labels.max()) + 1
    mean_, std_ = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))

    def seen(rows: Tensor) -> Tensor:
        return ((images[rows].to(device) / 255 - mean_) / std_).contiguous(memory_format=torch.channels_last)

    def batches(k: int) -> Iterator[Tensor]:
        yield from map(seen, (labels == k).nonzero().flatten().split(100))

    check(config, teacher, labels, size=images.shape[-1])
    if state is None:
        recognises(teacher, seen, labels)
    stats = statistics(teacher, batches, range(classes), layer=config.layer)
    atoms, weights = barycenters(stats, config, generator)
    pixels = recover(
        teacher, stats, atoms, weights, config, size=images.shape[-1], mean=mean, std=std, generator=generator,
        state=state, on_step=on_step,
    )  # fmt: skip
    return {
        "images": pixels, "labels": torch.arange(classes).repeat_interleave(config.ipc), "weights": weights.flatten(),
        "atoms": atoms,
    }  # fmt: skip


if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from common import cli, script

    sys.exit(
        cli.guard(
            lambda a: script.run_with_teacher(
                a, "wmdd", Config, PUBLISHED, RecoverState.restore, distill, check=check,
                passes=lambda config, classes: len(passes(classes, config)),
            ),
            sys.argv[1:],
        )
    )
