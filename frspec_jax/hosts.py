"""Several hosts as one run: the same command on each, of which only the first prints and keeps what comes out."""

from __future__ import annotations

import argparse

from frspec_jax.errors import UserError


def add_host_flags(parser: argparse.ArgumentParser, about: str) -> None:
    """--coordinator, --processes and --process. about: what else each host needs."""
    hosts = parser.add_argument_group("several hosts", about)
    hosts.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of the first process; auto: what SLURM, Open MPI or a Kubernetes job set says, which also tells "
        "the other two",
    )
    hosts.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    hosts.add_argument("--process", type=int, metavar="I", help="which of them this one is, from 0")


def join(args: argparse.Namespace) -> None:
    """Join the other hosts, if the flags name any. Must come before JAX is first used.

    Raises:
      UserError: some of the flags are missing, make no sense, or the others cannot be reached.
    """
    import jax

    given = [args.coordinator, args.processes, args.process]
    if all(value is None for value in given):
        return
    if args.coordinator == "auto":
        given = [None] * 3
    elif any(value is None for value in given) or not 0 <= args.process < args.processes:
        raise UserError("--coordinator, --processes N and --process I go together, with I from 0 to N - 1")
    try:
        jax.distributed.initialize(*given)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--coordinator {args.coordinator} cannot be joined ({reason}); check the address") from None


def first_process() -> bool:
    """Whether this process is the one that writes and prints."""
    import jax

    return jax.process_index() == 0
