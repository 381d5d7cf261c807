"""The model answers prompts, hundreds side by side, into a store that a draft is trained on.

`python -m train answers` gives each prompt a slot as one gets free, which suits a CPU: there a pass over a prompt is
much work. A GPU would wait for the host between prompts; here a whole batch is read in one pass, and decoded until
nearly all of its answers have ended.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks.gpu_check.material import Amounts, amounts_of, checkpoint_of, prompts
from benchmarks.gpu_check.runner import Session
from frspec_jax import kv_cache, llama
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import ModelConfig
from frspec_jax.defaults import defaults
from frspec_jax.kv_cache import KVCache
from frspec_jax.llama import LlamaParams
from frspec_jax.placement import Placement
from frspec_jax.vocabulary import Ranking, tokenizer_hash
from pallas_kernels.dispatch import Kernels
from train.answers import loops
from train.features import FeatureStore, FeatureWriter
from train.rank import answer_counts

# Under vmap a kernel would get a grid of its own; XLA's attention has a batch axis.
PLAIN = dataclasses.replace(Kernels.all("xla"), steady=False)
ENDED = 0.97  # of a batch: the last few answers are cut, for all others would wait for them
Encoded = tuple[int, list[int]]  # a prompt's number and its tokens


def answers(session: Session) -> None:
    """Answer prompts for as long as the time allows; rank the answers' tokens."""
    amounts, checkpoint = amounts_of(session), checkpoint_of(session)
    params = checkpoint.params(defaults().dtype)
    begun = time.monotonic()
    seconds = amounts.answer_share * session.left
    encoded = list(enumerate(_encoded(checkpoint, prompts(session))))
    session.tell("prompts", {"count": len(encoded), "tokenizing_seconds": round(time.monotonic() - begun, 1)})
    shortest = 0
    with FeatureWriter(session.work / "store", checkpoint) as writer, concurrent.futures.ThreadPoolExecutor(1) as pool:
        for number, (longest, side_by_side) in enumerate(amounts.batches, 1):
            until = begun + seconds * number / len(amounts.batches)
            fitting = [prompt for prompt in encoded if shortest < len(prompt[1]) <= longest]
            shortest, written = longest, pool.submit(lambda: None)
            cache = _caches(checkpoint.config, params, side_by_side, longest + amounts.new_tokens)
            for at in range(0, len(fitting), side_by_side):
                if time.monotonic() > until:
                    break
                group = fitting[at : at + side_by_side]
                cache, *found = _answered(params, checkpoint, amounts, cache, group, longest, side_by_side)
                written.result()  # one batch is written while the next is decoded, and no more wait
                written = pool.submit(_write, writer, group, *found, checkpoint.stop_ids)
            written.result()
            tokens = {"sequences": len(writer.sources), "tokens": writer.tokens}
            session.tell(f"prompts of up to {longest}", tokens | {"seconds": round(time.monotonic() - begun, 1)})
    counts = answer_counts(FeatureStore(session.work / "store", checkpoint), checkpoint.config.vocab_size)
    ranking = Ranking(counts, tokenizer_hash(checkpoint.tokenizer), ("the model's own answers",))
    for folder in (checkpoint.path, session.out):
        ranking.save(folder / "ranking.npz")
    session.tell("answer_tokens", ranking.tokens)


def _encoded(checkpoint: Checkpoint, texts: list[str]) -> list[list[int]]:
    """Prompts through the chat template; as text first, since many texts are tokenized at once in threads."""
    tokenizer = checkpoint.tokenizer
    chats = [[{"role": "user", "content": text}] for text in texts]
    written = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    return tokenizer(written, add_special_tokens=False).input_ids


def _caches(config: ModelConfig, params: LlamaParams, count: int, capacity: int) -> KVCache:
    """Empty caches of `count` sequences; in steps of 64 rows, since every row is read in every step."""
    shape = (count, config.num_kv_heads, -(-capacity // 64) * 64, config.head_dim)
    dtype = kv_cache.stored(params.embedding.dtype)
    return tuple(kv_cache.LayerKV(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(config.num_layers))


def _answered(
    params: LlamaParams,
    checkpoint: Checkpoint,
    amounts: Amounts,
    cache: KVCache,
    group: list[Encoded],
    longest: int,
    side_by_side: int,
) -> tuple[KVCache, Array, list[Array], list[Array]]:
    """The cache, the prompts' features, and by stretches of steps the tokens fed and their features."""
    tokens, counts = np.zeros((side_by_side, longest), np.int32), np.ones(side_by_side, np.int32)
    for row, (_, prompt) in enumerate(group):
        tokens[row, : len(prompt)], counts[row] = prompt, len(prompt)
    config, stops = checkpoint.config, jnp.array(checkpoint.stop_ids, jnp.int32)
    cache, read, last = _read(params, config, cache, tokens, counts)
    lengths, done = jnp.asarray(counts), jnp.arange(side_by_side) >= len(group)
    fed, features = [], []
    for _ in range(amounts.new_tokens // amounts.steps):
        cache, last, lengths, done, out = _decoded(
            params, config, cache, last, lengths, done, stops, steps=amounts.steps
        )
        fed.append(out[0])
        features.append(out[1])
        if float(done.mean()) > ENDED:
            break
    return cache, read, fed, features


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def _read(
    params: LlamaParams, config: ModelConfig, cache: KVCache, tokens: Array, counts: Array
) -> tuple[KVCache, Array, Array]:
    """Prompts [B, T] into the cache: their features [B, T, H], and the greedy next token of each [B]."""

    def one(cache: KVCache, tokens: Array) -> tuple[Array, KVCache]:
        where = Placement.chain(jnp.int32(0), tokens.shape[0])
        return llama.forward(params, config, tokens, where, cache, kernels=PLAIN)

    features, cache = jax.vmap(one)(cache, tokens)
    last = jnp.take_along_axis(features, (counts - 1)[:, None, None], axis=1)[:, 0]
    return cache, features, jnp.argmax(llama.logits(params, config, last), -1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "steps"), donate_argnames=("cache",))
def _decoded(
    params: LlamaParams,
    config: ModelConfig,
    cache: KVCache,
    last: Array,
    lengths: Array,
    done: Array,
    stops: Array,
    steps: int,
) -> Any:
    """`steps` greedy tokens of every sequence; out: the tokens fed [steps, B] and their features [steps, B, H]."""

    def one(cache: KVCache, token: Array, length: Array) -> tuple[Array, KVCache]:
        features, cache = llama.forward(params, config, token[None], Placement.chain(length, 1), cache, kernels=PLAIN)
        return features[0], cache

    def step(carry: Any, _: None) -> Any:
        cache, last, lengths, done = carry
        features, cache = jax.vmap(one)(cache, last, lengths)
        following = jnp.argmax(llama.logits(params, config, features), -1).astype(jnp.int32)
        return (cache, following, lengths + 1, done | jnp.isin(last, stops)), (last, features)

    (cache, last, lengths, done), out = lax.scan(step, (cache, last, lengths, done), None, length=steps)
    return cache, last, lengths, done, out


def _write(
    writer: FeatureWriter,
    group: list[Encoded],
    read: Array,
    fed: list[Array],
    features: list[Array],
    stop_ids: tuple[int, ...],
) -> None:
    """Put a batch into the store: each answer up to its stop id, or to where it shows that it goes in circles."""
    prompt_rows = np.asarray(read.astype(jnp.float16))
    tokens = np.concatenate([np.asarray(part) for part in fed])
    rows = np.concatenate([np.asarray(part.astype(jnp.float16)) for part in features])
    for column, (number, prompt) in enumerate(group):
        stops = np.flatnonzero(np.isin(tokens[:, column], stop_ids))
        answer = tokens[: stops[0] if len(stops) else None, column].tolist()
        if loops(answer):
            answer = answer[: next(n for n in range(24, len(answer) + 1) if loops(answer[:n]))]
        if len(answer) < 4:
            continue
        whole = np.array(prompt + answer, np.int32)
        both = np.concatenate([prompt_rows[column, : len(prompt)], rows[: len(answer), column]])
        writer.append(number, whole, (np.arange(len(whole)) >= len(prompt)).astype(np.uint8), both)
