"""The store of features: whole sequences, of one target and one set of texts, and which tokens are an answer's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from frspec_jax.errors import UserError
from tests.support.folders import checkpoint_folder
from tests.support.stores import checkpoint_like, tagged_store
from train.corpus import Tally
from train.features import FeatureStore, FeatureWriter, open_corpora


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return checkpoint_folder(tmp_path_factory.mktemp("train") / "toy", draft=False, ranking=False)


def test_a_killed_writer_leaves_whole_sequences(tmp_path):
    whole = tagged_store(tmp_path / "whole", [3, 5, 2, 4])
    tagged_store(tmp_path / "cut", [3, 5])
    for name, debris in (("features.f16", 30), ("answer.u8", 3), ("tokens.i32", 5), ("index.i64", 7)):
        with open(tmp_path / "cut" / name, "ab") as file:
            file.write(b"\x01" * debris)  # of a third sequence, whose row was not finished
    assert len(FeatureStore(tmp_path / "cut", checkpoint_like())) == 2
    writer = FeatureWriter(tmp_path / "cut", checkpoint_like())
    assert (writer.tokens, writer.sources) == (8, {0, 1})
    writer.close()
    mended = tagged_store(tmp_path / "cut", [2, 4], first_source=2)
    assert mended.lengths.tolist() == whole.lengths.tolist() == [3, 5, 2, 4]
    for index in range(4):
        for mine, theirs in zip(mended.sequence(index), whole.sequence(index), strict=True):
            assert np.array_equal(mine, theirs)


def test_texts_are_run_as_far_as_a_row_reaches_and_kept_for_these_texts_alone(ckpt, tmp_path):
    target, cache = ckpt.params(), tmp_path / "cache"
    long, other = tmp_path / "long.txt", tmp_path / "other.txt"
    long.write_text("the cat sat on the mat and " * 200)
    other.write_text("the end of the tale")

    def lengths(file: Path, row: int, cache: Path) -> list[int]:
        return open_corpora([file], ckpt, target, cache, row, tally=Tally())[0].lengths.tolist()

    assert lengths(long, 16, cache) == [512] == lengths(long, 512, cache)
    assert lengths(long, 640, tmp_path / "longer") == [640]
    for file, row in ((other, 512), (long, 640)):
        with pytest.raises(UserError, match="features of other texts"):
            open_corpora([file], ckpt, target, cache, row, tally=Tally())
    assert lengths(long, 512, cache) == [512]


def chats(file: Path, *pairs: tuple[str, str]) -> Path:
    turns = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in pairs]
    file.write_text("".join(json.dumps({"messages": both}) + "\n" for both in turns))
    return file


def test_records_whose_answers_lie_behind_the_cut_are_left_out_and_counted(ckpt, tmp_path):
    tally, long, short = Tally(), "the end of it " * 80, "the cat?"
    file = chats(tmp_path / "half.jsonl", (long, "the"), (short, "it is"), (long + "!", "that"))
    (store,) = open_corpora([file], ckpt, ckpt.params(), tmp_path / "cache", 64, tally=tally)
    assert len(store) == 1 and store.sequence(0)[1].any()
    assert tally.said() == (
        "read 3 records; left out 2: their answers lie behind the first 512 tokens (--row) (first: half.jsonl, line 1)"
    )


def test_corpora_of_which_nothing_is_left_are_refused_for_that_reason(ckpt, tmp_path):
    file = chats(tmp_path / "long.jsonl", ("the end of it " * 80, "the"))
    with pytest.raises(UserError, match=r"nothing to train on: read 1 record; left out 1: their answers lie behind"):
        open_corpora([file], ckpt, ckpt.params(), tmp_path / "cache", 64, tally=Tally())


def test_a_cache_that_is_whole_leaves_out_the_same_again(ckpt, tmp_path):
    """What a resumed run says of its corpora is what the first one said, though it computes nothing."""
    file = chats(tmp_path / "half.jsonl", ("the end of it " * 80, "the"), ("the cat?", "it is"))
    said = []
    for _ in range(2):
        tally = Tally()
        (store,) = open_corpora([file], ckpt, ckpt.params(), tmp_path / "cache", 64, tally=tally)
        said.append((tally.said(), len(store)))
    assert said[0] == said[1] and said[0][1] == 1


def test_stores_of_another_target_and_other_folders_are_refused(tmp_path):
    tagged_store(tmp_path / "store", [3])
    for other in (checkpoint_like(target="b"), checkpoint_like(width=8)):
        for opened in (FeatureStore, FeatureWriter):
            with pytest.raises(UserError, match="store holds the features of another target than CKPT; make it again"):
                opened(tmp_path / "store", other)
    with pytest.raises(UserError, match="is no feature store; python -m train answers"):
        FeatureStore(tmp_path, checkpoint_like())


def test_an_empty_store_can_be_opened(tmp_path):
    store = tagged_store(tmp_path / "store", [])
    assert len(store) == 0 and store.features.shape == (0, 4)
