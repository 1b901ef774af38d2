"""vLLM servers as one: each is given the adapters, requests are shared out, and one that falls silent is left out.

What is spoken is vLLM's own protocol: ``/health``, ``/version``, ``/tokenize``, ``/v1/models``, ``/v1/completions``
with token ids, ``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``; and ``/miepo``, where the plug-in
(:mod:`miepo.vllm`) is installed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import httpx

from miepo.errors import UserError, cut, first_line, short
from miepo.rollout.adapter_files import AdapterFile

PAUSE = 0.5  # seconds between two looks at a server that is away
AWAY = {404, 408, 425, 429}  # and 5xx: it may answer later; 404 of an adapter that it had before it began anew
SHORT = 30.0  # seconds for an answer that takes no sampling


class Away(Exception):
    """A server does not answer now; the message says how it showed."""


@dataclass(frozen=True)
class Sampling:
    """A request to sample responses to one prompt.

    Attributes:
        body: Of ``/v1/completions``, without the model.
        adapter: The adapter to sample with; None for the base.
    """

    body: Mapping[str, Any]
    adapter: AdapterFile | None = None


@dataclass
class Server:
    """What is known of one server.

    Attributes:
        url: Where it listens.
        base: The name under which it serves the base.
        up: Whether it answered when it was last asked.
        gates: Whether it applies a gate to each request, by the plug-in.
        loaded: Names of the adapters that it has.
        asked: Requests that it works on.
    """

    url: str
    base: str = ""
    up: bool = True
    gates: bool = False
    version: str = ""
    loaded: set[str] = field(default_factory=set)
    asked: int = 0
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)


class ServerPool:
    """Spreads requests over servers, each to the one that works on the fewest.

    A server that does not answer is left out, looked at again and again, and taken back once it is up and still the
    one it was; what it owed goes to the others. All methods run in one event loop.

    Args:
        urls: Of the servers.
        timeout: Seconds for the responses to a request.
        retries: How often one request is asked again before the run ends.
        patience: Seconds to wait while no server is up.
        transport: How to reach them; by default over the network.
    """

    def __init__(
        self,
        urls: Sequence[str],
        timeout: float = 600.0,
        retries: int = 8,
        patience: float = 300.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.servers = [Server(url.rstrip("/")) for url in urls]
        self.timeout, self.retries, self.patience = timeout, retries, patience
        self.asked_again = 0  # requests that a server owed and another, or it later, has answered
        self.recognise: Callable[[Server], Awaitable[None]] | None = None  # raises UserError of another than it was
        self._client = httpx.AsyncClient(
            transport=transport,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
            timeout=httpx.Timeout(timeout, connect=min(SHORT, timeout)),
            trust_env=False,
        )
        self._changed = asyncio.Event()
        self._looks: set[asyncio.Task] = set()
        self._refused: UserError | None = None

    # -- one server ----------------------------------------------------------------------------------------------------

    async def ask(self, server: Server, path: str, body: Any = None, timeout: float = SHORT) -> Any:
        """Return what a server answers, as JSON or text; a body makes it a POST.

        Raises:
            Away: it does not answer, or not now.
            UserError: it refuses the request.
        """
        response = await self._send(server, path, body, timeout)
        if response.status_code in AWAY or response.status_code >= 500:
            raise Away(f"status {response.status_code}: {cut(_said(response))}")
        if response.status_code >= 400:
            raise UserError(f"the server at {server.url} refuses {path}: {_said(response)}")
        try:
            return response.json()
        except ValueError:
            return response.text

    async def _send(self, server: Server, path: str, body: Any, timeout: float) -> httpx.Response:
        try:
            return await self._client.request(
                "GET" if body is None else "POST", server.url + path, json=body, timeout=timeout
            )
        except httpx.HTTPError as error:
            raise Away(first_line(error) if str(error) else type(error).__name__) from None
        except (httpx.InvalidURL, UnicodeError) as error:
            raise UserError(f"engine.urls: expected a server's address, got {short(server.url)} ({error})") from None

    async def open(self, server: Server) -> None:
        """Learn what a server is.

        Raises:
            Away: it does not answer.
            UserError: it is no vLLM.
        """
        models = await self.ask(server, "/v1/models")
        try:
            server.base = next(model["id"] for model in models["data"] if not model.get("parent"))
            server.loaded = {model["id"] for model in models["data"] if model.get("parent")}
            server.version = str((await self.ask(server, "/version"))["version"])
        except (TypeError, KeyError, StopIteration):
            raise UserError(f"expected a vLLM server at {server.url}, got something else") from None
        try:
            server.gates = bool((await self.ask(server, "/miepo")).get("gates"))
        except (Away, AttributeError):
            server.gates = False

    async def load(self, server: Server, adapter: AdapterFile) -> None:
        """Load an adapter into a server, unless it has it.

        Raises:
            Away: it does not answer.
            UserError: it cannot.
        """
        async with server.loading:
            if adapter.name in server.loaded:
                return
            body = {"lora_name": adapter.name, "lora_path": str(adapter.folder.absolute())}
            response = await self._send(server, "/v1/load_lora_adapter", body, self.timeout)
            said = _said(response)
            if response.status_code >= 500 and "Engine" in said:
                raise Away(f"status {response.status_code}: {cut(said)}")
            if response.status_code >= 400 and "already been loaded" not in said:
                raise _cannot_load(server, adapter, response.status_code, said)
            server.loaded.add(adapter.name)

    async def unload(self, adapters: Collection[AdapterFile]) -> None:
        """Let all servers forget adapters; one that is away has forgotten them."""

        async def one(server: Server, name: str) -> None:
            server.loaded.discard(name)
            with suppress(Away, UserError):  # it does not know it any more
                await self.ask(server, "/v1/unload_lora_adapter", {"lora_name": name})

        await asyncio.gather(
            *(one(server, a.name) for a in adapters for server in self.servers if a.name in server.loaded)
        )

    # -- all of them ---------------------------------------------------------------------------------------------------

    async def complete(self, requests: Sequence[Sampling], only: Server | None = None) -> list[dict[str, Any]]:
        """Return the answers of ``/v1/completions`` in the order of the requests, whichever server gives them.

        Args:
            requests: What to sample.
            only: The server that is to answer; by default any.

        Raises:
            UserError: no server was up for long, or none could answer a request.
        """
        tasks = [asyncio.ensure_future(self._answered(request, only)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # of the others, where one has failed
                task.cancel()

    async def _answered(self, request: Sampling, only: Server | None) -> dict[str, Any]:
        failed: list[Server] = []
        reason = ""
        while len(failed) <= self.retries:
            server = await self._pick(failed, only)
            server.asked += 1
            try:
                if request.adapter is not None:
                    await self.load(server, request.adapter)
                body = dict(request.body) | {"model": request.adapter.name if request.adapter else server.base}
                return await self.ask(server, "/v1/completions", body, self.timeout)
            except Away as error:
                failed.append(server)
                reason = f"{server.url}: {error}"
                self.asked_again += 1
                self._leave_out(server)
            finally:
                server.asked -= 1
        raise UserError(f"no server answers a request in {len(failed)} tries, each of {self.timeout:g} s; {reason}")

    async def _pick(self, failed: Sequence[Server], only: Server | None) -> Server:
        """Return a server that is up: one that has not failed this request where there is one, the least asked."""
        end = monotonic() + self.patience
        while True:
            if self._refused is not None:
                raise self._refused
            up = [server for server in self.servers if server.up and only in (None, server)]
            if up:
                return min(up, key=lambda server: (failed.count(server), server.asked))
            if monotonic() > end:
                urls = ", ".join(server.url for server in self.servers)
                raise UserError(f"expected a server that answers within {self.patience:g} s, got none of {urls}")
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(PAUSE, self.patience))

    def _leave_out(self, server: Server) -> None:
        if server.up:
            server.up = False
            look = asyncio.get_running_loop().create_task(self._take_back(server))
            self._looks.add(look)
            look.add_done_callback(self._looks.discard)

    async def _take_back(self, server: Server) -> None:
        """Wait until a server is up again, and see that it is the one it was."""
        while True:
            await asyncio.sleep(PAUSE)
            try:
                await self.ask(server, "/health")
                await self.open(server)  # it may have begun anew, without adapters
                if self.recognise is not None:
                    await self.recognise(server)
            except Away:
                continue
            except UserError as error:
                self._refused = error
            else:
                server.up = True
            self._changed.set()
            return

    async def close(self) -> None:
        """Stop looking at servers and close the connections."""
        looks = list(self._looks)
        for look in looks:
            look.cancel()
        await asyncio.gather(*looks, return_exceptions=True)
        await self._client.aclose()


def _said(response: httpx.Response) -> str:
    """Return what a server says of a mistake, in one line."""
    try:
        content = response.json()
        content = content.get("error", content)
        text = content.get("message") or content.get("detail") if isinstance(content, dict) else content
    except (ValueError, AttributeError):
        text = response.text
    return (" ".join(str(text).split()) or response.reason_phrase)[:300]


def _cannot_load(server: Server, adapter: AdapterFile, status: int, said: str) -> Exception:
    """Return the error of an adapter that a server does not take."""
    where = f"the server at {server.url}"
    if status == 404 and "adapter" not in said.lower():  # there is no such route
        return UserError(
            f"{where} takes no adapters: expected vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in "
            "its environment, as miepo rollout-server starts it"
        )
    if "rank" in said:
        return UserError(f"{where} takes no adapter of this rank: expected another --max-lora-rank ({said})")
    if status == 404:
        return UserError(
            f"{where} does not see the adapter in '{adapter.folder}': expected engine.folder in a place that this "
            "machine and the server's share"
        )
    return UserError(f"{where} does not load the adapter in '{adapter.folder}': {said}")
