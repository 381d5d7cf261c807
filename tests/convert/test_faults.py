"""Conversion on a full disk, and names that no draft can have: one sentence, and nothing is left."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.__main__ import main
from tests.support.disk import files_of
from tests.support.tiny_hf import converted, refusal


@pytest.mark.parametrize("size", [2_000, 20_000])  # in config.json or the tokenizer; in the weights, which Orbax writes
def test_a_full_disk_is_one_sentence_and_with_room_it_works(tiny_source, tmp_path, capfd, size):
    capfd.readouterr()
    with files_of(size), pytest.raises(SystemExit) as stopped:
        main(["hf", str(tiny_source), "--out", str(tmp_path / "ckpt")])
    assert stopped.value.code == 2
    err = capfd.readouterr().err
    (line,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert "File too large" in line and f"--out {tmp_path / 'ckpt'}" in line
    assert "Traceback" not in err and "absl" not in err and os.listdir(tmp_path) == []
    assert converted("hf", tiny_source, tmp_path / "ckpt").config.vocab_size == 160


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "medusa"])
@pytest.mark.parametrize("name", ["a/b", "x/../..", ".hid", "", "none"])
def test_names_that_no_draft_can_have_are_refused(tiny_ckpt, tmp_path, capsys, kind, name):
    (tmp_path / "draft").mkdir()
    (tmp_path / "draft" / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        main([kind, str(tmp_path / "draft"), "--target", str(tiny_ckpt.path), "--name", name])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --name {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_no_numbers_are_named(tiny_source, tmp_path, capsys, dtype, value):
    """They would convert, and every answer would be nonsense."""
    name, source = "model.layers.0.mlp.up_proj.weight", shutil.copytree(tiny_source, tmp_path / "hf")
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(source / "model.safetensors").items()}
    tensors[name][3, 4] = value
    save_file(tensors, source / "model.safetensors")
    said = refusal(capsys, "hf", source, "--out", tmp_path / "out")
    assert f"{source}: {name} holds values that are no finite numbers; download the weights again" in said
    assert not (tmp_path / "out").exists()
