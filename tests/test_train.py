"""The training loop: losses against formulas, streams, stored and recomputed labels, exact resume, bad input."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from common import networks
from common.augment import apply_cutmix, rng
from common.datasets import Dataset
from common.hardware import resolve_device, resolve_precision
from common.labels import Fixed, Online, Stored, kd_loss, relabel
from common.store import Checkpoint
from common.train import accuracy, fit
from common.views import Recipe, learning_rate, normalise, steps_per_epoch, views

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture
def data() -> Dataset:
    g = rng("data")
    images = torch.randint(0, 256, (30, 3, 20, 20), dtype=torch.uint8, generator=g)
    return Dataset("random", images, torch.arange(30) % 3, ("a", "b", "c"), MEAN, STD, None, "x")


def network(seed=0):
    return networks.make("convnet2", classes=3, size=16, generator=rng(seed))


def student(data, recipe, soft=None, dropout=0.0, **more):
    net = torch.nn.Sequential(torch.nn.Dropout(dropout), network(1)) if dropout else network(1)
    net = fit(net, data, recipe, size=16, seed=7, device=CPU, soft=soft, **more)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_kd_loss_is_the_kl_divergence_by_its_formula():
    student, teacher = torch.randn(5, 4, generator=rng(0)).double(), torch.randn(5, 4, generator=rng(1)).double()
    total = 0.0
    for z, t in zip(student / 20, teacher / 20, strict=True):
        p, q = z.exp() / z.exp().sum(), t.exp() / t.exp().sum()
        total += sum((q[k] * (q[k] / p[k]).log()).item() for k in range(4))
    assert kd_loss(student, teacher, 20.0).item() == pytest.approx(total / 5, rel=1e-4)
    assert kd_loss(teacher, teacher, 20.0).item() == pytest.approx(0, abs=1e-8)


def test_kd_loss_at_high_temperature_is_a_small_squared_distance():
    """|z_T - z_S|^2 / (2 K T^2) with centred logits, and no factor T^2."""
    student, teacher = torch.randn(64, 10, generator=rng(0)), torch.randn(64, 10, generator=rng(1))
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    assert kd_loss(student, teacher, 20.0).item() == pytest.approx((gap.square().sum(1).mean() / 8000).item(), rel=0.01)


def test_kd_weights_are_relative():
    student, teacher, w = torch.randn(6, 4), torch.randn(6, 4), torch.rand(6) + 0.1
    assert kd_loss(student, teacher, 2.0, torch.full((6,), 0.3)).item() == pytest.approx(
        kd_loss(student, teacher, 2.0).item()
    )
    single = torch.stack([kd_loss(student[i : i + 1], teacher[i : i + 1], 2.0) for i in range(6)])
    assert kd_loss(student, teacher, 2.0, w).item() == pytest.approx(((w * single).sum() / w.sum()).item(), rel=1e-5)


@pytest.mark.parametrize(("n", "batch", "steps"), [(30, 10, 3), (31, 10, 3), (32, 10, 4), (5, 10, 1), (1, 10, 1)])
def test_a_rest_of_one_image_is_left_out(n, batch, steps):
    assert steps_per_epoch(n, batch) == steps


def test_a_stream_starts_anywhere_with_the_same_views(data):
    recipe = Recipe(epochs=3, batch=10)
    whole = list(views(data, recipe, 16, seed=3))
    for start in (0, 4, 8):
        for late, view in zip(views(data, recipe, 16, 3, start), whole[start:], strict=True):
            assert late.step == view.step and torch.equal(late.pixels, view.pixels)
    assert sorted(torch.cat([v.indices for v in whole[:3]]).tolist()) == list(range(30))
    assert not torch.equal(whole[0].pixels, next(views(data, recipe, 16, seed=4)).pixels)
    for name in ("indices", "pixels", "permutation"):  # drawn anew for every epoch and batch
        assert not torch.equal(getattr(whole[0], name), getattr(whole[3], name))
        assert not torch.equal(getattr(whole[0], name), getattr(whole[1], name))


def test_a_replayed_batch_gives_the_mixed_pixels_and_the_teachers_logits(data):
    recipe, teacher = Recipe(epochs=2, batch=10), network()
    logits = relabel(teacher, data, recipe, size=16, seed=3, device=CPU, dtype=torch.float32)
    assert logits.shape == (6, 10, 3) and logits.dtype == torch.float16
    plain = replace(recipe, cutmix=False)
    for view, before in zip(views(data, recipe, 16, 3), views(data, plain, 16, 3), strict=True):
        outside = (view.pixels == before.pixels).all(1)  # [B, H, W]
        partner = apply_cutmix(before.pixels, view.permutation, (0, 16, 0, 16))
        assert ((view.pixels == partner).all(1) | outside).all()
        with torch.no_grad():
            wanted = teacher(normalise(view.pixels, MEAN, STD))
        torch.testing.assert_close(logits[view.step].float(), wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_and_recomputed_labels_give_the_same_student(data, dtype):
    recipe, teacher = Recipe(epochs=4, batch=10), network()
    logits = relabel(teacher, data, recipe, size=16, seed=7, device=CPU, dtype=dtype)
    one = student(data, recipe, Stored(logits), dtype=dtype)
    two = student(data, recipe, Online(teacher, dtype), dtype=dtype)
    assert torch.equal(one, two)


def test_a_teacher_may_normalise_by_the_statistics_of_the_views(data):
    """As SRe2L's script for CIFAR has it, but for its running statistics, which stay here."""
    recipe, teacher = Recipe(epochs=2, batch=10), network()
    running = {name: value.clone() for name, value in teacher.state_dict().items() if "running" in name}
    options = {"device": CPU, "dtype": torch.float32}
    kept = relabel(teacher, data, recipe, size=16, seed=7, batch_statistics=True, **options)
    plain = relabel(network(), data, recipe, size=16, seed=7, **options)
    (view, *_) = views(data, recipe, 16, 7)
    with torch.no_grad():
        wanted = network().train()(normalise(view.pixels, MEAN, STD))
    torch.testing.assert_close(kept[0].float(), wanted, atol=2e-3, rtol=2e-3)
    assert not torch.allclose(kept[0], plain[0], atol=0.1)
    assert all(torch.equal(teacher.state_dict()[name], value) for name, value in running.items())
    one = student(data, recipe, Stored(kept), dtype=torch.float32)
    assert torch.equal(one, student(data, recipe, Online(network(), torch.float32, None, True), dtype=torch.float32))


def test_a_fixed_label_is_that_of_the_image_as_it_is(data):
    """Whatever the view; images of another size are brought to that of the student first."""
    teacher = network()
    fixed = Fixed(teacher, data, 16, torch.float32)
    with torch.no_grad():
        wanted = teacher(normalise(data.center(16), MEAN, STD))
    torch.testing.assert_close(fixed.kept.float(), wanted, atol=2e-3, rtol=2e-3)
    rows, two = torch.tensor([3, 0, 3]), torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for step, view in enumerate(two):
        assert torch.equal(fixed(step, view, rows, rows, rows), fixed.kept[rows])


def test_students_learn_fixed_labels(data):
    """Each row of a batch meets the label of its own image: with one step the loss is that of a plain loop."""
    recipe, teacher = Recipe(epochs=1, batch=len(data), cutmix=False), network()
    history, fixed = [], Fixed(teacher, data, 16, torch.float32)
    fit(network(), data, recipe, size=16, seed=7, device=CPU, dtype=torch.float32, soft=fixed, history=history)
    (view,) = views(data, recipe, 16, 7)
    net, losses = network().train(), []
    with torch.no_grad():
        logits = net(normalise(view.pixels, MEAN, STD))
        for said, row in zip(logits, view.indices, strict=True):
            q, p = (fixed.kept[row].float() / 20).softmax(0), (said / 20).softmax(0)
            losses.append((q * (q / p).log()).sum())
    assert history[0][1] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_less_than_the_logits_may_be_kept(data):
    """Two numbers an image, stored or recomputed: the same student, and not the one of the whole logits."""
    recipe, teacher = Recipe(epochs=2, batch=10), network()

    def keep(logits, y, partner):
        log_p = logits.log_softmax(1)
        return -torch.stack([log_p.gather(1, k[:, None])[:, 0] for k in (y, partner)], 1)

    def loss(logits, kept, y, partner):
        return (keep(logits, y, partner) - kept).abs().sum(1).mean()

    kept = relabel(teacher, data, recipe, size=16, seed=7, device=CPU, dtype=torch.float32, keep=keep)
    assert kept.shape == (6, 10, 2)
    (view, *_) = views(data, recipe, 16, 7)
    y = data.labels[view.indices]
    with torch.no_grad():
        wanted = keep(teacher(normalise(view.pixels, MEAN, STD)), y, y[view.permutation])
    torch.testing.assert_close(kept[0].float(), wanted, atol=2e-3, rtol=2e-3)
    one = student(data, recipe, Stored(kept), loss=loss, dtype=torch.float32)
    assert torch.equal(one, student(data, recipe, Online(teacher, torch.float32, keep), loss=loss, dtype=torch.float32))
    assert not torch.equal(one, student(data, recipe, Online(teacher, torch.float32), dtype=torch.float32))


@pytest.mark.parametrize(("optimizer", "dropout"), [("adamw", 0.0), ("sgd", 0.0), ("sgd", 0.3)])
@pytest.mark.parametrize("stop", [1, 5, 6, 11, 12])
def test_a_killed_run_continues_bit_for_bit(data, tmp_path, optimizer, dropout, stop):
    recipe = Recipe(epochs=4, batch=10, optimizer=optimizer, lr=0.01, labels="hard")
    seen = {"history": [], "on_epoch": lambda epoch, net: epoch + 0.5, "dropout": dropout}
    whole = student(data, recipe, **seen)
    assert [row[0] for row in seen["history"]] == [0, 1, 2, 3] and seen["history"][2][2] == 2.5

    class Killed(Exception):
        pass

    class Killing(Checkpoint):
        def due(self, step):
            return step == stop

        def save(self, tensors, meta):
            super().save(tensors, meta)
            raise Killed

    path, again = tmp_path / "state.safetensors", {**seen, "history": []}
    with pytest.raises(Killed):
        student(data, recipe, checkpoint=Killing(path), **{**seen, "history": []})
    assert torch.equal(student(data, recipe, checkpoint=Checkpoint(path), **again), whole)
    assert again["history"] == seen["history"]


def test_hard_labels_are_mixed_as_the_pixels_are(data):
    """One step of SGD on CutMix labels equals the step on the mixture of both cross-entropies."""
    recipe = Recipe(epochs=1, batch=30, labels="hard", optimizer="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
    net = network(1).train()
    (view,) = views(data, recipe, 16, 7)
    z = net(normalise(view.pixels, MEAN, STD))
    y = data.labels[view.indices]
    loss = (1 - view.share) * F.cross_entropy(z, y) + view.share * F.cross_entropy(z, y[view.permutation])
    loss.backward()
    wanted = torch.cat([(p - 0.1 * p.grad).detach().flatten() for p in net.parameters()])
    torch.testing.assert_close(student(data, recipe, dtype=torch.float32), wanted, atol=1e-6, rtol=1e-4)


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_last_good_state(data, tmp_path):
    checkpoint = Checkpoint(tmp_path / "state.safetensors", every_steps=1)
    recipe = Recipe(epochs=40, batch=10, labels="hard", optimizer="sgd", lr=1e30)
    with pytest.raises(FloatingPointError, match=r"not finite at step \d+ .*lr=1e\+30"):
        student(data, recipe, checkpoint=checkpoint)
    state = checkpoint.load()
    assert state is None or all(v.isfinite().all() for v in state[0].values() if v.is_floating_point())


def test_accuracy_counts_right_answers(data):
    class Oracle(torch.nn.Module):
        def forward(self, x):
            return F.one_hot(((x[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255).round().long() % 3, 3).float()

    images = torch.zeros(9, 3, 16, 16, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(9)
    labels = torch.arange(9) % 3
    labels[:3] = (labels[:3] + 1) % 3
    assert accuracy(Oracle(), images, labels, data, device=CPU, dtype=torch.float32, batch=4) == pytest.approx(
        100 * 6 / 9
    )


def test_schedules_by_their_formulas():
    def rates(**changes):
        recipe = Recipe(epochs=300, lr=2.0, **changes)
        return [learning_rate(recipe, epoch) for epoch in range(300)]

    whole, half, warm = rates(), rates(schedule="half-cosine"), rates(warmup=5)
    assert whole[0] == half[0] == 2.0 and whole[150] == pytest.approx(1.0) and whole[299] < 1e-4
    assert half[299] == pytest.approx(1.0, rel=0.01) and half[150] == pytest.approx(1 + math.cos(math.pi / 4))
    assert warm[0] == pytest.approx(0.02) and warm[4] == pytest.approx(2 * (0.01 + 0.99 * 0.8)) and warm[5] == 2.0
    assert warm[-1] < 1e-3 and all(a > b for a, b in pairwise(warm[5:]))


def test_a_larger_momentum_of_the_statistics_stands_for_a_second_forward_pass(data):
    """RDED's loop runs every batch through the student twice; 1 - 0.9^2 in one pass leaves the same statistics."""
    recipe = Recipe(epochs=2, batch=10, labels="hard", optimizer="sgd", lr=0.0, weight_decay=0.0)
    once = fit(network(1), data, replace(recipe, bn_momentum=0.19), size=16, seed=7, device=CPU, dtype=torch.float32)
    twice = network(1).train()
    for view in views(data, recipe, 16, 7):
        for _ in range(2):
            twice(normalise(view.pixels, MEAN, STD))
    for name, value in twice.named_buffers():
        if "running" in name:
            torch.testing.assert_close(once.get_buffer(name), value)


def test_a_padded_crop_is_a_shift_with_black_around(data):
    recipe = Recipe(epochs=4, batch=30, crop=1.0, pad=4, flip=False, cutmix=False)
    shifts = set()
    for view in views(data, recipe, 20, 3):
        for pixels, i in zip(view.pixels, view.indices, strict=True):
            padded = F.pad(data.images[i].float(), [4] * 4)
            found = [(y, x) for y in range(9) for x in range(9) if torch.equal(padded[:, y:, x:][:, :20, :20], pixels)]
            assert len(found) == 1
            shifts |= set(found)
    assert len(shifts) > 50 and {y for y, _ in shifts} == {x for _, x in shifts} == set(range(9))


def test_patches_are_shuffled_before_the_crop(data):
    recipe = Recipe(epochs=3, batch=30, crop=1.0, flip=False, cutmix=False, shuffle=2)
    arrangements = set()
    for view in views(data, recipe, 20, 3):
        for pixels, i in zip(view.pixels, view.indices, strict=True):
            image = data.images[i].float()  # of two halves, the swap is a roll
            found = [(y, x) for y in (0, 10) for x in (0, 10) if torch.equal(image.roll((y, x), (1, 2)), pixels)]
            assert len(found) == 1
            arrangements |= set(found)
    assert len(arrangements) == 4


def test_wrong_settings_are_named(data):
    for make, words in (
        (lambda: Recipe(schedule="linear"), "half-cosine"),
        (lambda: Recipe(pad=4), "pad=4"),
        (lambda: Recipe(shuffle=0), "shuffle=0"),
        (lambda: Recipe(optimizer="lion"), "adamw"),
        (lambda: Recipe(labels="none"), "soft"),
        (lambda: Recipe(epochs=0), "epochs=0"),
        (lambda: resolve_device("tpu"), "cuda"),
        (lambda: resolve_device("cuda:one"), "allowed: auto, cpu, cuda, cuda:N"),
        (lambda: resolve_precision("fp8", CPU), "bf16"),
        (lambda: student(data, Recipe(epochs=1)), "soft labels were not given"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
