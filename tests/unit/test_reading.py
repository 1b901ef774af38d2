"""Rows of files and data sets: what can be read, and what is said of what cannot."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from miepo.data.reading import read_rows
from miepo.errors import UserError

ROWS = [{"prompt": "a", "response": "", "n": 1}, {"prompt": "b\u2028c", "response": "d", "n": 0}]
FIELDS = {"prompt": str, "response": str}


def test_every_kind_of_source_gives_the_same_rows(tmp_path: Path) -> None:
    text = '{"prompt": "a", "response": "", "n": 1}\n\n{"prompt": "b\u2028c", "response": "d", "n": 0}'.encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(text))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    sources = [str(tmp_path / name) for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.parquet", "saved")]
    for source in [*sources, Dataset.from_list(ROWS)]:
        assert read_rows(source, FIELDS, blank=["response"]) == [{k: row[k] for k in FIELDS} for row in ROWS], source
        assert [row["n"] for row in read_rows(source, {"n": int})] == [1, 0]


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "response": ""}\n')
    with pytest.raises(UserError, match=r"a.jsonl, line 1: expected a response, got empty text"):
        read_rows(str(file), FIELDS)
    with pytest.raises(UserError, match=r"line 1: expected a JSON object with the field 'n', got prompt, response"):
        read_rows(str(file), {"n": int})
    with pytest.raises(UserError, match=r"line 1: expected int in 'prompt', got str"):
        read_rows(str(file), {"prompt": int})
    with pytest.raises(UserError, match=r"the data set: expected the columns 'prompt', 'response', got text"):
        read_rows(Dataset.from_dict({"text": ["x"]}), FIELDS)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.xz", "parquet"])
def test_a_truncated_download_is_named(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    rows = [{"prompt": f"how to grow {i}", "response": "water"} for i in range(2000)]
    text = "".join(f'{{"prompt": "{row["prompt"]}", "response": "water"}}\n' for row in rows).encode()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_bytes({"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress}[kind](text))
    whole = file.read_bytes()
    for part in (0.3, 0.7):
        file.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(UserError, match=rf"a\.{kind}.*(broken or truncated|not JSON)"):
            read_rows(str(file), FIELDS)
