"""A store of token sequences with the target's features: what a draft is trained on.

    STORE/meta.json      format, target, hidden size, taps if there are any
    STORE/index.i64      a row (source number, end) per sequence; a sequence exists once its row does
    STORE/tokens.i32     token ids, one sequence after the other
    STORE/answer.u8      1 where the token belongs to an answer
    STORE/features.f16   [tokens, (1 + taps) H], as llama.forward returns them

Rows are appended in that order backwards, so that a killed writer leaves whole sequences only, and
the next one goes on behind them. Reading is by memory map.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from frspec_jax import kv_cache, llama
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import ModelConfig
from frspec_jax.errors import UserError
from frspec_jax.files import write_json, writing
from frspec_jax.hosts import first_process
from frspec_jax.llama import LlamaParams
from frspec_jax.locks import folder_lock
from frspec_jax.placement import Placement
from train import devices
from train.conversations import Reader
from train.corpus import Tally, corpus_files, read_corpus

FORMAT = "frspec-jax features 1"
LENGTH = 512  # tokens of a text that are run through the target, or as many as a training row takes if that is more
NUMBERED = 2  # how the sequences of a cache are made of its texts; a cache of another number is made again
Taps = tuple[int, ...]  # layers of the target whose inputs stand beside each feature
_COLUMNS = (("features.f16", np.float16), ("answer.u8", np.uint8), ("tokens.i32", np.int32))


def _meta(checkpoint: Checkpoint, taps: Taps) -> dict[str, object]:
    meta = {"format": FORMAT, "target": checkpoint.fingerprint, "hidden_size": checkpoint.config.hidden_size}
    return meta | ({"taps": list(taps)} if taps else {})


class FeatureWriter:
    """Appends sequences to a store, which it makes, or reopens after an interruption; as a context, it closes it.

    The caller keeps other processes out, with `locks.folder_lock`.

    Raises:
      UserError: the folder is another target's store, or cannot be written.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, taps: Taps = ()) -> None:
        self._folder = folder
        meta = folder / "meta.json"
        if meta.exists():
            FeatureStore(folder, checkpoint, taps)  # refuses another target's store
        with writing(folder, "name another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            if not meta.exists():
                write_json(meta, _meta(checkpoint, taps))
            self._open((1 + len(taps)) * checkpoint.config.hidden_size)

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is not None and not self.sources:  # stopped before there was anything: as if it had never begun
            for name in ("meta.json", "index.i64", *(name for name, _ in _COLUMNS)):
                (self._folder / name).unlink(missing_ok=True)

    def _open(self, width: int) -> None:
        """Open the files behind their last whole sequence; width: columns of a feature."""
        folder = self._folder
        self._index = open(folder / "index.i64", "ab")  # noqa: SIM115 (open as long as the writer)
        whole = self._index.tell() // 16
        self._index.truncate(whole * 16)
        index = np.fromfile(folder / "index.i64", np.int64).reshape(-1, 2)
        self.tokens = int(index[-1, 1]) if whole else 0
        self.sources = {int(source) for source in index[:, 0]}
        self._columns = []
        for name, dtype in _COLUMNS:
            file = open(folder / name, "ab")  # noqa: SIM115
            file.truncate(self.tokens * np.dtype(dtype).itemsize * (width if name == "features.f16" else 1))
            self._columns.append((file, dtype))

    def append(self, source: int, tokens: np.ndarray, answer: np.ndarray, features: np.ndarray) -> None:
        """Add a sequence: tokens [L], answer [L] (0 or 1), features [L, (1 + taps) H] of the same L tokens.

        source: the number of the prompt or record that it came from, so that a resumed run skips it.

        Raises:
          UserError: the disk is full; the sequences before stay, and this one is as if it had never been.
        """
        with writing(self._folder, "name another folder"):
            for (file, dtype), column in zip(self._columns, (features, answer, tokens), strict=True):
                file.write(np.ascontiguousarray(column, dtype).tobytes())
                file.flush()
            self._index.write(np.array([source, self.tokens + len(tokens)], np.int64).tobytes())
            self._index.flush()
        self.tokens += len(tokens)
        self.sources.add(source)

    def close(self) -> None:
        """Let go of the files. All that counts was flushed; what a full disk has refused already stays out."""
        for file in (*(file for file, _ in self._columns), self._index):
            with contextlib.suppress(OSError):
                file.close()


class FeatureStore:
    """A store, opened for reading.

    Raises:
      UserError: the folder is no store, or was made with another target or other taps.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, taps: Taps = ()) -> None:
        try:
            meta = json.loads((folder / "meta.json").read_text())
        except (OSError, ValueError):
            meta = {}
        if meta.get("format") != FORMAT:
            raise UserError(f"{folder} is no feature store; python -m train answers or python -m train eagle makes one")
        if {**meta, "taps": None} != {**_meta(checkpoint, taps), "taps": None}:
            raise UserError(f"{folder} holds the features of another target than {checkpoint.path}; make it again")
        if tuple(meta.get("taps", ())) != taps:
            has, needed = meta.get("taps", []), list(taps)
            raise UserError(f"{folder} holds features with the taps {has}, and {needed} are needed; make it again")
        index = folder / "index.i64"
        rows = index.stat().st_size // 16 if index.exists() else 0
        ends = np.fromfile(index, np.int64, rows * 2).reshape(-1, 2)[:, 1] if rows else np.zeros(0, np.int64)
        self.starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if rows else ends
        self.lengths = ends - self.starts
        total = int(ends[-1]) if rows else 0
        self.hidden = checkpoint.config.hidden_size  # H: the first columns of a feature are the final one
        width = (1 + len(taps)) * self.hidden
        self.features, self.answer, self.tokens = (
            np.memmap(folder / name, dtype, "r", shape=(total, width) if name == "features.f16" else (total,))
            if total
            else np.zeros((0, width) if name == "features.f16" else 0, dtype)
            for name, dtype in _COLUMNS
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens [L], answer [L] and features [L, (1 + taps) H] of one sequence, as views of the memory map."""
        rows = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return self.tokens[rows], self.answer[rows], self.features[rows]

    def text(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """tokens [L] and answer [L] of one sequence."""
        return self.sequence(index)[:2]


def stored_taps(folder: Path) -> Taps | None:
    """The taps of the store in a folder; None where there is no store."""
    meta = folder / "meta.json"
    if not meta.is_file():
        return None
    try:
        return tuple(json.loads(meta.read_text()).get("taps", ()))
    except (OSError, ValueError):
        return ()  # opening the store will say what is wrong


def open_corpora(
    paths: list[Path],
    checkpoint: Checkpoint,
    target: LlamaParams,
    cache: Path,
    row: int,
    taps: Taps = (),
    *,
    tally: Tally,
) -> list[FeatureStore]:
    """The stores among `paths` with these taps, and `cache`: a store of all the rest, made where it is not whole.

    The rest are corpora, whose records are cut to `LENGTH` tokens or to the `row` of training, whichever is more, and
    stores without taps, whose tokens are then run through the target again.

    tally: counts what is left out of the corpora.

    Raises:
      UserError: a path is no store and no corpus, the cache was made of other ones, or cut otherwise, or nothing of the
        corpora can be trained on.
    """
    found = {path: stored_taps(path) for path in paths}
    stores = [FeatureStore(path, checkpoint, taps) for path, has in found.items() if has or has == taps]
    plain = [path for path, has in found.items() if taps and has == ()]
    files = corpus_files(path for path, has in found.items() if has is None)
    if files or plain:
        length = max(LENGTH, row)
        if first_process():  # hosts that see one folder would write over each other
            with folder_lock(cache, f"--work {cache}"):
                _made_of(cache, [*files, *plain], length)
                sequences = texts(files, [FeatureStore(path, checkpoint) for path in plain], checkpoint, tally)
                try:
                    with FeatureWriter(cache, checkpoint, taps) as writer:
                        compute_features(sequences, checkpoint, target, writer, length=length, tally=tally, taps=taps)
                        if not writer.sources:
                            raise UserError(f"the corpora hold nothing to train on: {tally.said()}; give others")
                finally:
                    if not (cache / "meta.json").exists():
                        (cache / "made_of.json").unlink(missing_ok=True)
            tally.tell()
        devices.meet("features")
        stores.append(FeatureStore(cache, checkpoint, taps))
    return stores


def _made_of(cache: Path, sources: list[Path], length: int) -> None:
    """Note in a new cache what it is made of, and refuse an old one of something else: its records go by number."""
    note = {"length": length, "sources": [path.name for path in sources], "sequences": NUMBERED}
    file = cache / "made_of.json"
    if not file.exists():
        write_json(file, note)
    elif json.loads(file.read_text()) != note:
        raise UserError(
            f"{cache} holds the features of other texts, or of texts cut for another --row; "
            "remove it, or name another folder with --work"
        )


Text = tuple[str, np.ndarray, np.ndarray]  # where it stands; tokens [L] int32; [L] uint8: 1 where they are an answer's


def texts(files: list[Path], stores: list[FeatureStore], checkpoint: Checkpoint, tally: Tally) -> Iterator[Text]:
    """The sequences of all records of some corpora, then all of some stores."""
    reader = Reader(checkpoint.tokenizer, checkpoint.config.vocab_size, tally)
    for file in files:
        for record in read_corpus(file, tally=tally):
            yield from ((record.where, *text) for text in reader.sequences(record))
    for store in stores:
        for index in range(len(store)):
            yield (f"sequence {index} of a store", *store.text(index))


def compute_features(
    sequences: Iterable[Text],
    checkpoint: Checkpoint,
    target: LlamaParams,
    writer: FeatureWriter,
    *,
    length: int,
    tally: Tally,
    taps: Taps = (),
) -> None:
    """Run sequences through the target, `length` tokens of each at most, and store what comes out.

    Sequences with no token of an answer among those, or too short for a pair, are counted and left out.
    """
    columns = (
        TextColumn("features: {task.fields[done]:,} sequences, {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None, done=0, tokens=writer.tokens)
        for number, (where, tokens, answer) in enumerate(sequences):
            if len(tokens) < 3:
                tally.leave_out("they have fewer than three tokens", where)
            elif not answer[1:length].any():  # of the first token there is no pair
                tally.leave_out(f"their answers lie behind the first {length} tokens (--row)", where)
            elif number not in writer.sources:
                tokens, answer = tokens[:length], answer[:length]
                padded = np.zeros(-(-len(tokens) // 128) * 128, np.int32)
                padded[: len(tokens)] = tokens
                features = np.asarray(_features(target, checkpoint.config, padded, taps))[: len(tokens)]
                writer.append(number, tokens, answer, features)
            progress.update(task, done=number + 1, tokens=writer.tokens)


@functools.partial(jax.jit, static_argnames=("config", "taps"))
def _features(target: LlamaParams, config: ModelConfig, tokens: jax.Array, taps: Taps) -> jax.Array:
    """The target's features [T, (1 + taps) H] of one text."""
    count = tokens.shape[0]
    cache = kv_cache.empty(config, kv_cache.rounded_capacity(count), target.embedding.dtype)
    return llama.forward(target, config, tokens, Placement.chain(jnp.int32(0), count), cache, taps=taps)[0]
