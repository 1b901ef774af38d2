"""Two processes on one machine, started as torchrun starts them, against one with a batch twice as large."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.helpers.data import write_rows
from tests.helpers.interruption import logged
from tests.helpers.launch import torchrun
from tests.integration.test_cli import callbacks, config, run

ROOT = Path(__file__).parents[2]
PROMPTS = ["the garden", "people like rain", "food", "in spring", "a good place", "when rain comes", "grow food"]
PROMPTS += ["it is good", "rain in spring", "people grow food"]


def values_of(model: Path, root: Path, batch_size: int, **changes: Any) -> dict:
    values = config(model, root, **changes)
    values["trainer"] |= {"max_epochs": 2, "gradient_clip_val": 1.0}
    values["trainer"]["callbacks"] = callbacks()
    # 3 prompts x 3 vectors do not divide by two: the shares of an evaluation are uneven
    values["data"] |= {"prompts": PROMPTS, "batch_size": batch_size, "evaluation_batch_size": 4}
    values["model"]["policy"]["init_args"]["lora_dropout"] = 0.0  # is of each process
    return values


def torchrun_itself(*args: str) -> tuple[int, str, float]:
    """The command that the README names: exit status, what was printed, and seconds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", *args]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    start = time.monotonic()
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    return ended.returncode, ended.stdout, time.monotonic() - start


def fit_by_two(
    values: dict, root: Path, strategy: str, *args: str, start: Callable[..., tuple[int, str, float]] = torchrun
) -> tuple[int, str, float]:
    file = root / "two.yaml"
    file.write_text(yaml.safe_dump(values))
    return start("miepo", "fit", "--config", str(file), "--trainer.devices", "2", "--trainer.strategy", strategy, *args)


def assert_alike(two: Path, one: Path) -> None:
    """Every logged figure and every weight, up to the order of sums."""
    rows, expected = logged(two), logged(one)
    assert [r.keys() for r in rows] == [r.keys() for r in expected]
    for row, other in zip(rows, expected, strict=True):
        first = row["step"] == "0"  # rounding, which sums in another order differ by, grows from step to step
        for key in row:
            value = pytest.approx(
                float(other[key]), rel=1e-5 if first else 1e-3, abs=1e-5 if first else 1e-3, nan_ok=True
            )
            assert float(row[key]) == value, (key, row["step"])
    files = [run / "evaluations/step_000000.jsonl" for run in (two, one)]
    answers = [file.read_text().partition("\n")[2] for file in files if file.exists()]  # behind what was measured
    assert len(set(answers)) <= 1
    a, b = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (two, one))
    for name, weight in b["state_dict"].items():
        torch.testing.assert_close(a["state_dict"][name], weight, rtol=1e-3, atol=1e-5)
    assert a.get("OnlinePreferenceDataModule") == b.get("OnlinePreferenceDataModule")  # responses scored


@pytest.fixture(scope="module")
def one(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    root = tmp_path_factory.mktemp("one")
    run("fit", values_of(tiny_model, root, 4), root)
    return root / "run/version_0"


@pytest.mark.parametrize(("strategy", "start"), [("ddp", torchrun_itself), ("sharded", torchrun)])
def test_two_are_one_process_with_the_batch_of_both(
    one: Path, strategy: str, start: Callable[..., tuple[int, str, float]], tiny_model: Path, tmp_path: Path
) -> None:
    values = values_of(tiny_model, tmp_path, 2)
    if strategy == "sharded":  # which must not notice that one process has more to compute than the other
        values["model"]["policy"]["init_args"] |= {"max_tokens_per_micro_batch": 40, "gradient_checkpointing": True}
    status, said, _ = fit_by_two(values, tmp_path, strategy, start=start)
    assert status == 0, said
    assert_alike(tmp_path / "run/version_0", one)


@pytest.mark.parametrize("second", ["ddp", "sharded"])
def test_two_stop_where_one_is_asked_to_and_go_on(one: Path, second: str, tiny_model: Path, tmp_path: Path) -> None:
    """In the middle of an epoch; a checkpoint is the same under every strategy."""
    values = values_of(tiny_model, tmp_path, 2)
    stopped = yaml.safe_load(yaml.safe_dump(values))
    stopped["trainer"]["callbacks"].append({"class_path": "tests.helpers.interruption.StopsOnOne"})
    status, said, _ = fit_by_two(stopped, tmp_path, "ddp")
    assert status != 0
    assert "Stopped by SIGTERM after 1 steps" in said
    status, said, _ = fit_by_two(values, tmp_path, second, "--ckpt_path", "last")
    assert status == 0, said
    assert_alike(tmp_path / "run/version_0", one)


def test_a_sharded_base_is_gathered_for_each_token_where_it_must_be(tiny_model: Path, tmp_path: Path) -> None:
    """Trains, evaluates and ends: with `generate`, whose draws are of the batch, figures are not those of one."""
    strategy = "{class_path: miepo.training.sharded_strategy.ShardedStrategy, init_args: {gather_for_rollout: false}}"
    status, said, _ = fit_by_two(values_of(tiny_model, tmp_path, 2), tmp_path, strategy)
    assert status == 0, said
    steps = [float(row["loss"]) for row in logged(tmp_path / "run/version_0") if "loss" in row]
    assert len(steps) == 6
    assert all(abs(loss) < 10 for loss in steps)


@pytest.mark.parametrize("how", ["gather", "layers"])
def test_prompts_that_end_at_other_times_keep_no_process_waiting(how: str, tiny_model: Path) -> None:
    status, said, _ = torchrun("tests.helpers.two_processes", str(tiny_model), how)
    assert status == 0, said
    assert "process 0: 40 tokens, same True, 0.50 of the layers" in said
    assert "process 1: 1 tokens, same True, 0.50 of the layers" in said


def test_other_ways_to_split_a_network_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    values = values_of(tiny_model, tmp_path, 2)
    strategy = "{class_path: lightning.pytorch.strategies.ModelParallelStrategy}"
    status, said, _ = fit_by_two(values, tmp_path, strategy)
    assert status != 0
    assert "miepo: error: expected trainer.strategy ddp, or sharded for a base that does not fit one device" in said


def test_supervised_fine_tuning_by_two(tiny_base_model: Path, tmp_path: Path) -> None:
    """11 examples: at the end of an epoch one process has two rows and the other one."""
    rows = [{"prompt": p, "response": r} for p, r in zip(PROMPTS, PROMPTS[::-1], strict=True)]
    write_rows(tmp_path / "examples.jsonl", [*rows, {"prompt": "the garden", "response": "people like it"}])
    found = []
    for name, size in (("one", 4), ("two", 2)):
        root = tmp_path / name
        root.mkdir()
        values: dict[str, Any] = config(tiny_base_model, root)
        values["trainer"] |= {"max_epochs": 2, "callbacks": []}
        data = {"examples": str(tmp_path / "examples.jsonl"), "batch_size": size}
        data["validation_examples"] = data["examples"]
        policy = {"base": str(tiny_base_model), "conditioning": [], "lora_rank": 2, "lora_dropout": 0.0}
        policy["template"] = "{prompt}{preference}"
        arguments = {"policy": {"class_path": "miepo.Policy", "init_args": policy}, "learning_rate": 0.01}
        values |= {
            "model": {"class_path": "miepo.methods.SupervisedFineTuning", "init_args": arguments},
            "data": {"class_path": "miepo.methods.SupervisedDataModule", "init_args": data},
            "objectives": [],
        }
        if name == "one":
            run("fit", values, root)
        else:
            status, said, _ = fit_by_two(values, root, "ddp")
            assert status == 0, said
        found.append(root / "run/version_0")
    assert_alike(found[1], found[0])
    one, two = (AutoModelForCausalLM.from_pretrained(run / "merged").state_dict() for run in found)
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("source", "strategy"), [("sampled", "ddp"), ("sampled", "sharded"), ("file", "ddp")])
def test_rewards_in_context_by_two(tiny_model: Path, tmp_path: Path, source: str, strategy: str) -> None:
    """Both imitate from one pool, to which each has sampled its share."""
    found = []
    for name, size in (("one", 4), ("two", 2)):
        root = tmp_path / name
        root.mkdir()
        values = values_of(tiny_model, root, size)
        policy = values["model"].pop("policy")["init_args"]
        policy["conditioning"] = [{"class_path": "miepo.methods.ric.TargetConditioning"}]
        arguments = {"policy": {"class_path": "miepo.Policy", "init_args": policy}, "learning_rate": 0.01}
        if source == "file":
            rows = [{"prompt": p, "response": r} for p, r in zip(PROMPTS, PROMPTS[::-1], strict=True)]
            write_rows(root / "examples.jsonl", rows[:7])
            values["data"]["offline_rows"] = str(root / "examples.jsonl")
        values |= {
            "model": {"class_path": "miepo.methods.RewardsInContext", "init_args": arguments},
            "data": {"class_path": "miepo.methods.RewardsInContextDataModule", "init_args": values["data"]},
        }
        if name == "one":
            run("fit", values, root)
        else:
            status, said, _ = fit_by_two(values, root, strategy)
            assert status == 0, said
            assert ("RiC stage 0: 7 responses scored" in said) is (source == "file")
        found.append(root / "run/version_0")
    assert_alike(found[1], found[0])
    pools = [torch.load(f / "checkpoints/last.ckpt", weights_only=True)["RewardsInContextDataModule"] for f in found]
    assert pools[0]["scored_responses"] == pools[1]["scored_responses"] > 0
    for key in ("pool", "offline_pool"):
        assert pools[0][key]["prompts"] == pools[1][key]["prompts"]
        assert torch.equal(pools[0][key]["responses"]["ids"], pools[1][key]["responses"]["ids"])


def test_all_processes_normalise_alike(tiny_model: Path, tmp_path: Path) -> None:
    values = values_of(tiny_model, tmp_path, 2)
    values["objectives"][0] = {"class_path": "tests.helpers.interruption.DiffersByProcess"}
    told = [{"class_path": "tests.helpers.interruption.TellsNormalisation"}]
    values["trainer"] |= {"num_sanity_val_steps": 0, "limit_val_batches": 0, "max_epochs": 1, "callbacks": told}
    status, said, _ = fit_by_two(values, tmp_path, "ddp")
    assert status == 0, said
    found = re.findall(r"process \d has (.*)", said)
    assert len(found) == 2
    assert len(set(found)) == 1


@pytest.mark.parametrize("when", ["rollout", "evaluation"])
def test_what_fails_on_one_process_ends_all_with_that_error(tiny_model: Path, tmp_path: Path, when: str) -> None:
    values = values_of(tiny_model, tmp_path, 2)
    values["objectives"][0] = {"class_path": "tests.helpers.interruption.FailsOnOne"}
    if when == "rollout":
        values["trainer"] |= {"num_sanity_val_steps": 0, "limit_val_batches": 0}
    else:
        values["data"]["validation_prompts"] = PROMPTS
    status, said, seconds = fit_by_two(values, tmp_path, "ddp")
    assert status != 0
    assert seconds < 60
    cause = "objective unlucky failed to score: ValueError: the reward server is on fire"
    assert said.count(f"miepo: error: {cause}") == 1  # the process where it happened
    assert "miepo: error: another process ended" in said  # and the one that would have waited
