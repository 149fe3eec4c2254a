"""Teachers: trained once for a data set, kept in the store, shared by every method, table and paper."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from common import networks
from common.augment import rng
from common.datasets import Dataset, Stream
from common.store import Checkpoint, Product
from common.train import Recipe, accuracy, fit, resolve_precision

__all__ = ["WMDD_TEACHER", "restore", "settings", "train"]

# WMDD, pretrain defaults: SGD 0.025, momentum 0.9, decay 1e-4 on all parameters, batch 32, 50 epochs, cosine to 0.
WMDD_TEACHER = Recipe(
    name="wmdd-teacher", epochs=50, batch=32, optimizer="sgd", lr=0.025, weight_decay=1e-4, decay_all=True,
    labels="hard", crop=0.08, cutmix=False,
)  # fmt: skip


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
    """Train one teacher, resumable in the folder `work`.

    The last epoch is kept; meta holds its test accuracy (percent) and the loss of every epoch.
    """
    classes, dtype, losses = len(data.classes), resolve_precision(precision, device), []
    net = networks.make(network, classes=classes, size=size, generator=rng(seed, "teacher"))
    fit(
        net, data, recipe, size=size, seed=seed, device=device, dtype=dtype,
        checkpoint=Checkpoint(work / "state.safetensors"),
        on_epoch=lambda epoch, _, loss: losses.append([epoch, loss]), description=f"teacher {network}",
    )  # fmt: skip
    top1 = accuracy(net, test_images, test_labels, data, device=device, dtype=dtype)
    meta = {"network": network, "classes": list(data.classes), "size": size, "accuracy": top1, "losses": losses}
    return Product({k: v.cpu() for k, v in net.state_dict().items()}, meta)


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
