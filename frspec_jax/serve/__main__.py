"""`python -m frspec_jax.serve --ckpt CKPT`: an OpenAI-compatible server and a chat page.

It answers at once (/health, /ready with its progress), and takes requests when the model is loaded and compiled.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from frspec_jax import entry, flags
from frspec_jax.commands import Parser
from frspec_jax.errors import UserError, quoted, reported

KEY_VARIABLE = "FRSPEC_API_KEY"


def arguments() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m frspec_jax.serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--ckpt", required=True, metavar="CKPT", help="checkpoint folder, made by python -m convert")
    parser.add_argument(
        "--name",
        action="append",
        metavar="NAME",
        help="what clients call it; may be given again (default: CKPT's)",
    )
    address = parser.add_argument_group("address")
    address.add_argument("--host", default="127.0.0.1", help="0.0.0.0: every network (default: this machine alone)")
    address.add_argument("--port", type=int, default=8000, metavar="N", help="0: any that is free (default: 8000)")
    address.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"keys, one a line, of which /v1 wants one (default: that of {KEY_VARIABLE}, or none)",
    )
    address.add_argument(
        "--cors", action="append", metavar="ORIGIN", help="a web page's origin that may ask; * for all (default: none)"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--slots", type=int, default=8, metavar="N", help="requests that decode at once, on each replica (default: 8)"
    )
    limits.add_argument(
        "--queue", type=int, default=64, metavar="N", help="requests that may wait; more get 429 (default: 64)"
    )
    limits.add_argument(
        "--seconds",
        type=float,
        default=600,
        metavar="S",
        help="of a request, waiting included (default: 600)",
    )
    limits.add_argument(
        "--body-kb", type=int, default=4096, metavar="KB", help="of a request's body; more gets 413 (default: 4096)"
    )
    limits.add_argument(
        "--choices", type=int, default=128, metavar="N", help="answers to one request, prompts times n (default: 128)"
    )
    limits.add_argument(
        "--drain-seconds", type=float, default=60, metavar="S", help="for what runs at SIGTERM (default: 60)"
    )
    behaviour = parser.add_argument_group("behaviour")
    behaviour.add_argument(
        "--control-tokens",
        choices=("text", "control"),
        default="text",
        help="what the likes of <|im_end|> in a user's text are (default: text, so that nobody forges a turn)",
    )
    behaviour.add_argument(
        "--compare",
        choices=("on", "off"),
        default="on",
        help="answer without drafts too, where a request (the page's switch) asks for it; memory for one more text",
    )
    flags.add_draft_flags(parser)
    flags.add_device_flags(parser).add_argument(
        "--data-parallel",
        type=int,
        default=1,
        metavar="R",
        help="replicas of the model that share the queue, each on --tensor-parallel devices of its own (default: 1)",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    with reported():
        check(args)
        draft = flags.draft_of(args)
        keys = keys_of(args.api_key_file)
        try:
            from frspec_jax.serve import life
        except ModuleNotFoundError as error:
            if error.name and error.name.startswith(("frspec_jax", "jax")):
                raise
            raise UserError(f"the server needs the package {error.name}; run: {entry.install('serve')}") from None
        life.serve(args, draft, keys)


def check(args: argparse.Namespace) -> None:
    """Refuse figures that cannot be."""
    for flag, least, most in (
        ("--port", 0, 65535),
        ("--slots", 1, 1024),
        ("--queue", 0, 100_000),
        ("--body-kb", 1, 2**20),
        ("--choices", 1, 100_000),
    ):
        value = getattr(args, flag[2:].replace("-", "_"))
        if not least <= value <= most:
            raise UserError(f"{flag} {value} is out of range: {least} to {most}")
    for flag in ("--seconds", "--drain-seconds"):
        value = getattr(args, flag[2:].replace("-", "_"))
        if not (math.isfinite(value) and (value > 0 or (value == 0 and flag == "--drain-seconds"))):
            raise UserError(f"{flag} {value} must be a positive number of seconds")
    for name in args.name or ():
        if not name.strip() or not name.isprintable():
            raise UserError("--name must not be empty; give what clients are to call the model")
    for origin in args.cors or ():
        if origin != "*" and (not origin.startswith(("http://", "https://")) or origin.endswith("/")):
            raise UserError(f"--cors {origin} must be an origin such as https://chat.example.org, without a path, or *")


def keys_of(file: Path | None) -> tuple[bytes, ...]:
    """The keys of a file, or of the environment."""
    if file is None:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return (os.fsencode(key),) if key else ()
    try:
        keys = tuple(line.strip() for line in file.read_bytes().splitlines() if line.strip())
    except OSError as error:
        raise UserError(f"--api-key-file {quoted(file)} cannot be read: {error.strerror}") from None
    if not keys:
        raise UserError(f"--api-key-file {quoted(file)} holds no key; write one a line, or leave the flag out")
    return keys


if __name__ == "__main__":
    main()
