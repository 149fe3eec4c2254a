"""Networks: published sizes, seeds, the norm of the matching methods, decay groups, teacher checkpoints."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import networks, networks_small, teachers
from common.augment import rng
from common.networks import InstanceNorm
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


def parameters_of(net) -> int:
    return sum(p.numel() for p in net.parameters())


def test_published_sizes():
    """RDED's Conv-3 for 10 classes has 320,010 parameters; the stems give the map sizes of the papers."""
    assert parameters_of(networks.make("convnet3", classes=10, size=32, generator=rng(0))) == 320_010
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
        ("convnet9", {}, "convnetD"),
        ("convnet3-instance-w48", {}, "-w32, -w64, -w128, -w256"),
        ("convnet3-instance-group", {}, "at most one for each of norm"),
        ("resnet18-instance-w64", {}, "unknown"),
        ("lenet", {"size": 8}, "size=8 is too small for lenet"),
        ("vgg11-bn", {"size": 28}, "size=28 is too small for vgg11"),
        ("resnet18-instance", {"size": 8}, "9 is the least"),
        ("resnet18-ap-instance", {"size": 15}, "16 is the least"),
        ("resnet18-dcbench", {"size": 8}, "9 is the least"),
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


# ---------------------------------------------------------------- small networks of the matching literature


def build(name, classes=10, size=32, channels=3):
    return networks.make(name, classes=classes, size=size, channels=channels, generator=rng(0))


def classifier(net):
    return [m for m in net.modules() if isinstance(m, nn.Linear)][-1]


@pytest.mark.parametrize(
    ("name", "arguments", "parameters", "feature"),
    [
        ("convnet3-instance", {}, 320_010, 2048),
        ("convnet3-instance", {"classes": 100}, 504_420, 2048),
        ("convnet4-instance", {"classes": 200, "size": 64}, 857_160, 2048),
        ("convnet3-instance", {"classes": 200, "size": 64}, 1_938_120, 8192),
        ("convnet5-instance", {"size": 128}, 615_690, 2048),
        ("convnet3-instance", {"size": 28, "channels": 1}, 320_010 - 2 * 9 * 128, 2048),
        ("convnet3-instance-nopool", {}, 320_010 - 20_480 + 10 * 128 * 1024, 128 * 1024),
        ("convnet3-instance-w32", {}, 3 * 9 * 32 + 2 * 9 * 32**2 + 3 * 3 * 32 + 10 * 512 + 10, 512),
        ("mlp", {}, 411_146, 128),
        ("mlp", {"size": 28, "channels": 1}, 411_146 - 128 * (3072 - 784), 128),
        ("lenet", {}, 62_006, 84),
        ("lenet", {"size": 28, "channels": 1}, 62_006 - 2 * 25 * 6, 84),
        ("lenet", {"size": 64}, 62_006, 84),
        ("alexnet", {}, 1_872_202, 3072),
        ("alexnet", {"size": 28, "channels": 1}, 1_872_202 - 2 * 25 * 128, 3072),
        ("alexnet", {"size": 64}, 1_872_202, 3072),
        ("alexnet-bn", {}, 1_872_202 + 2 * (128 + 3 * 192 + 256), 3072),
        ("vgg11-instance", {}, 9_231_114, 512),
        ("vgg11-instance", {"size": 64}, 9_231_114, 512),
        ("vgg11-bn", {"size": 28, "channels": 1}, 9_231_114 - 2 * 9 * 64, 512),
        ("resnet18-instance", {}, 11_173_962, 512),
        ("resnet18-bn", {"size": 64}, 11_173_962, 512),
        ("resnet18-ap-instance", {}, 11_173_962 + 10 * (8192 - 512), 8192),
        ("resnet18-ap-bn", {"size": 64}, 11_173_962 + 10 * (8192 - 512), 8192),
    ],
)
def test_small_networks_have_their_published_sizes(name, arguments, parameters, feature):
    net = build(name, **arguments)
    assert parameters_of(net) == parameters and classifier(net).in_features == feature
    size, channels = arguments.get("size", 32), arguments.get("channels", 3)
    seen = []
    classifier(net).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        assert net.eval()(torch.zeros(2, channels, size, size)).shape == (2, arguments.get("classes", 10))
    assert seen == [(2, feature)]


@pytest.mark.parametrize("name", ["convnet3", "convnet3-instance"])
def test_weights_of_a_seed_stay_what_they_were(name):
    """Stored runs name a network and a seed; these are the first and last weights of seed 0."""
    first, *_, weight, bias = build(name).parameters()
    found = [x.flatten()[0].item() for x in (first, weight, bias)]
    assert found == pytest.approx([0.1723005, 0.0156387, 0.0212606], abs=1e-7)
    assert next(iter(build(name).state_dict())) == "features.0.weight"


@pytest.mark.parametrize("name", ["resnet18-instance", "resnet18-dcbench", "convnet2-group", "lenet", "vgg11-bn"])
def test_every_layer_has_the_default_initialisation(name):
    """Weights of convolutions and linear layers are uniform within 1 / sqrt(fan-in); norms start as the identity."""
    for m in build(name, size=64).modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            bound = 1 / math.sqrt(m.weight[0].numel())
            assert m.weight.abs().max() <= bound
            if m.weight.numel() > 5000:
                assert m.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        elif getattr(m, "weight", None) is not None:
            assert (m.weight == 1).all() and (m.bias == 0).all()


@pytest.mark.parametrize("name", ["convnet3-instance", "convnet2-group", "convnet2-layer", "resnet18-ap-instance"])
def test_norms_without_running_statistics_do_the_same_in_training_and_testing(name):
    net, images = build(name, size=16), torch.randn(4, 3, 16, 16, generator=rng(1))
    with torch.no_grad():
        trained = net.train()(images)
        assert torch.equal(trained, net.eval()(images))
        alone = net(images[:1])  # no coupling between images
    torch.testing.assert_close(alone, trained[:1], atol=1e-5, rtol=1e-5)
    assert not [n for n, _ in net.named_buffers()]


def test_building_a_network_leaves_the_running_statistics_at_their_start():
    for name in ("vgg11-bn", "alexnet-bn", "resnet18-bn", "resnet18-ap-bn"):
        net = build(name)
        assert all(m.training for m in net.modules())
        assert all((b == (1 if n.endswith("running_var") else 0)).all() for n, b in net.named_buffers())


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("convnet2-w64-maxpool-instance-sigmoid", [nn.Conv2d, InstanceNorm, nn.Sigmoid, nn.MaxPool2d]),
        ("convnet2-group-leaky", [nn.Conv2d, nn.GroupNorm, nn.LeakyReLU, nn.AvgPool2d]),
        ("convnet2-swish", [nn.Conv2d, nn.BatchNorm2d, nn.SiLU, nn.AvgPool2d]),
        ("convnet2-layer-nopool", [nn.Conv2d, nn.LayerNorm, nn.ReLU, nn.Identity]),
        ("convnet2-nonorm-w32", [nn.Conv2d, nn.Identity, nn.ReLU, nn.AvgPool2d]),
    ],
)
def test_the_name_of_a_convnet_lists_its_parts(name, kinds):
    net = build(name, size=12)
    assert [type(m) for m in net.features] == kinds * 2
    width = 64 if "w64" in name else 32 if "w32" in name else 128
    assert net.features[0].out_channels == width and net.features[0].padding == (1, 1)
    with torch.no_grad():
        assert net(torch.zeros(3, 3, 12, 12)).shape == (3, 10)
    if "group" in name:
        assert net.features[1].num_groups == 4


@pytest.mark.parametrize(("size", "channels", "side"), [(28, 1, 4), (8, 1, 1), (8, 3, 1), (28, 3, 3), (33, 2, 4)])
def test_convnets_take_odd_sizes_and_any_channels(size, channels, side):
    net = build("convnet3-instance", size=size, channels=channels)
    assert classifier(net).in_features == 128 * side**2
    assert net.features[0].padding == ((3, 3) if channels == 1 else (1, 1)) and net.features[4].padding == (1, 1)
    with torch.no_grad():
        assert net(torch.zeros(2, channels, size, size)).shape == (2, 10)


def test_stride_and_pooling_halve_the_same_maps_of_a_resnet():
    images = torch.randn(2, 3, 32, 32, generator=rng(2))
    for average in (False, True):
        net = build("resnet18-ap-instance" if average else "resnet18-instance")
        strides = {m.stride[0] for m in net.modules() if isinstance(m, nn.Conv2d)}
        assert strides == ({1} if average else {1, 2})
        pools = [m for _, m in net.named_modules(remove_duplicate=False) if isinstance(m, nn.AvgPool2d)]
        assert len(pools) == (6 if average else 0)  # path and shortcut of three blocks
        with torch.no_grad():
            assert net.features[:-1](images).shape == (2, 512, 4, 4)


def test_a_strided_block_is_the_formula():
    """relu(norm(conv(relu(norm(conv x)))) + norm(conv1x1 x)), halved by stride or by pooling after the inner relu."""
    x = torch.randn(2, 8, 6, 6, generator=rng(3))
    for average in (False, True):
        with torch.random.fork_rng():
            block = networks_small._Block(8, 12, 2, networks_small.NORMS["instance"], average)
        first, second, shortcut = (m.weight for m in block.modules() if isinstance(m, nn.Conv2d))
        stride, halve = (1, lambda v: F.avg_pool2d(v, 2)) if average else (2, lambda v: v)
        inner = halve(F.relu(F.instance_norm(F.conv2d(x, first, stride=stride, padding=1))))
        sides = F.instance_norm(halve(F.conv2d(x, shortcut, stride=stride)))
        wanted = F.relu(F.instance_norm(F.conv2d(inner, second, padding=1)) + sides)
        torch.testing.assert_close(block(x), wanted, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- instance norm


def norms(channels=6):
    """Ours and the library's with the same random scale and shift, in float64."""
    ours, library = InstanceNorm(channels).double(), nn.GroupNorm(channels, channels).double()
    with torch.no_grad():
        for p in ours.parameters():
            p.copy_(torch.randn(p.shape, generator=rng(4), dtype=torch.float64))
    library.load_state_dict(ours.state_dict())
    return ours, library


def inputs(layout, *shape, dtype=torch.float64):
    x = 3 + torch.randn(*shape, generator=rng(5), dtype=torch.float64)
    return x.to(dtype).contiguous(memory_format=layout)


@pytest.fixture(params=["nchw", "channels_last", "compiling"])
def case(request, monkeypatch):
    """The layout of the input; "compiling" takes the branch of the compiler."""
    if request.param == "compiling":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return torch.channels_last if request.param == "channels_last" else torch.contiguous_format


def test_instance_norm_is_group_norm_up_to_second_derivatives(case):
    x = inputs(case, 3, 6, 5, 4)
    results = []
    for norm in norms():
        leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_(), *norm.parameters()]
        y = norm(leaves[0])
        first = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), leaves)
        results.append([y, *first, *second])
        assert y.dtype == torch.float64
    for ours, library in zip(*results, strict=True):
        torch.testing.assert_close(ours, library, atol=1e-9, rtol=1e-9)


def test_instance_norm_serves_function_transforms(case):
    """jvp of a gradient, and vmap of that over students with their own parameters and images."""
    results, x = [], inputs(torch.contiguous_format, 2, 3, 6, 4, 4)
    if case == torch.channels_last:
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    weights, biases = (torch.randn(2, 6, generator=rng(6 + i), dtype=torch.float64) for i in range(2))
    for norm in norms():

        def loss(x, weight, bias, norm=norm):
            return (torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,)) ** 3).sum()

        def second(*leaves, loss=loss):
            gradient, tangent = torch.func.jvp(torch.func.grad(loss, (0, 1, 2)), leaves, leaves)
            return *gradient, *tangent

        results.append(torch.vmap(second)(x, weights, biases))
        torch.testing.assert_close(second(x[0], weights[0], biases[0]), tuple(r[0] for r in results[-1]))
    torch.testing.assert_close(*results, atol=1e-9, rtol=1e-9)


def test_instance_norm_in_single_precision_keeps_its_digits(case):
    """A map far from zero, a constant one, and bf16 input: as close to float64 as the library comes."""
    ours, _ = norms(4)
    x = inputs(case, 3, 4, 16, 16)
    x = x + torch.tensor([0.0, 100.0, 3000.0, 0.0], dtype=torch.float64)[:, None, None]
    x[:, 3] = 7
    x = x.float().contiguous(memory_format=case)
    wanted = F.group_norm(x.double(), 4, ours.weight, ours.bias)
    torch.testing.assert_close(ours.float()(x).double(), wanted, atol=2e-3, rtol=0)
    torch.testing.assert_close(ours(x)[:, :2].double(), wanted[:, :2], atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(x)[:, 3], ours.bias[3].expand(3, 16, 16), atol=1e-3, rtol=0)
    half = ours(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half[:, 0].double(), wanted[:, 0], atol=0.1, rtol=0.02)


def test_a_compiled_network_with_instance_norm_is_the_same():
    net = build("convnet2-instance-w32", size=8)
    images = torch.randn(4, 3, 8, 8, generator=rng(7))
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)  # no C++ compiler needed
    for x in (images, images.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(compiled(x), net(images), atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(images), atol=1e-5, rtol=1e-5)
