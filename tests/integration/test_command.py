"""The command line from outside: the options of fit, the shell's completion, the wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from miepo.cli import main
from miepo.cli.command import COMMANDS
from miepo.cli.configurations import packaged_configurations

ROOT = Path(__file__).parents[2]


def test_fit_shows_the_settings_of_model_policy_data_and_objectives(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    lines = capsys.readouterr().out.splitlines()
    for option in (
        "model.learning_rate", "model.exploration", "model.policy.init_args.base", "data.prompts", "data.grid",
        "trainer.max_epochs",
    ):  # fmt: skip
        assert any(line.startswith(f"  --{option} ") for line in lines), option
    assert not any(line.startswith("  --data.seed ") for line in lines)  # --seed_everything sets it
    assert any(line.startswith("How objectives are given: ") for line in lines)


@pytest.mark.parametrize(
    ("asked", "option"),
    [
        ("--objectives.help=Brevity", "objectives.characters"),
        ("--model.help=miepo.MIEPO", "model.beta_c"),
        ("--model.policy.help=miepo.policy.Policy", "policy.lora_rank"),
        ("--model.exploration.help=InfoNCE", "exploration.beta_w"),
        ("--data.help=miepo.OnlinePreferenceDataModule", "data.grid"),
        ("--trainer.callbacks.help=miepo.callbacks.CollapseGuard", "trainer.callbacks.window"),
    ],
)
def test_the_help_of_one_class(asked: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", asked])
    printed = capsys.readouterr().out
    assert f"--{option} " in printed


# -- completion --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import contextlib

    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        with (folder / shell).open("w") as file, contextlib.redirect_stdout(file):
            main(["completion", shell])
    return folder


def bash(scripts: Path, *words: str) -> list[str]:
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        f'source {scripts}/bash; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _miepo; echo "${{COMPREPLY[@]}}"'
    )
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()


def zsh(scripts: Path, *words: str) -> list[str]:
    """What the script offers; the shell itself drops what does not begin as the word does."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        "compdef() {}; _files() {}; compadd() { shift; print -r -- $@ }; "
        f"source {scripts}/zsh; words=({quoted}); CURRENT={len(words)}; _miepo"
    )
    found = subprocess.run(["zsh", "-f", "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in found if name.startswith(words[-1])]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, scripts: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert subprocess.run([shell, "-n", str(scripts / shell)]).returncode == 0
    complete = {"bash": bash, "zsh": zsh}[shell]
    assert complete(scripts, "miepo", "") == [*COMMANDS, "--help", "--version"]
    assert complete(scripts, "miepo", "comp") == ["completion"]
    assert complete(scripts, "miepo", "fit", "--model.learn") == ["--model.learning_rate"]
    assert complete(scripts, "miepo", "predict", "--writer.pa") == ["--writer.path"]
    assert complete(scripts, "miepo", "validate", "--data.pro") == [
        "--data.prompts.help",
        "--data.prompts",
        "--data.prompts+",
        "--data.prompt_field",
    ]
    assert "--model.policy.init_args.base" in complete(scripts, "miepo", "fit", "--x", "1", "--model.policy")
    assert complete(scripts, "miepo", "serve", "--po") == ["--port"]
    assert complete(scripts, "miepo", "fit", "--config", "quick") == ["quickstart"]
    assert complete(scripts, "miepo", "fit", "--config", "") == list(packaged_configurations())
    assert complete(scripts, "miepo", "report", "runs") == []  # files, by the shell itself


# -- the wheel ---------------------------------------------------------------------------------------------------------


def test_the_wheel_runs_outside_the_checkout(tmp_path: Path) -> None:
    source, site, elsewhere = tmp_path / "source", tmp_path / "site", tmp_path / "elsewhere"
    for folder in ("miepo", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / file, source)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        file.extractall(site)
    inside = {name.removeprefix("miepo/configs/").removesuffix(".yaml") for name in names if name.endswith(".yaml")}
    assert inside == set(packaged_configurations())
    assert {"miepo/data/everyday_train.jsonl", "miepo/report/page.html.jinja", "miepo/py.typed"} <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "miepo",
        wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info",
    }
    elsewhere.mkdir()

    def miepo(*args: str) -> str:
        command = [sys.executable, "-m", "miepo", *args]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=elsewhere, env=os.environ | {"PYTHONPATH": str(site)}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    config = yaml.safe_load(miepo("fit", "--config", "quickstart", "--config", "methods/mo_odpo", "--print_config"))
    assert config["model"]["init_args"]["exploration"]["init_args"]["beta_w"] == 0.0
    miepo("init", "mine")
    assert yaml.safe_load((elsewhere / "mine.yaml").read_text())["data"]["batch_size"] == 4
