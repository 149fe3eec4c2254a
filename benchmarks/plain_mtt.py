"""MTT, DATM, ATT, TESLA and the experts in plain form: the formulas one after the other, built as the released code is.

The student's steps are one graph that autograd walks back through, so memory grows with their number; experts fetch and
collate image by image.  It is what `methods/mtt.py` is timed and checked against; both take the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["distill", "expert_epoch", "tesla", "unrolled"]

Batches = list[tuple[Tensor, object]]  # rows and augmentation draw of each student step


def forward(net: nn.Module, flat: Tensor, x: Tensor) -> Tensor:
    """net(x) with its parameters cut out of one vector [P]."""
    parameters, at = {}, 0
    for name, p in net.named_parameters():
        parameters[name] = flat[at : at + p.numel()].reshape(p.shape)
        at += p.numel()
    return torch.func.functional_call(net, parameters, (x,))


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    if y.is_floating_point():  # DATM: y are logits
        return -(torch.softmax(y, 1) * torch.log_softmax(logits, 1)).sum() / len(y)
    return F.cross_entropy(logits, y)


def view(images: Tensor, rows: Tensor, draw: object, augment: Callable | None) -> Tensor:
    return images[rows] if augment is None else augment(images[rows], draw)


def unrolled(
    net: nn.Module, start: Tensor, goal: Tensor, images: Tensor, labels: Tensor, lr: Tensor, batches: Batches,
    augment: Callable | None = None, nearest: bool = False,
) -> Tensor:  # fmt: skip
    """The loss with its whole graph.  nearest: ATT's choice of the step."""
    students = [start.clone().requires_grad_()]
    for rows, draw in batches:
        loss = cross_entropy(forward(net, students[-1], view(images, rows, draw, augment)), labels[rows])
        (gradient,) = torch.autograd.grad(loss, students[-1], create_graph=True)
        students.append(students[-1] - lr * gradient)
    last, least = len(batches), float("inf")
    if nearest:
        for i, student in enumerate(students[1:], 1):
            distance = F.l1_loss(student.detach(), goal, reduction="sum").item()
            if distance <= least:
                last, least = i, distance
    return F.mse_loss(students[last], goal, reduction="sum") / F.mse_loss(start, goal, reduction="sum")


def tesla(
    net: nn.Module, start: Tensor, goal: Tensor, images: Tensor, labels: Tensor, lr: Tensor, batches: Batches,
    augment: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """TESLA's procedure with every theta_i a constant: (loss, gradient of images, of soft labels, of lr)."""
    theta, total, thetas = start, torch.zeros_like(start), []
    for rows, draw in batches:
        leaf = theta.detach().clone().requires_grad_()
        loss = cross_entropy(forward(net, leaf, view(images.detach(), rows, draw, augment)), labels[rows].detach())
        (gradient,) = torch.autograd.grad(loss, leaf)
        thetas.append(theta)
        total += gradient
        theta = theta - lr.detach() * gradient
    distance = (start - goal).pow(2).sum()
    alpha = lr.detach().clone().requires_grad_()
    match = (start - alpha * total - goal).pow(2).sum() / distance
    (by_lr,) = torch.autograd.grad(match, alpha)
    v = 2 * (lr.detach() * (goal - start) + lr.detach() ** 2 * total) / distance
    x = images.detach().clone().requires_grad_()
    y = labels.detach().clone().requires_grad_(labels.is_floating_point())
    for theta, (rows, draw) in zip(thetas, batches, strict=True):
        leaf = theta.detach().clone().requires_grad_()
        loss = cross_entropy(forward(net, leaf, view(x, rows, draw, augment)), y[rows])
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (v * gradient).sum().backward(inputs=[x, y] if y.requires_grad else [x])
    return match.detach(), x.grad, y.grad, by_lr


def distill(
    net: nn.Module, matches: Iterable[tuple[Tensor, Tensor, Batches]], images: Tensor, labels: Tensor, lr: float,
    *, lr_images: float, lr_lr: float, momentum: float = 0.5, lr_labels: float = 0.0, threshold: float = float("inf"),
    augment: Callable | None = None, nearest: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:  # fmt: skip
    """Yields (images, labels, lr, loss) after each iteration.

    matches: theta_0, theta* and the student's batches of each iteration.  labels: class numbers, or logits that are
    learned with momentum 0.9.
    """
    images = images.clone().requires_grad_()
    alpha = torch.tensor(lr, dtype=images.dtype).requires_grad_()
    optimisers = [torch.optim.SGD([images], lr_images, momentum), torch.optim.SGD([alpha], lr_lr, momentum)]
    if labels.is_floating_point():
        labels = labels.clone().requires_grad_()
        optimisers.append(torch.optim.SGD([labels], lr_labels, 0.9))
    for start, goal, batches in matches:
        loss = unrolled(net, start, goal, images, labels, alpha, batches, augment, nearest)
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss.backward()
        if loss.item() <= threshold:
            for optimiser in optimisers:
                optimiser.step()
        yield images.detach(), labels.detach(), alpha.detach(), loss.item()


def ascend(parameters: list[Tensor], gradients: list[Tensor], rho: float) -> list[Tensor]:
    """The adaptive perturbation of each parameter."""
    norm = torch.stack([(p.abs() * g).norm() for p, g in zip(parameters, gradients, strict=True)]).norm()
    return [rho / (norm + 1e-12) * p.pow(2) * g for p, g in zip(parameters, gradients, strict=True)]


def decompose(before: list[Tensor], after: list[Tensor], gap: float) -> list[Tensor]:
    """GSAM: the gradient after the ascent, less `gap` times the part of the one before that is perpendicular to it."""
    product = sum((a * b).sum() for a, b in zip(before, after, strict=True))
    norm_before, norm_after = (torch.stack([g.norm() for g in gs]).norm() for gs in (before, after))
    cosine = product / (norm_before * norm_after + 1e-12)
    vertical = [a - cosine * norm_before * b / (norm_after + 1e-12) for a, b in zip(before, after, strict=True)]
    return [b - gap * v for b, v in zip(after, vertical, strict=True)]


def expert_epoch(
    net: nn.Module, images: Tensor, labels: Tensor, order: Tensor, draws: Iterator, *, batch: int = 256,
    lr: float = 0.01, rho: float = 0.0, gap: float = 0.3, augment: Callable | None = None,
) -> Iterator[float]:  # fmt: skip
    """One epoch over images [N, C, H, W] (network input) in `order`; yields the share of correct answers a step."""
    optimiser = torch.optim.SGD(net.parameters(), lr=lr)
    parameters = list(net.parameters())
    for at in range(0, len(order), batch):
        samples = [(images[i], labels[i]) for i in order[at : at + batch].tolist()]
        x, y = torch.stack([image for image, _ in samples]), torch.stack([label for _, label in samples])
        if augment is not None:
            x = augment(x, next(draws))
        optimiser.zero_grad()
        logits = net(x)
        F.cross_entropy(logits, y).backward()
        if rho:
            before = [p.grad.clone() for p in parameters]
            steps = ascend([p.detach() for p in parameters], before, rho)
            with torch.no_grad():
                for p, e in zip(parameters, steps, strict=True):
                    p.add_(e)
            optimiser.zero_grad()
            F.cross_entropy(net(x), y).backward()
            final = decompose(before, [p.grad for p in parameters], gap)
            with torch.no_grad():
                for p, e, g in zip(parameters, steps, final, strict=True):
                    p.sub_(e)
                    p.grad = g
        optimiser.step()
        yield (logits.detach().argmax(1) == y).sum().item() / len(y)
