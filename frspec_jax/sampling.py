"""From logits to tokens: temperature, top-k, top-p, min-p, and noise that depends on the position alone.

A token is drawn as argmax(filtered logits + Gumbel noise), which is an exact draw from the softmax.
The noise for the token at absolute position p is a function of (seed, sequence, p): whoever asks for
that token, vanilla decoding or the verification of any tree, draws the same one.

Every figure is an array, so another temperature is the same program. Static is only the `Rule`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from frspec_jax.config import Sampling
from frspec_jax.together import ALONE, Together
from pallas_kernels import largest

MASKED = -jnp.inf
FEW = 256  # best logits that filters look at before they sort all: 1.4 ms instead of 250 on a CPU, for 8 rows of 49k

# How a pass's tokens are chosen. "greedy" draws no noise. "sampled" draws it, and takes the best token for a request
# whose temperature is 0. "typical" samples too, and accepts by Medusa's rule, which is lossy. "mixed" is for texts
# of which each goes its own way: "sampled", but where all are greedy no noise is drawn.
Rule = Literal["greedy", "sampled", "typical", "mixed"]


def argument(value: Any, dtype: Any) -> Any:
    """A number or a list of them as an argument of a compiled program, which moves it to the device itself."""
    return np.asarray(value, dtype)


def rule_of(sampling: Sampling) -> Rule:
    """The rule that a request needs."""
    return "typical" if sampling.typical else "greedy" if sampling.greedy else "sampled"


@struct.dataclass
class SamplingArrays:
    """The figures of a `Sampling`, as arguments of the compiled program."""

    temperature: Array  # float32
    top_k: Array  # int32; 0: off
    top_p: Array  # float32; 1: off
    min_p: Array  # float32; 0: off
    typical: Array  # float32, e of typical acceptance; read under the rule "typical" alone

    @classmethod
    def of(cls, sampling: Sampling) -> SamplingArrays:
        return cls(
            temperature=argument(sampling.temperature, np.float32),
            top_k=argument(min(sampling.top_k, 2**31 - 1), np.int32),
            top_p=argument(sampling.top_p, np.float32),
            min_p=argument(sampling.min_p, np.float32),
            typical=argument(sampling.typical, np.float32),
        )


def seed_words(seed: int) -> Any:
    """A seed of 64 bits, -2^63 to 2^63 - 1, as the two words of a threefry key: uint32 [2], distinct for each seed.

    Seeds of 32 bits have 0 as their first word, as `jax.random.key` gives them.
    """
    low = (seed + 2**31) % 2**32 - 2**31  # the last 32 bits, signed
    return argument([((seed - low) >> 32) % 2**32, low % 2**32], np.uint32)


def gumbel_rows(seed: Array, sequence: Array, positions: Array, vocab_size: int) -> Array:
    """Gumbel noise [P, V], float32, for the tokens at `positions` [P] of a sequence.

    seed: [2] uint32, of `seed_words`. sequence: int32 scalar, tells apart the members of a batch.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), sequence)
    keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)
    return jax.vmap(lambda k: jax.random.gumbel(k, (vocab_size,), jnp.float32))(keys)


def warp(logits: Array, by: SamplingArrays, together: Together = ALONE) -> Array:
    """Temperature, then top-k, then top-p, then min-p, as transformers' warpers: removed tokens become -inf.

    logits: [N, V] float32. Tokens that tie with the last kept one are kept too.
    """
    logits = logits / jnp.where(by.temperature > 0, by.temperature, 1.0)
    filters = (by.top_p < 1) | ((by.top_k > 0) & (by.top_k < logits.shape[-1])) | (by.min_p > 0)
    filters &= by.temperature > 0
    least = lax.cond(
        together.any(filters),
        lambda logits, by: jnp.where(filters, least_kept(logits, by, together), MASKED),
        lambda logits, by: jnp.full((logits.shape[0], 1), MASKED),
        logits,
        by,
    )
    return jnp.where(logits < least, MASKED, logits)


def least_kept(logits: Array, by: SamplingArrays, together: Together = ALONE) -> Array:
    """The least logit of each row that the filters keep, [N, 1]; logits: [N, V].

    The `FEW` best logits tell, unless top-k asks for more, or a row is so flat that they do not add up to top-p. Then
    all are sorted, for the rows that need it: what a row keeps may not depend on the rows beside it.
    """
    few = min(FEW, logits.shape[-1])
    best = largest.top_k(logits, few)[0]
    limited = (by.top_k > 0) & (by.top_k <= few)
    among = ~limited | (jnp.arange(few, dtype=jnp.int32) < by.top_k)
    # Shares among what top-k leaves, which are then all here, or among all.
    whole = jnp.where(
        limited,
        jax.nn.logsumexp(jnp.where(among, best, MASKED), axis=-1, keepdims=True),
        jax.nn.logsumexp(logits, axis=-1, keepdims=True),
    )
    least, mass = least_of_nucleus(jnp.where(among, best, MASKED), whole, by)
    every = (by.top_k <= 0) & (by.top_p >= 1)  # neither of the two removes any
    least = jnp.where(every, MASKED, least)
    enough = every | limited | ((by.top_k <= 0) & (mass >= by.top_p)) | (few == logits.shape[-1])  # [N, 1]

    def of_all(logits: Array) -> Array:
        ranked = -jnp.sort(-logits, axis=-1)
        kept = (by.top_k <= 0) | (jnp.arange(ranked.shape[-1], dtype=jnp.int32) < by.top_k)
        ranked = jnp.where(kept, ranked, MASKED)
        return least_of_nucleus(ranked, jax.nn.logsumexp(ranked, axis=-1, keepdims=True), by)[0]

    least = jnp.where(enough, least, lax.cond(together.all(enough.all()), lambda _: least, of_all, logits))
    # min-p asks after the best token alone, which no filter removes: log P below the best logit.
    return jnp.maximum(least, best[:, :1] + jnp.log(by.min_p))


def least_of_nucleus(ranked: Array, whole: Array, by: SamplingArrays) -> tuple[Array, Array]:
    """Of logits [N, R] in descending order, the least that top-p keeps, and the share that all R have: [N, 1] each.

    whole: [N, 1], the logarithm of what exponentials are divided by. A token stays if those before it have less than P.
    """
    shares = jnp.exp(ranked - whole)
    mass = jnp.cumsum(shares, axis=-1)
    first = jnp.arange(ranked.shape[-1], dtype=jnp.int32) == 0  # the best token stays, whatever rounding says
    stays = (ranked > MASKED) & ((by.top_p >= 1) | (mass - shares < by.top_p) | first)
    return jnp.min(jnp.where(stays, ranked, jnp.inf), axis=-1, keepdims=True), mass[:, -1:]


def typical(logits: Array, by: SamplingArrays, tokens: Array, parent: Array) -> Array:
    """Which drafted tokens Medusa's typical acceptance takes: bool [N]. LOSSY: the text is no longer the target's law.

    A token passes if its probability after its parent is above min(e, sqrt(e) exp(-H)), where H is the entropy
    there and e is `by.typical`: a flat distribution lets more pass (arXiv 2401.10774, section 2.3.1).

    Args:
      logits: [N, V] float32, the target's after each node. tokens, parent: [N], the nodes' own, the root's ignored.
    """
    logs = jax.nn.log_softmax(warp(logits, by), axis=-1)
    entropy = -jnp.where(logs > MASKED, jnp.exp(logs) * logs, 0.0).sum(-1)
    bar = jnp.minimum(by.typical, jnp.sqrt(by.typical) * jnp.exp(-entropy))
    return jnp.exp(logs[parent, tokens]) > bar[parent]


@struct.dataclass
class Draw:
    """Whose draws: the figures they follow, and the noise that they meet."""

    by: SamplingArrays
    seed: Array  # [2] uint32, of `seed_words`
    sequence: Array  # int32, tells apart the members of a batch in the noise

    @classmethod
    def of(cls, sampling: Sampling, seed: int, sequence: int = 0) -> Draw:
        return cls(SamplingArrays.of(sampling), seed_words(seed), argument(sequence, np.int32))


def scored(logits: Array, draw: Draw, positions: Array, row: Array, together: Together = ALONE) -> Array:
    """What a sampled choice is the argmax of: [N, V] float32, filtered logits with their noise.

    Args: as those of `choose`.
    """
    noise = gumbel_rows(draw.seed, draw.sequence, positions, logits.shape[-1])
    return jnp.where(draw.by.temperature > 0, warp(logits, draw.by, together) + noise[row], logits)


@dataclasses.dataclass(frozen=True)
class Adjusting:
    """What a request does to logits [N, V] before one of each row is chosen."""

    wanted: Array  # bool, whether it changes anything, for any of the texts that are chosen for together
    apply: Callable[[Array], Array]


def choose(
    logits: Array,
    rule: Rule,
    draw: Draw,
    positions: Array,
    row: Array,
    together: Together = ALONE,
    adjusting: Adjusting | None = None,
) -> Array:
    """The token that the target says after each of N nodes: int32 [N].

    Args:
      logits: [N, V] float32.
      positions: [P] int32, the distinct absolute positions that are being filled.
      row: [N] int32, which of `positions` each node's next token has. Nodes of one depth share
        their noise: only one of them can be on the emitted path, and drafting never sees it.
      adjusting: penalties and biases of the request; None: it can have none.
    """

    def way(adjusts: bool, draws: bool) -> Callable[[Array], Array]:
        def choice(logits: Array) -> Array:
            if adjusts and adjusting is not None:
                logits = adjusting.apply(logits)
            if draws:
                logits = scored(logits, draw, positions, row, together)
            return largest.argmax(logits)

        return choice

    with jax.named_scope("choose"):
        may_adjust = [False] if adjusting is None else [False, True]
        may_draw = [rule != "greedy"] if rule != "mixed" else [False, True]
        ways = [way(adjusts, draws) for adjusts in may_adjust for draws in may_draw]
        index = jnp.int32(0) if adjusting is None else adjusting.wanted.astype(jnp.int32) * len(may_draw)
        if rule == "mixed":
            index += together.any(draw.by.temperature > 0).astype(jnp.int32)
        # One branch that gives back tokens: one that gives logits copies all of them, and a GPU's host waits for each.
        return ways[0](logits) if len(ways) == 1 else lax.switch(index, ways, logits)
