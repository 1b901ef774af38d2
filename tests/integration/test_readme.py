"""The README's examples are run as they stand there."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from miepo.cli import main

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
        "model": {"policy": {"init_args": {"base": str(tiny_model), "dtype": "float32"}}},
        "data": {"max_new_tokens": 24, "validation_limit": 2, "normalise_on": 32},  # enough for one exclamation mark
    }  # fmt: skip
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    program, *args = command.split()
    assert program == "miepo"
    main([*args, "--config", "small.yaml"])
    (metrics,) = tmp_path.glob("runs/**/metrics.csv")
    assert "reward/excitement" in metrics.read_text().splitlines()[0]


def test_the_two_commands_stand_there_exactly() -> None:
    for command in (
        'pip install -c tools/constraints.txt -e ".[quickstart]" && miepo fit --config configs/quickstart.yaml',
        'pip install -c tools/constraints.txt -e ".[test]" && pytest',
    ):
        assert f"```bash\n{command}\n```" in README
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("pytest")


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
