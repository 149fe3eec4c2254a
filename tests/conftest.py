"""One thread for the tensors of tests, and of the programs they start: they are small, on a busy machine threads wait
for each other, and with another number of threads the last bit of a sum can differ.
"""

import os
from collections import Counter

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; started programs inherit it

import pytest
import torch

from methods import nrr_dd, rded, sre2l, wmdd

torch.set_num_threads(1)


@pytest.fixture
def untrained(monkeypatch):
    """Teachers that know nothing will do: what is tested does not need more."""
    for method in (nrr_dd, rded, sre2l, wmdd):
        monkeypatch.setattr(method, "recognises", lambda *_: None)


def pytest_collection_modifyitems(items: list) -> None:
    """Files with the most slow tests first: one of them begun last would keep one process busy and the others idle."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: within a file the order stays
