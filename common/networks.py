"""Networks by name, built from an explicit generator.

    make("resnet18", classes=10, size=224, generator=torch.Generator().manual_seed(0))

Every factory returns a plain `nn.Module` that maps images [B, C, size, size] to logits [B, K]; its last `nn.Linear` is
the classifier, and what enters that layer is the feature [B, D] that the distribution-matching methods use.
ResNets, MobileNetV2 and EfficientNet-B0 come from torchvision, vision transformers from timm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torchvision
from torch import Tensor, nn

__all__ = ["ConvNet", "count_parameters", "make", "names"]


class ConvNet(nn.Module):
    """ConvNet-D: D blocks of [conv 3x3, norm, ReLU, average pool 2x2], then one linear layer on the flattened map.

    norm: "instance" is GroupNorm with one channel a group (DC, DM, MTT), "batch" is BatchNorm (RDED, NRR-DD).
    """

    def __init__(
        self, classes: int, size: int, channels: int = 3, depth: int = 3, width: int = 128, norm: str = "batch"
    ):
        super().__init__()
        norms: dict[str, Callable[[int], nn.Module]] = {
            "batch": nn.BatchNorm2d,
            "instance": lambda c: nn.GroupNorm(c, c),
            "none": lambda _: nn.Identity(),
        }
        if norm not in norms:
            raise ValueError(f"norm={norm!r} is unknown; allowed: {', '.join(norms)}")
        if size >> depth < 1:
            raise ValueError(f"size={size} is too small for depth={depth}: each block halves the map")
        blocks: list[nn.Module] = []
        for block in range(depth):
            conv = nn.Conv2d(channels if block == 0 else width, width, 3, padding=1)
            blocks += [conv, norms[norm](width), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * (size >> depth) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K]
        return self.classifier(self.features(images).flatten(1))


def _resnet(depth: int, stem: str, classes: int, size: int, channels: int) -> nn.Module:
    """torchvision ResNet with one of three stems.

    "imagenet": 7x7 stride 2 and max pool.  "mod": 3x3 stride 1, no pool (32 and 64 px).  "wmdd-tiny": 3x3 stride 2
    padding 3, no pool, the stem of the released WMDD code for Tiny-ImageNet at 224 px.  A replaced stem keeps PyTorch's
    default initialisation, as in the official repositories.
    """
    net = getattr(torchvision.models, f"resnet{depth}")(num_classes=classes)
    if stem == "mod":
        net.conv1, net.maxpool = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.Identity()
    elif stem == "wmdd-tiny":
        net.conv1, net.maxpool = nn.Conv2d(channels, 64, 3, 2, 3, bias=False), nn.Identity()
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    return net


def _torchvision(name: str, classes: int, size: int, channels: int) -> nn.Module:
    _rgb_only(name, channels)
    return getattr(torchvision.models, name)(num_classes=classes)


def _vit(name: str, classes: int, size: int, channels: int) -> nn.Module:
    """timm vision transformer; patch 16 as published, size/4 (a 4x4 token grid) below 64 px."""
    import timm  # heavy: only transformers need it

    patch = 16 if size >= 64 else max(size // 4, 1)
    return timm.create_model(
        f"vit_{name}_patch16_224", num_classes=classes, img_size=size, patch_size=patch, in_chans=channels
    )


def _convnet(depth: int, norm: str, classes: int, size: int, channels: int) -> nn.Module:
    return ConvNet(classes, size, channels, depth, norm=norm)


def _rgb_only(name: str, channels: int) -> None:
    if channels != 3:
        raise ValueError(f"network {name!r} takes 3 channels, got {channels}")


_FACTORIES: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{d}": partial(_resnet, d, "imagenet") for d in (18, 34, 50, 101)},
    **{f"resnet{d}-mod": partial(_resnet, d, "mod") for d in (18, 34, 50, 101)},
    **{f"resnet{d}-wmdd-tiny": partial(_resnet, d, "wmdd-tiny") for d in (18, 50, 101)},
    **{f"convnet{d}": partial(_convnet, d, "batch") for d in range(2, 7)},
    **{f"convnet{d}-instance": partial(_convnet, d, "instance") for d in range(2, 7)},
    **{n: partial(_torchvision, n) for n in ("mobilenet_v2", "efficientnet_b0")},
    **{f"vit-{n}": partial(_vit, n) for n in ("tiny", "small")},
}


def names() -> tuple[str, ...]:
    """All names that `make` knows."""
    return tuple(_FACTORIES)


def make(name: str, *, classes: int, size: int, generator: torch.Generator, channels: int = 3) -> nn.Module:
    """Build a freshly initialised network on the CPU.

    The initial weights depend on `generator` alone (one draw is taken from it); the global random state is left as it
    was.  Raises ValueError for an unknown name.
    """
    if name not in _FACTORIES:
        raise ValueError(f"network {name!r} is unknown; allowed: {', '.join(_FACTORIES)}")
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _FACTORIES[name](classes=classes, size=size, channels=channels)


def count_parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())
