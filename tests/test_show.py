"""What notebooks show of a run."""

from types import SimpleNamespace

import pytest

from papers import show


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """A run of three cells, two of them with results, and what is displayed of it."""
    said = []
    monkeypatch.setattr(show, "display", said.append)
    results = {
        name: {"table": "table1", "method": name, "ipc": ipc, "cell": name, "finished": day, "run_on": "digits",
               "values": [1.0], "seeds": [0], "seconds": {}, "peak_memory_bytes": 1, "bytes": {}, "hardware": "x",
               "command": "bash"}
        for name, ipc, day in (("dm", 10, "2026-01-02"), ("dc", 1, "2026-01-01"))
    }  # fmt: skip
    why = {"dm": "", "dc": "", "mtt": "no data"}
    cells = [SimpleNamespace(cell=SimpleNamespace(id=name), why=reason) for name, reason in why.items()]
    run = SimpleNamespace(folder=tmp_path, results=results, planned=cells)
    return show.Shown(run), said, tmp_path


def test_tables_and_figures_are_those_of_the_folder(shown):
    of_run, said, folder = shown
    (folder / "table1.md").write_text("# table1\n\n## Ours\n")
    of_run.table("table1")
    of_run.table("table2")
    of_run.figure("figure1")
    assert [m.data for m in said] == [
        "### table1\n\n#### Ours\n", "*table2: none of its cells has a result.*",
        "*figure1: nothing that it shows was made.*",
    ]  # fmt: skip


def test_results_by_their_fields_and_what_has_none(shown):
    of_run, said, _ = shown
    assert [r["method"] for r in of_run.accuracies("table1")] == ["dc", "dm"]
    assert [r["method"] for r in of_run.accuracies("table1", ipc=10)] == ["dm"] and not of_run.accuracies("table2")
    of_run.states()
    of_run.latest()
    assert said[0].data == "- 2 cells: has a result\n- 1 cells: no result: no data"
    assert "| cell | dm |" in said[1].data


def test_headings_of_a_page_go_deeper(shown):
    of_run, said, folder = shown
    (folder / "page.md").write_text("# One\n\ntext # no heading\n")
    of_run.page(folder / "page.md")
    of_run.page(folder / "none.md")
    assert said[0].data == "## One\n\ntext # no heading\n" and "not made at this scale" in said[1].data
