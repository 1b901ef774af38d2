"""Reports: reading a run's folder, intervals against a slow loop, what untrusted text becomes, and every mistake."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from miepo.callbacks.evaluation_table import table_rows
from miepo.errors import UserError
from miepo.evaluation import Answers, read_evaluation
from miepo.metrics import ParetoFrontMetric, reward_overlap
from miepo.preferences import evaluation_grid
from miepo.report import Report, report
from miepo.report import pictures as draw
from miepo.report.intervals import KEYS, front_of, overlap, point_estimates
from miepo.report.page import before_and_after, samples
from miepo.report.runs import differing, incomparable, labels, read_run, read_runs
from miepo.report.text import visible
from miepo.seeding import RandomStream, generator
from tests.helpers.runs import NAMES, evaluation_rows, figures, write_run

HOSTILE = [
    "<script>document.title = 'taken'</script>", "</div></details><h1>forged</h1>", "<img src=x onerror=alert(1)>",
    "{{ 7 * 7 }} {% raw %}", "a\0b", "\ud800 half", "\u202eright to left", "$x^$ \\frac", "</iframe>", "&lt;b&gt;", "\u2028line",
]  # fmt: skip


def edited(rows: list[dict[str, Any]], **changes: Any) -> list[dict[str, Any]]:
    return [rows[0] | changes, *rows[1:]]


def column(html: str, tag: str) -> list[str]:
    return re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_run_is_read_back(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "runs/a/version_0"))
    assert run.label == "a/version_0"
    assert run.names == NAMES
    assert run.steps == 4
    assert run.series["loss"] == ((0, 1.4), (1, 1.4 - 0.1), (2, 1.4 - 0.2), (3, 1.4 - 0.1 * 3))
    assert run.evaluations == 2
    assert run.first is not None and run.last is not None
    assert (run.first.title, run.last.title) == ("step 0", "step 4")
    assert (run.first.step, run.last.step) == (0, 4)
    assert run.first.figures["information/ceiling"] == 1.0986
    answers = run.last.answers
    assert answers is not None
    for grid in (run.last.grid, answers.grid):
        assert torch.equal(grid, evaluation_grid(2, 3).double())
    assert answers.scores.shape == (18, 2)
    assert answers.responses[4] == "answer 1 under 1"


def test_an_evaluation_after_one_step_is_told_from_the_one_before(tmp_path: Path) -> None:
    """Both are logged at step 0."""
    run = read_run(write_run(tmp_path / "run", steps=1))
    assert run.evaluations == 2
    columns, note = before_and_after(run)
    assert not note
    assert [c.figures["information/preference"] for c in columns[:2]] == [0.0, 0.3]


def test_a_run_of_an_older_version_shows_its_answers(tmp_path: Path) -> None:
    """A file of an evaluation had no first line with figures."""
    folder = write_run(tmp_path / "run")
    whole, _ = before_and_after(read_run(folder))
    for file in (folder / "evaluations").iterdir():
        file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[1:]))
    columns, note = before_and_after(read_run(folder))
    assert not note
    for old, new in zip(columns, whole, strict=True):
        assert old.title == new.title
        assert old.figures == {key: x for key, x in new.figures.items() if not key.startswith("information/")}


def test_a_run_that_kept_no_answers_shows_its_figures(tmp_path: Path) -> None:
    """As with ``record.prompts`` 0."""
    folder = write_run(tmp_path / "run")
    for file in (folder / "evaluations").iterdir():
        head = json.loads(file.read_text().splitlines()[0])
        head["arrays"]["front/means"] = [[0.0, None], [1.0, 2.0], [0.5, 0.5]]
        file.write_text(json.dumps(head) + "\n")
    run = read_run(folder)
    columns, note = before_and_after(run)
    assert not note
    assert [column.title for column in columns] == ["step 0", "step 4"]
    assert run.last is not None and columns[1].figures == run.last.figures
    html = report(folder).html
    assert "No answers of evaluations were kept by" in html
    assert "Mean rewards under every preference vector, before and after" in html


def test_rewards_that_are_missing_are_read_and_left_out(tmp_path: Path) -> None:
    rows = evaluation_rows(1)
    rows[0]["rewards"]["brevity"] = None
    evaluation = read_run(write_run(tmp_path / "run", [rows])).answers
    assert evaluation is not None
    assert evaluation.scores[0].isnan().tolist() == [False, True]
    logged = figures(rows)
    assert point_estimates(evaluation, -1.0) == pytest.approx(logged, rel=1e-5)
    assert len(draw.reward_columns(evaluation, evaluation.grid, 1)[0]) == 5


def test_an_evaluation_of_a_checkpoint(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [evaluation_rows(1)])
    (folder / "evaluations/step_000000.jsonl").rename(folder / "evaluations/validate.jsonl")
    run = read_run(folder)
    assert run.latest is not None and run.latest.title == "validate"
    (only,), note = before_and_after(run)
    assert not note and only.figures["front/mip_low"] <= only.figures["front/mip"]
    assert only.title == "validate"


def test_line_ends_that_only_unicode_knows_stay_in_a_text(tmp_path: Path) -> None:
    (tmp_path / "step_000001.jsonl").write_text(
        "".join(
            json.dumps(row, ensure_ascii=False) + "\n" for row in edited(evaluation_rows(), response="a\u2028b\x85c\r")
        ),
        encoding="utf-8",
    )
    answers = read_evaluation(tmp_path / "step_000001.jsonl").answers
    assert answers is not None and answers.responses[0] == "a\u2028b\x85c\r"


def test_a_log_that_is_being_written(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    whole = read_run(folder).series["loss"]
    with (folder / "metrics.csv").open("a") as file:
        file.write("0.1,0.2")
    assert read_run(folder).series["loss"] == whole
    with (folder / "metrics.csv").open("a") as file:
        file.write("\n0.1,0.2\n")
    with pytest.raises(UserError, match=r"metrics.csv, line 8: expected a number or nothing in each of 12 columns"):
        read_run(folder)


def test_names_are_as_short_as_they_can_be() -> None:
    assert labels([Path("/r/a"), Path("/r/a/b")]) == ["a", "a/b"]
    assert labels([Path("/x/q/version_0"), Path("/x/q/version_1")]) == ["version_0", "version_1"]
    assert labels([Path("/x/q/v/0"), Path("/x/p/w/0")]) == ["q/v", "p/w"]


def test_only_settings_that_differ() -> None:
    one = {"a": {"b": 1, "c": 2}, "objectives": [{"class_path": "m.X", "init_args": {"n": 1}}], "l": [1, 2]}
    other = {"a": {"b": 1, "c": 3}, "objectives": [{"class_path": "m.X", "init_args": {"n": 2}}], "l": [1]}
    assert differing([one, other]) == [
        ("a.c", ["2", "3"]), ("objectives.X.init_args.n", ["1", "2"]), ("l", ["[1, 2]", "[1]"]),
    ]  # fmt: skip
    assert differing([{"a": 1}, {"a": 1, "b": None}]) == [("b", ["–", "null"])]
    assert differing([one, one]) == []


def test_columns_of_runs_follow_the_first(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    turned = [
        row | {key: dict(reversed(row[key].items())) for key in ("preference", "rewards")} for row in evaluation_rows(1)
    ]
    mixed = write_run(tmp_path / "mixed", [[*evaluation_rows(0)[:1], *turned[1:]]])
    with pytest.raises(UserError, match=r"line 3: .* of \['letter_e', 'brevity'\]"):  # a file keeps one order
        read_run(mixed)
    first, second = read_runs([a, write_run(tmp_path / "b", [turned, turned])])
    assert first.last is not None and second.last is not None
    assert second.last.names == first.last.names
    assert torch.equal(first.last.grid, second.last.grid)
    one, other = first.last.answers, second.last.answers
    assert one is not None and other is not None
    assert one.names == other.names
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.grid, other.grid)


def test_runs_on_different_scales_are_said_to_be(tmp_path: Path) -> None:
    same = [write_run(tmp_path / name) for name in ("a", "b")]
    assert incomparable(read_runs(same)) == []
    file = same[1] / "normalisation.json"
    file.write_text(file.read_text().replace('"mean": 1.0, "sd": 2.0', '"mean": 1.5, "sd": 2.0', 1))
    rows = evaluation_rows(1, prompts=4, points=5)
    other = write_run(tmp_path / "c", [rows, rows], reference_point=-2.0)
    found = incomparable(read_runs([*same, other]))
    assert found == [
        "Rewards of letter_e are normalised in different ways: a by mean 1, sd 2; b by mean 1.5, sd 2; c by mean 1, sd 2.",
        "The runs were evaluated on different prompts.",
        "The runs were evaluated under different preference vectors.",
        "The hypervolume's reference points differ: a -1, b -1, c -2.",
    ]
    html = unescape(report([*same, other]).html)
    assert all(reason in html for reason in found)


# -- intervals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c")])
def test_intervals_against_a_slow_loop(names: tuple[str, ...], tmp_path: Path) -> None:
    """Each resample, and each set without a prompt, by itself through the metric of training, from lists of its rows."""
    rows = evaluation_rows(1, names, prompts=6, points=3 if len(names) == 2 else None)
    rows[3]["rewards"][names[0]] = None
    evaluation = read_run(write_run(tmp_path / "run", [rows])).answers
    assert evaluation is not None

    def measured(prompts: Sequence[int]) -> dict[str, float]:
        metric = ParetoFrontMetric(evaluation_grid(len(names), 3 if len(names) == 2 else None), -1.5)
        for place, p in enumerate(prompts):
            for row in rows:
                if row["position"] == p and None not in row["rewards"].values():
                    rewards = torch.tensor([[*row["rewards"].values()]]).double()
                    metric.update(rewards, torch.tensor([row["grid_index"]]), torch.tensor([place]))
        return {key: float(value) for key, value in metric.compute().items() if key in ("hv", "mip", "crd")}

    whole = measured(range(6))
    drawn = [measured(chosen)["hv"] for chosen in generator(RandomStream.BOOTSTRAP, 0).integers(6, size=(20, 6))]
    high, low = 2 * whole["hv"] - np.quantile(drawn, [0.025, 0.975])
    expected = {f"front/{key}": value for key, value in whole.items()} | {
        "front/hv_corrected": 2 * whole["hv"] - np.mean(drawn),
        "front/hv_corrected_low": low,
        "front/hv_corrected_high": high,
    }
    without = [measured([q for q in range(6) if q != p]) for p in range(6)]
    for key, scale, back in (("mip", float, float), ("crd", np.log, np.exp)):
        each = [scale(w[key]) for w in without]
        half = stats.t.ppf(0.975, 5) * (5 / 6 * np.sum((each - np.mean(each)) ** 2)) ** 0.5
        expected[f"front/{key}_low"] = back(scale(whole[key]) - half)
        expected[f"front/{key}_high"] = back(scale(whole[key]) + half)
    assert front_of(evaluation, -1.5, draws=20) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("prompts", [4, 30])
def test_an_interval_contains_its_estimate_and_narrows_with_prompts(seed: int, prompts: int, tmp_path: Path) -> None:
    evaluation = read_run(write_run(tmp_path / "run", [evaluation_rows(seed, prompts=prompts)])).answers
    assert evaluation is not None
    found = front_of(evaluation, -1.0)
    assert "front/hv_low" not in found  # flattered by noise, and a resample's even more
    for key in ("front/hv_corrected", *KEYS[1:]):
        assert found[f"{key}_low"] <= found[key] <= found[f"{key}_high"], key
    if prompts == 30:
        few = read_run(write_run(tmp_path / "few", [evaluation_rows(seed, prompts=8)])).answers
        assert few is not None
        wide = front_of(few, -1.0)
        for key in ("front/hv_corrected", "front/mip"):
            assert found[f"{key}_high"] - found[f"{key}_low"] < wide[f"{key}_high"] - wide[f"{key}_low"]


@pytest.mark.parametrize(("key", "truth"), [("front/mip", 5 / 6), ("front/crd", 1.0)])
def test_an_interval_covers_as_often_as_it_says(tmp_path: Path, key: str, truth: float) -> None:
    """Figures whose truth is known: the share of 200 data sets of ten prompts whose interval has it."""
    inside = 0
    for seed in range(200):
        rng = np.random.default_rng([5, seed])
        rows = evaluation_rows(0, prompts=10)
        for row in rows:
            weights = np.array([*row["preference"].values()])
            row["rewards"] = dict(zip(NAMES, (weights + rng.normal(size=2)).tolist(), strict=True))
        file = tmp_path / "step_000001.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        answers = read_evaluation(file).answers
        assert answers is not None
        found = front_of(answers, -1.0, draws=1)
        inside += found[f"{key}_low"] <= truth <= found[f"{key}_high"]
    assert 0.9 <= inside / 200 <= 0.99


def test_one_prompt_has_no_intervals(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [evaluation_rows(1, prompts=1)]))
    (only,), _ = before_and_after(run)
    assert {"front/hv", "front/mip"} <= set(only.figures)
    assert not [
        k for k in only.figures if k.startswith(("front", "steer")) and k.endswith(("_low", "_high", "corrected"))
    ]
    assert report([run.folder]).html


def test_the_change_is_that_of_pairs(tmp_path: Path) -> None:
    """Where every reward rises by one, the change of MIP is one for certain, however the prompts differ."""
    before = evaluation_rows(0)
    after = [row | {"rewards": {name: r + 1 for name, r in row["rewards"].items()}} for row in before]
    columns, _ = before_and_after(read_run(write_run(tmp_path / "run", [before, after])))
    assert [c.title for c in columns] == ["step 0", "step 4", "change"]
    change = columns[2].figures
    assert [change[f"front/mip{end}"] for end in ("", "_low", "_high")] == pytest.approx([1, 1, 1])
    assert change["front/hv_corrected_low"] > 0
    assert change["steerability/brevity"] == pytest.approx(0, abs=1e-6)
    other = [row | {"position": row["position"] + 100} for row in after]
    columns, _ = before_and_after(read_run(write_run(tmp_path / "other", [before, other])))
    assert len(columns) == 2  # of other prompts there are no pairs


def test_the_interval_of_a_change_against_a_slow_loop(tmp_path: Path) -> None:
    """Both evaluations without the same prompt, one prompt after the other."""
    run = read_run(write_run(tmp_path / "run", [evaluation_rows(0, prompts=6), evaluation_rows(1, prompts=6)]))
    assert run.first is not None
    assert run.last is not None
    old, new = run.first.answers, run.last.answers
    assert old is not None
    assert new is not None

    def figure(evaluation: Answers, key: str, without: int | None = None) -> float:
        keep = evaluation.positions != (-1 if without is None else without)
        parts = {name: getattr(evaluation, name)[keep] for name in ("grid_index", "positions", "scores")}
        return point_estimates(replace(evaluation, **parts), -1.0)[key]

    found = front_of(new, -1.0, old, draws=20)
    for key in ("front/mip", "front/crd"):
        change = figure(new, key) - figure(old, key)
        each = np.array([figure(new, key, p) - figure(old, key, p) for p in range(6)])
        half = stats.t.ppf(0.975, 5) * (5 / 6 * np.sum((each - each.mean()) ** 2)) ** 0.5
        assert found[key] == pytest.approx(change)
        assert [found[f"{key}_low"], found[f"{key}_high"]] == pytest.approx([change - half, change + half]), key
    drawn = []
    for chosen in generator(RandomStream.BOOTSTRAP, 0).integers(6, size=(20, 6)):
        both = []
        for e in (new, old):
            rows = torch.cat([torch.where(e.positions == p)[0] for p in chosen])
            parts = {name: getattr(e, name)[rows] for name in ("grid_index", "positions", "scores")}
            both.append(point_estimates(replace(e, **parts), -1.0)["front/hv"])
        drawn.append(both[0] - both[1])
    high, low = 2 * found["front/hv"] - np.quantile(drawn, [0.025, 0.975])
    assert [found["front/hv_corrected_low"], found["front/hv_corrected_high"]] == pytest.approx([low, high], rel=1e-5)


def test_dispersion_of_two_objectives_needs_four_prompts(tmp_path: Path) -> None:
    """Without one of three, two answers are left, whose covariance has no volume."""
    for prompts in (3, 4):
        evaluation = read_run(write_run(tmp_path / str(prompts), [evaluation_rows(1, prompts=prompts)])).answers
        assert evaluation is not None
        assert ("front/crd_low" in front_of(evaluation, -1.0, draws=2)) == (prompts == 4)


def test_no_interval_where_only_some_answers_were_kept(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    last = read_run(folder).last
    assert last is not None
    file = folder / "evaluations/step_000004.jsonl"
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:7]))
    columns, note = before_and_after(read_run(folder))
    assert "the answers that were kept (2 prompts at step 4) have others" in note
    assert [c.title for c in columns] == ["step 0", "step 4"]
    assert columns[1].figures == last.figures
    assert "front/mip_low" in columns[0].figures and "front/mip_low" not in columns[1].figures
    assert note in unescape(report([folder]).html)


def test_the_overlap_is_that_of_training(tmp_path: Path) -> None:
    evaluation = read_run(write_run(tmp_path / "run")).answers
    assert evaluation is not None
    assert overlap(evaluation) == float(reward_overlap(evaluation.scores, evaluation.grid_index, evaluation.grid))
    nothing = [row | {"rewards": dict.fromkeys(NAMES)} for row in evaluation_rows(1)]
    without = write_run(tmp_path / "without", [nothing, nothing])
    html = report(without).html
    assert "– (step 4, 6 prompts)" in html


def test_the_table_names_an_interval_and_the_ceiling_of_information_alone() -> None:
    metrics = {"front/hv": 2.0, "front/hv_low": 1.0, "front/hv_high": 3.0, "information/ceiling": 1.61}
    metrics |= {"information/preference": 0.5, "information/preference_low": -1e-9, "information/preference_high": 0.6}
    assert table_rows([metrics]) == [
        ["HV (up)", "2.000 [1.000, 3.000]"],
        ["I(Y;W|X), nats (up)", "0.500 [0.000, 0.600] of 1.61"],
    ]


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_which_metrics_have_a_curve(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    series = dict(run.series) | {
        "count/ties": ((0, 0.0), (1, 0.0)),
        "time/step": ((0, 1.0), (1, 2.0)),
        "front/x": ((0, 1.0),),
    }
    changed = run.__class__(**{**vars(run), "series": series})
    main, others, zero = draw.curves([changed])
    assert main[:4] == ["loss", "kl", "reward/brevity", "reward/letter_e"]
    assert main[4:] == ["information/preference", "front/hv", "front/mip", "front/crd"]
    assert others == ["time/step"]
    assert zero == ["count/ties"]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_picture_for_each_pair_of_objectives(count: int, tmp_path: Path) -> None:
    names = ["a", "$b$", "_c", "\u540d"][:count]
    folders = [
        write_run(
            tmp_path / str(i), [evaluation_rows(seed, names, points=3 if count == 2 else None) for seed in (i, 2)]
        )
        for i in range(2)
    ]
    for some in (folders[:1], folders):
        figures = draw.draw_fronts(read_runs(some))
        assert len(figures) == {1: 1, 2: 1, 3: 3, 4: 6}[count]
        assert all(draw.data_uri(figure).startswith("data:image/svg+xml;base64,") for figure in figures)
        assert report(some).html.count("<img") > len(figures)


def test_a_long_curve_is_smoothed_and_a_page_stays_light(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=20_000)
    page = report(folder)
    assert "A long curve is a running mean" in page.html
    assert len(page.html) < 3_000_000


def test_pages_do_not_depend_on_the_day(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert report(folder).html == report(folder).html


# -- what others wrote -------------------------------------------------------------------------------------------------


def test_text_of_models_and_users_stays_text(tmp_path: Path) -> None:
    rows = evaluation_rows(1)
    for row, text in zip(rows, HOSTILE, strict=False):
        row["response"] = text
    rows = [row | {"prompt": "<script>alert(1)</script>"} if row["position"] == 0 else row for row in rows]
    folder = write_run(tmp_path / "<b>run&", [rows, rows], config={"seed": "</pre><script>alert(2)</script>\0"})
    html = report(folder).html
    html.encode("utf-8")
    assert "\0" not in html
    assert "<script" not in html and "<h1>forged" not in html and "<img src=x" not in html
    shown = [unescape(text) for text in column(html, "div")]
    for text in HOSTILE:
        assert any(visible(text) in part for part in shown), text


def test_names_of_objectives_are_text_too(tmp_path: Path) -> None:
    names = ("<script>alert(1)</script>", "$\\frac{$ \ud800\0")
    html = report(write_run(tmp_path / "run", [evaluation_rows(s, names) for s in (0, 1)])).html
    assert "<script" not in html
    html.encode("utf-8")


def test_a_long_answer_is_cut(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [edited(evaluation_rows(1), response="x" * 1_000_000)])
    html = report(folder).html
    assert "… (998000 more characters)" in html
    assert len(html) < 1_000_000


def test_a_notebook_shows_the_page_in_a_frame() -> None:
    shown = Report('<style>p { color: "red" }</style>')._repr_html_()
    (srcdoc,) = re.findall('srcdoc="([^"]*)"', shown)
    assert unescape(srcdoc) == '<style>p { color: "red" }</style>'
    assert "<style" not in shown
    assert "sandbox" in shown


def test_prompts_are_as_many_as_asked_for(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for prompts, shown in ((0, 0), (2, 2), (100, 6)):
        assert len(samples([read_run(folder)], prompts)) == shown
    html = report(folder, 1).html
    answers = re.findall("<b>(.*?)</b>", html)
    assert answers == [f"letter_e {w:.2f}, brevity {1 - w:.2f}" for w, _ in evaluation_grid(2, 3).tolist()]
    assert html.count('class="answer"') == 3
    assert "None were asked for" in report(folder, 0).html


def test_a_run_without_answers_shows_what_it_has(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for file in (folder / "evaluations").iterdir():
        file.unlink()
    (folder / "fronts").mkdir()
    (folder / "fronts/step_000004.png").write_bytes(b"\x89PNG picture")
    html = report(folder).html
    assert "No answers of evaluations were kept by" in html
    assert html.count("data:image/png;base64,") == 1
    assert "No evaluation was recorded yet" in html
    with_one = report([folder, write_run(tmp_path / "other")]).html
    assert "No answers of evaluations were kept by run:" in with_one


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for file in (folder / "evaluations").iterdir():
        file.unlink()
    (folder / "metrics.csv").write_text("step,loss\n0,1.5\n")
    (folder / "config.yaml").unlink()
    html = report(folder).html
    for text in ("has no config.yaml", "No evaluation was recorded yet", "no two steps yet", "There is none to draw"):
        assert text in html


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": ', "expected a JSON object, got Expecting value"),
        (b"[1]", "expected a JSON object, got list"),
        (b"[" * 100_000, "expected a JSON object, got "),
        (b'"\xff"', "expected a JSON object, got 'utf-8' codec"),
        ({"prompt": 3}, "expected prompt to be a valid string, got 3"),
        ({"response": None}, "expected response to be a valid string, got None"),
        ({"position": True}, "expected position to be a valid integer, got True"),
        ({"grid_index": 2**70}, "expected grid_index to be less than 4611686018427387904, got 1180591620717411303424"),
        (
            {"rewards": {"letter_e": 1.0}},
            r"expected a weight and a reward for each objective of \['letter_e', 'brevity",
        ),
        ({"rewards": {"letter_e": "1", "brevity": 1}}, "expected rewards.letter_e to be a valid number, got '1'"),
        ({"rewards": {"letter_e": 10**400, "brevity": 1}}, "expected rewards.letter_e to be a valid number, got 1000"),
        (
            {"preference": {"letter_e": None, "brevity": 1}},
            "expected preference.letter_e to be a valid number, got None",
        ),
        (
            {"preference": {"letter_e": float("inf"), "brevity": 1}},
            "expected preference.letter_e to be a finite number",
        ),
        (
            {"preference": {"x": 0.5, "y": 0.5}, "rewards": {"x": 0.5, "y": 0.5}},
            r"expected a weight and a reward for each objective of \['letter_e', 'brevity'\], got weights of \['x', 'y'\]",
        ),
    ],
)
def test_a_malformed_line_is_named(line: Any, message: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    file = folder / "evaluations/step_000004.jsonl"
    lines = file.read_bytes().splitlines()
    lines[2] = line if isinstance(line, bytes) else json.dumps(json.loads(lines[2]) | line).encode()
    file.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=r"step_000004.jsonl, line 3: " + message):
        report(folder)


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "name/version_3")
    with pytest.raises(UserError, match=r"expected the folder of a run, got '.*nowhere', which does not exist"):
        report(tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"with metrics.csv in it, got '.*name', which has none; there is one in '.*version_3'"
    ):
        report(tmp_path / "name")
    with pytest.raises(UserError, match=r"got '.*config.yaml', which is a file"):
        report(folder / "config.yaml")
    with pytest.raises(UserError, match=r"expected different runs, got '.*version_3' twice"):
        report([folder, folder])
    with pytest.raises(UserError, match="expected the folder of at least one, got none"):
        report([])
    with pytest.raises(UserError, match="expected 0 or more, got -1"):
        report(folder, prompts=-1)


def test_runs_of_other_objectives_show_both_lists(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", [evaluation_rows(0, ("brevity", "humour"))])
    with pytest.raises(UserError, match=r"\['letter_e', 'brevity'\], got \['brevity', 'humour'\] in '.*b'"):
        report([a, b])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.csv", b"", "expected a column 'step'"),
        ("metrics.csv", b"loss\n1\n", r"expected a column 'step' in '.*', got \['loss'\]"),
        ("metrics.csv", b"step,loss\n0,x\n1,2\n", r"metrics.csv, line 2: expected a number"),
        ("metrics.csv", b"\xff\xfe", "expected text in"),
        ("config.yaml", b"a: [", "expected YAML in"),
        ("config.yaml", b"- a\n", "expected settings by name in '.*', got list"),
        ("config.yaml", b"\xff", "expected text in"),
        ("config.yaml", b"a: !!python/object/apply:os.getcwd []", "expected YAML in"),
        (
            "normalisation.json",
            b"{}",
            "expected a normalisation at '.*', got a file that miepo normalise did not write",
        ),
        ("evaluations/step_000004.jsonl", b"\n", "expected an evaluation in '.*', got an empty file"),
    ],
)
def test_a_malformed_file_is_named(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        report(folder)


def test_a_configuration_that_contains_itself(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in "ab"]
    for folder in folders:
        (folder / "config.yaml").write_text("a: &a\n  b: *a\n")
    with pytest.raises(UserError, match="something contains itself"):
        report(folders)


def test_a_page_is_replaced_once_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    assert Report("new").save(target).read_text() == "new"
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.raises(UserError, match="can be written, got no"):
        Report("newer").save(target)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("report.html", "new")]


def test_where_no_page_can_be(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a folder to write the report into, got '.*nowhere', which is none"):
        Report("x").save(tmp_path / "nowhere/report.html")
    with pytest.raises(UserError, match="which is a folder"):
        Report("x").save(tmp_path)
    with pytest.raises(UserError, match="can be written, got"):
        Report("x").save(tmp_path / ("x" * 300))
