"""What a run prints when it ends: the table, whether each objective follows its weight, and whole answers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from miepo.callbacks import EvaluationTable, ParetoFront, SampleTable, Steerability
from miepo.callbacks.evaluation_table import obedience, table_rows
from miepo.callbacks.sample_table import _Row
from tests.helpers.fit import tiny_run

METRICS = {
    "steerability/long": 1.94, "steerability/long_low": 1.4, "steerability/long_high": 2.44,
    "steerability/long_low_sugar": -0.2, "steerability/long_low_sugar_low": -0.5, "steerability/long_low_sugar_high": 0.1,
    "steerability_rank/long": 1.0, "side_effect/long/long_low_sugar": -1.94,
    "front/hv": 2.0, "front/hv_corrected": 1.5, "front/hv_corrected_low": 1.0, "front/hv_corrected_high": 1.75,
    "front/hv_above_chance": 0.5, "front/hv_p": 0.0025, "front/mip": 0.75, "front/mip_level": 0.5,
    "front/mip_covariance": 0.25, "front/best/long": 3.0, "front/finished": 0.96,
}  # fmt: skip


def test_slopes_are_the_headline() -> None:
    """An objective may be called as another's limit would be."""
    assert table_rows([METRICS]) == [
        ["slope of long, sd (up)", "1.940 [1.400, 2.440]"],
        ["slope of long_low_sugar, sd (up)", "-0.200 [-0.500, 0.100]"],
        ["HV (up)", "2.000"],
        ["HV, bias taken off (up)", "1.500 [1.000, 1.750]"],
        ["HV above chance (up)", "0.500 (p 0.003)"],
        ["MIP (up)", "0.750"],
        ["of it following w (up)", "0.250"],
        ["answers that ended (up)", "0.960"],
    ]
    assert obedience(METRICS, ["long", "long_low_sugar", "unmeasured"]) == [
        "long follows its weight: +1.9 sd [+1.4, +2.4]",
        "long_low_sugar: no evidence that it follows its weight: -0.2 sd [-0.5, +0.1]",
    ]


def test_figures_of_other_callbacks_come_last_under_their_own_names() -> None:
    own = {
        "answers/questions": 0.25,
        "answers/questions_low": 0.2,
        "answers/questions_high": 0.3,
        "fluency": 1e-3,
        "nothing": -2e-14,
    }
    hidden = {"count/failed/long": 2.0, "information/feedback/long": 0.1, "steerability_rank/long": 1.0}
    assert table_rows([{"front/hv": 2.0, **hidden}, own]) == [
        ["HV (up)", "2.000", "-"],
        ["answers/questions", "-", "0.250 [0.200, 0.300]"],
        ["fluency", "-", "0.001"],
        ["nothing", "-", "0"],
    ]


def test_a_run_says_whether_it_obeys(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, module, data = tiny_run(
        tiny_model, tmp_path, data={"grid": 3},
        trainer={
            "max_steps": 1, "limit_val_batches": 1.0, "val_check_interval": 1,
            "callbacks": [Steerability(), ParetoFront(draw=False), EvaluationTable()],
        },
    )  # fmt: skip
    with caplog.at_level("INFO"):
        trainer.fit(module, data)
    for name in ("letter_e", "length"):
        assert f"slope of {name}, sd (up)" in caplog.text
        assert any(
            f"{name}{rest}" in caplog.text
            for rest in (
                " follows its weight: ",
                " goes against its weight: ",
                ": no evidence that it follows its weight",
            )
        )
    assert "answers that ended (up)" in caplog.text


def test_whole_answers_are_printed_first_and_others_marked(caplog: pytest.LogCaptureFixture) -> None:
    table = SampleTable(prompts=3, printed=2)
    for position, whole in ((0, False), (1, True), (2, True)):
        for grid, weights in enumerate(((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))):
            ended = whole or grid == 1  # in the middle of the grid nothing is printed
            table.last.append(
                _Row(position, grid, f"p{position}", torch.tensor(weights), f"t{grid}\n x", [0.0, 0.0], ended)
            )
    module = SimpleNamespace(names=("a", "b"))
    with caplog.at_level("INFO"):
        table._print(module)
    lines = [record.getMessage().strip() for record in caplog.records]
    assert lines == [
        "Prompt: p1", "a (weight 1.00): t0 x", "b (weight 1.00): t2 x",
        "Prompt: p2", "a (weight 1.00): t0 x", "b (weight 1.00): t2 x",
    ]  # fmt: skip
    caplog.clear()
    table.printed = 3
    with caplog.at_level("INFO"):
        table._print(module)
    lines = [record.getMessage().strip() for record in caplog.records]
    assert lines[6:] == ["Prompt: p0", "a (weight 1.00): t0 x [cut]", "b (weight 1.00): t2 x [cut]"]
