"""Two workers of Ray on one machine, against two processes under torchrun: the same run, with a death, too."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from miepo.cli.command import main
from tests.helpers.interruption import kept, logged, same
from tests.integration.test_processes import ROOT, fit_by_two, values_of

ray = pytest.importorskip("ray")
ON_RAY = ("--launcher", "ray", "--ray.num_workers", "2")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One for all tests, since each takes seconds to start; the commands here find this process connected."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # these steps take less than its two seconds
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PYTHONPATH", str(ROOT))  # of servers, which are commands of their own
        ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, logging_level="ERROR")
        yield
        ray.shutdown()


def fit_on_ray(values: dict, root: Path, *args: str) -> None:
    file = root / "ray.yaml"
    file.write_text(yaml.safe_dump(values))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        main(["fit", "--config", str(file), *ON_RAY, *args])


def expected(model: Path, root: Path, strategy: str, **data: Any) -> Path:
    """The run of two processes that no one disturbs."""
    root.mkdir()
    values = values_of(model, root, 2)
    values["data"] |= data
    status, said, _ = fit_by_two(values, root, strategy)
    assert status == 0, said
    return root / "run/version_0"


def test_two_workers_are_two_processes_and_begin_again_where_one_died(
    cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    """Bit for bit; the second worker gets SIGKILL after the third step, and the first step is lost with it."""
    values = values_of(tiny_model, tmp_path, 2)
    values["checkpoint"] = {"every_n_steps": 2}
    values["trainer"]["callbacks"].append(
        {"class_path": "tests.helpers.interruption.DiesOnce", "init_args": {"marks": str(tmp_path / "marks")}}
    )
    fit_on_ray(values, tmp_path, "--trainer.strategy", "ddp")
    assert (tmp_path / "marks").read_text().split() == ["begins", "0", "dies", "3", "begins", "2"]
    (version,) = (tmp_path / "run").iterdir()
    whole = expected(tiny_model, tmp_path / "torchrun", "ddp")
    assert logged(version) == logged(whole)
    assert same(kept(version), kept(whole))
    (reported,) = tmp_path.glob("ray_checkpoints/miepo-*/checkpoint_*/last.ckpt")
    assert reported.read_bytes() == (version / "checkpoints/last.ckpt").read_bytes()
    saved = yaml.safe_load((version / "config.yaml").read_text())
    assert (saved["launcher"], saved["trainer"]["strategy"]) == (None, "ddp")  # it runs without Ray, too


def test_a_sharded_base_goes_on_in_the_folder_of_its_run(cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    """The first part under torchrun, the second on Ray."""
    whole = expected(tiny_model, tmp_path / "torchrun", "sharded")
    values = values_of(tiny_model, tmp_path, 2)
    stopped = yaml.safe_load(yaml.safe_dump(values))
    stopped["trainer"]["callbacks"].append({"class_path": "tests.helpers.interruption.StopsOnOne"})
    _, said, _ = fit_by_two(stopped, tmp_path, "sharded")
    assert "Stopped by SIGTERM after 1 steps" in said
    fit_on_ray(values, tmp_path, "--trainer.strategy", "sharded", "--ckpt_path", "last")
    (version,) = (tmp_path / "run").iterdir()
    assert logged(version) == logged(whole)
    assert same(kept(version), kept(whole))


def test_rollout_servers_beside_the_workers(cluster: None, tiny_model: Path, tmp_path: Path) -> None:
    """Two small servers as actors, batches ahead, two workers: the figures of servers that are there already."""
    words = [sys.executable, "-m", "tests.helpers.vllm_server", str(tiny_model), "--gates", "--port", "{port}"]
    words += ["--host", "0.0.0.0"]
    values = values_of(tiny_model, tmp_path, 2)
    values["trainer"] |= {"max_steps": 3, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    values["data"] |= {"staleness": 1, "engine": {"class_path": "miepo.rollout.ServerEngine"}}
    values["ray"] = {"rollout_servers": 2, "rollout_cpus": 0.0, "rollout_command": words}
    fit_on_ray(values, tmp_path)
    (version,) = (tmp_path / "run").iterdir()
    rows = [row for row in logged(version) if "rollout/gap" in row]
    assert [float(row["rollout/staleness"]) for row in rows] == [0, 1, 1]
    assert float(rows[0]["rollout/gap"]) < 1e-4
    assert all(float(row["count/asked_again"]) == 0 for row in rows)
    left = [p for p in psutil.process_iter(["cmdline"]) if "tests.helpers.vllm_server" in (p.info["cmdline"] or [])]
    assert not [process for process in left if str(tiny_model) in process.info["cmdline"]]


def test_more_workers_than_there_is_room_for(
    cluster: None, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        fit_on_ray(values_of(tiny_model, tmp_path, 2), tmp_path, "--ray.num_workers", "3")
    said = capsys.readouterr().err
    assert "expected ray.num_workers of at most 2, got 3: each needs 1 CPU, and the cluster has 2 CPU" in said
    assert not (tmp_path / "run").exists()
