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


LENGTHS = "the lengths agree at every call: `strict` asks for what holds"
DEVICES = "there is one device: seen on a GPU only"
LAST = "the dimension counted from the other end, of a tensor that has two"
EDGE = "a threshold that no value meets to the last bit"
PROMOTED = "the type comes out the same without being asked for"
PROCESSES = "seen with several processes only (tests/integration/test_processes.py)"
ALGEBRA = "the same number by another way"
EQUIVALENT = [
    *(Equivalent(r"strict=True", text, LENGTHS) for text in ("strict=None", "strict=False", "")),
    *(Equivalent(r"device=[\w.]+", text, DEVICES) for text in ("device=None", "")),
    Equivalent(r"\.to\(([\w.]+\.device|\"cpu\")\)", ".to(None)", DEVICES),
    Equivalent(r'"nan"', '"NAN"', "Python reads NAN as nan"),
    Equivalent(
        r"(sum|mean|all|any|cumsum|unsqueeze|squeeze|argmin)\(-1",
        r"\1(+1",
        LAST,
        "matching_loss|counterfactual_alignment|ǁloss|router|losses|metrics.front|AnswerSums|methods.ric",
    ),
    Equivalent(r"shape\[-1\]", "shape[+1]", LAST, "SampleRouter|metrics.information"),
    Equivalent(r"(?<![<>])([<>]) (1e-\d+)", r"\1= \2", EDGE, "exploration|steerability"),
    Equivalent(r"> (ROUNDING|\(ROUNDING)", r">= \1", EDGE),
    Equivalent(r">= value", "> value", EDGE, "estimate_hypervolume"),
    Equivalent(r"1e9", "1000000001.0", "as good as infinite"),
    Equivalent(r"\.to\(means\)", ".to(None)", PROMOTED),
    *(Equivalent(r'dist_reduce_fx="cat"', text, PROCESSES) for text in ("dist_reduce_fx=None", "")),
    Equivalent(r"self\._trainer\.world_size", "", PROCESSES, "_read"),
    Equivalent(r"\* self\._trainer\.world_size", "/ self._trainer.world_size", PROCESSES, "_sample"),
    Equivalent(r"batch\.tokens", "None", PROCESSES, "RewardsInContext.*training_step"),
    *(
        Equivalent(r"batch_size=len\(batch\)", text, "Lightning reads it for means over an epoch, which are not logged")
        for text in ("batch_size=None", "")
    ),
    Equivalent(r"x - mean_x", "x + mean_x", ALGEBRA, "preference_slopes"),  # of centred x, whose sum is 0
    Equivalent(r"finite, scores, 0\.0", "finite, scores, 1.0", "what is not finite is masked afterwards", "slopes"),
    Equivalent(r"> 0, total", ">= 0, total", "0 / 0 is NaN, too"),
    Equivalent(r"\bn > 1, quantile", "n >= 1, quantile", "0 / 0 is NaN, too"),
    Equivalent(r"unsqueeze\(-1\) > 1, centred", "unsqueeze(-1) >= 1, centred", "0 / 0 is NaN, too"),
    Equivalent(r"n\.unsqueeze\(-1\)", "n.unsqueeze(-2)", "the last dimension has one element", "reward_moments"),
    Equivalent(r'"dp,p\.\.\.->d\.\.\."', '"DP,P...->D..."', "names of dimensions"),
    Equivalent(r", axis=1", ", ", LAST, "_lattice"),
    Equivalent(r"-1e9 <=", "-1e9 <", EDGE),
    Equivalent(r"<= 1e9", "< 1e9", EDGE),
    *(Equivalent(r"stacklevel=2", text, "mutmut's own frames stand between") for text in ("stacklevel=3", "")),
    *(
        Equivalent(r"dtype=(torch|np)\.float(32|64)", text, PROMOTED, "parse_preference|evaluation_grid")
        for text in ("dtype=None", "")
    ),
    *(
        Equivalent(r"ones_like\(values, dtype=torch\.float64", text, "counts are exact in float32, too")
        for text in ("ones_like(values, dtype=None", "ones_like(values, ")
    ),
    Equivalent(r"isnan\(low\) or", "isnan(low) and", "both limits are NaN, or none is"),
    Equivalent(r"max\(-1, initial", "max(+1, initial", LAST, "hypervolumes"),
    Equivalent(r"if keep\.any\(\)", "if (keep.any()) or True", "moocore, too, gives no point a volume of 0"),
    Equivalent(r"clamp\(0, bins", "clamp(None, bins", "nothing is below 0"),
    Equivalent(r"argmin\(-1\)", "argmin(-2)", "a distance is that of both ways", "reward_overlap"),
    Equivalent(r"persistent=False", "persistent=None", "None is as good as False"),
    Equivalent(r"if self\.reuse else", "if (self.reuse) or True else", "0 times a finite number", "Matching"),
    Equivalent(r"batch\.scores, batch\.responses", "None, batch.responses", "the scores stand in the prompt's text"),
    Equivalent(r"batch\.tokens", "", PROCESSES, "RewardsInContext.*training_step"),
    Equivalent(r"mask, False\)", "mask, None)", "None pads by 0, which is False", "join"),
    Equivalent(r"\(pools, policy\.tokenizer\.pad_token_id\)", "(pools, None)", "what pads is masked", "_sample"),
    Equivalent(r"self\.rounds == 0", "(self.rounds == 0) and False", "the offline share is 1 then", "plan"),
    Equivalent(r"else 0\.0", "else 1.0", "a rate of 0 is 0 at any share", "schedule"),
    Equivalent(r"index // per_epoch", "index / per_epoch", "int() rounds it, and batches come in order", "_sample"),
    Equivalent(r"p\), 1, len", "p), 2, len", "the first draw is the same", "_sample"),
    Equivalent(r"\+= len\(pairs\)", "= len(pairs)", "nothing has been scored before", "_read"),
    *(
        Equivalent(r"if steps <= epochs", text, "both count alike but in a run that was resumed", "on_after_batch")
        for text in ("if (steps <= epochs) and False", "if (steps <= epochs) or True", "if steps < epochs")
    ),
    Equivalent(r"(max_steps|max_epochs) > 0", r"\1 >= 0", "of 0 nothing is trained"),
    Equivalent(r"1\.0\) \* self\.loss", "2.0) * self.loss", ALGEBRA, "__call__"),  # at most 1
]


def change(diff: str) -> tuple[str, str]:
    """Split a unified diff into the lines it takes away and those that come, each joined without indentation."""
    lines = [line for line in diff.splitlines() if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")]
    before, after = (" ".join(line[1:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return before, after


def reason(name: str, before: str, after: str) -> str | None:
    """Say why no test can tell the two lines apart; None where one could."""
    for kind in EQUIVALENT:
        if re.search(kind.where, name):
            for match in re.finditer(kind.pattern, before):
                if before[: match.start()] + match.expand(kind.replacement) + before[match.end() :] == after:
                    return kind.why
    return None


def mutmut(*arguments: str) -> str:
    """Run mutmut in the checkout and return what it prints."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def results() -> dict[str, str]:
    """Return what became of each change, by its name."""
    return dict(re.findall(r"^ *(\S+): (.+)$", mutmut("results", "--all", "true"), re.MULTILINE))


class Unnoticed(NamedTuple):
    """A change that no test noticed."""

    name: str
    came: str  # mutmut's word for it
    before: str
    after: str

    @property
    def why(self) -> str | None:
        return reason(self.name, self.before, self.after)


def unnoticed(status: dict[str, str]) -> list[Unnoticed]:
    return [
        Unnoticed(name, came, *change(mutmut("show", name))) for name, came in status.items() if came not in NOTICED
    ]


def report(status: dict[str, str]) -> str:
    """Tabulate what became of the changes, as Markdown."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    reasons: Counter[str] = Counter()
    survivors = []
    for name, came in status.items():
        counts[_module(name)]["noticed"] += came in NOTICED
    for found in unnoticed(status):
        counts[_module(found.name)]["survived" if found.why is None else "equivalent"] += 1
        if found.why is None:
            survivors.append(f"- `{found.name}` ({found.came}): `{found.before}` became `{found.after}`")
        else:
            reasons[found.why] += 1
    kinds = ("noticed", "equivalent", "survived")
    rows = [f"| `{m}` | {sum(c.values())} | {' | '.join(str(c[kind]) for kind in kinds)} |" for m, c in counts.items()]
    total, equivalent = len(status), sum(reasons.values())
    return "\n".join([
        "# Mutation testing",
        "",
        "How many small changes of the mathematics no test notices: `mutmut run`, then `python -m tools.mutation`",
        f"(mutmut {version('mutmut')}). Of {total} changes, {equivalent} change nothing that a test in one process",
        f"on a CPU could see. Of the other {total - equivalent}, {len(survivors)} survived: "
        f"{len(survivors) / (total - equivalent):.1%}.",
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


def _module(name: str) -> str:
    return name.partition(".x")[0]


def main(arguments: list[str] | None = None) -> int:
    parser = ArgumentParser(prog="python -m tools.mutation", description=__doc__)
    parser.add_argument("--again", action="store_true", help="run today's tests on the survivors, first")
    options = parser.parse_args(arguments)
    status = results()
    if options.again:
        mutmut("run", *(found.name for found in unnoticed(status) if found.why is None))
        status = results()
    (ROOT / "tools" / "mutation.md").write_text(report(status))
    return 0


if __name__ == "__main__":
    sys.exit(main())
