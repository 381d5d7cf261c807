"""Weights in a folder, as Orbax keeps them: written and read whole, or read a part at a time."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from frspec_jax.errors import UserError, quoted
from frspec_jax.files import leave_orbax_out, orbax_refusals


def _checkpointer() -> ocp.Checkpointer:
    """One that reads and writes in this process alone: in a run over several hosts, only one may be here."""
    alone = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process-{me}"
        )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def save_params(folder: Path, params: Any) -> None:
    """Write a pytree of weights to `folder` (Orbax); returns once it is on disk."""
    if jax.process_count() > 1:
        params = jax.tree.map(np.asarray, params)  # Orbax expects a jax.Array to be written by every process
    with orbax_refusals(), _checkpointer() as checkpointer:
        checkpointer.save(Path(folder).resolve(), args=ocp.args.StandardSave(params))


def load_params(folder: Path, shapes: Any) -> Any:
    """Restore a pytree of weights into the shapes and dtypes of `shapes`."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)
    try:
        with _checkpointer() as checkpointer:
            found = checkpointer.metadata(folder.resolve()).item_metadata
            names = _by_name(wanted, getattr(found, "tree", None))
            restored = checkpointer.restore(folder.resolve(), args=ocp.args.StandardRestore(names))
            return _filled(wanted, restored)
    except (Exception, asyncio.CancelledError) as error:  # Orbax raises many kinds for a folder that is cut short
        if interrupted(error):
            raise KeyboardInterrupt from None
        leave_orbax_out()
        raise _damaged(folder, error) from None


def _by_name(wanted: Any, found: Any) -> Any:
    """Wanted weights as Orbax keeps them, by name; without fields that are None and that the folder does not know.

    A folder may be older than a field of a weight that its model does not have.
    """
    if isinstance(wanted, tuple):
        each = found if isinstance(found, list | tuple) and len(found) == len(wanted) else [None] * len(wanted)
        return [_by_name(one, has) for one, has in zip(wanted, each, strict=True)]
    if not dataclasses.is_dataclass(wanted) or hasattr(wanted, "shape"):
        return wanted
    known = found if isinstance(found, Mapping) else {}
    values = {field.name: getattr(wanted, field.name) for field in dataclasses.fields(wanted)}
    return {
        name: _by_name(value, known.get(name)) for name, value in values.items() if value is not None or name in known
    }


def _filled(wanted: Any, restored: Any) -> Any:
    """What was restored by name, in the structure of what was wanted."""
    if isinstance(wanted, tuple):
        return tuple(_filled(one, has) for one, has in zip(wanted, restored, strict=True))
    if not dataclasses.is_dataclass(wanted) or hasattr(wanted, "shape"):
        return restored
    fields = dataclasses.fields(wanted)
    kind: Any = type(wanted)
    return kind(**{field.name: _filled(getattr(wanted, field.name), restored.get(field.name)) for field in fields})


class _OnDisk:
    """A stored weight, of which parts can be read (`sharding.Rows`)."""

    def __init__(self, array: Any) -> None:
        self._array, self.shape = array, tuple(array.shape)

    def __getitem__(self, at: Any) -> np.ndarray:
        read: np.ndarray = self._array[at].read().result()
        return read


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Callable[[tuple[str, ...]], _OnDisk | None]]:
    """The stored weights of a folder, by the names that lead to them; None for one that is not there.

    Raises:
      UserError: the folder is damaged.
    """
    import tensorstore

    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder.resolve()}/"}}

    def stored(names: tuple[str, ...]) -> _OnDisk | None:
        array = {"driver": "zarr", "kvstore": store, "path": ".".join(names) + "/"}
        if (
            names == ("lm_head",)
            and not tensorstore.KvStore.open(store)
            .result()
            .list(tensorstore.KvStore.KeyRange("lm_head/", "lm_head0"))
            .result()
        ):  # tied: the embedding serves as the head
            return None
        return _OnDisk(tensorstore.open(array, open=True).result())

    try:
        yield stored
    except ValueError as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: BaseException) -> UserError:
    """What to say of a folder that cannot be read: the reason is what was found first, in its first line."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{quoted(folder)} is damaged or incomplete ({reason[:200]}); convert it again")


def interrupted(error: BaseException) -> bool:
    """Whether Ctrl-C is behind an error: Orbax hands it on as the cause of one of its own, or as a cancelled task."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt | asyncio.CancelledError | concurrent.futures.CancelledError):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
