"""EAGLE-3: its layer and its vocabulary against PyTorch, from tensors in the published layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from frspec_jax import drafters, kv_cache, llama
from frspec_jax.config import TreeConfig
from frspec_jax.drafters.base import Accepted, Target, Turn
from frspec_jax.placement import Placement
from pallas_kernels.dispatch import AUTO
from tests.support import toy
from tests.support.drafts import imported, published_eagle3, published_speculators
from tests.support.tiny_hf import converted, edit_json, model_of, save

IDS = np.sort(np.random.default_rng(7).choice(160, 60, replace=False))


# The reference -----------------------------------------------------------------------------------


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """x [T, heads, dim] at positions 0 .. T-1."""
    count, _, dim = x.shape
    angle = torch.outer(torch.arange(count).float(), 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim))
    cos, sin = (torch.cat([f(angle)] * 2, -1)[:, None] for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def layer(
    t: dict[str, torch.Tensor], embeddings: torch.Tensor, hidden: torch.Tensor, theta: float, normed_residual=False
) -> torch.Tensor:
    """The decoder layer over a chain of pairs: embeddings and hidden [T, H]."""
    joined = torch.cat(
        [
            normed(embeddings, t["midlayer.input_layernorm.weight"]),
            normed(hidden, t["midlayer.hidden_norm.weight"]),
        ],
        -1,
    )
    q, k, v = (
        (joined @ t[f"midlayer.self_attn.{x}_proj.weight"].T).reshape(len(joined), -1, 10) for x in ("q", "k", "v")
    )
    q, k = rotated(q, theta), rotated(k, theta)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), is_causal=True
    )
    residual = normed(hidden, t["midlayer.hidden_norm.weight"]) if normed_residual else hidden
    x = residual + mixed.transpose(0, 1).reshape(len(joined), -1) @ t["midlayer.self_attn.o_proj.weight"].T
    inner = normed(x, t["midlayer.post_attention_layernorm.weight"])
    gate, up = inner @ t["midlayer.mlp.gate_proj.weight"].T, inner @ t["midlayer.mlp.up_proj.weight"].T
    return x + (torch.nn.functional.silu(gate) * up) @ t["midlayer.mlp.down_proj.weight"].T


def fused(t: dict[str, torch.Tensor], taps: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(taps, t["fc.weight"], t.get("fc.bias"))


def fused_of_normed(t: dict[str, torch.Tensor], taps: torch.Tensor) -> torch.Tensor:
    """As a draft does that has norms before `fc`."""
    if "input_norm.weight" in t:
        taps = normed(taps, t["input_norm.weight"])
    if "fc_norm.0.weight" in t:
        taps = torch.cat([normed(part, t[f"fc_norm.{i}.weight"]) for i, part in enumerate(taps.chunk(3, -1))], -1)
    return fused(t, taps)


def logits(t: dict[str, torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    return normed(output, t["norm.weight"]) @ t["lm_head.weight"].T


@pytest.mark.parametrize(("theta", "bias"), [(None, False), (500000.0, True)])
def test_logits_equal_pytorch(theta, bias, deep_ckpt, tmp_path):
    """True pairs, then three that feed on what the draft said: the way of a chain of three levels."""
    ckpt = deep_ckpt
    folder = published_eagle3(tmp_path / "draft", ckpt, IDS, bias=bias, embedding=True)
    if theta is not None:
        edit_json(folder / "config.json", rope_theta=theta)
    spec, params = imported(folder, ckpt, "eagle3", command="eagle3")
    assert spec.rope_theta == (theta or 10000.0)
    assert spec.taps == (2, 3, 3) and np.array_equal(params.ids, IDS)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    t = {name: tensor.float() for name, tensor in tensors.items()}

    rng, count, h = np.random.default_rng(0), 9, ckpt.config.hidden_size
    features = rng.normal(size=(count, 4 * h)).astype(np.float32)
    tokens = rng.integers(0, 160, count + 3)
    embedding = np.array(ckpt.params().embedding)
    embeddings = torch.from_numpy(embedding[tokens])

    drafter, weights = spec.assemble(Target(ckpt.config, ckpt.params()), params, IDS, kernels=AUTO)
    cache = drafter.new_memory(256, jnp.float32).kv
    inputs = drafter.fused(weights, jnp.asarray(features))
    where = Placement.chain(jnp.int32(0), count)
    ours, cache = jax.jit(drafter.extend)(weights, embedding[tokens[:count]], inputs, where, cache)
    hidden = fused(t, torch.from_numpy(features[:, h:]))
    theirs = layer(t, embeddings[:count], hidden, theta or 10000.0)
    for step in range(4):
        said = np.asarray(drafter.head_input(weights, ours) @ weights.head.weight.T)
        np.testing.assert_allclose(said, logits(t, theirs[-len(said) :]).numpy(), atol=1e-4)
        if step == 3:
            break
        hidden = torch.cat([hidden, theirs[-1:]])  # a pair's own output is what the next one takes in
        theirs = layer(t, embeddings[: count + step + 1], hidden, theta or 10000.0)
        where = Placement.chain(jnp.int32(count + step), 1)
        ours, cache = jax.jit(drafter.extend)(weights, embedding[tokens[count + step]][None], ours[-1:], where, cache)


@pytest.mark.parametrize(
    "entries",
    [
        {"norm_before_residual": False},
        {"norm_before_residual": True},
        {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
        {"norm_before_residual": False, "fc_norm": True, "eagle_aux_hidden_state_layer_ids": [0, 5, 6]},
    ],
    ids=["after", "before", "joined and output", "each"],
)
def test_drafts_of_speculators_equal_pytorch(entries, deep_ckpt, tmp_path):
    """True pairs, then steps on what the draft said, with each norm where config.json says that it is."""
    ckpt, h, count = deep_ckpt, deep_ckpt.config.hidden_size, 9
    folder = published_speculators(tmp_path / "draft", ckpt, IDS, **entries)
    spec, params = imported(folder, ckpt, "eagle3", command="eagle3")
    assert np.array_equal(params.ids, IDS) and not spec.own_embedding
    assert spec.taps == tuple(entries.get("eagle_aux_hidden_state_layer_ids", (2, 3, 3)))
    t = {
        name.replace("layers.0.", "midlayer."): value for name, value in load_file(folder / "model.safetensors").items()
    }
    rng = np.random.default_rng(0)
    features, tokens = rng.normal(size=(count, 4 * h)).astype(np.float32), rng.integers(0, 160, count + 2)
    embedding = np.array(ckpt.params().embedding)
    embeddings, before = torch.from_numpy(embedding[tokens]), entries["norm_before_residual"]

    def said_by_torch(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = layer(t, embeddings[: len(hidden)], hidden, 10000.0, before)
        fed = normed(output, t["norm.weight"]) if entries.get("norm_output") else output
        return logits(t, output), fed

    drafter, weights = spec.assemble(Target(ckpt.config, ckpt.params()), params, IDS, kernels=AUTO)
    cache, extend = drafter.new_memory(256, jnp.float32).kv, jax.jit(drafter.extend)
    inputs = drafter.fused(weights, jnp.asarray(features))
    where = Placement.chain(jnp.int32(0), count)
    ours, cache = extend(weights, embedding[tokens[:count]], inputs, where, cache)
    hidden = fused_of_normed(t, torch.from_numpy(features[:, h:]))
    for step in range(3):
        expected, fed = said_by_torch(hidden)
        said = np.asarray(drafter.head_input(weights, ours) @ weights.head.weight.T)
        np.testing.assert_allclose(said, expected[-len(said) :].numpy(), atol=1e-4)
        if step == 2:
            break
        hidden = torch.cat([hidden, fed[-1:]])
        where = Placement.chain(jnp.int32(count + step), 1)
        ours, cache = extend(weights, embedding[tokens[count + step]][None], ours[-1:], where, cache)


def test_taps_are_the_streams_that_transformers_layers_read(tmp_path):
    """Those that enter layers 0 and 2 of three, and (3) the last layer's output before the norm."""
    model = model_of(num_hidden_layers=3)
    tokens = np.random.default_rng(1).integers(0, 160, 12)
    inner: list[torch.Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda m, args, kwargs: inner.append(args[0]), with_kwargs=True)
        for block in model.model.layers
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda m, args: inner.append(args[0])))
    with torch.no_grad():
        final = model.model(torch.tensor(tokens[None])).last_hidden_state[0].numpy()
    for hook in hooks:
        hook.remove()
    ckpt = converted("hf", save(model, tmp_path / "hf"), tmp_path / "ckpt")
    config, params = ckpt.config, ckpt.params()
    cache = kv_cache.empty(config, 256, jnp.float32)
    where = Placement.chain(jnp.int32(0), 12)
    features, _ = llama.forward(params, config, tokens, where, cache, taps=(0, 2, 3))
    expected = np.concatenate([final, *(inner[n][0].numpy() for n in (0, 2, 3))], axis=-1)
    np.testing.assert_allclose(np.asarray(features), expected, atol=1e-4)
    plain, _ = llama.forward(params, config, tokens, where, cache)
    np.testing.assert_array_equal(
        np.asarray(llama.logits(params, config, features)), np.asarray(llama.logits(params, config, plain))
    )


# The vocabulary ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [False, True])
def test_proposals_are_ids_of_the_vocabulary_that_is_left(order):
    """The head's rows are cropped by id, in whatever order the map and the ranking have them."""
    cfg = toy.config(vocab_size=200)
    known = np.random.default_rng(2).permutation(200)[:50]
    known = known if order else np.sort(known)
    spec, params = toy.eagle3(cfg, ids=known)
    ids = np.random.default_rng(3).permutation(known)[:20].astype(np.int32)
    drafter, weights = spec.assemble(Target(cfg, toy.target(cfg)), params, ids, kernels=AUTO)
    assert np.array_equal(weights.head.ids, ids)
    rows = {int(i): np.asarray(params.lm_head)[n] for n, i in enumerate(known)}
    assert np.array_equal(weights.head.weight, np.stack([rows[int(i)] for i in ids]))
    rng = np.random.default_rng(4)
    features = jnp.asarray(rng.normal(size=(3, 4 * cfg.hidden_size)), jnp.float32)
    accepted = Accepted(features, jnp.array([4, 9, 1], jnp.int32), jnp.int32(2))
    turn = Turn(accepted, jnp.int32(9), jnp.int32(2), None)

    @jax.jit
    def proposed(weights, turn, memory):
        lead, memory = drafter.take_in(weights, turn, memory)
        return drafter.propose(weights, TreeConfig(20, 3, 4), lead, turn, memory)[0]

    tree = proposed(weights, turn, drafter.new_memory(256, jnp.float32))
    assert set(np.asarray(tree.tokens[1:]).tolist()) <= set(ids.tolist())


def test_configs_survive_json():
    spec, _ = toy.eagle3(toy.config())
    assert drafters.spec_of({"kind": "eagle3", "about": {}, **spec.to_json()}, "config.json") == spec
