"""An application on a port of this machine, in a thread of this process."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from miepo.serving.command import address_of, listen


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """Its address."""
    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="auto", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address_of("127.0.0.1", listening)
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listening.close()
