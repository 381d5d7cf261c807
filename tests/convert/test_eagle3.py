"""Import of EAGLE-3 drafts, and what is wrong with the maps of some."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from convert.__main__ import main
from eval.methods import side_by_side
from frspec_jax import api
from frspec_jax.api import Request
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.errors import UserError
from frspec_jax.vocabulary import Ranking, control_ids, tokenizer_hash
from tests.support.drafts import (
    edit_pickle,
    imported,
    published_eagle,
    published_eagle3,
)
from tests.support.tiny_hf import edit_json, refusal, same

IDS = np.sort(np.random.default_rng(7).choice(np.arange(1, 160), 60, replace=False))


@pytest.fixture
def ckpt(deep_ckpt) -> Checkpoint:
    return deep_ckpt


def rank(ckpt: Checkpoint) -> Ranking:
    ranking = Ranking(np.random.default_rng(3).permutation(160), tokenizer_hash(ckpt.tokenizer), ("toy.txt",))
    ranking.save(ckpt.path / "ranking.npz")
    return ranking


@pytest.mark.sweep
def test_an_imported_draft_changes_nothing_and_its_vocabulary_is_cropped_further(ckpt, tmp_path):
    ranking = rank(ckpt)
    imported(published_eagle3(tmp_path / "draft", ckpt, IDS), ckpt, "eagle3", command="eagle3")
    vanilla, prompt = api.load(ckpt, "none"), np.array([5, 80, 33, 9], np.int32)
    expected = vanilla.generate_ids(prompt, Request(24)).tokens
    for size, method, kept in (("full", "eagle3", 60), (None, "eagle3+fr", 40), (20, "eagle3+fr", 20)):
        model = api.load(ckpt, api.Draft(vocab=size, pace="fixed"))
        result = model.generate_ids(prompt, Request(24))
        assert result.tokens == expected
        assert (result.method, result.draft_vocab) == (method, kept)
        ids = np.asarray(model.weights.draft.head.ids)
        always = np.intersect1d(control_ids(ckpt.tokenizer, ckpt.stop_ids, 160), IDS)
        assert set(always) <= set(ids) <= set(IDS) and len(set(ids.tolist())) == kept
        best = [i for i in ranking.order if i in set(IDS)][: kept - len(always)]
        assert set(best) <= set(ids)
    assert api.load(ckpt).generate_ids(prompt, Request(24)).tokens == expected  # with a pace, as it comes
    with pytest.raises(UserError, match=r"Draft.vocab 61 is larger than the draft's own vocabulary \(60 tokens\)"):
        api.load(ckpt, api.Draft(vocab=61))


def test_a_head_over_the_whole_vocabulary_needs_no_map(ckpt, tmp_path):
    folder = published_eagle3(tmp_path / "draft", ckpt, np.arange(160))
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({k: v for k, v in tensors.items() if k not in ("d2t", "t2d")}, folder / "pytorch_model.bin")
    _, params = imported(folder, ckpt, "eagle3", command="eagle3")
    assert np.array_equal(params.ids, np.arange(160))


@pytest.mark.parametrize("form", ["eagle", "sglang", "vllm", "speculators"])
def test_it_comes_back_bit_for_bit(form, ckpt, tmp_path):
    folder = published_eagle3(tmp_path / "draft", ckpt, IDS)
    edit_json(folder / "config.json", rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 2.0})
    first = imported(folder, ckpt, "first", "--dtype", "bfloat16", command="eagle3")
    main(["export", "--ckpt", str(ckpt.path), "--format", form, "--out", str(tmp_path / "out")])
    tensors, original = load_file(tmp_path / "out" / "model.safetensors"), torch.load(folder / "pytorch_model.bin")
    if form == "speculators":
        assert set(tensors) == {name.replace("midlayer", "layers.0") for name in original} | {"embed_tokens.weight"}
    else:
        assert set(tensors) == set(original)
    for name in ("d2t", "t2d"):
        assert tensors[name].dtype == original[name].numpy().dtype
        assert np.array_equal(tensors[name], original[name].numpy())
    second = imported(tmp_path / "out", ckpt, "second", command="eagle3")
    assert second[0] == first[0] and second[0].rope_theta == 5e5 and same(second[1], first[1])


def test_biases_are_exported_for_eagles_own_code_alone(ckpt, tmp_path, capsys):
    imported(published_eagle3(tmp_path / "draft", ckpt, IDS, bias=True), ckpt, "first", command="eagle3")
    flags = ("--ckpt", ckpt.path, "--out", tmp_path / "out")
    assert "the draft has biases" in refusal(capsys, "export", *flags, "--format", "vllm")
    main(["export", *map(str, flags)])
    assert imported(tmp_path / "out", ckpt, "second", command="eagle3")[0].fc_bias


def _without(*names):
    def remove(folder, ckpt):
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        torch.save({k: v for k, v in tensors.items() if k not in names}, folder / "pytorch_model.bin")

    return remove


def _offsets(change):
    def edit(folder, ckpt):
        edit_pickle(folder, d2t=torch.from_numpy(change(IDS.copy()) - np.arange(len(IDS))))

    return edit


def _set(index, value):
    def change(ids):
        ids[index] = value
        return ids

    return change


WRONG = {
    "no map": (_without("d2t", "t2d"), "holds no d2t, without which nobody knows"),
    "all zeros": (_offsets(lambda ids: np.arange(len(ids))), "d2t is all zeros"),
    "out of range": (_offsets(_set(-1, 160)), "d2t names id 160; the map belongs to a head"),
    "negative": (_offsets(_set(0, -2)), "d2t names id -2; the map belongs to a head"),
    "duplicate": (_offsets(_set(1, IDS[0])), f"d2t names id {IDS[0]} more than once"),
    "other ids": (lambda f, c: edit_pickle(f, t2d=torch.arange(160) < 60), "t2d does not name the ids that d2t does"),
    "other vocabulary": (lambda f, c: edit_pickle(f, t2d=torch.ones(170, dtype=torch.bool)), "t2d does not name"),
    "shorter map": (lambda f, c: edit_pickle(f, d2t=torch.arange(59)), "d2t has shape [59], and the head 60 rows"),
    "floats": (lambda f, c: edit_pickle(f, d2t=torch.ones(60)), "d2t is stored as F32; it must hold integers"),
    "vocab_size": (lambda f, c: edit_json(f / "config.json", vocab_size=170), "vocab_size 170, but that of --target"),
    "hidden size": (lambda f, c: edit_json(f / "config.json", hidden_size=96), "belongs to another target"),
    "bias promised": (
        lambda f, c: edit_json(f / "config.json", bias=True),
        "says bias: true, but",
    ),
    "bias denied": (
        lambda f, c: edit_pickle(f, fc__bias=torch.ones(48)),
        "says bias: false, but",
    ),
    "no head": (_without("lm_head.weight"), "holds no lm_head.weight, so it is no whole EAGLE-3 draft"),
    "rows": (lambda f, c: edit_pickle(f, lm_head__weight=torch.ones(61, 48)), "lm_head.weight has shape [61, 48]"),
    "layers": (lambda f, c: edit_json(f / "config.json", num_hidden_layers=2), "a draft of 2 layers"),
    "no heads": (
        lambda f, c: edit_json(f / "config.json", num_attention_heads=0),
        "num_attention_heads is 0, and must",
    ),
    "KV heads": (
        lambda f, c: edit_json(f / "config.json", num_key_value_heads=4),
        "6 query heads cannot be shared by 4",
    ),
    "odd heads": (lambda f, c: edit_json(f / "config.json", head_dim=9), "config.json: head_dim 9 is odd"),
    "taps": (
        lambda f, c: edit_json(f / "config.json", eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 2]}),
        "eagle_aux_hidden_state_layer_ids [0, 1, 2] are not the published ones ([2, 3, 3]",
    ),
    "mixed bands": (
        lambda f, c: edit_json(f / "config.json", eagle_aux_injection_mode="banded_mix_fc"),
        "eagle_aux_injection_mode 'banded_mix_fc' is not supported; a draft whose fc joins",
    ),
    "narrow": (
        lambda f, c: edit_json(f / "config.json", hidden_size=96, target_hidden_size=48),
        "a hidden_size of 96, and its target one of 48; drafts that are as wide as their target",
    ),
    "another embedding": (
        lambda f, c: edit_pickle(f, embed_tokens__weight=torch.ones(160, 48)),
        'or, if it was trained with an embedding of its own, say "embed_requires_grad": true',
    ),
    "fingerprint": (lambda f, c: edit_json(f / "config.json", frspec_target="0" * 16), "made for another target"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_malformed_drafts_are_refused(fault, ckpt, tmp_path, capsys):
    breaks, sentence = WRONG[fault]
    folder = published_eagle3(tmp_path / "draft", ckpt, IDS)
    breaks(folder, ckpt)
    assert sentence in refusal(capsys, "eagle3", folder, "--target", ckpt.path)
    assert ckpt.draft_folder(None) is None


@pytest.mark.parametrize("stated", [[2, 3, 3], [1, 2, 2]])
def test_the_published_taps_may_be_stated_in_either_numbering(stated, ckpt, tmp_path):
    folder = published_eagle3(tmp_path / "draft", ckpt, IDS)
    edit_json(folder / "config.json", eagle_aux_hidden_state_layer_ids=stated)
    assert imported(folder, ckpt, "eagle3", command="eagle3")[0].taps == (2, 3, 3)


def test_the_wrong_command_is_told_the_right_one(ckpt, tmp_path, capsys):
    two, three = published_eagle(tmp_path / "two", ckpt, False), published_eagle3(tmp_path / "three", ckpt, IDS)
    assert "run: python -m convert eagle3 " in refusal(capsys, "eagle", three, "--target", ckpt.path)
    assert "run: python -m convert eagle " in refusal(capsys, "eagle3", two, "--target", ckpt.path)


def test_a_target_of_two_layers_has_no_taps(tiny_ckpt, tmp_path, capsys):
    folder = published_eagle3(tmp_path / "draft", tiny_ckpt, IDS)
    assert "--target has 2 layers" in refusal(capsys, "eagle3", folder, "--target", tiny_ckpt.path)


def test_config_json_names_the_kind(ckpt, tmp_path):
    imported(published_eagle3(tmp_path / "draft", ckpt, IDS), ckpt, "eagle3", command="eagle3")
    data = json.loads((ckpt.path / "drafts" / "eagle3" / "config.json").read_text())
    assert data["kind"] == "eagle3" and data["taps"] == [2, 3, 3] and data["draft_vocab_size"] == 60


def test_an_evaluation_has_each_vocabulary_once(ckpt, tmp_path):
    """A head of 60 tokens is whole at "full" and at 60: the same method."""
    rank(ckpt)
    imported(published_eagle3(tmp_path / "draft", ckpt, IDS), ckpt, "eagle3", command="eagle3")
    drafts = side_by_side.varied(["eagle3"], ["full", 60, 20], None, [ckpt.path / "ranking.npz"])
    found = side_by_side.methods(ckpt, drafts)
    assert list(found) == ["vanilla", "EAGLE-3", "EAGLE-3 + FR 20 (ranking)"]
