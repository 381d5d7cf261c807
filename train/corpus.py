"""Reading corpora: plain text and conversations, and what of them was left out.

Text: `.txt`, or records with "text". Conversations: records of the forms of `frspec_jax.prompts`. Files and their
compressions are those of `frspec_jax.records`. What a damaged file holds is not guessed at: reading stops. A record
that is whole but of no use (a speaker whom no template knows, an answer that lies behind the cut) is passed over, and
every command that reads a corpus says in the end how many of them there were, and why.
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from frspec_jax import prompts, records
from frspec_jax.errors import UserError, quoted
from frspec_jax.prompts import NoPrompt, UnknownSpeaker
from frspec_jax.records import COMPRESSIONS, FORMATS

NO_EMBEDDING = "they hold tokens that the model has no embedding for, such as {!r}"  # a reason to leave records out


@dataclasses.dataclass(frozen=True)
class Record:
    """One document: text, or the turns of a conversation."""

    source: str  # the file's name
    text: str | None = None
    turns: tuple[tuple[str, str], ...] = ()  # (role, text)
    extras: tuple[Mapping[str, Any], ...] = ()  # what else stands in each turn, for the chat template; none: nothing
    tools: list[Any] | None = None  # that the model may call, for the chat template
    where: str = ""  # its place in the file

    def parts(self, roles: Iterable[str]) -> list[str]:
        """The text, or what the speakers of `roles` say."""
        return [self.text] if self.text is not None else [text for role, text in self.turns if role in roles]

    def messages(self) -> list[dict[str, Any]]:
        """The turns as a chat template takes them."""
        extras = self.extras or ({},) * len(self.turns)
        return [
            {**extra, "role": role, "content": text} for (role, text), extra in zip(self.turns, extras, strict=True)
        ]


class Tally:
    """How many records of some corpora were read, and which were left out or mended, and why."""

    def __init__(self) -> None:
        self.read = 0
        self.left_out: collections.Counter[str] = collections.Counter()
        self.mended: collections.Counter[str] = collections.Counter()
        self._first: dict[str, str] = {}  # where each reason was met first

    def leave_out(self, reason: str, where: str, count: int = 1) -> None:
        """Count a record, or `count`, that nothing is made of."""
        self._note(self.left_out, reason, where, count)

    def mend(self, how: str, where: str) -> None:
        """Count a record that was used in another form than it came in."""
        self._note(self.mended, how, where, 1)

    def _note(self, counter: collections.Counter[str], reason: str, where: str, count: int) -> None:
        if count:
            counter[reason] += count
            self._first.setdefault(reason, where)

    def said(self) -> str:
        """One sentence, always the same way: records read, and of each reason how many, the first one named."""
        parts = [f"read {_records(self.read)}"]
        for verb, counter in (("left out", self.left_out), ("mended", self.mended)):
            for reason, count in counter.most_common():
                parts.append(f"{verb} {count:,}: {reason} (first: {self._first[reason]})")
        return "; ".join(parts if len(parts) > 1 else [*parts, "none left out"])

    def tell(self) -> None:
        """Say it on standard error; nothing where no corpus was read (a store holds what was kept already)."""
        if self.read or self.left_out:
            print(self.said(), file=sys.stderr)


def _records(count: int) -> str:
    return "1 record" if count == 1 else f"{count:,} records"


def corpus_files(paths: Iterable[Path]) -> list[Path]:
    """The files named, and all files of a known kind in the folders named, in a fixed order.

    Raises:
      UserError: a path that is missing, a file of an unknown kind, or a folder without corpora.
    """
    files: list[Path] = []
    compressed = ", ".join(COMPRESSIONS[1:])
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file() and records.kind_of(p))
            if not found:
                raise UserError(f"{quoted(path)} holds no corpus ({', '.join(FORMATS)}, plain or {compressed})")
            files += found
        elif not path.is_file():
            raise UserError(f"{quoted(path)} is no file or folder; name a corpus")
        elif not records.kind_of(path):
            raise UserError(
                f"{quoted(path)}: unknown kind of file; {', '.join(FORMATS)} can be read, plain or {compressed}"
            )
        else:
            files.append(path)
    return files


def read_corpus(
    path: Path, read: Callable[[int], object] | None = None, tally: Tally | None = None
) -> Iterator[Record]:
    """The records of one file, one at a time.

    Args:
      read: called before each record with the bytes of the file, as it lies on disk, that have been read.
      tally: counts the records, and those that are left out here.

    Raises:
      UserError: naming the file, and the line where there is one, that cannot be read.
    """
    tally = Tally() if tally is None else tally
    if records.kind_of(path) == ".txt":
        for number, text in enumerate(records.read_blocks(path, read=read), 1):
            tally.read += 1
            yield Record(path.name, text, where=f"{path.name}, block {number}")
        return
    for row in prompts.read_records(path, read=read, also=("text",)):
        tally.read += 1
        try:
            yield _record(path.name, f"{path.name}, {row.where}", row.value)
        except UnknownSpeaker as error:
            tally.leave_out(str(error).split(";")[0], f"{path.name}, {row.where}")
        except NoPrompt as error:
            raise UserError(f"{quoted(path)}, {row.where}: {error}") from None


def _record(source: str, where: str, row: Any) -> Record:
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return Record(source, prompts.clean(row["text"]), where=where)
    found = prompts.messages_of(row)
    if found is None:
        raise NoPrompt(f'no "text", {prompts.FORMS} in the record; add one')
    turns = tuple((message["role"], message["content"]) for message in found)
    extras = tuple({k: v for k, v in message.items() if k not in ("role", "content")} for message in found)
    return Record(source, None, turns, extras if any(extras) else (), prompts.tools_of(row), where)
