"""`python -m convert FORMAT ...`: one sub-command a format, each in a file of its own."""

from __future__ import annotations

import argparse
import importlib
import sys

# The modules are imported once they are called for: JAX takes a second, and --help should not.
COMMANDS = {
    "hf": "a Hugging Face folder (Llama, Qwen2): safetensors or .bin, sharded or not",
    "gguf": "a GGUF file (llama, qwen2), any quantisation",
    "eagle": "a published EAGLE or EAGLE-2 draft, into the checkpoint of its target",
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m convert", description="Bring a model or a draft into our format.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="FORMAT")
    called = argv[0] if argv and argv[0] in COMMANDS else None
    module = importlib.import_module(f"convert.{called}") if called else None
    for name, text in COMMANDS.items():
        sub = commands.add_parser(name, help=text)
        if module and name == called:
            sub.description = (module.__doc__ or "").split("\n\n", 1)[-1]
            module.add_arguments(sub)
    args = parser.parse_args(argv)
    from frspec_jax.errors import reported

    with reported():
        assert module is not None  # argparse has refused everything but a command
        module.run(args)


if __name__ == "__main__":
    main()
