"""Configurations and checkpoints of the release before name modules by what they were called then."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from miepo.cli import main
from miepo.cli.serve import make_parser
from miepo.objectives import Brevity, RetryingObjective
from miepo.objectives.base import alike, identity_of
from miepo.policy import Policy
from miepo.renamed import RENAMED, new_name


@pytest.mark.parametrize("old", RENAMED)
def test_a_module_is_found_by_its_old_name_with_a_warning(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(FutureWarning, match=rf"{old} is called {RENAMED[old]} now"):
        module = import_module(old)
    assert module is import_module(RENAMED[old])  # so that isinstance holds
    monkeypatch.delitem(sys.modules, old, raising=False)


def test_a_module_in_a_renamed_package() -> None:
    assert new_name("miepo.datasets.hh_rlhf") == "miepo.data.datasets.hh_rlhf"
    assert new_name("miepo.datasets_of_mine") is None
    with pytest.raises(ModuleNotFoundError):
        import_module("miepo.nothing")


def test_a_configuration_with_old_names_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("miepo.datamodule", "miepo.module"):
        sys.modules.pop(name, None)
    old = ["--model=miepo.module.MIEPO", "--data=miepo.datamodule.OnlinePreferenceDataModule"]
    config = str(Path(__file__).parents[2] / "configs/quickstart.yaml")
    with pytest.warns(FutureWarning, match="now: use that name"), pytest.raises(SystemExit) as end:
        main(["fit", "--config", config, *old, "--print_config"])
    assert end.value.code == 0
    assert "learning_rate: 0.002" in capsys.readouterr().out


def test_settings_that_are_gone_are_passed_over_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration that the command has written holds every setting, set or not."""
    gone = {"per_token": False, "clip": None, "candidates": 1, "warmup": 0.0}
    term = {"class_path": "miepo.exploration.InfoNCE", "init_args": {"beta_w": 0.25, **gone}}
    quickstart = yaml.safe_load((Path(__file__).parents[2] / "configs/quickstart.yaml").read_text())
    quickstart["model"]["exploration"] = term
    file = tmp_path / "old.yaml"
    file.write_text(yaml.safe_dump(quickstart))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(file), "--print_config"])
    assert end.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["exploration"] == {
        "class_path": "miepo.exploration.InfoNCE",
        "init_args": {"beta_w": 0.25, "num_counterfactuals": 1, "anchors": 2},
    }
    term["init_args"]["warmup"] = 0.5
    file.write_text(yaml.safe_dump(quickstart))
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(file), "--print_config"])
    assert end.value.code == 2
    assert "InfoNCE has no setting warmup any more: tools/study/exploration.py has" in capsys.readouterr().err


def test_a_class_by_its_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("miepo.objectives", "miepo.objectives.retrying"):
        with pytest.warns(FutureWarning, match=f"{module}.Patient is called RetryingObjective now"):
            assert import_module(module).Patient is RetryingObjective
        with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
            _ = import_module(module).Nothing


def test_a_normalisation_that_was_kept_under_an_old_name_is_of_the_same_objective() -> None:
    now = identity_of(RetryingObjective(Brevity()))
    assert alike(now | {"class": "miepo.objectives.patient.Patient"}, now)
    assert not alike(now | {"class": "miepo.objectives.patient.Other"}, now)


def test_an_option_by_its_old_name() -> None:
    parser = make_parser()
    with pytest.warns(FutureWarning, match="--most_tokens is called --max_tokens now"):
        options = parser.parse_args(["--ckpt_path", "x", "--most_tokens", "9"])
    assert (options.max_tokens, options.max_queue) == (9, 64)
    assert "most_tokens" not in parser.format_help()


def test_a_setting_by_its_old_name() -> None:
    with pytest.warns(FutureWarning, match="policy.tokens_per_pass is called max_tokens_per_micro_batch now"):
        assert Policy("base", tokens_per_pass=40).max_tokens_per_micro_batch == 40
