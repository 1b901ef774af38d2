"""What every request must pass before any of it is answered: its size, its time, its key, where it goes."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 256 * 1024  # of a request
MOST_SECONDS = 15.0  # until a request is here


class HTTPRejection(Exception):
    """A request that is not answered: HTTP status, what to tell, and the kind of error in OpenAI's terms."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", **headers: str) -> None:
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers

    def response(self) -> JSONResponse:
        text = str(self).encode("utf-8", "backslashreplace").decode()  # half a character has no encoding
        body = {"message": text, "type": self.kind, "param": None, "code": None}
        return JSONResponse({"error": body}, self.status, self.headers)


class Admission:
    """Turns away who does not bear the key, what is too large and what does not come, and keeps nothing of it.

    Args:
        app: That answers the others.
        key: That a request must bear as its bearer token, if any.
        posts: Paths to which something may be sent; all by default.
        seconds: That a request may take to come.
    """

    def __init__(
        self,
        app: ASGIApp,
        key: str | None = None,
        posts: Collection[str] | None = None,
        seconds: float = MOST_SECONDS,
    ) -> None:
        self.app, self.key, self.posts, self.seconds = app, key, posts, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
            body = await asyncio.wait_for(_body(receive), self.seconds)
        except HTTPRejection as refused:
            await refused.response()(scope, receive, send)
        except TimeoutError:
            late = HTTPRejection(408, f"expected the whole request within {self.seconds:g} s", "timeout_error")
            await late.response()(scope, receive, send)
        else:
            if body is not None:
                await self.app(scope, _again(body, receive), send)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        if self.key is not None and path != "/health":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not secrets.compare_digest(key.strip().encode(), self.key.encode()):
                raise HTTPRejection(401, "expected the key of this server as a bearer token", "authentication_error")
        if self.posts is not None and method not in ("GET", "HEAD") and path not in self.posts:
            raise HTTPRejection(404, "nothing is taken here")
        length = headers.get("content-length") or "0"
        if not length.isascii() or not length.isdigit():
            raise HTTPRejection(400, "expected a number as Content-Length")
        if int(length[:20]) > MOST_BYTES or "transfer-encoding" in headers:
            raise HTTPRejection(413, f"expected a request of at most {MOST_BYTES} bytes that says its length")


async def _body(receive: Receive) -> bytes | None:
    """Return all that is sent; None where who sends it has gone."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Return it as if nobody had read it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def read() -> Message:
        return messages.pop() if messages else await receive()

    return read
