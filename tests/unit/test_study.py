"""Studies: their files, their statistics, the synthetic language and its true front."""

from __future__ import annotations

import fcntl
import re
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from miepo.cli.command import main as miepo_main
from miepo.errors import UserError
from miepo.methods import TargetConditioning
from miepo.metrics import hypervolume
from tools.study import analysis, language, report, rows
from tools.study.__main__ import main
from tools.study.report import format_estimate
from tools.study.study import Method, Run, Study, arguments, execute, fingerprints, parts_hash, read_study, runs_of

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "configs/studies").glob("*.yaml"))
GOOD = """
config: configs/studies/tasks/tiny.yaml
seeds: 2
baseline: a
methods:
  a: {config: [configs/methods/mo_odpo.yaml]}
  b: {control: a, set: {model.learning_rate: 0.5}}
"""


def write(folder: Path, text: str) -> Path:
    (folder / "s.yaml").write_text(text)
    return folder / "s.yaml"


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.stem)
def test_every_study_can_be_read_and_has_a_header(file: Path) -> None:
    study = read_study(file)
    assert study.baseline in study.methods
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    for part in ("Purpose:", "Command:", "Run on:", "Result:"):
        assert any(line.startswith(f"# {part}") for line in header), part
    assert any(f"configs/studies/{file.name}" in line for line in header)


@pytest.mark.slow
@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.stem)
def test_every_method_of_a_study_is_a_configuration(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = read_study(file)
    for run in runs_of(replace(study, seeds=[3]), tmp_path):
        with pytest.raises(SystemExit, match=r"^0$"):
            miepo_main([*arguments(study, run, tmp_path), "--print_config"])
        assert yaml.safe_load(capsys.readouterr().out)["seed_everything"] == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("baseline: a", "baseline: c", "baseline names the unknown method 'c': there are a, b"),
        ("control: a", "control: z", r"methods.b.control names the unknown method 'z'"),
        (
            "seeds: 2",
            "seeds: 2\nmetrics: [hv, mpi]",
            "unknown metric mpi: there are slope, median_slope, side, hv_corrected",
        ),
        ("seeds: 2", "seeds: 0", "seeds must be a number of seeds or a list of them, got 0"),
        ("seeds: 2", "seeds: [1, 1]", r"expected different seeds, got \[1, 1\]"),
        ("seeds: 2", "seeds: 2\nseed: 3", "expected the keys .*, got seed"),
        ("seeds: 2\n", "", "expected the keys seeds, got none"),
        ("seeds: 2", "seeds: 2\nprocesses: 0", "processes must be a number of at least 1, got 0"),
        ("seeds: 2", "seeds: 2\nmetrics: hv", "metrics must be a list of slope, .*, got 'hv'"),
        ("set: {model.learning_rate: 0.5}", "set: [1]", r"methods.b.set must map settings to values, got \[1\]"),
        ("[configs/methods/mo_odpo.yaml]", "configs", "methods.a.config must be a list of names, got 'configs'"),
        ("control: a", "control: [[a]]", "methods.b.control must be a list of names"),
        ("baseline: a", "baseline: [a]", "baseline names the unknown method"),
        ("control: a", "kontrol: a", "method 'b' takes config, control, label, set, got kontrol"),
        ("mo_odpo.yaml", "mo_odp.yaml", "expected a configuration at 'configs/methods/mo_odp.yaml'"),
        ("methods:", "methods: {", "expected YAML, got text that is not"),
        (
            "seeds: 2",
            "seeds: 2\nat_equal_kl: [a, c]",
            r"at_equal_kl must be a list of methods, of a, b, got \['a', 'c'\]",
        ),
        ("seeds: 2", "seeds: 2\nat_equal_kl: a", "at_equal_kl must be a list of methods, of a, b, got 'a'"),
    ],
)
def test_a_bad_study_file_is_one_sentence(old: str, new: str, message: str, tmp_path: Path) -> None:
    read_study(write(tmp_path, GOOD))
    with pytest.raises(UserError, match=message):
        read_study(write(tmp_path, GOOD.replace(old, new)))


def test_files_that_a_study_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.yaml").write_bytes(b"seeds: \xff")
    (tmp_path / "file").touch()
    for given, said in (
        ([str(tmp_path / "s.yaml")], "expected YAML, got text that is not"),
        ([str(ROOT / "configs/studies/tiny.yaml"), "--out", str(tmp_path / "file")], "--out: expected a folder, got"),
        (
            [str(ROOT / "configs/studies/tiny.yaml"), "--rows", str(tmp_path / "no/rows.jsonl")],
            "--rows: expected a file in",
        ),
    ):
        assert main(given) == 2
        assert said in capsys.readouterr().err


def test_the_command_of_a_run(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, GOOD + "set: {data.prompts: '{parts}/train.jsonl'}\n"))
    runs = runs_of(study, tmp_path)
    assert [(r.method.name, r.seed) for r in runs] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    pairs = dict(pairwise(arguments(study, runs[3], tmp_path)))
    assert pairs["--data.prompts"] == f"{tmp_path}/parts/train.jsonl"
    assert (pairs["--seed_everything"], pairs["--model.learning_rate"]) == ("1", "0.5")


def test_where_a_run_computes_is_no_setting_of_it(tmp_path: Path) -> None:
    """Its row names device and precision, so that another machine may go on with a study, and no run is told apart."""
    study = read_study(write(tmp_path, GOOD))
    elsewhere = replace(study, machine={"trainer.accelerator": "gpu", "model.policy.init_args.dtype": "float32"})
    pairs = dict(pairwise(arguments(elsewhere, runs_of(elsewhere, tmp_path)[0], tmp_path)))
    assert (pairs["--trainer.accelerator"], pairs["--model.policy.init_args.dtype"]) == ("gpu", "float32")
    assert fingerprints(elsewhere, tmp_path) == fingerprints(study, tmp_path)


# -- statistics --------------------------------------------------------------------------------------------------------


def table(values: dict[str, list[float]], steps: dict[str, int] | None = None) -> pd.DataFrame:
    rows = [
        {
            "method": m,
            "seed": s,
            "step": (steps or {}).get(m, 5),
            "scored_responses": 10,
            "front/hv": v,
            "front/mip": 1.0,
        }
        for m, column in values.items()
        for s, v in enumerate(column)
    ]
    return pd.DataFrame(rows)


def study_of(*names: str) -> Study:
    methods = {n: Method(n, n.upper()) for n in names}
    return Study("s", ROOT, methods, [0, 1, 2], names[0], ["hv", "mip"], {}, None, None, 1, 1, ROOT / "none")


def test_a_paired_difference_is_taken_seed_by_seed() -> None:
    """The seeds differ by far more than the methods; the pairing removes that."""
    a = [1.0, 5.0, 9.0, 13.0, 17.0, 21.0]
    last = analysis.final(table({"a": a, "b": [x + d for x, d in zip(a, [0.5, 0.4, 0.6, 0.5, 0.4, 0.6], strict=True)]}))
    difference = analysis.paired(study_of("a", "b"), last, "b", "a")["front/hv"]
    assert difference.mean == pytest.approx(0.5)
    assert difference.low is not None
    assert 0.39 < difference.low < difference.mean < difference.high < 0.61
    assert difference.excludes_zero
    assert not analysis.paired(study_of("a", "b"), last, "b", "a")["front/mip"].excludes_zero


def test_only_seeds_that_both_have_are_paired() -> None:
    last = analysis.final(table({"a": [1.0, 5.0], "b": [2.0, 6.0, 100.0]}))
    difference = analysis.paired(study_of("a", "b"), last, "b", "a")["front/hv"]
    assert (difference.mean, difference.seeds) == (1.0, 2)


@pytest.mark.parametrize("b", [[1.5, 5.5 + 1e-6], [1.5, 5.5, 9.5]])
def test_two_seeds_or_values_that_are_alike_are_never_called_clear(b: list[float]) -> None:
    last = analysis.final(table({"a": [1.0, 5.0, 9.0], "b": b}))
    difference = analysis.paired(study_of("a", "b"), last, "b", "a")["front/hv"]
    assert difference.low is not None
    assert 0 < difference.low <= 0.5
    assert not difference.excludes_zero


def test_runs_of_different_precision_are_no_pairs() -> None:
    rows = table({"a": [1.0, 5.0, 9.0], "b": [1.5, 5.4, 0.0]})
    rows["precision"] = ["float32"] * 5 + ["bfloat16"]
    last = analysis.final(rows)
    difference = analysis.paired(study_of("a", "b"), last, "b", "a")["front/hv"]
    assert (difference.mean, difference.seeds) == (pytest.approx(0.45), 2)
    assert analysis.relative(last, "b", "a", "front/hv").mean == pytest.approx((3.45 - 3) / 3)


def test_one_seed_has_no_interval() -> None:
    last = analysis.final(table({"a": [1.0], "b": [2.0]}))
    value = analysis.summary(study_of("a", "b"), last)["a"]["front/hv"]
    assert (value.mean, value.low, value.high) == (1.0, None, None)
    assert format_estimate(value) == "1.000"
    assert not analysis.paired(study_of("a", "b"), last, "b", "a")["front/hv"].excludes_zero
    assert analysis.relative(last, "b", "a", "front/hv").low is None


def test_different_budgets_are_refused() -> None:
    with pytest.raises(UserError, match=r"expected runs of one budget, got different steps: a has 5; b has 6"):
        analysis.final(table({"a": [1.0], "b": [2.0]}, {"b": 6}))


def test_a_ratio_to_next_to_nothing_has_no_interval() -> None:
    last = analysis.final(table({"a": [0.1, -0.3, 0.25], "b": [1.0, 2.0, 3.0]}))
    assert analysis.relative(last, "b", "a", "front/hv").low is None
    last = analysis.final(table({"a": [1.0, float("nan"), 1.5, 2.0], "b": [2.0, 2.0, 2.5, float("nan")]}))
    assert (
        analysis.relative(last, "b", "a", "front/hv").mean,
        analysis.relative(last, "b", "a", "front/hv").seeds,
    ) == (0.8, 2)


def test_how_many_comparisons_there_are_is_said() -> None:
    assert "as about 1.8 of these 36 would" in report.chance({"a": 3, "b": 6, "c": 1}, ["a", "b", "b", "c"], 12)
    assert report.chance({"a": 2}, ["a"], 12) == "With fewer than 3 seeds no interval is called clear of zero."


def test_relative_margin_and_closed_gap() -> None:
    last = analysis.final(table({"a": [2.0, 2.0, 2.0], "b": [3.0, 3.0, 3.0]}))
    assert analysis.relative(last, "b", "a", "front/hv").mean == pytest.approx(0.5)
    gap = analysis.relative(last, "b", "a", "front/hv", ceiling=6.0)
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.25, 0.25, 0.25))


def test_the_true_fronts_mip_by_hand() -> None:
    vertices, grid = np.array([[0.0, 4.0], [3.0, 3.0], [4.0, 0.0]]), np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]])
    assert analysis.true_mip(vertices, grid) == pytest.approx((4 + 3 + 4) / 3)


def moved_table(gain: float) -> pd.DataFrame:
    """Two methods of six seeds: HV is 0.2 for each nat and what the seed adds; the second moves twice as far."""
    generator = np.random.default_rng(0)
    rows = []
    for seed, of_seed in enumerate(generator.normal(0, 1, 6)):
        for method, distance in (("a", 10.0), ("b", 20.0)):
            kl = distance + generator.normal(0, 3)
            hv = 0.2 * kl + of_seed + generator.normal(0, 0.1) + gain * (method == "b")
            rows.append({"method": method, "seed": seed, "step": 5, "scored_responses": 10, "front/hv": hv, "kl": kl})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_what_distance_brings_is_taken_off(gain: float) -> None:
    study, last = study_of("a", "b"), analysis.final(moved_table(gain))
    assert analysis.paired(study, last, "b", "a")["front/hv"].mean > 1.5 + gain  # most of it for having moved
    nat, methods = analysis.at_equal(study, last, ["a", "b"], "kl")["front/hv"]
    assert nat.mean == pytest.approx(0.2, abs=0.05)
    assert nat.excludes_zero
    difference = methods["b"]
    assert difference.low is not None
    assert difference.high is not None
    assert difference.low < gain < difference.high
    assert difference.high - difference.low < 1
    assert difference.excludes_zero == (gain > 0)


def test_intervals_at_equal_distance_are_those_of_least_squares() -> None:
    """By the residuals of a regression written otherwise: what the other columns explain is taken off first."""
    last = analysis.final(moved_table(1.0))
    _, methods = analysis.at_equal(study_of("a", "b"), last, ["b"], "kl")["front/hv"]
    others = pd.get_dummies(last.seed).to_numpy(float)
    others = np.column_stack([others, last.kl])

    def rest(column: np.ndarray) -> np.ndarray:
        return column - others @ np.linalg.lstsq(others, column, rcond=None)[0]

    x, y = rest((last.method == "b").to_numpy(float)), rest(last["front/hv"].to_numpy(float))
    value = x @ y / (x @ x)
    half = 2.7764451 * np.sqrt(((y - value * x) ** 2).sum() / 4 / (x @ x))  # t of 12 runs less 8 parameters
    found = methods["b"]
    assert (found.mean, found.low, found.high) == pytest.approx((value, value - half, value + half))


def test_no_comparison_at_equal_distance_without_enough_runs() -> None:
    rows = moved_table(0.0)
    assert analysis.at_equal(study_of("a", "b"), rows[rows.seed < 1], ["a", "b"], "kl") == {}
    assert analysis.at_equal(study_of("a", "b"), rows.assign(kl=3.0), ["a", "b"], "kl") == {}


def test_median_slope_and_how_many_are_clear() -> None:
    kept = {"step": 1, "slope/a": 1.0, "slope/b": 5.0, "slope/c": 2.0, "slope_low/a": 0.1, "slope_low/b": -0.1}
    last = analysis.tidy({("m", 0): [{"method": "m", "seed": 0, **kept}]})
    assert last["median_slope"].tolist() == [2.0]
    assert analysis.clear_slopes(last, "m") == (1, 2)


def test_a_title_with_a_bar_stays_one_column_in_markdown() -> None:
    row = {"label": "a", "cells": [{"text": "1", "clear": True}]}
    section = {"title": "t", "note": "n", "head": ["I(Y;W|X)"], "rows": [row]}
    assert report.markdown([section], [], {}, []).splitlines()[4:7] == [
        r"| method | I(Y;W\|X) |",
        "|---|---|",
        "| a | **1** |",
    ]


def test_only_clear_differences_are_bold_in_the_page() -> None:
    cells = [{"text": "+1 [+0.5, +1.5]", "clear": True}, {"text": "+1 [-0.5, +1.5]", "clear": False}]
    section = {"title": "t", "note": "n", "head": ["HV", "MIP"], "rows": [{"label": "a", "cells": cells}]}
    page = jinja2.Environment(autoescape=True).from_string(report.PAGE.read_text()).render(
        name="s", sections=[section], pictures={}, failures={}, unfinished=[], work={}, reference_point=-1, ceilings={}
    )  # fmt: skip
    assert '<td class="clear">+1 [+0.5, +1.5]</td><td>+1 [-0.5, +1.5]</td>' in page


def test_interval_of_the_mean_covers_it_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    intervals = [analysis.estimate(rng.normal(3.0, 1.0, 6)) for _ in range(400)]
    covered = np.mean([e.low <= 3.0 <= e.high for e in intervals])
    assert 0.92 < covered < 0.98
    draws = rng.normal([[2.0], [3.0]], 0.5, (200, 2, 10)).tolist()
    pairs = [analysis.final(table({"a": a, "b": b})) for a, b in draws]
    ratios = [analysis.relative(last, "b", "a", "front/hv") for last in pairs]
    assert 0.9 < np.mean([r.low <= 0.5 <= r.high for r in ratios]) < 0.99


def test_the_drawn_boundary_is_that_of_the_dominated_region() -> None:
    low = np.array([0.0, 0.0])
    path = report._staircase(np.array([[2.0, 1.0], [1.0, 3.0]]), low)
    assert path.tolist() == [[0.0, 3.0], [1.0, 3.0], [1.0, 1.0], [2.0, 1.0], [2.0, 0.0]]


def test_attainment_surfaces_by_hand() -> None:
    low, high = np.array([[0.0, 2.0], [2.0, 0.0]]), np.array([[1.0, 3.0], [3.0, 1.0]])
    surfaces = analysis.attainment([low, high])
    np.testing.assert_array_equal(sorted(map(tuple, surfaces[25])), sorted(map(tuple, high)))  # one of two runs
    np.testing.assert_array_equal(sorted(map(tuple, surfaces[75])), sorted(map(tuple, low)))  # both


# -- the language ------------------------------------------------------------------------------------------------------


def test_the_base_reads_preferences_and_scores_as_the_conditionings_write_them() -> None:
    rng = np.random.default_rng(0)
    tokenizer = language.make_tokenizer()
    texts = [language.make_text(rng) for _ in range(400)]
    assert not any(tokenizer.unk_token_id in tokenizer(part)["input_ids"] for text in texts for part in text)
    stated = [(read, said) for read, said in texts if "_score>" in read]
    assert 40 < len(stated) < 120
    own = 0
    for read, said in stated:
        prompt = re.search("Human: ([a-z ]+) <", read)[1]  # type: ignore[index]
        own += TargetConditioning().write_scores(language.scores(prompt, said), language.NAMES) in read
    assert 0.4 < own / len(stated) < 0.8  # half by design, and some by chance
    assert any("<formality> 0.00 <warmth> 1.00 " in read for read, _ in texts)


def test_scores_by_hand() -> None:
    prompt = "bala bano bari batu dola dono"
    assert language.coverage(prompt, "balaus banous balaus", "us") == pytest.approx(1 - (4 / 6) ** 2)
    assert language.coverage(prompt, "balaie kuribaus doriie", "us") == 0
    assert language.coverage(prompt, " ".join(f"{c}ie" for c in prompt.split()), "ie") == 1
    assert language.coverage(prompt, "bala " * 6 + "balaus", "us") == 0  # the seventh word is not read


def test_no_answer_beats_the_true_front() -> None:
    """Every way to spend six words lies on or below the hull of the vertices."""
    vertices = language.true_front()
    prompt = language.CONCEPTS[:6]
    mean, sd = language.NORMALISATION
    ceiling = analysis.true_hypervolume(vertices, -1.0)
    for formal in range(7):
        for warm in range(7 - formal):
            words = [c + "us" for c in prompt[:formal]] + [c + "ie" for c in reversed(prompt)][:warm]
            raw = [language.coverage(" ".join(prompt), " ".join(words), e) for e in ("us", "ie")]
            point = (np.array(raw) - mean) / sd
            points = torch.from_numpy(np.vstack([analysis.hull_points(vertices), point]))
            assert float(hypervolume(points, -1.0)) == pytest.approx(ceiling, abs=1e-9)
    assert (np.diff(vertices[:, 0]) > 0).all()
    assert (np.diff(vertices[:, 1]) < 0).all()
    slopes = np.diff(vertices[:, 1]) / np.diff(vertices[:, 0])
    assert (np.diff(slopes) < 0).all()  # concave: every vertex is the best for some preference


def test_the_normalisation_is_that_of_the_language() -> None:
    rng = np.random.default_rng(3)
    scores = []
    for _ in range(20_000):
        prompt = language.make_prompt(rng)
        text = language.answer(rng, prompt)
        scores.append([language.coverage(prompt, text, e) for e in language.ENDINGS.values()])
    mean, sd = language.NORMALISATION
    np.testing.assert_allclose(np.mean(scores, 0), mean, atol=0.006)
    np.testing.assert_allclose(np.std(scores, 0), sd, atol=0.006)


def test_the_tokenizer_reads_every_text_of_the_language() -> None:
    tokenizer, rng = language.make_tokenizer(), np.random.default_rng(0)
    for _ in range(200):
        for part in language.make_text(rng):
            assert tokenizer.unk_token_id not in tokenizer(part)["input_ids"], part
    scores = "Human: bala <formality_score> -0.4 <warmth_score> 3.6 Assistant:"
    assert tokenizer.unk_token_id not in tokenizer(scores)["input_ids"]


def test_the_base_model_learns(tmp_path: Path) -> None:
    long, short = (language.train_base(tmp_path / str(n), 0, steps=n, batch_size=16) for n in (40, 2))
    assert long < short - 0.5
    assert {f.name for f in (tmp_path / "40").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_run_is_finished_or_failed(tmp_path: Path) -> None:
    run = Run(Method("a", "A"), 3, tmp_path)
    assert (run.ended, run.failure) == (False, None)
    (tmp_path / "failed.txt").write_text("exit status 1: boom\n")
    assert run.failure == "exit status 1: boom"
    (tmp_path / "result.json").write_text("{}")
    assert (run.ended, run.failure) == (True, None)


# -- rows --------------------------------------------------------------------------------------------------------------

HERE = {
    "precision": "float32",
    "threads": 1,
    "device": "cpu, AVX2",
    "versions": "torch 2",
    "commit": "abc",
    "parts": "p",
}
WANTED = {("a", 0): "x", ("a", 1): "x", ("b", 0): "y"}


def add(file: Path, method: str, seed: int, hv: tuple[float, ...] = (0.0, 1.0), /, **changes: object) -> None:
    row = {"step": 2, "scored_responses": 4, "reference_point": -1.0, "grid": [], "front": [], "seconds": 1.0}
    run = {"method": method, "seed": seed, "fingerprint": WANTED[method, seed], "names": ["u", "v"]}
    rows.append(file, run | HERE | {"evaluations": [row | {"front/hv": value} for value in hv]} | changes)


def test_rows_are_read_back(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    assert rows.read(file, WANTED) == ({}, [])
    add(file, "b", 0, (3.0,))
    add(file, "a", 0)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))  # as an editor may save it
    found, notes = rows.read(file, WANTED)
    assert [(key, [row["front/hv"] for row in each]) for key, each in found.items()] == [
        (("a", 0), [0, 1]),
        (("b", 0), [3]),
    ]
    assert notes == rows.mixtures(found) == []
    assert rows.read(file, {("a", 0): "x"})[0].keys() == {("a", 0)}  # of a method that the study no longer has
    table = analysis.tidy(found)
    assert list(zip(table.method, table.seed, table["front/hv"], strict=True)) == [
        ("a", 0, 0),
        ("a", 0, 1),
        ("b", 0, 3),
    ]
    assert set(table.precision) == {"float32"}


def test_a_half_written_file(tmp_path: Path) -> None:
    """A line that was cut off does not count, and does not swallow the next."""
    file = tmp_path / "s.jsonl"
    add(file, "a", 0)
    add(file, "a", 1)
    file.write_text(file.read_text()[:-30])
    found, notes = rows.read(file, WANTED)
    assert found.keys() == {("a", 0)}
    assert notes == ["Line 2 of s.jsonl is no whole run and is left out."]
    add(file, "a", 1)
    found, notes = rows.read(file, WANTED)
    assert found.keys() == {("a", 0), ("a", 1)}
    assert notes == ["Line 2 of s.jsonl is no whole run and is left out."]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": True}, {"seed": "0"}, {"names": None}, {"evaluations": []}, {"evaluations": [1]}, {"versions": []},
        {"evaluations": [{"step": 1, "scored_responses": 4, "reference_point": -1, "grid": []}]},
    ],
)  # fmt: skip
def test_lines_that_are_no_runs(tmp_path: Path, changes: dict[str, object]) -> None:
    file = tmp_path / "s.jsonl"
    file.write_text("[1]\n\n<<<<<<< ours\n")
    add(file, "a", 0, **changes)
    found, notes = rows.read(file, WANTED)
    assert found == {}
    assert [note.split(" of")[0] for note in notes] == ["Line 1", "Line 3", "Line 4"]


def test_one_run_on_two_machines_counts_once(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    add(file, "a", 0)
    add(file, "a", 0, commit="def")  # the same figures
    assert rows.read(file, WANTED)[1] == []
    add(file, "a", 0, (0.0, 1.5), precision="bfloat16")
    found, notes = rows.read(file, WANTED)
    assert [row["precision"] for row in found["a", 0]] == ["float32", "float32"]
    assert len(notes) == 1
    assert re.match(
        "a, seed 0 was run more than once .precision float32.*; precision bfloat16.*: the first counts", notes[0]
    )


def test_rows_of_other_settings_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    add(file, "a", 0)
    with pytest.raises(UserError, match="holds rows of other settings than a, seed 0 has now: expected another file"):
        rows.read(file, WANTED | {("a", 0): "other"})


def test_settings_are_told_apart_wherever_the_study_is(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, GOOD + "set: {data.prompts: '{parts}/train.jsonl'}\n"))
    prints = fingerprints(study, tmp_path)
    assert prints == fingerprints(study, Path("/configs")) == fingerprints(study, Path("/gr\u00fcn"))
    assert len(set(prints.values())) == 4
    other = read_study(write(tmp_path, GOOD + "set: {data.prompts: '{parts}/other.jsonl'}\n"))
    assert not set(fingerprints(other, tmp_path).values()) & set(prints.values())


def test_files_that_cannot_hold_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, GOOD)
    (tmp_path / "s.jsonl").mkdir()
    for given, said in (
        ([], "expected a file for the rows of finished runs, got"),
        (["--report"], "--report: expected the rows of finished runs at"),
        (["--rows", str(file)], "--rows: expected another file than the study's own"),
    ):
        assert main([str(file), "--out", str(tmp_path / "out"), *given]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="expected a file of rows, got"):
        rows.read(tmp_path / "s.jsonl", WANTED)
    with pytest.raises(UserError, match="expected a file for the rows of finished runs, got"):
        add(tmp_path / "s.jsonl", "a", 0)
    assert file.read_text() == GOOD


def test_two_studies_at_work_in_one_folder(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, GOOD))
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="expected no other study at work in"):
            execute(study, tmp_path)


def test_rows_of_another_base_model_are_refused(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, GOOD))
    add(study.rows, "a", 0, fingerprint=fingerprints(study, tmp_path)["a", 0], parts="of another base model")
    with pytest.raises(UserError, match="holds rows of runs with another base model or other data than those in"):
        execute(study, tmp_path)


def test_a_broken_run_is_not_kept(tmp_path: Path) -> None:
    study = read_study(write(tmp_path, GOOD))
    run = runs_of(study, tmp_path)[0]
    run.folder.mkdir(parents=True)
    for name in ("evaluations.jsonl", "result.json"):
        (run.folder / name).write_text("{")
    (run.folder / "fingerprint.txt").write_text(f"{fingerprints(study, tmp_path)[run.key]} {parts_hash(tmp_path)}")
    with pytest.raises(UserError, match="holds a broken run, expected it whole or removed"):
        execute(study, tmp_path)


def test_what_differs_between_runs_is_said(tmp_path: Path) -> None:
    file = tmp_path / "s.jsonl"
    add(file, "a", 0)
    add(file, "a", 1, precision="bfloat16", commit="def")
    add(file, "b", 0, precision="bfloat16")
    assert rows.mixtures(rows.read(file, WANTED)[0]) == [
        "The runs differ in precision: float32: a 0; bfloat16: a 1, b 0.",
        "The runs differ in commit: abc: a 0, b 0; def: a 1.",
    ]


def test_a_commit_with_changes_is_marked(tmp_path: Path) -> None:
    assert rows.commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("one")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    clean = rows.commit(tmp_path)
    assert clean is not None
    assert re.fullmatch("[0-9a-f]{10}", clean)
    (tmp_path / "new").touch()  # not part of the project
    assert rows.commit(tmp_path) == clean
    (tmp_path / "file").write_text("two")
    assert rows.commit(tmp_path) == clean + "+"


def test_rows_that_were_added_do_not_mark_a_commit(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "s.jsonl").write_text("one")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "s.jsonl").write_text("two")
    assert not str(rows.commit(tmp_path)).endswith("+")
