"""The part of `frspec doctor` that looks at checkpoint folders: what they hold, and what they lack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from frspec_jax.errors import UserError, quoted
from frspec_jax.finding import BAD, GOOD, NOTE, Finding

if TYPE_CHECKING:
    from frspec_jax.checkpoint import Checkpoint

PLACES = (Path(), Path("checkpoints"))  # where checkpoints are looked for, if none is named


def checkpoints(ckpts: list[Path] | None = None) -> Iterator[Finding]:
    """The checkpoint folders that are named, or those that lie around: what they hold, and what they lack."""
    found = ckpts or sorted({path.parent for place in PLACES for path in place.glob("*/params")})
    if not found:
        yield Finding(
            NOTE,
            "checkpoints",
            "none here or in checkpoints/",
            "make demo brings one; your own: python -m convert hf MODEL --out CKPT",
        )
    for path in found:
        yield from checkpoint(path)


def checkpoint(path: Path) -> Iterator[Finding]:
    """One folder."""
    from frspec_jax.checkpoint import Checkpoint

    try:
        opened = Checkpoint.open(path)
        opened.stop_ids  # noqa: B018 (reads the tokenizer)
    except UserError as error:
        yield Finding(BAD, "checkpoint", error.on_the_command_line)
        return
    config = opened.config
    yield Finding(
        GOOD,
        "checkpoint",
        f"{quoted(path)}: {config.architecture}, {config.num_layers} layers, {config.vocab_size:,} tokens",
    )
    names = opened.draft_names
    if not names:
        yield Finding(
            NOTE,
            "  drafts",
            "none: decoding is plain, but for copying",
            f"python -m train eagle PROMPTS --ckpt {quoted(path)} --own-answers 1000000",
        )
    for name in names:
        yield from draft(opened, name)
    if not (path / "ranking.npz").is_file():
        yield Finding(
            NOTE,
            "  ranking",
            "none: drafts use the whole vocabulary",
            f"python -m train rank CORPUS --ckpt {quoted(path)}",
        )
    else:
        yield ranking(opened)


def draft(opened: Checkpoint, name: str) -> Iterator[Finding]:
    """One draft: whose it is, and whether it was tuned on this device."""
    from frspec_jax import tuned
    from frspec_jax.defaults import defaults

    folder = opened.path / "drafts" / name
    try:
        spec = opened.draft_spec(folder)
        setting = tuned.read(folder, defaults().dtype)
    except UserError as error:
        yield Finding(BAD, "  draft", error.on_the_command_line)
        return
    if setting is None:
        mend = f"python -m eval tune --ckpt {quoted(opened.path)} --draft {name}"
        yield Finding(NOTE, "  draft", f"{name} ({spec.kind}); not tuned on this device, so the defaults hold", mend)
    else:
        tree, vocab = setting.tree, setting.draft_vocab
        shown = f"V' = {vocab:,}, " if vocab else ""
        yield Finding(
            GOOD, "  draft", f"{name} ({spec.kind}); tuned here: {shown}{tree.size} nodes, depth {tree.depth}"
        )


def ranking(opened: Checkpoint) -> Finding:
    """The checkpoint's ranking."""
    from frspec_jax.vocabulary import Ranking, tokenizer_hash

    try:
        found = Ranking.read(opened.path / "ranking.npz", tokenizer_hash(opened.tokenizer), opened.config.vocab_size)
    except UserError as error:
        return Finding(BAD, "  ranking", error.on_the_command_line)
    return Finding(GOOD, "  ranking", f"{found.tokens:,} tokens counted")
