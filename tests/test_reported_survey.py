"""The printed numbers of the survey, typed a second time, and held against its text and the tables of other papers.

Counting rule of its reported.csv: each accuracy of Tables 2 and 3 is one number (493 and 8), without an error bar;
Table 1 gives two years and four ticks a survey (24).  Shadows of a neighbouring row are not numbers.
"""

import csv
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from papers import report

ROOT = Path(report.__file__).parent
HERE = ROOT / "survey"
ROWS = report.load_reported(HERE / "reported.csv")
ACCURACIES = {(row["dataset"], row["method"], row["ipc"]): row for row in ROWS if row["metric"] == "accuracy"}
IPCS = {"CIFAR-10": (1, 10, 50, 100), "CIFAR-100": (1, 10, 50, 100), "Tiny ImageNet": (1, 10, 50, 100),
        "ImageNet-1K": (1, 10, 50, 100, 200), "ImageNet-21K": (1, 10, 20, 50)}  # fmt: skip

# Typed from the page, not from reported.csv: one cell a column of the table, "-" where it has a dash.
SECOND = """
CIFAR-10      | RaT-BPTT           | 53.2 69.4 75.3 -
CIFAR-10      | DSA                | 28.8 52.1 60.6 -
CIFAR-10      | CAFE               | 30.3 46.3 55.5 -
CIFAR-10      | M3D                | 45.3 63.5 69.9 -
CIFAR-10      | LQM                | 45.9 60.9 70.2 -
CIFAR-10      | Deng et al. [37]   | 47.1 59.9 69.0 -
CIFAR-10      | EDC                | 32.6 79.1 87.0 -
CIFAR-10      | Zhong et al. [81]  | - 36.4 61.0 -
CIFAR-10      | AutoPalette        | 58.6 74.3 79.4 -
CIFAR-10      | RFAD               | 64.4 74.3 77.0 -
CIFAR-100     | MTT                | 24.3 40.1 47.7 -
CIFAR-100     | CAFE               | 12.9 27.8 37.9 -
CIFAR-100     | M3D                | 26.2 42.4 50.9 -
CIFAR-100     | LQM                | 27.2 47.7 52.4 -
CIFAR-100     | G-VBSM             | 25.9 59.5 65.0 -
CIFAR-100     | SelMatch           | - - 54.5 62.4
CIFAR-100     | INFER              | - 50.2 65.1 68.6
CIFAR-100     | GIFT               | - 49.5 57.0 -
CIFAR-100     | IADD               | 25.2 42.7 49.0 -
Tiny ImageNet | Teddy              | - - 45.2 52.0
Tiny ImageNet | MTT                | 8.8 23.2 28.0 33.7
Tiny ImageNet | LQM                | 10.4 20.8 24.3 -
Tiny ImageNet | WMDD               | 7.6 41.8 59.4 61.0
Tiny ImageNet | SRe2L              | 2.62 16.1 41.1 49.7
Tiny ImageNet | Xiao et al. [83]   | - - 48.8 53.6
Tiny ImageNet | APM                | - 30.0 38.2 39.6
Tiny ImageNet | DWA                | - - 52.8 56.0
ImageNet-1K   | DM                 | 1.3 5.7 11.4 - -
ImageNet-1K   | WMDD               | 3.2 38.2 57.6 60.7 -
ImageNet-1K   | CMI                | - 24.2 49.1 54.6 -
ImageNet-1K   | D4M                | - 34.2 63.4 66.5 68.1
ImageNet-1K   | FocusDD            | 8.8 45.3 61.7 62.0 -
ImageNet-1K   | Zhong et al. [81]  | - 42.1 59.4 61.8 -
ImageNet-1K   | GIFT               | - 21.7 39.5 42.5 -
ImageNet-1K   | Xiao et al. [83]   | - 34.6 55.4 59.4 62.6
ImageNet-1K   | CUDD               | - 39.0 57.4 61.3 65.0
ImageNet-1K   | LADD               | - 28.8 - - -
ImageNet-21K  | SRe2L              | - 18.5 21.8 -
ImageNet-21K  | CUDD               | - 28.0 34.9 -
"""

# Accuracies that sections 4 and 5 of the text repeat.
TEXT = {
    "CIFAR-10": {("DC", 1): 28.3, ("AutoPalette", 1): 58.6, ("D3M", 1): 35.9, ("D3M", 10): 58.6, ("DANCE", 1): 47.1,
                 ("DANCE", 10): 70.8, ("DATM", 1): 46.9, ("DATM", 10): 66.8, ("RDED", 1): 22.9, ("FreD", 1): 60.6,
                 ("NSD", 1): 68.5, ("EDC", 50): 87.0},
    "CIFAR-100": {("DC", 1): 12.8, ("AutoPalette", 1): 38.0, ("INFER", 10): 50.2, ("INFER", 50): 65.1,
                  ("PAD", 50): 55.9, ("PAD", 100): 58.5, ("DATM", 1): 27.9, ("RDED", 1): 11.0, ("FreD", 1): 34.6,
                  ("NSD", 1): 36.5},
    "Tiny ImageNet": {("DATM", 10): 31.1},
    "ImageNet-1K": {("D4M", 100): 66.5, ("D4M", 200): 68.1, ("DWA", 50): 55.2, ("CUDD", 200): 65.0},
    "ImageNet-21K": {("CUDD", 20): 34.9, ("CDA", 20): 26.4, ("EDC", 10): 26.8, ("RDED", 10): 25.6},
}  # fmt: skip

DOUBTFUL = {
    ("CIFAR-100", "LQM", 1), ("CIFAR-100", "LQM", 10), ("Tiny ImageNet", "LQM", 1), ("Tiny ImageNet", "LQM", 10),
    ("Tiny ImageNet", "GIFT", 10), ("Tiny ImageNet", "Xiao et al. [83]", 50), ("CIFAR-100", "AutoPalette", 50),
    ("Tiny ImageNet", "DREAM", 10), ("ImageNet-1K", "DREAM+", 10),
}  # fmt: skip
SET_RIGHT = {"LQM": 5, "WMDD": 8, "Deng et al. [37]": 1, "GIFT": 5, "Xiao et al. [83]": 3, "AutoPalette": 4}
OTHER_SOURCE = {("ImageNet-1K", "DM", 1), ("CIFAR-10", "IDM", 10), ("CIFAR-10", "DiM", 50), ("ImageNet-1K", "SRe2L", 1),
                ("ImageNet-1K", "SRe2L", 200)}  # fmt: skip
FALLING: set[tuple] = set()  # (dataset, method) whose accuracy does not grow with IPC: none


def methods_file():
    with open(HERE / "methods.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def value(dataset, method, ipc):
    return ACCURACIES[dataset, method, ipc]["value"]


# Every number once


def test_every_number_of_the_tables_is_there_once():
    assert Counter(row["table"] for row in ROWS) == {"table1": 24, "table2": 493, "table3": 8}
    assert len(ACCURACIES) == 493 + 8  # a method has one number a data set and IPC, whatever its family
    assert all(row["std"] is None for row in ROWS)


def test_numbers_a_column():
    counts = Counter((dataset, ipc) for dataset, _, ipc in ACCURACIES)
    columns = {"CIFAR-10": (43, 51, 52, 0), "CIFAR-100": (41, 51, 47, 5), "Tiny ImageNet": (29, 35, 37, 11),
               "ImageNet-1K": (12, 30, 27, 16, 6), "ImageNet-21K": (0, 5, 3, 0)}  # fmt: skip
    assert counts == {(d, i): n for d, row in columns.items() for i, n in zip(IPCS[d], row, strict=True) if n}


def test_methods_a_family():
    families = {(row["method"], row["setting"]) for row in ACCURACIES.values()}
    assert Counter(family for _, family in families) == {
        "meta": 3, "gradient": 2, "trajectory": 7, "distribution": 10, "latent": 1, "frequency": 1, "plug-and-play": 4,
        "generative": 6, "decoupled": 11, "selective": 10, "lossless": 1, "diversity": 4, "augmentation": 2,
    }  # fmt: skip
    assert len(families) == len({method for method, _ in families})


def test_table_1_compares_four_surveys():
    cells = {(row["method"], row["metric"]): row["value"] for row in ROWS if row["table"] == "table1"}
    earlier = ("Geng et al. [8]", "Lei et al. [9]", "Yu et al. [10]")
    assert {cells[name, "first year"] for name in earlier} == {2019} and cells["Liu and Du", "first year"] == 2023
    assert {cells[name, "last year"] for name in earlier} == {2023} and cells["Liu and Du", "last year"] == 2025
    ticks = {key for key, number in cells.items() if number == 1}
    topics = ("large-scale", "large IPC", "beyond classification", "SSL, DA, non-IID")
    assert ticks == {("Liu and Du", topic) for topic in topics} | {(n, topics[2]) for n in (earlier[0], earlier[2])}


# Second readings


@pytest.mark.parametrize("line", SECOND.strip().splitlines())
def test_second_transcription(line):
    dataset, method, numbers = (part.strip() for part in line.split("|"))
    expected = {ipc: float(n) for ipc, n in zip(IPCS[dataset], numbers.split(), strict=True) if n != "-"}
    assert expected == {i: row["value"] for (d, m, i), row in ACCURACIES.items() if (d, m) == (dataset, method)}


def test_second_transcription_is_large_enough():
    numbers = Counter()
    for line in SECOND.strip().splitlines():
        dataset, _, cells = (part.strip() for part in line.split("|"))
        numbers[dataset] += sum(cell != "-" for cell in cells.split())
    assert numbers.total() >= 100 and all(numbers[dataset] >= 20 for dataset in list(IPCS)[:4]), numbers


def test_the_text_repeats_the_tables():
    for dataset, numbers in TEXT.items():
        for (method, ipc), number in numbers.items():
            assert value(dataset, method, ipc) == number, (dataset, method, ipc)


def test_numbers_that_other_papers_print_too():
    """Same method, data set and IPC in the tables of the other papers; with a network in print, the same network."""
    names = {"SCDD": "SC-DD"}
    shared, differ = 0, {}
    for paper in ("matching", "nrr_dd", "wmdd"):
        for row in report.load_reported(ROOT / paper / "reported.csv"):
            key = row["dataset"], names.get(row["method"], row["method"]), row["ipc"]
            ours = ACCURACIES.get(key)
            if row["table"] != "table1" or row["metric"] != "accuracy" or ours is None:
                continue
            if ours["arch"] in ("", row["arch"]):
                shared += 1
                differ |= {(paper, *key): row["value"]} if abs(row["value"] - ours["value"]) > 0.15 else {}
    assert shared > 100
    assert differ == {("wmdd", "ImageNet-1K", "DM", 1): 1.5, ("nrr_dd", "CIFAR-10", "IDM", 10): 65.3,
                      ("nrr_dd", "ImageNet-1K", "SRe2L", 1): 0.1}  # fmt: skip
    for key, number in differ.items():  # a difference is said in the note, with the other number
        assert str(number) in ACCURACIES[key[1:]]["note"]


# Damage


def test_accuracy_grows_with_ipc():
    curves = defaultdict(list)
    for dataset, method, ipc in sorted(ACCURACIES, key=lambda key: key[2]):
        curves[dataset, method].append(value(dataset, method, ipc))
    assert {key for key, curve in curves.items() if curve != sorted(set(curve))} == FALLING


def test_doubtful_cells_are_exactly_those_listed():
    assert {key for key, row in ACCURACIES.items() if row["note"].startswith("doubtful: ")} == DOUBTFUL
    text = (HERE / "quirks.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert f"({len(DOUBTFUL)} of 493)" in text and f"({sum(SET_RIGHT.values())})" in text
    assert all(f"{value(*key)}" in text and key[1].split(" [")[0] in text for key in DOUBTFUL)


def test_notes_say_what_was_set_right_and_what_other_sources_print():
    notes = {key: row["note"] for key, row in ACCURACIES.items() if row["note"] and key not in DOUBTFUL}
    assert Counter(key[1] for key, note in notes.items() if note.startswith("set right: ")) == SET_RIGHT
    assert {key for key, note in notes.items() if not note.startswith("set right: ")} == OTHER_SOURCE


def test_shadows_of_neighbouring_rows_are_left_out():
    sets = defaultdict(set)
    for dataset, method, _ in ACCURACIES:
        sets[method].add(dataset)
    cifar, tiny, large = {"CIFAR-10", "CIFAR-100"}, {"Tiny ImageNet"}, {"ImageNet-1K"}
    expected = {"CAFE": cifar, "M3D": cifar, "LQM": cifar | tiny, "WMDD": tiny | large, "FocusDD": large,
                "Xiao et al. [83]": tiny | large, "GIFT": {"CIFAR-100"} | tiny | large, "AutoPalette": cifar,
                "IADD": cifar | tiny}  # fmt: skip
    assert {method: sets[method] for method in expected} == expected
    assert ("ImageNet-1K", "Zhong et al. [81]", 1) not in ACCURACIES


# Rows that do not share a protocol


def test_numbers_on_imagenet_1k_above_full_data():
    """WMDD prints 63.1 for a ResNet-18 on all of ImageNet-1K; distilled sets above it speak of other recipes."""
    above = {key[1:] for key, row in ACCURACIES.items() if key[0] == "ImageNet-1K" and row["value"] > 63.1}
    assert above == {("D4M", 50), ("D4M", 100), *((m, 200) for m in ("D4M", "SRe2L", "CDA", "SC-DD", "CUDD"))}


def test_gift_stands_near_the_convnet_of_rded_though_labelled_resnet_18():
    printed = {(row["dataset"], row["arch"], row["ipc"]): row["value"]
               for row in report.load_reported(ROOT / "nrr_dd" / "reported.csv")
               if (row["table"], row["method"]) == ("table1", "RDED")}  # fmt: skip
    for dataset, ipc in (("CIFAR-100", 50), ("Tiny ImageNet", 50), ("ImageNet-1K", 10), ("ImageNet-1K", 50)):
        gift = ACCURACIES[dataset, "GIFT", ipc]
        assert gift["arch"] == "ResNet-18"
        assert abs(gift["value"] - printed[dataset, "ConvNet", ipc]) < 1.5
        assert gift["value"] < printed[dataset, "ResNet-18", ipc] - 5


def test_autopalette_is_not_the_best_at_one_image_a_class():
    def ahead(dataset):
        its = value(dataset, "AutoPalette", 1)
        return {m for (d, m, i), row in ACCURACIES.items() if (d, i) == (dataset, 1) and row["value"] > its}

    assert ahead("CIFAR-10") == {"FreD", "NSD", "RFAD"} and ahead("CIFAR-100") == {"EDC", "RFAD"}


def test_gradient_matching_has_no_number_on_imagenet_1k():
    large = {row["setting"] for (dataset, _, _), row in ACCURACIES.items() if dataset == "ImageNet-1K"}
    assert "gradient" not in large and "distribution" in large
    assert value("Tiny ImageNet", "DC", 50) < value("Tiny ImageNet", "DM", 50) < value("Tiny ImageNet", "DSA", 50)


def test_rows_without_a_network_that_are_no_convnet():
    """43.6 is a ConvNet on all of ImageNet-1K (the teacher that the repository of GIFT publishes)."""
    above = {key[1] for key, row in ACCURACIES.items() if key[0] == "ImageNet-1K" and row["value"] > 43.6}
    unnamed = {row["method"] for row in ACCURACIES.values() if row["arch"] == ""}
    assert above & unnamed == {"Teddy", "WMDD", "CMI", "Gu et al. [59]", "D4M", "CDA"}


# The methods


def test_methods_file_holds_the_methods_of_the_tables():
    table = {(row["method"], row["setting"], row["arch"]) for row in ACCURACIES.values()}
    listed = methods_file()
    assert {(row["method"], row["family"], row["arch"]) for row in listed} == table
    assert len(listed) == len(table) == 62
    assert listed == sorted(listed, key=lambda row: (row["family"], int(row["year"]), int(row["reference"])))


def test_reference_numbers_and_years():
    listed = methods_file()
    assert len({row["reference"] for row in listed}) == len(listed)
    assert all(4 <= int(row["reference"]) <= 106 and row["venue"] for row in listed)
    for row in listed:
        number = row["method"].partition(" [")[2].rstrip("]")
        assert number in ("", row["reference"])
    years = {row["method"]: (int(row["year"]), int(row["cited_year"])) for row in listed}
    assert years["DD"] == (2018, 2018) and years["MTT"] == (2022, 2022) and years["FocusDD"] == (2025, 2025)
    differ = {name: pair for name, pair in years.items() if pair[0] != pair[1]}
    assert differ == {"SeqMatch": (2024, 2023), "CMI": (2023, 2024), "LADD": (2023, 2024)}
