"""Token rankings, and the sub-vocabulary that the draft's head keeps (FR-Spec, arXiv 2502.14856).

A ranking holds the counts of all ids, so that one file serves every size of the sub-vocabulary. A published token map
(`token_maps`) is one too: an order without counts, which serves every size up to its length.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from frspec_jax import files, token_maps
from frspec_jax.errors import UserError, quoted
from pallas_kernels.products import take_rows
from pallas_kernels.subvocab_head import quantised

SPARE = re.compile(r"unused|reserved|placeholder|extra_id", re.IGNORECASE)  # added tokens that no text holds


@struct.dataclass
class DraftHead:
    """The rows of the target's LM head that the draft keeps, and the ids that they stand for."""

    weight: Array  # [V', H]
    ids: Array  # [V'] int32, unique full-vocabulary ids
    scale: Array | None = None  # [V'] float32, what each row is multiplied by where the weight is int8


@struct.dataclass
class WholeHead:
    """The head that a draft's rows were taken from, for what proposes beyond them: copying, and slots."""

    weight: Array  # [R, H]; R is V, or less where the draft has a vocabulary of its own
    kept: Array  # [V] bool, which ids the draft's own head holds
    rows: Array | None = None  # [V] int32, each id's row, -1 where it has none; None: the id itself

    @classmethod
    def of(cls, weight: Array, ids: np.ndarray) -> WholeHead:
        """A head [V, H] of which a draft keeps the rows `ids` [V']."""
        return cls(weight, jnp.asarray(np.isin(np.arange(weight.shape[0]), ids)))

    def lacked(self, ids: Array) -> Array:
        """Which of some ids the draft's own head lacks, and this one has."""
        return ~self.kept[ids] if self.rows is None else ~self.kept[ids] & (self.rows[ids] >= 0)

    def rows_of(self, ids: Array) -> Array:
        """The rows [..., H] of ids [...] that have one; of others, any."""
        return take_rows(self.weight, jnp.maximum(ids if self.rows is None else self.rows[ids], 0))

    def keeping(self, ids: Array) -> WholeHead:
        """The same where the draft's own head holds `ids` [M] besides; negative ones are none."""
        beyond = jnp.where(ids < 0, self.kept.shape[0], ids)
        return dataclasses.replace(self, kept=self.kept.at[beyond].set(True, mode="drop"))


@dataclasses.dataclass(frozen=True, eq=False)
class Ranking:
    """How often each token id occurs in some corpora, by one tokenizer; or an order without counts; or both."""

    counts: np.ndarray  # [V] int64
    tokenizer: str  # `tokenizer_hash` of the tokenizer that counted
    corpora: tuple[str, ...]  # names of the files that were counted, or that said the order
    listed: np.ndarray | None = None  # [M] int32, ids of an order without counts, which come before all others
    ordered: bool = True  # whether the listed ids stand in an order; else counts, if there are any, order them too

    @property
    def tokens(self) -> int:
        """Occurrences counted."""
        return int(self.counts.sum())

    @functools.cached_property
    def order(self) -> np.ndarray:
        """All ids [V] int32, listed ones, then most frequent first; of equal counts the lower id comes first."""
        counted = np.argsort(-self.counts, kind="stable").astype(np.int32)
        if self.listed is None:
            return counted
        return _joined(self.listed if self.ordered else counted[np.isin(counted, self.listed)], counted)

    @property
    def reach(self) -> int:
        """How many ids of `order` stand where they do for a reason: beyond an order without counts all are alike."""
        return len(self.counts) if self.listed is None or self.tokens else len(self.listed)

    def coverage(self, ids: np.ndarray | Iterable[int]) -> float:
        """The share of the counted occurrences that `ids` make up, 0 to 1."""
        return float(self.counts[np.fromiter(ids, np.int64)].sum() / max(1, self.tokens))

    def __add__(self, other: Ranking) -> Ranking:
        """The ranking of both corpora together; of two orders without counts the first is gone on with by the other.

        Raises:
          UserError: another tokenizer counted the other.
        """
        if self.tokenizer != other.tokenizer or len(self.counts) != len(other.counts):
            raise UserError(
                "--merge: the rankings were counted with different tokenizers; count them again with one --ckpt"
            )
        corpora = tuple(dict.fromkeys(self.corpora + other.corpora))
        lists = [ranking.listed for ranking in (self, other) if ranking.listed is not None]
        listed = _joined(*lists) if lists else None
        ordered = any(ranking.ordered for ranking in (self, other) if ranking.listed is not None) or not lists
        return Ranking(self.counts + other.counts, self.tokenizer, corpora, listed, ordered)

    def save(self, path: Path) -> None:
        """Write an .npz file; an interruption leaves the old file, or none."""
        arrays: dict[str, Any] = {
            "counts": self.counts,
            "tokenizer": np.array(self.tokenizer),
            "corpora": np.array(self.corpora, dtype=np.str_),
        }
        if self.listed is not None:
            arrays |= {"listed": self.listed, "ordered": np.array(self.ordered)}
        with files.written_aside(path, f"--out {quoted(path)}", suffix=".npz") as part:
            np.savez_compressed(part, **arrays)

    @classmethod
    def load(cls, path: Path) -> Ranking:
        """Read a ranking.

        Raises:
          UserError: the file is missing, damaged, or no ranking.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                counts, tokenizer = data["counts"], str(data["tokenizer"])
                corpora = tuple(map(str, data["corpora"]))
                listed, ordered = data.get("listed"), bool(data.get("ordered", True))
        except FileNotFoundError:
            raise UserError(f"{quoted(path)} is no file; count a ranking with python -m train rank") from None
        except Exception as error:  # numpy and zipfile raise many kinds for a file that is cut short or of another make
            raise UserError(
                f"{quoted(path)} is no ranking or is damaged ({error}); count it again with python -m train rank"
            ) from None
        if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or counts.min(initial=0) < 0:
            raise UserError(f"{quoted(path)} holds no counts per token id; count it again with python -m train rank")
        if listed is not None and not _orders(listed, len(counts)):
            raise UserError(
                f"{quoted(path)} is damaged (its order names no ids); make it again with python -m train rank --merge"
            )
        listed = None if listed is None else listed.astype(np.int32)
        return cls(counts.astype(np.int64), tokenizer, corpora, listed, ordered)

    @classmethod
    def read(cls, path: Path, tokenizer: str, vocab_size: int) -> Ranking:
        """A ranking or a published token map, for a checkpoint whose tokenizer and vocabulary these are.

        Raises:
          UserError: as `load`, `check` and `token_maps.read_map` do. A map does not say whose tokenizer it is for.
        """
        if token_maps.is_map(path):
            found = token_maps.read_map(path, vocab_size)
            return cls(np.zeros(vocab_size, np.int64), tokenizer, (path.name,), found.ids, found.ordered)
        ranking = cls.load(path)
        ranking.check(tokenizer, vocab_size, path)
        return ranking

    def check(self, tokenizer: str, vocab_size: int, path: Path) -> None:
        """Refuse a ranking of another tokenizer: its ids would name other tokens, and drafts would fail silently.

        Raises:
          UserError: the vocabulary's size, or a token of it, is another than the checkpoint's.
        """
        mend = "count one with python -m train rank CORPUS --ckpt"
        if len(self.counts) != vocab_size:
            raise UserError(
                f"{quoted(path)} was counted with a vocabulary of {len(self.counts):,} ids, "
                f"and the checkpoint's has {vocab_size:,}; {mend}"
            )
        if self.tokenizer != tokenizer:
            raise UserError(f"{quoted(path)} was counted with another tokenizer than the checkpoint's; {mend}")


def _joined(*lists: np.ndarray) -> np.ndarray:
    """All ids of some lists, each where it stands first: int32."""
    ids = np.concatenate(lists)
    return ids[np.sort(np.unique(ids, return_index=True)[1])].astype(np.int32)


def _orders(listed: np.ndarray, vocab_size: int) -> bool:
    """Whether an array is a list of ids of the vocabulary, each once."""
    whole = listed.ndim == 1 and np.issubdtype(listed.dtype, np.integer) and listed.size > 0
    return bool(whole and listed.min() >= 0 and listed.max() < vocab_size and len(np.unique(listed)) == len(listed))


def tokenizer_hash(tokenizer: Any) -> str:
    """A short name of a tokenizer's vocabulary: which token each id stands for."""
    digest = hashlib.sha256()
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{number} {token}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def control_ids(tokenizer: Any, stop_ids: Iterable[int], vocab_size: int) -> tuple[int, ...]:
    """The ids that every sub-vocabulary holds: terminators, and the added tokens that steer a chat.

    Some of these are not marked special (`<think>`, `<tool_call>`): they are added tokens all the same. Of those, ones
    that stand for nothing yet (`<unused12>`) are left out; there can be thousands.
    """
    added = [
        n for n, token in tokenizer.added_tokens_decoder.items() if token.special or not SPARE.search(token.content)
    ]
    return tuple(sorted(n for n in {*added, *tokenizer.all_special_ids, *stop_ids} if 0 <= n < vocab_size))


def sub_vocabulary(
    ranking: Ranking | None, size: int, vocab_size: int, always: Iterable[int], known: np.ndarray | None = None
) -> np.ndarray:
    """The ids [V'] int32 of the `size` most frequent tokens, with every id of `always` inside.

    An id of `always` that is not frequent takes the place of the least frequent others. All ids
    (`size == vocab_size`) come in their own order, and need no ranking.

    Args:
      known: the ids of a draft with a vocabulary of its own (EAGLE-3), in its order: they stand for all
        ids then, and an id of `always` that is not among them cannot be proposed at all.

    Raises:
      UserError: `size` is out of range, larger than a token map is long, or has no room for `always` and one more.
    """
    every = np.arange(vocab_size, dtype=np.int32) if known is None else known.astype(np.int32)
    must = np.intersect1d(np.fromiter(always, np.int64), every)
    if size > len(every):
        whose = "the vocabulary" if known is None else "the draft's own vocabulary"
        raise UserError(f"--draft-vocab {size} is larger than {whose} ({len(every):,} tokens); lower it, or say full")
    if size == len(every):
        return every
    if size <= len(must):
        raise UserError(
            f"--draft-vocab {size} is too small: {len(must)} control tokens are always inside; "
            f"give at least {len(must) + 1}"
        )
    if ranking is None:
        raise ValueError("a sub-vocabulary of less than all ids needs a ranking")
    order = ranking.order if known is None else ranking.order[np.isin(ranking.order, every)]
    reach = reach_of(ranking, every)
    if size > reach:
        what = f"{reach:,} ids" if known is None else f"{reach:,} ids of the draft's own vocabulary"
        raise UserError(
            f"--draft-vocab {size} is larger than the token map {', '.join(ranking.corpora)}, which names {what}; "
            "lower it, or say full"
        )
    if size < reach and not ranking.ordered and not ranking.tokens:
        raise UserError(
            f"--draft-vocab {size} is smaller than the map {', '.join(ranking.corpora)}, which names {reach:,} ids in "
            f"no order; say {reach}, or give it an order: python -m train rank CORPUS --merge MAP"
        )
    chosen = np.isin(order, must)
    others = np.flatnonzero(~chosen)[: size - len(must)]
    chosen[others] = True
    return order[chosen]


def reach_of(ranking: Ranking, every: np.ndarray) -> int:
    """The largest V' below all of `every` that a ranking can choose among these ids."""
    return (
        len(every)
        if ranking.reach == len(ranking.counts)
        else int(np.isin(ranking.order[: ranking.reach], every).sum())
    )


def crop(head: Array, ids: np.ndarray, int8: bool = False) -> DraftHead:
    """The rows `ids` of an LM head [V, H], gathered once; all rows in their own order are shared, not copied.

    int8: round them to int8, each row with its own scale. Only proposals change by that, never the output.
    """
    identity = len(ids) == head.shape[0] and bool((ids == np.arange(len(ids))).all())
    rows = head if identity else head[jnp.asarray(ids)]
    kept = jnp.asarray(ids, jnp.int32)
    if int8:
        weight, scale = quantised(rows)
        return DraftHead(weight, kept, scale)
    return DraftHead(rows, kept)


def maps_of(ids: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """EAGLE-3's pair of maps for a head whose rows stand for `ids` [V'].

    Returns:
      d2t [V'] int64: what has to be added to a row's number to have its id (an offset, not the id).
      t2d [V] bool: which ids have a row.
    """
    t2d = np.zeros(vocab_size, bool)
    t2d[ids] = True
    return np.asarray(ids, np.int64) - np.arange(len(ids)), t2d
