"""One reader for prompts: every form in which they are published, as generate and train see it."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from frspec_jax.errors import UserError
from frspec_jax.prompts import Asked, read_prompts
from frspec_jax.records import COMPRESSIONS
from tests.support.corpora import COMPRESS, write
from train.corpus import Tally, read_corpus
from train.first_prompts import first_prompts

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
        assert [asked.prompt for asked in read_prompts(file)] == [prompt] * 2
        assert [record.turns for record in read_corpus(file)] == [tuple(turns)] * 2
        assert [first.text for first in first_prompts([file], Tally())] == [turns[0][1]]
    pq.write_table(pa.Table.from_pylist([{"id": 1, **row}]), tmp_path / "a.parquet")
    assert [record.turns for record in read_corpus(tmp_path / "a.parquet")] == [tuple(turns)]


def test_a_text_is_one_prompt_without_its_byte_order_mark(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfSay\r\nyes")
    assert read_prompts(file) == [Asked("Say\nyes")]


def test_messages_keep_the_roles_that_a_template_may_know(tmp_path):
    turns = [*SAY, {"role": "assistant", "content": None}, {"role": "tool", "content": "4", "name": "sum"}]
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": turns}))
    assert read_prompts(file)[0].prompt == [SAY[0], {"role": "assistant", "content": ""}, turns[2]]


def test_a_prompt_goes_before_the_conversation_that_begins_with_it(tmp_path):
    file = tmp_path / "a.jsonl"
    answered = [*SAY, {"role": "assistant", "content": "Yes."}]
    file.write_text(json.dumps({"prompt": "Say yes", "messages": answered}))
    assert read_prompts(file)[0].prompt == "Say yes"
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
        (b'{"messages": [{"content": "a"}]}', 'line 1: a turn has no speaker; give each a "role"'),
        (b"\n \r\n", "holds no prompt"),
        (b"caf\xe9", "line 1: not UTF-8 text"),
        ('{"prompt": "a"}\n'.encode("utf-16"), "line 1: the file is UTF-16 text; save it as UTF-8"),
        ('{"prompt": "a"}\n'.encode("utf-16-le"), "line 1: the file is UTF-16 text; save it as UTF-8"),
        (b'{"prompt": "a"}\n{"prompt": "b', "line 2: not JSON .*, and the file ends in the middle of it"),
        (b'{"prompt": "a", "tools": 3}', 'line 1: "tools" is no list'),
    ],
)
def test_what_is_no_prompt_is_named(tmp_path, content, said):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"prompt_file .*a\.jsonl.*{said}"):
        read_prompts(tmp_path / "a.jsonl")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"prompt_file .*absent cannot be read \(No such file"):
        read_prompts(tmp_path / "absent")


RECORDS = [{"id": "q1", "prompt": "Say yes"}, {"id": 7, "messages": SAY}, {"instruction": "Say", "input": "yes"}]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
def test_prompts_come_out_of_every_kind_of_file_with_their_ids(tmp_path, kind, compression):
    file = write(tmp_path, RECORDS, kind, compression)
    asked = read_prompts(file)
    assert [one.prompt for one in asked] == ["Say yes", SAY, "Say\n\nyes"]
    wanted = ["q1", 7, None] if kind != ".parquet" else ["q1", "7", None]  # of a column all are of one kind
    assert [one.id for one in asked] == wanted


@pytest.mark.parametrize("compression", COMPRESSIONS[1:])
def test_a_compressed_text_is_one_prompt(tmp_path, compression):
    file = tmp_path / f"a.txt{compression}"
    file.write_bytes(COMPRESS[compression](b"\xef\xbb\xbfSay\r\nyes"))
    assert read_prompts(file) == [Asked("Say\nyes")]


def test_a_system_message_and_tools_beside_the_turns_are_kept(tmp_path):
    file, tools = tmp_path / "a.jsonl", [{"name": "sum"}]
    rows = [
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "Say yes"}], "tools": json.dumps(tools)},
        {"system_prompt": "Be brief.", "prompt": "Say yes"},
        {"system": "", "prompt": "Say yes"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    brief = [{"role": "system", "content": "Be brief."}, *SAY]
    assert [(one.prompt, one.tools) for one in read_prompts(file)] == [(brief, tools), (brief, None), ("Say yes", None)]
    kept = list(read_corpus(file))
    assert [record.turns[0] for record in kept] == [("system", "Be brief.")] * 2 + [("user", "Say yes")]
    assert kept[0].tools == tools
