"""`python -m train answers PROMPTS... --ckpt CKPT --out STORE`: let the target answer prompts.

A draft learns its target's own text far faster than it learns people's. The prompts are the first
user turns of conversations; the answers go, with the target's features, into a store that `train
eagle` reads. Many sequences are decoded side by side; a slot whose answer has ended takes the next
prompt, so that every pass stays full. The same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from frspec_jax import kv_cache, llama, sampling
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import ModelConfig, Sampling
from frspec_jax.defaults import defaults
from frspec_jax.errors import UserError
from frspec_jax.files import folder_lock
from frspec_jax.kv_cache import KVCache
from frspec_jax.llama import LlamaParams
from frspec_jax.placement import Placement
from frspec_jax.sampling import Draw, Rule, argument
from pallas_kernels.dispatch import Kernels
from train.corpus import corpus_files, read_corpus
from train.features import FeatureWriter

STEPS = 8  # tokens between two looks at the host
ROW = 32  # prompts are padded to whole multiples, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class AnswerSettings:
    """What is answered, how, and where it goes; the same settings go on where an interrupted run stopped.

    Raises:
      UserError: a figure that makes no sense, by its flag.
    """

    prompts: tuple[Path, ...]  # files or folders of conversations
    out: Path  # the store
    max_new_tokens: int = 224
    capacity: int = 384  # tokens of prompt and answer together
    slots: int = 64  # answers in the making at a time
    temperature: float = 0.0
    seed: int = 0
    dtype: str | None = None  # of the target; None: what suits the device
    limit_tokens: int | None = None  # of the store, more or less the last answer; None: all prompts are answered

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "slots", "limit_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if self.capacity < 64 or self.capacity % 64:
            raise UserError(f"--capacity {self.capacity} must be a multiple of 64")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed} must be a whole number from -2^63 to 2^63 - 1")
        Sampling(self.temperature)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", type=Path, metavar="PROMPTS", help="conversation files or folders")
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder of the target")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="STORE", help="the feature store to make or to add to"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=224, metavar="N", help="tokens of an answer at most (default: 224)"
    )
    parser.add_argument(
        "--capacity", type=int, default=384, metavar="N", help="tokens of prompt and answer together (default: 384)"
    )
    parser.add_argument(
        "--slots", type=int, default=64, metavar="B", help="answers in the making at a time (default: 64)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the target (default: bfloat16 on a GPU and on a CPU with AMX, else float32)",
    )
    parser.add_argument(
        "--limit-tokens", type=int, metavar="N", help="stop when the store holds N tokens, or little more"
    )


def run(args: argparse.Namespace) -> None:
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(AnswerSettings)}
    settings = AnswerSettings(**{**given, "prompts": tuple(args.prompts)})
    make_store(settings, Checkpoint.open(args.ckpt))


def make_store(settings: AnswerSettings, checkpoint: Checkpoint) -> None:
    """Let the target answer prompts into a store, or go on with one; no other process may meanwhile.

    Raises:
      UserError: the prompts cannot be read; the store is another target's, another process writes it, or the disk
        is full: what was answered stays, and the same command goes on.
    """
    files = corpus_files(settings.prompts)
    with folder_lock(settings.out, f"--out {settings.out}"):
        params = checkpoint.params(jnp.dtype(settings.dtype) if settings.dtype else defaults().dtype)
        with FeatureWriter(settings.out, checkpoint) as writer:
            _answer_files(settings, checkpoint, params, files, writer)
        print(f"{settings.out} holds {writer.tokens:,} tokens in {len(writer.sources):,} sequences")


def _answer_files(
    settings: AnswerSettings, checkpoint: Checkpoint, params: LlamaParams, files: list[Path], writer: FeatureWriter
) -> None:
    longest, limit = settings.capacity - 2 * STEPS, settings.limit_tokens
    promised: dict[int, int] = {}  # prompts that are being answered, and the tokens that each may come to

    def waiting() -> Iterator[tuple[int, list[int]] | None]:
        for number, text in enumerate(first_turns(files)):
            if number in writer.sources:
                continue
            ids = prompt_ids(checkpoint.tokenizer, text)
            if not 0 < len(ids) <= longest:
                continue
            # Answers in the making may fill the store already; where they stay short, there is room for another.
            while limit and writer.tokens + sum(promised.values()) >= limit:
                if not promised:
                    return
                yield None
            promised[number] = min(len(ids) + settings.max_new_tokens, settings.capacity)
            yield number, ids

    def keep(number: int, tokens: np.ndarray, prompt: int, features: np.ndarray) -> None:
        del promised[number]
        writer.append(number, tokens, (np.arange(len(tokens)) >= prompt).astype(np.uint8), features)

    total = limit or sum(1 for _ in first_turns(files))  # tokens of the store, or answers
    columns = (
        TextColumn("{task.fields[answers]:,} answers, {task.fields[stored]:,} tokens in the store"),
        BarColumn(20),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        begun = writer.tokens if limit else len(writer.sources)
        task = progress.add_task("", total=total, completed=begun, answers=0, stored=writer.tokens)
        done = [0]

        def show(answers: int, tokens: int) -> None:
            done[0] += answers
            at = writer.tokens if limit else len(writer.sources)
            progress.update(task, answers=done[0], stored=writer.tokens, completed=min(at, total))

        answer_prompts(
            params,
            checkpoint.config,
            waiting(),
            checkpoint.stop_ids,
            keep,
            slots=settings.slots,
            capacity=settings.capacity,
            max_new_tokens=settings.max_new_tokens,
            settings=Sampling(settings.temperature),
            seed=settings.seed,
            progress=show,
        )


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a prompt as inference gives it: by the chat template, or as it stands where there is none."""
    if not tokenizer.chat_template:
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids
    messages = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


def first_turns(files: Iterable[Path]) -> Iterator[str]:
    """The first thing that the user says in each conversation, once each, in the files' order."""
    seen: set[str] = set()
    for file in files:
        for record in read_corpus(file):
            text = next((text for role, text in record.turns if role == "user"), "").strip()
            if text and text not in seen:
                seen.add(text)
                yield text


@struct.dataclass
class Slots:
    """B sequences being decoded side by side."""

    cache: KVCache  # each array [B, kv_heads, S, head_dim]
    length: Array  # [B] int32, tokens in the cache
    last: Array  # [B] int32, the token to feed next
    source: Array  # [B] int32, the prompt's number: the `sequence` of its noise


@struct.dataclass
class Prompted:
    """A prompt for a slot."""

    tokens: Array  # [T] int32, padded
    count: Array  # int32, how many are real
    slot: Array  # int32
    source: Array  # int32, its number, which tells it apart in the sampling noise


# No kernel of ours: under vmap attention's would have a grid of four axes, and a slot's rows need not be a multiple of
# its blocks.
XLA = dataclasses.replace(Kernels.all("xla"), steady=False)


@functools.partial(jax.jit, static_argnames=("config", "rule"), donate_argnames=("slots",))
def _admit(
    params: LlamaParams, config: ModelConfig, rule: Rule, draw: Draw, slots: Slots, prompt: Prompted
) -> tuple[Slots, Array]:
    """Run a padded prompt of T tokens into one slot; its features [T, H]."""
    slot, count = prompt.slot, prompt.count
    own = jax.tree.map(lambda rows: lax.dynamic_index_in_dim(rows, slot, keepdims=False), slots.cache)
    where = Placement.chain(jnp.int32(0), prompt.tokens.shape[0])
    features, own = llama.forward(params, config, prompt.tokens, where, own, kernels=XLA)
    cache = jax.tree.map(lambda rows, row: lax.dynamic_update_index_in_dim(rows, row, slot, 0), slots.cache, own)
    last = llama.logits(params, config, features[count - 1][None])
    draw = dataclasses.replace(draw, sequence=prompt.source)
    first = sampling.choose(last, rule, draw, count[None], jnp.zeros(1, jnp.int32))[0]
    slots = Slots(
        cache,
        slots.length.at[slot].set(count),
        slots.last.at[slot].set(first),
        slots.source.at[slot].set(prompt.source),
    )
    return slots, features


@functools.partial(jax.jit, static_argnames=("config", "rule", "steps"), donate_argnames=("slots",))
def _decode(
    params: LlamaParams, config: ModelConfig, rule: Rule, draw: Draw, slots: Slots, steps: int
) -> tuple[Slots, Array, Array]:
    """Feed `steps` tokens to every slot: the tokens fed [steps, B] and their features [steps, B, H]."""

    def one(cache: KVCache, token: Array, length: Array) -> tuple[Array, KVCache]:
        features, cache = llama.forward(params, config, token[None], Placement.chain(length, 1), cache, kernels=XLA)
        return features[0], cache

    def step(slots: Slots, _: None) -> tuple[Slots, tuple[Array, Array]]:
        features, cache = jax.vmap(one)(slots.cache, slots.last, slots.length)
        scores = llama.logits(params, config, features)

        def following(row: Array, source: Array, position: Array) -> Array:
            mine = dataclasses.replace(draw, sequence=source)
            return sampling.choose(row[None], rule, mine, position[None], jnp.zeros(1, jnp.int32))[0]

        chosen = jax.vmap(following)(scores, slots.source, slots.length + 1)
        return Slots(cache, slots.length + 1, chosen, slots.source), (slots.last, features)

    slots, (tokens, features) = lax.scan(step, slots, None, length=steps)
    return slots, tokens, features


def loops(tokens: list[int], longest: int = 32, repeats: int = 3) -> bool:
    """Whether the text ends in the same `longest` or fewer tokens, said `repeats` times and 24 tokens in all."""
    for period in range(1, longest + 1):
        tail = max(repeats * period, 24)
        if len(tokens) >= tail and tokens[-tail:-period] == tokens[-tail + period :]:
            return True
    return False


def answer_prompts(
    params: LlamaParams,
    config: ModelConfig,
    prompts: Iterable[tuple[int, list[int]] | None],
    stop_ids: tuple[int, ...],
    keep: Callable[[int, np.ndarray, int, np.ndarray], None],
    *,
    slots: int = 64,
    capacity: int = 512,
    max_new_tokens: int = 256,
    settings: Sampling = Sampling(),
    seed: int = 0,
    steps: int = STEPS,
    progress: Callable[[int, int], None] = lambda sequences, tokens: None,
) -> None:
    """Answer every prompt, `slots` at a time.

    Args:
      prompts: (number, token ids) pairs; a prompt with no room for an answer is passed over. None: there is no prompt
        for now; when an answer has ended, it is asked for again.
      keep: called with (number, tokens [L], prompt length, features [L, H] float32) for each answer
        that has ended: by a stop id, at `max_new_tokens`, at the capacity, or in a loop.
      capacity: rows of each slot's cache, a multiple of 64. steps: tokens between two looks at the host.
      progress: called with (answers, tokens) since the last call.
    """
    shape = (slots, config.num_kv_heads, capacity, config.head_dim)
    dtype = kv_cache.stored(params.embedding.dtype)
    layers = tuple(kv_cache.LayerKV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))
    state = Slots(layers, *(jnp.zeros(slots, jnp.int32) for _ in range(3)))
    waiting: Iterator[tuple[int, list[int]] | None] = iter(prompts)
    running: dict[int, _Answer] = {}
    free = list(range(slots))
    rule, draw = sampling.rule_of(settings), Draw.of(settings, seed)
    while True:
        while free:
            following = next(waiting, None)
            if following is None:
                break
            number, prompt = following
            if not 0 < len(prompt) <= capacity - 2 * steps:
                continue
            slot = free.pop()
            padded = np.zeros(min(-(-len(prompt) // ROW) * ROW, capacity), np.int32)
            padded[: len(prompt)] = prompt
            admitted = Prompted(*(argument(x, np.int32) for x in (padded, len(prompt), slot, number)))
            state, features = _admit(params, config, rule, draw, state, admitted)
            running[slot] = _Answer(number, list(prompt), len(prompt), [np.asarray(features[: len(prompt)])])
        if not running:
            return
        state, tokens, features = _decode(params, config, rule, draw, state, steps)
        fed, rows = np.asarray(tokens), np.asarray(features)
        # A free slot keeps decoding what it held: its length must not run past the capacity.
        ended = 0
        for slot, answer in list(running.items()):
            if answer.take(fed[:, slot], rows[:, slot], stop_ids, max_new_tokens, capacity - steps):
                keep(answer.number, np.array(answer.tokens, np.int32), answer.prompt_length, answer.features())
                del running[slot]
                free.append(slot)
                ended += 1
        idle = jnp.asarray([slot not in running for slot in range(slots)])
        state = state.replace(length=jnp.where(idle, 0, state.length))
        progress(ended, steps * len(running))


class _Answer:
    """One answer in the making."""

    def __init__(self, number: int, tokens: list[int], prompt_length: int, rows: list[np.ndarray]) -> None:
        self.number, self.tokens, self.prompt_length, self._rows = number, tokens, prompt_length, rows

    def take(self, fed: np.ndarray, rows: np.ndarray, stop_ids: tuple[int, ...], limit: int, room: int) -> bool:
        """Add the tokens fed since the last look; whether the answer has ended (the stop id is not kept)."""
        stops = np.flatnonzero(np.isin(fed, stop_ids))
        count = int(stops[0]) if len(stops) else len(fed)
        self.tokens += fed[:count].tolist()
        self._rows.append(rows[:count])
        answered = len(self.tokens) - self.prompt_length
        return bool(len(stops)) or answered >= limit or len(self.tokens) >= room or loops(self.tokens)

    def features(self) -> np.ndarray:
        return np.concatenate(self._rows)
