"""What a student is taught: losses, and where the teacher's labels of a stream of views come from.

The labels of every view can be stored (`relabel`, then `Stored`) or recomputed on the fly (`Online`) with the same
student as result: fast knowledge distillation (FKD, as SRe2L and WMDD use it) with one integer in place of the stored
crops.  What is kept of the teacher's logits may be less than all of them: `keep` says what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.datasets import Dataset
from common.hardware import autocast
from common.store import Checkpoint
from common.views import Recipe, normalise, steps_per_epoch, views

__all__ = ["Fixed", "Keep", "Labels", "Loss", "Online", "Stored", "hard_loss", "kd_loss", "relabel"]

Keep = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits [B, K], labels [B], partners' labels [B] -> [B, ...]
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # student's logits, kept, labels, partners' labels -> scalar


def kd_loss(student: Tensor, teacher: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)), mean over the batch, without the T^2 factor (as SRe2L, WMDD).

    student, teacher: logits [B, K]; weights: [B] or None, rescaled to mean 1.
    """
    log_p = F.log_softmax(student.float() / temperature, 1)
    log_q = F.log_softmax(teacher.float() / temperature, 1)
    per_sample = (log_q.exp() * (log_q - log_p)).sum(1)  # [B]
    return per_sample.mean() if weights is None else (per_sample * weights / weights.mean()).mean()


def hard_loss(logits: Tensor, labels: Tensor, partner: Tensor, share: float) -> Tensor:
    """Cross-entropy with CutMix labels: `share` of the pixels come from the partner image."""
    logits = logits.float()
    return (1 - share) * F.cross_entropy(logits, labels) + share * F.cross_entropy(logits, partner)


class Labels(Protocol):
    """Where the soft labels of a step come from; rows: int64 [B], which images of the set these are views of."""

    def __call__(self, step: int, images: Tensor, y: Tensor, partner: Tensor, rows: Tensor) -> Tensor: ...


class Stored:
    """What `relabel` kept: fp16 [steps, B, ...] on any device."""

    def __init__(self, kept: Tensor):
        self.kept = kept

    def __call__(self, step: int, images: Tensor, y: Tensor, partner: Tensor, rows: Tensor) -> Tensor:
        return self.kept[step, : len(images)].to(images.device)


class Fixed:
    """One label an image, whatever the view: what the teacher says of the image as it is, fp16 [M, K]."""

    @torch.no_grad()
    def __init__(self, teacher: nn.Module, data: Dataset, size: int, dtype: torch.dtype = torch.bfloat16):
        teacher, said, device = teacher.eval(), [], next(teacher.parameters()).device
        for rows in torch.arange(len(data)).split(100):
            x = normalise(data.center(size, rows).to(device), data.mean, data.std)
            with autocast(x.device, dtype):
                said.append(teacher(x).half())
        self.kept = torch.cat(said)

    def __call__(self, step: int, images: Tensor, y: Tensor, partner: Tensor, rows: Tensor) -> Tensor:
        return self.kept[rows]


class Online:
    """Labels recomputed by the teacher at each step: no bytes stored, one third more arithmetic.

    Rounded to fp16 as the stored ones are, so that both give the same student.  batch_statistics: BatchNorm normalises
    by those of the views, as in SRe2L's script for CIFAR; the running ones stay.
    """

    def __init__(
        self, teacher: nn.Module, dtype: torch.dtype = torch.bfloat16, keep: Keep | None = None,
        batch_statistics: bool = False,
    ):  # fmt: skip
        self.teacher, self.dtype, self.keep = teacher.eval().requires_grad_(False), dtype, keep
        norms = [m for m in teacher.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms if batch_statistics else ():
            norm.train().momentum = 0.0

    @torch.no_grad()
    def __call__(self, step: int, images: Tensor, y: Tensor, partner: Tensor, rows: Tensor) -> Tensor:
        with autocast(images.device, self.dtype):
            logits = self.teacher(images)
        return (logits if self.keep is None else self.keep(logits.float(), y, partner)).half()


def relabel(
    teacher: nn.Module, data: Dataset, recipe: Recipe, *, size: int, seed: int, device: torch.device,
    dtype: torch.dtype = torch.bfloat16, keep: Keep | None = None, batch_statistics: bool = False,
    checkpoint: Checkpoint | None = None,
) -> Tensor:  # fmt: skip
    """The teacher's labels of every view of the stream: fp16 [steps, B, ...] on the CPU (FKD, SRe2L section 3).

    keep: what is stored in place of the logits [B, K].  batch_statistics: as of `Online`.
    """
    label, kept, start = Online(teacher.to(device), dtype, keep, batch_statistics), None, 0
    if checkpoint and (state := checkpoint.load()):
        kept, start = state[0]["logits"], state[1]["step"]
    total = recipe.epochs * steps_per_epoch(len(data.labels), recipe.batch)
    labels = data.labels.to(device)
    bar = tqdm(total=total, initial=start, desc="relabel", unit="step", leave=False, disable=None)
    for view in views(data, recipe, size, seed, start):
        rows = view.indices.to(device)
        images, y = normalise(view.pixels.to(device), data.mean, data.std), labels[rows]
        z = label(view.step, images, y, y[view.permutation.to(device)], rows).cpu()
        if kept is None:
            kept = torch.zeros(total, min(recipe.batch, len(labels)), *z.shape[1:], dtype=torch.half)
        kept[view.step, : len(z)] = z
        bar.update()
        if checkpoint and checkpoint.due(view.step + 1):
            checkpoint.save({"logits": kept}, {"step": view.step + 1})
    bar.close()
    return kept
