"""Mutation testing of the mathematics: which small changes of the code no test notices.

``mutmut run`` changes one expression at a time, of the files that ``[tool.mutmut]`` names in ``pyproject.toml``, and
runs the tests that reach it; a run that was stopped goes on with what is missing. ``python -m tools.mutation`` then
writes ``tools/mutation.md``: the changes of each module, and every survivor. With ``--again`` the survivors meet
today's tests first. Needs ``pip install -c tools/constraints.txt -e ".[test,mutation]"``.
"""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import ArgumentParser
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NOTICED = ("killed", "timeout")  # a loop that does not end is noticed, too


class Equivalent(NamedTuple):
    """A kind of change that no test can tell from the code."""

    pattern: str  # what stood there, anywhere in the line
    replacement: str  # what came in its place, as ``re.sub`` writes it
    why: str
    where: str = ""  # the functions it holds for, as a pattern of their names; everywhere by default


LENGTHS = "the lengths agree at every call (`strict`)"
DEVICES = "there is one device: seen on a GPU only"
LAST = "1 and -1 name the same dimension, or the only one"
THRESHOLD = "two floats that are equal to the last bit, or a bound that no value reaches"
EQUIVALENT = [
    *(Equivalent(r"strict=True", text, LENGTHS) for text in ("strict=None", "strict=False", "")),
    *(Equivalent(r"device=[\w.]+", text, DEVICES) for text in ("device=None", "")),
    Equivalent(r"\.to\([\w.]+\.device\)", ".to(None)", DEVICES),
    Equivalent(r'"nan"', '"NAN"', "Python reads NAN and nan alike"),
]


def change(diff: str) -> tuple[str, str]:
    """Splits a unified diff into the lines it takes away and those that come, each joined without indentation."""
    lines = [line for line in diff.splitlines() if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")]
    before, after = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return before, after


def reason(name: str, before: str, after: str) -> str | None:
    """Says why no test can tell the two lines apart; None where one could."""
    for kind in EQUIVALENT:
        if re.search(kind.where, name):
            for match in re.finditer(kind.pattern, before):
                if before[: match.start()] + match.expand(kind.replacement) + before[match.end() :] == after:
                    return kind.why
    return None


def mutmut(*arguments: str) -> str:
    """Runs mutmut in the checkout and returns what it prints."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def results() -> dict[str, str]:
    """What became of each change, by its name."""
    return dict(re.findall(r"^ *(\S+): (.+)$", mutmut("results", "--all", "true"), re.MULTILINE))


def report(status: dict[str, str]) -> str:
    """Tabulates what became of the changes, as Markdown."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: Counter[str] = Counter()
    survivors = []
    for name, came in status.items():
        module = name.partition(".x")[0]
        if came in NOTICED:
            counts[module]["noticed"] += 1
            continue
        before, after = change(mutmut("show", name))
        why = reason(name, before, after)
        counts[module]["survived" if why is None else "equivalent"] += 1
        if why is None:
            survivors.append(f"- `{name}` ({came}): `{before}` became `{after}`")
        else:
            reasons[why] += 1
    kinds = ("noticed", "equivalent", "survived")
    rows = [f"| `{m}` | {sum(c.values())} | {' | '.join(str(c[kind]) for kind in kinds)} |" for m, c in counts.items()]
    total, equivalent = len(status), sum(reasons.values())
    return "\n".join([
        "# Mutation testing",
        "",
        "How many small changes of the mathematics no test notices: `mutmut run`, then `python -m tools.mutation`",
        f"(mutmut {version('mutmut')}). Of {total} changes, {equivalent} change nothing that a test could see. Of the "
        f"other {total - equivalent}, {len(survivors)} survived: {len(survivors) / (total - equivalent):.1%}.",
        "",
        "| module | changes | noticed | equivalent | survived |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "Why the equivalent ones are:",
        "",
        *(f"- {count}: {why}" for why, count in reasons.most_common()),
        "",
        "The survivors:",
        "",
        *(survivors or ["none"]),
        "",
    ])  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m tools.mutation", description=__doc__)
    parser.add_argument("--again", action="store_true", help="run the tests on the survivors again, first")
    options = parser.parse_args(arguments)
    status = results()
    if options.again:
        mutmut("run", *(name for name, came in status.items() if came not in NOTICED))
        status = results()
    (ROOT / "tools" / "mutation.md").write_text(report(status))
    return 0


if __name__ == "__main__":
    sys.exit(main())
