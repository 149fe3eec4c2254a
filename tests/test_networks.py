"""Networks: shapes, seeds, the global random state, decay groups, teacher checkpoints."""

import pytest
import torch
from torch import nn

from common import networks, teachers
from common.augment import rng
from common.train import parameter_groups


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet18-mod", "resnet18-wmdd-tiny", "convnet3", "convnet3-instance", "vit-tiny"]
)
def test_networks_map_images_to_logits(name):
    net = networks.make(name, classes=7, size=32, generator=rng(0)).eval()
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_weights_depend_on_the_generator_alone_and_the_global_state_is_left():
    before = torch.get_rng_state()
    one, same, other = (networks.make("convnet3", classes=3, size=32, generator=rng(s)) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)


def test_published_sizes():
    """RDED's Conv-3 for 10 classes has 320,010 parameters; the stems give the map sizes of the papers."""
    assert networks.count_parameters(networks.make("convnet3", classes=10, size=32, generator=rng(0))) == 320_010
    for name, size, side in (("resnet18", 224, 56), ("resnet18-mod", 32, 32), ("resnet18-wmdd-tiny", 224, 114)):
        net = networks.make(name, classes=10, size=size, generator=rng(0)).eval()
        with torch.no_grad():
            x = net.maxpool(net.relu(net.bn1(net.conv1(torch.zeros(1, 3, size, size)))))
        assert x.shape[2:] == (side, side)


def test_exactly_the_weight_matrices_decay():
    net = networks.make("resnet18", classes=10, size=32, generator=rng(0))
    decay, rest = parameter_groups(net, 0.01)
    assert len(decay["params"]) == 21 and decay["weight_decay"] == 0.01 and rest["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decay["params"]) and all(p.ndim == 1 for p in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("resnet17", {}, "resnet18"),
        ("mobilenet_v2", {"channels": 1}, "3 channels"),
        ("convnet6", {"size": 32}, "size=32"),
    ],
)
def test_wrong_networks_are_named(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        networks.make(name, **{"classes": 10, "size": 64, "generator": rng(0), **arguments})


def test_a_teacher_checkpoint_of_another_kind_is_refused_whole():
    tensors = networks.make("resnet18", classes=10, size=32, generator=rng(0)).state_dict()
    assert isinstance(teachers.restore(tensors, "resnet18", 10, 32), nn.Module)
    with pytest.raises(ValueError, match=r"fc\.bias is \(10,\), expected \(100,\)"):
        teachers.restore(tensors, "resnet18", 100, 32)
    with pytest.raises(ValueError, match="nothing was loaded"):
        teachers.restore(tensors, "resnet50", 10, 32)
    with pytest.raises(ValueError, match="nothing"):
        teachers.restore({k: v for k, v in tensors.items() if k != "bn1.weight"}, "resnet18", 10, 32)
