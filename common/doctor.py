"""What is on disk for a data set, and what is wrong with it: `python -m common.datasets check NAME data=ROOT`."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import cli, datasets
from common import datasets_decode as decoding
from common import datasets_files as files
from common.datasets_table import INFO

USAGE = "python -m common.datasets check NAME"


@dataclass(frozen=True)
class CheckConfig:
    """Arguments of the check."""

    data: str | None = field(default=None, metadata={"help": "folder that holds the data sets (default: DD_DATA)"})
    decode: bool = field(default=True, metadata={"help": "decode every image; false reads only the headers"})


@dataclass
class Report:
    """Lines to print, and one sentence for each thing that is wrong."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The report, problems last."""
        wrong = [f"problem: {problem}" for problem in self.problems] or ["nothing is wrong"]
        return "\n".join([*self.lines, *wrong])


def check(name: str, root: str | Path | None = None, decode: bool = True) -> Report:
    """Examine both splits of a set; never raises for what is wrong with it, except when nothing at all is there."""
    report = Report()
    if name in INFO:
        report.lines.append(f"{name}: {INFO[name].note}")
    source = None if name == "digits" else datasets.root_folder(name, root)
    for split in datasets.SPLITS:
        if name == "digits" or datasets.torchvision_folder(name, source, split):
            _tensors(report, name, source, split)
        else:
            _tree(report, name, files.set_folder(name, source), split, decode)
    return report


def _tensors(report: Report, name: str, root: Path | None, split: str) -> None:
    """A split that is read as tensors: embedded, or torchvision's files (whose checksums torchvision compares)."""
    try:
        data = datasets.load(name, root, split=split)
    except (OSError, ValueError) as error:
        report.problems.append(str(error))
        return
    report.lines.append(f"{split}: {data.note}")
    report.lines.append("  sha256 is that of the first image's pixels")
    for label, label_name in enumerate(data.classes):
        rows = data.class_indices(label)
        first = hashlib.sha256(data.images[rows[0]].numpy().tobytes()).hexdigest()
        report.lines.append(_class_line(label, label_name, len(rows), f"image {int(rows[0])}", first))


def _tree(report: Report, name: str, folder: Path, split: str, decode: bool) -> None:
    """A split that lies in image files or a parquet dump."""
    try:
        listing = files.list_split(name, folder, split)
        report.problems += files.problems(name, listing, files.train_classes(name, folder, listing))
    except (OSError, ValueError) as error:
        report.problems.append(str(error))
        return
    odd = files.odd_count(name, listing, split)
    report.problems += [odd] if odd else []
    report.lines.append(
        f"{split}: {len(listing.items):,} images, {len(listing.classes):,} classes, layout {listing.layout}, "
        f"in {listing.folder}"
    )
    _sizes(report, listing, decode)
    others = Counter(os.path.splitext(path)[1] or os.path.basename(path) for path in files.other_files(listing))
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        report.lines.append(f"  ignored files that are not images: {kinds}")
    report.lines.append("  position, class, images, first file and its sha256:")
    starts = np.searchsorted(listing.labels.numpy(), np.arange(len(listing.classes)))
    for label, (start, count) in enumerate(zip(starts.tolist(), files.counts(listing), strict=True)):
        item = listing.items[start] if count else b""
        first = decoding.name_of(item, start) if count else "none"
        content = item if isinstance(item, bytes) else Path(item).read_bytes()
        mark = hashlib.sha256(content).hexdigest() if count else ""
        report.lines.append(_class_line(label, listing.classes[label], count, os.path.basename(first), mark))


def _sizes(report: Report, listing: files.Listing, decode: bool) -> None:
    """Minimum, median and maximum of height and width; images that cannot be read are a problem."""

    def examine(position: int) -> tuple[int, int, str] | str:
        item = listing.items[position]
        try:
            with decoding.open_image(item) as image:
                if decode:
                    image.load()
                return image.height, image.width, image.mode
        except decoding.UNREADABLE as error:
            return f"{decoding.name_of(item, position)} ({decoding.reason(error)})"

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(examine, range(len(listing.items))))
    good = [row for row in found if not isinstance(row, str)]
    bad = [row for row in found if isinstance(row, str)]
    if bad:
        shown = "; ".join(bad[:3]) + ("; ..." if len(bad) > 3 else "")
        report.problems.append(f"{len(bad)} of {len(found)} images cannot be read: {shown}")
    if good:
        sides = [
            f"{label} {min(side)} / {sorted(side)[len(side) // 2]} / {max(side)} px"
            for label, side in zip(("height", "width"), list(zip(*good, strict=True))[:2], strict=True)
        ]
        modes = ", ".join(f"{count:,} {mode}" for mode, count in Counter(row[2] for row in good).most_common())
        report.lines.append(f"  {', '.join(sides)} (minimum / median / maximum); {modes}")


def _class_line(label: int, name: str, count: int, first: str, mark: str) -> str:
    return f"  {label:5d}  {name:24s} {count:7,d}  {first:32s}  {mark[:16]}"


def main(argv: list[str]) -> None:
    """Print the report; ValueError (exit status 1) when something is wrong."""
    if not argv or argv[0] in cli.HELP:
        argv = ["check", "NAME", "help"]
    command, *rest = argv
    if command != "check" or not rest or ("=" in rest[0]):
        raise cli.UsageError(f"'{' '.join(argv)}' is not understood; allowed: check NAME [data=FOLDER] [decode=false]")
    config = cli.parse(CheckConfig, rest[1:], prog=USAGE, description=f"Known names: {', '.join(INFO)}, or any folder.")
    report = check(rest[0], config.data, config.decode)
    print(report.text())
    if report.problems:
        raise ValueError(f"{rest[0]}: {len(report.problems)} problem(s) found")
