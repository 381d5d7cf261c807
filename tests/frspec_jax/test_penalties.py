"""Penalties and biases, held against a run that counts token by token, and against transformers' own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from frspec_jax.config import Sampling
from frspec_jax.errors import UserError
from frspec_jax.penalties import Bearing, Penalties, adjusted
from frspec_jax.tree import DraftTree
from pallas_kernels.visibility import constant_words

VOCAB = 17


def tree_of(parents: list[int], tokens: list[int]) -> DraftTree:
    """A tree of these nodes; parents[i] is that of node i + 1."""
    size = len(parents) + 1
    sees = np.eye(size, dtype=bool)
    for node, parent in enumerate(parents, 1):
        sees[node] |= sees[parent]
    depth = sees.sum(-1, dtype=np.int32) - 1
    above = jnp.asarray([0, *parents], jnp.int32)
    return DraftTree(jnp.asarray(tokens, jnp.int32), above, jnp.asarray(depth), constant_words(sees))


def one_by_one(logits: np.ndarray, prompt: list[int], answer: list[int], by: Sampling) -> np.ndarray:
    """OpenAI's rule and transformers', for the token after an answer so far: float64 [V]."""
    logits = logits.astype(np.float64).copy()
    for token in {*prompt, *answer}:
        factor = by.repetition_penalty
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(answer):
        logits[token] -= by.frequency_penalty * answer.count(token) + by.presence_penalty
    for token, bias in by.logit_bias:
        logits[token] += bias
    return logits


@given(st.data())
def test_each_node_is_penalised_by_its_own_path(data):
    tokens = st.integers(0, VOCAB - 1)
    prompt = data.draw(st.lists(tokens, min_size=1, max_size=6))
    answer = data.draw(st.lists(tokens, min_size=1, max_size=8))  # the last is the root
    below = data.draw(st.lists(tokens, max_size=6))
    parents = [data.draw(st.integers(0, number)) for number in range(len(below))]
    by = Sampling(
        repetition_penalty=data.draw(st.floats(0.5, 2)),
        presence_penalty=data.draw(st.floats(-2, 2)),
        frequency_penalty=data.draw(st.floats(-2, 2)),
        logit_bias=tuple(data.draw(st.lists(st.tuples(tokens, st.floats(-5, 5)), max_size=3))),
    )
    tree = tree_of(parents, [answer[-1], *below])
    bearing = Bearing.of(by, np.asarray(prompt), VOCAB)
    penalties = Penalties.of(by, jax.tree.map(jnp.asarray, bearing))
    padded = jnp.asarray([*answer, 0, 0], jnp.int32)
    penalties = penalties.after(padded, jnp.int32(len(answer)))
    logits = np.random.default_rng(0).normal(size=(1 + len(below), VOCAB)).astype(np.float32)
    got = np.asarray(adjusted(jnp.asarray(logits), penalties, tree))
    for node in range(1 + len(below)):
        path, at = [], node
        while at:
            path.insert(0, below[at - 1])
            at = parents[at - 1]
        np.testing.assert_allclose(got[node], one_by_one(logits[node], prompt, answer + path, by), atol=1e-4)


@pytest.mark.parametrize("penalty", [0.6, 1.8])
def test_repetition_is_transformers_own(penalty):
    rng, by = np.random.default_rng(1), Sampling(repetition_penalty=penalty)
    prompt, logits = rng.integers(0, VOCAB, 5), rng.normal(size=(1, VOCAB)).astype(np.float32)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(prompt)[None], torch.tensor(logits))
    penalties = Penalties.of(by, jax.tree.map(jnp.asarray, Bearing.of(by, prompt, VOCAB)))
    got = adjusted(jnp.asarray(logits), penalties, DraftTree.of_root(jnp.int32(0)))
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0 must be a positive number; 1 is off"),
        ({"presence_penalty": float("nan")}, "presence_penalty nan must be a finite number; 0 is off"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty inf must be a finite number; 0 is off"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias -1:1.0 must be a token id and a finite number"),
    ],
)
def test_figures_that_mean_nothing_are_refused(wrong, sentence):
    with pytest.raises(UserError, match=sentence):
        Sampling(**wrong)


def test_an_id_beyond_the_vocabulary_is_refused():
    by = Sampling(logit_bias=((VOCAB, 2.0),))
    with pytest.raises(UserError, match=f"logit_bias {VOCAB}:2: the model's token ids are 0 to {VOCAB - 1}"):
        Bearing.of(by, np.arange(3), VOCAB)
