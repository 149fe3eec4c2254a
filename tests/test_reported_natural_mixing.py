"""The printed numbers of the natural mixing paper, typed a second time, and what the paper says about them, recomputed.

Counting rule of its reported.csv: each accuracy and each gain of Tables I-III is one number (99).  Beside them count
the three accuracies drawn in Figure 1, and of the text every number that repeats no cell of a table: the ablation, the
robustness section and the fivefold claim (20 in all).  The protocol (IPC, eps) does not.
"""

from collections import Counter
from pathlib import Path
from statistics import mean

import pytest

from papers import report

ROOT = Path(report.__file__).parent
IPCS = (1, 10, 50)

# {table: {(dataset, method): "baseline>mixed" at IPC 1, 10 and 50}}
AGAIN = {
    "table1": {
        ("CIFAR-10", "DC"): "25.06>32.41 42.61>54.75 54.65>62.88",
        ("CIFAR-10", "DM"): "14.23>32.12 50.56>62.77 58.43>71.61",
        ("CIFAR-10", "DSA"): "13.55>31.98 43.79>63.08 53.32>71.10",
        ("CIFAR-10", "GLaD"): "28.60>42.80 50.50>60.20 61.00>72.20",
        ("CIFAR-10", "ATT"): "43.80>47.00 65.80>68.30 70.00>76.00",
    },
    "table2": {
        ("CIFAR-100", "DC"): "11.87>16.74 23.00>28.66 30.02>41.67",
        ("CIFAR-100", "DM"): "11.21>16.83 25.37>33.86 33.75>44.14",
        ("CIFAR-100", "DSA"): "11.77>17.09 23.12>29.48 31.43>42.33",
        ("CIFAR-100", "ATT"): "23.35>30.16 36.31>47.68 42.21>51.77",
    },
    "table3": {
        ("SVHN", "GLaD"): "35.80>54.10 72.40>81.40 76.80>85.10",
        ("ImageNet-A", "GLaD"): "34.20>57.00",
        ("ImageNette", "ATT"): "44.20>45.80 52.20>63.70",
    },
}
# {(method, metric, ipc): "baseline>mixed"} of the robustness section
ROBUSTNESS_AGAIN = {
    ("DC", "corruption accuracy", 10): "44.21>52.38",
    ("DSA", "corruption accuracy", 50): "50.15>61.29",
    ("DSA", "pgd-1 accuracy", 50): "29.5>41",
    ("DM", "fgsm-1 accuracy", 50): "31.32>39.57",
    ("DC", "attack-1 accuracy", 10): "31.48>32.43",
    ("DSA", "attack-8 accuracy", 50): ".57>.37",
}


def numbers_of(paper):
    """{(table, dataset, method, setting, arch, ipc, metric): value}"""
    rows = report.load_reported(ROOT / paper / "reported.csv")
    return {tuple(row[name] for name in report.KEY): row["value"] for row in rows}


NUMBERS = numbers_of("natural_mixing")
CELLS = sorted({(k[0], k[1], k[2], k[5]) for k in NUMBERS if k[0].startswith("table")})


def number(table, dataset, method, setting, ipc, metric="accuracy"):
    return NUMBERS[table, dataset, method, setting, "ConvNet", ipc, metric]


def pair(text):
    return tuple(float(value) for value in text.split(">"))


# Every number once, and twice the same


def test_every_number_of_the_paper_is_there_once():
    counts = Counter(key[0] for key in NUMBERS)
    assert counts == {"table1": 45, "table2": 36, "table3": 18, "figure1": 3, "text": 17}
    assert Counter(key[3] for key in NUMBERS if key[0].startswith("table")) == {"baseline": 33, "mixed": 33, "gain": 33}


def test_no_error_bar_is_printed():
    rows = report.load_reported(ROOT / "natural_mixing" / "reported.csv")
    assert {row["std"] for row in rows} == {None}


def test_tables_as_typed_again():
    again = {
        (table, dataset, method, ipc): pair(text)
        for table, rows in AGAIN.items()
        for (dataset, method), texts in rows.items()
        for ipc, text in zip(IPCS, texts.split(), strict=False)  # Table III stops earlier in two rows
    }
    ours = {cell: tuple(number(*cell[:3], s, cell[3]) for s in ("baseline", "mixed")) for cell in CELLS}
    assert ours == again and len(again) == 33


def test_robustness_as_typed_again():
    for (method, metric, ipc), text in ROBUSTNESS_AGAIN.items():
        values = tuple(number("text", "CIFAR-10", method, s, ipc, metric) for s in ("baseline", "mixed"))
        assert values == pair(text), (method, metric)
    assert number("text", "CIFAR-10", "All methods", "gain", None, "corruption gain") == 9.05


# Arithmetic


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: "-".join(map(str, cell)))
def test_gain_is_the_difference_in_points(cell):
    *place, ipc = cell
    gain = number(*place, "mixed", ipc) - number(*place, "baseline", ipc)
    assert number(*place, "gain", ipc, "gain") == pytest.approx(gain, abs=1e-6) and gain > 0


def test_figure_1_is_dc_at_ipc_50_and_not_ipc_1_as_drawn():
    drawn = [number("figure1", "CIFAR-10", "DC", setting, 50) for setting in ("baseline", "mixed")]
    holders = [cell for cell in CELLS if [number(*cell[:3], s, cell[3]) for s in ("baseline", "mixed")] == drawn]
    assert holders == [("table1", "CIFAR-10", "DC", 50)]
    assert NUMBERS["figure1", "CIFAR-10", "Full data", "", "ConvNet", None, "accuracy"] == 79.80 > max(drawn)


def test_largest_gain_on_the_imagenet_subsets_is_twice_the_one_announced():
    gains = {k[1:3]: v for k, v in NUMBERS.items() if k[6] == "gain" and k[1].startswith("ImageNet") and k[5] == 1}
    assert gains == {("ImageNet-A", "GLaD"): 22.8, ("ImageNette", "ATT"): 1.6}
    assert number("table3", "ImageNette", "ATT", "gain", 10, "gain") == 11.5  # "up to", says the abstract


def test_ten_mixed_images_match_fifty_plain_ones_in_six_of_ten_pairs():
    assert NUMBERS["text", "", "All methods", "mixed", "", 10, "times fewer images"] == 50 / 10
    pairs = [cell[:3] for cell in CELLS if cell[3] == 10 and (*cell[:3], 50) in CELLS]
    true = {place[1:] for place in pairs if number(*place, "mixed", 10) >= number(*place, "baseline", 50)}
    assert len(pairs) == 10
    assert true == {("CIFAR-10", "DC"), ("CIFAR-10", "DM"), ("CIFAR-10", "DSA"), ("CIFAR-100", "DM"),
                    ("CIFAR-100", "ATT"), ("SVHN", "GLaD")}  # fmt: skip


def test_baseline_of_the_ablation_is_no_cell_of_table_1():
    ablation = {s: number("text", "CIFAR-10", "Not named", s, 50) for s in ("baseline", "CIFAR-100 pool", "fractals")}
    assert ablation == {"baseline": 56.0, "CIFAR-100 pool": 35.2, "fractals": 53.5}
    baselines = [v for k, v in NUMBERS.items() if k[0] == "table1" and k[3] == "baseline"]
    assert min(abs(value - ablation["baseline"]) for value in baselines) == pytest.approx(1.35)  # DC at IPC 50


def test_dc_is_better_on_corrupted_than_on_clean_images():
    """By the letter of Table I; every other pair of the robustness section loses accuracy."""
    above = []
    for method, metric, ipc in ROBUSTNESS_AGAIN:
        for setting in ("baseline", "mixed"):
            value = number("text", "CIFAR-10", method, setting, ipc, metric)
            if value > number("table1", "CIFAR-10", method, setting, ipc):
                above.append((method, metric, setting))
    assert above == [("DC", "corruption accuracy", "baseline")]


def test_mean_corruption_gain_lies_between_the_two_that_are_printed():
    low, high = (
        number("text", "CIFAR-10", method, "mixed", ipc, "corruption accuracy")
        - number("text", "CIFAR-10", method, "baseline", ipc, "corruption accuracy")
        for method, ipc in (("DC", 10), ("DSA", 50))
    )
    assert (low, high) == (pytest.approx(8.17), pytest.approx(11.14)) and low < 9.05 < high


def test_share_of_clean_accuracy_that_survives_an_attack():
    def kept(method, metric, ipc):
        return [
            100 * number("text", "CIFAR-10", method, s, ipc, metric) / number("table1", "CIFAR-10", method, s, ipc)
            for s in ("baseline", "mixed")
        ]

    assert kept("DSA", "pgd-1 accuracy", 50) == pytest.approx([55.3, 57.7], abs=0.05)
    assert kept("DM", "fgsm-1 accuracy", 50) == pytest.approx([53.6, 55.3], abs=0.05)
    assert kept("DC", "attack-1 accuracy", 10) == pytest.approx([73.9, 59.2], abs=0.05)


# Against the numbers of the methods' own papers


def test_baselines_are_below_what_the_authors_of_the_methods_print():
    printed = numbers_of("matching")
    rows = []
    for cell in CELLS:
        own = printed.get(("table1", *cell[1:3], "", "ConvNet", cell[3], "accuracy"))
        if own is not None:
            rows.append((cell, number(*cell[:3], "baseline", cell[3]) - own, number(*cell[:3], "mixed", cell[3]) - own))
    assert len(rows) == 23
    assert [c[1:] for c, base, _ in rows if base > 0] == [("CIFAR-10", "DC", 50), ("CIFAR-10", "DM", 10)]
    assert {c[1:] for c, _, mixed in rows if mixed < 0} == {
        ("CIFAR-10", "ATT", 1), ("CIFAR-100", "DSA", 10), ("CIFAR-100", "DSA", 50)
    }  # fmt: skip
    assert mean(mixed - base for _, base, mixed in rows) == pytest.approx(9.72, abs=0.005)
    assert mean(mixed for _, _, mixed in rows) == pytest.approx(4.46, abs=0.005)
