"""MTT, DATM, ATT and TESLA against their plain forms in float64, closed forms, resume, memory and the copy rule."""

import ast
import copy
import math
import os
import shutil
import sys
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import plain_mtt
from common import networks
from common.augment import DiffAugment, rng
from common.datasets import load
from methods import mtt
from methods.mtt import Config, ExpertConfig, ExpertState, Match, State, Student
from tests.copied_file import said_alone

ROOT = Path(__file__).resolve().parent.parent
K = 3
EXACT = {"rtol": 1e-9, "atol": 1e-13}


def network(generator, width=4, channels=3, size=8, norm=True):
    """A small instance-norm ConvNet built from a generator; float32."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        layers = []
        for block in range(2):
            layers += [nn.Conv2d(channels if block == 0 else width, width, 3, padding=1)]
            layers += [nn.GroupNorm(width, width)] if norm else []
            layers += [nn.Softplus(), nn.AvgPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (size // 4) ** 2, K))


def double(generator):
    return network(generator).double()


class Jitter:
    """An augmentation with the protocol of DiffAugment: brightness or mirrored contrast."""

    @dataclass
    class Draw:
        operation: torch.Tensor
        values: torch.Tensor

    def draw(self, rows, generator, *, siamese):
        assert not siamese  # students and experts see every image on its own
        return self.Draw(
            torch.randint(2, (), generator=generator).expand(rows), torch.rand(rows, 3, generator=generator)
        )

    def __call__(self, images, draw):
        value = draw.values.to(images)[:, 0, None, None, None]
        return images + value - 0.5 if int(draw.operation[0]) else images.flip(3) * (value + 0.5)


def real(per_class=12, dtype=torch.float64, size=8, channels=3):
    """Images with a class mean, [N, C, H, W], and labels."""
    g = rng("real")
    labels = torch.arange(K).repeat(per_class)
    centres = torch.randn(K, channels, size, size, generator=g, dtype=torch.float64)
    noise = torch.randn(len(labels), channels, size, size, generator=g, dtype=torch.float64)
    return (centres[labels] + 0.7 * noise).to(dtype), labels


def trajectory(seed=0, steps=8, scale=0.02, make=double):
    """A made-up trajectory [S+1, P] around a random network."""
    start = mtt.flatten(make(rng("trajectory", seed)))
    noise = torch.randn(steps, len(start), generator=rng("noise", seed), dtype=start.dtype)
    return torch.cat([start[None], start + scale * noise.cumsum(0)])


def case(ipc=2, steps=4, batch=0, soft=False, augmented=True, dtype=torch.float64, seed=0):
    """(student, match, images, labels, lr, augment) of one iteration."""
    g = rng("case", seed)
    total = ipc * K
    images = torch.randn(total, 3, 8, 8, generator=g, dtype=dtype)
    labels = torch.arange(K).repeat_interleave(ipc)
    labels = torch.randn(total, K, generator=g, dtype=dtype) if soft else labels
    net = network(rng("net")).to(dtype)
    path, augment = trajectory(seed, make=lambda g: network(g).to(dtype)), Jitter() if augmented else None
    batches, left = [], []
    for _ in range(steps):
        left = left or list(torch.randperm(total, generator=g).split(batch or total))
        rows = left.pop()
        batches.append((rows, augment.draw(len(rows), g, siamese=False) if augmented else None))
    lr = torch.tensor(0.3, dtype=dtype)
    return Student(net, "cpu"), Match(path[1], path[3], batches), images, labels, lr, augment


def plain_gradients(student, match, images, labels, lr, augment, nearest=False):
    images, lr = images.clone().requires_grad_(), lr.clone().requires_grad_()
    labels = labels.clone().requires_grad_(labels.is_floating_point())
    loss = plain_mtt.unrolled(student.net, match.start, match.goal, images, labels, lr, match.batches, augment, nearest)
    loss.backward()
    return loss.detach(), images.grad, labels.grad, lr.grad


def gradient(kind, **settings):
    return mtt.gradient_of(Config(gradient=kind, **settings))


def agree(have, want, **tolerance):
    """Loss and gradients of images, labels and lr; relative to the largest entry of each."""
    for ours, theirs in zip(have[:4], want, strict=True):
        if theirs is None:
            assert ours is None
        else:
            size = theirs.abs().max()
            assert size > 0
            torch.testing.assert_close(ours / size, theirs / size, **tolerance)


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("kind", ["exact", "unrolled"])
@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("batch", [0, 4])  # 4 of 6 images: chunks of 2 and 4
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_equal_the_plain_form(kind, augmented, batch, soft):
    """Images, labels and step size, hard and soft, full batch and chunks."""
    given = case(steps=5, batch=batch, soft=soft, augmented=augmented)
    agree(gradient(kind)(*given), plain_gradients(*given), **EXACT)


def test_gradients_in_single_precision():
    given = case(steps=5, soft=True, dtype=torch.float32)
    agree(mtt.exact_gradient(*given), plain_gradients(*given), rtol=0, atol=1e-4)


def test_the_gradient_is_a_difference_quotient():
    student, match, images, labels, lr, augment = case(soft=True)
    ours = mtt.exact_gradient(student, match, images, labels, lr, augment)
    g = rng("direction")
    dx, dy, da = (torch.randn(t.shape, generator=g, dtype=t.dtype) for t in (images, labels, lr))

    def loss(h):
        moved = images + h * dx, labels + h * dy, lr + h * da
        return mtt.exact_gradient(student, match, *moved, augment).loss

    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    wanted = (ours.images * dx).sum() + (ours.labels * dy).sum() + ours.lr * da
    assert slope.item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["exact", "unrolled", "tesla"])
def test_the_loss_is_one_without_steps_and_zero_at_the_goal(kind):
    student, match, images, labels, lr, augment = case()
    loss = lambda match, lr: gradient(kind)(student, match, images, labels, lr, augment).loss.item()  # noqa: E731
    assert loss(match, 0 * lr) == pytest.approx(1, rel=1e-12)
    end = mtt.exact_gradient(student, match, images, labels, lr, augment).path[-1]
    assert loss(match._replace(goal=end), lr) == pytest.approx(0, abs=1e-24)


def test_passes_of_some_images_make_the_same_gradient():
    given = case(ipc=3, soft=True)
    chunked = Student(network(rng("net")).double(), "cpu", chunk=4)  # 9 images: 4, 4, 1
    for kind in ("exact", "unrolled"):
        agree(gradient(kind)(chunked, *given[1:]), plain_gradients(*given), **EXACT)
    agree(gradient("exact", keep=2)(chunked, *given[1:]), plain_gradients(*given), **EXACT)


@pytest.mark.parametrize("keep", [1, 3, 9])
def test_kept_graphs_make_the_same_gradient(keep):
    given, made = case(steps=5, soft=True), []
    taped = given[0]._taped
    given[0]._gradient = lambda *a: made.append(1) or taped(*a)
    want = mtt.exact_gradient(*given)
    assert len(made) == 10
    agree(mtt.exact_gradient(*given, keep=keep), want[:4], **EXACT)
    assert len(made) == 20 - min(keep, 5)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("batch", [0, 4])
def test_tesla_is_its_procedure(soft, batch):
    given = case(batch=batch, soft=soft)
    student, match, images, labels, lr, augment = given
    want = plain_mtt.tesla(student.net, match.start, match.goal, images, labels, lr, match.batches, augment)
    agree(gradient("tesla")(*given), want, **EXACT)


def test_tesla_agrees_for_one_step_and_else_only_for_the_last():
    one = case(steps=1)
    agree(gradient("tesla")(*one), plain_gradients(*one), **EXACT)
    given = case(ipc=2, steps=3, batch=2)  # three steps with images of their own
    exact, tesla = mtt.exact_gradient(*given), gradient("tesla")(*given)
    for i, (rows, _) in enumerate(given[1].batches):
        gap = (exact.images[rows] - tesla.images[rows]).norm() / exact.images[rows].norm()
        assert gap < 1e-12 if i == 2 else gap > 1e-3


@pytest.mark.parametrize("kind", ["exact", "unrolled"])
@pytest.mark.parametrize("lr", [0.3, 30.0])  # 30: the first step overshoots and is the nearest of all
def test_att_takes_the_nearest_step(kind, lr):
    given = [*case(steps=5)]
    given[4] = torch.tensor(lr, dtype=torch.float64)
    student, match, images, labels, lr, augment = given
    path = mtt.exact_gradient(student, match, images, labels, lr, augment).path
    distances = [(theta - match.goal).abs().sum().item() for theta in path[1:]]
    ours = gradient(kind, select="nearest")(*given)
    assert ours.last == 1 + distances.index(min(distances))
    agree(ours, plain_gradients(*given, nearest=True), **EXACT)


def test_att_goes_through_the_chosen_step_only():
    given = [*case(steps=5, batch=2)]
    path = mtt.exact_gradient(*given).path
    given[1] = given[1]._replace(goal=path[2] + 1e-3)
    ours = mtt.exact_gradient(*given, "nearest")
    assert ours.last == 2
    untouched = torch.ones(6, dtype=torch.bool)
    untouched[torch.cat([rows for rows, _ in given[1].batches[:2]])] = False
    assert untouched.any() and (ours.images[untouched] == 0).all()


def test_a_tie_goes_to_the_later_step():
    path = torch.tensor([[0.0, 0], [2, 0], [0, 2], [3, 3]])  # step 0 is the start and does not count
    assert mtt.nearest(path, torch.zeros(2)) == 2


class Peak(TorchDispatchMode):
    """Most bytes alive at once among the tensors made inside."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.free, storage._cdata)
        return out

    def free(self, key):
        self.now -= self.sizes.pop(key, 0)


def test_memory_does_not_grow_with_the_steps():
    peak = {}
    for kind in ("exact", "unrolled"):
        for steps in (4, 16):
            given = case(ipc=8, steps=steps, dtype=torch.float32)
            with Peak() as meter:
                gradient(kind)(*given)
            parameters = (steps + 1) * len(given[1].start) * 4
            peak[kind, steps] = meter.most - parameters * (kind == "exact")
    assert peak["exact", 16] == pytest.approx(peak["exact", 4], rel=0.02)
    assert peak["unrolled", 16] > 3 * peak["unrolled", 4] > 6 * peak["exact", 4]


class WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, K)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().amax((2, 3)))


def test_batch_norm_uses_the_batch():
    """No statistics are left behind, so that both passes of a step see the same network."""
    x, y = torch.randn(6, 1, 7, 9, generator=rng(0)), torch.arange(6) % K
    net = WithBatchNorm()
    student = Student(copy.deepcopy(net), "cpu")
    theta = mtt.flatten(net)
    ours = student.gradient(theta, x, y)
    F.cross_entropy(net.train()(x), y).backward()
    torch.testing.assert_close(ours, torch.cat([p.grad.flatten() for p in net.parameters()]))
    pair = student.gradient(theta.expand(2, -1), x.expand(2, *x.shape), y.expand(2, -1))
    torch.testing.assert_close(pair, ours.expand(2, -1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_low_precision_keeps_the_direction(precision):
    given = case(ipc=2, steps=3, soft=True, dtype=torch.float32)
    want = mtt.exact_gradient(*given)
    low = Student(network(rng("net")), "cpu", low=(True, precision == "bf16"))
    have = mtt.exact_gradient(low, *given[1:])
    assert have.loss.dtype == have.images.dtype == torch.float32 and have.loss != want.loss
    cosine = F.cosine_similarity(have.images.flatten(), want.images.flatten(), dim=0)
    assert cosine > (0.999 if precision == "mixed" else 0.99)


def test_mixed_has_the_kept_steps_in_fp32():
    """Both ways, so all of them kept is fp32; precision=auto may choose mixed for any `keep`."""
    given = case(ipc=2, steps=3, soft=True, dtype=torch.float32)
    mixed = Student(network(rng("net")), "cpu", low=(True, False))
    kept = [mtt.exact_gradient(mixed, *given[1:], keep=keep) for keep in (0, 1, 3)]
    assert all(torch.equal(*pair) for pair in zip(kept[2][:4], mtt.exact_gradient(*given, keep=3)[:4], strict=True))
    assert len({float(gradient.loss) for gradient in kept}) == 3
    assert Config(precision="mixed", keep=3).keep == 3


@pytest.mark.slow
def test_low_precision_keeps_the_direction_on_real_images():
    """CIFAR-10, ConvNet-3 of width 32, a real piece of trajectory: the cosine of the image gradients is above 0.99."""
    try:
        train = load("cifar10", os.environ.get("DD_DATA") or None, split="test")
    except (FileNotFoundError, ValueError) as error:
        pytest.skip(f"needs DD_DATA with cifar10: {error}")
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (train.mean, train.std))
    prepare = lambda x: (x.float() / 255 - mean) / std  # noqa: E731
    make = lambda g: networks.make("convnet3-instance-w32", classes=10, size=32, generator=g)  # noqa: E731
    path = mtt.train_experts(
        train.images[:512], train.labels[:512], ExpertConfig(experts=1, epochs=3, batch=64), make_network=make,
        prepare=prepare, generator=rng(0),
    )[0]  # fmt: skip
    images, augment, g = prepare(train.images[mtt.random_rows(train.labels, 1, 10, rng(1))]), DiffAugment(), rng(2)
    batches = [(torch.arange(10), augment.draw(10, g, siamese=False)) for _ in range(5)]
    given = Match(path[1], path[3], batches), images, torch.arange(10), torch.tensor(0.01), augment
    want = mtt.exact_gradient(Student(make(rng(0)), "cpu"), *given)
    for low in ((True, False), (True, True)):
        have = mtt.exact_gradient(Student(make(rng(0)), "cpu", low=low), *given)
        assert have.loss.item() == pytest.approx(want.loss.item(), rel=5e-3)
        assert F.cosine_similarity(have.images.flatten(), want.images.flatten(), dim=0) > 0.99


@pytest.mark.slow
def test_compiled_passes_give_the_same():
    if shutil.which("c++") is None:
        pytest.skip("compiling needs a C++ compiler")
    given = case(ipc=1, steps=3, soft=True)
    student = Student(network(rng("net")).double(), "cpu", compile=True)
    for settings in ({}, {"keep": 2}, {"gradient": "unrolled"}):
        ours = mtt.gradient_of(Config(**settings))(student, *given[1:])
        agree(ours, plain_gradients(*given), **EXACT)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same():
    given = case(soft=True, batch=4)
    student = Student(network(rng("net")).double(), "cuda")
    match = Match(given[1].start.cuda(), given[1].goal.cuda(), [(rows.cuda(), draw) for rows, draw in given[1].batches])
    have = mtt.exact_gradient(student, match, *(t.cuda() for t in given[2:5]), given[5])
    agree([t.cpu() for t in have[:4]], plain_gradients(*given), **EXACT)


@pytest.mark.parametrize("soft", [False, True])
def test_gradients_through_the_real_augmentation(soft):
    """All six operations come up in twelve steps; ConvNet-2 as in the experiments, float64."""
    augment, g = DiffAugment(), rng("real augmentation", 4)
    net = networks.make("convnet2-instance-w32", classes=K, size=16, generator=g).double()
    images, labels = torch.randn(6, 3, 16, 16, generator=g, dtype=torch.float64), torch.arange(K).repeat_interleave(2)
    labels = torch.randn(6, K, generator=g, dtype=torch.float64) if soft else labels
    start = mtt.flatten(net)
    goal = start + 0.01 * torch.randn(len(start), generator=g, dtype=torch.float64)
    batches = [(torch.randperm(6, generator=g), augment.draw(6, g, siamese=False)) for _ in range(12)]
    assert {int(draw.operation[0]) for _, draw in batches} == set(range(6))
    given = Student(net, "cpu"), Match(start, goal, batches), images, labels, torch.tensor(0.05).double(), augment
    agree(mtt.exact_gradient(*given), plain_gradients(*given), **EXACT)


# ---------------------------------------------------------------- distillation

SMALL = Config(
    ipc=2, iterations=6, student_steps=3, expert_epochs=2, max_start=4, batch=4, lr=5.0, student_lr=0.2, lr_lr=1e-3,
)  # fmt: skip
SOFT = replace(SMALL, labels="soft", init="correct", lr_labels=2.0, ema=0.9, min_start=1, start=2, expansion_end=4)


def distill(config=SMALL, *, data=None, experts=2, state=None, on_step=None, seed=0, augment=Jitter, make=double):
    images, labels = data or real()
    paths = [learned(e, make) for e in range(experts)]
    return mtt.distill(
        images, labels, paths, config, make_network=make, augment=augment and augment(), generator=rng("run", seed),
        state=state, on_step=on_step,
    )  # fmt: skip


CACHE = {}


def learned(expert, make=double):
    """A real trajectory [9, P] of a small network, float64."""
    if make is not double:
        return trajectory(expert, make=make)
    if expert not in CACHE:
        images, labels = real()
        CACHE[expert] = mtt.train_experts(
            images, labels, ExpertConfig(experts=1, epochs=8, batch=6, lr=0.1), make_network=double,
            generator=rng("expert", expert),
        )[0]  # fmt: skip
    return CACHE[expert]


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, select="nearest", gradient="unrolled"),
        replace(SOFT, init="real"),
        SOFT,
        replace(SOFT, threshold=0.9),
    ],
    ids=["mtt", "att", "datm-real", "datm", "datm-threshold"],
)
def test_distillation_equals_the_plain_loop(config):
    """Same start and draws, then images, labels, step size and loss after each of six iterations."""
    seen = []
    out = distill(config, on_step=lambda s: seen.append((s.images, s.labels, s.lr, s.loss, s.step, s.skipped)))
    images, labels = real()
    paths, g, augment = [learned(0), learned(1)], rng("run", 0), Jitter()
    student = Student(double(g), "cpu")
    state = mtt.start(images, labels, paths, config, student, None, "cpu", g)
    hard = torch.arange(K).repeat_interleave(config.ipc)

    def matches():
        for state.step in range(config.iterations):
            yield mtt.draw_match(state, paths, config, augment, "cpu", g)

    loop = plain_mtt.distill(
        student.net, matches(), state.images, hard if state.labels is None else state.labels, config.student_lr,
        lr_images=config.lr, lr_lr=config.lr_lr, lr_labels=config.lr_labels, threshold=config.threshold or math.inf,
        augment=augment, nearest=config.select == "nearest",
    )  # fmt: skip
    moved, ema = 0, state.images
    for (x, y, lr, loss), ours in zip(loop, seen, strict=True):
        torch.testing.assert_close(ours[0], x, rtol=1e-9, atol=1e-9)
        if config.labels == "soft":
            torch.testing.assert_close(ours[1], y, rtol=1e-9, atol=1e-9)
        assert ours[2].item() == pytest.approx(lr.item(), rel=1e-10)
        assert ours[3] == pytest.approx(loss, rel=1e-9)
        if loss <= (config.threshold or math.inf):
            moved, ema = moved + 1, config.ema * ema + (1 - config.ema) * x
    assert moved + seen[-1][5] == config.iterations
    if config.threshold:
        assert 0 < moved < config.iterations, [s[3] for s in seen]
    assert seen[-1][4] == config.iterations
    torch.testing.assert_close(out["images"], seen[-1][0])
    assert torch.equal(out["labels"], hard)
    if config.ema:
        torch.testing.assert_close(out["ema_images"], ema, rtol=1e-9, atol=1e-9)
    wanted = {"images", "labels", "lr"} | ({"soft_labels", "ema_images"} if config.labels == "soft" else set())
    assert set(out) == wanted


def test_the_images_lead_closer_to_the_expert():
    losses = []
    config = replace(SMALL, iterations=60, max_start=1, lr=20.0, batch=0)
    distill(config, experts=1, augment=None, on_step=lambda s: losses.append(s.loss))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("stop", [1, 4])
def test_a_killed_run_continues_bit_for_bit(stop):
    kept = {}

    def keep(state):
        if state.step == stop:
            kept.update(copy.deepcopy(state.tensors()))

    whole = distill(SOFT, on_step=keep)
    rest = distill(SOFT, state=State.restore(kept))
    for name, value in whole.items():
        assert torch.equal(rest[name], value), name


def test_two_runs_are_the_same_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    first, again, other = distill(), distill(), distill(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["images"], other["images"])


def test_a_loss_above_the_threshold_moves_nothing():
    """Momenta included: the state after a skipped iteration is the one before it."""
    states = []
    with pytest.warns(UserWarning, match="6 of 6 updates were left out: their loss was above threshold=1e-06"):
        distill(replace(SOFT, threshold=1e-6), on_step=lambda s: states.append(copy.deepcopy(s)))
    first, last = states[0], states[-1]
    assert last.skipped == last.step == 6
    for name in ("images", "images_velocity", "labels", "labels_velocity", "lr", "lr_velocity", "ema"):
        assert torch.equal(getattr(first, name), getattr(last, name)), name
    assert last.images_velocity.count_nonzero() == 0
    assert not torch.equal(first.generator, last.generator)


def test_the_window_of_start_epochs_grows():
    datm = Config(**mtt.PUBLISHED_DATM["cifar10", 10], ipc=10)  # 0, 10 -> 20 over 1000 iterations
    assert [mtt.window(datm, i) for i in (0, 99, 100, 550, 1000, 9999)] == [
        (0, 10), (0, 10), (0, 11), (0, 15), (0, 20), (0, 20),
    ]  # fmt: skip
    assert mtt.window(Config(**mtt.PUBLISHED_DATM["cifar10", 500], ipc=500), 0) == (40, 60)
    assert mtt.window(Config(max_start=2), 0) == (0, 2)


def test_start_epochs_and_experts_are_drawn_evenly():
    paths = [torch.arange(9.0)[:, None] + 100 * e for e in range(3)]
    config = replace(SMALL, min_start=2, max_start=5, student_steps=1)
    state = State(*[torch.zeros(6, 1)] * 2, *[torch.zeros(())] * 2, None, None, None, torch.empty(0).long(), None)
    g, met = rng("even"), []
    for state.step in range(300):
        match = mtt.draw_match(state, paths, config, None, "cpu", g)
        assert match.goal == match.start + config.expert_epochs
        met.append(divmod(int(match.start), 100))
    for three in range(0, 300, 3):
        assert sorted(e for e, _ in met[three : three + 3]) == [0, 1, 2]  # each expert once a round
    epochs = torch.bincount(torch.tensor([t for _, t in met]))
    assert epochs[:2].sum() == 0 and len(epochs) == 5 and (epochs[2:] - 100).abs().max() < 30


def test_batches_come_from_the_end_of_a_random_order():
    paths = [torch.zeros(9, 1)]
    state = State(*[torch.zeros(6, 1)] * 2, *[torch.zeros(())] * 2, None, None, None, torch.empty(0).long(), None)
    rows = [b for b, _ in mtt.draw_match(state, paths, replace(SMALL, student_steps=5), None, "cpu", rng(0)).batches]
    assert [len(r) for r in rows] == [2, 4, 2, 4, 2]  # 6 images in fours: the short rest first
    for a, b in ((0, 1), (2, 3)):
        assert sorted(torch.cat([rows[a], rows[b]]).tolist()) == list(range(6))
    whole = mtt.draw_match(state, paths, replace(SMALL, batch=0), None, "cpu", rng(0)).batches
    assert all(sorted(r.tolist()) == list(range(6)) for r, _ in whole)


def test_correct_images_are_the_first_that_the_experts_know():
    """Expert 0 knows every third image, expert 1 every second: where the first has too few, the second goes on."""
    labels = torch.arange(60) % K

    def predict(expert, rows):
        known = rows % (9 if expert == 0 else 2) == 0
        return F.one_hot(torch.where(known, labels[rows], (labels[rows] + 1) % K), K).double()

    rows = mtt.correct_rows(labels, 4, K, predict, 2, rng("correct")).view(K, 4)
    g = rng("correct")
    for k in range(K):
        order = (labels == k).nonzero().flatten()
        order = order[torch.randperm(len(order), generator=g)].tolist()
        first = [i for i in order if i % 9 == 0]
        wanted = first + [i for i in order if i % 2 == 0 and i not in first]
        assert rows[k].tolist() == wanted[:4]
        assert len(set(rows[k].tolist())) == 4
    with pytest.raises(ValueError, match=r"classify \d+ of 20 images of class 0 correctly, ipc=15"):
        mtt.correct_rows(labels, 15, K, predict, 2, rng("correct"))


def test_label_logits_are_the_mean_of_the_experts_that_are_right():
    images, labels = real()
    student, paths = Student(double(rng(0)), "cpu"), [learned(0)[[3]], learned(1)[[1]], learned(0), learned(1)]
    x, y = images[:9], labels[:9]
    outs = [student.predict(p[-1], x) for p in paths]
    sure = torch.stack([o.argmax(1) == y for o in outs]).any(0)
    wrong = torch.stack([o.argmax(1) != y for o in outs]).any(0)
    assert (sure & wrong).any()
    have = mtt.label_logits(student, paths, x, y, "correct")
    for i in sure.nonzero().flatten().tolist():
        right = [o[i] for o in outs if int(o[i].argmax()) == int(y[i])]
        torch.testing.assert_close(have[i], sum(right) / len(right))
    torch.testing.assert_close(mtt.label_logits(student, paths, x, y, "real"), outs[0])
    nobody = (y + 1) % K  # labels that no expert gives: the mean of all, and nothing that is not a number
    lost = torch.stack([o.argmax(1) != nobody for o in outs]).all(0)
    assert lost.any()
    torch.testing.assert_close(
        mtt.label_logits(student, paths, x, nobody, "correct")[lost], torch.stack(outs).mean(0)[lost]
    )


def test_a_set_starts_where_it_should():
    images, labels = real()
    student, paths = Student(double(rng(0)), "cpu"), [learned(0), learned(1)]
    begin = lambda **kw: mtt.start(images, labels, paths, replace(SOFT, **kw), student, None, "cpu", rng("s"))  # noqa: E731
    state = begin()
    known = student.predict(paths[0][-1], state.images).argmax(1)
    assert known.tolist() == [0, 0, 1, 1, 2, 2]
    for init in ("real", "correct"):
        rows = (begin(init=init).images[:, None] == images).flatten(2).all(2).nonzero()  # [M, 2]
        assert rows[:, 0].tolist() == list(range(6)) and len(rows[:, 1].unique()) == 6
        assert labels[rows[:, 1]].tolist() == [0, 0, 1, 1, 2, 2]
    drawn = torch.cat([mtt.random_rows(labels, 2, K, rng("rows", i)) for i in range(200)])
    assert (torch.bincount(drawn) - 200 / 6).abs().max() < 25  # each of the 36 as often
    noise = begin(init="noise", labels="hard")
    assert noise.labels is None and noise.images.std() == pytest.approx(1, abs=0.1)


def test_images_of_any_form_are_prepared():
    images, labels = real(dtype=torch.float32, channels=1, size=7)
    pixels = (images * 30 + 128).clamp(0, 255).to(torch.uint8)
    make = lambda g: network(g, channels=1, size=7, norm=False)  # noqa: E731
    config = replace(SMALL, iterations=1, lr=0.0)
    out = mtt.distill(
        pixels, labels, [trajectory(make=make)], config, make_network=make, prepare=lambda x: (x.float() - 128) / 30,
        generator=rng(0),
    )  # fmt: skip
    assert out["images"].dtype == torch.float32 and out["images"].shape == (6, 1, 7, 7)
    assert {round(v) for v in (out["images"] * 30 + 128).flatten().tolist()} <= set(pixels.flatten().tolist())


# ---------------------------------------------------------------- experts


def experts(config, *, augment=None, dtype=torch.float64, **more):
    images, labels = real(dtype=dtype)
    return mtt.train_experts(
        images, labels, config, make_network=double, augment=augment, generator=rng("experts"), **more
    )


QUICK = ExpertConfig(experts=3, epochs=2, batch=10, lr=0.1)  # 36 images: 10, 10, 10, 6


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_experts_take_the_steps_of_the_plain_loop(rho):
    config, augment = replace(QUICK, rho=rho, gap=0.3), Jitter()
    ours = experts(config, augment=augment)
    images, labels = real()
    seed = int(torch.randint(2**62, (), generator=rng("experts")))
    for e in range(3):
        net = double(mtt.draws(seed, e))
        torch.testing.assert_close(ours[e, 0], mtt.flatten(net), rtol=0, atol=0)
        for epoch in range(2):
            order = torch.randperm(36, generator=mtt.draws(seed, e, epoch))
            place = lambda step: mtt.draws(seed, e, epoch, step)  # noqa: E731, B023
            augmentations = (augment.draw(n, place(step), siamese=False) for step, n in enumerate((10, 10, 10, 6)))
            list(plain_mtt.expert_epoch(
                net, images, labels, order, augmentations, batch=10, lr=0.1, rho=rho, gap=0.3, augment=augment,
            ))  # fmt: skip
            torch.testing.assert_close(ours[e, epoch + 1], mtt.flatten(net), rtol=1e-9, atol=1e-10)


def test_the_ascent_matters():
    """Guards the comparison above: with rho and with gap the steps really differ."""
    ends = [experts(replace(QUICK, experts=1, **kw)) for kw in ({}, {"rho": 0.05}, {"rho": 0.05, "gap": 0.0})]
    for a, b in ((0, 1), (1, 2)):
        assert (ends[a][0, -1] - ends[b][0, -1]).abs().max() > 1e-4


def test_snapshots_are_copies():
    found = experts(replace(QUICK, epochs=3))
    assert found.shape == (3, 4, len(mtt.flatten(double(rng(0)))))
    flat = found.flatten(0, 1)
    for i in range(len(flat)):
        for j in range(i):
            assert (flat[i] - flat[j]).abs().max() > 1e-4


def test_experts_learn():
    images, labels = real()
    final = learned(0)[-1]
    assert (Student(double(rng(0)), "cpu").predict(final, images).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_side_by_side_changes_nothing(rho):
    alone = experts(replace(QUICK, rho=rho), augment=Jitter())
    for group in (2, 3):
        torch.testing.assert_close(
            experts(replace(QUICK, rho=rho), augment=Jitter(), side_by_side=group), alone, rtol=1e-9, atol=1e-10
        )


def test_some_experts_alone_are_those_of_the_whole():
    whole = experts(QUICK, augment=Jitter())
    for some in (range(0, 1), range(1, 3), range(2, 3)):
        assert torch.equal(experts(QUICK, augment=Jitter(), only=some), whole[some.start : some.stop])


@pytest.mark.parametrize("only", [None, range(1, 4)])
@pytest.mark.parametrize("side_by_side", [1, 2])
def test_experts_continue_bit_for_bit(side_by_side, only):
    """Killed in the middle of an epoch, at an epoch's end, and between experts."""
    kept, how = [], {"augment": Jitter(), "side_by_side": side_by_side, "only": only}
    whole = experts(QUICK, on_step=lambda s: kept.append(copy.deepcopy(s.tensors())), **how)
    for at in (0, 3, 5, 7, 8, 11, len(kept) - 1):
        assert torch.equal(experts(QUICK, state=ExpertState.restore(kept[at]), **how), whole), at


def test_finished_epochs_are_counted():
    steps = []
    experts(QUICK, side_by_side=2, on_step=lambda s: steps.append(s.step))
    assert steps == [0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 5, 5, 5, 5, 6]


def test_an_expert_that_diverges_is_named():
    with pytest.raises(FloatingPointError, match="an expert is not finite in epoch 0"):
        experts(replace(QUICK, lr=1e200), side_by_side=2)


# ---------------------------------------------------------------- published settings and errors


def test_published_settings_are_whole():
    """Every row makes a Config whose experts last long enough for it."""
    for method, table in mtt.TABLES.items():
        for (name, ipc), row in table.items():
            config = Config(ipc=ipc, **row)
            assert config.method == method and config.max_start + config.expert_epochs <= config.train_epochs + 1, name
            assert ExpertConfig.of(config).epochs == config.train_epochs
    datm = Config(ipc=1, **mtt.PUBLISHED_DATM["cifar10", 1])
    assert (datm.labels, datm.threshold, datm.iterations, datm.rho) == ("soft", 1.1, 10_000, 0.01)
    assert ExpertConfig.of(Config(ipc=1, **mtt.PUBLISHED_ATT["cifar10", 1])).batch == 512
    headline = {f: getattr(Config(), f) for f in mtt.PUBLISHED["cifar10", 10]}
    assert headline == mtt.PUBLISHED["cifar10", 10]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ipc": 0}, "ipc=0"),
        ({"gradient": "adjoint"}, "exact, unrolled, tesla"),
        ({"select": "first"}, "last, nearest"),
        ({"min_start": 20}, "min_start=20"),
        ({"start": 0, "expansion_end": 10}, "min_start < start <= max_start"),
        ({"start": 30, "expansion_end": 10}, "start=30"),
        ({"labels": "soft", "init": "noise"}, "init='noise'"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)


def test_inputs_that_do_not_fit_are_named():
    images, labels = real()
    made = [trajectory()]
    run = lambda config=SMALL, images=images, paths=made: mtt.distill(  # noqa: E731
        images, labels, paths, config, make_network=double, generator=rng(0)
    )
    with pytest.raises(ValueError, match="ipc=13 is more than the 12 real images"):
        run(replace(SMALL, ipc=13))
    with pytest.raises(ValueError, match=r"reads 10 snapshots, the shortest trajectory has 9; .* up to 7"):
        run(replace(SMALL, max_start=8))
    with pytest.raises(ValueError, match=r"have 5 parameters, the network \d+"):
        run(paths=[torch.zeros(9, 5)])
    with pytest.raises(ValueError, match="uint8"):
        run(images=images.to(torch.uint8))
    with pytest.raises(ValueError, match="trajectories are empty"):
        run(paths=[])
    with pytest.raises(ValueError, match="side_by_side=0"):
        experts(QUICK, side_by_side=0)
    with pytest.raises(ValueError, match="uint8"):
        experts(QUICK, dtype=torch.uint8)


def test_a_run_that_leaves_the_numbers_stops():
    """Before the hook sees the state, so that a checkpoint keeps the last good one."""
    seen = []
    with pytest.raises(FloatingPointError, match=r"step size is not positive at iteration \d.*lr_lr=1000"):
        distill(replace(SMALL, lr_lr=1000.0), on_step=lambda s: seen.append(s.lr.item()))
    assert all(lr > 0 for lr in seen)
    clamped = distill(replace(SMALL, lr_lr=1000.0, min_student_lr=0.01))
    assert clamped["lr"] >= 0.01
    with pytest.raises(FloatingPointError, match=r"trajectory loss is (nan|inf).* at iteration 0 .*smaller lr"):
        distill(replace(SMALL, student_lr=1e200))


# ---------------------------------------------------------------- the copy rule

ALONE = """
import torch, mtt
from torch import nn

def network(generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(100, (), generator=generator)))
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(24, 3))

images = torch.randint(0, 256, (30, 1, 9, 11), dtype=torch.uint8)
given = dict(make_network=network, prepare=lambda x: x / 255 - 0.5, generator=torch.Generator().manual_seed(0))
paths = mtt.train_experts(images, torch.arange(30) % 3, mtt.ExpertConfig(experts=2, epochs=3, rho=0.01), **given)
for settings in ({}, {"labels": "soft", "ema": 0.9}, {"gradient": "tesla"}, {"gradient": "unrolled"}):
    config = mtt.Config(ipc=2, iterations=2, student_steps=2, max_start=2, lr_lr=1e-7, **settings)
    out = mtt.distill(images, torch.arange(30) % 3, paths, config, **given)
    assert out["images"].shape == (6, 1, 9, 11) and out["images"].isfinite().all()
print("alone", sorted(out))
"""


def test_the_file_runs_alone(tmp_path):
    assert said_alone("mtt", ALONE, tmp_path) == "alone ['images', 'labels', 'lr']\n"


def test_it_imports_torch_alone():
    names = set()
    for node in ast.parse((ROOT / "methods" / "mtt.py").read_text()).body:  # not the block under the main guard
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch"}
