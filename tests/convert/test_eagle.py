"""Import of EAGLE drafts in the published format."""

from pathlib import Path

import numpy as np
import pytest
import torch

from frspec_jax.checkpoint import Checkpoint
from tests.support.drafts import edit_pickle, imported, published_eagle
from tests.support.tiny_hf import edit_json, refusal, same


@pytest.fixture
def ckpt(tiny_ckpt) -> Checkpoint:
    return tiny_ckpt


@pytest.mark.parametrize(("bias", "qkv_bias"), [(False, False), (True, False), (True, True)])
def test_published_draft(bias, qkv_bias, ckpt, tmp_path):
    folder = published_eagle(tmp_path / "draft", ckpt, bias, qkv_bias=qkv_bias)
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


def test_another_rope_base_is_told(ckpt, tmp_path, capsys):
    folder = published_eagle(tmp_path / "draft", ckpt, bias=True)
    edit_json(folder / "config.json", bias=True, rope_theta=500000.0)
    assert imported(folder, ckpt)[0].fc_bias
    notes = capsys.readouterr().err
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
    "no bias": (
        lambda f, c: edit_json(f / "config.json", bias=True),
        "says bias: true, but the checkpoint has no fc.bias",
    ),
    "bias": (
        lambda f, c: (edit_json(f / "config.json", bias=False), edit_pickle(f, fc__bias=torch.ones(48))),
        "says bias: false, but the checkpoint has an fc.bias",
    ),
    "eagle3": (lambda f, c: edit_pickle(f, d2t=torch.zeros(8)), "is an EAGLE-3 draft"),
}


@pytest.mark.parametrize("fault", WRONG_DRAFTS)
def test_wrong_drafts_are_refused(fault, ckpt, tmp_path, capsys):
    breaks, sentence = WRONG_DRAFTS[fault]
    folder = published_eagle(tmp_path / "draft", ckpt, bias=False)
    breaks(folder, ckpt)
    assert sentence in refusal(capsys, "eagle", folder, "--target", ckpt.path)
    assert not list((ckpt.path / "drafts").glob("*")) and ckpt.draft_folder(None) is None


def test_other_refusals_of_drafts(tiny_source, ckpt, tmp_path, capsys):
    folder = published_eagle(tmp_path / "draft", ckpt, bias=False)
    assert "must be a plain name" in refusal(capsys, "eagle", folder, "--target", ckpt.path, "--name", "a/b")
    assert "holds no fc.weight" in refusal(capsys, "eagle", tiny_source, "--target", ckpt.path)
    assert "is a Hugging Face model" in refusal(capsys, "eagle", folder, "--target", tiny_source)
    assert "is a draft; run: python -m convert eagle" in refusal(capsys, "hf", folder, "--out", tmp_path / "new")
    imported(folder, ckpt)
    assert "--name" in (sentence := refusal(capsys, "eagle", folder, "--target", ckpt.path)) and "exists" in sentence


def test_quantised_targets_accept_the_original_embedding(ckpt, tmp_path):
    """A target out of a GGUF file differs from the draft's embedding by more than rounding."""
    folder = published_eagle(tmp_path / "draft", ckpt, bias=False)
    noise = 1 + 0.05 * torch.from_numpy(np.random.default_rng(0).standard_normal(ckpt.params().embedding.shape))
    edit_pickle(folder, embed_tokens__weight=(torch.from_numpy(np.array(ckpt.params().embedding)) * noise).half())
    (ckpt.path / "source.json").write_text('{"format": "gguf"}')
    imported(folder, ckpt)


def test_names_may_have_model_before_them(ckpt, tmp_path):
    """vLLM's re-uploads: `model.fc.weight`, `model.layers.0.self_attn.q_proj.weight` and so on."""
    plain = imported(published_eagle(tmp_path / "plain", ckpt, bias=True, qkv_bias=True), ckpt, "plain")
    folder = published_eagle(tmp_path / "draft", ckpt, bias=True, qkv_bias=True)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({f"model.{name}": tensor for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
    draft, params = imported(folder, ckpt, "prefixed")
    assert draft == plain[0] and same(params, plain[1])


def test_hass_drafts_load_as_eagle_2(ckpt, tmp_path):
    """HASS publishes EAGLE-2's layer under EAGLE-2's names; its config.json has more of the target's entries."""
    folder = published_eagle(tmp_path / "HASS-Tiny", ckpt, bias=False)
    edit_json(
        folder / "config.json",
        vocab_size=160,
        hidden_act="silu",
        pretraining_tp=1,
        rope_scaling=None,
        use_cache=True,
        initializer_range=0.02,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        torch_dtype="float16",
    )
    plain = imported(published_eagle(tmp_path / "draft", ckpt, bias=False), ckpt, "eagle")
    hass = imported(folder, ckpt, "hass")
    assert hass[0] == plain[0] and same(hass[1], plain[1])
