"""A few kills of the harness that README's figures come from."""

from __future__ import annotations

import pytest

from tools.kill_runs import main


def test_a_killed_run_ends_as_one_that_was_not(capsys: pytest.CaptureFixture) -> None:
    assert main(["--kills", "3", "--kills_per_run", "3", "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    assert "Every run ended as the undisturbed one, bit for bit." in printed
    assert "3 kills in" in printed
