"""Prompts: read from JSONL, a list or a Hugging Face data set, checked, and dealt out epoch by epoch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from miepo.errors import UserError, needs
from miepo.preferences import Stream, generator
from miepo.resources import is_packaged, locate
from miepo.types import PromptBatch


def load_prompts(source: Any, field: str = "prompt", split: str = "train") -> list[str]:
    """Prompts from any supported source, checked.

    Args:
        source: A list of strings; a ``.jsonl`` file with ``field`` in every line (a path, or ``package:``/``pypi:``,
            see :mod:`miepo.resources`); a folder written by ``datasets.save_to_disk``; a hub id; a data set object.
        field: Name of the column that holds the prompt.
        split: Split of a hub data set.

    Raises:
        UserError: names the source, and for a file the line, that cannot be used.
    """
    if isinstance(source, str):
        path = locate(source)
        if is_packaged(source) or path.suffix in {".jsonl", ".json"}:
            return [prompt for _, prompt in _read_jsonl(path, field)]
        if path.suffix in {".txt", ".csv", ".tsv", ".parquet"}:
            what = "a file of another kind" if path.is_file() else "no file"
            raise UserError(f"expected a .jsonl file of prompts, got {what} at '{path}'")
        return _from_rows(_load_dataset(source, path, split), field, source)
    if isinstance(source, (list, tuple)):
        return _checked(((f"prompt {i}", row) for i, row in enumerate(source)), "the list of prompts")
    if hasattr(source, "column_names"):
        return _from_rows(source, field, "the data set")
    raise UserError(f"prompts must be a list, a .jsonl file or a data set, got {type(source).__name__}")


def read_rows(source: str, *fields: str) -> list[dict[str, str]]:
    """Rows of a JSONL file that hold all ``fields`` as text, for files of more than prompts."""
    path = locate(source)
    columns = [[value for _, value in _read_jsonl(path, field)] for field in fields]
    return [dict(zip(fields, values, strict=True)) for values in zip(*columns, strict=True)]


def _read_jsonl(path: Path, field: str) -> list[tuple[str, str]]:
    if not path.is_file():
        raise UserError(f"expected a file of prompts at '{path}': there is none")
    rows: list[tuple[str, str]] = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, got a byte that is not, at position {error.start}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: expected a JSON object, got text that is not JSON ({error})") from None
        if not isinstance(row, dict) or field not in row:
            keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{where}: expected a JSON object with the field '{field}', got {keys or 'no field'}")
        rows.append((where, row[field]))
    texts = _checked(rows, str(path), blank_ok=field == "response")
    return [(where, text) for (where, _), text in zip(rows, texts, strict=True)]


def _load_dataset(source: str, path: Path, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise needs("datasets", f"the prompt source '{source}'") from None
    try:
        if path.is_dir() and not (path / "dataset_dict.json").exists() and (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        if (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(path))[split]
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises many kinds, all of them about this source
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"expected a .jsonl file, a data set folder or a hub id as prompts, got '{source}': {reason[0]}"
        ) from None


def _from_rows(rows: Any, field: str, name: str) -> list[str]:
    if field not in rows.column_names:
        raise UserError(f"{name}: expected a column '{field}', got {', '.join(rows.column_names)}")
    return _checked(((f"{name}, row {i}", value) for i, value in enumerate(rows[field])), name)


def _checked(rows: Iterable[tuple[str, Any]], name: str, blank_ok: bool = False) -> list[str]:
    prompts = []
    for where, value in rows:
        if not isinstance(value, str):
            raise UserError(f"{where}: expected text, got {type(value).__name__}")
        if not value.strip() and not blank_ok:
            raise UserError(f"{where}: expected a prompt, got empty text")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise UserError(f"{where}: expected Unicode text, got half a character (a lone surrogate)")
        prompts.append(value)
    if not prompts:
        raise UserError(f"{name}: expected at least one prompt, got none")
    return prompts


def split_prompts(prompts: Sequence[str], validation_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """A seeded split into training and validation prompts; both parts keep at least one prompt."""
    if len(prompts) < 2:
        raise UserError(f"a split into training and validation needs at least 2 prompts, got {len(prompts)}")
    order = generator(Stream.SPLIT, seed).permutation(len(prompts))
    held_out = min(max(round(validation_fraction * len(prompts)), 1), len(prompts) - 1)
    return [prompts[i] for i in sorted(order[held_out:])], [prompts[i] for i in sorted(order[:held_out])]


class OnlinePrompts(Dataset):
    """Training prompts; item ``i`` is the ``i``-th prompt of the current epoch's shuffle.

    The shuffle is a function of (seed, epoch) and the position travels with the prompt, so it does not matter who
    reads which item.
    """

    def __init__(self, prompts: Sequence[str], seed: int, epoch: Callable[[], int]) -> None:
        self.prompts, self.seed, self.epoch = prompts, seed, epoch
        self._order: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, position: int) -> tuple[str, int, int]:
        epoch = self.epoch()
        return self.at(epoch, position), epoch, position

    def at(self, epoch: int, position: int) -> str:
        """The prompt at ``position`` of the shuffle of ``epoch``."""
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, generator(Stream.SHUFFLE, self.seed, epoch).permutation(len(self.prompts)))
        return self.prompts[self._order[1][position]]

    @staticmethod
    def collate(rows: Sequence[tuple[str, int, int]]) -> PromptBatch:
        prompts, epochs, positions = zip(*rows, strict=True)
        return PromptBatch(prompts, epochs, positions)


class GridPrompts(Dataset):
    """Every (prompt, preference vector) pair, prompt by prompt, for evaluation and prediction."""

    def __init__(self, prompts: Sequence[str], grid: Tensor) -> None:
        self.prompts, self.grid = prompts, grid  # (M, K)

    def __len__(self) -> int:
        return len(self.prompts) * len(self.grid)

    def __getitem__(self, index: int) -> tuple[str, int, int]:
        position, grid_index = divmod(index, len(self.grid))
        return self.prompts[position], position, grid_index

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        return (self[i] for i in range(len(self)))

    def collate(self, rows: Sequence[tuple[str, int, int]]) -> PromptBatch:
        prompts, positions, indices = zip(*rows, strict=True)
        index = torch.tensor(indices)
        return PromptBatch(prompts, [0] * len(rows), positions, index, self.grid[index])
