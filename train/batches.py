"""Packed batches: several sequences in each row, an order that is a function of (seed, step) alone.

A resumed run therefore sees exactly the batches that the interrupted one would have seen.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np
from flax import struct
from jax import Array

from train.features import FeatureStore

HELD_OUT = 50  # one sequence in so many is never trained on
ALL = slice(None)


Rows = Array | np.ndarray  # on the device, or still on the host


@struct.dataclass
class Batch:
    """R packed rows of T pairs. Pair t joins the feature of token t with token t + 1."""

    features: Rows  # [R, T, (1 + taps) H] float32, the target's feature of token t
    next_tokens: Rows  # [R, T] int32, token t + 1
    targets: Rows  # [R, T, H] float32, the target's feature of token t + 1
    mask: Rows  # [R, T] float32, 1 where the pair counts: token t + 1 is an answer's, or any (`Packing.prompts`)
    segment: Rows  # [R, T] int32, the number of the sequence within its row, from 1; 0 is padding
    position: Rows  # [R, T] int32, t within its own sequence


Piece = tuple[FeatureStore, int, int, int]  # a store, a sequence in it, first pair, pairs


@dataclasses.dataclass(frozen=True)
class Packing:
    """Sequences of some stores, cut to at most `row` pairs and packed `rows` rows a batch."""

    stores: tuple[FeatureStore, ...]
    rows: int
    row: int
    seed: int
    prompts: bool = False  # whether training counts pairs of prompts too; held-out pairs are those of answers

    def _pieces(self, held_out: bool) -> list[Piece]:
        found = []
        for store in self.stores:
            for index, length in enumerate(store.lengths):
                mine = zlib.crc32(b"%d" % index) % HELD_OUT == 0
                if mine == held_out:
                    pairs = int(length) - 1
                    found += [(store, index, at, min(self.row, pairs - at)) for at in range(0, pairs, self.row)]
        return found

    def _packed(self, pieces: list[Piece]) -> list[list[Piece]]:
        """First fit over the few latest open rows: near full, and the order stays mixed."""
        closed: list[list[Piece]] = []
        opened: list[tuple[int, list[Piece]]] = []  # free pairs, and what stands in the row
        for piece in pieces:
            for index, (free, row) in enumerate(opened):
                if free >= piece[3]:
                    opened[index] = (free - piece[3], [*row, piece])
                    break
            else:
                opened.append((self.row - piece[3], [piece]))
                if len(opened) > 4 * self.rows:
                    closed.append(opened.pop(0)[1])
        return closed + [row for _, row in opened]

    def training(self, first_step: int, share: slice = ALL) -> Iterator[Batch]:
        """Batches without end, from step `first_step` on; of each only the rows `share`."""
        pieces, step, epoch = self._pieces(held_out=False), 0, 0
        while True:
            rng = np.random.default_rng((self.seed % 2**64, epoch))
            packed = self._packed([pieces[i] for i in rng.permutation(len(pieces))])
            order = rng.permutation(len(packed))
            for at in range(0, len(order) - self.rows + 1, self.rows) or [0]:
                if step >= first_step:
                    yield self._batch([packed[i] for i in order[at : at + self.rows]], share, self.prompts)
                step += 1
            epoch += 1

    def held_out(self, batches: int, share: slice = ALL) -> list[Batch]:
        """The first batches of the sequences that are never trained on; of each only the rows `share`."""
        packed = self._packed(self._pieces(held_out=True))
        groups = [packed[at : at + self.rows] for at in range(0, len(packed), self.rows)]
        return [self._batch(group, share) for group in groups[:batches]]

    def held_out_sequences(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """tokens [L] and answer [L] of the sequences that are never trained on, whole."""
        for store, index, first, _ in self._pieces(held_out=True):
            if first == 0:
                yield store.sequence(index)[:2]

    def _batch(self, rows: list[list[Piece]], share: slice, prompts: bool = False) -> Batch:
        width, hidden = self.stores[0].features.shape[1], self.stores[0].hidden
        rows = (rows + [[]] * (self.rows - len(rows)))[share]
        shape = (len(rows), self.row)
        features, targets = (np.zeros((*shape, columns), np.float32) for columns in (width, hidden))
        next_tokens, segment, position = (np.zeros(shape, np.int32) for _ in range(3))
        mask = np.zeros(shape, np.float32)
        for r, pieces in enumerate(rows):
            at = 0
            for number, (store, index, first, pairs) in enumerate(pieces, 1):
                tokens, answer, rows_ = store.sequence(index)
                here, source = slice(at, at + pairs), slice(first, first + pairs)
                after = slice(first + 1, first + 1 + pairs)
                features[r, here], targets[r, here] = rows_[source], rows_[after, :hidden]
                next_tokens[r, here], mask[r, here] = tokens[after], 1 if prompts else answer[after]
                segment[r, here], position[r, here] = number, np.arange(first, first + pairs)
                at += pairs
        return Batch(features, next_tokens, targets, mask, segment, position)

    @property
    def steps_per_epoch(self) -> int:
        """About how many batches one pass over the training sequences makes."""
        pairs = sum(piece[3] for piece in self._pieces(held_out=False))
        return max(1, pairs // (self.rows * self.row))
