"""Teachers with weights of others: what is fetched, what is refused.  How teachers are trained: tests/test_train.py."""

import urllib.error

import pytest
import torch
import torchvision
from torchvision.models import WeightsEnum

from common import networks, teachers
from common.augment import rng
from papers.cells import load_paper
from papers.setups import setup_of


def test_torchvisions_weights_are_those_of_our_network(monkeypatch):
    theirs = torchvision.models.resnet18(num_classes=1000).state_dict()
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, *_, **__: theirs)
    net = teachers.fetched("resnet18", 1000)
    ours = teachers.restore(net.state_dict(), "resnet18", 1000, 224)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("network, classes", [("convnet4", 1000), ("resnet18", 10)])
def test_what_torchvision_does_not_have_is_named(network, classes):
    with pytest.raises(ValueError, match=f"no weights of ImageNet-1K for '{network}' with {classes} classes"):
        teachers.fetched(network, classes)


def test_without_a_connection_file_and_folder_are_named(monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    with pytest.raises(OSError, match=r"resnet18-.*pth cannot be fetched \(.*no route.*put that file into"):
        teachers.fetched("resnet18", 1000)


def test_the_cells_of_imagenet_1k_take_them_but_for_the_convnet():
    paper = load_paper("nrr_dd")
    cells = {c.arch: c for c in paper.cells_at("paper") if (c.dataset, c.method, c.ipc) == ("ImageNet-1K", "RDED", 10)}
    recipes = {arch: setup_of(paper.scales["paper"], cell).teacher for arch, cell in cells.items()}
    assert recipes["ResNet-18"] == teachers.TORCHVISION and recipes["ConvNet"] == teachers.WMDD_TEACHER
    assert networks.make("resnet18", classes=1000, size=224, generator=rng(0)).fc.out_features == 1000
