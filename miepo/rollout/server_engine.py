"""Sampling on vLLM servers, of this machine or of others, while the policy may train on."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from miepo.errors import UserError, first_line, short
from miepo.losses import mean_distance
from miepo.policy import Policy
from miepo.rollout.adapter_files import AdapterFile, AdapterFiles, new_prefix
from miepo.rollout.engine import RolloutEngine, responses_with_log_prob
from miepo.rollout.servers import Away, Sampling, Server, ServerPool
from miepo.training.distributed import first_process, from_first
from miepo.types import Responses
from miepo.vllm.request import gate_fields

T = TypeVar("T")

# whose tokens and log-probabilities tell one base from another
PROBE = "The river rose by 0.25 metres in April; nobody in Zürich or 東京 had expected that (or so they say)."
PROBE_PROMPT = "Tell me about rain."
PROBE_TOKENS = 16

ADDRESSES = "MIEPO_ROLLOUT_URLS"


def check_addresses(urls: Sequence[str]) -> None:
    """Refuse what is no list of servers.

    Raises:
        UserError: it is empty, names one twice, or something that is no address.
    """
    if not urls or isinstance(urls, str) or len({url.rstrip("/") for url in urls}) < len(urls):
        raise UserError(f"engine.urls must be a list of different addresses of servers, got {short(urls)}")
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise UserError(f"engine.urls: expected addresses such as http://127.0.0.1:8000, got {short(url)}")


class ServerEngine(RolloutEngine):
    """Samples on any number of vLLM servers, which ``miepo rollout-server`` starts.

    Every state of the adapter is written into a folder of its own, which the servers must see, and each loads it under
    a name of its own. A gated policy goes to servers that have miepo's plug-in (:mod:`miepo.vllm`) as one adapter, and
    each request carries its gate; to others as one plain adapter for each preference vector.

    Each prompt is a request of its own with a seed of its own, and goes to the server that works on the fewest. One
    that does not answer is left out until it does; its requests go to the others. What is drawn depends on seed and
    place in the run alone as far as vLLM computes alike whatever else is in its batch, which it does up to rounding.

    Before the first step every server must have the policy's tokenizer and base, and log-probabilities within
    ``max_gap`` of the policy's. The log has ``rollout/gap`` of what is sampled and ends the run beyond ``max_gap``.

    Args:
        urls: Addresses of the servers, such as ``http://127.0.0.1:8000``; by default those that the environment names
            in ``MIEPO_ROLLOUT_URLS``, separated by commas, as ``--launcher ray`` does.
        stop: See :class:`~miepo.rollout.engine.RolloutEngine`.
        folder: Where adapters are written, which this machine and the servers share; by default a temporary folder.
        max_gap: Largest mean distance of log-probabilities from the policy's, in nats a token. In float32 it was 1e-05
            (SmolLM2-135M on a CPU); in bfloat16 it was not measured.
        timeout: Seconds for the responses to a request.
        retries: How often a request is asked again before the run ends.
        patience: Seconds to wait while no server answers, and at the start for each.
    """

    samples_elsewhere: ClassVar[bool] = True

    def __init__(
        self,
        urls: list[str] | None = None,
        stop: Sequence[str] = (),
        folder: str | None = None,
        max_gap: float = 0.1,
        timeout: float = 600.0,
        retries: int = 8,
        patience: float = 120.0,
    ) -> None:
        super().__init__(stop)
        if urls is not None:
            check_addresses(urls)
        for name, value in (("max_gap", max_gap), ("timeout", timeout), ("patience", patience)):
            if not value > 0:
                raise UserError(f"engine.{name} must be positive, got {value}")
        if retries < 0:
            raise UserError(f"engine.retries must not be negative, got {retries}")
        self.urls, self.folder, self.max_gap = urls, folder, max_gap
        self.timeout, self.retries, self.patience = timeout, retries, patience
        self._loop: _Loop | None = None
        self._former: list[AdapterFile] = []  # of states that the policy had, and that a request may name
        self._named: list[set[str]] = []  # adapters of the requests that were begun and not waited for
        self._raw: AdapterFile | None = None
        self._gated = False  # whether all servers apply gates

    def draw(self, *args: Any, **kwargs: Any) -> Responses:
        return self.begin(*args, **kwargs)()

    def begin(
        self,
        policy: Policy,
        prompts: Sequence[str],
        preference: Tensor,
        count: int,
        max_new_tokens: int,
        seeds: Sequence[int],
    ) -> Callable[[], Responses]:
        loop = self._connected(policy)
        self._forget_former(policy)
        requests = self._requests(policy, prompts, preference, count, max_new_tokens, seeds)
        named = {request.adapter.name for request in requests if request.adapter}
        self._named.append(named)
        before = self.pool.asked_again
        answers = loop.start(self.pool.complete(requests))
        found: Responses | None = None

        def wait() -> Responses:
            nonlocal found
            if found is None:
                try:
                    found = responses_with_log_prob(policy, [_sampled(one) for one in answers.result()], self.stop)
                finally:
                    if named in self._named:
                        self._named.remove(named)
                found.counts["asked_again"] = self.pool.asked_again - before
            return found

        return wait

    # -- requests ------------------------------------------------------------------------------------------------------

    def _requests(
        self,
        policy: Policy,
        prompts: Sequence[str],
        preference: Tensor,
        count: int,
        max_new_tokens: int,
        seeds: Sequence[int],
    ) -> list[Sampling]:
        sampling: dict[str, Any] = {
            "n": count, "temperature": policy.temperature, "max_tokens": max_new_tokens, "logprobs": 0,
            "return_token_ids": True, "stop_token_ids": policy.end_ids, "stop": list(self.stop) or None,
            "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,  # nothing truncated or penalised
        }  # fmt: skip
        tokens = policy.encode(prompts, preference)
        gates = policy.gate_of(preference)  # (N, R)
        requests = []
        for i, (ids, mask) in enumerate(zip(tokens.ids, tokens.mask, strict=True)):
            body = sampling | {"prompt": ids[mask].tolist(), "seed": seeds[i] % 2**62}
            if gates is None:
                adapter = self._published(policy)
            elif self._gated:
                adapter = self._published(policy)
                body |= gate_fields(gates[i, :: policy.lora_rank].tolist())
            else:
                adapter = self.files.file(policy, gates[i : i + 1])
            requests.append(Sampling(body, adapter))
        return requests

    def _published(self, policy: Policy) -> AdapterFile:
        """Return the adapter with all its blocks, which the first process has written for all."""
        if self._raw is None:
            self._raw = from_first(lambda: self.files.file(policy))
        return self._raw

    def _forget_former(self, policy: Policy) -> None:
        """Let servers and disk forget adapters that the policy no longer has and no request names."""
        former = self.files.outdated(policy)
        if former is not None:
            self._former += former
            self._raw = None
        asked = set().union(*self._named)
        gone = [file for file in self._former if file.name not in asked]
        if gone and self._loop is not None:
            self._former = [file for file in self._former if file.name in asked]
            self._loop.run(self.pool.unload(gone))
            self.files.remove(gone)

    # -- the servers ---------------------------------------------------------------------------------------------------

    def _connected(self, policy: Policy) -> _Loop:
        """Return the loop in which servers are talked to; at first every server is looked at."""
        if self._loop is not None:
            return self._loop
        urls = self.urls
        if urls is None:
            urls = list(filter(None, os.environ.get(ADDRESSES, "").split(",")))
            check_addresses(urls)
        prefix = from_first(new_prefix)
        own = "" if first_process() else f"-{torch.distributed.get_rank()}"
        self.files = AdapterFiles(None if self.folder is None else Path(self.folder), prefix + own)
        self.pool = ServerPool(urls, self.timeout, self.retries, self.patience)
        loop = _Loop()
        try:
            known = _tokens_and_log_prob(policy)
            self.pool.recognise = lambda server: self._recognise(server, *known)
            loop.run(self._find_all())
            self._check_versions()
            self._gated = all(server.gates for server in self.pool.servers)
            self._compare(policy, loop)
        except BaseException:
            loop.close(self.pool)
            raise
        self._loop = loop
        weakref.finalize(self, loop.close, self.pool)
        return loop

    async def _find_all(self) -> None:
        await asyncio.gather(*map(self._find, self.pool.servers))

    async def _find(self, server: Server) -> None:
        """Wait for a server at the start, and learn what it is."""
        assert self.pool.recognise is not None
        try:
            async with asyncio.timeout(self.patience):
                said = False
                while True:
                    try:
                        await self.pool.open(server)
                        return await self.pool.recognise(server)
                    except Away as error:
                        reason = str(error)
                        if not said:
                            rank_zero_info(f"Waiting for the server at {server.url} ({reason})")
                        said = True
                        await asyncio.sleep(1)
        except TimeoutError:
            raise UserError(
                f"expected a vLLM server at {server.url} within {self.patience:g} s, got none: {reason}"
            ) from None

    async def _recognise(self, server: Server, ids: list[int], log_prob: Tensor) -> None:
        """Refuse a server of another base: its tokens of a text, or its log-probabilities of them, are others.

        Raises:
            Away: it does not answer.
            UserError: it is another.
        """
        if self._gated and not server.gates:
            raise UserError(f"the server at {server.url} came back without miepo's plug-in, which it had at the start")
        found = await self.pool.ask(server, "/tokenize", {"prompt": PROBE, "add_special_tokens": False})
        if not isinstance(found, dict) or found.get("tokens") != ids:
            raise UserError(f"the server at {server.url} has another tokenizer than the policy: expected the same base")
        body = {"model": server.base, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0}
        answer = await self.pool.ask(server, "/v1/completions", body, self.timeout)
        read = answer["choices"][0]["prompt_logprobs"][1:]
        values = torch.tensor([float(step[str(i)]["logprob"]) for step, i in zip(read, ids[1:], strict=True)])
        gap = float((values - log_prob).abs().mean())
        if not gap <= self.max_gap:
            raise UserError(
                f"the server at {server.url} has another base than the policy: its log-probabilities of a text are "
                f"{gap:.3g} nats a token away, expected at most {self.max_gap:g} (engine.max_gap)"
            )

    def _check_versions(self) -> None:
        versions = {server.version for server in self.pool.servers}
        if len(versions) > 1:
            rank_zero_warn(f"the servers are of different versions of vLLM ({', '.join(sorted(versions))})")
        with_gate = {server.gates for server in self.pool.servers}
        if len(with_gate) > 1:
            rank_zero_warn("some servers have miepo's plug-in and some not: none is sent gates")

    def _compare(self, policy: Policy, loop: _Loop) -> None:
        """Compare what every server samples with the adapter as it is with the policy's own log-probabilities."""
        preference = torch.full((1, len(policy.names)), 1 / len(policy.names))
        self._forget_former(policy)
        for server in self.pool.servers:
            requests = self._requests(policy, [PROBE_PROMPT], preference, 1, PROBE_TOKENS, [0])
            answers = loop.run(self.pool.complete(requests, server))
            responses = responses_with_log_prob(policy, [_sampled(one) for one in answers])
            with policy.evaluating():
                own = policy.response_log_prob([PROBE_PROMPT], preference.unsqueeze(1), responses.tokens).squeeze(2)
            assert responses.log_prob is not None
            gap = float(mean_distance(own, responses.log_prob, responses.tokens.mask).mean())
            if not gap <= self.max_gap:
                raise UserError(
                    f"the server at {server.url} samples from another distribution: its log-probabilities are "
                    f"{gap:.3g} nats a token away, expected at most {self.max_gap:g} (engine.max_gap); it needs "
                    "--logprobs-mode processed_logprobs, as miepo rollout-server starts it"
                )
            rank_zero_info(
                f"Sampling on {server.url} (vLLM {server.version}{', with gates' if server.gates else ''}): "
                f"log-probabilities {gap:.2g} nats a token from the policy's"
            )


def _sampled(answer: Any) -> list[tuple[list[int], list[float]]]:
    """Return ids and log-probabilities of the responses in an answer of ``/v1/completions``."""
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [(list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"])) for choice in choices]
    except (KeyError, TypeError) as error:
        raise UserError(f"expected responses with token ids and log-probabilities, got other: {error}") from None


def _tokens_and_log_prob(policy: Policy) -> tuple[list[int], Tensor]:
    """Return the tokens of :data:`PROBE` and the base's log-probabilities of all but the first."""
    ids: list[int] = policy.tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    given = torch.tensor([ids], device=policy.device)
    with policy.evaluating(), policy.autocast(), policy.model.disable_adapter():
        logits = policy.model(input_ids=given).logits[0, :-1].float()
    return ids, logits.log_softmax(-1).gather(1, given[0, 1:, None]).squeeze(1).cpu()


class _Loop:
    """An event loop in a thread of its own, so that requests go on while the policy trains."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="rollout servers", daemon=True)
        self.thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> Any:
        """Begin ``work`` and return its future."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what comes of ``work``."""
        return self.start(work).result()

    def close(self, pool: ServerPool) -> None:
        """Close the connections and end the thread."""
        try:
            self.start(pool.close()).result(5)
        except Exception as error:  # of a server that is gone
            rank_zero_warn(f"connections to rollout servers did not close: {first_line(error)}")
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()
