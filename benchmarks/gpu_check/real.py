"""The real model on this device: how fast it decodes, and whether drafting changes its text."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax.numpy as jnp

from benchmarks.gpu_check.material import amounts_of, checkpoint_of
from benchmarks.gpu_check.programs import every_kernel
from benchmarks.gpu_check.runner import Session
from benchmarks.gpu_check.training import NAME
from eval.data.questions import read_questions
from frspec_jax import Draft, Request, load
from frspec_jax.api import NO_DRAFT, Result
from pallas_kernels.dispatch import Kernels

LEAST = 15.0  # seconds: with less left no further way is begun


def real_model(session: Session) -> None:
    """Ways to decode, in bfloat16 and in float32, against vanilla decoding. In float32 other tokens are a failure.

    The sample of questions that ships is asked; a draft that there is none of, for lack of time, is left out.
    """
    amounts, checkpoint = amounts_of(session), checkpoint_of(session)
    questions = [question.turns[0] for question in read_questions(None)][: amounts.questions]
    every = every_kernel(session)
    drafted = Draft(NAME, amounts.draft_vocab, amounts.tree)
    ways = {
        "vanilla": (NO_DRAFT, Kernels.all("xla")),
        "FR-Spec, all kernels": (drafted, every),
        "FR-Spec": (drafted, Kernels()),
        "vanilla, all kernels": (NO_DRAFT, every),
        "EAGLE-2": (Draft(NAME, "full", amounts.tree), Kernels()),
        "FR-Spec, copying": (Draft(NAME, amounts.draft_vocab, amounts.tree, copying=True), Kernels()),
    }
    if not (checkpoint.path / "drafts" / NAME).is_dir():
        session.tell("draft", "there is none; vanilla decoding alone")
        ways = {name: way for name, way in ways.items() if way[0] is NO_DRAFT}
    names, dtypes = list(ways), ("bfloat16", "float32")
    if session.dry:
        names, dtypes = names[:2], ("float32",)
    # The telling ways in both dtypes before the others: the time may not do for all.
    order = [(dtype, name) for lot in (names[:3], names[3:]) for dtype in dtypes for name in lot]
    targets = {dtype: checkpoint.params(jnp.dtype(dtype)) for dtype in dtypes}
    vanilla: dict[str, list[Result]] = {}
    different = []
    for dtype, name in order:
        if session.left < LEAST:
            session.tell(f"{dtype}, {name}", "left out, for lack of time")
            continue
        draft, kernels = ways[name]
        begun = time.perf_counter()
        model = load(checkpoint, draft, dtype=dtype, context=512, kernels=kernels, target=targets[dtype])
        model.warm_up()
        compiling = time.perf_counter() - begun
        results = [model.generate(question, Request(amounts.answer_tokens)) for question in questions]
        expected = vanilla.setdefault(dtype, results)
        same = sum(mine.tokens == theirs.tokens for mine, theirs in zip(results, expected, strict=True))
        session.tell(f"{dtype}, {name}", _figures(results) | {"same_as_vanilla": same, "load_seconds": compiling})
        different += [name] * (dtype == "float32" and same < len(results))
    if different:
        raise RuntimeError(f"in float32 other tokens than vanilla's: {', '.join(different)}")


def _figures(results: list[Result]) -> dict[str, Any]:
    """Speed and accepted length over some answers."""
    rounds, tokens = sum(result.rounds for result in results), sum(len(result.tokens) - 1 for result in results)
    return {
        "answers": len(results),
        "tokens_per_second": round(statistics.median(result.decode_rate for result in results), 1),
        "accepted_length": round(tokens / max(1, rounds), 3),
        "ms_a_round": 1e3 * sum(result.decode_seconds for result in results) / max(1, rounds),
        "prefill_ms": 1e3 * statistics.median(result.prefill_seconds for result in results),
    }
