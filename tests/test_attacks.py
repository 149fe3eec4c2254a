"""Attacks against closed forms on linear networks, a plain loop written from the formula, and on a trained network."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from common import attacks
from common.attacks import fgsm, pgd, robust_accuracy
from common.augment import ZCA, rng

EPS = 8 / 255
SHAPE = (3, 4, 4)  # C, H, W of the small images
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.5, 2.0]).view(3, 1, 1)


def same(pixels):
    return pixels


def normalised(pixels):
    return (pixels - MEAN) / STD


def mixed(pixels):
    """Channels into one another: signs of gradients change on the way."""
    return torch.einsum("dc,bchw->bdhw", torch.tensor([[1.0, -2, 0.3], [0.5, 1, -1], [-3, 0.2, 1]]), pixels - MEAN)


def linear(classes=2):
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, classes))
    generator = rng("linear", classes)
    with torch.no_grad():
        net[1].weight.normal_(generator=generator)
        net[1].bias.zero_()
    return net


def curved():
    """Tanh between two linear layers, so that gradients turn within the ball."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 4))
    generator = rng("curved")
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=generator)
    return net


def images_of(count, low=0.3, high=0.7, classes=2):
    pixels = low + (high - low) * torch.rand(count, *SHAPE, generator=rng("images", count))
    return pixels, torch.arange(count) % classes


# ---------------------------------------------------------------- closed forms


def uphill(net, labels):
    """Of two classes: the weight of the other one less that of the label, [B, C, H, W]."""
    weight = net[1].weight.detach().view(2, *SHAPE)
    return weight[1 - labels] - weight[labels]


def test_both_reach_the_optimum_of_a_linear_network():
    net, (x, y) = linear(), images_of(6)
    w = uphill(net, y)
    best = x + EPS * w.sign()
    assert torch.equal(fgsm(net, x, y, EPS, prepare=same), best)
    assert torch.equal(pgd(net, x, y, EPS, prepare=same, generator=rng(0)), best)  # 10 eps / 4 cross the ball
    with torch.no_grad():
        margin = margins(net, same, best, y) - margins(net, same, x, y)
    torch.testing.assert_close(margin, EPS * w.abs().sum((1, 2, 3)))  # eps |w|_1


@pytest.mark.parametrize("prepare", [normalised, mixed])
def test_the_gradient_goes_through_prepare(prepare):
    net, (x, y) = linear(), images_of(6)
    w = uphill(net, y)
    chained = w / STD if prepare is normalised else torch.func.vjp(mixed, x)[1](w)[0]
    torch.testing.assert_close(attacks._gradient(net, prepare, x, y, 0)[0], chained)
    assert torch.equal(fgsm(net, x, y, EPS, prepare=prepare), x + EPS * chained.sign())


def test_the_gradient_goes_through_whitening():
    net, (x, y) = linear(), images_of(60)
    zca = ZCA.fit(x)
    w = (uphill(net, y).flatten(1) @ zca.whiten.T).view_as(x)
    assert torch.equal(fgsm(net, x, y, EPS, prepare=zca), x + EPS * w.sign())
    assert not torch.equal(w.sign(), uphill(net, y).sign())


def test_the_ascent_is_that_of_cross_entropy():
    net, (x, y) = curved().double(), images_of(40, classes=4)
    pixels = x.double().requires_grad_()
    loss = F.cross_entropy(net(normalised(pixels)), y, reduction="none")
    (expected,) = torch.autograd.grad(loss.sum(), pixels)
    wrong = 1 - (-loss.detach()).exp()  # dCE/dm
    found, _ = attacks._gradient(net, normalised, x.double(), y, 0)
    torch.testing.assert_close(wrong[:, None, None, None] * found, expected)


def test_a_certain_network_is_no_refuge():
    net, (x, y) = linear(), images_of(40)
    with torch.no_grad():
        net[1].weight.mul_(1e3)
    y = net(x).argmax(1)
    pixels = x.clone().requires_grad_()
    F.cross_entropy(net(pixels), y, reduction="sum").backward()
    assert (pixels.grad.flatten(1) == 0).all(1).any()  # some images are that certain
    assert torch.equal(fgsm(net, x, y, EPS, prepare=same), x + EPS * uphill(net, y).sign())


def test_steps_are_a_quarter_of_eps_unless_said():
    net, (x, y) = linear(), images_of(6)
    sign = uphill(net, y).sign()
    cases = (({"steps": 1}, EPS / 4), ({"steps": 3}, 3 * EPS / 4), ({"steps": 20}, EPS))
    for options, moved in (*cases, ({"steps": 2, "step_size": 0.01}, 0.02)):
        found = pgd(net, x, y, EPS, prepare=same, start="zero", **options)
        torch.testing.assert_close(found, x + moved * sign)


def margins(net, prepare, x, y):
    return attacks._margin(*attacks._scores(net(prepare(x)), y))


# ---------------------------------------------------------------- against a plain loop


def plain(net, x, y, eps, prepare, steps, size, start):
    """PGD on the cross-entropy of one image, from the formula."""
    point = start.clone()
    for _ in range(steps):
        point.requires_grad_()
        F.cross_entropy(net(prepare(point[None])), y[None]).backward()
        with torch.no_grad():
            point = point + size * point.grad.sign()
            point = torch.maximum(torch.minimum(point, x + eps), x - eps).clamp(0, 1)
    return point.detach()


@pytest.mark.parametrize("start", ["zero", "random"])
def test_pgd_is_the_plain_loop_image_by_image(start):
    net, (x, y) = curved(), images_of(9, 0.0, 1.0, classes=4)
    eps = 0.1
    starts = [x] if start == "zero" else attacks._random_starts(x, eps, rng(3), 1)
    found = pgd(net, x, y, eps, prepare=normalised, steps=6, step_size=0.03, start=start, generator=rng(3))
    for i in range(len(x)):
        slow = plain(net, x[i], y[i], eps, normalised, 6, 0.03, starts[0][i])
        torch.testing.assert_close(found[i], slow)


def test_fgsm_is_one_step_of_pgd():
    net, (x, y) = curved(), images_of(9, 0.0, 1.0, classes=4)
    one = pgd(net, x, y, EPS, prepare=normalised, steps=1, step_size=EPS, start="zero")
    assert torch.equal(fgsm(net, x, y, EPS, prepare=normalised), one)


@pytest.mark.parametrize("eps", [1 / 255, EPS, 0.6])
@pytest.mark.parametrize("attack", ["fgsm", "pgd", "restarts"])
def test_ball_range_and_type(attack, eps):
    net = curved()
    x = torch.randint(0, 256, (9, *SHAPE), generator=rng("bytes"), dtype=torch.uint8)
    x[:3], x[3:6] = 0, 255
    y = torch.arange(9) % 4
    options = {"prepare": normalised} if attack == "fgsm" else {"prepare": normalised, "generator": rng(0)}
    options |= {"restarts": 3} if attack == "restarts" else {}
    found = (fgsm if attack == "fgsm" else pgd)(net, x, y, eps, **options)
    moved = (found - x / 255).abs()
    assert found.dtype == torch.float32 and found.shape == x.shape and not found.requires_grad
    assert found.min() >= 0 and found.max() <= 1 and eps * 0.99 < moved.max() <= eps + 1e-6
    options |= {} if attack == "fgsm" else {"generator": rng(0)}
    assert torch.equal(found, (fgsm if attack == "fgsm" else pgd)(net, x / 255, y, eps, **options))


def test_eps_0_is_the_image():
    net, (x, y) = curved(), images_of(9, 0.0, 1.0, classes=4)
    assert torch.equal(fgsm(net, x, y, 0, prepare=same), x)
    assert torch.equal(pgd(net, x, y, 0, prepare=same, generator=rng(0)), x)


# ---------------------------------------------------------------- random starts


def test_starts_are_uniform_in_the_ball_and_do_not_depend_on_the_batch():
    x = images_of(200)[0]
    starts = torch.stack(attacks._random_starts(x, 0.1, rng(5), 3))  # [R, B, C, H, W]
    noise = (starts - x) / 0.1
    assert noise.min() < -0.99 and noise.max() > 0.99 and noise.abs().max() < 1 + 1e-5
    assert abs(noise.mean()) < 0.01 and abs(noise.var() - 1 / 3) < 0.01
    assert len(noise.flatten(2)[:, :, 0].flatten().unique()) == 600  # of restarts and images each their own
    generator = rng(5)
    parts = [torch.stack(attacks._random_starts(part, 0.1, generator, 3)) for part in x.split(7)]
    assert torch.equal(torch.cat(parts, 1), starts)
    dark = attacks._random_starts(torch.zeros_like(x), 0.1, rng(5), 1)[0]
    assert dark.min() == 0


def test_restarts_keep_the_worst_of_each_image():
    net, (x, y) = curved(), images_of(40, 0.0, 1.0, classes=4)
    options = {"prepare": normalised, "steps": 2, "step_size": 0.02}
    found = pgd(net, x, y, 0.1, generator=rng(1), restarts=3, **options)
    low, high = (x - 0.1).clamp(min=0), (x + 0.1).clamp(max=1)
    each = [
        attacks._climb(net, normalised, s, y, low, high, 2, 0.02, False)
        for s in attacks._random_starts(x, 0.1, rng(1), 3)
    ]
    worst = torch.stack([margins(net, normalised, a, y) for a in each]).argmax(0)  # [B]
    assert worst.unique().numel() == 3  # each restart is the worst for some image
    for i, r in enumerate(worst):
        assert torch.equal(found[i], each[r][i])


def test_margin_is_above_0_where_the_class_is_wrong():
    net, (x, y) = curved(), images_of(40, classes=4)
    assert torch.equal(margins(net, same, x, y) > 0, net(x).argmax(1) != y)


def test_a_stopped_image_stays_where_it_is_first_missed():
    net, (x, y) = curved(), images_of(60, 0.0, 1.0, classes=4)
    y[:40] = net(normalised(x))[:40].argmax(1)  # most are right at the start
    options = {"prepare": normalised, "step_size": 0.03, "start": "zero"}
    path = [x, *(pgd(net, x, y, 0.1, steps=steps, **options) for steps in range(1, 7))]
    missed = torch.stack([net(normalised(point)).argmax(1) != y for point in path])  # [S, B]
    first = torch.where(missed.any(0), missed.int().argmax(0), 6)  # [B]; the last point of an image never missed
    assert first.unique().numel() > 3
    found = pgd(net, x, y, 0.1, steps=6, stop=True, **options)
    torch.testing.assert_close(found, torch.stack(path)[first, torch.arange(len(x))])
    right = robust_accuracy(
        net, x, y, eps=0.1, prepare=normalised, device="cpu", attack="pgd", steps=6, step_size=0.03, start="zero"
    )
    assert right == pytest.approx(100 * (~missed.any(0)).double().mean().item())


# ---------------------------------------------------------------- the network afterwards


class Noisy(nn.Sequential):
    """BatchNorm and dropout, which tell train mode from eval mode, and an activation in place."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(16, 4),
        )
        generator = rng("noisy")
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(generator=generator)


def test_the_network_is_left_as_it_was():
    net, (x, y) = Noisy().train(), images_of(9, classes=4)
    net[1].eval()  # a part frozen by its owner
    net[0].weight.requires_grad_(False)
    net[5].weight.grad = torch.ones_like(net[5].weight)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    a = fgsm(net, x, y, EPS, prepare=normalised)
    b = pgd(net, x, y, EPS, prepare=normalised, generator=rng(0), restarts=2)
    robust_accuracy(net, x, y, attack="pgd", eps=EPS, prepare=normalised, device="cpu")
    assert [m.training for m in net] == [True, False, True, True, True, True] and net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [p.requires_grad for p in net.parameters()] == [False] + [True] * 5
    assert net[5].weight.grad.eq(1).all() and net[5].bias.grad is None and net[0].weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():  # the attack makes its own gradients
        assert torch.equal(a, fgsm(net.eval(), x, y, EPS, prepare=normalised))
        assert torch.equal(b, pgd(net, x, y, EPS, prepare=normalised, generator=rng(0), restarts=2))


def test_modes_come_back_after_an_error():
    net, (x, y) = Noisy().train(), images_of(9, classes=4)
    with pytest.raises(ValueError, match="differentiable"):
        fgsm(net, x, y, EPS, prepare=torch.Tensor.detach)
    assert all(m.training for m in net.modules())


# ---------------------------------------------------------------- accuracy under attack


@pytest.fixture(scope="module")
def digits():
    """A small network that has learned 8x8 scans of digits, and 200 of its test images."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 10))
    generator = rng("digits")
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(std=0.1, generator=generator)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(net(x[200:]), y[200:]).backward()
        optimizer.step()
    return net, (x[:200] * 255).byte(), y[:200]


def accuracy(digits, **options):
    return robust_accuracy(*digits, **({"eps": 0.1, "prepare": same, "device": "cpu"} | options))


def test_order_of_accuracies(digits):
    net, x, y = digits
    clean = 100 * (net(x / 255).argmax(1) == y).double().mean().item()
    assert clean > 90
    for attack in ("fgsm", "pgd"):
        assert accuracy(digits, eps=0, attack=attack) == pytest.approx(clean)
        negative = (net, 255 - x, y)
        assert accuracy(negative, eps=0, attack=attack, prepare=lambda pixels: 1 - pixels) == pytest.approx(clean)
    weak, strong, climbed = accuracy(digits, eps=0.03), accuracy(digits), accuracy(digits, attack="pgd")
    assert clean > weak > strong > climbed > 0
    assert accuracy(digits, attack="pgd", steps=20, restarts=3) <= climbed
    adversarial = fgsm(net, x, y, 0.1, prepare=same)
    assert strong == pytest.approx(100 * (net(adversarial).argmax(1) == y).double().mean().item())


def test_accuracy_does_not_depend_on_the_batch_but_on_the_seed(digits):
    options = {"attack": "pgd", "eps": 0.08, "steps": 1}
    found = [accuracy(digits, batch=batch, seed=2, **options) for batch in (None, 7, 64, 200)]
    assert len(set(found)) == 1
    assert len({accuracy(digits, seed=seed, **options) for seed in range(6)}) > 1


def test_transfer_climbs_the_other_network():
    x, y = images_of(40)
    net = linear()
    y = net(x).argmax(1)  # all right without an attack
    other = linear()
    with torch.no_grad():
        other[1].weight.neg_()
    options = {"eps": 0.3, "prepare": same, "device": "cpu"}
    assert robust_accuracy(net, x, y, **options) == 0
    for attack in ("fgsm", "pgd"):  # what fools the opposite network helps this one
        assert robust_accuracy(net, x, y, source=other, attack=attack, **options) == 100


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": -0.1}, r"eps=-0.1 is not in \[0, 1\]"),
        ({"eps": 8}, r"eps=8 is not in \[0, 1\].*8/255"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"steps": 0}, "steps=0"),
        ({"restarts": 0}, "restarts=0"),
        ({"step_size": 0.0}, "step_size=0.0"),
        ({"step_size": 2.0}, "step_size=2.0"),
        ({"start": "ball"}, "start='ball' is unknown; allowed: random, zero"),
        ({"generator": None}, "start='random' draws from a generator"),
        ({"start": "zero", "restarts": 2}, "restarts=2 from start='zero'"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels \(5,\)"),
        ({"images": torch.rand(6, 48)}, r"images \(6, 48\)"),
        ({"images": 255 * torch.rand(6, *SHAPE)}, "normalisation is prepare's"),
        ({"images": torch.rand(6, *SHAPE) - 0.5}, "normalisation is prepare's"),
        ({"images": torch.full((6, *SHAPE), torch.nan)}, "normalisation is prepare's"),
        ({"images": torch.full((6, *SHAPE), 200)}, "images are torch.int64; pass pixels, uint8 or float"),
    ],
)
def test_what_does_not_fit_pgd(changes, message):
    x, y = images_of(6)
    options = {"images": x, "labels": y, "eps": EPS, "prepare": same, "generator": rng(0)} | changes
    with pytest.raises(ValueError, match=message):
        pgd(linear(), **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attack": "cw"}, "attack='cw' is unknown; allowed: fgsm, pgd"),
        ({"steps": 3}, "attack='fgsm' takes no steps"),
        ({"batch": 0}, "batch=0"),
        ({"eps": 2}, "eps=2"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels \(5,\)"),
    ],
)
def test_what_does_not_fit_robust_accuracy(changes, message):
    x, y = images_of(6)
    options = {"images": x, "labels": y, "eps": EPS, "prepare": same, "device": "cpu"} | changes
    with pytest.raises(ValueError, match=message):
        robust_accuracy(linear(), **options)


def test_a_gradient_that_is_not_finite_is_an_error():
    net, (x, y) = linear(), images_of(6)
    with torch.no_grad():
        net[1].weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"not finite at step 0 \(loss=nan\)"):
        fgsm(net, x, y, EPS, prepare=same)
