"""`python -m train medusa-tree CORPUS... --ckpt CKPT --draft medusa`: fit a Medusa draft's tree to its heads.

On held-out answers it measures how often the target's token is each head's best, second best, and so on; a
path's value is the product along it, and the tree keeps the most valuable paths (arXiv 2401.10774). The tree
is written into the draft's config.json in order of value, so that a prefix of it is the best smaller tree.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import heapq
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from frspec_jax.checkpoint import Checkpoint, amend_draft
from frspec_jax.config import TREE_LIMIT
from frspec_jax.drafters.medusa import Choices, MedusaConfig, MedusaParams
from frspec_jax.drafting import Draft, draft_ids
from frspec_jax.errors import UserError
from frspec_jax.files import check_writable
from frspec_jax.locks import folder_lock
from frspec_jax.vocabulary import crop
from train.batches import Batch, Packing
from train.corpus import Tally
from train.features import open_corpora
from train.medusa import rank_hits
from train.task import draft_to_fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "corpus", nargs="+", type=Path, help="feature stores, or text or conversation files and folders"
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder of the target")
    parser.add_argument(
        "--draft", metavar="NAME", help="a draft's name or folder (default: the first that the checkpoint had)"
    )
    parser.add_argument("--draft-vocab", metavar="N", help="V' that the heads are cropped to (default: as in generate)")
    parser.add_argument("--nodes", type=int, default=63, help="paths below the root (default: 63)")
    parser.add_argument(
        "--ranks", type=int, default=10, help="best tokens of a head that may stand in it (default: 10)"
    )
    parser.add_argument("--work", type=Path, help="folder for features of texts (default: CKPT/training/medusa-tree)")
    parser.add_argument("--rows", type=int, default=8, help="packed rows a batch (default: 8)")
    parser.add_argument("--row", type=int, default=512, help="tokens a row; longer sequences are cut (default: 512)")
    parser.add_argument("--batches", type=int, default=8, help="held-out batches to measure on (default: 8)")


def run(args: argparse.Namespace) -> None:
    checkpoint = Checkpoint.open(args.ckpt)
    folder, spec, params = draft_to_fit(
        checkpoint, args.draft, MedusaConfig, MedusaParams, "whose tree is not fixed; give a Medusa one"
    )
    for flag, least in (("rows", 1), ("row", 2), ("batches", 1)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} {getattr(args, flag)} must be at least {least}")
    if not 1 <= args.nodes < TREE_LIMIT:
        raise UserError(f"--nodes {args.nodes} is out of range: 1 to {TREE_LIMIT - 1}")
    ids = draft_ids(checkpoint, Draft(vocab=args.draft_vocab))
    if not 1 <= args.ranks <= len(ids):
        raise UserError(f"--ranks {args.ranks} is out of range: 1 to {len(ids)}, the vocabulary of the draft")
    check_writable(folder, f"--draft {folder}")
    with folder_lock(folder, f"--draft {folder}"):
        fit(args, checkpoint, folder, (spec, params), ids)


def fit(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    folder: Path,
    draft: tuple[MedusaConfig, MedusaParams],
    ids: np.ndarray,
) -> None:
    """Choose the tree of some heads that may propose `ids` [V'], and write it into their config.json."""
    spec, params = draft
    target = checkpoint.params()
    work = args.work or args.ckpt / "training" / "medusa-tree"
    tally = Tally()
    stores = open_corpora(args.corpus, checkpoint, target, work, args.row, tally=tally)
    held_out = Packing(tuple(stores), args.rows, args.row, seed=0).held_out(args.batches)
    accuracy = measured(params, target.head, ids, held_out, args.ranks)
    choices, value = most_valuable(accuracy, args.nodes)
    facts = {"draft_vocab": len(ids), "accuracy": accuracy.round(4).tolist()}
    amend_draft(folder, dataclasses.replace(spec, choices=choices), {"tree": facts})
    print(
        f"wrote the tree of {folder}: {len(choices)} nodes below the root, {max(map(len, choices))} levels; "
        f"{1 + value:.2f} tokens a round are expected of it (bonus counted, heads taken as independent)"
    )
    tally.tell()


def measured(params: MedusaParams, head: Array, ids: np.ndarray, batches: list[Batch], ranks: int) -> np.ndarray:
    """How often the target's best token is each head's r-th best: [heads, ranks], 0 to 1.

    head: [V, H], the target's. ids: [V'], what the heads may propose.

    Raises:
      UserError: the batches hold nothing to measure on.
    """
    hits = np.zeros((len(params.heads), ranks))
    counts = np.zeros((len(params.heads), 1))
    for i, one in enumerate(params.heads):
        rows = head if one.lm_head is None else one.lm_head
        count_hits = jax.jit(functools.partial(rank_hits, i=i, ranks=ranks))
        for batch in batches:
            found, count = count_hits(one, crop(rows, ids).weight, jnp.asarray(ids), head, batch)
            hits[i] += np.asarray(found)
            counts[i] += float(count)
    if not counts.all():
        raise UserError("the corpora hold too few held-out answers to measure every head on; give more of them")
    return hits / counts


def most_valuable(accuracy: np.ndarray, nodes: int) -> tuple[Choices, float]:
    """The `nodes` most valuable paths, in order, and the sum of their values: the accepted drafts to expect.

    Grown from the best path on: each that is kept offers its first child and its next sibling, so every
    path comes after its own beginning.

    Args:
      accuracy: [heads, ranks], of each head's r-th best token.
    """
    heads, ranks = accuracy.shape
    kept: list[tuple[int, ...]] = []
    total = 0.0
    # (less its value, the path, the value of what it goes on from); ties go by the path.
    offered: list[tuple[float, tuple[int, ...], float]] = [(-float(accuracy[0, 0]), (0,), 1.0)]
    while offered and len(kept) < nodes:
        negative, path, above = heapq.heappop(offered)
        kept.append(path)
        total -= negative
        if len(path) < heads:
            heapq.heappush(offered, (negative * float(accuracy[len(path), 0]), (*path, 0), -negative))
        if path[-1] + 1 < ranks:
            rank = path[-1] + 1
            value = above * float(accuracy[len(path) - 1, rank])
            heapq.heappush(offered, (-value, (*path[:-1], rank), above))
    return tuple(kept), float(total)
