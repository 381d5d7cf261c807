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

from frspec_jax import flags, hosts, prompts
from frspec_jax.commands import Parser
from frspec_jax.config import Sampling
from frspec_jax.entry import spelled
from frspec_jax.errors import UserError, quoted, reported
from frspec_jax.prompts import Asked

if TYPE_CHECKING:
    import numpy as np

    from frspec_jax.api import Generator, Request, Result


def arguments() -> argparse.ArgumentParser:
    parser = Parser(
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
        help="a file that is one prompt, or records (.jsonl, .json, .parquet, plain or compressed): each with "
        '"prompt", "messages", "conversations" or "instruction"; its "id" goes to the output of --json',
    )
    prompt.add_argument("--system", metavar="TEXT", help="the system message of a chat")
    prompt.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    output = parser.add_argument_group("output")
    output.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="tokens at most (default: 512)")
    output.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text; may be repeated"
    )
    output.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="with --json: each token's log-probability under the target, and the N likeliest beside it",
    )
    output.add_argument(
        "--slots",
        type=int,
        metavar="N",
        help="of several prompts, answer so many at a time, each exactly as alone (default: 8, or 1 where "
        "--lossy-typical asks for what is not exact)",
    )
    output.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a prompt, not the text; an id of its record stays with it",
    )
    flags.add_sampling_flags(parser)
    flags.add_penalty_flags(parser)
    flags.add_draft_flags(parser)
    flags.add_device_flags(parser)
    hosts.add_host_flags(
        parser, "the same command on each; --tensor-parallel counts the devices of all, and the first one prints"
    )
    return parser


def read_prompts(args: argparse.Namespace) -> list[Asked]:
    """The prompts of the command line, of a file, or of standard input."""
    if args.prompt is not None:
        return [Asked(_unicode(args.prompt, "--prompt"))]
    if args.prompt_file is None:
        return [Asked(_standard_input())]
    return prompts.read_prompts(args.prompt_file)


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
        hosts.join(args)
        # Everything that can be refused without a model is refused before one is loaded.
        sampling = flags.sampling_of(args)
        _unicode(args.system or "", "--system")
        draft = flags.draft_of(args)
        if args.slots is not None and args.slots < 1:
            raise UserError(f"--slots {args.slots} must be at least 1")
        if args.logprobs is not None and not args.json:
            raise UserError("--logprobs goes with --json; add it, or drop the flag")
        generate(args, read_prompts(args), sampling, draft)


def generate(args: argparse.Namespace, asked: list[Asked], sampling: Sampling, draft: flags.DraftFlags) -> None:
    """Answer the prompts, to standard output."""
    from rich.console import Console

    from frspec_jax import api
    from frspec_jax.batch import SLOTS
    from frspec_jax.checkpoint import Checkpoint
    from frspec_jax.sharding import mesh_of
    from pallas_kernels.dispatch import Kernels

    request = api.Request(
        args.max_new_tokens,
        sampling,
        args.seed,
        args.raw,
        args.system,
        stop=tuple(_unicode(text, "--stop") for text in args.stop),
        logprobs=args.logprobs,
    )
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
            mesh=mesh_of(args.tensor_parallel),
        )
    every = [model.encode(one.prompt, request, one.tools) for one in asked]
    for one, ids in zip(asked, every, strict=True):  # a prompt that does not fit is refused before any is answered
        _check(model, ids, request, args.prompt_file if one.where else None, one.where)
    if hosts.first_process():
        for line in remarks(model, draft):
            print(spelled(f"note: {line}"), file=sys.stderr)
    slots = args.slots or (1 if sampling.typical else SLOTS)
    if len(asked) > 1 and slots > 1:
        together(args, model, asked, [(ids, request) for ids in every], slots)
        return
    with console.status("compiling"):
        model.warm_up(sampling, logprobs=request.logprobs is not None)
    for number, (one, ids) in enumerate(zip(asked, every, strict=True)):
        stream = api.Stream(model, ids, request)
        if len(asked) > 1 and not args.json and hosts.first_process():
            print(parting(number, len(asked)))
        for piece in stream:
            if not args.json and hosts.first_process():
                sys.stdout.write(piece)
                sys.stdout.flush()
        assert stream.result is not None
        show(args, one, stream.result, text="")


def _check(model: Generator, ids: np.ndarray, request: Request, file: Path | None, where: str) -> None:
    """See that a prompt can be answered; of one out of a file of records, a refusal says where it stands."""
    try:
        model.check(ids, request)
    except UserError as error:
        if file is None:
            raise
        raise UserError(f"--prompt-file {quoted(file)}, {where}: {error.on_the_command_line}") from None


def remarks(model: Generator, draft: flags.DraftFlags) -> list[str]:
    """What a user may not expect of the way in which a model drafts, and what would change it."""
    checkpoint, args = model.checkpoint, draft.args
    path, names = quoted(checkpoint.path), checkpoint.draft_names
    if args.draft == "none":
        return []
    if model.drafting.folder is None:
        if names:  # `eval tune` has found that none pays here
            return []
        return [f"{path} has no draft, so FR-Spec is off; train one: python -m train eagle PROMPTS --ckpt {path}"]
    said = []
    if args.draft is None and len(names) > 1:
        said.append(f"drafting with {model.drafting.folder.name}; {path} holds {', '.join(names)}: --draft chooses")
    cropped = model.drafting.method.cropped
    if (
        not cropped
        and args.draft_vocab is None
        and args.ranking is None
        and not (checkpoint.path / "ranking.npz").exists()
    ):
        said.append(
            f"{path} has no ranking, so the draft uses the whole vocabulary; count one: "
            f"python -m train rank CORPUS --ckpt {path}"
        )
    return said


def parting(number: int, total: int) -> str:
    """The line that stands before one of several answers."""
    return f"{chr(10) if number else ''}--- answer {number + 1} of {total} ---"


def together(
    args: argparse.Namespace, model: Generator, asked: list[Asked], every: list[tuple[np.ndarray, Request]], slots: int
) -> None:
    """Answer prompts, given with their token ids, in a batch; what is said stands in their order."""
    from rich.console import Console

    from frspec_jax.batch import answers

    done: dict[int, Result] = {}
    shown = 0
    with Console(stderr=True).status(f"compiling rounds of {min(slots, len(asked))} texts") as status:
        for number, result in answers(model, every, slots):
            done[number] = result
            while shown in done:
                answer = done.pop(shown)
                if not args.json and hosts.first_process():
                    print(parting(shown, len(asked)))
                show(args, asked[shown], answer, text=answer.text)
                shown += 1
            status.update(f"{shown + len(done)} of {len(asked)} answered")


def show(args: argparse.Namespace, asked: Asked, answer: Result, text: str) -> None:
    """One answer, of which `text` is not out yet; its record's id, if it has one, comes first."""
    if not hosts.first_process():
        return
    if args.json:
        own = {} if asked.id is None else {"id": asked.id}
        print(json.dumps(own | answer.to_json(), ensure_ascii=False), flush=True)
    else:
        print(text, flush=True)
    print(answer.summary(), file=sys.stderr)


if __name__ == "__main__":
    main()
