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
import tomllib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frspec_jax import api, engine
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.errors import UserError
from frspec_jax.plan import Plan
from frspec_jax.presets import config_of, eagle_of, family_of, random_weights, state_at
from pallas_kernels import bench, dispatch, measured, subvocab_head, tree_attention
from pallas_kernels.best_children import best_children
from pallas_kernels.compaction import compact
from pallas_kernels.device import H100, compiling_for
from pallas_kernels.dispatch import Kernels
from pallas_kernels.fused_linear import fused_linear
from pallas_kernels.models import SHAPES
from pallas_kernels.products import linear, mean_square, take_rows, turned
from pallas_kernels.rotary_append import Place, Rotation, rotary_append
from pallas_kernels.subvocab_head import cases as head_cases
from pallas_kernels.subvocab_head import quantised, subvocab_top_k
from pallas_kernels.tree_attention import cases as attention_cases
from pallas_kernels.tree_attention import xla
from pallas_kernels.visibility import causal
from tests import conftest
from tests.pallas_kernels import test_subvocab_head, test_tree_attention
from tests.support import toy

INTERPRET = Kernels.all("interpret")
PALLAS = Kernels.all("pallas")


# Every division of the work ----------------------------------------------------------------------


@pytest.mark.sweep(quick=["256-*", "900-*"])
@pytest.mark.parametrize(
    ("block_q", "block_k", "splits"), [(16, 16, 1), (16, 256, 4), (64, 64, 16), (128, 32, 3), (32, 128, 2)]
)
@pytest.mark.parametrize("committed", [0, 1, 255, 256, 900])
def test_attention_is_the_same_however_it_is_split(block_q, block_k, splits, committed):
    """Shares beyond the live rows see nothing, and must weigh nothing."""
    config = tree_attention.Config(block_q, block_k, splits)
    attend = jax.jit(functools.partial(tree_attention.tree_attention, implementation="interpret", config=config))
    q, keys, values, committed, line = test_tree_attention.case((40, 2, 3, 64, 1024), committed, "tree", seed=committed)
    mine = attend(q, keys, values, test_tree_attention.sees(committed, line))
    exact = test_tree_attention.reference(q, keys, values, committed, line)
    assert test_tree_attention.error(mine, exact) < 2e-6


@pytest.mark.parametrize("how", test_tree_attention.attend)
@settings(max_examples=8, deadline=None)
@given(
    st.tuples(
        st.integers(1, 70),
        st.integers(1, 3),
        st.integers(1, 8),
        st.sampled_from([64, 80, 96, 128, 256]),
        st.sampled_from([256, 512, 768]),
    ),
    st.floats(0, 1),
    st.one_of(st.none(), st.floats(0, 1)),
    st.sampled_from([0.0, 5.0]),
    st.integers(0, 2**32 - 1),
)
def test_attention_at_any_shape(how, shape, fill, window, cap, seed):
    """And with any window (of so much of the committed rows; every token has moved on by some) and a soft cap."""
    committed = round(fill * (shape[4] - shape[0]))
    q, keys, values, _, line = test_tree_attention.case(shape, committed, "tree", seed)
    first = None
    if window is not None:
        start = round((1 - window) * committed)
        first = np.minimum(start + np.arange(shape[0]) // 4, committed)
        keys[:, :start] = test_tree_attention.GARBAGE
    attend = test_tree_attention.capped(how, cap)
    mine = attend(q, keys, values, test_tree_attention.sees(committed, line, first))
    exact = test_tree_attention.reference(q, keys, values, committed, line, first, cap)
    assert test_tree_attention.error(mine, exact) < 2e-6


@pytest.mark.sweep(quick=["1000-*"])
@pytest.mark.parametrize(("block_v", "block_h"), [(16, 16), (64, 128), (256, 32), (128, 64)])
@pytest.mark.parametrize("size", [100, 1000, 1024])
def test_the_head_is_the_same_however_it_is_tiled(block_v, block_h, size):
    config = subvocab_head.Config(block_v, block_h)
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
    config = tree_attention.Config(32, 64, 4, num_warps, num_stages)
    attend = jax.jit(functools.partial(tree_attention.tree_attention, implementation="pallas", config=config))
    for committed in (0, 63, 700):
        q, keys, values, committed, line = test_tree_attention.case(
            (60, 2, 4, head_dim, 1024), committed, "tree", seed=committed
        )
        mine = attend(q, keys, values, test_tree_attention.sees(committed, line))
        exact = test_tree_attention.reference(q, keys, values, committed, line)
        assert test_tree_attention.error(mine, exact) < 2e-6


@pytest.mark.gpu
@needs_gpu
@variants
@pytest.mark.parametrize("size", [8193, 32768])
def test_the_head_on_a_gpu(num_warps, num_stages, size):
    config = subvocab_head.Config(64, 64, num_warps, num_stages)
    rng = np.random.default_rng(size)
    x, head = (rng.normal(size=shape).astype(np.float32) for shape in ((10, 512), (size, 512)))
    scores, index = jax.jit(functools.partial(subvocab_top_k, k=10, implementation="pallas", config=config))(x, head)
    expected, order, _ = test_subvocab_head.reference(x, head, 10)
    np.testing.assert_allclose(scores, expected, atol=2e-3)
    assert (np.asarray(index) == order).mean() > 0.99 and int(index.max()) < size


# The round with kernels inside -------------------------------------------------------------------


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("kind", "settings", "int8", "kernels"),
    [
        *((kind, Sampling(), False, INTERPRET) for kind in toy.DRAFTS),
        *((kind, Sampling(), True, Kernels("xla", "interpret", "xla")) for kind in toy.DRAFTS),
        # What is drawn is the target's affair, and how its logits are multiplied: any draft will do.
        ("eagle", Sampling(1.0), False, dataclasses.replace(INTERPRET, product="xla")),
    ],
)
def test_a_round_with_kernels_emits_the_same_tokens(kind, settings, int8, kernels):
    """And makes the same proposals: as many rounds, unless the head was rounded. Layers are alike, and one will do."""
    cfg, ids = toy.config(num_layers=1), np.array([5, 1, 9, 3, 11, 0, 7, 20, 21, 2, 4])
    w, drafter = toy.weights(cfg, ids, kind=kind)
    prompt = np.arange(9) % cfg.vocab_size
    plan = dataclasses.replace(toy.plan(cfg, drafter, TreeConfig(8, 2, 4), settings), kernels=Kernels.all("xla"))
    expected, before = toy.decode(plan, w, prompt, 24, settings, seed=3)
    w, _ = toy.weights(cfg, ids, kind=kind, int8=int8)
    plan = dataclasses.replace(plan, drafter=dataclasses.replace(drafter, kernels=kernels), kernels=kernels)
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


@pytest.mark.sweep
@pytest.mark.material
def test_kernels_on_the_real_model(real_checkpoint):
    """SmolLM2's first two layers (all thirty, interpreted, compile for minutes): the same text in the same rounds."""
    whole = real_checkpoint.params(jnp.float32)
    short = dataclasses.replace(real_checkpoint, config=dataclasses.replace(real_checkpoint.config, num_layers=2))
    target = whole.replace(layers=whole.layers[:2])

    def decoded(kernels):
        draft = api.Draft("eagle", pace="fixed")
        model = api.load(short, draft, context=256, kernels=kernels, target=target)
        result = model.generate("Name three colours.", api.Request(max_new_tokens=16))
        return result.tokens, result.accepted_histogram

    plain = decoded(Kernels.all("xla"))
    assert len(plain[0]) > 4 and decoded(INTERPRET) == plain


@pytest.mark.parametrize("how", ["pallas", "mosaic"])
def test_kernels_need_a_gpu_unless_they_are_interpreted(how, real_checkpoint, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(UserError, match=f"kernels {how} needs a CUDA GPU"):
        api.load(real_checkpoint, "eagle", kernels=Kernels.all(how))


# Lowering to Triton at production shapes, without a GPU ------------------------------------------


def lowered(function, *arguments) -> str:
    """The program for CUDA, as text; Pallas lowers its kernels to Triton on the way, or fails."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def kernels_in(text: str) -> int:
    return len(re.findall(r"__gpu\$xla\.gpu\.triton|triton_kernel_call", text))


def launches(jaxpr) -> int:
    """How often a program calls a kernel. (Lowered, equal layers share one function.)"""
    inner = [p for eqn in jaxpr.eqns if eqn.primitive.name != "pallas_call" for p in programs_in(eqn)]
    return sum(eqn.primitive.name == "pallas_call" for eqn in jaxpr.eqns) + sum(map(launches, inner))


def programs_in(eqn):
    """The programs within an operation."""
    leaves = jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"))
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")]


cross_lowering = pytest.mark.skipif(
    jax.__version_info__ >= (0, 11) and jax.default_backend() != "gpu",
    reason="JAX 0.11 lowers for CUDA only where there is a GPU",
)


@pytest.mark.sweep(quick=["bfloat16-smollm2*", "float32-gemma*", "bfloat16-qwen2-7b"])
@cross_lowering
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_kernels_lower_at_the_shapes_of(name, dtype):
    shape = SHAPES[name]
    for tokens in (1, 10, 60, 256):
        attend = functools.partial(tree_attention.tree_attention, implementation="pallas")
        assert kernels_in(lowered(attend, *attention_cases.arguments(shape, tokens, 8192, dtype))) == 2
    for rows, vocabulary in ((1, 8192), (10, 10_000), (10, None)):
        head = functools.partial(subvocab_top_k, k=10, implementation="pallas")
        assert kernels_in(lowered(head, *head_cases.arguments(shape, rows, vocabulary, dtype))) == 2
    x, head_rows = head_cases.arguments(shape, 10, 8193, jnp.int8)
    x = jax.ShapeDtypeStruct(x.shape, dtype)
    scale = jax.ShapeDtypeStruct((8193,), jnp.float32)
    int8 = functools.partial(subvocab_top_k, implementation="pallas")
    assert kernels_in(lowered(lambda a, b, c: int8(a, b, 10, c), x, head_rows, scale)) == 2
    extra = subvocab_head.Extra(
        jax.ShapeDtypeStruct((500, shape.hidden), dtype), jax.ShapeDtypeStruct((500,), jnp.int32)
    )
    assert kernels_in(lowered(lambda a, b, c, e: int8(a, b, 10, c, extra=e), x, head_rows, scale, extra)) == 3
    argmax = functools.partial(subvocab_top_k, k=1, implementation="pallas")
    assert kernels_in(lowered(argmax, *head_cases.arguments(shape, 64, None, dtype))) == 2


@cross_lowering
@pytest.mark.parametrize("head_dim", [8, 80, 96])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_attention_lowers_where_head_dim_is_no_power_of_two(head_dim, dtype):
    """Or one below Triton's least."""
    model = dataclasses.replace(SHAPES["smollm2-135m"], head_dim=head_dim)
    attend = functools.partial(tree_attention.tree_attention, implementation="pallas")
    assert kernels_in(lowered(attend, *attention_cases.arguments(model, 60, 8192, dtype))) == 2


@pytest.mark.sweep(quick=["llama3-8b"])
@cross_lowering
@pytest.mark.parametrize("name", SHAPES)
def test_the_whole_round_lowers_at_the_shapes_of(name):
    config = config_of(dataclasses.replace(SHAPES[name], layers=3), family_of(name))
    tree, vocabulary = TreeConfig(60, 6, 10), min(32768, config.vocab_size)
    plan = Plan(config, eagle_of(config, PALLAS), tree, (2,), kernels=PALLAS)
    make = functools.partial(random_weights, config, vocabulary, jnp.bfloat16)
    weights = jax.eval_shape(make, jax.random.key(0))
    with compiling_for(H100):
        state = jax.eval_shape(functools.partial(state_at, plan, capacity=2048, dtype=jnp.bfloat16), jnp.int32(100))
        traced = jax.jit(functools.partial(engine.decode_rounds, plan)).trace(weights, state, jnp.int32(1))
        assert kernels_in(traced.lower(lowering_platforms=("cuda",)).as_text()) > 0
    # A layer is four products, rotation, attention and its combination; of the draft's layer there is one in extend and
    # one a level below the first. A head is two kernels a level, the next beams one, and compaction one for 32 layers.
    layers = 7 * (config.num_layers + tree.depth)
    assert launches(traced.jaxpr.jaxpr) == layers + 2 * tree.depth + (tree.depth - 1) + -(-2 * config.num_layers // 64)


# 32 bits whatever JAX's own default is --------------------------------------------------------------


def wide_types(jaxpr, found=()) -> set[str]:
    """Operations of a program, and of the programs within it, that give numbers of 64 bits."""
    names = {f"{eqn.primitive}: {v.aval}" for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "dtype")}
    for inner in (program for eqn in jaxpr.eqns for program in programs_in(eqn)):
        names |= wide_types(inner)
    return {name for name in names if re.search(r"\b[iuf]64\b|\b(int|uint|float)64\b", name)}


def in_64_bits(function, *arguments):
    """A function's program, and its results, under JAX's 64-bit types."""
    with jax.enable_x64(True):
        return jax.make_jaxpr(function)(*arguments).jaxpr, jax.jit(function)(*arguments)


def some(*shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


START, PATH = jnp.int32(5), jnp.array([0, 2, 3, 0], jnp.int32)
IDS = jnp.arange(9, dtype=jnp.int32).reshape(3, 3)
BITS = jnp.uint16  # of bfloat16, as a CPU's cache keeps them
OPERATIONS = {
    "attention, dense": (tree_attention.tree_attention, (some(5, 4, 16), some(2, 512, 16), some(2, 512, 16))),
    "attention, in blocks": (tree_attention.tree_attention, (some(5, 4, 16), some(2, 1024, 16), some(2, 1024, 16))),
    "attention, bits": (
        tree_attention.tree_attention,
        (some(5, 4, 16, dtype=jnp.bfloat16), *(2 * [some(2, 1024, 16, dtype=jnp.bfloat16).view(BITS)])),
    ),
    "attention, kernel": (
        functools.partial(tree_attention.tree_attention, implementation="interpret"),
        (some(5, 4, 24), some(2, 512, 24), some(2, 512, 24)),
    ),
    "head": (functools.partial(subvocab_top_k, k=3), (some(4, 32), some(100, 32))),
    "head, kernel": (
        functools.partial(subvocab_top_k, k=3, implementation="interpret"),
        (some(4, 32), some(100, 32)),
    ),
    "attention, in straight lines": (xla.straight, (some(5, 4, 16), some(2, 1024, 16), some(2, 1024, 16))),
    "rotation": (
        rotary_append,
        (some(3, 64), Rotation(some(3, 1, 16)), some(1, 32, 16), some(1, 32, 16), Place(START)),
    ),
    "rotation, kernel": (
        functools.partial(rotary_append, implementation="interpret"),
        (some(3, 64), Rotation(some(3, 1, 16)), some(1, 32, 16), some(1, 32, 16), Place(START, skip=2)),
    ),
    "compaction": (compact, ([some(2, 32, 16)], START, PATH)),
    "compaction, kernel": (functools.partial(compact, implementation="interpret"), ([some(2, 32, 16)], START, PATH)),
    "next beams": (best_children, (some(3), some(3, 3), IDS, IDS[:, :1], IDS[:, :1])),
    "next beams, kernel": (
        functools.partial(best_children, implementation="interpret"),
        (some(3), some(3, 3), IDS, IDS[:, :1], IDS[:, :1]),
    ),
    "head with ids, kernel": (
        lambda x, head, ids: subvocab_top_k(x, head, 3, ids=ids, implementation="interpret"),
        (some(4, 32), some(9, 32), jnp.arange(9, dtype=jnp.int32)),
    ),
    "product": (functools.partial(fused_linear, gate="silu"), (some(2, 16), some(6, 16))),
    "product, kernel": (
        functools.partial(fused_linear, gate="silu", implementation="interpret"),
        (some(2, 16), some(6, 16)),
    ),
    "quantised": (quantised, (some(9, 16),)),
    "linear": (linear, (some(2, 16), some(9, 16))),
    "linear, bfloat16": (linear, (some(1, 16, dtype=jnp.bfloat16), some(9, 16, dtype=jnp.bfloat16))),
    "mean square": (mean_square, (some(2, 16, dtype=jnp.bfloat16),)),
    "turned": (turned, (some(2, 16),)),
    "rows of a table": (take_rows, (some(30, 8, dtype=jnp.bfloat16), jnp.array([3, 29], jnp.int32))),
}


@pytest.mark.sweep(quick=["attention, kernel", "head with ids, kernel", "product*"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_turns_to_64_bits(name):
    function, arguments = OPERATIONS[name]
    if name.startswith("attention"):
        line = np.tri(5, dtype=bool)
        arguments = (*arguments, test_tree_attention.sees(300, line))
    narrow = jax.jit(function)(*arguments)
    program, wide = in_64_bits(function, *arguments)
    assert not wide_types(program)
    for mine, other in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(other, np.float32), rtol=1e-6, atol=1e-6)


@cross_lowering
def test_kernels_lower_where_64_bits_are_the_default():
    model = SHAPES["smollm2-135m"]
    attend = functools.partial(tree_attention.tree_attention, implementation="pallas")
    head = functools.partial(subvocab_top_k, k=10, implementation="pallas")
    with jax.enable_x64(True):
        assert kernels_in(lowered(attend, *attention_cases.arguments(model, 60, 8192, jnp.bfloat16))) == 2
        assert kernels_in(lowered(head, *head_cases.arguments(model, 10, 8193, jnp.bfloat16))) == 2


def test_who_sees_whom_stays_in_32_bits():
    program, dense = in_64_bits(lambda line: test_tree_attention.sees(3, line).dense(40), jnp.eye(33, dtype=bool))
    assert not wide_types(program) and dense.dtype == bool
    program, words = in_64_bits(lambda: causal(40))
    assert not wide_types(program) and words.dtype == jnp.int32


# The choice --------------------------------------------------------------------------------------

DEVICE, PLACE = "NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"
ROW = {"dtype": "float32", "shape": {"rows": 64, "heads": 8}, "config": {"splits": 4}, "pallas_us": 5.0, "xla_us": 8.0}


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU as far as `choose` looks, and empty folders of tables: the user's and the package's."""
    monkeypatch.setenv(measured.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "PACKAGED", tmp_path / "package")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=DEVICE, compute_capability="9.0")])
    measured.read.cache_clear()
    yield tmp_path / "cache" / "kernels" / PLACE, tmp_path / "package" / PLACE
    measured.read.cache_clear()


def put(folder, *rows, operation="a"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{operation}.json").write_text(json.dumps({"device": DEVICE, "rows": rows}))
    measured.read.cache_clear()


def chosen(operation="a", dtype="float32", **shape):
    default = tree_attention.Config()
    implementation, config = dispatch.choose("auto", operation, dtype, shape or ROW["shape"], default)
    assert implementation == "pallas" or config == default
    return config.splits if implementation == "pallas" else implementation


def test_auto_takes_what_was_measured_to_win(gpu):
    _, package = gpu
    assert chosen() == "xla"
    slow = ROW | {"shape": {"rows": 1024, "heads": 8}, "pallas_us": 9.0}
    put(package, ROW, slow)
    assert chosen() == 4
    assert chosen(rows=100, heads=8) == 4  # near
    assert chosen(rows=200, heads=8) == "xla"  # far from both
    assert chosen(rows=1000, heads=8) == "xla"  # measured, and lost
    assert chosen(rows=64, heads=32) == chosen(rows=64) == "xla"
    assert chosen("b") == chosen(dtype="bfloat16") == "xla"


def test_attention_needs_no_table(gpu):
    """Nor what stands around it: without one they run as kernels, and a table that says otherwise is heeded."""
    config = tree_attention.Config()
    assert dispatch.choose("auto", "a", "float32", ROW["shape"], config, unmeasured="pallas") == ("pallas", config)
    assert dispatch.resolve("auto") == "pallas" and dispatch.resolve("xla") == "xla"
    put(gpu[1], ROW | {"pallas_us": 9.0})
    assert dispatch.choose("auto", "a", "float32", ROW["shape"], config, unmeasured="pallas") == ("xla", config)


def test_a_gpu_before_sm_80_runs_no_kernel():
    with compiling_for(dataclasses.replace(H100, capability=(7, 5))):
        assert chosen() == dispatch.resolve("auto") == "xla"
        config = tree_attention.Config()
        assert dispatch.choose("auto", "a", "float32", ROW["shape"], config, unmeasured="pallas") == ("xla", config)


def test_the_users_own_table_is_read_first(gpu, monkeypatch):
    own, package = gpu
    put(package, ROW, ROW | {"shape": {"rows": 4096, "heads": 8}})
    put(own, ROW | {"config": {"splits": 2}})
    assert chosen() == 2
    assert chosen(rows=4096, heads=8) == 4  # the user has not measured it
    put(own, ROW | {"pallas_us": 8.5})
    assert chosen() == "xla"  # measured here, and lost
    monkeypatch.setenv(measured.CACHE_VARIABLE, "off")
    assert chosen() == 4


@pytest.mark.parametrize("variables", [{"XDG_CACHE_HOME": "X"}, {"HOME": "X"}, {"FRSPEC_JAX_CACHE": "X/frspec-jax"}])
def test_where_the_users_tables_are(variables, tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "FRSPEC_JAX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.replace("X", str(tmp_path)))
    base = tmp_path / ".cache" if "HOME" in variables else tmp_path
    assert measured.own_folder() == base / "frspec-jax" / "kernels"
    assert measured.table_path(tmp_path, DEVICE, "a") == tmp_path / PLACE / "a.json"
    assert measured.table_path(tmp_path, "../a/B", "a") == tmp_path / "a-b" / "a.json"


DAMAGE = {
    "no JSON": "{",
    "no text": b"\xff\xfe",
    "no rows": "{}",
    "a list": "[]",
    "a row of something else": json.dumps({"rows": [{"speed": 3}]}),
    "rows that are words": json.dumps({"rows": ["fast"]}),
    "a config that is a list": json.dumps({"rows": [ROW | {"config": [4]}]}),
    "a size of zero": json.dumps({"rows": [ROW | {"shape": {"rows": 0, "heads": 8}}]}),
    "a time that is a word": json.dumps({"rows": [ROW | {"xla_us": "fast"}]}),
    "a setting that is none": json.dumps({"rows": [ROW | {"config": {"wheels": 4}}]}),
    "a block that Triton cannot take": json.dumps({"rows": [ROW | {"config": {"block_k": 65}}]}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_table_is_one_sentence_and_tune_replaces_it(name, gpu, caplog):
    own, package = gpu
    put(package, ROW)
    put(own)
    path, content = own / "a.json", DAMAGE[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert chosen() == 4  # the package's
    (record,) = caplog.records
    said = record.getMessage()
    assert str(path) in said and "left out; `python -m pallas_kernels.bench --tune` writes it anew" in said
    assert "\n" not in said and record.exc_info is None
    found = ROW | {"operation": "a", "config": {"splits": 2}, "label": ""}
    bench.keep(own.parent, {"device": DEVICE}, found, tree_attention.Config)
    caplog.clear()
    assert chosen() == 2 and not caplog.records
    assert json.loads(path.read_text())["device"] == DEVICE and [p.name for p in own.iterdir()] == ["a.json"]


def test_a_table_keeps_the_shapes_that_were_not_measured_again(gpu):
    own, _ = gpu
    far = {"rows": 4096, "heads": 8}
    put(own, ROW, ROW | {"shape": far})
    measured.write(own / "a.json", {}, measured.Row(**ROW | {"config": tree_attention.Config(splits=8)}))
    assert chosen() == 8 and chosen(**far) == 4
    bench.keep(own.parent, {}, {"operation": "a", "config": None}, tree_attention.Config)  # no config was right
    assert chosen() == 8


def test_tune_needs_a_folder_that_it_can_write_to(monkeypatch, capsys):
    for value, said in (("off", "FRSPEC_JAX_CACHE=off leaves no folder"), ("/proc/no", "/proc/no/kernels")):
        monkeypatch.setenv(measured.CACHE_VARIABLE, value)
        with pytest.raises(SystemExit) as stop:
            bench.main(["--dry", "--tune"])
        assert stop.value.code == 2 and said in capsys.readouterr().err.replace("\n", " ")


def test_tables_are_in_the_wheel():
    with open(conftest.ROOT / "pyproject.toml", "rb") as file:
        patterns = tomllib.load(file)["tool"]["setuptools"]["package-data"]["pallas_kernels"]
    table = measured.table_path(measured.PACKAGED, DEVICE, "tree_attention")
    path = table.relative_to(measured.PACKAGED.parent)
    assert any(path.match(pattern) for pattern in patterns)


def test_without_a_gpu_auto_is_xla(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    config = tree_attention.Config()
    assert dispatch.choose("auto", "tree_attention", "float32", {}, config) == ("xla", config)
    with pytest.raises(ValueError, match="'cuda' is none of"):
        Kernels(attention="cuda")  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"block_q": 8}, {"block_k": 48}, {"splits": 0}])
def test_settings_that_triton_cannot_take_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} .* is no"):
        tree_attention.Config(**settings)


def test_a_sweep_begins_with_what_would_suit_and_tries_nothing_twice():
    for configs, suited in (
        (attention_cases.sweep(240, 8), tree_attention.Config.suited_to(240, 8)),
        (head_cases.sweep(576), subvocab_head.Config.suited_to(576)),
    ):
        assert configs[0] == suited and len(set(configs)) == len(configs) > 6
