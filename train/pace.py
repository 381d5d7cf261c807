"""`python -m train pace PROMPTS... --ckpt CKPT --draft eagle`: find out how often the target agrees with a draft.

A round with a pace (`frspec_jax.pace`) weighs tokens by their chance of being accepted. A draft's own probabilities say
little of it, and what was looked up in the text has none. So the target answers some prompts; at each place of an
answer the draft proposes its beams and the text is looked up in; and what proved right is counted into the draft's
pace.json. Any kind of draft will do.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.progress import track

from frspec_jax import api, llama, lookup, pace_tables
from frspec_jax.api import Draft, Generator, Request
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.drafters.base import Accepted, DraftMemory, Turn
from frspec_jax.errors import UserError
from frspec_jax.files import check_writable
from frspec_jax.locks import folder_lock
from frspec_jax.pace import GRID
from frspec_jax.pace_tables import Fitted
from frspec_jax.placement import Placement
from frspec_jax.plan import EXACT, Plan
from frspec_jax.state import Caches, Weights, new_caches
from frspec_jax.tree import ALL_THE_WAY, Candidates
from train.corpus import Tally, corpus_files
from train.first_prompts import first_prompts, prompt_ids

PASS = 256  # tokens of a text that run through target and draft at a time
SURE = 0.98  # nothing is surer than that
DOUBT = 8.0  # answers that what is known beforehand weighs as much as


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="+", type=Path, metavar="PROMPTS", help="conversation files or folders")
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder of the target")
    parser.add_argument(
        "--draft", metavar="NAME", help="a draft's name or folder (default: the first that the checkpoint had)"
    )
    parser.add_argument("--draft-vocab", metavar="N", help="V', a number, full or a share (default: as users get it)")
    parser.add_argument("--answers", type=int, default=100, metavar="N", help="that are looked at (default: 100)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=96, metavar="N", help="of an answer, at most (default: 96)"
    )


def run(args: argparse.Namespace) -> None:
    for flag in ("answers", "max_new_tokens"):
        if getattr(args, flag) < 2:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)} must be at least 2")
    checkpoint = Checkpoint.open(args.ckpt)
    folder = checkpoint.draft_folder(args.draft)
    if folder is None:
        raise UserError(f"{args.ckpt} holds no draft; name one with --draft")
    check_writable(folder, f"--draft {folder}")
    with folder_lock(folder, f"--draft {folder}"):
        fit(args, checkpoint, folder)


def fit(args: argparse.Namespace, checkpoint: Checkpoint, folder: Path) -> None:
    """Look at the answers to prompts, and write what was found beside a draft."""
    model = api.load(checkpoint, Draft(str(folder), args.draft_vocab, pace="auto"))
    request = Request(args.max_new_tokens)
    tally = Tally()
    prompts = itertools.islice(fitting(model, corpus_files(args.prompts), request, tally), args.answers)
    seen = Seen(model)
    for ids in track(prompts, "answers", args.answers, console=Console(stderr=True)):
        seen.look_at(ids, request)
    if not seen.places:
        raise UserError("the prompts hold no conversation that fits --context; give others")
    file = pace_tables.write_odds(folder, seen.fitted())
    print(f"wrote {file}: {seen.places:,} places of {seen.answers} answers")
    tally.tell()


def fitting(model: Generator, files: list[Path], request: Request, tally: Tally) -> Iterator[np.ndarray]:
    """First turns of conversations that leave room for an answer, as token ids; tally: counts those that do not."""
    room = min(model.runtime.context, 4 * PASS) - request.max_new_tokens
    for prompt in first_prompts(files, tally):
        ids = prompt_ids(prompt, model.checkpoint, tally)
        if len(ids) > room:
            tally.leave_out(f"their prompts are longer than {room} tokens", prompt.where)
        elif ids:
            yield np.asarray(ids, np.int32)


class Seen:
    """What was proposed at the places of answers, and what of it was right."""

    def __init__(self, model: Generator) -> None:
        pace = model.drafting.pace
        assert pace is not None
        self.model, self.places, self.answers = model, 0, 0
        self.by_level = model.drafting.drafter.by_level(pace.growth)
        self.tokens = model.tree.depth
        # Proposals and hits: by level and grid point, and by length of match and place in the chain.
        self.beam = np.zeros((2, len(self.by_level), len(GRID)))
        self.chain = np.zeros((2, lookup.LONGEST + 1, self.tokens))

    def look_at(self, prompt: np.ndarray, request: Request) -> None:
        """Answer a prompt, and see what is proposed at each place of the answer."""
        model = self.model
        answer = model.generate_ids(prompt, request).tokens
        text = np.concatenate([prompt, np.asarray(answer, np.int32)])
        count = len(text) - 1  # tokens that another follows
        if count <= len(prompt):
            return
        plan, room = model.plan(), 4 * PASS + PASS
        tokens = np.zeros(-(-count // PASS) * PASS + 1, np.int32)
        tokens[: len(text)] = text
        with jax.enable_x64(False):
            caches, parts = new_caches(plan, room, model.runtime.dtype), []
            for first in range(0, len(tokens) - 1, PASS):
                asked = np.int32(np.clip(len(prompt) - first, 0, PASS))
                features, caches = _passed(
                    plan, model.weights, caches, tokens[first : first + PASS + 1], np.int32(first), asked
                )
                parts.append(features)
            features = jnp.concatenate(parts)
            known = np.full(room + 1, -1, np.int32)
            known[1 : len(text)] = text[1:]
            memory = caches.draft
            # As in decoding: what a drafter writes for a tree is written over when the next token is taken in.
            for place in range(len(prompt), count):
                row = features[place - 1 : place]
                offered, chain, memory = _proposed(
                    plan, model.weights, row, known[place : place + 1], np.int32(place), known, memory
                )
                self._count(jax.tree.map(np.asarray, (offered, chain)), text[place + 1 :])
        self.answers += 1

    def _count(self, proposed: tuple[Candidates, lookup.Chain], following: np.ndarray) -> None:
        """What was right; following: the tokens that came after the root."""
        candidates, chain = proposed
        self.places += 1
        right = np.zeros(candidates.count, bool)
        first = 0
        for level, many in enumerate(self.by_level[: len(following)]):
            here = np.arange(first, first + many)
            parent = candidates.parent[here]
            counted = here[(parent < 0) | right[np.maximum(parent, 0)]]
            above = np.where(candidates.parent[counted] < 0, 0.0, candidates.scores[candidates.parent[counted]])
            chance = np.exp(candidates.scores[counted] - above)
            right[counted] = candidates.tokens[counted] == following[level]
            point = np.abs(chance[:, None] - GRID).argmin(-1)
            np.add.at(self.beam[0, level], point, 1)
            np.add.at(self.beam[1, level], point, right[counted])
            first += many
        for place, token in enumerate(chain.tokens[: len(following)]):
            self.chain[0, chain.match, place] += 1
            if token != following[place]:
                break
            self.chain[1, chain.match, place] += 1

    def fitted(self) -> Fitted:
        """The odds: shares of what was right, drawn towards those of all levels or places together where few were."""
        beam = [rising(_drawn(row, _drawn(self.beam.sum(1), GRID))) for row in self.beam.transpose(1, 0, 2)]
        of_match = rising(_drawn(self.chain.sum(-1), np.linspace(0, 0.8, lookup.LONGEST + 1)))
        chain = np.stack([rising(_drawn(column, of_match)) for column in self.chain.transpose(2, 0, 1)], -1)
        chain[0] = 0.0
        model = self.model
        about = {
            "places": self.places,
            "answers": self.answers,
            "draft_vocab": model.draft_vocab,
            "context_slots": model.context_slots,
        }
        return Fitted(_rounded(np.stack(beam)), _rounded(chain), about)


def _drawn(counts: np.ndarray, before: Any) -> np.ndarray:
    """Hits over proposals, counts [2, N], where `before` [N] is what is believed beforehand."""
    return (counts[1] + DOUBT * np.asarray(before)) / (counts[0] + DOUBT)


def rising(values: np.ndarray) -> np.ndarray:
    """The nearest values that never fall, [N]: neighbours that do are averaged."""
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([float(value), 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [[(a * m + b * n) / (m + n), m + n]]
    return np.concatenate([[value] * int(many) for value, many in blocks])


def _rounded(table: np.ndarray) -> list[list[float]]:
    return np.minimum(table, SURE).round(3).tolist()


@functools.partial(jax.jit, static_argnames=("plan",), donate_argnames=("caches",), compiler_options=EXACT)
def _passed(
    plan: Plan, weights: Weights, caches: Caches, tokens: Array, first: Array, asked: Array
) -> tuple[Array, Caches]:
    """Run part of a text through target and draft: features [PASS, ...]; tokens: [PASS + 1], `asked` of the prompt."""
    where = Placement.chain(first, PASS)
    features, target = llama.forward(
        weights.target, plan.config, tokens[:-1], where, caches.target, kernels=plan.kernels, taps=plan.drafter.taps
    )
    draft = plan.drafter.prefill(weights.draft, features, tokens, first, asked, caches.draft)
    return features, Caches(target, draft, caches.text)


@functools.partial(jax.jit, static_argnames=("plan",), donate_argnames=("memory",), compiler_options=EXACT)
def _proposed(
    plan: Plan,
    weights: Weights,
    feature: Array,
    root: Array,
    place: Array,
    text: Array,
    memory: DraftMemory,
) -> tuple[Candidates, lookup.Chain, DraftMemory]:
    """What is proposed below the root [1] at `place`, where the target made `feature` [1, ...] of the token before."""
    assert plan.pace is not None
    turn = Turn(Accepted(feature, root, jnp.int32(1)), root[0], place, text)
    lead, memory = plan.drafter.take_in(weights.draft, turn, memory)
    candidates, _, memory = plan.drafter.offer(weights.draft, plan.pace.growth, lead, turn, memory, ALL_THE_WAY)
    return candidates, lookup.chain(text, place, plan.tree.depth), memory
