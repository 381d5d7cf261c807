"""A store of token sequences with the target's features: what a draft is trained on.

    STORE/meta.json      format, target, hidden size
    STORE/index.i64      a row (source number, end) per sequence; a sequence exists once its row does
    STORE/tokens.i32     token ids, one sequence after the other
    STORE/answer.u8      1 where the token belongs to an answer
    STORE/features.f16   [tokens, H]

Rows are appended in that order backwards, so that a killed writer leaves whole sequences only, and
the next one goes on behind them. Reading is by memory map.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from frspec_jax import kv_cache, llama
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import ModelConfig
from frspec_jax.errors import UserError
from frspec_jax.llama import LlamaParams
from frspec_jax.tree import causal
from train.corpus import Record, corpus_files, read_corpus

FORMAT = "frspec-jax features 1"
_COLUMNS = (("features.f16", np.float16), ("answer.u8", np.uint8), ("tokens.i32", np.int32))


def _meta(checkpoint: Checkpoint) -> dict[str, object]:
    return {"format": FORMAT, "target": checkpoint.fingerprint, "hidden_size": checkpoint.config.hidden_size}


class FeatureWriter:
    """Appends sequences to a store, which it makes, or reopens after an interruption."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        meta = folder / "meta.json"
        if meta.exists():
            FeatureStore(folder, checkpoint)  # refuses another target's store
        else:
            meta.write_text(json.dumps(_meta(checkpoint), indent=2) + "\n")
        width = checkpoint.config.hidden_size
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
        """Add a sequence: tokens [L], answer [L] (0 or 1), features [L, H] of the same L tokens.

        source: the number of the prompt or record that it came from, so that a resumed run skips it.
        """
        for (file, dtype), column in zip(self._columns, (features, answer, tokens), strict=True):
            file.write(np.ascontiguousarray(column, dtype).tobytes())
            file.flush()
        self.tokens += len(tokens)
        self.sources.add(source)
        self._index.write(np.array([source, self.tokens], np.int64).tobytes())
        self._index.flush()

    def close(self) -> None:
        for file, _ in self._columns:
            file.close()
        self._index.close()


class FeatureStore:
    """A store, opened for reading.

    Raises:
      UserError: the folder is no store, or was made with another target.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        try:
            meta = json.loads((folder / "meta.json").read_text())
        except (OSError, ValueError):
            meta = {}
        if meta.get("format") != FORMAT:
            raise UserError(f"{folder} is no feature store; python -m train answers or python -m train eagle makes one")
        if meta != _meta(checkpoint):
            raise UserError(f"{folder} holds the features of another target than {checkpoint.path}; make it again")
        index = folder / "index.i64"
        rows = index.stat().st_size // 16 if index.exists() else 0
        ends = np.fromfile(index, np.int64, rows * 2).reshape(-1, 2)[:, 1] if rows else np.zeros(0, np.int64)
        self.starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if rows else ends
        self.lengths = ends - self.starts
        total = int(ends[-1]) if rows else 0
        width = checkpoint.config.hidden_size
        self.features, self.answer, self.tokens = (
            np.memmap(folder / name, dtype, "r", shape=(total, width) if name == "features.f16" else (total,))
            if total
            else np.zeros((0, width) if name == "features.f16" else 0, dtype)
            for name, dtype in _COLUMNS
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """tokens [L], answer [L] and features [L, H] of one sequence, as views of the memory map."""
        rows = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return self.tokens[rows], self.answer[rows], self.features[rows]


def open_corpora(paths: list[Path], checkpoint: Checkpoint, target: LlamaParams, cache: Path) -> list[FeatureStore]:
    """The stores among `paths`, and `cache`: a store of the corpora among them, made where it is not whole."""
    stores = [FeatureStore(path, checkpoint) for path in paths if (path / "meta.json").is_file()]
    files = corpus_files(path for path in paths if not (path / "meta.json").is_file())
    if files:
        writer = FeatureWriter(cache, checkpoint)
        try:
            compute_features(files, checkpoint, target, writer)
        finally:
            writer.close()
        stores.append(FeatureStore(cache, checkpoint))
    return stores


def compute_features(
    files: list[Path], checkpoint: Checkpoint, target: LlamaParams, writer: FeatureWriter, length: int = 512
) -> None:
    """Run corpora through the target, `length` tokens of a record at most, and store what comes out."""
    columns = (
        TextColumn("features: {task.fields[records]:,} records, {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None, records=0, tokens=writer.tokens)
        records = (record for file in files for record in read_corpus(file))
        for number, record in enumerate(records):
            if number in writer.sources:
                continue
            tokens, answer = encode(record, checkpoint.tokenizer)
            if len(tokens) >= 3 and answer.any():
                tokens, answer = tokens[:length], answer[:length]
                padded = np.zeros(-(-len(tokens) // 128) * 128, np.int32)
                padded[: len(tokens)] = tokens
                features = np.asarray(_features(target, checkpoint.config, padded))[: len(tokens)]
                writer.append(number, tokens, answer, features)
            progress.update(task, records=number + 1, tokens=writer.tokens)


@functools.partial(jax.jit, static_argnames=("config",))
def _features(target: LlamaParams, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    """The target's features [T, H] of one text."""
    count = tokens.shape[0]
    cache = kv_cache.empty(config, kv_cache.rounded_capacity(count), target.embedding.dtype)
    positions = jnp.arange(count, dtype=jnp.int32)
    return llama.forward(target, config, tokens, positions, cache, jnp.int32(0), causal(count))[0]


def encode(record: Record, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [L] int32 of a record, and [L] uint8: 1 where the token is an answer's (all of a plain text).

    A conversation goes through the chat template; its answers are found as what each assistant turn
    adds to the text before it. Where a template rewrites what it has said before, there is no such
    boundary, and the turns from there on are left out.
    """
    if record.text is not None:
        ids = np.asarray(tokenizer(record.text).input_ids, np.int32)
        return ids, np.ones(len(ids), np.uint8)

    def rendered(turns: int, prompt: bool) -> list[int]:
        messages = [{"role": role, "content": text} for role, text in record.turns[:turns]]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)

    tokens: list[int] = []
    answer: list[int] = []
    for index, (role, _) in enumerate(record.turns):
        if role == "assistant" and index:
            prompt, whole = rendered(index, True), rendered(index + 1, False)
            if prompt[: len(tokens)] != tokens or whole[: len(prompt)] != prompt:
                break
            answer += [0] * (len(prompt) - len(tokens)) + [1] * (len(whole) - len(prompt))
            tokens = whole
    return np.asarray(tokens, np.int32), np.asarray(answer, np.uint8)
