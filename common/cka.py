"""Linear CKA: how alike two representations of the same images are, up to rotation and scale.

    matrix, names_a, names_b = similarity(net_a, net_b, images, prepare=prepare, device=device)     # matrix: [La, Lb]

Kornblith et al. (arXiv 1905.00414), for features X [n, d1] and Y [n, d2] with centred columns and K = X X^T, L = Y Y^T:

    CKA = |Y^T X|^2 / (|X^T X| |Y^T Y|) = <K, L> / sqrt(<K, K> <L, L>)          (Frobenius norms and inner products)

With more features than images it is large for unrelated ones.  Nguyen et al. (arXiv 2010.15327) therefore estimate
<K, L> without bias (Song et al., JMLR 2012), so that batches can be averaged, before the ratio is taken:

    HSIC1(K, L) = (<K~, L~> + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2 1'K~L~1 / (n-2)) / (n (n-3)),   K~: K without its diagonal
                = <u(K), u(L)> / (n (n-3))                                      (Szekely and Rizzo, Ann. Statist. 2014)

u(K), U-centring, subtracts from K~ what makes every row sum to 0.  The second form needs one vector u(K) of n^2 numbers
a layer and batch; all pairs of layers are then one product of matrices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from common.attacks import eval_mode
from common.networks_small import ConvNet

__all__ = ["cka", "debiased_cka", "layer_features", "layer_names", "similarity", "unbiased_cka"]

FLOOR = 1e-24  # of <K, K>, float64: a layer that says the same of every image is 0 to all others, and not NaN
LEAST = 4  # images of a batch: HSIC1 divides by n - 3

# ---------------------------------------------------------------- two matrices of features


def cka(x: Tensor, y: Tensor) -> float:
    """x: [n, ...], y: [n, ...] of the same n images, flattened -> CKA in float64."""
    _check_pair(x, y, 2)
    x, y = _centred(x.double()), _centred(y.double())
    return _ratio(_inner(x, y), _inner(x, x), _inner(y, y))


def debiased_cka(x: Tensor, y: Tensor) -> float:
    """As `cka`, with HSIC1 of all n images at once in place of each inner product."""
    _check_pair(x, y, LEAST)
    x, y = _centred(x.double()), _centred(y.double())
    return _ratio(_debiased(x, y), _debiased(x, x), _debiased(y, y))


def unbiased_cka(x: Tensor, y: Tensor, batch: int = 256) -> float:
    """As `debiased_cka`, with means over batches; images that do not fill the last batch are left out."""
    _check_pair(x, y, LEAST)
    full = _full(len(x), batch)
    u, v = (torch.cat([_gram(part) for part in z[:full].split(batch)]) for z in (x, y))
    return _ratio(u @ v, u @ u, v @ v)


def _inner(x: Tensor, y: Tensor) -> Tensor:
    """<X X^T, Y Y^T>, by features where they are fewer than images."""
    if x.shape[1] * y.shape[1] <= len(x) ** 2:
        return (y.T @ x).square().sum()
    return ((x @ x.T) * (y @ y.T)).sum()


def _debiased(x: Tensor, y: Tensor) -> Tensor:
    """n (n - 3) HSIC1 of centred features: rows of the centred K sum to 0, those of K~ to minus its diagonal."""
    n, p, q = len(x), x.square().sum(1), y.square().sum(1)  # the diagonals of K and L
    return _inner(x, y) - n / (n - 2) * (p @ q) + p.sum() * q.sum() / ((n - 1) * (n - 2))


def _ratio(cross: Tensor, own_x: Tensor, own_y: Tensor) -> float:
    # Only the denominator has a floor: an unbiased numerator may be a little below 0.
    return float(cross / (own_x.clamp(min=FLOOR).sqrt() * own_y.clamp(min=FLOOR).sqrt()))


def _centred(x: Tensor) -> Tensor:
    x = x.flatten(1)
    return x - x.mean(0)


def _gram(features: Tensor, debias: bool = True) -> Tensor:
    """[n, ...] -> u(K), or the centred K, float64 [n * n].

    Columns are centred, to which u is blind, so that float32 keeps its digits; the product is of the features' type.
    """
    x = _centred(features.to(torch.promote_types(features.dtype, torch.float32)))
    gram = (x @ x.T).double() / x.shape[1]
    if debias:
        n = len(gram)
        gram.fill_diagonal_(0)
        rows = gram.sum(1)
        gram -= (rows[:, None] + rows) / (n - 2) - rows.sum() / ((n - 1) * (n - 2))
        gram.fill_diagonal_(0)
    return gram.flatten()


# ---------------------------------------------------------------- layers of networks


def layer_names(net: nn.Module) -> dict[str, str]:
    """The layers compared by default, {name: path of the module}.

    ConvNet-D: conv1, norm1, act1, pool1, ..., logits.  Others: every module without children, under its path.  Identity
    and dropout are left out.
    """
    leaves = {path: m for path, m in net.named_modules() if path and not any(m.children())}
    paths = [p for p, m in leaves.items() if not isinstance(m, nn.Identity | nn.modules.dropout._DropoutNd)]
    if not isinstance(net, ConvNet):
        return {path: path for path in paths}
    kinds = ("conv", "norm", "act", "pool")
    label = lambda i: f"{kinds[i % 4]}{i // 4 + 1}"  # noqa: E731
    return {"logits" if p == "classifier" else label(int(p.split(".")[1])): p for p in paths}


@torch.no_grad()
def layer_features(
    net: nn.Module,
    inputs: Tensor,
    layers: Sequence[str] | None = None,
    *,
    reduce: Callable[[Tensor], Tensor] = torch.clone,
) -> dict[str, Tensor]:
    """What `layers` make of network input [B, ...] in eval mode, in order of computation: {name: reduce(output)}.

    layers: names of `layer_names`, or paths of any modules; None: all of `layer_names`.  A module that is called again
    has its later outputs under "name#2" and so on.  `reduce` runs as soon as the output is there: with one that returns
    little, the features of one layer at a time are in memory.  It must not return the output itself, which the next
    layer may overwrite (in-place ReLU).
    """
    known, modules = layer_names(net), dict(net.named_modules())
    table = {path: path for path in modules} | known
    for name in layers or ():
        if name not in table:
            raise ValueError(f"layer {name!r} is unknown; allowed: {', '.join(known)}, and the path of any module")
    found, calls = {}, Counter()

    def keep(name: str, output: Tensor) -> None:
        calls[name] += 1
        found[name if calls[name] == 1 else f"{name}#{calls[name]}"] = reduce(output)

    chosen = known if layers is None else layers
    hooks = [modules[table[n]].register_forward_hook(lambda m, i, out, n=n: keep(n, out)) for n in chosen]
    try:
        with eval_mode(net):
            net(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if layers is not None and (silent := [name for name in layers if name not in found]):
        raise ValueError(f"layers {', '.join(silent)} are not called by the network's forward pass")
    return found


@torch.no_grad()
def similarity(
    net_a: nn.Module,
    net_b: nn.Module,
    images: Tensor,
    *,
    prepare: Callable[[Tensor], Tensor],
    device: torch.device | str,
    layers: Sequence[str] | None = None,
    batch: int = 256,
    debias: bool = True,
) -> tuple[Tensor, list[str], list[str]]:
    """CKA of every layer of net_a with every layer of net_b: float64 [La, Lb] on the CPU, and both lists of names.

    images: [N, C, H, W]; prepare: images as they are given, but on `device` -> input of both networks, which lie there
    too.  layers: as of `layer_features`, for both.  Means are over full batches, so that each has the same
    weight.  debias=False: the centred Grams, which with batch=N is `cka` of all pairs.
    """
    full = _full(len(images), batch)
    cross, own_a, own_b = 0, 0, 0
    for some in images[:full].split(batch):
        inputs = prepare(some.to(device))
        a, b = (layer_features(net, inputs, layers, reduce=lambda x: _gram(x, debias)) for net in (net_a, net_b))
        u, v = torch.stack(list(a.values())), torch.stack(list(b.values()))  # [La, n * n], [Lb, n * n]
        cross = cross + u @ v.T
        own_a, own_b = own_a + u.square().sum(1), own_b + v.square().sum(1)
    for own, names in ((own_a, a), (own_b, b)):
        if not own.isfinite().all():
            bad = next(name for name, value in zip(names, own, strict=True) if not value.isfinite())
            raise FloatingPointError(f"layer {bad} gives values that are not finite for these images")
    scale = own_a.clamp(min=FLOOR).sqrt()[:, None] * own_b.clamp(min=FLOOR).sqrt()
    return (cross / scale).cpu(), list(a), list(b)


def _full(n: int, batch: int) -> int:
    """How many of n images fill whole batches."""
    if batch < LEAST or n < batch:
        raise ValueError(f"batch={batch} must be at least {LEAST} and at most the number of images, {n}")
    return n // batch * batch


def _check_pair(x: Tensor, y: Tensor, least: int) -> None:
    if len(x) != len(y) or len(x) < least:
        raise ValueError(f"{len(x)} rows of x and {len(y)} of y; needs as many of both, and at least {least}")
