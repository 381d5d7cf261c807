"""`python -m eval COMMAND ...`: each a file of its name in eval/commands."""

from __future__ import annotations

from frspec_jax.commands import dispatch

COMMANDS = {
    "demo": "answer three prompts with FR-Spec, and compare it with other ways of decoding",
    "pace": "watch what each round of an answer drafts and verifies",
    "simulate": "what ways of pacing rounds would bring by a table of costs, and what was measured",
    "speed": "tokens a second, accepted length and stage times, side by side",
    "stages": "where a round's time goes, at a published model's sizes: no checkpoint needed",
    "accept": "accepted length over a question set",
    "run": "answer question sets with every method, side by side, and keep records",
    "report": "tables in the paper's layout and plots, out of what run has kept",
    "tune": "find the fastest V' and draft tree on this device, and keep them as defaults",
    "frequency": "plot the long tail of token frequencies, of one or several rankings",
    "draft-tree": "draw a draft tree and its mask, with the full and the cropped vocabulary",
    "loops": "the same rounds, driven by the host or compiled into one loop",
    "quality": "HumanEval and GSM8K: are answers worth the same with drafting?",
    "load": "a server under load: first token and time between tokens as requests come faster",
    "identical": "compare the output with that of transformers, token by token",
}


def main(argv: list[str] | None = None) -> None:
    dispatch("eval", "Measure a checkpoint.", COMMANDS, argv, home="eval.commands")


if __name__ == "__main__":
    main()
