"""Every kernel, compiled for the device at hand, against its XLA twin there; attention in Mosaic GPU too."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_check.programs import Sizes, sizes_of
from benchmarks.gpu_check.runner import Session
from pallas_kernels.bench import widened
from pallas_kernels.best_children import best_children
from pallas_kernels.compaction import compact
from pallas_kernels.fused_linear import cases as products
from pallas_kernels.rotary_append import Place, Rotation, rotary_append
from pallas_kernels.subvocab_head import cases as heads
from pallas_kernels.timing import Case
from pallas_kernels.tree_attention import cases as attention
from pallas_kernels.tree_attention import mosaic_config

WORKERS = 8  # kernels that are compiled side by side
Check = tuple[str, Callable[[], tuple[float, float]]]  # a name, and what finds the error and what it may be


def kernels(session: Session) -> None:
    """Tell each kernel's error; the step fails if one is too large, or if a kernel does not compile."""
    wrong = []
    with concurrent.futures.ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        waiting = {pool.submit(check): name for name, check in checks(sizes_of(session))}
        for future in concurrent.futures.as_completed(waiting):
            name = waiting[future]
            try:
                error, tolerance = future.result()
                right = error <= tolerance  # NaN is not
                session.tell(name, {"error": error, "tolerance": tolerance, "right": right})
            except Exception as failure:
                right = False
                session.tell(name, {"right": False, "failed": str(failure)[:600]})
            wrong += [] if right else [name]
    if wrong:
        raise RuntimeError(f"wrong: {', '.join(wrong)}")


def checks(sizes: Sizes) -> Iterator[Check]:
    """All six kernels: small in float32, and at the model's sizes in its own dtype."""
    small = ("tiny", 200, None, jnp.float32)
    large = (sizes.model, sizes.context, sizes.draft_vocab, sizes.dtype)
    for model, context, vocab, dtype in (small,) if sizes.model == "tiny" else (small, large):
        of_model = [functools.partial(attention.timed, model, tokens, context, dtype) for tokens in (60, 10, 1)]
        of_model += [functools.partial(heads.timed, model, 10, vocab, dtype)]
        of_model += [functools.partial(products.timed, model, 10, product, dtype) for product in products.PRODUCTS]
        if model != "tiny":
            of_model += [functools.partial(products.timed, model, 60, product, dtype) for product in ("qkv", "down")]
        else:
            of_model = of_model[1:2] + of_model[3:5]
        for make in of_model:
            name, *rest = make.args
            label = " ".join(str(part) for part in rest if part is not None and part is not dtype)
            operation = make.func.__module__.split(".")[1]
            yield f"{operation}, {name} {label}", lambda make=make: _of_case(make(), sizes)
    if mosaic_config.available(sizes.kernel == "interpret"):
        yield from _of_mosaic(sizes)
    yield "rotary_append", lambda: _rotary(sizes)
    yield "compaction", lambda: _compaction(sizes)
    yield "best_children", lambda: _children(sizes)


def _of_mosaic(sizes: Sizes) -> Iterator[Check]:
    """Attention in Mosaic GPU."""
    for tokens in (10,) if sizes.model == "tiny" else (60, 10, 1):
        label = f"tree_attention in Mosaic GPU, {sizes.model} {tokens} {sizes.context}"
        yield label, lambda tokens=tokens: _mosaic(tokens, sizes)


def _of_case(case: Case, sizes: Sizes) -> tuple[float, float]:
    """The kernel in its dtype against XLA in float32."""
    mine = jax.jit(functools.partial(case.run, implementation=sizes.kernel))(case.moving, *case.still)
    exact = jax.jit(functools.partial(case.run, implementation="xla"))(
        *jax.tree.map(widened, (case.moving, *case.still))
    )
    return _difference(mine, exact), case.tolerance


def _mosaic(tokens: int, sizes: Sizes) -> tuple[float, float]:
    """The largest error under the configs of its sweep, in bfloat16: that is all that it takes."""
    case = attention.timed(sizes.model, tokens, sizes.context, jnp.bfloat16)
    interpret = sizes.kernel == "interpret"
    configs = (mosaic_config.Config(splits=2),) if interpret else attention.mosaic_sweep(case.moving, case.still[0])
    if not all(mosaic_config.takes(case.moving, case.still[0], config, interpret) for config in configs):
        raise RuntimeError("Triton's kernel would run in place of Mosaic's")
    runs = [dataclasses.replace(case, run=functools.partial(case.run, config=config)) for config in configs]
    return max(_of_case(run, sizes)[0] for run in runs), case.tolerance


def _difference(one: Any, other: Any) -> float:
    """The largest between two pytrees of arrays."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(jnp.abs(widened(a) - widened(b)).max()) for a, b in pairs)


def _both(function: Callable[..., Any], sizes: Sizes, *arguments: Any) -> tuple[Any, Any]:
    """What the kernel and XLA make of the same arguments."""
    found = (jax.jit(functools.partial(function, implementation=how))(*arguments) for how in (sizes.kernel, "xla"))
    kernel, xla = found
    return kernel, xla


def _rotary(sizes: Sizes) -> tuple[float, float]:
    shape, tokens, rng = sizes.shape, sizes.tree.size, np.random.default_rng(0)
    columns = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    qkv = jnp.asarray(rng.standard_normal((tokens, columns), np.float32), sizes.dtype)
    angle = rng.standard_normal((tokens, 1, shape.head_dim // 2))
    by = Rotation(jnp.asarray(np.concatenate([np.cos(angle), np.sin(angle)], -1), jnp.float32))
    keys, values = jnp.asarray(rng.standard_normal((2, shape.kv_heads, 256, shape.head_dim), np.float32), sizes.dtype)
    # One rounding of a number below eight may go the other way.
    tolerance = 2.0**-5 if sizes.dtype == jnp.bfloat16 else 4e-6
    return _difference(*_both(rotary_append, sizes, qkv, by, keys, values, Place(jnp.int32(37)))), tolerance


def _compaction(sizes: Sizes) -> tuple[float, float]:
    """Rows that move are copies, so they are equal; those past the path's end may be anything."""
    shape, start, rng = sizes.shape, 37, np.random.default_rng(0)
    filled = rng.standard_normal((2, 2, shape.kv_heads, 128, shape.head_dim), np.float32)
    caches = [jnp.asarray(rows, sizes.dtype) for layer in filled for rows in layer]
    path = np.array([0, 1, 4, 5, 0], np.int32)
    found = _both(compact, sizes, caches, jnp.int32(start), path)
    kept = np.r_[0 : start + 4, start + len(path) : 128]
    return _difference(*([rows[:, kept] for rows in side] for side in found)), 0.0


def _children(sizes: Sizes) -> tuple[float, float]:
    """Whole numbers as scores, so that many tie: the choice is equal to the bit, or wrong."""
    k, rng = sizes.tree.top_k, np.random.default_rng(0)
    beams, scores = (jnp.asarray(rng.integers(-3, 1, shape), jnp.float32) for shape in (k, (k, k)))
    tokens = jnp.asarray(rng.integers(0, 10**6, (k, k)), jnp.int32)
    sees, own = jnp.asarray(rng.integers(-(2**31), 2**31, (2, k, 2)), jnp.int32)
    kernel, xla = _both(best_children, sizes, beams, scores, tokens, sees, own)
    pairs = zip(jax.tree.leaves(kernel), jax.tree.leaves(xla), strict=True)
    return float(not all(np.array_equal(a, b) for a, b in pairs)), 0.0
