"""A model for dry runs: random weights and a tokenizer of bytes, in the format that the real one comes in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HIDDEN, WIDE, HEADS, KV_HEADS, LAYERS = 32, 48, 4, 2, 1


def write_gguf(file: Path) -> None:
    """A llama of one layer whose tokens are bytes, as llama.cpp's converter lays one out."""
    import gguf

    tokens = [*SPECIAL, *bytes_to_unicode().values()]
    rng = np.random.default_rng(0)
    head_dim = HIDDEN // HEADS
    shapes = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (KV_HEADS * head_dim, HIDDEN),
        "attn_v": (KV_HEADS * head_dim, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (WIDE, HIDDEN),
        "ffn_up": (WIDE, HIDDEN),
        "ffn_down": (HIDDEN, WIDE),
    }
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, shape: tuple[int, ...]) -> None:
        values = 0.25 * rng.standard_normal(shape, np.float32) + (len(shape) == 1)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    add("token_embd", (len(tokens), HIDDEN))
    add("output_norm", (HIDDEN,))
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}", (HIDDEN,))
        for name, shape in shapes.items():
            add(f"blk.{layer}.{name}", shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
