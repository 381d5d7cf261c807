"""Every command that adds to a folder: while another process holds it, it is refused, and nothing has changed.

Once that process is killed (kill -9), the same command does what it does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convert.__main__ import main as convert
from eval.__main__ import main as evaluate
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.locks import LOCK, name_lock
from tests.support.children import holding
from tests.support.drafts import published_eagle
from train.__main__ import main as train

ROOT = Path(__file__).parents[2]
TRAIN = ("--rows", 2, "--row", 16, "--steps", 1, "--warmup", 1, "--loss-vocab", 64, "--loss-random", 32,
         "--unroll", 1, "--accept-every", 0)  # fmt: skip


def text(folder: Path) -> Path:
    (folder / "text.txt").write_text("the end of the tale and the cat in the hat\n" * 40)
    return folder / "text.txt"


# What is held, and the command: of a copy of a checkpoint, a corpus, and a folder for the rest.
CASES = {
    "a checkpoint, by an importer": (
        lambda ckpt, work: ckpt,
        lambda ckpt, corpus, work: (convert, "draft", published_eagle(work / "hf", Checkpoint.open(ckpt), False),
                                    "--target", ckpt, "--name", "other"),
    ),
    "a checkpoint, by a count": (
        lambda ckpt, work: ckpt,
        lambda ckpt, corpus, work: (train, "rank", text(work), "--ckpt", ckpt, "--force", "--processes", 1),
    ),
    "a draft, by a fit": (
        lambda ckpt, work: ckpt / "drafts" / "eagle",
        lambda ckpt, corpus, work: (train, "copying", corpus, "--ckpt", ckpt, "--draft", "eagle", "--sequences", 8,
                                    "--row", 32, "--work", work / "features"),
    ),
    "a training folder": (
        lambda ckpt, work: work / "run",
        lambda ckpt, corpus, work: (train, "eagle", corpus, "--ckpt", ckpt, "--name", "new", "--work", work / "run",
                                    *TRAIN),
    ),
    "a store of answers": (
        lambda ckpt, work: work / "store",
        lambda ckpt, corpus, work: (train, "answers", corpus, "--ckpt", ckpt, "--out", work / "store", "--slots", 4,
                                    "--max-new-tokens", 4),
    ),
    "a run of an evaluation": (
        lambda ckpt, work: work / "run",
        lambda ckpt, corpus, work: (evaluate, "run", "--ckpt", ckpt, "--draft", "eagle", "--draft-vocab", "full",
                                    "--tree-size", 2, "--depth", 1, "--draft-top-k", 1, "--questions", 1,
                                    "--max-new-tokens", 4, "--data", corpus, "--out", work / "run"),
    ),
}  # fmt: skip


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != LOCK}


@pytest.mark.sweep(quick=["a checkpoint*", "a store*", "a run of an evaluation"])
@pytest.mark.parametrize("case", CASES)
def test_the_second_is_refused_and_goes_on_once_the_first_is_killed(case, toy_copy, corpus, tmp_path, capfd):
    held, command = CASES[case]
    work = tmp_path / "work"
    work.mkdir()
    main, *argv = command(toy_copy.path, corpus, work)
    argv = [str(arg) for arg in argv]
    folder = held(toy_copy.path, work)
    with holding(folder) as first:
        before = files_of(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stopped.value.code == 2
        assert f"{folder} is being written by process {first.pid} since " in line
        assert files_of(tmp_path) == before, "nothing has changed"
        first.kill()
        first.wait()
    main(argv)
    after = files_of(tmp_path)
    assert after != before and not [path for path in tmp_path.rglob("*") if path.name == LOCK]


def test_a_draft_that_is_being_trained_is_not_trained_twice(toy_copy, corpus, tmp_path, capfd):
    """Under one name and in two folders: the second would learn of it only once it was done."""
    argv = ["eagle", corpus, "--ckpt", toy_copy.path, "--name", "new", *TRAIN]
    drafts = toy_copy.path / "drafts"
    with name_lock(drafts / "new"), pytest.raises(SystemExit) as stopped:
        train([str(arg) for arg in (*argv, "--work", tmp_path / "two")])
    assert stopped.value.code == 2 and f"--name new: {drafts / 'new'} is being written by" in capfd.readouterr().err
    assert not (tmp_path / "two").exists() and sorted(os.listdir(drafts)) == ["eagle"]


@pytest.mark.sweep
def test_a_real_run_that_is_killed_lets_the_next_one_go_on(toy_copy, corpus, tmp_path):
    """Two commands in two terminals: the second is refused, the first is killed, the second goes on with its store."""
    source = shutil.copy(corpus, tmp_path / "chats.jsonl")
    argv = [sys.executable, "-m", "train", "answers", source, "--ckpt", str(toy_copy.path), "--slots", "1"]
    argv += ["--max-new-tokens", "64", "--out", str(tmp_path / "store")]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    first = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        index, ends = tmp_path / "store" / "index.i64", time.monotonic() + 120
        while not (index.exists() and index.stat().st_size):
            assert first.poll() is None and time.monotonic() < ends
            time.sleep(0.02)
        first.send_signal(signal.SIGSTOP)  # so that it is at it still
        second = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
        assert second.returncode == 2 and f"is being written by process {first.pid} since" in second.stderr
    finally:
        first.kill()
        first.wait()
    done = index.stat().st_size
    third = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert third.returncode == 0 and index.stat().st_size > done, third.stderr
