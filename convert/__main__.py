"""`python -m convert FORMAT ...`: one sub-command a format, each in a file of its own."""

from __future__ import annotations

from frspec_jax.commands import dispatch

COMMANDS = {
    "hf": "a Hugging Face folder (Llama, Qwen2): safetensors or .bin, sharded or not",
    "gguf": "a GGUF file (llama, qwen2), any quantisation",
    "draft": "a published draft of any form: looked at, and read by whichever of the next three is for it",
    "eagle": "a published EAGLE, EAGLE-2 or HASS draft, into the checkpoint of its target",
    "eagle3": "a published EAGLE-3 draft, with the map of its vocabulary",
    "medusa": "published Medusa heads, of either layout, into the checkpoint of their target",
    "export": "the other way: a draft and a ranking out of a checkpoint, as EAGLE's code, SGLang or vLLM read them",
}


def main(argv: list[str] | None = None) -> None:
    dispatch("convert", "Bring a model or a draft into our format.", COMMANDS, argv)


if __name__ == "__main__":
    main()
