"""A short tests.faults.ray_campaign: a node is lost during a run. Killed workers are in tests/test_cluster.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import ray_campaign
from tests.faults.campaign import WRONG

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_run_outlives_a_lost_node(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: requirements-cluster.txt")
    command = [sys.executable, "-m", "tests.faults.ray_campaign", "only=table1/cifar-10/random/convnet/1"]
    command += ["seeds=0,1,2", "kills=0", "nodes=1", "apart=0", "drivers=0", f"report={tmp_path}/page.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads((tmp_path / "page" / "ray_node.json").read_text())["counts"]["node"]
    rows = ray_campaign.ROWS
    assert counts[rows["kills"]] == 1 and counts[rows["cells"]] == counts[rows["rounds"]] == counts[rows["starts"]]
    assert not any(counts[rows[name]] for name in (*WRONG, "given up", "left"))
    assert "| finished, whole entries made a second time | 0 |" in (tmp_path / "page.md").read_text()
