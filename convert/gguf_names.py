"""What llama.cpp calls a tensor, and how it stores it, in the terms of Hugging Face's checkpoints."""

from __future__ import annotations

import re

import numpy as np

from frspec_jax.families import BY_NAME

# GGUF's names, and those of Hugging Face. `N` stands for the layer's number.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.N.attn_norm": "model.layers.N.input_layernorm",
    "blk.N.attn_q": "model.layers.N.self_attn.q_proj",
    "blk.N.attn_k": "model.layers.N.self_attn.k_proj",
    "blk.N.attn_v": "model.layers.N.self_attn.v_proj",
    "blk.N.attn_q_norm": "model.layers.N.self_attn.q_norm",
    "blk.N.attn_k_norm": "model.layers.N.self_attn.k_norm",
    "blk.N.attn_output": "model.layers.N.self_attn.o_proj",
    "blk.N.ffn_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.ffn_gate": "model.layers.N.mlp.gate_proj",
    "blk.N.ffn_up": "model.layers.N.mlp.up_proj",
    "blk.N.ffn_down": "model.layers.N.mlp.down_proj",
}
# Of families that norm what attention and MLP add: the same words of Hugging Face stand for other norms there.
NAMES_AROUND = {
    "blk.N.post_attention_norm": "model.layers.N.post_attention_layernorm",
    "blk.N.ffn_norm": "model.layers.N.pre_feedforward_layernorm",
    "blk.N.post_ffw_norm": "model.layers.N.post_feedforward_layernorm",
}
# Rotation pairs neighbours in these, and halves in the others: for that their rows of Q and K are stored in its order.
PAIRS_NEIGHBOURS = ("llama", "smollm3")
ARCHITECTURES = tuple(name for name in BY_NAME if name != "mistral")  # whose models are of architecture llama here
FREQUENCY_FACTORS = "rope_freqs.weight"  # what each rotary frequency is divided by; read into the config


def hf_name(name: str, family: str) -> str:
    """A GGUF tensor's name in Hugging Face's terms; unknown ones stay as they are."""
    names = NAMES | (NAMES_AROUND if family in BY_NAME and BY_NAME[family].norms == "around" else {})
    stem, _, end = name.rpartition(".")
    layer = re.match(r"blk\.(\d+)\.", stem)
    pattern = re.sub(r"^blk\.\d+\.", "blk.N.", stem)
    if pattern not in names:
        return name
    return names[pattern].replace("N", layer[1] if layer else "N") + "." + end


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of Q and K rows, which pairs neighbours for rotation; ours pairs halves."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
