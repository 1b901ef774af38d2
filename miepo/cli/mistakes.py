"""Which errors are a mistake of the user, who gets one sentence and no traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from traceback import walk_tb

from miepo.errors import UserError, first_line


def user_error(error: BaseException | None) -> BaseException | None:
    """Return the user's mistake behind an exception: the parser wraps what a constructor raises in its own errors."""
    for cause in _causes(error):
        # Lightning's error by its name, since the import of its class alone takes seconds
        if isinstance(cause, UserError) or "MisconfigurationException" in (c.__name__ for c in type(cause).__mro__):
            return cause
    return None


def construction_error(error: BaseException) -> str:
    """Return what a constructor raised, which the parser may have wrapped in errors of its own."""
    for cause in reversed([*_causes(error)]):
        frames = [frame.f_code.co_filename for frame, _ in walk_tb(cause.__traceback__)]
        if frames and "jsonargparse" not in frames[-1]:
            return f"{type(cause).__name__}: {first_line(cause)}"
    return f"{type(error).__name__}: {first_line(error)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and, one after the other, those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def outer_mistake(error: BaseException) -> str | None:
    """Say what the user can mend of an error that the machine or a library gives a reason for."""
    if isinstance(error, OSError) and error.strerror:
        path = f", got '{error.filename}'" if error.filename else ""
        return f"expected paths that can be read and written{path}: {error.strerror}"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return (
            "the device's memory is spent: expected smaller batches (data.batch_size, data.evaluation_batch_size), "
            "shorter responses or a smaller policy.max_tokens_per_micro_batch; python -m tools.memory tells beforehand"
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
        return f"trainer.callbacks EarlyStopping: {first_line(error)}"
    return None
