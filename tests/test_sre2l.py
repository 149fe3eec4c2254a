"""SRe2L and CDA against plain loops written from their formulas, closed forms, resume, determinism, the copy rule."""

import copy
import math
import os
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from benchmarks import plain_sre2l
from benchmarks.plain_wmdd import augment
from common import networks, script
from common.augment import rng
from methods import sre2l
from methods.sre2l import PUBLISHED, PUBLISHED_CDA, Config, RecoverState
from tests.copied_file import OWN_NETWORK, killed_state, said_alone
from tests.user_network import MEAN, STD, Small

pytestmark = pytest.mark.usefixtures("untrained")

LOW, HIGH = (torch.tensor([(e - m) / s for m, s in zip(MEAN, STD, strict=True)])[:, None, None] for e in (0, 1))


@pytest.fixture
def teacher():
    return Small().eval().requires_grad_(False)


def ours_and_gradient(teacher, x, labels, config):
    """The loss of a forward and d loss / d x, in the arithmetic of x; labels [G, k]."""
    x = x.clone().requires_grad_()
    with sre2l.bn_gaps(teacher, config, lambda: len(labels)) as gaps:
        loss = sre2l.objective(x, teacher(x), gaps, labels, config)
    return loss, torch.autograd.grad(loss, x)[0]


# ---------------------------------------------------------------- settings and schedules


def test_learning_rate_falls_as_a_cosine():
    config = Config(lr=0.25, iterations=4000)
    assert sre2l.learning_rate(config, 0) == 0.25
    assert sre2l.learning_rate(config, 2000) == pytest.approx(0.125)
    assert sre2l.learning_rate(config, 3999) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("curriculum", "milestone", "expected"),
    [
        ("cosine", 1.0, {0: 1.0, 25: 0.08 + 0.92 * (1 + 0.5**0.5) / 2, 50: 0.54, 99: 0.0802, 100: 0.08}),
        ("cosine", 0.5, {0: 1.0, 25: 0.54, 50: 0.08, 99: 0.08}),
        ("linear", 0.8, {0: 1.0, 20: 0.77, 40: 0.54, 80: 0.08, 99: 0.08}),
        ("step", 0.5, {0: 1.0, 49: 1.0, 50: 0.08, 99: 0.08}),
        ("cosine", 0.0, {0: 0.08, 99: 0.08}),
        ("none", 1.0, {0: 0.08, 99: 0.08}),
    ],
)
def test_the_smallest_crop_follows_the_curriculum(curriculum, milestone, expected):
    config = Config(curriculum=curriculum, milestone=milestone, iterations=100)
    for step, share in expected.items():
        assert sre2l.least_area(config, step) == pytest.approx(share, abs=1e-4)
    assert sre2l.least_area(Config(crop=False), 0) is None


def test_crops_are_no_smaller_than_asked():
    for least in (0.08, 0.54, 1.0):
        views = [sre2l.random_view(64, least, (0, 4), rng("crop", least, i)) for i in range(300)]
        share = torch.tensor([v.height * v.width / 64**2 for v in views])
        assert share.min() >= least - 0.02  # sides are whole pixels
        assert share.max() <= 1
        if least < 1:
            assert share.min() < least + 0.06 and share.std() > 0.05
    assert share.min() > 0.99  # the first crops of CDA


@pytest.mark.parametrize("roll", [(0, 4), (-4, 4)])
def test_rolls_stay_between_their_bounds(roll):
    views = [sre2l.random_view(32, None, roll, rng("roll", i)) for i in range(400)]
    assert {v.down for v in views} == {v.right for v in views} == set(range(roll[0], roll[1] + 1))
    assert {v[:5] for v in views} == {(0, 0, 32, 32, False)}  # no crop, no flip


@pytest.mark.parametrize(("both", "jitter", "bounds"), [(False, -1, (0, 4)), (True, 5, (-5, 5)), (False, 0, (0, 0))])
def test_the_roll_of_a_run_is_the_configured_one(teacher, monkeypatch, both, jitter, bounds):
    asked, draw = [], sre2l.random_view
    monkeypatch.setattr(sre2l, "random_view", lambda *a: asked.append(a[1:3]) or draw(*a))
    config = Config(ipc=1, iterations=4, jitter=jitter, jitter_both=both, curriculum="linear")
    recover(teacher, config)
    assert [roll for _, roll in asked] == [bounds] * 4
    assert [least for least, _ in asked] == pytest.approx([1.0, 0.77, 0.54, 0.31])


def test_published_settings_are_settings():
    for table in (PUBLISHED, PUBLISHED_CDA):
        for row in table.values():
            Config(**row)
    assert Config(**PUBLISHED["imagenet-1k", None]) == Config()  # the defaults
    assert not PUBLISHED["cifar100", None]["crop"]
    assert all(row["curriculum"] == "cosine" for row in PUBLISHED_CDA.values())


# ---------------------------------------------------------------- batches


def test_a_batch_is_one_image_of_each_of_consecutive_classes():
    plan = sre2l.passes(250, Config(ipc=3))
    numbers = [n.tolist() for n in plan]
    assert [len(rows) for rows in numbers] == [1] * 6 + [2, 1]  # of the last 50 classes two batches fit into a forward
    batches = [row for rows in numbers for row in rows]
    first = range(0, 250, 100)
    assert [[n // 3 for n in row] for row in batches] == [
        list(range(k, min(k + 100, 250))) for k in first for _ in range(3)
    ]
    assert [{n % 3 for n in row} for row in batches] == [{0}, {1}, {2}] * 3
    assert sorted(n for row in batches for n in row) == list(range(750))


def test_batches_of_ten_classes_fill_the_forward():
    assert [tuple(n.shape) for n in sre2l.passes(10, Config(ipc=25))] == [(10, 10), (10, 10), (5, 10)]
    assert [tuple(n.shape) for n in sre2l.passes(10, Config(ipc=2, in_flight=1))] == [(1, 10), (1, 10)]
    assert [tuple(n.shape) for n in sre2l.passes(10, Config(ipc=1, batch=4))] == [(1, 4), (1, 4), (1, 2)]


# ---------------------------------------------------------------- objective


def explicit_bn_loss(net, x, first_multiplier):
    """R_BN of one batch by loops over layers, channels and images."""
    total, first = 0.0, True
    for layer in net.body:
        if isinstance(layer, nn.BatchNorm2d):
            gaps = {"mean": 0.0, "var": 0.0}
            for c in range(x.shape[1]):
                values = [v for image in x[:, c].tolist() for row in image for v in row]
                m = math.fsum(values) / len(values)
                v = math.fsum((value - m) ** 2 for value in values) / len(values)
                gaps["mean"] += (m - layer.running_mean[c].item()) ** 2
                gaps["var"] += (v - layer.running_var[c].item()) ** 2
            total += (first_multiplier if first else 1.0) * (math.sqrt(gaps["mean"]) + math.sqrt(gaps["var"]))
            first = False
        x = layer(x)
    return total


def test_the_batch_norm_loss_is_two_norms_a_layer(teacher):
    teacher = teacher.double()
    x = torch.randn(6, 3, 8, 8, generator=rng(1), dtype=torch.float64)
    config = Config(bn_weight=1.0, first_bn_multiplier=7.0)
    labels = torch.tensor([[0, 1, 2], [3, 0, 1]])
    loss, _ = ours_and_gradient(teacher, x, labels, config)
    wanted = sum(
        explicit_bn_loss(teacher, part, 7.0) + F.cross_entropy(teacher(part), y).item()
        for part, y in zip(x.split(3), labels, strict=True)
    )
    assert loss.item() == pytest.approx(wanted, rel=1e-9)


def test_the_gradient_of_the_batch_norm_term_is_the_closed_form():
    """d R_l / dx = g_m / n + 2 (x - m) g_v / n with unit vectors g_m and g_v along the two gaps."""
    bn = Small().body[1].double()
    x = torch.randn(4, 8, 5, 3, generator=rng(1), dtype=torch.float64).requires_grad_()
    (ours,) = torch.autograd.grad(sre2l.bn_gap(bn, x, 1).sum(), x)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    to_mean, to_var = (F.normalize(gap, dim=0) for gap in (mean - bn.running_mean, var - bn.running_var))
    centred = x - mean[:, None, None]
    wanted = (to_mean[:, None, None] + 2 * centred * to_var[:, None, None]) / (4 * 5 * 3)
    torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-9)
    plain = (mean - bn.running_mean).norm() + (var - bn.running_var).norm()
    torch.testing.assert_close(ours, torch.autograd.grad(plain, x)[0], atol=1e-12, rtol=1e-9)


def test_batch_norm_layers_count_in_module_order_not_in_the_order_of_the_forward():
    """The multiplier belongs to the first layer of the module list, as in the released code."""

    class Backwards(Small):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            nn.init.uniform_(self.first.running_mean, 1, 2)
            nn.init.uniform_(self.second.running_mean, 4, 5)

        def forward(self, x):
            return self.head(self.body(self.first(self.second(x))))

    net = Backwards().eval().requires_grad_(False)
    net.body, net.head = nn.AdaptiveAvgPool2d((4, 4)), nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    x = torch.randn(4, 3, 8, 8, generator=rng(1))
    labels = torch.arange(4)[None]
    loss = {m: ours_and_gradient(net, x, labels, Config(bn_weight=1.0, first_bn_multiplier=m))[0] for m in (1.0, 3.0)}
    gap = sre2l.bn_gap(net.first, net.second(x), 1)
    assert (loss[3.0] - loss[1.0]).item() == pytest.approx(2 * gap.item(), rel=1e-5)


def test_total_variation_and_length_are_their_formulas():
    x = torch.randn(2, 3, 4, 5, 6, generator=rng(1), dtype=torch.float64)  # [G, k, C, H, W]
    tv = sre2l.total_variation(x)
    for g in range(2):
        wanted = 0.0
        for dy, dx in ((0, 1), (1, 0), (1, 1), (1, -1)):
            squares = [
                (image[c, i + dy, j + dx] - image[c, i, j]).item() ** 2
                for image in x[g] for c in range(4) for i in range(5) for j in range(6)
                if i + dy < 5 and 0 <= j + dx < 6
            ]  # fmt: skip
            wanted += math.sqrt(sum(squares))
        assert tv[g].item() == pytest.approx(wanted, rel=1e-9)
        assert plain_sre2l.total_variation(x[g]).item() == pytest.approx(wanted, rel=1e-9)
    logits, labels = torch.zeros(6, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.long)
    config = Config(bn_weight=0.0, l2_weight=2.0)
    loss = sre2l.objective(x.flatten(0, 1), logits, [torch.zeros(2)], labels, config)
    lengths = sum(math.sqrt(image.square().sum().item()) for image in x.flatten(0, 1)) / 3
    assert loss.item() == pytest.approx(2 * math.log(3) + 2.0 * lengths, rel=1e-9)


def test_batches_in_one_forward_have_the_gradients_of_their_own(teacher):
    teacher, labels = teacher.double(), torch.tensor([[0, 1, 2], [0, 1, 2], [1, 2, 3]])
    x = torch.randn(9, 3, 10, 10, generator=rng(2), dtype=torch.float64)
    config = Config(bn_weight=0.5, tv_weight=0.1, l2_weight=0.1)
    loss, grad = ours_and_gradient(teacher, x, labels, config)
    alone = [ours_and_gradient(teacher, x[3 * g : 3 * g + 3], labels[g : g + 1], config) for g in range(3)]
    assert loss.item() == pytest.approx(sum(one.item() for one, _ in alone), rel=1e-9)
    torch.testing.assert_close(grad, torch.cat([g for _, g in alone]), atol=1e-12, rtol=1e-9)


def test_bf16_stays_close(teacher):
    x, labels, config = torch.randn(8, 3, 8, 8, generator=rng(9)), torch.arange(4).expand(2, 4), Config(bn_weight=1.0)
    exact, wanted = ours_and_gradient(teacher, x, labels, config)
    with torch.autocast("cpu", torch.bfloat16):
        loss, grad = ours_and_gradient(teacher, x, labels, config)
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    assert F.cosine_similarity(grad.flatten(), wanted.flatten(), dim=0) > 0.97


# ---------------------------------------------------------------- recover


def recover(teacher, config, size=16, seed=1, **more):
    return sre2l.recover(
        teacher, 4, config, size=size, channels=3, mean=MEAN, std=STD, generator=rng(seed), **more
    )  # fmt: skip


def pixels(x):
    return (x * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]).clamp(0, 1)


QUICK = Config(ipc=3, iterations=8, batch=2, in_flight=4)  # per half of the classes a pass of two batches, one of one


def plain_steps(teacher, noise, labels, views, config):
    return plain_sre2l.recover(
        teacher, noise, labels, views, iterations=config.iterations, lr=config.lr, bn_weight=config.bn_weight,
        first_bn_multiplier=config.first_bn_multiplier, tv_weight=config.tv_weight, l2_weight=config.l2_weight,
        low=LOW, high=HIGH,
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bn_weight": 1.0, "curriculum": "cosine", "jitter_both": True},
        {"crop": False, "tv_weight": 0.01, "l2_weight": 0.001},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=["sre2l", "cda", "priors", "compiled"],
)
def test_recover_takes_the_steps_of_the_plain_form(teacher, settings):
    """Two batches share each of our forwards and run one after the other in the plain form, with the same draws."""
    if "compile" in settings and shutil.which("c++") is None:
        pytest.skip("compiling needs a C++ compiler")
    config = Config(ipc=2, iterations=10, jitter=3, in_flight=8, **settings)
    losses = []
    ours = recover(teacher, config, seed=6, on_step=lambda s: losses.append(s.loss))
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, (1,), generator=rng(6))))  # of the one pass
    noise = torch.randn(8, 3, 16, 16, generator=generator)
    roll = (-3, 3) if config.jitter_both else (0, 3)
    views = [sre2l.random_view(16, sre2l.least_area(config, step), roll, generator) for step in range(10)]
    steps = list(plain_steps(teacher, noise.split(4), [torch.arange(4)] * 2, iter(views + views), config))
    for j, (x, _) in enumerate((steps[9], steps[19])):
        assert (ours[j::2] - pixels(x)).abs().max() < 2e-3
    assert losses[-1] == pytest.approx((steps[9][1] + steps[19][1]) / 2, rel=1e-4)


@pytest.mark.parametrize("draw", range(5))
def test_the_loss_and_image_gradient_of_the_plain_form_in_float64(teacher, draw):
    teacher, view = teacher.double(), sre2l.random_view(16, 0.08, (-2, 2), rng(draw))
    x = torch.randn(4, 3, 16, 16, generator=rng(3), dtype=torch.float64).requires_grad_()
    config, labels = Config(bn_weight=1.0, tv_weight=0.01, l2_weight=0.01), torch.arange(4)
    with sre2l.bn_gaps(teacher, config, lambda: 1) as gaps:
        seen = sre2l.see(x, view)
        ours = sre2l.objective(seen, teacher(seen), gaps, labels[None], config)
    hooks, seen = plain_sre2l.hook(teacher), augment(x, view)
    plain = plain_sre2l.objective(
        seen, teacher(seen), labels, hooks, bn_weight=1.0, first_bn_multiplier=10.0, tv_weight=0.01, l2_weight=0.01
    )
    assert ours.item() == pytest.approx(plain.item(), rel=1e-9)
    wanted = torch.autograd.grad(plain, x)[0]
    assert wanted.norm() > 0.1
    torch.testing.assert_close(torch.autograd.grad(ours, x)[0], wanted, atol=1e-9, rtol=1e-9)


DWA = Config(ipc=2, iterations=6, batch=2, jitter=2, init="real", perturb=0.3, perturb_steps=3, var_weight=4.0)
FIRST = torch.rand(8, 3, 16, 16, generator=rng("first"))


def test_dwa_takes_the_steps_of_a_loop_written_from_its_formulas(teacher):
    """The teacher of each batch is moved up the loss of what the batch starts from, in a copy of its own."""
    kept = {name: v.clone() for name, v in teacher.state_dict().items()}
    ours = recover(teacher, DWA, seed=6, start=FIRST.__getitem__)
    assert all(torch.equal(v, kept[name]) for name, v in teacher.state_dict().items())
    plan = [[0, 2], [1, 3], [4, 6], [5, 7]]  # image j of class k is number 2 k + j; a batch is two classes
    assert [rows.tolist() for rows in sre2l.passes(4, DWA)] == [[one] for one in plan]
    seeds = torch.randint(2**62, (4,), generator=rng(6)).tolist()
    shift, scale = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    for rows, seed in zip(plan, seeds, strict=True):
        labels, first = torch.tensor(rows) // 2, (FIRST[rows] - shift) / scale
        moved, draws = copy.deepcopy(teacher).requires_grad_(True), torch.Generator().manual_seed(seed ^ 1)
        for _ in range(3):
            view = sre2l.see(first, sre2l.random_view(16, 0.08, (0, 2), draws))
            grads = torch.autograd.grad(F.cross_entropy(moved(view), labels), list(moved.parameters()))
            length = math.sqrt(sum(g.square().sum().item() for g in grads))
            for w, g in zip(moved.parameters(), grads, strict=True):
                w.data += 0.3 / 3 * g / length
        gap = torch.cat([(a - b).flatten() for a, b in zip(moved.parameters(), teacher.parameters(), strict=True)])
        assert 0.05 < gap.norm() <= 0.3
        layers, entered = [m for m in moved.modules() if isinstance(m, nn.BatchNorm2d)], {}
        for bn in layers:
            bn.register_forward_pre_hook(lambda bn, x, entered=entered: entered.__setitem__(bn, x[0]))
        x, generator = first.clone().requires_grad_(), torch.Generator().manual_seed(seed)
        adam = torch.optim.Adam([x], betas=(0.5, 0.9))
        for step in range(6):
            adam.param_groups[0]["lr"] = 0.25 * (1 + math.cos(math.pi * step / 6)) / 2
            adam.zero_grad()
            loss = F.cross_entropy(moved(sre2l.see(x, sre2l.random_view(16, 0.08, (0, 2), generator))), labels)
            for bn in layers:
                mean, var = entered[bn].mean((0, 2, 3)), entered[bn].var((0, 2, 3), correction=0)
                gap = (mean - bn.running_mean).norm() + 4.0 * (var - bn.running_var).norm()
                loss = loss + 0.01 * (10 if bn is layers[0] else 1) * gap
            loss.backward()
            adam.step()
            x.data = torch.minimum(torch.maximum(x.data, LOW), HIGH)
        assert (ours[rows] - pixels(x.detach())).abs().max() < 2e-3


def test_dwa_continues_bit_for_bit(teacher):
    saved = []
    keep = lambda state: saved.append({name: t.clone() for name, t in state.tensors().items()})  # noqa: E731
    whole = recover(teacher, DWA, start=FIRST.__getitem__, on_step=keep)
    for step in (2, 7, 12):
        state = sre2l.RecoverState.restore(saved[step])
        assert torch.equal(recover(teacher, DWA, seed=9, start=FIRST.__getitem__, state=state), whole)


def test_dwa_starts_from_random_real_images(teacher):
    labels = torch.arange(40) % 4
    images = torch.randint(0, 256, (40, 3, 16, 16), generator=rng("real"), dtype=torch.uint8)
    rows = sre2l.drawn(labels, 3, rng(5))
    assert labels[rows].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3 and len(set(rows.tolist())) == 12
    still = replace(DWA, ipc=3, iterations=1, lr=0.0)
    out = sre2l.distill(images, labels, teacher, still, mean=MEAN, std=STD, generator=rng(5))
    torch.testing.assert_close(out["images"], images[rows] / 255, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="init=real with ipc=11: class 0 has 10 images"):
        sre2l.check(replace(DWA, ipc=11), teacher, labels, size=16)
    with pytest.raises(ValueError, match="init='real', but first images were not given"):
        recover(teacher, DWA)
    with pytest.raises(ValueError, match="init='noise', but first images were given"):
        recover(teacher, QUICK, start=FIRST.__getitem__)


def test_moments_start_fresh_and_pixels_stay_in_range(teacher):
    states = []

    def look(state):
        x, first, second = (t.detach().clone() for t in state.live)
        states.append((state.number, state.step, first, second))
        assert (x >= LOW - 1e-6).all() and (x <= HIGH + 1e-6).all()

    out = recover(teacher, QUICK, on_step=look)
    assert [s[:2] for s in states] == [(number, step) for number in range(4) for step in range(1, 9)]
    for _, step, first, second in states:
        if step == 1:  # fresh moments for every batch: first = g/2, second = g^2/10
            torch.testing.assert_close(second, (2 * first).square() / 10, atol=1e-12, rtol=1e-3)
    assert out.shape == (12, 3, 16, 16) and out.dtype == torch.float32
    assert out.min() >= 0 and out.max() <= 1


def test_images_are_sorted_by_class_and_differ(teacher):
    """The teacher reads class k in the images k*I .. k*I + I - 1, and no two images are equal."""
    config = Config(ipc=3, iterations=120, batch=3, in_flight=6, bn_weight=0.0, crop=False, jitter=0)
    images = torch.zeros(5, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 3, 1, 2, 2])
    out = sre2l.distill(*images, teacher, config, mean=MEAN, std=STD, generator=rng(1))
    assert out["labels"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    seen = (out["images"] - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(teacher(seen).argmax(1), out["labels"])
    assert torch.pdist(out["images"].flatten(1)).min() > 1


def test_the_objective_falls(teacher):
    losses = []
    recover(teacher, Config(ipc=1, iterations=100, bn_weight=1.0), on_step=lambda s: losses.append(s.loss))
    start, _ = ours_and_gradient(
        teacher, torch.randn(4, 3, 16, 16, generator=rng(1)), torch.arange(4)[None], Config(bn_weight=1.0)
    )
    assert losses[-1] < 0.7 * start.item()


def test_two_seeded_runs_are_equal_and_seeds_differ(teacher):
    before = torch.get_rng_state()
    one, two, other = recover(teacher, QUICK), recover(teacher, QUICK), recover(teacher, QUICK, seed=2)
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("stop", [1, 7, 8, 9, 15, 27])
def test_a_stopped_run_continues_bit_for_bit(teacher, stop):
    whole, kept = recover(teacher, QUICK), killed_state(stop, recover, teacher, QUICK)
    assert torch.equal(recover(teacher, QUICK, seed=99, state=RecoverState.restore(kept)), whole)


def test_parts_make_the_images_of_the_whole(teacher):
    whole, plan = recover(teacher, QUICK), sre2l.passes(4, QUICK)
    for part in (slice(0, 1), slice(1, len(plan))):
        numbers = torch.cat([number.flatten() for number in plan[part]]).sort().values
        assert 0 < len(numbers) < len(whole)
        assert torch.equal(recover(teacher, QUICK, part=part), whole[numbers])


def test_hooks_are_gone_afterwards(teacher):
    recover(teacher, QUICK)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in teacher.modules())


def real_images(n=500):
    """Real images uint8 [n, 3, 32, 32] and their classes, as many of each, or a skip without them."""
    folder = Path(os.environ.get("DD_DATA", "nowhere")).expanduser() / "cifar10" / "train"
    files = [sorted(path.iterdir())[: n // 10] for path in sorted(folder.glob("*"))]
    if sum(map(len, files)) != n:
        pytest.skip("needs the environment variable DD_DATA with cifar10/train/<class>/ below it")
    images = torch.stack([pil_to_tensor(Image.open(path).convert("RGB")) for own in files for path in own])
    return images, torch.arange(10).repeat_interleave(n // 10)


def test_recovered_statistics_come_close_to_those_of_real_images():
    """A BatchNorm network that has seen 500 real images: ten recovered ones meet its statistics better than ten."""
    images, labels = real_images()
    shift, scale = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    net = networks.make("convnet3-w32", classes=10, size=32, generator=rng(0)).train()
    for bn in sre2l.batch_norms(net):
        bn.reset_running_stats()
        bn.momentum = None  # plain average over batches
    with torch.no_grad():
        for part in (images / 255).split(100):
            net((part - shift) / scale)
    net.eval()
    config = Config(ipc=1, iterations=60, bn_weight=1.0, crop=False, jitter=4)  # no crops for CIFAR
    out = sre2l.distill(images, labels, net, config, mean=MEAN, std=STD, generator=rng(1))

    def gap(pixels):
        with torch.no_grad(), sre2l.bn_gaps(net, config, lambda: 1) as gaps:
            net((pixels - shift) / scale)
        return sum(gaps).item()

    noise = (torch.randn(10, 3, 32, 32, generator=rng(1)) * scale + shift).clamp(0, 1)
    assert gap(out["images"]) < 0.2 * gap(images[::50] / 255) < 0.2 * gap(noise)
    colour = [pixels.mean((0, 2, 3)) for pixels in (out["images"], images / 255)]
    assert (colour[0] - colour[1]).abs().max() < 0.05


# ---------------------------------------------------------------- errors


def test_a_loss_that_is_not_finite_stops_with_the_step(teacher):
    teacher.body[1].running_mean.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=r"nan at step 7 of pass 0 \(lr=0.25, bn_weight=0.01\)"):
        recover(teacher, QUICK)


def test_a_state_that_is_not_finite_is_not_handed_out(teacher):
    """The loss is looked at every 50 steps only; a checkpoint in between must not replace the last good state."""
    teacher.body[1].running_mean.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="images are not finite after step 1 of pass 0"):
        recover(teacher, QUICK, on_step=lambda state: state.tensors())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ipc": 0}, "ipc=0 is too small; the least is 1"),
        ({"curriculum": "sine"}, "curriculum='sine' is unknown; allowed: none, cosine, linear, step"),
        ({"milestone": 1.5}, "milestone=1.5 is too large; the most is 1"),
        ({"bn_weight": -1.0}, "bn_weight=-1.0"),
        ({"curriculum": "cosine", "crop": False}, "curriculum='cosine' .* needs crop=True"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)


def test_unfit_teachers_are_named(teacher):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
    with pytest.raises(ValueError, match="the teacher Sequential has no BatchNorm2d"):
        recover(flat, QUICK)
    with pytest.raises(ValueError, match="tells 4 classes apart, asked for are 7"):
        sre2l.recover(teacher, 7, QUICK, size=16, channels=3, mean=MEAN, std=STD, generator=rng(0))
    with pytest.raises(ValueError, match="each of the 1 channels"):
        sre2l.recover(teacher, 4, QUICK, size=16, channels=1, mean=MEAN, std=STD, generator=rng(0))


# ---------------------------------------------------------------- the copy rule

ALONE = f"""
import torch, torchvision, sre2l
sre2l.recognises = lambda *_: None  # the teachers are untrained
{OWN_NETWORK}
images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
config = sre2l.Config(ipc=2, iterations=2)
for teacher in (torchvision.models.resnet18(num_classes=3), Own()):
    out = sre2l.distill(images, torch.arange(30) % 3, teacher.eval(), config, mean=(0.5,) * 3, std=(0.2,) * 3,
                        generator=torch.Generator().manual_seed(0))
    assert out["images"].shape == (6, 3, 32, 32) and out["images"].isfinite().all()
print("alone")
"""


@pytest.mark.parametrize(
    ("arguments", "kept", "row"),
    [
        (["perturb=0.0"], "sre2l", None),
        (["dataset=tiny-imagenet", "curriculum=cosine"], "cda", sre2l.PUBLISHED_CDA["tiny-imagenet", None]),
        (["dataset=cifar10", "perturb=0.02"], "dwa", sre2l.PUBLISHED_DWA["cifar10", None]),
        (["dataset=my-own", "perturb=0.015"], "dwa", sre2l.PUBLISHED_DWA["imagenet-1k", None]),
    ],
)
def test_the_script_takes_the_settings_of_the_method_that_its_arguments_name(arguments, kept, row, monkeypatch):
    seen = {}

    def run(argv, name, config, published, *_, **more):
        seen.update(kept=more["kept"], published=published)

    monkeypatch.setattr(script, "run_with_teacher", run)
    monkeypatch.setattr(sys, "argv", ["sre2l.py", *arguments])
    with pytest.raises(SystemExit):
        runpy.run_path(sre2l.__file__, run_name="__main__")
    dataset = dict(a.split("=") for a in arguments).get("dataset", "digits")
    assert seen["kept"] == kept and (row is None or seen["published"][dataset, None] == row)


def test_two_methods_at_once_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sre2l.py", "curriculum=cosine", "perturb=0.1"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(sre2l.__file__, run_name="__main__")
    assert end.value.code == 2 and "two methods; pass one of them" in capsys.readouterr().err


def test_the_file_runs_alone(tmp_path):
    assert said_alone("sre2l", ALONE, tmp_path) == "alone\n"
