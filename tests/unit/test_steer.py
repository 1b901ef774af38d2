"""Sliders that stay on the simplex, and answers as the page gets them."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import gradio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miepo.errors import UserError
from miepo.policy import GatedConditioning
from miepo.serving.batcher import Batcher
from miepo.serving.steer import SteerPage, _others, answers, on_simplex
from tests.helpers.trained import trained_policy

WEIGHTS = st.lists(st.floats(0, 1), min_size=1, max_size=5)


@given(weights=WEIGHTS, data=st.data())
def test_sliders_stay_on_the_simplex(weights: list[float], data: st.DataObject) -> None:
    moved = data.draw(st.integers(0, len(weights) - 1))
    found = on_simplex(moved, weights)
    assert sum(found) == pytest.approx(1)
    assert min(found) >= 0
    if len(weights) > 1:
        assert found[moved] == weights[moved]
    others = [(before, after) for k, (before, after) in enumerate(zip(weights, found, strict=True)) if k != moved]
    total = sum(before for before, _ in others)
    for before, after in others if total > 1e-9 else []:
        assert after == pytest.approx((1 - found[moved]) * before / total)


def test_answers_grow_and_too_many_are_refused(tiny_model: Path) -> None:
    trained = trained_policy(tiny_model, [GatedConditioning()])
    questions = [trained.question("the garden", w, 8) for w in ({"letter_e": 1.0}, {"brevity": 1.0})]
    batcher = Batcher(trained.policy, max_queue=2)
    seen = list(answers(batcher, questions, 60))
    assert all(later[i].startswith(earlier[i]) for earlier, later in pairwise(seen) for i in (0, 1))
    expected = [trained.generate("the garden", w, max_new_tokens=8) for w in ({"letter_e": 1.0}, {"brevity": 1.0})]
    assert [bool(text) for text in seen[-1]] == [bool(text) for text in expected]
    with pytest.raises(UserError, match="too many wait"):
        list(answers(batcher, questions * 2, 60))
    with pytest.raises(UserError, match="too long"):
        list(answers(batcher, questions, -1))
    batcher.close()


def test_what_cannot_be_scored_is_said(tiny_model: Path) -> None:
    trained = trained_policy(tiny_model, [GatedConditioning()])
    trained._given = None  # as loaded from a file whose objectives are not miepo's own
    page = SteerPage(trained, Batcher(trained.policy))
    rows, note, points = page.scores("the garden", ["a", "b"], [[0.5, 0.5]] * 2, time.monotonic() + 20)
    assert (rows, points) == ([], [])
    assert "not scored: 'somewhere' names tests.helpers.tiny.Letters" in note
    page.batcher.close()


def test_scores_are_not_waited_for_for_ever(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = trained_policy(tiny_model, [GatedConditioning()])
    page = SteerPage(trained, Batcher(trained.policy), timeout=0.2)
    monkeypatch.setattr(trained, "score", lambda *_: time.sleep(1))
    begin = time.monotonic()
    for _ in range(2):  # the second waits for the first
        rows, note, _ = page.scores("the garden", ["a", "b"], [[0.5, 0.5]] * 2, time.monotonic() + page.timeout)
        assert (rows, note) == ([], " (not scored within 0.2 s)")
    assert time.monotonic() - begin < 0.9
    page.batcher.close()


def test_a_box_that_was_emptied_and_a_server_that_stops_are_told(tiny_model: Path) -> None:
    trained = trained_policy(tiny_model, [GatedConditioning()])
    page = SteerPage(trained, Batcher(trained.policy))
    with pytest.raises(gradio.Error, match="expected a weight for every objective, got none"):
        next(page.answer("the garden", 4, 1.0, 0, 0.5, None, 0.5, 0.5))
    assert _others(0, 0.5, None) == 0.5
    page._redraw(0.5, None, 0.5, 0.5)
    page.batcher.close()
    with pytest.raises(UserError, match="the server is stopping"):
        list(answers(page.batcher, [trained.question("the garden", {"brevity": 1.0}, 8)], 60))
