"""Runs of `python -m train eagle`: what they leave, how they resume, and what they refuse."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frspec_jax.vocabulary import Ranking
from tests.support import toy
from tests.support.folders import checkpoint_folder
from tests.support.runs import refusal, same
from train import eagle, start
from train.__main__ import main
from train.batches import Packing
from train.features import FeatureStore

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return checkpoint_folder(tmp_path_factory.mktemp("train") / "toy", draft=False, ranking=False)


FLAGS = (
    "--rows",
    2,
    "--row",
    16,
    "--steps",
    6,
    "--save-every",
    3,
    "--eval-every",
    4,
    "--warmup",
    1,
    "--loss-vocab",
    64,
    "--loss-random",
    32,
    "--unroll",
    1,
)

# The command line, killed in its fifth step, as soon as the checkpoint of the third is whole.
KILLED = """
import itertools, os, signal, sys, time
from pathlib import Path
from train import eagle
from train.__main__ import main
work, calls, step = Path(sys.argv[sys.argv.index("--work") + 1]), itertools.count(1), eagle.train_step
def killed(*args):
    if next(calls) == 5:
        while not (work / "checkpoints" / "3").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args)
eagle.train_step = killed
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def uninterrupted(ckpt, corpus, tmp_path_factory):
    """The draft of a run in one go, and the store of features that it made."""
    work = tmp_path_factory.mktemp("run") / "work"
    main(command(corpus, ckpt, work, "whole"))
    return drafted(ckpt, "whole"), work / "features"


def command(corpus, ckpt, work, name, *flags) -> list[str]:
    given = ("eagle", corpus, "--ckpt", ckpt.path, "--work", work, "--name", name, *FLAGS, *flags)
    return [str(arg) for arg in given]


def drafted(ckpt, name):
    folder = ckpt.draft_folder(name)
    about = json.loads((folder / "config.json").read_text())["about"]
    return ckpt.draft(folder)[1], about["held_out"]


def test_a_run_makes_a_draft_and_keeps_its_figures(ckpt, corpus, uninterrupted):
    (_, held_out), features = uninterrupted
    assert held_out["step"] == 6 and len(held_out["top1"]) == len(held_out["top3"]) == eagle.PASSES
    assert len(FeatureStore(features, ckpt)) == 42
    rows = [json.loads(line) for line in (features.parent / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 6, 6] and rows[1]["loss"] > 0 and rows[1]["utilisation"] > 0
    assert "held_out" in rows[0] and "held_out" in rows[2]
    assert (features.parent / "curves.png").stat().st_size > 5000


def test_a_killed_run_resumes_bit_for_bit(ckpt, corpus, uninterrupted, tmp_path, capsys):
    work = tmp_path / "work"
    argv = command(corpus, ckpt, work, "killed")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, *argv], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (ckpt.path / "drafts" / "killed").exists()
    main(argv)
    assert "resumed at step 3" in capsys.readouterr().err
    params, held_out = drafted(ckpt, "killed")
    assert same(params, uninterrupted[0][0]) and held_out == uninterrupted[0][1]


def test_ctrl_c_saves_and_the_run_resumes_bit_for_bit(ckpt, corpus, uninterrupted, tmp_path, monkeypatch, capsys):
    calls, step = itertools.count(1), eagle.train_step

    def interrupted(*args):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    store = uninterrupted[1]  # as a corpus this time, so the store is read and not made
    argv = command(store, ckpt, tmp_path / "work", "stopped")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(eagle, "train_step", interrupted)
        main(argv)
    assert stopped.value.code == 130 and not (ckpt.path / "drafts" / "stopped").exists()
    main(argv)
    assert "resumed at step 4" in capsys.readouterr().err
    assert not (tmp_path / "work" / "features").exists()
    assert same(drafted(ckpt, "stopped")[0], uninterrupted[0][0])


@pytest.mark.sweep
def test_own_answers_are_the_two_commands_in_one(tmp_path, capsys):
    ckpt = checkpoint_folder(tmp_path / "toy", draft=False, ranking=False)
    prompts, store = tmp_path / "prompts.jsonl", tmp_path / "store"
    words = ("the", "end", "of", "a", "tale", "was", "in", "it")
    turns = ([{"from": "human", "value": " ".join(pair)}] for pair in itertools.product(words, words))
    prompts.write_text("".join(json.dumps({"id": "x", "conversations": turn}) + "\n" for turn in turns))
    main(["answers", str(prompts), "--ckpt", str(ckpt.path), "--out", str(store), "--limit-tokens", "100000"])
    main(command(store, ckpt, tmp_path / "apart", "apart"))
    flags = ("--own-answers", "100000")
    main(command(prompts, ckpt, tmp_path / "work", "together", *flags))
    assert same(drafted(ckpt, "together")[0], drafted(ckpt, "apart")[0])
    answers = FeatureStore(tmp_path / "work" / "answers", ckpt)
    ranking = Ranking.load(ckpt.path / "ranking.npz")
    assert (ranking.counts == np.bincount(answers.tokens[answers.answer == 1], minlength=len(ranking.counts))).all()
    assert ranking.corpora == ("answers to prompts.jsonl",)

    Ranking(ranking.counts + 1, ranking.tokenizer, ("mine",)).save(ckpt.path / "ranking.npz")
    shutil.rmtree(ckpt.path / "drafts" / "together")
    main(command(prompts, ckpt, tmp_path / "work", "together", *flags))  # whole already: nothing is answered again
    assert same(drafted(ckpt, "together")[0], drafted(ckpt, "apart")[0])
    assert Ranking.load(ckpt.path / "ranking.npz").corpora == ("mine",)
    message = refusal(capsys, command(prompts, ckpt, tmp_path / "work", "more", "--own-answers", "200000"))
    assert "holds a run with another own_answers" in message
    assert len(FeatureStore(tmp_path / "work" / "answers", ckpt)) == len(answers)  # or it could not be resumed
    message = refusal(capsys, command(store, ckpt, tmp_path / "other", "other", *flags))
    assert "--own-answers takes conversations" in message
    message = refusal(capsys, command(prompts, ckpt, tmp_path / "other", "other", "--own-answers", "0"))
    assert "--own-answers 0 must be at least 1" in message and not (tmp_path / "other").exists()
    (tmp_path / "tale.txt").write_text("the end of the tale")
    message = refusal(capsys, command(tmp_path / "tale.txt", ckpt, tmp_path / "other", "other", *flags))
    assert "hold no prompt of a user" in message and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--lr", "0.5"), "another recipe"),
        (("--seed", "1"), "another seed"),
        (("--rows", "3"), "rows"),
        (("--loss-on", "all"), "another loss_on"),
    ],
)
def test_a_run_is_not_resumed_as_another(ckpt, uninterrupted, capsys, flags, said):
    store = uninterrupted[1]
    argv = command(store, ckpt, store.parent, "other", *flags)
    message = refusal(capsys, argv)
    assert said in message and f"--work {store.parent} holds a run" in message
    assert not (ckpt.path / "drafts" / "other").exists()


def test_a_draft_is_not_overwritten(ckpt, uninterrupted, tmp_path, capsys):
    assert "whole exists already; remove it or choose another name" in refusal(
        capsys, command(uninterrupted[1], ckpt, tmp_path / "work", "whole")
    )
    assert not (tmp_path / "work").exists()


@pytest.mark.sweep
def test_a_draft_can_start_from_another(ckpt, uninterrupted, tmp_path):
    """With a learning rate of zero nothing moves: the new draft is the old one."""
    main(command(uninterrupted[1], ckpt, tmp_path / "work", "second", "--start-from", "whole", "--lr", "0"))
    assert same(drafted(ckpt, "second")[0], uninterrupted[0][0])


@pytest.mark.sweep
def test_the_loss_can_count_prompts_too(ckpt, uninterrupted, tmp_path):
    main(command(uninterrupted[1], ckpt, tmp_path / "work", "all", "--loss-on", "all"))
    assert not same(drafted(ckpt, "all")[0], uninterrupted[0][0])
    about = json.loads((ckpt.draft_folder("all") / "config.json").read_text())["about"]
    assert about["loss_on"] == "all"


def test_a_draft_to_start_from_that_is_not_there_is_refused(ckpt, uninterrupted, tmp_path, capsys):
    said = refusal(capsys, command(uninterrupted[1], ckpt, tmp_path / "work", "third", "--start-from", "nosuch"))
    assert "--start-from nosuch is neither a draft" in said and not (tmp_path / "work").exists()


@pytest.mark.sweep(quick=["flags0"])
@pytest.mark.parametrize("flags", [("--start", "random", "--units", "one"), ("--start", "random"), ()])
def test_a_new_draft_starts_as_the_flags_say(ckpt, uninterrupted, tmp_path, flags):
    """Again nothing moves, so the draft is what the run began with."""
    name = "start" + "".join(flags)
    main(command(uninterrupted[1], ckpt, tmp_path / "work", name, "--lr", "0", *flags))
    table = np.asarray(ckpt.params(jnp.float32).embedding)
    packing = Packing((FeatureStore(uninterrupted[1], ckpt),), rows=2, row=16, seed=0)
    units = start.ONE if "--units" in flags else start.Units.measured(packing, table)
    expected = eagle.initial_params(jax.random.key(0), toy.draft(ckpt.config)[0], ckpt.config)
    if "--start" not in flags:
        expected = start.fitted(expected, packing, table, units)
    begun = drafted(ckpt, name)[0]
    assert same(begun, start.folded(expected, units)) and not same(begun, uninterrupted[0][0])


def test_too_few_sequences_are_refused(ckpt, tmp_path, capsys):
    (tmp_path / "few.txt").write_text("the end of the tale")
    assert "too few sequences" in refusal(capsys, command(tmp_path / "few.txt", ckpt, tmp_path / "work", "few"))
