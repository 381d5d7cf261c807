"""`python -m train copying CORPUS... --ckpt CKPT --draft eagle`: fit how an EAGLE-2 draft copies.

How far the logits of what followed the same tokens earlier should rise (`frspec_jax.drafters.copying`) is four
figures. They are fitted to the likelihood of the target's best token, on answers, in the draft's first self-fed steps,
and written into the draft's config.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from rich.console import Console
from rich.progress import track

from frspec_jax.checkpoint import Checkpoint, amend_draft
from frspec_jax.config import ModelConfig
from frspec_jax.drafters import copying
from frspec_jax.drafters.copying import Copying
from frspec_jax.drafters.eagle import EagleConfig, EagleParams
from frspec_jax.errors import UserError
from frspec_jax.files import check_writable
from frspec_jax.llama import LlamaParams
from frspec_jax.locks import folder_lock
from train.batches import Batch
from train.corpus import Tally
from train.features import FeatureStore, open_corpora
from train.optimiser import head_logits
from train.recipe import unrolled_passes, valid
from train.task import draft_to_fit

STEPS, RATE = 400, 0.03  # of Adam, on the figures' logarithms
PASSES = 3  # self-fed steps that count alike
ROW = 128  # sequences are padded to multiples of it


@struct.dataclass
class Places:
    """What the likelihood of P steps depends on, whatever the figures: the target's best token, and what followed.

    A step is one pair in one pass, so that a pair stands for up to `PASSES` of them.
    """

    best: Array  # [P] float32, the draft's own log-probability of the target's best token
    follows: Array  # [P, MATCHES] int32, as `copying.followers` has them
    longest: Array  # [P, MATCHES] int32
    age: Array  # [P, MATCHES] int32
    said: Array  # [P, MATCHES] float32, the draft's own log-probability of each
    right: Array  # [P, MATCHES] bool, whether it is the target's best token


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "corpus", nargs="+", type=Path, help="feature stores, or text or conversation files and folders"
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder of the target")
    parser.add_argument(
        "--draft", metavar="NAME", help="a draft's name or folder (default: the first that the checkpoint had)"
    )
    parser.add_argument("--sequences", type=int, default=200, metavar="N", help="to fit to, at most (default: 200)")
    parser.add_argument("--row", type=int, default=1024, help="tokens of each, at most (default: 1024)")
    parser.add_argument("--work", type=Path, help="folder for features of texts (default: CKPT/training/copying)")


def run(args: argparse.Namespace) -> None:
    for flag, least in (("sequences", 1), ("row", 2)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} {getattr(args, flag)} must be at least {least}")
    checkpoint = Checkpoint.open(args.ckpt)
    folder, spec, params = draft_to_fit(
        checkpoint, args.draft, EagleConfig, EagleParams, "which does not copy; give an EAGLE-2 one"
    )
    check_writable(folder, f"--draft {folder}")
    with folder_lock(folder, f"--draft {folder}"):
        fit(args, checkpoint, folder, spec, params)


def fit(args: argparse.Namespace, checkpoint: Checkpoint, folder: Path, spec: EagleConfig, params: EagleParams) -> None:
    """Fit how a draft copies to corpora, and write it into its config.json."""
    target = checkpoint.params()
    tally = Tally()
    work = args.work or args.ckpt / "training" / "copying"
    stores = open_corpora(args.corpus, checkpoint, target, work, args.row, tally=tally)
    found = places(spec.layer_of(checkpoint.config), params, target, stores, args.sequences, args.row)
    before = float(loss(spec.copying or Copying(), found))
    figures, after = fitted(found)
    facts = {"steps": len(found.best), "loss": round(after, 4), "loss_without": round(float(-found.best.mean()), 4)}
    amend_draft(folder, dataclasses.replace(spec, copying=figures), {"copying": facts})
    said = ", ".join(f"{name} {value:g}" for name, value in dataclasses.asdict(figures).items())
    print(
        f"wrote how {folder} copies: {said}; over {len(found.best):,} self-fed steps the target's best token has a "
        f"loss of {after:.3f}, with the figures before {before:.3f}, without copying {facts['loss_without']:.3f}"
    )
    tally.tell()


def places(
    layer: ModelConfig, params: EagleParams, target: LlamaParams, stores: list[FeatureStore], sequences: int, row: int
) -> Places:
    """What fits are made of, from the first sequences of each store in turn.

    Raises:
      UserError: there is no answer to look at.
    """

    @jax.jit
    def of_one(
        params: EagleParams, target: LlamaParams, features: Array, tokens: Array, answer: Array
    ) -> tuple[Places, Array]:
        pairs = tokens.shape[0] - 1
        here = jnp.arange(pairs)
        one = jnp.ones((1, pairs), jnp.int32)
        batch = Batch(features[None, :-1], tokens[None, 1:], features[None, 1:], answer[None, 1:], one, here[None])
        best = head_logits(batch.targets, target.head)[0].argmax(-1)
        # Pair t speaks for the token after t + 1; the first token of a text is one that drafting is not told either.
        known = tokens.at[0].set(-1)
        last = jax.vmap(lambda t: copying.recent(known, t + 1))(here)
        found, counts = [], []
        for s, output in enumerate(unrolled_passes(params, layer, target.embedding, batch, PASSES)):
            logs = jax.nn.log_softmax(head_logits(output, target.head)[0], axis=-1)
            follows, longest, age = copying.followers(known, here + 1 - s, last, here + 1)
            said = jnp.take_along_axis(logs, jnp.maximum(follows, 0), axis=-1)
            own = jnp.take_along_axis(logs, best[:, None], axis=-1)[:, 0]
            found.append(Places(own, follows, longest, age, said, follows == best[:, None]))
            counts.append(valid(batch, s)[0] > 0)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *found), jnp.concatenate(counts)

    parts: list[Places] = []
    shown = track(
        with_answers(stores, sequences, row),
        "sequences",
        min(sequences, sum(map(len, stores))),
        console=Console(stderr=True),
    )
    for tokens, answer, features in shown:
        more = -len(tokens) % ROW
        found, counted = of_one(
            params,
            target,
            np.pad(features.astype(np.float32), ((0, more), (0, 0))),
            np.pad(tokens, (0, more)),
            np.pad(answer.astype(np.float32), (0, more)),
        )
        keep = np.asarray(counted)
        parts.append(jax.tree.map(lambda x, keep=keep: np.asarray(x)[keep], found))
    if not sum(len(part.best) for part in parts):
        raise UserError(
            "the corpora hold no answer to fit to; give conversations, or stores of python -m train answers"
        )
    return jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x)), *parts)


def with_answers(
    stores: list[FeatureStore], sequences: int, row: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The first sequences that hold an answer, of each store in turn: tokens [L], answer [L] and features [L, H]."""
    turns = itertools.zip_longest(*([(store, index) for index in range(len(store))] for store in stores))
    every = (store.sequence(index) for turn in turns for store, index in filter(None, turn))
    cut = (tuple(column[:row] for column in sequence) for sequence in every)
    return itertools.islice(((t, a, f) for t, a, f in cut if len(t) > 2 and a[1:].any()), sequences)


def loss(figures: Copying, found: Places) -> Array:
    """Minus the mean log-probability of the target's best token, when a draft copies by these figures."""
    rise = copying.rises(figures, found.follows, copying.weighed(figures, found.longest, found.age))
    # What `copying.raised` does to one token, over the full vocabulary.
    brought = (jnp.exp(found.said) * jnp.expm1(rise)).sum(-1)
    return -(found.best + (rise * found.right).sum(-1) - jnp.log1p(brought)).mean()


def fitted(found: Places) -> tuple[Copying, float]:
    """The figures of least loss, from the defaults on, and that loss."""
    names = [field.name for field in dataclasses.fields(Copying)]
    optimiser = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def of_logs(logs: Array) -> Array:
        figures: dict[str, Any] = dict(zip(names, jnp.exp(logs), strict=True))
        return loss(Copying(**figures), found)

    @jax.jit
    def step(logs: Array, state: optax.OptState) -> tuple[Array, optax.OptState]:
        updates, state = optimiser.update(jax.grad(of_logs)(logs), state)
        return optax.apply_updates(logs, updates), state

    logs = jnp.log(jnp.array([getattr(Copying(), name) for name in names]))
    state = optimiser.init(logs)
    for _ in range(STEPS):
        logs, state = step(logs, state)
    figures = Copying(**{name: float(f"{value:.3g}") for name, value in zip(names, np.exp(logs), strict=True)})
    return figures, float(loss(figures, found))
