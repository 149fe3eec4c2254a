"""Finds or makes the Python environment of this repository; run by path, by run_all.sh, before anything is installed.

    python common/environment.py check    # exit 0 when this interpreter satisfies requirements.txt, else 1 and why not
    python common/environment.py make     # fills .venv, unless it is filled already

`check` needs nothing but `packaging`, which requirements.txt lists; `make` needs the standard library alone. A `.venv`
made here holds a stamp: `unfinished` from the first moment, and at the end the hash of requirements.txt and
constraints.txt. A killed install is therefore never mistaken for a whole one, and a `.venv` without any stamp is
somebody's own: it is used when it satisfies requirements.txt and never deleted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 10)
FILES = ("requirements.txt", "constraints.txt")
STAMP = "run_all.stamp"
UNFINISHED = "unfinished"


def requirement_lines(path):
    """The requirements in a file, one string each, without comments and blank lines."""
    lines = (line.split("#")[0].strip() for line in Path(path).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def lacking(requirements):
    """What the running interpreter lacks of `requirements` (a list of requirement strings); [] when it satisfies all.

    Pre-releases count (GPU images ship them). Reads package metadata only, so it takes milliseconds, and cannot tell a
    package that is installed but broken.
    """
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ["packaging is missing"]
    problems = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} is {found}, needed {requirement.specifier}")
    return problems


def fingerprint(root=ROOT):
    """sha256 over the two files that say what `.venv` holds; a missing file counts as empty."""
    digest = hashlib.sha256()
    for name in FILES:
        path = Path(root, name)
        content = path.read_bytes() if path.is_file() else b""
        digest.update(f"{name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def read_stamp(venv):
    """The stamp of a `.venv` made here, or None: no such folder, or somebody's own."""
    path = Path(venv, STAMP)
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def usable(root=ROOT):
    """Whether `.venv` was filled here from the present files, and its interpreter is still there."""
    venv = Path(root, ".venv")
    return read_stamp(venv) == fingerprint(root) and os.access(venv / "bin" / "python", os.X_OK)


def check(root=ROOT):
    """What the running interpreter lacks, [] when it can be used.

    Inside a `.venv` that was made here the stamp decides, since the metadata of a killed install can look whole.
    """
    if sys.version_info < OLDEST:
        return [f"Python is {sys.version.split()[0]}, needed >= {OLDEST[0]}.{OLDEST[1]}"]
    venv = Path(root, ".venv")
    if Path(sys.prefix).resolve() == venv.resolve() and read_stamp(venv) is not None:
        return [] if usable(root) else [".venv is unfinished, or older than requirements.txt or constraints.txt"]
    return lacking(requirement_lines(Path(root, FILES[0])))


@contextmanager
def locked(path):
    """Hold an exclusive lock on a file, waiting for whoever has it; the system frees it when a process dies."""
    import fcntl

    with open(path, "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another start is making .venv: waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(root=ROOT):
    """Make and fill `.venv` unless it is filled already. Raises OSError or RuntimeError with one sentence."""
    root = Path(root)
    with locked(root / ".venv.lock"):
        if usable(root):
            return
        venv = root / ".venv"
        if venv.exists():
            if read_stamp(venv) is None:
                raise RuntimeError(
                    f"{venv} was not made by run_all.sh and does not satisfy requirements.txt: fill it with"
                    " `pip install -r requirements.txt -c constraints.txt`, or move it away"
                )
            say(".venv is unfinished, or older than requirements.txt or constraints.txt: making it again.")
            shutil.rmtree(venv)
        say(f"Making .venv with Python {sys.version.split()[0]}: once, a few minutes, 6 GB of disk.")
        venv.mkdir()
        write_stamp(venv, UNFINISHED)
        create(venv)
        fill(venv, root)
        write_stamp(venv, fingerprint(root))


def create(venv):
    """An empty environment with pip in the folder `venv`; RuntimeError says what this Python lacks for it."""
    try:
        import ensurepip  # noqa: F401  (Debian leaves it out of python3)
        from venv import EnvBuilder
    except ImportError as error:
        raise RuntimeError(
            f"this Python ({sys.executable}) cannot make environments, {error.name} is missing: on Debian and Ubuntu"
            " `apt install python3-venv` adds it; or name another Python with PYTHON=..."
        ) from error
    try:
        EnvBuilder(symlinks=True, with_pip=True).create(venv)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"making {venv} failed: {' '.join(map(str, error.cmd))} gave {error.returncode}") from error


def fill(venv, root):
    """pip install the two files into `venv`, pip's output on stderr; RuntimeError when pip fails."""
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["-r", str(root / FILES[0]), "-c", str(root / FILES[1])]
    status = subprocess.run(command, stdout=sys.stderr, check=False).returncode
    if status != 0:
        raise RuntimeError(
            f"pip could not fill .venv (its message is above, status {status}): start again with a package index, 6 GB"
            " of disk and Python 3.10 to 3.12 (PYTHON=python3.12 names one), or install requirements.txt some other way"
        )


def write_stamp(venv, text):
    """Write the stamp whole or not at all."""
    part = venv / f"{STAMP}.part"
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, venv / STAMP)


def say(sentence):
    print(sentence, file=sys.stderr, flush=True)


def main(argv):
    """Exit status: 0 done, 1 lacking or failed (reasons on stderr), 2 wrong usage, 130 interrupted."""
    try:
        if argv == ["check"]:
            problems = check()
            for problem in problems:
                say(f"  {problem}")
            return 1 if problems else 0
        if argv == ["make"]:
            make()
            return 0
    except KeyboardInterrupt:
        say("Interrupted: .venv is unfinished, the next start makes it again.")
        return 130
    except (OSError, RuntimeError) as error:
        say(f"run_all.sh: {error}")
        return 1
    say(f"{Path(__file__).name}: one word is needed, check or make; got: {' '.join(argv) or 'nothing'}")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
