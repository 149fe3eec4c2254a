"""Students against a plain loop with the released schedule, side by side against alone, resume, and the protocols."""

import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import plain_students
from common import networks, students
from common.augment import DiffAugment, rng
from common.protocols import PROTOCOLS, Protocol
from common.store import Checkpoint
from common.students import train_students

AUGMENT = DiffAugment()
CLASSES, SIZE = 3, 8


def maker(name="convnet2-instance-w32", dtype=torch.float64):
    return lambda generator: networks.make(name, classes=CLASSES, size=SIZE, generator=generator).to(dtype)


def images_of(count, seed, dtype=torch.float64, channels=3):
    """Each class has a pattern of its own under noise."""
    labels = torch.arange(count) % CLASSES
    patterns = torch.randn(CLASSES, channels, SIZE, SIZE, generator=rng("patterns"), dtype=torch.float64)
    noise = torch.randn(count, channels, SIZE, SIZE, generator=rng(seed), dtype=torch.float64)
    return (patterns[labels] + noise).to(dtype), labels


SET, TEST = images_of(20, "set"), images_of(60, "test")
SOFT = torch.randn(20, CLASSES, generator=rng("soft"), dtype=torch.float64)
QUICK = replace(PROTOCOLS["dsa-2021"], epochs=6, batch=8, lr=0.05)  # 7 passes of batches of 8, 8 and 4


def train(protocol=QUICK, seeds=(0,), **changes):
    settings = {"make_network": maker(), "dtype": torch.float64} | changes
    return train_students(*SET, *TEST, protocol=protocol, seeds=seeds, **settings)


class Each(Checkpoint):
    """Saves at every chance."""

    def due(self, step):
        return True


class Killed(Exception):
    pass


# ---------------------------------------------------------------- against the plain form


def plain(protocol, seed, lr=None, dtype=torch.float64, name="convnet2-instance-w32"):
    """Loss of the last pass, accuracy and network of the plain loop with the same orders and draws."""
    net = maker(name, dtype)(rng(seed, "student"))
    sizes = [len(rows) for rows in torch.arange(20).split(protocol.batch)]
    orders = (torch.randperm(20, generator=rng(seed, "order", e)) for e in range(protocol.passes))
    draws = (
        AUGMENT.draw(size, rng(seed, "augment", e, b), siamese=False)
        for e in range(protocol.passes)
        for b, size in enumerate(sizes)
    )
    soft = protocol.labels == "soft"
    loss = plain_students.train(
        net, SET[0].to(dtype), SOFT.to(dtype) if soft else SET[1], orders, draws if protocol.augment else None,
        epochs=protocol.epochs, lr=lr or protocol.lr, batch=protocol.batch,
        criterion=plain_students.soft_cross_entropy if soft else F.cross_entropy,
    )  # fmt: skip
    return loss, plain_students.test(net, TEST[0].to(dtype), TEST[1]), net


@pytest.mark.parametrize("name", ["convnet2-instance-w32", "convnet2-w32"])
@pytest.mark.parametrize("protocol", ["dc-2021", "dsa-2021", "mtt-2022", "datm-2024"])
@pytest.mark.parametrize("epochs", [6, 7])
def test_a_student_is_that_of_the_plain_loop(protocol, name, epochs):
    protocol, kept = replace(PROTOCOLS[protocol], epochs=epochs, batch=8), []

    def make(generator):
        kept.append(maker(name)(generator))
        return kept[-1]

    lr = 0.03 if protocol.lr is None else None
    loss, accuracy, net = plain(protocol, 5, lr, name=name)
    ours = train(protocol, (5,), lr=lr, soft_labels=SOFT, make_network=make)
    assert ours.losses == pytest.approx([loss], rel=1e-9)
    assert ours.accuracies == pytest.approx([accuracy])
    for own, wanted in zip(kept[-1].parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-11, rtol=1e-9)


def test_in_fp32_too():
    few = replace(QUICK, epochs=1)
    loss, _, _ = plain(few, 2, dtype=torch.float32)
    ours = train_students(
        SET[0].float(), SET[1], TEST[0].float(), TEST[1], protocol=few, seeds=(2,),
        make_network=maker(dtype=torch.float32),
    )  # fmt: skip
    assert ours.losses == pytest.approx([loss], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "optimizer"), [("mixing-2025", torch.optim.Adam), ("hard-truths-soft", torch.optim.AdamW)]
)
def test_adam_and_cosine(name, optimizer):
    """The two recipes that differ, written out; KL by the library's function."""
    protocol = replace(PROTOCOLS[name], epochs=5, augment="")
    net = maker()(rng(1, "student"))
    kwargs = {"weight_decay": 0.01} if optimizer is torch.optim.AdamW else {}
    adam = optimizer(net.parameters(), 1e-3, **kwargs)
    for epoch in range(5):
        if optimizer is torch.optim.AdamW:
            adam.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * epoch / 5)) / 2
            p, q = net(SET[0]) / 20, SOFT / 20
            loss = F.kl_div(p.log_softmax(1), q.log_softmax(1), log_target=True, reduction="batchmean")
        else:
            loss = F.cross_entropy(net(SET[0]), SET[1])
        adam.zero_grad()
        loss.backward()
        adam.step()
    ours = train(protocol, (1,), soft_labels=SOFT)
    assert ours.losses == pytest.approx([loss.item()], rel=1e-9)
    assert ours.accuracies == pytest.approx([plain_students.test(net, *TEST)])


# ---------------------------------------------------------------- the schedule and the protocols


@pytest.mark.parametrize(("epochs", "at_lr", "at_tenth"), [(300, 152, 149), (1000, 502, 499)])
def test_the_released_schedule(epochs, at_lr, at_tenth):
    """E + 1 passes, a tenth after pass E // 2 + 1, where the momentum is forgotten (13.8)."""
    protocol = Protocol("x", epochs=epochs)
    rates = [protocol.rate(0.01, e) for e in range(protocol.passes)]
    assert rates == pytest.approx([0.01] * at_lr + [0.001] * at_tenth)
    assert [e for e in range(protocol.passes) if protocol.restarts(e)] == [0, at_lr]


def test_other_schedules():
    constant, cosine = (Protocol("x", epochs=10, schedule=s) for s in ("constant", "cosine"))
    assert constant.passes == cosine.passes == 10
    assert [constant.rate(0.1, e) for e in (0, 9)] == [0.1, 0.1]
    assert [cosine.rate(0.1, e) for e in (0, 5)] == pytest.approx([0.1, 0.05])
    assert not any(p.restarts(e) for p in (constant, cosine) for e in range(1, 10))


def test_protocols_are_the_published_ones():
    dsa = "color_crop_cutout_flip_scale_rotate"
    facts = {n: (p.passes, p.batch, p.optimizer, p.lr, p.labels, p.augment) for n, p in PROTOCOLS.items()}
    assert facts == {
        "dc-2021": (301, 256, "sgd", 0.01, "hard", ""),
        "dsa-2021": (1001, 256, "sgd", 0.01, "hard", dsa),
        "dm-2023": (1001, 256, "sgd", 0.01, "hard", dsa),
        "mtt-2022": (1001, 256, "sgd", None, "hard", dsa),
        "datm-2024": (1001, 128, "sgd", None, "soft", dsa),
        "dcbench-2022": (1001, 256, "sgd", 0.01, "hard", dsa),
        "dcbench-2022-plain": (301, 256, "sgd", 0.01, "hard", ""),
        "mixing-2025": (300, 256, "adam", 1e-3, "hard", ""),
        "mixing-2025-dsa": (300, 256, "adam", 1e-3, "hard", dsa),
        "hard-truths-hard": (301, 256, "sgd", 0.01, "hard", dsa),
        "hard-truths-soft": (300, 256, "adamw", 1e-3, "kl", dsa),
        "hard-truths-online": (300, 256, "adamw", 1e-3, "online", dsa),
    }
    rest = {n: (p.schedule, p.momentum, p.weight_decay, p.temperature) for n, p in PROTOCOLS.items()}
    for name in ("mixing-2025", "mixing-2025-dsa"):
        assert rest.pop(name) == ("constant", 0.0, 0.0, 1.0)
    for name in ("hard-truths-soft", "hard-truths-online"):
        assert rest.pop(name) == ("cosine", 0.0, 0.01, 20.0)
    assert set(rest.values()) == {("step-half", 0.9, 5e-4, 1.0)}
    for p in PROTOCOLS.values():
        assert p.source
        assert p.optimizer != "sgd" or (p.momentum, p.weight_decay) == (0.9, 5e-4)


def test_the_strategy_of_the_protocol_is_used():
    own, given, other = train(), train(augment=AUGMENT), train(augment=DiffAugment("rotate"))
    assert own.losses == given.losses != other.losses


# ---------------------------------------------------------------- side by side


@pytest.mark.parametrize("name", ["dsa-2021", "datm-2024", "mixing-2025", "hard-truths-soft"])
@pytest.mark.parametrize("side_by_side", [2, 3])
def test_a_student_does_not_depend_on_its_company(name, side_by_side):
    protocol, options = replace(PROTOCOLS[name], epochs=6, batch=8), {"lr": 0.03, "soft_labels": SOFT}
    seeds = (4, 1, 7)
    alone = [train(protocol, (seed,), **options) for seed in seeds]
    together = train(protocol, seeds, side_by_side=side_by_side, looks=2, **options)
    assert together.losses == pytest.approx([s.losses[0] for s in alone], rel=1e-9)
    assert together.accuracies == pytest.approx([s.accuracies[0] for s in alone])
    assert len(set(together.losses)) == 3  # each has its own network, order and augmentation
    assert all(b >= a for a, b in zip(together.accuracies, together.best, strict=True))


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 16), nn.ReLU(), nn.Dropout(0.5))
        self.last = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.last(self.body(x))


class Branches(nn.Module):
    """Looks at its numbers, which vmap does not allow."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3 * SIZE**2, CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        return self.last(x if x.mean().item() < 100 else x / 2)


def own_maker(kind):
    def make(generator):
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return kind().double()

    return make


OWN = {"batch norm": maker("convnet2-w32"), "dropout": own_maker(Drops), "branches": own_maker(Branches)}


@pytest.mark.parametrize("kind", OWN)
def test_networks_that_do_not_stack_go_one_after_the_other(kind):
    alone, together = (train(seeds=(0, 1), make_network=OWN[kind], side_by_side=n) for n in (1, 2))
    assert alone.losses == together.losses and alone.accuracies == together.accuracies


def test_dropout_drops():
    still = train(make_network=lambda g: own_maker(Drops)(g).eval())
    assert train(make_network=own_maker(Drops)).losses == still.losses  # training mode is set, whatever it was
    none = own_maker(Drops)

    def without(generator):
        net = none(generator)
        net.body[3].p = 0.0
        return net

    assert train(make_network=without).losses != still.losses


def test_what_a_network_draws_depends_on_the_place():
    """A seed of its own for each (student, pass, batch), the same in every run."""

    class Looks(Drops):
        def forward(self, x):
            if self.training:
                seen.append(torch.initial_seed())
            return super().forward(x)

    runs = []
    for _ in range(2):
        seen = []
        train(seeds=(0, 1), make_network=own_maker(Looks))
        runs.append(seen[1:])  # the first call only asks whether the network stacks
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == len(runs[0]) == 2 * 7 * 3


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("options", "protocol"),
    [
        ({"side_by_side": 1}, "dsa-2021"),
        ({"side_by_side": 2}, "dsa-2021"),
        ({"side_by_side": 2}, "datm-2024"),
        ({"side_by_side": 2, "looks": 2}, "hard-truths-soft"),
        ({"make_network": OWN["batch norm"]}, "dc-2021"),
        ({"make_network": OWN["dropout"]}, "mixing-2025"),
        ({"side_by_side": 2, "keep": True, "mix": lambda seed, epoch: noisy(seed, epoch)}, "mixing-2025"),
    ],
)
@pytest.mark.parametrize("stop", [1, 5, 7, 9])
def test_a_killed_run_continues_bit_for_bit(tmp_path, options, protocol, stop):
    """Also around the new optimiser of pass 5, between students and in the second of them."""
    protocol = replace(PROTOCOLS[protocol], epochs=6, batch=8)
    options = {"lr": 0.03, "soft_labels": SOFT, "seeds": (3, 8, 2)} | options
    whole = train(protocol, **options)
    passes = []

    def kill(done, total):
        passes.append((done, total))
        if len(passes) == stop:
            raise Killed

    with pytest.raises(Killed):
        train(protocol, checkpoint=Each(tmp_path / "state"), on_epoch=kill, **options)
    resumed = train(protocol, checkpoint=Each(tmp_path / "state"), on_epoch=lambda *at: passes.append(at), **options)
    assert replace(resumed, seconds=0, networks=[]) == replace(whole, seconds=0, networks=[])
    assert len(resumed.networks) == len(whole.networks) == 3 * options.get("keep", False)
    for one, other in zip(resumed.networks, whole.networks, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    done, total = [done for done, _ in passes], passes[0][1]
    assert sorted(set(done)) == list(range(1, total + 1))
    assert len(done) == total + (stop % protocol.passes == 0)  # a group's last pass is not kept before it is tested


def test_a_finished_run_is_read_back(tmp_path):
    whole = train(seeds=(0, 1), checkpoint=Each(tmp_path / "state"))
    seen = []
    again = train(seeds=(0, 1), checkpoint=Each(tmp_path / "state"), on_epoch=lambda *at: seen.append(at))
    assert replace(again, seconds=0) == replace(whole, seconds=0) and seen == []


def test_students_in_the_checkpoint_stay_together(tmp_path):
    """A run begun on a GPU, say, with two side by side goes on so elsewhere."""

    def kill(done, _):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        train(seeds=(0, 1), side_by_side=2, checkpoint=Each(tmp_path / "state"), on_epoch=kill)
    resumed = train(seeds=(0, 1), checkpoint=Each(tmp_path / "state"))
    assert resumed.losses == train(seeds=(0, 1), side_by_side=2).losses


# ---------------------------------------------------------------- mixtures, kept networks, a teacher that looks on


def noisy(seed, epoch):
    return SET[0] + torch.randn(SET[0].shape, generator=rng("noise", seed, epoch), dtype=torch.float64)


def test_a_pass_is_on_the_mixture_of_its_seed_and_epoch():
    protocol, asked = replace(PROTOCOLS["dc-2021"], epochs=3, batch=20), []

    def recorded(seed, epoch):
        asked.append((seed, epoch))
        return noisy(seed, epoch)

    both = train(protocol, seeds=(4, 5), side_by_side=2, mix=recorded)
    assert asked == [(seed, epoch) for epoch in range(4) for seed in (4, 5)]
    apart = [train(protocol, seeds=(seed,), mix=noisy).losses[0] for seed in (4, 5)]
    assert both.losses == pytest.approx(apart, rel=1e-9)
    assert train(protocol, seeds=(4, 5)).losses != pytest.approx(apart, rel=1e-3)
    same = train(protocol, seeds=(4, 5), mix=lambda seed, epoch: SET[0]).losses
    assert same == train(protocol, seeds=(4, 5)).losses


@pytest.mark.parametrize("side_by_side", [1, 2])
def test_kept_networks_are_those_that_were_tested(side_by_side):
    found = train(seeds=(0, 1, 2), side_by_side=side_by_side, keep=True)
    for accuracy, state in zip(found.accuracies, found.networks, strict=True):
        net = maker()(rng(0))
        net.load_state_dict(state)
        assert plain_students.test(net, TEST[0], TEST[1]) == pytest.approx(accuracy)


def test_an_online_teacher_sees_what_the_student_sees():
    """A teacher that looks nothing up: without augmentation it is the same as its labels of the images."""
    net = maker()(rng("teacher"))
    labels = net(SET[0]).detach()
    stored = replace(PROTOCOLS["hard-truths-soft"], epochs=4, batch=8, augment="")
    online = replace(PROTOCOLS["hard-truths-online"], epochs=4, batch=8, augment="")
    options = {"seeds": (0, 1), "side_by_side": 2}
    theirs = train(stored, soft_labels=labels, **options).losses
    assert train(online, teacher=net, **options).losses == pytest.approx(theirs, rel=1e-9)
    seen = []
    train(replace(online, augment=PROTOCOLS["hard-truths-online"].augment), teacher=lambda x: seen.append(x) or net(x))
    assert not any(torch.isclose(x[:, None], SET[0][None]).flatten(2).all(2).all() for x in seen)


# ---------------------------------------------------------------- the rest


def test_seeds_repeat_and_leave_the_global_state():
    before = torch.get_rng_state()
    one, two = train(seeds=(0, 1)), train(seeds=(0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.losses == two.losses and one.losses[0] != one.losses[1]


def test_students_learn_and_bytes_are_prepared():
    pixels = (SET[0] * 20 + 100).clamp(0, 255).byte(), (TEST[0] * 20 + 100).clamp(0, 255).byte()
    prepare = lambda x: (x.float() - 100) / 20  # noqa: E731
    protocol = replace(PROTOCOLS["dc-2021"], epochs=20)
    make = maker(dtype=torch.float32)
    found = train_students(
        prepare(pixels[0]), SET[1], pixels[1], TEST[1], make_network=make, protocol=protocol, seeds=(0, 1),
        prepare=prepare, looks=5,
    )  # fmt: skip
    assert min(found.accuracies) > 70
    assert len(found.best) == 2 and found.seconds > 0
    assert [len(c) for c in found.curves] == [5, 5] and [c[-1] for c in found.curves] == found.accuracies  # 21 passes
    same = train_students(
        prepare(pixels[0]), SET[1], prepare(pixels[1]), TEST[1], make_network=make, protocol=protocol, seeds=(0, 1)
    )
    assert same.accuracies == found.accuracies and same.best == []


def test_looks_may_be_named_and_change_nothing():
    protocol = replace(PROTOCOLS["dc-2021"], epochs=6)
    plain, looked = train(protocol, (0,)), train(protocol, (0,), looks=(1, 2, 5))
    assert looked.losses == plain.losses and looked.accuracies == plain.accuracies
    assert len(looked.curves[0]) == 4 and looked.curves[0][-1] == plain.accuracies[0]
    assert looked.curves[0][1] == train(protocol, (0,), looks=2).curves[0][0]


def test_bf16_stays_close():
    protocol = replace(PROTOCOLS["dc-2021"], epochs=3)
    exact, low = (
        train_students(
            SET[0].float(), SET[1], TEST[0].float(), TEST[1], make_network=maker(dtype=torch.float32),
            protocol=protocol, seeds=(0,), dtype=dtype,
        )
        for dtype in (torch.float32, torch.bfloat16)
    )  # fmt: skip
    assert low.losses != exact.losses
    assert low.losses == pytest.approx(exact.losses, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("side_by_side", [1, 2])
def test_compiled_students_are_the_eager_ones(side_by_side):
    if shutil.which("c++") is None:
        pytest.skip("compiling needs a C++ compiler")
    protocol = replace(QUICK, epochs=2, batch=20)
    make = maker("convnet1-instance-w32")
    eager = train(protocol, (0, 1), make_network=make)
    compiled = train(protocol, (0, 1), make_network=make, side_by_side=side_by_side, compile=True)
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-6)
    assert compiled.accuracies == pytest.approx(eager.accuracies)


@pytest.mark.parametrize("side_by_side", [1, 3])
def test_a_loss_that_is_not_finite_stops_with_the_student_and_the_pass(side_by_side):
    broken = maker()(rng(9, "student")).classifier.weight

    def make(generator):
        net = maker()(generator)
        if torch.equal(net.classifier.weight, broken):
            nn.init.constant_(net.classifier.bias, math.nan)
        return net

    with pytest.raises(FloatingPointError, match=r"student 9 is nan after pass 7 of 7 .* 'dsa-2021' \(lr=0.05\)"):
        train(seeds=(7, 8, 9), make_network=make, side_by_side=side_by_side)


@pytest.mark.parametrize(
    ("protocol", "options", "words"),
    [
        ("dm-2024", {}, r"protocol='dm-2024' is unknown; allowed: dc-2021, dsa-2021, dm-2023, .*, hard-truths-soft"),
        ("dc-2021", {"augment": AUGMENT}, "'dc-2021' trains without augmentation"),
        ("mtt-2022", {}, "learned with the images; lr=None"),
        ("mtt-2022", {"lr": -0.01}, "lr=-0.01 is not above 0"),
        ("mtt-2022", {"lr": math.nan}, "lr=nan is not above 0"),
        ("datm-2024", {"lr": 0.01}, r"soft_labels=None, allowed: \[20, classes\]"),
        ("datm-2024", {"lr": 0.01, "soft_labels": SOFT[:4]}, r"soft_labels=\(4, 3\)"),
        ("hard-truths-online", {}, "labels='online'; a teacher goes with"),
        ("dc-2021", {"teacher": lambda x: x}, "labels='hard'; a teacher goes with labels='online' alone"),
        ("dc-2021", {"seeds": ()}, "seeds are empty"),
        ("dc-2021", {"side_by_side": -1}, "side_by_side=-1"),
        ("dc-2021", {"looks": -1}, "looks=-1"),
        ("dc-2021", {"looks": (0, 2)}, r"looks=\(0, 2\)"),
    ],
)
def test_what_does_not_fit_is_named(protocol, options, words):
    with pytest.raises(ValueError, match=words):
        train(protocol, **options)


def test_wrong_images_are_named():
    call = {"make_network": maker(), "protocol": "dc-2021", "seeds": (0,)}
    with pytest.raises(ValueError, match="20 images and 3 labels"):
        train_students(SET[0], SET[1][:3], *TEST, **call)
    with pytest.raises(ValueError, match="60 test images and 2 labels"):
        train_students(*SET, TEST[0], TEST[1][:2], **call)
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        train_students(SET[0].byte(), SET[1], *TEST, **call)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"optimizer": "lion"}, "sgd, adam, adamw"),
        ({"schedule": "linear"}, "step-half"),
        ({"labels": "mixed"}, "hard, soft, kl"),
        ({"lr": 0.0}, "lr=0.0"),
    ],
)
def test_wrong_protocols_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Protocol("x", **settings)


def test_losses_of_a_group():
    """Means over the batch, one for each student."""
    logits = torch.randn(2, 5, 3, generator=rng(1), dtype=torch.float64)
    hard, soft = torch.randint(3, (2, 5), generator=rng(2)), torch.randn(2, 5, 3, generator=rng(3)).double()
    for labels, target, one in (
        ("hard", hard, F.cross_entropy),
        ("soft", soft, plain_students.soft_cross_entropy),
        ("kl", soft, lambda z, y: F.kl_div((z / 4).log_softmax(1), (y / 4).softmax(1), reduction="batchmean")),
    ):
        protocol = Protocol("x", labels=labels, temperature=4.0 if labels == "kl" else 1.0)
        wanted = torch.stack([one(z, y) for z, y in zip(logits, target, strict=True)])
        torch.testing.assert_close(students.student_losses(logits, target, protocol), wanted, atol=1e-12, rtol=1e-9)
        factor = 16 if labels == "kl" else 1
        squared = students.student_losses(logits, target, replace(protocol, t_squared=True))
        torch.testing.assert_close(squared, factor * wanted, atol=1e-12, rtol=1e-9)
        assert ("t_squared" in replace(protocol, t_squared=True).settings()) and "t_squared" not in protocol.settings()
        count = torch.tensor([[3, 0, 1, 1, 2], [1, 2, 4, 0, 1]])  # a weight is worth as many copies of the image
        copies = [
            (z.repeat_interleave(n, 0), y.repeat_interleave(n, 0))
            for z, y, n in zip(logits, target, count, strict=True)
        ]
        wanted = torch.stack([one(z, y) for z, y in copies])
        found = students.student_losses(logits, target, protocol, count.double())
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-9)


def test_students_learn_by_the_weights_of_their_images():
    """A weight of 0 is an image that is not there; what all weigh alike is as without weights."""
    images, labels = torch.randn(8, 3, 8, 8, generator=rng(5)), torch.arange(8) % 2
    make = lambda g: networks.make("mlp", classes=2, size=8, generator=g)  # noqa: E731
    train = lambda **more: train_students(  # noqa: E731
        images, labels, images, labels, make_network=make, protocol=Protocol("x", epochs=3, batch=8), seeds=(0, 1),
        keep=True, side_by_side=2, **more,
    )  # fmt: skip
    plain, same = train(), train(weights=torch.full((8,), 2.0))
    for one, other in zip(plain.networks, same.networks, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    few = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0])
    first = train(weights=few)
    images = torch.cat([images[:4], torch.randn(4, 3, 8, 8, generator=rng(6))])
    for one, other in zip(first.networks, train(weights=few).networks, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert not torch.equal(*(next(iter(found.networks[0].values())) for found in (first, plain)))
    with pytest.raises(ValueError, match="needs one for each of 8 images, none below 0"):
        train(weights=-few)


def test_a_last_batch_that_batch_norm_cannot_take_is_named():
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.norm(self.conv(x)).flatten(1))

    images, labels = torch.randn(5, 3, 8, 8, generator=rng(0)), torch.arange(5) % 2
    protocol = Protocol("own", epochs=1, batch=4)
    given = {"make_network": lambda _: Narrow(), "seeds": [0]}
    with pytest.raises(ValueError, match="5 images in batches of 4 leave a last one of a single image"):
        train_students(images, labels, images, labels, protocol=protocol, **given)
    assert train_students(images, labels, images, labels, protocol=replace(protocol, batch=5), **given).accuracies
