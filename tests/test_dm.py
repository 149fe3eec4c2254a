"""DM against a class loop written from its formula, closed forms, resume, determinism and the copy rule."""

import os
import shutil
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import pil_to_tensor

from benchmarks import plain_augment, plain_dm
from common import networks
from common.augment import DiffAugment, rng
from methods import dm
from methods.dm import Config, Embedding, State
from tests.copied_file import killed_state, said_alone

AUGMENT = DiffAugment()


def maker(name="convnet3-instance-w32", classes=3, size=16, channels=3, dtype=torch.float32):
    return lambda generator: networks.make(
        name, classes=classes, size=size, channels=channels, generator=generator
    ).to(dtype)  # fmt: skip


def real(dtype=torch.float32, counts=(20, 20, 20), size=16, channels=3):
    """Images with a mean of their own for each class, the classes mixed."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=rng("order"))]
    images = torch.randn(len(labels), channels, size, size, generator=rng("real"), dtype=torch.float64)
    return (images + labels[:, None, None, None]).to(dtype), labels


QUICK = Config(ipc=2, iterations=5, batch_real=8)


def distill(config=QUICK, data=None, **changes):
    settings = {"make_network": maker(), "augment": AUGMENT, "generator": rng(1)} | changes
    return dm.distill(*(data or real()), config, **settings)


# ---------------------------------------------------------------- against the plain form


def compare(config, data, make_network, augment, tolerance):
    """Images and loss after each step, and the first image gradient, of ours and of the plain loop."""
    states = []
    dm.distill(
        *data, config, make_network=make_network, augment=augment, generator=rng(3),
        on_step=lambda s: states.append((s.images, s.velocity, float(s.loss))),
    )  # fmt: skip
    images, labels = data
    generator = rng(3)
    rows = [(labels == k).nonzero().flatten() for k in range(int(labels.max()) + 1)]
    start = images[torch.cat([r[torch.randperm(len(r), generator=generator)[: config.ipc]] for r in rows])]
    draw = (lambda k, g: augment.draw(k, g, siamese=True)) if augment else None
    loop = plain_dm.distill(
        images, labels, start, make_network=make_network, draw=draw, generator=generator, lr=config.lr,
        momentum=config.momentum, batch_real=config.batch_real,
        augment=partial(plain_augment.augment, strategy=augment.strategy if augment else ""),
    )  # fmt: skip
    for step, (ours, wanted) in enumerate(zip(states, loop, strict=False)):
        x, gradient, loss = wanted
        assert ours[2] == pytest.approx(loss, rel=tolerance)
        if step == 0:  # the velocity of the first step is the gradient
            assert (ours[1] - gradient).norm() < tolerance * gradient.norm()
        assert (ours[0] - x).norm() < tolerance * (x - start).norm()
    assert len(states) == config.iterations


@pytest.mark.parametrize("name", ["convnet3-instance-w32", "convnet3-w32", "convnet3-group-w32"])
def test_steps_are_those_of_the_class_loop(name):
    make = maker(name, dtype=torch.float64)
    compare(Config(ipc=3, iterations=6, batch_real=12), real(torch.float64), make, AUGMENT, 1e-9)
    # One step in fp32: rounding may put a unit of a ReLU on its other side, which the next steps carry along.
    compare(Config(ipc=3, iterations=1, batch_real=12), real(), maker(name), AUGMENT, 1e-4)


@pytest.mark.parametrize("name", ["convnet3-instance-w32", "convnet3-w32"])
def test_classes_of_different_size(name):
    """The real batch of a small class is the whole of it."""
    data, make = real(torch.float64, (3, 20, 11)), maker(name, dtype=torch.float64)
    compare(Config(ipc=2, iterations=3, batch_real=16, chunk=7), data, make, AUGMENT, 1e-9)


def test_without_augmentation():
    compare(Config(ipc=2, iterations=3, batch_real=8), real(torch.float64), maker(dtype=torch.float64), None, 1e-9)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (1, 9), (4, 13)])
def test_any_channels_and_odd_sizes(channels, size):
    data = real(torch.float64, size=size, channels=channels)
    make = maker(channels=channels, size=size, dtype=torch.float64)
    compare(Config(ipc=2, iterations=2, batch_real=6), data, make, DiffAugment("color_crop_cutout_scale_rotate"), 1e-9)


@pytest.mark.parametrize("chunk", [1, 5, 8, 1000])
def test_chunks_do_not_change_the_result(chunk):
    data, make = real(torch.float64), maker(dtype=torch.float64)
    config = {"ipc": 3, "iterations": 3, "batch_real": 10}
    wanted = distill(Config(**config), data, make_network=make)["images"]
    ours = distill(Config(**config, chunk=chunk), data, make_network=make)["images"]
    torch.testing.assert_close(ours, wanted, atol=1e-11, rtol=1e-11)


# ---------------------------------------------------------------- closed forms


class Pixels(nn.Module):
    """psi is the image itself."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(3 * 16 * 16, 3)

    def forward(self, x):
        return self.last(x.flatten(1))


def test_with_pixels_as_features_every_image_follows_the_gap_of_the_means():
    """d L / d s = -2 (mean B_k - mean S_k) / I, then SGD with momentum."""
    data = real(torch.float64)
    images, labels = data
    config = Config(ipc=4, iterations=3, batch_real=20, lr=0.7, momentum=0.5)
    seen = []
    distill(
        config, data, make_network=lambda _: Pixels().double(), augment=None, on_step=lambda s: seen.append(s.images)
    )
    rows = [(labels == k).nonzero().flatten() for k in range(3)]
    x = images[torch.cat(dm.draw_real(rows, 4, rng(1)))]
    target, velocity = torch.stack([images[r].mean(0) for r in rows]), 0
    for ours in seen:
        gap = target - x.unflatten(0, (3, 4)).mean(1)
        velocity = 0.5 * velocity - 2 * gap.repeat_interleave(4, 0) / 4
        x = x - 0.7 * velocity
        torch.testing.assert_close(ours, x, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["convnet3-instance-w32", "convnet3-w32"])
def test_the_loss_of_real_images_against_themselves_is_zero(name):
    """Same images, same augmentation (13.5)."""
    losses = []
    config = Config(ipc=20, iterations=1, batch_real=20)
    compared = {"make_network": maker(name, dtype=torch.float64), "on_step": lambda s: losses.append(float(s.loss))}
    distill(config, real(torch.float64), **compared)
    assert losses[0] < 1e-20
    distill(Config(ipc=20, iterations=1, batch_real=20, init="noise"), real(torch.float64), **compared)
    assert losses[1] > 1e-3


def test_a_class_moves_its_own_images_only():
    psi = Embedding(maker(dtype=torch.float64)(rng(0)))
    x = torch.randn(12, 3, 16, 16, generator=rng(1), dtype=torch.float64)
    means = psi(x).unflatten(0, (3, 4)).mean(1)
    means[1] += 1
    for block in (1, 2, 3):
        loss, gradient = dm.image_gradient(psi, x, means, lambda x, _: x, block)
        assert loss.item() == pytest.approx(means.shape[1])
        moved = gradient.flatten(1).norm(dim=1)
        assert moved[4:8].min() > 1e-3 and moved[:4].max() < 1e-9 and moved[8:].max() < 1e-9


def test_features_are_not_pooled_and_enter_the_classifier():
    net = networks.make("convnet3-instance", classes=10, size=32, generator=rng(0))
    x = torch.randn(2, 3, 32, 32, generator=rng(1))
    features = Embedding(net)(x)
    assert features.shape == (2, 2048)
    torch.testing.assert_close(net.classifier(features), net(x), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- the loop


def test_every_step_has_a_fresh_network_that_is_never_trained():
    made, kept = [], []

    def make(generator):
        made.append(maker()(generator))
        kept.append({k: v.clone() for k, v in made[-1].state_dict().items()})
        return made[-1]

    distill(make_network=make)
    used = kept[1:]  # the first one only gives its shape
    assert len(used) == QUICK.iterations
    first = [w["classifier.weight"] for w in used]
    assert all(not torch.equal(a, b) for a, b in pairwise(first))
    for net, before in zip(made, kept, strict=True):
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_loss_falls():
    """Against images that stay where they start: same networks, same real batches."""
    losses = {}
    for lr in (0.0, 10.0):
        config, kept = Config(ipc=1, iterations=40, batch_real=20, init="noise", lr=lr), []
        distill(config, augment=None, on_step=lambda s, kept=kept: kept.append(float(s.loss)))
        losses[lr] = kept
    assert sum(losses[10.0][-5:]) < 0.8 * sum(losses[0.0][-5:])


def test_where_the_images_start():
    images, labels = real()
    starts = {}
    for init in ("real", "noise"):
        config = Config(ipc=6, iterations=1, lr=0.0, init=init)
        out = distill(config)
        assert out["labels"].tolist() == [0] * 6 + [1] * 6 + [2] * 6
        assert out["images"].dtype == torch.float32 and out["images"].shape == (18, 3, 16, 16)
        starts[init] = out["images"]
    for x, label in zip(starts["real"], out["labels"], strict=True):
        (row,) = (images == x).flatten(1).all(1).nonzero()
        assert labels[row] == label
    assert len(starts["real"].unique(dim=0)) == 18
    assert abs(starts["noise"].mean()) < 0.05 and abs(starts["noise"].std() - 1) < 0.05


def test_bytes_are_prepared():
    """uint8 with prepare gives what its floats give."""
    images = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8, generator=rng(5))
    labels = torch.arange(30) % 3
    prepare = lambda x: (x.float() / 255 - 0.4) / 0.2  # noqa: E731
    ours = distill(data=(images, labels), prepare=prepare)["images"]
    assert torch.equal(ours, distill(data=(prepare(images), labels))["images"])


def test_two_seeded_runs_are_equal_and_leave_the_global_state():
    before = torch.get_rng_state()
    one, two, other = distill(), distill(), distill(generator=rng(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one["images"], two["images"])
    assert not torch.equal(one["images"], other["images"])


@pytest.mark.parametrize("name", ["convnet3-instance-w32", "convnet3-w32"])
@pytest.mark.parametrize("stop", [1, 4])
def test_a_stopped_run_continues_bit_for_bit(name, stop):
    make = {"make_network": maker(name)}
    whole, kept = distill(**make)["images"], killed_state(stop, distill, **make)
    assert int(kept["at"]) == stop
    resumed = distill(**make, state=State.restore(kept), generator=rng("another"))["images"]
    assert torch.equal(resumed, whole)


def test_dropout_is_off():
    """A network with dropout gives what it gives without, and draws nothing."""

    def make(generator, share=0.5):
        net = maker()(generator)
        net.features.append(nn.Dropout(share))
        return net

    with_it = distill(make_network=make)["images"]
    assert torch.equal(with_it, distill(make_network=lambda g: make(g, 0.0))["images"])


# ---------------------------------------------------------------- precision and compilation


def gradient(data, **settings):
    """The first image gradient: it is the velocity after one step."""
    out = []
    config = Config(ipc=2, iterations=1, batch_real=8, chunk=16, **settings)

    def narrow(generator):
        with torch.random.fork_rng():
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            return networks.ConvNet(10, 32, width=8, norm="instance")

    distill(config, data, make_network=narrow, on_step=lambda state: out.append(state.velocity))
    return out[0].flatten()


def test_bf16_of_the_real_branch_keeps_the_image_gradient():
    """Real CIFAR-10, 8 images a class."""
    folder = Path(os.environ.get("DD_DATA", "nowhere")).expanduser() / "cifar10" / "test"
    files = [path for one in sorted(folder.glob("*")) for path in sorted(one.iterdir())[:8]]
    if len(files) < 80:
        pytest.skip("needs DD_DATA with cifar10/test/<class>/")
    pixels = torch.stack([pil_to_tensor(Image.open(path).convert("RGB")) for path in files])
    data = ((pixels / 255 - 0.47) / 0.2, torch.arange(10).repeat_interleave(8))
    exact, mixed, low = (gradient(data, precision=p) for p in ("fp32", "mixed", "bf16"))
    assert F.cosine_similarity(mixed, exact, dim=0) > 0.999
    assert F.cosine_similarity(low, exact, dim=0) > 0.9
    assert not torch.equal(mixed, exact) and not torch.equal(low, mixed)


@pytest.mark.slow
def test_compiled_steps_are_the_eager_ones():
    if shutil.which("c++") is None:
        pytest.skip("compiling needs a C++ compiler")
    config = {"ipc": 2, "iterations": 3, "batch_real": 8, "chunk": 24}
    make = maker("convnet2-instance-w32")
    eager, compiled = (distill(Config(**config, compile=c), make_network=make)["images"] for c in (False, True))
    torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- settings and errors


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"ipc": 0}, "ipc=0"), ({"init": "kmeans"}, "real, noise"), ({"precision": "fp8"}, "mixed"), ({"lr": -1.0}, "lr")],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)


def test_published_settings():
    assert Config() == Config(ipc=10, iterations=20_000, lr=1.0, momentum=0.5, batch_real=256, init="real")
    for (_, ipc), row in dm.PUBLISHED.items():
        Config(**row)
        assert row["lr"] == (10.0 if ipc else 1.0)
    assert ("cifar10", 50) not in dm.PUBLISHED and dm.PUBLISHED["cifar10", 100] == {"lr": 10.0}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (real(counts=(1, 20, 20)), "class 0 has 1 real images; ipc=2"),
        (real(counts=(20, 0, 20)), "class 1 has 0 real images"),
        ((torch.zeros(9, 3, 16, 16, dtype=torch.uint8), torch.arange(9) % 3), "torch.uint8"),
        ((torch.zeros(9, 3, 16, 16), torch.arange(6) % 3), "9 images and 6 labels"),
    ],
)
def test_wrong_data_is_named(data, words):
    with pytest.raises(ValueError, match=words):
        distill(data=data)


def test_a_network_without_a_linear_layer_is_named():
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear"):
        distill(make_network=lambda _: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()))


def test_images_that_are_not_finite_stop_the_run_and_are_not_handed_out():
    images, labels = real()
    images[labels == 1] = torch.nan
    with pytest.raises(FloatingPointError, match=r"iteration 5 \(loss nan\)"):
        distill(data=(images, labels))
    kept = []
    with pytest.raises(FloatingPointError, match="after iteration 1"):
        distill(data=(images, labels), on_step=lambda state: kept.append(state.tensors()))
    assert kept == []


# ---------------------------------------------------------------- the copy rule

ALONE = """
import torch, dm

def make_network(generator):
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        conv, linear = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8 * 9, 3)
        return torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.Flatten(), linear)

images, labels = torch.randn(30, 3, 5, 5), torch.arange(30) % 3
out = dm.distill(images, labels, dm.Config(ipc=2, iterations=2), make_network=make_network,
                 generator=torch.Generator().manual_seed(0))
assert out["images"].shape == (6, 3, 5, 5) and out["images"].isfinite().all()
print("alone")
"""


def test_the_file_runs_alone(tmp_path):
    assert said_alone("dm", ALONE, tmp_path) == "alone\n"
