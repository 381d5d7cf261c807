"""Corpus files in every format and compression."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def write(folder: Path, rows: list, kind: str, compression: str = "", stem: str = "corpus") -> Path:
    """Write records (or, to .txt, their texts) as a corpus file."""
    if kind == ".txt":
        data = "".join(row["text"] for row in rows).encode()
    elif kind == ".jsonl":
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    elif kind == ".json":
        data = json.dumps(rows, ensure_ascii=False).encode()
    else:
        columns = dict.fromkeys(key for row in rows for key in row)  # which pyarrow takes from the first row alone
        table = pa.Table.from_pylist([{"number": n, **columns, **_plain(row)} for n, row in enumerate(rows)])
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        data = sink.getvalue().to_pybytes()
    path = folder / f"{stem}{kind}{compression}"
    path.write_bytes(COMPRESS[compression](data))
    return path


def _plain(row: dict) -> dict:
    """A record as a column of one kind can hold it: its id as text."""
    return {key: str(value) if key == "id" else value for key, value in row.items()}
