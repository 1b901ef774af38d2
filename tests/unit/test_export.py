"""Exported folders, read by plain Transformers and PEFT, are the policy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import AutoTokenizer

from miepo.cli.command import main
from miepo.errors import UserError
from miepo.policy import Conditioning, GatedConditioning, Policy, PromptConditioning
from miepo.trained.build import build_policy
from miepo.trained.export import export
from miepo.trained.model_card import method_of
from miepo.trained.saved import CARD, Saved, _read_export
from tests.helpers.trained import saved_policy

WAYS: dict[str, list[Conditioning]] = {
    "gated": [GatedConditioning()],
    "soups": [GatedConditioning(shared=False)],
    "prompt": [PromptConditioning()],
    "both": [PromptConditioning(decimals=3), GatedConditioning()],
}
THREE = ("letter_e", "brevity", "a'b\\c")
PROMPT = "the garden, people like rain"
# in a process of its own, which must not need miepo
READER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
class NoMiepo:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "miepo":
            raise ImportError("miepo is not installed")
sys.meta_path.insert(0, NoMiepo())
job = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(job["folder"])
if job["merged"]:
    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)
else:
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32), job["folder"])
if job["factors"]:  # by hand, as the card says
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            for first, last, factor in job["factors"]:
                weight.data[:, first:last] *= factor
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": job["prompt"]}], add_generation_prompt=True, return_tensors="pt", return_dict=True,
    **job["options"],
)["input_ids"]
with torch.no_grad():
    logits = model.eval()(ids).logits[0, -1]
torch.save({"ids": ids[0], "logits": logits, "generation": model.generation_config.to_dict()}, job["out"])
"""


def read_plainly(folder: Path, base: Path, out: Path, factors: list[Any] | None = None, **options: Any) -> dict:
    job = {"folder": str(folder), "base": str(base), "merged": not (folder / "adapter_config.json").is_file()}
    job |= {"factors": factors or [], "prompt": PROMPT, "options": options, "out": str(out)}
    command = [sys.executable, "-c", READER, json.dumps(job)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    return torch.load(out, weights_only=True)


def expected(policy: Policy, weights: dict[str, float]) -> tuple[Tensor, Tensor]:
    w = torch.tensor([[weights.get(name, 0.0) for name in policy.names]])
    tokens = policy.encode([PROMPT], w)
    with policy.conditioned(w), torch.no_grad():
        return tokens.ids[0], policy.model(tokens.ids).logits[0, -1]


def assert_same(found: dict, policy: Policy, weights: dict[str, float]) -> None:
    ids, logits = expected(policy, weights)
    assert found["ids"].tolist() == ids.tolist()
    torch.testing.assert_close(found["logits"], logits, rtol=1e-5, atol=1e-5)


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=r"got '.*', which is a run without a checkpoint$"):
        Saved.read(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_for_a_preference(way: str, tiny_model: Path, tmp_path: Path) -> None:
    saved, policy = saved_policy(tiny_model, WAYS[way])
    weights = {"letter_e": 0.3, "brevity": 0.7}
    export(saved, tmp_path / "out", weights)
    assert_same(read_plainly(tmp_path / "out", tiny_model, tmp_path / "x"), policy, weights)
    other = expected(policy, {"letter_e": 0.9, "brevity": 0.1})[1]
    assert (expected(policy, weights)[1] - other).abs().max() > 0.05  # the preference matters
    with pytest.raises(UserError, match="expected a run's folder"):
        Saved.read(tmp_path / "out")  # it follows one preference, and is no policy of the simplex


@pytest.mark.slow
@pytest.mark.parametrize("template", ["auto", "paper", "hh", "Q: {prompt}{preference}\n<|im_end|>A: {response}"])
def test_a_merged_model(template: str, tiny_model: Path, tiny_base_model: Path, tmp_path: Path) -> None:
    base = tiny_model if template == "auto" else tiny_base_model
    saved, policy = saved_policy(base, WAYS["both"], THREE, template=template)
    weights = {"letter_e": 0.5, "brevity": 0.25, "a'b\\c": 0.25}
    export(saved, tmp_path / "out", weights, merged=True)
    found = read_plainly(tmp_path / "out", base, tmp_path / "x")
    prompt = f"\n\nHuman: {PROMPT}" if template == "hh" else PROMPT
    w = torch.tensor([[0.5, 0.25, 0.25]])
    tokens = policy.encode([prompt], w)
    assert found["ids"].tolist() == tokens.ids[0].tolist()
    with policy.conditioned(w), torch.no_grad():
        torch.testing.assert_close(found["logits"], policy.model(tokens.ids).logits[0, -1], rtol=1e-4, atol=1e-4)
    kept = found["generation"]
    assert (kept["temperature"], kept["top_p"], kept["do_sample"]) == (0.8, 1.0, True)  # the measured distribution


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_whole_simplex(way: str, tiny_model: Path, tmp_path: Path) -> None:
    saved, policy = saved_policy(tiny_model, WAYS[way], THREE)
    folder = export(saved, tmp_path / "out")
    equal = dict.fromkeys(THREE, 1 / 3)
    assert_same(read_plainly(folder, tiny_model, tmp_path / "x"), policy, equal)  # as it lies there
    weights = {"letter_e": 0.005, "a'b\\c": 0.995}  # which single precision holds as a little less
    blocks = json.loads((folder / CARD).read_text())["blocks"]
    factors = [
        [*block["columns"], 1 if block["objective"] is None else 3 * weights.get(block["objective"], 0)]
        for block in blocks
    ]
    found = read_plainly(folder, tiny_model, tmp_path / "y", factors, preference=weights)
    assert_same(found, policy, weights)
    again = build_policy(_read_export(folder), {}).eval()
    assert_same({"ids": expected(policy, weights)[0], "logits": expected(again, weights)[1]}, policy, weights)


INFORMATION = {"preference": 0.8, "preference_low": 0.6, "preference_high": 1.0, "ceiling": 1.6}


def test_a_base_by_a_relative_path_is_found_from_anywhere(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_model.parent)
    saved, _ = saved_policy(tiny_model.name, WAYS["gated"])
    folder = export(saved, tmp_path / "out", {"brevity": 1.0})
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)
    assert "base_model:" not in (folder / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    again = export(saved, tmp_path / "again", {"brevity": 1.0}, base=str(tiny_model))
    assert (again / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


def test_a_base_that_has_moved_is_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    saved, _ = saved_policy(tiny_model, WAYS["gated"])
    saved.policy["init_args"]["base"] = gone = str(tmp_path / "gone")  # type: ignore[index]
    with pytest.raises(
        UserError, match=r"gone': there is none; if the base model has moved, base= \(--base\) says where"
    ):
        export(saved, tmp_path / "out", {"brevity": 1.0})
    with pytest.raises(UserError, match=r"there is none$"):
        export(saved, tmp_path / "out", {"brevity": 1.0}, base=gone)
    export(saved, tmp_path / "out", {"brevity": 1.0}, base=str(tiny_model))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "miepo.methods.RewardsInContext", "model": {}}, "Rewards-in-Context (arXiv 2402.10207)"),
        (
            {
                "method": "miepo.MIEPO",
                "model": {"exploration": {"class_path": "a.InfoNCE", "init_args": {"beta_w": 0.0}}},
            },
            "MO-ODPO (online DPO under drawn preferences, no exploration term)",
        ),
        (
            {
                "method": "miepo.MIEPO",
                "model": {"exploration": {"class_path": "a.Matching", "init_args": {"weight": 2.0}}},
            },
            "MI-EPO (arXiv 2607.01392), exploration term Matching",
        ),
        ({}, "a method that its settings below name"),
    ],
)
def test_the_card_names_the_method(settings: dict, said: str) -> None:
    assert method_of(settings) == said


def test_an_empty_folder_is_filled_and_stays_the_same(tiny_model: Path, tmp_path: Path) -> None:
    """A shell may be in it, or a volume be mounted there."""
    saved, _ = saved_policy(tiny_model, WAYS["gated"])
    folder = tmp_path / "out"
    folder.mkdir()
    before = folder.stat().st_ino
    export(saved, folder, {"brevity": 1.0})
    assert folder.stat().st_ino == before
    assert {path.name[0] for path in folder.iterdir()} & {"."} == set()
    assert (folder / "adapter_model.safetensors").is_file()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"expected a folder to export to that can be written, got .*file"):
        export(saved, tmp_path / "file" / "out", {"brevity": 1.0})


def test_what_rounding_takes_is_said(tiny_model: Path, tmp_path: Path) -> None:
    saved, _ = saved_policy(tiny_model, WAYS["gated"], scale=0.003, dtype="bfloat16")
    with pytest.warns(UserWarning, match=r"of the adapter's update \d+ % is left after rounding"):
        folder = export(saved, tmp_path / "out", {"brevity": 1.0}, merged=True)
    assert "Rounding to the type of the weights has left" in (folder / "README.md").read_text()


def test_the_card_tells_what_was_measured(tiny_model: Path, tmp_path: Path) -> None:
    saved, _ = saved_policy(tiny_model, WAYS["gated"])
    information = {f"information/{key}": value for key, value in INFORMATION.items()}
    evaluations = tuple(replace(e, figures={**e.figures, **information}) for e in saved.evaluations)
    saved = replace(saved, stop=("\n\nHuman:",), evaluations=evaluations)
    folder = export(saved, tmp_path / "out", {"brevity": 1.0})
    card = (folder / "README.md").read_text()
    table = [line for line in card.splitlines() if line.startswith("| ")]
    assert any(r"I(Y;W\|X)" in line for line in table)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1  # as many cells in each row
    assert r"'\n\nHuman:'" in card
    assert card.startswith("---\n")
    assert "library_name: peft" in card
    assert "the preference letter_e 0.00, brevity 1.00" in card
    assert "| HV (up) | 1.000 | 9.000 |" in card
    assert "brevity by mean -1, sd 2" in card
    assert '"lora_rank": 2' in card
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in folder.iterdir()} >= {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "generation_config.json",
        "chat_template.jinja",
    }  # fmt: skip


class Whispered(Conditioning):
    def write(self, preference, names) -> str:
        return f" ({preference[0]:.1f})"


class Squared(Conditioning):
    def blocks(self, objectives: int) -> int:
        return 1

    def gate(self, preference: Tensor) -> Tensor:
        return preference[:, :1] ** 2 + 0.5


def test_what_cannot_be_exported_is_said(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, _ = saved_policy(tiny_model, WAYS["gated"])
    with pytest.raises(UserError, match="it is of a stage without preferences"):
        export(replace(saved, names=()), tmp_path / "out")
    with pytest.raises(UserError, match="a merged model follows one preference"):
        export(saved, tmp_path / "out", merged=True)
    with pytest.raises(UserError, match="unknown objective humour"):
        export(saved, tmp_path / "out", {"humour": 1.0})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="expected a new or empty folder"):
        export(saved, tmp_path / "full", {"brevity": 1.0})
    for way, text in (
        ([Whispered()], "Whispered cannot be written"),
        ([Squared()], "Squared gates in a way of its own"),
    ):
        own, _ = saved_policy(tiny_model, way)
        own.policy["init_args"]["conditioning"] = [{"class_path": f"{__name__}.{type(way[0]).__name__}"}]  # type: ignore[index]
        with pytest.raises(UserError, match="is not miepo's own code"):
            export(own, tmp_path / "out")
        with pytest.raises(UserError, match=text):
            export(own, tmp_path / "out", trust=True)
    assert not (tmp_path / "out").exists()
    for arguments, said in (
        (["--ckpt_path", str(tmp_path / "none")], "expected a run's folder, a checkpoint"),
        (["--ckpt_path", str(tmp_path), "--preference", "[1]"], "expected a preference such as"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["export", *arguments, "--out", str(tmp_path / "out")])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err


def written(folder: Path, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **options)
    return found["input_ids"]


@pytest.mark.parametrize("template", ["auto", "paper", "hh"])
def test_the_template_takes_content_in_parts(
    template: str, tiny_model: Path, tiny_base_model: Path, tmp_path: Path
) -> None:
    base = tiny_model if template == "auto" else tiny_base_model
    folder = export(saved_policy(base, WAYS["prompt"], template=template)[0], tmp_path / "out")
    parts = [{"type": "text", "text": "the garden, "}, {"type": "text", "text": "people like rain"}]
    plain = written(folder, [{"role": "user", "content": PROMPT}])
    assert written(folder, [{"role": "user", "content": parts}]) == plain
    with pytest.raises(TemplateError, match="this model reads text alone"):
        written(folder, [{"role": "user", "content": [*parts, {"type": "image", "url": "x"}]}])
    if template == "hh":
        with pytest.raises(TemplateError, match="messages of user and assistant, got system"):
            written(folder, [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}])


@pytest.mark.parametrize(
    ("preference", "message"),
    [
        ({"letter": 1.0}, "unknown objective letter; the objectives are letter_e, brevity"),
        ({"letter_e": 2, "brevity": 8}, "weights that sum to 1, got a sum of 10"),
        ({"letter_e": -0.5, "brevity": 1.5}, "the weight of letter_e must be a number that is not negative, got -0.5"),
        ({"letter_e": "1"}, "the weight of letter_e must be a number"),
        ({"letter_e": True}, "the weight of letter_e must be a number"),
        ({"letter_e": float("nan")}, "the weight of letter_e must be a number"),
    ],
)
@pytest.mark.parametrize("way", ["prompt", "gated"])
def test_the_template_of_the_simplex_checks_the_preference(
    way: str, preference: dict, message: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = export(saved_policy(tiny_model, WAYS[way])[0], tmp_path / "out")
    messages = [{"role": "user", "content": PROMPT}]
    with pytest.raises(TemplateError, match=message):
        written(folder, messages, preference=preference)
    assert written(folder, messages, preference={"letter_e": 0.3333, "brevity": 0.6666})
