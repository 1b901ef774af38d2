"""A whole study in processes: resumed, with a crash, reported."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch

from tools.study.__main__ import main

STUDY = """
prepare: tests.helpers.study.prepare
true_front: tools.study.language.true_front
config: configs/studies/tasks/tiny.yaml
set:
  model.policy.base: "{parts}/base"
  data.prompts: "{parts}/train.jsonl"
  data.validation_prompts: "{parts}/validation.jsonl"
  data.batch_size: 2
  data.grid: 3
  trainer.limit_train_batches: 4
  trainer.val_check_interval: 2
seeds: 2
processes: 2
baseline: mo_odpo
methods:
  mo_odpo: {label: MO-ODPO, config: [configs/methods/mo_odpo.yaml]}
  ric: {label: RiC, config: [configs/methods/ric.yaml]}
"""
CRASH = "  broken: {set: {objectives: '[{class_path: tests.helpers.tiny.Broken}]'}}\n"


def test_a_study_from_start_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text(STUDY + CRASH)
    assert main([str(file), "--out", str(out)]) == 1  # something failed, and the rest went on
    printed = capsys.readouterr().out
    assert "broken, seed 0: exit status 2: miepo: error: objective broken failed to score" in printed
    rows = pd.read_csv(out / "results.csv")
    assert sorted(set(zip(rows.method, rows.seed, rows.step, strict=True))) == [
        (m, s, n) for m in ("mo_odpo", "ric") for s in (0, 1) for n in (2, 4)
    ]
    assert set(rows.loc[rows.step == 4, "scored_responses"]) == {16}  # 4 steps x 2 prompts x 2, for both methods
    numbers = [
        "front/hv",
        "front/mip",
        "front/crd",
        "information/preference",
        "front/sd/warmth",
        "overlap",
        "kl",
        "length",
    ]
    assert rows[numbers].notna().all().all()
    page = (out / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)|@import|url\(", page)  # no network
    assert 'name="viewport"' in page
    for text in ("MO-ODPO (2)", "Difference to MO-ODPO", "HV gap", "I(Y;W|X)", "broken, seed 1"):
        assert text in page, text
    assert 'class="clear"' not in page  # of two seeds nothing is called clear of zero
    assert {f.name for f in out.glob("*.png")} == {"fronts.png", "information.png"}

    # resumed: what has rows is not repeated, wherever it was made; what ended without them is taken up; the rest runs
    file.write_text(STUDY)
    kept = (tmp_path / "small.jsonl").read_text().splitlines()
    assert len(kept) == 4
    two = [line for line in kept if '"seed": 1' not in line]
    (tmp_path / "small.jsonl").write_text("\n".join(two) + "\n")
    redone = out / "ric/seed_1/result.json"
    redone.unlink()
    shutil.rmtree(out / "mo_odpo/seed_0")
    (out / "ric/seed_0/failed.txt").write_text("exit status 1: here, while another machine ended it")
    before = (out / "mo_odpo/seed_1/result.json").stat().st_mtime_ns
    assert main([str(file), "--out", str(out)]) == 0
    assert not (out / "mo_odpo/seed_0").exists()
    assert (out / "mo_odpo/seed_1/result.json").stat().st_mtime_ns == before
    assert redone.exists()
    now = (tmp_path / "small.jsonl").read_text().splitlines()
    assert now[:2] == two
    assert {comparable(line) for line in now} == {comparable(line) for line in kept}
    run = json.loads(now[-1])
    assert (run["precision"], run["threads"], run["names"]) == ("float32", 1, ["formality", "warmth"])
    assert f"torch {torch.__version__}" in run["versions"]
    again = pd.read_csv(out / "results.csv")
    same = [c for c in rows.columns if c != "seconds"]
    pd.testing.assert_frame_equal(rows[same], again[same])  # a run repeats itself

    file.write_text(STUDY.replace("data.grid: 3", "data.grid: 4"))  # the old runs are of another study
    assert main([str(file), "--out", str(out)]) == 2
    assert re.search(r"small.jsonl holds rows of other settings than \w+, seed 0 has now", capsys.readouterr().err)
    assert main([str(file), "--out", str(out), "--rows", str(tmp_path / "new.jsonl")]) == 2
    assert "holds a run of other settings than ric, seed 0 has now" in capsys.readouterr().err
    assert main([str(file), "--report", "--out", str(tmp_path / "elsewhere")]) == 2
    assert "holds rows of other settings" in capsys.readouterr().err
    file.write_text(STUDY)
    assert main([str(file), "--report", "--out", str(tmp_path / "elsewhere")]) == 0  # from the rows alone
    assert (tmp_path / "elsewhere/summary.md").read_text() == (out / "summary.md").read_text()

    file.write_text(STUDY + "  longer: {set: {trainer.limit_train_batches: 6}}\n")
    assert main([str(file), "--out", str(out)]) == 2
    assert "expected runs of one budget, got different scored responses" in capsys.readouterr().err


def comparable(line: str) -> str:
    """What repeats itself of a run's line."""
    run = json.loads(line)
    rows = [row | {"seconds": 0} for row in run["evaluations"]]
    return json.dumps(run | {"evaluations": rows, "commit": None}, sort_keys=True)


def test_a_stopped_study_ends_at_once_and_leaves_no_process(tmp_path: Path) -> None:
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text(STUDY.replace("trainer.limit_train_batches: 4", "trainer.limit_train_batches: 100000"))
    command = [sys.executable, "-m", "tools.study", str(file), "--out", str(out)]
    study = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        wait_for(lambda: any((out / "mo_odpo").glob("seed_*/log.txt")), 120)
        time.sleep(0.5)  # the second run may be starting, or not
        study.terminate()
        assert "study: stopped" in study.communicate(timeout=60)[1]
        assert study.returncode == 130
        wait_for(lambda: not group_exists(study.pid), 30)
    finally:
        if group_exists(study.pid):
            os.killpg(study.pid, signal.SIGKILL)
    assert not list(out.rglob("result.json"))
    assert not list(out.rglob("failed.txt"))  # stopped is not failed


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_mistake_ends_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.yaml"
    file.write_text(STUDY.replace("baseline: mo_odpo", "baseline: dpo"))
    assert main([str(file), "--out", str(tmp_path / "out")]) == 2
    assert "baseline names the unknown method 'dpo'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
