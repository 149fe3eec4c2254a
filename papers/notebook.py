"""Runs the notebook of a paper: `python -m papers.notebook paper=wmdd scale=smoke`.

The arguments are those of papers.runner and become the notebook's papermill parameters; what it prints is seen as it
comes. The executed notebook and its HTML are written into <out>/<paper>/<scale>/ when every cell has run; after a
failing cell the notebook as far as it got is kept there as <paper>.failed.ipynb, and the results of an earlier run
stay. Where papermill or jupyter are missing, the same cells run through papers.runner.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from common.cli import UsageError, guard
from common.store import write_atomic
from papers import runner

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("papermill", "nbformat", "nbconvert", "ipykernel")
KERNEL = "python3"
START_SECONDS = 300  # a kernel starts slowly on a busy machine or a network disk


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 1 a cell or stage failed, 2 wrong usage, 130 interrupted."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"Without the notebook, since {', '.join(missing)} cannot be imported: the same cells by papers.runner.")
        return runner.main(argv)
    return guard(run, argv)


def run(argv: list[str]) -> None:
    """Run the notebook of the paper named in `argv`, or print the plan alone where dry_run=true.

    UsageError for arguments that papers.runner or the notebook does not know; see `execute` for the rest.
    """
    args = runner.parse(argv)
    print(runner.describe(args, asked=runner.names_scale(argv)), flush=True)
    if args.dry_run:
        runner.run(args)
        return
    notebook = ROOT / "notebooks" / f"{args.paper}.ipynb"
    given = dict(argument.split("=", 1) for argument in argv)
    parameters = {key: text for key, text in given.items() if key not in ("paper", "dry_run")}
    check_parameters(notebook, parameters)
    page = execute(notebook, parameters, Path(args.out).expanduser() / args.paper / args.scale)
    print(f"Notebook: {page.with_suffix('.ipynb')}\nAs a page: {page}")


def check_parameters(notebook: Path, parameters: Mapping[str, str]) -> None:
    """UsageError names the parameters that the notebook does not declare: papermill would only warn and ignore them."""
    import papermill

    declared = papermill.inspect_notebook(str(notebook))
    unknown = [name for name in parameters if name not in declared]
    if unknown:
        raise UsageError(f"{notebook.name} has no parameter {', '.join(unknown)}; allowed: {', '.join(declared)}")


def execute(notebook: Path, parameters: Mapping[str, str], folder: Path) -> Path:
    """Run a notebook in this interpreter's kernel from the repository root; returns the path of its HTML in `folder`.

    RuntimeError names the failing cell, its error and where the partial notebook is kept.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    failed = folder / f"{notebook.stem}.failed.ipynb"
    with tempfile.TemporaryDirectory() as scratch, own_kernel(Path(scratch, "jupyter")):
        draft = Path(scratch, notebook.name)
        try:
            papermill.execute_notebook(
                str(notebook), str(draft), dict(parameters), kernel_name=KERNEL, cwd=str(ROOT), progress_bar=False,
                stdout_file=sys.stdout, stderr_file=sys.stderr, start_timeout=START_SECONDS,
            )  # fmt: skip
        except (PapermillExecutionError, RuntimeError) as error:  # a cell raised, or the kernel died
            if draft.exists():
                write_atomic(failed, portable(draft.read_text(encoding="utf-8")).encode())
            raise RuntimeError(f"{notebook.name}, {reason(error)}; as far as it got: {failed}") from error
        text = linked(portable(draft.read_text(encoding="utf-8")), folder)
    page = folder / f"{notebook.stem}.html"
    write_atomic(page, html(text, notebook.stem).encode())
    write_atomic(folder / notebook.name, text.encode())
    failed.unlink(missing_ok=True)
    return page


def linked(text: str, folder: Path) -> str:
    """The notebook with its links, which are those of notebooks/, as seen from `folder`."""
    folder = folder.resolve()
    up = Path(os.path.relpath(ROOT, folder)) if folder.is_relative_to(ROOT) else ROOT
    return text.replace("](../", f"]({up.as_posix()}/")


def reason(error: Exception) -> str:
    """One line on why a notebook stopped: the cell and its error, or the kernel's end."""
    if not hasattr(error, "ename"):
        return f"the kernel stopped: {' '.join(str(error).split())}"
    words = " ".join(str(error.evalue).split())
    return f"cell {error.exec_count}: {error.ename}: {words}"


@contextmanager
def own_kernel(folder: Path) -> Iterator[None]:
    """In this block jupyter's kernel is this interpreter, without the user's own kernels and start-up files."""
    spec = folder / "kernels" / KERNEL
    spec.mkdir(parents=True)
    kernel = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", "--log-level=CRITICAL"],
        "env": {"PYDEVD_DISABLE_FILE_VALIDATION": "1"},  # no debugger is attached: nothing to warn about
        "display_name": "Python 3",
        "language": "python",
    }
    (spec / "kernel.json").write_text(json.dumps(kernel), encoding="utf-8")
    places = {"JUPYTER_PATH": folder, "JUPYTER_RUNTIME_DIR": folder / "runtime", "IPYTHONDIR": folder / "ipython"}
    before = {name: os.environ.get(name) for name in places}
    os.environ.update({name: str(place) for name, place in places.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def portable(text: str) -> str:
    """The text of an executed notebook without this machine's paths, which say nothing elsewhere."""
    content = json.loads(text)
    for name in ("input_path", "output_path"):
        content["metadata"].get("papermill", {}).pop(name, None)
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    for folder in (ROOT, Path(sys.prefix)):
        text = text.replace(json.dumps(f"{folder}{os.sep}", ensure_ascii=False)[1:-1], "")
    return text


def html(text: str, title: str) -> str:
    """An executed notebook as one page of HTML, its pictures inside."""
    import nbformat
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_notebook_node(
        nbformat.reads(text, as_version=4), resources={"metadata": {"name": title}}
    )
    return page


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
