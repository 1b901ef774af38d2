"""Format, lint and types in one command: ``python tools/check.py`` (``--fix`` mends what can be mended)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATHS = ["miepo", "tests", "tools"]


def main() -> int:
    fix = "--fix" in sys.argv[1:]
    commands = [
        ["ruff", "check", *(["--fix"] if fix else []), *PATHS],
        ["ruff", "format", *([] if fix else ["--check"]), *PATHS],
        ["mypy"],
    ]
    results = []
    for command in commands:
        print("$", *command, flush=True)
        results.append(subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode)
    return int(any(results))


if __name__ == "__main__":
    sys.exit(main())
