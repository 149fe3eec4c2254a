"""Training and testing of classifiers: teachers on real images, students on distilled ones, by named recipes.

One loop, `fit`, serves both: a recipe makes a stream of views (common/views.py), a student learns the labels of a
teacher (common/labels.py) or the class numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import distributed
from common.augment import rng, seeded
from common.datasets import Dataset, Stream
from common.hardware import autocast
from common.labels import Labels, Loss, hard_loss, kd_loss
from common.store import Checkpoint
from common.views import Recipe, learning_rate, normalise, steps_per_epoch, views

__all__ = ["accuracy", "fit", "make_optimizer", "parameter_groups"]


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on parameters named `weight` with more than one dimension; none on biases and norms."""
    decay, rest = [], []
    for name, p in net.named_parameters():
        (decay if "weight" in name and p.ndim > 1 else rest).append(p)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def make_optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    params = net.parameters() if recipe.decay_all else parameter_groups(net, recipe.weight_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            params, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True
        )
    return torch.optim.AdamW(params, recipe.lr, weight_decay=recipe.weight_decay, fused=True)


# ---------------------------------------------------------------- the loop


def fit(
    net: nn.Module,
    data: Dataset | Stream,
    recipe: Recipe,
    *,
    size: int,
    seed: int,
    masks: int | None = None,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    soft: Labels | None = None,
    loss: Loss | None = None,
    weights: Tensor | None = None,
    checkpoint: Checkpoint | None = None,
    history: list | None = None,
    on_epoch: Callable[[int, nn.Module], float | None] | None = None,
    description: str = "train",
) -> nn.Module:
    """Train `net` on `data` by `recipe` and return it after the last epoch.

    soft: the teacher's labels where recipe.labels is "soft"; loss: what is made of them in place of `kd_loss`; weights:
    [M] sample weights of `kd_loss` or None.  masks: seed of dropout, `seed` by default.  history: a list that receives
    [epoch, mean loss, what on_epoch returned].
    With a checkpoint a killed run continues bit for bit (on a CPU), its history too.  Raises FloatingPointError when
    the loss is not finite, naming the step; the last good state stays in the checkpoint.

    Where several processes train together (common/distributed.py) each computes its rows of every batch, and all take
    the steps of one process; the first one's checkpoint counts.  ValueError for what they cannot share.
    """
    if (recipe.labels == "soft") != (soft is not None):
        raise ValueError(f"recipe {recipe.name!r} has labels={recipe.labels!r}, but soft labels were "
                         f"{'given' if soft is not None else 'not given'}")  # fmt: skip
    _check_shared(data, recipe)
    history = [] if history is None else history
    if not distributed.is_first():
        checkpoint = None
    net = net.to(device, memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = recipe.bn_momentum
    optimizer = make_optimizer(net, recipe)
    start, running = _resume(checkpoint, net, optimizer, history)
    model = distributed.parallel(net, device)
    rows = distributed.rows()
    own = slice(None) if isinstance(data, Stream) else rows  # a stream decodes no others
    labels, weights = data.labels.to(device), None if weights is None else weights.to(device)
    total = recipe.epochs * steps_per_epoch(len(labels), recipe.batch)
    quiet = None if distributed.is_first() else True
    bar = tqdm(total=total, initial=start, desc=description, unit="step", leave=False, disable=quiet)
    for view in views(data, recipe, size, seed, start, rows):
        if view.epoch != len(history):
            _end_epoch(net, running, history, on_epoch, bar)
            running = []
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, view.epoch)
        model.train()
        images = normalise(view.pixels[own].to(device), data.mean, data.std)
        shown = view.indices.to(device)
        y, partner, shown = labels[shown][own], labels[shown][view.permutation.to(device)][own], shown[own]
        drops = rng(seed if masks is None else masks, "network", view.step, distributed.rank())
        with seeded(torch.device(device), drops), autocast(device, dtype):
            logits = model(images)
        if soft is None:
            value = hard_loss(logits, y, partner, view.share)
        elif loss is not None:
            value = loss(logits.float(), soft(view.step, images, y, partner, shown).float(), y, partner)
        else:
            w = None if weights is None else weights[shown]
            value = kd_loss(logits, soft(view.step, images, y, partner, shown), recipe.temperature, w)
        optimizer.zero_grad(set_to_none=True)
        value = value * distributed.weight(len(y), device)
        value.backward()
        optimizer.step()
        running.append(distributed.mean(value.detach()))
        bar.update()
        save = checkpoint is not None and checkpoint.due(view.step + 1)
        if save or view.step % 50 == 49 or view.step + 1 == total:
            _check_finite(running[-1], view.step, recipe)
        if save:
            _save(checkpoint, net, optimizer, view.step + 1, history, running)
    if len(history) < recipe.epochs:
        _end_epoch(net, running, history, on_epoch, bar)
    bar.close()
    return net.eval()


def _check_shared(data: Dataset | Stream, recipe: Recipe) -> None:
    """ValueError for a training that the processes cannot share."""
    world, images = distributed.world(), len(data.labels)
    if world == 1:
        return
    if recipe.labels == "soft":
        raise ValueError(f"recipe {recipe.name!r} has labels='soft'; allowed on {world} processes: 'hard'")
    if recipe.cutmix and isinstance(data, Stream):  # an image and its partner may belong to two processes
        raise ValueError(f"recipe {recipe.name!r} has cutmix=True; allowed on {world} processes, of a stream: False")
    rest = images % recipe.batch
    smallest = rest if rest > 1 else min(recipe.batch, images)
    if smallest < world:
        raise ValueError(
            f"recipe {recipe.name!r} has a batch of {smallest} images (batch={recipe.batch}, {images} in all): too few "
            f"for {world} processes; allowed: at most {smallest}"
        )


def _end_epoch(net: nn.Module, losses: list[Tensor], history: list, on_epoch, bar) -> None:
    epoch, mean = len(history), torch.stack(losses).mean().item()
    bar.set_postfix(epoch=epoch, loss=f"{mean:.4g}")
    history.append([epoch, mean, on_epoch(epoch, net) if on_epoch else None])


def _check_finite(loss: Tensor, step: int, recipe: Recipe) -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the training loss is not finite at step {step} of recipe {recipe.name!r} (lr={recipe.lr}); the last good "
            "state is kept; a smaller learning rate or precision=fp32 may help"
        )


def _save(
    checkpoint: Checkpoint, net: nn.Module, optimizer: torch.optim.Optimizer, step: int, history: list, running: list
) -> None:
    tensors = {f"net/{k}": v for k, v in net.state_dict().items()} | {"running": torch.stack(running)}
    for i, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{k}": torch.as_tensor(v) for k, v in slots.items() if v is not None}
    checkpoint.save(tensors, {"step": step, "history": history})


def _resume(
    checkpoint: Checkpoint | None, net: nn.Module, optimizer: torch.optim.Optimizer, history: list
) -> tuple[int, list[Tensor]]:
    """Load the checkpoint into net, optimiser and history; returns the next step (0 without one) and the losses of the
    epoch that it is in."""
    saved = distributed.from_first(checkpoint.load() if checkpoint else None)
    if saved is None:
        return 0, []
    tensors, meta = saved
    net.load_state_dict({k.removeprefix("net/"): v for k, v in tensors.items() if k.startswith("net/")})
    params = [p for group in optimizer.param_groups for p in group["params"]]
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, i, name = key.split("/", 2)
            if value.shape == params[int(i)].shape:  # the fused optimiser wants the parameter's own memory order
                value = torch.empty_like(params[int(i)]).copy_(value)
            slots.setdefault(int(i), {})[name] = value
    state = optimizer.state_dict()
    optimizer.load_state_dict({**state, "state": slots})
    history[:] = meta["history"]
    device = next(net.parameters()).device
    return meta["step"], list(tensors["running"].to(device))


@torch.inference_mode()
def accuracy(
    net: nn.Module, images: Tensor, labels: Tensor, data: Dataset | Stream, *, device: torch.device,
    dtype: torch.dtype = torch.bfloat16, batch: int = 256,
) -> float:  # fmt: skip
    """Top-1 accuracy in percent on centre views: images uint8 [N, C, size, size], labels [N]."""
    net.eval()
    right = 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        with autocast(device, dtype):
            z = net(normalise(x.to(device), data.mean, data.std))
        right += (z.argmax(1) == y.to(device)).sum()
    return 100 * int(right) / len(labels)
