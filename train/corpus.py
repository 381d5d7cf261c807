"""Reading corpora: plain text and conversations, in the usual file formats, plain or compressed.

Text: `.txt`, or records with "text". Conversations: records of the forms of `frspec_jax.prompts`. Records come in
`.jsonl`, `.json` (one array) or `.parquet`; every file may end in `.gz`, `.xz` or `.zst` besides. A `.json` array is
read whole, and so is a compressed Parquet file; all others take little memory at any size.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from frspec_jax import prompts
from frspec_jax.errors import UserError
from frspec_jax.prompts import NoPrompt

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = ("", ".gz", ".xz", ".zst")
TEXT_BLOCK = 1 << 16  # characters of a .txt record: long files are cut at the end of a line


@dataclasses.dataclass(frozen=True)
class Record:
    """One document: text, or the turns of a conversation."""

    source: str  # the file's name
    text: str | None = None
    turns: tuple[tuple[str, str], ...] = ()  # (role, text); role is system, user or assistant

    def parts(self, roles: Iterable[str]) -> list[str]:
        """The text, or what the speakers of `roles` say."""
        return [self.text] if self.text is not None else [text for role, text in self.turns if role in roles]


def corpus_files(paths: Iterable[Path]) -> list[Path]:
    """The files named, and all files of a known kind in the folders named, in a fixed order.

    Raises:
      UserError: a path that is missing, a file of an unknown kind, or a folder without corpora.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and _format(p))
            if not found:
                raise UserError(
                    f"{path} holds no corpus ({', '.join(FORMATS)}, plain or {', '.join(COMPRESSIONS[1:])})"
                )
            files += found
        elif not path.is_file():
            raise UserError(f"{path} is no file or folder; name a corpus")
        elif not _format(path):
            raise UserError(
                f"{path}: unknown kind of file; {', '.join(FORMATS)} can be read, "
                f"plain or {', '.join(COMPRESSIONS[1:])}"
            )
        else:
            files.append(path)
    return files


def _format(path: Path) -> str | None:
    for compression in COMPRESSIONS:
        for kind in FORMATS:
            if path.name.endswith(kind + compression):
                return kind
    return None


def read_corpus(path: Path, read: Callable[[int], object] | None = None) -> Iterator[Record]:
    """The records of one file, one at a time.

    read: called before each record with the bytes of the file, as it lies on disk, that have been read.

    Raises:
      UserError: naming the file, and the line where there is one, that cannot be read.
    """
    try:
        with open(path, "rb") as raw:
            for record in _records(path, _decompressed(path, raw)):
                if read:
                    read(raw.tell())
                yield record
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}); mend or leave out the file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it first") from None


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    if path.suffix == ".xz":
        return lzma.open(raw, "rb")
    if path.suffix == ".zst":
        import pyarrow

        # Unlike the zstandard package's reader, this one reads every frame and notices a file that is cut short.
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    return raw


def _records(path: Path, file: IO[bytes]) -> Iterator[Record]:
    kind = _format(path)
    if kind == ".txt":
        text = io.TextIOWrapper(file, "utf-8-sig")
        while lines := text.readlines(TEXT_BLOCK):
            yield Record(path.name, "".join(lines))
    elif kind == ".jsonl":
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _record(path, f"line {number}", _parsed(path, f"line {number}", line))
    elif kind == ".json":
        rows = _parsed(path, "", file.read())
        if not isinstance(rows, list):
            raise UserError(f"{path} is not a JSON array of records; write one, or name a file of lines .jsonl")
        for number, row in enumerate(rows, 1):
            yield _record(path, f"record {number}", row)
    else:
        for number, row in enumerate(_parquet_rows(path, file), 1):
            yield _record(path, f"row {number}", row)


def _parquet_rows(path: Path, file: IO[bytes]) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file if path.suffix == ".parquet" else io.BytesIO(file.read()))
        columns = [name for name in table.schema_arrow.names if name in ("text", *prompts.KEYS)]
        if not columns:
            raise UserError(f'{path} has no column "text", {prompts.FORMS}; rename the one that counts')
        for batch in table.iter_batches(batch_size=64, columns=columns):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no Parquet file, or is damaged ({reason}); mend or leave out the file") from None


def _parsed(path: Path, where: str, text: bytes) -> Any:
    try:
        return prompts.parsed(text)
    except NoPrompt as error:
        raise UserError(f"{path}{', ' + where if where else ''}: {error}; mend or leave out the file") from None


def _record(path: Path, where: str, row: Any) -> Record:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return Record(path.name, prompts.clean(row["text"]))
    try:
        turns = prompts.turns_of(row)
    except NoPrompt as error:
        raise UserError(f"{path}, {where}: {error}") from None
    if turns is None:
        raise UserError(f'{path}, {where}: no "text", {prompts.FORMS} in the record; add one')
    return Record(path.name, turns=tuple(turns))
