"""Drafts as speculators, vLLM's trainers, write them: the layer's entries in an object of their own, and the verifier.

vLLM serves such a folder by its own name (`vllm serve OUT`), and takes the target from it. The embedding goes along for
EAGLE-3: the package reads no target, and would be left without one.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from convert.importing import EMBEDDING, target_embedding
from convert.kinds import SPECULATORS_KIND
from convert.published import LAYER_KEY
from frspec_jax.checkpoint import Checkpoint

Published = tuple[dict[str, np.ndarray], dict[str, Any]]  # tensors by name, and config.json
VERSION = "0.9.0"  # of the package, whose entries these are
OF_THE_DRAFT = ("architectures", "draft_vocab_size", "frspec_target", "bias", "qkv_bias")  # in no layer's entries
SPECULATIVE_TOKENS = 3  # that a server proposes where nobody asks for another number; vLLM's chains are short


def wrapped(plain: Published, kind: str, target: Checkpoint, entries: dict[str, Any]) -> Published:
    """A draft in SafeAILab's form as speculators' of a kind ("eagle", "eagle3"); entries: what that has besides."""
    tensors, config = plain
    layer = {key: value for key, value in config.items() if key not in OF_THE_DRAFT}
    described = {
        "architectures": [{"eagle": "EagleSpeculator", "eagle3": "Eagle3Speculator"}[kind]],
        SPECULATORS_KIND: kind,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": SPECULATIVE_TOKENS}],
            "verifier": verifier_of(target),
        },
        LAYER_KEY: layer,
        "tie_word_embeddings": False,
        "frspec_target": config["frspec_target"],
        **entries,
    }
    return {_name(name, kind): value for name, value in tensors.items()}, described


def _name(name: str, kind: str) -> str:
    if kind == "eagle3":
        return name.replace("midlayer.", "layers.0.", 1)
    return f"fusion_{name}" if name.startswith("fc.") else name.replace("layers.0.", "transformer.", 1)


def verifier_of(target: Checkpoint) -> dict[str, Any]:
    """The target by the name of what it was converted from, so far as that is known, and its architecture."""
    try:
        source = json.loads((target.path / "source.json").read_text("utf-8"))
    except (OSError, ValueError):
        source = {}
    name = source.get("folder") or source.get("file") if isinstance(source, dict) else None
    architecture = target.config.architecture
    return {"name_or_path": name, "architectures": [f"{architecture[:1].upper()}{architecture[1:]}ForCausalLM"]}


def with_embedding(tensors: dict[str, np.ndarray], target: Checkpoint, dtype: Any) -> dict[str, np.ndarray]:
    """The tensors with the target's embedding, where the draft has none of its own."""
    return tensors if EMBEDDING in tensors else tensors | {EMBEDDING: target_embedding(target).astype(dtype)}
