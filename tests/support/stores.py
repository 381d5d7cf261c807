"""Stores of features whose rows say which they are, for the tests of what reads them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from frspec_jax.checkpoint import Checkpoint
from train.features import FeatureStore, FeatureWriter


def checkpoint_like(width: int = 4, target: str = "a") -> Checkpoint:
    return SimpleNamespace(path="CKPT", fingerprint=target, config=SimpleNamespace(hidden_size=width))  # type: ignore


def tagged_store(folder: Path, lengths: list[int], first_source: int = 0) -> FeatureStore:
    """Sequences whose features say which they are: (sequence, token, token id, answer)."""
    writer = FeatureWriter(folder, checkpoint_like())
    for source, length in enumerate(lengths, first_source):
        rng = np.random.default_rng(source)
        tokens, answer = rng.integers(0, 2000, length, dtype=np.int32), rng.integers(0, 2, length, dtype=np.uint8)
        features = np.stack([np.full(length, source), np.arange(length), tokens, answer], axis=1)
        writer.append(source, tokens, answer, features)
    writer.close()
    return FeatureStore(folder, checkpoint_like())
