"""Coresets: greedy selectors against brute force, gradient algebra against autograd, windows against loops, resume."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import nn

from benchmarks import cases_coresets, plain_coresets
from common import script_selection
from common.augment import rng
from methods import coresets
from methods.coresets import METHODS, Bank, Config, CropFlip, State
from tests.copied_file import said_alone


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def gradients(n=12, classes=5, width=4, seed=0):
    """Errors p - y of images of class 1, and features."""
    error = normal(n, classes, seed=seed).softmax(1)
    error[:, 1] -= 1
    return error, normal(n, width, seed=seed + 1)


def explicit(error, features):
    """g = e [1, h]^T, flattened: [n, K (1 + D)]."""
    return (error[:, :, None] * F.pad(features, (1, 0), value=1.0)[:, None]).flatten(1)


def greedy(value, n, count):
    """Brute force: the image whose addition raises value(list) most, `count` times."""
    chosen = []
    for _ in range(count):
        rest = [x for x in range(n) if x not in chosen]
        chosen.append(max(rest, key=lambda x: value([*chosen, x])))  # the first of equals
    return chosen


def a_bank(n=60, classes=3, epochs=12, width=6, seed=0, labels=None):
    labels = torch.arange(n) % classes if labels is None else labels
    rand = lambda *shape: torch.rand(*shape, generator=g)  # noqa: E731
    g, n = rng(seed, "bank"), len(labels)
    p = rand(n, classes).softmax(1)
    return Bank(
        labels, p_true=rand(epochs, n), p_true_train=rand(epochs, n), el2n=rand(epochs, n),
        correct=rand(epochs, n) > 0.5, margin=rand(epochs, n).half(), entropy=rand(epochs, n).half(),
        conf=rand(epochs, n).half(), logit=rand(epochs, n).half(), h_norm=rand(epochs, n).half(),
        forget_train=(rand(n) * 5).short() - 1, h_final=(rand(n, width) - 0.5).half(),
        err_final=p - F.one_hot(labels, classes),
    )  # fmt: skip


SMALL = {"epoch": 3, "window": 4, "dual_epochs": 8, "starts": 2}


def choose(bank, method, ipc=3, seed=0, **options):
    config = Config(method=method, ipc=ipc, **(SMALL | options))
    accuracy = (lambda chosen, held: float(len(chosen))) if method == "el2n_best" else None
    return coresets.select(bank, bank.labels, config, generator=rng(seed), accuracy=accuracy)


# ---------------------------------------------------------------- gradients of the last layer


def test_the_factorised_gram_is_that_of_the_gradients_of_autograd():
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5)).double()
    x, y = normal(9, 6), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3])
    rows = []
    for i in range(9):
        loss = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        weight, bias = torch.autograd.grad(loss, (net[2].weight, net[2].bias))
        rows.append(torch.cat([weight.flatten(), bias]))
    g = torch.stack(rows)
    h = net[:2](x).detach()
    e = net(x).detach().softmax(1) - F.one_hot(y, 5)
    close = dict(atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(coresets.gradient_gram(e, h), g @ g.T, **close)
    torch.testing.assert_close(coresets.gradient_gram(e, h, unit=True), F.normalize(g) @ F.normalize(g).T, **close)
    distance = (g[:, None] - g).norm(dim=2)
    torch.testing.assert_close(coresets.gradient_distance(e, h), distance, atol=1e-7, rtol=0)
    torch.testing.assert_close(coresets.gains(e, h, e), g @ g.mean(0), **close)


@pytest.mark.parametrize("n", [1, 5, 12])
def test_the_gram_in_blocks(n):
    x = normal(n, 4)
    torch.testing.assert_close(coresets._gram(x, block=5), x @ x.T)


def test_an_image_without_gradient_is_similar_to_none():
    error, features = gradients()
    error[4] = 0
    s = coresets.similarity(error, features)
    assert not s[4].any() and not s[:, 4].any() and s[0, 0] == pytest.approx(1) and s.isfinite().all()
    assert coresets.graphcut(error, features, 12).sort().values.tolist() == list(range(12))


# ---------------------------------------------------------------- greedy selectors against brute force


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [3, 12])
def test_facility_location_takes_the_largest_gain_each_time(seed, count):
    error, features = gradients(seed=10 * seed)
    s = 0.5 + 0.5 * (g := F.normalize(explicit(error, features))) @ g.T
    wanted = greedy(lambda chosen: float(s[chosen].amax(0).sum()), 12, count)
    ours = coresets.facility_location(coresets.similarity(error, features), count).tolist()
    assert ours[:3] == wanted[:3] and sorted(ours) == sorted(wanted)


@pytest.mark.parametrize("seed", range(4))
def test_graphcut_takes_the_largest_gain_each_time(seed):
    error, features = gradients(seed=10 * seed)
    s = 0.5 + 0.5 * (g := F.normalize(explicit(error, features))) @ g.T

    def value(chosen):  # each image's similarity to itself stands in every gain alike and is left out
        inside = s[chosen][:, chosen]
        return float(s[chosen].sum() - inside.sum() + inside.diagonal().sum())

    assert coresets.graphcut(error, features, 5).tolist() == greedy(value, 12, 5)


@pytest.mark.parametrize("seed", range(4))
def test_craig_covers_distances_and_weighs_by_members(seed):
    error, features = gradients(seed=10 * seed)
    d = (explicit(error, features)[:, None] - explicit(error, features)).norm(dim=2)
    s = d.max() - d + 1e-3
    wanted = greedy(lambda chosen: float(s[chosen].amax(0).sum()), 12, 3)
    chosen, weights = coresets.craig(error, features, 3)
    assert chosen.tolist() == wanted
    assert weights.tolist() == [sum(int(d[i, wanted].argmin()) == m for i in range(12)) for m in range(3)]
    assert coresets.craig(error, features, 3, extra=1)[1].tolist() == (weights + 1).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_kcenter_takes_the_farthest_each_time(seed):
    x = normal(12, 3, seed=seed)
    chosen = [2]
    for _ in range(2):
        rest = [i for i in range(12) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(float((x[i] - x[c]).norm()) for c in chosen)))
    assert coresets.kcenter(x, 3, 2).tolist() == chosen
    sums = (x[:, None] - x).square().sum(2).sum(1)
    assert coresets.medoid(x) == int(sums.argmin())


@pytest.mark.parametrize("seed", range(4))
def test_the_plain_forms_choose_the_same(seed):
    """Of few enough: two images that only they cover better have one and the same gain."""
    error, features = gradients(n=40, width=6, seed=seed)
    chosen = coresets.facility_location(coresets.similarity(error, features), 5)
    assert chosen.tolist() == plain_coresets.facility_location(error, features, 5)
    assert coresets.kcenter(features, 9, seed).tolist() == plain_coresets.kcenter(features, 9, seed)


@pytest.mark.parametrize("name", [*cases_coresets.CASES])
def test_the_benchmark_runs(name, monkeypatch):
    """Small, and every form of it twice."""
    for size, value in {"IPC": 3, "COUNT": 30, "WIDTH": 5}.items():
        monkeypatch.setattr(cases_coresets, size, value)
    monkeypatch.setattr(cases_coresets, "bank", cases_coresets.bank.__wrapped__)
    case = cases_coresets.CASES[name]
    for loop in filter(None, (case.plain, *(form.loop for form in case.forms.values()))):
        answers = []

        def answer(answers=answers):
            answers.append(1)
            if len(answers) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            loop(answer, torch.device("cpu"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("farthest", [False, True])
def test_herding_follows_the_mean(seed, farthest):
    x = normal(12, 3, seed=seed)

    def value(chosen):
        away = float((len(chosen) * x.mean(0) - x[chosen].sum(0)).norm())
        return away if farthest else -away

    assert coresets.herding(x, 4, farthest).tolist() == greedy(value, 12, 4)


def test_glister_with_update_steps_the_logits():
    """Against a linear layer that is really stepped down the gradient of each choice."""
    features, weight, bias = normal(12, 4, seed=1), normal(5, 4, seed=2), normal(5, seed=3)
    y = torch.full((12,), 1)
    p = (features @ weight.T + bias).softmax(1)
    error = p - F.one_hot(y, 5)
    g, chosen, lr = explicit(error, features), [], 0.3
    for _ in range(4):
        now = (features @ weight.T + bias).softmax(1) - F.one_hot(y, 5)
        gain = g @ explicit(now, features).mean(0)
        gain[chosen] = -math.inf
        chosen.append(x := int(gain.argmax()))
        bias, weight = bias - lr * error[x], weight - lr * error[x][:, None] * features[x]
    assert coresets.glister(error, features, p, 4, lr).tolist() == chosen
    static = coresets.gains(error, features, error).argsort(descending=True)[:4].tolist()
    assert static != chosen  # the update matters here


def test_glister_with_update_ranks_where_every_probability_rounds_to_1():
    """Features of the size of a ConvNet's: after a few steps p_y is 1 to the last bit, and the others still differ."""
    features, lr = 27 * F.normalize(normal(120, 64, seed=1).abs(), dim=1), 0.1  # as ReLU leaves them
    p = normal(120, 10, seed=2).softmax(1)
    target = F.one_hot(torch.full((120,), 1), 10).double()
    error, g, z, chosen = p - target, explicit(p - target, features), p.log(), []
    for _ in range(30):
        others = (z - z[:, 1:2]).exp() * (1 - target)  # odds against the class, which p_y does not enter
        now = (others - target * others.sum(1, keepdim=True)) / (1 + others.sum(1, keepdim=True))
        gain = g @ explicit(now, features).mean(0)
        gain[chosen] = -math.inf
        chosen.append(x := int(gain.argmax()))
        z = z - lr * (1 + features @ features[x])[:, None] * error[x]
    assert bool(((z.softmax(1)[:, 1]) == 1).all())
    assert coresets.glister(error, features, p, 30, lr).tolist() == chosen
    single = coresets.glister(error.float(), features.float(), p.float(), 30, lr).tolist()
    assert len({*single} & {*chosen}) >= 25


def test_cal_is_the_mean_divergence_to_the_neighbours():
    features, p = normal(12, 3), normal(12, 4, seed=1).softmax(1)
    p[3] = torch.tensor([1.0, 0, 0, 0])
    safe = p.clamp(min=1e-12)
    kl = lambda a, b: float((a * (a / b).log()).sum())  # noqa: E731
    for i, found in enumerate(coresets.cal(features, p, 4).tolist()):
        near = sorted((j for j in range(12) if j != i), key=lambda j: float((features[i] - features[j]).norm()))[:4]
        wanted = sum(0.5 * kl(safe[i], safe[j]) + 0.5 * kl(safe[j], safe[i]) for j in near) / 4
        assert found == pytest.approx(wanted, rel=1e-9)
        one_sided = float(coresets.cal(features, p, 4, one_sided=True)[i])
        assert one_sided == pytest.approx(sum(kl(safe[j], safe[i]) for j in near) / 4, rel=1e-9)


# ---------------------------------------------------------------- k-means


def blobs(n=300, k=6, width=5):
    return (8 * normal(k, width, seed=5)).repeat_interleave(n // k, 0) + normal(n, width, seed=6)


@pytest.mark.parametrize("sketch", [0, 3])
def test_kmeans_is_as_good_as_sklearn(sketch):
    x = blobs()
    centres = coresets.kmeans(x, 6, starts=10, sketch=sketch, generator=rng(0))
    inertia = float(torch.cdist(x, centres).square().amin(1).sum())
    assert inertia <= 1.0001 * KMeans(6, n_init=10, random_state=0).fit(x.numpy()).inertia_


def test_lloyd_reaches_a_fixed_point_and_says_its_cost():
    x = normal(200, 4)
    centres, of, cost = coresets.lloyd(x, coresets.plus_plus(x, 7, rng(1)))
    distance = torch.cdist(x, centres).square()
    assert torch.equal(distance.argmin(1), of)
    assert float(cost) == pytest.approx(float(distance.amin(1).sum()))
    for k in range(7):
        torch.testing.assert_close(centres[k], x[of == k].mean(0))


def test_plus_plus_draws_by_squared_distance():
    x = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    seconds = [0, 0, 0]
    for seed in range(1500):
        first, second = coresets.plus_plus(x, 2, rng(seed)).flatten().tolist()
        if first == 0:
            seconds[(0.0, 1.0, 3.0).index(second)] += 1
    assert seconds[0] == 0
    assert seconds[2] / sum(seconds) == pytest.approx(0.9, abs=0.05)  # 9 / (1 + 9)


def test_every_centre_takes_an_image_of_its_own():
    x = torch.tensor([[0.0], [0.1], [5.0], [9.0]])
    assert coresets.nearest_images(x, torch.tensor([[0.0], [0.02], [9.0]])).tolist() == [0, 2 + 1, 1]
    same = torch.zeros(5, 2)
    found = coresets.nearest_images(same, coresets.kmeans(same, 5, 2, 0, rng(0)))
    assert sorted(found.tolist()) == list(range(5))


# ---------------------------------------------------------------- scores


def test_dyn_unc_and_dual_against_a_loop():
    p = torch.rand(9, 5, generator=rng(1))
    p[:, 0], p[:, 1] = 0.3, 1.0 - 1e-7 * torch.arange(9)  # no change, and one that float32 sums would lose
    for n in range(5):
        column = p[:, n].double()
        pieces = [column[k : k + 4] for k in range(6)]
        wanted = sum(float(piece.std()) for piece in pieces) / 6
        assert float(coresets.dyn_unc(p, 4)[n]) == pytest.approx(wanted, rel=1e-5, abs=1e-8)
        wanted = sum(float(piece.std() * (1 - piece.mean())) for piece in pieces) / 6
        assert float(coresets.dual(p, 4)[n]) == pytest.approx(wanted, rel=1e-5, abs=1e-8)


def test_dual_reads_the_first_epochs_of_training_only():
    bank = a_bank()
    config = Config(method="dual", **SMALL)
    wanted = coresets.dual(bank.p_true_train[:8], 4)
    assert torch.equal(coresets.image_score(bank, config, []), wanted)


def test_forgetting_counts_falls_and_marks_what_was_never_right():
    seen = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 1, 0]], dtype=torch.bool)
    assert coresets.forgotten(seen).tolist() == [2, 2, 0, -1]
    bank = Bank(torch.zeros(4, dtype=torch.long), correct=seen, forget_train=torch.tensor([2, 3, 0, -1]).short())
    order = lambda **o: choose(bank, ipc=4, **o)["indices"].tolist()  # noqa: E731
    assert order(method="forgetting") == [3, 1, 0, 2]
    assert order(method="forgetting_easy") == [2, 0, 1, 3]
    assert order(method="forgetting", never="zero") == [1, 0, 2, 3]  # equal counts: the lower number
    assert order(method="forgetting_easy", never="zero") == [2, 3, 0, 1]
    assert order(method="forgetting", forgetting="clean") == [3, 0, 1, 2]


@pytest.mark.parametrize(
    ("method", "options", "score", "largest"),
    [
        ("el2n", {}, lambda b: b.el2n[2], True),
        ("el2n_easy", {}, lambda b: b.el2n[2], False),
        ("grand", {}, lambda b: b.el2n[2] * (1 + b.h_norm[2].float() ** 2).sqrt(), True),
        ("least_confidence", {}, lambda b: b.conf[2], False),
        ("least_confidence", {"lc_logit": True}, lambda b: b.logit[2], False),
        ("entropy", {}, lambda b: b.entropy[2], True),
        ("margin", {}, lambda b: b.margin[2], False),
    ],
)
def test_scores_of_an_epoch_keep_the_right_end(method, options, score, largest):
    bank = a_bank()
    found, wanted = choose(bank, method, ipc=4, **options), score(bank).float()
    torch.testing.assert_close(found["scores"], wanted)
    for k in range(3):
        own = (bank.labels == k).nonzero().flatten()
        best = own[wanted[own].argsort(descending=largest, stable=True)[:4]]
        assert found["indices"][4 * k : 4 * k + 4].tolist() == best.tolist()


def test_cal_keeps_the_smallest_or_the_largest():
    """By the symmetric divergence, and by that of the neighbours from the image."""
    bank = a_bank()
    small, large = choose(bank, "cal", ipc=20), choose(bank, "cal", ipc=20, cal="largest")
    assert small["scores"][small["indices"][:20]].diff().min() >= 0
    assert large["scores"][large["indices"][:20]].diff().max() <= 0
    assert not torch.allclose(small["scores"], large["scores"])


def test_an_image_alone_in_its_class_has_no_neighbour_to_differ_from():
    bank = a_bank(labels=torch.tensor([0] * 9 + [1]), classes=2)
    found = choose(bank, "cal", ipc=1)
    assert found["indices"][1] == 9 and found["scores"][9] == 0 and found["scores"].isfinite().all()


def test_beta_moves_the_window_along_the_order():
    bank = a_bank()
    order = choose(bank, "el2n", ipc=20)["indices"][:20]
    for beta in (0.0, 0.3, 0.5, 1.0):
        start = math.floor(beta * (20 - 6) + 1e-9)
        assert choose(bank, "el2n", ipc=6, beta=beta)["indices"][:6].tolist() == order[start : start + 6].tolist()
    easy = choose(bank, "el2n_easy", ipc=6)["indices"][:6]
    assert choose(bank, "el2n", ipc=6, beta=1.0)["indices"][:6].tolist() == easy.flip(0).tolist()


def test_scores_of_several_banks_are_averaged():
    banks = [a_bank(seed=s) for s in range(3)]
    found = coresets.select(banks, banks[0].labels, Config(method="el2n", ipc=3, **SMALL), generator=rng(0))
    torch.testing.assert_close(found["scores"], torch.stack([b.el2n[2] for b in banks]).mean(0))


def test_without_balance_the_best_of_all_are_kept():
    bank = a_bank()
    found = choose(bank, "el2n", balanced=False)
    assert set(found["indices"].tolist()) == set(bank.el2n[2].argsort(descending=True)[:9].tolist())
    assert found["labels"].diff().min() >= 0
    assert len(set(choose(bank, "random", balanced=False)["indices"].tolist())) == 9


def test_beta_sampling_draws_by_score_times_density():
    """Shares of single draws against the probabilities of the formula."""
    score = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    mean, rows = torch.tensor([0.2, 0.5, 0.8, 0.6], dtype=torch.float64), torch.arange(4)
    b = 15 * (1 - mean.mean()) * (1 - 0.75**4)
    weight = torch.distributions.Beta(16 - b, b).log_prob(mean).exp() * score
    counts = torch.zeros(4)
    generator = rng(0)
    for _ in range(2000):
        counts[coresets.beta_sample(score, mean, rows, 1, 4.0, generator)] += 1
    torch.testing.assert_close(counts / 2000, (weight / weight.sum()).float(), atol=0.04, rtol=0)


def test_the_best_window_is_found_on_images_that_no_candidate_holds():
    bank, seen = a_bank(n=90), []

    def accuracy(chosen, held):
        seen.append((chosen, held))
        return [1, 5, 9, 9, 2, 0, 0, 0, 0, 0][len(seen) - 1]

    config = Config(method="el2n_best", ipc=4, **SMALL)
    found = coresets.select(bank, bank.labels, config, generator=rng(0), accuracy=accuracy)
    assert len(seen) == 10 and found["accuracies"].tolist() == [1, 5, 9, 9, 2, 0, 0, 0, 0, 0]
    for chosen, held in seen:
        assert torch.equal(held, seen[0][1]) and not set(held.tolist()) & set(chosen.tolist())
        assert bank.labels[held].bincount().tolist() == [3, 3, 3] and len(chosen) == 12
    wanted = choose(bank, "el2n", ipc=4, beta=0.2)  # the first of equals, in all images
    assert torch.equal(found["indices"], wanted["indices"])
    with pytest.raises(ValueError, match=r"windows at beta=\[0\.1\] is not a finite number"):
        answers = iter([1, math.nan, 9, 9, 2, 0, 0, 0, 0, 0])
        coresets.select(bank, bank.labels, config, generator=rng(0), accuracy=lambda *_: next(answers))


# ---------------------------------------------------------------- what holds for every selector


@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.integers(3, 14), min_size=2, max_size=4), ipc=st.integers(1, 3), seed=st.integers(0, 99),
    same=st.booleans(),
)  # fmt: skip
def test_every_class_gives_its_share_and_no_image_twice(counts, ipc, seed, same):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=rng(seed))]
    bank = a_bank(labels=labels, classes=len(counts), seed=seed)
    if same:  # equal images everywhere
        bank = Bank.restore({k: t if k == "labels" else torch.zeros_like(t) for k, t in bank.tensors().items()})
    for method, update in itertools.product(METHODS, ("static", "update")):
        found = choose(bank, method, ipc=ipc, seed=seed, glister=update)
        assert found["labels"].tolist() == [k for k in range(len(counts)) for _ in range(ipc)]
        assert torch.equal(labels[found["indices"]], found["labels"])
        assert len(set(found["indices"].tolist())) == ipc * len(counts)
        assert ("weights" in found) == (method == "craig")


@pytest.mark.parametrize("method", METHODS)
def test_two_seeded_selections_are_equal(method):
    bank = a_bank()
    first, second = choose(bank, method), choose(bank, method)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("method", ["el2n", "el2n_easy", "margin", "dyn_unc", "dual", "grand", "forgetting"])
def test_equal_scores_keep_the_order_of_the_images(method):
    bank = a_bank()
    bank = Bank.restore({k: t if k == "labels" else torch.ones_like(t) for k, t in bank.tensors().items()})
    assert choose(bank, method)["indices"].tolist() == [0, 3, 6, 1, 4, 7, 2, 5, 8]


@pytest.mark.parametrize("method", ["kcenter", "facility_location", "graphcut", "herding"])
def test_of_equal_images_the_first_is_taken(method):
    bank = a_bank(n=12, classes=1)
    twice = Bank(
        torch.zeros(24, dtype=torch.long), h_final=bank.h_final.repeat(2, 1),
        err_final=torch.rand(12, 2, generator=rng(1)).repeat(2, 1),
    )  # fmt: skip
    ipc = 5 if method in ("kcenter", "facility_location") else 1  # the other two may take an image and its copy
    assert choose(twice, method, ipc=ipc, first="medoid")["indices"].max() < 12


def test_a_small_class_is_kept_whole_with_a_warning():
    bank = a_bank(labels=torch.tensor([0] * 9 + [1] * 2 + [2] * 9))
    for method in METHODS:
        with pytest.warns(UserWarning, match=r"ipc=4: classes \[1\] have fewer images"):
            found = choose(bank, method, ipc=4)
        assert found["labels"].bincount().tolist() == [4, 2, 4]
        assert found["indices"][4:6].sort().values.tolist() == [9, 10]


def test_features_alone_are_enough_for_geometry():
    features, labels = normal(30, 4).float(), torch.arange(30) % 3
    for method in ("kcenter", "kmeans", "herding"):
        found = coresets.select(features, labels, Config(method=method, ipc=2), generator=rng(0))
        assert found["labels"].tolist() == [0, 0, 1, 1, 2, 2]


# ---------------------------------------------------------------- the scoring run


class Net(nn.Module):
    def __init__(self, generator, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            self.body = nn.Sequential(
                nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout)
            )  # fmt: skip
            self.last = nn.Linear(6 * 16, 3)

    def forward(self, x):
        return self.last(self.body(x))


def pixels(n=40):
    labels = torch.arange(n) % 3
    images = torch.randint(0, 100, (n, 3, 6, 6), generator=rng("pixels")) + 70 * labels[:, None, None, None]
    return images.clamp(max=255).byte(), labels


RUN = Config(method="el2n", ipc=2, epochs=4, batch=16, lr=0.05, epoch=2, window=2, dual_epochs=3, milestones=(2,))


def run(config=RUN, data=None, **changes):
    given = {"make_network": Net, "prepare": lambda x: x.float() / 128 - 1, "augment": CropFlip(1), "generator": rng(7)}
    return coresets.score(*(data or pixels()), config, **(given | changes))


def test_the_bank_holds_what_a_plain_run_shows():
    """A loop of its own over torch.optim, same draws; looked at with formulas of its own."""
    images, labels = pixels()
    bank = run()
    generator = rng(7)
    net, events = Net(generator), torch.zeros(40)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    augment, before = CropFlip(1), torch.zeros(40, dtype=torch.bool)
    for epoch in range(4):
        if epoch == 2:
            optimizer.param_groups[0]["lr"] *= 0.2
        net.train()
        order = torch.randperm(40, generator=generator)
        torch.randint(2**62, (), generator=generator)
        for rows in order.split(16):
            x = images[rows].float() / 128 - 1
            logits = net(augment(x, augment.draw(len(rows), generator, siamese=False)))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[rows]).backward()
            optimizer.step()
            p = logits.softmax(1)[torch.arange(len(rows)), labels[rows]]
            torch.testing.assert_close(bank.p_true_train[epoch, rows], p.detach(), atol=1e-5, rtol=1e-4)
            now = logits.argmax(1) == labels[rows]
            events[rows] += (before[rows] & ~now).float()
            before[rows] = now
        net.eval()
        with torch.no_grad():
            h = net.body(images.float() / 128 - 1)
            z = net.last(h)
            p, y = z.softmax(1), F.one_hot(labels, 3)
        near = lambda a, b: torch.testing.assert_close(a.float(), b, atol=2e-3, rtol=2e-3)  # noqa: E731
        near(bank.p_true[epoch], (p * y).sum(1))
        near(bank.el2n[epoch], ((p - y) ** 2).sum(1).sqrt())
        near(bank.conf[epoch], p.amax(1))
        near(bank.logit[epoch], z.amax(1))
        near(bank.entropy[epoch], -(p * p.log()).sum(1))
        near(bank.margin[epoch], p.sort(1).values[:, -1] - p.sort(1).values[:, -2])
        near(bank.h_norm[epoch], h.norm(dim=1))
        assert torch.equal(bank.correct[epoch], p.argmax(1) == labels)
    near(bank.h_final, h)
    near(bank.err_final, p - y)
    assert torch.equal(bank.forget_train.clamp(min=0).float(), events)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_killed_run_continues_bit_for_bit(dropout):
    saved, make = [], lambda g: Net(g, dropout)
    state = torch.get_rng_state()
    whole = run(make_network=make, on_step=lambda s: saved.append(s.tensors()))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is untouched
    torch.manual_seed(5)
    again = run(make_network=make)
    for after in (0, 1, 3):
        resumed = run(make_network=make, generator=rng(99), state=State.restore(saved[after]))
        for name, wanted in whole.tensors().items():
            assert torch.equal(wanted, again.tensors()[name]), name
            assert torch.equal(wanted, resumed.tensors()[name]), (after, name)


def test_a_stopped_run_is_the_beginning_of_the_long_one():
    long, short = run(), run(replace(RUN, stop=2))
    assert torch.equal(long.el2n[:2], short.el2n) and len(short.p_true) == 2


def test_learning_rates():
    rates = lambda **o: [coresets.learning_rate(replace(RUN, lr=1.0, **o), e) for e in (0, 1, 2, 3)]  # noqa: E731
    assert rates() == pytest.approx([1, 1, 0.2, 0.2])
    assert rates(milestones=(1, 3), gamma=0.1) == pytest.approx([1, 0.1, 0.1, 0.01])
    assert rates(schedule="constant") == [1, 1, 1, 1]
    assert rates(schedule="cosine") == pytest.approx([1, 0.5 + 0.5 * math.sqrt(0.5), 0.5, 0.5 - 0.5 * math.sqrt(0.5)])


def test_crop_flip_moves_whole_images():
    x = torch.arange(2 * 25.0).view(2, 1, 5, 5)
    centre = torch.tensor([[0.5, 0.5, 0.9], [0.5, 0.5, 0.1]])  # no shift; the second one flipped
    out = CropFlip(2)(x, centre)
    assert torch.equal(out[0], x[0]) and torch.equal(out[1], x[1].flip(-1))
    corner = CropFlip(2, flip=False)(x, torch.tensor([[0.0, 0.99, 0.0]] * 2))
    assert torch.equal(corner, F.pad(x, [2] * 4, mode="reflect")[:, :, :5, 4:])


def test_distill_gathers_the_images_it_names():
    images, labels = pixels()
    for method in ("random", "kcenter", "el2n", "craig"):
        config = replace(RUN, method=method)
        found = coresets.distill(images, labels, config, make_network=Net, prepare=lambda x: x.float() / 128 - 1,
                                 generator=rng(1))  # fmt: skip
        assert found["images"].dtype == torch.uint8 and torch.equal(found["images"], images[found["indices"]])
        assert found["labels"].tolist() == [0, 0, 1, 1, 2, 2]


def test_every_published_run_is_a_config():
    for (dataset, _), method in itertools.product(coresets.RUNS, METHODS):
        row = coresets.published(dataset, method)
        assert row.pop("augment") in ("crop-flip", "crop", "dsa", "rrc-flip", "none")
        coresets.check(Config(method=method, **row), torch.arange(30) % 3)
    assert all(coresets.published(digits, "el2n")["augment"] == "crop" for digits in ("svhn", "mnist"))


@pytest.mark.parametrize(("method", "resnet"), [("el2n", 0.1), ("dual", 0.1), ("craig", 0.1), ("kmeans", 0.01)])
def test_a_convnet_scores_at_its_own_rate(method, resnet, monkeypatch):
    """In the script, whose default network is the ConvNet."""

    def parse(argv, name, shared, config, published, purpose):
        (row,) = published.values()
        raise InterruptedError(row.get("lr", config.lr))

    monkeypatch.setattr(script_selection, "parse", parse)
    for network, rate in (("", 0.01), ("convnet3-instance", 0.01), ("resnet18-mod", resnet)):
        with pytest.raises(InterruptedError, match=f"^{rate}$"):
            script_selection.run_selection(["dataset=cifar10", f"method={method}", f"network={network}"], coresets)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "el2m"}, r"method='el2m' is unknown; allowed: random, kcenter"),
        ({"ipc": 0}, r"ipc=0: allowed is 1"),
        ({"beta": 1.5}, r"beta=1.5: allowed is 0 to 1"),
        ({"milestones": (3, 0)}, r"milestones=\(3, 0\)"),
        ({"stop": 300}, r"stop=300 is past the end of the schedule, epochs=200"),
        ({"momentum": 0.0}, r"nesterov=True needs a momentum"),
        ({"method": "craig", "balanced": False}, r"balanced=False ranks scores"),
        ({"method": "el2n_best", "balanced": False}, r"balanced=False ranks scores"),
        *[({"method": name, "beta": 0.1}, f"beta=0.1 moves .* method='{name}'")
          for name in ("random", "kmeans", "craig", "dual_beta", "el2n_best")],
        ({"method": "glister", "glister": "update", "beta": 0.1}, "beta=0.1 moves"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options)


def test_a_missing_array_is_named():
    bank = Bank(torch.arange(12) % 3)
    for method in set(METHODS) - {"random"}:
        with pytest.raises(ValueError, match=rf"method='{method}' needs the array '\w+', which this bank"):
            choose(bank, method)


def test_more_images_than_any_class_has():
    with pytest.raises(ValueError, match="ipc=30: the largest class has 20 images"):
        choose(a_bank(), "random", ipc=30)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dyn_unc", {"window": 13}, "window=13 of method='dyn_unc' is longer than the run, 12 epochs"),
        ("dual", {"dual_epochs": 13}, "dual_epochs=13 of method='dual' is longer than the run, 12 epochs"),
        ("dual", {"window": 9}, "window=9 of method='dual' is longer than the run, 8 epochs"),
        ("el2n", {"epoch": 13}, "epoch=13 of method='el2n' is longer than the run, 12 epochs"),
    ],
)
def test_windows_longer_than_the_run(method, options, message):
    with pytest.raises(ValueError, match=message):
        choose(a_bank(), method, **options)
    images, labels = pixels()
    with pytest.raises(ValueError, match=message):  # before the run
        coresets.distill(images, labels, Config(method=method, epochs=12, **(SMALL | options)), make_network=None,
                         prepare=len, generator=rng(0))  # fmt: skip


def test_bad_input():
    images, labels = pixels()
    with pytest.raises(ValueError, match="40 images and 39 labels"):
        run(data=(images, labels[1:]))
    with pytest.raises(ValueError, match=r"images are torch\.uint8"):
        run(prepare=None)
    with pytest.raises(ValueError, match="class 1 has no images"):
        gap = torch.tensor([0, 0, 2])
        coresets.select(Bank(gap), gap, Config(method="random", ipc=1), generator=rng(0))
    with pytest.raises(ValueError, match="the bank is of other images"):
        coresets.select(a_bank(), torch.zeros(60, dtype=torch.long), Config(method="random"), generator=rng(0))
    with pytest.raises(ValueError, match="takes one bank, not 2"):
        coresets.select([a_bank()] * 2, a_bank().labels, Config(method="kcenter"), generator=rng(0))
    with pytest.raises(ValueError, match=r"el2n_best' needs accuracy="):
        coresets.select(a_bank(), a_bank().labels, Config(method="el2n_best", **SMALL), generator=rng(0))
    with pytest.raises(ValueError, match=r"has no nn\.Linear layer"):
        run(make_network=lambda _: nn.Conv2d(3, 3, 3))
    with pytest.raises(FloatingPointError, match=r"in epoch 1 \(lr 1e\+30\)"):
        run(replace(RUN, lr=1e30))
    bank = a_bank()
    bank.el2n[2, 5] = math.nan
    grown = a_bank()
    grown.h_norm[2, 5] = math.inf  # float16 ends at 65,504
    with pytest.raises(ValueError, match="method='grand' have a NaN or an infinity"):
        choose(grown, "grand")
    with pytest.raises(ValueError, match="have a NaN"):
        choose(bank, "el2n")
    bank.h_final[2, 5] = math.inf
    with pytest.raises(ValueError, match="features for method='herding' are not finite"):
        choose(bank, "herding")
    for method in ("graphcut", "facility_location", "craig", "glister", "cal"):
        broken = a_bank()
        broken.err_final[5, 0] = math.nan
        with pytest.raises(ValueError, match=f"errors for method='{method}' are not finite"):
            choose(broken, method)
    with pytest.raises(ValueError, match="no bank is given"):
        coresets.select([], labels, Config(method="el2n"), generator=rng(0))
    for bad, words in ((labels - 1, r"labels are torch.int64 \[40\]"), (labels.float(), "labels are torch.float32")):
        with pytest.raises(ValueError, match=words + ".*; allowed: int64"):
            coresets.select(Bank(bad), bad, Config(method="random"), generator=rng(0))
    saved = []
    run(on_step=lambda s: saved.append(s.tensors()))
    with pytest.raises(ValueError, match="the state is of"):
        run(replace(RUN, epochs=9), state=State.restore(saved[0]))


ALONE = """
import coresets, torch

def make_network(generator):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(75, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))

images, labels = torch.randn(60, 3, 5, 5), torch.arange(60) % 3
for method in ("random", "kmeans", "craig", "forgetting", "dual"):
    config = coresets.Config(method=method, ipc=2, epochs=4, lr=0.01, epoch=2, window=2, dual_epochs=3)
    out = coresets.distill(images, labels, config, make_network=make_network, accuracy=lambda chosen, held: 0.0,
                           generator=torch.Generator().manual_seed(0))
    assert out["images"].shape == (6, 3, 5, 5)
print("alone")
"""


def test_the_file_runs_alone(tmp_path):
    assert said_alone("coresets", ALONE, tmp_path) == "alone\n"
