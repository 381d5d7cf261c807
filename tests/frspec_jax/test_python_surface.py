"""What a user meets in Python: the names of the package, settings by name, and how objects say what they are."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

import frspec_jax
from frspec_jax import Draft, Request, Sampling, TreeConfig, UserError, flags
from frspec_jax.checkpoint import Checkpoint, write_draft
from frspec_jax.config import VANILLA
from frspec_jax.files import new_folder
from frspec_jax.request import SETTINGS, Settings
from tests.support import toy
from tests.support.folders import checkpoint_folder


@pytest.fixture(scope="module")
def model(toy_folder):
    return frspec_jax.load(toy_folder.path)


def test_every_public_name_is_there_and_documented():
    for name in frspec_jax.__all__:
        thing = getattr(frspec_jax, name)
        assert name in dir(frspec_jax) and (name == "__version__" or thing.__doc__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = frspec_jax.nothing


def test_settings_by_name_are_a_requests(toy_folder):
    model = frspec_jax.load(toy_folder.path, "none")
    request = Request(12, Sampling(0.8, top_k=20), seed=5)
    by_name = model.generate("the end", max_new_tokens=12, temperature=0.8, top_k=20, seed=5)
    assert by_name.tokens == model.generate("the end", request).tokens
    assert model.generate("the end", request, temperature=0.0).tokens == model.generate("the end", Request(12)).tokens
    together = model.generate(["the end"], max_new_tokens=12, temperature=0.8, top_k=20, seed=5)
    assert together[0].tokens == by_name.tokens
    assert "".join(model.stream("the end", request, max_new_tokens=12)) == by_name.text


def test_settings_that_are_none_or_make_no_sense():
    assert set(Settings.__annotations__) == set(SETTINGS)
    with pytest.raises(TypeError, match="temprature is no setting of a request; did you mean temperature"):
        Request().changed(temprature=1.0)
    with pytest.raises(UserError, match="temperature -1 must be 0"):
        Request().changed(temperature=-1)
    assert Request().changed(logit_bias={3: -1.0}).sampling.logit_bias == ((3, -1.0),)
    assert Request().changed(sampling=Sampling(0.5), top_p=0.9).sampling == Sampling(0.5, top_p=0.9)


def test_one_stop_text_is_no_sequence_of_letters():
    assert Request(stop="END").stop == ("END",) and Request(stop=["a", "b"]).stop == ("a", "b")
    assert hash(Request(stop=["a"])) == hash(Request(stop="a"))
    with pytest.raises(UserError, match="must be texts that are not empty"):
        Request(stop="")


def test_what_objects_say_of_themselves(model, toy_folder):
    assert repr(model).startswith(
        f"<Generator {toy_folder.path}: eagle+fr+slots204+copying+auto, V' = 68 of 272, trees of"
    )
    assert "float32, context 1,024" in repr(model)
    answer = model.generate("the end", max_new_tokens=9)
    assert str(answer) == answer.text and repr(answer).startswith("<Result ") and answer.summary() in repr(answer)
    assert repr(toy_folder) == f"<Checkpoint {toy_folder.path}: llama, 2 layers, 272 tokens; drafts: eagle>"
    assert repr(Draft("eagle", vocab="1/4")).startswith("Draft(name='eagle', vocab='1/4'")


def add_draft(checkpoint: Checkpoint, name: str) -> None:
    shape, params = toy.draft(checkpoint.config)
    with new_folder(checkpoint.path / "drafts" / name) as folder:
        write_draft(folder, shape, params, checkpoint.fingerprint, {})


def test_a_second_draft_leaves_the_first_the_default(tmp_path):
    checkpoint = checkpoint_folder(tmp_path / "ckpt", draft=False)
    assert checkpoint.default_draft is None and checkpoint.draft_folder(None) is None
    for name in ("mine", "eagle", "a-third"):
        add_draft(checkpoint, name)
        assert checkpoint.default_draft == "mine"
    assert checkpoint.draft_names == ["a-third", "eagle", "mine"]
    assert checkpoint.draft_folder(None).name == "mine" and checkpoint.draft_folder("eagle").name == "eagle"


def test_drafts_of_which_nobody_knows_the_first(tmp_path):
    checkpoint = checkpoint_folder(tmp_path / "ckpt", draft=False)
    for name in ("b", "c"):
        add_draft(checkpoint, name)
    (checkpoint.path / "drafts" / "default").unlink()
    with pytest.raises(UserError, match="holds the drafts b, c; choose one with draft"):
        checkpoint.draft_folder(None)
    add_draft(checkpoint, "eagle")
    assert checkpoint.default_draft == "eagle"
    (checkpoint.path / "drafts" / "default").write_text("gone\n")
    assert checkpoint.default_draft == "eagle"


CPU_TREE = TreeConfig(4, 2, 2)


def tree(size=None, depth=None, top_k=None, default=CPU_TREE):
    return flags.tree_of(argparse.Namespace(tree_size=size, depth=depth, draft_top_k=top_k), default)


@pytest.mark.parametrize("size", [2, 3, 5, 8, 20, 60, 200])
def test_a_tree_size_alone_finds_a_depth(size):
    found = tree(size)
    assert found.size == size and found.candidates >= size - 1
    assert tree(size, default=VANILLA).size == size
    assert tree(size, depth=3).depth == 3 and tree(size, top_k=3).top_k == 3


def test_trees_that_are_asked_for_whole_stay_as_they_are():
    assert tree(60, 6, 10) == TreeConfig(60, 6, 10)
    assert tree(60) == TreeConfig(60, 6, 10)  # the papers' tree
    assert tree(depth=1) == TreeConfig(3, 1, 2)
    assert tree(1) == tree(depth=0) == VANILLA
    for wrong in ({"size": 60, "depth": 2, "top_k": 2}, {"size": 300}, {"size": 0}, {"size": 8, "depth": 0}):
        with pytest.raises(UserError):
            tree(**wrong)


def test_a_request_is_a_value():
    assert Request(seed=3) == Request().changed(seed=3)
    assert dataclasses.replace(Request(stop="a"), seed=1).stop == ("a",)
