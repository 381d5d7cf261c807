"""Rounds at the sizes of Llama 3 8B: which kernels pay, what V' saves, and what XLA's flags do."""

from __future__ import annotations

import argparse

from benchmarks.gpu_check.programs import Variant, bandwidth_of, every_kernel, measure, sizes_of
from benchmarks.gpu_check.runner import Session
from eval.commands import stages as by_stage
from frspec_jax.plan import EXACT
from pallas_kernels.dispatch import Kernels

NO_GRAPHS = (*EXACT.items(), ("xla_gpu_enable_command_buffer", ""))


def bandwidth(session: Session) -> None:
    """What this device reads a second: every floor counts with it."""
    session.tell("gb_per_second", round(bandwidth_of(session) / 1e9, 1))


def rounds(session: Session) -> None:
    """All layers: with every kernel and with none."""
    vocab = sizes_of(session).draft_vocab
    every, xla = every_kernel(session), Kernels.all("xla")
    variants = [
        Variant("xla", xla, vocab),
        Variant("all", every, vocab),
        Variant("vanilla, xla", xla, None),
        Variant("vanilla, all", every, None),
    ]
    measure(session, variants[:1] if session.dry else variants)


def more_rounds(session: Session) -> None:
    """All layers: some kernels, no sub-vocabulary, and `auto`, which goes by the tables that the sweep has written.

    (With no table, `auto` is XLA but for attention and what stands around it.)
    """
    sizes = sizes_of(session)
    vocab, kernel = sizes.draft_vocab, sizes.kernel
    variants = [
        Variant("auto", Kernels(), vocab),
        Variant("attention", Kernels(kernel, "xla", "xla"), vocab),
        Variant("attention and head", Kernels(kernel, kernel, "xla"), vocab),
        Variant("all, full vocabulary", every_kernel(session), sizes.shape.vocabulary),
    ]
    measure(session, variants[:1] if session.dry else variants)


def few_layers(session: Session) -> None:
    """What else may change a layer: on few of them, so that many variants are compiled in the time."""
    sizes = sizes_of(session)
    vocab, every = sizes.draft_vocab, every_kernel(session)
    variants = [
        Variant("all", every, vocab),
        Variant("xla", Kernels.all("xla"), vocab),
        Variant("all, no graphs", every, vocab, options=NO_GRAPHS),
        Variant("all, rounding may be left out", every, vocab, options=()),
        Variant("all, head in int8", every, vocab, int8=True),
    ]
    measure(session, variants[1:2] if session.dry else variants, layers=4)


def loops_as_graphs(session: Session) -> None:
    """The same with the decode loop and its branches in CUDA graphs: the flags are the process's."""
    sizes = sizes_of(session)
    variants = [
        Variant("all", every_kernel(session), sizes.draft_vocab),
        Variant("xla", Kernels.all("xla"), sizes.draft_vocab),
        Variant("vanilla, all", every_kernel(session), None),
    ]
    measure(session, variants[2:] if session.dry else variants, layers=4)


def stages(session: Session) -> None:
    """Rounds by stage, which the report holds against the aims."""
    sizes = sizes_of(session)
    args = argparse.Namespace(
        model=sizes.model,
        draft_vocab=None if session.dry else f"full,{sizes.draft_vocab}",
        context=[sizes.context],
        rounds=sizes.rounds,
        kernels="auto",
        draft_int8=False,
        peer_step=False,
    )
    for held in ("weights", "programs", "shape"):  # room for another set of the weights
        session.held.pop(held, None)
    session.tell("stages", by_stage.figures_of(args, sizes.tree))
