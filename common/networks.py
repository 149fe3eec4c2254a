"""Networks by name, built from an explicit generator.

    make("resnet18", classes=10, size=224, generator=torch.Generator().manual_seed(0))

Every factory returns a plain `nn.Module` that maps images [B, C, size, size] to logits [B, K]; its last `nn.Linear` is
the classifier, and what enters that layer is the feature [B, D] that the distribution-matching methods use.
ResNets, MobileNetV2 and EfficientNet-B0 come from torchvision, vision transformers from timm, the small networks of the
matching literature from `networks_small`.  A ConvNet takes its variations in the name, in any order:

    convnet3-instance-w64-sigmoid-maxpool       # depth 1..8; norm, width, activation and pooling where not the default
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common import networks_small as small
from common.networks_small import ConvNet, InstanceNorm

__all__ = ["ConvNet", "InstanceNorm", "forward_flops", "make", "names"]


def _vision(name: str, **options) -> nn.Module:
    """A network of torchvision, which is loaded here: it takes longer to import than torch."""
    import torchvision

    return getattr(torchvision.models, name)(**options)


def _resnet(depth: int, stem: str, classes: int, size: int, channels: int) -> nn.Module:
    """torchvision ResNet with one of three stems.

    "imagenet": 7x7 stride 2 and max pool.  "mod": 3x3 stride 1, no pool (32 and 64 px).  "wmdd-tiny": 3x3 stride 2
    padding 3, no pool, the stem of the released WMDD code for Tiny-ImageNet at 224 px.  A replaced stem keeps PyTorch's
    default initialisation, as in the official repositories.
    """
    net = _vision(f"resnet{depth}", num_classes=classes)
    if stem == "mod":
        net.conv1, net.maxpool = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.Identity()
    elif stem == "wmdd-tiny":
        net.conv1, net.maxpool = nn.Conv2d(channels, 64, 3, 2, 3, bias=False), nn.Identity()
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    return net


def _torchvision(name: str, classes: int, size: int, channels: int) -> nn.Module:
    _rgb_only(name, channels)
    return _vision(name, num_classes=classes)


def _vit(name: str, classes: int, size: int, channels: int, **slim: int) -> nn.Module:
    """timm vision transformer; patch 16 as published, size/4 (a 4x4 token grid) below 64 px."""
    import timm  # heavy: only transformers need it

    patch = 16 if size >= 64 else max(size // 4, 1)
    return timm.create_model(
        f"vit_{name}_patch16_224", num_classes=classes, img_size=size, patch_size=patch, in_chans=channels, **slim
    )


def _dcbench(depth: int, classes: int, size: int, channels: int) -> nn.Module:
    """DC-Bench's students: instance norm, default initialisation of every layer; a 3 x 3 stem up to 32 px.

    Above that (Tiny-ImageNet) the stem of ImageNet.
    """
    if size <= 8:  # the last map has one pixel, and its norm would wipe out the image
        raise ValueError(f"size={size} is too small for resnet{depth}-dcbench: 9 is the least")
    net = _vision(f"resnet{depth}", num_classes=classes, norm_layer=InstanceNorm)
    if size <= 32:
        net.conv1, net.maxpool = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.Identity()
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    return net.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)


def _rgb_only(name: str, channels: int) -> None:
    if channels != 3:
        raise ValueError(f"network {name!r} takes 3 channels, got {channels}")


_FACTORIES: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{d}": partial(_resnet, d, "imagenet") for d in (18, 34, 50, 101)},
    **{f"resnet{d}-mod": partial(_resnet, d, "mod") for d in (18, 34, 50, 101)},
    **{f"resnet{d}-wmdd-tiny": partial(_resnet, d, "wmdd-tiny") for d in (18, 50, 101)},
    **{f"convnet{d}": partial(ConvNet, depth=d) for d in range(1, 9)},
    **{f"convnet{d}-instance": partial(ConvNet, depth=d, norm="instance") for d in range(1, 9)},
    "mlp": small.mlp,
    "lenet": small.lenet,
    "alexnet": small.alexnet,
    "alexnet-bn": partial(small.alexnet, norm="batch"),
    "vgg11-instance": small.vgg11,
    "vgg11-bn": partial(small.vgg11, norm="batch"),
    "resnet18-instance": small.resnet18,
    "resnet18-bn": partial(small.resnet18, norm="batch"),
    **{f"resnet18-bn-w{w}": partial(small.resnet18, norm="batch", slim=w) for w in (8, 16)},
    "resnet18-ap-instance": partial(small.resnet18, average=True),
    "resnet18-ap-bn": partial(small.resnet18, average=True, norm="batch"),
    **{f"resnet{d}-dcbench": partial(_dcbench, d) for d in (18, 152)},
    **{n: partial(_torchvision, n) for n in ("mobilenet_v2", "efficientnet_b0")},
    **{f"vit-{n}": partial(_vit, n) for n in ("tiny", "small")},
    **{f"vit-{n}-w{w}": partial(_vit, n, embed_dim=w, depth=2) for n, w in (("tiny", 48), ("small", 96))},
}

# What may follow "convnetD-": each part sets one argument of ConvNet.
_PARTS: dict[str, tuple[str, str | int]] = {
    **{n: ("norm", n) for n in ("instance", "group", "layer")},
    "nonorm": ("norm", "none"),
    **{f"w{w}": ("width", w) for w in (32, 64, 128, 256)},
    **{a: ("activation", a) for a in ("sigmoid", "leaky", "swish")},
    "maxpool": ("pooling", "max"),
    "nopool": ("pooling", "none"),
}


def names() -> tuple[str, ...]:
    """All names that `make` knows, but for the ConvNets with further parts in their names."""
    return tuple(_FACTORIES)


def _factory(name: str) -> Callable[..., nn.Module]:
    if name in _FACTORIES:
        return _FACTORIES[name]
    head, *parts = name.split("-")
    depth = re.fullmatch("convnet([1-8])", head)
    options = dict(_PARTS[p] for p in parts if p in _PARTS)
    if depth is None or len(options) < len(parts):  # a part is unknown, or two set the same argument
        raise ValueError(
            f"network {name!r} is unknown; allowed: {', '.join(_FACTORIES)}; and convnetD followed by "
            f"-{', -'.join(_PARTS)}, at most one for each of norm, width, activation and pooling"
        )
    return partial(ConvNet, depth=int(depth[1]), **options)


def make(name: str, *, classes: int, size: int, generator: torch.Generator, channels: int = 3) -> nn.Module:
    """Build a freshly initialised network on the CPU.

    The initial weights depend on `generator` alone (one draw is taken from it); the global random state is left as it
    was.  Raises ValueError for an unknown name.
    """
    factory = _factory(name)
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return factory(classes=classes, size=size, channels=channels)


@functools.cache
def forward_flops(network: str, size: int, *, classes: int = 10, channels: int = 3) -> float:
    """Floating-point operations of one image's forward pass (two per multiply-add), counted on a real network."""
    net = make(network, classes=classes, size=size, generator=torch.Generator(), channels=channels).eval().to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, channels, size, size, device="meta"))
    return float(counter.get_total_flops())
