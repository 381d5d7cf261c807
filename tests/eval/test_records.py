"""The records of a run: torn lines, other configurations, two writers, and what is on disk when."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from eval.runs import records
from frspec_jax.errors import UserError


def test_folders_that_hold_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no manifest\.json"):
        records.read_manifest(tmp_path)
    with records.opened(tmp_path, {"kind": "run"}) as kept:
        for number in (1, 2):
            kept.append({"question": f"QA/{number}", "repeat": 0})
    file = tmp_path / "records.jsonl"
    first, second = file.read_text().splitlines(keepends=True)
    assert records.read_records(tmp_path) == [json.loads(first), json.loads(second)]
    file.write_text(first + "{\n" + second)
    with pytest.raises(UserError, match="line 2 is damaged"):
        records.read_records(tmp_path)
    file.write_text(first + second + first)
    with pytest.raises(UserError, match="line 3 counts QA/1 twice"):
        records.read_records(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="format"):
        records.read_manifest(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no manifest\.json"), records.opened(tmp_path, {}):
        pass
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        records.read_records(tmp_path)


def test_a_torn_line_is_dropped_and_written_anew(tmp_path):
    with records.opened(tmp_path, {}) as kept:
        kept.append({"question": "QA/1", "repeat": 0})
    file = tmp_path / "records.jsonl"
    whole = file.read_bytes()
    for torn in (b"{", b'{"question":"QA/2","repeat":0}', b"\xff\xfe"):  # even a whole one, without its newline
        file.write_bytes(whole + torn)
        assert records.read_records(tmp_path) == [{"question": "QA/1", "repeat": 0}]
        with records.opened(tmp_path, {}) as kept:
            kept.append({"question": "QA/2", "repeat": 0})
        assert file.read_bytes() == whole + b'{"question":"QA/2","repeat":0}\n'


def test_another_configuration_is_named_by_what_differs(tmp_path):
    with records.opened(tmp_path, {"tree": {"size": 8, "depth": 3}, "--seed": 0}):
        pass
    for other, words in (
        ({"tree": {"size": 6, "depth": 3}, "--seed": 0}, "tree size 8, and this command has 6"),
        ({"tree": {"size": 8, "depth": 3}, "--seed": 1}, "seed 0, and this command has 1"),
        ({"tree": {"size": 8, "depth": 3}}, "seed 0, and this command has None"),
    ):
        with pytest.raises(UserError, match=words), records.opened(tmp_path, other):
            pass


def test_two_processes_do_not_write_one_run(tmp_path):
    with records.opened(tmp_path, {"a": 1}) as kept:
        kept.append({"question": "QA/1", "repeat": 0})
        with (
            pytest.raises(UserError, match=rf"being written by process {os.getpid()}\b"),
            records.opened(tmp_path, {"a": 1}),
        ):
            pass
    with records.opened(tmp_path, {"a": 1}) as kept:
        assert kept.lines == [{"question": "QA/1", "repeat": 0}]


def test_a_line_is_on_disk_before_the_next_question(tmp_path, monkeypatch):
    synced = []
    with records.opened(tmp_path, {}) as kept:
        monkeypatch.setattr(records.os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
        for number in range(3):
            kept.append({"question": f"QA/{number}", "repeat": 0})
    sizes = np.cumsum([len(line) for line in (tmp_path / "records.jsonl").read_bytes().splitlines(keepends=True)])
    assert synced == sizes.tolist()
