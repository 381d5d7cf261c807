"""What part 2 works on: how much of everything, the model as a checkpoint, and prompts."""

from __future__ import annotations

import dataclasses
import json
import lzma
from pathlib import Path

from benchmarks.gpu_check import layout
from benchmarks.gpu_check.runner import Session
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import TreeConfig


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How much of everything."""

    batches: tuple[tuple[int, int], ...]  # prompt tokens at most, and sequences side by side
    new_tokens: int  # of an answer at most
    steps: int  # tokens between two looks at the host
    answer_share: float  # of the step's time, for decoding
    rows: int  # of a training batch
    row: int  # pairs
    loss_vocab: int
    loss_random: int
    timed_steps: int  # from which the number of steps that fit is told
    most_steps: int
    evaluations: int
    draft_vocab: int
    tree: TreeConfig
    questions: int
    answer_tokens: int  # of the real model's answers to them


REAL = Amounts(
    ((128, 512), (288, 256)), 224, 32, 0.8, 16, 512, 12_288, 4096, 40, 10**6, 10, 12_288, TreeConfig(60, 6, 10), 10, 96
)
DRY = Amounts(((64, 4),), 32, 16, 0.5, 2, 64, 64, 16, 2, 4, 1, 128, TreeConfig(3, 1, 2), 2, 8)


def amounts_of(session: Session) -> Amounts:
    return DRY if session.dry else REAL


def checkpoint_of(session: Session) -> Checkpoint:
    return Checkpoint.open(session.work / "ckpt")


def model(session: Session) -> None:
    """Convert the model."""
    from convert.__main__ import main

    layout.use_wheels(session.archive)
    file = session.work / "model.gguf"
    if session.dry:
        from benchmarks.gpu_check.tiny import write_gguf

        write_gguf(file)
    else:
        file = layout.joined_model(session.archive, Path(__file__).parents[2], file)
    main(["gguf", str(file), "--out", str(session.work / "ckpt")])
    session.tell("parameters", {"layers": checkpoint_of(session).config.num_layers, "file_bytes": file.stat().st_size})


def prompts(session: Session) -> list[str]:
    """What the model is to answer, none of it out of a question set."""
    file = session.archive / layout.PROMPTS
    if session.dry:
        return [f"Say {word} {count} times." for count in range(20) for word in ("yes", "no", "tea", "sun")]
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; make gpu-archive gathers it")
    with lzma.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]
