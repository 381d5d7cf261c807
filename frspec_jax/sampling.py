"""From logits to tokens: temperature, top-k, top-p, and noise that depends on the position alone.

A token is drawn as argmax(filtered logits + Gumbel noise), which is an exact draw from the softmax.
The noise for the token at absolute position p is a function of (seed, sequence, p): whoever asks for
that token, vanilla decoding or the verification of any tree, draws the same one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from frspec_jax.config import Sampling

MASKED = -jnp.inf


def gumbel_rows(seed: Array, sequence: Array, positions: Array, vocab_size: int) -> Array:
    """Gumbel noise [P, V], float32, for the tokens at `positions` [P] of a sequence.

    seed, sequence: int32 scalars; the sequence number tells apart the members of a batch.
    """
    key = jax.random.fold_in(jax.random.key(seed), sequence)
    keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)
    return jax.vmap(lambda k: jax.random.gumbel(k, (vocab_size,), jnp.float32))(keys)


def warp(logits: Array, sampling: Sampling) -> Array:
    """Temperature, then top-k, then top-p, as transformers' warpers: removed tokens become -inf.

    logits: [N, V] float32. Tokens that tie with the last kept one are kept too.
    """
    logits = logits / sampling.temperature
    cut, vocab_size = sampling.top_p < 1, logits.shape[-1]
    if 0 < sampling.top_k < vocab_size:
        ranked = lax.top_k(logits, sampling.top_k)[0][:, ::-1]  # top-p then has only these to look at
        least = ranked[:, :1]
    elif cut:
        ranked = jnp.sort(logits, axis=-1)
        least = ranked[:, :1]
    else:
        return logits
    if cut:
        tail = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)  # ascending: the tail that is cut comes first
        keep = (tail > 1 - sampling.top_p).at[:, -1].set(True)  # the best token stays, whatever rounding says
        least = jnp.min(jnp.where(keep, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < least, MASKED, logits)


def typical(logits: Array, sampling: Sampling, tokens: Array, parent: Array) -> Array:
    """Which drafted tokens Medusa's typical acceptance takes: bool [N]. LOSSY: the text is no longer the target's law.

    A token passes if its probability after its parent is above min(e, sqrt(e) exp(-H)), where H is the entropy
    there and e is `sampling.typical`: a flat distribution lets more pass (arXiv 2401.10774, section 2.3.1).

    Args:
      logits: [N, V] float32, the target's after each node. tokens, parent: [N], the nodes' own, the root's ignored.
    """
    logs = jax.nn.log_softmax(warp(logits, sampling), axis=-1)
    entropy = -jnp.where(logs > MASKED, jnp.exp(logs) * logs, 0.0).sum(-1)
    bar = jnp.minimum(sampling.typical, sampling.typical**0.5 * jnp.exp(-entropy))
    return jnp.exp(logs[parent, tokens]) > bar[parent]


def choose(logits: Array, sampling: Sampling, seed: Array, sequence: Array, positions: Array, row: Array) -> Array:
    """The token that the target says after each of N nodes: int32 [N].

    Args:
      logits: [N, V] float32.
      positions: [P] int32, the distinct absolute positions that are being filled.
      row: [N] int32, which of `positions` each node's next token has. Nodes of one depth share
        their noise: only one of them can be on the emitted path, and drafting never sees it.
    """
    with jax.named_scope("choose"):
        if not sampling.greedy:
            noise = gumbel_rows(seed, sequence, positions, logits.shape[-1])
            logits = warp(logits, sampling) + noise[row]
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
