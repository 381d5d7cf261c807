"""A loaded model that answers: `Generator`, and `Text`, one answer in the making, which everything that decodes drives.

with model.begin(ids, request) as text:
    text.advance()          # to its end; or advance(1), a round at a time
    print(text.tokens, text.result().text)
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from frspec_jax import engine, mesh_parts, pace_tables, prefill
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.detokenizer import text_of
from frspec_jax.drafting import Drafting
from frspec_jax.errors import UserError
from frspec_jax.kv_cache import BLOCK, rounded_capacity
from frspec_jax.likelihood import Likelihood, Likely
from frspec_jax.penalties import Bearing, Penalties
from frspec_jax.plan import Plan
from frspec_jax.prefill import Chunks
from frspec_jax.request import Effort, Prompt, Request, Result, Settings, asked_of
from frspec_jax.sampling import rule_of
from frspec_jax.sharding import AXIS, agreed
from frspec_jax.state import FULL, RUNNING, STOPPED, Asked, Caches, DecodeState, Weights, new_caches
from frspec_jax.writer import Writer
from pallas_kernels.dispatch import AUTO, Kernels

ALL_ROUNDS = 2**30


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a model runs, whatever drafts."""

    dtype: Any  # of weights and caches
    context: int  # tokens of prompt and answer together, at most
    chunks: Chunks  # of a prompt
    kernels: Kernels = AUTO
    mesh: Mesh | None = None  # over whose devices the target is divided

    def __post_init__(self) -> None:
        short = self.chunks.short
        if not 1 <= short <= BLOCK or BLOCK % short:
            raise UserError(f"--chunk {short} must divide {BLOCK}: 1, 2, 4, ... or {BLOCK} prompt tokens a pass")

    @property
    def of_target(self) -> Kernels:
        """The kernels of the target, whose layers may be divided; a drafter's never are."""
        return self.kernels if self.mesh is None else dataclasses.replace(self.kernels, axis=AXIS)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt that has been run through target and draft, and the first token chosen; any number of texts begin so."""

    state: DecodeState
    prompt_tokens: int
    seconds: float  # that it took
    request: Request


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
        """
        tokenizer = self.checkpoint.tokenizer
        text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
        raw = request.raw or not tokenizer.chat_template
        if not (text if raw else text.strip()):
            raise UserError("the prompt is empty; give some text")
        if raw:
            if request.system is not None:
                raise UserError("--system needs a chat template; the model has none, or --raw switches it off")
            return np.asarray(tokenizer(text).input_ids, np.int32)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if request.system is not None:
            messages = [{"role": "system", "content": request.system}, *messages]
        return self._templated(messages, tools)

    def _templated(self, messages: list[Any], tools: list[Any] | None) -> np.ndarray:
        """Messages through the chat template, which may be broken, or refuse them in words of its own."""
        try:
            ids = self.checkpoint.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, return_dict=False
            )
        except Exception as error:  # a template may raise anything: it is a program
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"the chat template of {self.checkpoint.path} cannot say these messages ({reason[:200]}); "
                "mend chat_template.jinja, or use --raw"
            ) from None
        if not ids:
            raise UserError(
                f"the chat template of {self.checkpoint.path} makes nothing of these messages; "
                "mend chat_template.jinja, or use --raw"
            )
        return np.asarray(ids, np.int32)

    def check(self, ids: Sequence[int] | np.ndarray, request: Request = Request()) -> int:
        """How many tokens may be emitted after a prompt of ids [T].

        Raises:
          UserError: they are no token ids, or leave no room in the context.
        """
        context, vocab_size = self.runtime.context, self.checkpoint.config.vocab_size
        given = np.asarray(ids)
        if given.ndim != 1 or not given.size or not np.issubdtype(given.dtype, np.integer):
            raise UserError(f"ids must be a list of at least one token id, and are {str(ids)[:60]}")
        if given.min() < 0 or given.max() >= vocab_size:
            wrong = int(given[(given < 0) | (given >= vocab_size)][0])
            token = self.checkpoint.tokenizer.convert_ids_to_tokens(wrong) if wrong >= 0 else None
            if token is not None:  # the tokenizer knows more than the model
                raise UserError(
                    f"the prompt holds the token {token!r}, whose id {wrong} the model has no embedding for (its ids "
                    f"are 0 to {vocab_size - 1}); leave it out"
                )
            raise UserError(f"ids hold {wrong}, and the model's token ids are 0 to {vocab_size - 1}")
        if len(given) >= context:
            raise UserError(
                f"the prompt has {len(given)} tokens, and --context {context} leaves room for at most {context - 1} "
                "and an answer; shorten it or raise --context"
            )
        return min(request.max_new_tokens, context - len(given))

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
        return mesh_parts.made(plan, lambda: new_caches(plan, self.capacity, self.runtime.dtype), mesh_parts.caches_on)

    def _take_caches(self) -> Caches | None:
        with self._lock:
            caches, self._caches = self._caches, None
        return caches

    def give_back(self, caches: Caches) -> None:
        """Take caches that a text no longer needs, for the next one to begin in."""
        if not any(leaf.is_deleted() for leaf in jax.tree.leaves(caches)):
            with self._lock:
                self._caches = caches


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
