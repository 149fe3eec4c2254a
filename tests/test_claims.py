"""docs/claims.md is that of the committed result files, and says of each number what it may claim."""

import json
from pathlib import Path

from papers import claims
from papers.cells import SCALES, load_paper, papers
from papers.report import load_cells
from papers.setups import setup_of

TABLES = Path(__file__).resolve().parent.parent / "tables"


def test_the_page_is_that_of_the_committed_files():
    assert claims.PAGE.read_text(encoding="utf-8") == claims.page(TABLES), "run: python -m papers.claims"


def test_every_number_on_real_images_has_a_row_and_no_number_of_digits_has():
    text = claims.page(TABLES)
    for paper in papers():
        for scale in SCALES:
            for cell in load_cells(TABLES / paper / scale / "cells"):
                file = f"../tables/{paper}/{scale}/cells/{cell['cell'].replace('/', '_')}.json"
                listed = f"| {scale} | [`{cell['cell']}`]({file}) |" in text
                assert (claims.PAGE.parent / file).is_file()
                assert listed == (scale != "smoke"), cell["cell"]


def test_every_figure_of_real_images_has_a_row():
    text = claims.page(TABLES)
    folders = (TABLES / paper / scale for paper in papers() for scale in ("small", "paper"))
    drawn = [file for folder in folders for file in folder.glob("figure*.png")]
    assert drawn and all(f"(../{file.relative_to(TABLES.parent)})" in text for file in drawn)


def cell(tmp_path, **changes):
    """A result file of WMDD's Table 1 at published settings, in a folder of tables of its own."""
    file = next((TABLES / "wmdd" / "small" / "cells").glob("table1_imagenette_wmdd_resnet-18_10_soft.json"))
    scale, found = changes.pop("scale", "paper"), json.loads(file.read_text())
    if scale == "paper":
        (planned,) = (c for c in load_paper("wmdd").cells_at(scale) if c.id == found["cell"])
        found["settings"] = setup_of(load_paper("wmdd").scales[scale], planned).facts()
    folder = tmp_path / "wmdd" / scale / "cells"
    folder.mkdir(parents=True)
    (folder / "one.json").write_text(json.dumps(found | changes))
    return tmp_path


def test_a_number_near_print_is_reproduced_and_one_far_from_it_differs(tmp_path):
    near = claims.page(cell(tmp_path / "near", mean=64.9, std=0.4, values=[64.5, 64.9, 65.3]))
    far = claims.page(cell(tmp_path / "far", mean=60.0, std=0.4, values=[59.6, 60.0, 60.4]))
    assert "| 64.8 ± 0.4 | 64.90 ± 0.40 (3) | +0.10 | reproduced |" in near
    assert "| 64.8 ± 0.4 | 60.00 ± 0.40 (3) | -4.80 | differs |" in far


def test_a_number_of_other_settings_is_never_reproduced(tmp_path):
    given = dict(mean=64.9, std=0.4, values=[64.5, 64.9, 65.3])
    (file,) = (cell(tmp_path / "one", **given) / "wmdd" / "paper" / "cells").iterdir()
    settings = json.loads(file.read_text())["settings"]
    other = settings | {"student": settings["student"] | {"epochs": 7}}
    text = claims.page(cell(tmp_path / "two", settings=other, **given))
    assert "| 64.8 ± 0.4 | 64.90 ± 0.40 (3) | +0.10 | not comparable |" in text


def test_hard_labels_are_not_judged_by_numbers_of_soft_ones(tmp_path):
    text = claims.page(cell(tmp_path, mean=64.9, std=0.4, values=[64.5, 64.9, 65.3], label_regime="hard"))
    assert "| 64.90 ± 0.40 (3) | Imagenette" in text and "64.8" not in text and "1 not comparable." in text


def test_hard_labels_meet_no_number_of_soft_ones(tmp_path):
    text = claims.page(cell(tmp_path, scale="small", label_regime="hard"))
    assert "| 59.8" in text and "64.8" not in text
