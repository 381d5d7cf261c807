"""Fitting how a draft copies: the likelihood against plain loops, what a fit finds, and the command."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from frspec_jax import generate
from frspec_jax.checkpoint import Checkpoint, write_draft
from frspec_jax.drafters.copying import LONGEST, MATCHES, Copying
from frspec_jax.files import new_folder
from tests.frspec_jax.test_copying import SOME, looked_up
from tests.support import toy
from tests.support.folders import checkpoint_folder
from train.__main__ import main
from train.batches import Batch
from train.copying import PASSES, Places, fitted, loss, places
from train.features import FeatureStore, FeatureWriter
from train.recipe import unrolled_passes


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Checkpoint:
    return checkpoint_folder(tmp_path_factory.mktemp("copying") / "toy")


def store_of(folder, ckpt: Checkpoint, ids: int = 12) -> FeatureStore:
    """Texts of few different tokens, with features of no target; their last two thirds are answers."""
    rng = np.random.default_rng(0)
    writer = FeatureWriter(folder, ckpt)
    for source, length in enumerate((40, 150, 61)):
        answer = (np.arange(length) > length // 3).astype(np.uint8)
        features = 0.1 * rng.normal(size=(length, ckpt.config.hidden_size))
        writer.append(source, rng.integers(0, ids, length, dtype=np.int32), answer, features)
    writer.close()
    return FeatureStore(folder, ckpt)


def test_the_loss_is_that_of_a_softmax_over_raised_logits(ckpt, tmp_path):
    """By plain loops over pairs: in pass s a draft has seen the text up to s tokens before the one it goes on from."""
    store, target = store_of(tmp_path / "store", ckpt), ckpt.params()
    spec, params = ckpt.draft(ckpt.draft_folder("eagle"))
    layer = spec.layer_of(ckpt.config)
    losses, plain = [], []
    for index in range(2):
        tokens, answer, features = (np.asarray(column)[:100] for column in store.sequence(index))
        pairs = len(tokens) - 1
        wide = features.astype(np.float32)[None]
        batch = Batch(
            wide[:, :-1],
            tokens[None, 1:],
            wide[:, 1:],
            answer[None, 1:].astype(np.float32),
            np.ones((1, pairs), np.int32),
            np.arange(pairs)[None],
        )
        head = np.asarray(target.head, np.float64)
        unrolled = jax.jit(unrolled_passes, static_argnames=("config", "unroll"))
        outputs = unrolled(params, layer, target.embedding, jax.tree.map(jnp.asarray, batch), PASSES)
        for s, output in enumerate(outputs):
            for t in range(s, pairs):
                if not answer[t + 1]:
                    continue
                logits = head @ np.asarray(output[0, t], np.float64)
                best = int((head @ wide[0, t + 1]).argmax())
                plain.append(-special.log_softmax(logits)[best])
                last = [int(tokens[i]) if i > 0 else -2 for i in range(t + 1, t + 1 - LONGEST, -1)]
                for token, weight in looked_up(tokens[: t + 2 - s].tolist(), last, t + 1):
                    logits[token] += SOME.gain * weight
                losses.append(-special.log_softmax(logits)[best])
    found = places(layer, params, target, [store], 2, 100)
    assert len(found.best) == len(losses) and found.follows.shape == (len(losses), MATCHES)
    np.testing.assert_allclose(float(loss(SOME, found)), np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(-float(found.best.mean()), np.mean(plain), rtol=1e-4)


@pytest.mark.sweep
@pytest.mark.parametrize("right", [0.02, 0.9])
def test_a_fit_finds_how_far_to_trust_the_text(right):
    """Matches of two tokens are right as often as told, those of one by chance; the draft itself gives a token 1 %."""
    rng = np.random.default_rng(1)
    count = 4000
    longest = rng.integers(1, 3, (count, MATCHES)) * (np.arange(MATCHES) == 0)  # one match each
    hit = (rng.random(count) < np.where(longest[:, 0] == 2, right, 0.02))[:, None] & (longest > 0)
    found = Places(
        best=jnp.full(count, np.log(0.01), jnp.float32),
        follows=jnp.asarray(np.where(longest > 0, 5, -1), jnp.int32),
        longest=jnp.asarray(longest, jnp.int32),
        age=jnp.asarray(rng.integers(1, 60, (count, MATCHES)), jnp.int32),
        said=jnp.full((count, MATCHES), np.log(0.01), jnp.float32),
        right=jnp.asarray(hit),
    )
    figures, least = fitted(found)
    assert least == pytest.approx(float(loss(figures, found))) and least < float(loss(Copying(), found))
    rise = {n: figures.gain * np.exp(figures.longer * (n - 1)) for n in (1, 2)}
    share = {n: rise[n] / (np.exp(figures.longer * (n - 1)) + figures.doubt) for n in (1, 2)}
    if right == 0.9:  # log(0.9 / 0.1) + log(99) is 6.8
        assert share[2] > 5 and share[1] < share[2] / 2
    else:  # log(0.02 / 0.98) + log(99) is 0.7
        assert share[2] < 2 and share[1] < 2


@pytest.mark.sweep
def test_the_command_writes_what_drafting_then_uses(ckpt, tmp_path, capsys):
    own = checkpoint_folder(tmp_path / "toy")
    store_of(tmp_path / "store", own)
    config = own.path / "drafts" / "eagle" / "config.json"
    before = json.loads(config.read_text())
    main(["copying", str(tmp_path / "store"), "--ckpt", str(own.path)])
    assert "without copying" in capsys.readouterr().out
    after = json.loads(config.read_text())
    assert set(after["copying"]) == {field.name for field in dataclasses.fields(Copying)}
    assert {**after, "copying": None, "about": before["about"]} == before
    assert after["about"]["copying"]["steps"] > 100
    spec = Checkpoint.open(own.path).draft_spec(own.path / "drafts" / "eagle")
    assert spec.copies(True) == spec != spec.copies(False)
    asked = ["--ckpt", str(own.path), "--prompt", "hi", "--max-new-tokens", "4", "--json"]
    generate.main([*asked, "--copying", "on", "--pace", "fixed"])
    assert json.loads(capsys.readouterr().out)["method"] == "eagle+fr+copying"


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["copying", *map(str, argv)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_mistakes_are_refused(ckpt, tmp_path, capsys):
    store = tmp_path / "store"
    store_of(store, ckpt)
    assert "--sequences 0 must be at least 1" in refused(capsys, store, "--ckpt", ckpt.path, "--sequences", 0)
    other = checkpoint_folder(tmp_path / "other", draft=False)
    assert "holds no draft" in refused(capsys, store, "--ckpt", other.path)
    shape, params = toy.medusa(other.config)
    with new_folder(other.path / "drafts" / "medusa") as folder:
        write_draft(folder, shape, params, other.fingerprint, {})
    assert "does not copy; give an EAGLE-2 one" in refused(capsys, store, "--ckpt", other.path)
    FeatureWriter(tmp_path / "empty", ckpt).close()
    assert "hold no answer to fit to" in refused(capsys, tmp_path / "empty", "--ckpt", ckpt.path)
