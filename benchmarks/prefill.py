"""How long a prompt takes until its first token: ours and transformers', in turns, in one process.

    python -m benchmarks.prefill --ckpt checkpoints/smollm2 --peer material/SmolLM2-135M-Instruct.Q4_1.gguf

The first of each is not counted. PyTorch may use every core, as XLA does.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from eval.methods.peers import Peer
from eval.runs import provenance
from frspec_jax import api
from frspec_jax.api import NO_DRAFT, Request
from frspec_jax.errors import reported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, metavar="CKPT", help="checkpoint folder")
    parser.add_argument("--peer", required=True, type=Path, metavar="MODEL", help="the same model, for transformers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of both (default: what suits the device)")
    parser.add_argument("--tokens", type=int, default=1480, metavar="N", help="of the prompt (default: 1480)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="default: 7")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    model = api.load(args.ckpt, NO_DRAFT, dtype=args.dtype)
    peer = Peer(args.peer, model.checkpoint.stop_ids, model.dtype_name)
    ids = np.random.default_rng(0).integers(100, model.checkpoint.config.vocab_size, args.tokens)

    def ours() -> float:
        with model.begin(ids, Request(2)) as text:
            return text.result().prefill_seconds

    def theirs() -> float:
        return peer.answer(ids, 2).prefill_seconds

    ours(), theirs()
    seconds = [(ours(), theirs()) for _ in range(args.repeats)]
    mine, other = (statistics.median(column) for column in zip(*seconds, strict=True))
    ratio = statistics.median(a / b for a, b in seconds)
    table = Table("", "seconds", title=f"{args.tokens} prompt tokens, {model.dtype_name}, medians of {args.repeats}")
    table.add_row("ours", f"{mine:.2f}")
    table.add_row("transformers", f"{other:.2f}")
    table.add_row("ours / transformers, median of the pairs", f"{ratio:.2f}")
    Console().print(table)
    figures = {
        "dtype": model.dtype_name,
        "tokens": args.tokens,
        "seconds": {"ours": [a for a, _ in seconds], "peer": [b for _, b in seconds]},
    }
    provenance.save(args.json, {"ratio": ratio, **figures})


if __name__ == "__main__":
    with reported():
        main()
