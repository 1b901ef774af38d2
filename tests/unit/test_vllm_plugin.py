"""The plug-in of vLLM, as far as it can be tested without vLLM; with it, ``tests/integration/test_vllm_plugin.py``."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from miepo.cli import main
from miepo.errors import UserError
from miepo.policy import GatedConditioning, PromptConditioning
from miepo.trained.export import export
from miepo.vllm import cpu_products
from miepo.vllm.endpoint import PreferenceMiddleware
from miepo.vllm.gates import TokenGates, rank_gates
from miepo.vllm.request import GATE, Card, gate_fields, gate_in, split_name
from miepo.vllm.resolver import PreferenceAdapters
from tests.helpers.trained import NAMES, saved_policy

W = {"letter_e": 0.2, "brevity": 0.8}


@pytest.fixture
def policies(tiny_model: Path, tmp_path: Path) -> Any:
    def make(*ways: Any) -> tuple[Any, Path]:
        saved, policy = saved_policy(tiny_model, ways or [GatedConditioning()])
        return policy, export(saved, tmp_path / f"policy{len(list(tmp_path.iterdir()))}")

    return make


# -- names and gates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a@", "a@x", "a@x=", "a@x=high", "a@x=0.5;y=0.5", "a@=1,"])
def test_a_name_without_weights_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"expected a model such as a@first=0.2,second=0.8, got"):
        split_name(name)


def test_the_gate_of_a_card_is_that_of_the_policy(policies) -> None:
    """As the adapter lies in the folder it follows equal weights; times the card's gate it follows any."""
    policy, folder = policies()
    card = Card(folder)
    gate = torch.tensor(card.gate(card.weights(W))).repeat_interleave(policy.lora_rank)
    for name, weight in load_file(folder / "adapter_model.safetensors").items():
        if ".lora_B." in name:
            own = policy.get_parameter(f"model.{name.removesuffix('.weight')}.default.weight")
            expected = own * policy.gate_of(torch.tensor([[0.2, 0.8]]))
            torch.testing.assert_close(weight * gate, expected.detach(), rtol=1e-6, atol=1e-6)
    assert not card.writes
    assert Card(policies(PromptConditioning())[1]).writes


def test_an_export_reads_back_as_it_was(policies) -> None:
    from miepo.trained.saved import Saved

    policy, folder = policies()
    saved = Saved.read(folder)
    for name, weight in policy.adapter_parameters().items():
        torch.testing.assert_close(saved.adapter[name], weight.detach(), rtol=1e-6, atol=1e-7)


def test_a_folder_that_is_no_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a policy of miepo export for every preference in"):
        Card(tmp_path)


def test_under_another_gate_the_prefix_cache_has_other_blocks() -> None:
    salts = {gate_fields(gate, salt)["cache_salt"] for gate in ([1.0, 0.2], [1.0, 0.8]) for salt in (None, "mine")}
    assert len(salts) == 4
    assert all(len(salt) <= 128 and salt.isalnum() for salt in salts)
    assert gate_in(gate_fields([1, 0.5])["vllm_xargs"]) == [1.0, 0.5]


@pytest.mark.parametrize("gate", ["x", [], [True], [float("nan")], [1, "2"], {"a": 1}])
def test_a_gate_that_is_none_is_refused(gate: Any) -> None:
    with pytest.raises(ValueError, match=f"expected {GATE} to be a list of numbers"):
        gate_in({GATE: gate})


def test_each_token_has_the_gate_of_its_request() -> None:
    rows = rank_gates([[1.0, 0.2, 0.8], None, [2.0], None], [6, 4, 3, 0], 8)
    assert rows is not None
    assert np.allclose(rows, [[1, 1, 0.2, 0.2, 0.8, 0.8, 1, 1], [1] * 8, [2] * 3 + [1] * 5, [0] * 8])
    assert rank_gates([None, None], [4, 4], 8) is None
    assert rank_gates([None, None], [4, 0], 8) is not None  # the base beside an adapter
    gates = TokenGates(10, 8, "cpu")
    gates.set(rows, [1, 2, 1, 1])
    buffer = torch.ones(3, 5, 8)
    gates.apply(buffer)
    for slice_ in buffer:
        assert np.allclose(slice_, rows[[0, 1, 1, 2, 3]])
    gates.set(None, [5])
    both = (torch.ones(6, 8), torch.ones(6, 8))
    gates.apply(both)
    assert all((part == 1).all() for part in both)  # nothing of the last batch is left


# -- products on a CPU -------------------------------------------------------------------------------------------------


class Naive:
    """What vLLM's class for CPUs does, token by token."""

    def __init__(self) -> None:
        self.calls = 0

    def update_metadata(self, slots: torch.Tensor) -> None:
        self.token_lora_indices = slots

    def _apply_shrink(self, y: Any, x: Any, weights: Any, scale: float) -> None:
        self.calls += 1
        for i, slot in enumerate(self.token_lora_indices):
            y[i] = scale * (weights[slot, 0] @ x[i])

    def _apply_expand(self, y: Any, x: Any, weights: Any, offset: int, size: int, add_inputs: bool = True) -> None:
        self.calls += 1
        for i, slot in enumerate(self.token_lora_indices):
            y[i, offset : offset + size] = (y[i, offset : offset + size] if add_inputs else 0) + weights[slot, 0] @ x[i]


@pytest.mark.parametrize(("slots", "called"), [([1, 1, 1, 1], 0), ([0, 5, 5, 0], 0), ([0, 1, 2, 3, 4], 2)])
@pytest.mark.parametrize("add", [True, False])
def test_dense_products_are_those_of_each_token(slots: list[int], called: int, add: bool) -> None:
    class Patched(Naive):
        pass

    torch.manual_seed(0)
    cpu_products.install(Patched)
    a, b, x = torch.randn(6, 1, 6, 5), torch.randn(6, 1, 3, 6), torch.randn(len(slots), 5)
    found = []
    for kernels in (Naive(), Patched()):
        kernels.update_metadata(torch.tensor(slots))
        middle, y = torch.zeros(len(slots), 6), torch.ones(len(slots), 7)
        kernels._apply_shrink(middle, x, a, 0.5)
        kernels._apply_expand(y, middle, b, 2, 3, add)
        found.append((y, kernels.calls))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[1][1] == called


# -- a plain adapter for each preference -------------------------------------------------------------------------------


def test_the_resolver_writes_the_adapter_of_a_preference(policies, tmp_path: Path) -> None:
    policy, folder = policies()
    adapters = PreferenceAdapters({"answers": folder})
    made = adapters.folder_of("answers@letter_e=0.2,brevity=0.8")
    assert made is not None
    plain = tmp_path / "plain"
    plain.mkdir()
    policy.save_adapter(plain, policy.gate_of(torch.tensor([[0.2, 0.8]])))
    expected = load_file(plain / "adapter_model.safetensors")
    found = load_file(made / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-6)
    assert adapters.folder_of("answers@brevity=0.8,letter_e=0.2") == made
    assert adapters.folder_of("answers") is None
    assert adapters.folder_of("others@letter_e=1") is None
    with pytest.raises(UserError, match="weights that sum to 1"):
        adapters.folder_of("answers@letter_e=3")


# -- requests ----------------------------------------------------------------------------------------------------------


def through(folder: Path, body: Any, path: str = "/v1/chat/completions", reason: str | None = None) -> Any:
    """What reaches vLLM of a request, or the error that is answered."""
    reached: list[Any] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        content = (await receive())["body"]
        assert dict(scope["headers"])[b"content-length"] == str(len(content)).encode()
        reached.append(json.loads(content))

    state = SimpleNamespace(
        openai_serving_models=SimpleNamespace(lora_requests={"answers": SimpleNamespace(lora_path=str(folder))}),
        miepo_reason=reason,
    )
    text = json.dumps(body).encode()
    parts = [{"type": "http.request", "body": text[:9], "more_body": True}, {"type": "http.request", "body": text[9:]}]

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"Content-Length", b"1")]}
    scope |= {"app": SimpleNamespace(state=state)}
    asyncio.run(PreferenceMiddleware(app)(scope, receive, send))
    if reached:
        return reached[0]
    assert sent[0]["status"] == 400
    return json.loads(sent[1]["body"])["error"]["message"]


def test_a_preference_becomes_a_gate(policies) -> None:
    _, folder = policies()
    for body in ({"model": "answers@letter_e=0.2,brevity=0.8"}, {"model": "answers", "preference": W}):
        found = through(folder, body | {"messages": [], "vllm_xargs": {"other": 1}})
        assert found["model"] == "answers"
        assert "preference" not in found
        assert found["vllm_xargs"] == {"other": 1, GATE: pytest.approx([1.0, 0.4, 1.6])}
        assert found["cache_salt"] == gate_fields(found["vllm_xargs"][GATE])["cache_salt"]
        assert "chat_template_kwargs" not in found
    plain = {"model": "base", "messages": []}
    assert through(folder, plain) == plain


def test_a_policy_that_reads_its_preference_gets_it_by_the_template(policies) -> None:
    _, folder = policies(PromptConditioning())
    found = through(folder, {"model": "answers", "preference": W, "messages": []})
    assert found["chat_template_kwargs"] == {"preference": pytest.approx(W)}
    assert GATE not in (found.get("vllm_xargs") or {})
    said = through(folder, {"model": "answers", "preference": W, "prompt": "x"}, "/v1/completions")
    assert said == "the policy reads its preference in the prompt: expected /v1/chat/completions"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"model": "answers", "preference": {"wit": 1}}, "unknown objective wit; the objectives are letter_e, brevity"),
        ({"model": "answers", "preference": {"brevity": 2}}, "expected weights that sum to 1, got a sum of 2"),
        ({"model": "answers", "preference": 3}, "preference: expected weights by objective, such as {'letter_e': 1.0}"),
        ({"model": "base", "preference": W}, "expected the name of a policy as model (answers)"),
        ({"preference": W}, "expected the name of a policy as model (answers)"),
        ({"model": "answers@brevity=1", "preference": W}, "in the model's name or in the body, got both"),
        ({"model": "answers@brief"}, "expected a model such as answers@first=0.2,second=0.8"),
        ({"model": "answers", "vllm_xargs": {GATE: "x"}}, f"expected {GATE} to be a list of numbers"),
    ],
)
def test_a_mistake_in_a_request_is_one_sentence(policies, body: Any, message: str) -> None:
    assert message in through(policies()[1], body)


def test_a_server_that_cannot_gate_says_so(policies) -> None:
    said = through(policies()[1], {"model": "answers", "preference": W}, reason="expected VLLM_USE_V2_MODEL_RUNNER=0")
    assert said == "this server cannot follow a preference: expected VLLM_USE_V2_MODEL_RUNNER=0"


# -- the line of a server ----------------------------------------------------------------------------------------------


def test_the_line_of_a_run(tiny_model: Path, capsys) -> None:
    options = ["--model.policy.class_path", "miepo.Policy", "--model.policy.init_args.base", str(tiny_model)]
    options += ["--model.policy.init_args.lora_rank", "6", "--data.prompts", '["x", "y"]']
    options += ["--model.policy.init_args.conditioning", '[{"class_path": "miepo.policy.GatedConditioning"}]']
    options += [
        "--model.policy.init_args.dtype",
        "float32",
        "--trainer.accelerator",
        "cpu",
        "--trainer.logger",
        "false",
    ]
    options += ["--objectives", '["miepo.objectives.Brevity", "miepo.objectives.Cheerfulness"]']
    main(["rollout-server", "--port", "8123", *options, "--", "--max-model-len", "512"])
    line = capsys.readouterr().out.split()
    assert line[0] == "VLLM_PLUGINS=miepo"
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in line
    stated = dict(pairwise(line))
    assert stated["--model"] == str(tiny_model)
    assert stated["--max-lora-rank"] == "32"  # 3 blocks of 6
    assert (stated["--port"], stated["--dtype"], stated["--max-loras"]) == ("8123", "float32", "2")
    assert line[-2:] == ["--max-model-len", "512"]


def test_the_line_of_a_trained_policy(policies, capsys) -> None:
    _, folder = policies()
    main(["rollout-server", "--ckpt_path", str(folder), "--name", "answers"])
    line = capsys.readouterr().out
    assert f"--lora-modules answers={folder}" in line
    assert f"--chat-template {folder}/chat_template.jinja" in line
    assert "RUNTIME_LORA" not in line
    assert NAMES == ("letter_e", "brevity")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected --config of a run, or --ckpt_path of a trained policy, got neither"),
        (["--ckpt_path", "nowhere"], "expected a policy of miepo export for every preference in"),
        (["--ckpt_path", "x", "--seed_everything", "1"], "got both (--seed_everything 1)"),
        (["--port", "0"], "--port: expected a number from 1 to 65535, got 0"),
        (["--adapters", "0"], "--adapters must be at least 1, got 0"),
    ],
)
def test_mistakes_of_the_command(words: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as status:
        main(["rollout-server", *words])
    assert status.value.code == 2
    assert message in capsys.readouterr().err


def test_an_interpreter_that_is_none(policies, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["rollout-server", "--ckpt_path", str(policies()[1]), "--run", "--python", "/no/python"])
    assert "--python: expected an interpreter with vLLM, got '/no/python'" in capsys.readouterr().err
