"""The printed numbers of the Hard Truths supplement, typed a second time, and what it says about them, recomputed.

Counting rule of its reported.csv: each accuracy and each gain of Tables 3-11 is one number (123), its error bar none;
Tables 1 and 2 are recipes.  Of text and captions count results, and sizes of analyses that no table holds (34): the
fitted b and half-lives per subset, correlations, losses, margins, parameters, iterations.  A number that text and
caption share counts once.
"""

from collections import Counter
from pathlib import Path

import pytest

from papers import report

ROWS = report.load_reported(Path(report.__file__).parent / "hard_truths" / "reported.csv")
NUMBERS = {tuple(row[name] for name in report.KEY): (row["value"], row["std"]) for row in ROWS}

# rows: method; columns: HL at IPC 10 and 50, SL at IPC 10 and 50
LABELS = [("HL", 10), ("HL", 50), ("SL", 10), ("SL", 50)]
TABLE3 = {
    "Random": "18.64+.25 34.66+.41 33.43+.18 45.39+.23",
    "K-centers": "25.04+.30 38.64+.43 34.70+.27 46.24+.12",
    "DM": "29.23+.26 42.32+.37 26.13+.10 43.46+.18",
    "DC": "28.42+.29 30.56+.56 23.54+.31 33.46+.38",
    "TM": "38.18+.42 46.32+.26 37.60+.25 46.26+.30",
}
TABLE4 = {"DM": "12.44 23.59 15.69 33.51", "DC": "11.86 14.10 12.39 21.35", "TM": "15.62 30.29 23.64 36.36",
          "Random": "10.39 21.86 20.36 35.88", "K-centers": "14.41 24.86 22.99 37.03"}  # fmt: skip
TABLE5 = {"DM": "2.96 6.71 5.03 19.64", "DC": "3.60 4.41 2.49 3.48", "TM": "5.50 10.26 10.27 20.32",
          "DATM": "5.22 10.12 8.93 23.83", "Random": "2.49 6.17 9.28 22.91",
          "K-centers": "3.91 7.80 10.51 23.53"}  # fmt: skip
# hard labels from here on; columns: IPC
TABLE6 = {"SRe2L": "9.79", "D4M": "21.56", "FAD-RM": "21.21", "RDED": "38.49", "CA2D": "41.56"}  # 50
TABLE7 = {"Dyn-Unc": "12.15+.22 33.03+.02 42.01+.10", "DUAL": "15.65+.17 38.28+.09 46.22+.10",
          "CAD-Prune": "12.57+.03 40.21+.15 47.40+.20", "CA2D": "15.25+.24 41.72+.40 46.32+.10"}  # fmt: skip
TABLE8 = {"CA2D": "20.95+.15 34.37+.11", "CAD-Prune": "22.95+.03 37.87+.16", "TM": "38.18+.42 46.32+.26",
          "K-centers": "25.04+.30 38.64+.43", "Random": "18.64+.25 34.66+.41"}  # fmt: skip
TABLE9 = {"Random": "32.70 31.97 45.20 47.01", "EL2N-Best": "40.12 41.18 51.24 52.11",
          "CAD-Prune": "40.37 41.34 52.00 49.94", "RDED": "37.64 36.60 47.71 49.11",
          "CA2D": "38.15 42.16 50.41 52.47"}  # fmt: skip
TABLE10 = {"CAD-Prune": "57.07+.04 65.46+.19", "EL2N-Best": "56.74+.03 64.07+.04"}  # 200, 500
TABLE11 = {"EL2N-Best": "38.44+.30 47.76+.43", "Early of full-training": "30.95+.35 39.94+.25",
           "Compute-aware": "40.21+.15 47.40+.20"}  # fmt: skip

# {metric: {place: value}}; the first word of a place is where the number stands
BIG, SWEEP = "text ImageNet-1K", "text ImageNet-1K SRe2L and DWA"
TEXT = {
    "b": {f"{BIG} Random HL ResNet-18 100": -0.1859, f"{BIG} EL2N-Easy HL ResNet-18 100": -0.1558,
          f"{BIG} Random SL+KD ResNet-18 100": 0.05, f"{BIG} EL2N-Easy SL+KD ResNet-18 100": 0.05},
    "tau": {f"{BIG} Random HL ResNet-18 100": 5.2632, f"{BIG} EL2N-Easy HL ResNet-18 100": 1.9474,
            f"{BIG} Random SL+KD ResNet-18 100": 2.8947, f"{BIG} EL2N-Easy SL+KD ResNet-18 100": 2.8947},
    "gain": {"text CIFAR-100 TM HL ConvNet 50": 8, "text CIFAR-100 TM HL ConvNet 10": 13,
             "text TinyImageNet DATM synthesis, least 50": 2, "text TinyImageNet DATM synthesis, most 50": 3},
    "parameters": {"text Average transfer MLP": 411e3, "text Average transfer ResNet-18": 11e6,
                   "text Average transfer ResNet-152": 60e6},
    "DCS": {"figure3a ImageNet-1K DM ID ResNet-18": 0.41, "figure3b ImageNet-1K SRe2L ID ResNet-18": -0.12,
            "figure3b Mini-ImageNet-C SRe2L OOD ResNet-18": -0.12},
    "TM loss": {"text TinyImageNet TM ResNet-18": 0.805, "figure4a TinyImageNet TM ResNet-18": 0.806},
    "start epoch": {"figure4a TinyImageNet DC dip, first ConvNet": 27,
                    "figure4a TinyImageNet DC dip, last ConvNet": 28},
    "iterations": {"text TinyImageNet DATM synthesis 50": 10e3, "text TinyImageNet DATM longer synthesis 50": 50e3},
    "times longer": {"text TinyImageNet DATM longer synthesis 50": 5},
    "N": {"text TinyImageNet DATM synthesis 50": 20},
    "M": {"text TinyImageNet DATM synthesis 50": 2},
    "subsets": {f"{SWEEP} ResNet-18": 158},
    "IPC values": {f"{SWEEP} ResNet-18": 7},
    "images per class": {f"{SWEEP} smallest ResNet-18": 10, f"{SWEEP} largest ResNet-18": 700},
    "accuracy": {"text Mini-ImageNet-C SRe2L OOD ResNet-18 50": 3.56,
                 "text Mini-ImageNet-C Random OOD ResNet-18 50": 11.72},
    "times slower": {"text RDED and CA2D HL": 2},
}  # fmt: skip


def hard(arch, *ipcs):
    return [("HL", arch, ipc) for ipc in ipcs]


def typed_again():
    """{key without metric: (value, std)} of the accuracies in Tables 3-11"""
    big, pair = "ResNet-18", [("HL", a, i) for i in (50, 100) for a in ("ResNet-50", "ResNet-101")]
    layout = [
        ("table3", "CIFAR-100", TABLE3, [(s, "ConvNet", i) for s, i in LABELS]),
        ("table4", "CIFAR-100", TABLE4, [(s, "average transfer", i) for s, i in LABELS]),
        ("table5", "TinyImageNet", TABLE5, [(s, "average transfer", i) for s, i in LABELS]),
        ("table6", "ImageNet-1K", TABLE6, hard(big, 50)),
        ("table7", "ImageNet-1K", TABLE7, hard(big, 10, 50, 100)),
        ("table8", "CIFAR-100", TABLE8, hard("ConvNet", 10, 50)),
        ("table9", "ImageNet-1K", TABLE9, pair),
        ("table10", "ImageNet-1K", TABLE10, hard(big, 200, 500)),
        ("table11", "ImageNet-1K", TABLE11, hard(big, 50, 100)),
    ]  # fmt: skip
    again = {}
    for table, dataset, methods, columns in layout:
        for method, texts in methods.items():
            for column, text in zip(columns, texts.split(), strict=True):
                value, _, std = text.partition("+")
                again[(table, dataset, method, *column)] = (float(value), float(std) if std else None)
    return again


def value(table, dataset, method, setting, arch, ipc, metric="accuracy"):
    return NUMBERS[table, dataset, method, setting, arch, ipc, metric][0]


def table3(method, setting, ipc):
    return value("table3", "CIFAR-100", method, setting, "ConvNet", ipc)


def imagenet(table, method, ipc, arch="ResNet-18"):
    return value(table, "ImageNet-1K", method, "HL", arch, ipc)


def text(dataset, method, setting, arch, ipc, metric):
    return value("text", dataset, method, setting, arch, ipc, metric)


# Every number once, and twice the same


def test_every_number_of_the_supplement_is_there_once():
    counts = Counter(key[0] for key in NUMBERS)
    tables = {"table3": 20, "table4": 20, "table5": 24, "table6": 5, "table7": 12, "table8": 10, "table9": 20,
              "table10": 4, "table11": 8}  # fmt: skip
    assert counts == tables | {"text": 28, "figure3a": 1, "figure3b": 2, "figure4a": 3}
    assert sum(tables.values()) == 123


def test_tables_as_typed_again():
    ours = {k[:6]: number for k, number in NUMBERS.items() if k[0].startswith("table") and k[6] == "accuracy"}
    again = typed_again()
    assert ours == again and len(again) == 121  # the other two are gains of Table 11


def test_text_and_captions_as_typed_again():
    ours: dict[str, dict[str, float]] = {}
    for (*place, metric), (number, std) in NUMBERS.items():
        if not place[0].startswith("table"):
            ours.setdefault(metric, {})[" ".join(str(name) for name in place if name)] = number
            assert std is None
    assert ours == TEXT and sum(map(len, ours.values())) == 34


# Tables against each other


def test_table_8_repeats_table_3():
    for method in ("Random", "K-centers", "TM"):
        for ipc in (10, 50):
            first, again = (
                NUMBERS[table, "CIFAR-100", method, "HL", "ConvNet", ipc, "accuracy"] for table in ("table3", "table8")
            )
            assert first == again, (method, ipc)


def test_table_11_repeats_cad_prune_of_table_7_and_table_6_has_another_ca2d():
    for ipc in (50, 100):
        first, again = (
            NUMBERS[table, "ImageNet-1K", method, "HL", "ResNet-18", ipc, "accuracy"]
            for table, method in (("table7", "CAD-Prune"), ("table11", "Compute-aware"))
        )
        assert first == again
    assert imagenet("table7", "CA2D", 50) - imagenet("table6", "CA2D", 50) == pytest.approx(0.16)


def test_gains_of_table_11_are_differences_in_points():
    for ipc, exact in ((50, 9.26), (100, 7.46)):
        gain = imagenet("table11", "Compute-aware", ipc) - imagenet("table11", "Early of full-training", ipc)
        printed = NUMBERS["table11", "ImageNet-1K", "Compute-aware", "HL", "ResNet-18", ipc, "gain"]
        assert gain == pytest.approx(exact) and printed == (round(exact, 1), None)


def test_margins_of_the_text():
    for ipc, hard_gain, soft_gain in ((10, 13.14, 2.90), (50, 7.68, 0.02)):
        assert table3("TM", "HL", ipc) - table3("K-centers", "HL", ipc) == pytest.approx(hard_gain)
        assert table3("TM", "SL", ipc) - table3("K-centers", "SL", ipc) == pytest.approx(soft_gain)
        assert text("CIFAR-100", "TM", "HL", "ConvNet", ipc, "gain") == round(hard_gain)


# Claims


@pytest.mark.parametrize(
    ("ipc", "spread", "without_dc"),
    [(10, (19.54, 14.06), (19.54, 11.47)), (50, (15.76, 12.80), (11.66, 2.80))],
)
def test_the_spread_between_sets_closes_only_at_ipc_50_and_without_dc(ipc, spread, without_dc):
    def spreads(methods):
        columns = [[table3(m, setting, ipc) for m in methods] for setting in ("HL", "SL")]
        return tuple(max(column) - min(column) for column in columns)

    assert spreads(TABLE3) == pytest.approx(spread)
    assert spreads(TABLE3.keys() - {"DC"}) == pytest.approx(without_dc)


def test_soft_labels_make_distilled_images_worse_at_ipc_10_and_leave_dm_and_dc_behind_random_ones():
    worse = {(m, i) for m in ("DM", "DC", "TM") for i in (10, 50) if table3(m, "SL", i) < table3(m, "HL", i)}
    assert worse == {("DM", 10), ("DC", 10), ("TM", 10), ("TM", 50)}
    for ipc in (10, 50):
        behind = {m for m in ("DM", "DC", "TM") if table3(m, "SL", ipc) < table3("Random", "SL", ipc)}
        assert behind == {"DM", "DC"}
    transfer = [key for key in NUMBERS if key[0] in ("table4", "table5") and key[3] == "SL"]
    worse = Counter(key[:3] for key in transfer if NUMBERS[key] < NUMBERS[(*key[:3], "HL", *key[4:])])
    assert worse == {("table5", "TinyImageNet", "DC"): 2}


def test_proposed_methods_are_not_always_ahead():
    best = {i: max((imagenet("table7", m, i), m) for m in TABLE7)[1] for i in (10, 50, 100)}
    assert best == {10: "DUAL", 50: "CA2D", 100: "CAD-Prune"}
    assert imagenet("table11", "EL2N-Best", 100) > imagenet("table11", "Compute-aware", 100)
    small = {i: value("table8", "CIFAR-100", "CA2D", "HL", "ConvNet", i) - table3("Random", "HL", i) for i in (10, 50)}
    assert small == {10: pytest.approx(2.31), 50: pytest.approx(-0.29)}
    for ipc in (10, 50):
        assert value("table8", "CIFAR-100", "CAD-Prune", "HL", "ConvNet", ipc) < table3("K-centers", "HL", ipc)


def test_table_9():
    def cell(method, ipc, arch):
        return imagenet("table9", method, ipc, f"ResNet-{arch}")

    places = [(ipc, arch) for ipc in (50, 100) for arch in (50, 101)]
    assert all(cell("CA2D", *place) > cell("RDED", *place) for place in places)
    behind = {p: cell("CAD-Prune", *p) - cell("EL2N-Best", *p) for p in places}
    assert {p: round(d, 2) for p, d in behind.items()} == {(50, 50): 0.25, (50, 101): 0.16, (100, 50): 0.76,
                                                            (100, 101): -2.17}  # fmt: skip
    larger_is_worse = {(m, ipc) for m in TABLE9 for ipc in (50, 100) if cell(m, ipc, 101) < cell(m, ipc, 50)}
    assert larger_is_worse == {("Random", 50), ("RDED", 50), ("CAD-Prune", 100)}
    assert cell("CA2D", 50, 50) < imagenet("table7", "CA2D", 50) < cell("CA2D", 50, 101)  # ResNet-18 in the middle


def test_printed_deltas_and_b_are_points_of_two_grids():
    """Twenty values from 1 to 10 and two hundred from -1 to 0: delta of Eq. 8 cannot exceed 1, a half-life can."""
    taus = {k[2:4]: v for k, (v, _) in NUMBERS.items() if k[6] == "tau"}
    grid = [round(1 + 9 * index / 19, 4) for index in range(20)]
    assert [grid.index(taus[k]) for k in (("Random", "SL+KD"), ("Random", "HL"), ("EL2N-Easy", "HL"))] == [4, 9, 2]
    assert [round(0.5 ** (1 / tau), 4) for tau in (2.8947, 5.2632, 1.9474)] == [0.7871, 0.8766, 0.7005]
    fits = [(-0.1859, 37), (-0.1558, 31)]
    assert [round(-index / 199, 4) for _, index in fits] == [b for b, _ in fits]
    assert round(-10 / 199, 2) == -text("ImageNet-1K", "Random", "SL+KD", "ResNet-18", 100, "b")


def test_parameters_of_the_mlp_are_those_for_ten_classes_at_32_px():
    def mlp(pixels, classes, width=128):
        return (3 * pixels + 1) * width + (width + 1) * width + (width + 1) * classes

    printed = text("", "Average transfer", "", "MLP", None, "parameters")
    assert round(mlp(32**2, 10), -3) == printed == 411_000
    assert (mlp(32**2, 100), mlp(64**2, 200)) == (422_756, 1_615_304)  # CIFAR-100, TinyImageNet: those of the tables


def test_longer_synthesis_is_five_times_the_first():
    first, longer = (text("TinyImageNet", "DATM", s, "", 50, "iterations") for s in ("synthesis", "longer synthesis"))
    assert longer / first == text("TinyImageNet", "DATM", "longer synthesis", "", 50, "times longer")
