"""Tokens to pieces of text: nothing of a stop text is ever out, and nothing is held back without need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frspec_jax.detokenizer import text_of
from frspec_jax.token_bytes import TokenBytes
from frspec_jax.writer import Writer
from tests.support import folders

TOKENIZER = folders.tokenizer()
END = 2
TEXTS = st.text("ab the🙂é你\n", max_size=30)
STOPS = st.lists(st.text("ab the🙂\n", min_size=1, max_size=4), max_size=3)


def written(ids, stop=(), blocks=()):
    """What a writer gives out, a list a token, and the rest."""
    writer, out = Writer(TOKENIZER, stop, (END,)), []
    for one in ids:
        out.append(writer.push(one, 0))
        if writer.stopped:
            return writer, out
    out.append(writer.finish())
    return writer, out


def joined(out):
    return "".join(said.text for part in out for said in part)


@given(TEXTS)
def test_the_pieces_are_the_text(text):
    ids = TOKENIZER(text).input_ids
    writer, out = written(ids)
    assert joined(out) == text and [said.id for part in out for said in part] == ids
    assert writer.taken == len(ids) and not writer.stopped


@given(st.lists(st.integers(0, folders.VOCAB_SIZE - 1), max_size=20))
def test_any_ids_at_all(ids):
    assert joined(written(ids)[1]) == text_of(TOKENIZER, ids)
    assert TokenBytes(TOKENIZER).join(ids).decode("utf-8", "replace") == text_of(TOKENIZER, ids)


@given(TEXTS, STOPS)
def test_stop_texts(text, stops):
    ids = TOKENIZER(text).input_ids
    writer, out = written(ids, stops)
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not ends:
        assert joined(out) == text and not writer.stopped
        return
    end, start = min(ends)
    assert writer.stopped and joined(out) == text[:start]
    # It stopped at the token that completed the stop text, and took in no further one.
    assert len(text_of(TOKENIZER, ids[: writer.taken]).rstrip("\ufffd")) >= end
    assert len(text_of(TOKENIZER, ids[: writer.taken - 1]).rstrip("\ufffd")) < end


@given(TEXTS, STOPS)
def test_held_back_only_while_a_match_is_possible(text, stops):
    """After each token, what is out is all up to the first token within which a stop text may begin."""
    ids, out, so_far = TOKENIZER(text).input_ids, "", ""
    writer = Writer(TOKENIZER, stops, (END,))
    for one in ids:
        fresh = writer.push(one, 0)
        if writer.stopped:
            break
        out += "".join(said.text for said in fresh)
        so_far = text_of(TOKENIZER, ids[: writer.taken]).rstrip("\ufffd")
        possible = [n for n in range(len(so_far)) if any(stop.startswith(so_far[n:]) for stop in stops)]
        held = so_far[len(out) :]
        longest = max(len(token) for token in TOKENIZER.get_vocab())
        assert so_far.startswith(out) and (bool(held) <= bool(possible))
        assert not held or len(held) <= len(so_far) - possible[0] + longest


def test_the_end_token_says_nothing_and_counts():
    ids = [*TOKENIZER("ab").input_ids, END]
    writer, out = written(ids)
    assert joined(out) == "ab" and writer.taken == 3 and [said.text for said in out[-1]][-1:] == [""]


def test_bytes_of_a_character_that_was_cut_off():
    ids = TOKENIZER("a🙂").input_ids[:-1]
    _, out = written([*ids, END])
    assert joined(out) == "a\ufffd" and sum(len(part) for part in out) == len(ids) + 1


@pytest.mark.parametrize("text", ["🙂", "the é"])
def test_bytes_of_tokens(text):
    single, ids = TokenBytes(TOKENIZER), TOKENIZER(text).input_ids
    assert single.join([*ids, END]) == text.encode()
    assert single.shown(END) == b"<|im_end|>" and single.of(END) == b"" and single.of(10**6) == b""


def test_bytes_of_a_sentencepiece_tokenizer():
    """Bytes that fall back, and a space that leads a text and is stripped from it."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁the": 3, "▁a": 4, "<0xF0>": 5, "<0x9F>": 6, "<0x99>": 7, "<0x82>": 8}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    inner.add_special_tokens(["<s>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    ids = [3, 4, 5, 6, 7, 8, 3]
    assert TokenBytes(tokenizer).join(ids).decode() == text_of(tokenizer, ids) == "the a🙂 the"
