"""Faults of the store, the disk and the machine while papers.runner is at work: what is made is what would have been.

The store alone is in tests/test_store.py (every file of an entry damaged in every way, kills at the moments that
matter, a full disk at each call, a read-only root); many kills are in tests/faults/campaign.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from common import datasets, store
from common.store import Damaged, Product, Store
from papers import runner
from papers.stages import Lab
from tests.faults import broken_files as broken
from tests.faults import campaign
from tests.image_trees import tree

CELL = "table1/cifar-10/random/convnet/1/own"


def arguments(place: Path, tables: str = "tables") -> list[str]:
    """The cheapest cell there is, in `place`."""
    return ["paper=matching", "scale=smoke", "device=cpu", f"only={CELL}", "seeds=0", f"store={place}/runs",
            f"out={place}/{tables}"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def no_figures():
    """They take longer than the cell; tests/test_figures.py draws them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "draw_figures", lambda finished: [])
        yield


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """Where an undisturbed run has finished."""
    place = tmp_path_factory.mktemp("reference")
    assert runner.main(arguments(place)) == 0
    return place


@pytest.fixture(scope="module")
def reference(origin) -> campaign.Run:
    """What an undisturbed run leaves."""
    return campaign.read(origin)


@pytest.fixture
def finished(tmp_path, origin) -> Path:
    """A place where the run has finished: a copy of the reference."""
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Callable[..., multiprocessing.Process]:
    """Starts a driver in a process of its own; all are forked from one that has made the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.campaign", "papers.matching.figures"])

    def started(place: Path, largest: int | None = None, tables: str = "tables") -> multiprocessing.Process:
        process = context.Process(target=campaign.drive, args=(arguments(place, tables), place / "log", largest))
        process.start()
        return process

    return started


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


HARMS = {"truncated": lambda path: os.truncate(path, path.stat().st_size // 2), "flipped": flip, "missing": Path.unlink}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("when", ["before the run", "while it runs"])
def test_a_damaged_entry_is_named_and_made_again(request, tmp_path, monkeypatch, reference, capsys, harm, when):
    harmed = []

    def damage() -> None:
        (entry,) = (path for path in campaign.entries(tmp_path) if path.parent.name == "distill")
        HARMS[harm](entry / "tensors.safetensors")
        harmed.append(entry.name)

    if when == "before the run":
        request.getfixturevalue("finished")
        (students,) = (tmp_path / "runs" / "students").glob("*/manifest.json")
        shutil.rmtree(students.parent)  # so that the images are needed
        damage()
    else:
        entry_of = Lab.entry

        def entry(lab: Lab, stage):
            found = entry_of(lab, stage)
            if stage.name == "distill" and not harmed:
                time.sleep(0.02)  # the clock of a file system ticks
                damage()
            return found

        monkeypatch.setattr(Lab, "entry", entry)
    with pytest.warns(UserWarning, match="is damaged: .*tensors.safetensors.*to be made again"):
        assert runner.main(arguments(tmp_path)) == 0
    assert campaign.read(tmp_path) == reference and "Traceback" not in "".join(capsys.readouterr())
    assert (tmp_path / "runs" / "distill" / f"{harmed[0]}.damaged-1").is_dir()


def test_a_store_names_no_files_outside_of_it(tmp_path):
    made = Store(tmp_path / "runs").make("teacher", {}, [], lambda work: Product({"x": torch.zeros(1)}, {}))
    (made.path.parent / "secret").write_text("secret")
    with pytest.raises(Damaged, match=r"'\.\./climbed' is not a plain file name"):
        Store(tmp_path / "other").receive("teacher", made.key, {**made.files(), "../climbed": b"x"})
    assert not list(tmp_path.rglob("climbed"))
    manifest = (made.path / "manifest.json").read_text()
    (made.path / "manifest.json").write_text(manifest.replace('"meta.json"', '"../secret": {}, "meta.json"'))
    with pytest.warns(UserWarning, match=r"names '\.\./secret', which is no file of it"):
        assert Store(tmp_path / "runs").get("teacher", made.key) is None


def test_decoded_images_that_would_run_code_are_decoded_again(tmp_path):
    tree(tmp_path)
    first = datasets.load("own", tmp_path, cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    np.save(entry / "images.npy", np.array([broken.Attack(tmp_path / broken.MARKER)], dtype=object))
    with pytest.warns(UserWarning, match="is damaged"):
        again = datasets.load("own", tmp_path, cache=tmp_path / "cache")
    assert again.fingerprint == first.fingerprint and not (tmp_path / broken.MARKER).exists()


# ---- clock, disk, signals, several drivers --------------------------------------------------------------------------


def test_nothing_depends_on_the_clock(tmp_path, monkeypatch, reference):
    """A clock that runs backwards, files from the future, and time that stands still between two checkpoints."""
    now = iter(range(2_000_000_000, 0, -1_000))
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: float(next(now)))
        patch.setattr(store.time, "monotonic", lambda: 0.0)
        assert runner.main(arguments(tmp_path)) == 0
    assert campaign.read(tmp_path) == reference
    for path in (tmp_path / "runs").rglob("*"):
        os.utime(path, (4e9, 4e9))
    before = campaign.marks(tmp_path)
    assert runner.main(arguments(tmp_path)) == 0
    assert campaign.marks(tmp_path) == before and campaign.read(tmp_path) == reference


def test_two_drivers_at_once_make_each_stage_once(tmp_path, start, reference):
    drivers = [start(tmp_path, tables=name) for name in ("one", "two")]
    for driver in drivers:
        driver.join(240)
    assert [driver.exitcode for driver in drivers] == [0, 0]
    assert campaign.read(tmp_path).tensors == reference.tensors
    stages = [(tmp_path / name / "matching/smoke/cells").glob("*.json") for name in ("one", "two")]
    one, two = (runner.json.loads(next(files).read_text()) for files in stages)
    assert one["values"] == two["values"] == reference.results[CELL]["values"]
    assert one["stages"] == two["stages"]  # keys, seconds and time of finishing: the same entries


def test_a_full_disk_is_said_and_the_next_run_finishes(tmp_path, start, reference):
    driver = start(tmp_path, largest=20_000)  # bytes: less than the distilled images
    driver.join(240)
    said = (tmp_path / "log").read_text()
    assert driver.exitcode == 1 and "Traceback" not in said
    assert "cannot write" in said and "nothing half-written was left in its place" in said
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not campaign.entries(tmp_path) and not [path for path in left if ".tmp-" in str(path)]
    assert runner.main(arguments(tmp_path, "after")) == 0
    assert campaign.read(tmp_path).tensors == reference.tensors


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """tmp_path/runs on a file system of its own, of 1 MiB."""
    place = tmp_path / "runs"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "small", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a small file system cannot be mounted here: {getattr(error, 'stderr', error)}".strip())
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_keeps_what_is_finished_and_the_next_run_finishes(
    tmp_path, small_disk, start, origin, reference
):
    """Room for the images, and for one more block."""
    block = os.statvfs(small_disk).f_frsize
    (images,) = (path for path in campaign.entries(origin) if path.parent.name == "distill")
    room = sum(-(-file.stat().st_size // block) for file in images.iterdir()) + 1
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes((os.statvfs(small_disk).f_bavail - room) * block))
    driver = start(tmp_path)
    driver.join(240)
    said = (tmp_path / "log").read_text()
    assert driver.exitcode == 1 and "Traceback" not in said
    (sentence,) = (line for line in said.splitlines() if line.startswith("failed: "))
    assert "cannot write" in sentence and "/students/" in sentence and "No space left on device" in sentence
    before = campaign.marks(tmp_path)
    assert set(before) == {f"distill/{images.name}"} and not list(small_disk.rglob("*.tmp-*"))
    ballast.unlink()
    assert runner.main(arguments(tmp_path, "after")) == 0
    assert campaign.read(tmp_path).tensors == reference.tensors
    assert before.items() <= campaign.marks(tmp_path).items()


def test_a_terminated_run_is_continued(tmp_path, start, reference):
    driver, deadline = start(tmp_path), time.monotonic() + 240
    while not campaign.entries(tmp_path):
        assert driver.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)
    driver.terminate()
    driver.join(240)
    assert driver.exitcode == -15
    before = campaign.marks(tmp_path)
    assert runner.main(arguments(tmp_path, "after")) == 0
    assert campaign.read(tmp_path).tensors == reference.tensors
    assert before.items() <= campaign.marks(tmp_path).items()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing below `folder` can be written in this block: by its rights, which root has everywhere, or by a mount."""
    if os.geteuid():
        inner = [path for path in folder.rglob("*") if path.is_dir()]
        try:
            for path in inner:
                path.chmod(0o555)
            yield
        finally:
            for path in inner:
                path.chmod(0o755)
        return
    try:
        subprocess.run(["mount", "--bind", folder, folder], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"root cannot mount a folder read-only here: {getattr(error, 'stderr', error)}".strip())
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_read_only_store_serves_what_it_has(tmp_path, finished, capsys):
    with read_only(tmp_path / "runs"):
        assert runner.main(arguments(tmp_path)) == 0
        assert runner.main([*arguments(tmp_path)[:4], "seeds=7", *arguments(tmp_path)[5:]]) == 1
    assert "cannot write" in capsys.readouterr().err
