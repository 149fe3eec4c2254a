"""What objectives give to a set of images, against closed forms, plain loops and the methods' own functions."""


import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import networks
from common.augment import DiffAugment, rng
from methods import mtt, sre2l
from papers import objectives


@pytest.fixture(autouse=True)
def global_state_is_untouched():
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=rng("analyses", seed), dtype=dtype)


def maker(name="convnet2-instance-w32", classes=3, size=8):
    return lambda generator: networks.make(name, classes=classes, size=size, generator=generator)


# ---------------------------------------------------------------- BatchNorm losses


def bn_teacher():
    """Two convolutions with BatchNorm whose running statistics are of other images."""
    teacher = maker("convnet2-w32")(rng("teacher"))
    teacher.train()(2 * normal(30, 3, 8, 8, seed=9))
    return teacher.eval()


def plain_gaps(teacher, images):
    """Eq. 1 in one pass, by what enters each layer."""
    entering, layers = [], sre2l.batch_norms(teacher)
    hooks = [layer.register_forward_pre_hook(lambda _, x: entering.append(x[0].double())) for layer in layers]
    with torch.no_grad():
        teacher(images)
    for hook in hooks:
        hook.remove()
    gaps = [
        ((x.mean((0, 2, 3)) - bn.running_mean).norm(), (x.var((0, 2, 3), unbiased=False) - bn.running_var).norm())
        for bn, x in zip(layers, entering, strict=True)
    ]
    return torch.tensor(gaps, dtype=torch.float64).T


def test_bn_gaps_of_a_whole_subset_are_exact_for_any_chunk():
    teacher, images = bn_teacher(), normal(23, 3, 8, 8, seed=1)
    mean, variance = plain_gaps(teacher, images)
    for chunk in (5, 23, 100):
        gaps = objectives.bn_gaps(teacher, images, chunk=chunk)
        torch.testing.assert_close(gaps.mean, mean, rtol=1e-5, atol=0)
        torch.testing.assert_close(gaps.variance, variance, rtol=1e-5, atol=0)
    assert objectives.bn_loss(gaps) == pytest.approx(float(mean.sum() + variance.sum()), rel=1e-5)
    assert float(gaps.mean.min()) > 0.01 and len(gaps.mean) == 2
    assert not any(m._forward_pre_hooks for m in teacher.modules())


def test_bn_variance_survives_a_large_mean():
    teacher = nn.Sequential(nn.BatchNorm2d(2)).eval()
    images = 3000 + 0.1 * normal(200, 2, 6, 6, seed=2, dtype=torch.float64)
    gaps = objectives.bn_gaps(teacher, images.float())
    want = (images.float().double().var((0, 2, 3), unbiased=False) - 1).norm()
    assert float(gaps.variance) == pytest.approx(float(want), rel=1e-6)


def test_whole_statistics_cannot_see_that_images_stand_there_twice():
    teacher, images = bn_teacher(), normal(8, 3, 8, 8, seed=1)
    once, twice = (objectives.bn_gaps(teacher, x) for x in (images, images.repeat(2, 1, 1, 1)))
    assert objectives.bn_loss(once) == pytest.approx(objectives.bn_loss(twice), rel=1e-6)


def test_the_loss_of_one_batch_is_that_of_sre2l():
    teacher, images = bn_teacher(), normal(12, 3, 8, 8, seed=3)
    config = sre2l.Config(ipc=4, batch=12, first_bn_multiplier=1.0)
    with torch.no_grad(), sre2l.bn_gaps(teacher, config, lambda: 1) as found:
        teacher(images)
    assert objectives.bn_loss(objectives.bn_gaps(teacher, images)) == pytest.approx(float(sum(found)), rel=1e-4)


def test_dwa_loss_by_hand():
    gaps = objectives.BNGaps(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25]))
    assert objectives.bn_loss(gaps) == 3.75
    assert objectives.dwa_loss(gaps, 2.0) == pytest.approx(0.01 * (10 * (1 + 2 * 0.5) + (2 + 2 * 0.25)))
    assert objectives.dwa_loss(gaps) == objectives.dwa_loss(gaps, 11.0)


def test_bn_gaps_take_what_prepare_makes():
    teacher, pixels = bn_teacher(), torch.randint(256, (6, 3, 8, 8), generator=rng("pixels"), dtype=torch.uint8)
    prepared = objectives.bn_gaps(teacher, pixels, prepare=lambda x: x / 255)
    torch.testing.assert_close(prepared.mean, objectives.bn_gaps(teacher, pixels / 255).mean)


def test_bn_gaps_refuse():
    teacher, images = bn_teacher(), normal(4, 3, 8, 8)
    with pytest.raises(ValueError, match="no images"):
        objectives.bn_gaps(teacher, images[:0])
    with pytest.raises(ValueError, match="training mode"):
        objectives.bn_gaps(teacher.train(), images)


# ---------------------------------------------------------------- DM


def labelled(*counts, seed=0):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=rng("order", seed))]
    return normal(len(labels), 3, 8, 8, seed=seed) + labels[:, None, None, None], labels


def plain_dm(real, subset, make_network, seeds, train=False):
    """Eq. 5 of each class in turn."""
    total = 0.0
    for seed in seeds:
        net = make_network(rng(seed, "dcs", "dm"))
        features = []
        [m for m in net.modules() if isinstance(m, nn.Linear)][-1].register_forward_pre_hook(
            lambda _, x, features=features: features.append(x[0])
        )
        net.train(train)
        with torch.no_grad():
            for images, _ in (real, subset):
                net(images)
        for k in range(3):
            a, b = (f[labels == k].mean(0) for f, (_, labels) in zip(features, (real, subset), strict=True))
            total += float((a - b).square().sum()) / len(seeds)
    return total


@pytest.mark.parametrize("network", ["convnet2-instance-w32", "convnet2-w32"])
def test_dm_loss_against_the_loop_over_classes(network):
    real, some, other = labelled(9, 8, 7), labelled(2, 2, 2, seed=1), labelled(1, 3, 2, seed=2)
    found = objectives.dm_loss(real, [some, other], make_network=maker(network), seeds=[0, 4], chunk=5)
    batch_norm = network == "convnet2-w32"
    want = [plain_dm(real, subset, maker(network), [0, 4], train=batch_norm) for subset in (some, other)]
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=1e-4, atol=0)


def test_dm_loss_is_nothing_for_the_real_set_under_shared_augmentation():
    real, doubled = labelled(4, 4, 4), labelled(4, 4, 4)
    doubled = tuple(t.repeat_interleave(2, 0) for t in doubled)
    settings = {"make_network": maker(), "seeds": [0, 1]}
    small = labelled(2, 2, 2, seed=1)
    plain = objectives.dm_loss(real, [real, doubled, small], **settings)
    seen = objectives.dm_loss(real, [real, doubled, small], augment=DiffAugment(), **settings)
    assert plain[:2].max() < 1e-6 * plain[2] and seen[:2].max() < 1e-6 * seen[2]
    assert abs(plain[2] - seen[2]) > 0.01 * plain[2]
    assert torch.equal(seen, objectives.dm_loss(real, [real, doubled, small], augment=DiffAugment(), **settings))


def test_dm_loss_draws_the_real_images_it_is_asked_for():
    real, subset = labelled(4, 4, 4), labelled(2, 2, 2, seed=1)
    settings = {"make_network": maker(), "seeds": [3]}
    whole, drawn, same = (float(objectives.dm_loss(real, [subset], per_class=n, **settings)) for n in (0, 2, 4))
    assert same == pytest.approx(whole, rel=1e-5) and abs(drawn - whole) > 1e-3 * whole


def test_dm_loss_refuses():
    real, lacking = labelled(4, 4, 4), labelled(2, 2, seed=1)
    with pytest.raises(ValueError, match=r"\[2, 2, 0\]"):
        objectives.dm_loss(real, [lacking], make_network=maker())
    with pytest.raises(ValueError, match="each class of the real"):
        objectives.dm_loss(lacking, [real], make_network=maker())


# ---------------------------------------------------------------- TM

QUICK = {"make_network": maker(), "lr": 0.05, "steps": 4, "epochs": 2}


def trajectory(seed=0, snapshots=6):
    theta = mtt.flatten(maker()(rng("expert", seed)))
    return torch.stack([theta + 0.01 * s * normal(len(theta), seed=seed) for s in range(snapshots)])


def test_tm_loss_is_that_of_the_distillation_and_of_plain_sgd():
    path, (images, labels) = trajectory(), labelled(3, 3, 3)
    found = objectives.tm_loss(
        path, images, labels, starts=[1, 3], batch=4, augment=DiffAugment(), generator=rng("tm"), **QUICK
    )
    generator = rng("tm")
    student = mtt.Student(maker()(torch.Generator()), "cpu")
    orders = [torch.randperm(9, generator=generator).split(4)]
    draws = [DiffAugment().draw(len(rows), generator, siamese=False) for rows in orders[0]]
    orders.append(torch.randperm(9, generator=generator).split(4))  # 4 + 4 + 1 images, then the next order
    draws.append(DiffAugment().draw(4, generator, siamese=False))
    batches = list(zip([*orders[0], orders[1][0]], draws, strict=True))
    for i, start in enumerate((1, 3)):
        match = mtt.Match(path[start], path[start + 2], batches)
        exact = mtt.exact_gradient(student, match, images, labels, torch.tensor(0.05), DiffAugment())
        torch.testing.assert_close(found[i], exact.loss)
        net = maker()(torch.Generator())
        nn.utils.vector_to_parameters(path[start].clone(), net.parameters())
        sgd = torch.optim.SGD(net.parameters(), lr=0.05)
        for rows, draw in batches:
            sgd.zero_grad()
            F.cross_entropy(net(DiffAugment()(images[rows], draw)), labels[rows]).backward()
            sgd.step()
        gap = mtt.flatten(net) - path[start + 2]
        want = gap.square().sum() / (path[start] - path[start + 2]).square().sum()
        torch.testing.assert_close(found[i], want, rtol=1e-4, atol=0)


def test_tm_loss_is_one_without_a_step_and_nothing_for_the_students_own_path():
    images, labels = labelled(3, 3, 3)
    still = objectives.tm_loss(trajectory(), images, labels, starts=[0, 2], generator=rng(0), **QUICK | {"lr": 0.0})
    torch.testing.assert_close(still, torch.ones(2))
    student, theta, path = mtt.Student(maker()(torch.Generator()), "cpu"), trajectory()[0], []
    for _ in range(9):
        path.append(theta)
        theta = theta - 0.05 * student.gradient(theta, images, labels)
    found = objectives.tm_loss(
        torch.stack(path), images, labels, starts=[0, 4], generator=rng(0), **QUICK | {"steps": 4, "epochs": 4}
    )
    assert found.max() < 1e-6


def test_tm_loss_gives_every_start_the_same_batches_and_takes_label_logits():
    path, (images, labels) = trajectory(), labelled(3, 3, 3)
    both = objectives.tm_loss(path, images, labels, starts=[1, 3], batch=2, generator=rng(1), **QUICK)
    alone = objectives.tm_loss(path, images, labels, starts=[3], batch=2, generator=rng(1), **QUICK)
    assert torch.equal(both[1:], alone)
    logits = 100 * F.one_hot(labels, 3).float()
    soft = objectives.tm_loss(path, images, logits, starts=[1, 3], batch=2, generator=rng(1), **QUICK)
    torch.testing.assert_close(soft, both)
    assert list(objectives.TM_STARTS) == list(range(20, 36))


def test_tm_loss_refuses():
    path, (images, labels) = trajectory(), labelled(3, 3, 3)
    with pytest.raises(ValueError, match=r"starts=\[4\] with epochs=2.*allowed: 0 to 3"):
        objectives.tm_loss(path, images, labels, starts=[4], generator=rng(0), **QUICK)
    with pytest.raises(ValueError, match="make_network must make the expert's network"):
        objectives.tm_loss(path[:, 1:], images, labels, starts=[0], generator=rng(0), **QUICK)
    with pytest.raises(FloatingPointError, match=r"start epoch 1 .*smaller lr"):
        objectives.tm_loss(path, images, labels, starts=[1], generator=rng(0), **QUICK | {"lr": 1e30})
