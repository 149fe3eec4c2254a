"""The README is true: generated results are fresh, and every command in it, and in the laptop section of
docs/cluster.md, works as far as it can here: without data, GPU or hours it has to reach its plan or its missing data.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common import networks
from common.augment import rng
from common.distilled import load
from methods import dm
from papers import export, notebook, readme
from papers.cells import load_paper, papers
from papers.report import load_reported
from papers.setups import setup_of

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
LAPTOP = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").split("## Laptop, with Ray")[1].split("## ")[0]
SET = ROOT / "tables" / "matching" / "small" / "sets" / "dc_cifar10_ipc1.safetensors"
PROGRAMS = ("bash", "python", "cp")
LISTED = r"(FOLDER|tables|runs|[a-z]+)/\S*|run_all\.sh"  # first words of lines that list files


def indented(text: str) -> list[str]:
    """The indented lines outside of paragraphs: commands, programs, lists of files."""
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


def commands(text: str) -> list[str]:
    """Indented lines that begin with a program, and those between backticks that are whole, without comments."""
    lines = [line for line in indented(text) if line.split()[0] in PROGRAMS]
    lines += re.findall(rf"`((?:{'|'.join(PROGRAMS)}) [^`\n]+)`", re.sub(r"<!--.*?-->", "", text))
    return list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in lines if "..." not in line))


# What is written


def test_the_results_are_those_of_the_committed_files():
    assert readme.updated(TEXT, readme.results(ROOT / "tables")) == TEXT, "run: python -m papers.readme"
    assert readme.PAGE.read_text(encoding="utf-8") == readme.page(ROOT / "tables"), "run: python -m papers.readme"


def test_the_status_counts_every_printed_number_once():
    rows = re.findall(r"^\| (\w+) \| ([\d |]+) \|$", readme.status(ROOT / "tables"), flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(papers())
    for name, numbers in rows:
        printed, smoke, small, near, ours, reproduced, differs, planned, lacking = map(int, numbers.split(" | "))
        assert printed == len(load_reported(ROOT / "papers" / name / "reported.csv")) == ours + planned + lacking
        assert max(smoke, small, ours) <= printed and near <= small and reproduced + differs <= ours


@pytest.mark.parametrize(("mean", "counts"), [(64.9, "0 | 1 | 1 | 0"), (60.0, "0 | 1 | 0 | 1")])
def test_the_status_tells_reproduced_from_different(tmp_path, mean, counts):
    source = ROOT / "tables" / "wmdd" / "small" / "cells" / "table1_imagenette_wmdd_resnet-18_10_soft.json"
    found = json.loads(source.read_text(encoding="utf-8")) | {"mean": mean}
    (cell,) = (c for c in load_paper("wmdd").cells_at("paper") if c.id == found["cell"])
    found["settings"] = setup_of(load_paper("wmdd").scales["paper"], cell).facts()
    (tmp_path / "wmdd" / "paper" / "cells").mkdir(parents=True)
    (tmp_path / "wmdd" / "paper" / "cells" / "one.json").write_text(json.dumps(found), encoding="utf-8")
    assert f"| wmdd | 128 | 0 | 0 | {counts} | 61 | 66 |" in readme.status(tmp_path)


def test_it_has_five_screens_at_most():
    assert len(TEXT.splitlines()) <= 5 * 40


def test_paths_that_it_names_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", TEXT)
    assert links and all((ROOT / link).exists() for link in links), links


# What is run


def test_every_indented_line_is_a_command_a_program_or_a_list_of_files(tmp_path, monkeypatch):
    kinds = {line: line.split()[0] for line in indented(TEXT)}
    others = [line for line, first in kinds.items() if first not in PROGRAMS and not re.fullmatch(LISTED, first)]
    shutil.copy(SET, tmp_path / "set.safetensors")
    monkeypatch.chdir(tmp_path)
    assert len(others) == 6, others
    use, copied = others[-3:], others[:-3]  # the rest are two programs, which run
    names: dict = {}
    exec("\n".join(use), names)
    assert names["network_input"].shape == (10, 3, 32, 32) and len(names["labels"]) == 10
    monkeypatch.setitem(sys.modules, "dm", dm)
    names["MyNetwork"] = lambda: networks.make("convnet1", classes=10, size=32, generator=rng(0))
    names["images"] = names["network_input"].repeat(10, 1, 1, 1)
    names["labels"] = names["labels"].repeat(10)
    text = "\n".join(copied)
    assert "20_000" in text
    exec(text.replace("20_000", "2"), names)
    assert names["made"]["images"].shape == (100, 3, 32, 32)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a set in it, where commands run that write files."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copy(SET, folder / "set.safetensors")
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Runs a program file or a module in this process, in `place`, without data: (status, what it printed, errors)."""
    monkeypatch.delenv("DD_DATA", raising=False)
    monkeypatch.chdir(place)

    def started(start, name: str, arguments: list[str]) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as end:
            start(name, run_name="__main__")
        return (end.value.code or 0, *capsys.readouterr())

    return started


def shell(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        words, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # modules run as programs
@pytest.mark.parametrize("command", [*commands(TEXT), *commands(LAPTOP)])
def test_command(command, run, place, capsys):
    match shlex.split(command):
        case ["bash", "run_all.sh", "help"]:
            shown = shell(*shlex.split(command))
            assert shown.returncode == 0 and max(map(len, shown.stdout.splitlines())) <= 100
        case ["bash", "run_all.sh", "tests"]:  # this is the test suite: only that pytest is reached
            shown = shell(*shlex.split(command), "--version")
            assert shown.returncode == 0 and "pytest" in shown.stdout
        case ["bash", "run_all.sh", "python", "-m", "pip", "install", *files]:  # that would change the environment
            assert all((ROOT / file).is_file() for file in files if not file.startswith("-")), files
        case ["bash", "run_all.sh", *keys] | ["python", "-m", "papers.runner", *keys] if "=" in "".join(keys):
            if "engine=ray" in keys:
                pytest.importorskip("ray", reason="Ray is not installed: requirements-cluster.txt")
            keys = [key for key in keys if key != "dry_run=true"]
            assert notebook.main([*keys, "dry_run=true", f"store={place}/runs"]) == 0, capsys.readouterr().err
            said = capsys.readouterr().out
            assert re.search(r"\d+ stages to run|missing data", said), said
            assert len(re.findall("not part of|planned, not run yet", said)) <= 2, said  # counted, not listed
        case ["python", script, "help"]:
            status, said, _ = run(runpy.run_path, str(ROOT / script), ["help"])
            assert status == 0 and max(map(len, said.splitlines())) <= 100
            assert ": ," not in said and " ," not in said  # the empty choice is not listed
        case ["python", "methods/wmdd.py", "dataset=digits", "ipc=10"]:  # smaller in the test below
            assert "iterations" in run(runpy.run_path, str(ROOT / "methods" / "wmdd.py"), ["help"])[1]
        case ["python", script, *keys] if script.startswith("methods/"):  # as far as the data that is not there
            status, said, wrong = run(runpy.run_path, str(ROOT / script), keys)
            missing = r"error: data set '\w+' (needs a root folder|is not there: looked for FOLDER)"
            assert status == 1 and re.match(missing, wrong), (said, wrong)
        case ["python", "-m", "common.datasets", "check", *keys]:
            status, said, wrong = run(runpy.run_module, "common.datasets", ["check", *keys])
            assert status == 1 and "is not there: looked for FOLDER" in said + wrong
        case ["python", "-m", "common.distilled", *words]:
            status, said, wrong = run(runpy.run_module, "common.distilled", words)
            assert status == 0 and said and max(map(len, said.splitlines())) <= 100, (said, wrong)
        case ["python", "-m", "common.evaluate", *keys]:  # tests/test_evaluate.py goes on where the data is
            status, said, wrong = run(runpy.run_module, "common.evaluate", keys)
            assert status == 1 and wrong.startswith("error: data set 'cifar10' needs a root folder"), (said, wrong)
        case ["python", "-m", "papers.export", *keys]:  # tests/test_export.py runs it on a store that has sets
            args, out, _ = export.parse(keys)
            status, _, wrong = run(runpy.run_module, "papers.export", keys)
            assert status == 1 and wrong.startswith("error: no set was written") and not (place / out).exists()
            assert args.paper == "matching"
        case ["cp", file, _]:  # tests of the method import the copy
            assert (ROOT / file).is_file()
        case _:
            pytest.fail(f"no check of this command: {command}")


@pytest.mark.slow
def test_one_method_alone_leaves_a_set_that_loads(run, tmp_path):
    assert "python methods/wmdd.py dataset=digits ipc=10" in TEXT
    keys = ["dataset=digits", "ipc=2", "device=cpu", "network=resnet18-bn-w16", "teacher_epochs=1", "student_epochs=2"]
    keys += ["iterations=3", f"store={tmp_path}/runs", f"out={tmp_path}/out"]
    status, said, wrong = run(runpy.run_path, str(ROOT / "methods" / "wmdd.py"), keys)
    assert status == 0, wrong
    assert re.search(r"student: \d+\.\d\d % on 360 test images", said)
    distilled = load(tmp_path / "out" / "wmdd_digits_ipc2.safetensors")
    assert distilled.images.shape == (20, 3, 32, 32) and distilled.settings["config"]["iterations"] == 3
    assert (tmp_path / "out" / "wmdd_digits_ipc2.png").exists()
    again = run(runpy.run_path, str(ROOT / "methods" / "wmdd.py"), keys)[1]
    assert again.splitlines()[-1] == said.splitlines()[-1]  # same seed, same number


def test_a_wrong_argument_of_a_method_is_named(run):
    status, _, wrong = run(runpy.run_path, str(ROOT / "methods" / "wmdd.py"), ["ipcs=3"])
    assert status == 2 and "unknown key 'ipcs' (did you mean 'ipc'?)" in wrong
