"""Commands in processes that are forked from one that has imported everything, which saves each of them ten seconds."""

from __future__ import annotations

import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tools.architectures import at_most

get_context("forkserver").set_forkserver_preload(["miepo.cli", "tools.study.record", "tests.helpers.interruption"])


def module(name: str, *arguments: str) -> None:
    """Runs ``python -m NAME ARGUMENTS`` in this process."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Leaves the handlers of signals, which the launcher sets, as they were."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def torchrun(*command: str) -> tuple[int, str, float]:
    """Runs ``torchrun --standalone --nproc_per_node=2 -m COMMAND``: exit status, what was printed, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
            start_method="forkserver", logs_specs=DefaultLogsSpecs(folder, redirects=Std.ALL), run_id=Path(folder).name,
        )  # fmt: skip
        start, status = time.monotonic(), 0
        try:
            with handlers_kept(), at_most(120):
                elastic_launch(config, module)(*command)
        except ChildFailedError as error:
            status = error.get_first_failure()[1].exitcode
        seconds = time.monotonic() - start
        return status, "".join(p.read_text() for p in sorted(Path(folder).rglob("*.log"))), seconds
