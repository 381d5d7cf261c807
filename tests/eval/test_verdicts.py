"""What answers say, in the forms in which models give them: the code, and the number."""

from __future__ import annotations

import pytest

from eval.data.problems import Problem
from eval.data.verdicts import code_of, fenced, number_of

STUB = 'from typing import List\n\n\ndef twice(xs: List[int]) -> List[int]:\n    """Twice each number."""\n'
BODY = "    return [2 * x for x in xs]\n"
GOOD = f"from typing import List\n\ndef twice(xs: List[int]) -> List[int]:\n{BODY}"
DRAFT = "def twice(xs):\n    return xs\n"
F = "```"
TWICE = Problem(
    "HumanEval/0", "HumanEval", "", stub=STUB, entry="twice", test="def check(f):\n    assert f([1, 2]) == [2, 4]\n"
)

CODE = {
    "one block": f"{F}python\n{GOOD}{F}",
    "shell block first": f"No packages:\n{F}bash\npython --version\n{F}\n\n{F}python\n{GOOD}{F}\n",
    "a call first": f"Called so:\n{F}python\nprint(len([1, 2]))\n{F}\nThe function:\n{F}python\n{GOOD}{F}\n",
    "a call behind": f"{F}python\n{GOOD}{F}\nCalled so:\n{F}python\nprint(len([1, 2]))\n{F}\n",
    "corrected": f"First:\n{F}python\n{DRAFT}{F}\nThat forgets to double:\n{F}python\n{GOOD}{F}\n",
    "corrected, and cut off in a third try": f"{F}\n{GOOD}{F}\nShorter:\n{F}\ndef twice(xs):\n    return [2 *",
    "a thought with a draft": f"<think>\n{F}python\n{DRAFT}{F}\nno.\n</think>\n{F}python\n{GOOD}{F}\n",
    "no fence, a sentence behind": f"{GOOD}\nThis doubles each number, and leaves an empty list empty.\n",
    "no fence, a sentence before": f"Here is the function:\n\n{GOOD}",
    "tildes": f"~~~python\n{GOOD}~~~\n",
    "in a list": "1. Solution:\n   " + f"{F}python\n{GOOD}{F}".replace("\n", "\n   "),
    "behind a list's number": f"1. {F}python\n   " + GOOD.replace("\n", "\n   ") + F,
    "four backticks": f"{F}`python\n{GOOD}{F}`\n",
    "lines of Windows": f"{F}python\n{GOOD}{F}".replace("\n", "\r\n"),
    "a fence behind the last line": f"{F}python\n{GOOD.rstrip()}{F}",
    "a body": f"{F}python\n{BODY}{F}",
    "a body and a call": f"{F}python\n{BODY}{F}\nSo:\n{F}\nprint(2)\n{F}",
    "a body without a fence, a sentence behind": f"{BODY}\nThat is all.",
    "an assignment": f"{F}python\ntwice = lambda xs: [2 * x for x in xs]\n{F}",
    "cut off in a comment": f"{F}python\n{GOOD}# and",
}


@pytest.mark.parametrize("form", CODE)
def test_the_code_of_an_answer_is_found(form):
    space: dict = {}
    exec(TWICE.program(CODE[form]), space)  # our own text, which does no harm
    assert space["twice"]([1]) == [2]


@pytest.mark.parametrize("text", [f"{F}\n{DRAFT}{F}", "I cannot do that.", "", f"{F}\n{F}"])
def test_what_is_wrong_or_missing_fails(text):
    with pytest.raises((AssertionError, TypeError, SyntaxError)):
        exec(TWICE.program(text), {})


def test_blocks_are_moved_to_the_margin_of_their_fence():
    text = "a\n  ```py\n  b\n    c\n d\n  ```\n~~~\n```\ne\n```\n~~~\n"
    assert list(fenced(text)) == ["b\n  c\nd\n", "```\ne\n```\n"]
    assert code_of("plain", "f") == "plain\n"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 and 4.\nThe answer is 1,234.", "1234"),
        ("it is -2.5", "-2.5"),
        ("$18", "18"),
        ("none", None),
        ("", None),
        ("The total is 72 clips, altogether.", "72"),
        ("The answer is **18**.", "18"),
        ("The answer is:\n\n**18**", "18"),
        ("The answer is $29.00.", "29.00"),
        (r"The answer is $\boxed{1{,}234}$.", "1234"),
        (r"So $\boxed{\text{18 apples}}$, of 20.", "18"),
        (r"The answer is 1\,234.", "1234"),
        ("The answer is 1\u202f234.", "1234"),
        ("The answer is 25 m^2.", "25"),
        ("it takes 25 cm2", "25"),
        ("it takes $25 m^{2}$", "25"),
        ("it takes 25 m²", "25"),
        ("The answer is 40%.", "40"),
        ("The answer is 40.\n\nNote: this assumes 7 days in a week.", "40"),
        ("The answer is 40.\n\nQuestion: 3 cows and 4?\nThe answer is 7.", "40"),
        ("#### 40\n\nQuestion: 3 cows and 4?\n#### 7", "40"),
        ("The final answer is 40 of 50.", "40"),
        ("The answer is not clear yet.\nThe answer is 5.", "5"),
        ("<think>The answer is 3.</think>The answer is 4.", "4"),
        ("The answer is \u22123.", "-3"),
        ("The answer is - 3.", "-3"),
        ("20-5=15", "15"),
        ("The answer is 20 - 5 = 15.", "15"),
        ("The answer is １８.", "１８"),
    ],
)
def test_the_number_that_an_answer_states(text, number):
    assert number_of(text) == number
