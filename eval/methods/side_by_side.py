"""Ways of decoding side by side, on the same prompts, in one run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from frspec_jax import api, llama, sampling
from frspec_jax.api import NO_DRAFT, Draft, Generator, Reading, Request, Result
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import TreeConfig
from frspec_jax.errors import UserError
from frspec_jax.vocabulary import DraftHead


def methods(checkpoint: Checkpoint, drafts: Sequence[Draft], **options: Any) -> dict[str, Generator]:
    """Vanilla, then a method for each of the drafts, by name. All share the target's weights.

    drafts: several that come to the same method are one: a draft with a vocabulary of its own is whole at "full" and
      at that vocabulary's size. options: those of `frspec_jax.load`.
    """
    vanilla = api.load(checkpoint, NO_DRAFT, **options)
    models = {"vanilla": vanilla}
    names = {draft.name for draft in drafts}
    known = set()
    for draft in drafts:
        model = api.load(checkpoint, draft, target=vanilla.weights.target, **options)
        method = model.drafting.method
        ranking = Path(draft.ranking) if draft.ranking is not None and method.cropped else None
        facts = (draft.name, method, model.draft_vocab, ranking)
        if facts in known:
            continue
        known.add(facts)
        name = label(model) + (f" ({ranking.stem})" if ranking else "")
        if name in models and len(names) > 1:  # two drafts of one kind
            name += f" [{draft.name}]"
        models[name] = model
    return models


def varied(
    drafts: Sequence[str | None],
    vocabularies: Sequence[int | str],
    tree: TreeConfig | None,
    rankings: Sequence[Path] = (),
    copying: Sequence[bool | None] = (None,),
    paces: Sequence[Literal["fixed", "auto"]] = ("fixed",),
    slots: Sequence[int | None] = (None,),
) -> list[Draft]:
    """Every draft (None: the default one) without and with copying, at each V', from each of the rankings.

    tree: of a fixed pace; an auto one chooses by itself. rankings: instead of the checkpoint's own. slots: for ids of
    the text, besides each V'.
    """
    return [
        Draft(draft, size, tree if pace == "fixed" else None, ranking, copying=copies, pace=pace, context_slots=many)
        for draft, pace, copies, size, many in itertools.product(drafts, paces, copying, vocabularies, slots)
        for ranking in ([None] if size == "full" or not rankings else rankings)
    ]


def label(model: Generator) -> str:
    """What tables call a method: the draft's usual name, and V' where the vocabulary is cropped."""
    return model.drafting.method.label(model.draft_vocab)


def draft_ids(model: Generator) -> np.ndarray:
    """The ids [V'] that a drafting method may propose."""
    parts = jax.tree.leaves(model.weights.draft, is_leaf=lambda node: isinstance(node, DraftHead))
    return np.asarray(next(part.ids for part in parts if isinstance(part, DraftHead)))


def covered(model: Generator, prompt: np.ndarray, tokens: Sequence[int]) -> int:
    """How many tokens of an answer to a prompt [T] were inside V', or in a slot when their turn came."""
    inside, slots = set(draft_ids(model).tolist()), model.context_slots
    latest: dict[int, None] = {}  # ids outside, the one seen last at the end
    count = 0
    for place, token in enumerate([*prompt.tolist(), *tokens]):
        held = place >= len(prompt) and (token in inside or token in latest)
        count += held
        if token not in inside and slots:
            latest.pop(token, None)
            latest[token] = None
            if len(latest) > slots:
                del latest[next(iter(latest))]
    return count


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
        with model.begin(prompt, request) as text:
            readings[kind] = text.reading()
    return model.generate_ids(readings[kind])


def check_rounds(rounds: int) -> None:
    """Refuse to make figures of answers that took no round, since their only token came with the prompt.

    rounds: of all answers together.
    """
    if not rounds:
        raise UserError("no prompt's answer is longer than one token; give other --data or raise --max-new-tokens")


def choice_gap(model: Generator, ids: np.ndarray, request: Request) -> float:
    """How far the target's best next token after `ids` [T] lies before its second: below rounding, a near-tie.

    In the scores that the choice is made by: logits, or (sampled) filtered logits with their noise.
    """
    with model.begin(ids, dataclasses.replace(request, max_new_tokens=1)) as text:
        state = text.state
        scores = llama.logits(model.weights.target, text.plan.config, state.accepted.features[:1])
        if text.plan.rule != "greedy":
            scores = sampling.scored(scores, state.asked.draw, state.length[None], jnp.zeros(1, jnp.int32))
        best, second = jax.lax.top_k(scores[0], 2)[0].tolist()
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
