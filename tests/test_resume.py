"""Long loops that are stopped and started again: every step counted once, in the bar too."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from common import resume
from common.store import Checkpoint


@dataclass
class Counter:
    step: int = 0
    number: int = 0

    def tensors(self) -> dict[str, Tensor]:
        return {"at": torch.tensor([self.number, self.step])}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor]) -> "Counter":
        number, step = tensors["at"].tolist()
        return cls(step, number)


@pytest.fixture
def bars(monkeypatch) -> list:
    """The bars that were shown, as on a terminal."""
    shown = []

    def bar(**options):
        shown.append(tqdm(**{**options, "disable": False}))
        return shown[-1]

    tqdm = resume.tqdm
    monkeypatch.setattr(resume, "tqdm", bar)
    return shown


def run(work, total: int, stop: int, **options) -> tuple[Counter, list]:
    with resume.resumable(work, Counter.restore, total, **options) as (state, on_step, losses):
        state = state or Counter()
        while state.step < stop:
            state.step += 1
            on_step(state)
    return state, losses


def test_a_stopped_loop_goes_on_where_it_was_saved(tmp_path, monkeypatch, bars):
    monkeypatch.setattr(Checkpoint, "due", lambda self, step: step % 4 == 0)
    curve = lambda state: None if state.step % 2 else [state.step, 1 / state.step]  # noqa: E731
    run(tmp_path, 10, 6, curve=curve)
    state, losses = run(tmp_path, 10, 10, curve=curve)
    assert state.step == 10
    assert [step for step, _ in losses] == [2, 4, 6, 8, 10]
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 6, 10), (4, 10, 10)]


def test_passes_are_counted_with_their_steps(tmp_path, bars):
    """number of finished passes x steps + steps of the present one; where it saves does not depend on the bar."""
    state = Counter(step=3, number=2)
    assert resume.passes_done(5)(state) == 13
    assert resume.passes_done()(Counter(number=4)) == 4
    seen = []
    with resume.resumable(tmp_path, Counter.restore, 20, done=resume.passes_done(5)) as (_, on_step, _):
        for number, step in ((0, 1), (0, 5), (1, 2), (3, 5)):
            on_step(Counter(step, number))
            seen.append(bars[0].n)
    assert seen == [1, 5, 7, 20]


def test_the_count_of_a_hidden_bar_is_right(tmp_path, monkeypatch):
    """Output into a file shows no bar; a checkpoint is due by the steps that were made all the same."""
    asked = []
    monkeypatch.setattr(Checkpoint, "due", lambda self, step: asked.append(step))
    run(tmp_path, 3, 3)
    assert asked == [1, 2, 3]
