"""The draft tree against EAGLE-2 in plain Python: what is proposed, what is kept, and which path is accepted."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frspec_jax.config import TreeConfig
from frspec_jax.tree import Beam, DraftTree, accepted_path, rerank, within_blocks
from pallas_kernels.visibility import bit_words, causal

SHAPES = [
    TreeConfig(2, 1, 1),
    TreeConfig(4, 1, 3),  # one level: nothing grows
    TreeConfig(5, 4, 1),  # a chain
    TreeConfig(8, 3, 4),
    TreeConfig(22, 3, 3),  # every candidate is kept
    TreeConfig(40, 4, 5),
    TreeConfig(70, 6, 10),  # ancestors fill three words
]
ROOT = 999


# Growing -----------------------------------------------------------------------------------------


def levels(tree: TreeConfig, seed: int, steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Scores [B, K] and tokens [B, K] of every level: B beams (1 at first) with K children each, best first.

    Scores are multiples of 1/4, so that sums are exact in float32; the fewer `steps`, the more ties.
    """
    rng = np.random.default_rng(seed)
    k, found = tree.top_k, []
    for level in range(tree.depth):
        beams = 1 if level == 0 else k
        scores = -np.sort(rng.integers(0, steps, (beams, k)), axis=1) / 4
        tokens = np.stack([rng.choice(500, k, replace=False) for _ in range(beams)])
        found.append((scores.astype(np.float32), tokens.astype(np.int32)))
    return found


def eagle2(tree: TreeConfig, proposals: list) -> tuple[dict, list, list]:
    """EAGLE-2 (arXiv 2406.16858) as prose has it: expand the K best of each level, keep the N - 1 best of all.

    Returns the kept nodes, the root first, as lists of tokens, parents, depths and ancestor sets; for each
    level the beams that are expanded, as numbers of candidates; and each candidate's parent.
    """
    candidates = [
        {"token": int(t), "score": float(s), "above": None, "depth": 1, "line": ()}
        for s, t in zip(proposals[0][0][0], proposals[0][1][0], strict=True)
    ]
    beams = list(range(tree.top_k))
    expanded = [beams]
    for scores, tokens in proposals[1:]:
        children = []
        for row, beam in enumerate(beams):
            above = candidates[beam]
            for s, t in zip(scores[row], tokens[row], strict=True):
                children.append(len(candidates))
                candidates.append(
                    {
                        "token": int(t),
                        "score": above["score"] + float(s),
                        "above": beam,
                        "depth": above["depth"] + 1,
                        "line": (*above["line"], beam),
                    }
                )
        beams = sorted(children, key=lambda c: (-candidates[c]["score"], c))[: tree.top_k]
        expanded.append(beams)
    assert len(candidates) == tree.candidates
    best = sorted(range(len(candidates)), key=lambda c: (-candidates[c]["score"], c))[: tree.size - 1]
    kept = sorted(best)
    node = {None: 0, **{candidate: n for n, candidate in enumerate(kept, 1)}}
    return (
        {
            "tokens": [ROOT, *(candidates[c]["token"] for c in kept)],
            "parent": [0, *(node[candidates[c]["above"]] for c in kept)],  # KeyError: a kept node's parent is not kept
            "depth": [0, *(candidates[c]["depth"] for c in kept)],
            "ancestors": [{0}, *({0, node[c], *(node[a] for a in candidates[c]["line"])} for c in kept)],
        },
        expanded,
        [candidate["above"] for candidate in candidates],
    )


@functools.partial(jax.jit, static_argnames="tree")
def grown(tree: TreeConfig, proposals) -> tuple[DraftTree, list[Beam], list[jax.Array]]:
    """Our tree from the same proposals, every beam on the way, and which beams they descend from."""
    beam = Beam.start(tree, proposals[0][0][0], proposals[0][1][0])
    beams, descents = [beam], []
    for scores, tokens in proposals[1:]:
        beam, parents = beam.grow(scores, tokens)
        beams.append(beam)
        descents.append(parents)
    return rerank(tree, beam.history, jnp.int32(ROOT)), beams, descents


def bits(words: np.ndarray) -> list[set[int]]:
    """The bits that are set in each row of int32 words."""
    words = np.asarray(words).astype(np.int64) & 0xFFFFFFFF
    return [{32 * w + b for w, word in enumerate(row) for b in range(32) if word >> b & 1} for row in words]


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 6, 40, 1000]))
def test_the_tree_is_eagle_2s(tree, seed, steps):
    proposals = levels(tree, seed, steps)
    expected, expanded, above = eagle2(tree, proposals)
    draft, beams, descents = grown(tree, proposals)
    assert np.asarray(draft.tokens).tolist() == expected["tokens"]
    assert np.asarray(draft.parent).tolist() == expected["parent"]
    assert np.asarray(draft.depth).tolist() == expected["depth"]
    assert draft.ancestors.shape == (tree.size, tree.words) and bits(draft.ancestors) == expected["ancestors"]
    assert {array.dtype for array in jax.tree.leaves(draft)} == {jnp.dtype(jnp.int32)}
    assert [np.asarray(beam.number).tolist() for beam in beams] == expanded
    # The draft's own view: beam i of a level is its tree row `level K + i`, and sees the rows above it.
    row = {number: level * tree.top_k + i for level, line in enumerate(expanded) for i, number in enumerate(line)}
    seen: dict[int, set[int]] = {}
    for level, beam in enumerate(beams):
        for i, number in enumerate(expanded[level]):
            if level:
                assert expanded[level - 1][int(descents[level - 1][i])] == above[number]
            seen[number] = {row[number], *seen.get(above[number], ())}
            if level < tree.depth - 1:  # the last level's beams never run through the draft
                assert bits(beam.visible)[i] == seen[number]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1))
def test_trees_from_real_numbers_are_whole(tree, seed):
    """Invariants that need no reference: parents come first, siblings are distinct, ancestors are the parent's."""
    rng = np.random.default_rng(seed)
    proposals = [
        (np.log(np.sort(rng.dirichlet(np.ones(tree.top_k + 2), len(s)))[:, :1:-1]).astype(np.float32), t)
        for s, t in levels(tree, seed, 9)
    ]
    draft, beams, _ = grown(tree, proposals)
    parent, depth = np.asarray(draft.parent), np.asarray(draft.depth)
    nodes = np.arange(tree.size)
    assert (parent[1:] < nodes[1:]).all() and parent[0] == 0
    assert depth[0] == 0 and (depth[1:] == depth[parent[1:]] + 1).all() and depth.max() <= tree.depth
    siblings = list(zip(parent[1:].tolist(), np.asarray(draft.tokens[1:]).tolist(), strict=True))
    assert len(set(siblings)) == tree.size - 1
    lines = bits(draft.ancestors)
    assert all(lines[n] == lines[parent[n]] | {n} for n in nodes[1:])
    scores = np.asarray(beams[-1].history.scores)
    kept = np.sort(np.argsort(-scores, kind="stable")[: tree.size - 1])
    assert len(scores) == tree.candidates
    assert np.array_equal(draft.tokens[1:], np.asarray(beams[-1].history.tokens)[kept])


# Accepting ---------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="depth")
def accepted(draft, chosen, depth):
    return accepted_path(draft, chosen, depth)


@st.composite
def trees(draw) -> tuple[DraftTree, np.ndarray]:
    """A tree of one of four sizes, whose siblings carry distinct tokens out of few, and the target's choices."""
    size, vocab = draw(st.sampled_from([1, 9, 33, 70])), 80
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    reach = draw(st.sampled_from([1, 3, 70]))  # parents among so many nodes before: long chains, or bushes
    parent = np.array([0, *(rng.integers(max(0, n - reach), n) for n in range(1, size))], np.int32)
    depth, line = np.zeros(size, np.int32), np.eye(size, dtype=bool)
    tokens = rng.permutation(vocab).astype(np.int32)[:size]
    for n in range(1, size):
        depth[n], line[n] = depth[parent[n]] + 1, line[n] | line[parent[n]]
        older = [tokens[m] for m in range(1, n) if parent[m] == parent[n]]
        tokens[n] = rng.choice([t for t in range(vocab) if t not in older])
    chosen = rng.integers(0, vocab, size).astype(np.int32)
    likely = draw(st.sampled_from([0.0, 0.6, 1.0]))
    for n in range(1, size):  # with some luck the target chooses one of a node's children
        if rng.random() < likely:
            chosen[parent[n]] = tokens[n]
    return DraftTree(tokens, parent, depth, jax.jit(bit_words)(line)), chosen


@settings(max_examples=150, deadline=None)
@given(trees())
def test_the_accepted_path_is_the_walk_along_the_targets_choices(case):
    draft, chosen = case
    walk, below = [0], [0]
    while below:
        below = [
            n for n in range(1, len(chosen)) if draft.parent[n] == walk[-1] and draft.tokens[n] == chosen[walk[-1]]
        ]
        assert len(below) <= 1
        walk += below
    path, depth = accepted(draft, chosen, 70)
    assert int(depth) == len(walk) - 1 and path.shape == (71,)
    assert np.asarray(path).tolist() == walk + [0] * (71 - len(walk))


def test_a_right_node_below_a_wrong_one_is_not_accepted():
    draft = DraftTree(*map(jnp.asarray, ([7, 1, 2], [0, 0, 1], [0, 1, 2])), causal(3))
    path, depth = accepted(draft, jnp.array([5, 2, 9]), 2)  # the target says 5 where node 1 says 1
    assert int(depth) == 0 and path.tolist() == [0, 0, 0]
    path, depth = accepted(draft, jnp.array([1, 2, 9]), 2)
    assert int(depth) == 2 and path.tolist() == [0, 1, 2]


# The rest ----------------------------------------------------------------------------------------


def test_the_tree_of_the_root_alone():
    draft = DraftTree.of_root(jnp.int32(5))
    assert [np.asarray(x).tolist() for x in jax.tree.leaves(draft)] == [[5], [0], [0], [[1]]]
    path, depth = accepted(draft, jnp.array([3]), 0)
    assert path.tolist() == [0] and int(depth) == 0


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 70])
def test_causal_words(tokens):
    words = causal(tokens)
    assert words.dtype == jnp.int32 and words.shape == (tokens, -(-tokens // 32))
    assert bits(words) == [set(range(t + 1)) for t in range(tokens)]


def test_within_blocks_keeps_what_stands_in_its_block():
    """Rows of 8: a path whose nodes move from the block that they stand in ends above the first that does."""
    path = jnp.array([0, 2, 5, 9], jnp.int32)

    def kept(start, drafts):
        return int(within_blocks(path, jnp.int32(drafts), jnp.int32(start), 8))

    assert [kept(0, drafts) for drafts in (0, 1, 2, 3)] == [0, 1, 2, 2]  # row 9 would move to row 3
    assert kept(6, 3) == 0  # the first draft is at row 8 and would move to row 7
    assert kept(5, 3) == 1
    assert kept(3, 3) == 1  # row 8 would move to row 5
    assert kept(8, 2) == 2  # rows 8, 10, 13: all in one block
    assert kept(7, 3) == 2  # behind the seam already: rows 9 and 12 to 8 and 9, row 16 to 10
