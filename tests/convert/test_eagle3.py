"""Import of EAGLE-3 drafts, and what is wrong with the maps of some."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig

from convert.__main__ import main
from eval.methods import side_by_side
from frspec_jax import api
from frspec_jax.api import Request
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.errors import UserError
from frspec_jax.vocabulary import Ranking, control_ids, tokenizer_hash
from tests.support.drafts import (
    edit_pickle,
    edit_safetensors,
    imported,
    published_eagle,
    published_eagle3,
    published_speculators,
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


# The format of speculators -----------------------------------------------------------------------

NORMS = {
    "plain": {},
    "residual": {"norm_before_residual": True},
    "joined": {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
    "each": {"fc_norm": True, "eagle_aux_hidden_state_layer_ids": [0, 5, 6]},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
}
SGLANGS = ("plain", "EAGLE-3.1")  # those that SGLang reads


def test_a_draft_of_speculators_stands_for_the_ids_of_its_map_and_changes_nothing(ckpt, tmp_path):
    """The map of the published case: draft id i is target id 4 i."""
    ids = 4 * np.arange(40)
    expected = api.load(ckpt, "none").generate_ids(np.array([5, 80, 33, 9], np.int32), Request(24)).tokens
    for name, entries in NORMS.items():
        folder = published_speculators(tmp_path / name, ckpt, ids, **entries)
        spec, params = imported(folder, ckpt, name, command="eagle3")
        assert np.array_equal(params.ids, ids) and spec.draft_vocab_size == 40
        assert spec.norms.residual == entries.get("norm_before_residual", False)
        model = api.load(ckpt, api.Draft(name, vocab="full", pace="fixed"))
        assert model.generate_ids(np.array([5, 80, 33, 9], np.int32), Request(24)).tokens == expected


def test_a_trained_embedding_is_kept_and_told(ckpt, tmp_path, capsys):
    folder = published_speculators(tmp_path / "draft", ckpt, IDS, norm_before_residual=True)
    rows = torch.randn(160, 48, generator=torch.Generator().manual_seed(1))
    edit_safetensors(folder, embed_tokens__weight=rows)
    spec, params = imported(folder, ckpt, "eagle3", command="eagle3")
    assert "differs from the target's in 160 of 160 rows; the draft keeps its own" in capsys.readouterr().err
    assert spec.own_embedding and np.array_equal(params.embedding, rows.numpy())
    model = api.load(ckpt, api.Draft("eagle3", vocab="full", pace="fixed"))
    assert np.array_equal(model.weights.draft.embedding, rows.numpy())
    prompt = np.array([5, 80, 33, 9], np.int32)
    assert model.generate_ids(prompt, Request(24)).tokens == (
        api.load(ckpt, "none").generate_ids(prompt, Request(24)).tokens
    )
    main(["export", "--ckpt", str(ckpt.path), "--format", "vllm", "--dtype", "float32", "--out", str(tmp_path / "out")])
    again = imported(tmp_path / "out", ckpt, "again", command="eagle3")
    assert again[0] == spec and same(again[1], params)


@pytest.mark.parametrize("name", NORMS)
def test_a_draft_of_speculators_comes_back_bit_for_bit(name, ckpt, tmp_path, capsys):
    first = imported(published_speculators(tmp_path / "draft", ckpt, IDS, **NORMS[name]), ckpt, command="eagle3")
    flags = ("--ckpt", ckpt.path, "--dtype", "float32")
    read_by = {"eagle": name == "plain", "sglang": name in SGLANGS, "vllm": True, "speculators": True}
    for form, reads in read_by.items():
        out = tmp_path / form
        if not reads:
            said = refusal(capsys, "export", *flags, "--format", form, "--out", out, "--draft", "eagle")
            assert "ignore; use --format vllm or speculators" in said and not out.exists()
            continue
        main(["export", *map(str, flags), "--format", form, "--out", str(out), "--draft", "eagle"])
        again = imported(out, ckpt, f"from-{form}", command="draft")
        assert again[0] == first[0] and same(again[1], first[1]), form


def test_what_speculators_reads_names_the_verifier(ckpt, tmp_path, capsys):
    imported(published_eagle3(tmp_path / "draft", ckpt, IDS), ckpt, command="eagle3")
    flags = ["export", "--ckpt", str(ckpt.path), "--out", str(tmp_path / "out")]
    assert "--verifier stands in drafts of --format speculators alone" in refusal(capsys, *flags, "--verifier", "x")
    main([*flags, "--format", "speculators", "--verifier", "somebody/target"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    verifier = config["speculators_config"]["verifier"]
    assert verifier == {"name_or_path": "somebody/target", "architectures": ["LlamaForCausalLM"]}
    assert config["architectures"] == ["Eagle3Speculator"] and config["draft_vocab_size"] == 60
    layer = config["transformer_layer_config"]
    assert (layer["model_type"], layer["num_hidden_layers"], layer["vocab_size"]) == ("llama", 1, 160)
    assert AutoConfig.for_model(**layer).head_dim == 10
    embedding = load_file(tmp_path / "out" / "model.safetensors")["embed_tokens.weight"].astype(np.float32)
    np.testing.assert_allclose(embedding, np.asarray(ckpt.params().embedding), rtol=2**-8)


@pytest.mark.parametrize(
    ("entries", "taps"),
    [
        ({"architectures": ["Eagle3LlamaForCausalLM"], "eagle_aux_injection_mode": "fused_fc"}, None),
        ({"architectures": ["Eagle3LlamaForCausalLM"], "aux_hidden_states_layer_ids": [1, 2, 2]}, None),
        ({"architectures": ["LlamaForCausalLMEagle3"], "use_aux_norm": True}, "each"),
    ],
)
def test_drafts_of_angelslim_and_specforge_are_read(entries, taps, ckpt, tmp_path):
    """AngelSlim calls the layer layers.0; SpecForge and SGLang have had two names for the norms of EAGLE-3.1."""
    folder = published_eagle3(tmp_path / "draft", ckpt, IDS, embedding=True)
    if "Eagle3Llama" in entries["architectures"][0]:
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        renamed = {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}
        torch.save(renamed, folder / "pytorch_model.bin")
    if taps:
        norms = {f"fc_norm__{i}__weight": torch.full((48,), 1.0 + i) for i in range(3)}
        edit_pickle(folder, **norms)
    edit_json(folder / "config.json", **entries)
    spec, params = imported(folder, ckpt, command="draft")
    assert spec.norms.taps == (taps or "none") and np.array_equal(params.ids, IDS)
    if taps:  # the norms' weights stand in the columns of fc
        plain = torch.load(folder / "pytorch_model.bin", weights_only=True)["fc.weight"].float().numpy()
        np.testing.assert_allclose(params.fc, plain * np.repeat([1.0, 2.0, 3.0], 48), rtol=1e-6)


def _spec_set(**entries):
    return lambda folder: edit_json(folder / "config.json", **entries)


def _layer_set(**entries):
    def edit(folder):
        layer = json.loads((folder / "config.json").read_text())["transformer_layer_config"]
        edit_json(folder / "config.json", transformer_layer_config={**layer, **entries})

    return edit


WRONG_SPECULATORS = {
    "type": (_spec_set(speculators_model_type="dflash"), "speculators_model_type is 'dflash'; of the drafts of"),
    "no type": (_spec_set(speculators_model_type=None), "speculators_model_type is None; of the drafts of"),
    "layer": (_spec_set(transformer_layer_config=[1]), "transformer_layer_config is [1], and must be an object"),
    "no layer": (_spec_set(transformer_layer_config={}), "transformer_layer_config is {}, and must be an object"),
    "unsaid norm": (_spec_set(norm_before_residual=None), "does not say norm_before_residual; write true or false"),
    "odd norm": (_spec_set(norm_before_residual="yes"), "norm_before_residual is 'yes', and must be true or false"),
    "no such norm": (_spec_set(norm_before_fc=True), "holds no input_norm.weight, though its config.json asks"),
    "two norms": (_spec_set(norm_before_fc=True, fc_norm=True), "asks for norm_before_fc and fc_norm"),
    "taps": (_spec_set(eagle_aux_hidden_state_layer_ids=[2, 3, 7]), "[2, 3, 7], and must be a list of layers"),
    "taps of text": (_spec_set(eagle_aux_hidden_state_layer_ids=["a"]), "['a'], and must be a list of layers"),
    "more taps": (_spec_set(eagle_aux_hidden_state_layer_ids=[1, 2, 3, 4]), "fc.weight has shape [48, 144]"),
    "layers": (_layer_set(num_hidden_layers=2), "a draft of 2 layers"),
    "activation": (_layer_set(hidden_act="gelu"), "hidden_act 'gelu' is not supported"),
    "window": (_layer_set(layer_types=["sliding_attention"]), "layer_types asks for sliding_attention"),
    "Q norm": (
        lambda f: edit_safetensors(f, layers__0__self_attn__q_norm__weight=torch.ones(10)),
        "midlayer.self_attn.q_norm.weight is unexpected",
    ),
    "twice": (lambda f: edit_safetensors(f, model__fc__weight=torch.ones(48, 144)), "holds fc.weight twice"),
    "norm's shape": (
        lambda f: (_spec_set(norm_before_fc=True)(f), edit_safetensors(f, input_norm__weight=torch.ones(48))),
        "input_norm.weight has shape [48], and must have [144]",
    ),
}


@pytest.mark.parametrize("fault", WRONG_SPECULATORS)
def test_malformed_drafts_of_speculators_are_refused(fault, ckpt, tmp_path, capsys):
    breaks, sentence = WRONG_SPECULATORS[fault]
    folder = published_speculators(tmp_path / "draft", ckpt, IDS)
    breaks(folder)
    assert sentence in refusal(capsys, "eagle3", folder, "--target", ckpt.path)
    assert ckpt.draft_folder(None) is None


@pytest.mark.parametrize("prefix", ["", "model."])
def test_no_two_commands_send_to_each_other(prefix, ckpt, tmp_path, capsys):
    """Whatever the folder, of the commands at most one is told to run another, and that one takes it."""
    made = {
        "eagle": published_eagle(tmp_path / "two", ckpt, False),
        "eagle3": published_speculators(tmp_path / "three", ckpt, IDS),
    }
    tensors = torch.load(made["eagle"] / "pytorch_model.bin", weights_only=True)
    torch.save({prefix + name: value for name, value in tensors.items()}, made["eagle"] / "pytorch_model.bin")
    edit_safetensors(made["eagle3"], lambda name: prefix + name)
    for kind, other in (("eagle", "eagle3"), ("eagle3", "eagle")):
        for argv in ((other, made[kind], "--target", ckpt.path), ("hf", made[kind], "--out", tmp_path / "no")):
            assert f"run: python -m convert {kind} {made[kind]} " in refusal(capsys, *argv)
        imported(made[kind], ckpt, kind, command=kind)
