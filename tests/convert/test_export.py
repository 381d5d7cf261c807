"""Drafts and rankings on their way to other engines, and back."""

from __future__ import annotations

import builtins
import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig

from convert.__main__ import main
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import RopeScaling
from frspec_jax.token_maps import FORMS, read_map
from frspec_jax.vocabulary import Ranking, control_ids, tokenizer_hash
from tests.support.drafts import imported, published_eagle, published_medusa
from tests.support.tiny_hf import edit_json, refusal, same


def exported(ckpt: Checkpoint, out, *flags):
    main(["export", "--ckpt", str(ckpt.path), "--out", str(out), *map(str, flags)])
    tensors = load_file(out / "model.safetensors") if (out / "model.safetensors").exists() else {}
    return tensors, json.loads((out / "config.json").read_text()) if tensors else {}


# Round trips -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", ["eagle", "sglang", "vllm"])
@pytest.mark.parametrize(("bias", "qkv_bias"), [(False, False), (True, True)])
def test_eagle_comes_back_bit_for_bit(bias, qkv_bias, form, dtype, tiny_ckpt, tmp_path, capsys):
    folder = published_eagle(tmp_path / "draft", tiny_ckpt, bias, embedding=False, qkv_bias=qkv_bias)
    first = imported(folder, tiny_ckpt, "first", "--dtype", dtype)
    if bias and form == "vllm":
        flags = ("--ckpt", tiny_ckpt.path, "--format", form, "--out", tmp_path / "out")
        assert "the draft's fc has a bias, which vLLM leaves out" in refusal(capsys, "export", *flags)
        assert not (tmp_path / "out").exists()
        return
    tensors, _ = exported(tiny_ckpt, tmp_path / "out", "--format", form, "--dtype", dtype)
    assert {array.dtype for array in tensors.values()} == {np.dtype(getattr(ml_dtypes, dtype, dtype))}
    assert "embed_tokens.weight" not in tensors
    capsys.readouterr()
    second = imported(tmp_path / "out", tiny_ckpt, "second")
    assert "note:" not in capsys.readouterr().err
    assert second[0] == first[0] and same(second[1], first[1])
    stored = [tiny_ckpt.draft(tiny_ckpt.draft_folder(name), ml_dtypes.bfloat16)[1] for name in ("first", "second")]
    assert same(*stored)


@pytest.mark.parametrize(("own", "layers"), [(True, 1), (False, 2)])
def test_medusa_comes_back_bit_for_bit(own, layers, tiny_ckpt, tmp_path):
    folder = published_medusa(tmp_path / "draft", tiny_ckpt, own, layers)
    edit_json(folder / "config.json", medusa_choices=[[0], [1], [0, 0]])
    first = imported(folder, tiny_ckpt, "first", "--dtype", "bfloat16", command="medusa")
    tensors, config = exported(tiny_ckpt, tmp_path / "out")
    original = torch.load(folder / "medusa_lm_head.pt", weights_only=True)
    assert {k: v.shape for k, v in tensors.items()} == {k: tuple(v.shape) for k, v in original.items()}
    assert config["medusa_num_heads"] == 4 and config["medusa_num_layers"] == layers
    second = imported(tmp_path / "out", tiny_ckpt, "second", command="medusa")
    assert second[0] == first[0] and same(second[1], first[1])


def test_facts_travel_along(tiny_ckpt, tmp_path):
    folder = published_eagle(tmp_path / "draft", tiny_ckpt, bias=False)
    edit_json(folder / "config.json", about={"training": "none"})
    imported(folder, tiny_ckpt)
    exported(tiny_ckpt, tmp_path / "out")
    imported(tmp_path / "out", tiny_ckpt, "second")
    about = json.loads((tiny_ckpt.draft_folder("second") / "config.json").read_text())["about"]
    assert about["training"] == "none" and about["source"] == "eagle"


# What each engine reads --------------------------------------------------------------------------


def test_sglang_finds_a_bias_and_no_more_than_it_reads(tiny_ckpt, tmp_path):
    imported(published_eagle(tmp_path / "draft", tiny_ckpt, bias=False), tiny_ckpt)
    plain, config = exported(tiny_ckpt, tmp_path / "eagle")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["bias"] is False
    tensors, config = exported(tiny_ckpt, tmp_path / "sglang", "--format", "sglang")
    assert set(tensors) == {*plain, "fc.bias"} and not tensors["fc.bias"].any()
    assert config["architectures"] == ["LlamaForCausalLMEagle"] and "bias" not in config
    assert config["tie_word_embeddings"] is False and config["rope_theta"] == tiny_ckpt.config.rope_theta
    tensors, config = exported(tiny_ckpt, tmp_path / "vllm", "--format", "vllm")
    assert set(tensors) == set(plain)
    assert config["architectures"] == ["EagleLlamaForCausalLM"] and "bias" not in config
    assert config["attention_bias"] is False and config["qkv_bias"] is False


@pytest.mark.parametrize("form", ["sglang", "vllm"])
def test_transformers_reads_the_config_as_the_engines_do(form, tiny_ckpt, tmp_path):
    imported(published_eagle(tmp_path / "draft", tiny_ckpt, bias=False), tiny_ckpt)
    exported(tiny_ckpt, tmp_path / "out", "--format", form)
    config, target = AutoConfig.from_pretrained(tmp_path / "out"), tiny_ckpt.config
    assert (config.model_type, config.num_hidden_layers, config.head_dim) == ("llama", 1, target.head_dim)
    assert (config.vocab_size, config.hidden_size) == (target.vocab_size, target.hidden_size)
    assert not config.attention_bias and not config.tie_word_embeddings


@pytest.mark.parametrize(("form", "architecture"), [("sglang", "Qwen2ForCausalLMEagle"), ("vllm", "Eagle")])
def test_biases_of_attention_are_named(form, architecture, tiny_ckpt, tmp_path):
    imported(published_eagle(tmp_path / "draft", tiny_ckpt, bias=False, qkv_bias=True), tiny_ckpt)
    tensors, config = exported(tiny_ckpt, tmp_path / "out", "--format", form)
    assert "layers.0.self_attn.k_proj.bias" in tensors
    assert config["architectures"][0].startswith(architecture)
    assert config["qkv_bias"] if form == "vllm" else config["model_type"] == "qwen2"


SCALINGS = [
    RopeScaling("linear", 2.0),
    RopeScaling("llama3", 8.0, 64, 1.0, 4.0),
    RopeScaling("yarn", 4.0, 64, beta_fast=16.0, beta_slow=2.0, attention_factor=1.25, truncate=False),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.kind)
def test_the_targets_rotary_scaling_goes_along(scaling, tiny_ckpt, tmp_path):
    imported(published_eagle(tmp_path / "draft", tiny_ckpt, bias=False), tiny_ckpt)
    data = json.loads((tiny_ckpt.path / "config.json").read_text())
    fields = {name: getattr(scaling, name) for name in data["rope_scaling"]}
    edit_json(tiny_ckpt.path / "config.json", rope_scaling=fields)
    _, config = exported(Checkpoint.open(tiny_ckpt.path), tmp_path / "out", "--format", "sglang")
    assert RopeScaling.from_hf(config["rope_scaling"], 256) == scaling


def test_a_scaling_that_config_json_cannot_say_is_refused(tiny_ckpt, tmp_path, capsys):
    imported(published_eagle(tmp_path / "draft", tiny_ckpt, bias=False), tiny_ckpt)
    data = json.loads((tiny_ckpt.path / "config.json").read_text())
    edit_json(
        tiny_ckpt.path / "config.json", rope_scaling={**data["rope_scaling"], "kind": "factors", "factors": [1] * 6}
    )
    flags = ("--ckpt", tiny_ckpt.path, "--format", "vllm", "--out", tmp_path / "out")
    assert "is a list of factors" in refusal(capsys, "export", *flags) and not (tmp_path / "out").exists()


# The ranking -------------------------------------------------------------------------------------


@pytest.fixture
def ranked(tiny_ckpt) -> Checkpoint:
    counts = np.random.default_rng(3).permutation(tiny_ckpt.config.vocab_size)
    Ranking(counts, tokenizer_hash(tiny_ckpt.tokenizer), ("toy.txt",)).save(tiny_ckpt.path / "ranking.npz")
    return tiny_ckpt


def test_the_ranking_goes_along_at_any_size(ranked, tmp_path):
    exported(ranked, tmp_path / "out", "--draft", "none", "--draft-vocab", 40)
    ids = torch.load(tmp_path / "out" / "freq_40.pt", weights_only=True)
    assert type(ids) is list and all(type(i) is int for i in ids) and len(set(ids)) == 40
    counts = Ranking.load(ranked.path / "ranking.npz").counts
    assert np.array_equal(np.argsort(-counts[ids]), np.arange(40)), "most frequent first"
    assert set(control_ids(ranked.tokenizer, ranked.stop_ids, 160)) <= set(ids)
    maps = load_file(tmp_path / "out" / "vocabulary_map.safetensors")
    assert maps["d2t"].dtype == np.int64 and maps["t2d"].dtype == bool
    rows = np.arange(40) + maps["d2t"]
    assert sorted(ids) == rows.tolist() == np.flatnonzero(maps["t2d"]).tolist() and len(maps["t2d"]) == 160
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["freq_40.pt", "vocabulary_map.safetensors"]


def test_the_ranking_goes_along_in_every_form(ranked, tmp_path):
    exported(ranked, tmp_path / "out", "--draft", "none", "--draft-vocab", 40, "--map", *FORMS)
    maps = [read_map(tmp_path / "out" / f"freq_40.{form}", 160) for form in FORMS]
    assert all(found.ordered and np.array_equal(found.ids, maps[0].ids) for found in maps) and len(maps[0].ids) == 40
    both = read_map(tmp_path / "out" / "vocabulary_map.safetensors", 160)
    assert not both.ordered and both.ids.tolist() == sorted(maps[0].ids)


def test_draft_and_ranking_together(ranked, tmp_path):
    imported(published_eagle(tmp_path / "draft", ranked, bias=False), ranked)
    exported(ranked, tmp_path / "out", "--format", "sglang", "--draft-vocab", 32)
    names = ["config.json", "freq_32.pt", "model.safetensors", "vocabulary_map.safetensors"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == names


# Refusals ----------------------------------------------------------------------------------------


def test_refusals(tiny_ckpt, tmp_path, capsys):
    out = ("--ckpt", tiny_ckpt.path, "--out", tmp_path / "out")
    assert "holds no draft to export" in refusal(capsys, "export", *out)
    assert "holds no draft to export" in refusal(capsys, "export", *out, "--draft", "none")
    assert "needs a ranking" in refusal(capsys, "export", *out, "--draft", "none", "--draft-vocab", 40)
    imported(published_medusa(tmp_path / "draft", tiny_ckpt, own=False), tiny_ckpt, "medusa", command="medusa")
    assert "say how many with --draft-vocab" in refusal(capsys, "export", *out, "--map", "json")
    sentence = refusal(capsys, "export", *out, "--format", "vllm")
    assert "--format vllm: a draft of kind medusa can be written as medusa" in sentence
    assert not (tmp_path / "out").exists()


def test_without_torch_a_token_map_is_refused_in_one_sentence(ranked, tmp_path, capsys, monkeypatch):
    real = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    flags = ("--ckpt", ranked.path, "--draft", "none", "--draft-vocab", 40, "--out", tmp_path / "out")
    assert "pip install torch" in refusal(capsys, "export", *flags)
    assert not (tmp_path / "out").exists()
