"""Packing: every pair once an epoch, in an order that is a function of seed and step."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.runs import same
from tests.support.stores import tagged_store
from train.batches import Batch, Packing
from train.features import FeatureStore

HELD_OUT = {29, 37, 40, 88, 116}  # of the first 120 sequences: part of the format, for a run must resume


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two stores, the second of which has only one sequence; in both, most fit a row and some do not."""
    folder = tmp_path_factory.mktemp("stores")
    lengths = np.random.default_rng(0).choice([1, 2, 3, 5, 8, 13, 21, 34], 120).tolist()
    return tagged_store(folder / "a", lengths), tagged_store(folder / "b", [19], first_source=500)


def pairs_of(batch: Batch) -> list[tuple[int, int]]:
    """(sequence, token) of every pair in a batch, after checking that each is what its tags say."""
    found = []
    for row, segment in np.ndindex(batch.segment.shape[0], int(batch.segment.max()) + 1):
        here = batch.segment[row] == segment
        if segment == 0:
            assert not batch.mask[row][here].any() and not batch.features[row][here].any()
            continue
        sequence, token, _, _ = batch.features[row][here].T
        assert len(set(sequence)) <= 1, "a segment holds pairs of several sequences"
        assert np.array_equal(token, token[:1].repeat(len(token)) + np.arange(len(token)))
        assert np.array_equal(batch.position[row][here], token)
        after = batch.targets[row][here]
        assert np.array_equal(after[:, 0], sequence) and np.array_equal(after[:, 1], token + 1)
        assert np.array_equal(batch.next_tokens[row][here], after[:, 2])
        assert np.array_equal(batch.mask[row][here], after[:, 3])
        found += list(zip(sequence.astype(int).tolist(), token.astype(int).tolist(), strict=True))
    return found


def all_pairs(stores: tuple[FeatureStore, ...], held_out: bool) -> set[tuple[int, int]]:
    names = [(source, length) for source, length in enumerate(stores[0].lengths)] + [(500, stores[1].lengths[0])]
    return {(s, t) for s, length in names if (s in HELD_OUT) == held_out for t in range(length - 1)}


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), row=st.integers(2, 48), seed=st.integers(0, 2**31 - 1))
def test_every_pair_once_an_epoch(stores, rows, row, seed):
    """Up to a batch that is not full: `rows` - 1 packed rows at most wait for the next epoch."""
    seen: set[tuple[int, int]] = set()
    expected = all_pairs(stores, held_out=False)
    for batch in Packing(stores, rows, row, seed).training(0):
        assert batch.features.shape == (rows, row, 4)
        fresh = pairs_of(batch)
        assert fresh and len(set(fresh)) == len(fresh)
        if seen & set(fresh):
            break
        seen |= set(fresh)
        assert seen <= expected, "a sequence that is held out was trained on"
    assert len(expected - seen) <= (rows - 1) * row


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), row=st.integers(2, 48))
def test_what_is_held_out_comes_whole_and_always_the_same(stores, rows, row):
    batches = Packing(stores, rows, row, seed=1).held_out(10_000)
    found = [pair for batch in batches for pair in pairs_of(batch)]
    assert len(found) == len(set(found)) and set(found) == all_pairs(stores, held_out=True)
    again = Packing(stores, rows, row, seed=2).held_out(1)
    assert same(again[0], batches[0]) and len(again) == 1


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 80), rows=st.integers(1, 5), row=st.sampled_from([8, 48, 400]), seed=st.integers(0, 99))
def test_the_order_is_a_function_of_seed_and_step(stores, first, rows, row, seed):
    packing = Packing(stores, rows, row, seed)
    skipped = itertools.islice(packing.training(0), first, first + 3)
    for resumed, batch in zip(packing.training(first), skipped, strict=False):
        assert same(resumed, batch)


def test_prompts_count_in_training_where_that_is_asked_for_and_never_in_what_is_held_out(stores):
    answers, everything = (Packing(stores, 2, 48, 0, prompts) for prompts in (False, True))
    assert all(same(a, b) for a, b in zip(answers.held_out(9), everything.held_out(9), strict=True))
    for a, b in itertools.islice(zip(answers.training(0), everything.training(0), strict=False), 6):
        assert same(dataclasses.replace(b, mask=a.mask), a) and not np.array_equal(a.mask, b.mask)
        assert np.array_equal(b.mask > 0, b.segment > 0)


def test_epochs_and_seeds_differ(stores):
    epochs = Packing(stores, 1, 64, seed=0)
    count = len({pair for batch in itertools.islice(epochs.training(0), 200) for pair in pairs_of(batch)})
    assert count == len(all_pairs(stores, held_out=False))
    starts = [pairs_of(next(Packing(stores, 1, 64, seed).training(0))) for seed in range(4)]
    first = pairs_of(next(epochs.training(0)))
    later = [pairs_of(batch) for batch in itertools.islice(epochs.training(0), 1, 200)]
    assert starts[0] == first and all(start != first for start in starts[1:]) and first not in later


def test_rows_are_near_full(stores):
    steps = Packing(stores, 2, 64, seed=0).steps_per_epoch
    batches = itertools.islice(Packing(stores, 2, 64, seed=0).training(0), steps)
    assert np.mean([(batch.segment > 0).mean() for batch in batches]) > 0.85
