"""Small data in the real schemas of the two public data sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

WORDS = [
    "plant",
    "tree",
    "rain",
    "soil",
    "garden",
    "water",
    "seed",
    "good",
    "bad",
    "people",
    "food",
    "like",
    "grow",
    "place",
    "spring",
    "help",
    "make",
    "tell",
    "how",
    "why",
]


def sentence(rng: np.random.Generator, low: int = 4, high: int = 12) -> str:
    return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=rng.integers(low, high)))


def safe_rlhf_rows(count: int, seed: int = 0) -> list[dict]:
    """As ``PKU-Alignment/PKU-SafeRLHF-10K`` writes them."""
    rng = np.random.default_rng([1, seed])
    return [
        {
            "prompt": f"{sentence(rng)} {i}?", "response_0": f"{sentence(rng)}.", "response_1": f"{sentence(rng)}.",
            "is_response_0_safe": bool(rng.integers(2)), "is_response_1_safe": bool(rng.integers(2)),
            "better_response_id": int(rng.integers(2)), "safer_response_id": int(rng.integers(2)),
        }
        for i in range(count)
    ]  # fmt: skip


def hh_rlhf_rows(count: int, seed: int = 0) -> list[dict]:
    """As ``Anthropic/hh-rlhf`` writes them: dialogues of one to three turns."""
    rng = np.random.default_rng([2, seed])
    rows = []
    for i in range(count):
        turns = "".join(
            f"\n\nHuman: {sentence(rng)}?\n\nAssistant: {sentence(rng)}." for _ in range(rng.integers(0, 3))
        )
        head = f"{turns}\n\nHuman: {sentence(rng)} {i}?\n\nAssistant:"
        rows.append({"chosen": f"{head} {sentence(rng)}.", "rejected": f"{head} {sentence(rng)}."})
    return rows


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
