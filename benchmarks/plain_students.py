"""Students in plain form: images fetched one by one and stacked, as a loader does it, testing with a graph.

fp32 (or the type of what comes in), NCHW, one network at a time, the loss and the predictions copied to the host at
every batch, as in the released code of DC and its successors.  It is what `common/students.py` is timed and checked
against; it takes its orders and augmentation draws from the caller, so both compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import plain_augment

__all__ = ["epoch", "test", "train"]


def loader(images: Tensor, targets: Tensor, order: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in order.split(batch):
        samples = [(images[i], targets[i]) for i in rows.tolist()]
        yield torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -torch.mean(torch.sum(F.softmax(target, 1) * F.log_softmax(logits, 1), 1))


def epoch(
    net: nn.Module, images: Tensor, targets: Tensor, order: Tensor, draws: Iterator | None,
    *, optimizer: torch.optim.Optimizer | None = None, batch: int = 256, criterion: Callable = F.cross_entropy,
    augment: Callable[[Tensor, object], Tensor] = plain_augment.augment,
) -> float:  # fmt: skip
    """One pass; draws gives the augmentation of each batch.  Returns the mean loss."""
    net.train()
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    total = 0.0
    for x, y in loader(images, targets, order, batch):
        x = x if draws is None else augment(x, next(draws))
        logits = net(x)
        loss = criterion(logits, y)
        total += loss.item() * len(x)
        logits.detach().cpu().numpy().argmax(1)  # for the accuracy on the batch, which the released code prints
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return total / len(images)


def test(net: nn.Module, images: Tensor, labels: Tensor, batch: int = 256) -> float:
    """Top-1 accuracy in percent."""
    net.eval()
    right = 0
    for x, y in loader(images, labels, torch.arange(len(images)), batch):
        logits = net(x)
        F.cross_entropy(logits, y).item()
        right += int((torch.from_numpy(logits.detach().cpu().numpy().argmax(1)) == y.cpu()).sum())
    return 100 * right / len(labels)


def train(
    net: nn.Module, images: Tensor, targets: Tensor, orders: Iterator[Tensor], draws: Iterator | None,
    *, epochs: int, lr: float, batch: int = 256, criterion: Callable = F.cross_entropy,
    augment: Callable[[Tensor, object], Tensor] = plain_augment.augment,
) -> float:  # fmt: skip
    """The released schedule: E + 1 passes, a tenth of lr and a new optimiser after pass E // 2 + 1.

    Returns the mean loss of the last pass; the network is trained in place.
    """
    loss = float("nan")
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    for number in range(epochs + 1):
        loss = epoch(
            net, images, targets, next(orders), draws, optimizer=optimizer, batch=batch, criterion=criterion,
            augment=augment,
        )  # fmt: skip
        if number == epochs // 2 + 1:
            lr *= 0.1
            optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    return loss
