"""The flags that commands share, each defined once, and what they make. Nothing here imports JAX before it is used."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frspec_jax.config import CONTEXT_SLOTS, TREE_LIMIT, VANILLA, Sampling, TreeConfig
from frspec_jax.errors import UserError

if TYPE_CHECKING:
    from frspec_jax.checkpoint import Checkpoint
    from frspec_jax.drafting import Draft

# Those of pallas_kernels.dispatch, without importing JAX.
IMPLEMENTATIONS = ("auto", "pallas", "mosaic", "interpret", "xla")
DTYPES = ("float32", "bfloat16")


# Sampling ----------------------------------------------------------------------------------------


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """--temperature, --top-k, --top-p, --min-p, --lossy-typical and --seed."""
    group = parser.add_argument_group("sampling", "applied in this order, as in transformers")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="keep the K best tokens; 0 keeps all (default: 0)"
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest share P (default: 1)")
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="keep tokens at least P times as likely as the best one (default: 0)",
    )
    group.add_argument(
        "--lossy-typical",
        type=float,
        default=0.0,
        metavar="E",
        help="Medusa's typical acceptance: faster, but the text is no longer the target's law; Medusa's own E is 0.09",
    )
    group.add_argument("--seed", type=int, default=0, help="same seed, same text, whatever drafts (default: 0)")


def add_penalty_flags(parser: argparse.ArgumentParser) -> None:
    """--repetition-penalty, --presence-penalty, --frequency-penalty and --logit-bias."""
    group = parser.add_argument_group("penalties", "applied before all sampling; they change greedy text too")
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="P",
        help="divide the logits of tokens in prompt and answer, as transformers (default: 1, off)",
    )
    for name, what in (("presence", "once for a token"), ("frequency", "for each time that a token stands")):
        group.add_argument(
            f"--{name}-penalty",
            type=float,
            default=0.0,
            metavar="P",
            help=f"taken off the logit, {what} in the answer, as OpenAI's (default: 0, off)",
        )
    group.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID:BIAS", help="added to a token's logit; may be repeated"
    )


def sampling_of(args: argparse.Namespace) -> Sampling:
    """What the sampling flags ask for, and those of penalties where a command has them."""
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.lossy_typical, args.min_p)
    if not hasattr(args, "logit_bias"):
        return sampling
    return dataclasses.replace(
        sampling,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        logit_bias=tuple(map(_bias, args.logit_bias)),
    )


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition(":")
    try:
        return int(token), float(bias)
    except ValueError:
        raise UserError(f"--logit-bias {text} must be a token id and a number, such as 28:-100") from None


# Drafting ----------------------------------------------------------------------------------------


def add_tree_flags(parser: Any) -> None:
    """--tree-size, --depth and --draft-top-k."""
    parser.add_argument(
        "--tree-size",
        type=int,
        metavar="N",
        help="nodes of the draft tree, with the root (default: what suits the device)",
    )
    parser.add_argument(
        "--depth", type=int, metavar="D", help="levels below the root (default: as many as --tree-size needs)"
    )
    parser.add_argument(
        "--draft-top-k", type=int, metavar="K", help="beams a level and children a node (default: likewise)"
    )


def add_draft_flags(parser: argparse.ArgumentParser) -> None:
    """What drafts, and how."""
    group = parser.add_argument_group(
        "drafting", "changes the speed, never the text; python -m eval tune sets the defaults for a device"
    )
    group.add_argument(
        "--draft", metavar="NAME", help="a draft's name or folder, or none (default: the first that the checkpoint had)"
    )
    group.add_argument(
        "--draft-vocab",
        metavar="N",
        help="V', tokens that the draft may propose, full, or a share such as 1/4 "
        "(default: as tuned; else, if ranked, a sixteenth with slots and a quarter without)",
    )
    group.add_argument(
        "--ranking",
        type=Path,
        metavar="FILE",
        help="take the sub-vocabulary from this ranking, or from a token map: ids, most frequent first, as .pt, .json, "
        ".txt, .npy or .safetensors (default: the checkpoint's ranking)",
    )
    group.add_argument(
        "--context-slots",
        type=int,
        metavar="M",
        help="the draft may also propose the last M ids of this text, prompt included, that V' lacks "
        f"(default: {CONTEXT_SLOTS} with --pace auto, and none with a fixed one)",
    )
    add_tree_flags(group)
    group.add_argument("--draft-int8", action="store_true", help="round the draft's head to int8: fewer bytes to read")
    group.add_argument(
        "--copying",
        choices=("off", "on"),
        help="propose besides what followed the same tokens earlier in the text, even with --draft none; with a fixed "
        "pace an EAGLE-2 draft only (default: on, with a fixed pace off)",
    )
    group.add_argument(
        "--pace",
        choices=("auto", "fixed"),
        help="auto: each round drafts and verifies what pays; fixed: one tree in every round, as in the papers "
        "(default: auto, or fixed where a flag shapes the tree)",
    )


@dataclasses.dataclass(frozen=True)
class DraftFlags:
    """A draft as the flags ask for it: what is missing of its tree depends on the checkpoint and the device."""

    args: argparse.Namespace

    def resolved(self, checkpoint: Checkpoint, dtype: Any = None) -> Draft:
        """What `frspec_jax.load` takes."""
        from frspec_jax.drafting import Draft, preferred_tree

        args = self.args
        copying = None if args.copying is None else args.copying == "on"
        draft = Draft(
            args.draft, args.draft_vocab, None, args.ranking, args.draft_int8, copying, args.pace, args.context_slots
        )
        shaped = (args.tree_size, args.depth, args.draft_top_k) != (None, None, None)
        if not shaped:
            return draft
        draft = dataclasses.replace(draft, pace=args.pace or "fixed")
        return dataclasses.replace(draft, tree=tree_of(args, preferred_tree(checkpoint, draft, dtype)))


def draft_of(args: argparse.Namespace) -> DraftFlags:
    """What the draft flags ask for, as far as it can be refused without a checkpoint."""
    vocab = args.draft_vocab
    if vocab not in (None, "full") and not vocab.removeprefix("1/").isdecimal():
        raise UserError(f"--draft-vocab {vocab} must be a number of tokens, full, or a share such as 1/4")
    if args.ranking is not None and not args.ranking.is_file():
        raise UserError(f"--ranking {args.ranking} is no file; give a ranking of python -m train rank, or a token map")
    return DraftFlags(args)


# Shapes that suit trees of at most so many nodes: of those that were measured, the first that is large enough.
SHAPES = (TreeConfig(4, 2, 2), TreeConfig(8, 3, 4), TreeConfig(24, 4, 6), TreeConfig(60, 6, 10))


def tree_of(args: argparse.Namespace, default: TreeConfig) -> TreeConfig:
    """The tree that the flags ask for.

    A flag that is not given keeps the default's figure where that fits the others. Where --tree-size asks for more
    nodes than those can propose, the depth or the top-k that was not given grows.
    """
    if (args.tree_size in (None, 1) and args.depth == 0) or (args.tree_size == 1 and args.depth is None):
        return VANILLA
    size, depth, top_k = args.tree_size, args.depth, args.draft_top_k
    if size is None:
        depth = default.depth if depth is None else depth
        top_k = default.top_k if top_k is None else top_k
        return TreeConfig(max(2, min(default.size, 1 + top_k + (depth - 1) * top_k**2)), depth, top_k)
    if not _fits(size, default.depth, default.top_k):
        default = next((shape for shape in SHAPES if size <= shape.size), SHAPES[-1])
    depth_fits = depth is None or depth > 0  # else it is refused below, whatever the top-k
    if depth is None:
        depth = default.depth
        while top_k is not None and top_k > 1 and not _fits(size, depth, top_k):
            depth += 1
    if top_k is None:
        top_k = default.top_k
        while depth_fits and size <= TREE_LIMIT and not _fits(size, depth, top_k):
            top_k += 1
    return TreeConfig(size, depth, top_k)


def _fits(size: int, depth: int, top_k: int) -> bool:
    """Whether so many levels of so many beams propose enough nodes."""
    return depth > 0 and top_k + (depth - 1) * top_k**2 >= size - 1


# The device --------------------------------------------------------------------------------------


def add_dtype_flag(parser: Any, default: str | None = None) -> None:
    """--dtype; default: None is what suits the device."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=default,
        help=f"default: {default or 'bfloat16 on a GPU and on a CPU with AMX, else float32'}",
    )


def add_device_flags(parser: argparse.ArgumentParser) -> Any:
    """How the model runs; the group of flags, for those that a command adds."""
    group = parser.add_argument_group("device")
    add_dtype_flag(group)
    group.add_argument(
        "--context", type=int, metavar="N", help="tokens of prompt and answer together (default: at most 4096)"
    )
    group.add_argument(
        "--chunk",
        type=int,
        metavar="N",
        help="prompt tokens a pass, always as many, a divisor of 256 (default: what suits)",
    )
    group.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="divide the target, and an EAGLE draft where that pays, among N devices (default: 1)",
    )
    group.add_argument(
        "--kernels",
        choices=IMPLEMENTATIONS,
        default="auto",
        help="auto: Pallas kernels for attention on a GPU, others where they were measured to win (default); "
        "pallas: all of them; mosaic: all, attention in Mosaic GPU instead of Triton; interpret: slowly, on any device",
    )
    return group
