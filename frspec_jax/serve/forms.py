"""Answers in OpenAI's two forms: chats, and the older completions."""

from __future__ import annotations

import abc
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from frspec_jax.scheduler import Piece
from frspec_jax.tickets import Figures
from frspec_jax.token_bytes import TokenBytes
from frspec_jax.writer import Said

ORIGINS = ("own", "drafted", "copied")  # state.OWN, DRAFTED, COPIED
LEAST = -9999.0  # OpenAI's word for minus infinity, which JSON has none for


@dataclasses.dataclass
class Whole:
    """One choice, collected."""

    said: list[Said] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    figures: Figures | None = None

    def add(self, piece: Piece) -> None:
        self.said += piece.said
        self.finish_reason, self.figures = piece.finish_reason, piece.figures

    @property
    def text(self) -> str:
        return "".join(said.text for said in self.said)


def usage(prompts: Sequence[int], completion: int) -> dict[str, int]:
    """Tokens of each prompt, counted once however many choices it has, and of all answers."""
    return {
        "prompt_tokens": sum(prompts),
        "completion_tokens": completion,
        "total_tokens": sum(prompts) + completion,
    }


def shown_figures(figures: Figures) -> dict[str, Any]:
    """How an answer came about so far, for the page."""
    return {
        "completion_tokens": figures.completion_tokens,
        "rounds": figures.rounds,
        "accepted_length": figures.accepted_length and round(figures.accepted_length, 3),
        "tokens_per_second": figures.rate and round(figures.rate, 2),
        "first_token_seconds": round(figures.first, 4),
    }


def finite(logprob: float) -> float:
    return max(logprob, LEAST) if math.isfinite(logprob) else LEAST


class Form(abc.ABC):
    """What one request's answers look like, whole or in chunks."""

    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(
        self, name: str, key: str, tokens: TokenBytes, *, origins: bool = False, usage_asked: bool = False
    ) -> None:
        """name: the model's, as it is served. key: of this request; origins: say how each token came.

        usage_asked: a stream ends with the usage.
        """
        self.id, self.created, self.model = f"{self.prefix}-{key}", int(time.time()), name
        self.tokens, self.origins, self.usage_asked = tokens, origins, usage_asked

    def whole(self, choices: Sequence[Whole], used: dict[str, int]) -> dict[str, Any]:
        """The reply of a request that does not stream."""
        return {
            **self._head(self.whole_object),
            "choices": [self._choice(n, choice) for n, choice in enumerate(choices)],
            "usage": used,
        }

    @abc.abstractmethod
    def opening(self, index: int) -> list[dict[str, Any]]:
        """The chunks before a choice's first text."""

    @abc.abstractmethod
    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        """The chunks of a further piece; the last holds the reason of the end and no text."""

    def usage_chunk(self, used: dict[str, int]) -> dict[str, Any]:
        """The last chunk, where usage is asked for."""
        return {**self._head(self.chunk_object), "choices": [], "usage": used}

    @abc.abstractmethod
    def _choice(self, index: int, choice: Whole) -> dict[str, Any]:
        """A choice of a reply that does not stream."""

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "system_fingerprint": None}

    def _chunk(self, choice: dict[str, Any], piece: Piece | None = None) -> dict[str, Any]:
        chunk = {**self._head(self.chunk_object), "choices": [choice]}
        if self.usage_asked:
            chunk["usage"] = None
        if self.origins and piece is not None:
            choice["origins"] = self._origins(piece.said)
            chunk["figures"] = shown_figures(piece.figures)
        return chunk

    def _origins(self, said: Sequence[Said]) -> list[list[str]]:
        return [[one.text, ORIGINS[one.origin]] for one in said]

    def _extra(self, choice: Whole) -> dict[str, Any]:
        if not self.origins or choice.figures is None:
            return {}
        return {"origins": self._origins(choice.said), "figures": shown_figures(choice.figures)}

    def _likely(self, said: Sequence[Said]) -> list[tuple[Said, bytes]]:
        """The tokens that are something of the text, and their bytes; what ends it and says nothing is none."""
        found = [(one, self.tokens.of(one.id)) for one in said if one.likely is not None]
        return [(one, data) for one, data in found if data]


class ChatForm(Form):
    """chat.completion and chat.completion.chunk."""

    whole_object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(self._delta(index, {"role": "assistant", "content": ""}))]

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        out = []
        if piece.said and (piece.text or self._likely(piece.said)):
            delta = self._delta(index, {"content": piece.text}, logprobs=self._logprobs(piece.said))
            out.append(self._chunk(delta, piece))
        if piece.finish_reason is not None:
            last = self._chunk(self._delta(index, {}, piece.finish_reason))
            if self.origins:
                last["figures"] = shown_figures(piece.figures)
            out.append(last)
        return out

    def _delta(self, index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None) -> dict:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _choice(self, index: int, choice: Whole) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.said),
            "finish_reason": choice.finish_reason,
            **self._extra(choice),
        }

    def _logprobs(self, said: Sequence[Said]) -> dict[str, Any] | None:
        if not any(one.likely is not None for one in said):
            return None
        return {
            "content": [
                {
                    **self._entry(data, one.likely.logprob),
                    "top_logprobs": [self._entry(self.tokens.shown(token), lp) for token, lp in one.likely.top],
                }
                for one, data in self._likely(said)
            ],
            "refusal": None,
        }

    def _entry(self, data: bytes, logprob: float) -> dict[str, Any]:
        return {"token": data.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(data)}


class CompletionForm(Form):
    """text_completion. echoes: each choice's prompt, where it is to stand before the text."""

    whole_object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, *args: Any, echoes: Sequence[str] = (), **more: Any) -> None:
        super().__init__(*args, **more)
        self._echoes = echoes
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self._chunk(self._part(index, self._echoes[index]))] if self._echoes else []

    def chunks(self, index: int, piece: Piece) -> list[dict[str, Any]]:
        out = []
        if piece.said and (piece.text or self._likely(piece.said)):
            logprobs = self._logprobs(piece.said, self._offsets.get(index, 0))
            self._offsets[index] = self._offsets.get(index, 0) + len(piece.text)
            out.append(self._chunk(self._part(index, piece.text, logprobs=logprobs), piece))
        if piece.finish_reason is not None:
            out.append(self._chunk(self._part(index, "", piece.finish_reason)))
        return out

    def _part(self, index: int, text: str, reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _choice(self, index: int, choice: Whole) -> dict[str, Any]:
        echo = self._echoes[index] if self._echoes else ""
        part = self._part(index, echo + choice.text, choice.finish_reason, self._logprobs(choice.said, 0))
        return part | self._extra(choice)

    def _logprobs(self, said: Sequence[Said], offset: int) -> dict[str, Any] | None:
        if not any(one.likely is not None for one in said):
            return None
        offsets = {}
        for one in said:
            offsets[id(one)] = offset
            offset += len(one.text)
        found = self._likely(said)
        return {
            "tokens": [_name(data) for _, data in found],
            "token_logprobs": [finite(one.likely.logprob) for one, _ in found],
            "top_logprobs": [self._top(one, data) for one, data in found],
            "text_offset": [offsets[id(one)] for one, _ in found],
        }

    def _top(self, one: Said, data: bytes) -> dict[str, float]:
        """The likeliest tokens, and the chosen one where it is none of them."""
        pairs = [(_name(self.tokens.shown(token)), finite(logprob)) for token, logprob in one.likely.top]
        return dict(pairs) if not pairs else dict(pairs) | {_name(data): finite(one.likely.logprob)}


def _name(data: bytes) -> str:
    """A token's text; OpenAI's "bytes:..." where it is no whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
