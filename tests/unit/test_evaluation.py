"""The record of an evaluation: in a file, in a checkpoint, and as earlier versions kept it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from miepo.callbacks import EvaluationCallback, EvaluationRecord, ParetoFront
from miepo.errors import UserError, invalid
from miepo.evaluation import (
    MEANS,
    REFERENCE_POINT,
    Evaluation,
    evaluation_files,
    evaluations_in,
    measured_front,
    read_evaluation,
    write_evaluation,
)
from miepo.training.checkpoint_io import read_checkpoint
from tests.helpers.fit import tiny_run
from tests.helpers.runs import evaluation_rows

GRID = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
MEASURED = Evaluation(
    step=8, title="step 8", names=("a", "b"), grid=GRID, figures={"front/hv": 1.5},
    arrays={MEANS: torch.tensor([[0.1, float("nan")], [1.0, 2.0]]), REFERENCE_POINT: torch.tensor([-2.0, -2.0])},
)  # fmt: skip


def test_it_comes_back_from_json_and_a_file(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "evaluations", MEASURED, evaluation_rows(names=("a", "b"), points=2))
    assert [file.name for file in evaluation_files(tmp_path)] == ["step_000008.jsonl"]
    for found in (
        Evaluation.of_state(json.loads(json.dumps(MEASURED.state()))),
        read_evaluation(tmp_path / "evaluations/step_000008.jsonl"),
    ):
        assert (found.step, found.title, found.names, found.figures) == (8, "step 8", ("a", "b"), {"front/hv": 1.5})
        assert torch.equal(found.grid, GRID)
        assert found.means is not None
        torch.testing.assert_close(found.means.float(), MEASURED.means, equal_nan=True)
        assert found.reference_point == -2
    assert found.answers is not None and found.answers.scores.shape == (12, 2)
    assert len((tmp_path / "evaluations/step_000008.jsonl").read_text().splitlines()) == 13


def test_columns_are_put_in_another_order() -> None:
    turned = MEASURED.ordered(("b", "a"))
    assert torch.equal(turned.grid, GRID.flip(1))
    assert turned.means is not None
    assert turned.means[1].tolist() == [2.0, 1.0]
    assert turned.figures == MEASURED.figures


def test_a_front_needs_means_and_has_the_first_beside_it() -> None:
    assert measured_front([]) is None
    assert measured_front([Evaluation(0, "step 0", ("a", "b"), GRID)]) is None
    only, both = measured_front([MEASURED]), measured_front([MEASURED, MEASURED.ordered(("a", "b"))])
    assert only is not None and only.before is None
    assert both is not None and both.before is MEASURED.means


FRONT = {
    "grid": [[0.0, 1.0], [1.0, 0.0]],
    "before": [[0.0, 0.0]] * 2,
    "after": [[1.0, 2.0]] * 2,
    "reference_point": -2.0,
}
TABLE = {
    "first": {"step": 0, "metrics": {"front/hv": 1.0, "front/crd": float("nan")}},
    "last": {"step": 8, "metrics": {"front/hv": 2.0}},
}


def test_older_checkpoints_keep_it_in_the_states_of_callbacks() -> None:
    first, last = evaluations_in({}, ("a", "b"), {"ParetoFront": FRONT, "EvaluationTable": TABLE})
    assert (first.step, first.figures, last.step, last.figures) == (0, {"front/hv": 1.0}, 8, {"front/hv": 2.0})
    assert first.means is not None and last.means is not None
    assert (first.means.tolist(), last.means.tolist()) == (FRONT["before"], FRONT["after"])
    assert (last.reference_point, last.grid.tolist()) == (-2, FRONT["grid"])
    assert evaluations_in({}, ("a",), {}) == []
    front, *others = evaluations_in({}, ("a", "b"), {"ParetoFront": FRONT | {"before": None}, "EvaluationTable": {}})
    assert not others and front.means is not None and front.means.tolist() == FRONT["after"]
    assert [e.step for e in evaluations_in({}, ("a", "b"), {"EvaluationTable": TABLE})] == [0, 8]
    once = {"first": TABLE["first"], "last": TABLE["first"]}
    assert [e.step for e in evaluations_in({}, ("a", "b"), {"ParetoFront": FRONT, "EvaluationTable": once})] == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "8"}, "expected step to be a valid integer, got '8'"),
        ({"figures": {"front/hv": "1"}}, "expected figures.front/hv to be a valid number, got '1'"),
        ({"figures": {"front/hv": float("inf")}}, "expected figures.front/hv to be a finite number, got inf"),
        ({"grid": [[0.0], 1]}, "expected grid.1 to be a valid list, got 1"),
        ({"grid": [[0.0], [1.0, 0.0]]}, "expected 2 weights in each vector of the grid, got [[0.0], [1.0, 0.0]]"),
        ({"arrays": {MEANS: [[0.0, 1.0]]}}, "expected front/means of shape (2, 2), got (1, 2)"),
        ({"arrays": {MEANS: [[0.0, 1.0], [1.0]]}}, "expected sequence of length 2 at dim 1 (got 1)"),
        ({"arrays": {"own": [[0.0], 1.0]}}, "expected numbers in arrays, got another: "),
        ({"arrays": {"own": ["x"]}}, "too many dimensions 'str'"),
        ({"arrays": {REFERENCE_POINT: [0.0]}}, "expected front/reference_point of shape (2,), got (1,)"),
    ],
)
def test_a_malformed_state_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        Evaluation.of_state(MEASURED.state() | changes)
    assert message in invalid(caught.value)
    if "step" not in changes:  # which the name of a file says
        file = tmp_path / "step_000001.jsonl"
        file.write_text(json.dumps(MEASURED.state() | changes))
        with pytest.raises(UserError, match=r"step_000001.jsonl, line 1: (expected|too many)"):
            read_evaluation(file)
    missing = MEASURED.state()
    del missing["title"]
    with pytest.raises(ValueError, match=r".") as caught:
        Evaluation.of_state(missing)
    assert invalid(caught.value) == "expected title, got none"


class Histogram(EvaluationCallback):
    """Measures what is no single number."""

    def on_evaluation_end(self, trainer, module) -> dict[str, Any]:
        return {"own/number": 3, "own/counts": torch.ones(1, 2, 1), "own/unknown": float("nan")}


@pytest.mark.parametrize("validate", [False, True])
def test_what_any_callback_measures_is_in_it(tiny_model: Path, tmp_path: Path, validate: bool) -> None:
    """In the file and in the checkpoint, the first and the last of the run, and of these alone."""
    own: list[Callback] = [Histogram(), ParetoFront(draw=False), EvaluationRecord(prompts=0)]
    settings = {
        "callbacks": own, "max_steps": 3, "limit_val_batches": 1.0, "val_check_interval": 1, "num_sanity_val_steps": -1,
    }  # fmt: skip
    trainer, module, data = tiny_run(tiny_model, tmp_path, data={"grid": 3}, trainer=settings)
    if validate:
        trainer.validate(module, data, verbose=False)
        assert module.evaluations == []
        assert module.evaluation is not None and module.evaluation.title == "validate"
        assert [file.name for file in evaluation_files(tmp_path)] == ["validate.jsonl"]
        return
    trainer.fit(module, data)
    assert [e.step for e in module.evaluations] == [0, 3]
    assert [file.stem for file in evaluation_files(tmp_path)] == [f"step_{i:06d}" for i in range(4)]
    last = read_evaluation(evaluation_files(tmp_path)[-1])
    assert last.answers is None
    assert {key: x for key, x in last.figures.items() if key.startswith("own")} == {"own/number": 3.0}
    assert last.arrays["own/counts"].tolist() == [[[1.0], [1.0]]]
    assert "own/counts" not in trainer.callback_metrics
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    saved = read_checkpoint(tmp_path / "x.ckpt")["miepo"]["evaluations"]
    assert saved == [e.state() for e in module.evaluations]
    assert saved[1] == last.state()
