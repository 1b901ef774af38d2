"""A small server that speaks vLLM's routes and samples from a real, tiny network: for tests of the protocol.

``python -m tests.helpers.vllm_server MODEL --port 8000`` is a process of its own, which a test may kill.
"""

from __future__ import annotations

import asyncio
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from miepo.vllm.request import GATE


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class TinyServer:
    """What vLLM does, one request at a time."""

    def __init__(self, model: Path | str, gates: bool = False, most_rank: int = 64, lora: bool = True) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.gates, self.most_rank, self.lora = gates, most_rank, lora
        self.adapters: dict[str, str] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.faults: list[Callable[[str, dict[str, Any]], None]] = []  # may raise
        self.delay = 0.0
        self.distort = 0.0  # added to the log-probabilities that it states
        self.version = "0.32.0"
        self.most_adapters = 0  # that were loaded at one time

    def load(self, name: str, path: str) -> None:
        if name in self.adapters:
            raise Refused(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").is_file():
            raise Refused(404, f"Loading lora {name} failed: No adapter found for {path}")
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(path, name)
        else:
            self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name).eval()
        rank = self.model.peft_config[name].r
        if rank > self.most_rank:
            self.model.delete_adapter(name)
            raise Refused(500, f"LoRA rank {rank} is greater than max_lora_rank {self.most_rank}.")
        self.adapters[name] = path
        self.most_adapters = max(self.most_adapters, len(self.adapters))

    def unload(self, name: str) -> None:
        if name not in self.adapters:
            raise Refused(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        if others := [other for other in self.model.peft_config if other != name]:  # PEFT needs one
            self.model.set_adapter(others[0])
            self.model.delete_adapter(name)

    @contextmanager
    def adapted(self, name: str, gate: Sequence[float] | None) -> Any:
        if name not in self.adapters:
            if not isinstance(self.model, PeftModel):
                yield
                return
            with self.model.disable_adapter():
                yield
            return
        self.model.set_adapter(name)
        if gate is None:
            yield
            return
        layers = [m.lora_B[name].weight for m in self.model.modules() if name in getattr(m, "lora_B", {})]
        before = [weight.data for weight in layers]
        for weight in layers:
            weight.data = weight.data * torch.tensor(gate).repeat_interleave(weight.shape[1] // len(gate))
        try:
            yield
        finally:
            for weight, data in zip(layers, before, strict=True):
                weight.data = data

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        name = body["model"]
        if name != "base" and name not in self.adapters:
            raise Refused(404, f"The model `{name}` does not exist.")
        gate = (body.get("vllm_xargs") or {}).get(GATE)
        if gate is not None and not (self.gates and body.get("cache_salt")):
            raise Refused(400, "a gate without the plug-in, or without a salt of the cache")
        prompt, temperature = body["prompt"], body.get("temperature", 1.0)
        with self.adapted(name, gate):
            choices = [
                self._choice(body, prompt, temperature, torch.Generator().manual_seed(body.get("seed", 0) + i), i)
                for i in range(body.get("n", 1))
            ]
            if body.get("prompt_logprobs") is not None:
                table = self.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
                choices[0]["prompt_logprobs"] = [None] + [
                    {str(t): {"logprob": float(table[i, t])}} for i, t in enumerate(prompt[1:])
                ]
        return {"choices": choices[::-1]}  # the order is not promised

    def _choice(self, body: dict[str, Any], prompt: Any, temperature: float, draws: Any, index: int) -> dict[str, Any]:
        ids: list[int] = []
        values: list[float] = []
        reason = "length"
        ends = set(body.get("stop_token_ids") or []) | {self.tokenizer.eos_token_id}
        for _ in range(body["max_tokens"]):
            logits = self.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1] / temperature
            log_prob = logits.log_softmax(-1)
            ids.append(int(torch.multinomial(log_prob.exp(), 1, generator=draws)))
            values.append(float(log_prob[ids[-1]]) + self.distort)
            text = self.tokenizer.decode(ids)
            if ids[-1] in ends or any(stop in text for stop in body.get("stop") or []):
                reason = "stop"
                break
        return {"index": index, "token_ids": ids, "logprobs": {"token_logprobs": values}, "finish_reason": reason}

    def answer(self, path: str, body: dict[str, Any]) -> Any:
        self.calls.append((path, body))
        for fault in list(self.faults):
            fault(path, body)
        if path == "/v1/models":
            cards = [{"id": "base", "parent": None}] + [{"id": name, "parent": "base"} for name in self.adapters]
            return {"data": cards}
        if path == "/health":
            return ""
        if path == "/version":
            return {"version": self.version}
        if path == "/miepo" and self.gates:
            return {"gates": True}
        if path == "/tokenize":
            return {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/v1/completions":
            return self.complete(body)
        if path == "/v1/load_lora_adapter" and self.lora:
            self.load(body["lora_name"], body["lora_path"])
            return "Success"
        if path == "/v1/unload_lora_adapter" and self.lora:
            self.unload(body["lora_name"])
            return "Success"
        raise Refused(404, "Not Found")

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.api_route("/{path:path}", methods=["GET", "POST"])
        async def any_route(path: str, request: Request) -> Any:
            body = await request.json() if request.method == "POST" else {}
            if self.delay and path == "v1/completions":
                await asyncio.sleep(self.delay)
            try:
                found = self.answer(f"/{path}", body)
            except Refused as error:
                content: dict[str, Any] = {"error": {"message": str(error), "code": error.status}}
                if str(error) == "Not Found":
                    content = {"detail": "Not Found"}
                return JSONResponse(content, error.status)
            return PlainTextResponse(found) if isinstance(found, str) else found

        return app


class TinyNetwork(httpx.AsyncBaseTransport):
    """Servers in this process by their addresses; one that is None, or not there, refuses connections."""

    def __init__(self, servers: dict[str, TinyServer | None]) -> None:
        self.servers = servers
        self.apps: dict[int, httpx.ASGITransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        server = self.servers.get(f"{request.url.scheme}://{request.url.netloc.decode()}")
        if server is None:
            raise httpx.ConnectError("All connection attempts failed", request=request)
        app = self.apps.setdefault(id(server), httpx.ASGITransport(server.app()))
        timeout = request.extensions["timeout"]["read"]
        try:
            return await asyncio.wait_for(app.handle_async_request(request), timeout)
        except TimeoutError:
            raise httpx.ReadTimeout("", request=request) from None


if __name__ == "__main__":
    import uvicorn

    parser = ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--gates", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    uvicorn.run(TinyServer(options.model, options.gates).app(), host=options.host, port=options.port, log_level="error")
