"""Measures over the records of a run: accepted length, coverage, speeds, and identity to vanilla.

Everything is pooled: tokens over rounds, tokens over seconds, not means of ratios by question. The
first token of an answer is the prefill's; it counts in `whole_rate` only. An average over tasks is
the mean of the tasks' figures, as in the paper.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.data.questions import TASKS
from eval.runs import records
from frspec_jax.errors import UserError

# Logits that lie closer than this may change places by rounding alone, by the weights' dtype.
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.25}
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Tally:
    """What one method did on some questions: one entry of each array a question, its turns and repeats summed."""

    decoded: np.ndarray  # tokens that came after the prefill
    emitted: np.ndarray  # all tokens
    rounds: np.ndarray
    decode_seconds: np.ndarray
    prefill_seconds: np.ndarray
    covered: np.ndarray  # emitted tokens inside the sub-vocabulary
    histogram: np.ndarray  # [D+1] rounds that emitted 1, 2, ... tokens; empty where nothing drafts
    gaps: np.ndarray  # the target's gap, one an answer that parted from vanilla's
    answers: int

    @property
    def accepted_length(self) -> float:
        """Tokens a round, the bonus token counted."""
        return float(self.decoded.sum() / max(1, int(self.rounds.sum())))

    @property
    def coverage(self) -> float:
        """The share of the emitted tokens that the draft could have proposed."""
        return float(self.covered.sum() / max(1, int(self.emitted.sum())))

    @property
    def decode_rate(self) -> float:
        """Tokens a second of decoding, prefill left out."""
        return float(self.decoded.sum() / max(1e-9, float(self.decode_seconds.sum())))

    @property
    def whole_rate(self) -> float:
        """Tokens a second of prefill and decoding together."""
        return float(self.emitted.sum() / max(1e-9, float(self.decode_seconds.sum() + self.prefill_seconds.sum())))

    def identity(self, tie: float) -> tuple[int, int, int]:
        """Answers identical to vanilla's, those that parted at a gap below `tie`, and those that differ."""
        near = int((self.gaps < tie).sum())
        return self.answers - len(self.gaps), near, len(self.gaps) - near


def acceptance_by_depth(histogram: np.ndarray) -> list[float]:
    """Of the rounds that accepted d - 1 drafts, the share that accepted the d-th too: d = 1 to D.

    histogram: [D+1] rounds that emitted 1, 2, ... tokens. A round that a stop id or the limit cut
    counts as it was emitted.
    """
    at_least = histogram[::-1].cumsum()[::-1]  # rounds that accepted at least 0, 1, ... drafts
    return [float(share) for share in at_least[1:] / np.maximum(1, at_least[:-1])]


def tally(lines: Sequence[Mapping[str, Any]], method: str) -> Tally:
    """Sum up a method's figures over records."""
    by_question: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        by_question.setdefault(line["question"], []).extend(turn["methods"][method] for turn in line["turns"])
    every = [answer for answers in by_question.values() for answer in answers]

    def summed(value: Any) -> np.ndarray:
        return np.array([sum(value(answer) for answer in answers) for answers in by_question.values()])

    histograms = [answer["histogram"] for answer in every if "histogram" in answer]
    return Tally(
        decoded=summed(lambda answer: answer["emitted"] - answer["first"]),
        emitted=summed(lambda answer: answer["emitted"]),
        rounds=summed(lambda answer: answer["rounds"]),
        decode_seconds=summed(lambda answer: answer["decode_seconds"]),
        prefill_seconds=summed(lambda answer: answer["prefill_seconds"]),
        covered=summed(lambda answer: answer.get("covered", 0)),
        histogram=np.sum(histograms, axis=0) if histograms else np.zeros(0, int),
        gaps=np.array([answer["parted"]["gap"] for answer in every if "parted" in answer]),
        answers=len(every),
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that was read back: its manifest, and its records."""

    name: str
    manifest: dict[str, Any]
    lines: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read RUN.

        Raises:
          UserError: the folder holds no run, or none of its questions is answered yet, or all in a single token.
        """
        manifest = records.read_manifest(folder)
        if manifest.get("kind") != "run":
            raise UserError(f"{folder} holds no run of python -m eval run; python -m eval quality reports on its own")
        lines = records.read_records(folder)
        if not lines:
            raise UserError(f"{folder} holds no answered question yet; let python -m eval run go on with it")
        read = cls(folder.resolve().name, manifest, lines)
        if not read.tasks:
            raise UserError(f"{folder} holds no answer longer than one token; run it with more --max-new-tokens")
        return read

    @property
    def model(self) -> str:
        """The checkpoint's name."""
        return self.manifest["checkpoint"]["name"]

    @property
    def vocabulary(self) -> int:
        """V, the full vocabulary's size."""
        return self.manifest["checkpoint"]["vocabulary"]

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """Every method's facts by name, in the order of the run; a peer's kind is "peer"."""
        names = list(self.lines[0]["turns"][0]["methods"])
        return {name: self.manifest["methods"].get(name, {"kind": "peer", "draft_vocab": None}) for name in names}

    @property
    def drafting(self) -> list[str]:
        """The methods of ours that draft."""
        return [name for name, facts in self.methods.items() if facts["kind"] not in ("vanilla", "peer")]

    @property
    def tasks(self) -> list[str]:
        """The tasks that were asked, in the paper's order; those whose answers took no round have no figures."""
        answers = ((line["task"], turn["methods"]["vanilla"]) for line in self.lines for turn in line["turns"])
        decoded = {task for task, answer in answers if answer["rounds"]}
        return [task for task in TASKS if task in decoded]

    @property
    def tie(self) -> float:
        """The gap below which the target's choice is a near-tie, for this run's dtype."""
        return NEAR_TIE[self.manifest["dtype"]]

    @functools.cached_property
    def tallies(self) -> dict[str, dict[str, Tally]]:
        """By method and task."""
        by_task = {task: [line for line in self.lines if line["task"] == task] for task in self.tasks}
        return {name: {task: tally(lines, name) for task, lines in by_task.items()} for name in self.methods}

    def whole(self, method: str) -> Tally:
        """A method's figures over all tasks."""
        return tally(self.lines, method)

    def rates_by_repeat(self, method: str) -> list[float]:
        """Decoding tokens/s of each repeat, pooled over the questions that every repeat has answered."""
        repeats = sorted({line["repeat"] for line in self.lines})
        answered = [{line["question"] for line in self.lines if line["repeat"] == number} for number in repeats]
        common = set.intersection(*answered)
        return [
            tally([x for x in self.lines if x["repeat"] == number and x["question"] in common], method).decode_rate
            for number in repeats
            if common
        ]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure, and the 95 % interval of its bootstrap."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """With the interval in brackets, where there is one: a single question has none."""
        return f"{self.value:.2f}" + (f" ({self.low:.2f} to {self.high:.2f})" if self.low < self.high else "")


def speed_ups(mine: Mapping[str, Tally], base: Mapping[str, Tally], seed: int = 0) -> dict[str, Interval]:
    """Decoding tokens/s over those of `base`, by task and as "Average" (the ratio of the tasks' mean rates).

    The interval resamples questions within each task, the same ones for both methods, so that an
    easy question is easy for both.
    """
    rng = np.random.default_rng(seed)
    found: dict[str, Interval] = {}
    sampled: list[tuple[np.ndarray, np.ndarray]] = []
    for task, one in mine.items():
        other, count = base[task], len(one.decoded)
        weights = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)  # [R, Q] how often each one is drawn
        fast, slow = (weights @ part.decoded / np.maximum(1e-9, weights @ part.decode_seconds) for part in (one, other))
        sampled.append((fast, slow))
        found[task] = _interval(one.decode_rate / max(1e-9, other.decode_rate), fast / np.maximum(1e-9, slow))
    fast, slow = (np.mean(column, axis=0) for column in zip(*sampled, strict=True))
    ratio = mean_rate(mine) / max(1e-9, mean_rate(base))
    found["Average"] = _interval(ratio, fast / np.maximum(1e-9, slow))
    return found


def mean_rate(tallies: Mapping[str, Tally]) -> float:
    """The mean over tasks of the decoding tokens/s."""
    return float(np.mean([part.decode_rate for part in tallies.values()]))


def _interval(value: float, sampled: np.ndarray) -> Interval:
    low, high = np.quantile(sampled, (0.025, 0.975)).tolist()
    return Interval(value, low, high)
