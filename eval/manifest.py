"""What a run depends on, as its manifest keeps it: two runs with the same facts measure the same thing."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eval import measure
from frspec_jax.api import Generator
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.vocabulary import DraftHead, Ranking

HEAD_ROWS = 64  # of a cropped head, that tell it from another; all of them would take long


def of_models(checkpoint: Checkpoint, found: dict[str, Generator], rankings: Sequence[Path] = ()) -> dict[str, Any]:
    """The checkpoint, the methods by name, the rankings (default: the checkpoint's own), the machine, the versions."""
    files = rankings or [checkpoint.path / "ranking.npz"]
    return {
        "checkpoint": {
            "name": checkpoint.path.resolve().name,
            "fingerprint": checkpoint.fingerprint,
            "vocabulary": checkpoint.config.vocab_size,
        },
        "methods": {name: of_method(model) for name, model in found.items()},
        "rankings": {file.stem: of_ranking(file) for file in files if file.is_file()},
        "dtype": str(found["vanilla"].weights.target.embedding.dtype),
        "machine": measure.machine(),
        "versions": measure.versions(),
    }


def of_ranking(file: Path) -> dict[str, Any]:
    """What a ranking counted."""
    ranking = Ranking.load(file)
    counts = hashlib.sha256(ranking.counts.tobytes()).hexdigest()[:16]
    return {"corpora": list(ranking.corpora), "tokens": ranking.tokens, "digest": counts}


def of_method(model: Generator) -> dict[str, Any]:
    """A method's kind, V' and tree, and a short name of what it drafts with."""
    digest = hashlib.sha256()
    for part in jax.tree.leaves(model.weights.draft, is_leaf=lambda node: isinstance(node, DraftHead)):
        if part is model.weights.target.head:  # a draft that copies reads it too
            continue
        for array in (part.ids, part.weight[:HEAD_ROWS]) if isinstance(part, DraftHead) else (part,):
            digest.update(np.asarray(array, np.float32).tobytes())
    return {
        "kind": model.method,
        "draft_vocab": model.draft_vocab,
        "tree": {"size": model.tree.size, "depth": model.tree.depth, "top_k": model.tree.top_k},
        **({"copying": dataclasses.asdict(copying)} if (copying := getattr(model.drafter, "copying", None)) else {}),
        "weights": digest.hexdigest()[:16],
    }
