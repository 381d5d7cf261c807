"""Load a checkpoint, generate, stream: the Python side of `python -m frspec_jax.generate`.

model = frspec_jax.load("CKPT")
print(model.generate("Why is the sky blue?").text)
for piece in model.stream("Why is the sky blue?", Request(sampling=Sampling(0.7), seed=1)):
    print(piece, end="", flush=True)
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers.decoders import DecodeStream

from frspec_jax import engine, tuned
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import VANILLA, Sampling, TreeConfig
from frspec_jax.drafters.base import Drafter, Vanilla
from frspec_jax.errors import UserError
from frspec_jax.kv_cache import rounded_capacity
from frspec_jax.llama import LlamaParams
from frspec_jax.vocabulary import Ranking, control_ids, sub_vocabulary, tokenizer_hash
from pallas_kernels.dispatch import AUTO, Kernels

Prompt = str | Sequence[Mapping[str, str]]  # text, or messages with "role" and "content"
ALL_ROUNDS = np.int32(2**30)


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What suits a kind of device, from measurements (README, section on speed)."""

    tree: TreeConfig
    dtype: Any
    chunk: int  # prompt tokens a pass


DEFAULTS = {
    # A pass over 4, 8 and 60 tokens costs a CPU about 1.5, 1.8 and 5 passes over one in float32; one with units for
    # products of bfloat16 (AMX) about 1.1, 1.2 and 3; and a GPU about one.
    "cpu": Defaults(TreeConfig(size=4, depth=2, top_k=2), jnp.float32, 64),
    "cpu with amx": Defaults(TreeConfig(size=8, depth=3, top_k=4), jnp.bfloat16, 64),
    "gpu": Defaults(TreeConfig(size=60, depth=6, top_k=10), jnp.bfloat16, 256),
}


def defaults(dtype: Any = None) -> Defaults:
    """The defaults of the device at hand, where weights are `dtype`; None: in the dtype that suits it best."""
    if jax.default_backend() != "cpu":
        return DEFAULTS["gpu"]
    wide = dtype is not None and jnp.dtype(dtype) != jnp.bfloat16
    return DEFAULTS["cpu with amx" if has_amx() and not wide else "cpu"]


@functools.cache
def has_amx(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies matrices of bfloat16 in hardware (Intel's Sapphire Rapids and later)."""
    try:
        return " amx_bf16" in cpuinfo.read_text()
    except OSError:
        return False  # not Linux


@dataclasses.dataclass(frozen=True)
class Request:
    """What may differ from one prompt to the next."""

    max_new_tokens: int = 512
    sampling: Sampling = Sampling()
    seed: int = 0
    raw: bool = False  # no chat template
    system: str | None = None  # the system message of a chat

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {self.max_new_tokens} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Result:
    """One answer, and how it came about."""

    text: str
    tokens: list[int]  # the stop id included, where one ended the answer
    prompt_tokens: int
    finish_reason: str  # "stop" or "length"
    method: str  # "vanilla", or "eagle", "eagle+fr" (cropped), "eagle+fr+copying"; ", lossy": typical acceptance
    draft_vocab: int | None  # V'; None where nothing drafts
    rounds: int
    accepted_length: float | None  # tokens a round, the bonus token counted; the first token is the prefill's
    accepted_histogram: list[int]  # rounds that emitted 1, 2, ... D+1 tokens
    prefill_seconds: float
    decode_seconds: float

    @property
    def decode_rate(self) -> float:
        """Tokens a second of decoding; the first token is the prefill's."""
        return (len(self.tokens) - 1) / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """One line for people."""
        line = (
            f"{len(self.tokens)} tokens ({self.finish_reason}); prefill {self.prefill_rate:.1f} tokens/s, "
            f"decode {self.decode_rate:.1f} tokens/s"
        )
        if self.draft_vocab is not None and self.accepted_length is not None:
            line += f"; accepted length {self.accepted_length:.2f} with bonus, V' = {self.draft_vocab:,}"
        return f"{line} [{self.method}]"


def load(
    ckpt: str | Path | Checkpoint,
    *,
    draft: str | None = None,
    draft_vocab: int | str | None = None,
    tree: TreeConfig | None = None,
    dtype: Any = None,
    context: int | None = None,
    chunk: int | None = None,
    target: LlamaParams | None = None,
    ranking: Path | None = None,
    kernels: Kernels = AUTO,
    draft_int8: bool = False,
    copying: bool = False,
) -> Generator:
    """Open a checkpoint folder and make it ready to generate.

    Args:
      draft: a draft's name or folder, "none" for vanilla decoding, or None for the only one there is.
      draft_vocab: V', "full", or None: a quarter of the vocabulary where the checkpoint has a ranking,
        or what `python -m eval tune` has found best on this device.
      tree: the draft tree's shape. dtype: of weights and caches. chunk: prompt tokens a pass.
        None stands for what suits the device (`defaults`).
      target: the weights, if they are loaded already: several models may share them.
      ranking: the file that sub-vocabularies are taken from (default: the checkpoint's ranking.npz).
      context: tokens that prompt, answer and draft tree may take together (default: at most 4096).
      kernels: implementations of attention and of the draft's head.
      draft_int8: round the draft's head to int8: half the bytes of bfloat16, and the same text.
      copying: let an EAGLE-2 draft propose what followed the same tokens earlier in the text (`drafters.copying`).

    Raises:
      UserError: with one sentence that says what to mend.
    """
    checkpoint = ckpt if isinstance(ckpt, Checkpoint) else Checkpoint.open(ckpt)
    best = defaults(dtype)
    dtype = best.dtype if dtype is None else dtype
    config = checkpoint.config
    if "pallas" in dataclasses.astuple(kernels) and jax.default_backend() != "gpu":
        raise UserError(
            f"--kernels pallas needs a CUDA GPU, and JAX found {jax.default_backend()}; use auto, xla or interpret"
        )
    if context is not None and not 1 <= context <= config.max_context:
        raise UserError(
            f"--context {context} is out of range; the model was trained for 1 to {config.max_context} tokens"
        )
    folder = None if draft == "none" else checkpoint.draft_folder(draft)
    target = checkpoint.params(dtype) if target is None else target
    drafter: Drafter = Vanilla()
    weights: Any = ()
    size: int | None = None
    method = "vanilla"
    if folder is None:
        if copying:
            raise UserError(f"--copying on needs a draft, and {checkpoint.path} has none; drop the flag or add one")
        if draft_vocab is not None:
            raise UserError(
                f"--draft-vocab {draft_vocab} needs a draft, and {checkpoint.path} has none; drop the flag or add one"
            )
        tree = VANILLA
    else:
        spec, params = checkpoint.draft(folder, dtype)
        known = spec.vocabulary(params)
        setting = tuned.read(folder, dtype)
        if draft_vocab is None and setting is not None and (ranking or checkpoint.path / "ranking.npz").is_file():
            draft_vocab = setting.draft_vocab
        ids = draft_ids(checkpoint, draft_vocab, known, ranking)
        tree = preferred_tree(checkpoint, draft, dtype) if tree is None else tree
        if tree.top_k > len(ids):
            raise UserError(f"--draft-top-k {tree.top_k} is larger than --draft-vocab {len(ids)}; lower it")
        if tree.size > 1:
            tree, size = spec.fit(tree), len(ids)
            method = spec.kind if size == (config.vocab_size if known is None else len(known)) else f"{spec.kind}+fr"
            method += "+copying" if copying else ""
            drafter, weights = spec.copies(copying).assemble(
                config, params, target.head, ids, kernels=kernels, int8=draft_int8
            )
    return Generator(
        checkpoint, engine.Weights(target, weights), drafter, tree, size, method, dtype,
        rounded_capacity(context or min(config.max_context, 4096)), chunk or best.chunk, kernels, folder,
    )  # fmt: skip


def preferred_tree(checkpoint: Checkpoint, draft: str | None, dtype: Any = None) -> TreeConfig:
    """The tree where none is asked for: what `python -m eval tune` found best on this device, or `defaults`."""
    folder = None if draft == "none" else checkpoint.draft_folder(draft)
    best = defaults(dtype)
    setting = None if folder is None else tuned.read(folder, best.dtype if dtype is None else dtype)
    return best.tree if setting is None else setting.tree


def draft_ids(
    checkpoint: Checkpoint,
    draft_vocab: int | str | None,
    known: np.ndarray | None = None,
    ranking_file: Path | None = None,
) -> np.ndarray:
    """The ids [V'] int32 that the draft may propose: `load`'s `draft_vocab`, resolved.

    known: ids that a draft with a vocabulary of its own is limited to. V' then counts among them.
    """
    vocab_size = checkpoint.config.vocab_size
    every = np.arange(vocab_size, dtype=np.int32) if known is None else known
    file = checkpoint.path / "ranking.npz" if ranking_file is None else ranking_file
    if draft_vocab is None:
        draft_vocab = min(vocab_size // 4, len(every)) if file.is_file() else "full"
    if draft_vocab == "full":
        return every
    size = int(draft_vocab)
    ranking = None
    if size != len(every):
        if ranking_file is None and not file.is_file():
            raise UserError(
                f"--draft-vocab {size} needs a ranking, and {checkpoint.path} has none; "
                f"count one: python -m train rank CORPUS --ckpt {checkpoint.path}"
            )
        ranking = Ranking.load(file)
        ranking.check(tokenizer_hash(checkpoint.tokenizer), vocab_size, file)
    always = control_ids(checkpoint.tokenizer, checkpoint.stop_ids, vocab_size)
    return sub_vocabulary(ranking, size, vocab_size, always, known)


@dataclasses.dataclass(frozen=True)
class Reading:
    """A prompt that has been run through target and draft, and the first token chosen."""

    state: engine.DecodeState
    prompt_tokens: int
    seconds: float  # that it took
    request: Request

    def copy(self) -> Reading:
        """One more to answer from."""
        return dataclasses.replace(self, state=jax.block_until_ready(jax.tree.map(jnp.copy, self.state)))


class Generator:
    """A loaded model; `load` makes one. Not for use from several threads at once: it owns one set of caches."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: engine.Weights,
        drafter: Drafter,
        tree: TreeConfig,
        draft_vocab: int | None,
        method: str,
        dtype: Any,
        capacity: int,
        chunk: int,
        kernels: Kernels = AUTO,
        draft_folder: Path | None = None,
    ) -> None:
        self.checkpoint, self.weights, self.drafter, self.tree = checkpoint, weights, drafter, tree
        self.draft_vocab, self.method = draft_vocab, method
        self.capacity, self.chunk, self.kernels = capacity, chunk, kernels
        self.draft_folder = draft_folder
        self._dtype = dtype
        self._caches: engine.Caches | None = None
        self._warm: set[engine.Plan] = set()

    @property
    def dtype_name(self) -> str:
        """The dtype of weights and products: "float32" or "bfloat16"."""
        return jnp.dtype(self._dtype).name

    def plan(self, sampling: Sampling) -> engine.Plan:
        """What is compiled for these sampling settings."""
        return engine.Plan(
            self.checkpoint.config, self.drafter, self.tree, sampling, self.checkpoint.stop_ids, self.kernels
        )

    def encode(self, prompt: Prompt, request: Request = Request()) -> np.ndarray:
        """A prompt as token ids [T] int32: through the chat template, unless the request or the model is raw."""
        tokenizer = self.checkpoint.tokenizer
        text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
        if not text.strip():
            raise UserError("the prompt is empty; give some text with --prompt, --prompt-file or on standard input")
        if request.raw or not tokenizer.chat_template:
            if request.system is not None:
                raise UserError("--system needs a chat template; the model has none, or --raw switches it off")
            return np.asarray(tokenizer(text).input_ids, np.int32)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if request.system is not None:
            messages = [{"role": "system", "content": request.system}, *messages]
        return np.asarray(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False), np.int32
        )

    def check(self, ids: np.ndarray, request: Request = Request()) -> int:
        """How many tokens may be emitted after a prompt; refuses one that does not fit the cache."""
        room = self.capacity - len(ids) - self.plan(request.sampling).margin
        if room < 1:
            raise UserError(
                f"the prompt has {len(ids)} tokens, and --context {self.capacity} leaves room for "
                f"{len(ids) + room - 1} beside the draft tree; shorten it or raise --context"
            )
        return min(request.max_new_tokens, room)

    def warm_up(self, sampling: Sampling = Sampling()) -> None:
        """Compile what these settings need, so that no request's time holds it."""
        plan = self.plan(sampling)
        if plan not in self._warm:
            state = self._start(plan, np.zeros(1, np.int32), 2, 0)
            self._finish(engine.run(plan, self.weights, state, np.int32(0)))
            self._warm.add(plan)

    def generate(self, prompt: Prompt, request: Request = Request()) -> Result:
        """Answer one prompt."""
        return self.generate_ids(self.encode(prompt, request), request)

    def generate_ids(self, ids: np.ndarray, request: Request = Request()) -> Result:
        """Answer one prompt that is token ids [T] already."""
        return self.answer(self.read(ids, request))

    def read(self, ids: np.ndarray, request: Request = Request()) -> Reading:
        """Run a prompt of token ids [T]; `answer` goes on from there."""
        plan, limit = self._admit(ids, request)
        begin = time.perf_counter()
        state = jax.block_until_ready(self._start(plan, ids, limit, request.seed))
        return Reading(state, len(ids), time.perf_counter() - begin, request)

    def answer(self, reading: Reading) -> Result:
        """Decode after a prompt that this model read, or one with the same `reads_as`; uses the reading up."""
        plan = self.plan(reading.request.sampling)
        self.warm_up(reading.request.sampling)
        begin = time.perf_counter()
        state = jax.block_until_ready(engine.run(plan, self.weights, reading.state, ALL_ROUNDS))
        seconds = time.perf_counter() - begin
        result = self._result(state, reading.prompt_tokens, reading.seconds, seconds, reading.request)
        self._finish(state)
        return result

    def reads_as(self, request: Request = Request()) -> Hashable:
        """Models that agree in this read a prompt alike: what V' keeps matters only once a draft proposes."""
        return id(self.weights.target), self.draft_folder, self.plan(request.sampling), self.capacity, self.chunk

    def stream(self, prompt: Prompt, request: Request = Request()) -> Stream:
        """Answer one prompt, text as it comes: iterate over the pieces, then read `.result`."""
        return Stream(self, self.encode(prompt, request), request)

    # What Stream shares with generate_ids.

    def _admit(self, ids: np.ndarray, request: Request) -> tuple[engine.Plan, int]:
        """The plan, compiled, and how many tokens may be emitted."""
        limit = self.check(ids, request)
        self.warm_up(request.sampling)
        return self.plan(request.sampling), limit

    def _start(self, plan: engine.Plan, ids: np.ndarray, limit: int, seed: int) -> engine.DecodeState:
        caches = self._caches or engine.new_caches(plan, self.capacity, self._dtype)
        self._caches = None  # donated; a request that is cut off leaves none, and the next makes new ones
        return engine.start(plan, self.weights, caches, ids, chunk=self.chunk, limit=limit, seed=seed)

    def _finish(self, state: engine.DecodeState) -> None:
        self._caches = state.caches

    def _result(
        self, state: engine.DecodeState, prompt: int, prefill: float, decode: float, request: Request
    ) -> Result:
        tokens = np.asarray(state.output)[: int(state.emitted)].tolist()
        rounds = int(state.rounds)
        return Result(
            text=self.checkpoint.tokenizer.decode(tokens, skip_special_tokens=True),
            tokens=tokens,
            prompt_tokens=prompt,
            finish_reason="stop" if int(state.finished) == engine.STOPPED else "length",
            method=f"{self.method}, lossy" if request.sampling.typical else self.method,
            draft_vocab=self.draft_vocab,
            rounds=rounds,
            accepted_length=(len(tokens) - 1) / rounds if rounds else None,
            accepted_histogram=np.asarray(state.histogram).tolist(),
            prefill_seconds=prefill,
            decode_seconds=decode,
        )


class Stream:
    """An answer in the making: an iterator over pieces of text, one a round; `result` once it has ended."""

    def __init__(self, generator: Generator, ids: np.ndarray, request: Request) -> None:
        self._generator, self._ids, self._request = generator, ids, request
        self.result: Result | None = None

    def __iter__(self) -> Iterator[str]:
        model, ids = self._generator, self._ids
        plan, limit = model._admit(ids, self._request)
        decoder = DecodeStream(skip_special_tokens=True)
        tokenizer = model.checkpoint.tokenizer.backend_tokenizer
        begin = time.perf_counter()
        state = jax.block_until_ready(model._start(plan, ids, limit, self._request.seed))
        prefill, decode, shown, written = time.perf_counter() - begin, 0.0, 0, ""
        while True:
            emitted = int(state.emitted)
            fresh = np.asarray(state.output)[shown:emitted].tolist()
            piece = "".join(part for token in fresh if (part := decoder.step(tokenizer, token)))
            shown, written = emitted, written + piece
            if piece:
                yield piece
            if int(state.finished) != engine.RUNNING:
                break
            begin = time.perf_counter()
            state = jax.block_until_ready(engine.run(plan, model.weights, state, np.int32(1)))
            decode += time.perf_counter() - begin
        self.result = model._result(state, len(ids), prefill, decode, self._request)
        model._finish(state)
        rest = self.result.text[len(written) :]
        if rest and self.result.text.startswith(written):  # bytes that never became a whole character
            yield rest
