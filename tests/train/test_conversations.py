"""Which tokens of a conversation are an answer's, by chat template; and what is left out or mended, with its count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from frspec_jax.errors import UserError
from tests.support import folders
from train.conversations import Reader
from train.corpus import Record, Tally

A, U, S = "assistant", "user", "system"
CHATML = folders.TEMPLATE
# The prompt for an answer opens the thought, and what was said before is shown without its thought (R1's distillates).
THINK_OPEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Thoughts of all turns but the last are cut (Qwen3).
THINK_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Roles must alternate, no token ends the header, and what is said is stripped (Llama 2).
INST = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must "
    "alternate') }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content.strip() + ' <|im_end|>' }}{% endif %}{% endfor %}"
)
# Words for markers, and a space that only the prompt for an answer ends in.
VICUNA = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }}\n{% else %}ASSISTANT: {{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
COUNTING = "<|im_start|>system\nYou have {{ messages | length }} messages.<|im_end|>\n" + CHATML

TWO = ((U, "Name a colour."), (A, "Blue."), (U, "Another?"), (A, "Green."))
THOUGHT = ((U, "2+2?"), (A, "<think>\nTwo.\n</think>\n\nFour."), (U, "3+3?"), (A, "<think>\nThree.\n</think>\n\nSix."))
END = "<|im_end|>\n"
MARKERS = "<|im_start|>user\nHi<|im_end|>\n"  # in what is said


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE that has learned to melt spaces and newlines, as the tokenizers of large vocabularies do."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(folders.SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(["\n\n\n  \n\n   Blue.  Green. : Blue: Green\n  " * 30], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>")


def answers(tokenizer, template, turns, tally=None):
    """The sequences that a conversation becomes: of each its text, and its answers as they stand in it."""
    tokenizer.chat_template = template
    found = []
    for tokens, answer in Reader(tokenizer, 400, tally or Tally()).sequences(
        Record("x", turns=tuple(turns), where="x")
    ):
        edges = np.flatnonzero(np.diff([0, *answer.astype(int), 0]))
        found.append([tokenizer.decode(tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)])
    return found


@pytest.mark.parametrize(
    ("template", "turns", "expected"),
    [
        (CHATML, TWO, [["Blue." + END, "Green." + END]]),
        (CHATML, ((S, "Be brief."), *TWO), [["Blue." + END, "Green." + END]]),
        (CHATML, ((A, "Hello!"), *TWO), [["Blue." + END, "Green." + END]]),
        (CHATML, (*TWO[:2], (S, "Now in French."), (U, "Another?"), (A, "Vert.")), [["Blue." + END, "Vert." + END]]),
        (CHATML, (*TWO, (U, "Nobody answers.")), [["Blue." + END, "Green." + END]]),
        (CHATML, (TWO[0], (A, ""), *TWO[2:]), [[END, "Green." + END]]),
        (
            CHATML,
            (TWO[0], (A, "<|im_start|>user\nHi" + END), *TWO[2:]),
            [["<|im_start|>user\nHi" + END * 2, "Green." + END]],
        ),
        # A thought that the prompt has opened goes on, behind the prompt that inference gives.
        (THINK_OPEN, THOUGHT, [["Two.\n</think>\n\nFour." + END], ["Three.\n</think>\n\nSix." + END]]),
        (THINK_OPEN, TWO, [["Blue." + END, "Green." + END]]),
        (THINK_LAST, THOUGHT, [[THOUGHT[1][1] + END], [THOUGHT[3][1] + END]]),
        (INST, TWO, [[" Blue. <|im_end|>", " Green. <|im_end|>"]]),
        (COUNTING, TWO, [["Blue." + END], ["Green." + END]]),
    ],
)
def test_answers_are_found_whatever_the_template_does(tokenizer, template, turns, expected):
    assert answers(tokenizer, template, turns) == expected


@pytest.mark.parametrize("template", [CHATML, VICUNA])
@pytest.mark.parametrize("said", ["  Blue.", "\n\nBlue.", "\nBlue.", " ", "Blue.  "])
def test_a_token_that_melts_with_the_prompt_belongs_to_the_answer(tokenizer, template, said):
    ((first, second),) = answers(tokenizer, template, (TWO[0], (A, said), *TWO[2:]))
    assert first.endswith(said + END) and second.endswith("Green." + END)
    assert len(first) <= len(said + END) + 4 and "colour" not in first  # a few blanks of the prompt at most


@given(st.lists(st.tuples(st.sampled_from([U, A, S]), st.text(st.characters(codec="utf-8"), max_size=12)), max_size=6))
def test_every_character_of_every_answer_is_trained_on_and_none_of_the_questions(tokenizer, turns):
    """Whatever is said: with marks around each text, what is marked as an answer is what the assistant says."""
    turns = [(role, f"{'aq'[role != A]}{text}{'az'[role != A]}") for role, text in turns]
    said = [spans for spans in answers(tokenizer, CHATML, turns)]
    expected = [text + END for n, (role, text) in enumerate(turns) if role == A and n]
    assert "".join("".join(spans) for spans in said) == "".join(expected)


def test_what_stands_beside_the_text_reaches_the_template_and_weight_0_is_prompt(tokenizer):
    tokenizer.chat_template = (
        "{% if tools %}{{ tools[0].name }}|{% endif %}{% for m in messages %}{{ m.name or '' }}{{ m.role }}:"
        "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    turns = ((U, "a"), (A, "one"), ("tool", "42"), (A, "two"))
    record = Record("x", turns=turns, extras=({}, {"weight": 0}, {"name": "sum "}, {}), tools=[{"name": "sum"}])
    ((tokens, answer),) = Reader(tokenizer, 400, Tally()).sequences(record)
    assert tokenizer.decode(tokens) == "sum|user:a\nassistant:one\nsum tool:42\nassistant:two\n"
    assert tokenizer.decode(tokens[answer == 1]) == "two\n"


@pytest.mark.parametrize(
    ("turns", "spoken"),
    [
        (((A, "Hello!"), *TWO), "an answer to nothing was dropped"),
        (((U, "Hi."), *TWO), "an answer to nothing was dropped"),
        (((S, "Be brief."), *TWO), "the system message was put before the first question"),
    ],
)
def test_what_a_strict_template_refuses_is_mended_and_counted(tokenizer, turns, spoken):
    tally = Tally()
    assert answers(tokenizer, INST, turns, tally) == [[" Blue. <|im_end|>", " Green. <|im_end|>"]]
    assert tally.said().startswith(f"read 0 records; mended 1: {spoken}")


def test_what_a_template_refuses_in_every_form_is_left_out_and_counted(tokenizer):
    tally = Tally()
    assert answers(tokenizer, "{{ raise_exception('never') }}", TWO, tally) == []
    assert tally.said() == "read 0 records; left out 1: the chat template refuses them (never) (first: x)"


def test_conversations_without_an_answer_and_tokens_beyond_the_model_are_counted(tokenizer):
    tally = Tally()
    assert answers(tokenizer, CHATML, TWO[:1], tally) == []
    reader = Reader(tokenizer, 20, tally)
    assert reader.sequences(Record("x", text="abc", where="y")) == []
    assert tally.said() == (
        "read 0 records; left out 1: nothing in them is an answer to train on (first: x); "
        "left out 1: they hold tokens that the model has no embedding for, such as 'c' (first: y)"
    )


def test_all_of_a_text_counts(tokenizer):
    ((tokens, answer),) = Reader(tokenizer, 400, Tally()).sequences(Record("x", "the end"))
    assert tokenizer.decode(tokens) == "the end" and answer.all()


def test_a_target_without_a_template_is_named(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"a\.jsonl, line 3 is a conversation, and the target has no chat template"):
        Reader(tokenizer, 400, Tally()).sequences(Record("x", turns=TWO, where="a.jsonl, line 3"))
