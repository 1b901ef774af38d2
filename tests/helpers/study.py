"""A study small enough for a test: a base model after a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tools.study import language


def prepare(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("train", 12), ("validation", 3)):
        rows = [json.dumps({"prompt": language.make_prompt(rng)}) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    language.train_base(folder / "base", 0, steps=5, batch_size=8)
