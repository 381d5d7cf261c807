"""`python -m pallas_kernels.bench`: each kernel against XLA, at the shapes of published models.

For every shape: microseconds of XLA and of the kernel (the best of a sweep over its configs; of attention's two
kernels, Triton's and Mosaic's, over those of both, and a table's row says whose won), the
bytes that must be read, the time that they take at the measured bandwidth, and the ratio to it.
`--tune` keeps what was found in tables (`measured`), from which `auto` chooses. Every config of the sweep is
checked against a float32 reference first: one that is wrong is reported, and never chosen.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pallas_kernels import measured, timing
from pallas_kernels.dispatch import Implementation
from pallas_kernels.fused_linear import cases as products
from pallas_kernels.models import SHAPES
from pallas_kernels.subvocab_head import cases as head
from pallas_kernels.timing import Case
from pallas_kernels.tree_attention import cases as attention


def cases(names: Iterable[str], contexts: Iterable[int], dtype: DTypeLike) -> Iterator[Case]:
    """What is timed: the operations that a table decides on, at the sizes of each model."""
    for name in names:
        for tokens, context in itertools.product(attention.TOKENS, contexts):
            yield attention.timed(name, tokens, context, dtype)
        for vocabulary in (v for v in head.VOCABULARIES if v is None or v < SHAPES[name].vocabulary):
            yield head.timed(name, head.TOP_K, vocabulary, dtype)
        yield head.timed(name, 60, None, dtype, k=1)  # greedy verification
        for rows, product in itertools.product(products.ROWS, products.PRODUCTS):
            yield products.timed(name, rows, product, dtype)


def widened(x: Array) -> Array:
    """Floats as float32, for a reference; integers as they are."""
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


@dataclasses.dataclass(frozen=True)
class Built:
    """A way to run a case, compiled: once, and in a loop to be timed; or why that failed."""

    once: Any = None
    loop: timing.Loop | None = None
    failure: str = ""


def build(case: Case, how: dict[str, Any], copies: list[tuple[Any, ...]], calls: int) -> Built:
    run = functools.partial(case.run, **how)
    try:
        once = jax.jit(run).lower(case.moving, *case.still).compile()
        return Built(once, timing.calls_of(run, case.moving, copies, calls))
    except Exception as failure:  # too much shared memory, say: such a config is out, and the sweep goes on
        return Built(failure=_reason(failure))


def _reason(failure: Exception) -> str:
    return (str(failure).splitlines() or [type(failure).__name__])[0][:200]


def measure(case: Case, kernel: Implementation, calls: int, speed: float, workers: int = 1) -> dict[str, Any]:
    """Times of XLA and of the kernel under its best right config; the configs that were wrong.

    workers: threads that compile side by side; what is timed runs alone.
    """
    copies = timing.copies_of(case.still, min(16, calls))
    ways: list[dict[str, Any]] = [{"implementation": kernel, "config": config} for config in case.configs]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        plain, *built = pool.map(lambda how: build(case, how, copies, calls), [{"implementation": "xla"}, *ways])
    exact = jax.jit(functools.partial(case.run, implementation="xla"))(
        *jax.tree.map(widened, (case.moving, *case.still))
    )
    best, best_us, wrong = None, float("inf"), []
    for config, way in zip(case.configs, built, strict=True):
        if way.loop is None:
            wrong.append({**dataclasses.asdict(config), "error": way.failure})
            continue
        try:
            error = float(jnp.abs(way.once(case.moving, *case.still).astype(jnp.float32) - exact).max())
            if not error <= case.tolerance:  # NaN is wrong too
                wrong.append({**dataclasses.asdict(config), "error": error})
                continue
            taken = way.loop.microseconds()
        except Exception as failure:
            wrong.append({**dataclasses.asdict(config), "error": _reason(failure)})
            continue
        if taken < best_us:
            best, best_us = config, taken
    if plain.loop is None:
        raise RuntimeError(f"XLA's {case.operation} failed: {plain.failure}")
    xla = plain.loop.microseconds()
    floor = 1e6 * case.bytes / speed
    return {
        "operation": case.operation,
        "label": case.label,
        "dtype": case.dtype,
        "shape": case.shape,
        "bytes": case.bytes,
        "floor_us": round(floor, 2),
        "xla_us": round(xla, 2),
        "pallas_us": round(best_us, 2) if best else None,
        "times_floor": round(min(best_us, xla) / floor, 2),
        "config": dataclasses.asdict(best) if best else None,
        "backend": measured.backend_of(type(best)) if best else None,
        "configs": len(case.configs),
        "wrong": wrong,
    }


def show(rows: list[dict[str, Any]], device: str, speed: float) -> None:
    table = Table(title=f"{device}, {speed / 1e9:,.0f} GB/s; microseconds")
    for heading in ("operation", "shape", "floor", "XLA", "Pallas", "by", "gain", "× floor", "wrong"):
        table.add_column(heading, justify="left" if heading in ("operation", "shape", "by") else "right")
    for row in rows:
        gain = f"{row['xla_us'] / row['pallas_us']:.2f}×" if row["pallas_us"] else ""
        wrong = f"{len(row['wrong'])}/{row['configs']}" if row["wrong"] else ""
        figures = (row["floor_us"], row["xla_us"], row["pallas_us"] or "")
        rest = (row["backend"] or "", gain, str(row["times_floor"]), wrong)
        table.add_row(row["operation"], row["label"], *map(str, figures), *rest)
    Console(width=140 if not sys.stdout.isatty() else None).print(table)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench", description="Time each Pallas kernel against XLA, at real shapes."
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=["llama3-8b", "llama3.2-1b", "qwen2-7b"],
        metavar="MODEL",
        help=f"of {', '.join(SHAPES)} (default: llama3-8b llama3.2-1b qwen2-7b)",
    )
    parser.add_argument(
        "--context", nargs="+", type=int, default=[1024, 4096], metavar="N", help="live cache rows (default: 1024 4096)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--no-sweep", action="store_true", help="one config a shape: the one that would suit")
    parser.add_argument("--calls", type=int, default=64, metavar="N", help="calls a measurement (default: 64)")
    parser.add_argument(
        "--tune",
        nargs="?",
        const="own",
        choices=("own", "package"),
        help="keep the winners for `auto`: in your own tables, in the cache folder (the default), or in the package's",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    parser.add_argument(
        "--dry", action="store_true", help="no GPU: interpret the kernels at a tiny shape; shows that all of it runs"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = arguments()
    args = parser.parse_args(argv)
    if jax.default_backend() != "gpu" and not args.dry:
        parser.error("no GPU is in sight, and the kernels are for one; --dry interprets them at a tiny shape")
    if args.calls < 1 or min(args.context) < 1:
        parser.error(f"--calls {args.calls} and --context {min(args.context)}: give at least 1 of each")
    if args.json:
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.touch()
        except OSError as error:
            parser.error(f"--json {args.json} cannot be written: {error.strerror}; name another file")
    device = jax.devices()[0].device_kind
    tables = _tables(parser, args.tune, device) if args.tune else None
    speed = timing.bandwidth(16 if args.dry else 2048)
    chosen = list(cases(["tiny"], [200], "float32") if args.dry else cases(args.shapes, args.context, args.dtype))
    if args.dry or args.no_sweep:
        chosen = [dataclasses.replace(case, configs=case.configs[:1]) for case in chosen]
    kernel: Implementation = "interpret" if args.dry else "pallas"
    about = {"device": device, "jax": jax.__version__, "date": datetime.date.today().isoformat()}
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.label)
            rows.append(measure(case, kernel, 2 if args.dry else args.calls, speed))
            progress.advance(task)
            # After every case, so that a run that is cut off keeps what it has.
            if args.json:
                more = {"command": "python -m pallas_kernels.bench", "interpreted": args.dry}
                figures = about | more | {"bandwidth_gb_per_second": round(speed / 1e9, 1), "cases": rows}
                args.json.write_text(json.dumps(figures, indent=1) + "\n")
            if tables and not args.dry:
                keep(tables, about, rows[-1], *map(type, case.configs))
    show(rows, device, speed)


def keep(folder: Path, about: dict[str, str], found: dict[str, Any], *kinds: type) -> None:
    """Put what `measure` found into this device's table of the operation; nothing where no config was right.

    kinds: the classes of the kernels' configs.
    """
    if found["config"]:
        times = {name: found[name] for name in ("pallas_us", "xla_us")}
        backend = found.get("backend", measured.TRITON)
        kind = next(kind for kind in kinds if measured.backend_of(kind) == backend)
        row = measured.Row(found["dtype"], found["shape"], kind(**found["config"]), **times)
        measured.write(measured.table_path(folder, about["device"], found["operation"]), about, row, *set(kinds))


def _tables(parser: argparse.ArgumentParser, where: str, device: str) -> Path:
    """The folder of tables that `--tune` writes to, refused where that cannot be done."""
    folder = measured.PACKAGED if where == "package" else measured.own_folder()
    if folder is None:
        parser.error(f"--tune: {measured.CACHE_VARIABLE}=off leaves no folder for tables; set it to a folder")
    place = measured.table_path(folder, device, "any").parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        (place / ".part").touch()
        (place / ".part").unlink()
    except OSError as error:
        parser.error(
            f"--tune: {place} cannot be written: {error.strerror}; name another folder in {measured.CACHE_VARIABLE}"
        )
    return folder


if __name__ == "__main__":
    main()
