"""``miepo serve``: its address, its key and its end."""

from __future__ import annotations

import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any

from miepo.errors import UserError, needs
from miepo.serving.batcher import Batcher
from miepo.trained.policy import TrainedPolicy, load

MOST_CLIENTS = 512  # connections at one time
SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOCAL = ("127.0.0.1", "localhost", "[::1]")


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def key_for(options: Namespace) -> str | None:
    """Return the key that clients must give, None where none is needed."""
    if options.key is None and not is_loopback(options.host):
        return secrets.token_urlsafe(24)
    key: str | None = options.key
    return key


def listen(host: str, port: int) -> socket.socket:
    """Open a socket at an address; taken before a model is loaded, so that a mistake shows at once."""
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
    """Return the address of a socket as a browser takes it."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listening.getsockname()[1]}"


def hosts_of(host: str) -> list[str] | None:
    """Return names under which a server that only this machine can reach may be addressed: no web page's own.

    Else any.
    """
    return [*LOCAL, host] if is_loopback(host) else None


@contextmanager
def opened(options: Namespace) -> Iterator[tuple[socket.socket, TrainedPolicy]]:
    """Yield the socket to listen at and the policy to show there, as the options say.

    SIGINT and SIGTERM end it quietly.
    """
    # what a shell starts in its background was told to ignore SIGINT
    before = {number: signal.signal(number, _leave) for number in SIGNALS}
    try:
        with closing(listen(options.host, options.port)) as listening:
            yield listening, load(options.ckpt_path, base=options.base, device=options.device, trust=options.trust)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve_app(app: Any, listening: socket.socket, batcher: Batcher) -> None:
    """Serve until SIGINT or SIGTERM comes; the exit status says which, and clients who wait are told."""
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


def serve(options: Namespace) -> None:
    """Answer requests until a signal comes; the options are those of ``miepo serve``."""
    try:
        import uvicorn  # noqa: F401

        from miepo.serving.app import make_app
    except ImportError as error:
        raise needs(error.name or "fastapi", "miepo serve") from None
    key = key_for(options)
    with opened(options) as (listening, trained):
        batcher = Batcher(trained.policy, options.batch_size, options.max_queue)
        app = make_app(
            trained, batcher, name=options.name, key=key, hosts=hosts_of(options.host),
            timeout=options.timeout, max_tokens=options.max_tokens,
        )  # fmt: skip
        print(f"Serving {trained!r} at {address_of(options.host, listening)}/v1 as model '{options.name}'", flush=True)
        if key is not None and options.key is None:
            print(f"Key: {key}", flush=True)
        serve_app(app, listening, batcher)
