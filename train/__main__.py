"""`python -m train COMMAND ...`: one sub-command a file."""

from __future__ import annotations

import argparse

from frspec_jax.commands import dispatch
from frspec_jax.errors import quoted

COMMANDS = {
    "rank": "count tokens: which ones may the draft propose?",
    "answers": "let the target answer prompts, as training data",
    "eagle": "train an EAGLE-2 draft",
    "eagle3": "train an EAGLE-3 draft",
    "medusa": "train Medusa heads that share the target's LM head",
    "curves": "plot what runs have logged",
    "medusa-tree": "fit a Medusa draft's tree to what its heads get right",
    "copying": "fit how far an EAGLE-2 draft copies what stands in the text already",
    "pace": "find out how often the target agrees with a draft, for rounds that pay",
}


def following(args: argparse.Namespace) -> list[str]:
    """What to type after a command."""
    if args.command == "curves":
        return []
    ckpt = quoted(args.ckpt)
    generate = f'python -m frspec_jax.generate --ckpt {ckpt} --prompt "Why is the sky blue?"'
    if args.command == "answers":
        return [f"python -m train eagle {quoted(args.out)} --ckpt {ckpt}"]
    if args.command == "rank":
        elsewhere = args.out is not None and args.out != args.ckpt / "ranking.npz"
        return [f"{generate} --ranking {quoted(args.out)}" if elsewhere else generate]
    if args.command in ("eagle", "eagle3", "medusa"):
        name = quoted(args.name)
        return [f"{generate} --draft {name}", f"python -m eval tune --ckpt {ckpt} --draft {name}"]
    return [generate]


def main(argv: list[str] | None = None) -> None:
    dispatch("train", "From a target to its draft.", COMMANDS, argv, after=following)


if __name__ == "__main__":
    main()
