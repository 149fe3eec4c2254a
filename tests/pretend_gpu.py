"""A GPU that is none: its tensors are computed on the CPU, and a GPU's errors about devices are raised.

What it finds without a GPU: tensors of two devices in one operation, a generator of another device than the numbers it
draws, NumPy on the memory of a GPU.  What it does not: kernels, memory, speed, and anything that is compiled.
"""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch import Tensor
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class OnGPU(Tensor):
    """A tensor that says it lies on a GPU, around the one on the CPU that holds its numbers."""

    is_meta = False  # what meta tensors lack, numbers, these have

    @staticmethod
    def __new__(cls, host: Tensor):
        return Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            layout=host.layout, device="meta", requires_grad=False,
        )  # fmt: skip

    def __init__(self, host: Tensor):
        self.host = host

    def __repr__(self, **_) -> str:
        return f"OnGPU({self.host!r})"

    def numpy(self, **_):
        raise TypeError("can't convert a tensor of a GPU to numpy")

    __array__ = numpy

    def tolist(self):
        return self.host.tolist()

    def __getitem__(self, index):
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def compute(func, args: tuple, kwargs: dict):
    """An operation on the CPU's numbers, its result where a GPU would have it.  RuntimeError where a GPU has one."""
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    there, here = [t for t in given if isinstance(t, OnGPU)], [t for t in given if not isinstance(t, OnGPU)]
    if any(t.is_meta for t in here):  # of a plan, whose networks have no numbers
        args, kwargs = tree_map(lambda t: t.host.to("meta") if isinstance(t, OnGPU) else t, (args, kwargs))
        return func(*args, **kwargs)
    device = kwargs.get("device")
    goal = "meta" if there else "cpu"
    if device is not None:
        goal, kwargs = torch.device(device).type, kwargs | {"device": torch.device("cpu")}
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != goal:
        raise RuntimeError(f"{func}: expected a '{goal}' device type for generator but found '{generator.device}'")
    if there and func not in MOVES:
        # a GPU takes numbers of the CPU as scalars, and to index with; the CPU takes nothing of a GPU
        fine = isinstance(args[0], OnGPU) if func in INDEXED else all(t.dim() == 0 for t in here)
        if func in INDEXED:
            values = [t for t in args[2:3] if isinstance(t, Tensor)]
            fine = fine and all(isinstance(t, OnGPU) or t.dim() == 0 for t in values)
        if not fine:
            raise RuntimeError(f"{func}: tensors on two devices, {[(tuple(t.shape), str(t.device)) for t in given]}")
    flat, spec = tree_flatten((args, kwargs))
    real_args, real_kwargs = tree_unflatten([t.host if isinstance(t, OnGPU) else t for t in flat], spec)
    made = func(*real_args, **real_kwargs)
    if func is aten.copy_.default:
        return args[0]
    if goal == "cpu":
        return made
    own = {id(t.host): t for t in there}  # what an in-place operation returns is what it was given
    wrapped = lambda t: own[id(t)] if id(t) in own else OnGPU(t) if isinstance(t, Tensor) else t  # noqa: E731
    return tree_map(wrapped, made)


class _Mode(TorchDispatchMode):
    """Catches what has no tensor of the GPU among its arguments, such as zeros(device="cuda") and .to("cuda")."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


@contextlib.contextmanager
def pretend_gpu():
    """Within it the device that it yields is a GPU, for eager code in fp32."""
    made = torch.tensor

    def tensor(data, *, device=None, **options) -> Tensor:
        """torch.tensor, which asks no mode before it fills the memory of a device."""
        return made(data, **options) if device is None else made(data, **options).to(device)

    def enter(mode: torch.inference_mode) -> None:
        """Without gradients: in inference mode itself no tensor can stand for another."""
        mode._inference_mode_context = torch.no_grad() if mode.mode else torch.enable_grad()
        mode._inference_mode_context.__enter__()

    nothing = lambda *_, **__: contextlib.nullcontext()  # noqa: E731
    as_it_is = lambda f=None, **_: f if f is not None else (lambda g: g)  # noqa: E731
    patched = {"autocast": nothing, "compile": as_it_is, "tensor": tensor}
    fused = [*optimizer._get_fused_kernels_supported_devices(), "meta"]
    with (
        _Mode(), mock.patch.multiple(torch, **patched),
        mock.patch.object(torch.inference_mode, "__enter__", enter),
        mock.patch.object(optimizer, "_get_fused_kernels_supported_devices", lambda: fused),
    ):  # fmt: skip
        yield torch.device("meta")
