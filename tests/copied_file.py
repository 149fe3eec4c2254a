"""What tests of a method do with its file alone: copy it, run it in a Python that sees nothing else, stop it midway."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent

# A program of a user: a network of their own for three classes, whose last layer follows a BatchNorm.
OWN_NETWORK = """
class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)
        self.last = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.norm(self.conv(x)).relu().amax((2, 3)))
"""


def said_alone(method: str, program: str, folder: Path) -> str:
    """What `program` prints where methods/<method>.py lies in `folder` and nothing of the repository is importable."""
    shutil.copy(ROOT / "methods" / f"{method}.py", folder)
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{program}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert not done.returncode, done.stderr
    return done.stdout


class Killed(Exception):
    """Ends a run in the middle."""


def killed_state(stop: int, run, *arguments, **options) -> dict[str, Tensor]:
    """The tensors of the state at step `stop` of `run(..., on_step=)`, which is killed there."""
    kept = []

    def kill(state) -> None:
        kept.append({name: t.clone() for name, t in state.tensors().items()})
        if len(kept) == stop:
            raise Killed

    with pytest.raises(Killed):
        run(*arguments, **options, on_step=kill)
    return kept[-1]
