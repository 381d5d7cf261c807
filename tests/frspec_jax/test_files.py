"""Files that are whole or not there, and folders with one writer at a time."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from frspec_jax import files
from frspec_jax.errors import UserError

HOLD = "import sys, time, frspec_jax.files as f, pathlib\n"


def child(code, *args):
    """Another Python that runs `code` and then says that it is ready; killed by the caller."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD + code, *map(str, args)], stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@contextlib.contextmanager
def running(code, *args):
    process = child(code, *args)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


LOCKED = "with f.folder_lock(pathlib.Path(sys.argv[1])):\n    print('ready', flush=True)\n    time.sleep(60)\n"
IN_PART = (
    "with f.part_of(pathlib.Path(sys.argv[1]), folder=bool(int(sys.argv[2]))) as part:\n"
    "    (part / 'x' if part.is_dir() else part).write_text('half')\n"
    "    print('ready', flush=True)\n    time.sleep(60)\n"
)


def test_a_file_is_whole_or_as_it_was(tmp_path):
    out = tmp_path / "a.json"
    files.write_json(out, {"one": 1})
    assert json.loads(out.read_text()) == {"one": 1}
    with pytest.raises(RuntimeError), files.written_aside(out) as part:
        part.write_text("half")
        raise RuntimeError
    assert json.loads(out.read_text()) == {"one": 1} and os.listdir(tmp_path) == ["a.json"]
    files.write_text(out, "ü")
    assert out.read_bytes() == "ü".encode()


@pytest.mark.parametrize("where", ["write_bytes", "fsync", "replace"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, where):
    out = tmp_path / "a.txt"
    out.write_text("before")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os if where == "fsync" else Path, where, full)
    with pytest.raises(UserError, match=r"a\.txt cannot be written: No space left on device; make room"):
        files.write_text(out, "after")
    assert out.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written: Not a directory; name another file"):
        files.write_text(tmp_path / "file" / "a", "")
    with pytest.raises(UserError, match=r"work .*cannot be written: Not a directory; name another folder"):
        files.check_writable(tmp_path / "file" / "a" / "b", "--work w")
    files.check_writable(tmp_path / "new" / "er")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("folder", [False, True])
def test_parts_of_the_dead_are_cleared_and_those_of_the_living_stay(tmp_path, folder):
    out = tmp_path / "out"
    with running(IN_PART, out, int(folder)) as living:
        dead = child(IN_PART, out, int(folder))
        dead.kill()
        dead.communicate()
        assert len(os.listdir(tmp_path)) == 2
        with files.part_of(out, folder=folder) as part:
            assert {path.name for path in tmp_path.iterdir()} == {f".out.part-{living.pid}", part.name}
            files.put_in_place(part, out)
        assert {path.name for path in tmp_path.iterdir()} == {f".out.part-{living.pid}", "out"}


def test_a_stale_part_of_our_own_process_id_is_no_hindrance(tmp_path):
    """Containers number their processes from 1: a killed one's part can bear our number."""
    out = tmp_path / "out"
    stale = tmp_path / f".out.part-{os.getpid()}"
    stale.mkdir()
    (stale / "half").write_text("")
    with files.part_of(out, folder=True) as part:
        assert os.listdir(part) == []
        with files.part_of(out, folder=True) as second:  # two writers in one process, each with its own
            assert second != part and part.is_dir()
    assert os.listdir(tmp_path) == []


def test_parts_of_other_names_stay(tmp_path):
    (tmp_path / ".other.part-1").mkdir()
    files.write_text(tmp_path / "out", "")
    assert sorted(os.listdir(tmp_path)) == [".other.part-1", "out"]


def test_a_second_writer_is_refused_by_the_first_ones_number(tmp_path):
    with running(LOCKED, tmp_path / "work") as first:
        refused = pytest.raises(UserError, match=f"work w is being written by process {first.pid}; wait for it")
        with refused, files.folder_lock(tmp_path / "work", "--work w"):
            pytest.fail("two at once")
        first.kill()
        first.wait()
        assert (tmp_path / "work" / files.LOCK).exists()  # the dead leave it, and it does not hold
        with files.folder_lock(tmp_path / "work"):
            assert (tmp_path / "work" / files.LOCK).read_text() == str(os.getpid())
            with pytest.raises(UserError, match=f"process {os.getpid()}"), files.folder_lock(tmp_path / "work"):
                pytest.fail("two at once")
    assert os.listdir(tmp_path / "work") == []


def test_a_lock_makes_its_folder_and_leaves_none_empty(tmp_path):
    with files.folder_lock(tmp_path / "a" / "b"):
        pass
    assert os.listdir(tmp_path) == []
    with files.folder_lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("")
    assert os.listdir(tmp_path / "a" / "b") == ["file"]


def test_a_file_system_without_locks_goes_by_the_process_id(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", none)
    (tmp_path / files.LOCK).write_text(str(os.getppid()))
    with pytest.raises(UserError, match=f"process {os.getppid()}"), files.folder_lock(tmp_path):
        pytest.fail("two at once")
    (tmp_path / files.LOCK).write_text("999999999")
    with files.folder_lock(tmp_path):
        pass
    (tmp_path / ".out.part-999999999").mkdir()  # nothing is known of whose it is
    files.write_text(tmp_path / "out", "")
    assert sorted(os.listdir(tmp_path)) == [".out.part-999999999", "out"]


def test_many_take_turns(tmp_path):
    """Locks that come and go at once never let two in."""
    code = (
        "from frspec_jax.errors import UserError\nprint('ready', flush=True)\nwork = pathlib.Path(sys.argv[1])\n"
        "done = 0\nwhile done < 100:\n  try:\n    with f.folder_lock(work):\n"
        "      (work / 'mine').mkdir(); (work / 'mine').rmdir(); done += 1\n  except UserError:\n    pass\n"
    )
    workers = [child(code, tmp_path / "work") for _ in range(3)]
    ends = time.monotonic() + 60
    for worker in workers:
        assert worker.wait(timeout=max(1, ends - time.monotonic())) == 0
        worker.communicate()
