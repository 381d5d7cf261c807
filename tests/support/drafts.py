"""Random drafts in the published formats, and our commands that read them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from convert.__main__ import main
from frspec_jax.checkpoint import Checkpoint


def published_eagle(
    folder: Path, target: Checkpoint, bias: bool, embedding: bool = True, qkv_bias: bool = False
) -> Path:
    """A random EAGLE draft in the published format, as pytorch_model.bin in float16."""
    rng, c = np.random.default_rng(1), target.config
    h, f, kv = c.hidden_size, c.intermediate_size, c.num_kv_heads * c.head_dim
    shapes = {
        "fc.weight": (h, 2 * h),
        "layers.0.self_attn.q_proj.weight": (h, h),
        "layers.0.self_attn.k_proj.weight": (kv, h),
        "layers.0.self_attn.v_proj.weight": (kv, h),
        "layers.0.self_attn.o_proj.weight": (h, h),
        "layers.0.mlp.gate_proj.weight": (f, h),
        "layers.0.mlp.up_proj.weight": (f, h),
        "layers.0.mlp.down_proj.weight": (h, f),
        "layers.0.post_attention_layernorm.weight": (h,),
    }
    shapes |= {"fc.bias": (h,)} if bias else {}
    if qkv_bias:
        shapes |= {f"layers.0.self_attn.{x}_proj.bias": (h if x == "q" else kv,) for x in "qkv"}
    tensors = {name: torch.from_numpy(rng.standard_normal(shape).astype(np.float16)) for name, shape in shapes.items()}
    if embedding:
        tensors["embed_tokens.weight"] = torch.from_numpy(np.array(target.params().embedding)).half()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": h,
        "intermediate_size": f,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "rms_norm_eps": 1e-6,
        "bias": bias,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def published_medusa(folder: Path, target: Checkpoint, own: bool, layers: int = 1, heads: int = 4) -> Path:
    """Random Medusa heads, as medusa_lm_head.pt in float16: with LM heads of their own, or sharing the target's."""
    rng, c = np.random.default_rng(2), target.config
    shapes = {}
    for i in range(heads):
        for j in range(layers):
            shapes |= {
                f"{i}.{j}.linear.weight": (c.hidden_size, c.hidden_size),
                f"{i}.{j}.linear.bias": (c.hidden_size,),
            }
        if own:
            shapes[f"{i}.{layers}.weight"] = (c.vocab_size, c.hidden_size)
    tensors = {name: torch.from_numpy(rng.standard_normal(shape).astype(np.float16)) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    config = {"medusa_num_heads": heads, "medusa_num_layers": layers, "base_model_name_or_path": "nobody/tiny"}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "medusa_lm_head.pt")
    return folder


def published_eagle3(
    folder: Path, target: Checkpoint, ids: np.ndarray, *, bias: bool = False, embedding: bool = False
) -> Path:
    """A random EAGLE-3 draft whose head stands for `ids`, in the published format, as pytorch_model.bin in float16."""
    rng, c = np.random.default_rng(4), target.config
    h, f, q, kv = c.hidden_size, 72, 6 * 10, 2 * 10  # of other sizes than the target's layers, but for h
    shapes = {
        "fc.weight": (h, 3 * h),
        "midlayer.self_attn.q_proj.weight": (q, 2 * h),
        "midlayer.self_attn.k_proj.weight": (kv, 2 * h),
        "midlayer.self_attn.v_proj.weight": (kv, 2 * h),
        "midlayer.self_attn.o_proj.weight": (h, q),
        "midlayer.mlp.gate_proj.weight": (f, h),
        "midlayer.mlp.up_proj.weight": (f, h),
        "midlayer.mlp.down_proj.weight": (h, f),
        "midlayer.input_layernorm.weight": (h,),
        "midlayer.hidden_norm.weight": (h,),
        "midlayer.post_attention_layernorm.weight": (h,),
        "norm.weight": (h,),
        "lm_head.weight": (len(ids), h),
    }
    shapes |= {"fc.bias": (h,)} if bias else {}
    values = {name: 0.2 * rng.standard_normal(shape) + (len(shape) == 1) for name, shape in shapes.items()}
    tensors = {name: torch.from_numpy(value.astype(np.float16)) for name, value in values.items()}
    tensors["d2t"] = torch.from_numpy(ids - np.arange(len(ids)))
    tensors["t2d"] = torch.from_numpy(np.isin(np.arange(c.vocab_size), ids))
    if embedding:
        tensors["embed_tokens.weight"] = torch.from_numpy(np.array(target.params().embedding)).half()
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "hidden_size": h,
        "intermediate_size": f,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "rms_norm_eps": 1e-5,
        "vocab_size": c.vocab_size,
        "draft_vocab_size": len(ids),
        **({"bias": True} if bias else {}),
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def published_speculators(folder: Path, target: Checkpoint, ids: np.ndarray, **entries: Any) -> Path:
    """The tensors of `published_eagle3` as speculators, vLLM's trainers, write them: in float32, under their names.

    entries: of config.json; norm_before_fc and fc_norm bring their tensors along.
    """
    plain = published_eagle3(folder / "plain", target, ids)
    tensors = {name: value for name, value in torch.load(plain / "pytorch_model.bin", weights_only=True).items()}
    tensors = {n: value.float() if value.is_floating_point() else value for n, value in tensors.items()}
    tensors = {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}
    h, random = target.config.hidden_size, torch.Generator().manual_seed(5)
    if entries.get("norm_before_fc"):
        tensors["input_norm.weight"] = 1 + 0.3 * torch.randn(3 * h, generator=random)
    if entries.get("fc_norm"):
        tensors |= {f"fc_norm.{i}.weight": 1 + 0.3 * torch.randn(h, generator=random) for i in range(3)}
    tensors["embed_tokens.weight"] = torch.from_numpy(np.array(target.params().embedding))
    layer = json.loads((plain / "config.json").read_text())
    size = layer.pop("draft_vocab_size")
    shutil.rmtree(plain)
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": "0.2.0",
        "draft_vocab_size": size,
        "norm_before_residual": False,
        "transformer_layer_config": {**layer, "model_type": "llama", "hidden_act": "silu"},
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "nobody/tiny"}},
        **entries,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit_safetensors(folder: Path, name_of: Callable[[str], str] = lambda name: name, **changes: Any) -> None:
    """Rename tensors, and put some in (None: take out), under names whose dots are written __."""
    tensors = {name_of(name): value for name, value in load_file(folder / "model.safetensors").items()}
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")


def edit_pickle(folder: Path, **changes: Any) -> None:
    """Put tensors in, under names whose dots are written __."""
    (file,) = (*folder.glob("*.bin"), *folder.glob("*.pt"))
    tensors = torch.load(file, weights_only=True)
    torch.save(tensors | {name.replace("__", "."): value for name, value in changes.items()}, file)


def imported(
    folder: Path, ckpt: Checkpoint, name: str = "eagle", *flags: str, command: str = "eagle"
) -> tuple[Any, Any]:
    """Run `python -m convert COMMAND`, and load what it has written."""
    main([command, str(folder), "--target", str(ckpt.path), "--name", name, *flags])
    return ckpt.draft(ckpt.draft_folder(name))
