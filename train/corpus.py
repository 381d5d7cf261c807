"""Reading corpora: plain text and conversations, in the usual file formats, plain or compressed.

Text: `.txt`, or records with "text". Conversations: records with "conversations" (ShareGPT's "from"
and "value") or "messages" ("role" and "content"). Records come in `.jsonl`, `.json` (one array) or
`.parquet`; every file may end in `.gz`, `.xz` or `.zst` besides.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from frspec_jax.errors import UserError

ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),  # all of them occur in ShareGPT
}
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


def read_corpus(path: Path) -> Iterator[Record]:
    """The records of one file, one at a time.

    Raises:
      UserError: naming the file, and the line where there is one, that cannot be read.
    """
    try:
        with _opened(path) as file:
            yield from _records(path, file)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read ({error}); mend or leave out the file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it first") from None


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".zst":
        import zstandard

        return zstandard.open(path, "rb")
    return open(path, "rb")


def _records(path: Path, file: IO[bytes]) -> Iterator[Record]:
    kind = _format(path)
    if kind == ".txt":
        text = io.TextIOWrapper(file, "utf-8")
        while lines := text.readlines(TEXT_BLOCK):
            yield Record(path.name, "".join(lines))
    elif kind == ".jsonl":
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _record(path, f"line {number}", _parsed(path, f"line {number}", line))
    elif kind == ".json":
        rows = _parsed(path, "", file.read())
        if not isinstance(rows, list):
            raise UserError(f"{path} is not a JSON array of records")
        for number, row in enumerate(rows, 1):
            yield _record(path, f"record {number}", row)
    else:
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()) if path.suffix != ".parquet" else path)
        except pyarrow.ArrowInvalid as error:
            raise UserError(f"{path} is no Parquet file ({error})") from None
        for batch in table.iter_batches(batch_size=512):
            for number, row in enumerate(batch.to_pylist(), 1):
                yield _record(path, f"row {number}", row)


def _parsed(path: Path, where: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}{', ' + where if where else ''}: not JSON ({error})") from None


def _record(path: Path, where: str, row: Any) -> Record:
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return Record(path.name, row["text"])
        for key, role, text in (("conversations", "from", "value"), ("messages", "role", "content")):
            if isinstance(row.get(key), list):
                turns = tuple((_role(path, where, t, role), str(t.get(text) or "")) for t in row[key])
                return Record(path.name, turns=turns)
    raise UserError(f'{path}, {where}: no "text", "conversations" or "messages" in the record')


def _role(path: Path, where: str, turn: Any, key: str) -> str:
    name = turn.get(key) if isinstance(turn, dict) else None
    if name not in ROLES:
        raise UserError(f"{path}, {where}: speaker {name!r} is not known; {', '.join(ROLES)} are")
    return ROLES[name]
