"""Import of Medusa heads in both published layouts."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frspec_jax import api
from frspec_jax.api import Request
from frspec_jax.drafters.medusa import PUBLISHED_63, residual
from tests.frspec_jax.test_medusa import reference
from tests.support.drafts import edit_pickle, imported, published_medusa
from tests.support.runs import same
from tests.support.tiny_hf import edit_json, refusal


@pytest.mark.parametrize(("own", "layers", "heads"), [(True, 1, 4), (False, 1, 3), (True, 2, 2), (False, 2, 5)])
def test_imported_heads_compute_what_pytorch_does(own, layers, heads, tiny_ckpt, tmp_path):
    folder = published_medusa(tmp_path / "draft", tiny_ckpt, own, layers, heads)
    tensors = torch.load(folder / "medusa_lm_head.pt", weights_only=True)
    spec, params = imported(folder, tiny_ckpt, "medusa", command="medusa")
    assert (spec.num_heads, spec.num_layers, spec.own_lm_heads) == (heads, layers, own)
    assert spec.choices == tuple(path for path in PUBLISHED_63 if len(path) <= heads)
    head = np.array(tiny_ckpt.params().head)
    feature = np.random.default_rng(0).normal(size=(2, tiny_ckpt.config.hidden_size)).astype(np.float32)
    expected = reference({name: t.float().numpy() for name, t in tensors.items()}, head, feature, layers)
    for ours, wanted in zip(params.heads, expected, strict=True):
        rows = head if ours.lm_head is None else ours.lm_head
        said = np.asarray(residual(ours.blocks, jnp.asarray(feature)) @ rows.T)
        np.testing.assert_allclose(said, wanted, atol=1e-4, rtol=1e-5)


def test_safetensors_and_a_tree_of_its_own(tiny_ckpt, tmp_path):
    folder = published_medusa(tmp_path / "draft", tiny_ckpt, own=False)
    save_file(torch.load(folder / "medusa_lm_head.pt", weights_only=True), folder / "medusa_lm_head.safetensors")
    (folder / "medusa_lm_head.pt").unlink()
    edit_json(folder / "config.json", medusa_choices=[[0], [0, 0], [1]])
    spec, _ = imported(folder, tiny_ckpt, "medusa", command="medusa")
    assert spec.choices == ((0,), (0, 0), (1,))


def test_the_tensors_decide_on_the_number_of_heads(tiny_ckpt, tmp_path, capsys):
    """Medusa's own config for Vicuna says two heads where there are five."""
    folder = published_medusa(tmp_path / "draft", tiny_ckpt, own=True, heads=5)
    edit_json(folder / "config.json", medusa_num_heads=2)
    assert imported(folder, tiny_ckpt, "medusa", command="medusa")[0].num_heads == 5
    assert "says medusa_num_heads 2; the tensors are of 5" in capsys.readouterr().err


@pytest.mark.sweep
def test_an_imported_draft_is_loaded_by_its_kind_and_changes_nothing(tiny_ckpt, tmp_path):
    imported(published_medusa(tmp_path / "draft", tiny_ckpt, own=False), tiny_ckpt, "medusa", command="medusa")
    model, vanilla = api.load(tiny_ckpt), api.load(tiny_ckpt, "none")
    prompt = np.array([5, 80, 33, 9], np.int32)
    result = model.generate_ids(prompt, Request(24))
    assert result.tokens == vanilla.generate_ids(prompt, Request(24)).tokens
    assert result.method == "medusa+copying+auto" and result.draft_vocab == tiny_ckpt.config.vocab_size
    data = json.loads((tiny_ckpt.path / "drafts" / "medusa" / "config.json").read_text())
    assert data["kind"] == "medusa" and data["about"]["source"] == "medusa"


WRONG = {
    "vocabulary": (lambda f, c: edit_pickle(f, **{"0__1__weight": torch.zeros(170, 48)}), "a vocabulary of 170"),
    "hidden size": (
        lambda f, c: edit_pickle(f, **{"0__0__linear__weight": torch.zeros(64, 64)}),
        "heads for a hidden size of 64",
    ),
    "shape": (
        lambda f, c: edit_pickle(f, **{"1__0__linear__bias": torch.zeros(8)}),
        "1.0.linear.bias has shape [8] where",
    ),
    "missing": (lambda f, c: edit_pickle(f, **{"5__0__linear__weight": torch.zeros(48, 48)}), "4.0.linear.weight is"),
    "unexpected": (lambda f, c: edit_pickle(f, extra=torch.zeros(3)), "extra is unexpected"),
    "tree": (lambda f, c: edit_json(f / "config.json", medusa_choices=[[0, 0]]), "medusa_choices is no tree"),
    "fingerprint": (lambda f, c: edit_json(f / "config.json", frspec_target="0" * 16), "made for another target"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_heads_are_refused(fault, tiny_ckpt, tmp_path, capsys):
    breaks, sentence = WRONG[fault]
    folder = published_medusa(tmp_path / "draft", tiny_ckpt, own=True)
    config = json.loads((folder / "config.json").read_text())
    del config["medusa_num_heads"]  # or the missing tensors would be noted on a line of their own
    (folder / "config.json").write_text(json.dumps(config))
    breaks(folder, tiny_ckpt)
    assert sentence in refusal(capsys, "medusa", folder, "--target", tiny_ckpt.path)
    assert tiny_ckpt.draft_folder(None) is None


def test_what_is_no_medusa_is_refused(tiny_source, tiny_ckpt, capsys):
    sentence = refusal(capsys, "medusa", tiny_source, "--target", tiny_ckpt.path)
    assert "holds no 0.0.linear.weight, so it holds no Medusa heads" in sentence


@pytest.mark.parametrize("form", ["medusa_head.{i}.{rest}", "medusa_heads.{i}.{named}", "base.medusa_head.{i}.{rest}"])
def test_heads_under_a_prefix_and_inside_a_whole_model_are_the_same(tiny_ckpt, tmp_path, form):
    """Medusa-2's models hold the target's own tensors besides; NVIDIA's exporters name the parts of a head."""
    plain = published_medusa(tmp_path / "plain", tiny_ckpt, own=True, layers=2, heads=3)
    _, wanted = imported(plain, tiny_ckpt, "plain", command="medusa")

    def name_of(name: str) -> str:
        i, rest = name.split(".", 1)
        named = "lm_head.weight" if rest == "2.weight" else f"medusa_layers.{rest}"
        return form.format(i=i, rest=rest, named=named)

    tensors = torch.load(plain / "medusa_lm_head.pt", weights_only=True)
    other = plain.rename(tmp_path / "other")
    (other / "medusa_lm_head.pt").unlink()
    whole = {"model.embed_tokens.weight": torch.zeros(3, 3)} | {name_of(name): t for name, t in tensors.items()}
    save_file(whole, other / "model.safetensors")
    _, found = imported(other, tiny_ckpt, "other", command="medusa")
    assert same(wanted, found)
