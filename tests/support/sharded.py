"""`python -m tests.support.sharded [NAME ...]`: texts on one device and on several, as JSON: which are the same.

Without names all cases are run, and a batch and replicas of a model (`replicas`) out of a checkpoint besides.

A process of its own, since the number of devices is fixed when JAX begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from jax.sharding import Mesh

from frspec_jax import api, mesh_parts, sharding
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.drafters.beam import BeamDrafter, BeamMemory, BeamWeights
from frspec_jax.pace import Pace
from frspec_jax.plan import Plan
from frspec_jax.scheduler import Engine
from frspec_jax.state import DecodeState, Weights
from pallas_kernels.dispatch import AUTO
from tests.support import toy
from tests.support.folders import checkpoint_folder

CFG = toy.config(num_heads=8, num_kv_heads=2, vocab_size=30)
GEMMA = {"windows": (7, 0), "norms": "around", "head_norms": True, "norm_offset": 1.0}
BIASES = {"attention_bias": True, "output_bias": True, "mlp_bias": True}
PROMPT = np.random.default_rng(0).integers(0, 30, 21)
TREE = TreeConfig(8, 3, 4)
HALF = np.arange(0, 30, 2)  # a sub-vocabulary


@dataclasses.dataclass(frozen=True)
class Case:
    """What is decoded, and on how many devices."""

    plan: Plan
    weights: Weights
    counts: tuple[int, ...]
    settings: Sampling = Sampling()
    divides: bool = False  # its draft too, where that is possible, however small the layer is


def drafts_divided() -> mock._patch:
    """Meanwhile a draft's layer is divided where it can be, whether that pays or not."""
    return mock.patch.object(sharding, "LEAST_SAVED", 0)


def divided(case: Case, devices: int) -> tuple[Plan, Weights]:
    """The case's plan and weights, on so many devices."""
    mesh, plan, weights = sharding.mesh_of(devices), case.plan, case.weights
    assert mesh is not None
    with drafts_divided() if case.divides else contextlib.nullcontext():
        drafter, draft = mesh_parts.draft_on(mesh, plan.drafter, weights.draft)
    plan = dataclasses.replace(plan, drafter=drafter, mesh=mesh, kernels=dataclasses.replace(AUTO, axis=sharding.AXIS))
    target = sharding.spread(weights.target, plan.config, mesh)
    return plan, Weights(target, draft, sharding.everywhere(weights.pace, mesh))


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {}
    greedy, sampled = Sampling(), Sampling(1.0, top_p=0.9)
    for kind, settings, counts in (
        ("eagle", greedy, (2, 8)),
        ("eagle3", sampled, (4,)),
        ("medusa", greedy, (4,)),
        ("copying", sampled, (2,)),
    ):
        weights, drafter = toy.weights(CFG, HALF, kind=kind)
        plan = toy.plan(CFG, drafter, toy.fitted(kind, CFG, TREE), settings)
        found[f"{kind}, {'greedy' if settings.greedy else 'sampled'}"] = Case(plan, weights, counts, settings)
    found["vanilla"] = Case(toy.vanilla_plan(CFG, sampled), toy.weights(CFG)[0], (8,), sampled)
    found["eagle with a pace"] = Case(*toy.paced(CFG, "eagle"), (4,))
    gemma = toy.config(num_heads=8, num_kv_heads=4, vocab_size=30, **GEMMA)
    weights, drafter = toy.weights(gemma)
    found["like Gemma 3"] = Case(toy.plan(gemma, drafter, TREE), weights, (8,))
    qwen = toy.config(num_heads=8, num_kv_heads=4, vocab_size=30, tied_head=True, **BIASES)
    weights, drafter = toy.weights(qwen)
    found["tied, with biases"] = Case(toy.plan(qwen, drafter, TREE), weights, (4,))
    # Drafts that are divided. EAGLE-3's has four heads of its own, where the target has eight.
    found["tied, with biases, draft divided"] = dataclasses.replace(found["tied, with biases"], divides=True)
    weights, drafter = toy.weights(CFG, HALF, int8=True)
    found["eagle divided, sampled"] = Case(toy.plan(CFG, drafter, TREE, sampled), weights, (2, 8), sampled, True)
    weights, drafter = toy.weights(CFG, HALF, kind="eagle3")
    found["eagle3 divided, greedy"] = Case(toy.plan(CFG, drafter, TREE), weights, (2,), divides=True)
    weights, drafter = toy.weights(CFG, HALF, kind="eagle3", slots=5)
    found["eagle3 divided, with slots"] = Case(toy.plan(CFG, drafter, TREE, sampled), weights, (4,), sampled, True)
    paced, weights = toy.paced(CFG, "eagle", ids=HALF, slots=5)
    found["eagle divided, with a pace and slots"] = Case(paced, weights, (8,), divides=True)
    found["copying divided"] = dataclasses.replace(found["copying, sampled"], divides=True)
    return found


def apart(case: Case, plan: Plan, state: DecodeState) -> bool:
    """Whether each device holds the keys and values of its own heads alone, those of a draft that is divided too."""
    devices = plan.mesh.devices.size if plan.mesh is not None else 1
    layers = [(state.caches.target[0], plan.config, True)]
    if isinstance(state.caches.draft, BeamMemory):
        assert isinstance(plan.drafter, BeamDrafter)
        cfg = plan.drafter.config
        layers.append((state.caches.draft.kv, cfg, case.divides and sharding.divides(cfg, devices)))
    heads = [layer.keys.sharding.shard_shape(layer.keys.shape)[0] for layer, _, _ in layers]
    return heads == [max(1, cfg.num_kv_heads // devices) if own else cfg.num_kv_heads for _, cfg, own in layers]


def drafts_alike(state: DecodeState, alone: DecodeState) -> bool:
    """Whether the draft's cache is that of one device, rows of the last tree among them; a text would not tell."""
    mine, other = state.caches.draft, alone.caches.draft
    if not isinstance(mine, BeamMemory) or not isinstance(other, BeamMemory):
        return True
    keys = np.asarray(mine.kv.keys)
    shared = keys.shape[0] // other.kv.keys.shape[0]  # devices that hold the same head
    return np.allclose(keys, np.repeat(np.asarray(other.kv.keys), shared, 0), rtol=1e-3, atol=1e-3)


def main(wanted: list[str]) -> None:
    same: dict[str, bool] = {}
    assert isinstance(toy.PACE, Pace) and jax.device_count() >= 8
    for name, case in cases().items():
        if wanted and name not in wanted:
            continue
        expected, alone = toy.decode(case.plan, case.weights, PROMPT, 30, case.settings, seed=1)
        for devices in case.counts:
            plan, weights = divided(case, devices)
            tokens, state = toy.decode(plan, weights, PROMPT, 30, case.settings, seed=1)
            facts = tokens == expected, drafts_alike(state, alone), apart(case, plan, state)
            same[f"{name}, {devices} devices"] = all(facts)
            print(f"{name}, {devices} devices: {facts}", file=sys.stderr)
    if not wanted:
        answers = batch(None)
        same["a batch, out of a checkpoint"] = batch(sharding.mesh_of(2)) == answers
        with drafts_divided():
            same["a batch, its draft divided"] = batch(sharding.mesh_of(4)) == answers
    if not wanted or "replicas" in wanted:
        alone, _ = replicas(1, 1)
        for copies, devices in ((2, 1), (2, 2)):
            texts, places = replicas(copies, devices)
            same[f"{copies} replicas of {devices}"] = texts == alone and len(set(places)) == copies * devices
    print(json.dumps(same))


def replicas(copies: int, devices: int) -> tuple[list[str], list[int]]:
    """What an engine over copies of a checkpoint's model answers to nine requests at once; devices of the caches."""
    asked = api.Draft(tree=TreeConfig(4, 2, 2), context_slots=8)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint_folder(Path(folder) / "toy")
        models = [
            api.load(checkpoint, asked, dtype="float32", context=256, mesh=mesh)
            for mesh in sharding.meshes_of(copies, devices)
        ]
        requests = [api.Request(12, sampling=Sampling(0.8 * (n % 2)), seed=n) for n in range(9)]
        ids = models[0].encode("the end")

        async def text(engine: Engine, request: api.Request) -> str:
            return "".join([piece.text async for piece in engine.stream(ids, request)])

        async def main() -> tuple[list[str], list[int]]:
            async with Engine.over(models, slots=2) as engine:
                texts = await asyncio.gather(*(text(engine, request) for request in requests))
                caches = [batch.state.caches.target[0].keys for batch in engine.batches]
                return texts, [device.id for keys in caches for device in keys.sharding.device_set]

        return asyncio.run(main())


def batch(mesh: Mesh | None) -> list[list[int]]:
    """What a model of a checkpoint's folder answers to three prompts at once."""
    asked = api.Draft(tree=TreeConfig(4, 2, 2), context_slots=8)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint_folder(Path(folder) / "toy")
        model = api.load(checkpoint, asked, dtype="float32", context=256, mesh=mesh)
        is_divided = mesh_parts.split_of(model.drafting.drafter) is not None
        assert is_divided == (mesh is not None and sharding.LEAST_SAVED == 0)
        draft, target = model.weights.draft, model.weights.target
        assert isinstance(draft, BeamWeights) and draft.embedding is target.embedding, "a device would hold it twice"
        return [result.tokens for result in model.generate(["the end", "a b", "hello world"], api.Request(12))]


if __name__ == "__main__":
    main(sys.argv[1:])
