"""GGUF files that are no model of this machine's: one sentence that says what they are, and what to give instead."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from convert.gguf_checks import check_is_model
from frspec_jax.errors import UserError
from tests.convert.test_gguf import SIZES, write_gguf
from tests.support.tiny_hf import model_of, refusal


def write(file, add, endian=gguf.GGUFEndian.LITTLE):
    writer = gguf.GGUFWriter(file, "llama", endianess=endian)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def weights(writer):
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))


def adapter(writer):
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((4, 32), np.float32))


def other(writer):
    writer.add_type("mmproj")
    weights(writer)


@pytest.mark.parametrize(
    ("add", "endian", "said"),
    [
        (weights, gguf.GGUFEndian.BIG, "of the other byte order .*: gguf-convert-endian .*x.gguf little"),
        (adapter, gguf.GGUFEndian.LITTLE, "is a LoRA adapter, .*; merge it into its model first"),
        (
            lambda writer: writer.add_token_list(["a"]),
            gguf.GGUFEndian.LITTLE,
            "a vocabulary alone, and no weights",
        ),
        (other, gguf.GGUFEndian.LITTLE, "of type 'mmproj'; give the model's own file"),
    ],
)
def test_what_is_no_model_is_named(tmp_path, capsys, add, endian, said):
    file = write(tmp_path / "x.gguf", add, endian)
    with pytest.raises(UserError, match=said):
        check_is_model(file, gguf.GGUFReader(file))
    assert "x.gguf" in refusal(capsys, "gguf", file, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_whose_merges_name_no_token_is_named(tmp_path, capsys):
    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges(["t3 t4"])

    file = write_gguf(tmp_path / "x.gguf", model_of(**SIZES), extra=add)
    said = refusal(capsys, "gguf", file, "--out", tmp_path / "out")
    assert "its tokenizer cannot be built" in said and "convert the model's Hugging Face folder" in said
    assert not (tmp_path / "out").exists()
