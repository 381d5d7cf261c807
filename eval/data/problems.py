"""Problems with known answers, as they are published: HumanEval (arXiv 2107.03374), GSM8K (arXiv 2110.14168)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval.data.questions import CODE_PROMPT, PUBLISHED
from eval.data.verdicts import code_of, defines, number_of
from frspec_jax import records
from frspec_jax.errors import UserError

BENCHMARKS = ("HumanEval", "GSM8K")
GSM8K = ("gsm8k/test.jsonl", "test.jsonl")
MATHS_PROMPT = "{}\n\nThink step by step. End with a line that says: The answer is, and then the number."


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem: what is asked, and how an answer is judged."""

    key: str  # "HumanEval/0" or "GSM8K/0"
    task: str  # one of BENCHMARKS
    prompt: str
    answer: str = ""  # GSM8K: the number
    stub: str = ""  # HumanEval: the function's head, with what stands before it
    entry: str = ""  # HumanEval: the function's name
    test: str = ""  # HumanEval: code that defines check(candidate)

    def solved(self, text: str) -> bool:
        """Whether an answer to a GSM8K problem states the right number."""
        found = number_of(text)
        return found is not None and float(found) == float(self.answer)

    def program(self, text: str) -> str:
        """What must run to its end if an answer to a HumanEval problem is right."""
        code = code_of(text, self.entry, self.stub)
        head = self.stub
        if defines(code, self.entry):
            head = head[: head.rfind(f"def {self.entry}")]  # imports and helpers; the answer has the function whole
        return f"{head}{code}\n\n{self.test}\n\ncheck({self.entry})\n"


def read_problems(folder: Path) -> list[Problem]:
    """The problems of a folder that holds HumanEval, GSM8K or both.

    Raises:
      UserError: it holds neither, or a line cannot be read.
    """
    found: list[Problem] = []
    for names, parse in ((PUBLISHED[1], _human_eval), (GSM8K, _gsm8k)):
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is not None:
            found += _parse(file, parse)
    if not found:
        raise UserError(f"--data {folder} holds neither {PUBLISHED[1][0]} nor {GSM8K[0]}; bring one of them")
    return found


def _parse(file: Path, parse: Callable[[int, Any], Problem]) -> list[Problem]:
    found = []
    for row in records.read_rows(file, "--data"):
        try:
            found.append(parse(row.number, row.value))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            where = f"{records.named(file, '--data')}, {row.where}"
            raise UserError(f"{where}: not of the published format ({error})") from None
    return found


def _human_eval(_: int, row: Any) -> Problem:
    stub = row["prompt"]
    return Problem(
        f"HumanEval/{row['task_id'].rpartition('/')[2]}",
        "HumanEval",
        CODE_PROMPT.format(stub),
        stub=stub,
        entry=row["entry_point"],
        test=row["test"],
    )


def _gsm8k(number: int, row: Any) -> Problem:
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    float(answer)  # a line without its number is none of GSM8K's
    return Problem(f"GSM8K/{number - 1}", "GSM8K", MATHS_PROMPT.format(row["question"]), answer=answer)
