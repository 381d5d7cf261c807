"""Question sets as they are published: Spec-Bench (arXiv 2401.07851) and HumanEval; and a small sample of our own."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, TypeVar

from frspec_jax import json_lines
from frspec_jax.errors import UserError

TASKS = ("MT", "Conv", "RAG", "Math", "QA", "Summ", "Code")  # the paper's columns, in its order
CONVERSATION = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities", "mt_bench"}
CATEGORIES = {
    **dict.fromkeys(CONVERSATION, "Conv"),
    "translation": "MT",
    "summarization": "Summ",
    "qa": "QA",
    "math_reasoning": "Math",
    "rag": "RAG",
}
# Where the published files lie below a folder, either as their projects lay them out or side by side.
PUBLISHED = (
    ("spec_bench/question.jsonl", "question.jsonl"),
    ("humaneval/HumanEval.jsonl.gz", "HumanEval.jsonl.gz", "HumanEval.jsonl"),
)
CODE_PROMPT = "Complete this Python function. Answer with the whole function in one code block.\n\n```python\n{}```"


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a set; a conversation has two turns."""

    number: int
    task: str  # one of TASKS
    turns: tuple[str, ...]

    @property
    def key(self) -> str:
        """The question's name among those of all tasks, such as "Conv/81"."""
        return f"{self.task}/{self.number}"


def read_questions(path: Path | None) -> list[Question]:
    """The questions of a file, of a folder that holds the published files, or of the sample that ships.

    A file is Spec-Bench's `question.jsonl` or HumanEval's `HumanEval.jsonl`, plain or gzipped; a
    folder holds one or both, see PUBLISHED.

    Raises:
      UserError: naming the file and the line that cannot be read.
    """
    if path is None:
        sample = resources.files("eval").joinpath("data/sample.jsonl").read_text("utf-8")
        return _parse(sample, Path("sample.jsonl"))
    if not path.is_dir():
        return _parse(read_text(path), path)
    found = [next((path / name for name in names if (path / name).is_file()), None) for names in PUBLISHED]
    files = [file for file in found if file is not None]
    if not files:
        raise UserError(f"--data {path} holds neither {PUBLISHED[0][0]} nor {PUBLISHED[1][0]}; bring one of them")
    return [question for file in files for question in _parse(read_text(file), file)]


def read_text(file: Path) -> str:
    """The text of a data file, plain or gzipped."""
    try:
        data = file.read_bytes()
        return (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged, or no UTF-8 text"
        raise UserError(f"--data {file} cannot be read: {reason}") from None


def _parse(text: str, file: Path) -> list[Question]:
    questions = []
    for number, line in json_lines.numbered(text):
        try:
            questions.append(_question(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--data {file}, line {number}: no question of Spec-Bench's or HumanEval's format ({error})"
            ) from None
    if not questions:
        raise UserError(f"--data {file} holds no question")
    return questions


def _question(row: Mapping[str, Any]) -> Question:
    if "task_id" in row:  # HumanEval
        return Question(int(row["task_id"].rpartition("/")[2]), "Code", (CODE_PROMPT.format(row["prompt"]),))
    return Question(int(row["question_id"]), CATEGORIES[row["category"]], tuple(map(str, row["turns"])))


class Asked(Protocol):
    """What can be chosen from evenly: a `Question`, or a problem of `eval.problems`."""

    @property
    def task(self) -> str:
        """The group that it belongs to."""


Item = TypeVar("Item", bound=Asked)


def by_task(questions: Sequence[Item]) -> dict[str, list[Item]]:
    """The questions of each task, tasks in the order in which they are first met."""
    groups: dict[str, list[Item]] = {}
    for question in questions:
        groups.setdefault(question.task, []).append(question)
    return groups


def of_tasks(questions: list[Question], tasks: str | None) -> list[Question]:
    """Those of the tasks that --tasks names ("MT,QA"); all without it.

    Raises:
      UserError: a task that the set does not hold.
    """
    if tasks is None:
        return questions
    wanted, held = tasks.split(","), by_task(questions)
    for task in wanted:
        if task not in held:
            raise UserError(f"--tasks {task}: the question set has none of it; it holds {', '.join(held)}")
    return [question for question in questions if question.task in wanted]


def spread(questions: list[Item], count: int | None) -> list[Item]:
    """`count` of the questions, taken in turn from each task and evenly within it; all for None."""
    if count is None:
        return questions
    if count < 1:
        raise UserError(f"--questions {count} must be at least 1")
    tasks = list(by_task(questions).values())
    shares = [count // len(tasks) + (index < count % len(tasks)) for index in range(len(tasks))]
    chosen: list[Item] = []
    for group, share in zip(tasks, shares, strict=True):
        share = min(share, len(group))
        chosen += [group[i * len(group) // share] for i in range(share)]
    return chosen


def alternated(questions: Sequence[Item]) -> list[Item]:
    """One of each task in turn, so that a run which is cut short holds some of all."""
    rows = zip_longest(*by_task(questions).values())
    return [question for row in rows for question in row if question is not None]


def digest(questions: list[Question]) -> str:
    """A short name of a question set: its questions, their order and their wording."""
    text = json.dumps([[question.key, question.turns] for question in questions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
