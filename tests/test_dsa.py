"""DSA against its plain form: siamese augmentation, image gradient, whole loop, resume, what it shares with DC."""

import os
import shutil
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import plain_dc
from common import datasets
from common.augment import DiffAugment, rng
from common.networks import ConvNet
from methods import dc, dsa
from methods.dsa import Config, Network, Real, State
from tests.copied_file import killed_state, said_alone

CPU = torch.device("cpu")
K, SIZE = 3, 8
LOOP = Config(ipc=2, outer=3, inner=2, iterations=2, batch_real=5, batch_train=4, in_flight=2, lr=1.0, network_lr=0.1)
AUGMENT = DiffAugment()


def maker(norm="instance", dtype=torch.float64, size=SIZE, width=6, classes=K):
    """A make_network for a ConvNet-2 of this kind."""

    def make(generator):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            return ConvNet(classes, size, 3, depth=2, width=width, norm=norm).to(dtype)

    return make


def real_set(dtype=torch.float64):
    """Classes of 9, 7 and 4 images, in mixed order: batches of different sizes, pieces that need filling."""
    labels = torch.tensor([0] * 9 + [1] * 7 + [2] * 4)[torch.randperm(20, generator=rng("order"))]
    images = torch.randn(20, 3, SIZE, SIZE, generator=rng("real"), dtype=torch.float64)
    return (images + labels[:, None, None, None]).to(dtype), labels


def start(config, images):
    return torch.randn(K * config.ipc, *images.shape[1:], generator=rng("start"), dtype=torch.float64).to(images.dtype)


def one_step(config, make, images, labels, seed=0, augment=AUGMENT):
    """Loss and gradient by the images of the first outer step from a fixed start."""
    generator = rng("step", seed)
    network, real = Network(make, config, CPU), Real(images, labels, config, None, CPU)
    network.renew(make(generator))
    if network.norms:
        network.measure(real.load(torch.cat(real.draw(16, generator))))
    return dsa.image_gradient(network, real, start(config, images), augment, config, generator)


def plain(config, make, images, labels, generator):
    return plain_dc.distill(
        images, labels, start(config, images), make_network=make, generator=generator, draw=AUGMENT.draw,
        outer=config.loops[0], inner=config.loops[1], lr=config.lr, momentum=config.momentum,
        network_lr=config.network_lr, batch_real=config.batch_real, batch_train=config.batch_train,
    )  # fmt: skip


def ours(config, make, images, labels, generator, augment=AUGMENT, **more):
    """distill from the start of the plain form."""
    x = start(config, images)
    state = State(x, torch.zeros_like(x), generator.get_state())
    return dsa.distill(
        images, labels, config, make_network=make, augment=augment, generator=generator, state=state, **more
    )


class Recorder:
    """DiffAugment that keeps what it was asked for."""

    def __init__(self):
        self.draws, self.calls = [], []

    def draw(self, rows, generator, *, siamese):
        self.draws.append((rows, siamese))
        return AUGMENT.draw(rows, generator, siamese=siamese)

    def __call__(self, images, draw):
        self.calls.append((images.detach(), draw))
        return AUGMENT(images, draw)


# ---------------------------------------------------------------- against the plain form


@pytest.mark.parametrize("seed", range(4))  # other operations each time
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_loss_and_image_gradient_are_those_of_the_plain_form(norm, seed):
    make, (images, labels) = maker(norm), real_set()
    loss, gradient = one_step(LOOP, make, images, labels, seed)
    _, wanted_gradient, wanted = next(plain(LOOP, make, images, labels, rng("step", seed)))
    assert loss.item() == pytest.approx(wanted, rel=1e-9)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-9, atol=1e-9 * wanted_gradient.abs().max().item())


def test_loss_and_image_gradient_in_single_precision():
    make, (images, labels) = maker(dtype=torch.float32), real_set(torch.float32)
    loss, gradient = one_step(LOOP, make, images, labels)
    _, wanted_gradient, wanted = next(plain(LOOP, make, images, labels, rng("step", 0)))
    assert loss.item() == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-4 * wanted_gradient.abs().max().item())


@pytest.mark.parametrize(
    ("norm", "dtype", "tolerance"),
    [("instance", torch.float64, 1e-9), ("batch", torch.float64, 1e-9), ("instance", torch.float32, 1e-4)],
)
def test_the_loop_makes_the_images_of_the_plain_form(norm, dtype, tolerance):
    """Two networks, three outer steps each, augmented inner training between them in batches of 4 and 2."""
    make, (images, labels) = maker(norm, dtype), real_set(dtype)
    losses = []
    out = ours(LOOP, make, images, labels, rng("loop"), on_step=lambda s: losses.append(float(s.loss)))
    steps = list(islice(plain(LOOP, make, images, labels, rng("loop")), 6))
    torch.testing.assert_close(out["images"], steps[-1][0], rtol=tolerance, atol=tolerance / 10)
    wanted = [sum(loss for _, _, loss in steps[i : i + 3]) / 3 / K for i in (0, 3)]
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert (out["images"] - start(LOOP, images)).abs().max() > 0.1  # they moved


@pytest.mark.parametrize("change", [{"memory": "class"}, {"in_flight": 1}, {"in_flight": 100}])
def test_memory_settings_do_not_change_the_update(change):
    make, (images, labels) = maker(), real_set()
    _, gradient = one_step(LOOP, make, images, labels)
    _, other = one_step(replace(LOOP, **change), make, images, labels)
    torch.testing.assert_close(other, gradient, rtol=1e-10, atol=1e-12 * gradient.abs().max().item())


# ---------------------------------------------------------------- the augmentation


@pytest.mark.parametrize("memory", ["all", "class"])
def test_real_and_synthetic_images_of_a_class_share_one_draw(memory):
    recorder, (images, labels) = Recorder(), real_set()
    one_step(replace(LOOP, memory=memory), maker(), images, labels, augment=recorder)
    assert recorder.draws == [(K, True)]
    x, seen = start(LOOP, images).unflatten(0, (K, -1)), {k: [] for k in range(K)}
    for batch, draw in recorder.calls:
        for part, row in zip(batch.unflatten(0, (len(draw.operation), -1)), range(len(draw.operation)), strict=True):
            values = draw.values[row].tolist()
            (k,) = [k for k in range(K) if torch.equal(part, x[k])] or {
                int(labels[(images == image).flatten(1).all(1)]) for image in part
            }
            seen[k].append((draw.operation[row].item(), *values))
    each = [4, 4, 3]  # the real batches of 5, 5 and 4 in pieces of 2, and the synthetic images
    assert [len(s) for s in seen.values()] == each and all(len(set(s)) == 1 for s in seen.values())
    assert len({s[0] for s in seen.values()}) == K


def test_the_network_is_trained_on_images_augmented_one_by_one():
    recorder, (images, labels) = Recorder(), real_set()
    ours(replace(LOOP, iterations=1), maker(), images, labels, rng(0), augment=recorder)
    training = [(4, False), (2, False)] * LOOP.inner
    assert recorder.draws == [(K, True), *training, (K, True), *training, (K, True)]


def test_the_gradient_flows_through_the_augmentation():
    """Half of every image is hidden from the network: the gradient there is 0."""

    class Hide(Recorder):
        def __call__(self, images, draw):
            return torch.cat([images[..., :4], 0 * images[..., 4:]], 3)

    _, gradient = one_step(LOOP, maker(), *real_set(), augment=Hide())
    assert (gradient[..., 4:] == 0).all() and (gradient[..., :4] != 0).any()


# ---------------------------------------------------------------- the loop


def test_at_one_image_a_class_the_network_is_never_trained(monkeypatch):
    monkeypatch.setattr(dsa, "train", lambda *_: pytest.fail("the network was trained"))
    recorder, (images, labels) = Recorder(), real_set()
    config = Config(ipc=1, iterations=3, batch_real=5)
    dsa.distill(images, labels, config, make_network=maker(), augment=recorder, generator=rng(0))
    assert recorder.draws == [(K, True)] * 3


def test_starts_as_real_images_of_the_class():
    images, labels = real_set()
    for k, image in enumerate(State.start(Real(images, labels, LOOP, None, CPU), LOOP, rng(0)).images):
        (row,) = (images == image).flatten(1).all(1).nonzero()
        assert labels[row] == k // 2


def test_seeds_decide_and_the_global_state_is_left_alone():
    images, labels = real_set(torch.float32)

    def run(seed):
        make = maker(dtype=torch.float32)
        return dsa.distill(images, labels, LOOP, make_network=make, augment=AUGMENT, generator=rng(seed))["images"]

    before = torch.random.get_rng_state()
    one, two, other = run(0), run(0), run(1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_stopped_run_continues_bit_for_bit(stop):
    images, labels = real_set(torch.float32)
    given = (images, labels, replace(LOOP, iterations=4))
    more = {"make_network": maker(dtype=torch.float32), "augment": AUGMENT}
    whole = dsa.distill(*given, generator=rng(0), **more)["images"]
    kept = killed_state(stop, dsa.distill, *given, generator=rng(0), **more)
    resumed = dsa.distill(*given, generator=rng("other"), state=State.restore(kept), **more)
    assert torch.equal(resumed["images"], whole)


def test_without_an_augmentation_it_says_what_to_pass():
    images, labels = real_set()
    with pytest.raises(ValueError, match=r"augment=None: DSA needs one; pass DiffAugment\('color_crop"):
        dsa.distill(images, labels, LOOP, make_network=maker(), generator=rng(0))


# ---------------------------------------------------------------- precision, compilation


def test_mixed_precision_keeps_the_image_gradient_on_real_images():
    folder = Path(os.environ.get("DD_DATA") or "nowhere").expanduser() / "cifar10" / "test"
    if not folder.is_dir():
        pytest.skip("real images: set DD_DATA to a folder that holds cifar10")
    data = datasets.load("cifar10", os.environ["DD_DATA"], split="test")
    rows = torch.cat([(data.labels == k).nonzero().flatten()[:8] for k in range(10)])
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.mean, data.std))
    images, labels = (data.images[rows] / 255 - mean) / std, data.labels[rows]
    make = maker(dtype=torch.float32, size=32, width=16, classes=10)
    found = {}
    for precision in ("fp32", "mixed"):
        config, generator = Config(ipc=1, batch_real=8, precision=precision), rng(0)
        network, real = Network(make, config, CPU), Real(images, labels, config, None, CPU)
        network.renew(make(generator))
        x = State.start(real, config, generator).images
        found[precision] = dsa.image_gradient(network, real, x, AUGMENT, config, generator)[1].flatten()
    assert not torch.equal(*found.values())
    assert F.cosine_similarity(*found.values(), dim=0) > 0.99


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="compiling needs a C++ compiler")
def test_compiled_functions_make_the_same_images():
    images, labels = real_set(torch.float32)
    config = replace(LOOP, batch_real=6, in_flight=6, batch_train=6)  # one shape: two functions to compile
    make = maker(dtype=torch.float32, width=2)
    eager, compiled = (ours(replace(config, compile=c), make, images, labels, rng(0))["images"] for c in (False, True))
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- what is shared with DC, the copy rule


def test_the_settings_differ_from_those_of_dc_in_the_start_alone():
    differ = [f.name for f in fields(Config) if f.default != getattr(dc.Config(), f.name)]
    assert differ == ["init"] and Config().init == "real" and dc.Config().init == "noise"
    assert dsa.LOOPS == dc.LOOPS and dsa.PUBLISHED == dc.PUBLISHED


ALONE = """
import torch, dsa
class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = torch.nn.Conv2d(3, 4, 3), torch.nn.GroupNorm(4, 4), torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)).relu().amax((2, 3)))

class Brightness:
    def draw(self, rows, generator, *, siamese):
        return torch.rand(rows, generator=generator)

    def __call__(self, images, draw):
        return images + draw.repeat_interleave(len(images) // len(draw))[:, None, None, None]

images = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8)
config = dsa.Config(ipc=2, outer=2, inner=1, iterations=2)
out = dsa.distill(images, torch.arange(30) % 3, config, make_network=lambda _: Own(), prepare=lambda x: x / 255 - 0.5,
                  augment=Brightness(), generator=torch.Generator().manual_seed(0))
assert out["images"].shape == (6, 3, 8, 8) and out["images"].isfinite().all()
print("alone")
"""


def test_the_file_runs_alone(tmp_path):
    assert said_alone("dsa", ALONE, tmp_path) == "alone\n"
