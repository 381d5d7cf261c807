"""Pieces joined are the text: any ids, cut anywhere, by a tokenizer of bytes and by one that falls back to bytes."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
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


FRAGMENTS = [b"\x82\xac\xe2", b"\xac\xe2\x82", b"\xac\xe2", b"\x98\x80\xf0\x9f", b"\x80\xf0\x9f\x98", b"a\xe2\x82"]


def fragments() -> PreTrainedTokenizerFast:
    """All bytes, and ids that begin and end within characters: none of their ends need be a character's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    of_byte = {byte: letter for byte, letter in zip(_printed_order(), letters, strict=True)}
    tokens = [
        *(of_byte[byte] for byte in range(256)),
        *("".join(of_byte[b] for b in part) for part in FRAGMENTS),
        "<e>",
    ]
    inner = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<e>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<e>")


def _printed_order() -> list[int]:
    """Bytes in the order of the letters that GPT-2's alphabet has for them: those that print, then the rest."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printed + [byte for byte in range(256) if byte not in printed]


TOKENIZERS = {"bytes": folders.tokenizer(), "byte fallback": sentencepiece(), "fragments": fragments()}
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


@pytest.mark.parametrize("kind", ["bytes", "byte fallback"])
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


RUNS = {
    "continuations": [0x80],
    "characters across ids": [256],  # 82 AC E2: every id ends within a character, and the text is fine
    "across two": [259, 260],
    "leads": [0xF0, 0x9F],
    "silence in between": [0x80, 262],
    "wrong and right": [0xE2, 0x82, 0xFF, 0xAC, 0x41],
}


@pytest.mark.parametrize("name", RUNS)
def test_an_endless_run_costs_the_same_for_each_id(name, monkeypatch):
    """Of bytes that are no character, or of characters none of which ends with an id: given out now and then."""
    tokenizer, again, asked = fragments(), TOKENIZERS["fragments"], []
    decode, ids = tokenizer.decode, RUNS[name] * (2000 // len(RUNS[name]))
    whole = text_of(again, ids)
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **how: asked.append(len(ids)) or decode(ids, **how))
    detokenizer, out, held = Detokenizer(tokenizer), "", 0
    for count, number in enumerate(ids, 1):
        out += detokenizer.push([number])
        held = max(held, len(text_of(again, ids[:count])) - len(out) if count % 97 == 0 else 0)
    assert whole.startswith(out) and out + detokenizer.finish() == whole
    assert held <= 3 * 16 and max(asked) <= 4 * 16


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_long_runs_of_any_bytes_are_the_text(data):
    few = [0x80, 0x82, 0xAC, 0xE2, 0xF0, 0x9F, 0x98, 0xFF, 0x41, *range(256, 263), 300]
    parts = data.draw(st.lists(st.lists(st.sampled_from(few), max_size=9), min_size=5, max_size=30))
    detokenizer, tokenizer, out = Detokenizer(TOKENIZERS["fragments"]), TOKENIZERS["fragments"], ""
    for part in parts:
        out += detokenizer.push(part)
    whole = text_of(tokenizer, [number for part in parts for number in part])
    assert whole.startswith(out) and out + detokenizer.finish() == whole


def test_a_long_run_of_fallback_bytes_is_not_looked_through_again():
    """It is held back until it ends, for its last byte may spoil them all; each id is looked at once."""
    detokenizer, looks = Detokenizer(TOKENIZERS["byte fallback"]), []
    look = detokenizer._open
    detokenizer._open = lambda number: looks.append(number) or look(number)
    ids = [LINE] * 3000
    assert "".join(detokenizer.push([number]) for number in ids) == "" and len(looks) == 3000
    assert detokenizer.push([A]) == "\n" * 3000 + " a"
