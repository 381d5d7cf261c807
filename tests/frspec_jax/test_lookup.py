"""What is looked up in a text, against a search in plain Python."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from frspec_jax.lookup import LONGEST, chain

CAPACITY, TOKENS = 40, 7
looked_up = jax.jit(chain, static_argnames="tokens")


def by_hand(text: list[int], tokens: int) -> tuple[list[int], int]:
    """What followed the longest earlier match of the end of `text`, whose first token nobody reads; and its length."""
    best, at = 0, 0
    end = len(text) - 1
    for place in range(1, end):
        match = 0
        while match < LONGEST and place - match >= 1 and text[place - match] == text[end - match]:
            match += 1
        if match and match >= best:
            best, at = match, place
    period = end - at
    return [text[at + 1 + i % period] for i in range(tokens)], best


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=CAPACITY), st.integers(0, 9))
def test_a_chain_is_what_followed_the_longest_match(text, junk):
    rows = np.full(CAPACITY + 1, junk, np.int32)  # what lies behind the text is none of it
    rows[: len(text)] = text
    rows[0] = -1
    found = looked_up(rows, jnp.int32(len(text) - 1), TOKENS)
    expected, match = by_hand(text, TOKENS)
    assert int(found.match) == match
    if match:
        assert np.asarray(found.tokens).tolist() == expected


def test_a_text_of_one_period_goes_on_with_it():
    rows = np.full(CAPACITY + 1, 99, np.int32)
    rows[:7] = [-1, 5, 6, 5, 6, 5, 6]
    found = looked_up(rows, jnp.int32(6), TOKENS)
    assert np.asarray(found.tokens).tolist() == [5, 6, 5, 6, 5, 6, 5] and int(found.match) == 4
