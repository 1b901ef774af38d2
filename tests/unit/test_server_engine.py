"""The protocol of rollout servers, on small servers that speak vLLM's routes over a real, tiny network."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from miepo.errors import UserError
from miepo.policy import GatedConditioning, Policy, PromptConditioning
from miepo.rollout import ServerEngine, adapter_files, server_engine
from miepo.rollout.servers import PAUSE, ServerPool
from miepo.training.run_checkpoint import RunCheckpoint
from tests.helpers.fit import Batches, tiny_run
from tests.helpers.interruption import StopAt, same
from tests.helpers.tiny import randomise_adapter, save_tiny_model, tiny_policy
from tests.helpers.vllm_server import Refused, TinyNetwork, TinyServer

A, B = "http://a:1", "http://b:2"
W = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
PROMPTS = ["the garden", "food", "people like rain", "in spring"]


@pytest.fixture
def network(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TinyNetwork]:
    def make(**settings: Any) -> TinyNetwork:
        found = TinyNetwork({url: TinyServer(tiny_model, **settings) for url in (A, B)})
        monkeypatch.setattr(server_engine, "ServerPool", functools.partial(ServerPool, transport=found))
        monkeypatch.setattr("miepo.rollout.servers.PAUSE", 0.02)
        return found

    return make


def policy_on(model: Path, *ways: Any, **settings: Any) -> Policy:
    return randomise_adapter(tiny_policy(model, ways or [GatedConditioning()], temperature=0.7, **settings)).eval()


def distance(policy: Policy, responses: Any, preference: torch.Tensor = W) -> float:
    with policy.evaluating():
        own = policy.response_log_prob(PROMPTS, preference.unsqueeze(1), responses.tokens).squeeze(2)
    return float((own - responses.log_prob).abs().max())


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("way", [GatedConditioning(), PromptConditioning()])
def test_servers_sample_from_the_policy_as_it_is(tiny_model: Path, network, way: Any, gates: bool) -> None:
    servers = network(gates=gates).servers
    policy, engine = policy_on(tiny_model, way), ServerEngine([A, B])
    first = engine.sample(policy, PROMPTS, W, 2, 6, 0)
    assert distance(policy, first) < 1e-4
    assert distance(policy, first, 1 - W) > 0.1  # the test could fail
    assert engine.sample(policy, PROMPTS, W, 2, 6, 0).texts == first.texts
    assert engine.sample(policy, PROMPTS, W, 2, 6, 1).texts != first.texts
    randomise_adapter(policy, seed=1)
    assert distance(policy, first) > 0.1
    assert distance(policy, engine.sample(policy, PROMPTS, W, 2, 6, 0)) < 1e-4
    asked = [[p for p, _ in server.calls if p == "/v1/completions"] for server in servers.values()]
    assert abs(len(asked[0]) - len(asked[1])) <= 1  # shared out


def test_with_gates_all_preferences_share_one_adapter_and_draw_alike(tiny_model: Path, network) -> None:
    texts = {}
    for gates, most in ((True, 1), (False, 4)):
        servers = network(gates=gates).servers
        policy, engine = policy_on(tiny_model), ServerEngine([A, B])
        texts[gates] = engine.sample(policy, PROMPTS, W, 2, 6, 0).texts
        assert max(server.most_adapters for server in servers.values()) <= most
        for seed in range(1, 4):
            randomise_adapter(policy, seed)
            engine.sample(policy, PROMPTS, W, 2, 6, 0)
        kept = {path.name for path in engine.files.folder.iterdir()}
        assert kept == set().union(*(server.adapters for server in servers.values()))  # those before are gone
        assert len(kept) == (1 if gates else 3)
    assert texts[True] == texts[False]


def test_a_stop_text_ends_a_response(tiny_model: Path, network) -> None:
    network()
    policy = policy_on(tiny_model)
    free = ServerEngine([A, B]).sample(policy, PROMPTS, W, 2, 12, 0)
    stop = next(text[2:4] for row in free.texts for text in row if text[2:4].isalpha())
    made = ServerEngine([A, B], stop=[stop]).sample(policy, PROMPTS, W, 2, 12, 0)
    assert all(stop not in text for row in made.texts for text in row)
    assert any(stop in text for row in free.texts for text in row)


# -- servers that fail -------------------------------------------------------------------------------------------------


def refuse(times: int, status: int = 503, path: str = "/v1/completions") -> Callable[[str, Any], None]:
    left = [times]

    def fault(asked: str, body: Any) -> None:
        if asked == path and left[0] and "prompt_logprobs" not in body:
            left[0] -= 1
            raise Refused(status, "out of order")

    return fault


@pytest.mark.parametrize("moment", ["refuses", "is away for good", "comes back without adapters", "is slow"])
def test_what_one_server_owes_the_others_answer_alike(tiny_model: Path, network, moment: str) -> None:
    found = network(gates=True)
    policy = policy_on(tiny_model)
    expected = ServerEngine([A, B]).sample(policy, PROMPTS, W, 2, 6, 0)

    engine = ServerEngine([A, B], timeout=0.3 if moment == "is slow" else 60)
    engine.sample(policy, PROMPTS, W, 2, 6, 7)
    first = found.servers[A]
    assert first is not None
    if moment == "refuses":
        first.faults.append(refuse(2))
    elif moment == "is slow":
        first.delay = 2
    elif moment == "is away for good":
        found.servers[A] = None
    else:
        found.servers[A] = TinyServer(tiny_model, gates=True)
    made = engine.sample(policy, PROMPTS, W, 2, 6, 0)
    assert made.texts == expected.texts
    assert torch.equal(made.tokens.ids, expected.tokens.ids)
    assert made.counts["asked_again"] > 0
    randomise_adapter(policy, seed=1)
    assert distance(policy, engine.sample(policy, PROMPTS, W, 2, 6, 0)) < 1e-4


def test_a_server_that_is_back_takes_its_share(tiny_model: Path, network) -> None:
    found = network(gates=True)
    policy, engine = policy_on(tiny_model), ServerEngine([A, B])
    engine.sample(policy, PROMPTS, W, 2, 6, 0)
    found.servers[A], away = None, found.servers[A]
    engine.sample(policy, PROMPTS, W, 2, 6, 0)
    found.servers[A] = away
    assert away is not None
    away.adapters.clear()  # as one that began anew
    engine._loop.run(wait_for(lambda: engine.pool.servers[0].up))
    away.calls.clear()
    assert distance(policy, engine.sample(policy, PROMPTS, W, 2, 6, 0)) < 1e-4
    assert [path for path, _ in away.calls].count("/v1/completions") == 2


async def wait_for(condition: Callable[[], bool]) -> None:
    import asyncio

    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come")


def test_another_base_in_a_servers_place_ends_the_run(tiny_model: Path, network, tmp_path: Path) -> None:
    found = network()
    policy, engine = policy_on(tiny_model), ServerEngine([A, B], patience=5)
    engine.sample(policy, PROMPTS, W, 2, 6, 0)
    found.servers[A] = found.servers[B] = None
    wait = engine.begin(policy, PROMPTS, W, 2, 6, [1, 2, 3, 4])
    found.servers[A] = TinyServer(save_tiny_model(tmp_path, seed=5))
    with pytest.raises(UserError, match=r"another base than the policy: its log-probabilities .* at most 0.1"):
        wait()


def test_a_server_that_is_back_without_the_plug_in_ends_the_run(tiny_model: Path, network) -> None:
    """It would overlook the gates of requests."""
    found = network(gates=True)
    policy, engine = policy_on(tiny_model), ServerEngine([A, B], patience=5)
    engine.sample(policy, PROMPTS, W, 2, 6, 0)
    found.servers[A] = found.servers[B] = None
    wait = engine.begin(policy, PROMPTS, W, 2, 6, [1, 2, 3, 4])
    found.servers[A] = TinyServer(tiny_model)
    with pytest.raises(UserError, match=r"http://a:1 came back without miepo's plug-in, which it had at the start"):
        wait()


def test_no_server_at_all_ends_the_run_in_a_sentence(tiny_model: Path, network) -> None:
    found = network()
    policy, engine = policy_on(tiny_model), ServerEngine([A, B], patience=0.2)
    engine.sample(policy, PROMPTS, W, 2, 6, 0)
    found.servers[A] = found.servers[B] = None
    with pytest.raises(UserError, match=r"expected a server that answers within 0.2 s, got none of http://a:1, http"):
        engine.sample(policy, PROMPTS, W, 2, 6, 0)


def test_a_request_that_no_server_answers_ends_the_run(tiny_model: Path, network) -> None:
    found = network()
    policy, engine = policy_on(tiny_model), ServerEngine([A, B], retries=3)
    engine.sample(policy, PROMPTS, W, 2, 6, 0)
    for server in found.servers.values():
        server.faults.append(refuse(1000))
    with pytest.raises(UserError, match=r"no server answers a request in 4 tries.*status 503: out of order"):
        engine.sample(policy, PROMPTS, W, 2, 6, 0)


# -- mistakes before the first step ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"lora": False}, None, "takes no adapters: expected vLLM with --enable-lora"),
        ({"most_rank": 2}, None, r"takes no adapter of this rank: expected another --max-lora-rank \(LoRA rank 6 is"),
        ({}, lambda s: setattr(s, "distort", 0.5), "samples from another distribution: its log-prob.* 0.5 nats"),
        (
            {},
            lambda s: s.faults.append(lambda p, b: b.pop("lora_path", 0) and b.update(lora_path="/no")),
            "does not see",
        ),
        ({}, lambda s: setattr(s, "tokenizer", lambda *_, **__: {"input_ids": [1]}), "has another tokenizer"),
        (
            {},
            lambda s: s.faults.append(refuse(9999, 404, "/version")),
            "expected a vLLM server at .* within 0.3 s, got",
        ),
    ],
)
def test_a_server_that_does_not_fit_is_refused_at_once(tiny_model: Path, network, settings, change, message) -> None:
    found = network(**settings)
    if change:
        change(found.servers[B])
    with pytest.raises(UserError, match=message):
        ServerEngine([A, B], patience=0.3).sample(policy_on(tiny_model), PROMPTS, W, 2, 6, 0)


def test_no_server_at_the_start_is_one_sentence(tiny_model: Path, network) -> None:
    network().servers[B] = None
    with pytest.raises(UserError, match=r"expected a vLLM server at http://b:2 within 0.2 s, got none: All connection"):
        ServerEngine([A, B], patience=0.2).sample(policy_on(tiny_model), PROMPTS, W, 2, 6, 0)


def test_a_full_disk_is_one_sentence(
    tiny_model: Path, network, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    network()
    policy = policy_on(tiny_model)

    def full(folder: Path, gate: Any = None) -> None:
        (folder / "begun").write_text("x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(policy, "save_adapter", full)
    with pytest.raises(UserError, match=r"expected room for the adapter in a folder .*No space left on device"):
        ServerEngine([A, B], folder=str(tmp_path)).sample(policy, PROMPTS, W, 2, 6, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"urls": []}, "list of different addresses"),
        ({"urls": [A, A + "/"]}, "list of different addresses"),
        ({"urls": ["localhost:8000"]}, "expected addresses such as"),
        ({"urls": [A], "max_gap": 0}, "engine.max_gap must be positive"),
        ({"urls": [A], "retries": -1}, "must not be negative"),
    ],
)
def test_bad_settings(given, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ServerEngine(**given)


def test_addresses_may_come_from_the_environment(tiny_model: Path, network, monkeypatch) -> None:
    network()
    policy = policy_on(tiny_model)
    with pytest.raises(UserError, match=r"list of different addresses of servers, got \[\]"):
        ServerEngine().sample(policy, PROMPTS, W, 2, 6, 0)
    monkeypatch.setenv("MIEPO_ROLLOUT_URLS", f"{A},{B}")
    assert distance(policy, ServerEngine().sample(policy, PROMPTS, W, 2, 6, 0)) < 1e-4


def test_names_of_adapters_are_of_one_run() -> None:
    assert len({adapter_files.new_prefix() for _ in range(100)}) == 100


# -- a run -------------------------------------------------------------------------------------------------------------


def run(model: Path, root: Path, steps: int = 4, **data: Any) -> tuple[Any, Batches]:
    batches = Batches()
    torch.manual_seed(0)
    trainer, module, datamodule = tiny_run(
        model,
        root,
        data={"engine": ServerEngine([A, B]), "batch_size": 2} | data,
        trainer={"max_steps": steps, "max_epochs": 2, "callbacks": [batches]},
    )
    trainer.fit(module, datamodule)
    return module, batches


def test_a_run_without_staleness_is_on_policy_and_states_the_gap(tiny_model: Path, tmp_path: Path, network) -> None:
    network(gates=True)
    _, batches = run(tiny_model, tmp_path)
    assert [logged["rollout/staleness"] for logged in batches.logged] == [0] * 4
    assert all(logged["rollout/gap"] < 1e-4 for logged in batches.logged)
    assert all(logged["count/asked_again"] == 0 for logged in batches.logged)


def test_beyond_the_bound_a_run_ends(tiny_model: Path, tmp_path: Path, network) -> None:
    servers = network(gates=True).servers

    def worse(path: str, body: Any) -> None:
        if path == "/v1/completions" and body.get("n") == 2:
            servers[A].distort = servers[B].distort = 1.0

    for server in servers.values():
        server.faults.append(worse)
    with pytest.raises(
        UserError, match=r"log-probabilities are 1 nats a token from the policy's: expected at most 0.1"
    ):
        run(tiny_model, tmp_path)


@pytest.mark.parametrize("staleness", [1, 2])
def test_batches_ahead_are_of_the_policy_some_steps_before(
    tiny_model: Path, tmp_path: Path, network, staleness: int
) -> None:
    network(gates=True)
    _, now = run(tiny_model, tmp_path / "now")
    _, ahead = run(tiny_model, tmp_path / "ahead", staleness=staleness)
    assert [batch.staleness for batch in ahead.batches] == [0, *range(1, staleness + 1), *[staleness] * 4][:4]
    for one, other in zip(now.batches, ahead.batches, strict=True):
        assert one.prompts == other.prompts
        assert torch.equal(one.preference, other.preference)
    assert now.batches[0].responses.texts == ahead.batches[0].responses.texts
    assert ahead.logged[3]["rollout/gap"] > 1e-3  # of the policy as it is, which has moved on


@pytest.mark.parametrize("limit", [{"limit_train_batches": 3, "max_epochs": 2}, {"max_steps": 6, "max_epochs": 2}])
def test_nothing_is_sampled_that_no_step_takes(tiny_model: Path, tmp_path: Path, network, limit) -> None:
    servers = network(gates=True).servers
    trainer, module, data = tiny_run(
        tiny_model, tmp_path, trainer={"max_steps": -1} | limit,
        data={"engine": ServerEngine([A, B]), "batch_size": 2, "staleness": 2},
    )  # fmt: skip
    trainer.fit(module, data)
    bodies = [body for server in servers.values() for path, body in server.calls if path == "/v1/completions"]
    probes = [body for body in bodies if body.get("n") != 2]
    assert len(bodies) - len(probes) == 4 + 6 * 2  # the normalisation, and six batches


def test_more_than_none_ahead_needs_an_engine_elsewhere(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"staleness 1 needs an engine that samples beside the training, .* got Tra"):
        tiny_run(tiny_model, tmp_path, data={"staleness": 1})


def test_a_checkpoint_holds_what_is_begun(tiny_model: Path, tmp_path: Path, network, monkeypatch) -> None:
    """Stopped after three of six steps with two batches ahead, a run ends as one that was not."""
    network(gates=True)

    def fit(root: Path, stop: int | None = None, resume: Path | None = None) -> tuple[Any, Batches]:
        batches = Batches()
        torch.manual_seed(0)
        trainer, module, data = tiny_run(
            tiny_model, root, data={"engine": ServerEngine([A, B]), "batch_size": 1, "staleness": 2},
            trainer={"max_steps": 6, "callbacks": [batches, RunCheckpoint(), StopAt()], "enable_checkpointing": True},
        )  # fmt: skip
        if stop:
            monkeypatch.setattr(StopAt, "moment", ("on_train_batch_end", stop, signal.SIGTERM))
            with pytest.raises(SystemExit):
                trainer.fit(module, data)
        else:
            trainer.fit(module, data, ckpt_path=resume)
        return module, batches

    whole, seen = fit(tmp_path / "whole")
    _, first = fit(tmp_path / "first", stop=3)
    resumed, rest = fit(tmp_path / "rest", resume=tmp_path / "first" / "checkpoints" / "last.ckpt")
    assert (len(first.batches), len(rest.batches)) == (3, 3)
    texts = [batch.responses.texts for batch in [*first.batches, *rest.batches]]
    assert texts == [batch.responses.texts for batch in seen.batches]
    assert [b.staleness for b in rest.batches] == [b.staleness for b in seen.batches[len(first.batches) :]]
    assert same(dict(whole.policy.adapter_parameters()), dict(resumed.policy.adapter_parameters()))


def test_the_pause_between_two_looks_is_short() -> None:
    assert 0 < PAUSE <= 1
    assert issubclass(httpx.ConnectError, httpx.HTTPError)
