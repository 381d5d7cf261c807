"""Promises 1 and 2 for what other families than Llama have: windows, two rotary bases, caps, norms of heads."""

import numpy as np
import pytest

from frspec_jax import api
from frspec_jax.api import Draft, Request
from frspec_jax.config import Sampling, TreeConfig
from tests.support import toy
from tests.support.folders import checkpoint_folder

PROMPT = np.random.default_rng(3).integers(0, 24, 19)
MEMBERS = {
    "qwen3": {"head_norms": True},
    "mistral": {"windows": (5, 5)},  # less than the prompt, and less than the tree is deep
    "smollm3": {"unrotated": (1,)},
    "gemma2": {"windows": (6, 0), "attention_cap": 4.0, "logits_cap": 8.0, "norms": "around", "activation": "gelu"},
    "gemma3": {
        "windows": (7, 0), "local_rope_theta": 100.0, "norms": "around", "norm_offset": 1.0, "activation": "gelu",
        "head_norms": True, "embedding_scale": 32**0.5, "query_scale": 0.5,
    },
}  # fmt: skip


@pytest.mark.sweep(quick=["sampled-gemma3", "greedy-qwen3"])
@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("settings", [Sampling(), Sampling(1.0, top_p=0.9)], ids=["greedy", "sampled"])
def test_drafting_changes_nothing(member, settings):
    cfg = toy.config(**MEMBERS[member])
    w, drafter = toy.weights(cfg, np.arange(0, 24, 2))
    plan, vanilla = toy.plan(cfg, drafter, TreeConfig(12, 6, 3), settings), toy.vanilla_plan(cfg, settings)
    expected, _ = toy.decode(vanilla, w, PROMPT, 40, settings, seed=1)
    tokens, state = toy.decode(plan, w, PROMPT, 40, settings, seed=1)
    assert tokens == expected and len(set(tokens)) > 3
    assert int(state.rounds) < 39, "no draft was ever right: nothing was tried"


@pytest.mark.sweep(quick=["gemma3"])
@pytest.mark.parametrize("member", MEMBERS)
def test_a_text_in_a_batch_is_what_it_is_alone(member, tmp_path):
    checkpoint = checkpoint_folder(tmp_path / "toy", **MEMBERS[member])
    model = api.load(checkpoint, Draft(tree=TreeConfig(4, 2, 2)), dtype="float32", context=256)
    prompts, request = ["the end", "hello world, a b c", "the"], Request(16, sampling=Sampling(0.9), seed=2)
    together = [result.tokens for result in model.generate(prompts, request)]
    assert together == [model.generate(prompt, request).tokens for prompt in prompts]
    assert len({tuple(tokens) for tokens in together}) == 3


def test_a_window_changes_the_text():
    """Else none of this would be noticed."""
    texts = set()
    for windows in ((), (5, 5), (5, 0)):
        cfg = toy.config(windows=windows)
        w, _ = toy.weights(cfg)
        texts.add(tuple(toy.decode(toy.vanilla_plan(cfg), w, PROMPT, 40)[0]))
    assert len(texts) == 3
