"""Promise 4: a plan is two programs, whatever the prompts and what their requests ask for."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frspec_jax import api, defaults
from frspec_jax.api import Draft, Request
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.prefill import Chunks
from tests.support import toy

PROMPT = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], np.int32)
TREE = TreeConfig(8, 3, 4)
# Everything that a request may ask for, each figure another one.
SAMPLED = [
    Request(5 + n, Sampling(0.3 + 0.1 * n, top_k=7 * n, top_p=1 - 0.05 * n, min_p=0.01 * n), seed=2**40 * n + n)
    for n in range(10)
]
GREEDY = [Request(5 + n, seed=n) for n in range(10)]


@contextlib.contextmanager
def programs():
    """The names of the programs that are made meanwhile, whether they are then compiled or found in a cache."""
    made: list[str] = []

    def hear(event: str, seconds: float, **about: str) -> None:
        if "jaxpr_to_mlir_module" in event:
            made.append(about.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        yield made
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)


@pytest.mark.sweep(quick=["eagle"])
def test_a_second_prompt_compiles_nothing(kind):
    cfg = toy.config()
    w, drafter = toy.weights(cfg, kind=kind)
    plan = toy.plan(cfg, drafter, TREE, Sampling(1.0))
    toy.decode(plan, w, PROMPT, 8, Sampling(1.0))
    with programs() as made:
        toy.decode(plan, w, np.arange(20) % cfg.vocab_size, 30, Sampling(0.4, 5), seed=9)
        toy.decode(plan, w, np.arange(70) % cfg.vocab_size, 5, Sampling(1.7, 0, 0.6, min_p=0.1), seed=2)
    assert made == []
    with programs() as made:
        jax.jit(lambda x: x * 3.25 + 1)(jnp.ones(7))
    assert made, "the listener hears nothing, so this test would prove nothing"


@pytest.mark.parametrize("requests", [GREEDY, SAMPLED])
def test_ten_requests_of_a_model_are_two_programs(toy_folder, requests):
    """Prefill and rounds: the first request is warmed up for, and finds both."""
    model = api.load(toy_folder, Draft(tree=TREE), dtype="float32", chunk=64)
    with programs() as made:
        model.warm_up(requests[0].sampling)
    assert sum(name in ("prefill_chunk", "jit(prefill_chunk)") for name in made) == 1
    assert sum("decode_rounds" in name for name in made) == 1
    prompts = [np.arange(1, 6 + 11 * n) % 250 for n in range(10)]
    alone = model.generate_ids(prompts[3], requests[3]).tokens
    with programs() as made:
        texts = [model.generate_ids(prompt, request).tokens for prompt, request in zip(prompts, requests, strict=True)]
    assert made == []
    assert texts[3] == alone and len({tuple(tokens) for tokens in texts}) > 5


def test_long_prompts_are_one_program_more(toy_folder, monkeypatch):
    """It is made when the first of them comes, outside the time that is taken of it; `warm_up` makes it beforehand."""
    monkeypatch.setitem(defaults.DEFAULTS, "cpu", dataclasses.replace(defaults.DEFAULTS["cpu"], chunks=Chunks(8, 32)))
    long = np.arange(1, 60)
    model = api.load(toy_folder, Draft(tree=TREE), dtype="float32")
    with programs() as made:
        model.generate_ids(np.arange(1, 9), Request(4))
    assert sum("prefill" in name for name in made) == 1
    with programs() as made:
        text = model.generate_ids(long, Request(4)).tokens
    assert [name for name in made if "prefill" in name or "rounds" in name] == [
        name for name in made if "prefill" in name
    ]
    assert sum("prefill" in name for name in made) == 1
    ready = api.load(toy_folder, Draft(tree=TREE), dtype="float32")
    ready.warm_up()
    with programs() as made:
        assert ready.generate_ids(long, Request(4)).tokens == text
        ready.generate_ids(np.arange(1, 9), Request(4))
    assert made == []


def test_settings_that_are_figures_make_no_other_plan(toy_folder):
    model = api.load(toy_folder, Draft(tree=TREE))
    plans = {model.plan(request.sampling) for request in SAMPLED}
    assert len(plans) == 1 and model.plan() not in plans
    lossy = model.plan(dataclasses.replace(SAMPLED[0].sampling, typical=0.1))
    assert lossy == model.plan(Sampling(1.3, typical=0.3)) and lossy not in plans
