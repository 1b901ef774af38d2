"""The README's examples are run as they stand there."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from miepo import load
from miepo.cli.command import main
from miepo.serving.app import make_app
from miepo.serving.batcher import Batcher
from tests.helpers.serving import running
from tests.integration.test_cli import config, run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_add_an_objective(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class and the overlay, saved where the README says, and its command; on a tiny model."""
    (python,) = [b for b in blocks("python") if "class Excitement" in b]
    assert len([line for line in python.splitlines() if line.strip()]) <= 15
    (overlay,) = [b for b in blocks("yaml") if "exclamations.Excitement" in b]
    (command,) = [b for b in blocks("bash") if "excitement.yaml" in b]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "exclamations.py").write_text(python)
    (tmp_path / "excitement.yaml").write_text(overlay)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    small = {
        "trainer": {
            "limit_train_batches": 1, "enable_progress_bar": False,
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}}],
        },
        "model": {"policy": {"init_args": {"base": str(tiny_model), "dtype": "float32", "lora_layers": 2}}},
        "data": {"max_new_tokens": 24, "validation_limit": 2, "normalise_on": 32},  # enough for one exclamation mark
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    program, *args = command.split()
    assert program == "miepo"
    main([*args, "--config", "small.yaml"])
    (metrics,) = tmp_path.glob("runs/**/metrics.csv")
    assert "reward/excitement" in metrics.read_text().splitlines()[0]


@pytest.fixture(scope="module")
def quickstart_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the README's run lies; with a tiny model and objectives of the same names."""
    root = tmp_path_factory.mktemp("readme")
    values = config(tiny_model, root)
    entry = {"class_path": "miepo.objectives.Brevity", "init_args": {"characters": 60, "name": "cheerfulness"}}
    values["objectives"] = [entry, {"class_path": "miepo.objectives.Brevity"}]
    run("fit", values, root)
    (root / "runs").mkdir()
    (root / "run").rename(root / "runs/quickstart")
    return root


def test_use_the_policy(
    quickstart_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (python,) = [b for b in blocks("python") if "miepo.load" in b]
    assert len([line for line in python.splitlines() if line.strip()]) <= 6
    monkeypatch.chdir(quickstart_run)
    found: dict[str, Any] = {}
    exec(compile(python, "README.md", "exec"), found)
    assert len(found["answers"]) == 2
    assert "'brevity': [" in capsys.readouterr().out
    assert "<img" in found["policy"].front._repr_html_()


def test_ask_the_server(quickstart_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (python,) = [b for b in blocks("python") if "OpenAI" in b]
    policy = load(quickstart_run / "runs/quickstart/version_0")
    batcher = Batcher(policy.policy)
    with running(make_app(policy, batcher)) as address:
        found: dict[str, Any] = {}
        exec(compile(python.replace("http://127.0.0.1:8000", address), "README.md", "exec"), found)
        found["client"].close()
    batcher.close()
    assert "{'cheerfulness': 0.2, 'brevity': 0.8}" in capsys.readouterr().out


def test_export_and_report(quickstart_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quickstart_run)
    commands = [line for b in blocks("bash") for line in b.splitlines() if re.match("miepo (export|report)", line)]
    assert len(commands) == 4
    for command in commands:
        main(shlex.split(command)[1:])
    for name in (
        "brief/adapter_config.json",
        "brief_model/model.safetensors",
        "every_preference/miepo.json",
        "report.html",
    ):
        assert Path(name).is_file()


def test_the_two_commands_stand_there_exactly() -> None:
    for command in (
        'pip install -c tools/constraints.txt -e ".[quickstart]" && miepo fit --config configs/quickstart.yaml',
        'pip install -c tools/constraints.txt -e ".[test]" && OMP_NUM_THREADS=1 pytest -n 2',
    ):
        assert f"```bash\n{command}\n```" in README
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("OMP_NUM_THREADS=1 pytest -n 2")


def test_every_class_path_and_file_it_names_exists() -> None:
    import importlib

    for path in re.findall(r"`?(miepo\.(?:objectives|router|callbacks|rollout)\.[A-Z]\w+)", README):
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path
    for file in re.findall(r"(?:configs|tools|miepo)/[\w/]+\.(?:yaml|py|png|txt)", README):
        assert (ROOT / file).exists(), file
    for file in re.findall(r"`(\w+\.py)`", README):
        assert (ROOT / "miepo" / file).exists() or file == "exclamations.py", file


def test_nothing_is_left_to_fill_in() -> None:
    assert "<!--" not in README
    assert "TODO" not in README


def test_yaml_examples_parse() -> None:
    for block in blocks("yaml"):
        assert [*yaml.safe_load(block)] in (["objectives"], ["data"])
