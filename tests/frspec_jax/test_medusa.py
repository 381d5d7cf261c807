"""Medusa: its tree, its heads against PyTorch, and what its config.json may not say."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frspec_jax import drafters
from frspec_jax.config import TreeConfig
from frspec_jax.drafters.base import NO_MEMORY, Accepted, Target, Turn
from frspec_jax.drafters.medusa import PUBLISHED_63, MedusaConfig, published_choices, residual, skeleton, within
from frspec_jax.errors import UserError
from frspec_jax.tree import DraftTree
from pallas_kernels.visibility import bit_words
from tests.support import toy

# The tree ----------------------------------------------------------------------------------------


def test_the_published_tree_has_its_known_figures():
    """Of Medusa's mc_sim_7b_63: 63 nodes, by depth 10, 28, 23 and 2; at most ten children anywhere."""
    assert len(PUBLISHED_63) == len(set(PUBLISHED_63)) == 63
    depths = [len(path) for path in PUBLISHED_63]
    assert [depths.count(d) for d in (1, 2, 3, 4)] == [10, 28, 23, 2]
    assert max(max(path) for path in PUBLISHED_63) == 9
    assert PUBLISHED_63[:7] == ((0,), (0, 0), (1,), (0, 1), (2,), (0, 0, 0), (1, 0))
    assert max(len(path) for path in published_choices(2)) == 2 and len(published_choices(2)) == 38


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 64), depth=st.integers(1, 6), top_k=st.integers(1, 10))
def test_the_tree_within_bounds_is_a_tree(size, depth, top_k):
    size = min(size, 1 + top_k + (depth - 1) * top_k**2)
    kept = within(PUBLISHED_63, TreeConfig(size, depth, top_k))
    assert 1 <= len(kept) <= size - 1
    assert max(map(len, kept)) <= depth and max(map(max, kept)) < top_k
    parent, levels, ancestors = skeleton(kept)
    assert (parent[1:] < np.arange(1, len(parent))).all()
    assert levels.tolist() == [0, *map(len, kept)]
    visible = np.zeros((len(parent), len(parent)), bool)
    for node, path in enumerate([(), *kept]):
        visible[node] = [path[: len(other)] == other for other in [(), *kept]]
    assert np.array_equal(ancestors, np.asarray(jax.jit(bit_words)(visible)))


def test_fit_asks_for_no_more_nodes_than_there_are():
    spec, _ = toy.medusa(toy.config())
    assert spec.fit(TreeConfig(60, 6, 10)) == TreeConfig(60, 6, 10)
    assert spec.fit(TreeConfig(100, 4, 10)).size == 64
    small = dataclasses.replace(spec, choices=((0,), (1,), (0, 0), (0, 1)))
    assert small.fit(TreeConfig(60, 6, 10)).size == 5
    assert small.fit(TreeConfig(8, 3, 4)).size == 5 and small.fit(TreeConfig(3, 3, 4)).size == 3
    assert small.fit(TreeConfig(4, 3, 1)).size == 3


# The heads, against PyTorch ----------------------------------------------------------------------


def reference(tensors: dict[str, np.ndarray], head: np.ndarray, feature: np.ndarray, layers: int) -> list[np.ndarray]:
    """Each head's logits over the whole vocabulary, from tensors in the published layout."""
    count = 1 + max(int(name.split(".")[0]) for name in tensors)
    found = []
    for i in range(count):
        x = torch.from_numpy(feature)
        for j in range(layers):
            weight, bias = (torch.from_numpy(tensors[f"{i}.{j}.linear.{part}"]) for part in ("weight", "bias"))
            x = x + torch.nn.functional.silu(torch.nn.functional.linear(x, weight, bias))
        rows = tensors.get(f"{i}.{layers}.weight", head)
        found.append(torch.nn.functional.linear(x, torch.from_numpy(rows)).numpy())
    return found


def published(spec: MedusaConfig, params) -> dict[str, np.ndarray]:
    """The weights in the published layout."""
    tensors = {}
    for i, head in enumerate(params.heads):
        for j, block in enumerate(head.blocks):
            tensors |= {f"{i}.{j}.linear.weight": block.weight, f"{i}.{j}.linear.bias": block.bias}
        if head.lm_head is not None:
            tensors[f"{i}.{len(head.blocks)}.weight"] = head.lm_head
    return {name: np.array(array) for name, array in tensors.items()}


@pytest.mark.parametrize(("own", "layers"), [(False, 1), (True, 1), (True, 2)])
def test_logits_equal_pytorch(own, layers):
    cfg = toy.config(vocab_size=200)
    spec, params = toy.medusa(cfg, own=own, layers=layers)
    head = np.array(toy.target(cfg).head)
    feature = np.random.default_rng(5).normal(size=(3, cfg.hidden_size)).astype(np.float32)
    expected = reference(published(spec, params), head, feature, layers)
    for weights, wanted in zip(params.heads, expected, strict=True):
        rows = head if weights.lm_head is None else weights.lm_head
        ours = residual(weights.blocks, jnp.asarray(feature)) @ rows.T
        np.testing.assert_allclose(np.asarray(ours), wanted, atol=1e-4)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("ids", [None, (5, 150, 7, 9, 199, 0, 33, 62, 81, 90, 44, 13, 17)])
def test_proposals_are_the_best_of_each_head(own, ids):
    """Node [a, b] is head 1's b-th best id of the sub-vocabulary, whatever a is."""
    cfg = toy.config(vocab_size=200)
    spec, params = toy.medusa(cfg, own=own)
    kept = np.arange(200) if ids is None else np.array(ids)
    target = toy.target(cfg)
    head = target.head
    drafter, weights = spec.assemble(Target(cfg, target), params, kept, kernels=toy.AUTO)
    features = np.random.default_rng(6).normal(size=(5, cfg.hidden_size)).astype(np.float32)
    accepted = Accepted(jnp.asarray(features), jnp.zeros(5, jnp.int32), jnp.int32(3))
    shape = TreeConfig(64, 4, 10)
    turn = Turn(accepted, jnp.int32(42), jnp.int32(8), None)
    lead, memory = drafter.take_in(weights, turn, NO_MEMORY)
    tree, memory = drafter.propose(weights, shape, lead, turn, memory)
    assert isinstance(tree, DraftTree) and memory is NO_MEMORY
    expected = reference(published(spec, params), np.array(head), features[2:3], 1)
    ranked = [kept[np.argsort(-logits[0][kept], kind="stable")] for logits in expected]
    assert tree.tokens.tolist() == [42, *(ranked[len(path) - 1][path[-1]] for path in PUBLISHED_63)]


def test_own_heads_are_cropped_and_a_shared_one_is_shared():
    cfg = toy.config(vocab_size=200)
    target, ids = Target(cfg, toy.target(cfg)), np.arange(0, 200, 4)
    spec, params = toy.medusa(cfg, own=True)
    _, weights = spec.assemble(target, params, ids, kernels=toy.AUTO)
    assert [rows.weight.shape for rows in weights.lm_heads] == [(50, cfg.hidden_size)] * 4
    spec, params = toy.medusa(cfg, own=False)
    _, weights = spec.assemble(target, params, np.arange(200), kernels=toy.AUTO)
    assert len(weights.lm_heads) == 1 and weights.lm_heads[0].weight is target.params.head


# Configs -----------------------------------------------------------------------------------------


def test_configs_survive_json():
    spec, _ = toy.medusa(toy.config())
    assert drafters.spec_of({"kind": "medusa", "about": {}, **spec.to_json()}, "config.json") == spec


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"choices": [[0], [0, 0], [0]]}, "comes twice"),
        ({"choices": [[0], [1, 0], [1]]}, "before the path that it goes on from"),
        ({"choices": [[1], [0]]}, r"the tree's first path is \[1\]; it must be \[0\]"),
        ({"choices": [[0], [-1]]}, "comes twice, or"),
        ({"choices": [[0], [0, 0], [0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0, 0]]}, "needs 5 heads, and there are 4"),
        ({"choices": []}, "a tree of 0 nodes"),
        ({"choices": [[n] for n in range(300)]}, "a tree of 300 nodes"),
        ({"num_heads": 0}, "0 heads"),
        ({"kind": "hydra"}, "a draft of kind 'hydra' is not known; known are eagle, eagle3, medusa"),
    ],
)
def test_damaged_configs_are_refused(changes, words):
    spec, _ = toy.medusa(toy.config())
    with pytest.raises(UserError, match=words):
        drafters.spec_of({"kind": "medusa", **spec.to_json(), **changes}, "config.json")


def test_a_missing_entry_is_named():
    spec, _ = toy.medusa(toy.config())
    data = spec.to_json()
    del data["own_lm_heads"]
    with pytest.raises(UserError, match=r"config.json is damaged.*own_lm_heads.*; convert the draft again"):
        drafters.spec_of({"kind": "medusa", **data}, "config.json")


def test_the_drafter_is_static():
    """Two of the same make are one compiled program."""
    cfg = toy.config()
    spec, params = toy.medusa(cfg)
    target, ids = Target(cfg, toy.target(cfg)), np.arange(cfg.vocab_size)
    one, other = (spec.assemble(target, params, ids, kernels=toy.AUTO)[0] for _ in range(2))
    assert one == other and hash(one) == hash(other) and dataclasses.is_dataclass(one)
    assert jax.tree.leaves(one.new_memory(256, jnp.float32)) == []
