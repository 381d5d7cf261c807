"""`python -m tests.support.sharded [NAME ...]`: texts on one device and on several, as JSON: which are the same.

Without names all cases are run, and a batch out of a checkpoint besides.

A process of its own, since the number of devices is fixed when JAX begins.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from frspec_jax import api, sharding
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.pace import Pace
from frspec_jax.plan import Plan
from frspec_jax.state import Weights
from pallas_kernels.dispatch import AUTO
from tests.support import toy
from tests.support.folders import checkpoint_folder

CFG = toy.config(num_heads=8, num_kv_heads=2, vocab_size=30)
GEMMA = {"windows": (7, 0), "norms": "around", "head_norms": True, "norm_offset": 1.0}
BIASES = {"attention_bias": True, "output_bias": True, "mlp_bias": True}
PROMPT = np.random.default_rng(0).integers(0, 30, 21)
TREE = TreeConfig(8, 3, 4)


def divided(plan: Plan, weights: Weights, devices: int) -> tuple[Plan, Weights]:
    """The same plan and weights, on so many devices."""
    mesh = sharding.mesh_of(devices)
    assert mesh is not None
    plan = dataclasses.replace(plan, mesh=mesh, kernels=dataclasses.replace(AUTO, axis=sharding.AXIS))
    others = sharding.everywhere((weights.draft, weights.pace), mesh)
    return plan, Weights(sharding.spread(weights.target, plan.config, mesh), *others)


def cases() -> dict[str, tuple[Plan, Weights, Sampling, tuple[int, ...]]]:
    """What is decoded: plan, weights, settings, on how many devices."""
    found: dict[str, Any] = {}
    greedy, sampled = Sampling(), Sampling(1.0, top_p=0.9)
    for kind, settings, counts in (
        ("eagle", greedy, (2, 8)),
        ("eagle3", sampled, (4,)),
        ("medusa", greedy, (4,)),
        ("copying", sampled, (2,)),
    ):
        weights, drafter = toy.weights(CFG, np.arange(0, 30, 2), kind=kind)
        plan = toy.plan(CFG, drafter, toy.fitted(kind, CFG, TREE), settings)
        found[f"{kind}, {'greedy' if settings.greedy else 'sampled'}"] = plan, weights, settings, counts
    found["vanilla"] = toy.vanilla_plan(CFG, sampled), toy.weights(CFG)[0], sampled, (8,)
    paced, weights = toy.paced(CFG, "eagle")
    found["eagle with a pace"] = paced, weights, Sampling(), (4,)
    gemma = toy.config(num_heads=8, num_kv_heads=4, vocab_size=30, **GEMMA)
    weights, drafter = toy.weights(gemma)
    found["like Gemma 3"] = toy.plan(gemma, drafter, TREE), weights, Sampling(), (8,)
    qwen = toy.config(num_heads=8, num_kv_heads=4, vocab_size=30, tied_head=True, **BIASES)
    weights, drafter = toy.weights(qwen)
    found["tied, with biases"] = toy.plan(qwen, drafter, TREE), weights, Sampling(), (4,)
    return found


def main(wanted: list[str]) -> None:
    same: dict[str, bool] = {}
    assert isinstance(toy.PACE, Pace) and jax.device_count() >= 8
    for name, (plan, weights, settings, counts) in cases().items():
        if wanted and name not in wanted:
            continue
        expected = toy.decode(plan, weights, PROMPT, 30, settings, seed=1)[0]
        for devices in counts:
            there = divided(plan, weights, devices)
            tokens, state = toy.decode(*there, PROMPT, 30, settings, seed=1)
            keys = state.caches.target[0].keys
            whole = max(1, plan.config.num_kv_heads // devices)
            shown = keys.sharding.shard_shape(keys.shape)[0] == whole  # each device holds its own heads alone
            same[f"{name}, {devices} devices"] = tokens == expected and shown
            print(f"{name}, {devices} devices: {tokens == expected}, {shown}", file=sys.stderr)
    if not wanted:
        same["a batch, out of a checkpoint"] = batch(None) == batch(sharding.mesh_of(2))
    print(json.dumps(same))


def batch(mesh: Mesh | None) -> list[list[int]]:
    """What a model of a checkpoint's folder answers to three prompts at once."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint_folder(Path(folder) / "toy")
        model = api.load(checkpoint, api.Draft(tree=TreeConfig(4, 2, 2)), dtype="float32", context=256, mesh=mesh)
        return [result.tokens for result in model.generate(["the end", "a b", "hello world"], api.Request(12))]


if __name__ == "__main__":
    main(sys.argv[1:])
