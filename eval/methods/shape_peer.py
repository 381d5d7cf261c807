"""transformers (PyTorch) with random weights of a published model's sizes: a decoding step's time, as a peer."""

from __future__ import annotations

import statistics
import time

from frspec_jax.config import ModelConfig
from frspec_jax.errors import UserError

TOKENS = 32  # steps that a time is the mean of


def step_us(config: ModelConfig, contexts: list[int]) -> dict[int, float]:
    """Microseconds of a greedy step by tokens in the cache: static cache, compiled by PyTorch on a GPU.

    bfloat16 on a GPU, float32 on a CPU. The median of three answers, each less the time of its first token.
    """
    try:
        import torch
        import transformers
    except ImportError as missing:
        raise UserError(f"--peer-step needs {missing.name}; run: pip install {missing.name}") from None
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    kind = transformers.Qwen2Config if config.architecture == "qwen2" else transformers.LlamaConfig
    sizes = kind(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=max(contexts) + TOKENS + 1,
        tie_word_embeddings=config.tied_head,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(sizes, dtype=dtype).eval()
    found = {}
    for context in contexts:
        prompt = torch.randint(1, config.vocab_size, (1, context), device=device)

        def answer(tokens: int, prompt: torch.Tensor = prompt) -> float:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            with torch.inference_mode():
                model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=tokens,
                    min_new_tokens=tokens,
                    do_sample=False,
                    cache_implementation="static",
                )
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        answer(TOKENS + 1)  # compiles
        times = [answer(TOKENS + 1) - answer(1) for _ in range(3)]
        found[context] = 1e6 * statistics.median(times) / TOKENS
    return found
