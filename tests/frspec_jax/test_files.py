"""Files that are whole or not there."""

import errno
import json
import os
from pathlib import Path

import pytest

from frspec_jax import files
from frspec_jax.errors import UserError
from tests.support.children import child, running

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


def test_a_file_system_without_locks_leaves_parts_whose_owner_it_cannot_know(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", none)
    (tmp_path / ".out.part-999999999").mkdir()
    files.write_text(tmp_path / "out", "")
    assert sorted(os.listdir(tmp_path)) == [".out.part-999999999", "out"]
