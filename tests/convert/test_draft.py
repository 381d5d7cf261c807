"""`python -m convert draft`: a folder is looked at, and read as what it is; what is none of the kinds is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frspec_jax.vocabulary import Ranking
from tests.support.drafts import (
    edit_safetensors,
    imported,
    published_eagle,
    published_eagle3,
    published_medusa,
    published_speculators,
)
from tests.support.tiny_hf import edit_json, refusal, same

IDS = np.arange(3, 160, 4)


def in_safetensors(folder, **changes):
    """A published folder's pickle as model.safetensors, with some tensors changed (None: taken out)."""
    (file,) = (*folder.glob("*.bin"), *folder.glob("*.pt"))
    tensors = torch.load(file, weights_only=True) | {name.replace("__", "."): t for name, t in changes.items()}
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, folder / "model.safetensors")
    file.unlink()
    return folder


def speculators_eagle(folder, ckpt, bias=False, **entries):
    """An EAGLE draft as speculators published it: other names, and the layer's entries in an object of their own."""
    in_safetensors(published_eagle(folder, ckpt, bias, embedding=False))
    edit_safetensors(
        folder, lambda name: f"fusion_{name}" if name[:2] == "fc" else name.replace("layers.0", "transformer")
    )
    layer = json.loads((folder / "config.json").read_text())
    layer.pop("bias")
    config = {
        "architectures": ["EagleSpeculator"],
        "speculators_model_type": "eagle",
        "transformer_layer_architecture": "LlamaDecoderLayer",
        "transformer_layer_config": layer,
        "layernorms": False,
        "fusion_bias": bias,
        **entries,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


KINDS = {
    "eagle": lambda folder, ckpt: published_eagle(folder, ckpt, bias=True),
    "eagle3": lambda folder, ckpt: published_eagle3(folder, ckpt, IDS),
    "medusa": lambda folder, ckpt: published_medusa(folder, ckpt, own=False),
    "eagle of speculators": lambda folder, ckpt: speculators_eagle(folder, ckpt),
    "eagle3 of speculators": lambda folder, ckpt: published_speculators(folder, ckpt, IDS),
}


@pytest.mark.parametrize("form", KINDS)
def test_a_folder_is_read_as_what_it_is(form, deep_ckpt, tmp_path, capsys):
    kind, folder = form.split()[0], KINDS[form](tmp_path / "draft", deep_ckpt)
    named = imported(folder, deep_ckpt, "named", command=kind)
    capsys.readouterr()
    found = imported(folder, deep_ckpt, "found", command="draft")
    assert found[0] == named[0] and same(found[1], named[1])
    assert f"{folder} is a" in capsys.readouterr().out
    for other in {"eagle", "eagle3", "medusa"} - {kind}:  # and each other command sends to the one that takes it
        said = refusal(capsys, other, folder, "--target", deep_ckpt.path)
        assert f"run: python -m convert {kind} {folder}" in said


def test_a_draft_of_speculators_is_that_of_its_publishers_under_other_names(deep_ckpt, tmp_path):
    plain = published_eagle(tmp_path / "plain", deep_ckpt, bias=True, embedding=False)
    other = speculators_eagle(tmp_path / "other", deep_ckpt, bias=True)
    first, second = (imported(folder, deep_ckpt, folder.name, command="draft") for folder in (plain, other))
    assert first[0] == second[0] and first[0].fc_bias and same(first[1], second[1])


@pytest.mark.parametrize("bias", [False, True])
def test_eagle_2_goes_to_speculators_and_comes_back(deep_ckpt, tmp_path, bias, capsys):
    first = imported(published_eagle(tmp_path / "draft", deep_ckpt, bias), deep_ckpt, "first", command="draft")
    argv = ["export", "--ckpt", deep_ckpt.path, "--format", "speculators", "--dtype", "float32"]
    from convert.__main__ import main

    main([str(arg) for arg in (*argv, "--out", tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle" and config["fusion_bias"] is bias
    second = imported(tmp_path / "out", deep_ckpt, "second", command="draft")
    assert first[0] == second[0] and same(first[1], second[1])
    imported(published_eagle(tmp_path / "qkv", deep_ckpt, bias, qkv_bias=True), deep_ckpt, "qkv")
    said = refusal(capsys, *argv, "--draft", "qkv", "--out", tmp_path / "no")
    assert "attention has biases" in said and not (tmp_path / "no").exists()


def test_a_head_that_is_the_targets_is_left_out_and_its_map_is_a_ranking(deep_ckpt, tmp_path, capsys):
    head, ids = torch.from_numpy(np.array(deep_ckpt.params().head)), torch.from_numpy(IDS[::-1].copy())
    folder = published_eagle(tmp_path / "draft", deep_ckpt, bias=False)
    plain = imported(folder, deep_ckpt, "plain")
    in_safetensors(folder, lm_head__weight=head)
    assert same(imported(folder, deep_ckpt, "whole")[1], plain[1])
    edit_safetensors(folder, lm_head__weight=head[ids].bfloat16(), token_map=ids)
    assert same(imported(folder, deep_ckpt, "rows")[1], plain[1])
    assert f"--ranking {folder}/model.safetensors reads it" in capsys.readouterr().out
    found = Ranking.read(folder / "model.safetensors", "abc", 160)
    assert found.ordered and found.listed.tolist() == ids.tolist()


FAULTS = {
    "own head": (lambda f: in_safetensors(f, lm_head__weight=torch.ones(160, 48)), "lm_head.weight differs from the"),
    "fewer rows": (lambda f: in_safetensors(f, lm_head__weight=torch.ones(40, 48)), "weight has shape [40, 48]"),
    "map": (
        lambda f: in_safetensors(f, lm_head__weight=torch.ones(1, 48), token_map=torch.tensor([160])),
        "token_map must name ids of --target, from 0 to 159",
    ),
    "a model": (lambda f: _as_model(f), "holds no draft that is known (its config.json says LlamaForCausalLM); EAGLE"),
    "norms": (
        lambda f: edit_json(f / "config.json", speculators_model_type="eagle", layernorms=True,
                            transformer_layer_config={"hidden_size": 48}),
        "asks for layernorms; an EAGLE draft without them",
    ),
    "another kind": (
        lambda f: (_as_model(f), edit_json(f / "config.json", speculators_model_type="dflash")),
        "speculators_model_type is 'dflash'; of the drafts of speculators those of type eagle and eagle3",
    ),
}  # fmt: skip


def _as_model(folder):
    in_safetensors(folder, fc__weight=None)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_read_is_told(fault, deep_ckpt, tmp_path, capsys):
    breaks, said = FAULTS[fault]
    folder = published_eagle(tmp_path / "draft", deep_ckpt, bias=False)
    breaks(folder)
    assert said in refusal(capsys, "draft", folder, "--target", deep_ckpt.path)
    assert deep_ckpt.draft_folder(None) is None
