"""Question sets as they are published: Spec-Bench (arXiv 2401.07851), HumanEval; prompts; and a sample of our own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol, TypeVar

from frspec_jax import prompts, records
from frspec_jax.errors import UserError, quoted
from frspec_jax.prompts import NoPrompt

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
    """One question of a set; a conversation has several turns."""

    number: int
    task: str  # one of TASKS
    turns: tuple[str, ...]
    system: str = ""  # the system message before them, if there is one
    id: Any = None  # the record's own, where it has one

    @property
    def key(self) -> str:
        """The question's name among those of all tasks, such as "Conv/81"."""
        return f"{self.task}/{self.number}"

    @property
    def opening(self) -> list[dict[str, str]]:
        """What stands before the first turn, as messages."""
        return [{"role": "system", "content": self.system}] if self.system else []

    @property
    def first(self) -> list[dict[str, str]]:
        """The first turn as messages."""
        return [*self.opening, {"role": "user", "content": self.turns[0]}]


def read_questions(path: Path | None) -> list[Question]:
    """The questions of a file, of a folder that holds the published files, or of the sample that ships.

    A file is Spec-Bench's `question.jsonl`, HumanEval's `HumanEval.jsonl`, or prompts of any of the forms of
    `frspec_jax.prompts`, in any of the formats of `frspec_jax.records`; a folder holds one or both of the first, see
    PUBLISHED.

    Raises:
      UserError: naming the file and the line that cannot be read.
    """
    if path is None:
        with resources.as_file(resources.files("eval").joinpath("data/sample.jsonl")) as sample:
            return _read(sample)
    if not path.is_dir():
        return _read(path)
    found = [next((path / name for name in names if (path / name).is_file()), None) for names in PUBLISHED]
    files = [file for file in found if file is not None]
    if not files:
        raise UserError(
            f"--data {quoted(path)} holds neither {PUBLISHED[0][0]} nor {PUBLISHED[1][0]}; bring one of them"
        )
    return [question for file in files for question in _read(file)]


def _read(file: Path) -> list[Question]:
    questions = []
    for row in records.read_rows(file, "--data"):
        try:
            questions.append(_question(row))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{records.named(file, '--data')}, {row.where}: no question of Spec-Bench's or HumanEval's format, nor "
                f"a prompt ({error})"
            ) from None
    if not questions:
        raise UserError(f"{records.named(file, '--data')} holds no question")
    return questions


def _question(row: records.Row) -> Question:
    value = row.value
    if "task_id" in value:  # HumanEval
        return Question(int(value["task_id"].rpartition("/")[2]), "Code", (CODE_PROMPT.format(value["prompt"]),))
    if "question_id" in value:  # Spec-Bench
        return Question(int(value["question_id"]), CATEGORIES[value["category"]], tuple(map(str, value["turns"])))
    asked = prompts.prompt_of(value)
    if prompts.tools_of(value):
        raise NoPrompt("tools cannot be measured; leave them out")
    said = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    system = "\n\n".join(one["content"] for one in said if one["role"] == "system")
    turns = tuple(one["content"] for one in said if one["role"] == "user")
    if other := next((one["role"] for one in said if one["role"] not in ("system", "user", "assistant")), None):
        raise NoPrompt(f"a turn of {other} cannot be measured; leave it out")
    task = value.get("category", value.get("task"))
    return Question(row.number, task if task in TASKS else CATEGORIES.get(task, "Conv"), turns, system, value.get("id"))


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
    # Of a question without a system message, as before there were any: a run that has begun can go on.
    text = json.dumps([[q.key, q.turns, *([q.system] if q.system else [])] for q in questions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
