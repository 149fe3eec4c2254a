"""The notebook for newcomers runs whole, on digits, from any folder of the repository, and shows what its text says."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from common import distilled
from papers import notebook

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "use_a_distilled_set.ipynb"


def code(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The folder of the executed notebook; its files are in `sets` below."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("DD_DATA", raising=False)
        notebook.execute(NOTEBOOK, {"out": str(folder / "sets")}, folder)
    return folder


@pytest.fixture(scope="module")
def said(executed) -> str:
    outputs = (output for cell in code(executed / NOTEBOOK.name) for output in cell.outputs)
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow
def test_the_set_beats_random_images_by_what_is_printed(said):
    kinds = ("distilled set", "random real images", "mixed")
    found = {kind: float(re.search(rf"{kind}: ([\d.]+) % of 360 test images of digits", said)[1]) for kind in kinds}
    assert found["distilled set"] > found["random real images"] + 3 and found["random real images"] > 50, found
    assert found["mixed"] > found["random real images"], found


@pytest.mark.slow
def test_own_images_and_own_network_learn(said):
    assert "429 training images of one, two, zero; a set of 6" in said
    assert float(re.search(r"distilled set: ([\d.]+) % of 108 test images of my-images", said)[1]) > 70  # chance is 33
    assert all(float(a) > 60 for a in re.search(r"my network: ([\d.]+) %, ([\d.]+) %, ([\d.]+) %", said).groups())


@pytest.mark.slow
def test_every_layout_was_written_and_read_back(executed, said):
    differences = re.findall(r"digits-(\w+)\S* +10 images of 10 classes, pixels within ([\d.]+)", said)
    assert [layout for layout, _ in differences] == list(distilled.SUFFIX)
    assert all(float(d) <= (0.004 if layout == "images" else 1e-4) for layout, d in differences), differences
    exported = distilled.load(executed / "sets" / "exported.safetensors")
    assert exported.settings["method"] == "dm" and exported.images.shape == (10, 1, 32, 32)
    assert len(list((executed / "sets" / "exported-images").glob("*/*.png"))) == 10


@pytest.mark.slow
def test_it_shows_pictures(executed):
    pictures = [o for cell in code(executed / NOTEBOOK.name) for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 4


def test_it_is_stored_without_outputs():
    assert all(not cell.outputs and cell.execution_count is None for cell in code(NOTEBOOK))


def test_it_finds_the_repository_from_the_folder_of_notebooks_and_from_the_root(tmp_path):
    parameters, *cells = [cell.source for cell in code(NOTEBOOK)]
    program = "\n".join([parameters, f"out = {str(tmp_path)!r}", *cells[:3]])  # up to the first set
    for folder in (ROOT, ROOT / "notebooks"):
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "airplane" in done.stdout, done.stderr
