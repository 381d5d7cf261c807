"""Answers in the making: `Text`, which everything that decodes drives, and `Stream`, the same as pieces of text.

with model.begin(ids, request) as text:
    text.advance()          # to its end; or advance(1), a round at a time
    print(text.tokens, text.result().text)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self, cast

import jax
import jax.numpy as jnp
import numpy as np

from frspec_jax import engine
from frspec_jax.likelihood import Likelihood
from frspec_jax.request import Effort, Request, Result
from frspec_jax.state import FULL, RUNNING, STOPPED, DecodeState, Weights

if TYPE_CHECKING:
    from frspec_jax.generator import Generator

ALL_ROUNDS = 2**30


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt that has been run through target and draft, and the first token chosen; any number of texts begin so."""

    state: DecodeState
    prompt_tokens: int
    seconds: float  # that it took
    request: Request


class Text:
    """An answer in the making, of one `Generator`. Leaving its `with` block gives the caches back, whatever happened.

    In a compiled round the state is donated: after an error or Ctrl-C inside one, the text is lost, and only it.
    """

    def __init__(self, model: Generator, request: Request, reading: Reading, *, own: bool = False) -> None:
        self._model, self._request = model, request
        self._prompt_tokens, self._prefill_seconds, self._decode_seconds = reading.prompt_tokens, reading.seconds, 0.0
        self.plan = model.plan_for(request)
        self.state = reading.state if own else _copied(reading.state)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._model.give_back(self.state.caches)

    @property
    def weights(self) -> Weights:
        """What a round of this text reads."""
        return self._model.weights

    @property
    def emitted(self) -> int:
        """How many tokens there are so far."""
        return int(self.state.emitted)

    @property
    def tokens(self) -> list[int]:
        """The answer so far; the stop id included, where one ended it."""
        return np.asarray(self.state.output)[: self.emitted].tolist()

    @property
    def finished(self) -> bool:
        """Whether a stop id or the limit ended it."""
        return int(self.state.finished) != RUNNING

    def advance(self, rounds: int = ALL_ROUNDS) -> None:
        """Decode until the text is finished, or so many more rounds are done."""
        self.drive(lambda plan, weights, state: engine.run(plan, weights, state, np.int32(rounds)))

    def drive(self, step: engine.Step) -> None:
        """Decode with another driver of rounds, timed as `advance` is: it takes the state, and gives the next one."""
        begun = time.perf_counter()
        with jax.enable_x64(False):
            self.state = jax.block_until_ready(step(self.plan, self.weights, self.state))
        self._decode_seconds += time.perf_counter() - begun

    def reading(self) -> Reading:
        """The text as it stands, for others to begin with; this one goes on untouched."""
        return Reading(_copied(self.state), self._prompt_tokens, self._prefill_seconds, self._request)

    def result(self) -> Result:
        """The answer so far, and how it came about."""
        state, wanted = self.state, self._request.logprobs
        return self._model.result_of(
            self.tokens,
            {STOPPED: "stop", FULL: "length"}.get(int(state.finished)),
            Effort(
                prompt_tokens=self._prompt_tokens,
                rounds=int(state.rounds),
                histogram=np.asarray(state.histogram).tolist(),
                prefill_seconds=self._prefill_seconds,
                decode_seconds=self._decode_seconds,
            ),
            lossy=self.plan.rule == "typical",
            logprobs=None if wanted is None else cast(Likelihood, state.likelihood).shown(self.emitted, wanted),
        )


def _copied(state: DecodeState) -> DecodeState:
    return jax.block_until_ready(jax.tree.map(jnp.copy, state))


class Stream:
    """An answer in the making: an iterator over pieces of text, about one a round; `result` once it has ended."""

    def __init__(self, model: Generator, ids: Sequence[int] | np.ndarray | Reading, request: Request) -> None:
        self._model, self._ids, self._request = model, ids, request
        self.result: Result | None = None

    def __iter__(self) -> Iterator[str]:
        writer = self._model.writer(self._request)
        with self._model.begin(self._ids, self._request) as text:
            while True:
                ended = text.finished
                piece = "".join(said.text for said in writer.more(text.tokens[writer.taken :], ended=ended))
                if piece:
                    yield piece
                if ended or writer.stopped:
                    break
                text.advance(1)
            self.result = text.result().ended_by(writer)
