"""`python -m train rank CORPUS... --ckpt CKPT`: count how often each token occurs.

The full ranking, with counts, is written to CKPT/ranking.npz; generation slices it at any V'.
Files may be .txt, .jsonl, .json or .parquet, plain or .gz, .xz, .zst; folders are searched. Texts are
counted without the tokenizer's own start tokens. Of a store that `train answers` has made, the target's own
answers count. --merge takes published token maps too (freq_32768.pt): what one names comes first, in its order, and
counts order the rest, if there are any.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from frspec_jax.commands import results_console
from frspec_jax.errors import UserError, quoted
from frspec_jax.files import check_writable
from frspec_jax.locks import folder_lock, name_lock
from frspec_jax.prompts import ROLES
from train.corpus import NO_EMBEDDING, Tally, corpus_files, read_corpus

# Worker processes import this module, and should not pay for JAX: `run` and `show` import what needs it.
if TYPE_CHECKING:
    from frspec_jax.checkpoint import Checkpoint
    from frspec_jax.vocabulary import Ranking
    from train.features import FeatureStore

BATCH = 1 << 18  # characters that a worker counts at a time; its memory is some hundred bytes a token
SHARES = (16, 8, 4, 2)  # the table shows V' at one in so many of the vocabulary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "corpus",
        nargs="*",
        type=Path,
        metavar="CORPUS",
        help="files or folders of text or conversations, or stores of answers",
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
        "--merge",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="add up these rankings, and what CORPUS gives; "
        "of a token map (ids, most frequent first: .pt, .json, .txt, .npy, .safetensors) the order comes first",
    )
    parser.add_argument(
        "--evaluate", nargs="+", type=Path, metavar="TEXT", help="also print the coverage of text that was not counted"
    )


def run(args: argparse.Namespace) -> None:
    from frspec_jax import token_maps
    from frspec_jax.checkpoint import Checkpoint

    roles = _checked(args)
    checkpoint = Checkpoint.open(args.ckpt)
    out = args.out or args.ckpt / "ranking.npz"
    if token_maps.is_map(out):
        raise UserError(
            f"--out {quoted(out)} would be no token map but a ranking with counts, an .npz file; name one, and write "
            "maps with python -m convert export --draft-vocab N --map FORM"
        )
    if out.exists() and not args.force:
        raise UserError(f"{out} exists already; replace it with --force, or name another file with --out")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist; make it first")
    check_writable(out.parent, f"--out {out}")
    # What stands in a checkpoint is the checkpoint's; elsewhere the file alone is held.
    inside = out.parent.resolve() == args.ckpt.resolve()
    with folder_lock(args.ckpt, f"--ckpt {args.ckpt}") if inside else name_lock(out, f"--out {out}"):
        make(args, checkpoint, out, roles)


def make(args: argparse.Namespace, checkpoint: Checkpoint, out: Path, roles: tuple[str, ...]) -> None:
    """Count what is asked for, and write it to `out`, which nobody else writes meanwhile."""
    from frspec_jax.vocabulary import Ranking, control_ids, tokenizer_hash
    from train.features import FeatureStore, stored_taps

    vocab_size, tokenizer = checkpoint.config.vocab_size, tokenizer_hash(checkpoint.tokenizer)
    rankings = [Ranking.read(path, tokenizer, vocab_size) for path in args.merge or ()]
    stores = {path: taps for path in args.corpus if (taps := stored_taps(path)) is not None}
    files = corpus_files(path for path in args.corpus if path not in stores)
    held_out = corpus_files(args.evaluate or ())
    answers = [answer_counts(FeatureStore(path, checkpoint, taps), vocab_size) for path, taps in stores.items()]

    # What is held out comes first: a mistake in it shows before the long count.
    tally = Tally()
    how = Counting(args.ckpt / "tokenizer.json", vocab_size, roles, args.processes, args.limit_tokens)
    every = count_files([*held_out, *files], how, tally)
    others = list(zip([file.name for file in held_out], every, strict=False))
    for name, counts in others:
        if not counts.any():
            raise UserError(f"--evaluate {name} holds nothing to count: {tally.said()}; give another, or other --roles")
    names = (*(path.resolve().name for path in stores), *(file.name for file in files))
    counted = Ranking(sum([*answers, *every], np.zeros(vocab_size, np.int64)), tokenizer, names)
    ranking = sum(rankings[1:], rankings[0]) if rankings else counted
    if rankings and names:
        ranking = ranking + counted
    if not ranking.tokens and (ranking.listed is None or names):
        raise UserError(f"the corpus holds nothing to count: {tally.said()}; give another, or other --roles")
    ranking.save(out)
    show(ranking, others, control_ids(checkpoint.tokenizer, checkpoint.stop_ids, vocab_size))
    listed = "" if ranking.listed is None else f"an order of {len(ranking.listed):,} ids"
    seen = f"{ranking.tokens:,} tokens, {np.count_nonzero(ranking.counts):,} of {vocab_size:,} ids seen"
    print(f"wrote {out}: {', before '.join(filter(None, (listed, seen if ranking.tokens else '')))}")
    tally.tell()


def answer_counts(store: FeatureStore, vocab_size: int) -> np.ndarray:
    """Occurrences [V] int64 of each token id in a store's answers."""
    return np.bincount(store.tokens[store.answer == 1], minlength=vocab_size)


def _checked(args: argparse.Namespace) -> tuple[str, ...]:
    """The roles asked for; refuses what argparse cannot."""
    if not args.corpus and not args.merge:
        raise UserError("name a CORPUS to count, or rankings to add up with --merge")
    roles = tuple(role.strip() for role in args.roles.split(","))
    if unknown := [role for role in roles if role not in ROLES.values()]:
        raise UserError(f"--roles {unknown[0]}: choose among system, user and assistant")
    for flag, number in (("--limit-tokens", args.limit_tokens), ("--processes", args.processes)):
        if number is not None and number < 1:
            raise UserError(f"{flag} {number} must be at least 1")
    return roles


def show(ranking: Ranking, others: list[tuple[str, np.ndarray]], always: tuple[int, ...]) -> None:
    """Print a table of coverage by V', of the counted text and of others (names and counts [V])."""
    from frspec_jax.vocabulary import sub_vocabulary

    table = Table(title="share of occurrences inside the sub-vocabulary")
    texts = [("counted text", ranking.counts), *others] if ranking.tokens else others
    if not texts:
        return
    for heading in ("V'", "of V", *(name for name, _ in texts)):
        table.add_column(Text(heading), justify="right")
    vocab_size = len(ranking.counts)
    for share in SHARES:
        size = vocab_size // share
        if not len(always) < size <= ranking.reach:
            continue
        ids = sub_vocabulary(ranking, size, vocab_size, always)
        found = (counts[ids].sum() / counts.sum() for _, counts in texts)
        table.add_row(f"{size:,}", f"1/{share}", *(f"{value:.2%}" for value in found))
    results_console().print(table)


# Counting ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counting:
    """How texts are counted."""

    tokenizer: Path  # a tokenizer.json
    vocab_size: int  # V; a text with a token beyond it is left out
    roles: tuple[str, ...]  # the speakers that count
    processes: int | None = None  # workers; None: one a core
    limit: int | None = None  # tokens of each file, or little more


def count_files(files: list[Path], how: Counting, tally: Tally) -> Iterator[np.ndarray]:
    """Occurrences [V] int64 of each token id in each corpus file, one file after the other.

    tally: counts what is left out. A bar on stderr shows bytes read.

    Raises:
      UserError: a file cannot be read.
    """
    if not files:
        return
    processes = how.processes or os.cpu_count() or 1
    # Spawned workers never see the parent's threads (JAX has some), and load only the tokenizer.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _open_tokenizer, (str(how.tokenizer), how.vocab_size))
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.fields[tokens]:>13,} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with pool, Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=sum(file.stat().st_size for file in files), tokens=0)
        start = tokens = 0
        for file in files:
            counts, here = np.zeros(how.vocab_size, np.int64), 0
            progress.update(task, description=file.name)
            for position, found in _in_order(pool, _batches(file, how.roles, tally), 2 * processes):
                why, where = NO_EMBEDDING.format(found.beyond), f"{file.name}, before byte {position}"
                tally.leave_out(why, where, found.left_out)
                counts[found.ids] += found.numbers
                here += int(found.numbers.sum())
                progress.update(task, completed=start + position, tokens=tokens + here)
                if how.limit and here >= how.limit:
                    break
            start, tokens = start + file.stat().st_size, tokens + here
            progress.update(task, completed=start)
            yield counts


def _batches(file: Path, roles: tuple[str, ...], tally: Tally) -> Iterator[tuple[int, list[str]]]:
    """Bytes of the file read so far, and texts of about `BATCH` characters; longer ones are cut at ends of lines."""
    position, size = 0, 0
    batch: list[str] = []

    def read(count: int) -> None:
        nonlocal position
        position = count

    for record in read_corpus(file, read, tally):
        texts = [text for text in record.parts(roles) if text]
        if not texts:
            tally.leave_out(f"they hold no text of the roles {','.join(roles)}", record.where)
        for text in texts:
            for piece in [text] if len(text) <= BATCH else _pieces(text):
                batch.append(piece)
                size += len(piece)
                if size >= BATCH:
                    yield position, batch
                    batch, size = [], 0
    yield position, batch


def _pieces(text: str) -> Iterator[str]:
    lines = io.StringIO(text)
    while piece := lines.readlines(BATCH):
        yield "".join(piece)


def _in_order(pool: Executor, batches: Iterable[tuple[int, list[str]]], ahead: int) -> Iterator[tuple[int, Counted]]:
    """Each batch's position, and what it holds; reads only `ahead` batches ahead, so that memory stays flat."""
    pending: collections.deque[tuple[int, Future[Any]]] = collections.deque()
    try:
        for position, batch in batches:
            pending.append((position, pool.submit(_count, batch)))
            if len(pending) > ahead:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()
    except BrokenProcessPool:
        raise UserError("a worker process died, for want of memory perhaps; try again with fewer --processes") from None


@dataclasses.dataclass(frozen=True)
class Counted:
    """What some texts hold."""

    ids: np.ndarray  # int64, those that occur, ascending
    numbers: np.ndarray  # int64, how often
    left_out: int  # texts with a token beyond the vocabulary
    beyond: str | None  # one of those tokens


_worker: tuple[Any, int] | None = None  # of a worker process: the tokenizer, and V


def _open_tokenizer(path: str, vocab_size: int) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent reports it
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    tokenizer.no_truncation()  # a tokenizer.json can ask for it, meant for training
    tokenizer.no_padding()
    _worker = tokenizer, vocab_size


def _end_with_the_parent() -> None:
    """Wait for the end of the process that started this one, a kill included, and end too: nobody else would."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _count(texts: list[str]) -> Counted:
    """The ids that occur in some texts, and how often."""
    assert _worker is not None, "a worker has opened its tokenizer"
    tokenizer, vocab_size = _worker
    encoded = [np.asarray(e.ids, np.int64) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    kept = [ids for ids in encoded if not ids.size or ids.max() < vocab_size]
    ids, numbers = np.unique(np.concatenate(kept) if kept else np.zeros(0, np.int64), return_counts=True)
    beyond = next((int(ids.max()) for ids in encoded if ids.size and ids.max() >= vocab_size), None)
    token = None if beyond is None else tokenizer.id_to_token(beyond)
    return Counted(ids, numbers, len(encoded) - len(kept), token)
