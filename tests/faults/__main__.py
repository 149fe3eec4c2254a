"""The whole fault campaign, part after part: `python -m tests.faults`, without arguments.  It takes hours.

Each part writes its section of tables/reliability.md; one that fails is said, and the others go on.
"""

from __future__ import annotations

import subprocess
import sys

TWO_CELLS = "only=table1/cifar-10/random/convnet/1,table1/cifar-10/dm/convnet/1"
PARTS = (
    ("tests.faults.single",),
    ("tests.faults.campaign", "kills=100", "dense=45", "minutes=90"),
    ("tests.faults.campaign", TWO_CELLS, "kills=100", "dense=2", "minutes=20"),
    ("tests.faults.ray_campaign",),
)


def main() -> int:
    if sys.argv[1:]:  # a question for help must not start hours of work
        asked = sys.argv[1:] in (["help"], ["-h"], ["--help"])
        print(__doc__ if asked else f"unknown: {' '.join(sys.argv[1:])}; allowed: help")
        return 0 if asked else 2
    failed = []
    for module, *arguments in PARTS:
        command = [sys.executable, "-m", module, *arguments]
        print(" ".join(command[1:]), flush=True)
        if subprocess.run(command).returncode:
            failed.append(" ".join([module, *arguments]))
    print("failed: " + "; ".join(failed) if failed else "all parts ended as they should")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
