"""Folders with one writer at a time: who comes second hears who is there; a dead holder's lock is nobody's."""

from __future__ import annotations

import errno
import os
import re
import socket
import time

import pytest

from frspec_jax import locks
from frspec_jax.errors import UserError
from tests.support.children import child, holding


def test_a_second_writer_is_refused_by_the_first_ones_number(tmp_path):
    with holding(tmp_path / "work") as first:
        since = r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S*"
        refused = pytest.raises(UserError, match=f"work w is being written by process {first.pid} {since}; wait for it")
        with refused, locks.folder_lock(tmp_path / "work", "--work w"):
            pytest.fail("two at once")
        first.kill()  # -9
        first.wait()
        assert (tmp_path / "work" / locks.LOCK).exists()  # the dead leave it, and it does not hold
        with locks.folder_lock(tmp_path / "work"):
            holder = locks.Holder.read((tmp_path / "work" / locks.LOCK).read_bytes())
            assert (holder.process, holder.host) == (os.getpid(), socket.gethostname()) and holder.since
            with pytest.raises(UserError, match=f"process {os.getpid()}"), locks.folder_lock(tmp_path / "work"):
                pytest.fail("two at once")
    assert os.listdir(tmp_path / "work") == []


def test_who_is_patient_waits_for_the_first_one(tmp_path):
    with holding(tmp_path, 0.6) as first, locks.folder_lock(tmp_path, patience=60):
        assert first.wait(10) == 0
    with holding(tmp_path):
        begun = time.monotonic()
        with pytest.raises(UserError, match="is being written by"), locks.folder_lock(tmp_path, patience=0.3):
            pytest.fail("two at once")
        assert time.monotonic() - begun > 0.3


def test_a_lock_makes_its_folder_and_leaves_none_empty(tmp_path):
    with locks.folder_lock(tmp_path / "a" / "b"):
        pass
    assert os.listdir(tmp_path) == []
    with locks.folder_lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("")
    assert os.listdir(tmp_path / "a" / "b") == ["file"]


def test_a_name_is_held_before_there_is_anything_under_it(tmp_path):
    out = tmp_path / "drafts" / "mine"
    with locks.name_lock(out):
        assert not out.exists()
        refused = pytest.raises(UserError, match=f"name mine is being written by process {os.getpid()}")
        with locks.name_lock(out.with_name("other")), locks.folder_lock(out.parent):
            pass  # other names, and what holds the folder, are no hindrance
        with refused, locks.name_lock(out, "--name mine"):
            pytest.fail("two at once")
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_goes_by_what_stands_there(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", none)
    file, here = tmp_path / locks.LOCK, socket.gethostname()
    for text, said in (
        (f"{os.getppid()}", f"process {os.getppid()};"),
        (
            f"{os.getppid()} {here} 2026-01-02 03:04:05+00:00\n",
            f"process {os.getppid()} since 2026-01-02 03:04:05+00:00;",
        ),
        ("7 elsewhere 2026-01-02 03:04:05+00:00\n", "process 7 on elsewhere since 2026-01-02 03:04:05+00:00;"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=re.escape(said)) as refused, locks.folder_lock(tmp_path):
            pytest.fail("two at once")
        assert ("if that process is gone, remove " in str(refused.value)) == ("elsewhere" in text)
    for text in ("999999999", f"999999999 {here} 2026-01-02 03:04:05+00:00\n", "", "\xff no holder"):
        file.write_text(text)
        with locks.folder_lock(tmp_path):
            pass


def test_many_take_turns(tmp_path):
    """Locks that come and go at once never let two in."""
    code = (
        "from frspec_jax.errors import UserError\nprint('ready', flush=True)\nwork = pathlib.Path(sys.argv[1])\n"
        "done = 0\nwhile done < 100:\n  try:\n    with locks.folder_lock(work):\n"
        "      (work / 'mine').mkdir(); (work / 'mine').rmdir(); done += 1\n  except UserError:\n    pass\n"
    )
    workers = [child(code, tmp_path / "work") for _ in range(3)]
    ends = time.monotonic() + 60
    for worker in workers:
        assert worker.wait(timeout=max(1, ends - time.monotonic())) == 0
        worker.communicate()
