"""Reads the file of an offline W&B run: a LevelDB log of protocol-buffer records behind a header of seven bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from struct import unpack
from typing import Any

HEADER, BLOCK = 7, 32768
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> Iterator[Any]:
    """All records, as W&B wrote them."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, parts = HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:  # what is left of a block is padding where no header fits
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = unpack("<IHB", data[place : place + HEADER])
        parts = (b"" if kind in (FULL, FIRST) else parts) + data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (FULL, LAST):
            yield Record.FromString(parts)
