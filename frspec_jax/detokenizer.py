"""Token ids to pieces of text as they come: joined, the pieces are what the tokenizer makes of all ids at once."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
UNFINISHED = "\ufffd"  # what a tokenizer shows of bytes that are no whole character (yet)
# Decoders whose text only grows as ids come, but for what `Detokenizer` holds back.
PENDING = 16  # ids after which a text that ends within a character is given out as far as it is certain
ENOUGH = 4  # of them must say something: no character has more bytes, and every id that speaks has one at least
KNOWN = {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    """What ids say, special tokens left out; spaces stand as the model wrote them, before a comma too."""
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Detokenizer:
    """The text of one answer, in pieces. Each piece costs a look at the last few ids, however long the answer is.

    `_anchor` need not be where a character begins: bytes from within one show themselves as replacement characters,
    and what follows is read as in the whole text, as soon as there are four bytes of it or a character has ended.

    Held back are bytes that may still become a character. A byte-fallback tokenizer (SentencePiece: Llama 2) makes
    replacement characters of a whole run of bytes if its last one is wrong, so there a run is held back until it ends.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoders, self._bytes, self._silent, self._known = _facts(tokenizer)
        self._ids: list[int] = []
        self._certain = 0  # ids up to the last one that ends a run of bytes
        self._shown = 0  # ids whose text is out, but perhaps for a last character that is not whole
        self._anchor = 0  # ids from here to `_shown` are decoded again with new ones: what leads a text is stripped
        self._anchor_text = ""  # their text

    def push(self, ids: Sequence[int]) -> str:
        """Take in further ids: the text that is certain by now and has not been given out."""
        for number in ids:
            self._ids.append(number)
            if not self._open(number):
                self._certain = len(self._ids)
        end = self._certain
        if end <= self._shown or not self._decoders <= KNOWN:
            return ""
        window = text_of(self._tokenizer, self._ids[self._anchor : end])
        # Where bytes are joined last of all (ByteLevel), further ones change no more than a last replacement character.
        cut = "ByteLevel" in self._decoders and window.endswith(UNFINISHED)
        if cut and not self._long(end):
            return ""
        window = window[:-1] if cut else window
        if not window.startswith(self._anchor_text):
            return ""
        piece = window[len(self._anchor_text) :]
        fresh = text_of(self._tokenizer, self._ids[self._shown : end])
        fresh = fresh[:-1] if cut else fresh
        # Only what says something can stand in for all that came before it: a leading space may be stripped from it.
        self._anchor, self._anchor_text = (self._shown, fresh) if fresh else (self._anchor, window)
        self._shown = end
        return piece

    def _long(self, end: int) -> bool:
        """Whether what is held back up to `end` has become long, and enough of it says something."""
        held = self._ids[self._shown : end]
        return len(held) >= PENDING and sum(not self._open(number) for number in held) >= ENOUGH

    def _open(self, number: int) -> bool:
        """Whether bytes before and after this id are one run: it is a byte itself, or nothing is said by it."""
        return number in self._bytes or number in self._silent or number not in self._known

    def finish(self) -> str:
        """The rest of the text, whatever its last bytes have become."""
        window = text_of(self._tokenizer, self._ids[self._anchor :])
        self._shown = len(self._ids)
        return window[len(self._anchor_text) :]


@functools.lru_cache(maxsize=8)
def _facts(tokenizer: Any) -> tuple[set[str], frozenset[int], frozenset[int], frozenset[int]]:
    """The kinds of decoders at work; the ids that are single bytes where bytes run together; special ids; all ids.

    A special token need not have a role (bos, eos) to be left out: whatever was added as one is. A model may have more
    ids than its tokenizer, where its embedding was padded; those beyond say nothing either.
    """
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
    kinds = {part["type"] for part in decoder_parts(decoder)}
    vocabulary = tokenizer.get_vocab()
    single = (n for token, n in vocabulary.items() if BYTE.fullmatch(token)) if "ByteFallback" in kinds else ()
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
    return kinds, frozenset(single), frozenset(special.union(tokenizer.all_special_ids)), frozenset(vocabulary.values())


def decoder_parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [part for one in decoder["decoders"] for part in decoder_parts(one)]
    return [decoder]
