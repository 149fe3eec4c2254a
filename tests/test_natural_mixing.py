"""Natural mixing against its plain form and closed forms, resume, what runs share, fractals, the script."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import plain_mixing, plain_students
from benchmarks.cases_mixing import CASES
from common import matching, networks, script_mixing
from common.augment import ZCA, DiffAugment, rng
from common.cli import UsageError
from common.distilled import write_dc_pt
from common.distilled_set import DistilledSet
from common.protocols import PROTOCOLS
from common.store import Checkpoint
from methods import natural_mixing
from methods.natural_mixing import Config, Pool, State, attractor, fractal_pool, mix, mixed_epoch, random_maps, train
from tests.copied_file import Killed, said_alone

COUNTS = (7, 1, 12)  # real images of each class
SIDE = 8


def real(dtype=torch.uint8, counts=COUNTS):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=rng("order"))]
    images = torch.randint(0, 256, (len(labels), 3, SIDE, SIDE), generator=rng("real"))
    return images.to(dtype), labels


def prepare(images):
    return (images.double() / 255 - 0.4) / 0.2


REAL, REAL_LABELS = real()
LABELS = torch.tensor([2, 0, 1, 2, 0, 0, 2, 1, 1, 2])
IMAGES = torch.randn(len(LABELS), 3, SIDE, SIDE, generator=rng("set"), dtype=torch.float64)
POOL = Pool.of(REAL, REAL_LABELS, "cpu", prepare)


def make(generator, dtype=torch.float64, **layers):
    net = networks.make("convnet2-instance-w32", classes=3, size=SIDE, generator=generator).to(dtype)
    for name, layer in layers.items():
        net.features.add_module(name, layer)
    return net


def run(config, images=IMAGES, labels=LABELS, **changes):
    settings = {"make_network": make, "prepare": prepare, "generator": rng(1)} | changes
    return train(images, labels, REAL, REAL_LABELS, config, **settings)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- mixing


def plain_mixed(config, generator, images=IMAGES, labels=LABELS):
    """The same draws, one image at a time."""
    uniform = torch.rand(len(labels), generator=generator, dtype=torch.float64).tolist()
    many = {"epoch": 1, "sample": len(labels)}.get(config.alpha)
    alphas = torch.rand(many, generator=generator).tolist() if many else [config.share]
    alphas = alphas * (len(labels) // len(alphas))
    return plain_mixing.mixed_epoch(images, labels, prepare(REAL), REAL_LABELS, uniform, alphas)


@pytest.mark.parametrize("alpha", ["epoch", "sample", "fixed"])
def test_mixed_images_are_those_of_the_plain_form(alpha):
    config = Config(alpha=alpha, share=0.3 if alpha == "fixed" else 0.5)
    before = IMAGES.clone()
    for seed in range(5):
        ours = mixed_epoch(IMAGES, LABELS, POOL, config, rng(seed))
        torch.testing.assert_close(ours, plain_mixed(config, rng(seed)), atol=1e-7, rtol=0)  # alpha is drawn in fp32
    assert torch.equal(IMAGES, before)


def test_equation_2_by_hand():
    s, x = torch.tensor([1.0, -2.0, 8.0]), torch.tensor([3.0, 6.0, -8.0])
    s, x = (t.view(3, 1, 1, 1).expand(3, 2, 2, 2) for t in (s, x))
    assert mix(s, x, torch.tensor(0.25))[:, 0, 0, 0].tolist() == [1.5, 0.0, 4.0]
    assert mix(s, x, 0.25)[:, 0, 0, 0].tolist() == [1.5, 0.0, 4.0]
    assert mix(s, x, torch.tensor([0.0, 0.5, 1.0]))[:, 0, 0, 0].tolist() == [1.0, 2.0, -8.0]


def test_the_ends_are_exact():
    """share=0 is the set itself, share=1 the real images themselves, nothing is clamped."""
    far = IMAGES * 100
    assert torch.equal(mixed_epoch(far, LABELS, POOL, Config(alpha="fixed", share=0.0), rng(0)), far)
    only = mixed_epoch(far, LABELS, POOL, Config(alpha="fixed", share=1.0), rng(0))
    assert torch.equal(only, POOL.draw(LABELS, rng(0)))


def coefficients(config, draws=2000):
    """Alpha of each image, [draws, M], read off a mix of zeros with ones."""
    pool = Pool.of(torch.ones(3, 1, 1, 1), torch.arange(3))
    generator, images = rng("alpha"), torch.zeros(len(LABELS), 1, 1, 1)
    return torch.stack([mixed_epoch(images, LABELS, pool, config, generator).flatten() for _ in range(draws)])


def test_what_alpha_is_drawn_from():
    epoch, sample = coefficients(Config()), coefficients(Config(alpha="sample"))
    assert (epoch == epoch[:, :1]).all() and (sample != sample[:, :1])[:, 1:].all()
    for found in (epoch[:, 0], sample[:, 4]):
        assert abs(found.mean() - 0.5) < 0.03 and abs(found.var() - 1 / 12) < 0.01 and found.max() > 0.99
    assert abs(torch.corrcoef(sample.T)[0, 1]) < 0.1
    fixed = coefficients(Config(alpha="fixed", share=0.3), 3)
    assert torch.allclose(fixed, torch.tensor(0.3))


def test_every_reading_of_alpha_meets_the_same_partners():
    seen = []

    class Seen(Pool):
        def draw(self, *arguments):
            seen.append(super().draw(*arguments))
            return seen[-1]

    pool = Seen(POOL.images, POOL.offset, POOL.count, POOL.prepare)
    for alpha in ("epoch", "sample", "fixed"):
        mixed_epoch(IMAGES, LABELS, pool, Config(alpha=alpha), rng(4))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("partner", ["class", "any"])
def test_partners_are_uniform_and_independent(partner):
    numbered = Pool.of(torch.arange(len(REAL_LABELS)).float()[:, None, None, None], REAL_LABELS)
    generator = rng("partners")
    found = torch.stack([numbered.draw(LABELS, generator, partner).flatten() for _ in range(4000)]).long()
    for i, label in enumerate(LABELS.tolist()):
        allowed = (label == REAL_LABELS).nonzero().flatten() if partner == "class" else torch.arange(len(REAL_LABELS))
        hits = found[:, i].bincount(minlength=len(REAL_LABELS))
        assert hits.sum() == hits[allowed].sum()
        expected = 4000 / len(allowed)
        assert (hits[allowed] - expected).square().sum() / expected < 3 * len(allowed) + 12  # chi squared
    pair = found[:, [0, 3]].double()  # two images of one class, drawn apart
    assert abs(torch.corrcoef(pair.T)[0, 1]) < 0.08


def test_the_pool_keeps_bytes_and_the_order_within_a_class():
    assert POOL.images.dtype == torch.uint8 and POOL.count.tolist() == list(COUNTS)
    for k in range(3):
        own = POOL.images[POOL.offset[k] : POOL.offset[k] + POOL.count[k]]
        assert torch.equal(own, REAL[k == REAL_LABELS])


def test_a_pool_without_labels():
    other = Pool.of(REAL, None, "cpu", prepare)
    assert torch.equal(other.draw(LABELS, rng(1), "any"), Pool.of(REAL, LABELS.new_zeros(20), "cpu", prepare).draw(
        LABELS.new_zeros(10), rng(1)))  # fmt: skip
    with pytest.raises(ValueError, match="partner='any'"):
        other.draw(LABELS, rng(1))


@pytest.mark.parametrize("space", [prepare, ZCA.fit(REAL).__call__])
def test_mixing_network_input_is_mixing_pixels(space):
    pixels = torch.rand(10, 3, SIDE, SIDE, generator=rng(8), dtype=torch.float64) * 300 - 20
    partners = POOL.images[:10].double()
    unit = (lambda x: x) if space is prepare else (lambda x: x / 255)
    alpha = torch.rand(10, generator=rng(9), dtype=torch.float64)
    ours = mix(space(unit(pixels)), space(unit(partners)), alpha)
    torch.testing.assert_close(ours, space(unit(mix(pixels, partners, alpha))))


# ---------------------------------------------------------------- training


def plain_train(config, augment=None, soft=None):
    """Epochs of the plain forms, from the formulas and DC's schedule, with the draws of ours."""
    seed = int(torch.randint(2**62, (), generator=rng(1)))
    net = make(natural_mixing.rng(seed, "network"))
    if config.optimizer == "adam":
        optimizer, passes = torch.optim.Adam(net.parameters(), lr=1e-3), config.epochs
    else:
        optimizer, passes = plain_sgd(net, 0.01), config.epochs + 1
    target, classes = (LABELS, LABELS) if soft is None else (soft, soft.argmax(1))
    criterion = nn.functional.cross_entropy if soft is None else plain_students.soft_cross_entropy
    for number in range(passes):
        mixed = plain_mixed(config, natural_mixing.rng(seed, "mix", number), labels=classes)
        order = torch.randperm(len(IMAGES), generator=natural_mixing.rng(seed, "order", number))
        draws = None
        if augment:
            sizes = [len(rows) for rows in order.split(config.batch)]
            draws = iter(
                augment.draw(n, natural_mixing.rng(seed, "augment", number, batch), siamese=False)
                for batch, n in enumerate(sizes)
            )
        plain_students.epoch(
            net, mixed, target, order, draws, optimizer=optimizer, batch=config.batch, criterion=criterion,
            augment=augment,
        )  # fmt: skip
        if config.optimizer == "sgd" and number == config.epochs // 2 + 1:
            optimizer = plain_sgd(net, 0.001)
    return net.state_dict()


def plain_sgd(net, lr):
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


@pytest.mark.parametrize(
    ("settings", "soft"),
    [
        ({"alpha": "sample"}, False), ({"optimizer": "sgd", "augment": True}, False),
        ({"alpha": "fixed", "share": 0.0}, False), ({"batch": 4}, True),
    ],
)  # fmt: skip
def test_a_student_is_that_of_the_plain_loop(settings, soft):
    config = Config(**{"epochs": 6, "batch": 7} | settings)
    labels = torch.randn(len(LABELS), 3, generator=rng("soft"), dtype=torch.float64) if soft else None
    augment = DiffAugment() if config.augment else None
    ours, wanted = run(config, augment=augment, soft_labels=labels), plain_train(config, augment, labels)
    assert ours.keys() == wanted.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], wanted[name], atol=1e-6, rtol=0)


def test_the_class_of_a_soft_label_is_its_largest_entry():
    """With partners of known classes and no rest of the set."""
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(1, 3)

        def forward(self, x):
            seen.append(x.flatten())
            return self.linear(x.flatten(1))

    soft = nn.functional.one_hot(torch.tensor([1, 2, 0]), 3).float() * 5
    pool = Pool.of(torch.tensor([10.0, 20, 30]).view(3, 1, 1, 1), torch.arange(3))
    config = Config(alpha="fixed", share=1.0, epochs=1)
    arguments = {"make_network": lambda _: Spy(), "generator": rng(0), "pool": pool}
    train(torch.zeros(3, 1, 1, 1), torch.zeros(3, dtype=torch.long), None, None, config, soft_labels=soft, **arguments)
    train(torch.zeros(3, 1, 1, 1), torch.zeros(3, dtype=torch.long), None, None, config, **arguments)
    assert sorted(seen[0].tolist()) == [10, 20, 30] and seen[1].tolist() == [10, 10, 10]


def test_with_and_without_mixing_a_seed_gives_the_same_weights_and_order():
    """Image i is filled with its number; real images, with their class."""
    images = torch.arange(len(LABELS)).double().view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)
    pool = Pool.of(torch.arange(3).double().view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE), torch.arange(3))
    seen, first = {}, {}
    for share in (0.0, 1.0):
        seen[share] = []

        def spied(generator, share=share):
            net = make(generator)
            first[share] = {name: t.clone() for name, t in net.state_dict().items()}
            net.register_forward_pre_hook(lambda _, args: seen[share].append(args[0][:, 0, 0, 0]))
            return net

        config = Config(alpha="fixed", share=share, epochs=3, batch=4)
        run(config, images, make_network=spied, pool=pool)
    assert same(first[0.0], first[1.0])
    order = torch.cat(seen[0.0]).long()
    assert LABELS[order].tolist() == torch.cat(seen[1.0]).long().tolist()
    assert len({tuple(epoch.tolist()) for epoch in order.split(10)}) == 3  # another order each epoch
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in order.split(10))


def test_two_seeded_runs_are_equal_and_leave_the_global_state():
    before = torch.get_rng_state()
    config = Config(epochs=2)
    dropout = {"make_network": lambda g: make(g, drop=nn.Dropout(0.5))}
    one, two, other = run(config, **dropout), run(config, **dropout), run(config, generator=rng(2), **dropout)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(one, two) and not same(one, other)
    torch.manual_seed(5)
    again = run(config, **dropout)
    torch.set_rng_state(before)
    assert same(again, one)


@pytest.mark.parametrize(("optimizer", "stop"), [("adam", 1), ("adam", 4), ("sgd", 2), ("sgd", 4), ("sgd", 5)])
def test_a_stopped_run_continues_bit_for_bit(optimizer, stop):
    """With running statistics, dropout and augmentation; sgd renews its optimiser before pass 5."""
    config = Config(optimizer=optimizer, epochs=6, batch=4, augment=True, alpha="sample")
    common = {
        "make_network": lambda g: make(g, torch.float32, norm=nn.BatchNorm2d(32), drop=nn.Dropout(0.3)),
        "augment": DiffAugment(), "images": IMAGES.float(),
    }  # fmt: skip
    whole, kept = run(config, **common), []

    def kill(state):
        kept.append(state.tensors())
        if state.epoch == stop:
            raise Killed

    with pytest.raises(Killed):
        run(config, on_step=kill, **common)
    assert [int(k["at"]) for k in kept] == list(range(1, stop + 1))
    resumed = run(config, state=State.restore(kept[-1]), generator=rng("another"), **common)
    assert same(resumed, whole)
    again = State.restore(kept[-1]).tensors()
    assert same(again, kept[-1])


def test_a_finished_state_is_only_read_back():
    kept = []
    config = Config(epochs=2)
    whole = run(config, on_step=lambda state: kept.append(state.tensors()))
    assert [int(k["at"]) for k in kept] == [1, 2]
    assert same(run(config, state=State.restore(kept[-1]), on_step=lambda _: pytest.fail("trained")), whole)
    assert same(run(config, state=State.restore(kept[0])), whole)  # a kept state does not follow the training


def test_a_shared_pool_is_the_same_and_nothing_is_changed():
    before, set_before = POOL.images.clone(), IMAGES.clone()
    config = Config(epochs=2)
    assert same(run(config), train(IMAGES, LABELS, None, None, config, make_network=make, generator=rng(1), pool=POOL))
    assert torch.equal(before, POOL.images) and torch.equal(set_before, IMAGES)


def test_bf16_is_close_to_fp32():
    images, net = IMAGES.float(), {"make_network": lambda g: make(g, torch.float32)}
    one, two = (run(Config(epochs=1, precision=p), images, **net) for p in ("fp32", "bf16"))
    assert not same(one, two)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=0.003, rtol=0)  # Adam's first step is 0.001 each


def test_a_student_learns():
    """Classes that lie apart; the set says nothing, the real images do."""
    images, labels = real(torch.float64, (30, 30, 30))
    images = images / 255 + labels[:, None, None, None]
    nothing = torch.zeros(9, 3, SIDE, SIDE, dtype=torch.float64)
    right = {}
    for share in (0.0, 1.0):
        net = networks.make("mlp", classes=3, size=SIDE, generator=rng(0)).double()
        config = Config(alpha="fixed", share=share, epochs=200)
        made = train(
            nothing, torch.arange(9) % 3, images, labels, config, generator=rng(0),
            make_network=lambda g: networks.make("mlp", classes=3, size=SIDE, generator=g).double(),
        )  # fmt: skip
        net.load_state_dict(made)
        right[share] = (net(images).argmax(1) == labels).double().mean()
    assert right[1.0] > 0.9 and right[0.0] < 0.6


# ---------------------------------------------------------------- settings and errors


def test_the_defaults_are_the_released_script():
    config = Config()
    assert (config.epochs, config.batch, config.optimizer, config.alpha) == (300, 256, "adam", "epoch")
    assert config.passes == 300 and {config.rate(e) for e in range(300)} == {1e-3} and not config.augment
    sgd = Config(optimizer="sgd")
    assert sgd.passes == 301 and [sgd.rate(e) for e in (0, 151, 152, 300)] == [0.01, 0.01, 0.001, 0.001]
    assert [e for e in range(301) if sgd.restarts(e)] == [0, 152] and Config(lr=0.5).rate(7) == 0.5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": "batch"}, "epoch, sample, fixed"), ({"share": 1.5}, "share=1.5 .* at most 1"),
        ({"share": -0.1}, "share=-0.1"), ({"share": 0.3}, "share=0.3 and alpha='epoch'.*allowed: alpha='fixed'"),
        ({"partner": "none"}, "class, any"), ({"epochs": 0}, "epochs=0"),
        ({"optimizer": "adamw"}, "adam, sgd"), ({"lr": -1.0}, "lr=-1"), ({"precision": "fp8"}, "fp32, bf16"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": LABELS[:4]}, "10 images and 4 labels"),
        ({"images": REAL[:10]}, "torch.uint8"),
        ({"labels": LABELS + 2}, "class 3 of the set has no real image"),
        ({"images": IMAGES[:, :1]}, r"real images are \[3, 8, 8\].*\[1, 8, 8\]"),
        ({"images": IMAGES[..., :4]}, r"\[3, 8, 8\].*\[3, 8, 4\]"),
        ({"prepare": None}, "torch.uint8"),
        ({"soft_labels": torch.zeros(4, 3)}, r"soft_labels=\(4, 3\); allowed: \[10, classes\]"),
        ({"augment": DiffAugment()}, "augment=False"),
        ({"pool": Pool.of(REAL, None, "cpu", prepare)}, "class 0 of the set has no real image"),
    ],
)
def test_wrong_data_is_named_before_any_network_is_made(changes, words):
    with pytest.raises(ValueError, match=words):
        run(Config(epochs=1), **{"make_network": lambda _: pytest.fail("too late")} | changes)


def test_real_images_or_a_pool_must_be_passed():
    with pytest.raises(ValueError, match="real_images=None and pool=None; allowed: images"):
        train(IMAGES, LABELS, None, None, Config(), make_network=make, generator=rng(1))


@pytest.mark.parametrize(
    ("labels", "words"), [(LABELS[:1], "1 labels of torch.int64"), (LABELS - 9, "the least of them -9"),
                          (LABELS.float(), "labels of torch.float32")],
)  # fmt: skip
def test_labels_of_an_epoch_that_do_not_fit_are_named(labels, words):
    pool = Pool.of(REAL, REAL_LABELS, "cpu", prepare)
    with pytest.raises(ValueError, match=f"10 images of the set have .*{words}"):
        mixed_epoch(IMAGES, labels, pool, Config(), rng(0))


def test_a_missing_class_in_the_middle_is_named():
    pool = Pool.of(REAL, torch.where(REAL_LABELS == 1, 0, REAL_LABELS), "cpu", prepare)
    with pytest.raises(ValueError, match="class 1 of the set"):
        pool.draw(LABELS, rng(0))
    assert pool.draw(LABELS[LABELS != 1], rng(0)).shape == (7, 3, SIDE, SIDE)


def test_augmentation_that_is_asked_for_must_be_passed():
    with pytest.raises(ValueError, match="augment=True, but none is"):
        run(Config(augment=True))


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [(REAL, REAL_LABELS[:3], "3 labels"), (REAL[:0], None, "no labels"), (REAL[0], None, r"\[3, 8, 8\]")],
)
def test_a_wrong_pool_is_named(images, labels, words):
    with pytest.raises(ValueError, match=words):
        Pool.of(images, labels, "cpu", prepare)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_handed_out():
    bad, kept = IMAGES.clone(), []
    bad[3] = torch.nan
    with pytest.raises(FloatingPointError, match="nan after pass 50;"):
        run(Config(epochs=60), bad)
    with pytest.raises(FloatingPointError, match="after pass 1;"):
        run(Config(epochs=3), bad, on_step=lambda state: kept.append(state.tensors()))
    assert kept == []


# ---------------------------------------------------------------- fractals


def test_fractal_maps_are_contractions_weighted_by_their_determinant():
    matrices, shifts, weights = random_maps(300, rng(0))
    assert matrices.shape == (300, 6, 2, 2) and shifts.shape == (300, 6, 2)
    assert torch.linalg.matrix_norm(matrices, 2).max() < 0.9001
    assert torch.allclose(weights.sum(1), torch.ones(300))
    present = weights > 0
    assert present.sum(1).unique().tolist() == [3, 4, 5, 6]
    area = torch.linalg.det(matrices).abs() * present
    assert torch.allclose(weights, area / area.sum(1, keepdim=True), atol=1e-5)


def test_points_lie_where_the_maps_put_them():
    """The measure of an iterated function system is invariant, so its mean solves m = sum_k w_k (A_k m + b_k)."""
    matrices, shifts, weights = random_maps(5, rng(1))
    points, colours = attractor(matrices, shifts, weights, 200, rng(2))
    pull = torch.einsum("fk,fkij->fij", weights, matrices)
    mean = torch.linalg.solve(torch.eye(2) - pull, torch.einsum("fk,fki->fi", weights, shifts))
    torch.testing.assert_close(points.mean(1), mean, atol=0.02, rtol=0)
    # Second moments: E z z' = sum_k w_k (A E z z' A' + A m b' + b m' A' + b b').
    second = torch.zeros(5, 2, 2)
    for _ in range(300):
        cross = torch.einsum("fkij,fj,fkl->fkil", matrices, mean, shifts)
        inner = torch.einsum("fkij,fjl,fkml->fkim", matrices, second, matrices)
        parts = inner + cross + cross.mT + shifts[..., None] * shifts[..., None, :]
        second = torch.einsum("fk,fkij->fij", weights, parts)
    torch.testing.assert_close(points.mT @ points / points.shape[1], second, atol=0.05, rtol=0.02)
    assert colours.min() >= 0 and colours.max() <= 1 and colours.std(1).min() > 0.02


@pytest.mark.parametrize(("count", "size", "channels"), [(40, 16, 3), (3, 9, 1)])
def test_fractals_are_repeatable_pictures(count, size, channels):
    before = torch.get_rng_state()
    one = fractal_pool(count, size, rng(0), channels)
    assert one.dtype == torch.uint8 and one.shape == (count, channels, size, size)
    assert torch.equal(one, fractal_pool(count, size, rng(0), channels))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(one.unique(dim=0)) == count and not torch.equal(one, fractal_pool(count, size, rng(1), channels))
    shown = one.float().amax(1).flatten(1)
    assert shown.std(1).min() > 2 and (shown > 0).float().mean() > 0.2


def test_fractals_reach_every_border():
    """The attractor fills the frame in both directions."""
    shown = fractal_pool(30, 32, rng(3)).amax(1) > 0
    assert shown[:, :2].any(2).any(1).all() and shown[:, -2:].any(2).any(1).all()
    assert shown[:, :, :2].any(2).any(1).all() and shown[:, :, -2:].any(2).any(1).all()


def test_fractals_want_a_size():
    with pytest.raises(ValueError, match="size=0"):
        fractal_pool(3, 0, rng(0))


# ---------------------------------------------------------------- the script, the benchmark, the copy rule


def script_run(tmp_path, capsys, *arguments):
    places = [f"store={tmp_path}/runs", f"out={tmp_path}/out", "device=cpu", "dataset=digits", "network=mlp"]
    script_mixing.run_mixing([*places, "epochs=3", *arguments], natural_mixing)
    return capsys.readouterr().out


def lines(text):
    return {line.split(":")[0]: line.split(":")[1] for line in text.splitlines() if " % on 360 test images" in line}


def test_the_script_on_random_real_images(tmp_path, capsys):
    found = lines(script_run(tmp_path, capsys, "ipc=2", "size=8", "cross=true", "students=2"))
    assert list(found) == ["set alone", "mixed", "set alone, augmented", "mixed, augmented"]
    assert all("±" in line for line in found.values()) and len(set(found.values())) > 1
    assert (tmp_path / "out" / "natural_mixing_digits.png").stat().st_size > 100
    again = lines(script_run(tmp_path, capsys, "ipc=2", "size=8", "cross=true", "students=2"))
    assert again == found  # from the store


def spied(monkeypatch):
    """What each training of the script is given."""
    seen = []

    def train_(images, *arguments, **settings):
        seen.append((images, settings))
        return train(images, *arguments, **settings)

    monkeypatch.setattr(natural_mixing, "train", train_)
    return seen


@pytest.mark.parametrize("layout", ["own", "dc", "whitened"])
def test_the_script_reads_distilled_sets(tmp_path, capsys, monkeypatch, layout):
    """Real images come into the space of the set: that of its constants, or whitened."""
    seen, pixels = spied(monkeypatch), torch.rand(20, 1, 8, 8, generator=rng(0)) * 1.2 - 0.1
    on = matching.task("digits", None, device=torch.device("cpu"), size=8, network="mlp", zca=True)
    whitening = {"zca_eps": 0.1, "size": 8, "fitted_on": on.train.fingerprint} if layout == "whitened" else None
    made = DistilledSet(pixels, torch.arange(20) % 10, tuple("0123456789"), (0.2,), (0.3,), whitening=whitening)
    file, given = tmp_path / "set.safetensors", []
    if layout == "dc":
        file, given = tmp_path / "res_DC_digits_2ipc.pt", ["normalisation=cifar10"]
        made = replace(made, mean=(0.4914,), std=(0.2023,))
        write_dc_pt(made, file)
    else:
        made.save(file)
    found = lines(script_run(tmp_path, capsys, f"set={file}", "size=8", *given))
    assert list(found) == ["set alone", "mixed"] and [s["pool"].images.shape[0] for _, s in seen] == [1437] * 2
    for images, settings in seen:
        wanted = on.zca if whitening else lambda x: (x - made.mean[0]) / made.std[0]
        torch.testing.assert_close(images, wanted(pixels), atol=1e-5, rtol=1e-5)
        real_images = settings["pool"].images[:5]
        ours = settings["pool"].prepare(real_images)
        torch.testing.assert_close(ours, wanted(real_images.float() / 255), atol=1e-5, rtol=1e-5)


def test_the_script_learns_soft_labels(tmp_path, capsys, monkeypatch):
    seen, soft = spied(monkeypatch), torch.randn(10, 10, generator=rng(0))
    images, labels = torch.rand(10, 1, 8, 8, generator=rng(1)), soft.argmax(1)
    DistilledSet(images, labels, tuple("0123456789"), (0.2,), (0.3,), soft_labels=soft).save(tmp_path / "a.safetensors")
    script_run(tmp_path, capsys, f"set={tmp_path / 'a.safetensors'}", "size=8")
    assert all(torch.equal(settings["soft_labels"], soft) for _, settings in seen) and len(seen) == 2


def test_the_script_mixes_other_images(tmp_path, capsys, monkeypatch):
    seen = spied(monkeypatch)
    script_run(tmp_path, capsys, "ipc=1", "size=8", "pool=fractals", "partner=any")
    (pool,) = {settings["pool"] for _, settings in seen}
    assert torch.equal(pool.images, fractal_pool(1000, 8, rng(0, "fractals"), 1))
    with pytest.raises(ValueError, match="partner='any'"):
        script_run(tmp_path, capsys, "ipc=1", "size=8", "pool=digits")


def test_the_script_takes_a_protocol(tmp_path, capsys, monkeypatch):
    """Any recipe: that of DC's students, on the set and on what it is mixed to at each of their passes."""
    monkeypatch.setitem(PROTOCOLS, "dc-2021", replace(PROTOCOLS["dc-2021"], epochs=3))
    asked, mixed_epoch = [], natural_mixing.mixed_epoch

    def spy(*arguments):
        asked.append(arguments)
        return mixed_epoch(*arguments)

    monkeypatch.setattr(natural_mixing, "mixed_epoch", spy)
    run = ["store=" + str(tmp_path / "runs"), f"out={tmp_path}", "device=cpu", "dataset=digits", "network=mlp", "ipc=2"]
    script_mixing.run_mixing([*run, "size=8", "protocol=dc-2021", "students=2"], natural_mixing)
    found = lines(capsys.readouterr().out)
    assert list(found) == ["set alone", "mixed"] and found["set alone"] != found["mixed"]
    assert len(asked) == 1 + 2 * PROTOCOLS["dc-2021"].passes  # the picture, and each pass of two students
    on = matching.task("digits", None, device=torch.device("cpu"), size=8, network="mlp")
    tensors = matching.random_subset(on, 2, 0)
    alone = matching.students(tmp_path, on, tensors, "dc-2021", [0, 1]).meta["accuracies"]
    assert f"{sum(alone) / 2:.2f}" in found["set alone"]


@pytest.mark.parametrize("more, words", [("epochs=5", "epochs=5"), ("cross=true", "cross=true")])
def test_a_protocol_has_its_own_recipe(more, words):
    with pytest.raises(UsageError, match=f"protocol=dc-2021 has its own recipe; leave out {words}"):
        script_mixing.run_mixing(["protocol=dc-2021", more], natural_mixing)
    with pytest.raises(UsageError, match="'hard-truths-soft' is not allowed"):
        script_mixing.run_mixing(["protocol=hard-truths-soft"], natural_mixing)


def test_a_killed_script_goes_on(tmp_path, capsys, monkeypatch):
    wanted = script_run(tmp_path / "whole", capsys, "ipc=1", "size=8", "alpha=sample")
    monkeypatch.setattr(Checkpoint, "due", lambda *_: True)
    begun = []

    def train_(*arguments, on_step, state=None, **settings):
        begun.append(state.epoch if state else 0)

        def kill(state):
            on_step(state)
            if state.epoch == 2 and len(begun) == 1:
                raise Killed

        return train(*arguments, on_step=kill, state=state, **settings)

    monkeypatch.setattr(natural_mixing, "train", train_)
    with pytest.raises(Killed):
        script_run(tmp_path, capsys, "ipc=1", "size=8", "alpha=sample")
    again = script_run(tmp_path, capsys, "ipc=1", "size=8", "alpha=sample")
    assert begun == [0, 2, 0] and lines(again) == lines(wanted)


def test_a_wrong_argument_of_the_script_is_named():
    for argument, words in (("sets=x", "set"), ("alpha=often", "epoch, sample, fixed")):
        with pytest.raises(UsageError, match=words):
            script_mixing.run_mixing([argument], natural_mixing)


def test_the_benchmark_runs():
    (case,) = CASES.values()
    for loop in (case.plain, case.forms["ours, fp32"].loop):
        answers = []

        def answer(answers=answers):
            answers.append(1)
            if len(answers) == 2:
                raise Killed

        with pytest.raises(Killed):
            loop(answer, torch.device("cpu"))


ALONE = """
import torch, natural_mixing as nm

def make_network(generator):
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 9, 3))

images, labels = torch.randn(6, 3, 5, 5), torch.arange(6) % 3
real, classes = torch.randn(30, 3, 5, 5), torch.arange(30) % 3
out = nm.train(images, labels, real, classes, nm.Config(epochs=2), make_network=make_network,
               generator=torch.Generator().manual_seed(0))
assert len(out) == 4 and all(t.isfinite().all() for t in out.values())
assert nm.fractal_pool(2, 5, torch.Generator().manual_seed(0)).shape == (2, 3, 5, 5)
print("alone")
"""


def test_the_file_runs_alone(tmp_path):
    assert said_alone("natural_mixing", ALONE, tmp_path) == "alone\n"
