"""What a CPU can prove of the kernels: every way of dividing the work, and that they lower to Triton for CUDA.

That they compute the right thing is in test_tree_attention.py and test_subvocab_head.py, which run
them interpreted, beside their XLA twins.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frspec_jax import api, engine, kv_cache
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.errors import UserError
from frspec_jax.presets import eagle_of, model_config, random_weights, state_at
from pallas_kernels import dispatch, subvocab_head_pallas, tree_attention_pallas
from pallas_kernels.dispatch import Kernels
from pallas_kernels.shapes import SHAPES
from pallas_kernels.subvocab_head import quantised, subvocab_top_k
from pallas_kernels.tree_attention import tree_attention
from pallas_kernels.visibility import Sees, bit_words
from tests.pallas_kernels import test_subvocab_head, test_tree_attention
from tests.support import toy

INTERPRET = Kernels("interpret", "interpret")
PALLAS = Kernels("pallas", "pallas")


# Every division of the work ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_q", "block_k", "splits"), [(16, 16, 1), (16, 256, 4), (64, 64, 16), (128, 32, 3), (32, 128, 2)]
)
@pytest.mark.parametrize("committed", [0, 1, 255, 256, 900])
def test_attention_is_the_same_however_it_is_split(block_q, block_k, splits, committed):
    """Shares beyond the live rows see nothing, and must weigh nothing."""
    config = tree_attention_pallas.Config(block_q, block_k, splits)
    attend = jax.jit(functools.partial(tree_attention, implementation="interpret", config=config))
    q, keys, values, committed, line = test_tree_attention.case((40, 2, 3, 64, 1024), committed, "tree", seed=committed)
    mine = attend(q, keys, values, Sees(jnp.int32(committed), bit_words(jnp.asarray(line))))
    exact = test_tree_attention.reference(q, keys, values, committed, line)
    assert test_tree_attention.error(mine, exact) < 2e-6


@pytest.mark.parametrize(("block_v", "block_h"), [(16, 16), (64, 128), (256, 32), (128, 64)])
@pytest.mark.parametrize("size", [100, 1000, 1024])
def test_the_head_is_the_same_however_it_is_tiled(block_v, block_h, size):
    config = subvocab_head_pallas.Config(block_v, block_h)
    rng = np.random.default_rng(size)
    x, head = (rng.normal(size=shape).astype(np.float32) for shape in ((7, 96), (size, 96)))
    scores, index = jax.jit(functools.partial(subvocab_top_k, k=10, implementation="interpret", config=config))(x, head)
    expected, order, _ = test_subvocab_head.reference(x, head, 10)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert np.array_equal(index, order) and int(index.max()) < size


@pytest.mark.parametrize("how", ["xla", "interpret"])
def test_an_int8_head_is_the_head_but_for_rounding(how):
    rng = np.random.default_rng(0)
    x, head = jnp.asarray(rng.normal(size=(6, 128)), jnp.float32), rng.normal(size=(1000, 128)).astype(np.float32)
    head[17] = 0  # a row without a largest entry to scale by
    weight, scale = quantised(jnp.asarray(head))
    assert weight.dtype == jnp.int8
    rounded = np.asarray(weight, np.float32) * np.asarray(scale)[:, None]
    assert np.abs(rounded - head).max() <= np.abs(head).max() / 254 * 1.0001
    scores, index = jax.jit(functools.partial(subvocab_top_k, k=10, implementation=how))(x, weight, scale=scale)
    expected, order, _ = test_subvocab_head.reference(x, rounded, 10)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    assert np.array_equal(index, order)


# On a GPU: every variant that a sweep may choose --------------------------------------------------

needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA GPU")
variants = pytest.mark.parametrize(("num_warps", "num_stages"), list(itertools.product((2, 4, 8), (1, 2, 3, 4))))


@pytest.mark.gpu
@needs_gpu
@variants
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_attention_on_a_gpu(num_warps, num_stages, head_dim):
    config = tree_attention_pallas.Config(32, 64, 4, num_warps, num_stages)
    attend = jax.jit(functools.partial(tree_attention, implementation="pallas", config=config))
    for committed in (0, 63, 700):
        q, keys, values, committed, line = test_tree_attention.case(
            (60, 2, 4, head_dim, 1024), committed, "tree", seed=committed
        )
        mine = attend(q, keys, values, Sees(jnp.int32(committed), bit_words(jnp.asarray(line))))
        exact = test_tree_attention.reference(q, keys, values, committed, line)
        assert test_tree_attention.error(mine, exact) < 2e-6


@pytest.mark.gpu
@needs_gpu
@variants
@pytest.mark.parametrize("size", [8193, 32768])
def test_the_head_on_a_gpu(num_warps, num_stages, size):
    config = subvocab_head_pallas.Config(64, 64, num_warps, num_stages)
    rng = np.random.default_rng(size)
    x, head = (rng.normal(size=shape).astype(np.float32) for shape in ((10, 512), (size, 512)))
    scores, index = jax.jit(functools.partial(subvocab_top_k, k=10, implementation="pallas", config=config))(x, head)
    expected, order, _ = test_subvocab_head.reference(x, head, 10)
    np.testing.assert_allclose(scores, expected, atol=2e-3)
    assert (np.asarray(index) == order).mean() > 0.99 and int(index.max()) < size


# The round with kernels inside -------------------------------------------------------------------


@pytest.mark.parametrize("kind", toy.DRAFTS)
@pytest.mark.parametrize(("settings", "int8"), [(Sampling(), False), (Sampling(1.0), False), (Sampling(), True)])
def test_a_round_with_kernels_emits_the_same_tokens(kind, settings, int8):
    """And makes the same proposals: as many rounds, unless the head was rounded."""
    cfg, ids = toy.config(), np.array([5, 1, 9, 3, 11, 0, 7, 20, 21, 2, 4])
    w, drafter = toy.weights(cfg, ids, kind=kind)
    prompt = np.arange(9) % cfg.vocab_size
    plan = dataclasses.replace(toy.plan(cfg, drafter, TreeConfig(8, 2, 4), settings), kernels=Kernels("xla", "xla"))
    expected, before = toy.decode(plan, w, prompt, 24, settings, seed=3)
    w, _ = toy.weights(cfg, ids, kind=kind, int8=int8)
    plan = dataclasses.replace(plan, drafter=dataclasses.replace(drafter, kernels=INTERPRET), kernels=INTERPRET)
    tokens, after = toy.decode(plan, w, prompt, 24, settings, seed=3)
    assert tokens == expected
    assert int8 or np.array_equal(before.histogram, after.histogram)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("settings", [Sampling(), Sampling(1.0)])
def test_a_round_on_a_gpu_emits_the_same_tokens(settings):
    """Compiled kernels, and vanilla decoding by XLA."""
    cfg = toy.config()
    w, eagle = toy.weights(cfg, np.array([5, 1, 9, 3, 11, 0, 7, 20, 21, 2, 4]))
    prompt = np.arange(9) % cfg.vocab_size
    expected, _ = toy.decode(toy.vanilla_plan(cfg, settings), w, prompt, 24, settings, seed=3)
    plan = toy.plan(cfg, dataclasses.replace(eagle, kernels=PALLAS), TreeConfig(60, 6, 10), settings)
    plan = dataclasses.replace(plan, kernels=PALLAS)
    assert toy.decode(plan, w, prompt, 24, settings, seed=3)[0] == expected


@pytest.mark.material
def test_kernels_on_the_real_model(real_checkpoint):
    """SmolLM2, a short prompt: interpreted kernels and XLA give the same text in the same rounds."""
    prompt, request = "Name three colours.", api.Request(max_new_tokens=8)
    plain = api.load(real_checkpoint, "eagle", context=256, kernels=Kernels("xla", "xla")).generate(prompt, request)
    kernels = api.load(real_checkpoint, "eagle", context=256, kernels=INTERPRET).generate(prompt, request)
    assert (kernels.tokens, kernels.accepted_histogram) == (plain.tokens, plain.accepted_histogram)


def test_kernels_need_a_gpu_unless_they_are_interpreted(real_checkpoint, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(UserError, match="--kernels pallas needs a CUDA GPU"):
        api.load(real_checkpoint, "eagle", kernels=PALLAS)


# Lowering to Triton at production shapes, without a GPU ------------------------------------------


def lowered(function, *arguments) -> str:
    """The program for CUDA, as text; Pallas lowers its kernels to Triton on the way, or fails."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def kernels_in(text: str) -> int:
    return len(re.findall(r"__gpu\$xla\.gpu\.triton|triton_kernel_call", text))


cross_lowering = pytest.mark.skipif(
    jax.__version_info__ >= (0, 11) and jax.default_backend() != "gpu",
    reason="JAX 0.11 lowers for CUDA only where there is a GPU",
)


@cross_lowering
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_kernels_lower_at_the_shapes_of(name, dtype):
    shape = SHAPES[name]
    for tokens in (1, 10, 60, 256):
        attend = functools.partial(tree_attention, implementation="pallas")
        assert kernels_in(lowered(attend, *shape.attention(tokens, 8192, dtype))) == 1
    for rows, vocabulary in itertools.product((1, 10), (8192, 10_000, None)):
        head = functools.partial(subvocab_top_k, k=10, implementation="pallas")
        assert kernels_in(lowered(head, *shape.head(rows, vocabulary, dtype))) == 1
    x, head_rows = shape.head(10, 8193, jnp.int8)
    x = jax.ShapeDtypeStruct(x.shape, dtype)
    scale = jax.ShapeDtypeStruct((8193,), jnp.float32)
    int8 = functools.partial(subvocab_top_k, implementation="pallas")
    assert kernels_in(lowered(lambda a, b, c: int8(a, b, 10, c), x, head_rows, scale)) == 1
    argmax = functools.partial(subvocab_top_k, k=1, implementation="pallas")
    assert kernels_in(lowered(argmax, *shape.head(64, None, dtype))) == 1


@cross_lowering
@pytest.mark.parametrize("name", SHAPES)
def test_the_whole_round_lowers_at_the_shapes_of(name, monkeypatch):
    monkeypatch.setattr(kv_cache, "stored", lambda dtype: dtype)  # as on the GPU that it is lowered for
    config = model_config(name)
    tree, vocabulary = TreeConfig(60, 6, 10), min(32768, config.vocab_size)
    plan = engine.Plan(config, eagle_of(config, PALLAS), tree, (2,), kernels=PALLAS)
    make = functools.partial(random_weights, config, vocabulary, jnp.bfloat16)
    weights = jax.eval_shape(make, jax.random.key(0))
    state = jax.eval_shape(functools.partial(state_at, plan, capacity=2048, dtype=jnp.bfloat16), jnp.int32(100))
    text = engine.run.trace(plan, weights, state, jnp.int32(1)).lower(lowering_platforms=("cuda",)).as_text()
    # One attention a layer of the target; of the draft, one in extend and one a level below the first; a head a level.
    assert kernels_in(text) == config.num_layers + tree.depth + tree.depth


# The choice --------------------------------------------------------------------------------------


def test_auto_takes_what_was_measured_to_win(tmp_path):
    table = tmp_path / "tuned.json"
    row = {"operation": "a", "device": "H100", "shape": {"rows": 64, "heads": 8}, "config": {"splits": 4}}
    slow = row | {"shape": {"rows": 1024, "heads": 8}, "pallas_us": 9.0, "xla_us": 8.0}
    table.write_text(json.dumps([row | {"pallas_us": 5.0, "xla_us": 8.0}, slow]))
    found = functools.partial(dispatch.measured, table=table)
    assert found("a", "H100", {"rows": 64, "heads": 8}) == {"splits": 4}
    assert found("a", "H100", {"rows": 100, "heads": 8}) == {"splits": 4}  # near
    assert found("a", "H100", {"rows": 200, "heads": 8}) is None  # far from both
    assert found("a", "H100", {"rows": 1000, "heads": 8}) is None  # measured, and lost
    assert found("a", "A100", {"rows": 64, "heads": 8}) is None
    assert found("b", "H100", {"rows": 64, "heads": 8}) is None
    assert found("a", "H100", {"rows": 64, "heads": 32}) is None


def test_without_a_gpu_auto_is_xla(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    config = tree_attention_pallas.Config()
    assert dispatch.choose("auto", "tree_attention", {}, config) == ("xla", config)
    with pytest.raises(ValueError, match="'cuda' is none of"):
        Kernels(attention="cuda")  # type: ignore[arg-type]
