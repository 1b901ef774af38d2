"""``miepo serve``: the command, its address and its key."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any

from miepo.errors import UserError, needs
from miepo.serving.batcher import Batcher
from miepo.trained.policy import TrainedPolicy, load

MOST_CLIENTS = 512  # connections at one time
MOST_SECONDS = 86_400  # of one response
SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOCAL = ("127.0.0.1", "localhost", "[::1]")


def add_options(parser: ArgumentParser, port: int) -> None:
    """What every command needs that shows a trained policy at an address."""
    parser.add_argument("--ckpt_path", required=True, help="a run's folder, a checkpoint or a folder of miepo export")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; beyond this machine a key is needed")
    parser.add_argument("--port", type=int, default=port)
    parser.add_argument("--key", help="that a client must give; drawn where --host is not of this machine alone")
    parser.add_argument("--most_tokens", type=int, default=512, help="of a response")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds after which a response is given up")
    parser.add_argument("--waiting", type=int, default=64, help="requests that may wait; more are refused")
    parser.add_argument("--base", help="where the base model is, if not where it was in training")
    parser.add_argument("--device", help="by default a GPU where there is one")
    parser.add_argument("--trust", action="store_true", help="import code that the checkpoint names and miepo has not")


def check_options(options: Namespace) -> None:
    """Refuses what cannot be, before a model is loaded."""
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port: expected a number from 0 to 65535, got {options.port}")
    for name in ("most_tokens", "timeout", "waiting"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name} must be positive, got {getattr(options, name)}")
    if options.timeout > MOST_SECONDS:
        raise UserError(f"--timeout: expected at most {MOST_SECONDS} seconds, got {options.timeout}")
    if options.key is not None and len(options.key) < 8:
        raise UserError(f"--key: expected at least 8 characters, got {len(options.key)}")
    if options.key is not None and not options.key.isascii():
        raise UserError("--key: expected ASCII characters, which are all that a header carries")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def key_for(options: Namespace) -> str | None:
    """The key that clients must give, None where none is needed."""
    if options.key is None and not is_loopback(options.host):
        return secrets.token_urlsafe(24)
    key: str | None = options.key
    return key


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; taken before a model is loaded, so that a mistake shows at once."""
    found = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except (OSError, UnicodeError) as error:
        if found is not None:
            found.close()
        raise UserError(f"cannot listen at {host}, port {port}: {getattr(error, 'strerror', None) or error}") from None
    return found


def address_of(host: str, listening: socket.socket) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listening.getsockname()[1]}"


def hosts_of(host: str) -> list[str] | None:
    """Names under which a server that only this machine can reach may be addressed: no web page's own; else any."""
    return [*LOCAL, host] if is_loopback(host) else None


@contextmanager
def opened(options: Namespace) -> Iterator[tuple[socket.socket, TrainedPolicy]]:
    """The socket to listen at and the policy to show there, as the options say; SIGINT and SIGTERM end it quietly."""
    # what a shell starts in its background was told to ignore SIGINT
    before = {number: signal.signal(number, _leave) for number in SIGNALS}
    try:
        with closing(listen(options.host, options.port)) as listening:
            yield listening, load(options.ckpt_path, base=options.base, device=options.device, trust=options.trust)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve_app(app: Any, listening: socket.socket, batcher: Batcher) -> None:
    """Serves until SIGINT or SIGTERM comes; the exit status says which, and clients who wait are told."""
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            super().handle_exit(sig, frame)
            batcher.stop()

    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, limit_concurrency=MOST_CLIENTS)
    try:
        Server(config).run(sockets=[listening])  # which raises the signal again when all is in order
    except SystemExit as ended:
        for number in SIGNALS:  # this takes two seconds at most
            signal.signal(number, signal.SIG_IGN)
        batcher.close()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # at once: where a thread is within the network or an objective, Python would wait for it, or abort
        os._exit(int(ended.code or 0))
    batcher.close()


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def main(args: Sequence[str]) -> None:
    """``miepo serve --ckpt_path RUN [--port 8000]``."""
    parser = ArgumentParser(
        prog="miepo serve",
        description="Answers OpenAI's chat requests, which carry a preference: "
        'extra_body={"preference": {"helpful": 0.7, "brief": 0.3}}.',
    )
    add_options(parser, 8000)
    parser.add_argument("--name", default="miepo", help="of the model")
    parser.add_argument("--batch_size", type=int, default=16, help="requests that are answered together")
    options = parser.parse_args(args)
    check_options(options)
    if options.batch_size < 1:
        raise UserError(f"--batch_size must be positive, got {options.batch_size}")
    try:
        import uvicorn  # noqa: F401

        from miepo.serving.app import make_app
    except ImportError as error:
        raise needs(error.name or "fastapi", "miepo serve") from None
    key = key_for(options)
    with opened(options) as (listening, trained):
        batcher = Batcher(trained.policy, options.batch_size, options.waiting)
        app = make_app(
            trained, batcher, name=options.name, key=key, hosts=hosts_of(options.host),
            timeout=options.timeout, most_tokens=options.most_tokens,
        )  # fmt: skip
        print(f"Serving {trained!r} at {address_of(options.host, listening)}/v1 as model '{options.name}'", flush=True)
        if key is not None and options.key is None:
            print(f"Key: {key}", flush=True)
        serve_app(app, listening, batcher)
