"""A loaded model that answers: `Generator`."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Unpack, cast, overload

import jax
import jax.numpy as jnp
import numpy as np

from frspec_jax import engine, mesh_parts, pace_tables, prefill
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.detokenizer import text_of
from frspec_jax.drafting import Drafting
from frspec_jax.encoding import encoded, room_after
from frspec_jax.kv_cache import rounded_capacity
from frspec_jax.likelihood import Likely
from frspec_jax.penalties import Bearing, Penalties
from frspec_jax.plan import Plan
from frspec_jax.prefill import Chunks
from frspec_jax.request import Effort, Prompt, Request, Result, Settings, asked_of
from frspec_jax.runtime import Runtime
from frspec_jax.sampling import rule_of
from frspec_jax.sharding import agreed
from frspec_jax.state import Asked, Caches, Weights, new_caches
from frspec_jax.texts import Reading, Stream, Text
from frspec_jax.writer import Writer


class Generator:
    """A loaded model; `load` makes one.

    Several threads may use it at once: each text in the making has caches of its own. Those of a text that has ended
    serve the next one.
    """

    def __init__(self, checkpoint: Checkpoint, drafting: Drafting, weights: Weights, runtime: Runtime) -> None:
        self.checkpoint, self.drafting, self.weights, self.runtime = checkpoint, drafting, weights, runtime
        self._lock = threading.Lock()  # over the caches
        self._caches: Caches | None = None  # of the last text that ended, for the next to begin in
        self._compiling = threading.Lock()  # over the plans that are compiled
        self._warm: set[tuple[Plan, int]] = set()  # with the chunks of a prompt
        self._paced = False  # whether the costs of a round are known

    def __repr__(self) -> str:
        what = [str(self.drafting.method.name)]
        if self.draft_vocab is not None:
            what.append(f"V' = {self.draft_vocab:,} of {self.checkpoint.config.vocab_size:,}")
        if self.tree.size > 1:
            most = "at most " if self.drafting.pace is not None else ""
            what.append(f"trees of {most}{self.tree.size}")
        how = f"{self.dtype_name}, context {self.runtime.context:,}"
        return f"<Generator {self.checkpoint.path}: {', '.join(what)}; {how}>"

    @property
    def tree(self) -> TreeConfig:
        """The draft tree's shape."""
        return self.drafting.tree

    @property
    def draft_vocab(self) -> int | None:
        """V'; None where nothing drafts."""
        return self.drafting.vocab

    @property
    def context_slots(self) -> int:
        """M, ids of a text so far that may be proposed besides V'."""
        return self.drafting.method.slots

    @property
    def dtype_name(self) -> str:
        """The dtype of weights and products: "float32" or "bfloat16"."""
        return jnp.dtype(self.runtime.dtype).name

    @property
    def capacity(self) -> int:
        """Rows of a cache: the context, and what a round writes beyond it."""
        return rounded_capacity(self.runtime.context + self.plan().margin)

    def plan(self, sampling: Sampling = Sampling(), *, logprobs: bool = False) -> Plan:
        """What is compiled for these sampling settings: no figure matters, but whether anything samples or adjusts."""
        drafting, stop_ids = self.drafting, self.checkpoint.stop_ids
        return Plan(
            self.checkpoint.config,
            drafting.drafter,
            drafting.tree,
            stop_ids,
            rule_of(sampling),
            self.runtime.of_target,
            drafting.pace,
            adjusts=sampling.adjusts,
            logprobs=logprobs,
            mesh=self.runtime.mesh,
        )

    def plan_for(self, request: Request) -> Plan:
        """What is compiled for a request."""
        return self.plan(request.sampling, logprobs=request.logprobs is not None)

    def encode(self, prompt: Prompt, request: Request = Request(), tools: list[Any] | None = None) -> np.ndarray:
        """A prompt as token ids [T] int32: through the chat template, unless the request or the model is raw.

        tools: functions that the model may call, for the template to describe.

        Raises:
          UserError: the prompt is empty, or the template cannot say it.
        """
        return encoded(self.checkpoint, prompt, request, tools)

    def check(self, ids: Sequence[int] | np.ndarray, request: Request = Request()) -> int:
        """How many tokens may be emitted after a prompt of ids [T].

        Raises:
          UserError: they are no token ids, or leave no room in the context.
        """
        return min(request.max_new_tokens, room_after(self.checkpoint, ids, self.runtime.context))

    def warm_up(
        self, sampling: Sampling = Sampling(), *, prompt_tokens: int | None = None, logprobs: bool = False
    ) -> None:
        """Compile what requests with such sampling settings need, so that no request's time holds it.

        prompt_tokens: of the prompt to come, which may need no long chunks; None: of any length.
        """
        plan = self.plan(sampling, logprobs=logprobs)
        for size in self._chunk_sizes(prompt_tokens):
            self._compile(plan, size, sampling)
        if plan.pace is not None and not self._paced:
            with self._compiling:
                self._find_costs(plan)

    def measure_costs(self) -> None:
        """Measure what a round costs on this device, and keep it, whatever was measured before; seconds."""
        self.warm_up()
        with self._compiling:
            self._find_costs(self.plan(), anew=True)

    def _find_costs(self, plan: Plan, anew: bool = False) -> None:
        """What the pace's decisions go by: measured before on this device, or now."""
        if plan.pace is None or self.weights.pace is None or (self._paced and not anew):
            return
        name = pace_tables.name_of(plan, self.runtime.dtype, self.draft_vocab)
        costs = None if anew else pace_tables.kept_costs(name, plan.pace)
        if costs is None and self.capacity >= pace_tables.room_to_measure(plan.pace, plan.tree):
            caches, chunks = self._take_caches() or self._new_caches(plan), self.runtime.chunks
            with jax.enable_x64(False):
                state = pace_tables.measuring_state(plan, self.weights, caches, chunks)
                costs, caches = pace_tables.measured(plan, self.weights, state)
            self.give_back(caches)
            costs = agreed(costs)
            pace_tables.keep_costs(name, plan.pace, costs)
        if costs is not None:  # else the context has no room to measure in, and the guess stays
            tables = dataclasses.replace(self.weights.pace, costs=costs)
            self.weights = dataclasses.replace(self.weights, pace=tables)
        self._paced = True

    def _chunk_sizes(self, prompt_tokens: int | None) -> list[int]:
        """The sizes of the chunks that a prompt runs in; None: that any may need."""
        chunks, capacity = self.runtime.chunks, self.capacity
        lengths = (1, chunks.long) if prompt_tokens is None else (prompt_tokens,)
        return sorted({size for length in lengths for size in chunks.sizes(length, capacity)})

    def _compile(self, plan: Plan, chunk: int, sampling: Sampling) -> None:
        if (plan, chunk) in self._warm:
            return
        with self._compiling:  # a second thread waits for the program instead of compiling it too
            if (plan, chunk) in self._warm:
                return
            caches, asked = self._take_caches() or self._new_caches(plan), Asked.of(sampling, seed=0, limit=2)
            prompt, chunks = np.zeros(chunk, np.int32), Chunks(chunk)
            penalties = self.penalties_of(Request(sampling=sampling), prompt)
            with jax.enable_x64(False):
                state = prefill.start(plan, self.weights, caches, prompt, asked, chunks=chunks, penalties=penalties)
                state = jax.block_until_ready(engine.run(plan, self.weights, state, np.int32(0)))
            self.give_back(state.caches)
            self._warm.add((plan, chunk))

    def begin(self, prompt: Sequence[int] | np.ndarray | Reading, request: Request = Request()) -> Text:
        """Read a prompt of token ids [T]; the text that begins is advanced within a `with` block.

        prompt: or what this model, or one with the same `reads_as`, has read of it; its own request then holds.
        """
        if isinstance(prompt, Reading):
            self._warm_up_for(prompt.request, prompt.prompt_tokens)
            return Text(self, prompt.request, prompt)
        limit, ids = self.check(prompt, request), np.asarray(prompt, np.int32)
        plan, asked, penalties = self.plan_for(request), asked_of(request, limit), self.penalties_of(request, ids)
        self._warm_up_for(request, len(ids))
        caches = self._take_caches()
        begun = time.perf_counter()
        with jax.enable_x64(False):
            state = jax.block_until_ready(
                prefill.start(
                    plan,
                    self.weights,
                    caches or self._new_caches(plan),
                    ids,
                    asked,
                    chunks=self.runtime.chunks,
                    penalties=penalties,
                )
            )
        return Text(self, request, Reading(state, len(ids), time.perf_counter() - begun, request), own=True)

    def _warm_up_for(self, request: Request, prompt_tokens: int) -> None:
        self.warm_up(request.sampling, prompt_tokens=prompt_tokens, logprobs=request.logprobs is not None)

    def penalties_of(self, request: Request, ids: np.ndarray) -> Penalties | None:
        """What a request changes in the logits after a prompt of ids [T]; None: nothing.

        Raises:
          UserError: it names an id that the vocabulary does not have.
        """
        if not request.sampling.adjusts:
            return None
        return Penalties.of(request.sampling, Bearing.of(request.sampling, ids, self.checkpoint.config.vocab_size))

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: Prompt, request: Request = ..., **settings: Unpack[Settings]
    ) -> Result: ...
    @overload  # a list of prompts; an empty one counts as such
    def generate(
        self, prompt: Sequence[Prompt], request: Request = ..., **settings: Unpack[Settings]
    ) -> list[Result]: ...
    def generate(
        self, prompt: Prompt | Sequence[Prompt], request: Request = Request(), **settings: Unpack[Settings]
    ) -> Result | list[Result]:
        r"""Answer one prompt; or a list of prompts, together in a batch (`frspec_jax.batch`).

        Args:
          prompt: text; or a chat, messages with "role" and "content"; or a list of either.
          settings: what differs from `request`, by name: temperature=0.7, max_new_tokens=64, seed=1, stop="\n", ...

        Raises:
          UserError: a prompt is empty or does not fit the context, or a setting makes no sense.
        """
        request = request.changed(**settings)
        if isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], Mapping)):
            return self.generate_ids(self.encode(cast(Prompt, prompt), request), request)
        from frspec_jax.batch import answers  # which imports this module

        every = [(self.encode(cast(Prompt, one), request), request) for one in prompt]
        return [result for _, result in sorted(answers(self, every), key=lambda answer: answer[0])]

    def generate_ids(self, ids: Sequence[int] | np.ndarray | Reading, request: Request = Request()) -> Result:
        """Answer one prompt that is token ids [T] already, or read already."""
        request = ids.request if isinstance(ids, Reading) else request
        if request.stop:
            stream = Stream(self, ids, request)
            for _ in stream:
                pass
            assert stream.result is not None
            return stream.result
        with self.begin(ids, request) as text:
            text.advance()
            return text.result()

    def stream(self, prompt: Prompt, request: Request = Request(), **settings: Unpack[Settings]) -> Stream:
        """Answer one prompt, text as it comes: iterate over the pieces, then read `.result`.

        settings: what differs from `request`, by name, as for `generate`.
        """
        request = request.changed(**settings)
        return Stream(self, self.encode(prompt, request), request)

    def reads_as(self, request: Request = Request()) -> Hashable:
        """Models that agree in this read a prompt alike: what V' keeps matters only once a draft proposes.

        But where there are slots, those ids of the prompt that it lacks have filled them.
        """
        lacks = id(self.weights.draft) if self.context_slots else None
        return id(self.weights.target), self.drafting.folder, self.plan_for(request), self.runtime, lacks

    def result_of(
        self,
        tokens: list[int],
        finish_reason: str | None,
        effort: Effort,
        *,
        lossy: bool = False,
        logprobs: tuple[Likely, ...] | None = None,
    ) -> Result:
        """An answer of this model, and how it came about."""
        rounds = effort.rounds
        return Result(
            text=text_of(self.checkpoint.tokenizer, tokens),
            tokens=tokens,
            prompt_tokens=effort.prompt_tokens,
            finish_reason=finish_reason,
            method=dataclasses.replace(self.drafting.method, lossy=lossy).name,
            draft_vocab=self.draft_vocab,
            rounds=rounds,
            accepted_length=(len(tokens) - 1) / rounds if rounds else None,
            accepted_histogram=effort.histogram,
            prefill_seconds=effort.prefill_seconds,
            decode_seconds=effort.decode_seconds,
            context_slots=self.context_slots,
            logprobs=logprobs,
        )

    def writer(self, request: Request) -> Writer:
        """What makes text of a request's tokens, up to a stop text of it."""
        return Writer(self.checkpoint.tokenizer, request.stop, self.checkpoint.stop_ids)

    def _new_caches(self, plan: Plan) -> Caches:
        where = functools.partial(mesh_parts.caches_on, plan)
        return mesh_parts.made(plan, lambda: new_caches(plan, self.capacity, self.runtime.dtype), where)

    def _take_caches(self) -> Caches | None:
        with self._lock:
            caches, self._caches = self._caches, None
        return caches

    def give_back(self, caches: Caches) -> None:
        """Take caches that a text no longer needs, for the next one to begin in."""
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(caches)):
            with self._lock:
                self._caches = caches
