"""Training at scale: parts of a batch, several devices and several hosts give the run that one device gives."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import toy
from tests.support.folders import checkpoint_folder
from tests.support.runs import chats, refusal
from train import curves, recipe
from train.__main__ import main
from train.batches import Batch
from train.optimiser import gradients
from train.recipe import Recipe

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--rows",
    4,
    "--row",
    16,
    "--steps",
    6,
    "--save-every",
    3,
    "--eval-every",
    3,
    "--warmup",
    1,
    "--loss-vocab",
    64,
    "--loss-random",
    32,
    "--unroll",
    2,
)


# One step ----------------------------------------------------------------------------------------

CFG = toy.config()


def batch_of(rows: int, tokens: int = 12) -> Batch:
    """Random pairs, of which each row counts another share."""
    rng = np.random.default_rng(0)
    features, targets = 0.2 * rng.normal(size=(2, rows, tokens, CFG.hidden_size)).astype(np.float32)
    mask = (rng.random((rows, tokens)) < np.linspace(0.1, 1, rows)[:, None]).astype(np.float32)
    position = np.broadcast_to(np.arange(tokens, dtype=np.int32), (rows, tokens))
    ids = rng.integers(0, CFG.vocab_size, (rows, tokens), dtype=np.int32)
    return Batch(features, ids, targets, mask, np.ones((rows, tokens), np.int32), position)


def step(settings: Recipe, rows: int = 8):
    """The gradients and metrics of one batch under a recipe."""
    target, shape = toy.target(CFG), toy.draft(CFG)[0]
    params = recipe.initial_params(jax.random.key(0), shape, CFG)
    layer, batch = shape.layer_of(CFG), batch_of(rows)
    embedding, head = settings.cast((target.embedding, target.head))

    @jax.jit
    def run(params, batch):
        def loss(params, part, counts):
            return recipe.loss_terms(params, layer, embedding, head, part, settings, counts)

        return gradients(loss, params, batch, recipe.pairs_counted(batch, settings.unroll), settings)

    return run(params, jax.tree.map(jnp.asarray, batch))


def distance(a, b) -> float:
    """The largest difference between two pytrees of arrays, relative to the largest entry of each array."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.abs(x - y).max() / (jnp.abs(x).max() + 1e-9)) for x, y in pairs)


@pytest.mark.sweep(quick=["8"])
@pytest.mark.parametrize("parts", [2, 8])
def test_parts_of_a_batch_add_up_to_the_batch(parts):
    """Exactly, though they hold different numbers of pairs: a mean of means would not."""
    whole, split = step(Recipe(unroll=2)), step(Recipe(unroll=2, accumulate=parts))
    assert distance(whole, split) < 1e-5


def test_recomputed_logits_change_nothing():
    assert distance(step(Recipe(unroll=2)), step(Recipe(unroll=2, remat="heads"))) < 1e-6


def test_bfloat16_products_give_nearly_the_same_gradients_in_float32():
    exact, rounded = step(Recipe(unroll=2)), step(Recipe(unroll=2, compute="bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded))
    for a, b in zip(jax.tree.leaves(exact[0]), jax.tree.leaves(rounded[0]), strict=True):
        cosine = float((a * b).sum() / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))
        assert cosine > 0.995
    assert distance(exact, rounded) > 1e-6, "nothing was computed in bfloat16"


def test_recipes_say_how_much_work_a_step_is():
    _, params = toy.draft(CFG)
    head = toy.target(CFG).head
    matrices = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
    one = Recipe(loss_vocab=0).flops(params, head, passes=1, outputs=1)
    assert one == 6 * matrices + 6 * head.size
    assert Recipe(loss_vocab=8, loss_random=2).flops(params, head, 1, 1) == 6 * matrices + 6 * 10 * CFG.hidden_size


# Whole runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return checkpoint_folder(tmp_path_factory.mktemp("scale") / "toy", draft=False, ranking=False)


@pytest.fixture(scope="module")
def store(ckpt, tmp_path_factory):
    """A run on one device, whose store of features the others share."""
    work = tmp_path_factory.mktemp("one") / "work"
    corpus = chats(work.parent / "chats.jsonl")
    flags = ("--accept-every", 3)
    main([str(a) for a in ("eagle", corpus, "--ckpt", ckpt.path, "--work", work, "--name", "one", *FLAGS, *flags)])
    return work / "features"


def start(ckpt, store, work, name, devices, *flags) -> subprocess.Popen:
    argv = ("eagle", store, "--ckpt", ckpt.path, "--work", work, "--name", name, *FLAGS, "--accept-every", 3, *flags)
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-m", "train", *map(str, argv)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finished(*runs: subprocess.Popen) -> list[str]:
    """What each run said. One that hangs is aborted, so that faulthandler tells where each of them stood."""
    with ThreadPoolExecutor() as readers:
        said = [readers.submit(run.communicate) for run in runs]
        if wait(said, timeout=400).not_done:
            for run in runs:
                run.send_signal(signal.SIGABRT)
        outputs = [future.result()[0] for future in said]
    assert [run.returncode for run in runs] == [0] * len(runs), "\n".join(outputs)
    return outputs


def compare(ckpt, store, work, name) -> None:
    """The same curve and the same draft as the run on one device, but for the order of summation."""
    mine, one = curves.read(work), curves.read(store.parent)
    assert [row["step"] for row in mine] == [row["step"] for row in one]
    for a, b in zip(mine, one, strict=True):
        for key in set(a) & {"loss", "kl_0", "kl_1"}:
            assert a[key] == pytest.approx(b[key], rel=1e-3)
    lengths = [[row["accepted_length"] for row in rows if "accepted_length" in row] for rows in (mine, one)]
    assert lengths[0] == lengths[1] and len(lengths[0]) == 2
    drafts = [ckpt.draft(ckpt.draft_folder(draft))[1] for draft in (name, "one")]
    assert distance(*drafts) < 1e-4  # measured: 2e-7; Muon's orthogonalisation magnifies rounding


@pytest.mark.sweep
def test_four_devices_give_the_run_of_one(ckpt, store, tmp_path):
    run = start(ckpt, store, tmp_path / "work", "four", 4)
    (said,) = finished(run)
    assert "4 devices" in said
    compare(ckpt, store, tmp_path / "work", "four")


@pytest.mark.sweep
def test_two_hosts_give_the_run_of_one(ckpt, store, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = ("--coordinator", f"localhost:{port}", "--processes", 2, "--process")
    runs = [start(ckpt, store, tmp_path / "work", "hosts", 1, *hosts, process) for process in range(2)]
    said = finished(*runs)
    assert "2 devices" in said[0] and "wrote" in said[0] and "wrote" not in said[1]
    compare(ckpt, store, tmp_path / "work", "hosts")


@pytest.mark.sweep
def test_the_best_weights_are_kept(ckpt, store, tmp_path, monkeypatch):
    """Held-out agreement is made to fall: then the draft is what the first evaluation saw."""
    scores = iter([0.5, 0.2, 0.0])
    from train.task import Task

    monkeypatch.setattr(Task, "held_out", lambda self, state, batches: {"top1": [next(scores)], "top3": [0.0]})
    argv = ("eagle", store, "--ckpt", ckpt.path, "--work", tmp_path / "work", "--name", "best", *FLAGS)
    main([str(a) for a in argv])
    about = json.loads((ckpt.path / "drafts" / "best" / "config.json").read_text())["about"]
    assert about["held_out"]["step"] == 3


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--accumulate", 3], "--rows 4 cannot be split evenly into 3 parts"),
        (["--rows", 0], "--rows 0 must be at least 1"),
        (["--accumulate", 0], "--accumulate 0 must be at least 1"),
        (["--accept-every", -1], "--accept-every -1 must be 0 (never) or a number of steps"),
        (["--processes", 2], "--coordinator, --processes N and --process I go together"),
        (["--coordinator", "h:1", "--processes", 2, "--process", 2], "with I from 0 to N - 1"),
    ],
)
def test_what_cannot_be_spread_is_refused(ckpt, store, tmp_path, capsys, flags, said):
    argv = ["eagle", store, "--ckpt", ckpt.path, "--work", tmp_path / "work", "--name", "no", *FLAGS, *flags]
    assert said in refusal(capsys, argv)
    assert not (tmp_path / "work" / "checkpoints").exists()


# Curves ------------------------------------------------------------------------------------------


def test_curves_are_drawn_of_several_runs(ckpt, store, tmp_path, capsys):
    main(["curves", str(store.parent), str(store.parent), "--out", str(tmp_path / "both.svg")])
    assert (tmp_path / "both.svg").read_text().startswith("<?xml")
    with open(store.parent / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "held_')  # a line that a kill cut short
    assert len(curves.read(store.parent)) == 5
    line = refusal(capsys, ["curves", tmp_path])
    assert "metrics.jsonl cannot be read" in line
    assert "give a name that ends in .png or .svg" in refusal(capsys, ["curves", store.parent, "--out", "a.txt"])


def test_a_recipe_is_hashable():
    assert hash(Recipe(accumulate=2)) == hash(dataclasses.replace(Recipe(), accumulate=2))
