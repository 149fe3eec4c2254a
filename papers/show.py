"""What the notebooks show of a finished run: tables and figures that it wrote, accuracies, what has no result."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from IPython.display import Image, Markdown, display

from papers.runner import Run

__all__ = ["Shown"]


@dataclass(frozen=True)
class Shown:
    """A run, for the cells of a notebook."""

    run: Run

    def table(self, name: str) -> None:
        """Show a table as it was written into `out`."""
        file = self.run.folder / f"{name}.md"
        if file.is_file():
            self.page(file, "##")
        else:
            display(Markdown(f"*{name}: none of its cells has a result.*"))

    def figure(self, name: str) -> None:
        """Show a figure as it was written into `out`."""
        file = self.run.folder / f"{name}.png"
        display(Image(filename=str(file)) if file.is_file() else Markdown(f"*{name}: nothing that it shows was made.*"))

    def accuracies(self, name: str, **wanted) -> list[dict]:
        """The results of a table or figure whose fields have the wanted values, smallest IPC first."""
        found = [r for r in self.run.results.values() if r["table"] == name and wanted.items() <= r.items()]
        return sorted(found, key=lambda r: r["ipc"] or 0)

    def states(self) -> None:
        """Show how many cells have a result, and why the others have none."""
        counts = Counter(
            "has a result" if p.cell.id in self.run.results else f"no result: {p.why or 'not made'}"
            for p in self.run.planned
        )
        display(Markdown("\n".join(f"- {count} cells: {what}" for what, count in counts.most_common())))

    def latest(self) -> None:
        """Show what the newest result file says of itself."""
        if not self.run.results:
            return
        example = max(self.run.results.values(), key=lambda r: r["finished"])
        names = ("cell", "run_on", "values", "seeds", "seconds", "peak_memory_bytes", "bytes", "hardware", "command")
        lines = [f"| {name} | {example[name]} |" for name in names]
        display(Markdown("\n".join(["| latest cell | |", "|---|---|", *lines])))

    def page(self, path: str | Path, deeper: str = "#") -> None:
        """Show a page of Markdown, its headings so many levels deeper."""
        file = Path(path)
        text = file.read_text(encoding="utf-8") if file.is_file() else f"*{path}: not made at this scale.*"
        display(Markdown(re.sub("^#", f"#{deeper}", text, flags=re.MULTILINE)))
