"""Copying: what followed the same tokens before becomes more probable in a draft.

Much of what a model writes stands in its context already: names out of a text that it sums up, lines of code, digits
of a problem. A large draft finds it by attention; a draft of one layer that has seen a few million tokens does not.
It can be looked up: where the last tokens occurred earlier, what stood behind them is a good guess (prompt lookup
decoding). Here it is no guess beside the draft's but part of its distribution, so that the tree's scores
weigh both. A draft may say what it likes: the target alone decides, and the text stays the same.

A drafter holds `Copying` or `NO_COPYING`. Below a root each makes what raises the scores of beams level by level:
`Copies`, or `NoCopies`, which changes nothing.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from frspec_jax.vocabulary import WholeHead
from pallas_kernels.products import einsum_f32, take_rows

LONGEST = 3  # tokens of a match that count: the last one, and up to two before it
MATCHES = 16  # earlier places that a beam looks at: the longest matches, of equally long ones the latest


@dataclasses.dataclass(frozen=True)
class Copying:
    """How much a match weighs. The defaults were chosen on SmolLM2-135M (docs/lab-book.md)."""

    gain: float = 6.0  # what a token's logit rises by, were all weight on places that it follows
    longer: float = 2.0  # log-weight of each further token that a match is long
    reach: float = 200.0  # tokens: a place that lies so much further back weighs 1 / e
    doubt: float = 0.3  # the weight of "none of them"; a match of one token, right here, has 1

    @property
    def reads_text(self) -> bool:
        """Whether it looks at the text so far (`base.Turn.text`)."""
        return True

    def below_root(self, text: Array | None, length: Array, whole: WholeHead | None) -> Copies:
        """What raises the scores of a tree's beams; the root stands at position `length` of the text [S + 1]."""
        assert text is not None and whole is not None
        return Copies(self, whole, text, length, recent(text, length)[None], length[None])


@dataclasses.dataclass(frozen=True)
class NoCopying:
    """A drafter's own scores, as they are."""

    @property
    def reads_text(self) -> bool:
        return False

    def below_root(self, text: Array | None, length: Array, whole: WholeHead | None) -> NoCopies:
        return NoCopies()


NO_COPYING = NoCopying()


@struct.dataclass
class NoCopies:
    """Raises nothing, at any level."""

    def raised(self, rows: Array, scores: Array, tokens: Array) -> tuple[Array, Array]:
        return scores, tokens

    def below(self, tokens: Array, parents: Array) -> NoCopies:
        return self


@struct.dataclass
class Copies:
    """What followed the last tokens of M beams, at one level of a tree in the making."""

    copying: Copying = struct.field(pytree_node=False)
    whole: WholeHead
    text: Array  # [S + 1] int32
    length: Array  # int32 scalar, the root's position
    last: Array  # [M, LONGEST] int32, each beam's last tokens, the latest first
    here: Array  # [M] int32, the positions of the latest

    def raised(self, rows: Array, scores: Array, tokens: Array) -> tuple[Array, Array]:
        """The beams' best tokens [M, K] and their log-probabilities, after what stands in the text has risen.

        rows: [M, H], what the head reads. scores, tokens: [M, K], the draft's own best.
        """
        with jax.named_scope("copy"):
            follows, longest, age = followers(self.text, self.length, self.last, self.here)
            rise = rises(self.copying, follows, weighed(self.copying, longest, age))
            # The best token's score and its logit tell what the logits have to be lowered by.
            asked = jnp.concatenate([tokens[:, :1], jnp.maximum(follows, 0)], axis=-1)
            said = einsum_f32("mh,mch->mc", rows, take_rows(self.whole.weight, asked).astype(rows.dtype))
            said = said[:, 1:] - said[:, :1] + scores[:, :1]
            return raised(scores, tokens, follows, said, self.whole.kept[jnp.maximum(follows, 0)], rise)

    def below(self, tokens: Array, parents: Array) -> Copies:
        """One level further down: beams `tokens` [K], which descend from the beams `parents` [K] of this one."""
        last = jnp.column_stack([tokens, self.last[parents, :-1]])
        return dataclasses.replace(self, last=last, here=jnp.broadcast_to(self.here[0] + 1, tokens.shape))


def recent(tokens: Array, length: Array) -> Array:
    """The last tokens [LONGEST] up to position `length`, the latest first; -2, like no other, where none is known."""
    at = length - jnp.arange(LONGEST, dtype=jnp.int32)
    return jnp.where(at < 1, -2, tokens[jnp.maximum(at, 0)])


def followers(tokens: Array, length: Array, last: Array, here: Array) -> tuple[Array, Array, Array]:
    """What followed earlier occurrences of the last tokens: the `MATCHES` longest matches, the latest first.

    Args:
      tokens: [S + 1] int32, of which positions 0 .. `length` are real. length: int32, a scalar or [K].
      last: [K, LONGEST] int32, the last tokens of each beam, the latest first.
      here: [K] int32, the position of each beam's latest token.

    Returns:
      Tokens, how many tokens long their matches are, and how far back these lie: [K, MATCHES] int32 each. Where there
      is no further match, -1 and a length of 0.
    """
    size, place = tokens.shape[0], jnp.arange(tokens.shape[0], dtype=jnp.int32)
    longest = jnp.zeros((last.shape[0], size), jnp.int32)
    so_far = jnp.broadcast_to(place < jnp.reshape(length, (-1, 1)), longest.shape)
    for back in range(LONGEST):
        before = tokens if back == 0 else jnp.concatenate([jnp.full(back, -1, jnp.int32), tokens[:-back]])
        so_far &= before[None] == last[:, back, None]
        longest += so_far
    # As floats, which hold these numbers exactly: of integers XLA's CPU backend would sort all, 7 ms instead of 0.1.
    best, at = lax.top_k((longest * size + place).astype(jnp.float32), MATCHES)
    found = best.astype(jnp.int32) // size
    follows = jnp.where(found > 0, tokens[jnp.minimum(at + 1, size - 1)], -1)
    return follows, found, here[:, None] - at


def weighed(copying: Copying, longest: Array, age: Array) -> Array:
    """What places weigh, of matches `longest` tokens long (0: none) and `age` tokens back, both [..., MATCHES]."""
    log_weight = copying.longer * (longest - 1) - age / copying.reach
    weight = jnp.exp(jnp.where(longest > 0, log_weight, -jnp.inf))
    return weight / (weight.sum(-1, keepdims=True) + copying.doubt)


def rises(copying: Copying, follows: Array, weight: Array) -> Array:
    """What each follower's logit rises by, [..., MATCHES]: for a token that is there twice, at its first place only."""
    same = (follows[..., :, None] == follows[..., None, :]) & (follows >= 0)[..., None, :]
    first = ~(same & jnp.tril(jnp.ones((MATCHES, MATCHES), bool), -1)).any(-1) & (follows >= 0)
    return jnp.where(first, copying.gain * (same * weight[..., None, :]).sum(-1), 0.0)


def raised(scores: Array, best: Array, follows: Array, said: Array, inside: Array, rise: Array) -> tuple[Array, Array]:
    """The K best tokens after followers have risen, and their log-probabilities, normalised anew.

    Args:
      scores, best: [M, K], log-probabilities and ids of the draft's own best tokens.
      follows: [M, MATCHES] int32, -1 where there is none.
      said: [M, MATCHES], their log-probabilities; of one outside V', its logit lowered by as much as theirs.
      inside: [M, MATCHES] bool, whether the sub-vocabulary holds them.
      rise: [M, MATCHES], of `rises`.
    """
    counts = rise > 0
    among = best[:, :, None] == follows[:, None, :]  # [M, K, MATCHES]
    scores = scores + jnp.where(among, rise[:, None], 0.0).sum(-1)
    added = counts & ~among.any(1)
    wide = jnp.concatenate([scores, jnp.where(added, said + rise, -jnp.inf)], axis=-1)
    ids = jnp.concatenate([best, follows], axis=-1)
    # Of what was one before, followers inside take exp(said) away and bring exp(said + rise).
    brought = jnp.where(counts, jnp.exp(said + rise) - jnp.where(inside, jnp.exp(said), 0.0), 0.0).sum(-1)
    top, index = lax.top_k(wide, best.shape[1])
    # No rounding may make a child likelier than its parent: `tree.rerank` counts on that.
    return jnp.minimum(top - jnp.log1p(brought)[:, None], 0.0), jnp.take_along_axis(ids, index, axis=-1)
