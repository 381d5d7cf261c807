"""The bytes of single tokens: what log-probabilities are shown beside, where a character is split over several."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any

from frspec_jax.detokenizer import BYTE, decoder_parts


class TokenBytes:
    """What each token id stands for, as bytes: joined, those of an answer are its text in UTF-8.

    first: of an answer's first token a decoder may strip the leading space (SentencePiece: Llama 2).
    """

    def __init__(self, tokenizer: Any) -> None:
        self._kinds, self._strips = _facts(tokenizer)
        self._names = _names(tokenizer)
        self._added = {n: token.content for n, token in tokenizer.added_tokens_decoder.items()}
        self._special = set(tokenizer.all_special_ids)
        self._special |= {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}

    def of(self, token: int, *, first: bool = False) -> bytes:
        """The bytes of one id; none where it says nothing in a text (a special token)."""
        return b"" if token in self._special else self.shown(token, first=first)

    def shown(self, token: int, *, first: bool = False) -> bytes:
        """The same, but a special token is its name: beside a text it can be likely without being in it."""
        if token in self._added:
            return self._added[token].encode()
        name = self._names.get(token)
        if name is None:  # an embedding that was padded has more ids than the tokenizer
            return b""
        if "ByteLevel" in self._kinds:
            table = byte_of_letter()
            return bytes(table[letter] for letter in name if letter in table)
        if "ByteFallback" in self._kinds and BYTE.fullmatch(name):
            return bytes([int(name[3:5], 16)])
        text = name.replace("▁", " ")
        return (text.removeprefix(" ") if first and self._strips else text).encode()

    def join(self, tokens: Sequence[int]) -> bytes:
        """The bytes of an answer."""
        return b"".join(self.of(token, first=n == 0) for n, token in enumerate(tokens))


@functools.cache
def byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: each byte as a letter that can be seen. Those that print stand for themselves."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(b): b for b in printing} | {chr(256 + n): b for n, b in enumerate(others)}


@functools.lru_cache(maxsize=8)
def _names(tokenizer: Any) -> dict[int, str]:
    return {n: name for name, n in tokenizer.get_vocab().items()}


@functools.lru_cache(maxsize=8)
def _facts(tokenizer: Any) -> tuple[frozenset[str], bool]:
    """The kinds of decoders at work, and whether a text loses the space that it begins with."""
    parts = decoder_parts(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    strips = any(part["type"] == "Strip" and part.get("start") for part in parts)
    leads = any(part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never" for part in parts)
    return frozenset(part["type"] for part in parts), strips or leads
