"""EAGLE-3 drafts as speculators, vLLM's trainers, write them, and those of SpecForge and AngelSlim; and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig

from convert.__main__ import main
from frspec_jax import api
from frspec_jax.api import Request
from frspec_jax.checkpoint import Checkpoint
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


NORMS = {
    "plain": {},
    "residual": {"norm_before_residual": True},
    "joined": {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
    "each": {"fc_norm": True, "eagle_aux_hidden_state_layer_ids": [0, 5, 6]},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
}
SGLANGS = ("plain", "EAGLE-3.1")  # those that SGLang reads


@pytest.mark.sweep
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


@pytest.mark.sweep
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
