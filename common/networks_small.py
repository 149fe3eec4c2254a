"""The small networks of the matching literature (DC, DSA, DM, MTT, DATM), for 8 to 128 px and any number of channels.

Each is `features`, flattened, then one linear `classifier`, with PyTorch's default initialisation.  Quirks that the
published numbers contain: the first layer of ConvNet, VGG11, AlexNet and LeNet pads one-channel images by two pixels
more on each side (28 px count as 32), and from 64 px on the first layer has stride 2 (VGG11 subsamples its last map).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["ConvNet", "InstanceNorm", "SmallNet", "alexnet", "lenet", "mlp", "resnet18", "vgg11"]

# ---------------------------------------------------------------- norms


class InstanceNorm(nn.GroupNorm):
    """`nn.GroupNorm(C, C)`, the norm of DC and its successors: each channel of each image to mean 0 and variance 1.

    Same parameters, names, results and derivatives of any order.  In eager mode the library's kernel is fast on NCHW
    tensors but slow on small channels_last maps; there, and where a compiler can fuse them, plain sums do the work.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(channels, channels, eps)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        # The stride says "channels_last" where vmap cannot answer is_contiguous(memory_format).
        if not torch.compiler.is_compiling() and x.stride(1) != 1:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Both moments in one pass.  Any constant may be taken off first; with a pixel of the same map E[d]^2 is at most
        # H W times the variance, so that the difference keeps its digits however far the map is from zero.
        d = wide - wide[:, :, x.shape[2] // 2, x.shape[3] // 2, None, None].detach()
        mean = d.mean((2, 3), keepdim=True)  # [B, C, 1, 1]
        variance = d.square().mean((2, 3), keepdim=True) - mean.square()
        scale = (variance + self.eps).rsqrt() * self.weight[:, None, None]
        return (d * scale + (self.bias[:, None, None] - mean * scale)).to(x.dtype)


NORMS: dict[str, Callable[[int, int], nn.Module]] = {  # of channels and side of the map
    "batch": lambda c, _: nn.BatchNorm2d(c),
    "instance": lambda c, _: InstanceNorm(c),
    "group": lambda c, _: nn.GroupNorm(4, c),
    "layer": lambda c, side: nn.LayerNorm([c, side, side]),
    "none": lambda *_: nn.Identity(),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "sigmoid": nn.Sigmoid,
    "leaky": lambda: nn.LeakyReLU(0.01, inplace=True),
    "swish": nn.SiLU,
}
POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "avg": lambda: nn.AvgPool2d(2),
    "max": lambda: nn.MaxPool2d(2),
    "none": nn.Identity,
}


def _choose(what: str, name: str, table: dict) -> Callable[..., nn.Module]:
    if name not in table:
        raise ValueError(f"{what}={name!r} is unknown; allowed: {', '.join(table)}")
    return table[name]


# ---------------------------------------------------------------- networks


class SmallNet(nn.Module):
    """`features` [B, ...], flattened, then `classifier`."""

    def __init__(self, features: nn.Module, dimension: int, classes: int):
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(dimension, classes)

    def forward(self, images: Tensor) -> Tensor:  # [B, C, H, W] -> [B, K]
        return self.classifier(self.features(images).flatten(1))


class ConvNet(SmallNet):
    """ConvNet-D: D blocks of [conv 3x3, norm, activation, pool 2x2], then one linear layer on the flattened map.

    norm: "instance" is GroupNorm with one channel a group (DC, DM, MTT), "batch" is BatchNorm (RDED, NRR-DD), "group"
    has four groups, "layer" one mean over C, H, W; all with scale and shift.
    """

    def __init__(
        self, classes: int, size: int, channels: int = 3, depth: int = 3, width: int = 128, norm: str = "batch",
        activation: str = "relu", pooling: str = "avg",
    ):  # fmt: skip
        make_norm = _choose("norm", norm, NORMS)
        make_activation = _choose("activation", activation, ACTIVATIONS)
        make_pool = _choose("pooling", pooling, POOLINGS)
        padding = 3 if channels == 1 else 1
        side = size + 2 * padding - 2
        if pooling != "none" and side >> depth < 1:
            raise ValueError(f"size={size} is too small for depth={depth}: each block halves the map")
        blocks: list[nn.Module] = []
        for block in range(depth):
            conv = nn.Conv2d(width if block else channels, width, 3, padding=1 if block else padding)
            blocks += [conv, make_norm(width, side), make_activation(), make_pool()]
            side = side if pooling == "none" else side // 2
        super().__init__(nn.Sequential(*blocks), width * side**2, classes)


def _stride(size: int) -> int:
    return 2 if size >= 64 else 1


def _classified(name: str, features: nn.Module, classes: int, size: int, channels: int) -> SmallNet:
    """Put the linear layer behind `features`; its width is read off one black image."""
    try:
        with torch.no_grad():  # eval: the black image must not enter running statistics
            dimension = features.eval()(torch.zeros(1, channels, size, size)).numel()
    except RuntimeError as error:
        raise ValueError(f"size={size} is too small for {name}: its poolings leave no pixel") from error
    return SmallNet(features.train(), dimension, classes)


def mlp(classes: int, size: int, channels: int) -> SmallNet:
    """Two hidden layers of 128."""
    layers = [nn.Flatten(), nn.Linear(channels * size**2, 128), nn.ReLU(inplace=True)]
    return SmallNet(nn.Sequential(*layers, nn.Linear(128, 128), nn.ReLU(inplace=True)), 128, classes)


def lenet(classes: int, size: int, channels: int) -> SmallNet:
    """LeNet-5 with ReLU and max pooling: convolutions of 6 and 16 channels, linear layers of 120 and 84."""
    maps = nn.Sequential(
        nn.Conv2d(channels, 6, 5, _stride(size), padding=2 if channels == 1 else 0), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(),
    )  # fmt: skip
    hidden = _classified("lenet", maps, 120, size, channels)
    layers = [hidden, nn.ReLU(inplace=True), nn.Linear(120, 84), nn.ReLU(inplace=True)]
    return SmallNet(nn.Sequential(*layers), 84, classes)


def alexnet(classes: int, size: int, channels: int, norm: str = "none") -> SmallNet:
    """AlexNet for 32 px: five convolutions, three max pools, one linear layer; `norm` after each convolution."""
    make_norm, layers = _choose("norm", norm, NORMS), []
    plan = [(128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True)]  # width, kernel, pool
    before = channels
    for width, kernel, pool in plan:
        first = not layers
        padding = 4 if first and channels == 1 else kernel // 2
        conv = nn.Conv2d(before, width, kernel, _stride(size) if first else 1, padding)
        layers += [conv, make_norm(width, 0), nn.ReLU(inplace=True)] + [nn.MaxPool2d(2)] * pool
        before = width
    return _classified("alexnet", nn.Sequential(*layers), classes, size, channels)


def vgg11(classes: int, size: int, channels: int, norm: str = "instance") -> SmallNet:
    """VGG11: eight convolutions, five max pools, one linear layer; `norm` after each convolution."""
    if size + 4 * (channels == 1) < 32:  # a norm over a single pixel would wipe out the image
        raise ValueError(f"size={size} is too small for vgg11: it halves the map five times")
    make_norm, layers = _choose("norm", norm, NORMS), []
    before = channels
    for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        padding = 3 if channels == 1 and not layers else 1
        layers += [nn.Conv2d(before, width, 3, padding=padding), make_norm(width, 0), nn.ReLU(inplace=True)]
        before = width
    layers.append(nn.AvgPool2d(1, _stride(size)))
    return _classified("vgg11", nn.Sequential(*layers), classes, size, channels)


class _Block(nn.Module):
    """Basic residual block.  average: halve the map by average pooling where others use a strided convolution."""

    def __init__(self, before: int, width: int, stride: int, make_norm: Callable[[int, int], nn.Module], average: bool):
        super().__init__()
        pool = [nn.AvgPool2d(2)] if average and stride > 1 else []
        same, stride = stride == 1 and before == width, 1 if average else stride
        self.path = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False), make_norm(width, 0), nn.ReLU(inplace=True), *pool,
            nn.Conv2d(width, width, 3, 1, 1, bias=False), make_norm(width, 0),
        )  # fmt: skip
        shortcut = [nn.Conv2d(before, width, 1, stride, bias=False), *pool, make_norm(width, 0)]
        self.shortcut = nn.Sequential(*([] if same else shortcut))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.path(x) + self.shortcut(x))


def resnet18(
    classes: int, size: int, channels: int, norm: str = "instance", average: bool = False, slim: int = 64
) -> SmallNet:
    """ResNet-18 with a 3x3 stem and no max pool; average: the "AP" form, whose classifier sees the whole 4x4 map.

    slim: channels of the first stage, 64 in the papers; a smoke run takes fewer.
    """
    make_norm, least = _choose("norm", norm, NORMS), 16 if average else 9
    if size < least and norm == "instance":  # the last map has one pixel, and its norm would wipe out the image
        raise ValueError(f"size={size} is too small for resnet18 with instance norm: {least} is the least")
    layers = [nn.Conv2d(channels, slim, 3, _stride(size), 1, bias=False), make_norm(slim, 0), nn.ReLU(inplace=True)]
    before = slim
    for times, stride in ((1, 1), (1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (8, 2), (8, 1)):
        layers.append(_Block(before, times * slim, stride, make_norm, average))
        before = times * slim
    layers.append(nn.Identity() if average else nn.AdaptiveAvgPool2d(1))
    return _classified("resnet18", nn.Sequential(*layers), classes, size, channels)
