"""Training on a bad day: full disks, second terminals, kills, slips. One sentence, and nothing is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frspec_jax import locks
from frspec_jax.checkpoint import Checkpoint
from tests.support.disk import files_of
from tests.support.folders import checkpoint_folder
from tests.support.runs import chats, drafted, refusal, same
from train import eagle
from train.__main__ import main
from train.features import FeatureStore
from train.folder import Run
from train.optimiser import key_of, seed_words

ROOT = Path(__file__).parents[2]
FLAGS = ("--rows", 2, "--row", 16, "--steps", 6, "--save-every", 3, "--eval-every", 4, "--warmup", 1,
         "--loss-vocab", 64, "--loss-random", 32, "--unroll", 1, "--accept-every", 0)  # fmt: skip


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return checkpoint_folder(tmp_path_factory.mktemp("faults") / "toy", draft=False, ranking=False, layers=4)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return chats(tmp_path_factory.mktemp("corpus") / "chats.jsonl")


@pytest.fixture(scope="module")
def whole(ckpt, corpus, tmp_path_factory):
    """The draft of a run that nothing disturbed, and its store of features."""
    work = tmp_path_factory.mktemp("whole") / "work"
    main(command(corpus, ckpt, work, "whole"))
    return drafted(ckpt, "whole")[1], work / "features"


def command(corpus, ckpt, work, name, *flags, kind="eagle") -> list[str]:
    given = (kind, corpus, "--ckpt", ckpt.path, "--work", work, "--name", name, *FLAGS, *flags)
    return [str(arg) for arg in given]


def left(folder: Path) -> set[str]:
    """What stands below a folder, by name, but for what Orbax calls its own."""
    return {path.name for path in folder.rglob("*")}


# A full disk -------------------------------------------------------------------------------------


@pytest.mark.sweep(quick=["30000"])
@pytest.mark.parametrize("size", [1_000, 30_000])
def test_a_full_disk_stops_a_run_in_one_sentence_and_with_room_it_goes_on(ckpt, corpus, whole, tmp_path, capfd, size):
    """In the features, and in the first checkpoint, whose writers are Orbax' threads."""
    work, name = tmp_path / "work", f"full{size}"
    capfd.readouterr()
    with files_of(size), pytest.raises(SystemExit) as stopped:
        main(command(corpus, ckpt, work, name))
    assert stopped.value.code == 2
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "cannot be written: File too large; make room and run the command again" in lines[0]
    assert str(work) in lines[0] and "Traceback" not in err and "absl" not in err
    assert not any(".part-" in name or "orbax-checkpoint-tmp" in name or name == locks.LOCK for name in left(work))
    assert not (ckpt.path / "drafts" / name).exists()
    main(command(corpus, ckpt, work, name))
    assert same(drafted(ckpt, name)[1], whole[0])


def test_a_full_disk_stops_answers_and_with_room_they_go_on(ckpt, corpus, tmp_path, capfd):
    argv = ["answers", corpus, "--ckpt", ckpt.path, "--max-new-tokens", 16, "--slots", 4, "--out"]
    main([str(arg) for arg in (*argv, tmp_path / "whole")])
    store = FeatureStore(tmp_path / "whole", ckpt)
    with files_of(store.features.nbytes // 2):
        assert "store cannot be written: File too large; make room" in refusal(capfd, [*argv, tmp_path / "store"])
    some = FeatureStore(tmp_path / "store", ckpt)
    assert 0 < len(some) < len(store)
    main([str(arg) for arg in (*argv, tmp_path / "store")])
    again = FeatureStore(tmp_path / "store", ckpt)
    assert len(again) == len(store) and locks.LOCK not in left(tmp_path)
    assert {bytes(again.text(i)[0]) for i in range(len(again))} == {bytes(store.text(i)[0]) for i in range(len(store))}


def test_settings_and_descriptions_are_there_whole_or_not_at_all(ckpt, corpus, whole, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cases = (
        (command(whole[1], ckpt, tmp_path / "work", "later"), tmp_path / "work" / "settings.json"),
        (command(corpus, ckpt, tmp_path / "made", "later"), tmp_path / "made" / "features" / "made_of.json"),
        (["answers", corpus, "--ckpt", ckpt.path, "--out", tmp_path / "store"], tmp_path / "store" / "meta.json"),
    )
    for argv, file in cases:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            assert "No space left on device; make room and run the command again" in refusal(capsys, argv)
        assert not file.exists() and not file.parent.exists()


def test_settings_that_are_damaged_are_named(ckpt, whole, tmp_path, capsys):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "settings.json").write_text("")
    said = refusal(capsys, command(whole[1], ckpt, tmp_path / "work", "no"))
    assert "settings.json is damaged" in said and "remove" in said


def test_a_row_of_metrics_that_was_cut_short_takes_no_other_with_it(tmp_path):
    with Run(tmp_path / "work", {}) as run:
        run.log({"step": 1, "loss": 1.0})
        with open(tmp_path / "work" / "metrics.jsonl", "a") as file:
            file.write('{"step": 2, "lo')
        run.log({"step": 3, "loss": 3.0})
        assert [row["step"] for row in run.rows(9)] == [1, 3]


# A loss that is no number ------------------------------------------------------------------------


@pytest.mark.sweep(quick=["loss*"])
@pytest.mark.parametrize(
    ("what", "first", "expected"),
    [("loss", 5, "step 5: the loss is nan"), ("weights", 6, "step 6: a weight is no finite number")],
)
def test_what_is_no_number_stops_the_run_and_is_never_saved(
    ckpt, whole, tmp_path, monkeypatch, capsys, what, first, expected
):
    """A loss that is not finite shows weights that went before it; weights alone are seen when they are to be kept."""
    calls, step = itertools.count(1), eagle.train_step
    name, work = f"bad-{what}", tmp_path / "work"

    def bad(*args):
        state, metrics = step(*args)
        if next(calls) < first:
            return state, metrics
        if what == "loss":
            return state, {**metrics, "loss": jnp.float32(math.nan)}
        return state.replace(params=jax.tree.map(lambda x: x * jnp.inf, state.params)), metrics

    with monkeypatch.context() as patch:
        patch.setattr(eagle, "train_step", bad)
        said = refusal(capsys, command(whole[1], ckpt, work, name))
    assert expected in said and "lower --lr" in said
    assert [path.name for path in (work / "checkpoints").iterdir()] == ["3"]
    assert not (ckpt.path / "drafts" / name).exists()
    main(command(whole[1], ckpt, work, name))  # it was no fault of the run's, and it goes on from what was saved
    assert "resumed at step 3" in capsys.readouterr().err
    assert same(drafted(ckpt, name)[1], whole[0])


class Loss:
    """A loss that notes how many steps had been given to the device when the host asked for it."""

    def __init__(self, step: int, asked: dict[int, int], calls: list[int], value: float) -> None:
        self.step, self.asked, self.calls, self.value = step, asked, calls, value

    def __float__(self) -> float:
        self.asked.setdefault(self.step, len(self.calls))
        return self.value


@pytest.mark.parametrize("first", [None, 2, 5])
def test_the_device_has_work_while_the_host_looks_at_a_loss(ckpt, whole, tmp_path, monkeypatch, capsys, first):
    """Two steps behind, but for what keeps weights, which waits for all; the first bad step is the one named."""
    calls, asked, step, name = [], {}, eagle.train_step, f"ahead-{first}"

    def noted(*args):
        state, metrics = step(*args)
        calls.append(0)
        value = 1.0 if first is None or len(calls) < first else math.inf
        return state, {**metrics, "loss": Loss(len(calls), asked, calls, value)}

    monkeypatch.setattr(eagle, "train_step", noted)
    argv = command(whole[1], ckpt, tmp_path / "work", name, "--steps", 12, "--save-every", 6, "--eval-every", 100)
    if first is None:
        main(argv)
        assert asked == {1: 3, 2: 4, 3: 5, 4: 6, 5: 6, 6: 6, 7: 9, 8: 10, 9: 11, 10: 12, 11: 12, 12: 12}
        rows = [json.loads(row) for row in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == [10, 12]
        return
    assert f"step {first}: the loss is inf" in refusal(capsys, argv)
    assert len(calls) == min(first + 2, 6) and list((tmp_path / "work" / "checkpoints").iterdir()) == []
    assert not (ckpt.path / "drafts" / name).exists()


# Slips of the finger -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--lr", "nan"), "--lr nan must be a number"),
        (("--lr", "1e30"), "--lr 1e+30 must be at most 10"),
        (("--lr", "-1"), "--lr -1.0 must be at least 0"),
        (("--clip", "0"), "--clip 0.0 must be at least 1e-09"),
        (("--weight-decay", "inf"), "--weight-decay inf must be at most 10"),
        (("--noise", "-0.1"), "--noise -0.1 must be at least 0"),
        (("--ce-weight", "nan"), "--ce-weight nan must be a number"),
        (("--unroll", "0"), "--unroll 0 must be at least 1"),
        (("--warmup", "-1"), "--warmup -1 must be at least 0"),
        (("--loss-vocab", "-1"), "--loss-vocab -1 must be at least 0"),
        (("--steps", "0"), "--steps 0 must be at least 1"),
        (("--steps", "-3"), "--steps -3 must be at least 1"),
        (("--row", "1"), "--row 1 must be at least 2, a token and what follows it"),
        (("--eval-batches", "0"), "--eval-batches 0 must be at least 1"),
        (("--seed", str(2**64)), f"--seed {2**64} must be a number of 64 bits"),
        (("--seed", str(-(2**63) - 1)), "must be a number of 64 bits"),
    ],
)
def test_figures_that_make_no_sense_are_refused(ckpt, corpus, tmp_path, capsys, flags, said):
    assert said in refusal(capsys, command(corpus, ckpt, tmp_path / "work", "no", *flags))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "medusa"])
def test_names_that_no_draft_can_have_are_refused_before_training(ckpt, corpus, tmp_path, capsys, kind):
    names = {
        "a/b": "slashes",
        "x/../..": "slashes",
        "..": "slashes",
        "": "slashes",
        ".hid": "a leading dot",
        "a\nb": "slashes",
        "none": "would be no draft to --draft",
    }
    for name, said in names.items():
        argv = [kind, corpus, "--ckpt", ckpt.path, "--work", tmp_path / "work", "--name", name]
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(arg) for arg in argv])
        assert stopped.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: --name {name}") and said in err
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--seed", str(2**63)), f"--seed {2**63} must be a whole number from -2^63"),
        (("--limit-tokens", "0"), "--limit-tokens 0 must be at least 1"),
        (("--slots", "0"), "--slots 0 must be at least 1"),
        (("--capacity", "100"), "--capacity 100 must be a multiple of 64"),
        (("--temperature", "nan"), "--temperature nan"),
    ],
)
def test_figures_of_answers_that_make_no_sense_are_refused(ckpt, corpus, tmp_path, capsys, flags, said):
    assert said in refusal(capsys, ["answers", corpus, "--ckpt", ckpt.path, "--out", tmp_path / "store", *flags])
    assert not (tmp_path / "store").exists()


def test_short_rows_leave_out_what_nothing_can_be_said_of(ckpt, whole, tmp_path, capsys):
    """No pair of a row of two has a self-fed step's worth of pairs before it; a nan would win or lose every contest."""
    argv = command(whole[1], ckpt, tmp_path / "work", "short", "--row", 2)
    assert "the held-out sequences hold no answer to measure on" in refusal(capsys, argv)
    assert not (tmp_path / "work" / "metrics.jsonl").exists()
    main(command(whole[1], ckpt, tmp_path / "longer", "short", "--row", 2, "--eval-batches", 50))
    about = json.loads((ckpt.path / "drafts" / "short" / "config.json").read_text())["about"]
    assert len(about["held_out"]["top1"]) == 2 and np.isfinite(about["held_out"]["top1"]).all()


def test_any_seed_of_64_bits_is_its_own(ckpt, whole, tmp_path):
    for seed in (0, 1, 2**31 - 1):  # those that JAX takes as they are give what they gave
        assert (
            jax.random.key_data(key_of(seed_words(seed))).tolist() == jax.random.key_data(jax.random.key(seed)).tolist()
        )
    seeds = (0, 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 2, -(2**62))
    assert len({tuple(seed_words(seed).tolist()) for seed in seeds}) == len(seeds)
    drafts = {}
    for seed in (-1, 2**33):
        main(command(whole[1], ckpt, tmp_path / f"work{seed}", f"seed{seed}", "--seed", seed, "--steps", 1))
        drafts[seed] = drafted(ckpt, f"seed{seed}")[1]
    assert not same(drafts[-1], drafts[2**33])


# Two at once, and places that cannot be written --------------------------------------------------


def unread(self, dtype=None):
    raise AssertionError("the target's weights were read before the refusal")


def test_a_second_run_in_one_folder_is_refused_by_the_first_ones_number(ckpt, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Checkpoint, "params", unread)
    with locks.folder_lock(tmp_path / "work"):
        said = refusal(capsys, command(whole[1], ckpt, tmp_path / "work", "second"))
    assert f"--work {tmp_path / 'work'} is being written by process {os.getpid()}" in said


def test_a_second_writer_of_a_store_is_refused(ckpt, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Checkpoint, "params", unread)
    with locks.folder_lock(tmp_path / "store"):
        said = refusal(capsys, ["answers", corpus, "--ckpt", ckpt.path, "--out", tmp_path / "store"])
    assert f"--out {tmp_path / 'store'} is being written by process {os.getpid()}" in said
    monkeypatch.undo()
    (tmp_path / "work" / "features").mkdir(parents=True)
    with locks.folder_lock(tmp_path / "work" / "features"):  # medusa-tree and copying may be at such a one
        said = refusal(capsys, command(corpus, ckpt, tmp_path / "work", "second"))
    assert f"features is being written by process {os.getpid()}" in said


def test_places_that_cannot_be_written_are_refused_before_work_starts(ckpt, corpus, tmp_path, monkeypatch, capsys):
    """What a read-only mount does, a file in the way does too, to any user."""
    monkeypatch.setattr(Checkpoint, "params", unread)
    (tmp_path / "file").write_text("")
    said = refusal(capsys, command(corpus, ckpt, tmp_path / "file" / "work", "no"))
    assert f"--work {tmp_path / 'file' / 'work'} cannot be written: Not a directory; name another folder" in said
    said = refusal(capsys, ["answers", corpus, "--ckpt", ckpt.path, "--out", tmp_path / "file" / "store"])
    assert f"--out {tmp_path / 'file' / 'store'} cannot be written: Not a directory" in said
    own = dataclasses.replace(ckpt, path=tmp_path / "toy")
    (tmp_path / "toy").mkdir()
    for name in ("config.json", "params", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "toy" / name).symlink_to(ckpt.path / name)
    (tmp_path / "toy" / "drafts").write_text("")
    said = refusal(capsys, command(corpus, own, tmp_path / "work", "no"))
    assert "its folder drafts cannot be written: Not a directory" in said and not (tmp_path / "work").exists()


# A parent that dies ------------------------------------------------------------------------------


def children(pid: int) -> list[int]:
    """The processes of a process, on Linux."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = stat.read_text().rpartition(") ")
            if int(rest.split()[1]) == pid and rest[0] != "Z":
                found.append(int(name.split()[0]))
    return found


@pytest.mark.sweep(quick=["9"])
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_a_count_that_is_killed(ckpt, tmp_path, how):
    corpus = tmp_path / "a.txt"
    corpus.write_text("the end of the tale of the cat on the mat\n" * 300_000)
    argv = ["rank", corpus, "--ckpt", ckpt.path, "--out", tmp_path / "r.npz", "--processes", 2]
    parent = subprocess.Popen(
        [sys.executable, "-m", "train", *map(str, argv)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while len(workers := children(parent.pid)) < 3:  # two, and the tracker that multiprocessing keeps
            assert time.monotonic() < deadline and parent.poll() is None, "no workers came"
            time.sleep(0.05)
        time.sleep(1)
        parent.send_signal(how)
        parent.wait()
        while alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < deadline + 30, f"{alive} live on"
            time.sleep(0.1)
    finally:
        for pid in (parent.pid, *children(parent.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        parent.wait()
    assert not (tmp_path / "r.npz").exists()
