"""Small random models in Hugging Face's format, and our commands run in process."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from convert.__main__ import main
from frspec_jax import llama
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.kv_cache import empty
from frspec_jax.placement import Placement

SIZES = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def model_of(family: str = "Llama", seed: int = 0, **changes):
    """A random model (transformers, float32) whose every tensor matters: no bias is zero, no norm is one."""
    config = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")(
        **{**SIZES, **changes}
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            values = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.3 * values if "norm" in name else 0.3 * values)
    return model


def save_tokenizer(folder: Path) -> None:
    """A tokenizer.json of whole words, so that `folder` counts as complete."""
    folder.mkdir(parents=True, exist_ok=True)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "hello": 3, "world": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def save(model, folder: Path, **how) -> Path:
    """Save a model and its tokenizer the way that a download would lie there."""
    model.save_pretrained(folder, **how)
    save_tokenizer(folder)
    return folder


def converted(command: str, source: Path, out: Path, *flags: str) -> Checkpoint:
    """Run `python -m convert COMMAND SOURCE --out OUT` and open what it has written."""
    main([command, str(source), "--out", str(out), *flags])
    return Checkpoint.open(out)


def refusal(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one sentence by which `python -m convert ARGS` refuses."""
    capsys.readouterr()  # what was said before, transformers' progress bars among it
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in args])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


forward = jax.jit(llama.forward, static_argnums=1)


def ours(checkpoint: Checkpoint, tokens: np.ndarray, chunks: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Features [T, H] and logits [T, V] by our target, run in one pass or in chunks of the given lengths."""
    return ours_of(checkpoint.config, checkpoint.params(), tokens, chunks)


def ours_of(config, params, tokens: np.ndarray, chunks: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
    """The same of weights in memory."""
    cache, done, features = empty(config, 256, np.float32), 0, []
    for length in chunks or (len(tokens),):
        part = np.asarray(tokens[done : done + length], np.int32)
        rows, cache = forward(params, config, part, Placement.chain(jnp.int32(done), length), cache)
        features.append(rows)
        done += length
    assert done == len(tokens)
    joined = np.concatenate(features)
    return joined, np.asarray(llama.logits(params, config, joined))


def theirs(model, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same by transformers."""
    with torch.no_grad():
        out = model(torch.tensor(np.asarray(tokens)[None]), output_hidden_states=True)
    return out.hidden_states[-1][0].float().numpy(), out.logits[0].float().numpy()


def same(a, b) -> bool:
    """Whether two pytrees of weights are equal, bit for bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
