"""Where the parts of weights, caches and states stand on a mesh; `sharding` says it of a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from frspec_jax.kv_cache import LayerKV
from frspec_jax.plan import Plan
from frspec_jax.sharding import COLUMNS, ROWS, WHOLE, on_devices, weight_specs
from frspec_jax.state import Caches, DecodeState, Weights


def weights_on(weights: Weights) -> Weights:
    """Where the parts of the weights stand on a mesh: the target's are divided, and each device has all others."""
    return Weights(weight_specs(weights.target), WHOLE, WHOLE)  # type: ignore[arg-type]


def caches_on(caches: Caches) -> Caches:
    """Where the parts of caches stand on a mesh: the target's keys and values are divided by heads."""

    def layer(kv: LayerKV) -> LayerKV:
        spec = ROWS if kv.slot is None and kv.keys.ndim == 3 else COLUMNS  # of a pool heads are the second axis
        return LayerKV(spec, spec, WHOLE)  # type: ignore[arg-type]

    return Caches(tuple(map(layer, caches.target)), WHOLE, WHOLE)  # type: ignore[arg-type]


def state_on(caches: Caches) -> DecodeState:
    """Where the parts of a state with such caches stand on a mesh."""
    parts: dict[str, Any] = {field.name: WHOLE for field in dataclasses.fields(DecodeState)}
    return DecodeState(**(parts | {"caches": caches_on(caches)}))


T = TypeVar("T")


def made(plan: Plan, make: Callable[[], T], where: Callable[[T], Any]) -> T:
    """Arrays made where the results of this plan's programs stand: for others its programs would be compiled once more.

    On a mesh each device makes its own part. where: says of them where their parts stand there.
    """
    if plan.mesh is None:
        return jax.device_put(make(), jax.local_devices()[0])
    shapes = jax.eval_shape(make)
    return jax.jit(make, out_shardings=on_devices(plan.mesh, shapes, where(shapes)))()
