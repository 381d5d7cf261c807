"""The shapes and dtypes that stand beside the fields of trees, states, stages and drafters are true."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from frspec_jax import stages
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.placement import Placement
from frspec_jax.plan import Plan
from frspec_jax.prefill import Chunk, prefill_chunk
from frspec_jax.state import Asked, Caches, new_caches
from frspec_jax.tree import Beam, rerank
from tests.support import said, toy

TREES = [TreeConfig(8, 3, 4), TreeConfig(40, 4, 5), TreeConfig(2, 1, 1)]
SETTINGS = [Sampling(), Sampling(0.8, top_k=7), Sampling(1.0, typical=0.1)]


def letters(plan: Plan, capacity: int) -> dict[str, int]:
    cfg, tree = plan.config, plan.tree
    sizes = {"N": tree.size, "D": tree.depth, "K": tree.top_k, "S": capacity, "C": 8, "V": cfg.vocab_size}
    return sizes | {"H": cfg.hidden_size, "head_dim": cfg.head_dim, "taps": len(plan.drafter.taps), "words": tree.words}


@pytest.mark.sweep(quick=["*-eagle"])
@pytest.mark.parametrize("kind", toy.DRAFTS)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("settings", SETTINGS)
def test_of_a_round(kind, tree, settings):
    cfg, capacity = toy.config(), 256
    w, drafter = toy.weights(cfg, np.array([5, 1, 9, 3, 11, 0, 7]), kind=kind)
    plan = toy.plan(cfg, drafter, toy.fitted(kind, cfg, tree), settings)
    chunk = Chunk(np.zeros(9, np.int32), np.int32(0), np.int32(8), np.bool_(True))
    asked = Asked.of(settings, seed=3, limit=20)
    caches = jax.eval_shape(lambda: new_caches(plan, capacity, jnp.float32))
    prefill = functools.partial(prefill_chunk, plan)
    state = jax.eval_shape(prefill, w, caches, chunk, asked)
    proposed, memory = jax.eval_shape(functools.partial(stages.draft, plan), w, state)
    verdict, cache = jax.eval_shape(functools.partial(stages.verify, plan), w, state.caches.target, proposed, state)
    taken, cache = jax.eval_shape(functools.partial(stages.take, plan), proposed, verdict, cache, state)
    after = jax.eval_shape(
        functools.partial(stages.emit, plan),
        state,
        proposed,
        taken,
        Caches(cache, memory, state.caches.text),
    )
    sizes = letters(plan, capacity)
    parts = (chunk, asked, state, proposed, verdict, taken, after)
    assert all(said.check(part, sizes) > 1 for part in parts)
    assert (verdict.typical is None) == (settings.typical == 0)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


@pytest.mark.parametrize("tree", TREES)
def test_of_a_growing_tree(tree):
    k = tree.top_k

    def grown(scores: Array, tokens: Array) -> tuple[object, ...]:
        beam, seen = Beam.start(tree, scores[0], tokens[0]), []
        for level in range(1, tree.depth):
            seen += [beam, Placement.of_level(beam, level, jnp.int32(7))]
            beam, _ = beam.grow(scores, tokens)
        return (*seen, beam, rerank(tree, beam.history, jnp.int32(0)))

    shape = jax.ShapeDtypeStruct
    made = jax.eval_shape(grown, shape((k, k), jnp.float32), shape((k, k), jnp.int32))
    sizes = {"N": tree.size, "D": tree.depth, "K": k, "T": k, "words": tree.words}
    for part in made:
        rows = {"words": -(-tree.draft_rows // 32)} if not hasattr(part, "depth") else {}
        assert said.check(part, sizes | rows) > 1


@dataclasses.dataclass
class Wrong:
    tokens: Array  # [N, 2] int32
    root: Array  # int32


def test_a_comment_that_is_wrong_is_found():
    for tokens, root in (((3, 3), 0), ((2, 2), 0), ((3,), 0), ((3, 2), 0.5)):
        with pytest.raises(AssertionError, match="Wrong"):
            said.check(Wrong(np.zeros(tokens, np.int32), np.asarray(root, type(root))), {"N": 3})
    assert said.check(Wrong(np.zeros((3, 2), np.int32), np.int32(1)), {"N": 3}) == 2
