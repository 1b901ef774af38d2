"""Every YAML under configs/ can be instantiated, and says what it is for, how it is run and what came out."""

from __future__ import annotations

from pathlib import Path

import pytest

from miepo.cli.trainer import MiepoCLI
from miepo.exploration import Matching
from miepo.methods import RewardsInContext, SupervisedFineTuning
from miepo.methods.mi_epo import MIEPO
from miepo.objectives import Objective
from miepo.preferences import CornerPreferences

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = CONFIGS / "quickstart.yaml"
BASES = {  # what an overlay changes
    "methods": QUICKSTART,
    "conditioning": QUICKSTART,
    "safe_alignment": CONFIGS / "safe_alignment/online.yaml",
    "helpful_assistant": CONFIGS / "helpful_assistant/online_k2.yaml",
}
FILES = sorted(f for f in CONFIGS.rglob("*.yaml") if f.parent.name != "studies")  # those: test_study.py


def instantiate(*files: Path) -> MiepoCLI:
    args = [argument for file in files for argument in ("--config", str(file))]
    return MiepoCLI(run=False, args=args, save_config_callback=None)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(CONFIGS)))
def test_instantiates_and_has_a_header(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    base = BASES.get(file.parent.name)
    overlay = base is not None and (file.parent.name in ("methods", "conditioning") or file.stem in ("ric", "evaluate"))
    cli = instantiate(base, file) if overlay else instantiate(file)
    assert isinstance(cli.model, {"ric": RewardsInContext, "sft": SupervisedFineTuning}.get(file.stem, MIEPO))
    assert file.stem == "sft" or len([c for c in cli.trainer.callbacks if isinstance(c, Objective)]) >= 2
    header = [line for line in file.read_text().splitlines() if line.startswith("#")]
    for part in ("Purpose:", "Command:", "Run on:", "Result:"):
        assert any(line.startswith(f"# {part}") for line in header), part
    assert "TODO" not in file.read_text()
    assert any(f"configs/{file.relative_to(CONFIGS)}" in line for line in header)


def test_overlays_are_the_methods_they_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    plain = instantiate(QUICKSTART)
    assert not plain.model.exploration.active  # no term was shown to help there
    paper = instantiate(QUICKSTART, CONFIGS / "methods/mi_epo.yaml").model.exploration
    assert (paper.beta_w, paper.anchors, paper.num_counterfactuals) == (0.01, 2, 1)
    third = instantiate(QUICKSTART, CONFIGS / "methods/infonce.yaml").model.exploration
    assert (third.beta_w, third.anchors) == (0.003, 1)
    assert plain.datamodule.feedback == "per_objective"
    mo_odpo = instantiate(QUICKSTART, CONFIGS / "methods/mo_odpo.yaml")
    assert (mo_odpo.model.exploration.beta_w, mo_odpo.datamodule.feedback) == (0.0, "per_objective")
    scalarised = instantiate(QUICKSTART, CONFIGS / "methods/mo_odpo_scalarised.yaml")
    soups = instantiate(QUICKSTART, CONFIGS / "methods/rewarded_soups.yaml")
    (gate,) = soups.model.policy.conditioning
    assert isinstance(soups.datamodule.preferences, CornerPreferences)
    assert (gate.shared, soups.model.exploration.active) == (False, False)
    matching = instantiate(QUICKSTART, CONFIGS / "methods/matching.yaml", CONFIGS / "conditioning/gated.yaml")
    assert isinstance(matching.model.exploration, Matching)
    assert matching.model.policy.conditioning[0].shared
    assert (scalarised.model.exploration.beta_w, scalarised.datamodule.feedback) == (0.0, "scalarised")


def test_one_seed_fixes_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    cli = MiepoCLI(run=False, args=["--config", str(QUICKSTART), "--seed_everything", "7"], save_config_callback=None)
    assert cli.datamodule.seed == 7
