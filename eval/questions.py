"""Question sets in Spec-Bench's format (arXiv 2401.07851), and a small sample of our own."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path

from frspec_jax.errors import UserError

CONVERSATION = {
    "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities", "mt_bench"
}  # fmt: skip
TASKS = {
    **dict.fromkeys(CONVERSATION, "Conv"),
    "translation": "MT",
    "summarization": "Summ",
    "qa": "QA",
    "math_reasoning": "Math",
    "rag": "RAG",
}


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a set; a conversation has two turns."""

    number: int
    task: str  # MT, Conv, RAG, Math, QA or Summ
    turns: tuple[str, ...]


def read_questions(path: Path | None) -> list[Question]:
    """The questions of a Spec-Bench `question.jsonl` (or the folder that holds one), or the sample that ships.

    Raises:
      UserError: naming the file and the line that cannot be read.
    """
    if path is None:
        text, path = resources.files("eval").joinpath("data/sample.jsonl").read_text("utf-8"), Path("sample.jsonl")
    else:
        path = path / "question.jsonl" if path.is_dir() else path
        try:
            text = path.read_text("utf-8")
        except OSError as error:
            raise UserError(f"--data {path} cannot be read: {error.strerror}") from None
    questions = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
            questions.append(Question(int(row["question_id"]), TASKS[row["category"]], tuple(row["turns"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--data {path}, line {number}: no question of Spec-Bench's format ({error})") from None
    return questions


def spread(questions: list[Question], count: int) -> list[Question]:
    """`count` of the questions, taken in turn from each task and evenly within it."""
    by_task: dict[str, list[Question]] = {}
    for question in questions:
        by_task.setdefault(question.task, []).append(question)
    tasks = list(by_task.values())
    shares = [count // len(tasks) + (index < count % len(tasks)) for index in range(len(tasks))]
    chosen = []
    for group, share in zip(tasks, shares, strict=True):
        share = min(share, len(group))
        chosen += [group[i * len(group) // share] for i in range(share)]
    return chosen
