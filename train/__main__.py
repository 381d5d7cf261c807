"""`python -m train COMMAND ...`: one sub-command a file."""

from __future__ import annotations

from frspec_jax.commands import dispatch

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


def main(argv: list[str] | None = None) -> None:
    dispatch("train", "From a target to its draft.", COMMANDS, argv)


if __name__ == "__main__":
    main()
