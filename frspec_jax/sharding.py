"""A target over several devices: which part of each weight a device holds, and how programs run on all of them.

Every device runs the same program on its own part of the target: some of the heads, some of the MLP's columns, some of
the head's rows. What attention and MLP add is a sum over the devices, two a layer; everything else each device works
out for itself. So the code of a layer is the code of one device, kernels included, and one device (`mesh` is None) is
the case without sums.

A draft's layer is divided in the same way where that `pays`, and else each device has it whole.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from frspec_jax.config import ModelConfig
from frspec_jax.errors import UserError
from frspec_jax.llama import LlamaParams

AXIS = "model"  # of a mesh: heads, columns of the MLP and rows of the head are divided along it
WHOLE, ROWS, COLUMNS = PartitionSpec(), PartitionSpec(AXIS), PartitionSpec(None, AXIS)

# Where the parts of a weight stand. What is not here, each device has whole.
PARTITION = {
    "qkv": ROWS,  # by heads, see `Split.pieces`
    "qkv_bias": ROWS,
    "output": COLUMNS,
    "gate_up": ROWS,
    "gate_up_bias": ROWS,
    "down": COLUMNS,
    "lm_head": ROWS,
}

# Bytes of a draft's layer that a device must be spared for the two sums a pass to pay. An H100 reads so many in 20 us,
# and two sums of a few rows are taken to last as long over NVLink: neither was measured.
LEAST_SAVED = 64 << 20

T = TypeVar("T")


def mesh_of(devices: int) -> Mesh | None:
    """A mesh of so many devices, those of all hosts in their order; None for one.

    Raises:
      UserError: there are not so many.
    """
    there = jax.devices()
    if not 1 <= devices <= len(there):
        most = "1 device; give 1" if len(there) == 1 else f"{len(there)} devices; give 1 to {len(there)}"
        raise UserError(f"--tensor-parallel {devices}: JAX found {most}")
    return None if devices == 1 else Mesh(np.array(there[:devices]), (AXIS,))


def meshes_of(replicas: int, devices: int) -> list[Mesh | None]:
    """Meshes of so many devices for each of several copies of a model, on the devices of this host; [None] for one.

    Raises:
      UserError: there are not so many.
    """
    if replicas == 1:
        return [mesh_of(devices)]
    there, taken = jax.local_devices(), replicas * devices
    if replicas < 1 or devices < 1 or taken > len(there):
        raise UserError(
            f"--data-parallel {replicas} with --tensor-parallel {devices} takes {max(taken, 0)} devices, and JAX found "
            f"{len(there)} here; both are at least 1"
        )
    grid = np.array(there[:taken]).reshape(replicas, devices)
    return [Mesh(row, (AXIS,)) for row in grid]


class Rows(Protocol):
    """A stored weight, of which parts can be read: an array, or one on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, at: Any) -> Any: ...


def divides(config: ModelConfig, count: int) -> bool:
    """Whether layers of these sizes can be divided among so many devices, each with whole heads."""
    heads, kv_heads, inner = config.num_heads, config.num_kv_heads, config.intermediate_size
    return heads % count == inner % count == 0 and (kv_heads % count == 0 or count % kv_heads == 0)


@dataclasses.dataclass(frozen=True)
class Split:
    """A target, or a draft's layer as a model of its own, of these sizes, divided among `count` devices.

    Raises:
      UserError: it cannot be divided so.
    """

    config: ModelConfig
    count: int

    def __post_init__(self) -> None:
        if not divides(self.config, self.count):
            heads, kv_heads, inner = self.config.num_heads, self.config.num_kv_heads, self.config.intermediate_size
            raise UserError(
                f"--tensor-parallel {self.count}: the target's {heads} heads, {kv_heads} KV heads and {inner} columns "
                "of the MLP cannot be divided so; give a number that divides the first and the last, and divides the "
                "KV heads or is a multiple of them"
            )

    @property
    def kv_heads(self) -> int:
        """KV heads a device. Where there are fewer of them than devices, several devices hold the same one."""
        return max(1, self.config.num_kv_heads // self.count)

    @property
    def all_kv_heads(self) -> int:
        """KV heads of all devices together: what a cache over the mesh has."""
        return self.kv_heads * self.count

    @property
    def vocabulary(self) -> int:
        """Rows of the head, rounded up so that they can be divided."""
        return -(-self.config.vocab_size // self.count) * self.count

    def pieces(self, name: str, device: int) -> list[tuple[int, int]]:
        """The rows (or columns) of a stored weight that a device holds, in its order: ranges, from and to.

        Of Q, K and V each device holds its own heads of all three, of gate and up its own columns of both.
        """
        config, count = self.config, self.count
        if name.startswith("qkv"):
            width, heads = config.head_dim, config.num_heads // count
            first = device * config.num_kv_heads // count  # the same for devices that share one
            runs = [(device * heads, heads)]
            runs += [(config.num_heads + part * config.num_kv_heads + first, self.kv_heads) for part in (0, 1)]
            return [(start * width, (start + some) * width) for start, some in runs]
        if name.startswith("gate_up"):
            some = config.intermediate_size // count
            return [(start + device * some, start + (device + 1) * some) for start in (0, config.intermediate_size)]
        size = {
            "output": config.num_heads * config.head_dim,
            "down": config.intermediate_size,
            "lm_head": self.vocabulary,
        }[name]
        return [(device * size // count, (device + 1) * size // count)]

    def part(self, name: str, stored: Rows, device: int) -> np.ndarray:
        """What a device holds of a weight; rows of the head beyond the vocabulary are zeros."""
        axis = PARTITION[name].index(AXIS)
        ranges = self.pieces(name, device)
        end = stored.shape[axis]
        rows = [stored[(slice(None),) * axis + (slice(min(a, end), min(b, end)),)] for a, b in ranges]
        whole = np.concatenate([np.asarray(row) for row in rows], axis)
        wanted = sum(b - a for a, b in ranges)
        spare = [(0, wanted - whole.shape[axis] if dim == axis else 0) for dim in range(whole.ndim)]
        return np.pad(whole, spare) if any(after for _, after in spare) else whole


def in_parts(split: Split, mesh: Mesh, name: str, stored: Rows, dtype: Any) -> Array:
    """A stored weight, divided among the devices of a mesh: each device's part is read by itself."""
    axis, width = PARTITION[name].index(AXIS), sum(b - a for a, b in split.pieces(name, 0))
    shape = (*stored.shape[:axis], width * split.count, *stored.shape[axis + 1 :])

    def part(at: Any) -> np.ndarray:
        return split.part(name, stored, (at[axis].start or 0) // width).astype(dtype, copy=False)

    return jax.make_array_from_callback(shape, NamedSharding(mesh, PARTITION[name]), part)


def _names(path: Sequence[Any]) -> tuple[str, ...]:
    """The names that lead to a weight."""
    return tuple(str(getattr(key, "name", getattr(key, "idx", key))) for key in path)


def placed(
    config: ModelConfig, mesh: Mesh, stored: Callable[[tuple[str, ...]], Rows | None], dtype: Any
) -> LlamaParams:
    """A target's weights on a mesh, each device's part read by itself.

    stored: a weight, by the names that lead to it in `LlamaParams` ("layers", "3", "qkv"); None where there is none.
    """
    from frspec_jax.shapes import model_shapes

    split = Split(config, mesh.devices.size)

    def place(path: Sequence[Any], like: Any) -> Array:
        names = _names(path)
        source = stored(names)
        if names[-1] == "lm_head" and source is None:  # tied: a device's rows of it are a copy
            source = stored(("embedding",))
        assert source is not None
        if names[-1] in PARTITION:
            return in_parts(split, mesh, names[-1], source, dtype)
        whole = functools.cache(lambda: np.asarray(source[...]).astype(dtype, copy=False))
        return jax.make_array_from_callback(like.shape, NamedSharding(mesh, WHOLE), lambda _: whole())

    shapes = model_shapes(dataclasses.replace(config, tied_head=False), dtype)
    params: LlamaParams = jax.tree_util.tree_map_with_path(place, shapes)
    return params


def spread(params: LlamaParams, config: ModelConfig, mesh: Mesh) -> LlamaParams:
    """A target's weights that are in memory, divided among the devices of a mesh."""

    def stored(names: tuple[str, ...]) -> Any:
        found: Any = params
        for name in names:
            found = found[int(name)] if name.isdecimal() else getattr(found, name)
        return None if found is None else np.asarray(found)

    return placed(config, mesh, stored, params.embedding.dtype)


def pays(weights: Any, config: ModelConfig, count: int) -> bool:
    """Whether a draft's layer is divided among so many devices: it can be, and a pass on each then reads enough less.

    weights: the draft's, or their shapes. config: its layer, as a model of one.
    """
    paths = jax.tree_util.tree_leaves_with_path(weights)
    layer = sum(x.size * x.dtype.itemsize for path, x in paths if _names(path)[-1] in PARTITION)
    return divides(config, count) and layer - layer // count >= LEAST_SAVED


def spread_draft(weights: T, split: Split, mesh: Mesh) -> T:
    """A draft's weights that are in memory: its layer divided among the devices of a mesh, all else on each of them."""

    def place(path: Sequence[Any], x: Any) -> Any:
        name = _names(path)[-1]
        return in_parts(split, mesh, name, np.asarray(x), x.dtype) if name in PARTITION else everywhere(x, mesh)

    placed: T = jax.tree_util.tree_map_with_path(place, weights)
    return placed


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays that each device of a mesh has whole; no mesh: as they are."""
    if mesh is None:
        return tree
    there = NamedSharding(mesh, WHOLE)

    def put(x: Any) -> Array:
        if isinstance(x, Array) and x.sharding.is_equivalent_to(there, x.ndim):
            return x  # the target's embedding, of which a device needs no second one
        if isinstance(x, Array) and len(x.sharding.device_set) > 1:  # of the target's: from device to device
            moved: Array = jax.jit(lambda x: x, out_shardings=there)(x)
            return moved
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, there, lambda _: whole)

    return jax.tree.map(put, tree)


def on_devices(mesh: Mesh, arrays: Any, specs: Any) -> Any:
    """The sharding of each array, in their structure, by specs of which one may stand for several."""
    every = jax.tree.broadcast(specs, arrays, is_leaf=lambda x: isinstance(x, PartitionSpec))
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), every, is_leaf=lambda x: isinstance(x, PartitionSpec))


def agreed(arrays: Any) -> Any:
    """Arrays as the first of several hosts has them: what a device measures differs, and hosts must decide alike."""
    if jax.process_count() == 1:
        return arrays
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(arrays)


def weight_specs(weights: Any) -> Any:
    """Where the parts of weights stand, a target's or those of a draft that is divided, in their structure."""
    return jax.tree_util.tree_map_with_path(lambda path, _: PARTITION.get(_names(path)[-1], WHOLE), weights)


def on_mesh(program: Callable[..., Any], mesh: Mesh | None, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """A program of arrays, run by every device of a mesh on its own parts; no mesh: the program."""
    if mesh is None:
        return program
    # What is the same on all devices is so since all work it out alike: nothing there is to be proved to JAX.
    return jax.shard_map(program, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
