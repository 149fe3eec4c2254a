"""The page of the fault campaigns: one section a campaign, from the counts that each keeps as JSON beside it."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict
from pathlib import Path

import torch

from common.hardware import made
from common.store import write_atomic

PAGE = "tables/reliability.md"


def command(module: str, options) -> str:
    """What makes a campaign again: the options that are not empty, apart from where its page lies."""
    given = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in asdict(options).items()}
    return " ".join(["python -m", module, *(f"{k}={v}" for k, v in given.items() if v != "" and k != "report")])


def keep(page: str, section: dict, seconds: float) -> None:
    """Prints a section and keeps it as <page without suffix>/<title>.json; the page is made anew from all of these.

    section: title, command, how, counts (column -> row -> number), cells, limits.
    """
    section |= {"seconds": round(seconds), "system": platform.system(), **made(torch.device("cpu"))}
    print(rendered(section))
    if page:
        folder, name = Path(page).with_suffix(""), re.sub(r"\W+", "_", section["title"].lower())
        write_atomic(folder / f"{name}.json", (json.dumps(section, indent=1) + "\n").encode())
        sections = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
        write_atomic(page, "\n".join(["# Reliability\n", *map(rendered, sections)]).encode())


def rendered(section: dict) -> str:
    """A campaign as Markdown: what was done, one column of counts for each kind of fault, where and by what."""
    columns = section["counts"]
    rows = list(dict.fromkeys(row for counts in columns.values() for row in counts))
    lines = [f"## {section['title']}", "", f"Written by `{section['command']}`.", "", section["how"], ""]
    lines += [f"| what | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {row} | {' | '.join(str(counts.get(row, '')) for counts in columns.values())} |" for row in rows]
    packages = ", ".join(f"{name} {version}" for name, version in section["versions"].items())
    cells = [f"- `{cell}`" for cell in section["cells"]]
    lines += ["", section["limits"], "", *cells, *([""] if cells else [])]
    where = f"{section['hardware']}, {section['system']}; commit {section['commit']}"
    return "\n".join([*lines, f"{section['seconds']} s on {where}; {packages}.", ""])
