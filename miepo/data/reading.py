"""Rows of a file or data set, read and checked before anything else is spent: JSONL, Parquet, folders, hub ids."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from miepo.errors import UserError, first_line, needs
from miepo.resources import is_file, is_packaged, locate
from miepo.text import check_text

NAMES: dict[type, str] = {str: "text", list: "a list"}
OPENERS = {".gz": gzip.open, ".xz": lzma.open}
Located = Iterable[tuple[str, Any]]  # where a row stands, and the row


def read_rows(
    source: Any,
    fields: Mapping[str, type | tuple[type, ...]],
    splits: Sequence[str] = ("train",),
    blank: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return rows with the wanted fields, checked one by one.

    Args:
        source: A ``.jsonl`` file, or JSON with one array, also compressed (``.gz``, ``.xz``), or a ``.parquet`` file,
            each a path or ``package:``/``pypi:`` (see :mod:`miepo.resources`); a folder written by
            ``datasets.save_to_disk``, or of data files; a hub id; a data set object.
        fields: Wanted fields with the type of their values.
        splits: Of a data set that has several, the first of these that it has.
        blank: Fields whose text may be empty.

    Raises:
        UserError: names the source, and for a file the line, that cannot be used.
    """
    if not isinstance(source, str):
        return _checked(_of_dataset(source, fields, "the data set"), fields, blank, "the data set")
    path = locate(source)
    kinds = {suffix for suffix in path.suffixes if suffix not in OPENERS}
    if path.suffix == ".parquet":
        return _checked(_of_parquet(path, fields), fields, blank, str(path))
    if is_packaged(source) or kinds & {".jsonl", ".json"}:
        return _checked(_of_jsonl(path), fields, blank, str(path))
    if path.suffix in {".txt", ".csv", ".tsv", *OPENERS}:
        what = "a file of another kind" if is_file(path) else "no file"
        raise UserError(f"expected a .jsonl or .parquet file, got {what} at '{path}'")
    return _checked(_of_dataset(_load_dataset(source, path, splits), fields, source), fields, blank, source)


def _of_jsonl(path: Path) -> Located:
    if not is_file(path):
        raise UserError(f"expected a file at '{path}': there is none")
    lines = iter(enumerate(_lines(path), 1))
    first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    if first[1].lstrip().startswith("["):  # one array of all rows
        rows = _json("".join([first[1], *(line for _, line in lines)]), str(path))
        yield from ((f"{path}, row {i}", _object(row, f"{path}, row {i}")) for i, row in enumerate(rows, 1))
        return
    for number, line in chain([first], lines):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(_json(line, where), where)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected a JSON object, got text that is not JSON ({error})") from None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def _lines(path: Path) -> list[str]:
    # split at line feeds alone: other characters that end a line for str.splitlines may stand in a JSON text
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:  # type: ignore[operator]
            return list(file)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, got a byte that is not, at position {error.start}") from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path}: expected a whole compressed file, got a broken or truncated one: {error}") from None


def _of_parquet(path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> Located:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise needs("datasets", f"the Parquet file '{path.name}'") from None
    if not is_file(path):
        raise UserError(f"expected a file at '{path}': there is none")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(file.schema_arrow.names, fields, str(path))
        rows = file.read(columns=list(fields)).to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = first_line(error)
        raise UserError(f"{path}: expected a whole Parquet file, got a broken or truncated one: {reason}") from None
    return ((f"{path}, row {i}", row) for i, row in enumerate(rows))


def _load_dataset(source: str, path: Path, splits: Sequence[str]) -> Any:
    try:
        import datasets
    except ImportError:
        raise needs("datasets", f"the data set '{source}'") from None
    saved = any(is_file(path / name) for name in ("dataset_dict.json", "state.json"))
    try:
        found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(source)
    except Exception as error:  # the library raises many kinds, all of them about this source
        reason = first_line(error)
        raise UserError(
            f"expected a .jsonl or .parquet file, a data set folder or a hub id, got '{source}': {reason}"
        ) from None
    if not isinstance(found, Mapping):
        return found
    if (split := next((name for name in splits if name in found), None)) is None:
        raise UserError(f"'{source}': expected a data set with the split {' or '.join(splits)}, got {', '.join(found)}")
    return found[split]


def _of_dataset(rows: Any, fields: Mapping[str, type | tuple[type, ...]], name: str) -> Located:
    _check_columns(rows.column_names, fields, name)
    return ((f"{name}, row {i}", row) for i, row in enumerate(rows.select_columns(list(fields))))


def _check_columns(columns: Collection[str], fields: Mapping[str, type | tuple[type, ...]], name: str) -> None:
    if missing := [field for field in fields if field not in columns]:
        wanted = "a column" if len(missing) == 1 else "the columns"
        raise UserError(f"{name}: expected {wanted} {', '.join(map(repr, missing))}, got {', '.join(columns)}")


def _checked(
    rows: Located, fields: Mapping[str, type | tuple[type, ...]], blank: Collection[str], name: str
) -> list[dict[str, Any]]:
    result = []
    for where, row in rows:
        for field, kind in fields.items():
            if field not in row:
                raise UserError(
                    f"{where}: expected a JSON object with the field '{field}', got {', '.join(row) or 'no field'}"
                )
            value = row[field]
            if not isinstance(value, kind):
                kinds = kind if isinstance(kind, tuple) else (kind,)
                expected = " or ".join(NAMES.get(k, k.__name__) for k in kinds)
                raise UserError(f"{where}: expected {expected} in '{field}', got {type(value).__name__}")
            if isinstance(value, str):
                check_text(value, where, field, blank_ok=field in blank)
        result.append({field: row[field] for field in fields})
    if not result:
        raise UserError(f"{name}: expected at least one row, got none")
    return result
