"""Tokenizers out of GGUF files and tokenizer.model, against the originals that they come from."""

import io
import json
import random
import shutil
import unicodedata
from pathlib import Path

import gguf
import numpy as np
import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from convert.gguf import GgufFile
from convert.gguf_tokenizer import _sentence_piece, save_tokenizer
from frspec_jax.errors import UserError
from tests.support.tiny_hf import converted, model_of, refusal, save

ALPHABET = "aAbh  .\n\t=-_eé中ñ😀'sß<>|/\r▁0123"


def texts(alphabet: str = ALPHABET, count: int = 1500) -> list[str]:
    """Plain sentences, and random strings that meet every corner of a tokenizer."""
    rng = random.Random(0)
    plain = [
        "",
        " ",
        "Hello world",
        "  two  spaces ",
        "def f(x):\n    return x\n\n\n",
        "naïve café 中文 😀!",
        "it's I'LL",
    ]
    strings = ["".join(rng.choice(alphabet) for _ in range(rng.randint(0, 40))) for _ in range(count)]
    runs = [
        "".join(rng.choice(["a", "ha", " ", "-", "the", "\n"]) * rng.randint(1, 9) for _ in range(6))
        for _ in range(300)
    ]
    return plain + strings + runs


@pytest.fixture(scope="module")
def llama2_kind() -> bytes:
    """A SentencePiece BPE model with Llama 2's settings, trained on a little text."""
    rng = random.Random(1)
    words = [
        "the",
        "a",
        "of",
        "and",
        "house",
        "ha",
        "haha",
        "indent",
        "value",
        "return",
        "tokens",
        "draft",
        "tree",
        "speculative",
    ]
    lines = [" ".join(rng.choice(words) for _ in range(12)) for _ in range(400)]
    lines += [
        " " * rng.randint(1, 16) + "indent " + "-" * rng.randint(1, 8) + "a" * rng.randint(1, 8) for _ in range(300)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


def write_sentencepiece_gguf(file: Path, model: bytes) -> Path:
    """The tokenizer in a GGUF file, as llama.cpp's converter writes it."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(pieces.vocab_size())
    kinds = {2: pieces.is_unknown, 3: pieces.is_control, 5: pieces.is_unused, 6: pieces.is_byte}
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([pieces.id_to_piece(i) for i in ids])
    writer.add_token_scores([pieces.get_score(i) for i in ids])
    writer.add_token_types([next((kind for kind, holds in kinds.items() if holds(i)), 1) for i in ids])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_tensor("token_embd.weight", np.ones((len(ids), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tokenizer_out_of(file: Path, folder: Path):
    folder.mkdir()
    save_tokenizer(folder, GgufFile(file))
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def test_sentencepiece_out_of_gguf(llama2_kind, tmp_path):
    tokenizer = tokenizer_out_of(write_sentencepiece_gguf(tmp_path / "spm.gguf", llama2_kind), tmp_path / "tok")
    original = sentencepiece.SentencePieceProcessor(model_proto=llama2_kind)
    different = [t for t in texts() if tokenizer.encode(t, add_special_tokens=False) != original.encode(t)]
    assert different == []
    decoded = [t for t in texts() if tokenizer.decode(tokenizer.encode(t, add_special_tokens=False)) != t]
    assert [t for t in decoded if "▁" not in t] == []  # a written "▁" comes back as a space, in SentencePiece too
    assert tokenizer.encode("the house") == [1, *original.encode("the house")]
    # Special tokens are taken whole, and the text after one gets its own leading space, as in llama.cpp.
    assert tokenizer.encode("<s>the</s>the", add_special_tokens=False) == [
        1,
        *original.encode("the"),
        2,
        *original.encode("the"),
    ]
    assert json.loads((tmp_path / "tok" / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_sentencepiece_never_spells_special_pieces(llama2_kind, tmp_path):
    """A piece like "<0x41>" that text could spell out of its parts stays out of reach, as in SentencePiece."""
    fields = {
        "tokenizer.ggml.tokens": [
            "<unk>",
            "<s>",
            "</s>",
            "<0x41>",
            "<0x",
            "41>",
            "<",
            "0",
            "x",
            "4",
            "1",
            ">",
            "0x",
            "41",
        ],
        "tokenizer.ggml.token_type": [2, 3, 3, 6] + [1] * 10,
    }
    fields["tokenizer.ggml.scores"] = [0.0] * 4 + [-float(n) for n in range(10)]

    class Fields:
        label = "here"

        def get(self, key, default=None):
            return fields.get(key, default)

    tokenizer = _sentence_piece(Fields(), fields["tokenizer.ggml.tokens"])
    assert 3 not in tokenizer.encode("<0x41>").ids


def test_folder_with_tokenizer_model_alone(llama2_kind, tmp_path, capsys):
    """A Hugging Face folder of before tokenizer.json: the same ids as SentencePiece's own."""
    original = sentencepiece.SentencePieceProcessor(model_proto=llama2_kind)
    folder = save(model_of(vocab_size=421), tmp_path / "hf")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(llama2_kind)
    (folder / "added_tokens.json").write_text('{"<pad>": 420}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ bos_token }}{{ messages[0].content }}"}')
    tokenizer = converted("hf", folder, tmp_path / "ckpt").tokenizer
    for text in texts(count=100):
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text)
    assert tokenizer.encode("the<pad>") == [1, *original.encode("the"), 420]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False) == "<s>the"
    shutil.rmtree(tmp_path / "ckpt")
    (folder / "added_tokens.json").write_text('{"<pad>": 430}')
    assert "leaves gaps after id 420" in refusal(capsys, "hf", folder, "--out", tmp_path / "ckpt")


def byte_level_gguf(file: Path, pre: str | None, arch: str = "llama", add_bos: bool | None = None) -> Path:
    tokens = [*bytes_to_unicode().values(), "Ġa", "aa", "11", "111", "<|begin|>", "<|eot_id|>"]
    writer = gguf.GGUFWriter(file, arch)
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(["Ġ a", "a a", "1 1", "11 1"])
    writer.add_token_types([1] * (len(tokens) - 2) + [3, 3])
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_tensor("token_embd.weight", np.ones((len(tokens), 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(
    ("pre", "arch", "digits", "bos"),
    [
        ("llama-bpe", "llama", ["111", "11"], True),  # up to three digits, and BOS unless the file says otherwise
        ("qwen2", "qwen2", ["1"] * 5, False),
        (None, "qwen2", ["1"] * 5, False),  # files of before May 2024 do not name it
        ("smollm", "llama", ["1"] * 5, False),
        ("gpt-2", "llama", ["11", "111"], False),  # all of them at once, which merges pairs first
    ],
)
def test_ways_of_splitting(pre, arch, digits, bos, tmp_path):
    tokenizer = tokenizer_out_of(byte_level_gguf(tmp_path / "t.gguf", pre, arch), tmp_path / "tok")
    ids = tokenizer.encode("11111")
    assert tokenizer.convert_ids_to_tokens(ids[bos:]) == digits
    assert (ids[0] == tokenizer.bos_token_id) == bos
    again = tokenizer_out_of(byte_level_gguf(tmp_path / "u.gguf", pre, arch, add_bos=False), tmp_path / "tok2")
    assert again.encode("11111") == ids[bos:]


def test_unknown_ways_of_splitting_are_refused(tmp_path, capsys):
    for pre in (None, "default", "dbrx"):
        file = byte_level_gguf(tmp_path / f"{pre}.gguf", pre)
        with pytest.raises(UserError, match="pre-tokenizer"):
            save_tokenizer(tmp_path, GgufFile(file))


# A real model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(gguf_path, tmp_path_factory):
    """The real model's tokenizer by our conversion, and how the file says that it splits text."""
    kind = GgufFile(gguf_path).get("tokenizer.ggml.pre")
    return tokenizer_out_of(gguf_path, tmp_path_factory.mktemp("real") / "tok"), kind


@pytest.mark.sweep
@pytest.mark.material
def test_tokenizer_of_a_real_model(gguf_path, real):
    """Against transformers' own reading of the file.

    It reads `smollm` without the split at every digit that the original tokenizer has (and llama.cpp
    too), so for that one numbers are left out here. It also leaves out Qwen's NFC normalisation.
    """
    tokenizer, kind = real
    theirs = AutoTokenizer.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name)
    checked = 0
    for text in [*texts(), "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|> x"]:
        if kind == "smollm" and any(unicodedata.category(c).startswith("N") for c in text):
            continue
        text = unicodedata.normalize("NFC", text)
        assert tokenizer.encode(text) == theirs.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
        checked += 1
    assert checked > 300
    talk = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yes?"}]
    for more in ({}, {"add_generation_prompt": True}):
        rendered = tokenizer.apply_chat_template(talk, tokenize=False, **more)
        assert rendered == theirs.apply_chat_template(talk, tokenize=False, **more)
    assert tokenizer.eos_token_id == theirs.eos_token_id


@pytest.mark.sweep
@pytest.mark.material
def test_smollm_splits_every_digit(real):
    tokenizer, kind = real
    if kind != "smollm":
        pytest.skip("the model at hand splits digits in another way")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 123")) == ["in", "Ġ", "1", "2", "3"]
