"""WMDD against plain loops written from its formulas, closed forms, resume, determinism and the copy rule."""

import ast
import math
import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import ot
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import pil_to_tensor

from benchmarks import plain_wmdd
from common import networks
from common.augment import rng
from methods import wmdd
from methods.wmdd import Config, RecoverState, Statistics
from tests.copied_file import OWN_NETWORK, killed_state, said_alone
from tests.user_network import MEAN, STD, Small

pytestmark = pytest.mark.usefixtures("untrained")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def teacher():
    return Small().eval().requires_grad_(False)


@pytest.fixture
def real():
    images = torch.randint(0, 256, (48, 3, 16, 16), dtype=torch.uint8, generator=rng("real"))
    return images, torch.arange(4).repeat_interleave(12)


def statistics_of(teacher, real, chunk=100, layer=0):
    images, labels = real
    pixels = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    return wmdd.statistics(teacher, lambda k: pixels[labels == k].split(chunk), range(4), layer=layer)


def clusters(n=60, d=6, seed=0):
    g = rng("clusters", seed)
    centres = 4 * torch.randn(3, d, generator=g, dtype=torch.float64)
    return centres[torch.arange(n) % 3] + torch.randn(n, d, generator=g, dtype=torch.float64)


# ---------------------------------------------------------------- statistics


def batch_norm_inputs(net, x):
    """Plain form: run the layers one by one and keep what enters each BatchNorm."""
    seen = []
    for layer in net.body:
        if isinstance(layer, nn.BatchNorm2d):
            seen.append(x)
        x = layer(x)
    return seen, x


@pytest.mark.parametrize("chunk", [100, 5])  # 5: a short last chunk of 2
def test_statistics_are_the_chunked_formula(teacher, real, chunk):
    stats = statistics_of(teacher, real, chunk)
    images, labels = real
    pixels = ((images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]).double()
    plain = Small().double().eval()
    for k in range(4):
        total, mean, var, features = 0, 0, 0, []
        for part in pixels[labels == k].split(chunk):
            inputs, feature = batch_norm_inputs(plain, part)
            features.append(feature)
            mean = mean + len(part) * torch.cat([x.mean((0, 2, 3)) for x in inputs])
            var = var + len(part) * torch.cat([x.var((0, 2, 3), correction=0) for x in inputs])
            total += len(part)
        torch.testing.assert_close(stats.mean[k].double(), mean / total, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stats.var[k].double(), var / total, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(stats.of_class(k).double(), torch.cat(features), atol=1e-5, rtol=1e-5)


def test_moments_and_their_gradient_equal_autograd_on_the_plain_form():
    x = torch.randn(6, 5, 7, 3, generator=rng(1), dtype=torch.float64).requires_grad_()
    g1, g2 = (torch.randn(2, 5, generator=rng(s), dtype=torch.float64) for s in (2, 3))
    plain = x.unflatten(0, (2, 3))
    mean, var = plain.mean((1, 3, 4)), plain.var((1, 3, 4), correction=0)
    (wanted,) = torch.autograd.grad((mean * g1 + var * g2).sum(), x)
    ours = wmdd.group_moments(x, 2)
    torch.testing.assert_close(ours, (mean, var), atol=1e-12, rtol=1e-9)
    (grad,) = torch.autograd.grad((ours[0] * g1 + ours[1] * g2).sum(), x)
    torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=1e-9)


def test_weighted_moments_are_equation_14():
    x, w = torch.randn(2 * 3, 4, 5, 6, generator=rng(1)), torch.rand(2, 3, generator=rng(2)) + 0.1
    mean, var = wmdd.group_moments(x, 2, w)
    for g in range(2):
        for c in range(4):
            m = sum(w[g, j] * x[3 * g + j, c].sum() for j in range(3)) / (30 * w[g].sum())
            v = sum(w[g, j] * (x[3 * g + j, c] - m).square().sum() for j in range(3)) / (30 * w[g].sum())
            assert mean[g, c].item() == pytest.approx(m.item(), abs=1e-5)
            assert var[g, c].item() == pytest.approx(v.item(), rel=1e-4)
    torch.testing.assert_close(
        wmdd.group_moments(x, 2, torch.ones(2, 3)), wmdd.group_moments(x, 2), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", ["resnet18", "resnet18-bn-w8"])
def test_layers_are_counted_along_the_main_path(name):
    """17 convolutions behind 3 x 3 kernels or the stem; those of the shortcuts have 1 x 1."""
    net = networks.make(name, classes=4, size=32, generator=rng(0))
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
    path = wmdd.main_path(net)
    assert len(path) == len(convolutions) == 17
    assert [bn.num_features for bn in path] == [conv.out_channels for conv in convolutions]


def test_layers_are_read_where_asked(teacher, real):
    deep = statistics_of(teacher, real, layer=2)
    assert deep.features.shape == (48, 12)  # pooled second convolution, before its ReLU
    assert (deep.features < 0).any()
    with pytest.raises(ValueError, match="layer=3 does not exist: the teacher has 2"):
        statistics_of(teacher, real, layer=3)


# ---------------------------------------------------------------- barycenters


def test_the_barycenter_of_one_atom_is_the_mean():
    points = clusters()
    atoms, weights = wmdd.barycenter(points.float(), 1, rng(0))
    torch.testing.assert_close(atoms[0], points.mean(0).float())
    assert weights.tolist() == [1.0]


def test_uniform_atoms_are_means_of_equal_clusters():
    points = clusters(60)
    atoms = wmdd.uniform_barycenter(points, torch.randn(5, 6, generator=rng(0), dtype=torch.float64))
    plan = ot.emd(
        torch.full((5,), 0.2).numpy(), torch.full((60,), 1 / 60).numpy(), torch.cdist(atoms, points).square().numpy()
    )
    assert ((plan > 1e-9).sum(1) == 12).all()  # hard balanced assignment
    for j in range(5):
        torch.testing.assert_close(atoms[j], points[torch.from_numpy(plan[j] > 1e-9)].mean(0))


def test_the_cost_never_rises_with_the_iterations():
    points, start = clusters(50), torch.randn(7, 6, generator=rng(0), dtype=torch.float64)
    share = torch.full((7,), 1 / 7)
    costs = [wmdd.transport_cost(wmdd.uniform_barycenter(points, start, n), share, points) for n in (1, 2, 3, 5, 100)]
    assert all(b <= a + 1e-9 for a, b in pairwise(costs))


def test_transport_cost_of_a_hand_made_case():
    atoms, points = torch.tensor([[0.0], [10.0]]), torch.tensor([[1.0], [2.0], [9.0], [12.0]])
    assert wmdd.transport_cost(atoms, torch.tensor([0.5, 0.5]), points) == pytest.approx((1 + 4 + 1 + 4) / 4)
    assert wmdd.transport_cost(atoms, torch.tensor([0.75, 0.25]), points) == pytest.approx((1 + 4 + 81 + 4) / 4)


def real_features():
    """Features of 200 real images of a class by a network with random weights, or a skip without the images."""
    folder = Path(os.environ.get("DD_DATA", "nowhere")).expanduser() / "cifar10" / "train"
    files = sorted(path for one in sorted(folder.glob("*"))[:1] for path in one.iterdir())[:200]
    if len(files) < 200:
        pytest.skip("needs DD_DATA with cifar10/train/<class>/")
    pixels = torch.stack([pil_to_tensor(Image.open(path).convert("RGB")) for path in files]) / 255
    net = networks.make("resnet18-mod", classes=10, size=32, generator=rng(0)).eval()
    net.fc = nn.Identity()
    with torch.no_grad():
        return net(pixels).double()


@pytest.mark.parametrize("seed", [*range(4), "real"])
def test_learned_weights_cost_no_more_than_what_they_start_from(seed):
    points = real_features() if seed == "real" else clusters(70, seed=seed)
    for weights in ("uniform", "subgradient"):
        atoms, share = (x.double() for x in wmdd.barycenter(points, 6, rng(seed), weights=weights))
        learned, own = wmdd.learned_barycenter(points, atoms)
        before, after = wmdd.transport_cost(atoms, share, points), wmdd.transport_cost(learned, own, points)
        assert after <= before + 1e-9
        nearest = wmdd.squared_distances(points, learned).argmin(1)
        torch.testing.assert_close(own, torch.bincount(nearest, minlength=6).double() / len(points))
        assert own.min() > 0


def test_an_atom_without_points_finds_some():
    points = clusters(30)
    atoms, weights = wmdd.learned_barycenter(points, torch.full((3, 6), 1e6, dtype=torch.float64))
    assert weights.min() > 0 and atoms.abs().max() < 100


def test_an_atom_without_points_goes_to_the_farthest_one():
    points = torch.tensor([[0.0]] * 5 + [[100.0]], dtype=torch.float64)
    atoms, weights = wmdd.learned_barycenter(points, torch.tensor([[0.0], [-500.0]], dtype=torch.float64), iterations=2)
    assert sorted(atoms[:, 0].tolist()) == pytest.approx([0, 100]) and sorted(weights.tolist()) == pytest.approx(
        [1 / 6, 5 / 6]
    )


def test_sliced_atoms_match_the_quantiles_in_one_dimension():
    points = torch.arange(12.0, dtype=torch.float64)[torch.randperm(12, generator=rng(0)), None]
    atoms = wmdd.sliced_barycenter(points, torch.randn(4, 1, generator=rng(1), dtype=torch.float64), rng(2))
    torch.testing.assert_close(atoms.sort(0).values[:, 0], torch.tensor([1.0, 4.0, 7.0, 10.0]).double())


def test_sliced_atoms_come_close_to_wasserstein_atoms():
    points = clusters(90)
    share = torch.full((6,), 1 / 6)
    cost = {
        kind: wmdd.transport_cost(wmdd.barycenter(points, 6, rng(3), kind=kind)[0].double(), share, points)
        for kind in ("wasserstein", "sliced", "mmd")
    }
    assert cost["wasserstein"] < cost["sliced"] < 0.6 * cost["mmd"]


def test_too_many_atoms_are_refused():
    with pytest.raises(ValueError, match="ipc=11 is more than the 10 real images"):
        wmdd.barycenter(torch.zeros(10, 3), 11, rng(0))


# ---------------------------------------------------------------- views and batches


@pytest.mark.parametrize("draw", range(100))
def test_a_view_is_crop_resize_flip_and_roll(draw):
    size, jitter, image = 24, 5, torch.rand(2, 3, 24, 24, generator=rng("image"))
    view = wmdd.random_view(size, 0.08, (0, jitter), rng(draw))
    rows, columns = wmdd.view_matrices(view, size)
    g = rng(draw)  # the same draws, spelled out
    for area, aspect in torch.rand(10, 2, generator=g, dtype=torch.float64).tolist():
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * aspect)
        area = size**2 * (0.08 + 0.92 * area)
        width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if width <= size and height <= size:
            break
    else:
        width = height = size
    y, x = torch.rand(2, generator=g, dtype=torch.float64).tolist()
    top, left = int(y * (size - height + 1)), int(x * (size - width + 1))
    plain = F.interpolate(image[:, :, top : top + height, left : left + width], (size, size), mode="bilinear")
    if torch.rand((), generator=g).item() < 0.5:
        plain = plain.flip(3)
    dy, dx = torch.randint(jitter + 1, (2,), generator=g).tolist()
    wanted = plain.roll((dy, dx), (2, 3))
    torch.testing.assert_close(rows @ image @ columns.T, wanted, atol=1e-5, rtol=0)  # as a GPU does
    torch.testing.assert_close(wmdd.see(image, view), wanted, atol=1e-6, rtol=0)


def test_views_follow_torchvisions_law():
    size, n = 64, 4000
    ours = torch.tensor([wmdd.random_view(size, 0.08, (0, 9), rng("law", i)) for i in range(n)]).double()
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        image = torch.zeros(1, size, size)
        theirs = [RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(n)]
    for have, want in zip(ours[:, :4].unbind(1), torch.tensor(theirs).double().unbind(1), strict=True):
        assert (have.mean() - want.mean()).abs() < 4 * (2 * want.var() / n).sqrt()
        assert have.std() == pytest.approx(want.std().item(), rel=0.08)
    assert ours[:, 4].mean() == pytest.approx(0.5, abs=0.04)
    for roll in (ours[:, 5], ours[:, 6]):  # 0 to 9, each as often
        assert (torch.bincount(roll.long(), minlength=10) / n - 0.1).abs().max() < 0.02
    assert wmdd.random_view(size, None, (0, 0), rng(0)) == (0, 0, size, size, False, 0, 0)


@pytest.mark.parametrize(
    ("ipc", "classes", "per_group"),
    [(1, 1000, 100), (10, 1000, 10), (50, 1000, 2), (100, 1000, 1), (1, 10, 10), (10, 10, 10), (50, 10, 2)],
)
def test_classes_of_a_batch(ipc, classes, per_group):
    plan = wmdd.passes(classes, Config(ipc=ipc))
    assert all(groups == 1 and len(number) == per_group * ipc for number, groups in plan)
    assert torch.equal(torch.cat([number for number, _ in plan]), torch.arange(classes * ipc))


def test_global_batches_hold_one_image_a_class():
    plan = wmdd.passes(10, Config(ipc=3, bn="global", in_flight=10))
    assert [(number // 3).tolist() for number, _ in plan] == [list(range(10))] * 3
    assert sorted(torch.cat([number for number, _ in plan]).tolist()) == list(range(30))


# ---------------------------------------------------------------- objective


def plain_objective(net, x, stats, atoms, config):
    """The released loss by loops over layers and classes, in float64."""
    inputs, feature = batch_norm_inputs(net, x)
    classes, ipc = atoms.shape[:2]
    labels = torch.arange(classes).repeat_interleave(ipc)
    loss = config.ce_weight * F.cross_entropy(net.head(feature), labels)
    loss = loss + (feature - atoms.flatten(0, 1).double()).square().sum().sqrt()
    start = 0
    for number, layer in enumerate(inputs):
        width = layer.shape[1]
        by_class = layer.unflatten(0, (classes, ipc))
        for k in range(classes):
            part = by_class[k]
            mean, var = part.mean((0, 2, 3)), part.var((0, 2, 3), correction=0)
            want_mean, want_var = (s[k, start : start + width].double() for s in (stats.mean, stats.var))
            multiplier = config.first_bn_multiplier if number == 0 else 1
            loss = (
                loss + config.bn_weight * multiplier * ((mean - want_mean).norm() + (var - want_var).norm()) / classes
            )
        start += width
    return loss


def ours_and_gradient(teacher, stats, atoms, weights, config, x):
    number, groups = wmdd.passes(len(atoms), config)[0]
    target = wmdd._targets(teacher, stats, atoms, weights, config, number, groups)
    in_flight = len(number) // config.ipc if config.bn == "class" else groups
    x = x.clone().requires_grad_()
    with wmdd.probe(teacher, 0, lambda m: wmdd.group_moments(m, in_flight, target.weights)) as (feature, moments):
        logits = teacher(x)
    loss = wmdd.objective(logits, feature[0], moments, target, config)
    return loss, torch.autograd.grad(loss, x)[0]


def test_the_released_loss_and_its_image_gradient(teacher, real):
    stats = statistics_of(teacher, real)
    config = Config(ipc=3, bn_weight=7.0, first_bn_multiplier=4.0)
    atoms, weights = wmdd.barycenters(stats, config, rng(0))
    x = torch.randn(12, 3, 16, 16, generator=rng(9))
    loss, grad = ours_and_gradient(teacher, stats, atoms, weights, config, x)
    plain = x.double().requires_grad_()
    wanted = plain_objective(Small().double().eval(), plain, stats, atoms, config)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    (wanted_grad,) = torch.autograd.grad(wanted, plain)
    assert (grad - wanted_grad).norm() < 1e-4 * wanted_grad.norm()


def test_the_papers_loss_is_equation_15(teacher, real):
    stats = statistics_of(teacher, real)
    config = Config(ipc=3, loss="paper", ce_weight=0.0, bn_weight=2.0, weights="learned")
    atoms, weights = wmdd.barycenters(stats, config, rng(0))
    x = torch.randn(12, 3, 16, 16, generator=rng(9))
    loss, _ = ours_and_gradient(teacher, stats, atoms, weights, config, x)
    inputs, feature = batch_norm_inputs(Small().double().eval(), x.double())
    wanted = (feature - atoms.flatten(0, 1)).square().sum()
    start = 0
    for layer in inputs:
        mean, var = wmdd.group_moments(layer, 4, weights.double())
        for have, want in ((mean, stats.mean), (var, stats.var)):
            wanted = wanted + 2.0 * (have - want[:, start : start + layer.shape[1]]).square().sum()
        start += layer.shape[1]
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_global_statistics_are_those_of_the_network(teacher, real):
    stats = statistics_of(teacher, real)
    config = Config(ipc=3, bn="global", feature="ce", bn_weight=1.0, in_flight=4)
    atoms, weights = wmdd.barycenters(stats, config, rng(0))
    x = torch.randn(4, 3, 16, 16, generator=rng(9))
    loss, _ = ours_and_gradient(teacher, stats, atoms, weights, config, x)
    inputs, feature = batch_norm_inputs(teacher, x)
    wanted = F.cross_entropy(teacher.head(feature), torch.arange(4))
    for layer, bn in zip(inputs, wmdd.batch_norms(teacher), strict=True):
        wanted = wanted + (layer.mean((0, 2, 3)) - bn.running_mean).norm()
        wanted = wanted + (layer.var((0, 2, 3), correction=0) - bn.running_var).norm()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_real_images_of_a_class_have_no_statistics_gap(teacher, real):
    """A batch that is the class's own chunk: both PCBN differences are 0 (to the 1e-6 that smooths the root)."""
    stats = statistics_of(teacher, real)
    images, _ = real
    x = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    config = Config(ipc=12, bn_weight=1.0, feature="ce", batch=48)
    with_bn, _ = ours_and_gradient(teacher, stats, torch.zeros(4, 12, 48), torch.ones(4, 12), config, x)
    logits = teacher(x)
    plain = F.cross_entropy(logits, torch.arange(4).repeat_interleave(12))
    assert with_bn.item() == pytest.approx(plain.item(), abs=1e-3)


def test_the_feature_term_is_one_norm_of_the_batch():
    """Doubling every difference doubles it; its gradient has length 1."""
    target = wmdd.Targets(1, torch.zeros(6, dtype=torch.long), torch.zeros(6, 5), None, [], [])
    feature = torch.randn(6, 5, generator=rng(0)).requires_grad_()
    config = Config(ce_weight=0.0)
    one = wmdd.objective(torch.zeros(6, 2), feature, [], target, config)
    two = wmdd.objective(torch.zeros(6, 2), 2 * feature, [], target, config)
    assert two.item() == pytest.approx(2 * one.item(), rel=1e-5)
    assert torch.autograd.grad(one, feature)[0].norm().item() == pytest.approx(1, abs=1e-5)


# ---------------------------------------------------------------- recover


def distill(teacher, real, config, **more):
    return wmdd.distill(*real, teacher, config, mean=MEAN, std=STD, generator=rng(1), **more)


QUICK = Config(ipc=2, iterations=8, batch=4, in_flight=4, precision="fp32")


def test_moments_start_fresh_and_pixels_stay_in_range(teacher, real):
    low, high = (torch.tensor([(e - m) / s for m, s in zip(MEAN, STD, strict=True)])[:, None, None] for e in (0, 1))
    states = []

    def look(state):
        x, first, second = (t.detach().clone() for t in state.live)
        states.append((state.step, first, second))
        assert (x >= low - 1e-6).all() and (x <= high + 1e-6).all()

    out = distill(teacher, real, QUICK, on_step=look)
    assert [s for s, _, _ in states] == [1, 2, 3, 4, 5, 6, 7, 8] * 2  # two passes of two classes
    for _, first, second in (states[0], states[8]):  # fresh moments for every batch: first = g/2, second = g^2/10
        torch.testing.assert_close(second, (2 * first).square() / 10, atol=1e-12, rtol=1e-3)
    assert out["images"].min() >= 0 and out["images"].max() <= 1
    assert out["labels"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_learning_rate_falls_as_a_cosine():
    config = Config(lr=0.25, iterations=2000)
    assert wmdd.learning_rate(config, 0) == 0.25
    assert wmdd.learning_rate(config, 1000) == pytest.approx(0.125)
    assert wmdd.learning_rate(config, 1999) == pytest.approx(0, abs=1e-6)


def test_the_objective_falls(teacher, real):
    losses = []
    config = Config(ipc=2, iterations=100, precision="fp32", crop=False, jitter=0)
    distill(teacher, real, config, on_step=lambda s: losses.append(s.loss))
    assert losses[-1] < 0.8 * losses[50]


def test_two_seeded_runs_are_equal_and_seeds_differ(teacher, real):
    one, two = distill(teacher, real, QUICK), distill(teacher, real, QUICK)
    assert all(torch.equal(one[k], two[k]) for k in one)
    other = wmdd.distill(*real, teacher, QUICK, mean=MEAN, std=STD, generator=rng(2))
    assert not torch.equal(one["images"], other["images"])


@pytest.mark.parametrize("stop", [1, 7, 8, 9, 15])
def test_a_stopped_run_continues_bit_for_bit(teacher, real, stop):
    whole, kept = distill(teacher, real, QUICK)["images"], killed_state(stop, distill, teacher, real, QUICK)
    resumed = distill(teacher, real, QUICK, state=RecoverState.restore(kept))["images"]
    assert torch.equal(resumed, whole)


@pytest.mark.parametrize("bn", ["class", "global"])
def test_parts_make_the_images_of_the_whole(teacher, real, bn):
    stats, config = statistics_of(teacher, real), replace(QUICK, bn=bn, in_flight=2, batch=2)
    atoms, weights = wmdd.barycenters(stats, config, rng(3))
    halves = [wmdd.barycenters(stats, config, rng(3), part) for part in (slice(0, 1), slice(1, 4))]
    assert torch.equal(torch.cat([a for a, _ in halves]), atoms)
    assert torch.equal(torch.cat([w for _, w in halves]), weights)

    def recover(part=slice(None)):
        return wmdd.recover(
            teacher, stats, atoms, weights, config, size=16, mean=MEAN, std=STD, generator=rng(1), part=part
        )

    whole, plan = recover(), wmdd.passes(4, config)
    assert len(plan) == 4
    for part in (slice(0, 1), slice(1, 4)):
        numbers = torch.cat([number for number, _ in plan[part]]).sort().values
        assert torch.equal(recover(part), whole[numbers])


def test_groups_in_flight_do_not_change_the_images(teacher, real):
    """Two batches in one forward, with the draws of one: the images of each equal those of its own run."""
    stats = statistics_of(teacher, real)
    together = Config(ipc=2, iterations=5, batch=4, in_flight=8, precision="fp32", crop=False, jitter=0)
    atoms, weights = wmdd.barycenters(stats, together, rng(0))
    x = torch.randn(8, 3, 16, 16, generator=rng(4))
    _, both = ours_and_gradient(teacher, stats, atoms, weights, together, x)
    half = Config(ipc=2, batch=4, in_flight=4, precision="fp32")
    _, first = ours_and_gradient(teacher, stats, atoms, weights, half, x[:4])
    torch.testing.assert_close(both[:4], first, atol=1e-5, rtol=1e-4)


def test_bf16_stays_close(teacher, real):
    stats = statistics_of(teacher, real)
    config = Config(ipc=3)
    atoms, weights = wmdd.barycenters(stats, config, rng(0))
    x = torch.randn(12, 3, 16, 16, generator=rng(9))
    exact, wanted = ours_and_gradient(teacher, stats, atoms, weights, config, x)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grad = ours_and_gradient(teacher, stats, atoms, weights, config, x)
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert F.cosine_similarity(grad.flatten(), wanted.flatten(), dim=0) > 0.97


def test_a_loss_that_is_not_finite_stops_with_the_step(teacher, real):
    stats = statistics_of(teacher, real)
    broken = Statistics(stats.features, stats.labels, stats.mean * math.nan, stats.var)
    atoms, weights = wmdd.barycenters(stats, QUICK, rng(0))
    with pytest.raises(FloatingPointError, match=r"nan at step 7 of pass 0 \(lr=0.25"):
        wmdd.recover(teacher, broken, atoms, weights, QUICK, size=16, mean=MEAN, std=STD, generator=rng(0))


def test_a_state_that_is_not_finite_is_not_handed_out(teacher, real):
    """The loss is looked at every 50 steps only; a checkpoint in between must not replace the last good state."""
    stats, kept = statistics_of(teacher, real), []
    broken = Statistics(stats.features, stats.labels, stats.mean * math.nan, stats.var)
    atoms, weights = wmdd.barycenters(stats, QUICK, rng(0))
    with pytest.raises(FloatingPointError, match="images are not finite after step 1 of pass 0"):
        wmdd.recover(
            teacher, broken, atoms, weights, QUICK, size=16, mean=MEAN, std=STD, generator=rng(0),
            on_step=lambda state: kept.append(state.tensors()),
        )  # fmt: skip
    assert kept == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ipc": 0}, "ipc=0"),
        ({"loss": "l2"}, "official, paper"),
        ({"feature": "kl"}, "mmd"),
        ({"bn_weight": -1.0}, "bn_weight"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)


def test_a_teacher_without_batch_norm_is_named(real):
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        distill(nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), real, QUICK)


# ---------------------------------------------------------------- the copy rule

ALONE = f"""
import torch, torchvision, wmdd
wmdd.recognises = lambda *_: None  # the teachers are untrained
{OWN_NETWORK}
images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
config = wmdd.Config(ipc=2, iterations=2)
for teacher in (torchvision.models.resnet18(num_classes=3), Own()):
    out = wmdd.distill(images, torch.arange(30) % 3, teacher.eval(), config, mean=(0.5,) * 3, std=(0.2,) * 3,
                       generator=torch.Generator().manual_seed(0))
    assert out["images"].shape == (6, 3, 32, 32) and out["images"].isfinite().all()
print("alone")
"""


def test_the_file_runs_alone(tmp_path):
    assert said_alone("wmdd", ALONE, tmp_path) == "alone\n"


@pytest.mark.parametrize("path", sorted((ROOT / "methods").glob("*.py")), ids=lambda p: p.name)
def test_method_files_import_nothing_of_the_repository(path):
    for node in ast.parse(path.read_text()).body:  # the block under the main guard is not looked at
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["methods" if node.level else node.module]
        assert not {n.split(".")[0] for n in names} & {"common", "papers", "methods"}, ast.unparse(node)


# ---------------------------------------------------------------- the plain form of the benchmark


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_recover_takes_the_steps_of_the_plain_form(teacher, real, compiled):
    """Same noise, atoms, statistics and draws: the images after ten steps agree with the loop the benchmark times."""
    if compiled and shutil.which("c++") is None:
        pytest.skip("compiling needs a C++ compiler")
    stats = statistics_of(teacher, real)
    config = Config(ipc=2, iterations=10, precision="fp32", jitter=3, compile=compiled)
    atoms, weights = wmdd.barycenters(stats, config, rng(0))
    ours = wmdd.recover(teacher, stats, atoms, weights, config, size=16, mean=MEAN, std=STD, generator=rng(6))
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=rng(6))))  # of the one pass
    noise = torch.randn(8, 3, 16, 16, generator=generator)
    views = (wmdd.random_view(16, 0.08, (0, 3), generator) for _ in range(10))
    low, high = (torch.tensor([(e - m) / s for m, s in zip(MEAN, STD, strict=True)]).view(-1, 1, 1) for e in (0, 1))
    loop = plain_wmdd.recover(
        teacher, [noise], [torch.arange(4).repeat_interleave(2)], [atoms.flatten(0, 1)],
        [list(stats.mean.split([8, 12], 1))], [list(stats.var.split([8, 12], 1))], views,
        iterations=10, lr=config.lr, bn_weight=config.bn_weight, ce_weight=1.0, low=low, high=high,
    )  # fmt: skip
    *_, (plain, _) = loop
    pixels = (plain * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).clamp(0, 1)
    assert (ours - pixels).abs().max() < 2e-3
