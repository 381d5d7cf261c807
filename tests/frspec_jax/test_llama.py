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
