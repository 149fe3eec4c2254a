"""DC against its plain form and closed forms: distance, image gradient, whole loop, resume, precision, copy rule."""

import os
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import plain_dc
from common import datasets
from common.augment import rng
from common.networks import ConvNet
from methods import dc
from methods.dc import Config, Network, Real, State
from tests.copied_file import killed_state, said_alone

CPU = torch.device("cpu")
K, SIZE = 3, 8
EXACT, SINGLE = {"rtol": 1e-9, "atol": 1e-11}, {"rtol": 1e-4, "atol": 1e-5}
LOOP = Config(ipc=2, outer=3, inner=2, iterations=2, batch_real=5, batch_train=4, in_flight=2, lr=1.0, network_lr=0.1)


def maker(norm="instance", dtype=torch.float64, channels=3, size=SIZE, width=6, classes=K):
    """A make_network for a ConvNet-2 of this kind."""

    def make(generator):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            return ConvNet(classes, size, channels, depth=2, width=width, norm=norm).to(dtype)

    return make


def real_set(dtype=torch.float64, channels=3, size=SIZE):
    """Classes of 9, 7 and 4 images, in mixed order: batches of different sizes, pieces that need filling."""
    labels = torch.tensor([0] * 9 + [1] * 7 + [2] * 4)[torch.randperm(20, generator=rng("order"))]
    images = torch.randn(20, channels, size, size, generator=rng("real"), dtype=torch.float64)
    return (images + labels[:, None, None, None]).to(dtype), labels


def one_step(config, make, images, labels, seed=0):
    """Loss, gradient by the images and the network of the first outer step from a fixed start."""
    generator = rng("step", seed)
    network, real = Network(make, config, CPU), Real(images, labels, config, None, CPU)
    network.renew(make(generator))
    if network.norms:
        network.measure(real.load(torch.cat(real.draw(16, generator))))
    loss, gradient = dc.image_gradient(network, real, start(config, images), config, generator)
    return loss, gradient, network


def start(config, images):
    return torch.randn(K * config.ipc, *images.shape[1:], generator=rng("start"), dtype=torch.float64).to(images.dtype)


def plain(config, make, images, labels, generator):
    return plain_dc.distill(
        images, labels, start(config, images), make_network=make, generator=generator, outer=config.loops[0],
        inner=config.loops[1], lr=config.lr, momentum=config.momentum, network_lr=config.network_lr,
        batch_real=config.batch_real, batch_train=config.batch_train, kind=config.distance,
    )  # fmt: skip


def ours(config, make, images, labels, generator, **more):
    """distill from the start of the plain form."""
    x = start(config, images)
    state = State(x, torch.zeros_like(x), generator.get_state())
    return dc.distill(images, labels, config, make_network=make, generator=generator, state=state, **more)


# ---------------------------------------------------------------- the distance


def gradients(seed, classes=10):
    """Made-up gradients of ConvNet-3 (width 128), output rows of length about 1."""
    shapes = {"1": (128, 27), "2": (128, 128, 3, 3), "3": (128, 128, 3, 3), "last": (classes, 2048)}
    found = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=rng(seed, name))
        found[f"{name}.weight"] = weight / weight[0].numel() ** 0.5
        found[f"{name}.bias"] = torch.randn(shape[0], generator=rng(seed, name, "bias"))
    return found


def test_distance_of_equal_opposite_and_scaled_gradients():
    g, rows = gradients(0), 3 * 128 + 10
    other = gradients(1)
    assert 0 <= dc.distance(g, g) < 1e-2
    assert dc.distance({n: -v for n, v in g.items()}, g).item() == pytest.approx(2 * rows, abs=1e-2)
    assert dc.distance(other, g).item() == pytest.approx(rows, rel=0.03)
    scaled = dc.distance({n: 7 * v for n, v in other.items()}, g)
    assert scaled.item() == pytest.approx(dc.distance(other, g).item(), abs=1e-2)


def test_distance_ignores_one_dimensional_tensors_and_damps_short_rows():
    g, other = gradients(0), gradients(1)
    changed = {n: v + 5 if v.ndim == 1 else v for n, v in other.items()}
    assert torch.equal(dc.distance(changed, g), dc.distance(other, g))
    for kind in ("mse", "cos"):
        assert not torch.isclose(dc.distance(changed, g, kind), dc.distance(other, g, kind), rtol=1e-3)
    short = {"weight": torch.full((1, 1), 1e-3, dtype=torch.float64)}
    assert dc.distance(short, short).item() == pytest.approx(0.5)  # 1 - 1e-6 / (1e-6 + 1e-6)


def test_distance_takes_the_first_dimension_as_rows_whatever_the_others():
    a, b = (torch.randn(4, 2, 3, generator=rng(s), dtype=torch.float64) for s in (1, 2))
    wanted = sum(1 - F.cosine_similarity(x.flatten(), y.flatten(), dim=0) for x, y in zip(a, b, strict=True))
    assert dc.distance({"layer": a}, {"layer": b}).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_distance_is_smooth_where_a_row_is_zero():
    a = torch.randn(3, 4, generator=rng(1), dtype=torch.float64)
    a[1] = 0
    a.requires_grad_()
    loss = dc.distance({"w": a}, {"w": torch.ones(3, 4, dtype=torch.float64)})
    assert torch.autograd.grad(loss, a)[0].isfinite().all()


# ---------------------------------------------------------------- against the plain form


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("kind", ["ours", "mse", "cos"])
def test_loss_and_image_gradient_are_those_of_the_plain_form(norm, kind):
    config, make, (images, labels) = replace(LOOP, distance=kind), maker(norm), real_set()
    loss, gradient, _ = one_step(config, make, images, labels)
    _, wanted_gradient, wanted = next(plain(config, make, images, labels, rng("step", 0)))
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-9, atol=1e-9 * wanted_gradient.abs().max().item())


def test_loss_and_image_gradient_in_single_precision():
    make, (images, labels) = maker(dtype=torch.float32), real_set(torch.float32)
    loss, gradient, _ = one_step(LOOP, make, images, labels)
    _, wanted_gradient, wanted = next(plain(LOOP, make, images, labels, rng("step", 0)))
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-4 * wanted_gradient.abs().max().item())


@pytest.mark.parametrize(
    ("norm", "dtype", "tolerance"),
    [("instance", torch.float64, EXACT), ("batch", torch.float64, EXACT), ("instance", torch.float32, SINGLE)],
)
def test_the_loop_makes_the_images_of_the_plain_form(norm, dtype, tolerance):
    """Two networks, three outer steps each, inner training between them in batches of 4 and 2."""
    make, (images, labels) = maker(norm, dtype), real_set(dtype)
    losses = []
    out = ours(LOOP, make, images, labels, rng("loop"), on_step=lambda s: losses.append(float(s.loss)))
    steps = list(islice(plain(LOOP, make, images, labels, rng("loop")), 6))
    torch.testing.assert_close(out["images"], steps[-1][0], **tolerance)
    wanted = [sum(loss for _, _, loss in steps[i : i + 3]) / 3 / K for i in (0, 3)]
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert (out["images"] - start(LOOP, images)).abs().max() > 0.1  # they moved


@pytest.mark.parametrize("change", [{"memory": "class"}, {"in_flight": 1}, {"in_flight": 100}])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_memory_settings_do_not_change_the_update(change, norm):
    make, (images, labels) = maker(norm), real_set()
    _, gradient, _ = one_step(LOOP, make, images, labels)
    _, other, _ = one_step(replace(LOOP, **change), make, images, labels)
    torch.testing.assert_close(other, gradient, rtol=1e-10, atol=1e-12 * gradient.abs().max().item())


@pytest.mark.parametrize(("memory", "together"), [("all", [K]), ("class", [1] * K)])
def test_memory_decides_how_many_classes_are_differentiated_at_once(memory, together, monkeypatch):
    seen, exact = [], Network.synthetic_gradient
    monkeypatch.setattr(Network, "synthetic_gradient", lambda *a: seen.append(len(a[1])) or exact(*a))
    one_step(replace(LOOP, memory=memory), maker(), *real_set())
    assert seen == together


def test_images_of_a_class_follow_their_class_alone():
    """Other real images of class 2 leave the gradients of classes 0 and 1 as they are."""
    make, (images, labels) = maker(), real_set()
    _, one, _ = one_step(LOOP, make, images, labels)
    _, two, _ = one_step(LOOP, make, torch.where((labels == 2)[:, None, None, None], -images, images), labels)
    assert torch.equal(one[:4], two[:4]) and not torch.allclose(one[4:], two[4:])


def test_real_images_as_synthetic_ones_have_no_distance():
    """S_c = B_c: both gradients are the same, what is left comes from the 1e-6."""
    labels = torch.arange(K).repeat_interleave(4)
    images = torch.randn(12, 3, SIZE, SIZE, generator=rng(3), dtype=torch.float64)
    config = Config(ipc=4, outer=1, inner=1, batch_real=4)
    generator, make = rng(0), maker()
    network, real = Network(make, config, CPU), Real(images, labels, config, None, CPU)
    network.renew(make(generator))
    same, _ = dc.image_gradient(network, real, images, config, generator)
    other, _ = dc.image_gradient(network, real, images.flip(0), config, generator)
    assert same < 0.02 * other


# ---------------------------------------------------------------- BatchNorm


def test_batch_norm_is_measured_on_sixteen_images_a_class_and_frozen():
    make, (images, labels) = maker("batch"), real_set()
    _, _, network = one_step(LOOP, make, images, labels)
    generator = rng("step", 0)
    net = make(generator)
    inputs = []
    net.features[1].register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    net(images)  # classes have fewer than 16 images: all of them
    seen = inputs[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(network.buffers["features.1.running_mean"], 0.1 * seen.mean(1), **EXACT)
    torch.testing.assert_close(network.buffers["features.1.running_var"], 0.9 + 0.1 * seen.var(1), **EXACT)
    assert not any(norm.training for norm in network.norms)


# ---------------------------------------------------------------- the loop


def test_at_one_image_a_class_the_network_is_never_trained(monkeypatch):
    make, (images, labels) = maker(), real_set()
    built, seen = [], []
    recorded = lambda generator: built.append(make(generator)) or built[-1]  # noqa: E731
    step = dc.image_gradient
    monkeypatch.setattr(dc, "image_gradient", lambda net, *more: seen.append(dict(net.theta)) or step(net, *more))
    monkeypatch.setattr(dc, "train", lambda *_: pytest.fail("the network was trained"))
    config = Config(ipc=1, iterations=3, batch_real=5)
    dc.distill(images, labels, config, make_network=recorded, generator=rng(0))
    assert len(seen) == 3
    for net, theta in zip(built[1:], seen, strict=True):  # the first one built is the template
        assert all(torch.equal(p, theta[n]) for n, p in net.named_parameters())


def test_inner_training_is_plain_sgd_on_every_image_once_an_epoch():
    make, (images, _) = maker(), real_set()
    network = Network(make, replace(LOOP, batch_train=100), CPU)
    net = make(rng(0))
    network.renew(net)
    x, y = start(LOOP, images), torch.arange(K).repeat_interleave(LOOP.ipc)
    dc.train(network, x, y, 3, network.config, rng(1))
    for _ in range(3):
        gradient = torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), gradient, strict=True):
                p -= LOOP.network_lr * g
    for n, p in net.named_parameters():
        torch.testing.assert_close(network.theta[n], p, **EXACT)


def test_published_loops_and_their_override():
    loops = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
    assert {ipc: Config(ipc=ipc).loops for ipc in loops} == loops
    assert dc.PUBLISHED["cifar100", 50] == {"outer": 50, "inner": 10}
    assert Config(ipc=10, outer=3).loops == (3, 50)
    assert Config(ipc=7, outer=3, inner=2).loops == (3, 2)


def test_starts_as_noise_or_as_real_images_of_the_class():
    images, labels = real_set()
    noise = State.start(Real(images, labels, LOOP, None, CPU), LOOP, rng(0)).images
    assert noise.shape == (6, 3, SIZE, SIZE) and abs(noise.std() - 1) < 0.1 and abs(noise.mean()) < 0.1
    chosen = replace(LOOP, init="real")
    for k, image in enumerate(State.start(Real(images, labels, chosen, None, CPU), chosen, rng(0)).images):
        (row,) = (images == image).flatten(1).all(1).nonzero()
        assert labels[row] == k // 2


def test_the_loss_falls():
    losses, (images, labels) = [], real_set(torch.float32)
    config = Config(ipc=1, iterations=60, batch_real=9, lr=1.0)
    make = maker(dtype=torch.float32)
    dc.distill(images, labels, config, make_network=make, generator=rng(0), on_step=lambda s: losses.append(s.loss))
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_seeds_decide_and_the_global_state_is_left_alone():
    images, labels = real_set(torch.float32)
    run = lambda seed: dc.distill(  # noqa: E731
        images, labels, LOOP, make_network=maker(dtype=torch.float32), generator=rng(seed)
    )
    before = torch.random.get_rng_state()
    one, two, other = run(0), run(0), run(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one["images"], two["images"]) and not torch.equal(one["images"], other["images"])
    assert one["images"].dtype == torch.float32 and one["labels"].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stopped_run_continues_bit_for_bit(stop, norm):
    images, labels = real_set(torch.float32)
    given = (images, labels, replace(LOOP, iterations=4))
    make = maker(norm, torch.float32)
    whole = dc.distill(*given, make_network=make, generator=rng(0))["images"]
    state = State.restore(killed_state(stop, dc.distill, *given, make_network=make, generator=rng(0)))
    assert state.step == stop
    resumed = dc.distill(*given, make_network=make, generator=rng("other"), state=state)
    assert torch.equal(resumed["images"], whole)


def test_grey_images_of_odd_size_as_bytes():
    images = torch.randint(0, 256, (12, 1, 9, 11), dtype=torch.uint8, generator=rng(0))

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(1, 4, 3), nn.Linear(4, K)

        def forward(self, x):
            return self.last(self.conv(x).relu().mean((2, 3)))

    out = dc.distill(
        images, torch.arange(12) % K, replace(LOOP, init="real"), make_network=lambda _: Own(),
        prepare=lambda x: x / 255 - 0.5, generator=rng(0),
    )  # fmt: skip
    assert out["images"].shape == (6, 1, 9, 11) and out["images"].isfinite().all()


# ---------------------------------------------------------------- precision, compilation


def cifar_batches(each=8):
    """Real CIFAR-10: the first `each` images of ten classes, normalised."""
    folder = Path(os.environ.get("DD_DATA") or "nowhere").expanduser() / "cifar10" / "test"
    if not folder.is_dir():
        pytest.skip("real images: set DD_DATA to a folder that holds cifar10")
    data = datasets.load("cifar10", os.environ["DD_DATA"], split="test")
    rows = torch.cat([(data.labels == k).nonzero().flatten()[:each] for k in range(10)])
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
    return (data.images[rows] / 255 - mean) / std, data.labels[rows]


def test_mixed_precision_keeps_the_image_gradient_on_real_images():
    images, labels = cifar_batches()
    make = maker(dtype=torch.float32, size=32, width=16, classes=10)
    config, found = Config(ipc=1, batch_real=8), {}
    x = torch.randn(10, 3, 32, 32, generator=rng("noise"))
    for precision in ("fp32", "mixed"):
        settings, generator = replace(config, precision=precision), rng(0)
        network, real = Network(make, settings, CPU), Real(images, labels, settings, None, CPU)
        network.renew(make(generator))
        found[precision] = dc.image_gradient(network, real, x, settings, generator)[1].flatten()
    assert not torch.equal(*found.values())
    assert F.cosine_similarity(*found.values(), dim=0) > 0.99


@pytest.mark.parametrize(("precision", "norm"), [("mixed", "instance"), ("mixed", "batch"), ("bf16", "instance")])
def test_lower_precision_runs_the_whole_loop(precision, norm):
    images, labels = real_set(torch.float32)
    exact, low = (
        ours(replace(LOOP, precision=p), maker(norm, torch.float32), images, labels, rng(0))["images"]
        for p in ("fp32", precision)
    )
    moved, wanted = (x - start(LOOP, images) for x in (low, exact))
    assert not torch.equal(moved, wanted)
    assert F.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.9


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling needs a C++ compiler")
def test_compiled_functions_make_the_same_images():
    images, labels = real_set(torch.float32)
    config = replace(LOOP, batch_real=6, in_flight=6, batch_train=6)  # one shape: two functions to compile
    make = maker(dtype=torch.float32, width=2)
    eager, compiled = (ours(replace(config, compile=c), make, images, labels, rng(0))["images"] for c in (False, True))
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ipc": 0}, "ipc=0"),
        ({"ipc": 7}, "ipc=7 has no published loops; allowed: 1, 10, 20, 30, 40, 50, or give outer and inner"),
        ({"ipc": 7, "outer": 3}, "ipc=7"),
        ({"distance": "l1"}, "ours, mse, cos"),
        ({"init": "zeros"}, "noise, real"),
        ({"memory": "low"}, "all, class"),
        ({"precision": "fp16"}, "fp32, mixed, bf16"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Config(**settings)


def test_wrong_data_is_named():
    images, labels = real_set()
    run = lambda images, labels, config=LOOP, **more: dc.distill(  # noqa: E731
        images, labels, config, make_network=maker(), generator=rng(0), **more
    )
    with pytest.raises(ValueError, match="20 images but 19 labels"):
        run(images, labels[1:])
    with pytest.raises(ValueError, match="class 1 has 0 images"):
        run(images, labels * 2)
    with pytest.raises(ValueError, match="class 2 has 4 images; init=real needs at least 5"):
        run(images, labels, replace(LOOP, ipc=5, init="real"))
    with pytest.raises(ValueError, match=r"torch.uint8; pass float images, or prepare="):
        run(images.byte(), labels)
    with pytest.raises(ValueError, match="precision='bf16' cannot take a network with BatchNorm"):
        dc.distill(images, labels, replace(LOOP, precision="bf16"), make_network=maker("batch"), generator=rng(0))
    with pytest.raises(ValueError, match="DC has no augmentation"):
        run(images, labels, augment=lambda x, draw: x)


def test_a_loss_that_is_not_finite_stops_with_the_iteration():
    images, labels = real_set()
    with pytest.raises(FloatingPointError, match=r"nan at iteration 2 \(lr=1.0"):
        dc.distill(images * float("nan"), labels, LOOP, make_network=maker(), generator=rng(0))
    with pytest.raises(FloatingPointError, match="not finite after iteration 1;"):
        dc.distill(
            images * float("nan"), labels, LOOP, make_network=maker(), generator=rng(0),
            on_step=lambda state: state.tensors(),
        )  # fmt: skip


# ---------------------------------------------------------------- the copy rule

ALONE = """
import torch, dc
class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(4, 4), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)).relu().amax((2, 3)))

images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
config = dc.Config(ipc=2, outer=2, inner=1, iterations=2)
out = dc.distill(images, torch.arange(30) % 3, config, make_network=lambda _: Own(), prepare=lambda x: x / 255 - 0.5,
                 generator=torch.Generator().manual_seed(0))
assert out["images"].shape == (6, 3, 8, 8) and out["images"].isfinite().all()
print("alone")
"""


def test_the_file_runs_alone(tmp_path):
    assert said_alone("dc", ALONE, tmp_path) == "alone\n"
