"""Small real models for the tests: seeded random weights, a vocabulary of a few tokens, and a drafter that knows."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from frspec_jax import engine, prefill
from frspec_jax.config import VANILLA, ModelConfig, RopeScaling, Sampling, TreeConfig
from frspec_jax.drafters.base import NO_WEIGHTS, DraftMemory, DraftWeights, Memoryless, Target, Turn, Vanilla
from frspec_jax.drafters.eagle import EagleConfig, EagleParams
from frspec_jax.drafters.eagle3 import Eagle3Config, Eagle3Params
from frspec_jax.drafters.medusa import PUBLISHED_63, MedusaConfig, MedusaParams
from frspec_jax.llama import LlamaParams
from frspec_jax.pace import Pace
from frspec_jax.pace_tables import DEFAULT, tables_of
from frspec_jax.plan import Plan
from frspec_jax.prefill import Chunks
from frspec_jax.sampling import rule_of
from frspec_jax.shapes import model_shapes
from frspec_jax.state import Asked, DecodeState, Weights, new_caches
from frspec_jax.tree import DraftTree
from pallas_kernels.dispatch import AUTO
from pallas_kernels.visibility import causal

PACE = Pace((1, 3, 8), TreeConfig(8, 3, 4))
CROPPED = np.array([5, 1, 9, 3, 11, 0, 7])  # a sub-vocabulary of twelve tokens


def config(vocab_size: int = 24, **changes: Any) -> ModelConfig:
    base = ModelConfig(
        architecture="llama",
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        rope_scaling=RopeScaling(),
        max_context=2048,
        tied_head=False,
    )
    return dataclasses.replace(base, **changes)


def random_like(shapes: Any, seed: int, scale: float) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(scale * rng.normal(size=s.shape) + (len(s.shape) == 1), jnp.float32), shapes
    )


def target(cfg: ModelConfig, seed: int = 0) -> LlamaParams:
    params = random_like(model_shapes(cfg), seed, 0.25)
    return params.replace(final_norm=3 * params.final_norm)  # peaked enough that drafts can be right


def draft(cfg: ModelConfig, seed: int = 1) -> tuple[EagleConfig, EagleParams]:
    """A draft that is right now and then: it passes the feature on, with some noise of its own."""
    shape = EagleConfig.like(cfg)
    return shape, random_like(shape.shapes(cfg), seed, 0.25)


def medusa(cfg: ModelConfig, seed: int = 1, *, own: bool = False, layers: int = 1) -> tuple[MedusaConfig, MedusaParams]:
    """Four heads with the published tree."""
    shape = MedusaConfig(cfg.hidden_size, 4, layers, own, PUBLISHED_63)
    return shape, random_like(shape.shapes(cfg), seed, 0.25)


def eagle3(cfg: ModelConfig, seed: int = 1, ids: np.ndarray | None = None) -> tuple[Eagle3Config, Eagle3Params]:
    """A draft with a head over `ids`, ascending (all of them by default)."""
    ids = np.arange(cfg.vocab_size) if ids is None else ids
    shape = Eagle3Config(
        hidden_size=cfg.hidden_size,
        intermediate_size=40,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope_theta=5e3,
        rope_scaling=RopeScaling(),
        draft_vocab_size=len(ids),
        taps=(0, 1, cfg.num_layers),
    )
    return shape, random_like(shape.shapes(cfg), seed, 0.25).replace(ids=jnp.asarray(ids, jnp.int32))


def copying(cfg: ModelConfig, seed: int = 1) -> tuple[EagleConfig, EagleParams]:
    """The draft of `draft`, which also proposes what followed the same tokens before."""
    shape, params = draft(cfg, seed)
    return shape.copies(True), params


DRAFTS: dict[str, Any] = {"eagle": draft, "copying": copying, "eagle3": eagle3, "medusa": medusa}


def fitted(kind: str, cfg: ModelConfig, tree: TreeConfig) -> TreeConfig:
    """The tree that a draft of this kind grows where `tree` is asked for."""
    return DRAFTS[kind](cfg)[0].fit(tree)


def weights(
    cfg: ModelConfig,
    ids: np.ndarray | None = None,
    seed: int = 0,
    kind: str = "eagle",
    int8: bool = False,
    slots: int = 0,
) -> tuple[Weights, Any]:
    """A target with a draft whose head keeps `ids` (all of them by default), and so many slots."""
    params = target(cfg, seed)
    shape, draft_params = DRAFTS[kind](cfg, seed + 1)
    ids = np.arange(cfg.vocab_size) if ids is None else ids
    drafter, draft_weights = shape.assemble(
        Target(cfg, params), draft_params, ids, kernels=AUTO, int8=int8, slots=slots
    )
    return Weights(params, draft_weights), drafter


def plan(
    cfg: ModelConfig, drafter: Any, tree: TreeConfig, settings: Sampling = Sampling(), stop_ids: tuple[int, ...] = ()
) -> Plan:
    """What is compiled for a drafter and these sampling settings."""
    return Plan(cfg, drafter, tree, stop_ids, rule_of(settings))


def paced(
    cfg: ModelConfig,
    kind: str | None,
    settings: Sampling = Sampling(),
    ids: np.ndarray | None = None,
    slots: int = 0,
    **changes: Any,
) -> tuple[Plan, Weights]:
    """A plan with a pace for a kind of draft (None: only what stands in the text), and weights with usual tables.

    changes: of the `Pace`.
    """
    tree, pace = TreeConfig(8, 5, 4), dataclasses.replace(PACE, **changes)
    if kind is None:
        w, drafter = Weights(target(cfg), NO_WEIGHTS), Vanilla()
    else:
        w, drafter = weights(cfg, ids, kind=kind, slots=slots)
        pace = DRAFTS[kind](cfg)[0].fit_pace(pace, cfg.vocab_size if ids is None else len(ids))
    one = dataclasses.replace(plan(cfg, drafter, tree, settings), pace=pace)
    return one, dataclasses.replace(w, pace=tables_of(pace, tree, DEFAULT))


def vanilla_plan(cfg: ModelConfig, settings: Sampling = Sampling(), stop_ids: tuple[int, ...] = ()) -> Plan:
    return plan(cfg, Vanilla(), VANILLA, settings, stop_ids)


def decode(
    plan: Plan,
    w: Weights,
    prompt: np.ndarray,
    limit: int = 24,
    settings: Sampling = Sampling(),
    *,
    seed: int = 0,
    chunks: Chunks = Chunks(32),
    capacity: int = 256,
) -> tuple[list[int], DecodeState]:
    """The tokens that a plan emits after a prompt, and the last state."""
    assert plan.rule == rule_of(settings), "a plan is decoded with the settings that it was made for"
    if isinstance(plan.drafter, Vanilla) and plan.pace is None:
        w = Weights(w.target, NO_WEIGHTS)
    caches = new_caches(plan, capacity, jnp.float32)
    asked = Asked.of(settings, seed=seed, limit=limit)
    state = prefill.start(plan, w, caches, np.asarray(prompt, np.int32), asked, chunks=chunks)
    state = engine.run(plan, w, state, np.int32(10_000))
    return np.asarray(state.output)[: int(state.emitted)].tolist(), state


@struct.dataclass
class Told(DraftWeights):
    """What `Oracle` reads."""

    text: Array  # [T] int32, prompt and answer
    wrong_from: Array  # int32, the position from which on it errs


@dataclasses.dataclass(frozen=True)
class Oracle(Memoryless):
    """A drafter that is told the answer: it proposes, as a chain, the tokens that are to come."""

    def propose(
        self, weights: Told, tree: TreeConfig, lead: Array, turn: Turn, memory: DraftMemory
    ) -> tuple[DraftTree, DraftMemory]:
        nodes = jnp.arange(tree.size, dtype=jnp.int32)
        tokens = weights.text[turn.length + nodes]
        tokens = jnp.where(turn.length + nodes >= weights.wrong_from, tokens + 1, tokens)
        return DraftTree(tokens.at[0].set(turn.root), jnp.maximum(nodes - 1, 0), nodes, causal(tree.size)), memory
