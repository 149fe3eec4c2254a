"""What the README says in words of our results is what the result files say: every number of that section."""

import json
import re
from pathlib import Path

import pytest

from papers.report import load_reported

ROOT = Path(__file__).resolve().parent.parent
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## What came out")[1].split("<!-- results")[0]
SUBSETS = ("random", "k-centers-k-means", "k-centers-farthest-points", "el2n-hardest", "el2n-easiest", "cad-prune")


def ours(paper: str, cell: str, scale: str = "small") -> float:
    file = ROOT / "tables" / paper / scale / "cells" / f"{cell.replace('/', '_')}.json"
    return json.loads(file.read_text(encoding="utf-8"))["mean"]


def printed(paper: str, method: str, ipc: int, **fields: str) -> float:
    wanted = {"table": "table1", "method": method, "ipc": ipc, "metric": "accuracy", **fields}
    (found,) = (r for r in load_reported(ROOT / "papers" / paper / "reported.csv") if wanted.items() <= r.items())
    return found["value"]


def wmdd(method: str, ipc: int) -> float:
    """Over random images, on Imagenette by the recipe of WMDD."""
    of = [ours("wmdd", f"table1/imagenette/{name}/resnet-18/{ipc}/soft") for name in (method, "random")]
    return of[0] - of[1]


def rded(method: str, ipc: int) -> float:
    return ours("nrr_dd", f"table1/imagenette/{method}/resnet-18/{ipc}/soft")


def as_published(method: str, ipc: int) -> float:
    return ours("nrr_dd", f"table1/cifar-10/{method}/convnet/{ipc}/soft", "paper")


def as_printed(method: str, ipc: int) -> float:
    return printed("nrr_dd", method, ipc, dataset="CIFAR-10", arch="ConvNet")


def long(name: str) -> float:
    return ours("nrr_dd", f"table4/cifar-10/{name}/four-an-image-3-000-epochs/convnet/1/soft")


def short(method: str, ipc: int) -> float:
    """What print has over ours."""
    return printed("matching", method, ipc, dataset="CIFAR-10") - ours(
        "matching", f"table1/cifar-10/{method.lower()}/convnet/{ipc}/own"
    )


def gain(method: str, ipc: int) -> float:
    return ours("natural_mixing", f"table1/cifar-10/{method}/gain/convnet/{ipc}/own/gain")


def printed_gain(method: str, ipc: int) -> float:
    return printed("natural_mixing", method, ipc, dataset="CIFAR-10", setting="gain", metric="gain")


def regime(method: str, labels: str, ipc: int) -> float:
    return ours("hard_truths", f"regimes/cifar-100/{method}/{labels}/convnet/{ipc}/own")


def spread(labels: str, ipc: int) -> float:
    """Between those of the subsets of real images that were run."""
    folder = ROOT / "tables" / "hard_truths" / "small" / "cells"
    there = [m for m in SUBSETS if (folder / f"regimes_cifar-100_{m}_{labels}_convnet_{ipc}_own.json").is_file()]
    found = [regime(method, labels, ipc) for method in there]
    assert len(found) >= 5
    return max(found) - min(found)


SETS = ("dm", "dsa", "dc")
SAID = {  # words with a number in each (), and where the numbers come from
    r"DSA has (\S+) at IPC 1 \(print: (\S+)\)": [
        lambda: ours("matching", "table1/cifar-10/dsa/convnet/1/own", "paper"),
        lambda: printed("matching", "DSA", 1, dataset="CIFAR-10"),
    ],
    r"RDED has (\S+) and (\S+) at IPC 1 and 10": [lambda i=i: as_published("rded", i) for i in (1, 10)],
    r"NRR-DD (\S+) and (\S+) \(": [lambda i=i: as_published("nrr-dd", i) for i in (1, 10)],
    r"random images (\S+) and (\S+) by its recipe": [lambda i=i: as_published("random", i) for i in (1, 10)],
    r"at IPC 1 and 10 \(print: (\S+), (\S+)\)": [lambda i=i: as_printed("RDED", i) for i in (1, 10)],
    r"NRR-DD \S+ and \S+ \(print: (\S+), (\S+)\)": [lambda i=i: as_printed("NRR-DD", i) for i in (1, 10)],
    r"WMDD is (\S+) points over random images, RDED (\S+) and SRe2L (\S+)": [
        lambda m=m: wmdd(m, 1) for m in ("wmdd", "rded", "sre2l")
    ],
    r"at IPC 10 WMDD is (\S+) below them, at 50 (\S+)": [lambda i=i: -wmdd("wmdd", i) for i in (10, 50)],
    r"at IPC 1 RDED is (\S+) over random images, NRR-DD (\S+), SRe2L (\S+) below": [
        lambda: rded("rded", 1) - rded("random", 1), lambda: rded("nrr-dd", 1) - rded("random", 1),
        lambda: rded("random", 1) - rded("sre2l", 1),
    ],
    r"NRR-DD (\S+), RDED (\S+), SRe2L (\S+), but random images have (\S+)": [
        lambda m=m: rded(m, 10) for m in ("nrr-dd", "rded", "sre2l", "random")
    ],
    r"by that recipe NRR-DD has (\S+), not the printed (\S+), and random images (\S+);": [
        lambda: ours("nrr_dd", "table1/cifar-10/nrr-dd/convnet/1/soft"),
        lambda: printed("nrr_dd", "NRR-DD", 1, dataset="CIFAR-10", arch="ConvNet"),
        lambda: ours("nrr_dd", "table1/cifar-10/random/convnet/1/soft"),
    ],
    r"an image make (\S+) of it, and (\S+) of RDED's": [lambda: long("cidd+nrr"), lambda: long("rded")],
    r"MTT is (\S+) points short, DATM (\S+); at IPC 10 DM is (\S+) short": [
        lambda: short("MTT", 1), lambda: short("DATM", 1), lambda: short("DM", 10),
    ],
    r"DC and DSA (\S+) after 10 %": [lambda: (short("DC", 10) + short("DSA", 10)) / 2],
    r"at IPC 10 by (\S+), (\S+) and (\S+) points": [lambda m=m: gain(m, 10) for m in SETS],
    r"print: (\S+), (\S+), (\S+)\), at IPC 1": [lambda m=m: printed_gain(m.upper(), 10) for m in SETS],
    r"at IPC 1 by (\S+), (\S+) and (\S+) \(": [lambda m=m: gain(m, 1) for m in SETS],
    r"\((\S+), (\S+), (\S+)\); random images": [lambda m=m: printed_gain(m.upper(), 1) for m in SETS],
    r"random images by (\S+) at IPC 10": [lambda: gain("random", 10)],
    r"over random images falls from (\S+) to (\S+) points at IPC 10 and from (\S+) to (\S+) at 50": [
        lambda x=x, i=i: regime("dm", x, i) - regime("random", x, i) for i in (10, 50) for x in ("hl", "sl")
    ],
    r"subsets of real images from (\S+) to (\S+) and from (\S+) to (\S+)\. A set": [
        lambda x=x, i=i: spread(x, i) for i in (10, 50) for x in ("hl", "sl")
    ],
}  # fmt: skip


@pytest.mark.parametrize("words", SAID)
def test_a_number_in_words_is_that_of_its_files(words):
    (said,) = re.findall(words, " ".join(SECTION.split()))
    said = said if isinstance(said, tuple) else (said,)
    for text, source in zip(said, SAID[words], strict=True):
        digits = len(text.partition(".")[2])
        assert text == f"{source():.{digits}f}", f"{text} is {source():.2f}"


def test_no_number_is_left_out():
    text = " ".join(SECTION.split())
    for words in [*SAID, r"\[[^]]*\]\([^)]*\)|IPC \d+|CIFAR-10|\b(2|10) % of"]:
        for found in re.finditer(words, " ".join(SECTION.split())):
            text = text[: found.start()] + "_" * len(found[0]) + text[found.end() :]
    assert not re.findall(r"\d+", text), text
