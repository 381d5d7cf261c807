"""The sub-vocabulary head as a Pallas kernel for CUDA (Triton): product, log-sum-exp and top-k in one pass.

Each program multiplies a tile of the head's rows with all features, and leaves the tile's k best
scores and its log-sum-exp; another kernel merges the tiles. The logits are never in memory. The vocabulary is
the long side of the product and the few features the short one, as tensor cores like it. Extra rows are
tiles of their own, which a second launch writes behind those of the head.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.dispatch import check_blocks, power_of_two
from pallas_kernels.products import precision_of
from pallas_kernels.subvocab_head.heads import Extra, Head, joined_ids

MASKED = -1e30  # the score of rows past the end of the head: below every real one, above what is taken already


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernel divides its work. block_v: rows of the head a program. block_h: columns a step."""

    block_v: int = 64
    block_h: int = 128
    num_warps: int = 4
    num_stages: int = 4

    def __post_init__(self) -> None:
        check_blocks(self, "block_v", "block_h")

    @classmethod
    def suited_to(cls, hidden: int) -> Config:
        """A config before anything is measured: steps that divide `hidden` where they can."""
        block = next(block for block in (128, 64, 32, 16) if hidden % block == 0 or block == 16)
        return cls(block_h=block)


WHOLE = pl.BlockSpec(memory_space=pl.ANY)
Found = Sequence[Array]  # scores and index [tiles, kept, M], peak and total [tiles, M], of `_tile`


@functools.partial(jax.jit, static_argnames=("k", "config", "interpret"))  # equal layers are lowered once
def subvocab_top_k(
    x: Array, head: Head, k: int, extra: Extra | None, config: Config, interpret: bool
) -> tuple[Array, Array]:
    """`pallas_kernels.subvocab_head.subvocab_top_k`, by the kernels; arguments and result as there."""
    count, size, ids = x.shape[0], head.weight.shape[0], head.ids
    own = -(-size // config.block_v)
    tiles = own if extra is None else own - (-extra.ids.shape[0] // config.block_v)
    scored = functools.partial(_scored, x, k=k, config=config, interpret=interpret, tiles=tiles)
    found = scored(_Rows(head.weight, range(own), scale=head.scale))
    if extra is not None:
        ids = joined_ids(head, extra)
        found = scored(_Rows(extra.weight, range(own, tiles), ids=extra.ids, before=size), found)
    names = [] if ids is None else [ids]
    return pl.pallas_call(
        functools.partial(_merge, k=k, each=min(k, config.block_v)),
        grid=(count,),
        in_specs=[WHOLE] * (4 + len(names)),
        out_specs=[WHOLE] * 2,
        out_shape=[jax.ShapeDtypeStruct((count, k), jnp.float32), jax.ShapeDtypeStruct((count, k), jnp.int32)],
        compiler_params=plt.CompilerParams(num_warps=4 if tiles <= 1024 else 16, num_stages=1),
        interpret=interpret,
        name="subvocab_head_merge",
    )(*found, *names)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of one launch: those of the head, or the extra ones."""

    weight: Array  # [R, H]
    tiles: range  # theirs among all tiles
    scale: Array | None = None  # [R] float32, where the rows are quantised
    ids: Array | None = None  # [R] int32, negative where a row does not count; None: all count
    before: int = 0  # rows of other launches before these


def _scored(x: Array, rows: _Rows, into: Found = (), *, k: int, config: Config, interpret: bool, tiles: int) -> Found:
    """What all `tiles` have found, once those of these rows have run.

    into: what the tiles of other rows have found, which is written to in place.
    """
    columns, kept, first = power_of_two(x.shape[0]), power_of_two(k, least=1), rows.tiles.start
    about = [array for array in (rows.scale, rows.ids) if array is not None]
    per_tile = pl.BlockSpec((None, kept, columns), lambda tile: (tile + first, 0, 0))
    one_row = pl.BlockSpec((None, columns), lambda tile: (tile + first, 0))
    facts = _Facts(k, rows.before, rows.scale is not None, rows.ids is not None)
    return pl.pallas_call(
        functools.partial(_tile, config=config, facts=facts),
        grid=(len(rows.tiles),),
        in_specs=[WHOLE] * (2 + len(about) + len(into)),
        out_specs=[per_tile, per_tile, one_row, one_row],
        out_shape=[
            jax.ShapeDtypeStruct((tiles, kept, columns), jnp.float32),
            jax.ShapeDtypeStruct((tiles, kept, columns), jnp.int32),
            jax.ShapeDtypeStruct((tiles, columns), jnp.float32),
            jax.ShapeDtypeStruct((tiles, columns), jnp.float32),
        ],
        input_output_aliases={2 + len(about) + number: number for number in range(len(into))},
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="subvocab_head" + "_extra" * bool(into),
    )(x, rows.weight, *about, *into)


@dataclasses.dataclass(frozen=True)
class _Facts:
    """What a tile is told: how many to keep, rows of other heads before its own, and which arrays it is given."""

    k: int
    before: int
    scaled: bool
    named: bool


def _merge(scores_ref: Any, index_ref: Any, peak_ref: Any, total_ref: Any, *refs: Any, k: int, each: int) -> None:
    """The k best of one feature's candidates, of which every tile has its own `each` best in order.

    Refs: scores and index [tiles, kept, M], peak and total [tiles, M]; ids [V'] where rows have other names; the
    results [M, k], log-probabilities and ids. It is a merge of sorted lists: the best of the tiles' first ones is
    taken, and its tile's next one moves up. Of equal ones the lower tile's is taken, which is the head's lower row.
    """
    best_ref, row_ref = refs[-2:]
    feature, tiles = pl.program_id(0), scores_ref.shape[0]
    tile = lax.iota(jnp.int32, power_of_two(tiles))
    real, place = tile < tiles, jnp.minimum(tile, tiles - 1)
    column = jnp.full_like(tile, feature)
    first = plt.load(scores_ref.at[place, jnp.zeros_like(tile), column], mask=real, other=-jnp.inf)
    peak = plt.load(peak_ref.at[place, column], mask=real, other=MASKED)
    total = plt.load(total_ref.at[place, column], mask=real, other=0.0)
    top = peak.max(0)
    log_total = top + jnp.log((total * jnp.exp(peak - top)).sum(0))
    slot = lax.iota(jnp.int32, power_of_two(k, least=1))
    best, row = jnp.zeros(slot.shape, jnp.float32), jnp.zeros_like(slot)
    taken = jnp.zeros_like(tile)
    for number in range(k):
        value = first.max(0)
        at = jnp.where(first == value, tile, tiles - 1).min(0)
        here = (tile == at) & real
        rank = jnp.where(here, taken, 0).sum(0, dtype=jnp.int32)
        # Two ways of rounding the same sum must not make a certain token more than certain.
        best = jnp.where(slot == number, jnp.minimum(value - log_total, 0.0), best)
        row = jnp.where(slot == number, plt.load(index_ref.at[at, jnp.minimum(rank, each - 1), feature]), row)
        after = plt.load(scores_ref.at[at, jnp.minimum(rank + 1, each - 1), feature])
        first = jnp.where(here, jnp.where(rank + 1 < each, after, -jnp.inf), first)
        taken += here.astype(jnp.int32)
    line = jnp.full_like(slot, feature)
    if len(refs) == 3:
        row = plt.load(refs[0].at[row], mask=slot < k, other=0)
    plt.store(best_ref.at[line, slot], best, mask=slot < k)
    plt.store(row_ref.at[line, slot], row, mask=slot < k)


def _tile(x_ref: Any, head_ref: Any, *refs: Any, config: Config, facts: _Facts) -> None:
    """One tile of the head against all features.

    Refs: x [M, H]; head [V', H]; scale [V'] where the head is quantised; ids [V'] where some rows may not count; then
    the results, whose columns are padded: scores and index [kept, M], the k first real; peak and total [M], of the
    softmax over the tile.
    """
    k = facts.k
    scores_ref, index_ref, peak_ref, total_ref = refs[-4:]
    (count, hidden), size = x_ref.shape, head_ref.shape[0]
    block_v, block_h, (kept, columns) = config.block_v, config.block_h, scores_ref.shape
    start = pl.program_id(0) * block_v
    row, line = start + lax.iota(jnp.int32, block_v), lax.iota(jnp.int32, columns)
    precision = precision_of(x_ref)
    ragged = size % block_v != 0 or hidden % block_h != 0

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        number, total = carry
        column = number * block_h + lax.iota(jnp.int32, block_h)
        tile = head_ref.at[pl.ds(start, block_v), pl.ds(number * block_h, block_h)]
        real = (row < size)[:, None] & (column < hidden)[None]
        weight = plt.load(tile, mask=real, other=0) if ragged else plt.load(tile)
        inside = (line < count)[:, None] & (column < hidden)[None]
        at = (jnp.broadcast_to(a, inside.shape) for a in (line[:, None], column[None]))
        x = plt.load(x_ref.at[*at], mask=inside, other=0)
        product = lax.dot_general(
            weight.astype(x.dtype),
            x,
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return (number + 1, total + product), None

    begin: tuple[Any, Array] = np.int32(0), jnp.zeros((block_v, columns), jnp.float32)
    # Counted here, in 32 bits: a fori_loop of a known length counts in as many as JAX is set to.
    (_, scores), _ = lax.scan(step, begin, length=-(-hidden // block_h))
    if facts.scaled:
        scale = plt.load(refs[0].at[pl.ds(start, block_v)], mask=row < size, other=0.0)
        scores = scores * scale[:, None]
    counts = row < size
    if facts.named:
        counts = plt.load(refs[int(facts.scaled)].at[pl.ds(start, block_v)], mask=counts, other=-1) >= 0
    scores = jnp.where(counts[:, None], scores, MASKED)
    peak = scores.max(0)
    peak_ref[...] = peak
    total_ref[...] = jnp.exp(scores - peak[None]).sum(0)
    slot = lax.broadcasted_iota(jnp.int32, (kept, columns), 0)
    rows = lax.broadcasted_iota(jnp.int32, (block_v, columns), 0)
    best, index = jnp.full((kept, columns), MASKED, jnp.float32), jnp.zeros((kept, columns), jnp.int32)
    for number in range(min(k, block_v)):
        at = lax.argmax(scores, 0, jnp.int32)  # the lower of equal ones
        best = jnp.where(slot == number, scores.max(0)[None], best)
        index = jnp.where(slot == number, facts.before + start + at[None], index)
        scores = jnp.where(rows == at[None], -jnp.inf, scores)
    scores_ref[...] = best
    index_ref[...] = index
