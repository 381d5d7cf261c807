"""Corpora in every format and compression give the same records, and what is wrong in them is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frspec_jax import records
from frspec_jax.errors import UserError
from frspec_jax.records import COMPRESSIONS, FORMATS
from tests.support.corpora import write
from train.corpus import Record, Tally, corpus_files, read_corpus

TEXTS = [f"Line {n}: naïve 日本語 \U0001f600 and more.\n" for n in range(40)]
CHATS = [
    [("human", f"Question {n}?"), ("gpt", f"Answer {n}."), ("system", "Be brief."), ("user", ""), ("assistant", "ok")]
    for n in range(40)
]


def texts(rows=TEXTS) -> list:
    return [{"text": text} for text in rows]


def chats(key: str) -> list:
    role, said = {"conversations": ("from", "value"), "messages": ("role", "content")}[key]
    return [{key: [{role: name, said: text} for name, text in chat]} for chat in CHATS]


# Formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", FORMATS)
def test_text_in_every_format(tmp_path, kind, compression):
    path = write(tmp_path, texts(), kind, compression)
    records = list(read_corpus(path))
    assert "".join(record.text or "" for record in records) == "".join(TEXTS)
    assert {record.source for record in records} == {path.name}
    assert all(not record.turns for record in records)
    assert len(records) == (1 if kind == ".txt" else len(TEXTS))


@pytest.mark.parametrize("key", ["conversations", "messages"])
@pytest.mark.parametrize("kind", FORMATS[1:])
def test_conversations_in_every_format(tmp_path, kind, key):
    records = list(read_corpus(write(tmp_path, chats(key), kind)))
    roles = ("user", "assistant", "system", "user", "assistant")
    assert [record.turns for record in records] == [
        tuple(zip(roles, [text for _, text in chat], strict=True)) for chat in CHATS
    ]
    assert records[0].text is None
    assert records[3].parts(["assistant"]) == ["Answer 3.", "ok"]
    assert Record("a.txt", "whole").parts(["assistant"]) == ["whole"]  # plain text has no roles


@pytest.mark.parametrize("compression", COMPRESSIONS[1:])
def test_compressed_files_in_several_parts_are_read_whole(tmp_path, compression):
    path = write(tmp_path, texts(), ".jsonl", compression)
    path.write_bytes(path.read_bytes() * 3)
    assert [record.text for record in read_corpus(path)] == TEXTS * 3


def test_what_is_said_may_come_in_parts_or_not_at_all(tmp_path):
    said = [[{"type": "text", "text": "Why "}, {"type": "text", "text": "so?"}], None, ["plain"]]
    turns = [{"role": "user", "content": content} for content in said]
    (record,) = read_corpus(write(tmp_path, [{"messages": turns}], ".jsonl"))
    assert [text for _, text in record.turns] == ["Why so?", "", "plain"]


def test_byte_order_marks_blank_lines_and_half_surrogates(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n  \n{"text": "a \\ud800 b \\ud83d\\ude00"}\n')
    assert [record.text for record in read_corpus(file)] == ["one", "a � b \U0001f600"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert [record.text for record in read_corpus(tmp_path / "a.txt")] == ["one"]


@given(st.lists(st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"])), max_size=8), st.data())
def test_long_text_files_come_in_blocks_that_end_with_a_line(tmp_path_factory, lines, data):
    file = tmp_path_factory.mktemp("corpus") / "long.txt"
    whole = "\n".join(lines).removeprefix("\ufeff")
    file.write_bytes(whole.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "TEXT_BLOCK", data.draw(st.integers(1, 12)))
        blocks = [record.text or "" for record in read_corpus(file)]
    assert "".join(blocks) == whole.removeprefix("\ufeff")
    assert all(block.endswith("\n") for block in blocks[:-1])


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("kind", FORMATS)
def test_progress_is_told_in_bytes_of_the_file(tmp_path, kind, compression):
    path = write(tmp_path, texts(TEXTS * 50), kind, compression)
    told: list[int] = []
    records = list(read_corpus(path, told.append))
    assert len(told) == len(records)
    assert all(0 < n <= path.stat().st_size for n in told)
    if kind != ".parquet":  # whose index stands at its end
        assert told == sorted(told)


def test_records_come_before_the_file_is_read_whole(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n{"text": "two"}\nnot JSON\n')
    records = read_corpus(file)
    assert [next(records).text, next(records).text] == ["one", "two"]
    with pytest.raises(UserError, match="line 3"):
        next(records)


# What is left out ---------------------------------------------------------------------------------


def test_speakers_under_other_names_are_known_and_others_are_counted(tmp_path):
    """One line with a speaker of whom nobody knows is no reason to stop a corpus of millions."""
    said = [
        ("Human", "a"),
        ("function_call", "b"),
        ("observation", "c"),
        ("GPT", "d"),
        ("developer", "e"),
        ("tool", "f"),
    ]
    rows = [
        {"conversations": [{"from": name, "value": text} for name, text in said]},
        {"messages": [{"role": "ghost", "content": "x"}]},
        {"text": "one"},
        {"messages": [{"role": "ghost", "content": "y"}]},
    ]
    tally = Tally()
    found = list(read_corpus(write(tmp_path, rows, ".jsonl"), tally=tally))
    roles = ("user", "assistant", "tool", "assistant", "developer", "tool")
    assert [record.turns for record in found] == [tuple(zip(roles, "abcdef", strict=True)), ()]
    assert tally.said() == ("read 4 records; left out 2: speaker 'ghost' is not known (first: corpus.jsonl, line 2)")


def test_what_stands_beside_what_is_said_is_kept_for_the_template(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0, "name": "x"}]
    (record,) = read_corpus(write(tmp_path, [{"messages": turns}], ".jsonl"))
    assert record.messages() == turns


# Files and folders -------------------------------------------------------------------------------


def test_folders_are_searched_in_order_and_other_files_are_left_out(tmp_path):
    (tmp_path / "b").mkdir()
    names = ["b/2.txt", "b/1.jsonl.xz", "a.parquet", "c.json.zst", "notes.md", "b/model.npz", "archive.gz"]
    for name in names:
        (tmp_path / name).touch()
    found = corpus_files([tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["a.parquet", "b/1.jsonl.xz", "b/2.txt", "c.json.zst"]
    assert corpus_files([tmp_path / "b" / "2.txt", tmp_path / "b"])[0].name == "2.txt"  # as they were named


def test_paths_that_are_no_corpus_are_refused(tmp_path):
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(UserError, match=r"notes\.md: unknown kind of file; \.txt, .* can be read"):
        corpus_files([tmp_path / "notes.md"])
    with pytest.raises(UserError, match=r"absent\.txt is no file or folder; name a corpus"):
        corpus_files([tmp_path / "absent.txt"])
    with pytest.raises(UserError, match="holds no corpus"):
        corpus_files([tmp_path])


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl, line 1: not UTF-8 text \(byte 0xff\)"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl", b'{"text": "one"}\n{"body": "two"}\n', r'a\.jsonl, line 2: no "text", "messages", "conv'),
        ("a.jsonl", b'{"text": 3}', r'a\.jsonl, line 1: no "text"'),
        ("a.jsonl", b'["text"]', r'a\.jsonl, line 1: no "text"'),
        ("a.jsonl", b'{"messages": ["x"]}', "line 1: a turn has no speaker"),
        ("a.jsonl", b'{"messages": [{"role": ["user"], "content": "x"}]}', "line 1: a turn has no speaker"),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": [{"image": "x"}]}]}',
            '"content" of the user is not',
        ),
        ("a.jsonl", b'{"conversations": [{"from": "gpt", "value": 7}]}', 'line 1: "value" of the gpt is not text'),
        ("a.json", b"{", r"a\.json: not JSON"),
        ("a.json", b'{"text": "one"}', r"a\.json is not a JSON array of records"),
        ("a.json", b'[{"text": "one"}, 2]', r"a\.json, record 2: no"),
        ("a.txt", b"caf\xe9", r"a\.txt is not UTF-8 text \(byte 0xe9\); convert it first"),
        ("a.txt", "café".encode("utf-16"), r"a\.txt, line 1: the file is UTF-16 text; save it as UTF-8"),
        ("a.json", "[]".encode("utf-16-be"), r"a\.json, line 1: the file is UTF-16 text; save it as UTF-8"),
        ("a.parquet", b"PAR1 or not", r"a\.parquet is no Parquet file"),
        ("a.txt.gz", b"plain text", r"a\.txt\.gz cannot be read .*; mend or leave out the file"),
        ("a.txt.xz", b"plain text", r"a\.txt\.xz cannot be read"),
        ("a.txt.zst", b"plain text", r"a\.txt\.zst cannot be read"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as refused:
        list(read_corpus(tmp_path / name))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("compression", COMPRESSIONS[1:])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_compressed_file_that_is_cut_short_is_refused(tmp_path, kind, compression):
    path = write(tmp_path, texts(TEXTS * 50), kind, compression)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        list(read_corpus(path))


@pytest.mark.parametrize("compression", [".gz", ".xz"])  # in .zst checksums are optional, and pyarrow writes none
def test_a_compressed_file_that_is_damaged_is_refused(tmp_path, compression):
    path = write(tmp_path, texts([f"{n * 7919 % 10007}\n" for n in range(20000)]), ".txt", compression)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"cannot be read|not UTF-8"):
        list(read_corpus(path))


def test_parquet_rows_are_numbered_over_the_whole_file(tmp_path):
    path = write(tmp_path, [*texts(TEXTS * 20), {"text": None}], ".parquet")
    with pytest.raises(UserError, match=rf"row {len(TEXTS) * 20 + 1}: no"):
        list(read_corpus(path))


def test_a_parquet_file_without_such_a_column_is_refused(tmp_path):
    with pytest.raises(UserError, match='has no column "text"'):
        list(read_corpus(write(tmp_path, [{"body": "x"}], ".parquet")))
