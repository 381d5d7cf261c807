"""`python -m train rank CORPUS... --ckpt CKPT`: count how often each token occurs.

The full ranking, with counts, is written to CKPT/ranking.npz; generation slices it at any V'.
Files may be .txt, .jsonl, .json or .parquet, plain or .gz, .xz, .zst; folders are searched. Texts are
counted without the tokenizer's own start tokens.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from frspec_jax.checkpoint import Checkpoint
from frspec_jax.errors import UserError
from frspec_jax.vocabulary import Ranking, control_ids, sub_vocabulary, tokenizer_hash
from train.corpus import ROLES, corpus_files, read_corpus

BATCH = 256  # texts that a worker counts at a time
SHARES = (16, 8, 4, 2)  # the table shows V' at one in so many of the vocabulary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "corpus", nargs="*", type=Path, metavar="CORPUS", help="files or folders of text or conversations"
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder, for its tokenizer")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write the ranking (default: CKPT/ranking.npz)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing ranking")
    parser.add_argument(
        "--roles", default="user,assistant", help="speakers of conversations that count (default: user,assistant)"
    )
    parser.add_argument("--limit-tokens", type=int, metavar="N", help="stop after about N tokens of each file")
    parser.add_argument("--processes", type=int, metavar="N", help="worker processes (default: one a core)")
    parser.add_argument(
        "--merge", nargs="+", type=Path, metavar="FILE", help="add up these rankings, and what CORPUS gives"
    )
    parser.add_argument(
        "--evaluate", nargs="+", type=Path, metavar="TEXT", help="also print the coverage of text that was not counted"
    )


def run(args: argparse.Namespace) -> None:
    if not args.corpus and not args.merge:
        raise UserError("name a CORPUS to count, or rankings to add up with --merge")
    roles = tuple(role.strip() for role in args.roles.split(","))
    if unknown := [role for role in roles if role not in ROLES.values()]:
        raise UserError(f"--roles {unknown[0]}: choose among system, user and assistant")
    for flag, number in (("--limit-tokens", args.limit_tokens), ("--processes", args.processes)):
        if number is not None and number < 1:
            raise UserError(f"{flag} {number} must be at least 1")
    checkpoint = Checkpoint.open(args.ckpt)
    out = args.out or args.ckpt / "ranking.npz"
    if out.exists() and not args.force:
        raise UserError(f"{out} exists already; replace it with --force, or name another file with --out")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    counter = Counter(checkpoint, roles, args.processes)
    rankings = [Ranking.load(path) for path in args.merge or ()]
    if args.corpus:
        files = corpus_files(args.corpus)
        counts = sum(counter.count(file, args.limit_tokens) for file in files)
        rankings.append(counter.ranking(np.asarray(counts), [file.name for file in files]))
    ranking = rankings[0]
    for other in rankings[1:]:
        ranking = ranking + other
    ranking.check(counter.hash, counter.vocab_size, (args.merge or [out])[0])
    if not ranking.tokens:
        raise UserError(f"the corpus holds no text of the roles {args.roles}; choose others with --roles")
    others = [(file.name, counter.count(file, args.limit_tokens)) for file in corpus_files(args.evaluate or ())]
    ranking.save(out)
    show(ranking, others, control_ids(checkpoint.tokenizer, checkpoint.stop_ids, counter.vocab_size))
    print(
        f"wrote {out}: {ranking.tokens:,} tokens, "
        f"{np.count_nonzero(ranking.counts):,} of {counter.vocab_size:,} ids seen"
    )


def show(ranking: Ranking, others: list[tuple[str, np.ndarray]], always: tuple[int, ...]) -> None:
    """A table of coverage by V', of the counted text and of others."""
    table = Table(title="share of occurrences inside the sub-vocabulary")
    for heading in ("V'", "of V", "counted text", *(name for name, _ in others)):
        table.add_column(heading, justify="right")
    vocab_size = len(ranking.counts)
    for share in SHARES:
        size = vocab_size // share
        if size <= len(always):
            continue
        ids = sub_vocabulary(ranking, size, vocab_size, always)
        found = [ranking.coverage(ids), *(counts[ids].sum() / max(1, counts.sum()) for _, counts in others)]
        table.add_row(f"{size:,}", f"1/{share}", *(f"{value:.2%}" for value in found))
    Console().print(table)


class Counter:
    """Counts token ids of files, in several processes."""

    def __init__(self, checkpoint: Checkpoint, roles: tuple[str, ...], processes: int | None) -> None:
        self.hash = tokenizer_hash(checkpoint.tokenizer)
        self.vocab_size = checkpoint.config.vocab_size
        self._roles, self._processes = roles, processes or os.cpu_count() or 1
        self._tokenizer = str(checkpoint.path / "tokenizer.json")

    def ranking(self, counts: np.ndarray, names: list[str]) -> Ranking:
        return Ranking(counts, self.hash, tuple(names))

    def count(self, file: Path, limit: int | None = None) -> np.ndarray:
        """Occurrences [V] int64 of each id in one corpus file; `limit` tokens or little more."""
        counts = np.zeros(self.vocab_size, np.int64)
        columns = (
            TextColumn(file.name),
            BarColumn(),
            TextColumn("{task.fields[tokens]:,} tokens"),
            TimeElapsedColumn(),
        )
        # Spawned workers never see the parent's threads (JAX has some), and load only the tokenizer.
        pool = multiprocessing.get_context("spawn").Pool(self._processes, _open_tokenizer, (self._tokenizer,))
        with pool, Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("counting", total=None, tokens=0)
            for ids, numbers in _in_order(pool, _batches(file, self._roles), self._processes):
                if ids.size and ids[-1] >= self.vocab_size:
                    raise UserError(
                        f"{self._tokenizer} gives the id {ids[-1]}, outside the vocabulary of {self.vocab_size}"
                    )
                counts[ids] += numbers
                progress.update(task, tokens=int(counts.sum()))
                if limit and counts.sum() >= limit:
                    break
        return counts


def _batches(file: Path, roles: tuple[str, ...]) -> Iterator[list[str]]:
    texts = (text for record in read_corpus(file) for text in record.parts(roles))
    while batch := list(itertools.islice(texts, BATCH)):
        yield batch


def _in_order(pool: Any, batches: Iterable[list[str]], processes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """`imap` that reads ahead only a few batches, so that a corpus of any size needs little memory."""
    pending: collections.deque[Any] = collections.deque()
    for batch in batches:
        pending.append(pool.apply_async(_count, (batch,)))
        if len(pending) > 2 * processes:
            yield pending.popleft().get()
    while pending:
        yield pending.popleft().get()


_worker_tokenizer: Any = None  # of a worker process


def _open_tokenizer(path: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    from tokenizers import Tokenizer

    _worker_tokenizer = Tokenizer.from_file(path)


def _count(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The ids that occur in some texts, ascending, and how often."""
    encoded = _worker_tokenizer.encode_batch(texts, add_special_tokens=False)
    ids = np.concatenate([np.asarray(e.ids, np.int64) for e in encoded]) if encoded else np.zeros(0, np.int64)
    return np.unique(ids, return_counts=True)
