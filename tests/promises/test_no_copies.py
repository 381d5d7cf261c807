"""Promise 5: caches are updated in place, and no weight is copied, as the compiled programs say."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frspec_jax import engine, prefill
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.prefill import Chunk, Chunks
from frspec_jax.state import Asked, new_caches
from tests import conftest
from tests.support import toy

pytestmark = pytest.mark.as_shipped
PROMPT = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], np.int32)


@pytest.mark.sweep(quick=["eagle-256-*", "medusa-256-fixed"])
@pytest.mark.parametrize(("capacity", "pace"), [(256, "fixed"), (1024, "fixed"), (256, "auto")])
def test_no_copy_of_a_cache_in_the_compiled_programs(kind, capacity, pace):
    """Promise 5, read off the optimised HLO: caches are donated and updated in place, whatever a round chooses.

    Those of the shorter caches are the programs by which test_exact.py and test_pace.py decode: they're compiled once.
    """
    cfg = toy.config(vocab_size=12)
    if pace == "auto":
        plan, w = toy.paced(cfg, kind, ids=toy.CROPPED)
    else:
        w, drafter = toy.weights(cfg, toy.CROPPED, kind=kind)
        plan = toy.plan(cfg, drafter, toy.fitted(kind, cfg, TreeConfig(8, 3, 4)), Sampling())
    caches = new_caches(plan, capacity, jnp.float32)
    asked = Asked.of(Sampling(), seed=0, limit=8)
    chunk = Chunk(np.zeros(33, np.int32), np.int32(0), np.int32(1), np.bool_(True))
    chunk_program = prefill.run.lower(plan, w, caches, chunk, asked).compile()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
    state = prefill.start(plan, w, caches, PROMPT, asked, chunks=Chunks(32))
    round_program = engine.run.lower(plan, w, state, np.int32(5)).compile()
    for program in (chunk_program, round_program):
        text = program.as_text()
        shape = rf"f32\[(?:1,)*{cfg.num_kv_heads},{capacity},{cfg.head_dim}\]"
        assert re.search(shape, text)
        copies = [line for line in text.splitlines() if re.search(rf"= {shape}\S* copy(-start)?\(", line)]
        assert copies == []
        assert program.memory_analysis().alias_size_in_bytes >= size


@pytest.mark.sweep(quick=["eagle"])
@pytest.mark.skipif(not conftest.HAS_AMX, reason="other CPUs compute in float32, whatever the weights are")
def test_no_weight_is_widened_in_the_compiled_round(kind):
    """Handed rows or ids amiss, XLA's CPU backend makes float32 copies of bfloat16 weights at each call."""
    cfg = toy.config()
    w, drafter = toy.weights(cfg, kind=kind)
    w = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, w)
    plan = toy.plan(cfg, drafter, TreeConfig(8, 3, 4), Sampling())
    asked = Asked.of(Sampling(), seed=0, limit=8)
    state = prefill.start(plan, w, new_caches(plan, 512, jnp.bfloat16), PROMPT, asked, chunks=Chunks(32))
    text = engine.run.lower(plan, w, state, np.int32(5)).compile().as_text()
    matrices = {leaf.shape for leaf in jax.tree.leaves(w) if leaf.ndim == 2 and leaf.dtype == jnp.bfloat16}
    assert all(f"bf16[{rows},{columns}]" in text for rows, columns in matrices)
    assert [shape for shape in matrices if f"f32[{shape[0]},{shape[1]}]" in text] == []
