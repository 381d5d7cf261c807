"""Conversion from GGUF: the weights against the Hugging Face path."""

import dataclasses
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize

import convert.gguf
from convert.gguf_names import unpermute
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.layers import rope_frequencies
from tests.support.tiny_hf import converted, model_of, ours, refusal, save, theirs

QUANTISATIONS = {"F32": gguf.GGMLQuantizationType.F32, "Q8_0": gguf.GGMLQuantizationType.Q8_0}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 96}  # whole blocks of 32, as quantisation asks
PROMPT = np.random.default_rng(0).integers(3, 96, 40)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of Q and K rows, written from its definition: pair i of a head is rows 2i and 2i + 1."""
    by_head = rows.reshape(heads, -1, *rows.shape[1:])
    half = by_head.shape[1] // 2
    out = np.empty_like(by_head)
    out[:, 0::2], out[:, 1::2] = by_head[:, :half], by_head[:, half:]
    return out.reshape(rows.shape)


def write_gguf(file: Path, model, kind: str = "F32", extra=None) -> Path:
    """Write a model of transformers the way llama.cpp's converter does. The matrices change to what is stored.

    extra: called with the writer before it closes.
    """
    config, kind_of_model = model.config, model.config.model_type
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(kind_of_model, kind_of_model)
    permuted = arch in ("llama", "smollm3")
    writer = gguf.GGUFWriter(file, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"])
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    tokens = ["<unk>", "<s>", "</s>", *(f"t{n}" for n in range(3, config.vocab_size))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3] + [1] * (len(tokens) - 3))
    for number, add in enumerate((writer.add_unk_token_id, writer.add_bos_token_id, writer.add_eos_token_id)):
        add(number)
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.named_parameters():  # a tied head is not among them, nor in a GGUF file
        array = tensor.detach().numpy()
        if arch.startswith("gemma") and "norm" in name:
            array = array + 1
        stored = QUANTISATIONS[kind] if array.ndim == 2 else QUANTISATIONS["F32"]
        if permuted and ("q_proj" in name or "k_proj" in name):
            array = permute(array, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        data = quantize(array, stored)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=stored)
        with torch.no_grad():
            plain = dequantize(data, stored).reshape(array.shape)
            if permuted and ("q_proj" in name or "k_proj" in name):
                heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                order = np.argsort(permute(np.arange(len(plain)), heads))  # back by sorting, not by our own function
                plain = plain[order]
            if arch.startswith("gemma") and "norm" in name:
                plain = plain - 1
            tensor.copy_(torch.from_numpy(plain.copy()))
    if extra:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def equal(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def both_ways(tmp_path: Path, model, kind: str = "F32", extra=None) -> tuple[Checkpoint, Checkpoint]:
    """The same weights through GGUF and through a Hugging Face folder."""
    file = write_gguf(tmp_path / "model.gguf", model, kind, extra)  # first: it rounds the weights of `model`
    through_hf = converted("hf", save(model, tmp_path / "hf"), tmp_path / "from-hf")
    return converted("gguf", file, tmp_path / "from-gguf"), through_hf


@pytest.mark.parametrize("kind", QUANTISATIONS)
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("Llama", {"head_dim": 24, "attention_bias": True, "mlp_bias": True}),
        ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ],
)
def test_gguf_equals_hugging_face(family, changes, kind, tmp_path):
    by_gguf, by_hf = both_ways(tmp_path, model_of(family, **SIZES, **changes), kind)
    assert by_gguf.config == by_hf.config
    assert equal(by_gguf.params(), by_hf.params())


def windowed(writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window(16)
    if writer.arch == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)


@pytest.mark.parametrize(
    ("family", "changes", "extra"),
    [
        ("Mistral", {"sliding_window": None, "head_dim": 24}, None),
        ("Qwen3", {"head_dim": 24}, None),
        ("SmolLM3", {"num_hidden_layers": 5, "pad_token_id": 0}, None),
        ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}, windowed),
        (
            "Gemma3",
            {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "num_hidden_layers": 7},
            windowed,
        ),
    ],
)
def test_other_families_through_gguf_equal_hugging_face(family, changes, extra, tmp_path):
    by_gguf, by_hf = both_ways(tmp_path, model_of(family, **SIZES, **changes), extra=extra)
    assert dataclasses.replace(by_gguf.config, architecture=by_hf.config.architecture) == by_hf.config
    assert equal(by_gguf.params(), by_hf.params())


def test_a_forgotten_permutation_would_be_noticed(tmp_path, monkeypatch):
    model = model_of(**SIZES)
    monkeypatch.setattr(convert.gguf, "unpermute", lambda rows, heads: rows)
    by_gguf, by_hf = both_ways(tmp_path, model)
    assert not equal(by_gguf.params(), by_hf.params())
    assert np.abs(ours(by_gguf, PROMPT)[1] - theirs(model, PROMPT)[1]).max() > 0.1


def test_unpermute_undoes_llama_cpps_order():
    rows = np.arange(2 * 8 * 3).reshape(16, 3)
    np.testing.assert_array_equal(unpermute(permute(rows, 2), 2), rows)
    np.testing.assert_array_equal(permute(np.arange(6), 1), [0, 3, 1, 4, 2, 5])


def test_frequency_factors(tmp_path):
    """Llama 3.1's scaling, which llama.cpp stores as a divisor for each frequency."""
    model = model_of(**SIZES, rope_parameters=LLAMA3)
    plain = 1.0 / LLAMA3["rope_theta"] ** (np.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.min() == pytest.approx(1) and factors.max() == pytest.approx(8)
    by_gguf, by_hf = both_ways(tmp_path, model, extra=lambda w: w.add_tensor("rope_freqs.weight", factors))
    assert by_gguf.config.rope_scaling.kind == "factors"
    np.testing.assert_allclose(rope_frequencies(by_gguf.config), rope_frequencies(by_hf.config), rtol=1e-6)
    np.testing.assert_allclose(ours(by_gguf, PROMPT)[1], theirs(model, PROMPT)[1], atol=1e-4, rtol=1e-4)


def test_yarn(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    by_gguf, by_hf = both_ways(tmp_path, model_of("Qwen2", **SIZES, rope_parameters=rope), extra=add)
    assert by_gguf.config == by_hf.config


def test_old_name_of_linear_scaling(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    model = model_of(**SIZES, rope_parameters=rope)
    by_gguf, by_hf = both_ways(tmp_path, model, extra=lambda w: w.add_float32("llama.rope.scale_linear", 4.0))
    assert by_gguf.config == by_hf.config


FAULTS = {
    "split": (lambda w: w.add_uint16("split.count", 3), "is one of 3 parts; join them first"),
    "experts": (lambda w: w.add_expert_count(8), "a mixture of 8 experts"),
    "rotated": (lambda w: w.add_rope_dimension_count(8), "8 of 16 dimensions a head are rotated"),
    "longrope": (
        lambda w: (w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), w.add_rope_scaling_factor(2.0)),
        "rope scaling of type 'longrope'",
    ),
    "tensor": (
        lambda w: w.add_tensor("blk.0.extra.weight", np.ones(2, np.float32)),
        "blk.0.extra.weight is unexpected",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_kinds_of_file_are_refused(fault, tmp_path, capsys):
    add, sentence = FAULTS[fault]
    file = write_gguf(tmp_path / "model.gguf", model_of(**SIZES), extra=add)
    assert sentence in refusal(capsys, "gguf", file, "--out", tmp_path / "new" / "ckpt")
    assert not list((tmp_path / "new").glob("*"))


def test_damaged_and_foreign_files_are_refused(tmp_path, capsys):
    whole = write_gguf(tmp_path / "model.gguf", model_of(**SIZES)).read_bytes()
    out = ("--out", tmp_path / "new" / "ckpt")
    for name, data in {"half": whole[: len(whole) // 2], "head": whole[:40], "text": b"no model", "empty": b""}.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        assert "cannot be read as GGUF" in refusal(capsys, "gguf", tmp_path / f"{name}.gguf", *out)
    assert "is no file" in refusal(capsys, "gguf", tmp_path / "missing.gguf", *out)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "architecture 'gpt2'; llama, qwen2, qwen3, smollm3, gemma2, gemma3 are" in refusal(
        capsys, "gguf", tmp_path / "other.gguf", *out
    )
    assert not list((tmp_path / "new").glob("*"))
