"""NRR-DD against plain loops written from its equations, closed forms, resume, determinism and the copy rule."""

import math
import os
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from benchmarks import plain_nrr_dd
from common import networks
from common.augment import apply_cutmix, cutmix_box, rng
from methods import nrr_dd
from methods.nrr_dd import Config, State
from tests.copied_file import OWN_NETWORK, killed_state, said_alone

pytestmark = pytest.mark.usefixtures("untrained")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FACTS = {"mean": MEAN, "std": STD}


class Small(nn.Module):
    """A user's own network with two BatchNorm layers, its last map averaged or flattened."""

    def __init__(self, side=16, pooled=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(5)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2),
                nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
            )  # fmt: skip
            self.pool = nn.AdaptiveAvgPool2d(1) if pooled else nn.Identity()
            self.head = nn.Linear(12 if pooled else 12 * (side // 2) ** 2, 4)
            for m in self.modules():
                if isinstance(m, nn.BatchNorm2d):
                    nn.init.uniform_(m.running_mean, -0.5, 0.5)
                    nn.init.uniform_(m.running_var, 0.5, 2)
                    nn.init.uniform_(m.weight, 0.5, 2)
            self.head.weight.data *= 4  # confident enough for the order of the scores to mean something

    def forward(self, x):
        return self.head(self.pool(self.body(x)).flatten(1))


@pytest.fixture
def teacher():
    return Small().eval().requires_grad_(False)


@pytest.fixture
def real():
    images = torch.randint(0, 256, (48, 3, 16, 16), dtype=torch.uint8, generator=rng("real"))
    return images, torch.arange(48) % 4


def normalised(pixels):
    shift, scale = (torch.tensor(v, dtype=pixels.dtype)[:, None, None] for v in (MEAN, STD))
    return (pixels - shift) / scale


# ---------------------------------------------------------------- class activation maps


def taught(name, size):
    return networks.make(name, classes=5, size=size, generator=rng(0)).eval()


@pytest.mark.parametrize(
    ("name", "size", "reduced"),
    [("convnet3", 32, "sum"), ("convnet5-w32", 32, "mean"), ("resnet18-mod", 16, "mean"), ("resnet18", 64, "mean"),
     ("mobilenet_v2", 64, "mean"), ("efficientnet_b0", 64, "mean")],
)  # fmt: skip
def test_an_activation_map_adds_up_to_the_logit(name, size, reduced):
    """Check 20: mean of the map + bias where it is averaged, sum + bias where it is flattened."""
    net, labels = taught(name, size), torch.tensor([4, 1, 0])
    with torch.no_grad():
        maps, logits = nrr_dd.cam(net, torch.randn(3, 3, size, size, generator=rng(1)), labels)
    whole = getattr(maps.flatten(1), reduced)(1) + nrr_dd.classifier_of(net).bias[labels]
    assert maps.shape[1:].numel() > 1
    torch.testing.assert_close(whole, logits.gather(1, labels[:, None])[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pooled", [True, False])
def test_an_activation_map_is_equation_1(pooled):
    net, x, labels = Small(pooled=pooled).double().eval(), torch.randn(2, 3, 16, 16, generator=rng(1)), [3, 1]
    with torch.no_grad():
        ours = nrr_dd.normalised_cam(nrr_dd.cam(net, x.double(), torch.tensor(labels))[0], 16)
        for i, maps in enumerate(net.body(x.double())):
            torch.testing.assert_close(ours[i], plain_nrr_dd.cam(maps, net.head.weight[labels[i]], 16))


def test_a_map_that_fits_by_its_numbers_alone_is_refused():
    """ResNet-50 at 32 px ends in one position; the map before it has as many values as the classifier takes."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.early, self.late = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 8, 8), nn.Conv2d(4, 16, 2)
            self.head = nn.Linear(16, 4)

        def forward(self, x):
            return self.head(self.late(self.early(self.norm(x))).flatten(1))

    net = Narrow()
    with pytest.raises(ValueError, match=r"last map is \[4, 2, 2\], its classifier takes 16 features that are neither"):
        nrr_dd.check(Config(ipc=1, pool=2), net, torch.arange(8) % 4, size=16)


def test_a_teacher_without_such_a_map_is_named():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.one, self.two = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 10), nn.Linear(10, 4)

        def forward(self, x):
            return self.two(self.one(self.conv(x).flatten(1)).relu())

    net = Deep()
    with pytest.raises(ValueError, match=r"Deep has no class activation map: .* \[4, 6, 6\], its .* 10 features"):
        nrr_dd.cam(net, torch.zeros(1, 3, 8, 8), torch.zeros(1, dtype=torch.long))
    assert not any(m._forward_hooks for m in net.modules())


def test_maps_are_scaled_to_0_and_1():
    maps = torch.randn(3, 4, 4, generator=rng(0)) * 100
    scaled = nrr_dd.normalised_cam(maps, 4)
    assert scaled.amin((1, 2)).tolist() == [0] * 3 and scaled.amax((1, 2)).tolist() == [1] * 3
    assert nrr_dd.normalised_cam(torch.full((1, 4, 4), 3.0), 8).tolist() == torch.zeros(1, 8, 8).tolist()
    large = nrr_dd.normalised_cam(maps, 32)
    assert large.min() >= 0 and large.max() <= 1
    torch.testing.assert_close(large, F.interpolate(scaled[:, None], (32, 32), mode="bilinear")[:, 0])
    cut = nrr_dd.normalised_cam(maps, 4, relu=True)
    torch.testing.assert_close(cut, maps.clamp(min=0) / maps.amax((1, 2), keepdim=True))
    nearest, cubic = (nrr_dd.normalised_cam(maps, 8, resize=kind) for kind in ("nearest", "bicubic"))
    assert torch.equal(nearest, scaled.repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert cubic.min() >= 0 and cubic.max() <= 1 and not torch.equal(cubic, nrr_dd.normalised_cam(maps, 8))


def test_the_mask_is_zero_exactly_where_the_activation_reaches_epsilon():
    """Check 21, Eq. 4."""
    heat = torch.rand(2, 9, 9, generator=rng(0))
    heat[0, 0, :3] = torch.tensor([0.0, 0.5, 1.0])
    mask = nrr_dd.noncritical_mask(heat, 0.5)
    assert torch.equal(mask == 0, heat >= 0.5)
    assert mask[0, 0, :3].tolist() == [1, 0, 0] and mask.max() <= 1
    for c, m in zip(heat.flatten().tolist(), mask.flatten().tolist(), strict=True):
        assert m == pytest.approx(max(0, 0.5 - c) / 0.5, abs=1e-6)


# ---------------------------------------------------------------- discovery


def test_scores_of_crops_are_loops_over_their_pixels():
    heat = torch.rand(2, 8, 8, generator=rng(0))
    boxes = torch.tensor([[[0, 0, 8, 8], [2, 1, 3, 5]], [[7, 0, 1, 1], [4, 4, 4, 2]]])
    for (b, k), kind in product(product(range(2), range(2)), ("mean", "max", "mass")):
        top, left, height, width = boxes[b, k].tolist()
        part = [heat[b, y, x].item() for y in range(top, top + height) for x in range(left, left + width)]
        wanted = {"mean": sum(part) / len(part), "max": max(part), "mass": sum(part)}[kind]
        assert nrr_dd.crop_scores(heat, boxes, kind)[b, k].item() == pytest.approx(wanted, rel=1e-5)


def test_pixels_count_by_the_share_a_crop_has_of_them():
    heat = torch.tensor([[[1.0, 2.0], [4.0, 8.0]]])
    box = torch.tensor([[[0.5, 0.0, 1.0, 1.5]]])  # half of each row, the right column by half
    mass = 0.5 * (1 + 0.5 * 2) + 0.5 * (4 + 0.5 * 8)
    assert nrr_dd.crop_scores(heat, box, "mass").item() == pytest.approx(mass)
    assert nrr_dd.crop_scores(heat, box, "mean").item() == pytest.approx(mass / 1.5)
    assert nrr_dd.crop_scores(heat, box, "max").item() == 8


def test_the_three_confidences():
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]])
    p = logits.softmax(1)
    assert nrr_dd.confidence(logits, 0, "max").tolist() == pytest.approx([p[0, 0].item(), p[1, 1].item()])
    assert nrr_dd.confidence(logits, 0, "true").tolist() == pytest.approx(p[:, 0].tolist())
    assert nrr_dd.confidence(logits, 0, "ce_low").tolist() == pytest.approx((-p[:, 0].log()).tolist())
    assert nrr_dd.confidence(logits, 0, "true").argsort().tolist() == [1, 0]  # the hardest first
    assert nrr_dd.confidence(logits, 0, "ce_low").argsort().tolist() == [0, 1]  # the easiest first


@pytest.mark.parametrize(("patches", "pooled", "size"), [(1, True, 32), (4, False, 32), (9, True, 34)])
def test_discovery_is_that_of_the_plain_form(patches, pooled, size):
    """A loop over images of several sizes, on a canvas whose border must not count."""
    net, config, sides = Small(size, pooled).eval(), Config(ipc=2, patches=patches, batch=7), [[size, size]]
    factor = config.factor(size)
    if factor > 1:
        sides += [[size // 2, size], [size, size // 2]]  # whole pixels of the map, for the plain form rounds
    images = torch.randint(0, 256, (24, 3, 40, 40), dtype=torch.uint8, generator=rng("canvas"))
    sizes = torch.tensor(sides).repeat(24 // len(sides), 1)
    ours, scores = nrr_dd.select(net, images, sizes, 2, config, size=size, **FACTS, generator=rng(3))
    boxes = nrr_dd.random_boxes(sizes.repeat_interleave(5, 0), rng(3), ratio=(1.0, 1.0)).unflatten(0, (24, 5))
    shown = [image[:, :h, :w] for image, (h, w) in zip(images, sizes.tolist(), strict=True)]
    plain, wanted = plain_nrr_dd.discover(
        net, net.body[-1], shown, boxes.tolist(), 2, 2 * factor**2, factor=factor, size=size, **FACTS
    )
    assert scores.tolist() == pytest.approx(wanted, abs=1e-4) and scores.tolist() == sorted(scores.tolist())
    torch.testing.assert_close(ours / 255, plain, atol=1e-4, rtol=0)


def test_a_stopped_discovery_continues_bit_for_bit(teacher, real):
    facts, given = {"size": 16, **FACTS}, (*real, teacher, Config(ipc=2, pool=6))
    whole = nrr_dd.discover(*given, generator=rng(0), **facts)
    kept = killed_state(2, nrr_dd.discover, *given, generator=rng(0), **facts)
    facts |= {"generator": rng(9), "state": nrr_dd.Discovery.restore(kept)}
    assert torch.equal(nrr_dd.discover(*given, **facts), whole)


def test_crops_have_the_least_area_that_is_asked_for(teacher, real):
    """With all of it every crop is the whole image, and a patch is that image."""
    config = Config(ipc=8, pool=8, crop_area=1.0)
    patches, _ = nrr_dd.select(teacher, real[0][:8], None, 0, config, size=16, **FACTS, generator=rng(0))
    whole = {tuple(image.flatten().tolist()) for image in real[0][:8].float()}
    assert {tuple(patch.flatten().tolist()) for patch in patches} == whole


@pytest.mark.parametrize("kept", [1, 3, 5])
def test_several_crops_of_an_image_can_be_kept(teacher, real, kept):
    images = real[0][:6]
    config = Config(ipc=6 * kept, pool=6, kept=kept)
    patches, scores = nrr_dd.select(teacher, images, None, 1, config, size=16, **FACTS, generator=rng(0))
    assert len({tuple(p.flatten().tolist()) for p in patches}) == 6 * kept == len(scores)
    assert (scores.diff() >= 0).all()


def test_tiles_run_row_by_row_with_the_hardest_first():
    rank = torch.arange(12.0).view(12, 1, 1, 1).expand(12, 1, 4, 4)  # I = 3, f = 2
    images = nrr_dd.stitch(rank, 2, 8)
    for i in range(3):
        assert images[i, 0, ::4, ::4].flatten().tolist() == [i, 3 + i, 6 + i, 9 + i]
    assert nrr_dd.stitch(rank, 2, 9)[0, 0, :, 0].tolist() == [0] * 5 + [6] * 4


# ---------------------------------------------------------------- distances


def test_distances_are_cross_entropies_at_both_labels():
    """Check 22, Eq. 8."""
    logits = 5 * torch.randn(6, 4, generator=rng(0))
    y, other = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([1, 1, 0, 2, 3, 2])
    d = nrr_dd.boundary_labels(logits, y, other)
    torch.testing.assert_close(d[:, 0], F.cross_entropy(logits, y, reduction="none"))
    torch.testing.assert_close(d[:, 1], F.cross_entropy(logits, other, reduction="none"))
    assert nrr_dd.boundary_labels(logits.bfloat16(), y, other).dtype == torch.float32
    softer = nrr_dd.boundary_labels(logits, y, other, temperature=4.0)
    torch.testing.assert_close(softer, nrr_dd.boundary_labels(logits / 4, y, other))


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
def test_a_mix_replayed_from_its_seed_gives_the_same_distances(teacher, kind):
    """Check 22."""
    x, y = torch.randn(6, 3, 16, 16, generator=rng(0)), torch.arange(6) % 4
    d = []
    for seed in (1, 1, 2):
        partner, own = nrr_dd.random_mix(kind, 16, 6, rng(seed))
        d.append(nrr_dd.boundary_labels(teacher(own * x + (1 - own) * x[partner]), y, y[partner]))
    assert torch.equal(d[0], d[1]) and not torch.equal(d[0], d[2])


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_follows_the_law_of_training(seed):
    x, generator = torch.rand(5, 3, 20, 20, generator=rng("x")), rng(seed)
    wanted = apply_cutmix(x, torch.randperm(5, generator=generator), cutmix_box(20, generator))
    partner, own = nrr_dd.random_mix("cutmix", 20, 5, rng(seed))
    assert torch.equal(own * x + (1 - own) * x[partner], wanted)


def test_mixup_blends_with_one_uniform_share():
    shares = [nrr_dd.random_mix("mixup", 4, 3, rng(i))[1] for i in range(400)]
    assert all(len(s.unique()) == 1 for s in shares)
    values = torch.stack([s[0, 0] for s in shares])
    assert values.mean() == pytest.approx(0.5, abs=0.06) and values.std() == pytest.approx(1 / 12**0.5, abs=0.03)


@pytest.mark.parametrize("weight", [0.5, 1.0, 10.0])
def test_slopes_of_the_students_loss(weight):
    """Check 23, Eq. 9: 1 - alpha between r and the teacher's distance, 1 + alpha beyond it, +-alpha below r."""
    y, other = torch.tensor([0]), torch.tensor([1])
    cases = ((0.4, 0.1, 1 - weight), (0.05, 0.1, 1 + weight), (0.8, 0.9, weight), (0.8, 0.7, -weight))
    for p, p_teacher, slope in cases:
        rest = torch.full((8,), (1 - p - 0.01) / 8)  # the second label is matched: its own loss is constant
        logits = torch.cat([torch.tensor([p, 0.01]), rest]).log()[None].requires_grad_()
        teacher_d = -torch.tensor([[p_teacher, 0.01]]).log()
        d = nrr_dd.boundary_labels(logits, y, other)
        loss = nrr_dd.boundary_loss(logits, teacher_d, y, other, threshold=math.log(2), weight=weight)
        (have,) = torch.autograd.grad(loss, logits, retain_graph=True)
        (unit,) = torch.autograd.grad(d[0, 0], logits)
        (second,) = torch.autograd.grad(nrr_dd.boundary_labels(logits, y, other)[0, 1], logits)
        free = (have - slope * unit) @ second.T / (second @ second.T)  # what is left belongs to the second distance
        torch.testing.assert_close(have, slope * unit + free * second, atol=1e-5, rtol=1e-4)


def test_the_students_loss_is_equation_9():
    logits, d = torch.randn(5, 4, generator=rng(0)), 3 * torch.rand(5, 2, generator=rng(1))
    y, other = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 2, 2, 0, 3])
    wanted = 0.0
    for i in range(5):
        for j, label in enumerate((y[i], other[i])):
            own = -math.log(logits[i].softmax(0)[label].item())
            wanted += (max(0, own - 0.9) + 7 * abs(own - d[i, j].item())) / 5
    ours = nrr_dd.boundary_loss(logits, d, y, other, threshold=0.9, weight=7)
    assert ours.item() == pytest.approx(wanted, rel=1e-5)


def test_two_labels_can_be_met_from_ln_2_on():
    """Check 24: the hinges of two different labels reach 0 together only for r >= ln 2."""
    p = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    d = -torch.stack([p, 1 - p], 1).log()  # all mass on the two labels: the best case
    for r, reached in ((math.log(2) + 1e-9, True), (0.69, False), (0.2, False)):
        least = min(nrr_dd.hinge(one[None], r).item() for one in d)
        assert (least == 0) is reached and least >= 0
    assert Config().threshold == math.log(2)


def test_compact_labels_keep_two_probabilities_and_share_the_rest():
    logits = 8 * torch.randn(7, 6, generator=rng(0))
    for temperature in (1.0, 20.0):
        p, q = (x.div(temperature).softmax(1) for x in (logits, nrr_dd.compact_labels(logits, temperature)))
        for row, made in zip(p, q, strict=True):
            first, second, *rest = row.argsort(descending=True).tolist()
            torch.testing.assert_close(made[[first, second]], row[[first, second]])
            torch.testing.assert_close(made[rest], ((1 - row[first] - row[second]) / 4).expand(4), atol=1e-6, rtol=1e-4)
    two = torch.tensor([[1.0, -2.0]])
    torch.testing.assert_close(nrr_dd.compact_labels(two, 3.0).div(3).softmax(1), two.div(3).softmax(1))


def test_labels_are_kept_and_learned_from_as_they_are_called():
    logits, teacher = torch.randn(2, 5, 4, generator=rng(0))
    y, other = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 1, 3, 0, 2])
    kd = lambda s, t, temperature: F.kl_div(  # noqa: E731
        (s / temperature).log_softmax(1), (t / temperature).log_softmax(1), log_target=True, reduction="batchmean"
    )
    config = Config(threshold=0.9, boundary_weight=3.0, distance_temperature=2.0)
    assert nrr_dd.transfer("soft", config, 20.0, kd) == nrr_dd.transfer("hard", config, 20.0, kd) == (None, None)
    keep, loss = nrr_dd.transfer("compact", config, 20.0, kd)
    assert keep is None
    assert loss(logits, teacher, y, other) == kd(logits, nrr_dd.compact_labels(teacher, 20.0), 20.0)
    keep, loss = nrr_dd.transfer("boundary", config, 20.0, kd)
    d = nrr_dd.boundary_labels(teacher / 2, y, other)
    assert torch.equal(keep(teacher, y, other), d)
    wanted = nrr_dd.boundary_loss(logits / 2, d, y, other, threshold=0.9, weight=3.0)
    torch.testing.assert_close(loss(logits, d, y, other), wanted)


# ---------------------------------------------------------------- refinement


def draws_of(config, size, count, generator, steps):
    """The draws that refine makes, in its order."""
    for _ in range(steps):
        view = nrr_dd.random_view(size, *config.view(size), generator)
        if config.label_refinement:
            yield view, *nrr_dd.random_mix(config.mix, size, count, generator)
        else:
            yield view, None, None


def both(net, config, images, labels):
    """Pixels after all steps by ours and by the plain form."""
    state = nrr_dd.begin(net, images, labels, config, **FACTS, generator=rng(7))
    order, mask, generator = state.order, state.mask, torch.Generator()
    generator.set_state(state.generator)
    ours = nrr_dd.refine(net, images, labels, config, **FACTS, generator=rng(0), state=state)
    low, high = (normalised(torch.full((3, 1, 1), edge, dtype=images.dtype)) for edge in (0, 1))
    shift, scale = (torch.tensor(v, dtype=images.dtype)[:, None, None] for v in (MEAN, STD))
    plain, losses = images.clone(), []
    for rows in order.tensor_split(math.ceil(len(images) / config.batch)):
        loop = plain_nrr_dd.refine(
            net, [normalised(images[rows])], [labels[rows]], [mask[rows]],
            draws_of(config, images.shape[-1], len(rows), generator, config.iterations), iterations=config.iterations,
            lr=config.lr, bn_weight=config.bn_weight, label_refinement=config.label_refinement,
            threshold=config.threshold, low=low, high=high, optimizer=config.optimizer,
        )  # fmt: skip
        *_, (x, loss) = loop
        losses.append(loss)
        plain[rows] = x * scale + shift
    return ours, plain, state.loss, losses[-1]


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optimizer": "sgd"},
        {"label_refinement": 1.0, "least_area": 0.5, "jitter": 2},
        {"label_refinement": 0.7, "mix": "mixup", "threshold": 0.3, "batch": 4},
        {"label_refinement": 3.0, "optimizer": "sgd", "batch": 7},
    ],
    ids=str,
)
def test_refine_takes_the_steps_of_the_plain_form(settings, pooled):
    """Same images, masks and draws, in float64: Eqs 3-5, 8, 11 and 12, and so the image gradient."""
    net = Small(pooled=pooled).double().eval()
    config = Config(ipc=2, iterations=5, bn_weight=0.4, lr=100.0 if "optimizer" in settings else 0.3, **settings)
    images = torch.rand(8, 3, 16, 16, generator=rng("images"), dtype=torch.float64)
    ours, plain, loss, wanted = both(net, config, images, torch.arange(8) % 4)
    assert (ours - images).abs().max() > 0.01
    exact = 1e-9 if config.optimizer == "sgd" else 1e-8  # Adam divides by gradients that may be small
    torch.testing.assert_close(ours, plain, atol=exact, rtol=0)
    assert loss == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_refine_of_a_convnet_in_fp32(compiled):
    if compiled and shutil.which("c++") is None:
        pytest.skip("compiling needs a C++ compiler")
    net = taught("convnet3-w32", 32)
    config = Config(ipc=1, iterations=5, label_refinement=1.0, compile=compiled)
    images = torch.rand(5, 3, 32, 32, generator=rng("images"))
    ours, plain, loss, wanted = both(net, config, images, torch.arange(5))
    assert loss == pytest.approx(wanted, rel=1e-4)
    assert (ours - plain).abs().mean() < 1e-4 < (ours - images).abs().mean()


def test_the_second_half_is_there_only_with_label_refinement(teacher):
    images, seen = torch.rand(6, 3, 16, 16, generator=rng(0)), []
    hook = teacher.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
    for weight in (0.0, 1.0):
        config = Config(iterations=2, label_refinement=weight)
        nrr_dd.refine(teacher, images, torch.arange(6) % 4, config, **FACTS, generator=rng(0))
    hook.remove()
    assert seen == [6, 6, 6, 6, 12, 12]  # masks, two steps; masks, two steps


@pytest.mark.parametrize("settings", [{}, {"mask_steps": "gradient"}, {"optimizer": "sgd", "lr": 3.0}], ids=str)
def test_critical_pixels_never_change(teacher, settings):
    """Check 21, to the last bit; all others may."""
    images = torch.rand(6, 3, 16, 16, generator=rng(0))
    config = Config(iterations=6, lr=0.2, label_refinement=1.0, **settings) if "lr" not in settings else Config(
        iterations=6, label_refinement=1.0, **settings
    )  # fmt: skip
    state = nrr_dd.begin(teacher, images, torch.arange(6) % 4, config, **FACTS, generator=rng(0))
    critical = (state.mask == 0)[:, None].expand_as(images)
    assert 0.05 < critical.float().mean() < 0.95
    out = nrr_dd.refine(teacher, images, torch.arange(6) % 4, config, **FACTS, generator=rng(1), state=state)
    assert torch.equal(out[critical], images[critical])
    assert (out[~critical] != images[~critical]).float().mean() > 0.9
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("partner_gradient", [False, True])
def test_a_partner_moves_where_its_gradient_is_kept(teacher, partner_gradient):
    """One step of Eq. 5 with the gradient of Eq. 11, written out."""
    images, labels = torch.rand(6, 3, 16, 16, generator=rng(0)), torch.arange(6) % 4
    config = Config(iterations=1, optimizer="sgd", lr=0.5, label_refinement=1.0, partner_gradient=partner_gradient)
    state = nrr_dd.begin(teacher, images, labels, config, **FACTS, generator=rng(0))
    rows, mask, generator = state.order, state.mask, torch.Generator()
    generator.set_state(state.generator)
    ((view, partner, own),) = draws_of(config, 16, 6, generator, 1)
    x, y, running = images[rows].requires_grad_(), labels[rows], []
    seen = nrr_dd.see(x, view)
    mixed = own * seen + (1 - own) * (seen if partner_gradient else seen.detach())[partner]
    with nrr_dd.batch_statistics(teacher, 2) as moments:
        logits = teacher(normalised(torch.cat([seen, mixed])))
        running = [(bn.running_mean, bn.running_var) for bn in nrr_dd.batch_norms(teacher)]
        loss = nrr_dd.objective(logits, moments, running, y, y[partner], config)
    std = torch.tensor(STD)[:, None, None]
    moved = images[rows] - 0.5 * std**2 * mask[rows, None] * torch.autograd.grad(loss, x)[0]
    out = nrr_dd.refine(teacher, images, labels, config, **FACTS, generator=rng(1), state=state)
    torch.testing.assert_close(out[rows], moved.clamp(0, 1), atol=1e-6, rtol=1e-5)


def test_the_mask_is_made_anew_where_that_is_asked_for(teacher):
    images, labels, kept = torch.rand(6, 3, 16, 16, generator=rng(0)), torch.arange(6) % 4, []
    config = Config(iterations=6, lr=0.5, mask_every=3)
    state = nrr_dd.begin(teacher, images, labels, config, **FACTS, generator=rng(0))
    first = state.mask.clone()
    keep = lambda s: kept.append((s.step, s.mask.clone(), s.tensors()["images"].clone()))  # noqa: E731
    nrr_dd.refine(teacher, images, labels, config, **FACTS, generator=rng(1), state=state, on_step=keep)
    assert [step for step, mask, _ in kept if torch.equal(mask, first)] == [1, 2, 3]
    anew = nrr_dd.masks_of(teacher, normalised(kept[2][2]), labels, config)
    assert torch.equal(kept[3][1], kept[5][1])
    torch.testing.assert_close(kept[3][1], anew)


def test_adam_divides_a_fixed_mask_out_of_the_gradient(teacher):
    """Why the mask multiplies the step by default: pixels hardly critical and nearly critical move alike otherwise."""
    images, moved = torch.rand(6, 3, 16, 16, generator=rng(0)), {}
    for where in ("adam", "gradient"):
        config = Config(iterations=1, lr=0.02, mask_steps=where)
        state = nrr_dd.begin(teacher, images, torch.arange(6) % 4, config, **FACTS, generator=rng(0))
        out = nrr_dd.refine(teacher, images, torch.arange(6) % 4, config, **FACTS, generator=rng(1), state=state)
        step = (out - images).abs() / (0.02 * torch.tensor(STD)[:, None, None])
        inside = ((images > 0.05) & (images < 0.95)).all(1) & (state.mask > 0.05)  # away from the clip
        moved[where] = step.mean(1)[inside], state.mask[inside]
    for where, wanted in (("adam", moved["adam"][1]), ("gradient", 1)):
        off = (moved[where][0] / wanted - 1).abs()
        assert (off < 0.02).float().mean() > 0.98  # the rest: gradients as small as Adam's epsilon


def test_adam_is_the_librarys():
    x, first, second = torch.zeros(50), torch.zeros(50), torch.zeros(50)
    leaf = torch.zeros(50, requires_grad=True)
    adam = torch.optim.Adam([leaf], lr=0.3, betas=(0.5, 0.9))
    for step in range(1, 8):
        leaf.grad = torch.randn(50, generator=rng(step)) * 10.0 ** (step - 4)
        x -= 0.3 * nrr_dd.adam_step(leaf.grad.clone(), first, second, step)
        adam.step()
        torch.testing.assert_close(x, leaf.detach(), atol=1e-6, rtol=1e-5)


def test_learning_rate_falls_as_a_cosine():
    config = Config()
    assert [nrr_dd.learning_rate(config, s) for s in (0, 500)] == pytest.approx([0.05, 0.025])
    assert nrr_dd.learning_rate(config, 999) == pytest.approx(0, abs=1e-6)
    assert nrr_dd.learning_rate(Config(schedule="constant"), 999) == 0.05


def test_the_objective_falls(teacher, real):
    losses = []
    for iterations in (1, 100):
        config = Config(ipc=2, pool=8, iterations=iterations, lr=0.1, least_area=0, jitter=0, epsilon=1.0)
        distill(teacher, real, config, on_step=lambda s: losses.append(s.loss))
    assert losses[-1] < 0.7 * losses[0]


# ---------------------------------------------------------------- the whole method

QUICK = Config(ipc=3, pool=8, iterations=6, batch=6, label_refinement=1.0)


def distill(teacher, real, config, seed=1, **more):
    return nrr_dd.distill(*real, teacher, config, **FACTS, generator=rng(seed), **more)


def test_what_comes_out(teacher, real):
    out = distill(teacher, real, replace(QUICK, patches=4, pool=12), size=14)
    assert {k: (tuple(v.shape), v.dtype) for k, v in out.items()} == {
        "images": ((12, 3, 14, 14), torch.float32), "before": ((12, 3, 14, 14), torch.float32),
        "labels": ((12,), torch.int64), "mask": ((12, 14, 14), torch.float32),
    }  # fmt: skip
    assert out["labels"].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert out["images"].min() >= 0 and out["images"].max() <= 1
    assert (out["images"] != out["before"]).flatten(1).any(1).all()  # every image was refined
    assert torch.equal((out["images"] == out["before"])[:, 0] & (out["mask"] == 0), out["mask"] == 0)


def test_batches_mix_the_classes_and_hold_each_image_once(teacher, real):
    rows = []
    distill(teacher, real, QUICK, on_step=lambda s: rows.append(s.rows.tolist()))
    assert sorted(rows[0] + rows[6]) == list(range(12)) and rows[0] == rows[5] != rows[6]
    assert len({r // 3 for r in rows[0]}) > 2


def test_a_class_is_made_of_its_own_pool(teacher):
    """Images even in the colour of their class: every patch shows that colour."""
    labels = torch.arange(48) % 4
    images = (60 * labels + 10).to(torch.uint8)[:, None, None, None].expand(48, 3, 16, 16)
    out = distill(teacher, (images, labels), replace(QUICK, iterations=1))
    wanted = (60 * out["labels"] + 10)[:, None, None, None] / 255
    torch.testing.assert_close(out["before"], wanted.expand_as(out["before"]))


def test_two_seeded_runs_are_equal_and_seeds_differ(teacher, real):
    before = torch.random.get_rng_state()
    one, two, other = (distill(teacher, real, QUICK, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(one["before"], other["before"]) and not torch.equal(one["images"], other["images"])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(("stop", "mask_every"), [(1, 0), (5, 0), (6, 0), (7, 0), (11, 0), (2, 2), (3, 2), (8, 2)])
def test_a_stopped_run_continues_bit_for_bit(teacher, real, stop, mask_every, monkeypatch):
    config = replace(QUICK, mask_every=mask_every)
    whole, kept = distill(teacher, real, config), killed_state(stop, distill, teacher, real, config)
    monkeypatch.setattr(nrr_dd, "select", None)  # discovery is not done again
    resumed = distill(teacher, real, config, seed=9, state=State.restore(kept))
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)


def test_bf16_stays_close(teacher, real):
    images, way = torch.rand(8, 3, 16, 16, generator=rng(0)), {}
    for precision in ("fp32", "bf16"):
        config = Config(iterations=1, lr=1.0, optimizer="sgd", epsilon=1.0, label_refinement=1.0, precision=precision)
        out = nrr_dd.refine(teacher, images, torch.arange(8) % 4, config, **FACTS, generator=rng(1))
        way[precision] = (out - images).flatten()
    assert F.cosine_similarity(way["fp32"], way["bf16"], dim=0) > 0.97
    one, two = (
        nrr_dd.select(teacher, real[0][:8], None, 0, Config(ipc=8, pool=8, precision=p), size=16, **FACTS,
                      generator=rng(0))[1] for p in ("fp32", "bf16")
    )  # fmt: skip
    torch.testing.assert_close(one, two, atol=0.02, rtol=0)


def test_real_images_are_refined_where_they_are_not_critical():
    folders = sorted((Path(os.environ.get("DD_DATA", "nowhere")).expanduser() / "cifar10" / "train").glob("*"))[:2]
    files = [path for folder in folders for path in sorted(folder.iterdir())[:40]]
    if len(files) < 80:
        pytest.skip("needs DD_DATA with cifar10/train/<class>/")
    real = torch.stack([pil_to_tensor(Image.open(path).convert("RGB")) for path in files]), torch.arange(80) // 40
    net = taught("convnet3-w32", 32)
    config = Config(ipc=4, pool=30, iterations=10, label_refinement=1.0)
    out = nrr_dd.distill(*real, net, config, **FACTS, generator=rng(0))
    change = (out["images"] - out["before"]).abs().mean(1)
    assert change[out["mask"] == 0].max() == 0 < change[out["mask"] > 0.5].mean()
    assert 0.2 < out["before"].mean() < 0.8 and out["before"].std() > 0.1


# ---------------------------------------------------------------- settings and bad input


def test_published_settings_are_settings():
    for row in nrr_dd.PUBLISHED.values():
        Config(**row)
    assert nrr_dd.PUBLISHED["tiny-imagenet", None]["bn_weight"] == 0.05
    assert [Config().factor(size) for size in (32, 64, 128, 224)] == [1, 1, 2, 2]
    assert Config().view(32) == (None, (0, 4)) and Config().view(64) == (0.5, (0, 0))
    assert Config(least_area=0, jitter=3).view(64) == (None, (0, 3)) and Config(least_area=0.08).view(32)[0] == 0.08


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ipc": 0}, "ipc=0"),
        ({"cam_score": "median"}, "mean, max, mass"),
        ({"confidence": "ce"}, "max, true, ce_low"),
        ({"mask_steps": "x"}, "adam, gradient"),
        ({"kept": 6}, "kept=6 is more than crops=5"),
        ({"patches": 3}, "patches=3 do not fill a square"),
        ({"epsilon": 0.0}, "epsilon=0.0 leaves no mask; allowed: above 0"),
        ({"least_area": 1.5}, "least_area=1.5 is no share; allowed: 0 to 1"),
        ({"iterations": 0}, "the least is 1"),
        ({"lr": -0.1}, "lr=-0.1 is too small; the least is 0"),
        ({"least_area": -0.5}, "least_area=-0.5 is no share"),
        ({"crop_area": 0.0}, "crop_area=0.0 is no share; allowed: above 0, at most 1"),
        ({"distance_temperature": 0.0}, "distance_temperature=0.0; allowed: above 0"),
        ({"labels": "dbr"}, "labels='dbr' is unknown; allowed: soft, hard, compact, boundary"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)


@pytest.mark.parametrize(
    ("settings", "size", "words"),
    [
        ({"pool": 13}, None, "pool=13 is more than the 12 images of class 0"),
        ({"ipc": 3, "patches": 4, "pool": 8}, None, "ipc=3 takes 12 patches a class; a pool of 8 images"),
        ({"ipc": 1, "pool": 8}, 20, "patches of 20 px .* shorter side is 16 px"),
    ],
)
def test_too_little_data_is_named_before_any_forward(real, settings, size, words):
    class Untouched(Small):
        def forward(self, x):
            raise AssertionError("a forward was made")

    with pytest.raises(ValueError, match=words):
        distill(Untouched().eval(), real, Config(**settings), size=size)


def test_teachers_that_do_not_fit_are_named(real):
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        distill(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(784, 4)), real, QUICK)
    with pytest.raises(ValueError, match="tells 4 classes apart, the images have 12"):
        distill(Small(), (real[0], torch.arange(48) % 12), replace(QUICK, pool=4))


def test_a_loss_that_is_not_finite_stops_with_the_step(teacher):
    images, kept = torch.rand(6, 3, 16, 16, generator=rng(0)), []
    broken = Small().eval()
    broken.body[1].running_mean[0] = math.nan
    state = nrr_dd.begin(teacher, images, torch.arange(6) % 4, QUICK, **FACTS, generator=rng(0))
    with pytest.raises(FloatingPointError, match=r"nan at step 5 of batch 0 \(lr=0.05"):
        nrr_dd.refine(broken, images, torch.arange(6) % 4, QUICK, **FACTS, generator=rng(0), state=state)
    state = nrr_dd.begin(teacher, images, torch.arange(6) % 4, QUICK, **FACTS, generator=rng(0))
    with pytest.raises(FloatingPointError, match="images are not finite after step 1 of batch 0"):
        nrr_dd.refine(
            broken, images, torch.arange(6) % 4, QUICK, **FACTS, generator=rng(0), state=state,
            on_step=lambda s: kept.append(s.tensors()),
        )  # fmt: skip
    assert kept == []
    with pytest.raises(FloatingPointError, match="scores of class 0 are not finite"):
        nrr_dd.select(broken, torch.zeros(6, 3, 16, 16, dtype=torch.uint8), None, 0, QUICK, size=16, **FACTS,
                      generator=rng(0))  # fmt: skip


# ---------------------------------------------------------------- the copy rule

ALONE = f"""
import torch, torchvision, nrr_dd
nrr_dd.recognises = lambda *_: None  # the teachers are untrained
{OWN_NETWORK}
images = torch.randint(0, 256, (30, 3, 64, 64), dtype=torch.uint8)
config = nrr_dd.Config(ipc=1, pool=2, iterations=2, label_refinement=1.0)
for teacher in (torchvision.models.resnet18(num_classes=3), Own()):
    out = nrr_dd.distill(images, torch.arange(30) % 3, teacher.eval(), config, mean=(0.5,) * 3, std=(0.2,) * 3,
                         generator=torch.Generator().manual_seed(0))
    assert out["images"].shape == (3, 3, 64, 64) and out["images"].isfinite().all()
print("alone")
"""


def test_the_file_runs_alone(tmp_path):
    assert said_alone("nrr_dd", ALONE, tmp_path) == "alone\n"
