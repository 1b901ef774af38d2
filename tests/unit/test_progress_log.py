"""Lines in place of a bar."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from miepo.callbacks import ProgressLog, Steerability
from miepo.errors import UserError
from tests.helpers.fit import tiny_run


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if re.match(r"step \d+ of", record.getMessage())]


@pytest.mark.parametrize(("every", "steps"), [(0.0, [1, 2, 3]), (1e6, [1, 3])])
def test_a_line_with_step_time_left_and_rewards(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, every: float, steps: list[int]
) -> None:
    trainer, module, data = tiny_run(
        tiny_model, tmp_path, trainer={"max_steps": 3, "callbacks": [ProgressLog(every)], "max_epochs": 3}
    )
    with caplog.at_level("INFO"):
        trainer.fit(module, data)
    found = lines(caplog)
    assert [int(line.split()[1]) for line in found] == steps
    pattern = r"step \d of 3, \d+ s left, letter_e [+-]\d\.\d\d, length [+-]\d\.\d\d"
    assert all(re.fullmatch(pattern, line) for line in found), found
    assert ", 0 s left" in found[-1]


def test_a_terminal_has_a_bar(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    trainer, module, data = tiny_run(tiny_model, tmp_path, trainer={"max_steps": 1, "callbacks": [ProgressLog(0)]})
    with caplog.at_level("INFO"):
        trainer.fit(module, data)
    assert not lines(caplog)


def test_bad_settings() -> None:
    with pytest.raises(UserError, match=r"progress.every_n_seconds must not be negative, got -1"):
        ProgressLog(-1)


def test_steerability_is_logged(tiny_model: Path, tmp_path: Path) -> None:
    trainer, module, data = tiny_run(
        tiny_model, tmp_path, data={"grid": 3, "validation_prompts": ["the rain", "a garden", "tea"]},
        trainer={"max_steps": 1, "callbacks": [Steerability()], "limit_val_batches": 1.0, "val_check_interval": 1},
    )  # fmt: skip
    trainer.fit(module, data)
    logged = trainer.callback_metrics
    for name, other in (("letter_e", "length"), ("length", "letter_e")):
        low, slope, high = (float(logged[f"steerability/{name}{end}"]) for end in ("_low", "", "_high"))
        assert low < slope < high
        # two weights that sum to 1: what one does the other undoes
        assert float(logged[f"side_effect/{name}/{other}"]) == pytest.approx(-slope, rel=1e-4)


def test_one_preference_vector_tells_nothing(tiny_model: Path, tmp_path: Path) -> None:
    trainer, module, data = tiny_run(
        tiny_model, tmp_path, data={"grid": [[0.5, 0.5], [0.5, 0.5]]},
        trainer={"max_steps": 1, "callbacks": [Steerability()], "limit_val_batches": 1.0, "val_check_interval": 1},
    )  # fmt: skip
    with pytest.warns(UserWarning, match="one preference vector: nothing tells whether the policy obeys"):
        trainer.fit(module, data)
    assert all(trainer.callback_metrics[f"steerability/{name}"].isnan() for name in module.names)
