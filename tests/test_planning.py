"""Every cell of every paper can be planned at the scales that no test runs: with the data there, in both precisions."""

import functools

import numpy as np
import pytest
import torch

from common import datasets, matching
from common.datasets_stream import Stream
from papers import mixing_stages, planning, runner, stages
from papers.cells import load_paper

PAPERS = ("wmdd", "nrr_dd", "matching", "natural_mixing", "hard_truths", "survey")


@functools.cache
def unseen(name: str, split: str, channels: int) -> datasets.Dataset | Stream:
    """A set of the right counts and classes, without its pixels."""
    facts = datasets.info(name)
    count = next(iter(facts.counts.values()))[split != "train"]
    classes = tuple(f"c{k:05d}" for k in range(facts.classes))
    labels, mean, std = torch.arange(count) * facts.classes // count, (0.5,) * channels, (0.25,) * channels
    if facts.streamed:
        items = np.empty(count, dtype="S1")
        return Stream(name, labels, classes, mean, std, f"{name} {split}", "", channels, 0.001, items)
    side = facts.size or 256
    pixels = torch.zeros(1, channels, side, side, dtype=torch.uint8).expand(count, -1, -1, -1)
    return datasets.Dataset(name, pixels, labels, classes, mean, std, None, f"{name} {split}")


@pytest.fixture
def all_there(monkeypatch):
    for module in (matching, mixing_stages, stages):
        monkeypatch.setattr(
            module, "load", lambda name, root=None, *, split="train", channels=3, **_: unseen(name, split, channels)
        )
    # Views of 50,000 images are not needed to plan: one stands for all.
    monkeypatch.setattr(
        datasets.Dataset, "center",
        lambda data, size, *_, **__: data.images[:, :, :1, :1].expand(-1, -1, size, size),
    )  # fmt: skip


def failures(paper: str, scale: str, precision: str, folder) -> dict[str, str]:
    args = runner.parse([f"paper={paper}", f"scale={scale}", f"data={folder}"])
    lab = runner.Lab(runner.Store(folder), str(folder), torch.device("cpu"), precision)
    planned = planning.make_plan(args, load_paper(paper), lab)
    assert any(p.stages for p in planned)
    return {p.cell.id: p.why for p in planned if p.why.startswith(("failed", "missing", "unreadable"))}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("paper", PAPERS)
def test_no_cell_of_small_fails_to_plan(paper, precision, all_there, tmp_path):
    assert not failures(paper, "small", precision, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("paper", PAPERS)
def test_no_cell_of_the_published_scale_fails_to_plan(paper, all_there, tmp_path):
    assert not failures(paper, "paper", "bf16", tmp_path)
