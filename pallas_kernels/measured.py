"""Tables of measured times: under which config a kernel beat XLA, by device, operation, dtype and shape.

A table is a JSON file DEVICE/OPERATION.json, one row a measured shape. `python -m pallas_kernels.bench --tune` writes
them to the user's own folder, which is read first; behind it stand those that came with the package. They decide how
fast a program is, never what it computes. Importing this needs no JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "FRSPEC_JAX_CACHE"  # a folder, or "off"
PACKAGED = Path(__file__).with_name("tables")
TRITON = "triton"  # the backend of a row that names none
TUNE = "python -m pallas_kernels.bench --tune"


def cache_folder() -> Path | None:
    """Where this project keeps what a machine found out: FRSPEC_JAX_CACHE, or frspec-jax in the user's cache folder.

    That is XDG_CACHE_HOME or else ~/.cache. None where FRSPEC_JAX_CACHE is "off".
    """
    wanted = os.environ.get(CACHE_VARIABLE)
    if wanted == "off":
        return None
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(wanted) if wanted else home / "frspec-jax"


def own_folder() -> Path | None:
    """The user's own tables: `kernels` in the cache folder, or None without one."""
    folder = cache_folder()
    return folder and folder / "kernels"


def table_path(folder: Path, device: str, operation: str) -> Path:
    """FOLDER/DEVICE/OPERATION.json, the kind of device in letters that any file system takes."""
    return folder / re.sub(r"[^a-z0-9.]+", "-", device.lower()).strip("-.") / f"{operation}.json"


def backend_of(kind: type) -> str:
    """Which of Pallas's backends compiles the kernel that configs of this class are for, as a table's row names it."""
    return getattr(kind, "backend", TRITON)


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured shape: the kernel's best config, and microseconds of both implementations.

    Where an operation has several kernels, the config is the best one's, and in the file `backend` says whose.
    """

    dtype: str
    shape: Mapping[str, int]  # sizes, by name
    config: Any  # the kernel's, a dataclass
    pallas_us: float
    xla_us: float

    def __post_init__(self) -> None:
        whole = [*self.shape.values(), *vars(self.config).values()]
        if not self.shape or not all(type(size) is int and size > 0 for size in whole):
            raise ValueError("a size or a setting is no positive whole number")
        if not all(isinstance(us, int | float) and us > 0 for us in (self.pallas_us, self.xla_us)):
            raise ValueError("a time is no positive number")

    def written(self) -> dict[str, Any]:
        """As a table has it."""
        named = {} if (backend := backend_of(type(self.config))) == TRITON else {"backend": backend}
        return named | dataclasses.asdict(self)

    def distance(self, shape: Mapping[str, int]) -> float:
        """By how many doublings the size that differs most does so; infinite for sizes of other names."""
        if self.shape.keys() != shape.keys():
            return math.inf
        return max(abs(math.log2(shape[name] / size)) for name, size in self.shape.items())


@dataclasses.dataclass(frozen=True)
class Table:
    """What was measured of one operation on one kind of device."""

    rows: tuple[Row, ...]

    def nearest(self, dtype: str, shape: Mapping[str, int]) -> Row | None:
        """The row of the nearest shape, if no size is off by more than a factor of two."""
        rows = [row for row in self.rows if row.dtype == dtype and row.distance(shape) <= 1]
        return min(rows, key=lambda row: row.distance(shape), default=None)


def nearest(device: str, operation: str, dtype: str, shape: Mapping[str, int], *kinds: type) -> Row | None:
    """The nearest row of the user's own table, or else of the package's; kinds: the classes of the kernels' configs."""
    for folder in (own_folder(), PACKAGED):
        table = folder and read(table_path(folder, device, operation), *kinds)
        if table and (row := table.nearest(dtype, shape)):
            return row
    return None


@functools.cache
def read(path: Path, *kinds: type) -> Table | None:
    """The table at `path`, or None where there is none; kinds: the classes of the kernels' configs.

    A damaged one is told of in one sentence, once, and counts as none: a program runs without it, if less quickly.
    """
    try:
        found = json.loads(path.read_bytes())
        return Table(tuple(_row(row, {backend_of(kind): kind for kind in kinds}) for row in found["rows"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # not as `write` leaves it
        said = "%s is no table of kernel times (%s), so it is left out; `%s` writes it anew"
        logging.getLogger(__name__).warning(said, path, str(error).splitlines()[0], TUNE)
        return None


def _row(found: dict[str, Any], kinds: dict[str, type]) -> Row:
    rest = {name: value for name, value in found.items() if name != "backend"}
    return Row(**rest | {"config": kinds[found.get("backend", TRITON)](**found["config"])})


def write(path: Path, about: Mapping[str, Any], row: Row, *kinds: type) -> None:
    """Put a row into the table at `path`, in place of one that it had of the same shape; a damaged table is replaced.

    Args:
      about: where the row comes from (device, version of JAX, date): it heads the file.
      kinds: the classes of the kernels' configs, where there are others than the row's.

    Raises:
      OSError: the file cannot be written.
    """
    read.cache_clear()
    before = read(path, *(kinds or (type(row.config),)))
    kept = [old for old in (before.rows if before else ()) if (old.dtype, old.shape) != (row.dtype, row.shape)]
    lines = ",\n".join(json.dumps(each.written()) for each in [*kept, row])
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    head = json.dumps({**about, "rows": []}).removesuffix("]}")
    unfinished.write_text(f"{head}\n{lines}\n]}}\n")  # a line a row, so that versions compare well
    unfinished.replace(path)
    read.cache_clear()
