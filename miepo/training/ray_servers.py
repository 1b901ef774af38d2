"""Rollout servers as actors of a Ray cluster, beside the workers of a run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import httpx

from miepo.errors import UserError, first_line

PORT = "{port}"  # in a server's words: the one that is free where it runs
PAUSE = 0.5  # seconds


class ServerProcess:
    """A server on the machine of an actor: started again, at the same address, whenever it ends.

    Args:
        words: Of its command, of which :data:`PORT` becomes its port.
        environment: Variables beside those that there are.
    """

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("", 0))
            self.port = free.getsockname()[1]
        self.words = [word.replace(PORT, str(self.port)) for word in words]
        self.environment = dict(environment)
        self.process: subprocess.Popen | None = None
        self.starts = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def start(self, host: str, patience: float) -> str:
        """Start the server and return its address once it answers.

        Args:
            host: By which others reach this machine.
            patience: Seconds to wait for an answer.

        Raises:
            UserError: it ends, or does not answer.
        """
        url = f"http://{host}:{self.port}"
        self._thread.start()
        end = time.monotonic() + patience
        while time.monotonic() < end and self.starts < 3:
            try:
                httpx.get(f"{url}/health", timeout=5, trust_env=False).raise_for_status()
                return url
            except httpx.HTTPError:
                time.sleep(PAUSE)
        self.stop()
        what = "it ends at once" if self.starts >= 3 else f"none answers within {patience:g} s"
        raise UserError(f"expected a rollout server by '{' '.join(self.words)}', got none: {what}")

    def _keep(self) -> None:
        while not self._ended.is_set():
            self.starts += 1
            try:
                self.process = subprocess.Popen(self.words, env=os.environ | self.environment, start_new_session=True)
            except OSError as error:
                print(f"a rollout server cannot be started: {first_line(error)}", flush=True)
                self.starts = 3
                return
            while self.process.poll() is None and not self._ended.is_set():
                time.sleep(PAUSE / 5)
            self._kill()

    def _kill(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # what it has started, too
            self.process.wait()

    def stop(self) -> None:
        """End the server."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(10)


def start_servers(
    count: int, words: Sequence[str], environment: Mapping[str, str], needs: Mapping[str, float], patience: float
) -> tuple[list[Any], list[str]]:
    """Place servers on the cluster, and return their actors and addresses.

    Args:
        count: How many.
        words: Of the command of each.
        environment: Of each.
        needs: Resources of each: ``CPU``, ``GPU``.
        patience: Seconds to wait for room and for an answer.

    Raises:
        UserError: there is no room, or a server does not start.
    """
    import ray

    class Actor:
        def start(self) -> str:
            self.server = ServerProcess(words, environment)
            return self.server.start(ray.util.get_node_ip_address(), patience)

        def stop(self) -> None:
            self.server.stop()

        def ready(self) -> bool:
            return True

    make: Any = ray.remote(num_cpus=needs["CPU"], num_gpus=needs["GPU"])(Actor)
    actors: list[Any] = [make.remote() for _ in range(count)]
    try:
        ray.get([actor.ready.remote() for actor in actors], timeout=patience)
    except ray.exceptions.GetTimeoutError:
        _end(actors)
        raise UserError(
            f"expected room for {count} rollout servers, each with {needs['CPU']:g} CPU and {needs['GPU']:g} GPU, got "
            f"none within {patience:g} s"
        ) from None
    try:
        return actors, ray.get([actor.start.remote() for actor in actors])
    except ray.exceptions.RayTaskError as error:
        _end(actors)
        cause = error.cause
        raise (UserError(str(cause)) if isinstance(cause, UserError) else error) from None
    except ray.exceptions.RayActorError as error:
        _end(actors)
        raise UserError(f"expected {count} rollout servers, got none: {first_line(error)}") from error


def stop_servers(actors: Sequence[Any]) -> None:
    """End the servers and their actors."""
    import ray

    with suppress(ray.exceptions.RayError):  # it is gone
        ray.get([actor.stop.remote() for actor in actors], timeout=30)
    _end(actors)


def _end(actors: Sequence[Any]) -> None:
    import ray

    for actor in actors:
        ray.kill(actor)
