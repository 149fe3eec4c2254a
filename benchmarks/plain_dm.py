"""DM in plain form: a loop over classes, one forward for each, built as the released code is built.

fp32 (or the type of what comes in), NCHW, one `.item()` an iteration.  It is what `methods/dm.py` is timed and checked
against; it takes its draws from the generator in the same order, so both compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks import plain_augment

__all__ = ["distill"]


def features(net: nn.Module, x: Tensor) -> Tensor:
    """Flattened input of the classifier: [B, C, H, W] -> [B, D]."""
    classifier = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    seen = []
    handle = classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    net(x)
    handle.remove()
    return seen[0]


def distill(
    images: Tensor, labels: Tensor, start: Tensor, *, make_network: Callable[[torch.Generator], nn.Module],
    draw: Callable[[int, torch.Generator], object] | None, generator: torch.Generator, lr: float = 1.0,
    momentum: float = 0.5, batch_real: int = 256, augment: Callable[[Tensor, object], Tensor] = plain_augment.augment,
) -> Iterator[tuple[Tensor, Tensor, float]]:  # fmt: skip
    """Yields (images, their gradient, loss) after every step, for ever.

    images [N, C, H, W] as network input, labels [N], start [M, C, H, W] sorted by class.  draw(classes, generator): the
    siamese augmentation of a step, a row a class; None for none.
    """
    classes = int(labels.max()) + 1
    ipc = len(start) // classes
    rows = [(labels == c).nonzero().flatten() for c in range(classes)]
    x = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=lr, momentum=momentum)
    while True:
        net = make_network(generator).to(x.device).train().requires_grad_(False)
        batches = [own[torch.randperm(len(own), generator=generator)[:batch_real]] for own in rows]
        drawn = draw(classes, generator) if draw else None
        real, synthetic = [], []
        for c in range(classes):
            ours, theirs = images[batches[c]], x[c * ipc : (c + 1) * ipc]
            if drawn is not None:
                ours, theirs = augment(ours, drawn[c : c + 1]), augment(theirs, drawn[c : c + 1])
            real.append(ours)
            synthetic.append(theirs)
        loss = torch.zeros((), dtype=x.dtype, device=x.device)
        if any(isinstance(m, nn.BatchNorm2d) for m in net.modules()):
            outputs = features(net, torch.cat(real)).detach().split([len(r) for r in real])
            synthetic_outputs = features(net, torch.cat(synthetic)).split(ipc)
        else:
            outputs = [features(net, r).detach() for r in real]
            synthetic_outputs = [features(net, s) for s in synthetic]
        for output, own in zip(outputs, synthetic_outputs, strict=True):
            loss = loss + torch.sum((output.mean(0) - own.mean(0)) ** 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield x.detach().clone(), x.grad.clone(), loss.item()
