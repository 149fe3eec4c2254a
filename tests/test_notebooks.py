"""What holds for the notebook of every paper as it is stored; what their cells compute is tested beside the figures."""

import dataclasses

import pytest

from papers import runner
from papers.cells import load_paper
from tests.notebook_cells import ROOT, code_cells, load_notebook, tagged

PAPERS = sorted(path.parent.name for path in ROOT.glob("papers/*/paper.yaml"))


@pytest.fixture(params=PAPERS)
def paper(request):
    return request.param


def test_it_is_stored_without_outputs(paper):
    notebook = load_notebook(paper)
    for found in notebook["cells"]:
        assert found["cell_type"] == "markdown" or (found["outputs"] == [] and found["execution_count"] is None)
    assert "papermill" not in notebook["metadata"]


def test_its_parameters_are_those_of_the_runner_as_text(paper):
    declared: dict = {}
    exec(tagged(load_notebook(paper), "parameters"), declared)
    declared.pop("__builtins__")
    fields = {f.name: f for f in dataclasses.fields(runner.Args) if f.name not in ("paper", "dry_run")}
    assert list(declared) == list(fields)
    for name, value in declared.items():
        default = fields[name].default
        assert value == (",".join(map(str, default)) if isinstance(default, tuple) else default)


def test_it_shows_every_table_and_figure(paper):
    code, own = "\n".join(code_cells(load_notebook(paper))), load_paper(paper)
    assert not [name for name in (*own.tables, *own.figures) if f'"{name}"' not in code]
