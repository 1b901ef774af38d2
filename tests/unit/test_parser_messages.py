"""A mistake in a configuration or an option is one sentence: where, what was expected, what came, what was meant."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback

from miepo.cli.command import main
from miepo.cli.parser_messages import one_sentence
from tests.helpers.fit import PROMPTS

CONFIG = {
    "trainer": {"max_steps": 1, "callbacks": [{"class_path": "miepo.callbacks.Steerability"}]},
    "objectives": [{"class_path": "miepo.objectives.Brevity"}],
    "model": {"policy": {"class_path": "miepo.policy.Policy", "init_args": {"base": "nowhere"}}},
    "data": {"prompts": PROMPTS},
}
POLICY = "model.policy.init_args"


class Picky(Callback):
    """Raises in its constructor as code that knows nothing of miepo does."""

    def __init__(self, top: int = 3) -> None:
        if top < 1:
            raise ValueError(f"top must be positive, got {top}")


def changed(path: str, value: Any) -> dict[str, Any]:
    values: Any = deepcopy(CONFIG)
    *keys, last = path.split(".")
    inside = values
    for key in keys:
        inside = inside[int(key)] if isinstance(inside, list) else inside.setdefault(key, {})
    inside[int(last) if isinstance(inside, list) else last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("objectives.0.class_path", "miepo.objectives.Brevty",
         "objectives: miepo.objectives has no Brevty: did you mean Brevity?"),
        ("objectives.0.class_path", "Brevty",
         "objectives: expected the import path of a class, or the name of an installed one, got 'Brevty': did you mean Brevity?"),
        ("objectives.0.class_path", "mine.vowels.Vowel", "objectives: there is no module mine, neither in the current folder nor installed"),
        ("objectives.0.init_args", {"charcters": 10},
         "objectives: Brevity has no setting 'charcters': did you mean characters?"),
        ("objectives.0.init_args", {"characters": "ten"}, "objectives.characters: expected int, got 'ten'"),
        ("objectives", {"class_path": "miepo.objectives.Brevity"},
         "objectives: expected list, got {'class_path': 'miepo.objectives.Brevity'}"),
        ("data.batch_size", "four", "data.batch_size: expected int, got 'four'"),
        ("data.batchsize", 4, "data: OnlinePreferenceDataModule has no setting 'batchsize': did you mean batch_size?"),
        ("data.feedback", "both", "data.feedback: expected 'per_objective' or 'scalarised', got 'both'"),
        ("data.grid", [1, 2], "data.grid: expected int or list or null, got [1, 2]"),
        ("data.engine", {"class_path": "miepo.rollout.VLLM"}, "data.engine: miepo.rollout has no VLLM"),
        ("model.larning_rate", 0.1, "model: MIEPO has no setting 'larning_rate': did you mean learning_rate?"),
        (f"{POLICY}.lora_rank", "eight", "model.policy.lora_rank: expected int, got 'eight'"),
        (f"{POLICY}.conditioning", [{"class_path": "miepo.GatedConditionin"}],
         "model.policy.conditioning: miepo has no GatedConditionin: did you mean GatedConditioning?"),
        ("trainer.callbacks.0.class_path", "miepo.callbacks.ParetoFrnt",
         "trainer.callbacks: miepo.callbacks has no ParetoFrnt: did you mean ParetoFront?"),
        ("trainer.callbacks.0", {"class_path": "miepo.callbacks.PreferenceInformation", "init_args": {"evry": 2}},
         "trainer.callbacks: PreferenceInformation has no setting 'evry': did you mean every?"),
        ("trainer.max_step", 3, "trainer has no setting 'max_step': did you mean max_steps?"),
        ("trainer.max_steps", "x", "trainer.max_steps: expected int, got 'x'"),
        ("modl", {"x": 1}, "the configuration has no setting 'modl.x': did you mean model?"),
        ("trainer.callbacks.0", {"class_path": f"{__name__}.Picky", "init_args": {"top": 0}},
         "expected a configuration that can be built, got ValueError: top must be positive, got 0"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_configuration(
    path: str, value: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(changed(path, value)))
    for more in ((), ("--print_config",)):  # of which the parser speaks in other words
        if more and "can be built" in sentence:  # it builds nothing then
            continue
        with pytest.raises(SystemExit) as end:
            main(["fit", "--config", str(file), *more])
        assert (end.value.code, capsys.readouterr().err) == (2, f"miepo: error: {sentence}\n")


def test_a_mistake_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    for option, sentence in (
        ("--data.batchsize=3", "data: OnlinePreferenceDataModule has no setting 'batchsize': did you mean batch_size?"),
        ("--model.learning_rate=fast", "model.learning_rate: expected float, got 'fast'"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["fit", "--config", str(file), option])
        assert (end.value.code, capsys.readouterr().err) == (2, f"miepo: error: {sentence}\n")


def test_what_it_does_not_know_stays_as_it_is() -> None:
    for message in ("unrecognized arguments: --x", "", 'Parser key "a":'):
        assert one_sentence(message) == message
    assert one_sentence('Parser key "a":\n  Something new') == "a: Something new"
    assert one_sentence("Problem with given class_path 'no.such.Class':\n  Option 'x' is not accepted") == (
        "Class has no setting 'x'"
    )
    long = "'" + "y" * 200 + "'"
    assert one_sentence(f"Expected a <class 'int'>. Got value: {long}") == f"expected int, got {long[:80]}.."


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("wrods.Words", "trainer.callbacks: expected the import path of a class, got 'wrods.Words': there is no module wrods, neither in the current folder nor installed"),
        ("miepo.callbacks.Steerabilty", "miepo.callbacks has no Steerabilty: did you mean Steerability?"),
    ],
)  # fmt: skip
def test_a_callback_that_cannot_be_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, sentence: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(CONFIG))
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", str(file), f"--trainer.callbacks+={given}", "--print_config"])
    assert capsys.readouterr().err.strip().endswith(sentence)


@pytest.mark.parametrize("key", ["model.policy.init_args.lora_layers", "model.policy.lora_layers"])
@pytest.mark.parametrize("apart", [True, False])
def test_null_on_the_command_line_is_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, apart: bool
) -> None:
    """Of a class within a class jsonargparse reads the text None."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(changed(f"{POLICY}.lora_layers", 3)))
    given = [f"--{key}", "null"] if apart else [f"--{key}=null"]
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", str(file), *given, "--print_config"])
    module = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert module["policy"]["init_args"]["lora_layers"] is None


def test_null_is_null_for_any_class_within_a_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    term = {"class_path": "miepo.exploration.Matching", "init_args": {"beta": 0.5}}
    file.write_text(yaml.safe_dump(changed("model.exploration", term)))
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", str(file), "--model.exploration.init_args.beta", "null", "--print_config"])
    found = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["exploration"]
    assert found["class_path"].endswith("Matching")
    assert found["init_args"]["beta"] is None
