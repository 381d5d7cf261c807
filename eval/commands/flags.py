"""Flags that several evaluations share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eval.methods.side_by_side import methods, varied
from eval.runs import output
from frspec_jax import compile_cache
from frspec_jax.api import Draft, Generator, Request
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import TreeConfig
from frspec_jax.drafting import preferred_tree, vocab_of
from frspec_jax.errors import UserError
from frspec_jax.flags import add_dtype_flag, add_tree_flags, tree_of
from frspec_jax.vocabulary import Ranking, tokenizer_hash

COPYING = {None: (None,), "off": (False,), "on": (True,), "both": (False, True)}
PACES: dict[str, tuple[Literal["fixed", "auto"], ...]] = {
    "fixed": ("fixed",),
    "auto": ("auto",),
    "both": ("fixed", "auto"),
}


def add_model_arguments(
    parser: argparse.ArgumentParser, vocabularies: str, dtype: str | None = None, pace: str = "fixed"
) -> None:
    """The flags of a checkpoint, its drafts and their trees.

    Args:
      vocabularies, pace: the defaults. dtype: the default; None is what suits the device.
    """
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder")
    parser.add_argument(
        "--draft",
        metavar="NAME,...",
        help="names or folders of drafts to measure (default: the first that the checkpoint had)",
    )
    parser.add_argument(
        "--draft-vocab",
        default=vocabularies,
        metavar="N,N,...",
        help=f"sub-vocabularies to measure: numbers, full, or shares such as 1/4 (default: {vocabularies})",
    )
    parser.add_argument(
        "--context-slots",
        metavar="M,M,...",
        help="measure each sub-vocabulary with so many slots for ids of the text so far; 0: none (default: 0 with a "
        "fixed pace, and as users get it where it is auto)",
    )
    add_tree_flags(parser)
    parser.add_argument(
        "--copying",
        choices=[choice for choice in COPYING if choice],
        help="drafts also propose what followed the same tokens earlier in the text; both: each method without "
        "it and with it (default: off with a fixed pace, and on where it is auto)",
    )
    parser.add_argument(
        "--pace",
        choices=PACES,
        default=pace,
        help="fixed: one tree in every round, as in the papers; auto: as users get it, each round drafts and verifies "
        f"what pays; both: each method both ways (default: {pace})",
    )
    add_dtype_flag(parser, dtype)


def add_question_arguments(parser: argparse.ArgumentParser, questions: int | None, tokens: int) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder or file of Spec-Bench and HumanEval, or a "
        "file of prompts, as --prompt-file of generate takes them (default: a small sample)",
    )
    parser.add_argument(
        "--questions",
        type=int,
        default=questions,
        metavar="N",
        help=f"evenly over the tasks (default: {'all' if questions is None else questions})",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=tokens, metavar="N", help=f"of an answer (default: {tokens})"
    )


def decoding_request(args: argparse.Namespace) -> Request:
    """What a command asks for that measures rounds: an answer's first token comes with its prompt, and takes none."""
    request = Request(args.max_new_tokens)
    if args.max_new_tokens < 2:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: the first is the prompt's; give at least 2")
    return request


def add_ranking_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ranking",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="take sub-vocabularies from each of these: .npz rankings, or token maps (.pt, .json, .txt, .npy, ...) "
        "(default: the checkpoint's ranking)",
    )


def progress_bar() -> Progress:
    """A bar on standard error, with counts and times."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=output.file_of("--json"), metavar="FILE", help="write the figures here too")


def add_out_argument(parser: argparse._ActionsContainer, text: str, required: bool = False) -> None:
    """The folder of what is drawn."""
    parser.add_argument("--out", type=output.folder_of("--out"), required=required, metavar="FOLDER", help=text)


def models(
    args: argparse.Namespace, rankings: Sequence[Path] = (), context: int | None = None
) -> tuple[Checkpoint, dict[str, Generator]]:
    """The checkpoint, and vanilla and the drafting methods that the flags ask for."""
    compile_cache.enable()
    checkpoint = Checkpoint.open(args.ckpt)
    names = args.draft.split(",") if args.draft else [None]
    if any(checkpoint.draft_folder(name) is None for name in names):
        raise UserError(f"{args.ckpt} holds no draft to measure; add one with python -m train eagle or convert eagle")
    check_rankings(checkpoint, rankings)
    tree: TreeConfig = tree_of(args, preferred_tree(checkpoint, Draft(names[0], pace="fixed"), args.dtype))
    if tree.size == 1:
        raise UserError("--tree-size 1 drafts nothing; vanilla decoding is measured anyhow, so ask for 2 or more")
    sizes = sizes_of(args.draft_vocab, checkpoint.config.vocab_size)
    slots = slots_of(args.context_slots)
    drafts = varied(names, sizes, tree, rankings, COPYING[args.copying], PACES[args.pace], slots)
    return checkpoint, methods(checkpoint, drafts, dtype=args.dtype, context=context)


def check_rankings(checkpoint: Checkpoint, rankings: Sequence[Path]) -> None:
    """Refuse rankings that are missing, damaged or another tokenizer's, even where no V' is taken from them."""
    for file in rankings:
        if not file.is_file():
            raise UserError(f"--ranking {file} is no file; give a ranking of python -m train rank, or a token map")
        Ranking.read(file, tokenizer_hash(checkpoint.tokenizer), checkpoint.config.vocab_size)


def sizes_of(text: str, vocab_size: int) -> list[int | str]:
    """The sub-vocabularies that --draft-vocab lists: numbers of tokens, or "full"."""
    return [_size(part.strip(), vocab_size) for part in text.split(",")]


def slots_of(text: str | None) -> list[int | None]:
    """The numbers of slots that --context-slots lists; None where it says nothing."""
    if text is None:
        return [None]
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--context-slots {text} must be whole numbers from 0 (none), such as 0,256,512")
    return [int(part) for part in parts]


def _size(text: str, vocab_size: int) -> int | str:
    return text if text == "full" else vocab_of(text, vocab_size)
