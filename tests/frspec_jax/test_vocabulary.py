"""Rankings and sub-vocabularies: what is kept, in what order, and what is refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from frspec_jax.errors import UserError
from frspec_jax.vocabulary import Ranking, control_ids, crop, sub_vocabulary, tokenizer_hash

COUNTS = st.lists(st.integers(0, 4), min_size=2, max_size=40)  # few values, so that ties are common


def ranking(counts, tokenizer="abc", corpora=("a.txt",)) -> Ranking:
    return Ranking(np.asarray(counts, np.int64), tokenizer, tuple(corpora))


# Order and coverage ------------------------------------------------------------------------------


@given(COUNTS)
def test_order_is_by_count_and_then_by_id(counts):
    order = ranking(counts).order
    assert order.dtype == np.int32
    assert order.tolist() == sorted(range(len(counts)), key=lambda i: (-counts[i], i))


@given(COUNTS)
def test_coverage_grows_with_size_to_one(counts):
    ranked = ranking(counts)
    shares = [ranked.coverage(ranked.order[:size]) for size in range(len(counts) + 1)]
    assert shares == sorted(shares) and shares[0] == 0
    assert shares[-1] == (1 if any(counts) else 0)


def test_coverage_is_the_share_of_occurrences():
    assert ranking([1, 6, 0, 3]).tokens == 10
    assert ranking([1, 6, 0, 3]).coverage([1, 3]) == pytest.approx(0.9)


# Sub-vocabularies --------------------------------------------------------------------------------


@given(COUNTS, st.data())
def test_sub_vocabulary_keeps_the_most_frequent_and_always_the_control_ids(counts, data):
    vocab_size = len(counts)
    always = data.draw(st.sets(st.integers(0, vocab_size - 1), max_size=vocab_size - 2))
    size = data.draw(st.integers(len(always) + 1, vocab_size - 1))
    ranked = ranking(counts)
    ids = sub_vocabulary(ranked, size, vocab_size, always)
    assert ids.dtype == np.int32 and len(ids) == size == len(set(ids.tolist()))
    assert always <= set(ids.tolist())
    place = {number: at for at, number in enumerate(ranked.order.tolist())}
    assert sorted(ids.tolist(), key=place.__getitem__) == ids.tolist()  # in the ranking's order
    others = [i for i in ranked.order.tolist() if i not in always]
    assert set(ids.tolist()) - always == set(others[: size - len(always)])


def test_a_rare_control_id_takes_the_place_of_the_least_frequent():
    counts = [50, 40, 30, 20, 10, 0]
    assert sub_vocabulary(ranking(counts), 3, 6, [5]).tolist() == [0, 1, 5]
    assert sub_vocabulary(ranking(counts), 3, 6, [1]).tolist() == [0, 1, 2]
    assert sub_vocabulary(ranking(counts), 3, 6, [5, 5, 0]).tolist() == [0, 1, 5]


@pytest.mark.parametrize("ranked", [None, ranking([0, 1, 9, 2])])
def test_all_ids_are_the_identity_and_need_no_ranking(ranked):
    ids = sub_vocabulary(ranked, 4, 4, [3])
    assert ids.dtype == np.int32 and ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("size", "always", "said"),
    [
        (7, [], r"Draft\.vocab 7 is larger than the vocabulary \(6 tokens\); lower it"),
        (2, [4, 5], r"Draft\.vocab 2 is too small: 2 control tokens .* give at least 3"),
        (0, [], r"Draft\.vocab 0 is too small: .* give at least 1"),
        (-3, [1], r"Draft\.vocab -3 is too small: .* give at least 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, always, said):
    with pytest.raises(UserError, match=said):
        sub_vocabulary(ranking([1] * 6), size, 6, always)


def test_fewer_than_all_ids_need_a_ranking():
    with pytest.raises(ValueError, match="needs a ranking"):
        sub_vocabulary(None, 3, 6, [])


def test_crop_gathers_rows_and_shares_all_of_them():
    head = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    cropped = crop(head, np.array([4, 0, 5], np.int32))
    assert cropped.ids.dtype == jnp.int32 and cropped.ids.tolist() == [4, 0, 5]
    assert (cropped.weight == head[jnp.array([4, 0, 5])]).all()
    assert crop(head, np.arange(6, dtype=np.int32)).weight is head
    assert crop(head, np.arange(6, dtype=np.int32)[::-1]).weight is not head  # all ids, but in another order


# Merging -----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(*[st.integers(0, 2**40)] * 3), min_size=5, max_size=5))
def test_merging_adds_counts_in_any_grouping(columns):
    a, b, c = (ranking(counts, corpora=(name,)) for name, counts in zip("abc", zip(*columns, strict=True), strict=True))
    left, right = (a + b) + c, a + (b + c)
    assert left.counts.tolist() == right.counts.tolist() == [sum(column) for column in columns]
    assert left.corpora == right.corpora == ("a", "b", "c")
    assert left.tokens == a.tokens + b.tokens + c.tokens
    assert (b + a).counts.tolist() == (a + b).counts.tolist()


@pytest.mark.parametrize("other", [ranking([1, 2], tokenizer="other"), ranking([1, 2, 3])])
def test_merging_refuses_another_tokenizer(other):
    with pytest.raises(UserError, match=r"merge: .* different tokenizers"):
        ranking([1, 2]) + other


# Files -------------------------------------------------------------------------------------------


def test_a_ranking_returns_from_its_file(tmp_path):
    before = ranking([3, 0, 2**50], corpora=("bücher.txt", "b.jsonl.xz"))
    before.save(tmp_path / "ranking.npz")
    after = Ranking.load(tmp_path / "ranking.npz")
    assert after.counts.dtype == np.int64 and after.counts.tolist() == before.counts.tolist()
    assert (after.tokenizer, after.corpora, after.tokens) == (before.tokenizer, before.corpora, before.tokens)
    assert [file.name for file in tmp_path.iterdir()] == ["ranking.npz"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "ranking.npz"
    ranking([1, 2]).save(file)

    def full(part, **_):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device; make room"):
        ranking([5, 5]).save(file)
    assert Ranking.load(file).counts.tolist() == [1, 2]
    assert [left.name for left in tmp_path.iterdir()] == ["ranking.npz"]


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "absent" / "r.npz", tmp_path / "file" / "r.npz", tmp_path):
        with pytest.raises(UserError, match=r"out .* cannot be written: .*; name another file"):
            ranking([1, 2]).save(place)


def damaged(file, kind):
    ranking(range(500)).save(file)
    if kind == "cut short":
        file.write_bytes(file.read_bytes()[:-80])
    elif kind == "text":
        file.write_text("the of and")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "other arrays":
        np.savez(file, weight=np.zeros(3))
    elif kind == "pickle":
        np.savez(file, counts=np.array([{}], dtype=object), tokenizer="a", corpora=["a"])
    elif kind == "shares":
        np.savez(file, counts=np.array([0.5, 0.5]), tokenizer="a", corpora=["a"])
    elif kind == "negative":
        np.savez(file, counts=np.array([4, -1]), tokenizer="a", corpora=["a"])


@pytest.mark.parametrize("kind", ["cut short", "text", "empty", "other arrays", "pickle", "shares", "negative"])
def test_what_is_no_ranking_is_refused(tmp_path, kind):
    damaged(tmp_path / "r.npz", kind)
    with pytest.raises(UserError, match=r"r\.npz (is no ranking or is damaged|holds no counts).*train rank"):
        Ranking.load(tmp_path / "r.npz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.npz is no file; count a ranking with python -m train rank"):
        Ranking.load(tmp_path / "absent.npz")


def test_check_tells_another_size_from_another_tokenizer(tmp_path):
    file = tmp_path / "r.npz"
    ranking([1, 2, 3]).check("abc", 3, file)
    with pytest.raises(UserError, match=r"r\.npz was counted with a vocabulary of 3 ids, and the checkpoint's has 4"):
        ranking([1, 2, 3]).check("abc", 4, file)
    with pytest.raises(UserError, match=r"r\.npz was counted with another tokenizer .*train rank"):
        ranking([1, 2, 3]).check("abd", 3, file)


def test_a_ranking_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ranking([1]).tokenizer = "other"  # type: ignore[misc]


# Tokenizers --------------------------------------------------------------------------------------


def fast_tokenizer(*words: str, **specials: str) -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    return PreTrainedTokenizerFast(tokenizer_object=model, **specials)


def test_the_hash_is_of_tokens_and_ids_alone():
    def vocab(**ids):
        return SimpleNamespace(get_vocab=lambda: ids)

    name = tokenizer_hash(vocab(a=0, b=1))
    assert name == "bb39ca3ef4f2eae3"  # of sha256("0 a\\n1 b\\n"); rankings that ship hold such names
    assert tokenizer_hash(vocab(b=1, a=0)) == name
    assert len({name, *(tokenizer_hash(v) for v in (vocab(a=1, b=0), vocab(a=0, c=1), vocab(a=0)))}) == 4


def test_the_hash_survives_saving_and_sees_added_tokens(tmp_path):
    tokenizer = fast_tokenizer("<unk>", "a", "b")
    name = tokenizer_hash(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_hash(PreTrainedTokenizerFast.from_pretrained(tmp_path)) == name
    tokenizer.add_tokens(["c"])
    assert tokenizer_hash(tokenizer) != name


def test_control_ids_are_terminators_and_added_tokens():
    tokenizer = fast_tokenizer("<unk>", "<s>", "</s>", "a", "b", "<|end|>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|im_start|>"]})
    tokenizer.add_tokens(["<tool_call>", "<unused7>"])  # they steer, or wait for a meaning; neither is marked special
    assert control_ids(tokenizer, [4], 100) == (1, 2, 4, 5, 6, 7)
    assert control_ids(tokenizer, [4, 4, 200], 6) == (1, 2, 4, 5)  # ids outside the vocabulary are left out
