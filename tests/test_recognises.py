"""A teacher near chance on real images is refused by every method that takes a trained one, before any work."""

import dataclasses

import pytest
import torch
from torch import nn

from methods import nrr_dd, rded, sre2l, wmdd

CLASSES, SIDE = 4, 16
CONFIGS = {
    nrr_dd: nrr_dd.Config(ipc=1, pool=4, iterations=1), rded: rded.Config(ipc=1, pool=4),
    sre2l: sre2l.Config(ipc=1, iterations=1), wmdd: wmdd.Config(ipc=1, iterations=1),
}  # fmt: skip


class Brightest(nn.Module):
    """Knows images of class k by their bright quarter k; `order` is what it calls them."""

    def __init__(self, order):
        super().__init__()
        self.norm, self.pool = nn.BatchNorm2d(1), nn.AdaptiveAvgPool2d(2)
        self.conv = nn.Conv2d(1, 1, 1, bias=False)
        self.last = nn.Linear(CLASSES, CLASSES, bias=False)
        nn.init.ones_(self.conv.weight)
        with torch.no_grad():
            self.last.weight.copy_(torch.eye(CLASSES)[order])

    def forward(self, x):
        return self.last(self.pool(self.conv(self.norm(x))).flatten(1))


@pytest.fixture
def real():
    labels = torch.arange(CLASSES).repeat_interleave(10)
    images = torch.randint(0, 100, (len(labels), 1, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    for image, label in zip(images, labels.tolist(), strict=True):
        top, left = divmod(label, 2)
        image[:, top * SIDE // 2 :, left * SIDE // 2 :][:, : SIDE // 2, : SIDE // 2] += 100
    return images.to(torch.uint8), labels


def distill(method, real, order, **changes):
    config, facts = CONFIGS[method], {"mean": (0.4,), "std": (0.2,)} | changes
    return method.distill(*real, Brightest(order).eval(), config, generator=torch.Generator().manual_seed(0), **facts)


@pytest.mark.parametrize("method", CONFIGS, ids=lambda m: m.__name__.rpartition(".")[2])
def test_classes_in_another_order_are_found(method, real):
    assert distill(method, real, [0, 1, 2, 3])["images"].shape == (CLASSES, 1, SIDE, SIDE)
    with pytest.raises(ValueError, match=r"recognises 0.0 % of 40 real images, near the 25 % of guessing: .* order"):
        distill(method, real, [1, 2, 3, 0])


@pytest.mark.parametrize("method", (rded, nrr_dd, sre2l), ids=lambda m: m.__name__.rpartition(".")[2])
def test_constants_that_do_not_fit_the_channels_are_named(method, real):
    with pytest.raises(ValueError, match="mean"):
        distill(method, real, [0, 1, 2, 3], mean=(0.4,) * 3, std=(0.2,) * 3)


@pytest.mark.parametrize("method", (nrr_dd, sre2l, wmdd), ids=lambda m: m.__name__.rpartition(".")[2])
def test_batch_norm_without_running_statistics_is_named(method):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    with pytest.raises(ValueError, match="no running statistics"):
        method.batch_norms(net)


def test_sre2l_wants_square_images(real):
    images, labels = real
    with pytest.raises(ValueError, match="16 x 12 px are not square"):
        distill(sre2l, (images[..., :12], labels), [0, 1, 2, 3])


def test_two_settings_are_two_errors():
    with pytest.raises(ValueError, match="epsilon=0"):
        dataclasses.replace(CONFIGS[nrr_dd], epsilon=0)
    with pytest.raises(ValueError, match=r"^least_area=2"):
        dataclasses.replace(CONFIGS[nrr_dd], least_area=2)
