"""What a training step of an EAGLE-2 draft costs a device, by the precision of its products and its optimiser.

    python benchmarks/train_step.py [--shapes smollm2-135m] [--rows 4] [--row 512] [--unroll 3] [--json FILE]

Random weights and a random batch: a step takes as long as one on real features. "Of a product's rate" holds a step's
matrix products against one large product in the same precision (model FLOP utilisation).
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from eval.commands import flags
from eval.runs import provenance
from frspec_jax.config import ModelConfig
from frspec_jax.drafters.eagle import EagleConfig
from frspec_jax.errors import reported
from frspec_jax.presets import SHAPES, model_config
from train.batches import Batch
from train.devices import product_rate
from train.optimiser import new_state, seed_words
from train.recipe import Recipe, initial_params, train_step

STEPS = 5


def random_batch(config: ModelConfig, rows: int, row: int) -> Batch:
    """One sequence a row, all of its tokens an answer's."""
    rng = np.random.default_rng(0)
    features, targets = rng.normal(size=(2, rows, row, config.hidden_size)).astype(np.float32)
    tokens = rng.integers(0, config.vocab_size, (rows, row), dtype=np.int32)
    ones = np.ones((rows, row), np.int32)
    return Batch(features, tokens, targets, ones.astype(np.float32), ones, np.cumsum(ones, axis=1, dtype=np.int32) - 1)


def measure(config: ModelConfig, recipe: Recipe, batch: Batch) -> dict[str, float]:
    """The median of some steps, the compiling one left out."""
    draft = EagleConfig.like(config)
    state = new_state(initial_params(jax.random.key(0), draft, config), recipe)
    head = jax.random.normal(jax.random.key(1), (config.vocab_size, config.hidden_size))
    ranked, seconds = jnp.arange(config.vocab_size), []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        state, metrics = train_step(state, draft.layer_of(config), recipe, head, head, ranked, seed_words(0), batch)
        jax.block_until_ready((state.params, metrics))
        seconds.append(time.perf_counter() - start)
    step, tokens = statistics.median(seconds[1:]), batch.segment.size
    flops = recipe.flops(state.params, head, passes=recipe.unroll, outputs=recipe.unroll) * tokens
    return {
        "seconds": round(step, 3),
        "tokens_per_second": round(tokens / step),
        "utilisation": round(flops / step / product_rate(recipe.compute), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="smollm2-135m", metavar="MODEL", help=", ".join(SHAPES))
    parser.add_argument("--rows", type=int, default=4, help="of a batch (default: 4)")
    parser.add_argument("--row", type=int, default=512, help="tokens of a row (default: 512)")
    parser.add_argument("--unroll", type=int, default=3, help="passes of a step (default: 3)")
    flags.add_json_argument(parser)
    args = parser.parse_args()
    config = model_config(args.shapes)
    batch, found = random_batch(config, args.rows, args.row), []
    table = Table("products", "optimiser", "seconds a step", "tokens/s", "of a product's rate", title=args.shapes)
    for compute, optimizer in itertools.product(("float32", "bfloat16"), ("adamw", "muon")):
        recipe = Recipe(compute=compute, optimizer=optimizer, unroll=args.unroll)
        figures = measure(config, recipe, batch)
        found.append({"compute": compute, "optimizer": optimizer, **figures})
        table.add_row(
            compute,
            optimizer,
            f"{figures['seconds']:.2f}",
            f"{figures['tokens_per_second']:,}",
            f"{figures['utilisation']:.0%}",
        )
    Console().print(table)
    provenance.save(
        args.json, {"shapes": args.shapes, "batch": [args.rows, args.row], "unroll": args.unroll, "steps": found}
    )


if __name__ == "__main__":
    with reported():
        main()
