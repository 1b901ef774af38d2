"""The routes of a server: requests that state a preference become requests with a gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from miepo import __version__
from miepo.errors import UserError
from miepo.vllm import gates
from miepo.vllm.request import GATE, Card, gate_fields, gate_in, split_name

PATHS = ("/v1/completions", "/v1/chat/completions")
LARGEST = 64 * 2**20  # bytes of a request


class PreferenceEndpoint:
    """The plug-in of group ``vllm.endpoint_plugins``."""

    name = "miepo"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the route ``/miepo``, which says whether gates are applied, and read preferences in other requests."""
        from fastapi.responses import JSONResponse

        async def state() -> Any:
            reason = app.state.miepo_reason
            return JSONResponse({"version": __version__, "gates": reason is None, "reason": reason})

        app.add_api_route("/miepo", state, methods=["GET"])
        app.add_middleware(PreferenceMiddleware)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Learn whether the server can apply gates."""
        state.miepo_reason = gates.why_not(engine_client.vllm_config)


class PreferenceMiddleware:
    """ASGI middleware that rewrites a request with a preference.

    Args:
        app: That answers it.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.cards: dict[str, Card] = {}  # by folder

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            return await self.app(scope, receive, send)
        body = await _read(receive)
        try:
            rewritten = self.rewritten(body, scope)
        except UserError as error:
            return await _refuse(send, str(error))
        headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(rewritten)).encode()))
        await self.app(scope | {"headers": headers}, _replay(rewritten, receive), send)

    def rewritten(self, body: bytes, scope: Mapping[str, Any]) -> bytes:
        """Return the body of a request with the gate of its preference; as it is where it states none.

        Raises:
            UserError: the preference is none of the policy's, or cannot be followed here.
        """
        try:
            request = json.loads(body)
        except ValueError:
            return body  # vLLM says what is wrong with it
        if not isinstance(request, dict):
            return body
        try:
            gate_in(request.get("vllm_xargs"))  # where the layers are, an error would end the server
        except (ValueError, AttributeError) as error:
            raise UserError(str(error)) from None
        state = scope["app"].state
        model, stated = split_name(request["model"]) if isinstance(request.get("model"), str) else ("", None)
        adapters = state.openai_serving_models.lora_requests
        if request.get("model") in adapters or model not in adapters:
            model, stated = str(request.get("model")), None  # a name with the separator, or a resolver's
        in_body = request.pop("preference", None)
        if stated is not None and in_body is not None:
            raise UserError("expected a preference in the model's name or in the body, got both")
        stated = in_body if stated is None else stated
        if stated is None:
            return body
        if model not in adapters:
            raise UserError(
                f"preference: expected the name of a policy as model ({', '.join(adapters) or 'none is loaded'})"
            )
        if state.miepo_reason is not None:
            raise UserError(f"this server cannot follow a preference: {state.miepo_reason}")
        card = self._card(Path(adapters[model].lora_path))
        weights = card.weights(stated)
        request["model"] = model
        if card.writes:
            if scope["path"] != "/v1/chat/completions":
                raise UserError("the policy reads its preference in the prompt: expected /v1/chat/completions")
            request["chat_template_kwargs"] = (request.get("chat_template_kwargs") or {}) | {"preference": weights}
        if any(owner is not None for owner in card.owners):
            fields = gate_fields(card.gate(weights), request.get("cache_salt"))
            others = {k: v for k, v in (request.get("vllm_xargs") or {}).items() if k != GATE}
            request |= fields | {"vllm_xargs": others | fields["vllm_xargs"]}
        return json.dumps(request).encode()

    def _card(self, folder: Path) -> Card:
        key = str(folder)
        if key not in self.cards:
            self.cards[key] = Card(folder)
        return self.cards[key]


async def _read(receive: Callable[[], Any]) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if not message.get("more_body") or size > LARGEST:
            return b"".join(parts)


def _replay(body: bytes, receive: Callable[[], Any]) -> Callable[[], Any]:
    """Return what gives the body once, and then what the client says, such as that it is gone."""
    given = False

    async def again() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Callable[[Any], Any], message: str) -> None:
    error = {"message": message, "type": "BadRequestError", "param": "preference", "code": 400}
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
