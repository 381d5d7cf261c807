"""Promises 1 and 2: the tokens are the target's own, whatever drafts, greedy and sampled, seed for seed."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frspec_jax import engine, kv_cache, llama, prefill, sampling, stages
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.drafters.base import NO_WEIGHTS
from frspec_jax.placement import Placement
from frspec_jax.plan import EXACT
from frspec_jax.prefill import Chunks
from frspec_jax.sampling import Draw
from frspec_jax.state import FULL, STOPPED, Asked, Weights, new_caches
from frspec_jax.tree import DraftTree
from pallas_kernels.device import H100, compiling_for
from pallas_kernels.dispatch import Kernels
from pallas_kernels.visibility import constant_words
from tests import conftest
from tests.support import toy

# One vocabulary, and one tree where any will do: tests of one shape share its compiled programs.
CFG, TREE = toy.config(vocab_size=12), TreeConfig(8, 3, 4)
PROMPT = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], np.int32)
OTHER_TREES = [TreeConfig(2, 1, 1), TreeConfig(4, 3, 1), TreeConfig(40, 4, 5), TreeConfig(5, 2, 3)]
SAMPLINGS = [Sampling(), Sampling(1.0), Sampling(0.8, top_k=7), Sampling(1.2, top_p=0.8), Sampling(0.9, 9, 0.9)]


def one_by_one(cfg, params, prompt, settings, seed, limit):
    """Decoding in its plainest form: the whole text through the target for each token, without the engine."""

    @jax.jit
    def following(tokens, count):  # tokens [64], `count` of them real
        cache = kv_cache.empty(cfg, 256, jnp.float32)
        features, _ = llama.forward(params, cfg, tokens, Placement.chain(jnp.int32(0), 64), cache)
        scores = llama.logits(params, cfg, features[count - 1][None])
        rule, draw = sampling.rule_of(settings), Draw.of(settings, seed)
        return sampling.choose(scores, rule, draw, count[None], jnp.zeros(1, jnp.int32))[0]

    text = list(map(int, prompt))
    for _ in range(limit):
        padded = np.zeros(64, np.int32)
        padded[: len(text)] = text
        text.append(int(following(padded, jnp.int32(len(text)))))
    return text[len(prompt) :]


@pytest.mark.as_shipped
@pytest.mark.parametrize("settings", SAMPLINGS[:2])
def test_vanilla_is_the_target_token_by_token(settings):
    w, _ = toy.weights(CFG)
    tokens, state = toy.decode(toy.vanilla_plan(CFG, settings), w, PROMPT, 12, settings, seed=5)
    assert tokens == one_by_one(CFG, w.target, PROMPT, settings, 5, 12)
    assert int(state.finished) == FULL


@pytest.mark.sweep(quick=["eagle-*", "*-tree0-settings0", "*-tree6-*"])
@pytest.mark.parametrize(
    ("tree", "settings"),
    [
        *(pytest.param(TREE, settings, marks=pytest.mark.as_shipped) for settings in SAMPLINGS),
        *((tree, Sampling()) for tree in OTHER_TREES),
    ],
)
def test_drafting_changes_nothing(kind, tree, settings):
    """Promises 1 and 2: whatever drafts, the tokens are vanilla's, greedy and sampled, seed for seed."""
    tree = toy.fitted(kind, CFG, tree)
    full, drafter = toy.weights(CFG, kind=kind)
    cropped, _ = toy.weights(CFG, toy.CROPPED, kind=kind)
    # A head of another size is another program: what the full one could do amiss, it would with the first of these.
    tried = (full, cropped) if (tree, settings) == (toy.fitted(kind, CFG, TREE), SAMPLINGS[0]) else (cropped,)
    vanilla, plan = toy.vanilla_plan(CFG, settings), toy.plan(CFG, drafter, tree, settings)
    drafts = 0
    for seed in range(4):
        prompt = np.random.default_rng(seed).integers(0, 12, 9 + seed)
        expected, _ = toy.decode(vanilla, full, prompt, 24, settings, seed=seed)
        for w in tried:
            tokens, state = toy.decode(plan, w, prompt, 24, settings, seed=seed)
            assert tokens == expected
            lengths = np.arange(1, tree.depth + 2)
            assert int((np.asarray(state.histogram) * lengths).sum()) == len(tokens) - 1
            assert int(state.histogram.sum()) == int(state.rounds)
            drafts += len(tokens) - 1 - int(state.rounds)
    assert drafts > 0 or tree.size < 5, "no draft was ever accepted: this test would prove nothing"


def test_seeds_differ():
    w, _ = toy.weights(CFG)
    plan = toy.vanilla_plan(CFG, Sampling(1.0))
    assert len({tuple(toy.decode(plan, w, PROMPT, 24, Sampling(1.0), seed=seed)[0]) for seed in range(6)}) == 6


@pytest.mark.sweep(quick=["eagle-*", "medusa-*"])
@pytest.mark.as_shipped
@pytest.mark.parametrize("length", [1, 7, 8, 9, 31, 64, 65])
def test_chunk_size_changes_nothing(kind, length):
    w, drafter = toy.weights(CFG, kind=kind)
    prompt = np.random.default_rng(length).integers(0, CFG.vocab_size, length)
    plan = toy.plan(CFG, drafter, TREE, Sampling())
    sizes = (Chunks(8), Chunks(32), Chunks(256), Chunks(8, 32))
    outputs = {chunks: toy.decode(plan, w, prompt, 12, chunks=chunks) for chunks in sizes}
    assert len({tuple(tokens) for tokens, _ in outputs.values()}) == 1
    # The drafter has seen the same too: it was right in the same rounds.
    assert len({tuple(np.asarray(state.histogram)) for _, state in outputs.values()}) == 1


@pytest.mark.sweep(quick=["eagle"])
def test_a_long_cache_changes_nothing(kind):
    """Beyond a capacity of 512 attention walks blocks, and the text crosses two of their borders."""
    w, drafter = toy.weights(CFG, kind=kind)
    prompt = np.random.default_rng(0).integers(0, CFG.vocab_size, 240)
    plan = toy.plan(CFG, drafter, TREE, Sampling(1.0))
    short, _ = toy.decode(toy.vanilla_plan(CFG, Sampling(1.0)), w, prompt, 200, Sampling(1.0), capacity=512)
    long, _ = toy.decode(plan, w, prompt, 200, Sampling(1.0), capacity=1024)
    assert short == long


@pytest.mark.sweep(quick=["eagle"])
def test_straight_attention_changes_nothing(kind):
    """XLA's on a GPU: it looks at 512 rows first and then at all, and the text crosses from the one to the other."""
    w, drafter = toy.weights(CFG, kind=kind)
    prompt = np.random.default_rng(0).integers(0, CFG.vocab_size, 440)
    expected, _ = toy.decode(toy.vanilla_plan(CFG), w, prompt, 120, capacity=1024)
    xla = Kernels.all("xla")
    plan = toy.plan(CFG, dataclasses.replace(drafter, kernels=xla), TREE)
    plan = dataclasses.replace(plan, kernels=xla)
    with compiling_for(H100):
        text, state = toy.decode(plan, w, prompt, 120, capacity=1024)
    assert text == expected and int(state.length) > 512


@pytest.mark.as_shipped
@pytest.mark.sweep(quick=["eagle-tree3", "copying-tree0", "medusa-tree1"])
@pytest.mark.skipif(not conftest.HAS_AMX, reason="other CPUs round otherwise in bfloat16")
@pytest.mark.parametrize("tree", [TREE, *OTHER_TREES])
def test_speculative_is_vanilla_in_bfloat16_too(kind, tree):
    """On a CPU a token's row rounds alike alone and in a tree, wherever its keys stand (README, on floating point)."""
    cfg = toy.config()
    w, drafter = toy.weights(cfg, kind=kind)
    w = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x, w)
    outputs = []
    for plan in (toy.vanilla_plan(cfg, Sampling(1.0)), toy.plan(cfg, drafter, tree, Sampling(1.0))):
        weights = w if plan.drafter is drafter else Weights(w.target, NO_WEIGHTS)
        caches = new_caches(plan, 1024, jnp.bfloat16)
        asked = Asked.of(Sampling(1.0), seed=3, limit=150)
        state = prefill.start(plan, weights, caches, PROMPT, asked, chunks=Chunks(8))
        state = engine.run(plan, weights, state, np.int32(1000))
        assert int(state.emitted) == 150 and state.accepted.features.dtype == jnp.bfloat16
        outputs.append(np.asarray(state.output)[:150].tolist())
    assert outputs[0] == outputs[1]


@pytest.mark.sweep(quick=["eagle"])
def test_typical_acceptance_takes_what_is_likely_enough(kind):
    """The lower the bar, the more of each tree is taken; and the text is another than the exact one."""
    w, drafter = toy.weights(CFG, kind=kind)

    def rounds(bar):
        settings = Sampling(1.0, typical=bar)
        plan = toy.plan(CFG, drafter, TREE, settings)
        tokens, state = toy.decode(plan, w, PROMPT, 41, settings, seed=1)
        return tokens, int(state.rounds)

    exact, few, full = rounds(0.0), rounds(0.02), rounds(1e-12)
    assert full[1] <= few[1] <= exact[1] and full[1] < exact[1] and full[0] != exact[0]


# Stops and limits --------------------------------------------------------------------------------


STOP = 4


def oracle(settings, stop_ids=(), wrong_from=10**6, depth=4, seed=0):
    """Vanilla's answer, a plan whose drafter is told it, and the weights that tell."""
    w, _ = toy.weights(CFG)
    answer, _ = toy.decode(toy.vanilla_plan(CFG, settings), w, PROMPT, 40, settings, seed=seed)
    text = jnp.asarray([*PROMPT, *answer, *([0] * 16)], jnp.int32)
    plan = toy.plan(CFG, toy.Oracle(), TreeConfig(depth + 1, depth, 1), settings, stop_ids)
    return answer, plan, Weights(w.target, toy.Told(text, jnp.int32(wrong_from)))


def says_stop(at):
    """A seed and what `oracle` gives for it, where STOP is the answer's token number `at` and none before."""
    for seed in range(200):
        answer, plan, known = oracle(Sampling(1.0), (STOP,), seed=seed)
        if STOP in answer and answer.index(STOP) == at:
            return seed, answer, plan, known
    raise AssertionError(f"no seed says token {STOP} first at {at}")


def test_a_drafter_that_is_always_right_fills_every_round():
    answer, plan, known = oracle(Sampling())
    tokens, state = toy.decode(plan, known, PROMPT, 31)
    assert tokens == answer[:31]
    assert int(state.rounds) == 6 and np.asarray(state.histogram).tolist() == [0, 0, 0, 0, 6]


@pytest.mark.parametrize("at", range(1, 9))
def test_a_stop_id_inside_an_accepted_block_ends_the_answer_there(at):
    seed, answer, plan, known = says_stop(at)
    tokens, state = toy.decode(plan, known, PROMPT, 31, Sampling(1.0), seed=seed)
    assert tokens == answer[: at + 1]
    assert int(state.finished) == STOPPED


@pytest.mark.parametrize("limit", range(1, 9))
def test_the_limit_cuts_a_block(limit):
    answer, plan, known = oracle(Sampling())
    tokens, state = toy.decode(plan, known, PROMPT, limit)
    assert tokens == answer[:limit]
    assert int(state.finished) == FULL


def test_a_stop_id_beyond_the_limit_does_not_count():
    seed, answer, plan, known = says_stop(4)
    tokens, state = toy.decode(plan, known, PROMPT, 4, Sampling(1.0), seed=seed)
    assert tokens == answer[:4] and int(state.finished) == FULL


def test_decoding_goes_on_rightly_after_a_draft_that_went_wrong():
    for wrong_from in range(len(PROMPT) + 1, len(PROMPT) + 8):
        answer, plan, known = oracle(Sampling(), wrong_from=wrong_from)
        assert toy.decode(plan, known, PROMPT, 20)[0] == answer[:20]


@pytest.mark.parametrize(
    ("dtype", "length", "drafts"), [("bfloat16", 253, 1), ("bfloat16", 254, 3), ("float32", 253, 3)]
)
def test_bfloat16_takes_no_draft_across_a_seam_of_the_cache(dtype, length, drafts):
    """A chain of the nodes 0, 1, 3 and 6, all right. Below row 253 node 3 stands at 256, and would move to 255.

    Sums over the cache begin anew at 256: token by token, node 3 would round otherwise. With one row more it stands
    behind the seam and stays there. Float32 makes no such promise, and takes all.
    """
    nodes = {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1, 6: 3, 7: 3}  # and the parent of each
    depth, sees = np.zeros(8, np.int32), np.eye(8, dtype=bool)
    for node, parent in list(nodes.items())[1:]:
        depth[node], sees[node] = depth[parent] + 1, sees[node] | sees[parent]
    parent = jnp.asarray(list(nodes.values()), jnp.int32)
    tree = DraftTree(jnp.arange(8, dtype=jnp.int32), parent, jnp.asarray(depth), constant_words(sees))
    plan = toy.plan(CFG, toy.weights(CFG)[1], TREE)
    chosen = jnp.asarray([1, 3, 9, 6, 9, 9, 9, 9], jnp.int32)
    verdict = stages.Verdict(jnp.zeros((8, CFG.hidden_size)), chosen, None, None)
    cache = kv_cache.empty(CFG, 768, jnp.dtype(dtype))
    state = SimpleNamespace(length=jnp.int32(length))
    taken, _ = jax.jit(lambda cache: stages.take(plan, tree, verdict, cache, state))(cache)
    assert int(taken.drafts) == drafts
    assert taken.block[: drafts + 1].tolist() == [1, 3, 6, 9][: drafts + 1]


@pytest.mark.as_shipped
@pytest.mark.sweep(quick=["like Gemma 3"])
@pytest.mark.skipif(not conftest.HAS_AMX, reason="other CPUs round otherwise in bfloat16")
@pytest.mark.parametrize("family", ["llama", "like Gemma 3"])
def test_a_token_has_the_same_bits_alone_and_among_others_in_bfloat16(family):
    """Features of sixteen tokens run together, and one by one: widths and heads are those of Gemma 3 270M."""
    around = {
        "norms": "around",
        "head_norms": True,
        "norm_offset": 1.0,
        "windows": (40, 40, 0) * 2,
        "activation": "gelu",
    }
    sizes = {"hidden_size": 640, "intermediate_size": 2048, "num_heads": 4, "num_kv_heads": 1, "head_dim": 256}
    cfg = toy.config(**sizes, num_layers=6, vocab_size=30, **(around if family != "llama" else {}))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), toy.weights(cfg)[0].target)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 30, 104), jnp.int32)

    @functools.partial(jax.jit, static_argnames="count", compiler_options=EXACT)
    def run(first, cache, count):
        tokens = jax.lax.dynamic_slice(ids, (first,), (count,))
        return llama.forward(params, cfg, tokens, Placement.chain(first, count), cache)

    _, alone = run(jnp.int32(0), kv_cache.empty(cfg, 256, jnp.dtype(jnp.bfloat16)), 40)
    for first in range(40, 104, 16):
        together, _ = run(jnp.int32(first), alone, 16)
        for place in range(16):
            one, alone = run(jnp.int32(first + place), alone, 1)
            np.testing.assert_array_equal(together[place], one[0])
