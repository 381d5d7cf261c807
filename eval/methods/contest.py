"""One question, answered by every method in turn: the figures that a record keeps of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable
from typing import Any

import numpy as np

from eval.data.questions import Question
from eval.methods import side_by_side
from eval.methods.peers import Peer
from frspec_jax.api import Generator, Reading, Request, Result
from frspec_jax.errors import UserError

PEERS = {"transformers": False, "transformers, prompt lookup": True}  # by whether prompt lookup assists
WARM_UP_TOKENS = 16


def first_prompt(vanilla: Generator, question: Question) -> np.ndarray:
    """A question's first turn as token ids [T]."""
    return vanilla.encode(question.first)


@dataclasses.dataclass(frozen=True)
class Contest:
    """The methods by name, vanilla among them, and the request that all of them are given."""

    models: dict[str, Generator]
    peer: Peer | None
    request: Request

    @functools.cached_property
    def _vocabularies(self) -> dict[str, np.ndarray]:
        """What each drafting method may propose: ids [V']."""
        return {name: side_by_side.draft_ids(m) for name, m in self.models.items() if m.draft_vocab is not None}

    @property
    def names(self) -> list[str]:
        """All methods, ours and the peer's."""
        return [*self.models, *(PEERS if self.peer else ())]

    def warm_up(self, question: Question) -> None:
        """Compile every method and run it once; nothing of this is recorded."""
        prompt = first_prompt(self.models["vanilla"], question)
        self._answers(self.names, prompt, WARM_UP_TOKENS)

    def ask(self, question: Question, turn: int) -> list[dict[str, Any]]:
        """Every method's figures for each turn of a question.

        A later turn sees vanilla's answers to those before it; one that no longer fits the context
        is left out.

        Args:
          turn: of the run; the methods begin with another one each time.
        """
        vanilla = self.models["vanilla"]
        messages = question.opening
        figures: list[dict[str, Any]] = []
        for text in question.turns:
            messages.append({"role": "user", "content": text})
            prompt = vanilla.encode(messages)
            try:
                # The largest tree leaves the least room; all methods are held to that.
                limit = min(model.check(prompt, self.request) for model in self.models.values())
            except UserError:
                if not figures:
                    raise
                break
            answers = self._answers(side_by_side.in_turn(self.names, turn), prompt, limit)
            figures.append({"prompt_tokens": len(prompt), "methods": self._compared(prompt, answers)})
            answer = vanilla.checkpoint.tokenizer.decode(answers["vanilla"]["tokens"], skip_special_tokens=True)
            messages.append({"role": "assistant", "content": answer})
        return figures

    def _answers(self, names: list[str], prompt: np.ndarray, limit: int) -> dict[str, dict[str, Any]]:
        """Each method's answer. Methods that differ in V' alone share one reading of the prompt."""
        request = dataclasses.replace(self.request, max_new_tokens=limit)
        readings: dict[Hashable, Reading] = {}
        answers = {}
        for name in names:
            if name in PEERS:
                assert self.peer is not None
                answers[name] = dataclasses.asdict(self.peer.answer(prompt, limit, lookup=PEERS[name]))
                continue
            answers[name] = self._figures(name, side_by_side.answer(self.models[name], prompt, request, readings))
        return answers

    def _figures(self, name: str, result: Result) -> dict[str, Any]:
        """What a record keeps of one of our answers."""
        figures = {
            "tokens": result.tokens,
            "first": 1,
            "rounds": result.rounds,
            "prefill_seconds": round(result.prefill_seconds, 6),
            "decode_seconds": round(result.decode_seconds, 6),
        }
        if result.draft_vocab is None:
            return figures
        inside = np.isin(result.tokens, self._vocabularies[name])
        return figures | {"histogram": result.accepted_histogram, "covered": int(inside.sum())}

    def _compared(self, prompt: np.ndarray, answers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The figures in the methods' own order, each held against vanilla's tokens.

        Tokens that equal vanilla's are not kept again; where a method's part from them, `parted`
        says at which token, and how near a tie the target's choice was there.
        """
        expected = answers["vanilla"]["tokens"]
        compared = {}
        for name in self.names:
            figures = answers[name] | {"emitted": len(answers[name]["tokens"])}
            if name != "vanilla" and figures["tokens"] == expected:
                del figures["tokens"]
            elif name != "vanilla":
                at = parting(figures["tokens"], expected)
                text = np.concatenate([prompt, np.asarray(expected[:at], np.int32)])
                figures["parted"] = {
                    "at": at,
                    "gap": side_by_side.choice_gap(self.models["vanilla"], text, self.request),
                }
            compared[name] = figures
        return compared


def parting(tokens: list[int], expected: list[int]) -> int:
    """The index of the first token in which two answers differ; of the shorter one's end, if it is the other's start.

    Two answers that are equal differ at their end.
    """
    shared = min(len(tokens), len(expected))
    return next((i for i in range(shared) if tokens[i] != expected[i]), shared)
