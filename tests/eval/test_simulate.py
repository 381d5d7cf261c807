"""Simulated rounds are those of decoding under the same tables, and cost what the table says; hindsight bounds them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from eval.methods.simulate import Policy, policies, simulated
from frspec_jax import api, pace_tables
from frspec_jax.api import Draft, Request
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.pace import Costs


@pytest.mark.sweep
def test_rounds_are_those_of_decoding_and_cost_what_the_table_says(toy_folder: Checkpoint, monkeypatch):
    monkeypatch.setattr(api.Generator, "_find_costs", lambda self, plan, anew=False: None)
    model = api.load(toy_folder, Draft(vocab=60), dtype="float32", context=400)
    pace = model.drafting.pace
    assert pace is not None and pace.sizes == (1, 2, 4, 8)
    real = Costs.of([4.0, 4.5, 5.0, 6.0], [0.0, 0.2, 0.4, 0.6, 0.8])

    def under(costs):
        tables = dataclasses.replace(model.weights.pace, costs=costs)
        model.weights = dataclasses.replace(model.weights, pace=tables)

    prompt, request = np.tile([40, 41, 90, 7, 12], 9).astype(np.int32), Request(60)
    under(real)
    paced = model.generate_ids(prompt, request)
    text = [*prompt.tolist(), *paced.tokens]
    found = {way.name: simulated(model, text, len(prompt), way) for way in policies(pace.sizes, pace.growth.depth)}
    assert all(one.tokens == len(paced.tokens) - 1 for one in found.values())
    many = len(paced.tokens) - 1
    assert found["what pays"].rounds == paced.rounds < found["vanilla"].rounds == many
    assert found["vanilla"].milliseconds == 4.0 * many
    assert found["perfect hindsight"].milliseconds <= min(one.milliseconds for one in found.values())
    assert found["perfect hindsight"].milliseconds >= 4.0 * found["perfect hindsight"].rounds
    always = simulated(model, text, len(prompt), Policy("all", always=(3, 4)))
    under(pace_tables.forced(pace, 3, 4))
    assert always.rounds == model.generate_ids(prompt, request).rounds
    np.testing.assert_allclose(always.milliseconds, always.rounds * (6.0 + 0.8), rtol=1e-5)
