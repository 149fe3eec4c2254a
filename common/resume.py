"""Long loops that can be stopped: where an earlier run stopped, a hook that saves and shows how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from common.store import Checkpoint

__all__ = ["passes_done", "resumable"]


@contextmanager
def resumable(
    work: Path,
    restore: Callable[[dict[str, Tensor]], Any],
    total: int,
    *,
    done: Callable[[Any], int] = lambda state: state.step,
    curve: Callable[[Any], list | None] = lambda state: None,
    name: str = "distil",
    unit: str = "step",
) -> Iterator[tuple[Any | None, Callable[[Any], None], list]]:
    """(state, on_step, losses) for a loop of `total` steps that works in the folder `work` and calls on_step(state).

    state: what restore(tensors) makes of the newest checkpoint, None at the start.  done: the steps behind a state.
    curve: what is kept of a state in the list of losses, its last entry the loss, or None.  state.tensors() is saved
    whenever a checkpoint is due; the bar is shown where the output is a terminal.
    """
    checkpoint = Checkpoint(work / "state.safetensors")
    saved = checkpoint.load()
    state = restore(saved[0]) if saved else None
    losses = saved[1].get("losses", []) if saved else []
    at = done(state) if state else 0
    with tqdm(desc=name, unit=unit, total=total, initial=at, leave=False, disable=None) as bar:

        def on_step(state: Any) -> None:
            nonlocal at
            before, at = at, done(state)
            bar.update(at - before)
            if (point := curve(state)) is not None:
                losses.append(point)
                bar.set_postfix(loss=f"{point[-1]:.4g}")
            if checkpoint.due(at):
                checkpoint.save(state.tensors(), {"losses": losses})

        yield state, on_step, losses


def passes_done(iterations: int = 1) -> Callable[[Any], int]:
    """What `done` is where state.number counts finished passes of so many steps, or finished classes."""
    return lambda state: state.number * iterations + getattr(state, "step", 0)
