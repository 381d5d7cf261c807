"""Many texts at once on one device: slots in which texts come and go, and the rounds that they share.

batch = Batch(model, slots=8)
slot = batch.admit(ids, request)
while batch.busy:
    for fresh in batch.step():
        ...                       # fresh.slot, fresh.tokens; with the last piece fresh.result

What a text says is what it would say alone, seed for seed, whoever sits beside it (docs/batch.md).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from frspec_jax import batched as programs
from frspec_jax import mesh_parts
from frspec_jax.batched import Reading, Report
from frspec_jax.config import Sampling
from frspec_jax.errors import UserError
from frspec_jax.likelihood import Likely
from frspec_jax.penalties import Bearing, Penalties
from frspec_jax.places import Places
from frspec_jax.prefill import Chunk, parts_of
from frspec_jax.request import Effort, Request, Result, asked_of
from frspec_jax.sampling import argument
from frspec_jax.shared_rounds import SharedRounds, ladder
from frspec_jax.state import RUNNING, STOPPED, DecodeState
from frspec_jax.writer import Writer

if TYPE_CHECKING:
    from frspec_jax.generator import Generator

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Fresh:
    """What a step brought one request."""

    slot: int
    tokens: tuple[int, ...]  # the stop id included, where one ended it
    origins: tuple[int, ...]  # of each: `state.OWN`, `DRAFTED` or `COPIED`
    logprobs: tuple[Likely, ...] | None  # of each; None where the request wants none
    finish_reason: str | None  # "stop", "length", or None while it goes on; the slot is free after that
    result: Result | None  # of the whole answer, with its last piece
    fault: Exception | None = None  # why there is no more of this request, whose slot is free; the others go on


@dataclasses.dataclass
class _Text:
    """A request in a slot."""

    slot: int
    request: Request
    prompt: np.ndarray
    limit: int
    left: list[Chunk]  # of the prompt, not read yet
    reused: int  # tokens of the prompt that were read before, for another text
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[Likely] = dataclasses.field(default_factory=list)
    rounds: int = 0
    histogram: list[int] = dataclasses.field(default_factory=list)
    prefill_seconds: float = 0.0
    began: float = 0.0  # when the first token came


class Batch:
    """Texts that are decoded together. Not thread-safe: one thread drives it.

    A step reads a chunk of one prompt, or runs a round of all texts that decode; between two chunks there is always a
    round, so that a long prompt holds nobody up. A prompt that begins as an earlier one did, which still lies in some
    slot, is read from there on.
    """

    def __init__(self, model: Generator, slots: int = 8, *, sizes: tuple[int, ...] | None = None) -> None:
        """A batch with every slot free.

        Args:
          slots: texts at a time. Each has a cache for the model's whole context, and there is one more to spare.
          sizes: how many texts rounds are compiled for, ascending, all `slots` the last; None: what suits the device.
        """
        if slots < 1:
            raise UserError(f"--slots {slots} must be at least 1")
        self.model, self.slots = model, slots
        self._plan = dataclasses.replace(model.plan(), rule="mixed", adjusts=True, logprobs=True, keeps=False)
        self._spare = slots  # the slot of nobody, for programs of more texts than there are
        with jax.enable_x64(False):
            plan = self._plan
            self._state = mesh_parts.made(
                plan,
                lambda: programs.new_state(plan, model.weights, model.capacity, slots + 1, model.runtime.dtype),
                lambda state: mesh_parts.state_on(plan, state.caches),
            )
        self._rounds = SharedRounds(model, self._plan, sizes or ladder(slots))
        self._texts: dict[int, _Text] = {}
        self._places = Places(slots)
        self._steps = 0
        self._read_last = False  # whether the last step read a chunk

    # What goes on ---------------------------------------------------------------------------------

    @property
    def state(self) -> DecodeState:
        """Caches and all else of every slot; the next step gives it away."""
        return self._state

    @property
    def free(self) -> int:
        """Slots that a request may begin in now."""
        return self.slots - len(self._texts)

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._texts)

    @property
    def reading(self) -> bool:
        """Whether some prompt is not read to its end."""
        return any(text.left for text in self._texts.values())

    def check(self, ids: Sequence[int] | np.ndarray, request: Request) -> int:
        """How many tokens may be emitted after a prompt of ids [T].

        Raises:
          UserError: the request is none that this model can answer.
        """
        if request.sampling.typical:
            raise UserError("--lossy-typical is not for batches, whose texts are exactly the target's; drop it")
        for token, value in request.sampling.logit_bias:
            if token >= self.model.checkpoint.config.vocab_size:
                raise UserError(
                    f"--logit-bias {token}:{value:g}: the model's token ids are 0 to "
                    f"{self.model.checkpoint.config.vocab_size - 1}"
                )
        return self.model.check(ids, request)

    # Requests ---------------------------------------------------------------------------------------

    def admit(self, ids: Sequence[int] | np.ndarray, request: Request) -> int:
        """Give a request a slot; its prompt of ids [T] is read in the next steps.

        Raises:
          UserError: as `check`. ValueError: no slot is free.
        """
        limit, prompt = self.check(ids, request), np.asarray(ids, np.int32)
        if not self.free:
            raise ValueError("no slot is free")
        slot, first = self._place_for(prompt)
        capacity, config = self.model.capacity, self.model.checkpoint.config
        left = parts_of(prompt, self.model.runtime.chunks, capacity, first)
        self._texts[slot] = _Text(slot, request, prompt, limit, left, first)
        self._places.holds(slot, prompt[:first].tolist())
        if request.sampling.adjusts:
            with jax.enable_x64(False):
                bearing = Bearing.of(request.sampling, prompt, config.vocab_size)
                self._state = programs.bear_on(self._state, argument(slot, np.int32), bearing)
        return slot

    def cancel(self, slot: int) -> None:
        """Give a request up: its slot is free at once."""
        self._leave(self._texts[slot])

    def step(self) -> list[Fresh]:
        """One piece of work, and what it brought."""
        self._steps += 1
        reading = next((text for text in self._texts.values() if text.left), None)
        decoding = [text for text in self._texts.values() if not text.left]
        with jax.enable_x64(False):
            if reading is not None and not (decoding and self._read_last):
                self._read_last = True
                return self._read(reading)
            self._read_last = False
            return self._round(decoding) if decoding else []

    def stop(self, slot: int) -> Result:
        """End an answer: its slot is free at once, and this is all of it."""
        text = self._texts[slot]
        result = self._result(text, "stop")
        self._leave(text)
        return result

    def _read(self, text: _Text) -> list[Fresh]:
        begun, request = time.perf_counter(), text.request
        chunk = text.left.pop(0)
        asked = asked_of(request, text.limit)
        whole: Any = None
        if self._plan.reads_text:
            whole = np.full(self.model.capacity + 1, -1, np.int32)
            whole[1 : len(text.prompt)] = text.prompt[1:]
        reading = Reading(
            argument(text.slot, np.int32), chunk, asked, whole, Penalties.of(request.sampling, bearing=None)
        )
        self._state, report = programs.read(self._plan, self.model.weights, self._state, reading)
        if text.left:
            jax.block_until_ready(report)
            text.prefill_seconds += time.perf_counter() - begun
            return []
        report = jax.device_get(report)
        self._places.holds(text.slot, text.prompt.tolist())
        text.began = time.perf_counter()
        text.prefill_seconds += text.began - begun
        return [self._told(text, report, 0)]

    def _round(self, texts: list[_Text]) -> list[Fresh]:
        unused = self._rounds.size_for(len(texts)) - len(texts)
        slots = [text.slot for text in texts] + [self._spare] * unused
        self._state, report = self._rounds.run(self._state, slots)
        report = jax.device_get(report)
        return [self._told(text, report, row) for row, text in enumerate(texts)]

    def _told(self, text: _Text, report: Report, row: int) -> Fresh:
        """What a report's row brought a text; where telling it fails, that text alone ends."""
        try:
            return self._fresh(text, report, row)
        except Exception as error:
            log.exception("a request in slot %d has failed", text.slot)
            if self._texts.get(text.slot) is text:
                self._leave(text)
            return Fresh(text.slot, (), (), None, None, None, fault=error)

    def _fresh(self, text: _Text, report: Report, row: int) -> Fresh:
        """What a report's row brought a text, which leaves where that ends it."""
        count = int(report.count[row])
        tokens = tuple(report.tokens[row, :count].tolist())
        text.tokens += tokens
        text.rounds, text.histogram = int(report.rounds[row]), report.histogram[row].tolist()
        wanted, logprobs = text.request.logprobs, None
        if wanted is not None and report.likelihood is not None:
            mine = jax.tree.map(lambda x: x[row], report.likelihood)
            logprobs = mine.shown(count, wanted)
            text.logprobs += logprobs
        reason, result = None, None
        if report.finished[row] != RUNNING:
            reason = "stop" if report.finished[row] == STOPPED else "length"
            result = self._result(text, reason)
            self._leave(text)
        return Fresh(text.slot, tokens, tuple(report.origins[row, :count].tolist()), logprobs, reason, result)

    def _result(self, text: _Text, reason: str) -> Result:
        """The whole answer."""
        return self.model.result_of(
            text.tokens,
            reason,
            Effort(
                prompt_tokens=len(text.prompt),
                rounds=text.rounds,
                histogram=text.histogram,
                prefill_seconds=text.prefill_seconds,
                decode_seconds=time.perf_counter() - text.began,
            ),
            logprobs=None if text.request.logprobs is None else tuple(text.logprobs),
        )

    # Slots -------------------------------------------------------------------------------------------

    def _place_for(self, prompt: np.ndarray) -> tuple[int, int]:
        """A free slot, and how many tokens of the prompt its caches hold already."""
        free = [slot for slot in range(self.slots) if slot not in self._texts]
        choice = self._places.choose(prompt, free, self.model.runtime.chunks.short)
        if choice.source is not None:
            source, target = argument(choice.source, np.int32), argument(choice.slot, np.int32)
            with jax.enable_x64(False):
                self._state = programs.copy_slot(self._state, source, target)
        return choice.slot, choice.held

    def _leave(self, text: _Text) -> None:
        """A text's slot is free; what its caches hold may serve the next one that begins alike."""
        del self._texts[text.slot]
        self._places.left(text.slot, self._steps)
        if text.tokens:
            # What was accepted last, the drafter may not have taken in yet.
            sound = len(text.prompt) + len(text.tokens) - 2 * (self._plan.tree.depth + 1)
            held = [*text.prompt.tolist(), *text.tokens][: max(sound, len(text.prompt) - 1)]
            self._places.holds(text.slot, held)

    # Before requests come ------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Compile all that requests may need, and measure what rounds of several texts cost where nobody has yet."""
        if self._texts:
            raise ValueError("a batch is warmed up before requests come")
        chunks = self.model.runtime.chunks
        longest = min(self.model.runtime.context - 2, max(chunks.long, 2 * chunks.short))
        for tokens in dict.fromkeys((1, longest)):
            self._run_through(
                np.arange(tokens) % 7, Request(max_new_tokens=2, sampling=Sampling(logit_bias=((0, 0.5),)))
            )
        with jax.enable_x64(False):
            zero = argument(0, np.int32)
            self._state = programs.copy_slot(self._state, zero, zero)
            for size in self._rounds.sizes:
                self._state = self._rounds.warm_up(size, self._state, self._spare)
        self._places = Places(self.slots)

    def _run_through(self, ids: np.ndarray, request: Request) -> None:
        self.admit(ids, request)
        while self.busy:
            for fresh in self.step():
                if fresh.fault is not None:
                    raise fresh.fault


SLOTS = 8  # texts at a time, where nobody says


def answers(
    model: Generator, asked: Sequence[tuple[np.ndarray, Request]], slots: int = SLOTS
) -> Iterator[tuple[int, Result]]:
    """Answer many prompts of ids [T] together: their numbers and answers, as they end.

    Raises:
      UserError: before anything is decoded, if one of the requests cannot be answered.
    """
    slots = max(1, min(slots, len(asked)))
    batch = Batch(model, slots, sizes=(slots,))
    for ids, request in asked:
        batch.check(ids, request)
    batch.warm_up()
    waiting, running = list(enumerate(asked))[::-1], dict[int, tuple[int, Writer]]()
    while waiting or batch.busy:
        while waiting and batch.free:
            number, (ids, request) = waiting.pop()
            running[batch.admit(ids, request)] = number, model.writer(request)
        for fresh in batch.step():
            if fresh.fault is not None:
                raise fresh.fault
            number, writer = running[fresh.slot]
            result = fresh.result
            writer.more(fresh.tokens, ended=result is not None)
            if result is None and writer.stopped:
                result = batch.stop(fresh.slot)
            if result is not None:
                del running[fresh.slot]
                yield number, result.ended_by(writer)
