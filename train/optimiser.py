"""What the recipes of drafts have in common: the optimiser, its schedule, and the vocabulary of the loss."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax import Array


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """The optimiser and its schedule."""

    steps: int = 2000
    lr: float = 1e-3
    warmup: int = 100
    decay: Literal["cosine", "linear"] = "cosine"
    optimizer: Literal["adamw", "muon"] = "muon"
    weight_decay: float = 0.0
    clip: float = 1.0  # global norm

    def schedule(self) -> optax.Schedule:
        """Linear warm-up, then decay to zero over the remaining steps."""
        rest = max(1, self.steps - self.warmup)
        fall = (
            optax.cosine_decay_schedule(self.lr, rest)
            if self.decay == "cosine"
            else optax.linear_schedule(self.lr, 0.0, rest)
        )
        return optax.join_schedules([optax.linear_schedule(0.0, self.lr, self.warmup), fall], [self.warmup])

    def transformation(self) -> optax.GradientTransformation:
        """The optimiser. Muon (orthogonalised momentum) for matrices leaves vectors to AdamW."""
        clip = optax.clip_by_global_norm(self.clip)
        if self.optimizer == "adamw":
            return optax.chain(clip, optax.adamw(self.schedule(), 0.9, 0.95, weight_decay=self.weight_decay))
        muon = optax.contrib.muon(
            self.schedule(), weight_decay=self.weight_decay, adam_b1=0.9, adam_b2=0.95, consistent_rms=0.2
        )
        return optax.chain(clip, muon)


@dataclasses.dataclass(frozen=True)
class TargetHeadLoss(Optimisation):
    """For drafts that the target's own LM head reads: which of its rows the cross-entropy looks at."""

    loss_vocab: int = 8192  # the most frequent ids, over which the cross-entropy is taken; 0 is all
    loss_random: int = 2048  # further ids, drawn anew each step, so that the tail is held down too

    def loss_head(self, head: Array, ranked: Array, key: Array) -> Array:
        """The rows [M, H] of an LM head [V, H] over which a step's cross-entropy is taken.

        ranked: [V] int32, all ids by frequency. key: decides the random ids.
        """
        if not self.loss_vocab:
            return head
        rest = jax.random.permutation(key, ranked[self.loss_vocab :])[: self.loss_random]
        return head[jnp.concatenate([ranked[: self.loss_vocab], rest])]


def new_state(params: Any, recipe: Optimisation) -> TrainState:
    """The optimiser's state at step 0. (flax's TrainState asks for a dict, so the draft is one entry of it.)"""
    return TrainState.create(apply_fn=None, params={"draft": params}, tx=recipe.transformation())
