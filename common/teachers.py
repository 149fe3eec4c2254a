"""Teachers: trained once for a data set, kept in the store, shared by every method, table and paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from common import networks
from common.augment import rng
from common.datasets import Dataset, Stream
from common.hardware import resolve_precision
from common.store import Checkpoint, Product
from common.train import accuracy, fit
from common.views import Recipe

__all__ = [
    "CIFAR_TEACHER", "RECIPES", "SQUEEZE", "TINY_TEACHER", "TORCHVISION", "WMDD_TEACHER", "check", "fetched",
    "resident", "restore", "settings", "train", "trained",
]  # fmt: skip

# WMDD, pretrain defaults: SGD 0.025, momentum 0.9, decay 1e-4 on all parameters, batch 32, 50 epochs, cosine to 0.
WMDD_TEACHER = Recipe(
    name="wmdd-teacher", epochs=50, batch=32, optimizer="sgd", lr=0.025, weight_decay=1e-4, decay_all=True,
    labels="hard", crop=0.08, cutmix=False,
)  # fmt: skip

# SRe2L, squeeze of CIFAR: SGD 0.1, decay 5e-4, batch 128, 200 epochs, cosine to 0, crops of 4 padded pixels.
CIFAR_TEACHER = Recipe(
    name="cifar-teacher", epochs=200, batch=128, optimizer="sgd", lr=0.1, weight_decay=5e-4, decay_all=True,
    labels="hard", crop=1.0, pad=4, cutmix=False,
)  # fmt: skip
# SRe2L, squeeze of Tiny-ImageNet at 64 px: SGD 0.2, decay 1e-4, batch 256, 50 epochs, five of them warm-up.
TINY_TEACHER = Recipe(
    name="tiny-teacher", epochs=50, batch=256, optimizer="sgd", lr=0.2, warmup=5, weight_decay=1e-4, decay_all=True,
    labels="hard", crop=0.08, cutmix=False,
)  # fmt: skip
# torchvision's first weights for ImageNet-1K (ResNet-18: 69.8 %), which SRe2L and RDED take; how they were trained, but
# for the schedule (a tenth every 30 epochs).  Nothing is trained here.
TORCHVISION = Recipe(
    name="torchvision", epochs=90, batch=256, optimizer="sgd", lr=0.1, weight_decay=1e-4, decay_all=True, labels="hard",
    crop=0.08, cutmix=False,
)  # fmt: skip
RECIPES = {"wmdd": WMDD_TEACHER, "cifar": CIFAR_TEACHER, "tiny": TINY_TEACHER, "torchvision": TORCHVISION}
SQUEEZE = {"cifar10": CIFAR_TEACHER, "cifar100": CIFAR_TEACHER, "tiny-imagenet": TINY_TEACHER}  # by data set


def settings(dataset: str, network: str, size: int, recipe: Recipe, seed: int, precision: str) -> dict:
    """What a teacher depends on besides the data; with the data fingerprints it names the store entry."""
    return {
        "dataset": dataset, "network": network, "size": size, "recipe": asdict(recipe), "seed": seed,
        "precision": precision,
    }  # fmt: skip


def train(
    work: Path, data: Dataset | Stream, test_images: Tensor, test_labels: Tensor, *, network: str, size: int,
    recipe: Recipe, seed: int, precision: str, device: torch.device,
) -> Product:  # fmt: skip
    """Train one teacher, resumable in the folder `work`, or fetch it where the recipe is torchvision's.

    The last epoch is kept; meta holds its test accuracy (percent) and the loss of every epoch.
    """
    if recipe.name == "torchvision":
        net, history = fetched(network, len(data.classes)).to(device), []
    else:
        net, history = trained(
            data, network=network, size=size, recipe=recipe, seed=seed, precision=precision, device=device,
            checkpoint=Checkpoint(work / "state.safetensors"),
        )  # fmt: skip
    dtype = resolve_precision(precision, device)
    top1 = accuracy(net, test_images, test_labels, data, device=device, dtype=dtype)
    meta = {"network": network, "classes": list(data.classes), "size": size, "accuracy": top1}
    meta["losses"] = [row[:2] for row in history]
    return Product({k: v.cpu() for k, v in net.state_dict().items()}, meta)


def fetched(network: str, classes: int) -> nn.Module:
    """A network with torchvision's first weights for the 1,000 classes of ImageNet-1K: torch.hub's copy, or fetched.

    ValueError where there are none, OSError that names file and folder where they cannot be fetched.
    """
    from torchvision import models

    if network not in models.list_models() or classes != 1000:
        raise ValueError(f"torchvision has no weights of ImageNet-1K for {network!r} with {classes} classes")
    weights = models.get_model_weights(network)["IMAGENET1K_V1"]
    try:
        return models.get_model(network, weights=weights)
    except OSError as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise OSError(f"{weights.url} cannot be fetched ({error}); put that file into {folder}") from error


def trained(
    data: Dataset | Stream, *, network: str, size: int, recipe: Recipe, seed: int, precision: str,
    device: torch.device, checkpoint: Checkpoint | None = None,
) -> tuple[nn.Module, list]:  # fmt: skip
    """A network after its training, and the history of `fit`; what each of several processes runs."""
    net, history = networks.make(network, classes=len(data.classes), size=size, generator=rng(seed, "teacher")), []
    fit(
        net, resident(data, device), recipe, size=size, seed=seed, device=device,
        dtype=resolve_precision(precision, device), checkpoint=checkpoint, history=history,
        description=f"teacher {network}",
    )  # fmt: skip
    return net, history


def resident(data: Dataset | Stream, device: torch.device) -> Dataset | Stream:
    """The images on a GPU where they take less than half of its free memory: views are then cut there."""
    if isinstance(data, Stream) or device.type != "cuda" or data.images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return data
    return data.to(device)


def restore(tensors: dict[str, Tensor], network: str, classes: int, size: int) -> nn.Module:
    """Rebuild a teacher from its state dict: strictly, every tensor or none.

    Raises ValueError that names the first mismatch for a checkpoint of another architecture or number of classes.
    """
    net = networks.make(network, classes=classes, size=size, generator=rng(0))
    wanted = net.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        have = tuple(tensors[name].shape) if name in tensors else "nothing"
        want = tuple(wanted[name].shape) if name in wanted else "nothing"
        if have != want:
            raise ValueError(
                f"the teacher checkpoint does not fit {network!r} with {classes} classes: {name} is {have}, expected "
                f"{want}; nothing was loaded"
            )
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)


def check(net: nn.Module, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """ValueError where a teacher is near chance on real training images, normalised [B, C, S, S], labels [B].

    The most frequent cause is a teacher that was trained with the classes in another order.
    """
    with torch.inference_mode():
        right = (net(images).argmax(1) == labels.to(images.device)).double().mean().item()
    chance = 1 / len(classes)
    least = chance + min(3 * math.sqrt(chance * (1 - chance) / len(images)), (1 - chance) / 2)  # three standard errors
    if right < least:
        raise ValueError(
            f"the teacher recognises {100 * right:.1f} % of {len(images)} real training images, near the"
            f" {100 / len(classes):.3g} % of guessing: is its class order that of the data ({classes[0]},"
            f" {classes[min(1, len(classes) - 1)]}, ...) and its normalisation the same?"
        )
