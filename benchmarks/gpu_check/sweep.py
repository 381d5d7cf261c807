"""Which config of each kernel is best here, and whether it beats XLA: tables for `auto`, most telling shapes first."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator

import jax

from benchmarks.gpu_check.programs import Sizes, bandwidth_of, sizes_of
from benchmarks.gpu_check.runner import Session
from pallas_kernels import bench, measured
from pallas_kernels.fused_linear import cases as products
from pallas_kernels.subvocab_head import cases as heads
from pallas_kernels.timing import Case
from pallas_kernels.tree_attention import cases as attention

WORKERS = 14  # configs that are compiled side by side
LEAST = 12.0  # seconds: with less left no further shape is begun


def sweep(session: Session) -> None:
    """Tell each shape's times, and keep the winner in OUT/kernels."""
    sizes, speed = sizes_of(session), bandwidth_of(session)
    folder = measured.own_folder()
    assert folder is not None, "the worker has named one"
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    calls, workers = (2, 1) if session.dry else (64, min(WORKERS, os.cpu_count() or 1))
    for make in cases(sizes):
        if session.left < LEAST:
            session.tell("left out", "the rest, for lack of time")
            return
        case = make()
        configs = case.configs[:1] if session.dry else case.configs
        case = dataclasses.replace(case, configs=configs)
        found = bench.measure(case, sizes.kernel, calls, speed, workers)
        session.tell(f"{case.operation}: {case.label}", found)
        bench.keep(folder, about, found, *map(type, case.configs))


def cases(sizes: Sizes) -> Iterator[Callable[[], Case]]:
    """A round reads most in verification, then in the draft's head and levels; vanilla's step comes last."""
    model, context, dtype = sizes.model, sizes.context, sizes.dtype
    if model == "tiny":
        yield functools.partial(attention.timed, model, 10, context, dtype)
        yield functools.partial(products.timed, model, 10, "down", dtype)
        return
    yield functools.partial(attention.timed, model, 60, context, dtype)
    yield functools.partial(heads.timed, model, heads.TOP_K, sizes.draft_vocab, dtype)
    for rows in (60, 10):
        for product in ("gate and up", "down", "qkv", "output"):
            yield functools.partial(products.timed, model, rows, product, dtype)
        yield functools.partial(attention.timed, model, 10 if rows == 60 else 1, context, dtype)
    for product in ("gate and up", "down", "qkv", "output"):
        yield functools.partial(products.timed, model, 1, product, dtype)
    for vocab in (8192, None):
        yield functools.partial(heads.timed, model, heads.TOP_K, vocab, dtype)
