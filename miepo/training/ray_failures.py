"""What Ray's controller of a run does when a worker fails: light, since it is imported where nothing trains."""

from __future__ import annotations

from typing import Any

from miepo.errors import UserError

ANOTHER = "another process ended: "  # how what ends one process reaches the others


def died(error: BaseException) -> bool:
    """Return whether a worker's process is gone, which Ray notices when it asks how the worker is."""
    return type(error).__name__.startswith("WorkerHealthCheck")


def ending_mistakes(allowed: int) -> Any:
    """Return Ray's callback that ends a run at a mistake, which another start would not mend.

    Its class is made here since its base is Ray's, which is not always installed.

    Args:
        allowed: How often the workers are started again; -1 for any number of times.
    """
    from ray.train import UserCallback

    class EndingMistakes(UserCallback):
        def __init__(self) -> None:
            self.count = 0

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            dead = [rank for rank, error in worker_exceptions.items() if died(error)]
            said = [str(error) for error in worker_exceptions.values() if isinstance(error, UserError)]
            if said and not dead:
                cause = next((text for text in said if not text.startswith(ANOTHER)), said[0])
                raise UserError(cause.removeprefix(ANOTHER))
            self.count += 1
            if allowed == -1 or self.count <= allowed:
                what = f"Worker {dead[0]} died" if dead else "A worker failed"
                print(f"{what}: all of them start again, from the last checkpoint that Ray knows", flush=True)

    return EndingMistakes()
