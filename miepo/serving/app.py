"""The HTTP application: checks, admission, streaming; the network runs in the batcher's thread."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from miepo.errors import UserError
from miepo.preferences import parse_preference
from miepo.rollout.streaming import Piece
from miepo.serving.batcher import Batcher, Busy, Ticket
from miepo.serving.protocol import ChatRequest
from miepo.trained import TrainedPolicy

MOST_BYTES = 256 * 1024  # of a request
logger = logging.getLogger(__name__)


class Refused(Exception):
    """A request that is not answered: HTTP status, what to tell, and the kind of error in OpenAI's terms."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", **headers: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers

    def response(self) -> JSONResponse:
        text = str(self).encode("utf-8", "backslashreplace").decode()  # half a character has no encoding
        body = {"message": text, "type": self.kind, "param": None, "code": None}
        return JSONResponse({"error": body}, self.status, self.headers)


def failure(error: Exception) -> Refused:
    """What a client is told of an error in the batcher."""
    if isinstance(error, TimeoutError):
        return Refused(504, str(error), "timeout_error")
    if isinstance(error, UserError):
        return Refused(400, str(error))
    return Refused(500, "the response could not be computed", "server_error")


class Responses:
    """The pieces of the responses to one request, as the event loop receives them."""

    def __init__(self, batcher: Batcher, questions: list[Any], timeout: float) -> None:
        loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Piece | Exception]]()
        deadline = self._deadline = time.monotonic() + timeout

        def to(index: int) -> Callable[[Piece | Exception], None]:
            def deliver(piece: Piece | Exception) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

            return deliver

        self.tickets = [Ticket(question, deadline, to(i)) for i, question in enumerate(questions)]
        try:
            batcher.submit(self.tickets)
        except Busy:
            waits = {"Retry-After": "1"}
            raise Refused(429, "too many requests wait already: try again later", "rate_limit_error", **waits) from None

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        left = len(self.tickets)
        try:
            while left:
                try:  # the network may be at a long prompt, where nobody can stop it
                    index, piece = await asyncio.wait_for(self._pieces.get(), self._deadline - time.monotonic())
                except TimeoutError:
                    raise failure(TimeoutError("the response took too long")) from None
                if isinstance(piece, Exception):
                    raise failure(piece)
                left -= piece.finish is not None
                yield index, piece
        finally:
            for ticket in self.tickets:
                ticket.cancelled = True  # those that are done do not mind


class Admission:
    """Turns away who does not bear the key, and what is too large, before any of it is read."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app, self.key = app, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refused(Headers(scope=scope), scope["path"]) if scope["type"] == "http" else None
        await (self.app if refused is None else refused.response())(scope, receive, send)

    def _refused(self, headers: Headers, path: str) -> Refused | None:
        if self.key is not None and path != "/health":
            given = headers.get("authorization", "").removeprefix("Bearer ")
            if not secrets.compare_digest(given.encode(), self.key.encode()):
                return Refused(401, "expected the key of this server as a bearer token", "authentication_error")
        length = headers.get("content-length") or "0"
        if not length.isascii() or not length.isdigit():
            return Refused(400, "expected a number as Content-Length")
        if int(length[:20]) > MOST_BYTES or "transfer-encoding" in headers:
            return Refused(413, f"expected a request of at most {MOST_BYTES} bytes that says its length")
        return None


def make_app(
    trained: TrainedPolicy,
    batcher: Batcher,
    *,
    name: str = "miepo",
    key: str | None = None,
    hosts: list[str] | None = None,
    timeout: float = 120.0,
    most_tokens: int | None = None,
) -> FastAPI:
    """The application.

    Args:
        trained: What answers.
        batcher: That runs it.
        name: Of the model, in answers.
        key: That requests must bear, if any.
        hosts: Names under which it may be addressed; any by default.
        timeout: Seconds after which a request is given up.
        most_tokens: Of a response; as many as fit the context by default.
    """
    app = FastAPI(title=f"miepo serve: {name}", docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())
    equal = dict.fromkeys(trained.names, 1 / len(trained.names))

    def questions_of(request: ChatRequest) -> tuple[list[Any], dict[str, float]]:
        wanted = equal if request.preference is None else request.preference
        vector = parse_preference(wanted, trained.names, strict=True)
        weights = dict(zip(trained.names, vector.double().round(decimals=6).tolist(), strict=True))
        tokens = request.tokens or trained.saved.max_new_tokens
        if most_tokens is not None and tokens > most_tokens:
            raise UserError(f"max_tokens: expected at most {most_tokens}, got {tokens}")
        first = secrets.randbits(62) if request.seed is None else request.seed
        messages = [message.model_dump() for message in request.messages]
        return [
            trained.question(
                messages, weights, tokens, request.temperature, request.top_p or 1.0, request.stop or (), first + i
            )
            for i in range(request.n or 1)
        ], weights

    app.add_middleware(Admission, key=key)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> Response:
        return Refused(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        told = []
        for problem in error.errors()[:5]:
            place = ".".join(str(part) for part in problem["loc"] if part != "body")
            told.append(f"{place}: {problem['msg']}" if place else problem["msg"])
        return Refused(400, "; ".join(told)).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        logger.error("a request failed", exc_info=error)
        return failure(error).response()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": batcher.waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": name, "object": "model", "created": started, "owned_by": "miepo"}
        return {"object": "list", "data": [entry | {"objectives": list(trained.names)}]}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        if body.model not in (None, name):
            raise Refused(404, f"expected the model '{name}', got '{body.model}'", "not_found_error")
        if (body.n or 1) > batcher.limit:
            raise Refused(400, f"n: expected at most {batcher.limit}, as many as may wait, got {body.n}")
        questions, weights = await run_in_threadpool(questions_of, body)
        responses = Responses(batcher, questions, timeout)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        given = len(questions[0].ids)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(responses, head, weights, given if usage else None)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        answer = asyncio.create_task(_whole(responses))
        while not (await asyncio.wait({answer}, timeout=0.5))[0]:
            if await request.is_disconnected():
                answer.cancel()
                return Response(status_code=499)
        texts, finishes, tokens = answer.result()
        choices = [
            {"index": i, "message": {"role": "assistant", "content": texts[i]}, "finish_reason": finishes[i],
             "logprobs": None}
            for i in range(len(texts))
        ]  # fmt: skip
        return JSONResponse(
            head | {"object": "chat.completion", "choices": choices, "usage": _usage(given, sum(tokens))}
            | {"preference": weights}
        )  # fmt: skip

    return app


def _usage(given: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}


async def _whole(responses: Responses) -> tuple[list[str], list[str], list[int]]:
    count = len(responses.tickets)
    texts, finishes, tokens = [""] * count, [""] * count, [0] * count
    async for index, piece in responses:
        texts[index] += piece.text
        tokens[index], finishes[index] = piece.tokens, piece.finish or ""
    return texts, finishes, tokens


async def _events(
    responses: Responses, head: dict[str, Any], weights: dict[str, float], given: int | None
) -> AsyncIterator[str]:
    """Server-sent events: one for each piece, the usage if it is asked for, an error where there is one."""
    head = head | {"object": "chat.completion.chunk"}

    def event(value: Any) -> str:
        return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"

    def choice(index: int, delta: dict[str, str], finish: str | None = None) -> list[dict[str, Any]]:
        return [{"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}]

    tokens = [0] * len(responses.tickets)
    try:
        for index in range(len(tokens)):
            begin = {"choices": choice(index, {"role": "assistant", "content": ""}), "preference": weights}
            yield event(head | begin)
        async for index, piece in responses:
            tokens[index] = piece.tokens
            if piece.text:
                yield event(head | {"choices": choice(index, {"content": piece.text})})
            if piece.finish:
                yield event(head | {"choices": choice(index, {}, piece.finish)})
        if given is not None:
            yield event(head | {"choices": [], "usage": _usage(given, sum(tokens))})
        yield "data: [DONE]\n\n"
    except Refused as error:
        yield event({"error": {"message": str(error), "type": error.kind, "param": None, "code": None}})
