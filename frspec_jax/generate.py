"""`python -m frspec_jax.generate --ckpt CKPT --prompt TEXT`: answer prompts with FR-Spec.

The text goes to standard output as it comes, and a line of figures to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from frspec_jax import json_lines
from frspec_jax.config import VANILLA, Sampling, TreeConfig
from frspec_jax.errors import UserError, reported

if TYPE_CHECKING:
    from frspec_jax.api import Prompt

IMPLEMENTATIONS = ("auto", "pallas", "interpret", "xla")  # those of pallas_kernels.dispatch, without importing JAX


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m frspec_jax.generate",
        description="Generate text with FR-Spec: exactly what the target alone would write, sooner.",
        epilog="Without --prompt and --prompt-file the prompt is read from standard input.",
    )
    parser.add_argument("--ckpt", required=True, metavar="CKPT", help="checkpoint folder, made by python -m convert")
    prompt = parser.add_argument_group("prompt")
    source = prompt.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="one prompt")
    source.add_argument(
        "--prompt-file", type=Path, metavar="FILE",
        help='a file that is one prompt, or JSON Lines (.jsonl): each with "prompt", or chat "messages"',
    )  # fmt: skip
    prompt.add_argument("--system", metavar="TEXT", help="the system message of a chat")
    prompt.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    output = parser.add_argument_group("output")
    output.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="tokens at most (default: 512)")
    output.add_argument("--json", action="store_true", help="print one JSON object a prompt, not the text")
    sampling = parser.add_argument_group("sampling", "applied in this order, as in transformers")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: 0)")
    sampling.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="keep the K best tokens; 0 keeps all (default: 0)"
    )
    sampling.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="keep the likeliest share P (default: 1)"
    )
    sampling.add_argument(
        "--lossy-typical", type=float, default=0.0, metavar="E",
        help="Medusa's typical acceptance: faster, but the text is no longer the target's law; Medusa's own E is 0.09",
    )  # fmt: skip
    sampling.add_argument("--seed", type=int, default=0, help="same seed, same text, whatever drafts (default: 0)")
    draft = parser.add_argument_group(
        "drafting", "changes the speed, never the text; python -m eval tune sets the defaults for a device"
    )
    draft.add_argument(
        "--draft", metavar="NAME", help="a draft's name or folder, or none (default: the only one there is)"
    )
    draft.add_argument(
        "--draft-vocab",
        metavar="N",
        help="V', tokens that the draft may propose, or full (default: as tuned, or a quarter, if ranked)",
    )
    draft.add_argument(
        "--tree-size",
        type=int,
        metavar="N",
        help="nodes of the draft tree, with the root (default: what suits the device)",
    )
    draft.add_argument("--depth", type=int, metavar="D", help="levels below the root")
    draft.add_argument("--draft-top-k", type=int, metavar="K", help="beams a level and children a node")
    draft.add_argument("--draft-int8", action="store_true", help="round the draft's head to int8: fewer bytes to read")
    draft.add_argument(
        "--copying", choices=("off", "on"), default="off",
        help="an EAGLE-2 draft also proposes what followed the same tokens earlier in the text (default: off)",
    )  # fmt: skip
    device = parser.add_argument_group("device")
    device.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: bfloat16 on a GPU and on a CPU with AMX, else float32",
    )
    device.add_argument(
        "--context", type=int, metavar="N", help="tokens of prompt and answer together (default: at most 4096)"
    )
    device.add_argument(
        "--kernels", choices=IMPLEMENTATIONS, default="auto",
        help="auto: Pallas kernels where they were measured to win (default); interpret: slowly, on any device",
    )  # fmt: skip
    return parser


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of the command line, of a file, or of standard input."""
    if args.prompt is not None:
        return [args.prompt]
    if args.prompt_file is None:
        if sys.stdin.isatty():
            print("prompt (end with Ctrl-D):", file=sys.stderr)
        return [sys.stdin.read()]
    try:
        text = args.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--prompt-file {args.prompt_file} cannot be read: {reason}") from None
    if args.prompt_file.suffix != ".jsonl":
        return [text]
    lines = list(json_lines.numbered(text))
    if not lines:
        raise UserError(f"--prompt-file {args.prompt_file} holds no prompt")
    return [_prompt_of(args.prompt_file, number, line) for number, line in lines]


def _prompt_of(file: Path, number: int, line: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"--prompt-file {file}, line {number}: not JSON ({error})") from None
    if isinstance(record, dict):
        if isinstance(record.get("prompt"), str):
            return record["prompt"]
        messages = record.get("messages")
        if (
            isinstance(messages, list)
            and messages
            and all(
                isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
                for m in messages
            )
        ):
            return messages
    raise UserError(
        f'--prompt-file {file}, line {number}: give "prompt" or "messages" (each with "role" and "content")'
    )


def tree_of(args: argparse.Namespace, default: TreeConfig) -> TreeConfig:
    """The tree that the flags ask for; a flag that is not given keeps the default's figure, where it fits."""
    if (args.tree_size in (None, 1) and args.depth == 0) or (args.tree_size == 1 and args.depth is None):
        return VANILLA
    depth = default.depth if args.depth is None else args.depth
    top_k = default.top_k if args.draft_top_k is None else args.draft_top_k
    if args.tree_size is not None:
        return TreeConfig(args.tree_size, depth, top_k)
    return TreeConfig(max(2, min(default.size, 1 + top_k + (depth - 1) * top_k**2)), depth, top_k)


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    with reported():
        # Everything that can be refused without a model is refused before one is loaded.
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.lossy_typical)
        if args.draft_vocab not in (None, "full") and not args.draft_vocab.isdecimal():
            raise UserError(f"--draft-vocab {args.draft_vocab} must be a number of tokens, or full")
        prompts = read_prompts(args)
        generate(args, prompts, sampling)


def generate(args: argparse.Namespace, prompts: list[Prompt], sampling: Sampling) -> None:
    """Answer the prompts, to standard output."""
    import jax.numpy as jnp
    from rich.console import Console

    from frspec_jax import api, compile_cache
    from frspec_jax.checkpoint import Checkpoint
    from pallas_kernels.dispatch import Kernels

    compile_cache.enable()
    request = api.Request(args.max_new_tokens, sampling, args.seed, args.raw, args.system)
    checkpoint = Checkpoint.open(args.ckpt)
    dtype = args.dtype and jnp.dtype(args.dtype)
    tree = tree_of(args, api.preferred_tree(checkpoint, args.draft, dtype))
    console = Console(stderr=True)
    with console.status("loading the weights"):
        model = api.load(
            checkpoint, draft=args.draft, draft_vocab=args.draft_vocab, tree=tree,
            dtype=dtype, context=args.context,
            kernels=Kernels(args.kernels, args.kernels), draft_int8=args.draft_int8,
            copying=args.copying == "on",
        )  # fmt: skip
    for prompt in prompts:  # a prompt that does not fit is refused before any is answered
        model.check(model.encode(prompt, request), request)
    with console.status("compiling"):
        model.warm_up(sampling)
    for prompt in prompts:
        stream = model.stream(prompt, request)
        for piece in stream:
            if not args.json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        assert stream.result is not None
        if args.json:
            print(json.dumps(stream.result.to_json(), ensure_ascii=False), flush=True)
        else:
            print(flush=True)
        print(stream.result.summary(), file=sys.stderr)


if __name__ == "__main__":
    main()
