"""Pace: a round drafts and verifies as much as pays, and no more.

A pass over several tokens costs more than one over a single token, on a CPU much more, and a draft that the target does
not follow brings nothing for it. So each round decides, by what tokens are worth:

    verify the N nodes for which   1 + sum of P(node) over the N - 1 likeliest   -   price x verify_ms[N]   is greatest

where P(node) is the chance that the target takes the whole path down to a node, and `price` is what a millisecond is
worth: the tokens that the last rounds emitted in one. A further level is drafted while the child that it may bring is
worth the level's time; and nothing is drafted at all while the last drafts were not worth theirs. Tokens that a lookup
found in the text (`lookup.chain`) are nodes like any other, and cost no drafting.

P is calibrated (`Odds`), and times are measured (`Costs`). Both are arrays, so that another table is no other program.
Neither ever decides what is emitted: the target alone does, and a wrong table only costs time.

Texts of a batch share their rounds, so the sums run over all of them (`together.Together`), and a round of theirs
verifies N nodes of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from frspec_jax.config import TreeConfig
from frspec_jax.lookup import Chain
from frspec_jax.sampling import argument
from frspec_jax.together import ALONE, Together
from frspec_jax.tree import Candidates

GRID = np.array([0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0], np.float32)  # a draft's own probabilities
LIKELY_CHILD = 0.4  # the part of a beam's chance that its children bring, on the average over texts
KEPT = 0.9  # what a round's weight becomes in running means when the next one is done
BELIEVED = 8.0  # rounds as vanilla decodes, that a text is taken to have behind it
TRUST = (0.3, 1.5)  # how far calibrated chances may be scaled by what came of the last ones
PROBE = 16  # rounds after which drafting is tried again, though it did not pay


@dataclasses.dataclass(frozen=True)
class Pace:
    """What is compiled for rounds that differ: the sizes that may be verified, and how far a drafter may go."""

    sizes: tuple[int, ...]  # nodes that a round may verify, the root among them: 1 first, ascending
    growth: TreeConfig  # the drafter's levels, and its beams; of a tree that is its own, the nodes too
    lookup: bool = True  # whether tokens are looked up in the text too
    ends: bool = True  # whether growing may end at any level: a GPU's host would wait for each answer

    def with_beams(self, top_k: int) -> Pace:
        """The same with so many beams a level."""
        return dataclasses.replace(self, growth=TreeConfig(2, self.growth.depth, top_k))


@struct.dataclass
class Costs:
    """Milliseconds; only their ratios matter."""

    verify: Array  # [sizes] float32, of a round that verifies so many nodes and takes in what was accepted before
    draft: Array  # [levels + 1] float32, of drafting so many levels besides; 0 for none

    @classmethod
    def of(cls, verify: list[float], draft: list[float]) -> Costs:
        return cls(argument(verify, np.float32), argument(draft, np.float32))


@struct.dataclass
class Odds:
    """How often the target agrees."""

    beam: Array  # [levels, GRID] float32, with a token to which the draft gives so much, where it agreed above
    chain: Array  # [LONGEST + 1, T] float32, with the t-th token of a chain that begins with so long a match

    @classmethod
    def of(cls, beam: list[list[float]], chain: list[list[float]]) -> Odds:
        return cls(argument(beam, np.float32), argument(chain, np.float32))


@struct.dataclass
class PaceTables:
    """What decisions are made by."""

    costs: Costs
    odds: Odds


DRAFTED, COPIED = 0, 1  # in the arrays of `Pulse`


@struct.dataclass
class Trust:
    """What became of the drafts in a text: running sums, in which each further round counts `KEPT` times less."""

    promised: Array  # [2] float32, nodes that should have been accepted: drafted, and copied ones
    came: Array  # [2] float32, that were

    @classmethod
    def unproven(cls) -> Trust:
        """Before the first round."""
        return cls(jnp.zeros(2), jnp.zeros(2))

    @property
    def scale(self) -> Array:
        """[2]: what calibrated chances are scaled by, in this text."""
        return jnp.clip((self.came + 4.0) / (self.promised + 4.0), *TRUST)

    def after(self, promised: Array, came: Array) -> Trust:
        """With one round more; both [2], drafted and copied: drafts that should have been accepted, and that were."""
        return Trust(KEPT * self.promised + promised, KEPT * self.came + came)


@struct.dataclass
class Pulse:
    """How the last rounds went, of a text or of several together: running sums and means as those of `Trust`."""

    tokens: Array  # float32, emitted
    milliseconds: Array  # float32, that they should have cost
    believed: Array  # float32, what is left of the rounds that are taken to have been before
    gain: Array  # float32, running mean: tokens that drafting was worth, for each not looked up already
    idle: Array  # int32, rounds since something was drafted
    levels: Array  # int32, that the last round drafted
    size: Array  # int32, index of the size that it verified

    @classmethod
    def still(cls) -> Pulse:
        """Before the first round."""
        zero = jnp.zeros((), jnp.float32)
        return cls(zero, zero, zero + BELIEVED, zero + 0.3, *[jnp.int32(0)] * 3)

    def price(self, costs: Costs, texts: Array | float = 1.0) -> Array:
        """Tokens that a millisecond is worth: at least what vanilla decoding of so many texts makes of it."""
        vanilla = texts / costs.verify[0]
        lately = (self.tokens + self.believed * texts) / (self.milliseconds + self.believed * costs.verify[0])
        return jnp.maximum(vanilla, lately)


C = TypeVar("C")


def when(pays: Array, run: Callable[[C], C], carry: C) -> C:
    """`run(carry)`, or the carry as it is.

    A loop of one turn or none: XLA updates in place what a loop carries, and copies what a branch gives back, which
    here is every cache.
    """
    return lax.while_loop(lambda at: at[0], lambda at: (jnp.bool_(False), run(at[1])), (pays, carry))[1]


@dataclasses.dataclass(frozen=True)
class Growing:
    """How far a drafter goes on in a round (`tree.Going`)."""

    pace: Pace
    tables: PaceTables
    price: Array
    trust: Array  # float32, of drafted nodes
    together: Together = ALONE

    def likely(self, scores: Array, level: int) -> Array:
        chance = interpolated(jnp.exp(scores), self.tables.odds.beam[level])
        return jnp.log(jnp.clip(chance * (self.trust if level == 0 else 1.0), 1e-9, 1.0))

    def on(self, level: int, scores: Array, deeper: Callable[[C], C], ended: C) -> C:
        if not self.pace.ends:
            return deeper(ended)
        draft = self.tables.costs.draft
        pays = self.together.total(jnp.exp(scores[0])) * LIKELY_CHILD > self.price * (draft[level + 1] - draft[level])
        return when(pays, deeper, ended)


def interpolated(said: Array, table: Array) -> Array:
    """The table [GRID] read at probabilities `said` [...], straight from point to point of `GRID`.

    As a sum of ramps: `jnp.interp` would search for the points in a loop.
    """
    width = GRID[1:] - GRID[:-1]
    way = jnp.clip((said[..., None] - GRID[:-1]) / width, 0.0, 1.0)  # [..., GRID - 1], along each piece
    return table[0] + (way * (table[1:] - table[:-1])).sum(-1)


def copied(odds: Odds, chain: Chain, trust: Array) -> Array:
    """The chance of each token of a chain, with all before it: log-probabilities [T]."""
    chance = jnp.clip(odds.chain[chain.match], 0.0, 1.0)
    chance = chance.at[0].multiply(trust)
    return jnp.cumsum(jnp.log(jnp.clip(chance, 1e-9, 1.0)))


def joined(drafted: Candidates, levels: tuple[int, ...], tokens: Array, scores: Array) -> Candidates:
    """Drafted candidates, and a chain of tokens [T] from the root after them; where both agree a node stands once.

    levels: how many of the drafted ones stand at each depth, in the order in which they are numbered.
    """
    on_chain, agreed = jnp.zeros(0, bool), jnp.int32(0)  # of the candidates so far; how far down both go together
    last = jnp.int32(-1)  # the candidate where they part
    first = 0
    raised = drafted.scores
    for depth, count in enumerate(levels[: len(tokens)]):
        here = slice(first, first + count)
        parent = drafted.parent[here]
        below = (parent < 0) if depth == 0 else on_chain[jnp.maximum(parent, 0)] & (parent >= 0)
        same = below & (drafted.tokens[here] == tokens[depth]) & (drafted.scores[here] > -jnp.inf)
        raised = raised.at[here].max(jnp.where(same, scores[depth], -jnp.inf))
        last = jnp.where(same.any(), first + jnp.argmax(same).astype(jnp.int32), last)
        agreed = agreed + same.any()
        on_chain = jnp.concatenate([on_chain, same])
        first += count
    place = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    rest = jnp.where(place >= agreed, scores, -jnp.inf)
    parent = jnp.where(place == agreed, last, drafted.count + place - 1)
    return dataclasses.replace(drafted, scores=raised).with_more(tokens, rest, parent)


@struct.dataclass
class Choice:
    """How many nodes a round verifies."""

    index: Array  # int32, of `Pace.sizes`
    tokens: Array  # float32, expected to be emitted, by all texts
    worth: Array  # float32, the tokens less what their verification costs


def best_size(pace: Pace, costs: Costs, price: Array, scores: Array, together: Together = ALONE) -> Choice:
    """The size that pays most; scores: [M], log-probabilities of paths, the best first."""
    expected = jnp.concatenate([jnp.ones(1), 1 + jnp.cumsum(jnp.exp(scores))])
    expected = together.total(expected[jnp.minimum(np.array(pace.sizes) - 1, scores.shape[0])])  # [sizes]
    worth = expected - price * costs.verify
    index = jnp.argmax(worth).astype(jnp.int32)
    return Choice(index, expected[index], worth[index])


def drafting_pays(costs: Costs, price: Array, pulse: Pulse, unknown: Array) -> Array:
    """Whether to draft at all; unknown: the chance that the next token is not the one that was found in the text.

    In a batch, the sum of these chances.
    """
    return (pulse.gain * unknown > price * costs.draft[1]) | (pulse.idle >= PROBE)


def gained(costs: Costs, price: Array, levels: Array, before: Choice, choice: Choice, unknown: Array) -> Array:
    """Tokens that drafting was worth but for its first level, which it has to beat, for each that was unknown."""
    further = costs.draft[levels] - costs.draft[1]
    return (choice.worth - price * further - before.worth) / jnp.maximum(unknown, 0.05)


def promised(pace: Pace, choice: Choice, likely: Array, copied: Array) -> Array:
    """How many drafts should be accepted, [2]: drafted and copied ones, of those that are verified.

    likely: [N-1] log-probabilities of the nodes below the root. copied: [N] bool.
    """
    inside = jnp.arange(1, copied.shape[0]) < jnp.array(pace.sizes)[choice.index]
    chances = jnp.where(inside, jnp.exp(likely), 0.0)
    return jnp.stack([jnp.where(copied[1:], 0.0, chances).sum(), jnp.where(copied[1:], chances, 0.0).sum()])


def came(copied: Array, path: Array, drafts: Array) -> Array:
    """How many were accepted, [2] int32: drafted and copied ones. path: [D+1] nodes, of which 1 .. `drafts` count."""
    step = jnp.arange(path.shape[0])
    on_path = (step >= 1) & (step <= drafts)
    many = (on_path & copied[path]).sum(dtype=jnp.int32)
    return jnp.stack([drafts - many, many])


@struct.dataclass
class Facts:
    """What a round did."""

    levels: Array  # int32, drafted
    size: Array  # int32, index of `Pace.sizes`
    gain: Array  # float32, tokens that drafting was worth, for each not looked up; read where something was drafted
    emitted: Array  # int32


def after(pulse: Pulse, costs: Costs, facts: Facts) -> Pulse:
    """The running means with one round more."""
    drafted = facts.levels > 0
    return Pulse(
        tokens=KEPT * pulse.tokens + facts.emitted,
        milliseconds=KEPT * pulse.milliseconds + costs.draft[facts.levels] + costs.verify[facts.size],
        believed=KEPT * pulse.believed,
        gain=jnp.where(drafted, KEPT * pulse.gain + (1 - KEPT) * facts.gain, pulse.gain),
        idle=jnp.where(drafted, 0, pulse.idle + 1),
        levels=facts.levels,
        size=facts.size,
    )
