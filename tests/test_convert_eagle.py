"""Import and export of EAGLE drafts in the published format."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from tiny_hf import converted, edit_json, model_of, refusal, same, save

from convert import eagle
from convert.__main__ import main
from frspec_jax.checkpoint import Checkpoint, draft_shapes, new_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(model_of(), tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def target(source, tmp_path_factory) -> Checkpoint:
    return converted("hf", source, tmp_path_factory.mktemp("target") / "ckpt")


def published(folder: Path, target: Checkpoint, bias: bool, embedding: bool = True, qkv_bias: bool = False) -> Path:
    """A random draft in the published format, as pytorch_model.bin in float16."""
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


def edit_pickle(folder: Path, **changes) -> None:
    file = folder / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    torch.save(tensors | {name.replace("__", "."): value for name, value in changes.items()}, file)


@pytest.fixture
def ckpt(target, tmp_path) -> Checkpoint:
    """A copy of the target for drafts to be written into."""
    return Checkpoint.open(shutil.copytree(target.path, tmp_path / "ckpt"))


def imported(folder: Path, ckpt: Checkpoint, name: str = "eagle", *flags: str):
    main(["eagle", str(folder), "--target", str(ckpt.path), "--name", name, *flags])
    return ckpt.draft(ckpt.draft_folder(name))


@pytest.mark.parametrize(("bias", "qkv_bias"), [(False, False), (True, False), (True, True)])
def test_published_draft(bias, qkv_bias, ckpt, tmp_path):
    folder = published(tmp_path / "draft", ckpt, bias, qkv_bias=qkv_bias)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    draft, params = imported(folder, ckpt)
    assert (draft.fc_bias, draft.attention_bias, draft.rms_norm_eps) == (bias, qkv_bias, 1e-6)

    def tensor(*names: str) -> np.ndarray:
        return np.concatenate([tensors[name].float().numpy() for name in names])

    np.testing.assert_array_equal(params.fc, tensor("fc.weight"))
    qkv = [f"layers.0.self_attn.{x}_proj." for x in "qkv"]
    np.testing.assert_array_equal(params.layer.qkv, tensor(*(name + "weight" for name in qkv)))
    np.testing.assert_array_equal(
        params.layer.gate_up, tensor("layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight")
    )
    np.testing.assert_array_equal(params.layer.mlp_norm, tensor("layers.0.post_attention_layernorm.weight"))
    assert params.layer.attention_norm is None
    if bias:
        np.testing.assert_array_equal(params.fc_bias, tensor("fc.bias"))
    if qkv_bias:
        np.testing.assert_array_equal(params.layer.qkv_bias, tensor(*(name + "bias" for name in qkv)))


def test_the_tensors_decide_on_the_bias(ckpt, tmp_path, capsys):
    folder = published(tmp_path / "draft", ckpt, bias=True)
    edit_json(folder / "config.json", bias=False, rope_theta=500000.0)
    assert imported(folder, ckpt)[0].fc_bias
    notes = capsys.readouterr().err
    assert "says bias: false, but the checkpoint has an fc.bias, which is used" in notes
    assert "says rope_theta 500000; the target's 10000 is used" in notes


def _another_embedding(folder: Path, ckpt: Checkpoint) -> None:
    rows = np.asarray(ckpt.params().embedding).copy()
    rows[5] *= 1.05
    edit_pickle(folder, embed_tokens__weight=torch.from_numpy(rows))


WRONG_DRAFTS = {
    "embedding": (_another_embedding, "differs from the embedding of --target"),
    "vocabulary": (
        lambda f, c: edit_pickle(f, embed_tokens__weight=torch.zeros(170, c.config.hidden_size)),
        "embed_tokens.weight has shape [170, 48]",
    ),
    "hidden size": (lambda f, c: edit_json(f / "config.json", hidden_size=96), "belongs to another target"),
    "tensor": (
        lambda f, c: edit_pickle(f, layers__0__input_layernorm__weight=torch.ones(48)),
        "layers.0.input_layernorm.weight is unexpected",
    ),
    "shape": (lambda f, c: edit_pickle(f, fc__weight=torch.ones(48, 48)), "fc.weight has shape [48, 48]"),
    "layers": (lambda f, c: edit_json(f / "config.json", num_hidden_layers=2), "a draft of 2 layers"),
    "fingerprint": (lambda f, c: edit_json(f / "config.json", frspec_target="0" * 16), "made for another target"),
    "eagle3": (lambda f, c: edit_pickle(f, d2t=torch.zeros(8)), "is an EAGLE-3 draft"),
}


@pytest.mark.parametrize("fault", WRONG_DRAFTS)
def test_wrong_drafts_are_refused(fault, ckpt, tmp_path, capsys):
    breaks, sentence = WRONG_DRAFTS[fault]
    folder = published(tmp_path / "draft", ckpt, bias=False)
    breaks(folder, ckpt)
    assert sentence in refusal(capsys, "eagle", folder, "--target", ckpt.path)
    assert not list((ckpt.path / "drafts").glob("*")) and ckpt.draft_folder(None) is None


def test_other_refusals_of_drafts(source, ckpt, tmp_path, capsys):
    folder = published(tmp_path / "draft", ckpt, bias=False)
    assert "must be a plain name" in refusal(capsys, "eagle", folder, "--target", ckpt.path, "--name", "a/b")
    assert "holds no fc.weight" in refusal(capsys, "eagle", source, "--target", ckpt.path)
    assert "is a Hugging Face model" in refusal(capsys, "eagle", folder, "--target", source)
    assert "is an EAGLE draft; run: python -m convert eagle" in refusal(capsys, "hf", folder, "--out", tmp_path / "new")
    imported(folder, ckpt)
    assert "--name" in (sentence := refusal(capsys, "eagle", folder, "--target", ckpt.path)) and "exists" in sentence


def test_quantised_targets_accept_the_original_embedding(ckpt, tmp_path):
    """A target out of a GGUF file differs from the draft's embedding by more than rounding."""
    folder = published(tmp_path / "draft", ckpt, bias=False)
    noise = 1 + 0.05 * torch.from_numpy(np.random.default_rng(0).standard_normal(ckpt.params().embedding.shape))
    edit_pickle(folder, embed_tokens__weight=(torch.from_numpy(np.array(ckpt.params().embedding)) * noise).half())
    (ckpt.path / "source.json").write_text('{"format": "gguf"}')
    imported(folder, ckpt)


@pytest.mark.parametrize(("bias", "qkv_bias"), [(False, False), (True, True)])
def test_export_and_import_are_bit_identical(bias, qkv_bias, ckpt, tmp_path):
    first = published(tmp_path / "draft", ckpt, bias, embedding=False, qkv_bias=qkv_bias)
    draft, params = imported(first, ckpt, "first", "--dtype", "bfloat16")
    with new_folder(tmp_path / "exported") as folder:
        eagle.export_eagle(folder, draft, params, ckpt, {"training": "none"})
    assert "embed_tokens.weight" not in load_file(tmp_path / "exported" / "model.safetensors")
    again, weights = imported(tmp_path / "exported", ckpt, "second")
    assert again == draft
    shapes = jax.tree.map(lambda s: s.dtype, draft_shapes(draft, ckpt.config, ml_dtypes.bfloat16))
    in_bf16 = [ckpt.draft(ckpt.draft_folder(name), ml_dtypes.bfloat16)[1] for name in ("first", "second")]
    assert jax.tree.map(lambda a: a.dtype, in_bf16[1]) == shapes
    assert same(*in_bf16) and same(params, weights)
    about = json.loads((ckpt.draft_folder("second") / "config.json").read_text())["about"]
    assert about["training"] == "none"
