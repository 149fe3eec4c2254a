"""CAD-Prune and CA2D against plain loops written from their formulas, closed forms, resume, determinism, copy rule."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import plain_rded
from common import distilled, matching, networks, script_selection
from common.augment import CropResizeFlip, DiffAugment, rng
from methods import cad, rded
from methods.cad import Config, State
from papers import selection_stages
from tests.copied_file import Killed, killed_state, said_alone

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CLASSES, COUNT = 3, 60
# 40 epochs of 2 x 3 images are 4 of 60: 8 snapshots in 24 steps of 10; 60 epochs of 10 steps where 5 are asked for.
PARTS = Config(ipc=2, student_epochs=40, batch=10, lr=0.05, crops=3, pool=10)
WHOLE = replace(PARTS, student_epochs=60)


def data(seed="data", counts=(20, 20, 20), size=16):
    """uint8 images with some structure, in mixed order."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=rng(seed, "order"))]
    coarse = torch.randn(len(labels), 3, 4, 4, generator=rng(seed)) + torch.randn(
        len(counts), 3, 4, 4, generator=rng(seed, "means")
    )[labels] * 0.7  # fmt: skip
    images = F.interpolate(coarse, (size, size), mode="bicubic") * 40 + 128
    return images.clamp(0, 255).to(torch.uint8), labels


def prepare(images):
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return (images / 255 - mean) / std


def maker(name="convnet2-instance-w32", classes=CLASSES, size=16):
    return lambda generator: networks.make(name, classes=classes, size=size, generator=generator)


AUGMENT = DiffAugment("color_crop_cutout_flip_scale_rotate")


def score(config=PARTS, sample=None, **changes):
    settings = {"make_network": maker(), "prepare": prepare, "augment": AUGMENT, "generator": rng(1)} | changes
    return cad.score(*(sample or data()), config, **settings)


class Colour(nn.Module):
    """Sees class k in images whose channel k is bright; keeps what entered it last."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return x.mean((2, 3)) * 4 * self.scale


class Untouchable(nn.Module):
    """A network that must not be asked."""

    def __init__(self, *_):
        super().__init__()
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x):
        raise AssertionError("a network was asked before the settings were checked")


def distill(config=PARTS, sample=None, teacher=None, **changes):
    settings = {
        "make_network": maker(), "prepare": prepare, "augment": AUGMENT, "generator": rng(1), "mean": MEAN, "std": STD,
        "teacher": teacher,
    } | changes  # fmt: skip
    return cad.distill(*(sample or data()), config, **settings)


# ---------------------------------------------------------------- budget and schedule


@pytest.mark.parametrize(
    ("classes", "count", "epochs", "wanted"),
    [
        (1000, 1_281_167, 200, {10: 1.56, 50: 7.81, 100: 15.61, 200: 31.22, 500: 78.05}),
        (100, 50_000, 300, {10: 6, 50: 30, 100: 60}),
        (200, 100_000, 300, {10: 6, 50: 30, 100: 60}),
        (10, 50_000, 300, {1: 0.06, 10: 0.6, 50: 3, 100: 6}),
    ],
)
def test_the_scoring_run_is_as_long_as_the_students(classes, count, epochs, wanted):
    for ipc, k in wanted.items():
        assert cad.scoring_epochs(epochs, ipc, classes, count) == pytest.approx(k, abs=0.005)


def test_a_snapshot_an_epoch_where_there_are_enough():
    small = replace(Config(), ipc=50)
    looks, window, windows, total = cad.schedule(small, 100, 50_000)
    assert (window, windows, total) == (28, 2, 30 * 196)
    assert looks == [196 * (k + 1) for k in range(30)]
    large = Config(**{**cad.PUBLISHED["imagenet-1k", None], "ipc": 50})
    looks, window, windows, total = cad.schedule(large, 1000, 1_281_167)  # 7.81 are 8 epochs, and J + W = 8
    assert (len(looks), window, windows, total) == (8, 6, 2, 8 * 10_010)
    assert cad.schedule(replace(large, ipc=100), 1000, 1_281_167)[1:] == (6, 2, 16 * 10_010)


@pytest.mark.parametrize(
    ("config", "classes", "count", "steps"),
    [
        (Config(ipc=1), 10, 50_000, 12),  # 0.06 epochs
        (Config(ipc=50), 10, 50_000, 586),  # 3 epochs
        (Config(**{**cad.PUBLISHED["imagenet-1k", None], "ipc": 10}), 1000, 1_281_167, 15_625),  # 1.56 epochs
    ],
)
def test_eight_snapshots_within_a_run_that_is_too_short(config, classes, count, steps):
    looks, window, windows, total = cad.schedule(config, classes, count)
    assert (len(looks), window, windows, total) == (8, 6, 2, steps)
    assert looks == [round(steps * i / 8) for i in range(1, 9)]
    gaps = [b - a for a, b in zip([0, *looks], looks, strict=False)]
    assert max(gaps) - min(gaps) <= 1 and min(gaps) >= 1
    other = replace(config, snapshots=5, window=3, windows=1)
    assert cad.schedule(other, classes, count)[0][-1] == steps and len(cad.schedule(other, classes, count)[0]) == 5


def test_at_most_a_snapshot_a_step():
    looks, window, _, total = cad.schedule(Config(ipc=1, student_epochs=125), 10, 50_000)
    assert (looks, window, total) == ([1, 2, 3, 4, 5], 3, 5)


def test_the_least_number_of_epochs_is_an_option():
    three = replace(Config(ipc=50), windows=1)  # K = 3
    assert len(cad.schedule(three, 10, 50_000)[0]) == 8
    looks, window, _, total = cad.schedule(replace(three, whole_epochs=3), 10, 50_000)
    assert (looks, window, total) == ([196, 392, 588], 2, 588)


def rates(config, classes=10, count=50_000):
    *_, total = cad.schedule(config, classes, count)
    drop, whole = cad.drop_step(config, classes, count), cad.whole_steps(config, classes, count)
    return torch.tensor([cad.learning_rate(config, step, whole, drop) for step in range(total)])


@pytest.mark.parametrize(("ipc", "drop"), [(100, 3 * 196), (500, 15 * 196), (50, 295), (1, 6)])
def test_the_drop_of_the_rate_is_scaled(ipc, drop):
    """Epoch 151 of 300: of 6 and 30 epochs, and of 586 and 12 steps."""
    found = rates(Config(ipc=ipc))
    assert (found[:drop] == 0.01).all() and torch.allclose(found[drop:], torch.tensor(0.001))
    assert 0 < drop < len(found)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_beginning_of_a_longer_run_has_its_rates(schedule):
    long = Config(ipc=500, schedule=schedule)  # 30 epochs
    early = Config(ipc=100, schedule=schedule, full_epochs=30)  # the first 6 of them
    assert torch.equal(rates(early), rates(long)[: 6 * 196])
    assert not torch.equal(rates(early), rates(Config(ipc=100, schedule=schedule)))
    with pytest.raises(ValueError, match="full_epochs=5 are 980 steps, shorter than the run of 1176 steps"):
        cad.whole_steps(replace(early, full_epochs=5), 10, 50_000)


def test_the_cosine_spans_the_run():
    config = Config(**cad.PUBLISHED["imagenet-1k", None], ipc=1)
    found = rates(config, 100, 10_000)
    steps = torch.arange(len(found))
    assert torch.allclose(found, 0.25 * (1 + torch.cos(math.pi * steps / len(steps))), atol=1e-6)
    assert found[0] == 0.5 and found[-1] < 0.01


# ---------------------------------------------------------------- the score


def plain_scores(trajectory, window, windows, include_last=False):
    """Eqs 1 and 2, image by image, in Python's floats."""
    snapshots, out = len(trajectory), []
    for series in trajectory.double().T.tolist():
        total = 0.0
        for k in range(snapshots - window - windows, snapshots - window):
            part = series[k + include_last : k + include_last + window]
            mean = sum(part) / window
            total += math.sqrt(sum((s - mean) ** 2 for s in part) / (window - 1))
        out.append(total / windows)
    return torch.tensor(out)


@pytest.mark.parametrize(("snapshots", "window", "windows"), [(8, 6, 2), (30, 28, 2), (30, 6, 2), (9, 2, 7), (5, 3, 1)])
@pytest.mark.parametrize("include_last", [False, True])
def test_the_score_is_that_of_the_plain_loop(snapshots, window, windows, include_last):
    trajectory = torch.rand(snapshots, 40, generator=rng(snapshots))
    ours = cad.dynamic_score(trajectory, window, windows, include_last)
    assert ours.dtype == torch.float32 and ours.shape == (40,)
    torch.testing.assert_close(ours, plain_scores(trajectory, window, windows, include_last), atol=1e-7, rtol=1e-6)


def test_small_deviations_keep_their_digits():
    """Images that are all but known: 1 - 1e-5 with steps of float32's resolution."""
    trajectory = (1 - 1e-5 + 1e-6 * torch.rand(30, 20, generator=rng(0), dtype=torch.float64)).float()
    torch.testing.assert_close(cad.dynamic_score(trajectory, 28, 2), plain_scores(trajectory, 28, 2), atol=0, rtol=1e-5)
    assert (cad.dynamic_score(torch.full((9, 4), 0.7), 6, 2) == 0).all()


@pytest.mark.parametrize(("include_last", "used"), [(False, range(7)), (True, range(1, 8))])
def test_windows_end_before_the_last_snapshot(include_last, used):
    """With J = K - W and W = 2 exactly the snapshots 0..K-2 count."""
    trajectory = torch.rand(8, 30, generator=rng(3))
    before = cad.dynamic_score(trajectory, 6, 2, include_last)
    for i in range(8):
        changed = trajectory.clone()
        changed[i] += 0.3
        assert (cad.dynamic_score(changed, 6, 2, include_last) != before).all() == (i in used), i
        assert torch.equal(cad.dynamic_score(changed, 6, 2, include_last), before) == (i not in used), i


def test_the_first_snapshots_count_for_nothing_behind_short_windows():
    trajectory = torch.rand(16, 30, generator=rng(3))
    assert torch.equal(cad.dynamic_score(trajectory, 6, 2), cad.dynamic_score(trajectory[8:], 6, 2))


def test_the_highest_of_each_class_are_kept():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.2, 0.9, 0.3, 0.8])
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    assert cad.prune(scores, labels, 2).tolist() == [2, 6, 1, 3]
    assert cad.prune(scores, labels, 4).tolist() == [2, 6, 4, 0, 1, 3, 5, 7]
    assert cad.prune(torch.zeros(300), torch.arange(300) % 3, 50).tolist() == [
        k + 3 * i for k in range(3) for i in range(50)
    ]


def test_a_class_of_fewer_images_gives_all():
    scores, labels = torch.tensor([0.1, 0.9, 0.5, 0.2]), torch.tensor([0, 1, 0, 0])
    with pytest.warns(UserWarning, match=r"ipc=2: classes \[1\] have fewer images and are kept whole"):
        assert cad.prune(scores, labels, 2).tolist() == [2, 3, 1]


# ---------------------------------------------------------------- the scoring run


def plain_run(config, epochs, make_network, augment, generator):
    """p_y and |p - y| after each epoch by an ordinary training loop; the rate drops half-way, or is a cosine."""
    images, labels = data()
    net, (x, n) = make_network(generator), (prepare(images), len(labels))
    p_true, el2n = [], []
    for epoch in range(epochs):
        if epoch == 0 or (config.schedule == "step" and epoch == round(epochs * 151 / 300)):
            optimizer = torch.optim.SGD(
                net.parameters(), config.lr * (0.1 if epoch else 1), momentum=config.momentum,
                nesterov=config.nesterov, weight_decay=config.weight_decay,
            )  # fmt: skip
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * n // config.batch)
        net.train()
        for rows in torch.randperm(n, generator=generator).split(config.batch):
            draw = augment.draw(len(rows), generator, siamese=False)
            torch.randint(2**62, (), generator=generator)  # the seed of a dropout that is not there
            optimizer.zero_grad()
            F.cross_entropy(net(augment(x[rows], draw)), labels[rows]).backward()
            optimizer.step()
            if config.schedule == "cosine":
                cosine.step()
        net.eval()
        with torch.no_grad():
            p = net(x).softmax(1)
        p_true.append(p[torch.arange(n), labels])
        el2n.append((p - F.one_hot(labels, CLASSES)).square().sum(1).sqrt())
    return torch.stack(p_true), torch.stack(el2n)


@pytest.mark.parametrize("name", ["convnet2-instance-w32", "convnet2-w32"])  # the second one has BatchNorm
@pytest.mark.parametrize("more", [{}, {"schedule": "cosine", "nesterov": True, "weight_decay": 0.01, "momentum": 0.8}])
def test_the_run_is_an_ordinary_training_of_k_epochs(name, more):
    config = replace(WHOLE, **more)
    ours = score(config, make_network=maker(name))
    p_true, el2n = plain_run(config, 6, maker(name), AUGMENT, rng(1))
    torch.testing.assert_close(ours["p_true"], p_true, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(ours["el2n"], el2n, atol=1e-4, rtol=1e-3)
    assert ours["p_true"].dtype == torch.float32 and ours["p_true"].shape == (6, COUNT)
    assert ours["p_true"][-1].mean() > ours["p_true"][0].mean() + 0.02  # it learns


def test_images_are_scored_as_they_are_in_eval_mode_at_the_snapshots():
    images, labels = data()
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = maker("convnet2-w32")(rng(0))

        def forward(self, x):
            seen.append((self.training, len(x)))
            out = self.net(x)
            if not self.training:
                kept.append((x.clone(), out.detach()))
            return out

    kept = []
    found = score(make_network=lambda _: Spy())
    assert sum(training for training, _ in seen) == 24
    assert [sum(t for t, _ in seen[: i + 1]) for i, (t, _) in enumerate(seen) if not t] == [
        step for step in range(3, 25, 3) for _ in range(6)
    ]
    x, z = (torch.cat(part) for part in zip(*kept[-6:], strict=True))
    assert torch.equal(x, prepare(images))
    p = z.softmax(1)[torch.arange(COUNT), labels]
    torch.testing.assert_close(found["p_true"][-1], p)


def test_both_meanings_of_the_score_rank_two_classes_alike():
    """|p - y| = sqrt(2) (1 - p_y) for two classes; for more they part."""
    sample = data(counts=(30, 30))
    found = score(WHOLE, sample, make_network=maker(classes=2))
    torch.testing.assert_close(found["el2n"], math.sqrt(2) * (1 - found["p_true"]), atol=1e-6, rtol=1e-5)
    by = {s: distill(replace(WHOLE, score=s), sample, make_network=maker(classes=2)) for s in ("prob", "el2n")}
    torch.testing.assert_close(by["el2n"]["scores"], math.sqrt(2) * by["prob"]["scores"], atol=1e-6, rtol=1e-4)
    assert torch.equal(by["prob"]["indices"], by["el2n"]["indices"])
    by = {s: distill(replace(WHOLE, score=s, ipc=4, student_epochs=30)) for s in ("prob", "el2n")}
    assert not torch.equal(by["prob"]["scores"].argsort(), by["el2n"]["scores"].argsort())


def test_every_image_is_seen_once_an_epoch():
    images, _ = data()
    marked, batches = torch.arange(COUNT, dtype=torch.float32)[:, None, None, None].expand(images.shape), []

    class Spy(Colour):
        def forward(self, x):
            if self.training:
                batches.append(x[:, 0, 0, 0].tolist())
            return super().forward(x / 100)

    score(WHOLE, (marked, data()[1]), make_network=lambda _: Spy(), prepare=None, augment=None)
    epochs = torch.tensor(batches).view(6, COUNT).tolist()
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs) and epochs[0] != epochs[1]


def test_two_seeded_runs_are_equal_and_leave_the_global_state():
    """Dropout too, whatever the global state is."""

    def make(generator):
        net = maker()(generator)
        net.features.append(nn.Dropout(0.5))
        return net

    found = []
    for number, seed in enumerate((1, 1, 2)):
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(number)
            before = torch.get_rng_state()
            found.append(score(make_network=make, generator=rng(seed))["p_true"])
            assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def killed(run, stop):
    """The tensors after `stop` steps of a run that is killed after the next one."""
    kept = {}

    def kill(state):
        if state.step == stop:
            kept.update(state.tensors())
        if state.step == min(stop + 1, 24):  # what was kept does not change with the run
            raise Killed

    with pytest.raises(Killed):
        run(on_step=kill)
    return kept


@pytest.mark.parametrize("name", ["convnet2-instance-w32", "convnet2-w32"])
@pytest.mark.parametrize("stop", [1, 6, 13, 24])  # within an epoch, at its end, after the drop at 12, at the end
def test_a_stopped_run_continues_bit_for_bit(name, stop):
    def run(**more):
        return score(make_network=maker(name), **more)

    whole, kept = run(), killed(run, stop)
    assert int(kept["at"]) == stop
    resumed = run(state=State.restore(kept), generator=rng("another"))
    for part in ("p_true", "el2n"):
        assert torch.equal(resumed[part], whole[part])


@pytest.mark.parametrize("stop", [5, 24])
def test_a_stopped_synthesis_continues_bit_for_bit(stop):
    def run(**more):
        return distill(replace(PARTS, method="ca2d"), teacher=Colour(), **more)

    whole, kept = run(), killed(run, stop)
    resumed = run(state=State.restore(kept), generator=rng("another"))
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_the_run_is_scored_at_the_rates_of_the_longer_one(schedule, monkeypatch):
    """The same draws: the run is that of a schedule of its own up to its rates, which are the longer one's."""
    config, rates = replace(PARTS, schedule=schedule), []
    real = cad.learning_rate
    monkeypatch.setattr(cad, "learning_rate", lambda *given: rates.append(real(*given)) or rates[-1])
    own = score(config)
    alone, rates[:] = list(rates), []
    early = score(replace(config, full_epochs=300))
    assert len(rates) == len(alone) and rates[0] == alone[0]
    assert min(rates) > 0.99 * config.lr > min(alone)  # the longer schedule has hardly begun
    assert not torch.equal(early["p_true"], own["p_true"])


def test_bf16_scores_stay_close():
    config = replace(PARTS, student_epochs=20, batch=30, snapshots=4, lr=0.01)
    one, two = (score(replace(config, precision=p), augment=None)["p_true"] for p in ("fp32", "bf16"))
    assert not torch.equal(one, two)
    torch.testing.assert_close(one, two, atol=0.02, rtol=0)


# ---------------------------------------------------------------- CAD-Prune


def test_what_is_chosen_moves_most():
    images, labels = data()
    found, out = score(), distill()
    scores = plain_scores(found["p_true"], 6, 2)
    torch.testing.assert_close(out["scores"], scores, atol=1e-7, rtol=1e-5)
    wanted = [
        row
        for k in range(CLASSES)
        for row in sorted((labels == k).nonzero().flatten().tolist(), key=lambda i: -scores[i].item())[:2]
    ]
    assert out["indices"].tolist() == wanted and out["indices"].dtype == torch.int64
    assert torch.equal(out["images"], images[out["indices"]]) and out["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    last = distill(replace(PARTS, include_last=True))["scores"]
    torch.testing.assert_close(last, plain_scores(found["p_true"], 6, 2, True), atol=1e-7, rtol=1e-5)
    assert not torch.allclose(last, out["scores"])


# ---------------------------------------------------------------- CA2D


def both_forms(config, size, sizes=None):
    """Ours and a walk image by image, with the same boxes: images of 0..255 [K*I, C, S, S] and what the pools were."""
    images, labels = data()
    scores = torch.rand(COUNT, generator=rng("scores"))
    teacher = maker("convnet2-w32", size=size)(rng(4)).eval()
    with torch.no_grad():
        teacher.classifier.weight *= 20  # losses that differ
    ours, of = cad.synthesise(
        teacher, images, labels, scores, config, size=size, sizes=sizes, mean=MEAN, std=STD, generator=rng(3)
    )
    assert of.tolist() == [k for k in range(CLASSES) for _ in range(config.ipc)]
    generator, made = rng(3), []
    for k in range(CLASSES):
        rows = sorted((labels == k).nonzero().flatten().tolist(), key=lambda i: -scores[i].item())
        rows = rows[: max(config.pool, config.ipc * config.factor**2)]
        own = torch.tensor([images.shape[2:]] * COUNT) if sizes is None else sizes
        boxes = cad.random_boxes(own[rows].repeat_interleave(config.crops, 0), generator, ratio=(1.0, 1.0))
        walk = plain_rded.score(
            teacher, [images[i, :, : own[i, 0], : own[i, 1]] for i in rows],
            boxes.unflatten(0, (-1, config.crops)).tolist(), k, factor=config.factor, size=size, mean=MEAN, std=STD,
        )  # fmt: skip
        crops, losses = plain_rded.select(walk, config.ipc * config.factor**2)
        assert losses == sorted(losses) and losses[0] < losses[-1]
        made.append(plain_rded.stitch(crops, config.factor, size))
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return ours.float(), (torch.cat(made) * std + mean) * 255


@pytest.mark.parametrize(("size", "factor", "pool"), [(16, 1, 10), (16, 2, 12), (13, 2, 3), (16, 3, 300)])
@pytest.mark.parametrize("canvas", [False, True])
def test_images_are_those_of_the_plain_walk(size, factor, pool, canvas):
    sizes = torch.randint(10, 17, (COUNT, 2), generator=rng("sizes")) if canvas else None
    ours, wanted = both_forms(replace(PARTS, factor=factor, pool=pool), size, sizes)
    assert ours.shape == (6, 3, size, size)
    difference = wanted - ours  # truncated to 8 bits
    assert difference.min() > -0.1 and difference.max() < 1.1


def test_the_pool_holds_the_highest_scores_alone(monkeypatch):
    images, labels = data()
    number_of, pools, kept = {x.numpy().tobytes(): i for i, x in enumerate(images)}, [], cad.best_crops

    def spy(teacher, x, *rest, **more):
        pools.append([number_of[y.numpy().tobytes()] for y in x])
        return kept(teacher, x, *rest, **more)

    monkeypatch.setattr(cad, "best_crops", spy)
    scores = torch.rand(COUNT, generator=rng("scores"))
    for pool, factor, size in ((4, 1, 4), (4, 2, 8), (300, 1, 20)):  # as asked; an image a tile; the class
        pools.clear()
        config = replace(PARTS, pool=pool, factor=factor)
        cad.synthesise(Colour(), images, labels, scores, config, mean=MEAN, std=STD, generator=rng(0))
        for k, own in enumerate(pools):
            others = [i for i in range(COUNT) if labels[i] == k and i not in own]
            assert len(own) == size and all(labels[i] == k for i in own)
            assert not others or min(scores[own]) > max(scores[others])


def test_the_same_pool_gives_what_rded_makes():
    images, labels = data()
    settings = {"size": 16, "mean": MEAN, "std": STD}
    for k in range(CLASSES):
        pool, theirs = images[labels == k], rded.Config(ipc=2, factor=2, crops=3)
        patches, scores = rded.select(Colour(), pool, None, k, theirs, generator=rng(k), **settings)
        sizes, config = torch.full((20, 2), 16), replace(PARTS, factor=2)
        ours, losses = cad.best_crops(Colour(), pool, sizes, k, config, generator=rng(k), **settings)
        assert torch.equal(ours, patches)
        torch.testing.assert_close(losses, scores)


def test_the_lowest_losses_come_first_and_tiles_are_filled_best_first():
    """Even images of class 0, whose channel 0 tells how sure the teacher is: the crop changes nothing."""
    level = torch.randperm(20, generator=rng(0)) * 12
    images = torch.zeros(20, 3, 16, 16, dtype=torch.uint8)
    images[:, 0] = level.to(torch.uint8)[:, None, None]
    config = Config(method="ca2d", ipc=2, factor=2, crops=2, pool=15)
    scores = -level.float()  # the pool leaves the brightest five out
    made, labels = cad.synthesise(
        Colour(), images, torch.zeros(20, dtype=torch.long), scores, config, mean=MEAN, std=STD, generator=rng(0)
    )
    assert labels.tolist() == [0, 0]
    corners = made[:, 0, ::8, ::8].long()  # [I, 2, 2]
    first = 14 * 12
    assert corners.flatten(1).T.flatten().tolist() == [first - 12 * rank for rank in range(8)]


def test_crops_stopped_between_classes_continue_bit_for_bit():
    (images, labels), facts = data(), {"mean": MEAN, "std": STD}
    given = Colour(), images, labels, torch.rand(COUNT, generator=rng("scores")), PARTS
    whole, _ = cad.synthesise(*given, generator=rng(0), **facts)
    held = killed_state(2, cad.synthesise, *given, generator=rng(0), **facts)
    again, _ = cad.synthesise(*given, generator=rng(9), state=cad.Synthesis.restore(held), **facts)
    assert torch.equal(again, whole)


@pytest.mark.parametrize(("size", "before", "patch"), [(16, 4, 8), (13, 3, 6)])
def test_crops_are_framed_in_the_mean_colour_not_enlarged(size, before, patch):
    images, labels = data()
    teacher = Colour()
    cad.synthesise(
        teacher, images, labels, torch.rand(COUNT), replace(PARTS, factor=2), size=size, mean=MEAN, std=STD,
        generator=rng(0),
    )  # fmt: skip
    outside = torch.ones(size, size, dtype=torch.bool)
    outside[before : before + patch, before : before + patch] = False
    for x in teacher.seen:
        assert x.shape[2:] == (size, size)
        assert (x[:, :, outside] == 0).all() and (x[:, :, ~outside] != 0).any()


def test_boxes_are_squares_of_at_least_the_smallest_share(monkeypatch):
    drawn = []
    monkeypatch.setattr(cad, "random_boxes", lambda *a: drawn.append((a[0], *a[2:])) or rded.random_boxes(*a))
    images, labels = data()
    cad.synthesise(Colour(), images, labels, torch.rand(COUNT), replace(PARTS, crop=0.5), mean=MEAN, std=STD,
                   generator=rng(0))  # fmt: skip
    assert len(drawn) == CLASSES
    assert all(len(sizes) == 10 * 3 and (scale, ratio) == ((0.5, 1.0), (1.0, 1.0)) for sizes, scale, ratio in drawn)


def test_tiles_by_size():
    for size, factor in ((32, 1), (64, 1), (127, 1), (128, 2), (224, 2)):
        assert cad.resolved(Config(), size).factor == factor
    assert cad.resolved(Config(factor=3), 32).factor == 3
    for ipc, pool in ((10, 300), (75, 300), (100, 400), (200, 800)):
        assert cad.resolved(Config(ipc=ipc), 224).pool == pool


# ---------------------------------------------------------------- settings and errors


def test_published_settings():
    assert Config() == Config(ipc=10, student_epochs=300, lr=0.01, batch=256, momentum=0.9, weight_decay=5e-4, pool=300)
    for (_, ipc), row in cad.PUBLISHED.items():
        assert ipc is None
        Config(**row)
    large = Config(**cad.PUBLISHED["imagenet-1k", None])
    assert (large.student_epochs, large.lr, large.batch, large.schedule) == (200, 0.5, 128, "cosine")
    assert (large.nesterov, large.weight_decay, large.window, large.windows) == (True, 1e-4, 6, 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ipc": 0}, "ipc=0"), ({"method": "el2n"}, "cad, ca2d"), ({"score": "loss"}, "prob, el2n"),
        ({"window": 1}, "window=1"), ({"schedule": "half"}, "step, cosine"), ({"crop": 1.5}, "crop=1.5"),
        ({"precision": "fp8"}, "bf16, fp32"), ({"snapshots": 1}, "snapshots=1"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)


@pytest.mark.parametrize(
    ("settings", "sample", "words"),
    [
        ({"ipc": 2}, data(counts=(20, 0, 40)), "class 1 has 0 images"),
        ({"ipc": 41}, data(counts=(20, 4, 36)), "no class has so many images, the largest has 36"),
        ({"method": "ca2d", "ipc": 5, "factor": 2}, data(counts=(30, 19, 30)), "takes 20 crops .* class 1 has 19"),
        ({"student_epochs": 1, "batch": 600}, None, "0.1 epochs of 60 images, no step of batch=600"),
        ({"student_epochs": 5}, None, "3 snapshots are too few for windows=2 of window=2"),
        ({"window": 7}, None, "8 snapshots are too few for windows=2 of window=7"),
        ({"windows": 7}, None, "windows=7 of window=2"),
        ({"factor": 17, "method": "ca2d", "ipc": 1, "student_epochs": 80}, data(counts=(300, 300, 300)), "factor=17"),
    ],
)
def test_what_cannot_work_is_named_before_any_work(settings, sample, words):
    with pytest.raises(ValueError, match=words):
        distill(replace(PARTS, **settings), sample, make_network=Untouchable, teacher=Untouchable())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", ["cad", "ca2d"])
def test_scores_that_rank_nothing_choose_nothing(method, value, monkeypatch):
    images, labels = data()
    bad = torch.rand(COUNT, generator=rng(0))
    bad[int((labels == 1).nonzero()[0])] = value
    monkeypatch.setattr(cad, "dynamic_score", lambda *_: bad)
    with pytest.raises(ValueError, match="scores of class 1 have a NaN or an infinity"):
        distill(replace(PARTS, method=method), (images, labels), teacher=Colour())


def test_what_is_missing_is_named_before_any_work():
    images, labels = data()
    crops, asked = replace(PARTS, method="ca2d"), {"make_network": Untouchable}
    with pytest.raises(ValueError, match="trained teacher; pass teacher="):
        distill(crops, **asked)
    with pytest.raises(ValueError, match="mean= and std="):
        distill(crops, teacher=Untouchable(), mean=None, **asked)
    with pytest.raises(ValueError, match=r"torch\.float32; crops are cut from pixels"):
        distill(crops, (images.float(), labels), teacher=Untouchable(), **asked)
    with pytest.raises(ValueError, match="tells 3 classes apart, the images have 4"):
        distill(crops, data(counts=(15,) * 4), teacher=Untouchable(), **asked)
    with pytest.raises(ValueError, match=r"torch\.uint8; pass network input"):
        distill(prepare=None, **asked)
    with pytest.raises(ValueError, match="60 images and 59 labels"):
        distill(sample=(images, labels[1:]), **asked)
    with pytest.raises(ValueError, match="3 snapshots are too few for windows=2 of window=2"):
        cad.dynamic_score(torch.rand(3, 5), 2, 2)


def test_a_run_that_is_not_finite_stops_and_is_not_handed_out():
    kept = []
    with pytest.raises(FloatingPointError, match=r"after step \d+ \(loss .*smaller lr"):
        score(replace(PARTS, lr=1e30))
    with pytest.raises(FloatingPointError, match="not finite after step"):
        score(replace(PARTS, lr=1e30), on_step=lambda state: kept.append(state.tensors()))
    assert len(kept) < 3
    bad = Colour()
    bad.scale.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="losses of class 0 are not finite"):
        distill(replace(PARTS, method="ca2d"), teacher=bad)


# ---------------------------------------------------------------- the script, and the copy rule


@pytest.mark.parametrize("method", ["cad", "ca2d"])
def test_the_script_keeps_a_set_and_trains_students_on_it(method, tmp_path, capsys):
    arguments = {
        "dataset": "digits", "method": method, "ipc": 2, "student_epochs": 50, "size": 8, "students": 2, "seed": 3,
        "network": "convnet1-instance-w32", "teacher_epochs": 1, "device": "cpu", "out": tmp_path, "store": tmp_path,
    }  # fmt: skip
    said = []
    for _ in range(2):  # the second run finds everything
        script_selection.run_cad([f"{key}={value}" for key, value in arguments.items()], cad)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "2 students, protocol hard-truths-hard" in said[0]
    assert ("teacher: " in said[0]) == (method == "ca2d")
    found = distilled.load(tmp_path / f"{method}_digits_ipc2.safetensors")
    on = matching.task("digits", None, device=torch.device("cpu"), size=8)
    real = {(int(y), x.numpy().tobytes()) for x, y in zip(on.train.images, on.train.labels, strict=True)}
    mine = {(int(y), x.numpy().tobytes()) for x, y in zip(
        (found.images * 255).round().to(torch.uint8), found.labels, strict=True)}  # fmt: skip
    assert found.labels.tolist() == [k for k in range(10) for _ in range(2)]
    assert len(mine) == 20 and (mine <= real) == (method == "cad")


@pytest.mark.parametrize(
    ("dataset", "kind", "named"), [("digits", DiffAugment, {}), ("imagenette", CropResizeFlip, {"augment": "rrc-flip"})]
)
def test_the_scoring_run_sees_what_students_of_its_data_set_see(dataset, kind, named, tmp_path, monkeypatch):
    """In the script and in the papers; what is named in the store is what is new."""
    seen = {}
    on = matching.task("digits", None, device=torch.device("cpu"), size=8, network="convnet1-instance-w32")
    on = replace(on, train=replace(on.train, name=dataset))

    def distill(*_, augment, **__):
        raise InterruptedError(type(augment).__name__)

    def make(stage, settings, *_):
        seen.update({k: v for k, v in settings.items() if k == "augment"})
        _[1](tmp_path)

    monkeypatch.setattr(cad, "distill", distill)
    monkeypatch.setattr(script_selection.matching, "task", lambda *_, **__: on)
    monkeypatch.setattr(script_selection.Store, "make", lambda self, *given: make(*given))
    arguments = [f"dataset={dataset}", "ipc=2", "device=cpu", "lr=0.01", "batch=64", "window=2", "whole_epochs=1",
                 "schedule=step", "student_epochs=300", f"store={tmp_path}"]  # fmt: skip
    with pytest.raises(InterruptedError, match=f"^{kind.__name__}$"):
        script_selection.run_cad(arguments, cad)
    assert seen == named

    stages = SimpleNamespace(
        stage=lambda name, settings, inputs, build, *_: (settings["run"], build),
        arithmetic=lambda flops: {"dtype": torch.float32, "compile": False},
    )
    setup = SimpleNamespace(dataset=dataset, run_on=dataset)
    monkeypatch.setattr(selection_stages, "scored", lambda *given: distill(augment=given[4]))
    run, build = selection_stages._trajectory(stages, setup, on, replace(PARTS, student_epochs=500))
    assert {k: v for k, v in run.items() if k == "augment"} == named
    with pytest.raises(InterruptedError, match=f"^{kind.__name__}$"):
        build(tmp_path)


ALONE = """
import torch, cad

def make_network(generator):
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        conv, linear = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8 * 9, 3)
        return torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), linear)

images, labels = torch.randint(0, 256, (30, 3, 5, 5), dtype=torch.uint8), torch.arange(30) % 3
rest = dict(make_network=make_network, prepare=lambda x: x / 255, generator=torch.Generator().manual_seed(0))
out = cad.distill(images, labels, cad.Config(ipc=2, batch=10, student_epochs=20), **rest)
assert out["images"].shape == (6, 3, 5, 5) and torch.equal(out["images"], images[out["indices"]])
config = cad.Config(method="ca2d", ipc=2, batch=10, student_epochs=20)
teacher = make_network(torch.Generator())
out = cad.distill(images, labels, config, teacher=teacher, mean=(.5,) * 3, std=(.2,) * 3, **rest)
assert out["images"].shape == (6, 3, 5, 5) and 0 <= out["images"].min() and out["images"].max() <= 1
print("alone")
"""


def test_the_file_runs_alone(tmp_path):
    assert said_alone("cad", ALONE, tmp_path) == "alone\n"
