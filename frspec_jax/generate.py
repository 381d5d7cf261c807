"""`python -m frspec_jax.generate --ckpt CKPT --prompt TEXT`: answer prompts with FR-Spec.

The text goes to standard output as it comes, and a line of figures to standard error.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from frspec_jax import flags, prompts
from frspec_jax.config import Sampling
from frspec_jax.errors import UserError, reported

if TYPE_CHECKING:
    from frspec_jax.api import Prompt


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
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help='a file that is one prompt, or JSON Lines (.jsonl): each with "prompt", or chat "messages"',
    )
    prompt.add_argument("--system", metavar="TEXT", help="the system message of a chat")
    prompt.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    output = parser.add_argument_group("output")
    output.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="tokens at most (default: 512)")
    output.add_argument("--json", action="store_true", help="print one JSON object a prompt, not the text")
    flags.add_sampling_flags(parser)
    flags.add_draft_flags(parser)
    flags.add_device_flags(parser)
    return parser


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of the command line, of a file, or of standard input."""
    if args.prompt is not None:
        return [_unicode(args.prompt, "--prompt")]
    if args.prompt_file is None:
        return [_standard_input()]
    return list(prompts.read_prompts(args.prompt_file))


def _standard_input() -> str:
    if sys.stdin is None or sys.stdin.closed:
        raise UserError("standard input is closed; give --prompt or --prompt-file")
    if sys.stdin.isatty():
        print("prompt (end with Ctrl-D):", file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):  # text is UTF-8, whatever the terminal's own encoding
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        return _unicode(sys.stdin.read(), "standard input")
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text; convert it, for instance with iconv") from None
    except OSError as error:
        raise UserError(f"standard input cannot be read: {error.strerror}; give --prompt or --prompt-file") from None


def _unicode(text: str, source: str) -> str:
    """The text, if it is some: bytes that are no UTF-8 reach us as surrogates, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{source} is not UTF-8 text; convert it, for instance with iconv") from None
    return text


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    with reported():
        # Everything that can be refused without a model is refused before one is loaded.
        sampling = flags.sampling_of(args)
        _unicode(args.system or "", "--system")
        draft = flags.draft_of(args)
        generate(args, read_prompts(args), sampling, draft)


def generate(args: argparse.Namespace, asked: list[Prompt], sampling: Sampling, draft: flags.DraftFlags) -> None:
    """Answer the prompts, to standard output."""
    from rich.console import Console

    from frspec_jax import api
    from frspec_jax.checkpoint import Checkpoint
    from pallas_kernels.dispatch import Kernels

    request = api.Request(args.max_new_tokens, sampling, args.seed, args.raw, args.system)
    checkpoint = Checkpoint.open(args.ckpt)
    console = Console(stderr=True)
    with console.status("loading the weights"):
        model = api.load(
            checkpoint,
            draft.resolved(checkpoint, args.dtype),
            dtype=args.dtype,
            context=args.context,
            chunk=args.chunk,
            kernels=Kernels.all(args.kernels),
        )
    for prompt in asked:  # a prompt that does not fit is refused before any is answered
        model.check(model.encode(prompt, request), request)
    with console.status("compiling"):
        model.warm_up(sampling)
    for prompt in asked:
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
