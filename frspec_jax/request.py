"""What is asked of a model, and what it answers."""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from frspec_jax.config import Sampling
from frspec_jax.errors import UserError
from frspec_jax.likelihood import MOST as MOST_LOGPROBS
from frspec_jax.likelihood import Likely
from frspec_jax.state import Asked
from frspec_jax.writer import Writer

Prompt = str | Sequence[Mapping[str, str]]  # text, or messages with "role" and "content"


@dataclasses.dataclass(frozen=True)
class Request:
    """What may differ from one prompt to the next."""

    max_new_tokens: int = 512  # tokens of the answer, at most
    sampling: Sampling = Sampling()  # how tokens are chosen; greedy, if nothing is said
    seed: int = 0  # of 64 bits: -2^63 to 2^63 - 1
    raw: bool = False  # no chat template
    system: str | None = None  # the system message of a chat
    sequence: int = 0  # tells apart answers of one seed to one prompt: 0, 1, 2, ...
    stop: str | Sequence[str] = ()  # the answer ends before the first of these texts that it would hold
    logprobs: int | None = None  # give each token's log-probability, and so many of the likeliest beside it; None: none

    def __post_init__(self) -> None:
        # One text stands for itself: as a sequence it would be its letters.
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise UserError(f"--stop {self.stop!r} must be texts that are not empty")
        if self.logprobs is not None and not (_is_int(self.logprobs) and 0 <= self.logprobs <= MOST_LOGPROBS):
            raise UserError(f"--logprobs {self.logprobs} must be 0 to {MOST_LOGPROBS} of the likeliest tokens")
        if not _is_int(self.max_new_tokens) or self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens} must be a whole number of at least 1")
        if not _is_int(self.seed) or not -(2**63) <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed!r} must be a whole number from -2^63 to 2^63 - 1")

    def changed(self, **settings: Any) -> Request:
        """The same request with other settings: fields of its own, or of its `Sampling`, by their names.

        Request(seed=1).changed(temperature=0.7, max_new_tokens=64)

        Raises:
          TypeError: there is no such setting. UserError: a value makes no sense.
        """
        wrong = [name for name in settings if name not in SETTINGS]
        if wrong:
            near = difflib.get_close_matches(wrong[0], SETTINGS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SETTINGS)}"
            raise TypeError(f"{wrong[0]} is no setting of a request; {hint}")
        own = {name: value for name, value in settings.items() if name in OWN_SETTINGS}
        of_sampling = {name: value for name, value in settings.items() if name not in OWN_SETTINGS}
        if "logit_bias" in of_sampling:  # a mapping, or pairs
            pairs = of_sampling["logit_bias"]
            of_sampling["logit_bias"] = tuple(map(tuple, pairs.items() if isinstance(pairs, Mapping) else pairs))
        if of_sampling:
            own["sampling"] = dataclasses.replace(own.get("sampling", self.sampling), **of_sampling)
        return dataclasses.replace(self, **own)


OWN_SETTINGS = tuple(field.name for field in dataclasses.fields(Request))
SETTINGS = (*OWN_SETTINGS, *(field.name for field in dataclasses.fields(Sampling)))


class Settings(TypedDict, total=False):
    """The settings that `Generator.generate` and `stream` take by name: those of a `Request` and of its `Sampling`."""

    max_new_tokens: int
    sampling: Sampling
    seed: int
    raw: bool
    system: str | None
    sequence: int
    stop: str | Sequence[str]
    logprobs: int | None
    temperature: float
    top_k: int
    top_p: float
    typical: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]]


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class Effort:
    """What an answer took."""

    prompt_tokens: int
    rounds: int  # passes of the target after the prompt's
    histogram: list[int]  # rounds that emitted 1, 2, ... D+1 tokens
    prefill_seconds: float  # reading the prompt
    decode_seconds: float  # all rounds


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """One answer, and how it came about. Printed, it is its text."""

    text: str  # the answer
    tokens: list[int]  # the stop id included, where one ended the answer
    prompt_tokens: int  # of the prompt, the chat template's own among them
    finish_reason: str | None  # "stop" or "length"; None while the answer goes on
    method: str  # `Method.name`: "vanilla", "eagle", "eagle+fr" (cropped), "eagle+fr+copying"
    draft_vocab: int | None  # V'; None where nothing drafts
    rounds: int  # passes of the target after the prompt's
    accepted_length: float | None  # tokens a round, the bonus token counted; the first token is the prefill's
    accepted_histogram: list[int]  # rounds that emitted 1, 2, ... D+1 tokens
    prefill_seconds: float  # reading the prompt
    decode_seconds: float  # all rounds
    context_slots: int = 0  # M, ids of the text so far that could be proposed besides V'
    logprobs: tuple[Likely, ...] | None = None  # of each token, where the request wants them

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"<Result {textwrap.shorten(self.text, 60, placeholder=' ...')!r}: {self.summary()}>"

    @property
    def decode_rate(self) -> float:
        """Tokens a second of decoding; the first token is the prefill's."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    def ended_by(self, writer: Writer) -> Result:
        """The answer up to a stop text, where its writer met one: the tokens that say it, and the text before it."""
        if not writer.stopped:
            return self
        count = writer.taken
        logprobs = None if self.logprobs is None else self.logprobs[:count]
        tokens = self.tokens[:count]
        return dataclasses.replace(self, tokens=tokens, text=writer.text, finish_reason="stop", logprobs=logprobs)

    def to_json(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        if self.logprobs is None:
            del data["logprobs"]
        return data

    def summary(self) -> str:
        """One line for people."""
        line = (
            f"{len(self.tokens)} tokens ({self.finish_reason}); prefill {self.prefill_rate:.1f} tokens/s, "
            f"decode {self.decode_rate:.1f} tokens/s"
        )
        if self.draft_vocab is not None and self.accepted_length is not None:
            line += f"; accepted length {self.accepted_length:.2f} with bonus, V' = {self.draft_vocab:,}"
            line += f" + {self.context_slots:,} slots" if self.context_slots else ""
        return f"{line} [{self.method}]"


def asked_of(request: Request, limit: int) -> Asked:
    """What a request asks of the rounds, which may emit no more than `limit` tokens."""
    return Asked.of(
        request.sampling,
        seed=request.seed,
        limit=limit,
        sequence=request.sequence,
        likelihood=request.logprobs is not None,
    )
