"""One reader for prompts: every form in which they are published, as generate and train see it."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frspec_jax.errors import UserError
from frspec_jax.prompts import read_prompts
from train.answers import first_turns
from train.corpus import read_corpus

SAY = [{"role": "user", "content": "Say yes"}]
FORMS = [  # a record, the prompt that it is to generate, and the turns that it is to train
    ({"prompt": "Say yes"}, "Say yes", [("user", "Say yes")]),
    ({"prompt": "Say yes", "completion": "Yes."}, "Say yes", [("user", "Say yes"), ("assistant", "Yes.")]),
    ({"prompt": SAY, "response": "Yes."}, SAY, [("user", "Say yes"), ("assistant", "Yes.")]),
    ({"messages": SAY}, SAY, [("user", "Say yes")]),
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "yes"}]}
            ]
        },
        SAY,
        [("user", "Say yes")],
    ),
    (
        {"conversations": [{"from": "human", "value": "Say yes"}, {"from": "gpt", "value": "Yes."}]},
        SAY,
        [("user", "Say yes"), ("assistant", "Yes.")],
    ),
    (
        {"instruction": "Say yes", "input": "", "output": "Yes."},
        "Say yes",
        [("user", "Say yes"), ("assistant", "Yes.")],
    ),
    ({"instruction": "Say", "input": "yes", "output": ""}, "Say\n\nyes", [("user", "Say\n\nyes")]),
    ({"instruction": "Say yes"}, "Say yes", [("user", "Say yes")]),
]


@pytest.mark.parametrize(("row", "prompt", "turns"), FORMS)
def test_every_form_is_read_by_generate_and_by_train(tmp_path, row, prompt, turns):
    """With a byte order mark and the line ends of Windows, as its editors leave them, too."""
    for start, end in ((b"", b"\n"), (b"\xef\xbb\xbf", b"\r\n")):
        file = tmp_path / "a.jsonl"
        file.write_bytes(start + (json.dumps(row).encode() + end) * 2 + end)
        assert read_prompts(file) == [prompt] * 2
        assert [record.turns for record in read_corpus(file)] == [tuple(turns)] * 2
        assert list(first_turns([file])) == [turns[0][1]]
    pq.write_table(pa.Table.from_pylist([{"id": 1, **row}]), tmp_path / "a.parquet")
    assert [record.turns for record in read_corpus(tmp_path / "a.parquet")] == [tuple(turns)]


def test_a_text_is_one_prompt_without_its_byte_order_mark(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfSay\r\nyes")
    assert read_prompts(file) == ["Say\nyes"]


def test_messages_keep_the_roles_that_a_template_may_know(tmp_path):
    turns = [*SAY, {"role": "assistant", "content": None}, {"role": "tool", "content": "4", "name": "sum"}]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": turns}))
    assert read_prompts(file) == [[SAY[0], {"role": "assistant", "content": ""}, turns[2]]]


def test_a_prompt_goes_before_the_conversation_that_begins_with_it(tmp_path):
    file = tmp_path / "a.jsonl"
    answered = [*SAY, {"role": "assistant", "content": "Yes."}]
    file.write_text(json.dumps({"prompt": "Say yes", "messages": answered}))
    assert read_prompts(file) == ["Say yes"]
    assert [len(record.turns) for record in read_corpus(file)] == [2]  # which holds the answer


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "a"}\nno\n', "line 2: not JSON"),
        (b'{"body": "a"}', 'line 1: give "messages", "conversations", "prompt" or "instruction"'),
        (b"[1]", "line 1: give"),
        (b'{"prompt": 3}', "line 1: give"),
        (b'{"messages": [{"role": "user"}]}', "line 1: nothing is asked"),
        (b'{"messages": []}', "line 1: nothing is asked"),
        (b'{"conversations": [{"from": "gpt", "value": "Yes."}]}', "line 1: nothing is asked"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "line 1: .*leave out images"),
        (b'{"messages": [{"content": "a"}]}', "line 1: speaker None is not known"),
        (b"\n \r\n", "holds no prompt"),
        (b"caf\xe9", "it is not UTF-8 text"),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path, content, said):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"prompt_file .*a\.jsonl.*{said}"):
        read_prompts(tmp_path / "a.jsonl")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"prompt_file .*absent cannot be read: No such file"):
        read_prompts(tmp_path / "absent")
