"""The target against transformers (PyTorch) on the same weights, for each member of the family."""

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.support.tiny_hf import SIZES, converted, model_of, ours, save, theirs

PROMPT = np.random.default_rng(0).integers(3, SIZES["vocab_size"], 70)  # more tokens than two words have bits
ROPE = {"rope_theta": 500000.0}
MEMBERS = {
    "llama": ("Llama", {}),
    "no_gqa": ("Llama", {"num_key_value_heads": 4}),
    "one_kv_head": ("Llama", {"num_key_value_heads": 1}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "head_dim": ("Llama", {"head_dim": 20}),
    "attention_bias": ("Llama", {"attention_bias": True}),
    "mlp_bias": ("Llama", {"mlp_bias": True}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}}),
    "llama3": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                **ROPE,
            }
        },
    ),
    "yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 16.0,
                **ROPE,
            },
        },
    ),
    "qwen2": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", **ROPE}}),
    "qwen2_yarn": (
        "Qwen2",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **ROPE}},
    ),
}


WINDOWED = {"sliding_window": 24, "head_dim": 16}  # the prompt is longer
BOTH = ["sliding_attention", "full_attention"]
TWO_BASES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
MEMBERS |= {
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_tied": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 24}),
    "mistral_nemo": ("Mistral", {"sliding_window": None, "head_dim": 20}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "gemma2": ("Gemma2", {**WINDOWED, "layer_types": BOTH, "query_pre_attn_scalar": 12}),
    "gemma3": ("Gemma3", {**WINDOWED, "layer_types": BOTH, "query_pre_attn_scalar": 16}),
    "gemma3_long": ("Gemma3", {**WINDOWED, "layer_types": BOTH, "rope_parameters": TWO_BASES}),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_features_and_logits_equal_transformers(member, tmp_path):
    family, changes = MEMBERS[member]
    model = model_of(family, **changes)
    checkpoint = converted("hf", save(model, tmp_path / "hf"), tmp_path / "ckpt")
    features, logits = ours(checkpoint, PROMPT)
    expected_features, expected_logits = theirs(model, PROMPT)
    assert expected_logits.std() > 0.5, "weights so small that nothing would be noticed"
    np.testing.assert_allclose(features, expected_features, atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("member", ["llama3", "yarn", "linear"])
def test_scaled_rope_matters_at_these_lengths(member):
    """The comparison above would notice a scaling that is ignored."""
    family, changes = MEMBERS[member]
    plain = model_of(family, rope_parameters={"rope_type": "default", **ROPE})
    assert np.abs(theirs(model_of(family, **changes), PROMPT)[1] - theirs(plain, PROMPT)[1]).max() > 0.1


@pytest.mark.parametrize("chunks", [(40, 30), (64, 6), (1, 1, 68), (33, 33, 4)])
def test_chunks_equal_one_pass(chunks, tmp_path):
    model = model_of()
    checkpoint = converted("hf", save(model, tmp_path / "hf"), tmp_path / "ckpt")
    whole, _ = ours(checkpoint, PROMPT)
    parts, _ = ours(checkpoint, PROMPT, chunks)
    np.testing.assert_allclose(parts, whole, atol=1e-5, rtol=1e-5)


def test_bfloat16_weights(tmp_path):
    """bfloat16 weights, computed in float32, equal transformers' float32 run of the same rounded weights."""
    folder = save(model_of().bfloat16(), tmp_path / "hf")
    checkpoint = converted("hf", folder, tmp_path / "ckpt")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    np.testing.assert_allclose(ours(checkpoint, PROMPT)[1], theirs(model, PROMPT)[1], atol=1e-4, rtol=1e-4)
