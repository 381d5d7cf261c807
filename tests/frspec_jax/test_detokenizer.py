"""Pieces joined are the text: any ids, cut anywhere, by a tokenizer of bytes and by one that falls back to bytes."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from frspec_jax.detokenizer import Detokenizer, text_of
from tests.support import folders

WORDS = ["▁", "▁▁", "a", "b", "▁a", "▁Hi", "!", ".", "é", "▁b", "ab"]
BYTES = [f"<0x{n:02X}>" for n in range(256)]


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: what the vocabulary does not hold is said byte by byte."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *WORDS]
    model = models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=[], unk_token="<unk>", byte_fallback=True)
    inner = Tokenizer(model)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_end|>"])  # the last has no role, such as eos
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"bytes": folders.tokenizer(), "byte fallback": sentencepiece()}
LINE, F0, A = 3 + 0x0A, 3 + 0xF0, 259 + WORDS.index("▁a")


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
@example(data=None)
def test_pieces_joined_are_the_text(kind, data):
    tokenizer = TOKENIZERS[kind]
    size = len(tokenizer)
    if data is None:  # what crashed a stream of Llama 2's kind: a good byte, one that is none, and a word
        parts = [[LINE], [F0], [A]]
    else:
        # Half of the ids from a few that matter most: bytes of one character, spaces, special tokens.
        few = [LINE, F0, 3 + 0x9F, 3 + 0x98, 3 + 0x80, 0, 1, 2, *range(size - 14, size + 2)]
        ids = st.integers(0, size + 20) | st.sampled_from(few)  # a padded embedding has ids that no token has
        parts = data.draw(st.lists(st.lists(ids, max_size=3), max_size=10))
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(part) for part in parts]
    whole = text_of(tokenizer, [number for part in parts for number in part])
    assert whole.startswith("".join(pieces)), "what was given out cannot be taken back"
    assert "".join(pieces) + detokenizer.finish() == whole


@pytest.mark.parametrize("between", ["<|im_end|>", "</s>", None])
def test_bytes_run_on_over_what_says_nothing(between):
    """A special token without a role, one with, and an id beyond the tokenizer's: a wrong byte after it spoils both."""
    tokenizer = TOKENIZERS["byte fallback"]
    silent = len(tokenizer) + 5 if between is None else tokenizer.convert_tokens_to_ids(between)
    ids = [LINE, silent, F0, A]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([number]) for number in ids]
    assert pieces[:-1] == ["", "", ""]
    assert "".join(pieces) + detokenizer.finish() == text_of(tokenizer, ids) == "\ufffd\ufffd a"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_text_comes_as_soon_as_it_is_certain(kind):
    tokenizer = TOKENIZERS[kind]
    detokenizer = Detokenizer(tokenizer)
    ids = [A, A] if kind == "byte fallback" else tokenizer("the an").input_ids
    assert all(detokenizer.push([number]) for number in ids)
    smile = [3 + byte for byte in "😀".encode()] if kind == "byte fallback" else tokenizer("😀").input_ids
    assert [detokenizer.push([number]) for number in smile[:-1]] == [""] * (len(smile) - 1)
    rest = detokenizer.push(smile[-1:]) + detokenizer.push(ids[:1])
    assert rest.startswith("😀")


def test_a_long_text_is_not_decoded_again_and_again(monkeypatch):
    tokenizer, asked = TOKENIZERS["bytes"], []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **how: asked.append(len(ids)) or decode(ids, **how))
    detokenizer = Detokenizer(tokenizer)
    for number in tokenizer("the an " * 200).input_ids:
        detokenizer.push([number])
    assert max(asked) < 8 and len(asked) > 1000
