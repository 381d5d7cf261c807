"""What the recipes of drafts have in common: the optimiser, its schedule, precision, and the vocabulary of the loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from jax import Array, lax

from frspec_jax.errors import UserError
from pallas_kernels.products import einsum_f32, rows_f32, turned
from train.batches import Batch, Rows

Tree = TypeVar("Tree")
Metrics = dict[str, Array]
# Given weights, a batch, and how many pairs count in each part (pass or head) of the whole batch: loss and metrics.
Loss = Callable[[Any, Batch, Array], tuple[Array, Metrics]]

# What a figure of a recipe may be, by its name: from and to. A rate above 10 is a slip of the finger, and infinite or
# negative weights train to nothing.
LARGEST = 2**31 - 1
LIMITS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("steps", "accumulate", "unroll", "heads", "layers"), (1, LARGEST)),
    **dict.fromkeys(("warmup", "loss_vocab", "loss_random"), (0, LARGEST)),
    **dict.fromkeys(("lr", "weight_decay", "noise", "unroll_decay", "head_decay"), (0, 10)),
    **dict.fromkeys(("feature_weight", "ce_weight"), (0, 1e6)),
    "clip": (1e-9, 1e9),
}


@dataclasses.dataclass(frozen=True)
class Optimisation:
    """The optimiser, its schedule, and how a step is computed.

    Raises:
      UserError: a figure outside of `LIMITS`, by its flag.
    """

    steps: int = 2000
    lr: float = 1e-3
    warmup: int = 100
    decay: Literal["cosine", "linear"] = "cosine"
    optimizer: Literal["adamw", "muon"] = "muon"
    weight_decay: float = 0.0
    clip: float = 1.0  # global norm
    accumulate: int = 1  # parts of a batch whose gradients are taken one after the other, to save memory
    compute: Literal["float32", "bfloat16"] = "float32"  # of products; weights and optimiser stay float32
    remat: Literal["none", "heads"] = "none"  # heads: logits are computed again for the gradient, not kept

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name, low)
            if not low <= value <= high:  # as is no nan
                wanted = f"at least {low:g}" if value < low else f"at most {high:g}" if value > high else "a number"
                raise UserError(f"--{name.replace('_', '-')} {value} must be {wanted}")

    def cast(self, tree: Tree) -> Tree:
        """Floats in the precision of products."""
        dtype = jnp.dtype(self.compute)
        return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    def cast_batch(self, batch: Batch) -> Batch:
        """The same for what products read of a batch; its masks, which are counted, stay float32."""
        features, targets = self.cast((batch.features, batch.targets))
        return dataclasses.replace(batch, features=features, targets=targets)

    def rematted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; with `remat`, one whose intermediate results are not kept for the gradient."""
        return jax.checkpoint(function) if self.remat == "heads" else function

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
        matrices = optax.chain(
            optax.trace(0.95, nesterov=True),
            optax.stateless_with_tree_map(lambda x, _: orthogonalised(x, jnp.dtype(self.compute))),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(self.schedule()),
        )
        vectors = optax.adamw(self.schedule(), 0.9, 0.95, weight_decay=0.0)
        kinds = {"matrix": matrices, "vector": vectors}
        return optax.chain(
            clip,
            optax.partition(kinds, lambda tree: jax.tree.map(lambda x: "matrix" if x.ndim == 2 else "vector", tree)),
        )


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic that sends singular values near one (Jordan et al., Muon)


def orthogonalised(x: Array, dtype: jnp.dtype[Any], steps: int = 5) -> Array:
    """Muon's update: a matrix of x's singular vectors whose singular values are all near one, times what makes its
    root mean square AdamW's, about 0.2 (arXiv 2502.16982).

    optax.contrib.muon says the same in the dtype of its momentum; here the products may be bfloat16 while the momentum
    is float32: with AMX an eighth of the time, which was two fifths of a step of Qwen2.5-0.5B's draft.
    """
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[0] > x.shape[1]
    wide = turned(x) if tall else x
    wide = (wide / (jnp.linalg.norm(wide) + 1e-8)).astype(dtype)
    for _ in range(steps):
        gram = einsum_f32("ik,jk->ij", wide, wide).astype(dtype)
        mix = (b * gram + c * einsum_f32("ij,jk->ik", gram, gram)).astype(dtype)
        wide = (a * wide + einsum_f32("ij,jk->ik", mix, wide)).astype(dtype)
    return (wide.T if tall else wide).astype(x.dtype) * (0.2 * max(x.shape) ** 0.5)


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

    def flops(self, params: Any, head: Array, passes: int, outputs: int) -> float:
        """Operations a token of a step that runs all weights `passes` times and reads `outputs` off the head [V, H]."""
        vocab, hidden = head.shape
        rows = min(vocab, self.loss_vocab + self.loss_random) if self.loss_vocab else vocab
        return passes * product_flops(params) + (2 + 4 * outputs) * rows * hidden


def seed_words(seed: int) -> np.ndarray:
    """A seed of 64 bits, signed or not, as two words [2] uint32, the high one first: what a step takes in."""
    return np.array([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def key_of(words: Array | np.ndarray) -> Array:
    """The random key of `seed_words`: that of `jax.random.key` where 31 bits are enough, which is all that it takes."""
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def head_logits(rows: Rows, head: Array) -> Array:
    """Logits [R, T, M], float32, of rows [R, T, H] by a head [M, H], multiplied in the head's dtype."""
    count, tokens, hidden = rows.shape
    flat = jnp.asarray(rows, head.dtype).reshape(count * tokens, hidden)
    return rows_f32(flat, head).reshape(count, tokens, -1)


def product_flops(params: Any) -> float:
    """Operations a token of the products with all matrices of `params`: forward, and both gradients."""
    return 6.0 * sum(leaf.size for leaf in jax.tree.leaves(params) if len(leaf.shape) == 2)


def new_state(params: Any, recipe: Optimisation) -> TrainState:
    """The optimiser's state at step 0. (flax's TrainState asks for a dict, so the draft is one entry of it.)"""
    return TrainState.create(apply_fn=None, params={"draft": params}, tx=recipe.transformation())


def gradients(loss: Loss, params: Any, batch: Batch, counts: Array, recipe: Optimisation) -> tuple[Any, Metrics]:
    """Gradients of a batch's loss, and its metrics, taken over `recipe.accumulate` parts of its rows in turn.

    Every term is a sum over pairs divided by a count of the whole batch, so the parts add up to what
    the batch gives at once (a mean of means would weigh parts with few pairs too much).
    """

    def of_part(params: Any, part: Batch) -> tuple[Array, Metrics]:
        return loss(recipe.cast(params), recipe.cast_batch(part), counts)

    gradient = jax.grad(of_part, has_aux=True)
    if recipe.accumulate == 1:
        return gradient(params, batch)
    # Part p takes every p-th row, so that each part lies on all devices that the rows are spread over.
    parts = jax.tree.map(lambda x: x.reshape(-1, recipe.accumulate, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    first = jax.tree.map(lambda x: x[0], parts)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first))
    return lax.scan(add, zero, parts)[0]
