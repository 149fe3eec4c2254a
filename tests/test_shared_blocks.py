"""What several files hold because each must be copyable alone: the marked blocks of one name are the same text."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"# --- begin shared block: (\w+) \([^)]*\) ---\n(.*?)# --- end shared block ---\n", re.DOTALL)


def blocks() -> dict[str, dict[str, str]]:
    """Name of a block -> file -> text."""
    found = defaultdict(dict)
    for path in [*sorted((ROOT / "methods").glob("*.py")), ROOT / "common" / "augment.py"]:
        text = path.read_text(encoding="utf-8")
        marks = len(re.findall("begin shared block|end shared block", text))
        inside = BLOCK.findall(text)
        assert marks == 2 * len(inside), f"{path.name}: a mark of a shared block has no partner"
        for name, body in inside:
            assert path.name not in found[name], f"{path.name} holds the block {name} twice"
            found[name][path.name] = body
    return dict(found)


@pytest.mark.parametrize("name", sorted(blocks()))
def test_the_copies_of_a_block_are_equal(name):
    copies = blocks()[name]
    assert len(copies) > 1, f"the block {name} is in {', '.join(copies)} alone: take the marks away"
    first, *rest = copies.items()
    for file, text in rest:
        assert text == first[1], f"the block {name} differs between {first[0]} and {file}"


def test_the_copies_are_where_they_are_known_to_be():
    """A block whose marks were lost in one file would no longer be compared there."""
    crops, recovered = {"augment.py", "cad.py", "nrr_dd.py", "rded.py"}, {"sre2l.py", "wmdd.py"}
    refined, gradients = recovered | {"nrr_dd.py"}, {"dc.py", "dsa.py"}
    assert {name: set(files) for name, files in blocks().items()} == {
        "boxes": crops, "crop_resize": crops, "resample_matrix": crops | recovered,
        "stitch": crops - {"augment.py"}, "shuffle": {"augment.py", "rded.py"},
        "seeded": {"augment.py", "cad.py", "coresets.py", "natural_mixing.py"}, "reader": {"cad.py", "coresets.py"},
        "distance": gradients, "network": gradients, "real": gradients, "state": gradients,
        "finite": recovered, "norm": recovered, "recover_state": recovered,
        "moments": refined, "teacher": refined, "view": refined, "recognises": refined | {"rded.py"},
    }  # fmt: skip
