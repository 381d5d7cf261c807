"""Attention in Mosaic GPU: interpreted against the textbook formula, compiled for an H100, and chosen by a table's row.

No GPU runs here. The interpreter plays shared memory, barriers and copies, and knows neither swizzles nor layouts; that
those fit together, the compiler says. Products are exact in it, and finished at once.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch, measured
from pallas_kernels.device import H100, Device, compiling_for
from pallas_kernels.models import SHAPES
from pallas_kernels.tree_attention import Config, attention_rows, cases, mosaic_config, tree_attention
from pallas_kernels.visibility import Sees
from tests.pallas_kernels import test_tree_attention as textbook
from tests.pallas_kernels.test_kernels import DEVICE, PLACE, gpu, put, wide_types  # noqa: F401 (gpu is a fixture)

interpreted = pytest.mark.skipif(
    not mosaic_config.SUPPORTED, reason="the interpreter of JAX 0.10 knows no product with a turned operand"
)
# A weight is rounded to bfloat16, by 2^-8 of it at most, before it meets its value, and the output once more.
ROUNDING = 2.0**-7


@functools.cache
def interpreter(config):
    return jax.jit(functools.partial(tree_attention, implementation="interpret", config=config))


def attend(config, q, keys, values, committed, line):
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, keys, values)]
    assert mosaic_config.takes(rounded[0], rounded[1], config, interpret=True)
    return np.asarray(interpreter(config)(*rounded, textbook.sees(committed, line)).astype(jnp.float32))


def reference(q, keys, values, committed, line):
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (q, keys, values)]
    return textbook.reference(*rounded, committed, line)


# Interpreted -------------------------------------------------------------------------------------


@pytest.mark.sweep
@interpreted
@settings(max_examples=6, deadline=None)
@given(
    st.tuples(
        st.integers(1, 70),
        st.integers(1, 2),
        st.integers(1, 12),
        st.sampled_from([32, 64, 80, 96, 128, 256]),
        st.sampled_from([256, 512]),
    ),
    st.sampled_from([64, 128]),
    st.integers(1, 5),
    st.integers(2, 4),
    st.floats(0, 1),
    st.sampled_from(["alone", "chain", "tree", "any"]),
    st.integers(0, 2**32 - 1),
)
def test_it_is_softmax_attention(shape, block_k, splits, stages, fill, kind, seed):
    """From an empty cache to a full one, which ends in a block; other rows hold what must not be seen."""
    tokens, _, _, head_dim, capacity = shape
    config = mosaic_config.Config(block_k, splits, stages)
    if config.shared_memory(head_dim) > mosaic_config.SHARED_MEMORY:
        config = mosaic_config.Config(64, splits, 2)
    given = textbook.case(shape, round(fill * (capacity - tokens)), kind, seed)
    assert textbook.error(attend(config, *given), reference(*given)) < ROUNDING


@interpreted
def test_at_every_edge_of_a_block_and_of_a_share():
    """Whole blocks, blocks in part, shares that see nothing: one program, any length."""
    shape, config = (9, 1, 3, 64, 256), mosaic_config.Config(64, 3, 2)
    for committed in (0, 1, 54, 55, 56, 63, 64, 65, 119, 120, 127, 128, 183, 192, 246, 247):
        given = textbook.case(shape, committed, "tree", committed)
        assert textbook.error(attend(config, *given), reference(*given)) < ROUNDING


@interpreted
def test_a_long_chain_has_its_bits_in_many_words():
    """More words a block than TMA moves at once."""
    given = textbook.case((160, 1, 1, 64, 256), 90, "chain", seed=1)
    config = mosaic_config.Config(splits=2)
    assert textbook.error(attend(config, *given), reference(*given)) < ROUNDING


@interpreted
def test_rows_that_a_query_does_not_see_change_nothing():
    q, keys, values, committed, line = textbook.case((20, 2, 3, 64, 256), 100, "alone", seed=1)
    config = mosaic_config.Config(splits=2)
    before = attend(config, q, keys, values, committed, line)
    hidden = committed + np.arange(1, 256 - committed)  # all but the first tree row
    keys[:, hidden], values[:, hidden] = np.random.default_rng(2).normal(size=(2, *keys[:, hidden].shape))
    assert np.array_equal(attend(config, q, keys, values, committed, line)[0], before[0])
    keys[:, committed] += 1
    assert not np.array_equal(attend(config, q, keys, values, committed, line)[0], before[0])


@interpreted
@pytest.mark.parametrize("stages", [2, 3])
def test_no_copy_races_with_what_it_is_read_for(stages):
    """By JAX's detector, which follows copies, barriers and what goes through registers (but no product's reads)."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # no public name

    from pallas_kernels.tree_attention import mosaic

    q, keys, values, committed, line = textbook.case((9, 1, 3, 64, 512), 400, "tree", seed=3)
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (q, keys, values)]
    how = mosaic.interpret_params(detect_races=True)
    config = mosaic_config.Config(splits=2, stages=stages)
    found = mosaic.tree_attention(*rounded, textbook.sees(committed, line), config, how)
    assert textbook.error(found.astype(jnp.float32), reference(q, keys, values, committed, line)) < ROUNDING
    assert not gpu_callbacks.get_races().races_found


@interpreted
def test_bits_of_bfloat16_are_taken_too():
    """As a CPU's caches keep them."""
    q, keys, values, committed, line = textbook.case((5, 1, 2, 64, 256), 100, "tree", seed=4)
    config = mosaic_config.Config(splits=2)
    bits = [jax.lax.bitcast_convert_type(jnp.asarray(x, jnp.bfloat16), jnp.uint16) for x in (keys, values)]
    mine = interpreter(config)(jnp.asarray(q, jnp.bfloat16), *bits, textbook.sees(committed, line))
    assert np.array_equal(mine, attend(config, q, keys, values, committed, line))


# The choice --------------------------------------------------------------------------------------

ROW = {
    "dtype": "bfloat16",
    "shape": {"rows": 240, "kv_heads": 8, "head_dim": 128},
    "config": {"block_k": 64, "splits": 4, "stages": 3},
    "pallas_us": 5.0,
    "xla_us": 8.0,
}
LLAMA = SHAPES["llama3-8b"]


def kernels_of(arguments, **how):
    """What a program calls: Triton's kernels, Mosaic's, or none."""
    program = str(jax.make_jaxpr(lambda *a: tree_attention(*a, **how))(*arguments))
    return "mosaic" if "mpmd_map" in program else "triton" if "pallas_call" in program else "xla"


def arguments(tokens=60, dtype=jnp.bfloat16, model=LLAMA):
    return cases.arguments(model, tokens, 2048, dtype)


@pytest.mark.skipif(not mosaic_config.SUPPORTED, reason="needs JAX 0.11")
def test_the_move_is_one_row_of_a_table(gpu):  # noqa: F811
    _, package = gpu
    assert kernels_of(arguments()) == "triton"  # nothing measured
    triton = ROW | {"config": {"splits": 4}}
    put(package, triton, operation="tree_attention")
    assert kernels_of(arguments()) == "triton"
    put(package, ROW | {"backend": "mosaic"}, operation="tree_attention")
    assert kernels_of(arguments()) == "mosaic"
    assert kernels_of(arguments(dtype=jnp.float32)) == kernels_of(arguments(tokens=1)) == "triton"  # not that row's
    put(package, ROW | {"backend": "mosaic", "pallas_us": 9.0}, operation="tree_attention")
    assert kernels_of(arguments()) == "xla"  # measured, and lost


@pytest.mark.skipif(not mosaic_config.SUPPORTED, reason="needs JAX 0.11")
def test_it_can_be_asked_for_and_triton_stands_in():
    asked = functools.partial(kernels_of, implementation="mosaic")
    with compiling_for(H100):
        assert asked(arguments()) == "mosaic"
        assert kernels_of(arguments(), implementation="pallas") == "triton"
        assert kernels_of(arguments(), implementation="pallas", config=mosaic_config.Config()) == "mosaic"
        assert asked(arguments(dtype=jnp.float32)) == "triton"
        q, keys, values, sees = arguments()
        narrow = [jax.ShapeDtypeStruct((*x.shape[:2], 72), x.dtype) for x in (q, keys, values)]
        assert asked((*narrow, sees)) == "triton"
        too_much = mosaic_config.Config(128, 4, 4)
        assert asked(arguments(), config=too_much) == "triton"
        assert attention_rows(4096, "mosaic") == (4096,)
    with compiling_for(Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0))):
        assert asked(arguments()) == "triton"


def test_before_jax_0_11_triton_stands_in(monkeypatch):
    monkeypatch.setattr(mosaic_config, "SUPPORTED", False)
    with compiling_for(H100):
        assert kernels_of(arguments(), implementation="mosaic") == "triton"
        q, keys, *_ = arguments()
        assert cases.mosaic_sweep(q, keys) == ()


def test_other_operations_take_it_as_pallas():
    assert dispatch.resolve("mosaic") == "pallas"
    assert dispatch.choose("mosaic", "a", "float32", {}, Config()) == ("pallas", Config())


def test_a_table_keeps_the_rows_of_both_kernels(gpu):  # noqa: F811
    own, _ = gpu
    path, kinds = own / "a.json", (Config, mosaic_config.Config)
    mine = measured.Row(**ROW | {"config": mosaic_config.Config(splits=4)})
    other = measured.Row(**ROW | {"config": Config(splits=2), "shape": {"rows": 4}})
    for row in (mine, other):
        measured.write(path, {"device": DEVICE}, row, *kinds)
    found = measured.read(path, *kinds)
    assert found is not None and sorted(map(str, found.rows)) == sorted(map(str, (mine, other)))
    backends = [row.get("backend") for row in json.loads(path.read_text())["rows"]]
    assert sorted(backends, key=str) == [None, "mosaic"]
    better = measured.Row(**ROW | {"config": Config(splits=8)})  # Triton wins the shape back
    measured.write(path, {"device": DEVICE}, better, *kinds)
    assert "mosaic" not in path.read_text() and len(measured.read(path, *kinds).rows) == 2


def test_a_row_of_a_backend_that_nobody_knows_is_damage(gpu, caplog):  # noqa: F811
    own, _ = gpu
    put(own, ROW | {"backend": "cuda"})
    assert measured.nearest(DEVICE, "a", "bfloat16", ROW["shape"], Config, mosaic_config.Config) is None
    assert "left out" in caplog.records[0].getMessage() and PLACE in caplog.records[0].getMessage()


@pytest.mark.parametrize("wrong", [{"block_k": 32}, {"block_k": 96}, {"splits": 0}, {"stages": 1}])
def test_settings_that_it_cannot_take_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        mosaic_config.Config(**wrong)


@pytest.mark.skipif(not mosaic_config.SUPPORTED, reason="needs JAX 0.11")
def test_a_sweep_on_hopper_has_both_kernels(gpu):  # noqa: F811
    q, keys, *_ = arguments()
    configs = cases.mosaic_sweep(q, keys)
    assert configs[0] == mosaic_config.Config.suited_to(240, 8) and len(set(configs)) == len(configs) > 6
    assert all(config.shared_memory(128) <= mosaic_config.SHARED_MEMORY for config in configs)


@pytest.mark.skipif(not mosaic_config.SUPPORTED, reason="needs JAX 0.11")
def test_it_is_of_32_bits_under_any_setting():
    with jax.enable_x64(True), compiling_for(H100):
        program = jax.make_jaxpr(lambda *a: tree_attention(*a, implementation="mosaic"))(*arguments())
    assert "mpmd_map" in str(program) and not wide_types(program.jaxpr)


# Compiled for an H100 ----------------------------------------------------------------------------

HAS_CUDA = importlib.util.find_spec("jax_cuda12_plugin") is not None
# (T, heads, KV heads, head_dim, block_k, splits, stages): Llama 3 8B, 3.2 1B, Qwen2 7B, SmolLM2, and other widths.
COMPILED = [
    (60, 32, 8, 128, 64, 4, 3),
    (60, 32, 8, 128, 128, 4, 2),
    (10, 32, 8, 128, 64, 16, 4),
    (1, 32, 8, 128, 64, 16, 3),
    (256, 32, 8, 128, 64, 2, 3),
    (60, 32, 8, 64, 64, 4, 3),
    (60, 28, 4, 128, 64, 8, 3),
    (61, 9, 3, 64, 64, 8, 3),
    (60, 16, 8, 256, 64, 4, 2),
    (60, 32, 32, 80, 64, 2, 3),
    (60, 32, 32, 96, 128, 2, 2),
]


@pytest.mark.cuda_compile
@pytest.mark.skipif(not HAS_CUDA, reason="needs jax[cuda12]: `make gpu-compile`")
@pytest.mark.skipif(os.environ.get("JAX_PLATFORMS") != "cpu", reason="needs JAX_PLATFORMS=cpu, set before all else")
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_it_compiles_without_a_spill(case, record_property):
    """To the end, by NVIDIA's assembler; two launches and nothing besides; what shared memory it takes was foreseen."""
    tokens, heads, kv_heads, head_dim, *division = case
    config = mosaic_config.Config(*division)
    from benchmarks.gpu_compile import assembler, hlo, programs

    shape = [(tokens, heads, head_dim), *2 * [(kv_heads, 2048, head_dim)]]
    words = jax.ShapeDtypeStruct((tokens, -(-tokens // 32)), jnp.int32)
    sees = Sees(jax.ShapeDtypeStruct((), jnp.int32), words)  # type: ignore[arg-type]
    given = (*(jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shape), sees)
    traced = programs.Traced(lambda *a: tree_attention(*a, implementation="pallas", config=config), given, ())
    with assembler.listening() as listener:
        done = programs.compiled_program(lambda: traced, listener.options)
        first, second = listener.heard()
    program = hlo.Program(done.text)
    launched = [launch.what for launch in program.block(program.entry).launches]
    assert launched == ["kernel tree_attention", "kernel tree_attention_combine"]
    for kernel in (first, second):
        record_property(kernel["kernel"], kernel)
        assert kernel["spilled"] == 0 and kernel["registers"] <= 255 and kernel["threads"] == 128
        assert kernel["shared_memory"] <= mosaic_config.SHARED_MEMORY
    assert first["shared_memory"] <= config.shared_memory(head_dim) < first["shared_memory"] + 4096
