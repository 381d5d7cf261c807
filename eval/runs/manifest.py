"""What a run depends on, as its manifest keeps it: two runs with the same facts measure the same thing."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from eval.runs import provenance
from frspec_jax.api import Generator
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.drafters.copying import Copying
from frspec_jax.vocabulary import DraftHead, Ranking, tokenizer_hash

HEAD_ROWS = 64  # of a cropped head, that tell it from another; all of them would take long


def of_models(checkpoint: Checkpoint, methods: dict[str, Generator], rankings: Sequence[Path] = ()) -> dict[str, Any]:
    """The checkpoint, the methods by name, the rankings (default: the checkpoint's own), the machine, the versions."""
    files = rankings or [checkpoint.path / "ranking.npz"]
    return {
        "checkpoint": {
            "name": checkpoint.path.resolve().name,
            "fingerprint": checkpoint.fingerprint,
            "vocabulary": checkpoint.config.vocab_size,
        },
        "methods": {name: of_method(model) for name, model in methods.items()},
        "rankings": {file.stem: of_ranking(checkpoint, file) for file in files if file.is_file()},
        "dtype": str(methods["vanilla"].weights.target.embedding.dtype),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }


def of_ranking(checkpoint: Checkpoint, file: Path) -> dict[str, Any]:
    """What a ranking counted, or how many ids a token map names."""
    ranking = Ranking.read(file, tokenizer_hash(checkpoint.tokenizer), checkpoint.config.vocab_size)
    digest, listed = hashlib.sha256(ranking.counts.tobytes()), ranking.listed
    if listed is not None:
        digest.update(listed.tobytes())
    facts = {"corpora": list(ranking.corpora), "tokens": ranking.tokens, "digest": digest.hexdigest()[:16]}
    return facts if listed is None else facts | {"listed": len(listed)}


def of_method(model: Generator) -> dict[str, Any]:
    """A method's kind, V' and tree, and a short name of what it drafts with."""
    digest, drafter, weights = hashlib.sha256(), model.drafting.drafter, model.weights.draft
    copying = getattr(drafter, "copying", None)
    whole = getattr(weights, "whole", None)  # the target's head, of which a draft that copies knows what it keeps
    paced = model.weights.pace  # by its odds nodes are chosen
    mine = (drafter.each_pass(weights), None if whole is None else whole.kept, None if paced is None else paced.odds)
    for part in jax.tree.leaves(mine, is_leaf=lambda node: isinstance(node, DraftHead)):
        for array in (part.ids, part.weight[:HEAD_ROWS]) if isinstance(part, DraftHead) else (part,):
            digest.update(np.asarray(array, np.float32).tobytes())
    return {
        "kind": model.drafting.method.name,
        "draft_vocab": model.draft_vocab,
        "tree": {"size": model.tree.size, "depth": model.tree.depth, "top_k": model.tree.top_k},
        **({"copying": dataclasses.asdict(copying)} if isinstance(copying, Copying) else {}),
        "weights": digest.hexdigest()[:16],
    }
