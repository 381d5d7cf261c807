"""Where the parts of weights, caches and states stand on a mesh; `sharding` says it of a weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from frspec_jax.drafters.base import Drafter, DraftWeights
from frspec_jax.drafters.beam import BeamDrafter, BeamMemory
from frspec_jax.kv_cache import LayerKV
from frspec_jax.plan import Plan
from frspec_jax.sharding import (
    COLUMNS,
    ROWS,
    WHOLE,
    Split,
    everywhere,
    on_devices,
    pays,
    spread_draft,
    weight_specs,
)
from frspec_jax.state import Caches, DecodeState, Weights


def draft_on(mesh: Mesh | None, drafter: Drafter, weights: DraftWeights) -> tuple[Drafter, DraftWeights]:
    """A drafter and its weights on a mesh, its layer divided where that pays; no mesh: as they are."""
    if mesh is None:
        return drafter, weights
    drafter = divided(drafter, weights, mesh.devices.size)
    split = split_of(drafter)
    return drafter, everywhere(weights, mesh) if split is None else spread_draft(weights, split, mesh)


def divided(drafter: Drafter, weights: DraftWeights, devices: int) -> Drafter:
    """The drafter, which divides its layer among so many devices where that pays; weights: its own, or their shapes."""
    if isinstance(drafter, BeamDrafter) and pays(weights, drafter.config, devices):
        return drafter.divided(devices)
    return drafter


def split_of(drafter: Drafter) -> Split | None:
    """How a drafter's layer is divided; None: each device has all of it."""
    return drafter.split if isinstance(drafter, BeamDrafter) else None


def weights_on(plan: Plan, weights: Weights) -> Weights:
    """Where the parts of the weights stand on a mesh: layers are divided, and each device has all others."""
    draft = WHOLE if split_of(plan.drafter) is None else weight_specs(weights.draft)
    return Weights(weight_specs(weights.target), draft, WHOLE)  # type: ignore[arg-type]


def caches_on(plan: Plan, caches: Caches) -> Caches:
    """Where the parts of caches stand on a mesh: keys and values of layers that are divided are so by heads."""

    def layer(kv: LayerKV) -> LayerKV:
        spec = ROWS if kv.slot is None and kv.keys.ndim == 3 else COLUMNS  # of a pool heads are the second axis
        return LayerKV(spec, spec, WHOLE)  # type: ignore[arg-type]

    draft: Any = WHOLE
    if split_of(plan.drafter) is not None:
        assert isinstance(caches.draft, BeamMemory)
        draft = BeamMemory(layer(caches.draft.kv), WHOLE)  # type: ignore[arg-type]
    return Caches(tuple(map(layer, caches.target)), draft, WHOLE)  # type: ignore[arg-type]


def state_on(plan: Plan, caches: Caches) -> DecodeState:
    """Where the parts of a state with such caches stand on a mesh."""
    parts: dict[str, Any] = {field.name: WHOLE for field in dataclasses.fields(DecodeState)}
    return DecodeState(**(parts | {"caches": caches_on(plan, caches)}))


T = TypeVar("T")


def made(plan: Plan, make: Callable[[], T], where: Callable[[T], Any]) -> T:
    """Arrays made where the results of this plan's programs stand: for others its programs would be compiled once more.

    On a mesh each device makes its own part. where: says of them where their parts stand there.
    """
    if plan.mesh is None:
        return jax.device_put(make(), jax.local_devices()[0])
    shapes = jax.eval_shape(make)
    return jax.jit(make, out_shardings=on_devices(plan.mesh, shapes, where(shapes)))()
