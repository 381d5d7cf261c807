"""`python -m eval quality`: reading answers, running code shut in, and the table; what is run, and what is not."""

from __future__ import annotations

import csv
import gzip
import json
import subprocess
import sys

import pytest

from eval.__main__ import main
from eval.commands import quality
from eval.data.problems import Problem, read_problems
from eval.data.questions import read_questions
from eval.sandbox import inside, judge
from frspec_jax.api import Generator
from frspec_jax.errors import UserError

STUB = 'import math\n\n\ndef helper(x):\n    return x\n\n\ndef area(r: float) -> float:\n    """Of a circle.\n    """\n'
TEST = "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-3\n"
AREA = Problem("HumanEval/0", "HumanEval", "", stub=STUB, entry="area", test=TEST)


@pytest.fixture(scope="module")
def ckpt(toy_folder):
    return toy_folder.path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "humaneval").mkdir()
    (folder / "gsm8k").mkdir()
    code = {"task_id": "HumanEval/7", "prompt": STUB, "entry_point": "area", "test": TEST}
    (folder / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress((json.dumps(code) + "\n").encode()))
    sums = [{"question": "One and one?", "answer": "1+1=2\n#### 2"}, {"question": "Much?", "answer": "#### 1,200"}]
    (folder / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    return folder


@pytest.fixture(scope="module")
def shut_in():
    """Skips where the system does not let a process leave the network."""
    try:
        judge.check()
    except UserError as reason:
        pytest.skip(str(reason))


def evaluate(*argv):
    main(["quality", *map(str, argv)])


# Answers ------------------------------------------------------------------------------------------


def test_problems_are_read_as_published(data, tmp_path):
    code, first, second = read_problems(data)
    assert (code.key, code.task, code.entry) == ("HumanEval/7", "HumanEval", "area") and STUB in code.prompt
    assert (first.key, first.answer, second.answer) == ("GSM8K/0", "2", "1200")
    with pytest.raises(UserError, match="holds neither"):
        read_problems(tmp_path)
    (tmp_path / "test.jsonl").write_text('{"question": "x", "answer": "no number"}\n')
    with pytest.raises(UserError, match="line 1"):
        read_problems(tmp_path)


def test_maths_is_judged_by_value():
    problem = Problem("GSM8K/0", "GSM8K", "", answer="18")
    assert problem.solved("The answer is 18.") and problem.solved("18.0") and problem.solved("**$18**")
    assert not problem.solved("18, no: 19") and not problem.solved("eighteen")


BODY = "    return math.pi * r**2\n"


@pytest.mark.parametrize(
    "text",
    [
        f"```python\ndef area(r):\n{BODY}```\nThis is it.",
        f"Here:\n```\nimport math\ndef area(r):\n{BODY}",  # the block was cut off
        BODY,  # only the body
        f"```python\n{BODY}```",
    ],
)
@pytest.mark.usefixtures("shut_in")
def test_right_code_passes_however_it_is_given(text):
    assert judge.passes(AREA.program(text))


@pytest.mark.parametrize(
    "text", ["    return 3\n", "```python\ndef other(r):\n    return 3.14159\n```", "I cannot do that.", ""]
)
@pytest.mark.usefixtures("shut_in")
def test_wrong_code_fails(text):
    assert not judge.passes(AREA.program(text))


@pytest.mark.parametrize(
    "ends",
    ["print(area(float(input())))", "sys.exit(0)", "import doctest, sys\n    sys.exit(doctest.testmod().failed + 1)"],
)
@pytest.mark.usefixtures("shut_in")
def test_what_a_file_does_when_it_is_run_is_not_judged(ends):
    guard = f'if __name__ == "__main__":\n    {ends}\n'
    assert judge.passes(AREA.program(f"```python\nimport sys\ndef area(r):\n{BODY}\n{guard}```"))


@pytest.mark.parametrize("modules", ["queue, threading, uuid", "array, abc, contextlib, inspect", "bisect, secrets"])
@pytest.mark.usefixtures("shut_in")
def test_the_usual_modules_can_be_imported(modules):
    assert judge.passes(AREA.program(f"```python\nimport {modules}\ndef area(r):\n{BODY}```"))


@pytest.mark.usefixtures("shut_in")
def test_a_standard_library_that_only_root_reads_is_said(monkeypatch, capsys):
    monkeypatch.setattr(judge, "RARE", "import no_such_module")
    judge.check()
    assert "is not readable for everybody; answers that import others count as wrong" in capsys.readouterr().err


@pytest.mark.usefixtures("shut_in")
def test_the_samples_own_solutions_pass():
    """The functions that ship in the sample are right, and what is not is found."""
    from importlib import resources

    rows = map(json.loads, resources.files("eval").joinpath("data/sample.jsonl").read_text("utf-8").splitlines())
    codes = [row for row in rows if "task_id" in row]
    assert len(codes) == sum(question.task == "Code" for question in read_questions(None)) == 2
    for row in codes:
        problem = Problem("x", "HumanEval", "", stub=row["prompt"], entry=row["entry_point"], test=row["test"])
        assert judge.passes(problem.program(row["canonical_solution"]))
        assert not judge.passes(problem.program("    return None\n"))


# The sandbox --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        "raise SystemExit(0)",
        "import os; os._exit(0)",
        "while True: pass",
        "x = bytearray(3 * 10**9)",
        "def f(): return f()\nf()",
        "import socket; socket.socket()",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import os; os.kill(1, 0)",
        "import ctypes; ctypes.CDLL(None)",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.setuid(0) or os.rmdir('/absent')",
    ],
)
@pytest.mark.usefixtures("shut_in")
def test_what_a_program_may_not_do(program):
    assert not judge.passes(program, seconds=3, megabytes=512)


@pytest.mark.usefixtures("shut_in")
def test_a_program_writes_and_removes_nothing(tmp_path):
    file = tmp_path / "kept"
    file.write_text("as it was")
    tmp_path.chmod(0o777)
    for code in (
        f"open({str(file)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'x')",
        f"import os; os.remove({str(file)!r})",
        f"import os; os.truncate({str(file)!r}, 0)",
        f"import os; os.open({str(file)!r}, os.O_WRONLY | os.O_TRUNC)",
        f"import pathlib; pathlib.Path({str(file)!r}).unlink()",
    ):
        assert not judge.passes(code)
    assert [p.name for p in tmp_path.iterdir()] == ["kept"] and file.read_text() == "as it was"


@pytest.mark.usefixtures("shut_in")
def test_there_is_no_network_even_without_the_guard():
    """The namespace alone: only a loopback interface is left, and it is down."""
    code = f"import sys; sys.path.insert(0, {str(judge.CHILD.parent)!r}); import inside, socket\n"
    code += "inside.leave_network(); print([name for _, name in socket.if_nameindex()])\n"
    code += "try: socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError as error: print(error.errno)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    import errno

    assert done.stdout.split("\n")[:2] == ["['lo']", str(errno.ENETUNREACH)], done


def test_a_system_without_namespaces_is_refused(monkeypatch):
    monkeypatch.setattr(judge, "MODULES", "raise OSError('it cannot leave the network')")
    with pytest.raises(UserError, match=r"execute .* cannot leave the network"):
        judge.check()


def test_only_reading_modes_are_let_through():
    inside.guard("open", ("x", "rb", 0))
    for event, arguments in (("open", ("x", "r+", 0)), ("open", ("x", None, 1)), ("socket.connect", ())):
        with pytest.raises(PermissionError):
            inside.guard(event, arguments)


# The command --------------------------------------------------------------------------------------


def command(ckpt, data, out):
    return ["--ckpt", ckpt, "--data", data, "--out", out, "--max-new-tokens", "8", "--seeds", "2"]


def table(out):
    with (out / "quality.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("shut_in")
def test_answers_are_kept_and_code_runs_only_when_asked_to(ckpt, data, tmp_path, monkeypatch, capsys):
    def never(*_):
        raise AssertionError("code was run")

    out = tmp_path / "run"
    monkeypatch.setattr(judge, "_run", never)
    evaluate(*command(ckpt, data, out))
    assert "were not run" in capsys.readouterr().out
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * (1 + 2)  # three problems: greedy, and two seeds
    assert all(len(set(line["answers"].values())) == 1 and len(line["answers"]) == 2 for line in lines)
    rows = table(out)
    assert [(row["Benchmark"], row["Temperature"], row["Problems"]) for row in rows] == [
        ("HumanEval", "0", "–"),
        ("HumanEval", "1", "–"),
        ("GSM8K", "0", "2"),
        ("GSM8K", "1", "2"),
    ]
    assert rows[0]["ours: vanilla"] == quality.NOT_JUDGED and rows[0]["paper: engine FR-Spec"] == "58.5"
    assert rows[3]["paper: transformers EAGLE-2"] == "66.5 ± 2.9" and " ± " in rows[3]["ours: vanilla"]
    # The same command asks nothing again; with --execute it judges what is there.
    monkeypatch.undo()
    monkeypatch.setattr(Generator, "generate_ids", never)
    evaluate(*command(ckpt, data, out), "--execute")
    assert table(out)[0]["ours: vanilla"] == "0.0" and table(out)[0]["Problems"] == "1"


def test_scores_are_by_seed():
    problems = {
        "GSM8K/0": Problem("GSM8K/0", "GSM8K", "", answer="2"),
        "GSM8K/1": Problem("GSM8K/1", "GSM8K", "", answer="3"),
    }
    lines = [
        {"problem": key, "temperature": 1.0, "repeat": seed, "answers": {"vanilla": text}}
        for key, seed, text in (("GSM8K/0", 0, "2"), ("GSM8K/1", 0, "3"), ("GSM8K/0", 1, "2"), ("GSM8K/1", 1, "4"))
    ]
    scores = quality.judged(lines, problems, execute=False)
    assert quality.percent(scores["GSM8K", 1.0]["vanilla"]) == "75.0 ± 35.4"
    assert quality.percent({0: [True, False, False]}) == "33.3"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--temperature", "0,warm"), "--temperature 0,warm"),
        (("--temperature", "-1"), "--temperature -1"),
        (("--seeds", "0"), "--seeds 0"),
        (("--peer", "absent"), "--peer absent is no file"),
        (("--questions", "0"), "--questions 0"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0"),
    ],
)
def test_refusals(ckpt, data, tmp_path, capsys, flags, words):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        evaluate(*command(ckpt, data, out), *flags)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and words in captured.err and not out.exists()
