"""Training of EAGLE-3: passes that are what drafting does, features with taps, and runs that resume."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frspec_jax import api, drafting, kv_cache, llama
from frspec_jax.api import Request
from frspec_jax.checkpoint import write_draft
from frspec_jax.drafters.base import Target
from frspec_jax.drafters.eagle3 import AS_PUBLISHED, Norms, with_embedding
from frspec_jax.placement import Placement
from pallas_kernels.dispatch import AUTO
from pallas_kernels.visibility import Sees, causal
from tests.support import toy
from tests.support.folders import checkpoint_folder
from tests.support.runs import chats, drafted, refusal, same
from train import eagle3
from train.__main__ import main
from train.batches import Batch
from train.eagle3 import Eagle3Recipe, agreement, loss_terms, train_step, unrolled_passes
from train.features import FeatureStore
from train.optimiser import new_state

CFG = toy.config(vocab_size=40)
IDS = np.array([1, 4, 5, 9, 12, 17, 20, 21, 22, 28, 30, 31, 33, 36, 38])
COUNT = 9


@pytest.fixture(scope="module")
def row() -> Batch:
    """One row: a sequence, another that begins in its middle, and padding."""
    rng, h = np.random.default_rng(5), CFG.hidden_size
    return Batch(
        features=rng.normal(size=(19, 4 * h)).astype(np.float32),
        next_tokens=rng.integers(0, 40, 19).astype(np.int32),
        targets=rng.normal(size=(19, h)).astype(np.float32),
        mask=np.repeat([1.0, 0.0], [15, 4]).astype(np.float32) * (rng.random(19) < 0.8),
        segment=np.repeat([1, 2, 0], [COUNT, 6, 4]).astype(np.int32),
        position=np.concatenate([np.arange(COUNT), 30 + np.arange(6), np.zeros(4)]).astype(np.int32),
    )


@pytest.fixture(scope="module")
def draft():
    """A draft with its drafter, the weights that drafts, and the target's embedding and head."""
    spec, params = toy.eagle3(CFG, ids=IDS)
    target = toy.target(CFG)
    drafter, weights = spec.assemble(Target(CFG, target), params, IDS, kernels=AUTO)
    return spec, params, drafter, weights, target.embedding, target.head


def close(mine, theirs) -> bool:
    return float(np.abs(np.asarray(mine) - np.asarray(theirs)).max()) < 1e-4


def of_one_row(params, layer, embedding, row, passes, norms=AS_PUBLISHED):
    batch = jax.tree.map(lambda x: x[None], row)
    unrolled = jax.jit(unrolled_passes, static_argnames=("config", "unroll", "norms"))
    return [output[0] for output in unrolled(params, layer, embedding, batch, passes, norms)]


@pytest.mark.parametrize("norms", [AS_PUBLISHED, Norms(True, "joined", True), Norms(taps="each")])
def test_passes_are_self_fed_steps_through_the_cache(row, draft, norms):
    """Pass 0 is the drafter's own way with true pairs; pass s is its s-th step on outputs of its own behind them."""
    spec, params, drafter, weights, embedding, _ = draft
    drafter = dataclasses.replace(drafter, norms=norms)
    extend = jax.jit(drafter.extend)
    inputs = embedding[row.next_tokens]
    passes = of_one_row(params, spec.layer_of(CFG), embedding, row, 4, norms)
    for pairs in (slice(0, COUNT), slice(COUNT, 15)):
        count = pairs.stop - pairs.start
        where = Placement(jnp.asarray(row.position[pairs]), jnp.int32(0), Sees(jnp.int32(0), causal(count)))
        features = drafter.fused(weights, jnp.asarray(row.features[pairs]))
        own, cache = extend(weights, inputs[pairs], features, where, drafter.new_memory(256, jnp.float32).kv)
        assert close(passes[0][pairs], drafter.head_input(weights, own))
        if pairs.start:
            continue
        for committed in range(1, COUNT - 2):
            feature, drafted_cache = own[committed - 1], cache
            for step in range(1, 4):
                pair = committed + step - 1
                sees = Sees(jnp.int32(committed), jnp.array([[2**step - 1]], jnp.int32))
                where = Placement(jnp.array([pair], jnp.int32), jnp.int32(pair), sees)
                rows, drafted_cache = extend(weights, inputs[pair : pair + 1], feature[None], where, drafted_cache)
                feature = rows[0]
                assert close(passes[step][pair], drafter.head_input(weights, rows)[0])


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def counted(row: Batch, s: int) -> list[int]:
    """Pairs of pass s: those that count and have the s pairs before them in their own sequence."""
    return [t for t in range(s, 19) if row.mask[t] and row.segment[t] == row.segment[t - s]]


@pytest.mark.sweep
def test_the_loss_is_over_pairs_whose_token_is_in_the_vocabulary(row, draft):
    spec, params, _, _, embedding, head = draft
    layer = spec.layer_of(CFG)
    batch = jax.tree.map(lambda x: x[None], row)
    bare = dataclasses.replace(params, ids=None)
    total, metrics = loss_terms(
        bare, layer, embedding, head, jnp.asarray(IDS), batch, Eagle3Recipe(unroll=3, unroll_decay=0.5)
    )
    logits = np.asarray(head) @ row.targets.T
    outputs = of_one_row(params, layer, embedding, row, 3)
    expected, dropped = 0.0, 0
    for s, output in enumerate(outputs):
        said = np.asarray(output @ params.lm_head.T)
        inside = [t for t in counted(row, s) if logits[:, t].argmax() in IDS]
        dropped += len(counted(row, s)) - len(inside)
        wants = [log_softmax(logits[IDS, t]) for t in inside]
        kl = [(np.exp(w) * (w - log_softmax(said[t]))).sum() for w, t in zip(wants, inside, strict=True)]
        np.testing.assert_allclose(metrics[f"kl_{s}"], np.mean(kl), rtol=1e-4)
        expected += 0.5**s * np.mean(kl)
    assert dropped > 0
    np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_agreement_is_with_the_targets_whole_vocabulary(row, draft):
    spec, params, _, _, embedding, head = draft
    layer, batch = spec.layer_of(CFG), jax.tree.map(lambda x: x[None], row)
    found = np.asarray(agreement(params, layer, embedding, head, jnp.asarray(IDS), batch, 2))
    for s, output in enumerate(of_one_row(params, layer, embedding, row, 2)):
        said = np.asarray(output @ params.lm_head.T)
        best = {t: int((np.asarray(head) @ row.targets[t]).argmax()) for t in counted(row, s)}
        top = {t: IDS[np.argsort(-said[t])[:3]].tolist() for t in best}
        hits = (sum(best[t] == top[t][0] for t in best), sum(best[t] in top[t] for t in best), len(best))
        assert found[s].tolist() == list(hits)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_lowers_the_loss(row, draft, optimizer):
    spec, _, _, _, embedding, head = draft
    recipe = Eagle3Recipe(steps=40, lr=1e-2, warmup=2, unroll=2, optimizer=optimizer)
    params = eagle3.initial_params(jax.random.key(0), spec, CFG, head, IDS)
    state, losses = new_state(params, recipe), []
    batch = jax.tree.map(lambda x: x[None], row)
    for _ in range(recipe.steps):
        state, metrics = train_step(state, spec.layer_of(CFG), recipe, embedding, head, jnp.asarray(IDS), batch)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.5 * losses[0]


# The command -------------------------------------------------------------------------------------

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
    "--unroll",
    2,
    "--draft-vocab",
    64,
)
TAPS = (2, 2, 2)  # of five layers: the third, the middle one, and the last but two


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return checkpoint_folder(tmp_path_factory.mktemp("train") / "toy", draft=False, layers=5)


@pytest.fixture(scope="module")
def whole(ckpt, tmp_path_factory):
    """The work folder of a run in one go, which leaves the draft "whole"."""
    work = tmp_path_factory.mktemp("run")
    main(command(chats(work / "chats.jsonl"), ckpt, work / "work", "whole"))
    return work / "work"


def command(corpus, ckpt, work, name, *flags) -> list[str]:
    given = ("eagle3", corpus, "--ckpt", ckpt.path, "--work", work, "--name", name, *FLAGS, *flags)
    return [str(arg) for arg in given]


def test_a_run_makes_a_draft_that_changes_nothing(ckpt, whole):
    spec, params = drafted(ckpt, "whole")
    ids = np.asarray(params.ids)
    assert (spec.taps, spec.draft_vocab_size, spec.rope_theta) == (TAPS, 64, ckpt.config.rope_theta)
    assert np.array_equal(ids, np.sort(drafting.draft_ids(ckpt, api.Draft(vocab=64))))
    assert not np.array_equal(params.lm_head, ckpt.params().head[ids]), "the head is trained too"
    prompt = np.array([5, 80, 33, 9], np.int32)
    expected = api.load(ckpt, "none").generate_ids(prompt, Request(24)).tokens
    for size, method in (("full", "eagle3"), (32, "eagle3+fr")):
        result = api.load(ckpt, api.Draft("whole", vocab=size, pace="fixed")).generate_ids(prompt, Request(24))
        assert result.tokens == expected and result.method == method


def test_features_have_the_targets_streams_beside_them(ckpt, whole):
    store, h = FeatureStore(whole / "features", ckpt, TAPS), ckpt.config.hidden_size
    tokens, _, features = store.sequence(3)
    cache = kv_cache.empty(ckpt.config, 256, jnp.float32)
    where = Placement.chain(jnp.int32(0), len(tokens))
    expected, _ = llama.forward(ckpt.params(), ckpt.config, tokens, where, cache, taps=TAPS)
    assert features.shape == (len(tokens), 4 * h)
    np.testing.assert_allclose(features, np.asarray(expected), rtol=2e-3, atol=2e-3)  # stored as float16


@pytest.mark.sweep
def test_a_plain_store_is_run_through_the_target_again(ckpt, whole, tmp_path):
    """A store of EAGLE-2's features has the same tokens: the run that they give is the same, bit for bit."""
    corpus = whole.parent / "chats.jsonl"
    main(
        [
            str(a)
            for a in (
                "eagle",
                corpus,
                "--ckpt",
                ckpt.path,
                "--work",
                tmp_path / "two",
                "--name",
                "two",
                "--rows",
                2,
                "--row",
                16,
                "--steps",
                1,
                "--loss-vocab",
                64,
                "--unroll",
                1,
            )
        ]
    )
    main(command(tmp_path / "two" / "features", ckpt, tmp_path / "work", "again"))
    assert same(drafted(ckpt, "again")[1], drafted(ckpt, "whole")[1])


def test_ctrl_c_saves_and_the_run_resumes_bit_for_bit(ckpt, whole, tmp_path, monkeypatch, capsys):
    calls, step = itertools.count(1), eagle3.train_step

    def interrupted(*args):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    argv = command(whole / "features", ckpt, tmp_path / "work", "stopped")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(eagle3, "train_step", interrupted)
        main(argv)
    assert stopped.value.code == 130 and not (ckpt.path / "drafts" / "stopped").exists()
    main(argv)
    assert "resumed at step 4" in capsys.readouterr().err
    assert not (tmp_path / "work" / "features").exists(), "a store with taps is read as it is"
    assert same(drafted(ckpt, "stopped")[1], drafted(ckpt, "whole")[1])


def test_a_draft_can_start_from_another(ckpt, whole, tmp_path, capsys):
    """With a learning rate of zero nothing moves; the vocabulary is the old draft's."""
    argv = command(whole / "features", ckpt, tmp_path / "work", "second", "--start-from", "whole", "--lr", "0")
    assert "--draft-vocab does not go with --start-from" in refusal(capsys, argv)
    at = argv.index("--draft-vocab")
    main(argv[:at] + argv[at + 2 :])
    assert same(drafted(ckpt, "second")[1], drafted(ckpt, "whole")[1])


@pytest.mark.sweep
def test_a_draft_of_other_norms_and_an_embedding_of_its_own_keeps_them(ckpt, whole, tmp_path):
    spec, params = drafted(ckpt, "whole")
    norms, embedding = Norms(True, "joined", True), 0.5 * ckpt.params().embedding
    spec = dataclasses.replace(spec, norms=norms, own_embedding=True)
    (folder := ckpt.path / "drafts" / "of-speculators").mkdir()
    write_draft(folder, spec, with_embedding(params, embedding), ckpt.fingerprint, {})
    flags = ("--start-from", "of-speculators", "--lr", "0", "--steps", "1")
    argv = command(whole / "features", ckpt, tmp_path / "work", "on", *flags)
    main([arg for arg in argv if arg not in ("--draft-vocab", "64")])
    found = drafted(ckpt, "on")
    assert found[0] == spec and same(found[1], with_embedding(params, embedding))


def test_refusals(ckpt, whole, tmp_path, capsys):
    argv = command(whole / "features", ckpt, whole, "other", "--unroll", "3")
    assert "holds a run with another recipe" in refusal(capsys, argv)
    argv = command(whole / "features", ckpt, tmp_path / "work", "other", "--draft-vocab", "9999")
    assert "--draft-vocab 9999 is larger than the vocabulary" in refusal(capsys, argv)
    shallow = checkpoint_folder(tmp_path / "shallow", draft=False)
    assert "has 2 layers" in refusal(capsys, command(whole / "features", shallow, tmp_path / "w", "other"))
    argv = ["eagle", whole / "features", "--ckpt", ckpt.path, "--work", tmp_path / "e", "--name", "plain"]
    assert "holds features with the taps [2, 2, 2], and [] are needed" in refusal(capsys, argv)
