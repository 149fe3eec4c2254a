"""One training on several processes, as `torchrun` starts them: who is who, and what they exchange.

    with started():
        net = fit(...)  # the step of one process with the whole batch; each process computes its rows

Without torchrun there is one process, and every function here gives back what it was given.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.hardware import resolve_device

T = TypeVar("T")

__all__ = [
    "BatchNorm", "beside", "from_first", "is_first", "mean", "own_device", "parallel", "rows", "started", "weight",
    "world",
]  # fmt: skip

# The others wait while the first decodes the test images, or waits for a lock; when one dies, torchrun ends them all.
PATIENCE = timedelta(days=1)


@contextmanager
def started() -> Iterator[None]:
    """In this block the processes that torchrun started know each other; a process that is alone stays so."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def beside() -> int:
    """How many of them share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that reads and writes for all."""
    return rank() == 0


def rows() -> slice:
    """The rows of every batch that are this process's; `slice(None)` where there is one."""
    return slice(None) if world() == 1 else slice(rank(), None, world())


def own_device(device: str) -> torch.device:
    """`resolve_device`, and for CUDA the GPU that is this process's own."""
    found = resolve_device(device)
    if world() == 1 or found.type == "cpu":
        return found
    if found.index is not None:
        raise ValueError(f"device={device} with several processes: each takes its own GPU; allowed: auto, cpu, cuda")
    if beside() > torch.cuda.device_count():
        raise ValueError(f"{beside()} processes, but {torch.cuda.device_count()} GPUs here; allowed: one process a GPU")
    found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(found)
    return found


def from_first(value: T) -> T:
    """What the first process has, on all of them; it is pickled, and tensors have to be on the CPU."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if world() == 1:
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / world()


def weight(count: int, device: torch.device) -> Tensor | float:
    """What the loss of `count` images is multiplied by, so that its `mean` is that of the images of all processes."""
    if world() == 1:
        return 1.0
    return count / mean(torch.full((), count, dtype=torch.float64, device=device))


def parallel(net: nn.Module, device: torch.device) -> nn.Module:
    """The network, to be called in training: gradients are those of `mean`, and so are the moments of its BatchNorms.

    `net` itself keeps its parameters and their names. ValueError for a batch norm that is not over images.
    """
    if world() == 1:
        return net
    for name, module in net.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if type(module) not in (nn.BatchNorm2d, BatchNorm):
                raise ValueError(f"{name} is a {type(module).__name__}; allowed with several processes: BatchNorm2d")
            module.__class__ = BatchNorm
    ids = None if device.type == "cpu" else [device]
    return DistributedDataParallel(net, device_ids=ids)


class BatchNorm(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the moments of the batch of all processes; `nn.SyncBatchNorm` takes no CPU tensors."""

    def forward(self, input: Tensor) -> Tensor:
        if world() == 1 or not self.training:
            return super().forward(input)
        kind = self.weight.dtype
        var, mean = (moment.double() for moment in torch.var_mean(input.to(kind), (0, 2, 3), correction=0))  # [C]
        part = torch.cat([mean, var + mean.square(), mean.new_ones(1)]) * (input.numel() / len(mean))
        total = _Sum.apply(part)
        count = total[-1]
        mean, square = (total[:-1] / count).chunk(2)
        var = square - mean.square()  # in double precision, where the difference loses nothing that matters
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(kind), self.momentum)
            self.running_var.lerp_((var * count / (count - 1)).to(kind), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt().to(kind)
        shift = self.bias - mean.to(kind) * scale
        return (input * scale[:, None, None] + shift[:, None, None]).to(input.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient, for the loss is a sum over them too."""

    @staticmethod
    def forward(ctx, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)
