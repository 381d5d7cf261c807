"""How an EAGLE draft learns: its passes over packed rows, the loss, and one optimiser step.

EAGLE's published recipe (arXiv 2401.15077) is a SmoothL1 loss on the predicted feature and a soft
cross-entropy on the target's distribution, one pass with the target's own features. Training-time
test (EAGLE-3, arXiv 2503.01840; HASS, arXiv 2408.15766) adds passes on the draft's own features, as
drafting will run them: `Recipe.unroll` passes in all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState
from jax import Array

from frspec_jax.config import ModelConfig
from frspec_jax.drafters.eagle import EagleConfig, EagleParams
from frspec_jax.layers import LayerParams, embedded, gated_mlp, project_qkv, rotation
from pallas_kernels.products import einsum_f32, linear, rms_norm
from train.batches import Batch
from train.optimiser import TargetHeadLoss, gradients, head_logits, key_of
from train.start import ONE, Units, folded

MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Recipe(TargetHeadLoss):
    """What the loss and the optimiser are made of."""

    lr: float = 6e-4  # from a fitted start; with Muon, 2e-3 first undoes what the fit has found
    feature_weight: float = 0.1  # of SmoothL1 on the features
    ce_weight: float = 1.0  # of the soft cross-entropy
    unroll: int = 2  # passes: the first on the target's features, the rest on the draft's own
    unroll_decay: float = 0.8  # weight of each further pass, as a factor
    noise: float = 0.0  # uniform noise on the features of the first pass, +- this much
    start: Literal["fitted", "random"] = "fitted"  # a new draft's fc: by least squares, or random
    units: Literal["measured", "one"] = "measured"  # that weights are trained in (train/start.py)


# EAGLE's published recipe: feature loss first, noise of 0.2 * 512 / T in all, one pass.
EAGLE2 = Recipe(
    steps=800_000,
    lr=3e-5,
    warmup=2000,
    decay="linear",
    optimizer="adamw",
    weight_decay=0.01,
    clip=0.5,
    feature_weight=1.0,
    ce_weight=0.1,
    unroll=1,
    noise=0.1,
    loss_vocab=0,
    loss_random=0,
    start="random",
    units="one",
)
PRESETS = {"default": Recipe(), "eagle2": EAGLE2}


def initial_params(key: Array, draft: EagleConfig, config: ModelConfig) -> EagleParams:
    """A draft to start from: `random_params`, so that it begins as its fc.

    (Starting from the target's last layer is worse: it works on a residual stream that is many times
    larger than the normed features that a draft reads and writes.)
    """
    return random_params(key, draft.shapes(config))


def random_params(key: Array, shapes: Any) -> Any:
    """Weights of a draft with one decoder `layer`: matrices normal, of deviation 1 / sqrt(inputs), vectors zero.

    So every sum starts near unit size, but for the products that write to the residual stream, which start at
    a tenth of that.
    """
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    random = [
        jax.random.normal(k, leaf.shape) * leaf.shape[1] ** -0.5 if len(leaf.shape) == 2 else jnp.zeros(leaf.shape)
        for k, leaf in zip(keys, leaves, strict=True)
    ]
    params = jax.tree.unflatten(tree, random)
    layer = params.layer
    layer = dataclasses.replace(
        layer, mlp_norm=jnp.ones_like(layer.mlp_norm), output=0.1 * layer.output, down=0.1 * layer.down
    )
    return dataclasses.replace(params, layer=layer)


def _attend(q: Array, keys: list[Array], values: list[Array], visible: Array) -> Array:
    """Attention of pass s over pass 0's earlier rows, and over the one row of each later pass on its path.

    q: [T, heads, head_dim]; keys, values: s + 1 arrays [T, kv_heads, head_dim], the later ones already
    shifted so that row t is what row t sees; visible: [T, T], which rows of pass 0 each row sees.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = keys[0].shape[1]
    q = q.reshape(tokens, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    main = einsum_f32("thgd,shd->hgts", q, keys[0])
    scores = [jnp.where(visible, main, MASKED)]
    scores += [einsum_f32("thgd,thd->hgt", q, k)[..., None] for k in keys[1:]]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q.dtype)
    mixed = einsum_f32("hgts,shd->thgd", weights[..., :tokens], values[0])
    for extra, v in enumerate(values[1:]):
        mixed += einsum_f32("hgt,thd->thgd", weights[..., tokens + extra], v)
    return mixed.astype(q.dtype).reshape(tokens, heads * head_dim)


def unrolled_passes(
    params: EagleParams, config: ModelConfig, embedding: Array, batch: Batch, unroll: int
) -> list[Array]:
    """`self_fed_passes` of EAGLE-2's layer; embedding: [V, H]."""
    features = jnp.asarray(batch.features)
    rows = embedded(embedding, batch.next_tokens, config).reshape(-1, features.shape[-1])

    def enter(features: Array) -> tuple[Array, Array]:
        x = linear(jnp.concatenate([rows, features], axis=-1), params.fc, params.fc_bias)
        return x, x

    return self_fed_passes(params.layer, config, enter, features, batch, unroll)


def self_fed_passes(
    layer: LayerParams,
    config: ModelConfig,
    enter: Callable[[Array], tuple[Array, Array]],
    features: Array,
    batch: Batch,
    unroll: int,
    leave: Callable[[Array], Array] = lambda x: x,
) -> list[Array]:
    """A draft's outputs [R, T, H] in each pass: on true features, on its own, on its own of these, ...

    Pass s reads at pair t what pass s - 1 said at t - 1, and sees what drafting would: true pairs up to
    t - s, then one pair of each pass before it. Only attention and this shift know where a row ends; products
    run over all R * T pairs at once, so that a weight has one gradient, not one a row to be added up.

    Args:
      enter: given the features [R * T, H] that a pass reads, what Q, K and V read and the residual stream.
      features: [R, T, H], those of pass 0. batch: segments and positions are read.
      leave: given the layer's outputs [R * T, H], what counts as the draft's.
    """
    rows, tokens = batch.segment.shape
    here = jnp.arange(tokens)
    segment = jnp.asarray(batch.segment)
    same = segment[:, :, None] == segment[:, None]
    by = rotation(config, jnp.asarray(batch.position).reshape(-1))

    def by_row(x: Array) -> Array:
        return x.reshape(rows, tokens, *x.shape[1:])

    def flat(x: Array) -> Array:
        return x.reshape(rows * tokens, *x.shape[2:])

    keys: list[Array] = []
    values: list[Array] = []
    outputs: list[Array] = []
    for s in range(unroll):
        attend_from, x = enter(flat(features))
        q, k, v = (by_row(a) for a in project_qkv(layer, config, attend_from, by))
        keys = [keys[0] if i == 0 else _shifted(old) for i, old in enumerate(keys)] + [k]
        values = [values[0] if i == 0 else _shifted(old) for i, old in enumerate(values)] + [v]
        visible = same & (here[None] <= here[:, None] - s)
        x = x + linear(flat(jax.vmap(_attend)(q, keys, values, visible)), layer.output, layer.output_bias)
        x = x + gated_mlp(layer, rms_norm(x, layer.mlp_norm, config.rms_norm_eps))
        outputs.append(by_row(leave(x)))
        features = _shifted(outputs[-1])
    return outputs


def _shifted(x: Array) -> Array:
    """Of x [R, T, ...], pair t becomes what pair t - 1 is; pair 0, which no loss reads, keeps its own."""
    return jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)


def valid(batch: Batch, s: int) -> Array:
    """Mask of pass s: the pair counts, and the s pairs before it stand in its own sequence."""
    before = jnp.pad(batch.segment, ((0, 0), (s, 0)))[:, : batch.segment.shape[1]]
    return jnp.asarray(batch.mask * (before == batch.segment))


def pairs_counted(batch: Batch, unroll: int) -> Array:
    """[unroll] how many pairs of a batch count in each pass."""
    return jnp.stack([valid(batch, s).sum() for s in range(unroll)])


def loss_terms(
    params: EagleParams,
    config: ModelConfig,
    embedding: Array,
    head: Array,
    batch: Batch,
    recipe: Recipe,
    counts: Array | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The recipe's loss, and its terms.

    Args:
      head: [M, H], the rows of the target's LM head over which the cross-entropy is taken.
      counts: [unroll] what the sums over pairs are divided by; None: the pairs of this batch that count.
    """
    counts = pairs_counted(batch, recipe.unroll) if counts is None else counts
    targets = jnp.asarray(batch.targets)
    log_want = jax.nn.log_softmax(head_logits(targets, head), axis=-1)
    best = log_want.argmax(-1)[..., None]

    @recipe.rematted
    def sums(output: Array, mask: Array) -> tuple[Array, Array, Array]:
        said = head_logits(output, head)
        # Cross-entropy less the target's entropy: the KL divergence, whose floor is zero.
        ce = ((jnp.exp(log_want) * (log_want - jax.nn.log_softmax(said, axis=-1))).sum(-1) * mask).sum()
        distance = optax.huber_loss(output.astype(jnp.float32), targets.astype(jnp.float32))
        # Not by an argmax, which takes a CPU three times as long as the maximum that softmax asks for anyway.
        right = jnp.take_along_axis(said, best, axis=-1)[..., 0] == said.max(-1)
        return ce, (distance.mean(-1) * mask).sum(), (right * mask).sum()

    total = jnp.zeros(())
    metrics: dict[str, Array] = {}
    for s, output in enumerate(unrolled_passes(params, config, embedding, batch, recipe.unroll)):
        ce, feature, right = (x / (counts[s] + 1e-5) for x in sums(output, valid(batch, s)))
        total += recipe.unroll_decay**s * (recipe.ce_weight * ce + recipe.feature_weight * feature)
        metrics |= {f"kl_{s}": ce, f"feature_{s}": feature, f"top1_{s}": right}
    return total, {"loss": total, **metrics}


@functools.partial(jax.jit, static_argnames=("config", "recipe", "units"), donate_argnames=("state",))
def train_step(
    state: TrainState,
    config: ModelConfig,
    recipe: Recipe,
    embedding: Array,
    head: Array,
    ranked: Array,
    seed: Array,
    batch: Batch,
    units: Units = ONE,
) -> tuple[TrainState, dict[str, Array]]:
    """One step of the optimiser, on weights in `units`.

    Args:
      embedding, head: [V, H], the target's. ranked: [V] int32, all ids by frequency. seed: [2] uint32, as
        `seed_words` makes it; with the step's number it decides the noise and the random ids.
    """
    key = jax.random.fold_in(key_of(seed), state.step)
    ids_key, noise_key = jax.random.split(key)
    embedding, head = recipe.cast((embedding, recipe.loss_head(head, ranked, ids_key)))
    if recipe.noise:
        noise = jax.random.uniform(noise_key, batch.features.shape, minval=-recipe.noise, maxval=recipe.noise)
        batch = dataclasses.replace(batch, features=batch.features + noise)

    def loss(params: EagleParams, part: Batch, counts: Array) -> tuple[Array, dict[str, Array]]:
        return loss_terms(folded(params, units), config, embedding, head, part, recipe, counts)

    counts = pairs_counted(batch, recipe.unroll)
    grads, metrics = gradients(loss, state.params["draft"], batch, counts, recipe)
    return state.apply_gradients(grads={"draft": grads}), metrics


@functools.partial(jax.jit, static_argnames=("config", "passes"))
def agreement(
    params: EagleParams, config: ModelConfig, embedding: Array, head: Array, batch: Batch, passes: int
) -> Array:
    """How often the draft's best token, and its best three, hold the target's best one, over all of `head`.

    Returns [passes, 3]: top-1 hits, top-3 hits and pairs counted, by pass (1: on true features).
    """
    embedding, head = (table.astype(batch.targets.dtype) for table in (embedding, head))
    best = head_logits(batch.targets, head).argmax(-1)
    outputs = unrolled_passes(params, config, embedding, batch, passes)
    return jnp.stack([hits(output, head, None, best, valid(batch, s)) for s, output in enumerate(outputs)])


def hits(outputs: Array, head: Array, ids: Array | None, best: Array, mask: Array) -> Array:
    """How often the best row of a head is the right one, how often one of its best three is, and of how many: [3].

    Args:
      outputs: [R, T, H], what the head [M, H] reads. ids: [M], what its rows stand for; None: themselves.
      best: [R, T], the right ids. mask: [R, T], 1 where a pair counts.
    """
    top = jax.lax.top_k(head_logits(outputs, head), 3)[1]
    found = ((top if ids is None else ids[top]) == best[..., None]) * mask[..., None]
    return jnp.stack([found[..., 0].sum(), found.sum(), mask.sum()])
