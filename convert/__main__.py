"""`python -m convert FORMAT ...`: one sub-command a format, each in a file of its own."""

from __future__ import annotations

import argparse
from pathlib import Path

from frspec_jax.commands import dispatch
from frspec_jax.errors import quoted

COMMANDS = {
    "hf": "a Hugging Face folder (Llama, Mistral, Qwen, Gemma): safetensors or .bin, sharded or not",
    "gguf": "a GGUF file (of the same families), any quantisation",
    "draft": "a published draft of any form: looked at, and read by whichever of the next three is for it",
    "eagle": "a published EAGLE, EAGLE-2 or HASS draft, into the checkpoint of its target",
    "eagle3": "a published EAGLE-3 draft, with the map of its vocabulary",
    "medusa": "published Medusa heads, of either layout, into the checkpoint of their target",
    "export": "the other way: a draft and a ranking out of a checkpoint, as EAGLE's code, SGLang or vLLM read them",
}


def following(args: argparse.Namespace) -> list[str]:
    """What to type after a conversion."""
    if args.command == "export":
        return []
    if args.command in ("hf", "gguf"):
        ckpt = quoted(args.out)
        return [
            f"python -m train eagle PROMPTS --ckpt {ckpt} --own-answers 1000000  (a draft and a ranking)",
            f"python -m convert eagle DRAFT_FOLDER --target {ckpt}  (or a draft that is published)",
            f'python -m frspec_jax.generate --ckpt {ckpt} --prompt "Why is the sky blue?"',
        ]
    ckpt = quoted(args.target)
    ranked = (
        Path(args.target) / "ranking.npz"
    ).exists() or args.command == "eagle3"  # which has a vocabulary of its own
    return [
        *([] if ranked else [f"python -m train rank CORPUS --ckpt {ckpt}  (which tokens are frequent)"]),
        f'python -m frspec_jax.generate --ckpt {ckpt} --draft {quoted(args.name)} --prompt "Why is the sky blue?"',
    ]


def main(argv: list[str] | None = None) -> None:
    dispatch("convert", "Bring a model or a draft into our format.", COMMANDS, argv, after=following)


if __name__ == "__main__":
    main()
