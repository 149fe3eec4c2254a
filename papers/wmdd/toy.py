"""The two-dimensional example of Figure 2: barycenters of outlines under three notions of distance.

Point clouds are float64 [n, 2] and lie on a few circles, or a few crosses, of different places and sizes.  Shapes
that differ by a shift and a scale have a Wasserstein barycenter in closed form: the same shape at the mean place with
the mean size (`mean_shape`).  KL and MMD average densities and kernel means instead, so they keep all shapes at once.
"""

from __future__ import annotations

import math

import ot
import torch
from torch import Tensor

__all__ = [
    "SHAPES", "clouds", "density", "grid", "kl_barycenter", "mean_shape", "mmd_barycenter", "outline_distance",
    "wasserstein_barycenter",
]  # fmt: skip

SHAPES = {  # centre x, centre y, size (radius; half a side of the square that a cross fills)
    "circle": ((-0.50, 0.35, 0.45), (0.45, 0.50, 0.60), (0.40, -0.50, 0.35), (-0.35, -0.35, 0.80)),
    "cross": ((-0.45, 0.45, 0.50), (0.50, 0.35, 0.40), (0.35, -0.45, 0.70), (-0.40, -0.35, 0.60)),
}
EXTENT = 1.4  # half a side of the square that is looked at
WIDTH = 0.01  # standard deviation of the points about their outline


def clouds(kind: str, points: int, generator: torch.Generator) -> Tensor:
    """One cloud for each of the `SHAPES` of a kind, evenly spread over its outline: [shapes, points, 2]."""
    out = []
    for x, y, size in SHAPES[kind]:
        t = (torch.arange(points) + torch.rand(points, generator=generator, dtype=torch.float64)) / points
        noise = WIDTH * torch.randn(points, 2, generator=generator, dtype=torch.float64)
        out.append(torch.tensor([x, y]) + size * _unit(kind, t) + noise)
    return torch.stack(out)


def _unit(kind: str, t: Tensor) -> Tensor:
    """Points at the shares t [n], 0 to 1, of the outline of a shape of size 1 at the origin: [n, 2]."""
    if kind == "circle":
        return torch.stack([(2 * math.pi * t).cos(), (2 * math.pi * t).sin()], 1)
    along, second = 4 * t.remainder(0.5) - 1, t >= 0.5  # one stroke after the other
    return torch.stack([along, torch.where(second, -along, along)], 1)


def mean_shape(kind: str) -> Tensor:
    """Centre x, y and size of the exact Wasserstein barycenter of the shapes of a kind: [3]."""
    return torch.tensor(SHAPES[kind], dtype=torch.float64).mean(0)


def outline_distance(kind: str, atoms: Tensor, shape: Tensor) -> Tensor:
    """Distance of each atom [m, 2] to the outline of `shape` (centre x, y, size): [m]."""
    line = shape[:2] + shape[2] * _unit(kind, torch.linspace(0, 1, 2001, dtype=torch.float64))
    return torch.cdist(atoms, line).min(1).values


def grid(side: int) -> Tensor:
    """The cells of the square that is looked at: [side * side, 2], rows of equal y, from the lower left."""
    axis = torch.linspace(-EXTENT, EXTENT, side, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def density(points: Tensor, places: Tensor, bandwidth: float = 0.05) -> Tensor:
    """Gaussian kernel density of a cloud [n, 2] at places [g, 2], as shares that sum to 1: [g]."""
    value = torch.exp(-torch.cdist(places, points).square() / (2 * bandwidth**2)).sum(1)
    return value / value.sum()


def kl_barycenter(densities: Tensor) -> Tensor:
    """The density q that minimises the sum of KL(p_i || q) over densities p [shapes, g]: their mixture, [g]."""
    return densities.mean(0)


def mmd_barycenter(shapes: Tensor, atoms: Tensor, bandwidth: float = 0.15, steps: int = 300) -> Tensor:
    """Atoms [m, 2], moved by Adam to minimise the summed squared MMD (Gaussian kernel) to clouds [shapes, n, 2].

    The sum differs by a constant from the squared MMD to the union of the clouds, which is what is minimised.
    """
    union, atoms = shapes.flatten(0, 1), atoms.clone().requires_grad_()
    adam = torch.optim.Adam([atoms], lr=0.05)

    def similarity(a: Tensor, b: Tensor) -> Tensor:
        squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
        return torch.exp(-squared / (2 * bandwidth**2)).mean()

    for step in range(steps):
        adam.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        adam.zero_grad()
        (similarity(atoms, atoms) - 2 * similarity(atoms, union)).backward()
        adam.step()
    return atoms.detach()


def wasserstein_barycenter(shapes: Tensor, atoms: Tensor) -> Tensor:
    """Free-support barycenter [m, 2] of clouds [shapes, n, 2] from the starting atoms [m, 2]; all masses are equal."""
    masses = [torch.full((len(cloud),), 1 / len(cloud), dtype=torch.float64).numpy() for cloud in shapes]
    found = ot.lp.free_support_barycenter(list(shapes.numpy()), masses, atoms.numpy(), numItermax=100, stopThr=1e-9)
    return torch.from_numpy(found)
