"""Training of Medusa heads: what each head learns, runs that resume, and the tree that fits the heads."""

from __future__ import annotations

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frspec_jax import api
from frspec_jax.api import Request
from frspec_jax.config import TreeConfig
from frspec_jax.drafters.medusa import PUBLISHED_63, check_choices, residual
from tests.support import toy
from tests.support.folders import checkpoint_folder
from tests.support.runs import drafted, refusal, same
from train import medusa
from train.__main__ import main
from train.batches import Batch
from train.medusa import MedusaRecipe, agreement, initial_params, loss_terms, train_step
from train.medusa_tree import measured, most_valuable
from train.optimiser import new_state, seed_words

CFG = toy.config(vocab_size=40)
HEADS = 4


@pytest.fixture(scope="module")
def row() -> Batch:
    """One row of two sequences and padding, whose answers begin and end within them."""
    rng, h = np.random.default_rng(0), CFG.hidden_size
    segment = np.array([1] * 11 + [2] * 9 + [0] * 4, np.int32)
    mask = np.array([0, 0, 1, 1, 1, 1, 0, 1, 1, 1, 1] + [0, 1, 1, 1, 1, 1, 1, 1, 1] + [0] * 4, np.float32)
    features, targets = (rng.normal(size=(24, h)).astype(np.float32) for _ in range(2))
    position = np.concatenate([np.arange(11), np.arange(9), np.zeros(4)]).astype(np.int32)
    row = Batch(features, rng.integers(0, 40, 24).astype(np.int32), targets, mask, segment, position)
    return jax.tree.map(lambda x: x[None], row)


@pytest.fixture(scope="module")
def heads():
    spec, params = toy.medusa(CFG)
    return spec, params, toy.target(CFG).head


def pairs_that_count(row: Batch, i: int) -> list[int]:
    """Pairs t of which head i's target, the distribution after token t + 1 + i, is an answer's in the same sequence."""
    mask, segment = np.asarray(row.mask)[0], np.asarray(row.segment)[0]
    return [t for t in range(len(mask) - i) if mask[t] and mask[t + i] and segment[t] == segment[t + i]]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


# The loss ----------------------------------------------------------------------------------------


def test_each_head_learns_the_distribution_its_place_ahead(row, heads):
    _, params, head = heads
    rows = np.asarray(head)[:17]
    total, metrics = loss_terms(params, jnp.asarray(rows), row, MedusaRecipe(head_decay=0.5))
    expected = 0.0
    for i, one in enumerate(params.heads):
        said = np.asarray(residual(one.blocks, jnp.asarray(row.features[0])) @ rows.T)
        kl, hits = [], []
        for t in pairs_that_count(row, i):
            want = log_softmax(rows @ row.targets[0, t + i])
            kl.append((np.exp(want) * (want - log_softmax(said[t]))).sum())
            hits.append(want.argmax() == said[t].argmax())
        assert len(kl) > 3
        np.testing.assert_allclose(metrics[f"kl_{i}"], np.mean(kl), rtol=1e-4)
        np.testing.assert_allclose(metrics[f"top1_{i}"], np.mean(hits), rtol=1e-4, atol=1e-6)
        expected += 0.5**i * np.mean(kl)
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_agreement_and_ranks_count_the_same_hits_as_numpy(row, heads):
    _, params, head = heads
    ids = np.array([3, 39, 17, 0, 25, 11, 8, 30, 22, 14, 6, 1])
    found, shares = np.asarray(agreement(params, head, row)), measured(params, head, ids, [row], 5)
    assert found.shape == (HEADS, 3) and shares.shape == (HEADS, 5)
    for i, one in enumerate(params.heads):
        said = np.asarray(residual(one.blocks, jnp.asarray(row.features[0])) @ head.T)
        best = {t: int((head @ row.targets[0, t + i]).argmax()) for t in pairs_that_count(row, i)}
        top = {t: np.argsort(-said[t])[:3].tolist() for t in best}
        hits = (sum(best[t] == top[t][0] for t in best), sum(best[t] in top[t] for t in best), len(best))
        assert found[i].tolist() == list(hits)
        for rank in range(5):
            right = sum(best[t] == ids[np.argsort(-said[t][ids])[rank]] for t in best)
            assert shares[i, rank] == pytest.approx(right / len(best))


def test_new_heads_say_what_the_target_says_of_the_feature(row):
    spec, _ = toy.medusa(CFG)
    params = initial_params(spec, CFG)
    features = jnp.asarray(row.features[0])
    for one in params.heads:
        np.testing.assert_array_equal(np.asarray(residual(one.blocks, features)), np.asarray(features))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_lowers_every_heads_loss(row, heads, optimizer):
    spec, _, head = heads
    recipe = MedusaRecipe(steps=60, lr=1e-2, warmup=2, loss_vocab=20, loss_random=10, optimizer=optimizer)
    state, kl = new_state(initial_params(spec, CFG), recipe), []
    for _ in range(recipe.steps):
        state, metrics = train_step(state, recipe, head, jnp.arange(40), seed_words(0), row)
        kl.append([float(metrics[f"kl_{i}"]) for i in range(HEADS)])
    first, last = np.mean(kl[:3], axis=0), np.mean(kl[-5:], axis=0)
    assert (last < 0.7 * first).all(), (first, last)


# The tree ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 6), st.integers(1, 40))
def test_the_tree_holds_the_most_valuable_paths(seed, count, ranks, nodes):
    rng = np.random.default_rng(seed)
    accuracy = -np.sort(-rng.dirichlet(np.ones(ranks + 1), count)[:, :ranks], axis=1)
    choices, value = most_valuable(accuracy, nodes)
    check_choices(choices, count)
    worth = {
        path: np.prod([accuracy[d, r] for d, r in enumerate(path)])
        for depth in range(1, count + 1)
        for path in itertools.product(range(ranks), repeat=depth)
    }
    best = sorted(worth.values(), reverse=True)[:nodes]
    np.testing.assert_allclose([worth[path] for path in choices], best, rtol=1e-9)
    assert value == pytest.approx(sum(best))


# The commands ------------------------------------------------------------------------------------

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
    "--heads",
    3,
)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return checkpoint_folder(tmp_path_factory.mktemp("train") / "toy", draft=False)


@pytest.fixture(scope="module")
def whole(ckpt, corpus, tmp_path_factory):
    """The store of features of a run in one go, which leaves the draft "whole"."""
    work = tmp_path_factory.mktemp("run") / "work"
    main(command(corpus, ckpt, work, "whole"))
    return work / "features"


def command(corpus, ckpt, work, name, *flags) -> list[str]:
    given = ("medusa", corpus, "--ckpt", ckpt.path, "--work", work, "--name", name, *FLAGS, *flags)
    return [str(arg) for arg in given]


@pytest.mark.sweep
def test_a_run_makes_a_draft_that_changes_nothing(ckpt, whole):
    spec, params = drafted(ckpt, "whole")
    assert (spec.num_heads, spec.num_layers, spec.own_lm_heads) == (3, 1, False)
    assert spec.choices == tuple(path for path in PUBLISHED_63 if len(path) <= 3)
    assert not same(params, initial_params(spec, ckpt.config))
    about = json.loads((ckpt.draft_folder("whole") / "config.json").read_text())["about"]
    assert about["held_out"]["step"] == 6 and len(about["held_out"]["top1"]) == 3
    vanilla, prompt = api.load(ckpt, "none"), np.array([5, 80, 33, 9], np.int32)
    expected = vanilla.generate_ids(prompt, Request(24)).tokens
    for tree in (TreeConfig(60, 6, 10), TreeConfig(8, 3, 4)):
        result = api.load(ckpt, api.Draft("whole", vocab=32, tree=tree)).generate_ids(prompt, Request(24))
        assert result.tokens == expected and result.method == "medusa+fr"


def test_ctrl_c_saves_and_the_run_resumes_bit_for_bit(ckpt, whole, tmp_path, monkeypatch, capsys):
    calls, step = itertools.count(1), medusa.train_step

    def interrupted(*args):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    argv = command(whole, ckpt, tmp_path / "work", "stopped")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(medusa, "train_step", interrupted)
        main(argv)
    assert stopped.value.code == 130 and not (ckpt.path / "drafts" / "stopped").exists()
    main(argv)
    assert "resumed at step 4" in capsys.readouterr().err
    assert same(drafted(ckpt, "stopped")[1], drafted(ckpt, "whole")[1])


@pytest.mark.sweep
def test_heads_can_start_from_others(ckpt, whole, tmp_path, capsys):
    """With a learning rate of zero nothing moves."""
    main(command(whole, ckpt, tmp_path / "work", "second", "--start-from", "whole", "--lr", "0"))
    assert same(drafted(ckpt, "second")[1], drafted(ckpt, "whole")[1])
    argv = command(whole, ckpt, tmp_path / "more", "third", "--start-from", "whole", "--heads", "4")
    assert "has 3 heads of 1 residual blocks; say --heads 3 --layers 1" in refusal(capsys, argv)
    assert not (tmp_path / "more").exists()


def test_refusals_of_runs(ckpt, whole, tmp_path, capsys):
    assert "--heads 0" in refusal(capsys, command(whole, ckpt, tmp_path / "work", "no", "--heads", "0"))
    argv = command(whole, ckpt, whole.parent, "other", "--heads", "2")
    assert "holds a run with another recipe" in refusal(capsys, argv)
    argv = ["eagle", whole, "--ckpt", ckpt.path, "--work", tmp_path / "e", "--start-from", "whole"]
    assert "is a draft of kind medusa; give one of kind eagle" in refusal(capsys, argv)


@pytest.mark.sweep
def test_the_tree_is_fitted_to_the_heads_and_drafts_with_it_change_nothing(ckpt, whole, tmp_path, capsys):
    main(command(whole, ckpt, tmp_path / "work", "fitted", "--start-from", "whole", "--lr", "0"))
    tree = ["medusa-tree", whole, "--ckpt", ckpt.path, "--draft", "fitted", "--row", 16, "--rows", 2]
    main([str(arg) for arg in [*tree, "--nodes", 12, "--ranks", 6, "--draft-vocab", 64]])
    assert "12 nodes below the root" in capsys.readouterr().out
    folder = ckpt.draft_folder("fitted")
    spec, params = drafted(ckpt, "fitted")
    facts = json.loads((folder / "config.json").read_text())["about"]["tree"]
    accuracy = np.array(facts["accuracy"])
    assert accuracy.shape == (3, 6) and facts["draft_vocab"] == 64 and accuracy.max() <= 1
    assert spec.choices[0] == (0,) and len(spec.choices) == 12
    assert same(params, drafted(ckpt, "whole")[1])
    assert json.loads((folder / "config.json").read_text())["about"]["held_out"]["step"] == 6
    model = api.load(ckpt, api.Draft("fitted", vocab=64, tree=TreeConfig(60, 6, 10)))
    assert model.tree.size == 13
    prompt = np.array([5, 80, 33, 9], np.int32)
    expected = api.load(ckpt, "none").generate_ids(prompt, Request(24)).tokens
    assert model.generate_ids(prompt, Request(24)).tokens == expected


def test_refusals_of_trees(ckpt, whole, tmp_path, capsys):
    tree = ["medusa-tree", whole, "--ckpt", ckpt.path, "--draft", "whole", "--row", 16, "--rows", 2]
    before = (ckpt.draft_folder("whole") / "config.json").read_text()
    assert "--nodes 300 is out of range" in refusal(capsys, [*tree, "--nodes", 300])
    assert "--ranks 0 is out of range" in refusal(capsys, [*tree, "--ranks", 0])
    few = tmp_path / "few.txt"
    few.write_text("the end")
    argv = [*tree[:1], few, *tree[2:], "--work", tmp_path / "work"]
    assert "too few held-out answers" in refusal(capsys, argv)
    assert (ckpt.draft_folder("whole") / "config.json").read_text() == before
