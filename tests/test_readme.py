"""The README is true: generated results are fresh, commands exist, one method runs alone as it says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from common.distilled import load
from papers import readme

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_results_are_those_of_the_committed_files():
    assert readme.updated(TEXT, readme.results(ROOT / "tables")) == TEXT, "run: python -m papers.readme"


def test_it_has_five_screens_at_most():
    assert len(TEXT.splitlines()) <= 5 * 40


def test_paths_that_it_names_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    assert links and all((ROOT / link).exists() for link in links), links


def test_help_of_every_command():
    for command in (["methods/wmdd.py", "help"], ["-m", "papers.runner", "help"], ["-m", "common.datasets", "help"]):
        done = run(*command)
        assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= 100, (command, done.stderr)


@pytest.mark.slow
def test_one_method_alone_leaves_a_set_that_loads(tmp_path):
    settings = ["teacher_epochs=1", "student_epochs=2", "iterations=3", f"store={tmp_path}/runs", f"out={tmp_path}/out"]
    done = run("methods/wmdd.py", "dataset=digits", "ipc=2", "device=cpu", *settings)
    assert done.returncode == 0, done.stderr
    assert re.search(r"student: \d+\.\d\d % on 360 test images", done.stdout)
    distilled = load(tmp_path / "out" / "wmdd_digits_ipc2.safetensors")
    assert distilled.images.shape == (20, 3, 32, 32) and distilled.settings["config"]["iterations"] == 3
    assert (tmp_path / "out" / "wmdd_digits_ipc2.png").exists()
    again = run("methods/wmdd.py", "dataset=digits", "ipc=2", "device=cpu", *settings)
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]  # same seed, same number


def test_a_wrong_argument_of_a_method_is_named():
    done = run("methods/wmdd.py", "ipcs=3")
    assert done.returncode == 2 and "ipcs" in done.stderr and "ipc" in done.stderr and "Traceback" not in done.stderr
