"""PKU-SafeRLHF: the data of the task safe alignment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miepo.data.datasets.base import Comparison, PreferenceDataset

# the prompt of PKU-Alignment's models; the preference text brings its own leading space
TEMPLATE = "BEGINNING OF CONVERSATION: USER: {prompt}{preference} ASSISTANT:{response}"


class SafeRLHF(PreferenceDataset):
    """``PKU-Alignment/PKU-SafeRLHF-10K`` (the paper: 8K prompts to train on, 2K to evaluate on).

    The hub's data set has a train split alone, so the test prompts are split off it.

    Args:
        source: Hub id, file or folder.
        train: See :class:`~miepo.data.datasets.base.PreferenceDataset`.
        test: See there.
        test_source: See there.
        seed: See there.
        preferred_by: ``better`` takes the more helpful response of a pair for the preferred one, ``safer`` the more
            harmless one.
    """

    blank = ("response_0", "response_1")

    def __init__(
        self, source: Any = "PKU-Alignment/PKU-SafeRLHF-10K", train: int = 8000, test: int = 2000,
        test_source: Any = None, seed: int = 0, preferred_by: str = "better",
    ) -> None:  # fmt: skip
        super().__init__(source, train, test, test_source, seed)
        self.column = f"{preferred_by}_response_id"
        self.fields = {"prompt": str, "response_0": str, "response_1": str, self.column: int}

    def read(self, row: Mapping[str, Any]) -> Comparison | str:
        if row[self.column] not in (0, 1):
            return f"{self.column} is neither 0 nor 1"
        return Comparison(row["prompt"], (row["response_0"], row["response_1"]), row[self.column])
