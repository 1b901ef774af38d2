"""A run of the real command, used from Python: `miepo.load`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import miepo
from miepo.cli.command import main
from miepo.errors import UserError
from miepo.evaluation import evaluation_files, read_evaluation
from miepo.exploration import InfoNCE
from miepo.objectives import Brevity
from miepo.policy import GatedConditioning
from miepo.rollout import TransformersEngine
from miepo.trained.build import build_policy
from tests.helpers.tiny import Letters, save_tiny_model
from tests.helpers.trained import saved_policy
from tests.integration.test_cli import config, run

PROMPTS = ["the rain", "a garden"]


@pytest.fixture(scope="module")
def trained_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    run("fit", config(tiny_model, root), root)
    return root / "run/version_0"


@pytest.fixture(scope="module")
def policy(trained_run: Path) -> miepo.TrainedPolicy:
    return miepo.load(trained_run, trust=True)


def test_it_answers_as_the_engine_of_training_does(policy: miepo.TrainedPolicy) -> None:
    w = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    expected = TransformersEngine().sample(policy.policy, PROMPTS, w, 1, 5, 3)
    under = [{"brevity": 1.0}, {"letter_e": 0.5, "brevity": 0.5}]
    assert policy.generate(PROMPTS, under, seed=3) == [row[0] for row in expected.texts]
    one = policy.generate(PROMPTS[0], {"brevity": 1.0}, seed=3)
    assert isinstance(one, str)
    assert one == "".join(policy.stream(PROMPTS[0], {"brevity": 1.0}, seed=3))
    many = policy.generate(PROMPTS * 20, {"brevity": 1.0}, temperature=0)
    assert many == many[:2] * 20


def test_it_scores_as_in_training(policy: miepo.TrainedPolicy, trained_run: Path) -> None:
    rows = [json.loads(line) for line in (trained_run / "evaluations/step_000002.jsonl").read_text().splitlines()[1:]]
    scores = policy.score([row["prompt"] for row in rows], [row["response"] for row in rows])
    assert list(scores) == ["letter_e", "brevity"]
    for name, values in scores.items():
        assert values == pytest.approx([row["rewards"][name] for row in rows])
    assert policy.score("the rain", rows[0]["response"])["brevity"] == pytest.approx(rows[0]["rewards"]["brevity"])


def test_numbers_of_numpy_are_numbers(policy: miepo.TrainedPolicy) -> None:
    weights = dict(zip(policy.names, np.array([0.25, 0.75], np.float32), strict=True))
    assert policy.generate("food", weights) == policy.generate("food", {"letter_e": 0.25, "brevity": 0.75})
    assert policy.generate("food", weights, seed=np.int64(3)) == policy.generate("food", weights, seed=3)
    assert policy.score([], []) == {"letter_e": [], "brevity": []}


def test_a_question_alone_is_scored_as_the_dialogue_it_begins(tiny_base_model: Path) -> None:
    """As in training on dialogues, where the objectives read them."""
    seen: list[str] = []

    class Watches(Letters):
        def score(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
            seen.extend(prompts)
            return super().score(prompts, responses)

    saved, _ = saved_policy(tiny_base_model, [GatedConditioning()], template="hh")
    built = build_policy(saved, {}).eval()
    watching = miepo.TrainedPolicy(saved, built, torch.device("cpu"), [Watches("e"), Brevity(30)])
    watching.objectives  # noqa: B018  # asked once when they are loaded
    seen.clear()
    dialogue = "\n\nHuman: the garden\n\nAssistant:"
    watching.score(["the garden", dialogue], ["a", "b"])
    assert seen == [dialogue] * 2
    assert watching.encode("the garden", "") == watching.encode(dialogue, "")


def test_the_front_renders_in_a_notebook(policy: miepo.TrainedPolicy, trained_run: Path) -> None:
    assert policy.front is not None
    shown = policy.front._repr_html_()
    assert shown.count("<tr>") == 1 + 3
    assert "data:image/png;base64," in shown
    first, last = (read_evaluation(file) for file in evaluation_files(trained_run))
    assert torch.equal(policy.front.means, last.means)
    assert torch.equal(policy.front.before, first.means)
    assert "letter_e, brevity" in repr(policy)


def test_an_exported_folder_is_the_same_policy(
    policy: miepo.TrainedPolicy, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", "--ckpt_path", str(trained_run), "--out", str(tmp_path / "out")])
    assert "Exported" in capsys.readouterr().out
    cards = [(tmp_path / "out/README.md").read_text()]
    one = ["--preference", '{"brevity": 1.0}', "--out", str(tmp_path / "one"), "--trust"]
    main(["export", "--ckpt_path", str(tmp_path / "out"), *one])
    cards.append((tmp_path / "one/README.md").read_text())
    for card in cards:
        assert "by MI-EPO (arXiv 2607.01392), exploration term InfoNCE on the base" in card
        stated = json.loads(card.partition("```json\n")[2].partition("\n```")[0])
        assert stated["model"]["exploration"] == {
            "class_path": "miepo.exploration.InfoNCE",
            "init_args": {"beta_w": 0.01},
        }
        assert (stated["method"], stated["steps"], stated["seed"]) == ("miepo.MIEPO", 2, 0)
        assert stated["data"]["prompts"] == "6 prompts"
        assert [o["class_path"] for o in stated["objectives"]][1] == "miepo.objectives.Brevity"
        assert (stated["data"]["feedback"], stated["data"]["max_new_tokens"]) == ("per_objective", 5)
    assert InfoNCE().beta_w == 0.01  # what a run without a setting has
    with pytest.raises(
        UserError, match="is a model for Transformers and PEFT: of those miepo reads exports of the whole"
    ):
        miepo.load(tmp_path / "one")
    with pytest.raises(UserError, match=r"got '.*run', which holds runs such as '.*version_0'"):
        miepo.load(trained_run.parent)
    again = miepo.load(tmp_path / "out", trust=True)
    assert again.generate(PROMPTS, {"brevity": 1.0}) == policy.generate(PROMPTS, {"brevity": 1.0})
    assert again.score("the rain", "e e e") == policy.score("the rain", "e e e")
    assert again.front is not None
    assert policy.front is not None
    torch.testing.assert_close(again.front.means, policy.front.means)
    assert [e.state() for e in again.saved.evaluations] == [e.state() for e in policy.saved.evaluations]


def test_mistakes_are_one_sentence(
    policy: miepo.TrainedPolicy, trained_run: Path, tiny_model: Path, tmp_path: Path
) -> None:
    for settings, said in (
        ({"preference": {"humour": 1.0}}, "unknown objective humour; the objectives are letter_e, brevity"),
        ({"preference": {"brevity": -1.0}}, "must not be negative"),
        ({"preference": {"brevity": 0.5}}, "expected weights that sum to 1, got a sum of 0.5"),
        ({"preference": {"brevity": 0.0}}, "at least one weight must be positive"),
        ({"preference": [{"brevity": 1.0}] * 3}, "one preference for all or one for each of 2 prompts, got 3"),
        ({"max_new_tokens": 5000}, "expected at most 256 together"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, a whole number, got 0"),
        ({"max_new_tokens": 3.5}, r"max_new_tokens must be at least 1, a whole number, got 3\.5"),
        ({"preference": [0.3, 0.7]}, "expected a preference by objective name, got float"),
        ({"preference": None}, "expected prompts as text, and a preference by objective name"),
        ({"prompts": [{"role": "user"}]}, "expected prompts as text"),
        ({"temperature": -1.0}, "temperature must lie between 0 and 100"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"stop": [""]}, "must be text, and not empty"),
        ({"stop": [5]}, "what ends the response must be text"),
        ({"stop": None}, "what ends the response must be text"),
        ({"seed": -1}, "seed must not be negative"),
        ({"seed": 1.5}, r"seed must not be negative, a whole number, got 1\.5"),
        ({"max_new_tokens": True}, "max_new_tokens must be at least 1, a whole number, got True"),
        ({"max_new_tokens": "5"}, "max_new_tokens must be at least 1, a whole number, got '5'"),
        ({"temperature": "hot"}, "temperature must lie between 0 and 100, got 'hot'"),
        ({"top_p": None}, "top_p must be above 0 and at most 1, got None"),
        ({"prompts": None}, "expected prompts as text"),
    ):
        arguments: dict[str, Any] = {"prompts": PROMPTS, "preference": {"brevity": 1.0}} | settings
        with pytest.raises(UserError, match=said):
            policy.generate(**arguments)
    with pytest.raises(UserError, match="expected a prompt as text, or messages with role and content"):
        policy.stream(["food"], {"brevity": 1.0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"seed must not be negative, a whole number, got 1\.5"):
        policy.stream("food", {"brevity": 1.0}, seed=1.5)
    with pytest.raises(UserError, match="one response for each of 2 prompts, got 1"):
        policy.score(PROMPTS, ["x"])
    with pytest.raises(UserError, match="expected a run's folder, a checkpoint or a folder of miepo export"):
        miepo.load(tmp_path / "nothing")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    with pytest.raises(UserError, match=r"expected a checkpoint at .* got a file that is none"):
        miepo.load(tmp_path / "text.ckpt")
    other = save_tiny_model(tmp_path / "other", seed=5)  # of the same shapes
    with pytest.raises(UserError, match="the adapter was trained on another base model"):
        miepo.load(trained_run, base=str(other))
    with pytest.raises(UserError, match=r"has the objectives \['letter_e', 'brevity'\], in this order"):
        miepo.load(trained_run, objectives=[Brevity(), Letters("e")])
    for given in ([Letters("e"), Brevity], Brevity()):
        with pytest.raises(UserError, match="expected a list of objectives, got"):
            miepo.load(trained_run, objectives=given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="expected a device such as cpu or cuda, got 'meta'"):
        miepo.load(trained_run, device="meta")
    with pytest.raises(UserError, match="expected prompts and responses as text"):
        policy.score("x", None)  # type: ignore[arg-type]
    assert miepo.load(trained_run, base=tiny_model).names == policy.names  # a path is one, too


def test_code_that_is_not_miepos_runs_only_where_it_is_trusted(trained_run: Path, tmp_path: Path) -> None:
    careful = miepo.load(trained_run)
    assert careful.generate("the rain", {"brevity": 1.0}) is not None  # objectives are not needed to answer
    with pytest.raises(UserError, match=r"names tests.helpers.tiny.Letters, which is not miepo's own code"):
        careful.score("the rain", "x")
    given = miepo.load(trained_run, objectives=[Letters("e"), Brevity()])
    assert given.score("the rain", "e").keys() == {"letter_e", "brevity"}
    checkpoint = torch.load(trained_run / "checkpoints/last.ckpt", weights_only=True)
    entry = checkpoint["miepo"]["config"]["objectives"][0]
    for harm in (
        {"class_path": "miepo.objectives.PythonObjective", "init_args": {"function": "os.system", "name": "letter_e"}},
        {"class_path": "miepo.objectives.RetryingObjective", "init_args": {"objective": {"class_path": "os.system"}}},
        {
            "class_path": "miepo.objectives.PythonObjective",
            "init_args": {"function": "miepo.a.b", "name": "letter_e"},
            "dict_kwargs": {"function": "os.system"},
        },
        {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(tmp_path / "ran")]}},
    ):
        checkpoint["miepo"]["config"]["objectives"][0] = harm
        torch.save(checkpoint, tmp_path / "harm.ckpt")
        with pytest.raises(UserError, match="not miepo's own code"):
            miepo.load(tmp_path / "harm.ckpt").score("the rain", "x")
    with pytest.raises(UserError, match=r"cannot build what .* names: subprocess.Popen is no policy, objective"):
        miepo.load(tmp_path / "harm.ckpt", trust=True).score("the rain", "x")
    assert not (tmp_path / "ran").exists()
    checkpoint["miepo"]["config"]["objectives"][0] = entry
    checkpoint["miepo"]["config"]["model"]["init_args"]["policy"]["class_path"] = "tests.helpers.tiny.Policy"
    torch.save(checkpoint, tmp_path / "harm.ckpt")
    with pytest.raises(UserError, match="not miepo's own code"):
        miepo.load(tmp_path / "harm.ckpt")


def test_a_damaged_folder_is_refused(trained_run: Path, tmp_path: Path) -> None:
    main(["export", "--ckpt_path", str(trained_run), "--out", str(tmp_path / "out")])
    weights = load_file(tmp_path / "out/adapter_model.safetensors")
    name = next(iter(weights))
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "out/adapter_model.safetensors")
    with pytest.raises(UserError, match="the checkpoint's adapter does not fit the policy: 1 of"):
        miepo.load(tmp_path / "out")
    (tmp_path / "out/adapter_model.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match="expected a folder of miepo export"):
        miepo.load(tmp_path / "out")
    (tmp_path / "out/miepo.json").write_text('{"names": []}')
    with pytest.raises(UserError, match="expected a folder of miepo export"):
        miepo.load(tmp_path / "out")


def test_a_base_that_changed_is_refused_by_the_command(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(SystemExit):
        run("validate", config(other, tmp_path), tmp_path, "--ckpt_path", str(trained_run / "checkpoints/last.ckpt"))
    assert "the adapter was trained on another base model" in capsys.readouterr().err
