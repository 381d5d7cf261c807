"""`python -m pallas_kernels.bench`: each kernel against XLA, at the shapes of published models.

For every shape: microseconds of XLA and of the kernel (the best of a sweep over its configs), the
bytes that must be read, the time that they take at the measured bandwidth, and the ratio to it.
`--tune` writes what was found to `tuned.json`, from which `auto` chooses. Every config of the sweep is
checked against a float32 reference first: one that is wrong is reported, and never chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from pallas_kernels import subvocab_head_pallas, timing, tree_attention_pallas
from pallas_kernels.dispatch import TUNED, Implementation, power_of_two
from pallas_kernels.shapes import SHAPES, Shape
from pallas_kernels.subvocab_head import subvocab_top_k
from pallas_kernels.tree_attention import tree_attention
from pallas_kernels.visibility import Sees, causal

TOKENS = (1, 10, 60)  # one token, a level of EAGLE's tree, a whole tree
VOCABULARIES = (8192, 16384, 32768, 65536, None)  # None is the model's own
TOP_K = 10
WARPS_STAGES = ((4, 2), (4, 3), (8, 3))


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape: functions from (moving, *still) to its result, by configuration."""

    operation: str  # as `dispatch.choose` has it
    label: str
    shape: dict[str, int]
    bytes: int  # that it must read
    moving: Array
    still: tuple[Array, ...]
    run: Callable[..., Any]  # run(moving, *still, implementation=, config=)
    configs: list[Any]
    tolerance: float  # of the kernel's result against the reference in float32


def attention_case(name: str, shape: Shape, tokens: int, context: int, dtype: jnp.dtype, sweep: bool) -> Case:
    """`tree_attention` of `tokens` queries, each seeing the ones before it, over a cache of `context` live rows."""
    capacity = -(-(context + tokens) // 1024) * 1024
    rng = np.random.default_rng(0)
    specs = shape.attention(tokens, capacity, dtype)
    q, keys, values = (jnp.asarray(rng.normal(size=spec.shape).astype(np.float32), dtype) for spec in specs[:3])
    sees = Sees(jnp.int32(context), causal(tokens))
    rows = tokens * shape.heads // shape.kv_heads
    suited = tree_attention_pallas.Config.suited_to(rows, shape.kv_heads)
    splits = sorted({max(1, suited.splits // 2), suited.splits})
    configs = [
        dataclasses.replace(suited, block_k=block_k, splits=split, num_warps=warps, num_stages=stages)
        for block_k, split, (warps, stages) in itertools.product((64, 128), splits, WARPS_STAGES)
    ]

    def run(q: Array, keys: Array, values: Array, **how: Any) -> Array:
        return tree_attention(q, keys, values, sees, **how)

    return Case(
        operation=f"tree_attention {keys.dtype}",
        label=f"{name}, {tokens} tokens, context {context}",
        shape={"rows": rows, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim},
        bytes=2 * (context + tokens) * shape.kv_heads * shape.head_dim * keys.dtype.itemsize,
        moving=q,
        still=(keys, values),
        run=run,
        configs=configs if sweep else [suited],
        tolerance=2e-2 if dtype == jnp.bfloat16 else 1e-5,
    )


def head_case(
    name: str, shape: Shape, rows: int, vocabulary: int | None, dtype: jnp.dtype, sweep: bool, k: int = TOP_K
) -> Case:
    """`subvocab_top_k` of `rows` features over `vocabulary` rows of the head."""
    rng = np.random.default_rng(0)
    x, head = (
        jnp.asarray(rng.normal(size=s.shape).astype(np.float32), dtype) for s in shape.head(rows, vocabulary, dtype)
    )
    suited = subvocab_head_pallas.Config.suited_to(shape.hidden)
    configs = [
        dataclasses.replace(suited, block_v=block_v, num_warps=warps, num_stages=stages)
        for block_v, (warps, stages) in itertools.product((64, 128), WARPS_STAGES)
    ]
    return Case(
        operation=f"subvocab_head {head.dtype}",
        label=f"{name}, {rows} rows, V' = {head.shape[0]:,}, top {k}",
        shape={"rows": power_of_two(rows), "hidden": shape.hidden, "vocabulary": head.shape[0]},
        bytes=head.nbytes,
        moving=x,
        still=(head,),
        run=functools.partial(_scores, k=k),
        configs=configs if sweep else [suited],
        tolerance=5e-2 if dtype == jnp.bfloat16 else 1e-3,
    )


def _scores(x: Array, head: Array, k: int, **how: Any) -> Array:
    return subvocab_top_k(x, head, k, **how)[0]


def cases(names: Iterable[str], contexts: Iterable[int], dtype: jnp.dtype, sweep: bool) -> Iterator[Case]:
    for name in names:
        shape = SHAPES[name]
        for tokens, context in itertools.product(TOKENS, contexts):
            yield attention_case(name, shape, tokens, context, dtype, sweep)
        sizes = [v for v in VOCABULARIES if v is None or v < shape.vocabulary]
        for vocabulary in sizes:
            yield head_case(name, shape, TOP_K, vocabulary, dtype, sweep)
        yield head_case(name, shape, 60, None, dtype, sweep, k=1)  # greedy verification


def measure(case: Case, kernel: Implementation, calls: int, speed: float) -> dict[str, Any]:
    """Times of XLA and of the kernel under its best right config; the configs that were wrong."""
    exact = jax.jit(functools.partial(case.run, implementation="xla"))(
        case.moving.astype(jnp.float32), *(array.astype(jnp.float32) for array in case.still)
    )
    best, best_us, wrong = None, float("inf"), []
    for config in case.configs:
        run = functools.partial(case.run, implementation=kernel, config=config)
        try:
            mine = jax.jit(run)(case.moving, *case.still)
            error = float(jnp.abs(mine.astype(jnp.float32) - exact).max())
            if not error <= case.tolerance:  # NaN is wrong too
                wrong.append({**dataclasses.asdict(config), "error": error})
                continue
            taken = timing.per_call(run, case.moving, *case.still, calls=calls)
        except Exception as failure:  # too much shared memory, say: such a config is out, and the sweep goes on
            wrong.append({**dataclasses.asdict(config), "error": str(failure).splitlines()[0][:200]})
            continue
        if taken < best_us:
            best, best_us = config, taken
    xla = timing.per_call(functools.partial(case.run, implementation="xla"), case.moving, *case.still, calls=calls)
    floor = 1e6 * case.bytes / speed
    return {
        "operation": case.operation,
        "label": case.label,
        "shape": case.shape,
        "bytes": case.bytes,
        "floor_us": round(floor, 2),
        "xla_us": round(xla, 2),
        "pallas_us": round(best_us, 2) if best else None,
        "times_floor": round(min(best_us, xla) / floor, 2),
        "config": dataclasses.asdict(best) if best else None,
        "configs": len(case.configs),
        "wrong": wrong,
    }


def show(rows: list[dict[str, Any]], device: str, speed: float) -> None:
    table = Table(title=f"{device}, {speed / 1e9:,.0f} GB/s; microseconds")
    for heading in ("operation", "shape", "floor", "XLA", "Pallas", "gain", "× floor", "wrong"):
        table.add_column(heading, justify="left" if heading in ("operation", "shape") else "right")
    for row in rows:
        gain = f"{row['xla_us'] / row['pallas_us']:.2f}×" if row["pallas_us"] else ""
        wrong = f"{len(row['wrong'])}/{row['configs']}" if row["wrong"] else ""
        figures = (row["floor_us"], row["xla_us"], row["pallas_us"] or "")
        table.add_row(row["operation"], row["label"], *map(str, figures), gain, str(row["times_floor"]), wrong)
    Console(width=140 if not sys.stdout.isatty() else None).print(table)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench", description="Time each Pallas kernel against XLA, at real shapes."
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["llama3-8b", "llama3.2-1b", "qwen2-7b"], metavar="MODEL",
        help=f"of {', '.join(SHAPES)} (default: llama3-8b llama3.2-1b qwen2-7b)",
    )  # fmt: skip
    parser.add_argument(
        "--context", nargs="+", type=int, default=[1024, 4096], metavar="N", help="live cache rows (default: 1024 4096)"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--no-sweep", action="store_true", help="one config a shape: the one that would suit")
    parser.add_argument("--calls", type=int, default=64, metavar="N", help="calls a measurement (default: 64)")
    parser.add_argument("--tune", action="store_true", help="write the winners to pallas_kernels/tuned.json")
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
    speed = timing.bandwidth(16 if args.dry else 2048)
    if args.dry:
        chosen = list(cases(["tiny"], [200], jnp.float32, sweep=False))
    else:
        chosen = list(cases(args.shapes, args.context, jnp.dtype(args.dtype), not args.no_sweep))
    kernel: Implementation = "interpret" if args.dry else "pallas"
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.label)
            rows.append(measure(case, kernel, 2 if args.dry else args.calls, speed))
            progress.advance(task)
            # After every case, so that a run that is cut off keeps what it has.
            if args.json:
                about = {"device": device, "jax": jax.__version__, "date": datetime.date.today().isoformat()}
                about |= {"command": "python -m pallas_kernels.bench", "interpreted": args.dry}
                figures = about | {"bandwidth_gb_per_second": round(speed / 1e9, 1), "cases": rows}
                args.json.write_text(json.dumps(figures, indent=1) + "\n")
            if args.tune and not args.dry:
                _write_table(rows, device)
    show(rows, device, speed)


def _write_table(rows: list[dict[str, Any]], device: str, table: Path = TUNED) -> None:
    """Put this device's rows in place of those that the table had of it."""
    before = json.loads(table.read_text()) if table.exists() else []
    keep = ("operation", "shape", "config", "pallas_us", "xla_us")
    mine = [{"device": device} | {key: row[key] for key in keep} for row in rows if row["config"]]
    found = [row for row in before if row["device"] != device] + mine
    table.write_text("[\n" + ",\n".join(json.dumps(row) for row in found) + "\n]\n")


if __name__ == "__main__":
    main()
