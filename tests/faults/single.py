"""Counts the faults that are tests (bad inputs, damage, disk, clock, two drivers) on the page of the campaigns.

    python -m tests.faults.single
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from common import cli
from tests.faults import reliability

FOLDER = Path(__file__).resolve().parent
FILES = {"test_bad_inputs.py": "bad inputs", "test_store_faults.py": "store, disk and machine"}


@dataclass(frozen=True)
class Options:
    """Where the counts go."""

    report: str = field(
        default=reliability.PAGE,
        metadata={"help": "page of the counts, with a folder of its name; empty: printed only"},
    )


class Outcomes:
    """What became of each case, by test: a plugin of pytest."""

    def __init__(self):
        self.counts: dict[str, Counter] = {}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when != "call" and report.passed:
            return
        file, name = Path(report.nodeid.split("[")[0]).name.split("::")
        words = name.removeprefix("test_").replace("_", " ")
        self.counts.setdefault(f"{FILES[file]}: {words}", Counter())[report.outcome] += 1


def main(argv: list[str]) -> None:
    """RuntimeError where a fault was not met as it should be."""
    options = cli.parse(Options, argv, prog="python -m tests.faults.single", description=__doc__.split("\n")[0])
    torch.set_num_threads(1)
    begun, found = time.monotonic(), Outcomes()
    tests = [str(FOLDER / file) for file in FILES]
    status = pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", *tests], plugins=[found])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the tests of faults did not run to their end: pytest says {status!r}")
    columns = {"met as it should be": "passed", "not met": "failed", "not tried here": "skipped"}
    section = {
        "title": "Single faults", "command": "python -m tests.faults.single",
        "how": "Each fault is a test, named in the row. A bad input (arguments, YAML, folders, images, archives, files"
        " of tensors) has to give one sentence and a non-zero exit status, show no traceback, run nothing that it"
        " brings and change no file that was there.",
        "counts": {c: {row: count[outcome] for row, count in found.counts.items()} for c, outcome in columns.items()},
        "cells": [], "limits": "The full disk is a file system of 1 MiB, where one may be mounted.",
    }  # fmt: skip
    reliability.keep(options.report, section, time.monotonic() - begun)
    if bad := [row for row, count in found.counts.items() if count["failed"]]:
        raise RuntimeError(f"not met as they should be: {'; '.join(bad)}")


if __name__ == "__main__":
    sys.exit(cli.guard(main, sys.argv[1:]))
