"""What other libraries say that nobody asked for."""

from __future__ import annotations

import logging
import warnings


def quiet() -> None:
    """Keep other libraries' deprecations, advertisements and bars of converters out of the output."""
    from transformers.utils import logging as transformers_logging

    for message in (
        ".*does not have many workers.*",  # prompts are in memory
        ".*infer the batch indices.*",  # whole batches; no one asks which rows
        ".*args parameter is intended to run from within Python.*",  # names of configurations were replaced by paths
        ".*`is_gradient_checkpointing` is deprecated.*",  # peft
        ".*LeafSpec.*",  # lightning
    ):
        warnings.filterwarnings("ignore", message=message)
    transformers_logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # each request to a rollout server
    lightning_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    if not any(isinstance(f, _Unasked) for f in lightning_log.filters):
        lightning_log.addFilter(_Unasked())


class _Unasked(logging.Filter):
    """Drops what Lightning says of products and of devices that nobody asked for."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "litlogger" not in record.getMessage() and not record.getMessage().startswith("TPU available")
