"""EAGLE's recipe: passes that are what drafting does, its loss, and a step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frspec_jax import kv_cache
from frspec_jax.config import TreeConfig
from frspec_jax.drafters import eagle as drafter
from frspec_jax.drafters.base import Accepted, Turn
from frspec_jax.drafters.beam import BeamMemory
from frspec_jax.layers import Pass
from frspec_jax.placement import Placement
from frspec_jax.vocabulary import DraftHead
from pallas_kernels.visibility import Sees, causal
from tests.support import toy
from train import eagle
from train.batches import Batch
from train.optimiser import new_state, seed_words
from train.recipe import Recipe, agreement, loss_terms, train_step, unrolled_passes

CFG = toy.config(vocab_size=40)
WIDTH = CFG.hidden_size
extend = jax.jit(drafter.run_pairs)


class Drafting:
    """A draft, a target's embedding and head, and one packed row: two sequences and some padding."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        shape, self.params = toy.draft(CFG)
        self.layer = shape.layer_of(CFG)
        target = toy.target(CFG)
        self.embedding, self.head = target.embedding, target.head
        self.count, rest, pad = 9, 6, 4
        total = self.count + rest + pad
        self.row = Batch(
            features=rng.normal(size=(total, WIDTH)).astype(np.float32),
            next_tokens=rng.integers(0, 40, total).astype(np.int32),
            targets=rng.normal(size=(total, WIDTH)).astype(np.float32),
            mask=(rng.random(total) < 0.8).astype(np.float32),
            segment=np.repeat([1, 2, 0], [self.count, rest, pad]).astype(np.int32),
            # The second sequence is the rest of a longer one, cut at its 30th token.
            position=np.concatenate([np.arange(self.count), 30 + np.arange(rest), np.zeros(pad)]).astype(np.int32),
        )

    def outputs(self, row: Batch, unroll: int = 4) -> list[np.ndarray]:
        batch = jax.tree.map(lambda x: x[None], row)
        return [np.asarray(x[0]) for x in passes(self.params, self.layer, self.embedding, batch, unroll)]

    def committed(self, pairs: slice) -> tuple[np.ndarray, kv_cache.LayerKV]:
        """The drafter's own way to take in pairs whose features are the target's."""
        count = pairs.stop - pairs.start
        embeddings, features = self.embedding[self.row.next_tokens[pairs]], self.row.features[pairs]
        where = Placement(jnp.asarray(self.row.position[pairs]), jnp.int32(0), Sees(jnp.int32(0), causal(count)))
        cache = kv_cache.empty(self.layer, 256, jnp.float32)[0]
        return extend(self.params, embeddings, features, Pass.of(self.layer, where), cache)


passes = jax.jit(unrolled_passes, static_argnums=(1, 4))


def close(mine, theirs) -> bool:
    """Equal but for the rounding of float32, by the size of the largest entry."""
    return float(np.abs(np.asarray(mine) - np.asarray(theirs)).max()) < 1e-5 * float(np.abs(np.asarray(theirs)).max())


@pytest.fixture(scope="module")
def drafting():
    return Drafting()


def test_the_first_pass_is_the_drafters_own(drafting):
    first = drafting.outputs(drafting.row)[0]
    for pairs in (slice(0, 9), slice(9, 15)):
        assert close(first[pairs], drafting.committed(pairs)[0])


def self_fed(pair: int, committed: int, step: int) -> Placement:
    """Where the pair of a chain's level `step` stands: it sees what is committed, and the levels before it."""
    sees = Sees(jnp.int32(committed), jnp.array([[2**step - 1]], jnp.int32))
    return Placement(jnp.array([pair], jnp.int32), jnp.int32(pair), sees)


def test_further_passes_are_self_fed_steps_through_the_cache(drafting):
    """As `propose` does them: a pair of its own feature behind the committed ones, each seeing those before it."""
    row, outputs = drafting.row, drafting.outputs(drafting.row)
    own, cache = drafting.committed(slice(0, drafting.count))
    for committed in range(1, drafting.count - 2):
        feature, drafted = own[committed - 1], cache
        for step in range(1, 4):
            pair = committed + step - 1
            embedding = drafting.embedding[row.next_tokens[pair : pair + 1]]
            here = Pass.of(drafting.layer, self_fed(pair, committed, step))
            rows, drafted = extend(drafting.params, embedding, feature[None], here, drafted)
            feature = rows[0]
            assert close(outputs[step][pair], feature)


def test_passes_say_the_tokens_that_drafting_does(drafting):
    """The drafter itself drafts a chain; on a row that goes on with that chain, the passes read off the same tokens."""
    _, cache = drafting.committed(slice(0, drafting.count))
    own = drafting.outputs(drafting.row)[0]
    head = DraftHead(drafting.head, jnp.arange(40))
    weights = drafter.EagleWeights(drafting.embedding, head, None, drafting.params)
    propose = jax.jit(drafter.Eagle(drafting.layer).propose, static_argnames="tree")
    for committed in range(1, drafting.count - 2):
        root = jnp.int32(drafting.row.next_tokens[committed - 1])
        feature, shape = own[committed - 1], TreeConfig(4, 3, 1)
        accepted = Accepted(feature[None], root[None], jnp.int32(1))
        turn = Turn(accepted, root, jnp.int32(committed), None)
        tree, _ = propose(weights, shape, feature, turn, BeamMemory(cache))
        assert int(tree.tokens[0]) == int(root)
        chain = np.asarray(tree.tokens[1:])
        next_tokens = drafting.row.next_tokens.copy()
        next_tokens[committed : committed + 3] = chain
        said = drafting.outputs(dataclasses.replace(drafting.row, next_tokens=next_tokens))
        for step in range(3):
            assert int((drafting.head @ said[step][committed - 1 + step]).argmax()) == chain[step]


def test_sequences_of_a_row_do_not_see_one_another(drafting):
    before = drafting.outputs(drafting.row)
    features, tokens = drafting.row.features.copy(), drafting.row.next_tokens.copy()
    features[: drafting.count] += 1
    tokens[: drafting.count] = 0
    after = drafting.outputs(dataclasses.replace(drafting.row, features=features, next_tokens=tokens))
    for s in range(4):  # the first s pairs of a sequence are masked in pass s
        np.testing.assert_array_equal(before[s][drafting.count + s : 15], after[s][drafting.count + s : 15])
        assert not np.allclose(before[s][s : drafting.count], after[s][s : drafting.count])


# The loss ----------------------------------------------------------------------------------------


def log_softmax(x):
    x = x.astype(np.float64) - x.max()
    return x - np.log(np.exp(x).sum())


def counted(row: Batch, s: int) -> list[int]:
    """The pairs that pass s is judged by: of an answer, with s pairs of their own sequence before them."""
    segment = row.segment
    return [
        t
        for t in range(len(segment))
        if row.mask[t] and segment[t] and t >= s and len({int(segment[u]) for u in range(t - s, t + 1)}) == 1
    ]


def test_the_loss_is_the_mean_over_pairs_that_count(drafting):
    recipe = Recipe(unroll=3, ce_weight=0.7, feature_weight=0.2, unroll_decay=0.5)
    row = dataclasses.replace(drafting.row, mask=drafting.row.mask * (drafting.row.segment > 0))
    head = drafting.head[:17]
    batch = jax.tree.map(lambda x: x[None], row)
    total, metrics = loss_terms(drafting.params, drafting.layer, drafting.embedding, head, batch, recipe)
    expected = 0.0
    for s, output in enumerate(drafting.outputs(row, 3)):
        kl, feature, hits = [], [], []
        for t in counted(row, s):
            want, said = log_softmax(np.asarray(head @ row.targets[t])), log_softmax(np.asarray(head @ output[t]))
            kl.append((np.exp(want) * (want - said)).sum())
            distance = np.abs(output[t] - row.targets[t]).astype(np.float64)
            feature.append(np.where(distance < 1, distance**2 / 2, distance - 0.5).mean())
            hits.append(want.argmax() == said.argmax())
        assert len(kl) > 4
        np.testing.assert_allclose(metrics[f"kl_{s}"], np.mean(kl), rtol=1e-4)
        np.testing.assert_allclose(metrics[f"feature_{s}"], np.mean(feature), rtol=1e-4)
        np.testing.assert_allclose(metrics[f"top1_{s}"], np.mean(hits), rtol=1e-4, atol=1e-6)
        expected += 0.5**s * (0.7 * np.mean(kl) + 0.2 * np.mean(feature))
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], total)


def test_agreement_counts_hits_over_the_whole_head(drafting):
    row = dataclasses.replace(drafting.row, mask=drafting.row.mask * (drafting.row.segment > 0))
    batch = jax.tree.map(lambda x: x[None], row)
    found = np.asarray(agreement(drafting.params, drafting.layer, drafting.embedding, drafting.head, batch, 3))
    for s, output in enumerate(drafting.outputs(row, 3)):
        best = {t: int((drafting.head @ row.targets[t]).argmax()) for t in counted(row, s)}
        ranked = {t: np.argsort(-np.asarray(drafting.head @ output[t]))[:3].tolist() for t in best}
        hits = (sum(best[t] == ranked[t][0] for t in best), sum(best[t] in ranked[t] for t in best), len(best))
        assert found[s].tolist() == list(hits)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(steps=30, lr=2e-2, warmup=2, unroll=2, loss_vocab=10, loss_random=6),
        Recipe(steps=30, lr=3e-3, warmup=2, unroll=1, loss_vocab=0, optimizer="adamw", decay="linear", noise=0.1),
    ],
    ids=["muon", "adamw"],
)
def test_training_lowers_the_loss(drafting, recipe):
    batch = jax.tree.map(lambda x: x[None], drafting.row)
    state = new_state(eagle.initial_params(jax.random.key(0), toy.draft(CFG)[0], CFG), recipe)
    losses = []
    for _ in range(recipe.steps):
        state, metrics = train_step(
            state, drafting.layer, recipe, drafting.embedding, drafting.head, jnp.arange(40), seed_words(0), batch
        )
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.3 * losses[0]
    assert int(state.step) == recipe.steps


@pytest.mark.parametrize("changes", [{"noise": 0.5, "loss_vocab": 0}, {"loss_vocab": 10, "loss_random": 6}])
def test_noise_and_random_ids_are_a_function_of_seed_and_step(drafting, changes):
    """At a learning rate of zero they are all that differs from step to step."""
    recipe = Recipe(steps=9, lr=0.0, unroll=1, optimizer="adamw", **changes)
    batch = jax.tree.map(lambda x: x[None], drafting.row)

    def losses(seed: int, first: int, last: int) -> list[float]:
        state, found = new_state(jax.tree.map(jnp.copy, drafting.params), recipe), []
        state = state.replace(step=jnp.int32(first))
        for _ in range(first, last):
            state, metrics = train_step(
                state,
                drafting.layer,
                recipe,
                drafting.embedding,
                drafting.head,
                jnp.arange(40),
                seed_words(seed),
                batch,
            )
            found.append(float(metrics["loss"]))
        return found

    before = losses(0, 0, 4)
    assert len(set(before)) == 4 and losses(0, 2, 4) == before[2:] and not set(losses(1, 0, 4)) & set(before)
