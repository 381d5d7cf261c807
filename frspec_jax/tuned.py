"""The draft setting that suits a device, as `python -m eval tune` measured it: DRAFT/tuned.json.

One file a draft, one entry a device and dtype, so that a checkpoint may be tuned on several machines.
`frspec_jax.load` takes its defaults from there; whatever the caller asks for goes first.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from frspec_jax import files
from frspec_jax.config import VANILLA, TreeConfig
from frspec_jax.errors import UserError, quoted
from frspec_jax.schema import checked

FILE = "tuned.json"
FORMAT = "frspec-jax tuned 1"


@dataclasses.dataclass(frozen=True)
class Setting:
    """V' and the tree's shape. `VANILLA` is a setting too: no tree beats plain decoding on this device."""

    draft_vocab: int | None
    tree: TreeConfig


NO_TREE = Setting(None, VANILLA)


@functools.cache
def machine() -> str:
    """The processor or accelerator at hand, in words."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"CPU: {name}, {cores} cores"


def key(dtype: Any) -> str:
    """The name of this device's entry: settings that suit one dtype need not suit another."""
    return f"{machine()}; {jnp.dtype(dtype).name}"


def read(folder: Path, dtype: Any) -> Setting | None:
    """What suits a draft on this device, or None where it was never tuned here.

    Raises:
      UserError: DRAFT/tuned.json is damaged.
    """
    entry = _entries(folder).get(key(dtype))
    if entry is None:
        return None
    try:
        return checked(Setting, entry, key(dtype))
    except UserError as error:
        raise UserError(
            f"{quoted(folder / FILE)} is damaged ({error}); delete it, or run python -m eval tune again"
        ) from None


def write(folder: Path, dtype: Any, setting: Setting, facts: dict[str, Any]) -> Path:
    """Set this device's entry, beside those of others. An interruption leaves the old file; a damaged one is replaced.

    facts: for the reader: what was measured, and when.
    """
    tree = {"size": setting.tree.size, "depth": setting.tree.depth, "top_k": setting.tree.top_k}
    file = folder / FILE
    try:
        others = _entries(folder)
    except UserError:  # damaged: what it held of other devices cannot be saved any more
        others = {}
    entries = others | {key(dtype): {"draft_vocab": setting.draft_vocab, "tree": tree, **facts}}
    files.write_json(file, {"format": FORMAT, "devices": entries})
    return file


def forget_damaged(folder: Path, dtype: Any) -> UserError | None:
    """Take away what `read` refuses, so that this device can be tuned anew; what was wrong, or None.

    Of a file that can be read only this device's entry goes.
    """
    try:
        read(folder, dtype)
        return None
    except UserError as error:
        damage = error
    file = folder / FILE
    try:
        others = {name: entry for name, entry in _entries(folder).items() if name != key(dtype)}
    except UserError:
        others = {}
    files.write_json(file, {"format": FORMAT, "devices": others})
    return damage


def _entries(folder: Path) -> dict[str, Any]:
    file = folder / FILE
    try:
        data = json.loads(file.read_text("utf-8"))
        if data["format"] == FORMAT:
            return dict(data["devices"])
        reason = f"it does not say format {FORMAT!r}"
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error)
    raise UserError(f"{quoted(file)} is damaged ({reason}); delete it, or run python -m eval tune again")
