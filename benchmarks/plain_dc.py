"""DC and DSA in plain form: a loop over classes, two graphs for each, built as the released code is built.

fp32 (or the type of what comes in), NCHW, double backward through a kept graph, a DataLoader for the inner training.
It is what `methods/dc.py` and `methods/dsa.py` are timed and checked against; it takes its draws from the generator in
the same order, so both compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import plain_augment

__all__ = ["distance", "distill"]


def row_distance(synthetic: Tensor, real: Tensor) -> Tensor:
    """Sum over output rows of one minus the cosine; 0 for 1-D tensors."""
    if real.ndim == 1:
        return torch.zeros((), dtype=real.dtype, device=real.device)
    a, b = real.reshape(real.shape[0], -1), synthetic.reshape(real.shape[0], -1)
    return torch.sum(1 - torch.sum(a * b, dim=-1) / (torch.norm(a, dim=-1) * torch.norm(b, dim=-1) + 0.000001))


def distance(synthetic: list[Tensor], real: list[Tensor], kind: str = "ours") -> Tensor:
    """D of one class; gradients in the order of the network's parameters."""
    if kind == "ours":
        return sum(row_distance(s, r) for s, r in zip(synthetic, real, strict=True))
    a, b = (torch.cat([g.reshape(-1) for g in gradients]) for gradients in (real, synthetic))
    if kind == "mse":
        return torch.sum((a - b) ** 2)
    return 1 - torch.sum(a * b) / (torch.norm(a) * torch.norm(b) + 0.000001)


def distill(
    images: Tensor, labels: Tensor, start: Tensor, *, make_network: Callable[[torch.Generator], nn.Module],
    outer: int, inner: int, generator: torch.Generator, draw: Callable[..., object] | None = None, lr: float = 0.1,
    momentum: float = 0.5, network_lr: float = 0.01, batch_real: int = 256, batch_train: int = 256, kind: str = "ours",
    augment: Callable[[Tensor, object], Tensor] = plain_augment.augment,
) -> Iterator[tuple[Tensor, Tensor, float]]:  # fmt: skip
    """Yields (images, their gradient, loss) after every image update, network after network, for ever.

    images [N, C, H, W] as network input, labels [N], start [M, C, H, W] sorted by class.  draw(rows, generator,
    siamese=...): a draw for `augment`; None: no augmentation, which is DC.
    """
    classes = int(labels.max()) + 1
    ipc = len(start) // classes
    rows = [(labels == c).nonzero().flatten() for c in range(classes)]
    synthetic_labels = torch.arange(classes, device=start.device).repeat_interleave(ipc)
    x = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=lr, momentum=momentum)

    def pick(count: int) -> list[Tensor]:
        return [own[torch.randperm(len(own), generator=generator)[:count]] for own in rows]

    while True:
        net = make_network(generator).to(x.device).train()
        parameters = list(net.parameters())
        network_optimizer = torch.optim.SGD(parameters, lr=network_lr)
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        for step in range(outer):
            if norms:
                net.train()
                net(images[torch.cat(pick(16))])
                for norm in norms:
                    norm.eval()
            batches = pick(batch_real)
            drawn = draw(classes, generator, siamese=True) if draw else None
            loss = torch.zeros((), dtype=x.dtype, device=x.device)
            for c in range(classes):
                real, synthetic = images[batches[c]], x[c * ipc : (c + 1) * ipc]
                if drawn is not None:
                    real, synthetic = augment(real, drawn[c : c + 1]), augment(synthetic, drawn[c : c + 1])
                own = synthetic_labels[c * ipc : (c + 1) * ipc]
                real_loss = F.cross_entropy(net(real), own[:1].expand(len(real)))
                real_gradient = [g.detach().clone() for g in torch.autograd.grad(real_loss, parameters)]
                synthetic_loss = F.cross_entropy(net(synthetic), own)
                synthetic_gradient = torch.autograd.grad(synthetic_loss, parameters, create_graph=True)
                loss = loss + distance(list(synthetic_gradient), real_gradient, kind)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield x.detach().clone(), x.grad.clone(), loss.item()
            if step == outer - 1:
                break
            net.train()
            data = TensorDataset(x.detach().clone(), synthetic_labels)
            for _ in range(inner):
                order = torch.randperm(len(x), generator=generator).tolist()
                for batch, own in DataLoader(data, batch_train, sampler=order, generator=torch.Generator()):
                    if draw:
                        batch = augment(batch, draw(len(batch), generator, siamese=False))
                    network_optimizer.zero_grad()
                    F.cross_entropy(net(batch), own).backward()
                    network_optimizer.step()
