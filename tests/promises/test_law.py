"""Promise 2: what is sampled follows the target's law, with any drafter."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from frspec_jax import engine, kv_cache, llama, prefill, sampling
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.placement import Placement
from frspec_jax.prefill import Chunks
from frspec_jax.sampling import SamplingArrays
from frspec_jax.state import Asked, new_caches, state_after
from tests.support import toy


# So many rounds that a program which is hardly optimised, as in `make test`, would take longer than optimising it does.
@functools.partial(jax.jit, static_argnames=("plan", "count"), compiler_options={"xla_backend_optimization_level": 1})
def decoded(plan, w, read, asked, count):
    """Three tokens of each of `count` sequences after a prompt, [count, 3]: one program whatever the settings."""
    feature = read.accepted.features[0]
    scores = llama.logits(w.target, plan.config, feature[None])

    def decode(sequence):
        mine = asked.replace(draw=asked.draw.replace(sequence=sequence))
        root = sampling.choose(scores, plan.rule, mine.draw, jnp.array([3]), jnp.zeros(1, jnp.int32))[0]
        state = state_after(plan, read.caches, feature, root, jnp.int32(3), mine)
        return engine.decode_rounds(plan, w, state, jnp.int32(5)).output[:3]

    return jax.lax.map(decode, jnp.arange(count), batch_size=250)


@functools.partial(jax.jit, static_argnames=("cfg",))
def shares(cfg, params, text, settings):
    """The target's distribution after each token of a text: [T, V]."""
    cache = kv_cache.empty(cfg, 256, jnp.float32)
    features, _ = llama.forward(params, cfg, text, Placement.chain(jnp.int32(0), len(text)), cache)
    return jax.nn.softmax(sampling.warp(llama.logits(params, cfg, features), settings), axis=-1)


@pytest.mark.sweep(quick=["eagle-*"])
@pytest.mark.parametrize("settings", [Sampling(1.0), Sampling(0.7, top_k=5)])
def test_outputs_follow_the_targets_law(kind, settings):
    """Three tokens of a model of eight, 6,000 sequences decoded side by side: chi-square against the exact law."""
    cfg = toy.config(vocab_size=8)
    w, drafter = toy.weights(cfg, seed=4, kind=kind)
    plan = toy.plan(cfg, drafter, TreeConfig(6, 2, 3), settings)
    prompt = np.array([2, 7, 1], np.int32)
    count = 6000
    asked = Asked.of(settings, seed=11, limit=3)
    read = prefill.start(plan, w, new_caches(plan, 256, jnp.float32), prompt, asked, chunks=Chunks(4))
    outputs = np.asarray(decoded(plan, w, read, asked, count))

    law = {}
    for tokens in itertools.product(range(8), repeat=2):
        text = jnp.asarray([*prompt, *tokens], jnp.int32)
        share = np.asarray(shares(cfg, w.target, text, SamplingArrays.of(settings)), np.float64)
        for last in range(8):
            law[(*tokens, last)] = share[2, tokens[0]] * share[3, tokens[1]] * share[4, last]
    assert abs(sum(law.values()) - 1) < 1e-5

    seen = np.zeros(512)
    np.add.at(seen, outputs @ np.array([64, 8, 1]), 1)
    expected = count * np.array([law[key] for key in sorted(law)])
    assert not seen[expected == 0].any(), "a token was drawn that the filters had removed"
    common = expected >= 5
    observed = np.append(seen[common], seen[~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3
