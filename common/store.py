"""Results on disk that are whole or not there: a content-addressed store, checkpoints, atomic writes.

    store = Store("runs")
    entry = store.make("teacher", {"epochs": 30, "seed": 0}, inputs=(), build=train_teacher)
    weights = entry.tensors()

`train_teacher(work)` runs once; every later call with the same settings and inputs reads what it left:

    runs/teacher/<key>/       tensors.safetensors, meta.json, further files, manifest.json (bytes and sha256 of each)
    runs/teacher/<key>.work/  scratch for checkpoints while the entry is made; outlives a killed process
    runs/teacher/<key>.lock   held by the one process that makes the entry; freed by the system if it dies

An entry is written beside its place and renamed into it, so a kill, a full disk or a power cut leaves either all of it
or none. A damaged entry is named, moved to `<key>.damaged-<n>` and made again.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, META, MANIFEST = "tensors.safetensors", "meta.json", "manifest.json"
SPENT = "spent.json"  # in the folder of a build that goes on: when this run of it began, and what earlier ones took


class Damaged(RuntimeError):
    """A stored file is missing, cut short or altered."""


@dataclass(frozen=True)
class Entry:
    """A finished result: `meta` holds what the build reported, its settings and inputs, `seconds` and `finished`."""

    stage: str
    key: str
    path: Path
    meta: dict

    def tensors(self, *names: str) -> dict[str, Tensor]:
        """Reads the tensors, or those of some names, on the CPU, in the dtypes they were saved with."""
        if not names:
            return load_file(self.path / TENSORS)
        with safe_open(self.path / TENSORS, framework="pt") as file:
            return {name: file.get_tensor(name) for name in names}

    def marks(self) -> dict[str, tuple[int, int]]:
        """Size and time of change (ns) of its files: others than before, and the entry has to be checked again."""
        with suppress(FileNotFoundError):
            return {name: (s.st_size, s.st_mtime_ns) for name, s in _stats(self.path)}
        return {}

    def files(self) -> dict[str, bytes]:
        """Everything it consists of, for `Store.receive` on a machine that does not see this folder."""
        return {file.name: file.read_bytes() for file in self.path.iterdir()}


@dataclass
class Product:
    """What a build returns: tensors, JSON-able facts about them, and further files by name (`preview.png`)."""

    tensors: dict[str, Tensor]
    meta: dict
    files: dict[str, bytes] = field(default_factory=dict)


class Store:
    """Entries under `root/<stage>/<key>/`; any number of processes may share one root."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def key(self, stage: str, settings: dict, inputs: Sequence[str] = ()) -> str:
        """16 hex digits naming the result of `stage` under `settings`, made from the entries `inputs` (their keys).

        The order of dictionary keys does not matter, tuples equal lists, 1 differs from 1.0. ValueError for a value
        that has no one spelling (an object, NaN, a dictionary key that is not text).
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", stage):
            raise ValueError(f"stage {stage!r} must be a plain folder name: letters, digits, '_', '-', '.'")
        if isinstance(inputs, str):
            raise ValueError(f"inputs must be a sequence of keys, not the single string {inputs!r}")
        text = canonical({"stage": stage, "settings": settings, "inputs": list(inputs)})
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def status(self, stage: str, settings: dict, inputs: Sequence[str] = ()) -> str:
        """'cached' or 'missing', from names and sizes alone: cheap enough to ask for every cell of a plan."""
        try:
            found = _read(self.root / stage / self.key(stage, settings, inputs), hashes=False)
        except Damaged:
            found = None
        return "cached" if found else "missing"

    def get(self, stage: str, key: str) -> Entry | None:
        """The entry, every file checked against its size and sha256; None if missing, or damaged and so set aside."""
        path = self.root / stage / key
        try:
            return _read(path)
        except Damaged as damage:
            try:
                with FileLock(_beside(path, "lock"), timeout=0):
                    return _read_or_set_aside(path)
            except (Timeout, OSError):  # another process is making it again, or the root is read-only
                warnings.warn(str(damage), stacklevel=2)
                return None

    def make(
        self, stage: str, settings: dict, inputs: Sequence[str], build: Callable[[Path], Product], *, wait: bool = True
    ) -> Entry | None:
        """The entry, from disk if it is there, else from `build(work)`, which one process at a time runs.

        Without `wait`, None where another process is making it just now.

        `work` is a folder for checkpoints: it survives a killed or failed build, and the next one finds it as it was.
        `meta["resumed"]` says so; `seconds` counts the earlier runs up to their last checkpoint. OSError names a path
        that cannot be written; errors of `build` pass through.
        """
        key = self.key(stage, settings, inputs)
        path, work = self.root / stage / key, self.root / stage / f"{key}.work"
        entry = self.get(stage, key)
        if entry is None:
            with _sentence(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path, wait) as held:
                if not held:
                    return None
                entry = _read_or_set_aside(path) or self._build(path, work, settings, inputs, build)
        if work.exists():  # also left by a process that died just after the rename
            shutil.rmtree(work, ignore_errors=True)
        return entry

    def receive(self, stage: str, key: str, files: Mapping[str, bytes]) -> None:
        """Keeps an entry that another store holds, as `Entry.files` read it there; Damaged if it is not whole."""
        path = self.root / stage / key
        for name in files:
            if Path(name).name != name:
                raise Damaged(f"entry {path} is not received: {name!r} is not a plain file name")
        with _sentence(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if _read_or_set_aside(path) is not None:
                return
            with replacing(path) as folder:
                folder.mkdir()
                for name, data in files.items():
                    (folder / name).write_bytes(data)
                _read(folder)

    def _build(
        self, path: Path, work: Path, settings: dict, inputs: Sequence[str], build: Callable[[Path], Product]
    ) -> Entry:
        for left_over in path.parent.glob(f"{path.name}.tmp-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        with _sentence(work):
            work.mkdir(exist_ok=True)
            resumed = any(file.name != SPENT for file in work.iterdir())
        before = _spent(work) if resumed else 0.0
        write_atomic(work / SPENT, json.dumps({"before": before, "begun": time.time()}).encode())
        start = time.perf_counter()
        try:
            product = build(work)
        except BaseException:
            with suppress(OSError):
                if [file.name for file in work.iterdir()] == [SPENT]:  # nothing to go on with
                    (work / SPENT).unlink()
            raise
        seconds = round(before + time.perf_counter() - start, 3)
        finished = datetime.now().astimezone().isoformat(timespec="seconds")
        facts = {"settings": settings, "inputs": list(inputs), "seconds": seconds, "resumed": resumed}
        meta = {**product.meta, **facts, "finished": finished}
        files = {META: json.dumps(meta, indent=1).encode(), **product.files}
        for name in product.files:
            if name in ("", TENSORS, META, MANIFEST) or Path(name).name != name:
                raise ValueError(f"file {name!r} must be a plain name, and none of {TENSORS}, {META}, {MANIFEST}")
        with replacing(path) as folder:
            folder.mkdir()
            for name, data in files.items():
                (folder / name).write_bytes(data)
            save_file(storable(product.tensors), folder / TENSORS)
            shutil.copymode(folder / META, folder / TENSORS)  # safetensors lets nobody but the owner read
            manifest = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
                        for name in (TENSORS, *files)}
            (folder / MANIFEST).write_bytes(json.dumps(manifest, indent=1).encode())
        return _read(path, hashes=False)


class Checkpoint:
    """The state of a long loop in one file: tensors (images, optimiser, generator state) and a JSON-able dictionary.

    `due(step)` is true once `every_steps` steps or `every_seconds` seconds have gone by since it last was, whichever
    comes first, but not while saving would take more than a twentieth of the time. A kill at any moment leaves the
    newest complete state.
    """

    def __init__(self, path: str | Path, every_seconds: float = 120.0, every_steps: int = 100):
        self.path, self.every_seconds, self.every_steps = Path(path), every_seconds, every_steps
        self._step: int | None = None
        self._time = time.monotonic()
        self._cost = 0.0  # seconds the last save took

    def due(self, step: int) -> bool:
        """Whether to save now; the first step it is asked about starts the count."""
        if self._step is None:
            self._step = step
        waited = time.monotonic() - self._time
        if (step - self._step < self.every_steps and waited < self.every_seconds) or waited < 20 * self._cost:
            return False
        self._step, self._time = step, time.monotonic()
        return True

    def save(self, tensors: dict[str, Tensor], meta: dict) -> None:
        """Replaces the saved state, whole. OSError leaves the previous one in place."""
        begun = time.monotonic()
        tensors, text = storable(tensors), json.dumps(meta)
        with replacing(self.path) as temporary:
            save_file(tensors, temporary, metadata={"meta": text, "sha256": digest(tensors, text)})
        self._cost = time.monotonic() - begun

    def load(self) -> tuple[dict[str, Tensor], dict] | None:
        """The saved state, on the CPU; None when there is none, or (with a warning that names it) a damaged one."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a file
            if facts.get("sha256") == digest(tensors, facts.get("meta", "")):
                return tensors, json.loads(facts["meta"])
        except (SafetensorError, ValueError):
            pass
        warnings.warn(f"checkpoint {self.path} is damaged; starting without it", stacklevel=2)
        return None


def write_atomic(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path`, making its folder; readers see the old file or the new one, never a part of it.

    OSError names the path, and the old file is left as it was.
    """
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; the file or flat folder made there takes its place when the block ends."""
    temporary = _beside(path, f"tmp-{uuid.uuid4().hex[:8]}")
    try:
        with _sentence(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            for part in (*temporary.glob("*"), temporary):
                _sync(part)
            os.replace(temporary, path)
            _sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):  # not there, or below a file: the sentence on what cannot be written stands
                temporary.unlink()


def canonical(value: object) -> str:
    """JSON with one spelling for each value: sorted keys, floats by repr, tuples as lists.

    ValueError names a value that JSON would lose or blur (objects, NaN, infinity, keys that are not text).
    """
    _refuse_ambiguous(value, "settings")
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """sha256 over `text` and the names, dtypes, shapes and bytes of CPU tensors, whatever their order."""
    names = sorted(tensors)
    shapes = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    state = hashlib.sha256(json.dumps([text, shapes]).encode())
    for name in names:
        state.update(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous, no two in the same memory."""
    plain, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    return plain


def _stats(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as files:
        yield from ((file.name, file.stat()) for file in files)


def sha256_of(path: Path) -> str:
    """sha256 of a file, read in pieces of 1 MiB."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            state.update(piece)
    return state.hexdigest()


def _spent(work: Path) -> float:
    """Seconds of the earlier runs of a build, each up to its last checkpoint: what came after is done again."""
    try:
        last = json.loads((work / SPENT).read_text())
        saved = max(file.stat().st_mtime for file in work.rglob("*") if file.is_file() and file.name != SPENT)
        return last["before"] + max(0.0, saved - last["begun"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def _read(path: Path, hashes: bool = True) -> Entry | None:
    """The entry at `path`; None if there is none. Damaged says which file is wrong and how."""
    if not path.is_dir():
        return None
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for name in sorted({TENSORS, META, *manifest}):
            if Path(name).name != name:
                raise Damaged(f"entry {path} is damaged: {MANIFEST} names {name!r}, which is no file of it")
            size, expected = (path / name).stat().st_size, manifest[name]
            if size != expected["bytes"]:
                raise Damaged(f"entry {path} is damaged: {name} has {size} bytes, not {expected['bytes']}")
            if hashes and sha256_of(path / name) != expected["sha256"]:
                raise Damaged(f"entry {path} is damaged: the sha256 of {name} is not the one recorded")
        meta = json.loads((path / META).read_bytes())
    except FileNotFoundError as error:
        raise Damaged(f"entry {path} is damaged: {Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError):
        raise Damaged(f"entry {path} is damaged: {MANIFEST} or {META} cannot be read") from None
    return Entry(path.parent.name, path.name, path, meta)


def _read_or_set_aside(path: Path) -> Entry | None:
    """`_read`, for one who holds the lock: a damaged entry is named and moved out of the way."""
    try:
        return _read(path)
    except Damaged as damage:
        names = (_beside(path, f"damaged-{n}") for n in count(1))
        aside = next(name for name in names if not name.exists())
        with _sentence(path):
            path.rename(aside)
        warnings.warn(f"{damage}; moved to {aside.name}, to be made again", stacklevel=3)
        return None


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock of one entry; a wait of more than a second is said once on stderr.

    Without `wait`, gives False where another process has the lock.
    """
    lock = FileLock(_beside(path, "lock"))
    with _sentence(path):
        try:
            lock.acquire(timeout=1 if wait else 0)
        except Timeout:
            if wait:
                print(f"waiting for another process that is making {path}", file=sys.stderr, flush=True)
                lock.acquire()
    try:
        yield lock.is_locked
    finally:
        lock.release()


@contextmanager
def _sentence(path: Path) -> Iterator[None]:
    """Turns a failed write into one sentence that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path}: {reason}; nothing half-written was left in its place") from error


def _sync(path: Path) -> None:
    """Asks the disk to keep a file or folder; some file systems cannot do that for folders, which is then let be."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not path.is_dir():
            raise


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")


def _refuse_ambiguous(value: object, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; keys must be text")
            _refuse_ambiguous(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            _refuse_ambiguous(item, f"{where}[{position}]")
    elif isinstance(value, float) and not abs(value) < float("inf"):
        raise ValueError(f"{where} is {value}; it must be finite")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"{where} is {value!r}; it must be text, a number, true/false, null, a list or a dictionary")
