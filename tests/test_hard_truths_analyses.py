"""The analyses of the Hard Truths paper against closed forms, plain loops and the methods' own functions."""

import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from scipy.stats import spearmanr

from common import scaling
from common.augment import rng
from common.scaling import fit_scaling_law, law_product, shared_b_test
from papers.hard_truths import analyses
from papers.hard_truths.analyses import dcs, el2n_sl


@pytest.fixture(autouse=True)
def global_state_is_untouched():
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=rng("analyses", seed), dtype=dtype)


# ---------------------------------------------------------------- EL2N-SL


def test_el2n_sl_of_two_classes_in_closed_form():
    student, teacher, t = normal(9, 2, seed=1), normal(9, 2, seed=2), 7.0
    p, q = ((logits[:, 0] - logits[:, 1]).div(t).sigmoid() for logits in (student, teacher))
    torch.testing.assert_close(el2n_sl(student, teacher, t), math.sqrt(2) * (p - q).abs() / t)
    both = torch.stack([student, teacher])
    torch.testing.assert_close(el2n_sl(both, teacher, t), el2n_sl(student, teacher, t) / 2)  # the second run is at 0


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_lemma_1(temperature):
    """Where logits have orthogonal parameter gradients of length c, GraNd is c/T times the distance."""
    n, k, d = 5, 4, 6
    features = F.normalize(normal(n, d, seed=1, dtype=torch.float64)) * 3
    teacher = 4 * normal(n, k, seed=2, dtype=torch.float64)
    q = (teacher / temperature).softmax(1)
    c = math.sqrt(1 + 9)  # of a linear layer with bias: the gradient of a logit is (h, 1)
    runs, grand = [], torch.zeros(n)
    for run in range(3):
        weight, bias = normal(k, d, seed=10 + run).double(), normal(k, seed=20 + run).double()
        runs.append(F.linear(features, weight, bias))
        layer = weight.requires_grad_(), bias.requires_grad_()
        for i in range(n):
            logp = (F.linear(features[i], *layer) / temperature).log_softmax(0)
            gradients = torch.autograd.grad(F.kl_div(logp, q[i], reduction="sum"), layer)
            grand[i] += torch.cat([g.flatten() for g in gradients]).norm() / 3
    torch.testing.assert_close(grand, c * el2n_sl(torch.stack(runs), teacher, temperature))


def test_lemma_1_needs_its_assumption():
    """One bias that all logits share: their gradients are parallel and cancel, the distance does not."""
    bias = torch.zeros(1, requires_grad=True)
    logits, teacher = normal(1, 4, seed=1), normal(1, 4, seed=2)
    loss = F.kl_div((logits + bias).log_softmax(1), teacher.softmax(1), reduction="sum")
    assert float(torch.autograd.grad(loss, bias)[0].abs()) < 1e-6 < 0.1 < float(el2n_sl(logits, teacher, 1.0))


def test_el2n_sl_refuses():
    with pytest.raises(ValueError, match="temperature=0"):
        el2n_sl(normal(2, 3), normal(2, 3), 0)
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[2, 4\]"):
        el2n_sl(normal(2, 3), normal(2, 4))


# ---------------------------------------------------------------- DCS


def subsets(m=60, seed=0):
    """Losses and errors that fall with IPC and are else independent, in steps, so that there are ties."""
    ipc = np.repeat([10, 50, 200], m // 3)
    noise = np.round(normal(2, m, seed=seed).double().numpy(), 1)
    return 5 - 2 * np.log10(ipc) + noise[0], 0.9 - 0.3 * np.log10(ipc) + 0.1 * noise[1], ipc


def interval(*given, **options):
    return dcs(*given, **{"generator": rng("bootstrap"), "resamples": 200} | options)


def test_dcs_against_scipy_and_the_formula_of_partial_correlation():
    losses, errors, ipc = subsets()
    found = interval(losses, errors, ipc)
    xy, xz, yz = (spearmanr(*pair).statistic for pair in ((losses, errors), (losses, ipc), (errors, ipc)))
    assert found.rho == pytest.approx(xy, abs=1e-12)
    assert found.partial == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)), abs=1e-12)
    own = {size: spearmanr(losses[ipc == size], errors[ipc == size]).statistic for size in (10, 50, 200)}
    assert {size: rho for size, (rho, _) in found.per_ipc.items()} == pytest.approx(own)
    assert found.within == pytest.approx(np.mean(list(own.values())))
    assert [count for _, count in found.per_ipc.values()] == [20, 20, 20] and found.subsets == 60
    assert found.low < found.partial < found.high and found.resamples == 200 and found.reason == ""


def test_size_alone_makes_a_plain_correlation_but_no_partial_one():
    found = interval(*subsets(m=180))
    assert found.rho > 0.4 and abs(found.partial) < 0.2 and found.low < 0 < found.high


def test_partial_sees_the_opposite_order_within_each_size():
    ipc = np.repeat([10, 100], 5)
    within = np.tile(np.arange(5), 2)
    found = interval(10 * ipc + within, 10 * ipc - within, ipc)
    assert found.rho > 0.4 and found.partial < -0.9 and found.within == pytest.approx(-1)


def test_only_ranks_matter_and_one_size_needs_no_adjustment():
    losses, errors, ipc = subsets()
    assert interval(np.exp(losses), errors**3, ipc) == interval(losses, errors, ipc)
    one = interval(losses[:20], errors[:20], ipc[:20])
    assert one.partial == pytest.approx(one.rho, abs=1e-12) == one.within


def test_bootstrap_draws_dependent_subsets_together():
    losses, errors, ipc = subsets()
    single = interval(losses, errors, ipc, np.arange(60))
    four = interval(*(np.tile(v, 4) for v in (losses, errors, ipc)), np.tile(np.arange(60), 4))
    loose = interval(*(np.tile(v, 4) for v in (losses, errors, ipc)))
    assert (four.partial, four.low, four.high) == pytest.approx((single.partial, single.low, single.high), abs=1e-9)
    assert loose.high - loose.low < 0.65 * (four.high - four.low)  # about half, were they independent
    assert single == interval(losses, errors, ipc)


def test_bootstrap_interval_has_the_width_of_large_samples():
    x, y = normal(2, 150, seed=5).double().numpy()
    found = interval(x, y, np.full(150, 10), resamples=500)
    assert found.high - found.low == pytest.approx(2 * 1.96 / math.sqrt(149), rel=0.1)


def test_dcs_says_why_there_is_no_correlation():
    losses, errors, ipc = subsets()
    constant = interval(np.ones(60), errors, ipc)
    assert math.isnan(constant.rho) and math.isnan(constant.partial) and math.isnan(constant.low)
    assert constant.reason == "all losses are equal" and math.isnan(constant.within)
    by_size = interval(losses, -ipc, ipc)
    assert by_size.rho < 1 and math.isnan(by_size.partial)
    assert by_size.reason == "the order of the errors follows from IPC alone"
    few = interval([1, 2, 3, 4], [1, 2, 3, 4], [10, 10, 50, 50])
    assert math.isnan(few.within) and few.per_ipc[10][1] == 2


def test_dcs_refuses():
    with pytest.raises(ValueError, match="3 subsets are too few"):
        interval([1, 2, 3], [1, 2, 3], [1, 1, 1])
    with pytest.raises(ValueError, match=r"errors\[2\]=nan"):
        interval([1, 2, 3, 4], [1, 2, math.nan, 4], [1, 1, 1, 1])
    with pytest.raises(ValueError, match="one number a subset"):
        interval([1, 2, 3, 4], [1, 2, 3], [1, 1, 1, 1])


def test_very_poor_subsets_are_found_at_their_own_size():
    accuracies, ipc = [0.10, 0.07, 0.0699, 0.5, 0.36, 0.2], [10, 10, 10, 50, 50, 50]
    assert analyses.very_poor(accuracies, ipc).tolist() == [False, False, True, False, False, True]
    assert analyses.very_poor(100 * np.array(accuracies), ipc).tolist() == [False, False, True, False, False, True]
    assert analyses.very_poor(accuracies, ipc, share=0.8).sum() == 0
    with pytest.raises(ValueError, match="share=30"):
        analyses.very_poor(accuracies, ipc, share=30)


# ---------------------------------------------------------------- the scaling law

EPOCHS = scaling.fitted_epochs(40)


def plain_product(n, k, b, tau):
    """Eqs 7 and 8, factor by factor."""
    value = n**b
    for j in range(2, k + 1):
        value *= (j * n / ((j - 1) * n)) ** (b * 0.5 ** ((j - 1) / tau))
    return value


def curve(b, tau, a=60.0, d=20.0, n=1000, noise=0.0, seed=0):
    errors = np.array([a * plain_product(n, k, b, tau) + d for k in EPOCHS])
    return errors + noise * normal(len(EPOCHS), seed=seed).double().numpy()


def test_the_printed_values_are_points_of_the_grid():
    b, tau = scaling.GRIDS["paper"]
    assert tau[[4, 9, 2]].round(4).tolist() == [2.8947, 5.2632, 1.9474]
    assert b[[162, 168, 189]].round(4).tolist() == [-0.1859, -0.1558, -0.0503]
    assert len(b) == 199 and b.max() < 0
    fine_b, fine_tau = scaling.GRIDS["fine"]
    assert len(fine_b) == 399 and len(fine_tau) == 100 and fine_tau.max() == 50


def test_the_law_against_its_product():
    found = law_product(500, EPOCHS, np.array([-0.3, -0.05]), np.array([1.0, 4.0, 9.0]))
    want = [[[plain_product(500, k, b, tau) for k in EPOCHS] for tau in (1.0, 4.0, 9.0)] for b in (-0.3, -0.05)]
    np.testing.assert_allclose(found, want, rtol=1e-12)
    assert [e for e in EPOCHS if e > 8] == [9, 10, 15, 20, 25, 30, 35, 40]


@pytest.mark.parametrize(("i", "j"), [(162, 9), (168, 2), (189, 4), (50, 0)])
@pytest.mark.parametrize("d", [None, 20.0])
def test_the_fit_recovers_the_law(i, j, d):
    b, tau = (axis[index] for axis, index in zip(scaling.GRIDS["paper"], (i, j), strict=True))
    errors = curve(b, tau)
    law = fit_scaling_law(1000, errors, EPOCHS, d=d)
    assert (law.b, law.tau) == (b, tau)
    assert (law.a, law.d) == pytest.approx((60, 20), rel=1e-6) and law.r2 == pytest.approx(1)
    assert law.delta == pytest.approx(0.5 ** (1 / tau))
    np.testing.assert_allclose(law.curve, errors, rtol=1e-9)


def test_the_fit_of_a_noisy_curve_and_its_ranges():
    errors = curve(-0.2, 5.0, noise=0.3)
    half, wide = (fit_scaling_law(1000, errors, EPOCHS, "fine", likelihood=share) for share in (0.5, 0.147))
    assert wide.b_range[0] <= half.b_range[0] <= half.b <= half.b_range[1] <= wide.b_range[1]
    assert wide.tau_range[0] <= half.tau_range[0] <= half.tau <= half.tau_range[1] <= wide.tau_range[1]
    assert wide.b_range[0] < -0.2 < wide.b_range[1] and half.r2 > 0.9
    known = fit_scaling_law(1000, errors, EPOCHS, "fine", d=20.0)
    assert known.d == 20 and np.ptp(known.b_range) < np.ptp(half.b_range)  # d known: b is better determined


def test_the_half_likelihood_region_against_a_loop_over_the_grid():
    errors = curve(-0.2, 5.0, noise=0.5)
    law = fit_scaling_law(1000, errors, EPOCHS)
    sse = {}
    for b in scaling.GRIDS["paper"][0]:
        for tau in scaling.GRIDS["paper"][1]:
            product = law_product(1000, EPOCHS, [b], [tau])[0, 0]
            sse[b, tau] = nnls(np.stack([product, np.ones_like(product)], 1), errors)[1] ** 2
    best = min(sse, key=sse.get)
    likely = [key for key, value in sse.items() if (value / sse[best]) ** (-len(errors) / 2) >= 0.5]
    assert (law.b, law.tau) == best and law.residual == pytest.approx(sse[best])
    assert law.b_range == (min(b for b, _ in likely), max(b for b, _ in likely))
    assert law.tau_range == (min(t for _, t in likely), max(t for _, t in likely))


@pytest.mark.parametrize("kind", ["inside", "rising", "steep", "flat"])
def test_least_squares_that_are_not_negative(kind):
    """Against scipy, also where the free solution has a negative a or d."""
    product = law_product(50, EPOCHS, np.linspace(-0.9, -0.05, 5), np.array([1.0, 6.0]))
    product = product / product[..., :1]
    ends = {"inside": (30, 20), "rising": (20, 30), "steep": (30, 0.01), "flat": (20, 20)}[kind]
    y = np.linspace(*ends, len(EPOCHS))
    a, d, sse = scaling._least_squares(product, y, None)
    for place in np.ndindex(a.shape):
        want, length = nnls(np.stack([product[place], np.ones(len(y))], 1), y)
        assert (a[place], d[place]) == pytest.approx(tuple(want), abs=1e-6)
        assert sse[place] == pytest.approx(length**2, abs=1e-9)
    if kind == "rising":
        assert not a.any()
    if kind == "steep":
        assert not d.all()


def test_shared_b():
    same = [(1000, curve(-0.186, 5.2, noise=0.05, seed=s), EPOCHS) for s in (1, 2)]
    other = [same[0], (1000, curve(-0.5, 5.2, noise=0.05, seed=2), EPOCHS)]
    one, two = (shared_b_test(curves, d=20.0) for curves in (same, other))
    assert one.p > 0.05 and two.p < 1e-6 and one.freedom == (1, 2 * len(EPOCHS) - 6)
    assert min(one.own) <= one.b <= max(one.own) and two.own[1] < -0.4

    fits = [fit_scaling_law(*c, d=20.0) for c in other]
    assert two.own == tuple(law.b for law in fits)
    shared = []
    for b in scaling.GRIDS["paper"][0]:
        products = law_product(1000, EPOCHS, [b], scaling.GRIDS["paper"][1])[0]
        shared.append(sum(scaling._least_squares(products, y, 20.0)[2].min() for _, y, _ in other))
    own = sum(law.residual for law in fits)
    assert two.statistic == pytest.approx((min(shared) - own) / (own / two.freedom[1]))


def test_the_fit_refuses():
    errors = curve(-0.2, 5.0)
    for given, message in [
        ((1000, errors[:4], EPOCHS[:4]), "at least 5"),
        ((0, errors, EPOCHS), "n=0"),
        ((1000, errors, EPOCHS[::-1]), "each greater"),
        ((1000, errors, [e / 2 for e in EPOCHS]), "whole numbers"),
        ((1000, -errors, EPOCHS), "not negative"),
        ((1000, errors, EPOCHS, "coarse"), "allowed: paper, fine"),
        ((1000, errors, EPOCHS, "paper", -1.0), "d=-1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit_scaling_law(*given)
    with pytest.raises(ValueError, match="the least is 2"):
        shared_b_test([(1000, errors, EPOCHS)])


# ---------------------------------------------------------------- compute and scores


def test_epochs_of_equal_compute():
    assert scaling.epochs_for(2, 50_000, 500) == 200 and scaling.epochs_for(50, 50_000, 50_000) == 50
    assert scaling.epochs_for(0.1, 50_000, 50_000) == 1
    with pytest.raises(ValueError, match="n=60000"):
        scaling.epochs_for(2, 50_000, 60_000)


def test_epochs_to_reach_a_share_of_the_gain():
    curve = {50: 0.2, 100: 0.3, 200: 0.4, 400: 0.5}  # a line in log epochs
    assert scaling.epochs_to_reach(curve, 0.9) == pytest.approx(200 * math.sqrt(2))
    assert scaling.epochs_to_reach(curve, 0.75, chance=0.1) == pytest.approx(200)
    assert scaling.epochs_to_reach(curve, 1.0) == 400 and scaling.epochs_to_reach(curve, 0.1) == 50
    assert scaling.epochs_to_reach({50: 0.4, 100: 0.401}) == 50
    assert scaling.epochs_to_reach(dict(reversed(curve.items())), 0.9) == pytest.approx(200 * math.sqrt(2))
    assert math.isnan(scaling.epochs_to_reach({50: 0.2, 100: 0.1}, chance=0.1))
    with pytest.raises(ValueError, match="share=95"):
        scaling.epochs_to_reach(curve, 95)


def test_scores_in_closed_form():
    assert scaling.hard_label_recovery(0.85, 0.45).value == pytest.approx(0.4)
    assert scaling.improvement_over_random([0.5, 0.7], 0.5).value == pytest.approx(0.1)
    scale = lambda s: (math.exp(s) - math.exp(-1)) / (math.e - math.exp(-1))  # noqa: E731
    assert scaling.label_robust_score(0.6, 0.5, 0.85, 0.45).value == pytest.approx(scale(0.5 * 0.1 - 0.5 * 0.4))
    assert scaling.label_robust_score(0.6, 0.5, 0.85, 0.45, 0.2).value == pytest.approx(scale(0.2 * 0.1 - 0.8 * 0.4))
    plain = scaling.augmentation_robust_score(0.6, 0.5, 0.5, 0.3, 0.3)
    assert plain.value == pytest.approx(scale(0.3 * 0.1 + 0.7 * 0.2))
    assert scaling.label_robust_score(1, 0, 0, 1).value == pytest.approx(1)
    assert scaling.label_robust_score(0, 1, 1, 0).value == pytest.approx(0)
    assert scaling.augmentation_robust_score(0.5, 0.5, 0.3, 0.3).value == pytest.approx(scale(0))


def test_the_spread_of_a_score_over_seeds():
    """Against scores of single seeds, every one with every other, moved out to their sample deviation."""
    own, random = 0.6 + 0.01 * np.array([-1, 0, 1]), 0.5 + 0.02 * np.array([-1, 0, 1])
    full, hard = np.array([0.85, 0.86]), 0.45 + 0.01 * np.array([-1, 1])
    wide = [x.mean() + (x - x.mean()) * (len(x) / (len(x) - 1)) ** 0.5 for x in (own, random, full, hard)]
    every = [scaling.label_robust_score(*seeds).value for seeds in product(*wide)]
    found = scaling.label_robust_score(own, random, full, hard)
    assert found.std == pytest.approx(np.std(every), rel=1e-2) and found.value == pytest.approx(
        np.mean(every), rel=1e-3
    )
    assert scaling.label_robust_score(0.6, 0.5, 0.85, 0.45).std == 0


def test_scores_refuse():
    with pytest.raises(ValueError, match=r"85.0 is not allowed; needs fractions"):
        scaling.hard_label_recovery(85.0, 0.4)
    with pytest.raises(ValueError, match="weight=2"):
        scaling.label_robust_score(0.6, 0.5, 0.85, 0.45, 2)
