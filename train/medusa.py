"""`python -m train medusa CORPUS... --ckpt CKPT --name medusa`: train Medusa heads for a target.

The heads are residual blocks that share the target's LM head. CORPUS is a feature store that `train answers`
has made, or text or conversations, whose features the target then computes into a store of its own
(WORK/features). The same command resumes a run bit for bit. Then `python -m train medusa-tree` fits the tree.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax.training.train_state import TrainState
from jax import Array

from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import ModelConfig
from frspec_jax.drafters.medusa import HeadParams, MedusaConfig, MedusaParams, published_choices, residual
from frspec_jax.errors import UserError
from frspec_jax.llama import LlamaParams
from train import session
from train.batches import Batch, Packing
from train.optimiser import TargetHeadLoss, gradients, head_logits, key_of, seed_words
from train.settings import RunSettings, settings_of
from train.settings import add_arguments as add_run_arguments
from train.task import Task, starting_draft


@dataclasses.dataclass(frozen=True)
class MedusaRecipe(TargetHeadLoss):
    """Medusa-1's recipe (arXiv 2401.10774: a frozen target, AdamW), with the target's distribution for labels."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    heads: int = 4
    layers: int = 1  # residual blocks a head
    head_decay: float = 0.8  # weight of each further head, as a factor


PRESETS = {"default": MedusaRecipe()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, MedusaConfig.kind, PRESETS)


def run(args: argparse.Namespace) -> None:
    checkpoint = Checkpoint.open(args.ckpt)
    settings = settings_of(args, PRESETS)
    spec, params = _start(settings, checkpoint)
    recipe = settings.recipe

    def task_of(target: LlamaParams, _: Packing) -> Task:
        seed, head = seed_words(settings.seed), target.head
        return Task(
            spec=spec,
            params=params,
            recipe=recipe,
            step=lambda state, ranked, batch: train_step(state, recipe, head, ranked, seed, batch),
            agreement=lambda params, batch: agreement(params, head, batch),
            parts="head",
            flops=recipe.flops(params, head, passes=1, outputs=recipe.heads),
        )

    session.train(settings, checkpoint, task_of)


def _start(settings: RunSettings[MedusaRecipe], checkpoint: Checkpoint) -> tuple[MedusaConfig, MedusaParams]:
    """New heads, or those of --start-from."""
    recipe = settings.recipe
    found = starting_draft(settings.start_from, checkpoint, MedusaConfig, MedusaParams)
    if found is None:
        config = checkpoint.config
        choices = published_choices(recipe.heads)
        spec = MedusaConfig(config.hidden_size, recipe.heads, recipe.layers, False, choices)
        return spec, initial_params(spec, config)
    spec, params = found
    if spec.own_lm_heads:
        raise UserError(
            f"--start-from {settings.start_from} has LM heads of its own; heads that share the target's train"
        )
    if (spec.num_heads, spec.num_layers) != (recipe.heads, recipe.layers):
        raise UserError(
            f"--start-from {settings.start_from} has {spec.num_heads} heads of {spec.num_layers} residual blocks; "
            f"say --heads {spec.num_heads} --layers {spec.num_layers}"
        )
    return spec, params


def initial_params(spec: MedusaConfig, target: ModelConfig) -> MedusaParams:
    """Heads of zeros: each one starts as the target's LM head on the feature itself, as Medusa's do."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), spec.shapes(target))


# The loss ----------------------------------------------------------------------------------------


def ahead(rows: Array, steps: int) -> Array:
    """Rows [R, T, ...] of which row t is row t + steps; the last ones are zero, which no mask counts."""
    return jnp.pad(rows[:, steps:], [(0, 0), (0, steps)] + [(0, 0)] * (rows.ndim - 2))


def valid(batch: Batch, head: int) -> Array:
    """[R, T], 1 where head `head`'s word on pair t counts.

    It says what follows token t + 1 + head, so that token must be an answer's, of the same sequence.
    """
    segment = jnp.asarray(batch.segment)
    return jnp.asarray(batch.mask) * ahead(jnp.asarray(batch.mask), head) * (ahead(segment, head) == segment)


def outputs_of(head: HeadParams, batch: Batch) -> Array:
    """A head's outputs [R, T, H] on the features of a batch."""
    rows, tokens, hidden = batch.features.shape
    flat = jnp.asarray(batch.features).reshape(rows * tokens, hidden)
    return residual(head.blocks, flat).reshape(rows, tokens, hidden)


def pairs_counted(batch: Batch, heads: int) -> Array:
    """[heads] how many pairs of a batch count for each head."""
    return jnp.stack([valid(batch, i).sum() for i in range(heads)])


def loss_terms(
    params: MedusaParams, head: Array, batch: Batch, recipe: MedusaRecipe, counts: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of the heads' KL divergences from the target, each head i + 1 tokens further on.

    Args:
      head: [M, H], the rows of the target's LM head over which they are taken.
      counts: [heads] what the sums over pairs are divided by; None: the pairs of this batch that count.
    """
    counts = pairs_counted(batch, len(params.heads)) if counts is None else counts
    log_want = jax.nn.log_softmax(head_logits(batch.targets, head), axis=-1)

    @recipe.rematted
    def sums(output: Array, want: Array, mask: Array) -> tuple[Array, Array]:
        said = jax.nn.log_softmax(head_logits(output, head), axis=-1)
        kl = ((jnp.exp(want) * (want - said)).sum(-1) * mask).sum()
        return kl, ((said.argmax(-1) == want.argmax(-1)) * mask).sum()

    total = jnp.zeros(())
    metrics: dict[str, Array] = {}
    for i, one in enumerate(params.heads):
        found = sums(outputs_of(one, batch), ahead(log_want, i), valid(batch, i))
        kl, right = (x / (counts[i] + 1e-5) for x in found)
        total += recipe.head_decay**i * kl
        metrics |= {f"kl_{i}": kl, f"top1_{i}": right}
    return total, {"loss": total, **metrics}


@functools.partial(jax.jit, static_argnames=("recipe",), donate_argnames=("state",))
def train_step(
    state: TrainState, recipe: MedusaRecipe, head: Array, ranked: Array, seed: Array, batch: Batch
) -> tuple[TrainState, dict[str, Array]]:
    """One step of the optimiser.

    Args:
      head: [V, H], the target's. ranked: [V] int32, all ids by frequency. seed: [2] uint32; with the
        step's number it decides the random ids.
    """
    rows = recipe.cast(recipe.loss_head(head, ranked, jax.random.fold_in(key_of(seed), state.step)))

    def loss(params: MedusaParams, part: Batch, counts: Array) -> tuple[Array, dict[str, Array]]:
        return loss_terms(params, rows, part, recipe, counts)

    grads, metrics = gradients(loss, state.params["draft"], batch, pairs_counted(batch, recipe.heads), recipe)
    return state.apply_gradients(grads={"draft": grads}), metrics


@jax.jit
def agreement(params: MedusaParams, head: Array, batch: Batch) -> Array:
    """How often each head's best token, and its best three, hold the target's best one, over all of `head`.

    Returns [heads, 3]: top-1 hits, top-3 hits and pairs counted.
    """
    head = head.astype(batch.targets.dtype)
    hits = [rank_hits(one, head, jnp.arange(head.shape[0]), head, batch, i, 3) for i, one in enumerate(params.heads)]
    return jnp.stack([jnp.stack([found[0], found[:3].sum(), count]) for found, count in hits])


def rank_hits(
    one: HeadParams, lm_head: Array, ids: Array, target_head: Array, batch: Batch, i: int, ranks: int
) -> tuple[Array, Array]:
    """How often the target's best token is the r-th best of head i, [ranks]; and of how many pairs.

    lm_head: [V', H], what reads the head's outputs, and `ids` [V'] what its rows stand for. target_head: [V, H].
    """
    best = ahead(head_logits(batch.targets, target_head).argmax(-1), i)
    top = ids[jax.lax.top_k(head_logits(outputs_of(one, batch), lm_head), ranks)[1]]
    mask = valid(batch, i)
    return ((top == best[..., None]) * mask[..., None]).sum((0, 1)), mask.sum()
