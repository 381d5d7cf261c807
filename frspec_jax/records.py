"""Records out of files, one reader for prompts, corpora and question sets alike.

Records come in `.jsonl` (one a line), `.json` (one array) or `.parquet` (one a row), and text in `.txt`; every file
may end in `.gz`, `.xz` or `.zst` besides. Text is UTF-8, with or without a byte order mark, its lines ended as on Unix
or on Windows. A `.json` array is read whole, and so is a compressed Parquet file; all others take little memory at any
size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from frspec_jax.errors import UserError, quoted

RECORDS = (".jsonl", ".json", ".parquet")
FORMATS = (".txt", *RECORDS)
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
TEXT_BLOCK = 1 << 16  # characters of a .txt block: long files are cut at the end of a line
# How files of other encodings begin, by their byte order marks.
WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
MEND = "mend or leave out the file"

Peeked = io.BufferedReader | gzip.GzipFile | lzma.LZMAFile
Told = Callable[[int], object]  # takes the bytes of a file, as it lies on disk, that have been read


@dataclasses.dataclass(frozen=True)
class Row:
    """A value out of a file, and where it stands there."""

    where: str  # "line 3", "record 3" or "row 3"
    number: int  # from 1
    value: Any


def kind_of(path: Path) -> str | None:
    """Which of `FORMATS` a file is by its name; None: none of them."""
    for compression in COMPRESSIONS:
        for kind in FORMATS:
            if path.name.endswith(kind + compression):
                return kind
    return None


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a Parquet file are read: of those that count there must be one."""

    counting: tuple[str, ...]
    beside: tuple[str, ...]
    forms: str  # how a refusal calls those that count


def read_rows(path: Path, what: str = "", read: Told | None = None, columns: Columns | None = None) -> Iterator[Row]:
    """The records of a file of one of the kinds `RECORDS`, one at a time.

    Args:
      what: the flag that named the file, for refusals ("--prompt-file"); none: the file alone.
      read: called before each record. columns: of a Parquet file; None: all.

    Raises:
      UserError: naming the file, and the line where there is one, that cannot be read.
    """
    name = named(path, what)
    with _opened(path, name) as (raw, file):
        for row in _rows(path, name, file, columns):
            if read:
                read(raw.tell())
            yield row


def read_blocks(path: Path, what: str = "", read: Told | None = None) -> Iterator[str]:
    """The text of a file in blocks of about `TEXT_BLOCK` characters, which end with a line; see `read_rows`."""
    name = named(path, what)
    with _opened(path, name) as (raw, file):
        text = io.TextIOWrapper(file, "utf-8-sig")
        while lines := text.readlines(TEXT_BLOCK):
            if read:
                read(raw.tell())
            yield "".join(lines)


def read_text(path: Path, what: str = "") -> str:
    r"""The whole text of a file of any name, without a byte order mark, lines ended by "\n" alone; see `read_rows`."""
    return "".join(read_blocks(path, what))


def named(path: Path, what: str) -> str:
    """A file as a sentence calls it: by its flag, if there is one."""
    return f"{what} {quoted(path)}" if what else quoted(path)


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[tuple[io.BufferedReader, Peeked]]:
    """A file as it lies there, and its bytes decompressed; what is wrong with it as one sentence."""
    try:
        with open(path, "rb") as raw:
            file = _decompressed(path, raw)
            start = file.peek(4)[:4]
            wide = next((kind for mark, kind in WIDE.items() if start.startswith(mark)), None)
            if wide is None and [bool(byte) for byte in start] in ([True, False] * 2, [False, True] * 2):
                wide = "UTF-16"  # without a mark: letters of ASCII have a zero beside them
            if wide:
                raise UserError(f"{name}, line 1: the file is {wide} text; save it as UTF-8")
            yield raw, file
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte 0x{error.object[error.start]:02x}); convert it first"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())
        raise UserError(f"{name} cannot be read ({reason}); {MEND}") from None


def _decompressed(path: Path, raw: io.BufferedReader) -> Peeked:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".xz":
        return lzma.LZMAFile(raw)
    if path.suffix == ".zst":
        import pyarrow

        # Unlike the zstandard package's reader, this one reads every frame and notices a file that is cut short.
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return raw


def _rows(path: Path, name: str, file: Peeked, columns: Columns | None) -> Iterator[Row]:
    kind = kind_of(path)
    if kind == ".jsonl":
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Row(f"line {number}", number, _parsed(line, f"{name}, line {number}"))
    elif kind == ".json":
        values = _parsed(file.read().removeprefix(b"\xef\xbb\xbf"), name)
        if not isinstance(values, list):
            raise UserError(f"{name} is not a JSON array of records; write one, or name a file of lines .jsonl")
        for number, value in enumerate(values, 1):
            yield Row(f"record {number}", number, value)
    elif kind == ".parquet":
        for number, value in enumerate(_parquet_rows(path, name, file, columns), 1):
            yield Row(f"row {number}", number, value)
    else:
        raise UserError(f"{name} holds no records by its name; {', '.join(RECORDS)} do")


def _parsed(text: bytes, name: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte 0x{text[error.start]:02x}); convert the file first") from None
    except (ValueError, RecursionError) as error:
        cut = not text.endswith(b"\n") and not text.rstrip().endswith((b"}", b"]"))
        reason = f"not JSON ({error})" + (", and the file ends in the middle of it" if cut else "")
        raise UserError(f"{name}: {reason}; {MEND}") from None


def _parquet_rows(path: Path, name: str, file: Peeked, columns: Columns | None) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file if path.suffix == ".parquet" else io.BytesIO(file.read()))
        there = list(table.schema_arrow.names)
        if columns:
            if not set(there) & set(columns.counting):
                raise UserError(f"{name} has no column {columns.forms}; rename the one that counts")
            there = [column for column in there if column in columns.counting + columns.beside]
        for batch in table.iter_batches(batch_size=64, columns=there):
            # A column of structs has every key in every row: what is null there was not given.
            yield from (_given(value) for value in batch.to_pylist())
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} is no Parquet file, or is damaged ({reason}); {MEND}") from None


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _given(one) for key, one in value.items() if one is not None}
    return [_given(one) for one in value] if isinstance(value, list) else value
