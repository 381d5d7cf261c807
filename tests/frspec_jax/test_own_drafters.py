"""Drafters of other packages: the example of docs/drafters.md, found by its entry point, and what it need not say."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from frspec_jax import api, drafters
from frspec_jax.api import Draft, Request
from frspec_jax.checkpoint import Checkpoint, add_draft
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.drafters.base import NO_PARAMS, NO_WEIGHTS, Accepted, DraftMemory, KindDefaults, Turn
from frspec_jax.errors import UserError
from tests.support.tiny_hf import refusal

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "ngram_drafter"


def installed(folder: Path, name: str = "ngram", value: str = "ngram_drafter:NgramKind") -> Path:
    """What pip leaves of the example where it is installed: by this alone it is found."""
    info = folder / f"{name}_drafter-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-drafter\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[{drafters.ENTRY_POINTS}]\n{name} = {value}\n")
    return folder


@pytest.fixture
def with_example(tmp_path, monkeypatch):
    for folder in (EXAMPLE, installed(tmp_path / "site")):
        monkeypatch.syspath_prepend(str(folder))
    import ngram_drafter

    return ngram_drafter


PROMPT = "the cat sat on the mat, the cat sat on the hat, the cat sat on the"


@pytest.mark.sweep
def test_the_examples_text_is_vanillas_as_a_command(toy_copy, tmp_path):
    """In a process of its own, as a user has it; the folder holds a description alone."""
    site = installed(tmp_path / "site")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (EXAMPLE, site, ROOT))), "JAX_PLATFORMS": "cpu"}

    def run(*argv: str) -> str:
        done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "drafts/ngram" in run(str(EXAMPLE / "ngram_drafter.py"), str(toy_copy.path))
    assert os.listdir(toy_copy.path / "drafts" / "ngram") == ["config.json"]
    flags = ("-m", "frspec_jax.generate", "--ckpt", str(toy_copy.path), "--raw", "--prompt", PROMPT, "--json")
    answers = [
        json.loads(run(*flags, "--max-new-tokens", "48", "--draft", draft, *more))
        for draft, *more in (("none",), ("ngram",), ("ngram", "--tree-size", "5", "--depth", "4", "--draft-top-k", "1"))
    ]
    assert answers[1]["tokens"] == answers[2]["tokens"] == answers[0]["tokens"]
    assert (answers[1]["method"], answers[2]["method"]) == ("ngram+copying+auto", "ngram")


def test_of_a_text_that_repeats_itself_much_is_accepted(with_example, toy_copy):
    add_draft(toy_copy, "ngram", with_example.NgramKind(1))
    vanilla = api.load(toy_copy, "none")
    model = api.load(toy_copy, Draft("ngram", tree=TreeConfig(5, 4, 1)), target=vanilla.weights.target)
    ids = np.random.default_rng(4).integers(0, toy_copy.config.vocab_size, 12).astype(np.int32)
    expected, found = vanilla.generate_ids(ids, Request(80)), model.generate_ids(ids, Request(80))
    assert found.tokens == expected.tokens and 2 * found.rounds < expected.rounds + 10


@pytest.mark.sweep(quick=["1-auto-settings0"])
@pytest.mark.parametrize("settings", [Sampling(), Sampling(1.0)])
@pytest.mark.parametrize("pace", ["auto", "fixed"])
@pytest.mark.parametrize("order", [1, 3])
def test_its_text_is_vanillas(order, pace, settings, with_example, toy_copy):
    add_draft(toy_copy, "ngram", with_example.NgramKind(order))
    vanilla = api.load(toy_copy, "none")
    model = api.load(toy_copy, Draft("ngram", pace=pace), target=vanilla.weights.target)
    ids = vanilla.encode(PROMPT, Request(raw=True))
    for seed in range(2):
        asked = Request(40, settings, seed)
        assert model.generate_ids(ids, asked).tokens == vanilla.generate_ids(ids, asked).tokens


def test_it_guesses_what_followed_the_same_tokens(with_example):
    drafter = with_example.Ngram(2)
    text = jnp.asarray([-1, 5, 6, 7, 8, 9, 5, 6, 0, 0, 0, 0, 0, 0], jnp.int32)  # from position 1 on; the root is the 6
    nothing = Accepted(jnp.zeros((1, 4)), jnp.zeros(1, jnp.int32), jnp.int32(1))
    turn = Turn(nothing, jnp.int32(6), jnp.int32(7), text)
    guess = drafter.guess(NO_WEIGHTS, turn, 4)
    assert guess.tokens.tolist() == [7, 8, 9, 5] and np.isfinite(guess.scores).all()
    tree, _ = drafter.propose(NO_WEIGHTS, TreeConfig(4, 3, 1), jnp.zeros(4), turn, DraftMemory())
    assert (tree.tokens.tolist(), tree.parent.tolist(), tree.depth.tolist()) == (
        [6, 7, 8, 9],
        [0, 0, 1, 2],
        [0, 1, 2, 3],
    )
    assert tree.ancestors[:, 0].tolist() == [1, 3, 7, 15]
    offered, _, _ = drafter.offer(NO_WEIGHTS, TreeConfig(2, 3, 1), jnp.zeros(4), turn, DraftMemory())
    assert offered.parent.tolist() == [-1, 0, 1] and drafter.by_level(TreeConfig(2, 3, 1)) == (1, 1, 1)
    nowhere = drafter.guess(NO_WEIGHTS, dataclasses.replace(turn, text=text.at[6].set(3)), 4)
    assert np.isneginf(nowhere.scores[0])


def test_what_is_asked_of_it_in_vain_is_refused(with_example, toy_copy, tmp_path, capsys):
    add_draft(toy_copy, "ngram", with_example.NgramKind())
    for asked, said in (
        (
            Draft("ngram", vocab=64),
            "Draft.vocab 64: a draft of kind ngram has no head to crop",
        ),
        (Draft("ngram", copying=True, pace="fixed"), "a draft of kind ngram does not copy"),
        (Draft("ngram", context_slots=8), "a draft of kind ngram has no slots"),
    ):
        with pytest.raises(UserError, match=said.replace(".", r"\.")):
            api.load(toy_copy, asked)
    assert api.load(toy_copy, Draft("ngram", vocab="full")).draft_vocab == toy_copy.config.vocab_size
    with pytest.raises(UserError, match="exists already"):
        add_draft(toy_copy, "ngram", with_example.NgramKind())
    argv = ("export", "--ckpt", toy_copy.path, "--draft", "ngram", "--out", tmp_path / "out")
    assert "a draft of kind ngram has no form that other engines read" in refusal(capsys, *argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "value", "config", "said"),
    [
        (
            "other",
            "x:Y",
            {"kind": "ngram"},
            "a draft of kind 'ngram' is not known; known are eagle,",
        ),
        ("ngram", "no_such_module:Kind", {"kind": "ngram"}, "are those of ngram-drafter, which cannot be imported"),
        ("ngram", "ngram_drafter:NgramKind", {"kind": "ngram", "order": 9}, "is damaged (order 9 must be 1 to 8)"),
        ("ngram", "ngram_drafter:NgramKind", {"kind": "ngram", "order": "two"}, "order is 'two', and must be a whole"),
        ("ngram", "ngram_drafter:NgramKind", {"kind": 3}, "a draft of kind 3 is not known"),
    ],
)
def test_kinds_that_cannot_be_had_are_named(name, value, config, said, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(installed(tmp_path / "site", name, value)))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    with pytest.raises(UserError) as refused:
        drafters.spec_of(config, "config.json")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_ours_go_before_others_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(installed(tmp_path / "site", "eagle", "x:Y")))
    assert drafters.spec_class("eagle").title == "EAGLE-2" and drafters.known().count("eagle") == 1


def test_the_defaults_of_a_kind_suit_any_target_and_grow_what_is_asked_for(toy_folder):
    @dataclasses.dataclass(frozen=True)
    class Kind(KindDefaults):
        kind: ClassVar[str] = "mine"
        title: ClassVar[str] = "Mine"
        figure: int = 3

    mine, tree = Kind(5), TreeConfig(8, 3, 2)
    assert mine.to_json() == {"figure": 5} and Kind.from_json({"figure": 5, "else": 1}) == mine
    assert mine.fit(tree) is tree and mine.copies(False) is mine and mine.vocabulary(NO_PARAMS) is None
    assert (mine.hidden_size, mine.taps, mine.in_context, mine.crops) == (None, (), False, False)
    assert isinstance(toy_folder, Checkpoint) and mine.shapes(toy_folder.config) is NO_PARAMS
