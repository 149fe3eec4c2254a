"""The way in: run_all.sh, the environment it finds or makes, and the notebook it runs."""

import ast
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from common.cli import UsageError
from papers import notebook, runner

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location("environment", ROOT / "common" / "environment.py")
REPORTER = """import json, os, sys
seen = {"arguments": sys.argv[1:], "folder": os.getcwd(), "prefix": sys.prefix, "variables": dict(os.environ)}
print(json.dumps(seen))
"""


def start(*arguments, tree=ROOT, cwd=ROOT, **variables):
    """run_all.sh of a tree with this interpreter; `variables` are added to the environment, None takes one away."""
    surroundings = {**os.environ, "PYTHON": sys.executable, **variables}
    surroundings = {name: value for name, value in surroundings.items() if value is not None}
    command = ["bash", os.path.relpath(tree / "run_all.sh", cwd), *arguments]
    return subprocess.run(command, cwd=cwd, env=surroundings, capture_output=True, text=True, timeout=300)


@pytest.fixture
def tree(tmp_path):
    """A copy of what the entry needs, in a folder with a space; its papers.notebook prints what reaches it."""
    copy = tmp_path / "a copy"
    for name in ("run_all.sh", "requirements.txt", "constraints.txt", "common/environment.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    papers = {"wmdd/paper.yaml": "", "other/paper.yaml": "", "__init__.py": "", "notebook.py": REPORTER}
    for name, text in papers.items():
        (copy / "papers" / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / "papers" / name).write_text(text)
    return copy


# Arguments


def test_help_lists_every_key():
    shown = start("help")
    assert shown.returncode == 0
    keys = {line.split()[0] for line in shown.stdout.splitlines() if line.startswith("  ") and line.split()}
    assert {field.name for field in dataclasses.fields(runner.Args)} <= keys
    assert max(map(len, shown.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((), "Usage"), (("scale=smoke",), "= is missing"), (("paper=wmd",), "wmd"), (("paper=../papers/wmdd",), "..")],
)
def test_wrong_paper_says_what_is_allowed_before_any_environment_is_made(tree, arguments, words):
    refused = start(*arguments, tree=tree, PYTHON="/nowhere/python")
    assert refused.returncode == 2
    assert words in refused.stderr and "other, wmdd" in refused.stderr
    assert refused.stdout == "" and not (tree / ".venv").exists()


@pytest.mark.parametrize(("argument", "named"), [("scal=smoke", "scale, only"), ("scale=large", "smoke, small")])
def test_wrong_argument_exits_with_2(argument, named):
    refused = start("paper=wmdd", argument)
    assert refused.returncode == 2
    assert named in refused.stderr
    assert "Traceback" not in refused.stderr


def test_any_folder_and_paths_with_spaces(tree, tmp_path):
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    done = start(
        "paper=wmdd", "only=table1, table2", "data=my sets", f"out={tmp_path}/o", "store=here",
        tree=tree, cwd=elsewhere, DD_DATA="~/sets",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    paths = [f"data={elsewhere}/my sets", f"out={tmp_path}/o", f"store={elsewhere}/here"]
    assert seen["arguments"] == ["paper=wmdd", "only=table1, table2", *paths]
    assert Path(seen["folder"]) == tree
    assert seen["variables"]["DD_DATA"] == "~/sets"


def test_users_cdpath_does_not_lead_astray(tree, tmp_path):
    (tmp_path / "decoy" / tree.name).mkdir(parents=True)
    done = start("paper=wmdd", tree=tree, cwd=tmp_path, CDPATH=str(tmp_path / "decoy"))
    assert done.returncode == 0, done.stderr
    assert Path(json.loads(done.stdout)["folder"]) == tree


def test_python_runs_in_the_callers_folder(tree, tmp_path):
    done = start("python", "-c", "import os; print(os.getcwd())", tree=tree, cwd=tmp_path)
    assert Path(done.stdout.strip()) == tmp_path, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the variables belong to glibc")
def test_allocator_variables_give_way_to_the_users(tree):
    names = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")
    ours = json.loads(start("paper=wmdd", tree=tree, **dict.fromkeys(names)).stdout)["variables"]
    assert ours[names[0]] == "0" and int(ours[names[1]]) > 2**32
    users = json.loads(start("paper=wmdd", tree=tree, **dict.fromkeys(names, "77")).stdout)["variables"]
    assert [users[name] for name in names] == ["77", "77"]


# Environment


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """common/environment.py with pip replaced: `calls` lists the fillings, which leave a file behind."""
    module = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(module)
    module.calls = []

    def create(venv):
        (venv / "bin").mkdir()
        (venv / "bin" / "python").symlink_to(sys.executable)

    def fill(venv, root):
        module.calls.append(venv)
        (venv / "filled").touch()

    monkeypatch.setattr(module, "create", create)
    monkeypatch.setattr(module, "fill", fill)
    (tmp_path / "requirements.txt").write_text("# a comment\n\npytest>=1  # why\n")
    (tmp_path / "constraints.txt").write_text("pytest==8.0\n")
    return module


def test_lacking_names_what_is_missing_or_too_old(environment):
    fine = ["pytest>=1", "PyTest", "no-such-package>=3; python_version < '3'"]
    assert environment.lacking(fine) == []
    found = environment.lacking([*fine, "pytest>=9999", "no-such-package>=3"])
    assert found == [f"pytest is {pytest.__version__}, needed >=9999", "no-such-package is missing"]


def test_this_interpreter_satisfies_the_requirements_and_says_so_quickly():
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "common/environment.py", "check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert time.perf_counter() - begun < 5  # about 0.1 s on an idle machine


def test_requirements_are_what_is_imported(environment):
    folders = ("benchmarks", "common", "methods", "papers", "tests")
    texts = [path.read_text(encoding="utf-8") for folder in folders for path in ROOT.glob(f"{folder}/**/*.py")]
    for path in ROOT.glob("notebooks/*.ipynb"):
        texts += [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    imported = set()
    for node in (node for text in texts for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported.add(node.module.split(".")[0])
    names = {"ot": "POT", "PIL": "Pillow", "sklearn": "scikit-learn", "yaml": "PyYAML"}
    others = imported - sys.stdlib_module_names - {path.name for path in ROOT.iterdir()} - {"environment"}
    used = {canonicalize_name(names.get(module, module)) for module in others}
    files = (ROOT / "requirements.txt", ROOT / "requirements-cluster.txt")
    lines = [line for file in files for line in environment.requirement_lines(file)]
    listed = {canonicalize_name(Requirement(line).name) for line in lines}
    beside = {"pyarrow", "ipython"}  # optional, for parquet dumps; a part of ipykernel
    assert used - beside <= listed
    assert listed - used <= {"ipykernel", "pytest-xdist", "ruff"}  # started as programs, or by pytest


def test_old_python_is_named(environment, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "OLDEST", (99, 0))
    assert environment.check(tmp_path) == [f"Python is {sys.version.split()[0]}, needed >= 99.0"]


def test_environment_is_filled_once_and_again_when_a_file_changes(environment, tmp_path):
    for expected in (1, 1):
        environment.make(tmp_path)
        assert len(environment.calls) == expected
    for name in ("requirements.txt", "constraints.txt"):
        (tmp_path / ".venv" / "old").touch()
        with open(tmp_path / name, "a") as file:
            file.write("hypothesis\n")
        assert not environment.usable(tmp_path)
        environment.make(tmp_path)
        assert environment.usable(tmp_path) and not (tmp_path / ".venv" / "old").exists()
    assert len(environment.calls) == 3


def test_killed_filling_is_made_again(environment, tmp_path, monkeypatch):
    fill = environment.fill

    def killed(venv, root):
        fill(venv, root)
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "fill", killed)
    with pytest.raises(KeyboardInterrupt):
        environment.make(tmp_path)
    assert (tmp_path / ".venv" / "filled").exists() and not environment.usable(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert environment.check(tmp_path) != []  # although its packages satisfy requirements.txt
    monkeypatch.setattr(environment, "fill", fill)
    environment.make(tmp_path)
    assert environment.usable(tmp_path) and environment.check(tmp_path) == []


def test_vanished_interpreter_is_noticed(environment, tmp_path):
    environment.make(tmp_path)
    (tmp_path / ".venv" / "bin" / "python").unlink()
    assert not environment.usable(tmp_path)


def test_somebodys_own_environment_is_used_or_left_alone(environment, tmp_path, monkeypatch):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "theirs").touch()
    with pytest.raises(RuntimeError, match="was not made by"):
        environment.make(tmp_path)
    assert (tmp_path / ".venv" / "theirs").exists() and environment.calls == []
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert environment.check(tmp_path) == []


def test_two_starts_fill_once(tmp_path):
    program = f"""import pathlib, sys, time
sys.path.insert(0, {str(ROOT / "common")!r})
import environment
def create(venv):
    (venv / "bin").mkdir()
    (venv / "bin" / "python").symlink_to(sys.executable)
def fill(venv, root):
    time.sleep(1)
    with open(root / "fillings", "a") as file:
        file.write("once ")
environment.create, environment.fill = create, fill
environment.make({str(tmp_path)!r})
print(environment.usable({str(tmp_path)!r}))
"""
    starts = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in starts] == ["True", "True"]
    assert (tmp_path / "fillings").read_text() == "once "


def test_python_that_is_none_is_named(tree):
    refused = start("paper=wmdd", tree=tree, PYTHON="/nowhere/python")
    assert refused.returncode == 1
    assert "PYTHON=/nowhere/python is no Python 3.10 or newer" in refused.stderr


def test_venv_is_made_by_pip_and_made_again_after_a_failure(tree, tmp_path):
    """The whole way with the real venv and pip, offline: one tiny package stands for the requirements."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (tree / "requirements.txt").write_text("tiny-stand-in>=1\n")
    (tree / "constraints.txt").write_text("tiny-stand-in==1.5\n")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.as_uri(), "PIP_CONFIG_FILE": os.devnull}

    refused = start("paper=wmdd", tree=tree, **offline)
    assert refused.returncode == 1
    assert "pip could not fill .venv" in refused.stderr and "Traceback" not in refused.stderr

    with zipfile.ZipFile(wheels / "tiny_stand_in-1.5-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_stand_in.py", "")
        facts = "tiny_stand_in-1.5.dist-info"
        wheel.writestr(f"{facts}/METADATA", "Metadata-Version: 2.1\nName: tiny-stand-in\nVersion: 1.5\n")
        wheel.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{facts}/RECORD", "")
    made = start("paper=wmdd", tree=tree, **offline)
    assert made.returncode == 0, made.stderr
    assert "unfinished" in made.stderr
    assert Path(json.loads(made.stdout)["prefix"]) == tree / ".venv"

    again = start("paper=wmdd", tree=tree, **offline)
    assert (again.returncode, again.stderr) == (0, "")
    assert Path(json.loads(again.stdout)["prefix"]) == tree / ".venv"


# Notebook


def write_notebook(path, source):
    """A notebook of two cells: its parameters (word, count) and `source`."""
    cells = [nbformat.v4.new_code_cell("word = ''\ncount = 1", metadata={"tags": ["parameters"]})]
    cells.append(nbformat.v4.new_code_cell(source))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture
def users_kernel(tmp_path, monkeypatch):
    """A user whose own python3 kernel is broken."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    broken = {"argv": ["/nowhere/python", "{connection_file}"], "display_name": "mine", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(broken))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))


def test_notebook_runs_here_and_is_written_with_its_page(tmp_path, users_kernel, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    source = "import os, sys\nprint(word, count, sys.executable, os.getcwd())\nprint(os.path.abspath('tables'))"
    path = write_notebook(tmp_path / "small.ipynb", source)
    page = notebook.execute(path, {"word": "hello"}, tmp_path / "out")
    assert f"hello 1 {sys.executable} {ROOT}\n" in capfd.readouterr().out
    assert page == tmp_path / "out" / "small.html" and "hello 1" in page.read_text()
    assert sorted(os.listdir(tmp_path / "out")) == ["small.html", "small.ipynb"]
    text = (tmp_path / "out" / "small.ipynb").read_text()
    assert nbformat.reads(text, as_version=4).cells[-1].outputs[0].text.endswith("\ntables\n")
    assert f"{ROOT}{os.sep}" not in text and str(tmp_path) not in text


def test_failing_cell_keeps_what_ran_and_the_earlier_result(tmp_path, capfd):
    out = tmp_path / "out"
    path = write_notebook(tmp_path / "small.ipynb", "print('before')\nraise ValueError(f'count is {count}')")
    out.mkdir()
    (out / "small.ipynb").write_text("earlier")
    with pytest.raises(RuntimeError, match=r"small\.ipynb, cell 3: ValueError: count is 4; .*small\.failed\.ipynb"):
        notebook.execute(path, {"count": 4}, out)
    assert "before" in capfd.readouterr().out
    assert (out / "small.ipynb").read_text() == "earlier"
    assert "count is 4" in (out / "small.failed.ipynb").read_text()
    notebook.execute(write_notebook(path, "print('fine')"), {}, out)
    assert sorted(os.listdir(out)) == ["small.html", "small.ipynb"]


def test_unknown_notebook_parameter_is_refused(tmp_path):
    path = write_notebook(tmp_path / "small.ipynb", "")
    notebook.check_parameters(path, {"word": "x"})
    with pytest.raises(UsageError, match="no parameter wrod; allowed: word, count"):
        notebook.check_parameters(path, {"wrod": "x"})


def test_without_papermill_the_runner_takes_over(monkeypatch, capsys):
    monkeypatch.setattr(notebook, "NEEDED", ("nbformat", "no_such_module"))
    monkeypatch.setattr(runner, "main", lambda argv: (argv, 7)[1] if argv == ["paper=wmdd"] else 0)
    assert notebook.main(["paper=wmdd"]) == 7
    said = capsys.readouterr().out
    assert "no_such_module" in said and "nbformat" not in said


def test_every_key_is_a_parameter_of_every_papers_notebook():
    keys = {field.name for field in dataclasses.fields(runner.Args)} - {"paper", "dry_run", "debug"}
    for paper in (path.parent.name for path in ROOT.glob("papers/*/paper.yaml")):
        notebook.check_parameters(ROOT / "notebooks" / f"{paper}.ipynb", dict.fromkeys(keys, ""))


def test_plan_alone_starts_no_notebook(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(runner, "run", seen.append)
    monkeypatch.setattr(notebook, "execute", lambda *_: pytest.fail("the notebook was started"))
    assert notebook.main(["paper=wmdd", "scale=smoke", "dry_run=true"]) == 0
    assert seen[0].dry_run and capsys.readouterr().out.startswith("wmdd: scale=smoke")


def test_arguments_reach_the_notebook_as_typed(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(notebook, "check_parameters", lambda *_: None)
    monkeypatch.setattr(notebook, "execute", lambda *given: seen.append(given) or tmp_path / "wmdd.html")
    arguments = ["paper=wmdd", "scale=smoke", "only=table1,table2", f"out={tmp_path}", "dry_run=false", "debug=true"]
    assert notebook.main(arguments) == 0
    parameters = {"scale": "smoke", "only": "table1,table2", "out": str(tmp_path)}
    assert seen == [(ROOT / "notebooks" / "wmdd.ipynb", parameters, tmp_path / "wmdd" / "smoke")]
