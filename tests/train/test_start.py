"""Where training starts: units that change no draft, and the linear draft that fits best."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import toy
from tests.support.runs import same
from train.batches import Batch, Packing
from train.features import FeatureStore, FeatureWriter
from train.optimiser import new_state, seed_words
from train.recipe import Recipe, agreement, initial_params, train_step, unrolled_passes
from train.start import ONE, Units, fitted, folded, unfolded

CFG = toy.config(vocab_size=40)
WIDTH = CFG.hidden_size
DRAFT = toy.draft(CFG)[0]
LAYER = DRAFT.layer_of(CFG)
UNITS = Units(feature=4.0, embedding=1 / 32)


def like(width: int) -> SimpleNamespace:
    return SimpleNamespace(path="CKPT", fingerprint="a", config=SimpleNamespace(hidden_size=width))


def test_folding_and_back_changes_no_bit():
    params = toy.draft(dataclasses.replace(CFG, attention_bias=True))[1]
    params = dataclasses.replace(params, fc_bias=jnp.arange(WIDTH) / 7)
    for dtype in (jnp.float32, jnp.bfloat16):
        narrow = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), params)
        assert not same(folded(narrow, UNITS), narrow)
        assert same(unfolded(folded(narrow, UNITS), UNITS), narrow)
    assert same(folded(params, ONE), params)


def test_a_folded_draft_says_in_features_what_its_weights_say_in_units():
    """On a target whose features are 4 times, and whose embeddings are 1 / 32 of, what the weights are made for."""
    rng = np.random.default_rng(3)
    params = dataclasses.replace(toy.draft(CFG)[1], fc_bias=jnp.asarray(rng.normal(size=WIDTH), jnp.float32))
    config = dataclasses.replace(LAYER, rms_norm_eps=0.0)  # the one thing in a draft that has a size of its own
    embedding = jnp.asarray(rng.normal(size=(40, WIDTH)), jnp.float32)
    features = rng.normal(size=(2, 9, WIDTH)).astype(np.float32)
    ids = rng.integers(0, 40, (2, 9), dtype=np.int32)
    place = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    batch = Batch(features, ids, features, np.ones((2, 9), np.float32), np.ones((2, 9), np.int32), place)
    in_units = unrolled_passes(params, config, embedding, batch, 3)
    larger = dataclasses.replace(batch, features=features * UNITS.feature)
    drafted = unrolled_passes(folded(params, UNITS), config, embedding * UNITS.embedding, larger, 3)
    for mine, theirs in zip(drafted, in_units, strict=True):
        np.testing.assert_allclose(mine, theirs * UNITS.feature, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """A store of a target whose next feature is a linear function of the last one and the token; its embedding.

    Its features are of size 6 and its embeddings of size 0.02, as in Qwen2.5-0.5B.
    """
    rng = np.random.default_rng(0)
    embedding = (0.02 * rng.normal(size=(40, WIDTH))).astype(np.float32)
    by_token, by_feature = rng.normal(size=(2, WIDTH, WIDTH)) / WIDTH**0.5
    folder = tmp_path_factory.mktemp("linear") / "store"
    writer = FeatureWriter(folder, like(WIDTH))
    for source in range(120):
        tokens = rng.integers(0, 40, 60, dtype=np.int32)
        features = np.zeros((60, WIDTH))
        features[0] = 6 * rng.normal(size=WIDTH)
        for t in range(1, 60):
            features[t] = 250 * embedding[tokens[t]] @ by_token.T + 0.6 * features[t - 1] @ by_feature.T
        writer.append(source, tokens, (np.arange(60) > 5).astype(np.uint8), features)
    writer.close()
    return Packing((FeatureStore(folder, like(WIDTH)),), rows=4, row=128, seed=0), embedding


def test_units_are_the_sizes_of_what_is_read(linear):
    packing, embedding = linear
    assert Units.measured(packing, embedding) == Units(feature=8.0, embedding=1 / 64)
    assert Units.measured(packing, embedding * 16) == Units(feature=8.0, embedding=1 / 4)


def test_a_batch_of_prompts_alone_has_units_too(tmp_path):
    writer = FeatureWriter(tmp_path / "store", like(WIDTH))
    for source in range(4):
        writer.append(source, np.arange(9, dtype=np.int32), np.zeros(9, np.uint8), np.full((9, WIDTH), 2.0))
    writer.close()
    packing = Packing((FeatureStore(tmp_path / "store", like(WIDTH)),), rows=2, row=16, seed=0)
    assert Units.measured(packing, np.full((40, WIDTH), 0.25, np.float32)) == Units(2.0, 0.25)


@pytest.mark.sweep
def test_the_fit_finds_a_linear_target(linear):
    packing, embedding = linear
    units = Units.measured(packing, embedding)
    start = fitted(initial_params(jax.random.key(0), DRAFT, CFG), packing, embedding, units)
    assert not start.layer.output.any() and not start.layer.down.any() and start.layer.qkv.any()
    batch = packing.held_out(1)[0]
    output = np.asarray(unrolled_passes(folded(start, units), LAYER, jnp.asarray(embedding), batch, 1)[0])
    counted = batch.mask > 0
    error = np.square(output - batch.targets)[counted].mean() / np.square(batch.targets)[counted].mean()
    assert error < 1e-3  # what the ridge holds back
    head = jnp.asarray(np.random.default_rng(1).normal(size=(40, WIDTH)), jnp.float32)
    found = np.asarray(agreement(folded(start, units), LAYER, jnp.asarray(embedding), head, batch, 3))
    assert (found[:, 0] / found[:, 2] > 0.9).all(), "self-fed steps of a linear draft stay near the target"


@pytest.mark.sweep
def test_in_units_a_draft_soon_hears_which_token_came(linear):
    """From random weights, the same steps of Muon: where the embedding is small, only units let it matter."""
    packing, embedding = linear
    recipe = Recipe(steps=60, lr=2e-2, warmup=2, unroll=1, loss_vocab=0, start="random")
    head = jnp.asarray(0.2 * np.random.default_rng(1).normal(size=(40, WIDTH)), jnp.float32)
    measured, held_out = Units.measured(packing, embedding), packing.held_out(1)[0]
    right = {}
    for units in (ONE, measured):
        state = new_state(initial_params(jax.random.key(0), DRAFT, CFG), recipe)
        batches = packing.training(0)
        for _ in range(recipe.steps):
            state, _ = train_step(
                state, LAYER, recipe, jnp.asarray(embedding), head, jnp.arange(40), seed_words(0), next(batches), units
            )
        drafted = folded(state.params["draft"], units)
        hits, _, pairs = np.asarray(agreement(drafted, LAYER, jnp.asarray(embedding), head, held_out, 1))[0]
        right[units] = hits / pairs
    assert right[measured] > 2 * right[ONE], right
