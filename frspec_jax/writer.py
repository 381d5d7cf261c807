"""Tokens of one answer, as they come, to pieces of text: what is certain, and ends before a stop text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from frspec_jax.detokenizer import Detokenizer


@dataclasses.dataclass(frozen=True)
class Said:
    """One token whose text is out."""

    id: int
    origin: int  # state.OWN, DRAFTED or COPIED
    text: str  # what it added; "" where its bytes wait for the next token to be a character
    likely: Any = None  # its log-probabilities (batch.Likely), where they were asked for


class Writer:
    """Detokenizes, and looks for stop texts; a text is held back only as long as it may turn out to begin one.

    Tokens are taken in one by one, so that each has a text of its own and an answer ends at the very token that
    completes a stop text, whatever came in the same block. Only what was generated is searched.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), stop_ids: Iterable[int] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop, self._stop_ids = tuple(stop), frozenset(stop_ids)
        self._held: list[Said] = []  # said, but may be the beginning of a stop text, or of a character
        self.taken = 0  # tokens so far, those held back and the one that ended it included
        self.stopped = False  # whether a stop text is complete
        self.text = ""  # that `more` has given out
        self._last = Said(-1, 0, "")  # given out

    def push(self, token: int, origin: int, likely: Any = None) -> list[Said]:
        """Take in one token: the tokens whose text is certain now."""
        assert not self.stopped, "a text that has ended takes no more"
        self.taken += 1
        self._held.append(Said(token, origin, self._detokenizer.push([token]), likely))
        return self._release()

    def more(self, tokens: Iterable[int], *, ended: bool) -> list[Said]:
        """Take in what has come, up to a stop text; ended: it was the last."""
        said: list[Said] = []
        for token in tokens:
            if not self.stopped:
                said += self.push(token, 0)
        said += self.finish() if ended else []
        self.text += "".join(one.text for one in said)
        return said

    def finish(self) -> list[Said]:
        """The rest, once no more tokens come."""
        if self.stopped:
            return []
        if rest := self._detokenizer.finish():  # bytes that became no whole character
            index = next((n for n in reversed(range(len(self._held))) if self._held[n].id not in self._stop_ids), None)
            if index is None:  # of a token that is out already, whose last bytes were not
                self._held.insert(0, Said(self._last.id, self._last.origin, rest))
            else:
                last = self._held[index]
                self._held[index] = dataclasses.replace(last, text=last.text + rest)
        out = self._release()
        return out if self.stopped else out + self._flush()

    def _flush(self) -> list[Said]:
        out, self._held = self._held, []
        return out

    def _release(self) -> list[Said]:
        """Cut before a stop text that is complete; else give out what can no longer be the beginning of one."""
        text = "".join(said.text for said in self._held)
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:  # the first to be complete, and of those that end together the longest
            self.stopped = True
            return self._cut(min(found)[1])
        safe = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        out = []
        # A token without text waits for the one that makes a character of its bytes.
        last_with_text = max((n for n, said in enumerate(self._held) if said.text), default=-1)
        end = 0
        for n, said in enumerate(self._held):
            end += len(said.text)
            if end > safe or n > last_with_text:
                break
            out.append(said)
        # Tokens without text go out with the one that has it, never before.
        while out and not out[-1].text:
            out.pop()
        del self._held[: len(out)]
        self._last = out[-1] if out else self._last
        return out

    def _cut(self, end: int) -> list[Said]:
        """The held tokens up to `end` characters; the one across it keeps what stands before."""
        out = []
        for said in self._held:
            if end <= 0:
                break
            out.append(dataclasses.replace(said, text=said.text[:end]))
            end -= len(said.text)
        while out and not out[-1].text:
            out.pop()
        self._held = []
        return out


def _overlap(text: str, stop: str) -> int:
    """Characters at the text's end that begin the stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
