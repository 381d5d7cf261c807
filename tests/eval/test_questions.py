"""Question sets, sizes of sub-vocabularies, and what is made of results."""

from __future__ import annotations

import json

import pytest

from eval.__main__ import main
from eval.commands.accept import Answer, show, summary
from eval.commands.flags import _size
from eval.data.questions import TASKS, Question, read_questions, spread
from frspec_jax.api import Result
from frspec_jax.errors import UserError
from frspec_jax.records import COMPRESSIONS
from tests.support.corpora import write


def test_the_sample_holds_every_task():
    questions = read_questions(None)
    assert {q.task for q in questions} == set(TASKS)
    assert {len(q.turns) for q in questions} == {1, 2}
    assert all(q.turns and all(turn.strip() for turn in q.turns) for q in questions)


def test_questions_are_read_and_refused_by_line(tmp_path):
    file = tmp_path / "question.jsonl"
    row = {"question_id": 7, "category": "coding", "turns": ["a", "b"]}
    file.write_text(json.dumps(row) + "\n")
    assert read_questions(tmp_path) == read_questions(file) == [Question(7, "Conv", ("a", "b"))]
    file.write_text(json.dumps(row) + "\n{}\n")
    with pytest.raises(UserError, match="line 2"):
        read_questions(file)
    with pytest.raises(UserError, match=r"data .* cannot be read"):
        read_questions(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_prompts_of_every_form_are_questions(tmp_path, kind, compression):
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    rows = [
        {"id": "q1", "prompt": "a"},
        {"messages": [{"role": "system", "content": "Be brief."}, *said], "category": "qa"},
        {"instruction": "a", "task": "Summ"},
    ]
    questions = read_questions(write(tmp_path, rows, kind, compression))
    assert [(q.key, q.turns, q.system) for q in questions] == [
        ("Conv/1", ("a",), ""),
        ("QA/2", ("a", "c"), "Be brief."),
        ("Summ/3", ("a",), ""),
    ]
    assert [q.id for q in questions] == ["q1", None, None]
    assert questions[1].first == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 'a part of type "image_url"'),
        ({"prompt": "a", "tools": [{}]}, "tools cannot be measured"),
        ({"messages": [{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}]}, "a turn of tool cannot"),
        (["a"], "line 2: no question of"),
    ],
)
def test_what_cannot_be_measured_is_named_by_its_line(tmp_path, row, said):
    file = write(tmp_path, [{"prompt": "a"}, row], ".jsonl")
    with pytest.raises(UserError, match=rf"data .*, line 2: .*{said}" if "line" not in said else said):
        read_questions(file)


def test_questions_are_spread_evenly_over_tasks():
    questions = [Question(n, task, ("x",)) for n, task in enumerate(["MT"] * 10 + ["QA"] * 10 + ["RAG"] * 2)]
    chosen = spread(questions, 8)
    assert [q.task for q in chosen] == ["MT"] * 3 + ["QA"] * 3 + ["RAG"] * 2
    assert [q.number for q in chosen[:3]] == [0, 3, 6]
    assert len(spread(questions, 100)) == 22


FIGURES = ("accept", "demo", "frequency", "identical", "loops", "speed", "stages", "tune")
PLOTTED = ("frequency", "loops", "quality", "report", "run", "stages", "draft-tree", "tune")


@pytest.mark.parametrize("command, flag", [*((c, "--json") for c in FIGURES), *((c, "--out") for c in PLOTTED)])
def test_what_cannot_be_written_is_refused_first(command, flag, tmp_path, capsys):
    """Before the checkpoint is looked at, and long before the measurement whose figures would be lost."""
    (tmp_path / "file").write_text("")
    rest = {
        "frequency": ["x.npz"],
        "report": ["RUN"],
        "stages": ["tiny"],
        "draft-tree": ["--prompt", "x"],
        "quality": ["--data", "x"],
    }.get(command, [])
    for place in (tmp_path / "file" / "below", "/proc/no/x"):
        with pytest.raises(SystemExit) as stop:
            main([command, *rest, flag, str(place)])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith(f"error: {flag} {place} cannot be written: ")
    if flag == "--json":
        with pytest.raises(SystemExit):
            main([command, *rest, flag, str(tmp_path)])
        assert f"--json {tmp_path} is a folder; name a file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_sizes():
    assert [_size(text, 1200) for text in ("full", "1/4", "32")] == ["full", 300, 32]
    for text in ("quarter", "1/0", "-3", ""):
        with pytest.raises(UserError, match=r"Draft\.vocab"):
            _size(text, 1200)


def result(histogram):
    tokens = sum(n * (i + 1) for i, n in enumerate(histogram)) + 1
    return Answer(
        Result("", [0] * tokens, 1, "stop", "eagle", 8, sum(histogram), None, histogram, 1.0, 1.0), tokens - 1
    )


def test_accepted_length_is_pooled_over_rounds():
    found = summary({"QA": [result([1, 0, 1]), result([2, 0, 0])], "MT": [result([0, 4, 0])]})
    assert found["accepted_length"] == {"QA": 1.5, "MT": 2.0}
    assert found["average"] == 1.75
    assert found["histogram"] == [3, 4, 1]
    assert found["acceptance_by_depth"] == [0.625, 0.2]
    assert found["coverage"] == round(14 / 17, 4)


def test_tables_in_a_pipe_are_whole(monkeypatch, capsys):
    """A file has no width: there, no cell may be cut to what would fit a terminal of 80 columns."""
    monkeypatch.delenv("COLUMNS", raising=False)
    row = {"name": "FR-Spec 32,768 (conversation)", "average": 2.5, "coverage": 0.941}
    row |= {"draft_vocab": 32768, "context_slots": 512}
    show({"questions": 7, "methods": [row | {"accepted_length": dict.fromkeys(TASKS, 2.5)}]})
    said = capsys.readouterr().out
    assert row["name"] in said and "33,280" in said and "94.1%" in said and "…" not in said
