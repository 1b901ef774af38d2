"""Which errors are a mistake of the user, who gets one sentence and no traceback."""

from __future__ import annotations

import sys

from miepo.errors import UserError, first_line


def user_error(error: BaseException | None) -> BaseException | None:
    """Return the user's mistake behind an exception: the parser wraps what a constructor raises in its own errors."""
    # Lightning's error by its name, since the import of its class alone takes seconds
    while error is not None and not (
        isinstance(error, UserError) or "MisconfigurationException" in (c.__name__ for c in type(error).__mro__)
    ):
        error = error.__cause__ or error.__context__
    return error


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
