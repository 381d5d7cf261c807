"""`python -m train eagle3 CORPUS... --ckpt CKPT --name eagle3`: train an EAGLE-3 draft for a target.

CORPUS is a feature store that `train answers` has made, or text or conversations. Stores do not hold the streams
of the target's layers that EAGLE-3 reads, so the target runs over their tokens again, into a store of the run's
own (WORK/features). The head keeps the most frequent tokens of CKPT's ranking (--draft-vocab), and is trained. The
same command resumes a run bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jax import Array

from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import ModelConfig
from frspec_jax.drafters.eagle3 import (
    AS_PUBLISHED,
    Eagle3Config,
    Eagle3Params,
    Norms,
    default_taps,
    entered,
    joined_taps,
    left,
    read_by_head,
    with_embedding,
    without_embedding,
)
from frspec_jax.drafting import Draft, draft_ids
from frspec_jax.errors import UserError
from frspec_jax.llama import LlamaParams
from pallas_kernels.products import rms_norm, take_rows
from train import session
from train.batches import Batch, Packing
from train.optimiser import Optimisation, gradients, head_logits, key_of, product_flops, seed_words
from train.recipe import hits, random_params, self_fed_passes, valid
from train.settings import add_arguments as add_run_arguments
from train.settings import settings_of
from train.task import Task, starting_draft

PASSES = 5  # self-fed steps that an evaluation looks at


@dataclasses.dataclass(frozen=True)
class Eagle3Recipe(Optimisation):
    """Cross-entropy alone, over passes that feed on the draft's own outputs (training-time test, arXiv 2503.01840)."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    unroll: int = 3  # passes: the first on the target's streams, the rest on the draft's own outputs
    unroll_decay: float = 0.8  # weight of each further pass, as a factor


# The published recipe: seven passes; AdamW, whose learning rate falls linearly to zero.
PUBLISHED = Eagle3Recipe(steps=800_000, lr=5e-5, warmup=12_000, decay="linear", clip=0.5, unroll=7)
PRESETS = {"default": Eagle3Recipe(), "eagle3": PUBLISHED}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, Eagle3Config.kind, PRESETS)
    parser.add_argument(
        "--draft-vocab",
        metavar="N",
        help="rows of the draft's head: a number, or a share such as 1/4 (default: a quarter, if ranked)",
    )


def run(args: argparse.Namespace) -> None:
    checkpoint = Checkpoint.open(args.ckpt)
    settings = settings_of(args, PRESETS)
    recipe, config = settings.recipe, checkpoint.config
    found = starting_draft(settings.start_from, checkpoint, Eagle3Config, Eagle3Params)
    if found is None:
        if config.num_layers < 3:
            raise UserError(f"--ckpt {checkpoint.path} has {config.num_layers} layers; EAGLE-3 reads the last but two")
        ids = np.sort(draft_ids(checkpoint, Draft(vocab=args.draft_vocab)))
        spec = new_draft(config, len(ids))
    elif args.draft_vocab is not None:
        raise UserError("--draft-vocab does not go with --start-from, whose draft has its vocabulary already")
    else:
        spec, ids = found[0], found[0].vocabulary(found[1])

    def task_of(target: LlamaParams, _: Packing) -> Task:
        embedding, head = target.embedding, target.head
        key = key_of(seed_words(settings.seed))
        whole = initial_params(key, spec, config, head, ids) if found is None else found[1]
        params, own = without_embedding(whole)
        embedding = embedding if own is None else own
        layer, kept, norms = spec.layer_of(config), jnp.asarray(ids, jnp.int32), spec.norms
        return Task(
            spec=spec,
            params=dataclasses.replace(params, ids=None),  # which are not trained, nor is an embedding
            recipe=recipe,
            step=lambda state, ranked, batch: train_step(state, layer, recipe, embedding, head, kept, batch, norms),
            agreement=lambda params, batch: agreement(params, layer, embedding, head, kept, batch, PASSES, norms),
            parts="self-fed step",
            # All weights in each pass (fc, which runs once, too often by some per cent); the target's whole head once.
            flops=recipe.unroll * product_flops(params) + 2.0 * config.vocab_size * config.hidden_size,
            finished=lambda params: with_embedding(dataclasses.replace(params, ids=kept), own),
        )

    session.train(settings, checkpoint, task_of, spec.taps, draft_vocab=len(ids))


def new_draft(target: ModelConfig, draft_vocab_size: int) -> Eagle3Config:
    """A draft with the shape of one of the target's own layers, and its rotary embedding."""
    same = (
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
    )
    return Eagle3Config(
        **{name: getattr(target, name) for name in same},
        draft_vocab_size=draft_vocab_size,
        taps=default_taps(target.num_layers),
    )


def initial_params(key: Array, spec: Eagle3Config, config: ModelConfig, head: Array, ids: np.ndarray) -> Eagle3Params:
    """A draft to start from: `random_params`, norms of one, and the rows `ids` of the target's LM head [V, H]."""
    params: Eagle3Params = random_params(key, dataclasses.replace(spec.shapes(config), lm_head=None, ids=None))
    # An array each: a step's arguments are donated, and no buffer can be given away twice.
    one, two, three = (jnp.ones(spec.hidden_size) for _ in range(3))
    return dataclasses.replace(params, embedding_norm=one, feature_norm=two, norm=three, lm_head=head[ids])


# The loss ----------------------------------------------------------------------------------------


def unrolled_passes(
    params: Eagle3Params,
    config: ModelConfig,
    embedding: Array,
    batch: Batch,
    unroll: int,
    norms: Norms = AS_PUBLISHED,
) -> list[Array]:
    """What the draft's head reads, [R, T, H], in each pass; embedding: [V, H]."""
    eps, hidden = config.rms_norm_eps, config.hidden_size
    normed = rms_norm(take_rows(embedding, batch.next_tokens).reshape(-1, hidden), params.embedding_norm, eps)

    def enter(features: Array) -> tuple[Array, Array]:
        return entered(params, norms, normed, features, eps)

    rows, tokens, width = batch.features.shape
    features = jnp.asarray(batch.features).reshape(rows * tokens, width)
    fused = joined_taps(params, norms, features, eps).reshape(rows, tokens, hidden)
    leave = functools.partial(left, params, norms, eps=eps)
    outputs = self_fed_passes(params.layer, config, enter, fused, batch, unroll, leave)
    return [read_by_head(params, norms, output, eps) for output in outputs]


def wanted(head: Array, ids: Array, batch: Batch) -> tuple[Array, Array]:
    """The target's log-probabilities over the draft's vocabulary [R, T, V_d]; where its best token is in it [R, T].

    The rows `ids` of the head are multiplied anew: to gather as many columns of all logits takes a CPU longer.
    """
    every = head_logits(batch.targets, head)
    kept = jnp.zeros(head.shape[0], bool).at[ids].set(True)
    inside = jnp.where(kept, every, -jnp.inf).max(-1) == every.max(-1)
    return jax.nn.log_softmax(head_logits(batch.targets, take_rows(head, ids)), axis=-1), inside


def pairs_counted(head: Array, ids: Array, batch: Batch, recipe: Eagle3Recipe) -> Array:
    """[unroll] how many pairs of a batch count in each pass."""
    inside = wanted(head, ids, batch)[1]
    return jnp.stack([(valid(batch, s) * inside).sum() for s in range(recipe.unroll)])


def loss_terms(
    params: Eagle3Params,
    config: ModelConfig,
    embedding: Array,
    head: Array,
    ids: Array,
    batch: Batch,
    recipe: Eagle3Recipe,
    counts: Array | None = None,
    norms: Norms = AS_PUBLISHED,
) -> tuple[Array, dict[str, Array]]:
    """The weighted sum of each pass's KL divergence from the target's distribution over the draft's vocabulary.

    A pair whose most probable token is not in that vocabulary does not count, as published.

    Args:
      embedding, head: [V, H], the target's. ids: [V_d] int32, the draft's vocabulary.
      counts: [unroll] what the sums over pairs are divided by; None: the pairs of this batch that count.
      norms: the draft's (`Eagle3Config.norms`).
    """
    counts = pairs_counted(head, ids, batch, recipe) if counts is None else counts
    log_want, inside = wanted(head, ids, batch)
    best = log_want.argmax(-1)[..., None]
    assert params.lm_head is not None
    lm_head = params.lm_head

    @recipe.rematted
    def sums(output: Array, mask: Array) -> tuple[Array, Array]:
        said = jax.nn.log_softmax(head_logits(output, lm_head), axis=-1)
        kl = ((jnp.exp(log_want) * (log_want - said)).sum(-1) * mask).sum()
        return kl, ((jnp.take_along_axis(said, best, axis=-1)[..., 0] == said.max(-1)) * mask).sum()

    total = jnp.zeros(())
    metrics: dict[str, Array] = {}
    for s, output in enumerate(unrolled_passes(params, config, embedding, batch, recipe.unroll, norms)):
        kl, right = (x / (counts[s] + 1e-5) for x in sums(output, valid(batch, s) * inside))
        total += recipe.unroll_decay**s * kl
        metrics |= {f"kl_{s}": kl, f"top1_{s}": right}
    return total, {"loss": total, **metrics}


@functools.partial(jax.jit, static_argnames=("config", "recipe", "norms"), donate_argnames=("state",))
def train_step(
    state: TrainState,
    config: ModelConfig,
    recipe: Eagle3Recipe,
    embedding: Array,
    head: Array,
    ids: Array,
    batch: Batch,
    norms: Norms = AS_PUBLISHED,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of the optimiser; the arguments are those of `loss_terms`."""
    embedding, head = recipe.cast((embedding, head))

    def loss(params: Eagle3Params, part: Batch, counts: Array) -> tuple[Array, dict[str, Array]]:
        return loss_terms(params, config, embedding, head, ids, part, recipe, counts, norms)

    counts = pairs_counted(head, ids, batch, recipe)
    grads, metrics = gradients(loss, state.params["draft"], batch, counts, recipe)
    return state.apply_gradients(grads={"draft": grads}), metrics


@functools.partial(jax.jit, static_argnames=("config", "passes", "norms"))
def agreement(
    params: Eagle3Params,
    config: ModelConfig,
    embedding: Array,
    head: Array,
    ids: Array,
    batch: Batch,
    passes: int,
    norms: Norms = AS_PUBLISHED,
) -> Array:
    """How often the draft's best token, and its best three, hold the target's best one of its whole vocabulary.

    Returns [passes, 3]: top-1 hits, top-3 hits and pairs counted, by pass (1: on true features).
    """
    assert params.lm_head is not None
    embedding, head = (table.astype(batch.targets.dtype) for table in (embedding, head))
    best = head_logits(batch.targets, head).argmax(-1)
    outputs = unrolled_passes(params, config, embedding, batch, passes, norms)
    return jnp.stack([hits(output, params.lm_head, ids, best, valid(batch, s)) for s, output in enumerate(outputs)])
