"""The HTTP application: checks, admission, streaming; the network runs in the batcher's thread."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from miepo.errors import UserError
from miepo.preferences import parse_preference
from miepo.serving.admission import Admission, HTTPRejection
from miepo.serving.batcher import Batcher, PendingRequest, QueueFull, Stopped
from miepo.serving.protocol import ChatRequest
from miepo.trained.policy import TrainedPolicy
from miepo.trained.streaming import Chunk

logger = logging.getLogger(__name__)


def failure(error: Exception) -> HTTPRejection:
    """Return what a client is told of an error in the batcher."""
    if isinstance(error, TimeoutError):
        return HTTPRejection(504, str(error), "timeout_error")
    if isinstance(error, UserError):
        return HTTPRejection(400, str(error))
    if isinstance(error, Stopped):
        return HTTPRejection(503, str(error), "server_error")
    return HTTPRejection(500, "the response could not be computed", "server_error")


class Responses:
    """The pieces of the responses to one request, as the event loop receives them."""

    def __init__(self, batcher: Batcher, questions: list[Any], timeout: float) -> None:
        loop, self._pieces = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Chunk | Exception]]()
        deadline = self._deadline = time.monotonic() + timeout

        def to(index: int) -> Callable[[Chunk | Exception], None]:
            def deliver(piece: Chunk | Exception) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

            return deliver

        self.tickets = [PendingRequest(question, deadline, to(i)) for i, question in enumerate(questions)]
        try:
            batcher.submit(self.tickets)
        except QueueFull:
            waits = {"Retry-After": "1"}
            raise HTTPRejection(
                429, "too many requests wait already: try again later", "rate_limit_error", **waits
            ) from None

    async def __aiter__(self) -> AsyncIterator[tuple[int, Chunk]]:
        unfinished = len(self.tickets)
        try:
            while unfinished:
                try:  # the network may be at a long prompt, where nobody can stop it
                    index, piece = await asyncio.wait_for(self._pieces.get(), self._deadline - time.monotonic())
                except TimeoutError:
                    raise failure(TimeoutError("the response took too long")) from None
                if isinstance(piece, Exception):
                    raise failure(piece)
                unfinished -= piece.finish is not None
                yield index, piece
        finally:
            for ticket in self.tickets:
                ticket.cancelled = True  # those that are done do not mind


def make_app(
    trained: TrainedPolicy,
    batcher: Batcher,
    *,
    name: str = "miepo",
    key: str | None = None,
    hosts: list[str] | None = None,
    timeout: float = 120.0,
    max_tokens: int | None = None,
) -> FastAPI:
    """Return the application.

    Args:
        trained: What answers.
        batcher: That runs it.
        name: Of the model, in answers.
        key: That requests must bear, if any.
        hosts: Names under which it may be addressed; any by default.
        timeout: Seconds after which a request is given up.
        max_tokens: Of a response; by default as many as fit the context. Where a request does not say how many, it
            gets as many as in training, or as there is room for.
    """
    app = FastAPI(title=f"miepo serve: {name}", docs_url=None, redoc_url=None, openapi_url=None)
    started = int(time.time())
    equal = dict.fromkeys(trained.names, 1 / len(trained.names))
    about = {"id": name, "object": "model", "created": started, "owned_by": "miepo", "objectives": list(trained.names)}

    def check_model(requested: str | None) -> None:
        if requested not in (None, name):
            raise HTTPRejection(404, f"expected the model '{name}', got '{requested}'", "not_found_error")

    def questions_of(request: ChatRequest) -> tuple[list[Any], dict[str, float]]:
        preference = equal if request.preference is None else request.preference
        vector = parse_preference(preference, trained.names, strict=True)
        weights = dict(zip(trained.names, vector.double().round(decimals=6).tolist(), strict=True))
        if request.tokens is not None and max_tokens is not None and request.tokens > max_tokens:
            raise UserError(f"max_tokens: expected at most {max_tokens}, got {request.tokens}")
        first = secrets.randbits(62) if request.seed is None else request.seed
        messages = [message.model_dump() for message in request.messages]
        question = trained.question(
            messages, weights, request.tokens, request.temperature, request.top_p or 1.0, request.stop or (), first
        )
        tokens = min(question.max_new_tokens, max_tokens or question.max_new_tokens)  # nobody asked for so many
        return [
            replace(question, max_new_tokens=tokens, seed=(first + i) % 2**63) for i in range(request.n or 1)
        ], weights

    app.add_middleware(Admission, key=key)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)

    @app.exception_handler(HTTPRejection)
    async def refused(_: Request, error: HTTPRejection) -> Response:
        return error.response()

    @app.exception_handler(UserError)
    async def mistaken(_: Request, error: UserError) -> Response:
        return HTTPRejection(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        told = []
        for problem in error.errors()[:5]:
            place = ".".join(str(part) for part in problem["loc"] if part != "body")
            told.append(f"{place}: {problem['msg']}" if place else problem["msg"])
        return HTTPRejection(400, "; ".join(told)).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return HTTPRejection(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> Response:
        logger.error("a request failed", exc_info=error)
        return failure(error).response()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": batcher.waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{requested}")
    async def model(requested: str) -> dict[str, Any]:
        check_model(requested)
        return about

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        check_model(body.model)
        if (body.n or 1) > batcher.limit:
            raise HTTPRejection(400, f"n: expected at most {batcher.limit}, as many as may wait, got {body.n}")
        questions, weights = await run_in_threadpool(questions_of, body)
        responses = Responses(batcher, questions, timeout)
        head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}
        prompt_tokens = len(questions[0].ids)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = _events(responses, head, weights, prompt_tokens if usage else None)
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
            head | {"object": "chat.completion", "choices": choices, "usage": _usage(prompt_tokens, sum(tokens))}
            | {"preference": weights}
        )  # fmt: skip

    return app


def _usage(prompt_tokens: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}


async def _whole(responses: Responses) -> tuple[list[str], list[str], list[int]]:
    count = len(responses.tickets)
    texts, finishes, tokens = [""] * count, [""] * count, [0] * count
    async for index, piece in responses:
        texts[index] += piece.text
        tokens[index], finishes[index] = piece.tokens, piece.finish or ""
    return texts, finishes, tokens


async def _events(
    responses: Responses, head: dict[str, Any], weights: dict[str, float], prompt_tokens: int | None
) -> AsyncIterator[str]:
    """Yield server-sent events: one for each piece, the usage if it is asked for, an error where there is one."""
    head = head | {"object": "chat.completion.chunk"}

    def event(value: Any) -> str:
        return f"data: {json.dumps(value)}\n\n"  # ASCII: some clients take other line ends for those of an event

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
        if prompt_tokens is not None:
            yield event(head | {"choices": [], "usage": _usage(prompt_tokens, sum(tokens))})
        yield "data: [DONE]\n\n"
    except HTTPRejection as error:
        yield event({"error": {"message": str(error), "type": error.kind, "param": None, "code": None}})
