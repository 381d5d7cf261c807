"""What the evaluations share: methods side by side, stage times, the bandwidth floor, and the machine's name."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import itertools
import platform
import statistics
import time
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from frspec_jax import api, engine, kv_cache, llama, sampling, tuned
from frspec_jax.api import Generator, Reading, Request, Result
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import TreeConfig
from frspec_jax.vocabulary import DraftHead

KINDS = {"eagle": "EAGLE-2", "eagle3": "EAGLE-3", "medusa": "Medusa"}  # drafts' usual names
machine = tuned.machine
WARM_UP = 3  # rounds before stages are timed


def methods(
    checkpoint: Checkpoint,
    drafts: Sequence[str | None],
    vocabularies: Sequence[int | str],
    tree: TreeConfig | None,
    rankings: Sequence[Path] = (),
    copying: Sequence[bool] = (False,),
    **options: Any,
) -> dict[str, Generator]:
    """Vanilla, then every draft at each V' ("full" or a number), by name. All share the target's weights.

    drafts: as `api.load` takes them, None for the only one there is.
    rankings: files to take sub-vocabularies from, each in turn, instead of the checkpoint's own.
    copying: without it, with it, or one after the other.
    """
    vanilla = api.load(checkpoint, draft="none", **options)
    found = {"vanilla": vanilla}
    options = {**options, "tree": tree, "target": vanilla.weights.target}
    known = set()  # a draft with a vocabulary of its own is whole at "full" and at that vocabulary's size: one method
    for draft, copies, size in itertools.product(drafts, copying, vocabularies):
        whole = size in ("full", checkpoint.config.vocab_size)
        for ranking in [None] if whole or not rankings else rankings:
            model = api.load(checkpoint, draft=draft, draft_vocab=size, ranking=ranking, copying=copies, **options)
            cropped = "+fr" in model.method
            method = (draft, copies, model.draft_vocab, ranking if cropped else None)
            if method in known:
                continue
            known.add(method)
            name = label(model) + (f" ({ranking.stem})" if ranking and cropped else "")
            if name in found and len(drafts) > 1:  # two drafts of one kind
                name += f" [{draft}]"
            found[name] = model
    return found


def label(model: Generator) -> str:
    """What tables call a method: the draft's usual name, and V' where the vocabulary is cropped."""
    kind, *more = model.method.split("+")
    name = KINDS.get(kind, kind)
    if "fr" in more:
        name = f"FR-Spec {model.draft_vocab:,}" if kind == "eagle" else f"{name} + FR {model.draft_vocab:,}"
    return f"{name} + copying" if "copying" in more else name


def draft_ids(model: Generator) -> np.ndarray:
    """The ids [V'] that a drafting method may propose."""
    parts = jax.tree.leaves(model.weights.draft, is_leaf=lambda node: isinstance(node, DraftHead))
    return np.asarray(next(part.ids for part in parts if isinstance(part, DraftHead)))


def in_turn(names: Sequence[str], turn: int) -> list[str]:
    """The names, begun with another one each turn, so that a machine's drift meets all methods alike."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]


def answer(model: Generator, prompt: np.ndarray, request: Request, readings: dict[Hashable, Reading]) -> Result:
    """A model's answer to a prompt of ids [T]; `readings`, empty at first, is what it shares with other models.

    Models that differ in V' alone read a prompt once.
    """
    kind = model.reads_as(request)
    if kind not in readings:
        readings[kind] = model.read(prompt, request)
    return model.answer(readings[kind].copy())


def choice_gap(model: Generator, ids: np.ndarray, request: Request) -> float:
    """How far the target's best next token after `ids` [T] lies before its second: below rounding, a near-tie.

    In the scores that the choice is made by: logits, or (sampled) filtered logits with their noise.
    """
    plan = model.plan(request.sampling)
    state = model._start(plan, ids, 1, request.seed)
    scores = llama.logits(model.weights.target, state.accepted.features[:1])
    if not request.sampling.greedy:
        noise = sampling.gumbel_rows(state.seed, state.sequence, state.length[None], scores.shape[-1])
        scores = sampling.warp(scores, request.sampling) + noise
    best, second = jax.lax.top_k(scores[0], 2)[0].tolist()
    model._finish(state)
    return best - second


def interleaved(
    models: dict[str, Generator], prompts: Iterable[np.ndarray], request: Request
) -> Iterator[dict[str, Result]]:
    """Answer each prompt with every method in turn, so that a machine's drift meets all of them alike."""
    for model in models.values():
        model.warm_up(request.sampling)
    names = list(models)
    for index, prompt in enumerate(prompts):
        results = {name: models[name].generate_ids(prompt, request) for name in in_turn(names, index)}
        yield {name: results[name] for name in names}


# Stages ------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("plan",), donate_argnames=("state",), compiler_options=engine.EXACT)
def draft_step(plan: engine.Plan, weights: engine.Weights, state: engine.DecodeState) -> Any:
    """The drafting half of a round as a program of its own: a `DraftTree`, and the state."""
    tree, cache = engine.draft(plan, weights, state)
    return tree, replace(state, caches=replace(state.caches, draft=cache))


@functools.partial(jax.jit, static_argnames=("plan",), donate_argnames=("state",), compiler_options=engine.EXACT)
def verify_step(plan: engine.Plan, weights: engine.Weights, state: engine.DecodeState, tree: Any) -> Any:
    """The target's pass over a tree: features [N, H], the `engine.Verdict`, and the state."""
    features, verdict, cache = engine.verify(plan, weights, state, tree)
    return features, verdict, replace(state, caches=replace(state.caches, target=cache))


@functools.partial(jax.jit, static_argnames=("plan",), donate_argnames=("state",), compiler_options=engine.EXACT)
def accept_step(plan: engine.Plan, state: engine.DecodeState, tree: Any, features: Any, verdict: Any) -> Any:
    """The end of a round: the state with the accepted path emitted and committed."""
    return engine.accept(plan, state, tree, features, verdict, state.caches)


@dataclasses.dataclass(frozen=True)
class StageTimes:
    """Median milliseconds of a round's stages, each run as a program of its own."""

    draft: float
    verify: float
    accept: float


def stage_times(model: Generator, prompt: np.ndarray, request: Request, rounds: int = 24) -> StageTimes:
    """Time draft, verify and accept apart, over the rounds of one answer."""
    plan = model.plan(request.sampling)
    limit = min(model.check(prompt, request), (rounds + WARM_UP + 1) * (plan.tree.depth + 1))
    state = model._start(plan, prompt, limit, request.seed)
    times: list[tuple[float, float, float]] = []
    while len(times) < rounds + WARM_UP and int(state.finished) == engine.RUNNING:
        start = time.perf_counter()
        tree, state = jax.block_until_ready(draft_step(plan, model.weights, state))
        drafted = time.perf_counter()
        features, verdict, state = jax.block_until_ready(verify_step(plan, model.weights, state, tree))
        verified = time.perf_counter()
        state = jax.block_until_ready(accept_step(plan, state, tree, features, verdict))
        times.append((drafted - start, verified - drafted, time.perf_counter() - verified))
    model._finish(state)
    medians = [1e3 * statistics.median(column) for column in zip(*times[WARM_UP:] or times, strict=True)]
    return StageTimes(*medians)


# Floor -------------------------------------------------------------------------------------------


def round_bytes(model: Generator, context: int) -> int:
    """Bytes that a round must read: target and head once, draft and cropped head at each level, live K/V rows."""

    def size(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    target, config = model.weights.target, model.checkpoint.config
    row = 2 * config.num_kv_heads * config.head_dim * kv_cache.stored(target.embedding.dtype).itemsize
    total = size(target.layers) + target.head.nbytes + config.num_layers * context * row
    if model.draft_vocab is not None:
        passes = 1 if model.method.startswith("medusa") else model.tree.depth  # Medusa's heads all read one feature
        whole = getattr(model.weights.draft, "whole", None)  # of which a draft that copies reads a few rows
        total += passes * (size(model.weights.draft) - size(whole) + context * row)
    return total


def versions() -> dict[str, str]:
    """Versions of what a measurement depends on."""
    names = ("frspec-jax", "jax", "jaxlib", "numpy", "transformers", "torch")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
