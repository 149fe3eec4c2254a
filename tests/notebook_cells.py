"""The cells of a paper's notebook, for tests."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_notebook(paper: str) -> dict:
    return json.loads((ROOT / "notebooks" / f"{paper}.ipynb").read_text(encoding="utf-8"))


def code_cells(notebook: dict) -> list[str]:
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]


def tagged(notebook: dict, tag: str) -> str:
    """The source of the one cell that has a tag."""
    (found,) = [c for c in notebook["cells"] if tag in c["metadata"].get("tags", ())]
    return "".join(found["source"])
