"""Training: every pair once, passes that are what drafting does, and runs that resume bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frspec_jax import kv_cache
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import TreeConfig
from frspec_jax.drafters import eagle as drafter
from frspec_jax.drafters.base import Accepted, Turn
from frspec_jax.drafters.beam import BeamMemory
from frspec_jax.errors import UserError
from frspec_jax.layers import Pass
from frspec_jax.placement import Placement
from frspec_jax.vocabulary import DraftHead, Ranking
from pallas_kernels.visibility import Sees, causal
from tests.support import toy
from tests.support.folders import checkpoint_folder
from tests.support.runs import refusal, same
from train import eagle, start
from train.__main__ import main
from train.batches import Batch, Packing
from train.corpus import Record
from train.features import FeatureStore, FeatureWriter, encode, open_corpora
from train.optimiser import head_logits, new_state, orthogonalised, seed_words
from train.recipe import Recipe, agreement, loss_terms, train_step, unrolled_passes

ROOT = Path(__file__).parents[2]
HELD_OUT = {29, 37, 40, 88, 116}  # of the first 120 sequences: part of the format, for a run must resume


def checkpoint_like(width: int = 4, target: str = "a") -> Checkpoint:
    return SimpleNamespace(path="CKPT", fingerprint=target, config=SimpleNamespace(hidden_size=width))  # type: ignore


# The store ---------------------------------------------------------------------------------------


def tagged_store(folder: Path, lengths: list[int], first_source: int = 0) -> FeatureStore:
    """Sequences whose features say which they are: (sequence, token, token id, answer)."""
    writer = FeatureWriter(folder, checkpoint_like())
    for source, length in enumerate(lengths, first_source):
        rng = np.random.default_rng(source)
        tokens, answer = rng.integers(0, 2000, length, dtype=np.int32), rng.integers(0, 2, length, dtype=np.uint8)
        features = np.stack([np.full(length, source), np.arange(length), tokens, answer], axis=1)
        writer.append(source, tokens, answer, features)
    writer.close()
    return FeatureStore(folder, checkpoint_like())


def test_a_killed_writer_leaves_whole_sequences(tmp_path):
    whole = tagged_store(tmp_path / "whole", [3, 5, 2, 4])
    tagged_store(tmp_path / "cut", [3, 5])
    for name, debris in (("features.f16", 30), ("answer.u8", 3), ("tokens.i32", 5), ("index.i64", 7)):
        with open(tmp_path / "cut" / name, "ab") as file:
            file.write(b"\x01" * debris)  # of a third sequence, whose row was not finished
    assert len(FeatureStore(tmp_path / "cut", checkpoint_like())) == 2
    writer = FeatureWriter(tmp_path / "cut", checkpoint_like())
    assert (writer.tokens, writer.sources) == (8, {0, 1})
    writer.close()
    mended = tagged_store(tmp_path / "cut", [2, 4], first_source=2)
    assert mended.lengths.tolist() == whole.lengths.tolist() == [3, 5, 2, 4]
    for index in range(4):
        for mine, theirs in zip(mended.sequence(index), whole.sequence(index), strict=True):
            assert np.array_equal(mine, theirs)


def test_texts_are_run_as_far_as_a_row_reaches_and_kept_for_these_texts_alone(ckpt, tmp_path):
    target, cache = ckpt.params(), tmp_path / "cache"
    long, other = tmp_path / "long.txt", tmp_path / "other.txt"
    long.write_text("the cat sat on the mat and " * 200)
    other.write_text("the end of the tale")

    def lengths(file: Path, row: int, cache: Path) -> list[int]:
        return open_corpora([file], ckpt, target, cache, row)[0].lengths.tolist()

    assert lengths(long, 16, cache) == [512] == lengths(long, 512, cache)
    assert lengths(long, 640, tmp_path / "longer") == [640]
    for file, row in ((other, 512), (long, 640)):
        with pytest.raises(UserError, match="features of other texts"):
            open_corpora([file], ckpt, target, cache, row)
    assert lengths(long, 512, cache) == [512]


def test_stores_of_another_target_and_other_folders_are_refused(tmp_path):
    tagged_store(tmp_path / "store", [3])
    for other in (checkpoint_like(target="b"), checkpoint_like(width=8)):
        for opened in (FeatureStore, FeatureWriter):
            with pytest.raises(UserError, match="store holds the features of another target than CKPT; make it again"):
                opened(tmp_path / "store", other)
    with pytest.raises(UserError, match="is no feature store; python -m train answers"):
        FeatureStore(tmp_path, checkpoint_like())


def test_an_empty_store_can_be_opened(tmp_path):
    store = tagged_store(tmp_path / "store", [])
    assert len(store) == 0 and store.features.shape == (0, 4)


# Packing -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two stores, the second of which has only one sequence; in both, most fit a row and some do not."""
    folder = tmp_path_factory.mktemp("stores")
    lengths = np.random.default_rng(0).choice([1, 2, 3, 5, 8, 13, 21, 34], 120).tolist()
    return tagged_store(folder / "a", lengths), tagged_store(folder / "b", [19], first_source=500)


def pairs_of(batch: Batch) -> list[tuple[int, int]]:
    """(sequence, token) of every pair in a batch, after checking that each is what its tags say."""
    found = []
    for row, segment in np.ndindex(batch.segment.shape[0], int(batch.segment.max()) + 1):
        here = batch.segment[row] == segment
        if segment == 0:
            assert not batch.mask[row][here].any() and not batch.features[row][here].any()
            continue
        sequence, token, _, _ = batch.features[row][here].T
        assert len(set(sequence)) <= 1, "a segment holds pairs of several sequences"
        assert np.array_equal(token, token[:1].repeat(len(token)) + np.arange(len(token)))
        assert np.array_equal(batch.position[row][here], token)
        after = batch.targets[row][here]
        assert np.array_equal(after[:, 0], sequence) and np.array_equal(after[:, 1], token + 1)
        assert np.array_equal(batch.next_tokens[row][here], after[:, 2])
        assert np.array_equal(batch.mask[row][here], after[:, 3])
        found += list(zip(sequence.astype(int).tolist(), token.astype(int).tolist(), strict=True))
    return found


def all_pairs(stores: tuple[FeatureStore, ...], held_out: bool) -> set[tuple[int, int]]:
    names = [(source, length) for source, length in enumerate(stores[0].lengths)] + [(500, stores[1].lengths[0])]
    return {(s, t) for s, length in names if (s in HELD_OUT) == held_out for t in range(length - 1)}


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 5), row=st.integers(2, 48), seed=st.integers(0, 2**31 - 1))
def test_every_pair_once_an_epoch(stores, rows, row, seed):
    """Up to a batch that is not full: `rows` - 1 packed rows at most wait for the next epoch."""
    seen: set[tuple[int, int]] = set()
    expected = all_pairs(stores, held_out=False)
    for batch in Packing(stores, rows, row, seed).training(0):
        assert batch.features.shape == (rows, row, 4)
        fresh = pairs_of(batch)
        assert fresh and len(set(fresh)) == len(fresh)
        if seen & set(fresh):
            break
        seen |= set(fresh)
        assert seen <= expected, "a sequence that is held out was trained on"
    assert len(expected - seen) <= (rows - 1) * row


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 5), row=st.integers(2, 48))
def test_what_is_held_out_comes_whole_and_always_the_same(stores, rows, row):
    batches = Packing(stores, rows, row, seed=1).held_out(10_000)
    found = [pair for batch in batches for pair in pairs_of(batch)]
    assert len(found) == len(set(found)) and set(found) == all_pairs(stores, held_out=True)
    again = Packing(stores, rows, row, seed=2).held_out(1)
    assert same(again[0], batches[0]) and len(again) == 1


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 80), rows=st.integers(1, 5), row=st.sampled_from([8, 48, 400]), seed=st.integers(0, 99))
def test_the_order_is_a_function_of_seed_and_step(stores, first, rows, row, seed):
    packing = Packing(stores, rows, row, seed)
    skipped = itertools.islice(packing.training(0), first, first + 3)
    for resumed, batch in zip(packing.training(first), skipped, strict=False):
        assert same(resumed, batch)


def test_prompts_count_in_training_where_that_is_asked_for_and_never_in_what_is_held_out(stores):
    answers, everything = (Packing(stores, 2, 48, 0, prompts) for prompts in (False, True))
    assert all(same(a, b) for a, b in zip(answers.held_out(9), everything.held_out(9), strict=True))
    for a, b in itertools.islice(zip(answers.training(0), everything.training(0), strict=False), 6):
        assert same(dataclasses.replace(b, mask=a.mask), a) and not np.array_equal(a.mask, b.mask)
        assert np.array_equal(b.mask > 0, b.segment > 0)


def test_epochs_and_seeds_differ(stores):
    epochs = Packing(stores, 1, 64, seed=0)
    count = len({pair for batch in itertools.islice(epochs.training(0), 200) for pair in pairs_of(batch)})
    assert count == len(all_pairs(stores, held_out=False))
    starts = [pairs_of(next(Packing(stores, 1, 64, seed).training(0))) for seed in range(4)]
    first = pairs_of(next(epochs.training(0)))
    later = [pairs_of(batch) for batch in itertools.islice(epochs.training(0), 1, 200)]
    assert starts[0] == first and all(start != first for start in starts[1:]) and first not in later


def test_rows_are_near_full(stores):
    steps = Packing(stores, 2, 64, seed=0).steps_per_epoch
    batches = itertools.islice(Packing(stores, 2, 64, seed=0).training(0), steps)
    assert np.mean([(batch.segment > 0).mean() for batch in batches]) > 0.85


# Which tokens are an answer's --------------------------------------------------------------------


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return checkpoint_folder(tmp_path_factory.mktemp("train") / "toy", draft=False, ranking=False)


def test_answers_are_what_the_assistant_says(ckpt):
    turns = (("system", "Be brief."), ("user", "Hi?"), ("assistant", "Hello the"), ("user", "So?"), ("assistant", "in"))
    tokens, answer = encode(Record("x", turns=(*turns, ("user", "left out: nobody answers"))), ckpt.tokenizer)
    text = ckpt.tokenizer.decode(tokens)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi?") and "left out" not in text
    spoken = "".join(ckpt.tokenizer.decode(token) if mine else "·" for token, mine in zip(tokens, answer, strict=True))
    assert [part for part in spoken.split("·") if part] == ["Hello the<|im_end|>\n", "in<|im_end|>\n"]


def test_all_of_a_text_counts_and_nothing_of_a_chat_without_answers(ckpt):
    tokens, answer = encode(Record("x", "the end"), ckpt.tokenizer)
    assert ckpt.tokenizer.decode(tokens) == "the end" and answer.all()
    tokens, answer = encode(Record("x", turns=(("user", "Hi?"),)), ckpt.tokenizer)
    assert len(tokens) == len(answer) == 0


# Passes ------------------------------------------------------------------------------------------


CFG = toy.config(vocab_size=40)
WIDTH = CFG.hidden_size
extend = jax.jit(drafter.run_pairs)


class Drafting:
    """A draft, a target's embedding and head, and one packed row: two sequences and some padding."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        shape, self.params = toy.draft(CFG)
        self.layer = shape.layer_of(CFG)
        target = toy.target(CFG)
        self.embedding, self.head = target.embedding, target.head
        self.count, rest, pad = 9, 6, 4
        total = self.count + rest + pad
        self.row = Batch(
            features=rng.normal(size=(total, WIDTH)).astype(np.float32),
            next_tokens=rng.integers(0, 40, total).astype(np.int32),
            targets=rng.normal(size=(total, WIDTH)).astype(np.float32),
            mask=(rng.random(total) < 0.8).astype(np.float32),
            segment=np.repeat([1, 2, 0], [self.count, rest, pad]).astype(np.int32),
            # The second sequence is the rest of a longer one, cut at its 30th token.
            position=np.concatenate([np.arange(self.count), 30 + np.arange(rest), np.zeros(pad)]).astype(np.int32),
        )

    def outputs(self, row: Batch, unroll: int = 4) -> list[np.ndarray]:
        batch = jax.tree.map(lambda x: x[None], row)
        return [np.asarray(x[0]) for x in passes(self.params, self.layer, self.embedding, batch, unroll)]

    def committed(self, pairs: slice) -> tuple[np.ndarray, kv_cache.LayerKV]:
        """The drafter's own way to take in pairs whose features are the target's."""
        count = pairs.stop - pairs.start
        embeddings, features = self.embedding[self.row.next_tokens[pairs]], self.row.features[pairs]
        where = Placement(jnp.asarray(self.row.position[pairs]), jnp.int32(0), Sees(jnp.int32(0), causal(count)))
        cache = kv_cache.empty(self.layer, 256, jnp.float32)[0]
        return extend(self.params, embeddings, features, Pass.of(self.layer, where), cache)


passes = jax.jit(unrolled_passes, static_argnums=(1, 4))


def close(mine, theirs) -> bool:
    """Equal but for the rounding of float32, by the size of the largest entry."""
    return float(np.abs(np.asarray(mine) - np.asarray(theirs)).max()) < 1e-5 * float(np.abs(np.asarray(theirs)).max())


@pytest.fixture(scope="module")
def drafting():
    return Drafting()


def test_the_first_pass_is_the_drafters_own(drafting):
    first = drafting.outputs(drafting.row)[0]
    for pairs in (slice(0, 9), slice(9, 15)):
        assert close(first[pairs], drafting.committed(pairs)[0])


def self_fed(pair: int, committed: int, step: int) -> Placement:
    """Where the pair of a chain's level `step` stands: it sees what is committed, and the levels before it."""
    sees = Sees(jnp.int32(committed), jnp.array([[2**step - 1]], jnp.int32))
    return Placement(jnp.array([pair], jnp.int32), jnp.int32(pair), sees)


def test_further_passes_are_self_fed_steps_through_the_cache(drafting):
    """As `propose` does them: a pair of its own feature behind the committed ones, each seeing those before it."""
    row, outputs = drafting.row, drafting.outputs(drafting.row)
    own, cache = drafting.committed(slice(0, drafting.count))
    for committed in range(1, drafting.count - 2):
        feature, drafted = own[committed - 1], cache
        for step in range(1, 4):
            pair = committed + step - 1
            embedding = drafting.embedding[row.next_tokens[pair : pair + 1]]
            here = Pass.of(drafting.layer, self_fed(pair, committed, step))
            rows, drafted = extend(drafting.params, embedding, feature[None], here, drafted)
            feature = rows[0]
            assert close(outputs[step][pair], feature)


def test_passes_say_the_tokens_that_drafting_does(drafting):
    """The drafter itself drafts a chain; on a row that goes on with that chain, the passes read off the same tokens."""
    _, cache = drafting.committed(slice(0, drafting.count))
    own = drafting.outputs(drafting.row)[0]
    head = DraftHead(drafting.head, jnp.arange(40))
    weights = drafter.EagleWeights(drafting.embedding, head, None, drafting.params)
    grow = jax.jit(drafter.Eagle(drafting.layer).grow, static_argnames="tree")
    for committed in range(1, drafting.count - 2):
        root = jnp.int32(drafting.row.next_tokens[committed - 1])
        feature, shape = own[committed - 1], TreeConfig(4, 3, 1)
        accepted = Accepted(feature[None], root[None], jnp.int32(1))
        turn = Turn(accepted, root, jnp.int32(committed))
        tree, _ = grow(weights, shape, feature, turn, BeamMemory(cache, None))
        assert int(tree.tokens[0]) == int(root)
        chain = np.asarray(tree.tokens[1:])
        next_tokens = drafting.row.next_tokens.copy()
        next_tokens[committed : committed + 3] = chain
        said = drafting.outputs(dataclasses.replace(drafting.row, next_tokens=next_tokens))
        for step in range(3):
            assert int((drafting.head @ said[step][committed - 1 + step]).argmax()) == chain[step]


def test_sequences_of_a_row_do_not_see_one_another(drafting):
    before = drafting.outputs(drafting.row)
    features, tokens = drafting.row.features.copy(), drafting.row.next_tokens.copy()
    features[: drafting.count] += 1
    tokens[: drafting.count] = 0
    after = drafting.outputs(dataclasses.replace(drafting.row, features=features, next_tokens=tokens))
    for s in range(4):  # the first s pairs of a sequence are masked in pass s
        np.testing.assert_array_equal(before[s][drafting.count + s : 15], after[s][drafting.count + s : 15])
        assert not np.allclose(before[s][s : drafting.count], after[s][s : drafting.count])


# The loss ----------------------------------------------------------------------------------------


def log_softmax(x):
    x = x.astype(np.float64) - x.max()
    return x - np.log(np.exp(x).sum())


def counted(row: Batch, s: int) -> list[int]:
    """The pairs that pass s is judged by: of an answer, with s pairs of their own sequence before them."""
    segment = row.segment
    return [
        t
        for t in range(len(segment))
        if row.mask[t] and segment[t] and t >= s and len({int(segment[u]) for u in range(t - s, t + 1)}) == 1
    ]


def test_the_loss_is_the_mean_over_pairs_that_count(drafting):
    recipe = Recipe(unroll=3, ce_weight=0.7, feature_weight=0.2, unroll_decay=0.5)
    row = dataclasses.replace(drafting.row, mask=drafting.row.mask * (drafting.row.segment > 0))
    head = drafting.head[:17]
    batch = jax.tree.map(lambda x: x[None], row)
    total, metrics = loss_terms(drafting.params, drafting.layer, drafting.embedding, head, batch, recipe)
    expected = 0.0
    for s, output in enumerate(drafting.outputs(row, 3)):
        kl, feature, hits = [], [], []
        for t in counted(row, s):
            want, said = log_softmax(np.asarray(head @ row.targets[t])), log_softmax(np.asarray(head @ output[t]))
            kl.append((np.exp(want) * (want - said)).sum())
            distance = np.abs(output[t] - row.targets[t]).astype(np.float64)
            feature.append(np.where(distance < 1, distance**2 / 2, distance - 0.5).mean())
            hits.append(want.argmax() == said.argmax())
        assert len(kl) > 4
        np.testing.assert_allclose(metrics[f"kl_{s}"], np.mean(kl), rtol=1e-4)
        np.testing.assert_allclose(metrics[f"feature_{s}"], np.mean(feature), rtol=1e-4)
        np.testing.assert_allclose(metrics[f"top1_{s}"], np.mean(hits), rtol=1e-4, atol=1e-6)
        expected += 0.5**s * (0.7 * np.mean(kl) + 0.2 * np.mean(feature))
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], total)


def test_agreement_counts_hits_over_the_whole_head(drafting):
    row = dataclasses.replace(drafting.row, mask=drafting.row.mask * (drafting.row.segment > 0))
    batch = jax.tree.map(lambda x: x[None], row)
    found = np.asarray(agreement(drafting.params, drafting.layer, drafting.embedding, drafting.head, batch, 3))
    for s, output in enumerate(drafting.outputs(row, 3)):
        best = {t: int((drafting.head @ row.targets[t]).argmax()) for t in counted(row, s)}
        ranked = {t: np.argsort(-np.asarray(drafting.head @ output[t]))[:3].tolist() for t in best}
        hits = (sum(best[t] == ranked[t][0] for t in best), sum(best[t] in ranked[t] for t in best), len(best))
        assert found[s].tolist() == list(hits)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(steps=30, lr=2e-2, warmup=2, unroll=2, loss_vocab=10, loss_random=6),
        Recipe(steps=30, lr=3e-3, warmup=2, unroll=1, loss_vocab=0, optimizer="adamw", decay="linear", noise=0.1),
    ],
    ids=["muon", "adamw"],
)
def test_training_lowers_the_loss(drafting, recipe):
    batch = jax.tree.map(lambda x: x[None], drafting.row)
    state = new_state(eagle.initial_params(jax.random.key(0), toy.draft(CFG)[0], CFG), recipe)
    losses = []
    for _ in range(recipe.steps):
        state, metrics = train_step(
            state, drafting.layer, recipe, drafting.embedding, drafting.head, jnp.arange(40), seed_words(0), batch
        )
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and np.mean(losses[-5:]) < 0.3 * losses[0]
    assert int(state.step) == recipe.steps


@pytest.mark.parametrize("changes", [{"noise": 0.5, "loss_vocab": 0}, {"loss_vocab": 10, "loss_random": 6}])
def test_noise_and_random_ids_are_a_function_of_seed_and_step(drafting, changes):
    """At a learning rate of zero they are all that differs from step to step."""
    recipe = Recipe(steps=9, lr=0.0, unroll=1, optimizer="adamw", **changes)
    batch = jax.tree.map(lambda x: x[None], drafting.row)

    def losses(seed: int, first: int, last: int) -> list[float]:
        state, found = new_state(jax.tree.map(jnp.copy, drafting.params), recipe), []
        state = state.replace(step=jnp.int32(first))
        for _ in range(first, last):
            state, metrics = train_step(
                state,
                drafting.layer,
                recipe,
                drafting.embedding,
                drafting.head,
                jnp.arange(40),
                seed_words(seed),
                batch,
            )
            found.append(float(metrics["loss"]))
        return found

    before = losses(0, 0, 4)
    assert len(set(before)) == 4 and losses(0, 2, 4) == before[2:] and not set(losses(1, 0, 4)) & set(before)


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


def test_a_draft_can_start_from_another(ckpt, uninterrupted, tmp_path):
    """With a learning rate of zero nothing moves: the new draft is the old one."""
    main(command(uninterrupted[1], ckpt, tmp_path / "work", "second", "--start-from", "whole", "--lr", "0"))
    assert same(drafted(ckpt, "second")[0], uninterrupted[0][0])


def test_the_loss_can_count_prompts_too(ckpt, uninterrupted, tmp_path):
    main(command(uninterrupted[1], ckpt, tmp_path / "work", "all", "--loss-on", "all"))
    assert not same(drafted(ckpt, "all")[0], uninterrupted[0][0])
    about = json.loads((ckpt.draft_folder("all") / "config.json").read_text())["about"]
    assert about["loss_on"] == "all"


def test_a_draft_to_start_from_that_is_not_there_is_refused(ckpt, uninterrupted, tmp_path, capsys):
    said = refusal(capsys, command(uninterrupted[1], ckpt, tmp_path / "work", "third", "--start-from", "nosuch"))
    assert "--start-from nosuch is neither a draft" in said and not (tmp_path / "work").exists()


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


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_the_logits_of_a_head_have_their_gradients(dtype, tolerance):
    """With respect to the rows that it reads and to itself, as in float32, in the dtype of the products."""
    rng = np.random.default_rng(0)
    rows, head = jnp.asarray(rng.normal(size=(2, 5, 16)), dtype), jnp.asarray(rng.normal(size=(30, 16)), dtype)
    weights = jnp.asarray(rng.normal(size=(2, 5, 30)), jnp.float32)

    def plain(rows, head):
        return jnp.einsum("rth,mh->rtm", rows.astype(jnp.float32), head.astype(jnp.float32), precision="highest")

    np.testing.assert_allclose(head_logits(rows, head), plain(rows, head), atol=1e-5)
    expected = jax.grad(lambda x, h: (plain(x, h) * weights).sum(), argnums=(0, 1))(rows, head)
    mine = jax.jit(jax.grad(lambda x, h: (head_logits(x, h) * weights).sum(), argnums=(0, 1)))(rows, head)
    for found, right in zip(mine, expected, strict=True):
        assert found.dtype == dtype
        right = np.asarray(right.astype(jnp.float32))
        np.testing.assert_allclose(found.astype(jnp.float32), right, atol=tolerance * abs(right).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_muon_makes_an_update_orthogonal(shape, dtype):
    """The singular vectors stay, the singular values come near one, and the update has the size of AdamW's."""
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = np.asarray(orthogonalised(jnp.asarray(x), jnp.dtype(dtype)), np.float64) / (0.2 * max(shape) ** 0.5)
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    values = u.T @ found @ vt.T
    assert np.abs(values - np.diag(np.diag(values))).max() < (1e-4 if dtype == jnp.float32 else 0.05)
    assert np.diag(values).min() > 0.5 and np.diag(values).max() < 1.3


def test_muon_is_optaxs():
    """For a matrix, in float32, of one gradient: the momentum's debiasing only scales what is made orthogonal."""
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(12, 20)), jnp.float32), "n": jnp.ones(5)}
    grads = jax.tree.map(lambda x: 0.1 * x - 0.05, params)
    mine = Recipe(lr=1e-2, warmup=0, steps=10, decay="linear").transformation()
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            optax.linear_schedule(1e-2, 0.0, 10), weight_decay=0.0, adam_b1=0.9, adam_b2=0.95, consistent_rms=0.2
        ),
    )
    updates = [tx.update(grads, tx.init(params), params)[0]["w"] for tx in (mine, theirs)]
    np.testing.assert_allclose(*updates, rtol=1e-3, atol=1e-7)
