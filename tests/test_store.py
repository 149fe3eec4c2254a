"""The store: what is named, what survives a kill, what is noticed when it is damaged."""

import errno
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from common import store as module
from common.store import Checkpoint, Product, Store, canonical, digest, write_atomic

REPOSITORY = Path(__file__).resolve().parents[1]
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
SETTINGS = {"epochs": 3, "rate": 0.1, "name": "tiny", "sizes": (32, 64)}


def product(value: float = 1.0) -> Product:
    return Product({"weight": torch.full((2, 3), value)}, {"loss": 0.5}, {"preview.png": b"not really"})


def never(work: Path) -> Product:
    raise AssertionError("this entry is there and must not be built")


def names(folder: Path) -> set[str]:
    """What lies in a folder, apart from the lock files."""
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


# ---- keys ---------------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)
dictionaries = st.dictionaries(st.text(), values, max_size=5)


def typed(value: object) -> object:
    """The value with the type of every leaf spelled out (1, 1.0 and True differ) and tuples as lists."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [typed(item) for item in value]
    return type(value).__name__, repr(value)


def reversed_keys(value: object) -> object:
    if isinstance(value, dict):
        return {key: reversed_keys(value[key]) for key in reversed(list(value))}
    return [reversed_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


@CALM
@given(dictionaries)
def test_canonical_text_loses_nothing(value):
    assert typed(json.loads(canonical(value))) == typed(value)  # so two different values never share a text


@CALM
@given(dictionaries, st.lists(st.text(max_size=4), max_size=3))
def test_key_ignores_order_and_kind_of_sequence(value, inputs):
    key = Store("runs").key("teacher", value, inputs)
    assert key == Store("elsewhere").key("teacher", reversed_keys(value), tuple(inputs))
    assert len(key) == 16 and set(key) <= set("0123456789abcdef")


def test_key_depends_on_every_part_and_stays_the_same_over_versions():
    key = Store("runs").key
    keys = [key("a", {"x": 1}), key("b", {"x": 1}), key("a", {"x": 1.0}), key("a", {"x": True}), key("a", {"x": "1"}),
            key("a", {"x": 1}, ["p"]), key("a", {"x": 1}, ["p", "q"]), key("a", {"x": 1}, ["q", "p"]), key("a", {})]
    assert len(set(keys)) == len(keys)
    # a change here orphans every stored result
    assert key("teacher", SETTINGS, ["0123456789abcdef"]) == "6835a1d8d07ce5d6"


@CALM
@given(st.sampled_from([float("nan"), float("inf"), -float("inf"), object(), {1: 2}, {3}, b"bytes", Path("p")]))
def test_settings_without_one_spelling_are_refused(bad):
    with pytest.raises(ValueError, match=r"settings\.a\[0\]"):
        canonical({"a": [bad]})


def test_bad_stage_and_inputs_are_refused():
    with pytest.raises(ValueError, match="folder name"):
        Store("runs").key("../teacher", {})
    with pytest.raises(ValueError, match="single string"):
        Store("runs").key("teacher", {}, "0123456789abcdef")


# ---- making and reading -------------------------------------------------------------------------------------------

def test_made_once_then_read(tmp_path):
    store = Store(tmp_path / "a new" / "root")
    assert store.status("teacher", SETTINGS) == "missing"
    entry = store.make("teacher", SETTINGS, ["0123"], lambda work: product())
    again = store.make("teacher", {**SETTINGS, "sizes": [32, 64]}, ("0123",), never)
    assert again == entry == store.get("teacher", entry.key)
    assert store.status("teacher", SETTINGS, ["0123"]) == "cached"
    assert torch.equal(entry.tensors()["weight"], torch.ones(2, 3))
    assert (entry.path / "preview.png").read_bytes() == b"not really"
    assert entry.meta["loss"] == 0.5 and entry.meta["settings"]["sizes"] == [32, 64]
    assert entry.meta["inputs"] == ["0123"] and entry.meta["seconds"] >= 0 and entry.meta["finished"][:2] == "20"
    assert names(entry.path.parent) == {entry.key}  # no scratch or temporary folder is left


def test_tensors_of_every_kind_come_back(tmp_path):
    base = torch.arange(12.0)
    tensors = {
        "bf16": base.bfloat16(), "half": base.half(), "double": base.double(), "int": base.long(), "byte": base.byte(),
        "flag": base > 3, "scalar": torch.tensor(7), "empty": torch.zeros(0, 3), "view": base[2:8].view(2, 3),
        "transposed": base.view(3, 4).t(), "same memory": base, "same again": base.view(4, 3),
        "channels last": base.view(1, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "generator": torch.Generator().manual_seed(3).get_state(), "learned": torch.ones(2, requires_grad=True),
    }
    back = Store(tmp_path).make("kinds", {}, [], lambda work: Product(tensors, {})).tensors()
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    assert Store(tmp_path).make("nothing", {}, [], lambda work: Product({}, {})).tensors() == {}


def test_changing_read_tensors_changes_no_file(tmp_path):
    store = Store(tmp_path)
    entry = store.make("teacher", {}, [], lambda work: product())
    entry.tensors()["weight"].zero_()
    assert torch.equal(store.get("teacher", entry.key).tensors()["weight"], torch.ones(2, 3))


def test_failed_build_keeps_its_scratch_and_its_error(tmp_path):
    store = Store(tmp_path)

    def fails(work: Path) -> Product:
        (work / "state").write_text("step 7")
        raise FileNotFoundError("the data set is missing")

    def resumes(work: Path) -> Product:
        assert (work / "state").read_text() == "step 7"
        return product()

    with pytest.raises(FileNotFoundError, match=r"^the data set is missing$"):
        store.make("teacher", {}, [], fails)
    assert store.status("teacher", {}) == "missing"
    entry = store.make("teacher", {}, [], resumes)
    assert entry.meta["resumed"] is True and names(tmp_path / "teacher") == {entry.key}


def test_seconds_are_those_of_all_runs_up_to_their_last_checkpoints(tmp_path):
    store, runs = Store(tmp_path), count()

    def build(work: Path) -> Product:
        time.sleep(0.2)
        (work / "state").write_text(f"run {next(runs)}")
        if (work / "state").read_text() != "run 2":
            time.sleep(0.2)  # lost: it comes after the checkpoint
            raise OSError("killed")
        return product()

    begun = time.perf_counter()
    for _ in range(2):
        with pytest.raises(OSError, match="killed"):
            store.make("teacher", {}, [], build)
    entry = store.make("teacher", {}, [], build)
    assert 0.55 < entry.meta["seconds"] < time.perf_counter() - begun - 0.35, entry.meta


@pytest.mark.parametrize("name", ["tensors.safetensors", "manifest.json", "../escape.png", "a/b.png", ""])
def test_files_cannot_leave_the_entry(tmp_path, name):
    with pytest.raises(ValueError, match="plain name"):
        Store(tmp_path).make("teacher", {}, [], lambda work: Product({}, {}, {name: b""}))


# ---- damage -------------------------------------------------------------------------------------------------------

def flip_a_bit(path: Path, bit: int = 203) -> None:
    data = bytearray(path.read_bytes())
    data[(bit // 8) % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


HARMS = {"missing": Path.unlink, "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
         "emptied": lambda path: os.truncate(path, 0), "bit-flipped": flip_a_bit}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("file", ["tensors.safetensors", "meta.json", "preview.png", "manifest.json"])
def test_damaged_entry_is_named_and_made_again(tmp_path, file, harm):
    store = Store(tmp_path)
    entry = store.make("teacher", {}, [], lambda work: product(1.0))
    HARMS[harm](entry.path / file)
    with pytest.warns(UserWarning, match=f"{entry.key} is damaged.*moved to {entry.key}.damaged-1"):
        entry = store.make("teacher", {}, [], lambda work: product(2.0))
    assert entry.tensors()["weight"][0, 0] == 2
    HARMS[harm](entry.path / file)
    with pytest.warns(UserWarning, match="damaged-2"):
        assert store.get("teacher", entry.key) is None
    assert names(tmp_path / "teacher") == {f"{entry.key}.damaged-{n}" for n in (1, 2)}


@settings(CALM, max_examples=60)
@given(bit=st.integers(0, 10**5), file=st.sampled_from(["tensors.safetensors", "meta.json", "manifest.json"]))
def test_no_flipped_bit_goes_into_a_result(bit, file):
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.warnings, "warn", lambda *args, **kwargs: None)
        patch.setattr(module, "_sync", lambda path: None)
        store = Store(root)
        entry = store.make("teacher", {}, [], lambda work: product())
        flip_a_bit(entry.path / file, bit)
        found = store.get("teacher", entry.key)
        assert found is None or (file == "manifest.json" and found == entry)  # a blank of the manifest may change


# ---- full disk, read-only root ------------------------------------------------------------------------------------

def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_for_tensors(*args, **kwargs):
    raise SafetensorError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("target, name, failure", [
    (module, "save_file", no_space_for_tensors), (Path, "write_bytes", no_space), (os, "fsync", no_space),
    (os, "replace", no_space), (Path, "mkdir", no_space)])
def test_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path, monkeypatch, target, name, failure):
    store = Store(tmp_path)
    good = store.make("teacher", {"seed": 0}, [], lambda work: product())
    with monkeypatch.context() as patch:
        patch.setattr(target, name, failure)
        with pytest.raises(OSError, match=r"cannot write .*teacher.*No space left on device"):
            store.make("teacher", {"seed": 1}, [], lambda work: product())
    left = names(tmp_path / "teacher") - {good.key}
    assert all(name.endswith(".work") for name in left)
    assert store.status("teacher", {"seed": 1}) == "missing" and store.get("teacher", good.key) == good
    store.make("teacher", {"seed": 1}, [], lambda work: product())


def test_folders_that_cannot_be_synced_do_not_matter(tmp_path, monkeypatch):
    real = os.open

    def refuses_folders(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuses_folders)
    Store(tmp_path).make("teacher", {}, [], lambda work: product())


@pytest.fixture
def read_only_root():
    """A root with one entry, seen by a user who may read it only."""
    root = Path(tempfile.mkdtemp())
    Store(root).make("teacher", {}, [], lambda work: product())
    user = os.geteuid()
    for folder in (root, root / "teacher"):
        folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        yield root
    finally:
        if user == 0:
            os.seteuid(0)
        for folder in (root, root / "teacher"):
            folder.chmod(0o755)
        shutil.rmtree(root)


def test_read_only_root_reads_and_refuses_to_write(read_only_root):
    store = Store(read_only_root)
    assert store.make("teacher", {}, [], never).tensors()["weight"].sum() == 6
    for stage in ("teacher", "another"):
        with pytest.raises(OSError, match=f"cannot write {read_only_root}.*denied"):
            store.make(stage, {"seed": 1}, [], never)


def test_damage_in_a_read_only_root_is_named(monkeypatch, tmp_path):
    store = Store(tmp_path)
    entry = store.make("teacher", {}, [], lambda work: product())
    flip_a_bit(entry.path / "meta.json")
    monkeypatch.setattr(module, "FileLock", no_space)
    with pytest.warns(UserWarning, match="meta.json"):
        assert store.get("teacher", entry.key) is None
    assert entry.path.exists()


# ---- kills and several processes ----------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
from common.store import Checkpoint, Product, Store

root, mode = Path(sys.argv[1]), sys.argv[2]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def build(work):
    with (root / "log").open("a") as log:
        log.write("built\\n")
    if mode == "wait":
        while not (root / "go").exists():
            time.sleep(0.02)
    checkpoint = Checkpoint(work / "state")
    tensors, meta = checkpoint.load() or ({"x": torch.zeros(3), "g": torch.Generator().manual_seed(0).get_state()},
                                          {"step": 0})
    generator = torch.Generator()
    generator.set_state(tensors["g"])
    for step in range(meta["step"], 6):
        if mode == "in build" and step == 4:
            die()
        tensors = {"x": tensors["x"] + torch.randn(3, generator=generator), "g": generator.get_state()}
        checkpoint.save(tensors, {"step": step + 1})
    return Product({"x": tensors["x"]}, {"from": meta["step"]}, {"note.txt": b"done"})

replace = os.replace
def dying_replace(source, target):
    folder = os.path.isdir(source)
    if mode == "in checkpoint" and not folder and os.path.exists(target) or mode == "before rename" and folder:
        die()
    replace(source, target)
    if mode == "after rename" and folder:
        die()
os.replace = dying_replace
entry = Store(root).make("teacher", {}, [], build)
print(entry.meta["from"], entry.tensors()["x"].tolist())
"""


def start(root: Path, mode: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(root), mode], cwd=REPOSITORY, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> str:
    return start(tmp_path_factory.mktemp("whole"), "plain").communicate(timeout=600)[0].split(maxsplit=1)[1]


@pytest.mark.parametrize("mode, resumed_from, builds", [
    ("in build", 4, 2), ("in checkpoint", 1, 2), ("before rename", 6, 2), ("after rename", 0, 1)])
def test_kill_minus_nine_then_again(tmp_path, uninterrupted, mode, resumed_from, builds):
    killed = start(tmp_path, mode)
    killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL
    key = Store(tmp_path).key("teacher", {})
    assert (tmp_path / "teacher" / key).exists() == (mode == "after rename")
    step, tensors = start(tmp_path, "plain").communicate(timeout=600)[0].split(maxsplit=1)
    assert int(step) == resumed_from and tensors == uninterrupted  # bit for bit: printed by repr
    assert (tmp_path / "log").read_text().count("built") == builds
    assert names(tmp_path / "teacher") == {key}


def test_two_processes_build_once(tmp_path):
    processes = [start(tmp_path, "wait") for _ in range(2)]
    said = queue.Queue()
    for process in processes:
        threading.Thread(target=lambda stream=process.stderr: said.put(stream.readline()), daemon=True).start()
    try:
        first = said.get(timeout=600)  # the builder is silent until `go`, so this is the other one, after its second
        (tmp_path / "go").touch()
        outputs = [process.stdout.read() for process in processes]
        assert "waiting for another process" in first and said.get(timeout=600) == ""
        assert outputs[0] == outputs[1] != "" and [process.wait() for process in processes] == [0, 0]
        assert (tmp_path / "log").read_text() == "built\n"
    finally:
        for process in processes:
            process.kill()


# ---- checkpoints and single files ---------------------------------------------------------------------------------

def test_checkpoint_keeps_the_last_good_state(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "work" / "state")
    assert checkpoint.load() is None
    saved = {"x": torch.randn(2, 3).bfloat16(), "g": torch.Generator().get_state()}
    checkpoint.save(saved, {"step": 5, "loss": [0.1]})
    for target, name, failure in [(module, "save_file", no_space_for_tensors), (os, "fsync", no_space)]:
        with monkeypatch.context() as patch:
            patch.setattr(target, name, failure)
            with pytest.raises(OSError, match=r"cannot write .*state: .*No space"):
                checkpoint.save({"x": torch.zeros(9)}, {"step": 6})
    tensors, meta = checkpoint.load()
    assert meta == {"step": 5, "loss": [0.1]} and torch.equal(tensors["x"], saved["x"])
    assert torch.equal(tensors["g"], saved["g"]) and names(tmp_path / "work") == {"state"}
    tensors["x"].zero_()
    checkpoint.save({"x": torch.ones(2)}, {"step": 7})
    assert checkpoint.load()[1] == {"step": 7}


@settings(CALM, max_examples=150)
@given(bit=st.integers(0, 10**5) | st.none(), cut=st.integers(0, 400) | st.none())
def test_damaged_checkpoint_is_named_and_not_used(bit, cut):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_sync", lambda path: None)
        checkpoint = Checkpoint(Path(folder, "state"))
        checkpoint.save({"x": torch.arange(6.0)}, {"step": 5})
        whole = checkpoint.path.read_bytes()
        if bit is not None:
            flip_a_bit(checkpoint.path, bit)
        if cut is not None:
            os.truncate(checkpoint.path, min(cut, len(whole)))
        if checkpoint.path.read_bytes() == whole:
            assert checkpoint.load()[1] == {"step": 5}
        else:
            with pytest.warns(UserWarning, match=r"state is damaged"):
                assert checkpoint.load() is None


def test_checkpoint_is_due_by_steps_or_by_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    checkpoint = Checkpoint(tmp_path / "state", every_seconds=60, every_steps=10)
    assert [step for step in range(7, 40) if checkpoint.due(step)] == [17, 27, 37]  # counted from the first step seen
    now[0] = 59.0
    assert not checkpoint.due(38)
    now[0] = 61.0
    assert checkpoint.due(39) and not checkpoint.due(40)


def test_digest_sees_names_types_shapes_and_bytes():
    x = torch.arange(4)
    digests = [digest({"x": x}), digest({"y": x}), digest({"x": x.float()}), digest({"x": x.view(2, 2)}),
               digest({"x": x + 1}), digest({"x": x}, "text"), digest({"x": x, "y": x})]
    assert len(set(digests)) == len(digests)
    assert digest({"x": x, "y": x}) == digest({"y": x, "x": x})


def test_write_atomic_replaces_or_leaves(tmp_path, monkeypatch):
    path = tmp_path / "cells" / "one.json"
    write_atomic(path, b"first")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match=r"cannot write .*one.json: No space left on device"):
            write_atomic(path, b"second")
    assert path.read_bytes() == b"first" and names(path.parent) == {"one.json"}
    write_atomic(path, b"third")
    assert path.read_bytes() == b"third"
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=r"cannot write .*one.json"):
        write_atomic(path, b"fourth")


def test_checkpoint_saves_take_at_most_a_twentieth_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("common.store.time.monotonic", lambda: now[0])
    checkpoint = Checkpoint(tmp_path / "state.safetensors", every_steps=1)
    checkpoint.due(0)

    def slow(tensors, path, metadata):
        now[0] += 3.0
        path.write_bytes(b"")

    monkeypatch.setattr("common.store.save_file", slow)
    assert checkpoint.due(1)
    checkpoint.save({"x": torch.zeros(1)}, {})
    now[0] = 59.0
    assert not checkpoint.due(2)
    now[0] = 61.0
    assert checkpoint.due(3)
