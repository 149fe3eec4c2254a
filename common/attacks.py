"""FGSM and PGD: the worst pixels within eps of an image, and what is left of a network's accuracy there.

    def prepare(pixels):                                    # [0, 1] pixels -> network input, differentiable
        return (pixels - mean) / std
    robust_accuracy(net, images, labels, attack="pgd", eps=8 / 255, prepare=prepare, device=device)

Both look for the largest cross-entropy of the true label in the ball |x' - x|_inf <= eps, cut to [0, 1]:

    FGSM   x' = x + eps sign(grad CE(x))                    (Goodfellow et al., arXiv 1412.6572)
    PGD    x' <- clip(x' + step sign(grad CE(x')))          (Madry et al., arXiv 1706.06083), from a point of the ball

Pixels, eps and step are on the [0, 1] scale: the normalisation, or the whitening, belongs to the attacked function.
Adversarial pixels are not rounded to whole numbers of 255.

With logits z, label y and m = log sum_{j != y} e^(z_j) - z_y, CE = log(1 + e^m).  Only signs enter above, and CE grows
with m, so m is climbed: the same attack in exact arithmetic.  In float32 the gradient of CE itself is rounded away
where a network is certain of an image, which then looks robust.  Gradients can hide in other ways too: compare with
more steps and restarts, and with an attack that climbs another network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.augment import rng

__all__ = ["eval_mode", "fgsm", "pgd", "robust_accuracy", "unit_pixels"]

ATTACKS, STARTS = ("fgsm", "pgd"), ("random", "zero")


def fgsm(net: nn.Module, images: Tensor, labels: Tensor, eps: float, *, prepare: Callable[[Tensor], Tensor]) -> Tensor:
    """One step of eps from the images themselves; arguments, result and errors as of `pgd`."""
    pixels, low, high = _ball(images, labels, eps)
    with eval_mode(net):
        return _climb(net, prepare, pixels, labels, low, high, 1, eps, False)


def pgd(
    net: nn.Module, images: Tensor, labels: Tensor, eps: float, *, prepare: Callable[[Tensor], Tensor],
    steps: int = 10, step_size: float | None = None, start: str = "random", generator: torch.Generator | None = None,
    restarts: int = 1, stop: bool = False,
) -> Tensor:  # fmt: skip
    """images [B, C, H, W], uint8 or float in [0, 1], labels int64 [B] -> adversarial pixels float32 [B, C, H, W].

    prepare: differentiable map of float32 pixels in [0, 1] to the input of `net`.  step_size: eps / 4 where not given.
    start: "random", uniform in the ball (drawn from `generator`, image after image), or "zero", the image itself.
    restarts: of so many random starts the result with the largest margin of a wrong class is kept, image by image.
    stop: an image stays where the network first misses it, which is all that an accuracy asks, and costs no more steps.
    The network is attacked in eval mode; its modes and its parameters' gradients are as before afterwards.
    ValueError for values that do not fit, FloatingPointError for a gradient that is not finite.
    """
    _check_options(steps, step_size, start, generator, restarts)
    pixels, low, high = _ball(images, labels, eps)
    size = eps / 4 if step_size is None else step_size
    starts = [pixels] if start == "zero" else _random_starts(pixels, eps, generator, restarts)
    with eval_mode(net):
        found = [_climb(net, prepare, point, labels, low, high, steps, size, stop) for point in starts]
        if restarts == 1:
            return found[0]
        with torch.no_grad():
            margins = [_margin(*_scores(net(prepare(point)), labels)) for point in found]
        worst = torch.stack(margins).argmax(0)  # [B]
    return torch.stack(found)[worst, torch.arange(len(worst), device=worst.device)]


def robust_accuracy(
    net: nn.Module, images: Tensor, labels: Tensor, *, eps: float, prepare: Callable[[Tensor], Tensor],
    device: torch.device | str, attack: str = "fgsm", seed: int = 0, batch: int | None = None,
    source: nn.Module | None = None, **options,
) -> float:  # fmt: skip
    """Percent of images [N, C, H, W], uint8 or float in [0, 1], that `net`, on `device`, gets right under attack.

    The random start of image i depends on (seed, i, restarts) only.  batch: 1000 images on a GPU, 100 on a CPU.
    source: the network that the attack climbs (a transfer attack), with the same `prepare`; None: net itself.
    options: steps, step_size, start and restarts of `pgd`.  An image counts as right where `net` gets it right at the
    start and after every step; a transfer attack takes all its steps and is judged by the last.
    """
    if attack not in ATTACKS:
        raise ValueError(f"attack={attack!r} is unknown; allowed: {', '.join(ATTACKS)}")
    if attack == "fgsm" and options:
        raise ValueError(f"attack='fgsm' takes no {', '.join(options)}; they are options of attack='pgd'")
    if batch is not None and batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    device = torch.device(device)
    batch = batch or (100 if device.type == "cpu" else 1000)
    _check_images(images, labels)
    source, stop, generator = net if source is None else source, source is None, rng(seed, "attack")
    right = torch.zeros((), dtype=torch.long, device=device)
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        x, y = x.to(device), y.to(device)
        if attack == "fgsm":
            x = fgsm(source, x, y, eps, prepare=prepare)
        else:
            x = pgd(source, x, y, eps, prepare=prepare, generator=generator, stop=stop, **options)
        with eval_mode(net), torch.no_grad():
            right += (net(prepare(x)).argmax(1) == y).sum()
    return 100 * int(right) / len(labels)


# ---------------------------------------------------------------- the ascent


def _climb(
    net, prepare, point: Tensor, labels: Tensor, low: Tensor, high: Tensor, steps: int, size: float, stop: bool
) -> Tensor:  # fmt: skip
    """`steps` signed steps up the loss from `point`, cut to [low, high] after each; `stop` as in `pgd`."""
    point, moving = point.clone(), torch.arange(len(point), device=point.device)
    for step in range(steps):
        gradient, margin = _gradient(net, prepare, point[moving], labels[moving], step)
        if stop:
            right = margin <= 0
            moving, gradient = moving[right], gradient[right]
        if not len(moving):
            break
        point[moving] = (point[moving] + size * gradient.sign()).clamp(low[moving], high[moving])
    return point


def _gradient(net, prepare, pixels: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Gradient in the pixels of the sum of m, in which no image sees another, and the margins [B]."""
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_()
        inputs = prepare(pixels)
        if not inputs.requires_grad:
            raise ValueError("prepare returns a tensor without a gradient; it must be differentiable in the pixels")
        true, others = _scores(net(inputs), labels)
        loss = (others.logsumexp(1) - true).sum()
        (gradient,) = torch.autograd.grad(loss, pixels)  # the pixels' alone: parameters keep theirs
    if not gradient.isfinite().all():
        raise FloatingPointError(
            f"the gradient of the loss is not finite at step {step} (loss={loss.item():.4g}); look at the weights of "
            "the network and at what prepare makes of [0, 1] pixels"
        )
    return gradient, _margin(true, others)


def _ball(images: Tensor, labels: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, and the least and largest value that each may take."""
    if not 0 <= eps <= 1:
        raise ValueError(f"eps={eps} is not in [0, 1]; it is on the scale of [0, 1] pixels, like 8/255")
    _check_images(images, labels)
    pixels = unit_pixels(images)
    return pixels, (pixels - eps).clamp(min=0), (pixels + eps).clamp(max=1)


def _random_starts(pixels: Tensor, eps: float, generator: torch.Generator, restarts: int) -> list[Tensor]:
    # All draws of an image are next to each other in the generator's stream, so that batches of any size see the same.
    shape = (len(pixels), restarts, *pixels.shape[1:])
    noise = torch.rand(shape, generator=generator, device=generator.device).to(pixels.device)
    return [(pixels + eps * (2 * own - 1)).clamp(0, 1) for own in noise.unbind(1)]


def _margin(true: Tensor, others: Tensor) -> Tensor:
    """Largest logit of the wrong classes less that of the true one [B]: above 0 where the attack succeeds."""
    return (others.amax(1) - true).detach()


def _scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the true classes [B], and all of them with -inf in the place of the true one [B, K]."""
    at = labels[:, None]
    return logits.gather(1, at)[:, 0], logits.scatter(1, at, -torch.inf)


# ---------------------------------------------------------------- shared, and checks


@contextmanager
def eval_mode(net: nn.Module) -> Iterator[None]:
    """Eval mode inside; each module's own mode again afterwards."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def unit_pixels(images: Tensor) -> Tensor:
    """uint8, or floats in [0, 1] -> float32 pixels in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _check_images(images: Tensor, labels: Tensor) -> None:
    if len(images) != len(labels) or not len(images) or images.dim() != 4:
        raise ValueError(f"images {tuple(images.shape)} and labels {tuple(labels.shape)}; needs [B, C, H, W] and [B]")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; pass pixels, uint8 or float in [0, 1]")
    if images.is_floating_point() and not (images.amin() >= 0 and images.amax() <= 1):
        raise ValueError(
            f"images are in [{images.amin():.4g}, {images.amax():.4g}]; pass pixels, uint8 or float in [0, 1]: "
            "normalisation is prepare's"
        )


def _check_options(steps: int, step_size: float | None, start: str, generator, restarts: int) -> None:
    if start not in STARTS:
        raise ValueError(f"start={start!r} is unknown; allowed: {', '.join(STARTS)}")
    if steps < 1 or restarts < 1:
        raise ValueError(f"steps={steps} and restarts={restarts} must be at least 1")
    if step_size is not None and not 0 < step_size <= 1:
        raise ValueError(f"step_size={step_size} must be above 0 and at most 1; it is on the scale of [0, 1] pixels")
    if start == "random" and generator is None:
        raise ValueError("start='random' draws from a generator; pass one, or start='zero'")
    if start == "zero" and restarts > 1:
        raise ValueError(f"restarts={restarts} from start='zero' are all the same; allowed: 1, or start='random'")
