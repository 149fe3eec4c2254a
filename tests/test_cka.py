"""CKA against its formulas written out in float64, its invariances, and what hooks see of networks."""

import pytest
import torch
from torch import nn

from common import networks
from common.augment import rng
from common.cka import cka, debiased_cka, layer_features, layer_names, similarity, unbiased_cka

ALL = [cka, debiased_cka, lambda x, y: unbiased_cka(x, y, 8)]
ids = ["full", "debiased", "minibatch"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=rng("features", seed, *shape), dtype=torch.float64).to(dtype)


def pair(n=40, d1=6, d2=9):
    """Features that share some directions."""
    x = normal(n, d1)
    return x, x @ normal(d1, d2, seed=1) + normal(n, d2, seed=2)


# ---------------------------------------------------------------- formulas, written out


def explicit_cka(x, y):
    n = len(x)
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    k, m = h @ x @ x.T @ h, h @ y @ y.T @ h
    return float((k @ m).trace() / ((k @ k).trace() * (m @ m).trace()).sqrt())


def explicit_hsic1(k, m):
    n = len(k)
    k, m, one = k.clone().fill_diagonal_(0), m.clone().fill_diagonal_(0), torch.ones(n, dtype=torch.float64)
    sums = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return ((k @ m).trace() + sums - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def explicit_unbiased(x, y, batch):
    parts = [(a @ a.T, b @ b.T) for a, b in zip(x.split(batch), y.split(batch), strict=True) if len(a) == batch]
    cross, own_x, own_y = (
        sum(explicit_hsic1(p[i], p[j]) for p in parts) / len(parts) for i, j in ((0, 1), (0, 0), (1, 1))
    )
    return float(cross / (own_x * own_y).sqrt())


@pytest.mark.parametrize("sizes", [(6, 9), (6, 900), (700, 900)])  # fewer and more features than images
def test_formulas(sizes):
    x, y = pair(41, *sizes)
    assert cka(x, y) == pytest.approx(explicit_cka(x, y), rel=1e-10)
    assert debiased_cka(x, y) == pytest.approx(explicit_unbiased(x, y, 41), rel=1e-10)
    assert unbiased_cka(x, y, 41) == pytest.approx(explicit_unbiased(x, y, 41), rel=1e-10)
    assert unbiased_cka(x, y, 8) == pytest.approx(explicit_unbiased(x, y, 8), rel=1e-10)  # the last image is left out


def test_means_are_taken_before_the_ratio():
    x, y = pair(40)
    x[20:] *= 5  # batches of unlike size, whose ratios differ
    ratios = [unbiased_cka(x[i : i + 20], y[i : i + 20], 20) for i in (0, 20)]
    assert abs(unbiased_cka(x, y, 20) - sum(ratios) / 2) > 1e-3
    assert unbiased_cka(x, y, 20) == pytest.approx(explicit_unbiased(x, y, 20), rel=1e-10)


def test_a_value_by_hand():
    x, y = torch.tensor([[0.0], [1], [2]]), torch.tensor([[5.0], [3], [7]])  # centred: (-1, 0, 1) and (0, -2, 2)
    assert cka(x, y) == pytest.approx(2**2 / (2 * 8))  # <x, y>^2 / (|x|^2 |y|^2)


# ---------------------------------------------------------------- invariances


@pytest.mark.parametrize("form", ALL, ids=ids)
def test_invariances(form):
    x, y = pair()
    value = form(x, y)
    rotation = torch.linalg.qr(normal(9, 9, seed=5))[0]
    permutation = torch.randperm(9, generator=rng(1))
    for moved in (y @ rotation, y[:, permutation], 1e-3 * y, -1e3 * y, y + 7 * normal(9, seed=6)):
        assert form(x, moved) == pytest.approx(value, rel=1e-6)
    assert form(y, x) == pytest.approx(value, rel=1e-10)
    stretched = y * torch.tensor([10.0] + [1] * 8, dtype=torch.float64)
    assert abs(form(x, stretched) - value) > 0.05
    assert 0.1 < value < 0.9


@pytest.mark.parametrize("form", ALL, ids=ids)
def test_of_itself_1_and_of_a_constant_0(form):
    x, _ = pair()
    assert form(x, x) == pytest.approx(1, rel=1e-10)
    assert form(x, torch.full((40, 3), 0.7)) == pytest.approx(0, abs=1e-6)


def test_independent_features():
    """More features than images: the plain value is near 1, the unbiased ones are near 0 on either side."""
    draws = [(normal(64, 600, seed=2 * s), normal(64, 600, seed=2 * s + 1)) for s in range(20)]
    assert all(cka(x, y) > 0.8 for x, y in draws)
    for form in (debiased_cka, lambda x, y: unbiased_cka(x, y, 16)):
        values = torch.tensor([form(x, y) for x, y in draws])
        assert values.abs().max() < 0.25 and abs(values.mean()) < 0.05
        assert values.min() < 0 < values.max()  # the numerator is not clamped


def test_batches_do_not_shift_the_value():
    """Over many draws small batches have the mean of large ones; the biased form has not."""
    small = large = 0
    for seed in range(60):
        x = normal(64, 8, seed=seed)
        y = x @ normal(8, 8, seed=-1) + 2 * normal(64, 8, seed=1000 + seed)
        small, large = small + unbiased_cka(x, y, 8) / 60, large + unbiased_cka(x, y, 64) / 60
    assert small == pytest.approx(large, abs=0.02)


def test_float32_features_keep_their_digits():
    x, y = pair(64, 3000, 3000)
    x, y = x + 50, y - 50  # far from zero
    exact = unbiased_cka(x, y, 32)
    assert unbiased_cka(x.float(), y.float(), 32) == pytest.approx(exact, abs=1e-5)
    assert cka(x.float(), y.float()) == pytest.approx(cka(x, y), abs=1e-5)


# ---------------------------------------------------------------- layers


def make(name, seed=0, size=8):
    return networks.make(name, classes=4, size=size, generator=rng("net", seed))


def prepare(images):
    assert images.dtype == torch.uint8
    return (images / 255 - 0.5) / 0.25


IMAGES = torch.randint(0, 256, (20, 3, 8, 8), generator=rng("images"), dtype=torch.uint8)
INPUT = (IMAGES / 255 - 0.5) / 0.25


def test_names_of_the_layers():
    kinds = ("conv", "norm", "act", "pool")
    names = layer_names(make("convnet3-instance-w32"))
    assert list(names) == [f"{k}{b}" for b in (1, 2, 3) for k in kinds] + ["logits"]
    assert names["norm2"] == "features.5" and names["logits"] == "classifier"
    without = [f"{k}{b}" for b in (1, 2) for k in ("conv", "act", "pool")] + ["logits"]
    assert list(layer_names(make("convnet2-nonorm-w32"))) == without
    net = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Sequential(nn.Linear(192, 4), nn.Dropout(0.5)))
    assert layer_names(net) == {"0": "0", "2.0": "2.0"}


def test_activations_in_place_do_not_change_what_was_seen():
    net = make("convnet2-instance-w32").train()
    found = layer_features(net, INPUT)
    assert list(found) == list(layer_names(net))
    with torch.no_grad():
        x, plain = INPUT, {}
        for name, module in zip(found, [*net.features, nn.Sequential(nn.Flatten(), net.classifier)], strict=True):
            x = plain[name] = module(x.clone())
            plain[name] = x.clone()
    assert all(torch.equal(found[name], plain[name]) for name in found)
    assert found["norm1"].min() < 0 <= found["act1"].min()


def test_chosen_layers_and_paths():
    net = make("convnet2-instance-w32")
    found = layer_features(net, INPUT, ["pool1", "features", "logits"])
    assert set(found) == {"pool1", "features", "logits"} and found["features"].shape == (20, 32, 2, 2)
    every = layer_features(net, INPUT)
    assert torch.equal(found["features"], every["pool2"]) and torch.equal(found["logits"], every["logits"])
    with pytest.raises(ValueError, match=r"layer 'pool9' is unknown; allowed: conv1, .*logits, and the path"):
        layer_features(net, INPUT, ["pool9"])


class Twice(nn.Module):
    """A module that is called twice, as in torchvision's residual blocks, and one that never is."""

    def __init__(self):
        super().__init__()
        self.first, self.relu = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)
        self.second, self.idle = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.relu(self.second(self.relu(self.first(x))))


def test_modules_called_twice_or_never():
    net = Twice()
    found = layer_features(net, INPUT)
    assert list(found) == ["first", "relu", "second", "relu#2"]
    assert torch.equal(found["relu#2"], found["second"].relu())
    with pytest.raises(ValueError, match="layers idle are not called"):
        layer_features(net, INPUT, ["first", "idle"])


def test_the_network_is_left_as_it_was():
    net = make("convnet2-w32").train()  # BatchNorm
    before = {k: v.clone() for k, v in net.state_dict().items()}
    similarity(net, net, IMAGES, prepare=prepare, batch=5, device="cpu")
    with pytest.raises(RuntimeError):
        layer_features(net, INPUT[:, :1])
    assert all(m.training and not m._forward_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---------------------------------------------------------------- networks against networks


@pytest.mark.parametrize("batch", [5, 6, 20])
def test_similarity_is_cka_of_each_pair(batch):
    a, b = make("convnet2-instance-w32", 0), make("convnet1-w32", 1)
    matrix, names_a, names_b = similarity(a, b, IMAGES, prepare=prepare, batch=batch, device="cpu")
    assert matrix.shape == (9, 5) and matrix.dtype == torch.float64
    assert names_a == list(layer_names(a)) and names_b == list(layer_names(b))
    x, y = (list(layer_features(net, INPUT).values()) for net in (a, b))
    exact = [[explicit_unbiased(p.flatten(1).double(), q.flatten(1).double(), batch) for q in y] for p in x]
    torch.testing.assert_close(matrix, torch.tensor(exact, dtype=torch.float64), atol=1e-5, rtol=0)
    assert matrix.max() - matrix.min() > 0.05


def test_full_similarity_is_full_cka():
    a, b = make("convnet2-instance-w32", 0), make("convnet2-instance-w32", 1)
    options = {"prepare": prepare, "device": "cpu", "batch": 20, "layers": ["norm1", "pool2", "logits"]}
    matrix, _, _ = similarity(a, b, IMAGES, debias=False, **options)
    x, y = (list(layer_features(net, INPUT, options["layers"]).values()) for net in (a, b))
    exact = [[explicit_cka(p.flatten(1).double(), q.flatten(1).double()) for q in y] for p in x]
    torch.testing.assert_close(matrix, torch.tensor(exact, dtype=torch.float64), atol=1e-5, rtol=0)
    assert matrix.shape == (3, 3) and not torch.allclose(matrix, similarity(a, b, IMAGES, **options)[0], atol=1e-2)


def test_with_itself_and_with_its_channels_permuted():
    net, moved = make("convnet2-instance-w32"), make("convnet2-instance-w32")
    order = torch.randperm(32, generator=rng("order"))
    with torch.no_grad():
        for p in (net.features[1].weight, net.features[1].bias):
            p.copy_(normal(32, seed=3))
        moved.load_state_dict(net.state_dict())
        for p in (*moved.features[0].parameters(), *moved.features[1].parameters()):
            p.copy_(p[order])
        moved.features[4].weight.copy_(net.features[4].weight[:, order])
    options = {"prepare": prepare, "batch": 5, "device": "cpu"}
    itself, permuted = (similarity(net, other, IMAGES, **options)[0] for other in (net, moved))
    assert itself.diagonal().sub(1).abs().max() < 1e-10 and torch.allclose(itself, itself.T)
    assert permuted.diagonal().sub(1).abs().max() < 1e-5
    torch.testing.assert_close(permuted, itself, atol=1e-4, rtol=0)


def test_dead_layers_and_images_that_are_ready():
    net, dead = make("convnet1-nonorm-w32"), make("convnet1-nonorm-w32")
    with torch.no_grad():
        dead.features[0].bias.fill_(-1e4)  # ReLU gives 0 for every image
    options = {"prepare": prepare, "batch": 10, "device": "cpu"}
    matrix = similarity(net, dead, IMAGES, **options)[0]
    assert matrix.isfinite().all() and matrix[:, 1:].abs().max() < 1e-3
    assert torch.equal(similarity(net, dead, INPUT, **options | {"prepare": lambda images: images})[0], matrix)


def test_a_layer_that_is_not_finite_is_named():
    net, broken = make("convnet1-nonorm-w32"), make("convnet1-nonorm-w32")
    with torch.no_grad():
        broken.features[0].bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="layer conv1 gives values that are not finite"):
        similarity(net, broken, IMAGES, prepare=prepare, device="cpu", batch=10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cka(x, x[:3]), "20 rows of x and 3 of y"),
        (lambda x: debiased_cka(x[:3], x[:3]), "at least 4"),
        (lambda x: unbiased_cka(x, x, 3), "batch=3 must be at least 4"),
        (lambda x: unbiased_cka(x, x, 21), "batch=21 must be .* at most the number of images, 20"),
        (lambda x: similarity(Twice(), Twice(), IMAGES, prepare=prepare, device="cpu"), "batch=256 must"),
    ],
)
def test_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(20, 3))
