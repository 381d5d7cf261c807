"""Where a pace's tables come from: files, measurement, defaults; and how drafts with a pace are asked for."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from frspec_jax import api, pace_tables
from frspec_jax.api import Draft, Request
from frspec_jax.batch import Batch
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.defaults import CPU_PACE, DEFAULTS
from frspec_jax.errors import UserError
from frspec_jax.method import Method
from frspec_jax.pace import GRID
from frspec_jax.pace_tables import DEFAULT, FILE, Fitted
from frspec_jax.state import RUNNING
from pallas_kernels.measured import CACHE_VARIABLE

PROMPT = np.arange(3, 40)


@pytest.fixture(scope="module")
def vanilla(toy_folder):
    model = api.load(toy_folder, "none", dtype="float32")
    return {
        drawn: model.generate_ids(PROMPT, Request(40, drawn, seed=3)).tokens for drawn in (Sampling(), Sampling(1.0))
    }


@pytest.mark.sweep(quick=["draft1-*"])
@pytest.mark.parametrize("drawn", [Sampling(), Sampling(1.0)], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "draft",
    [
        Draft(),
        Draft("none", copying=True),
        Draft(copying=False),
        Draft(vocab=64, pace="auto", tree=TreeConfig(6, 3, 2)),
    ],
)
def test_as_users_get_it_the_text_is_vanillas(toy_folder, vanilla, draft, drawn):
    model = api.load(toy_folder, draft, dtype="float32")
    result = model.generate_ids(PROMPT, Request(40, drawn, seed=3))
    assert result.tokens == vanilla[drawn]
    assert result.method.endswith("+auto") and ("copying" in result.method) == draft.copies


@pytest.mark.sweep
def test_costs_are_measured_once_and_kept(toy_folder, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    measured, times = pace_tables.measured, []
    monkeypatch.setattr(pace_tables, "measured", lambda *given: times.append(1) or measured(*given))
    model = api.load(toy_folder, dtype="float32")
    guessed = model.weights.pace.costs
    model.warm_up()
    (file,) = (tmp_path / "pace").iterdir()
    kept = json.loads(file.read_text())
    costs = model.weights.pace.costs
    np.testing.assert_allclose(kept["verify_ms"], costs.verify, atol=1e-4)
    np.testing.assert_allclose(kept["draft_ms"], costs.draft, atol=1e-4)
    assert (np.diff(costs.verify) >= 0).all() and (np.diff(costs.draft) > 0).all() and costs.draft[0] == 0
    assert not np.allclose(costs.verify, guessed.verify)
    model.warm_up(Sampling(1.0))
    again = api.load(toy_folder, dtype="float32")
    again.warm_up()
    assert len(times) == 1
    np.testing.assert_allclose(again.weights.pace.costs.verify, kept["verify_ms"], rtol=1e-6)
    again.measure_costs()
    assert len(times) == 2
    other = api.load(toy_folder, Draft(vocab=64), dtype="float32")
    other.warm_up()
    assert len(times) == 3 and len(list((tmp_path / "pace").iterdir())) == 2
    file.write_text('{"verify_ms": [1, "two"')  # what is damaged is measured again
    api.load(toy_folder, dtype="float32").warm_up()
    assert len(times) == 4 and json.loads(file.read_text())["verify_ms"]


def test_what_an_earlier_request_asked_for_is_not_measured(toy_folder):
    batch = Batch(api.load(toy_folder, dtype="float32"), 2)
    batch.admit(np.arange(5), Request(4, Sampling(logit_bias=((3, 0.5),))))
    batch.step()
    assert batch.state.penalties.active.any()
    anew = pace_tables.begun_anew(batch.state)
    assert not anew.penalties.active.any() and (anew.finished == RUNNING).all()


def test_a_context_without_room_goes_by_the_guess(toy_folder):
    model = api.load(toy_folder, dtype="float32", context=16)
    assert len(model.generate_ids(PROMPT[:8], Request(4)).tokens) <= 4


def test_odds_of_a_folder(toy_copy):
    folder = toy_copy.draft_folder("eagle")
    assert pace_tables.read_odds(folder) is DEFAULT and pace_tables.read_odds(None) is DEFAULT
    mine = Fitted([GRID.tolist(), [0.5] * len(GRID)], [[0.1 * n, 0.2] for n in range(7)], {"places": 3})
    pace_tables.write_odds(folder, mine)
    assert pace_tables.read_odds(folder) == mine
    odds = api.load(toy_copy, dtype="float32").weights.pace.odds
    assert odds.beam.shape == (CPU_PACE.growth.depth, len(GRID)) and (odds.beam[1:] == 0.5).all()
    assert odds.chain.shape == (7, DEFAULTS["cpu"].paced.depth) and (odds.chain[:, 1:] == np.float32(0.2)).all()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"format": "frspec-jax pace 9", "beam": [], "chain": []}',
        '{"format": "frspec-jax pace 1", "beam": [[0.5]], "chain": [[0.5]]}',
        json.dumps({"format": "frspec-jax pace 1", "beam": [[2.0] * len(GRID)], "chain": [[0.5]] * 7}),
        json.dumps({"format": "frspec-jax pace 1", "beam": [["x"] * len(GRID)], "chain": [[0.5]] * 7}),
    ],
)
def test_damaged_odds_are_one_sentence(toy_copy, text):
    file = toy_copy.draft_folder("eagle") / FILE
    file.write_text(text)
    with pytest.raises(
        UserError, match=r"pace\.json is damaged .*; delete it, or write it anew with python -m train pace"
    ):
        api.load(toy_copy, dtype="float32")
    api.load(toy_copy, Draft(pace="fixed"), dtype="float32")  # which reads none


def test_which_pace_is_asked_for(toy_folder):
    tree = TreeConfig(6, 2, 3)
    assert Draft().paced and Draft().copies and not Draft(tree=tree).paced and not Draft(tree=tree).copies
    assert Draft(tree=tree, pace="auto").paced and not Draft(pace="fixed").paced
    shaped = api.load(toy_folder, Draft(tree=tree, pace="auto"), dtype="float32").drafting
    assert shaped.pace.sizes == (1, 2, 4, 6) and (shaped.pace.growth.depth, shaped.pace.growth.top_k) == (2, 3)
    assert api.load(toy_folder, Draft(pace="fixed"), dtype="float32").drafting.pace is None
    with pytest.raises(UserError, match="pace maybe must be auto or fixed"):
        Draft(pace="maybe")
    with pytest.raises(UserError, match="copying on with a fixed pace needs a draft"):
        api.load(toy_folder, Draft("none", copying=True, pace="fixed"))


@pytest.mark.parametrize(
    ("method", "name", "label"),
    [
        (Method("eagle", True, True, True), "eagle+fr+copying+auto", "FR-Spec 1,000, auto"),
        (Method("eagle", True, False, True), "eagle+fr+auto", "FR-Spec 1,000, auto without copying"),
        (Method(None, False, True, True), "vanilla+copying+auto", "lookup alone, auto"),
        (Method("medusa", False, True, True, True), "medusa+copying+auto, lossy", "Medusa, auto"),
    ],
)
def test_names(method, name, label):
    assert method.name == name and Method.parse(name) == method
    assert method.label(1000) == label


@pytest.mark.sweep
def test_a_lossy_request_has_a_pace_too(toy_folder):
    model = api.load(toy_folder, dtype="float32")
    result = model.generate_ids(PROMPT, Request(24, Sampling(1.0, typical=0.3), seed=1))
    assert len(result.tokens) > 1 and result.method.endswith(", lossy")
    assert dataclasses.replace(Method.parse(result.method), lossy=False).paced
