"""Published token maps, in every form in which they are passed round, as rankings."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frspec_jax.errors import UserError
from frspec_jax.token_maps import FORMS, write_map
from frspec_jax.vocabulary import Ranking, sub_vocabulary


def ranking(counts, tokenizer="abc", corpora=("a.txt",)) -> Ranking:
    return Ranking(np.asarray(counts, np.int64), tokenizer, tuple(corpora))


ORDER = [7, 3, 11, 0, 5, 9]


def token_map(folder, form, ids=ORDER):
    """A published token map, as each of those who publish them stores it."""
    file = folder / {"tensor": "t.pt", "old": "old.pt", "plain": "plain.pt"}.get(form, f"freq.{form}")
    if form in ("pt", "tensor", "old"):
        torch.save(torch.tensor(ids) if form == "tensor" else ids, file, _use_new_zipfile_serialization=form != "old")
    elif form in ("plain", "pkl"):
        file.write_bytes(pickle.dumps(ids))
    elif form == "json":
        file.write_text("\ufeff" + json.dumps(ids), "utf-8")
    elif form == "txt":
        file.write_text("\r\n".join(map(str, ids)))
    elif form == "npy":
        np.save(file, np.array(ids))
    else:
        save_file({"token_map": torch.tensor(ids, dtype=torch.int32)}, file)
    return file


@pytest.mark.parametrize("form", ["pt", "tensor", "old", "plain", "pkl", "json", "txt", "npy", "safetensors"])
def test_a_token_map_is_an_order_without_counts(tmp_path, form):
    found = Ranking.read(token_map(tmp_path, form, [7, 3, 7, 11, 0, 5, 3, 9]), "abc", 12)
    assert found.listed.tolist() == ORDER and found.listed.dtype == np.int32
    assert (found.tokens, found.reach, found.order.tolist()) == (0, 6, [*ORDER, 1, 2, 4, 6, 8, 10])
    found.save(tmp_path / "r.npz")
    again = Ranking.load(tmp_path / "r.npz")
    assert again.order.tolist() == found.order.tolist() and (again.reach, again.corpora) == (6, found.corpora)


def test_a_token_map_is_sliced_at_any_size_up_to_its_length():
    listed = dataclasses.replace(ranking([0] * 12), listed=np.array(ORDER, np.int32), corpora=("freq_6.pt",))
    for size in range(3, 7):
        ids = sub_vocabulary(listed, size, 12, (3, 10))
        assert ids.tolist() == [*[i for i in ORDER if i != 10][: size - 1], 10] and ids.dtype == np.int32
    with pytest.raises(UserError, match=r"Draft.vocab 7 is larger than the token map freq_6.pt, which names 6"):
        sub_vocabulary(listed, 7, 12, (3, 10))
    assert sub_vocabulary(listed, 12, 12, (3, 10)).tolist() == list(range(12))
    known = np.array([1, 5, 7, 8, 10, 11])
    assert sub_vocabulary(listed, 3, 12, (7,), known).tolist() == [7, 11, 5]
    with pytest.raises(UserError, match=r"names 3 ids of the draft's own vocabulary"):
        sub_vocabulary(listed, 4, 12, (7,), known)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_as_a_token_map_is_read_as_one(tmp_path, form):
    write_map(tmp_path / f"freq_6.{form}", np.array(ORDER, np.int32))
    found = Ranking.read(tmp_path / f"freq_6.{form}", "abc", 12)
    assert found.listed.tolist() == ORDER and found.ordered


IDS = np.array([0, 2, 5, 7])  # that an EAGLE-3 draft's rows stand for
D2T, T2D = IDS - np.arange(4), np.isin(np.arange(12), IDS)
PAIRS = {
    "both.safetensors": lambda file: save_file({"d2t": torch.tensor(D2T), "t2d": torch.tensor(T2D)}, file),
    "both.pt": lambda file: torch.save({"t2d": torch.tensor(T2D), "d2t": torch.tensor(D2T)}, file),
    "d2t.npy": lambda file: np.save(file, D2T),
    "t2d.npy": lambda file: np.save(file, T2D),
    "t2d.pt": lambda file: torch.save(torch.tensor(T2D), file),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_maps_of_an_eagle3_draft_name_ids_in_no_order_until_counts_give_them_one(tmp_path, name):
    PAIRS[name](tmp_path / name)
    found = Ranking.read(tmp_path / name, "abc", 12)
    assert found.listed.tolist() == IDS.tolist() and not found.ordered
    assert sub_vocabulary(found, 4, 12, (0,)).tolist() == IDS.tolist()
    with pytest.raises(UserError, match=r"smaller than the map .* names 4 ids in no order; say 4, or give it an order"):
        sub_vocabulary(found, 3, 12, (0,))
    counts = [1, 90, 0, 0, 0, 8, 0, 3, 0, 0, 0, 0]
    both = found + ranking(counts)
    both.save(tmp_path / "r.npz")
    for one in (both, ranking(counts) + found, Ranking.load(tmp_path / "r.npz")):
        assert one.order[:6].tolist() == [5, 7, 0, 2, 1, 3]
        assert sub_vocabulary(one, 2, 12, (0,)).tolist() == [5, 0]
    ordered = dataclasses.replace(ranking([0] * 12), listed=np.array(ORDER, np.int32))
    assert (ordered + found).order[:8].tolist() == [*ORDER, 2, 1] and (ordered + found).ordered


def test_counts_order_what_a_token_map_does_not_name():
    listed = dataclasses.replace(ranking([0] * 6, corpora=("map",)), listed=np.array([4, 2], np.int32))
    both = listed + ranking([5, 0, 9, 7, 0, 1])
    assert (both.order.tolist(), both.reach) == ([4, 2, 3, 0, 5, 1], 6)
    assert (ranking([5, 0, 9, 7, 0, 1]) + listed).order.tolist() == both.order.tolist()
    other = dataclasses.replace(listed, listed=np.array([2, 5], np.int32))
    assert (listed + other).listed.tolist() == [4, 2, 5]


class Runs:
    def __reduce__(self):
        return (open, ("/tmp/no-such-folder/x", "w"))


BAD_MAPS = {
    "outside": (
        lambda f: token_map(f, "pt", [3, 12]),
        "names the id 12, outside the checkpoint's vocabulary of 12 ids",
    ),
    "negative": (lambda f: token_map(f, "json", [3, -1]), "names the id -1, outside the checkpoint's vocabulary"),
    "empty": (lambda f: token_map(f, "json", []), "it holds no list of whole numbers"),
    "truths": (lambda f: token_map(f, "json", [True, False]), "it holds no list of whole numbers"),
    "fractions": (lambda f: token_map(f, "json", [1.0, 2.0]), "it holds no list of whole numbers"),
    "words": (lambda f: token_map(f, "txt", ["the", "fox"]), "is no ranking or is damaged"),
    "a table": (lambda f: token_map(f, "tensor", [[1, 2], [3, 4]]), "it holds no list of whole numbers"),
    "a set": (lambda f: token_map(f, "pkl", {1, 2}), "it holds no list of whole numbers"),
    "code": (lambda f: token_map(f, "pkl", [Runs()]), "could run anything; save the ids as a plain list"),
    "torch's code": (lambda f: token_map(f, "pt", [Runs()]), "is no ranking or is damaged"),
    "cut short": (lambda f: cut(token_map(f, "pt")), "is no ranking or is damaged"),
    "none": (lambda f: f / "absent.pt", "absent.pt is no file"),
}


def cut(file):
    file.write_bytes(file.read_bytes()[:-40])
    return file


@pytest.mark.parametrize("fault", BAD_MAPS)
def test_what_is_no_token_map_is_refused_in_one_sentence(tmp_path, fault):
    make, said = BAD_MAPS[fault]
    with pytest.raises(UserError) as refused:
        Ranking.read(make(tmp_path), "abc", 12)
    assert said in str(refused.value) and str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_torch_is_needed_for_its_own_files_alone(tmp_path, monkeypatch):
    files = {form: token_map(tmp_path, form) for form in ("pt", "old", "plain", "json", "txt", "safetensors")}
    monkeypatch.setitem(sys.modules, "torch", None)
    for form in ("plain", "json", "txt", "safetensors"):
        assert Ranking.read(files[form], "abc", 12).listed.tolist() == ORDER
    for form in ("pt", "old"):
        with pytest.raises(UserError, match=r"pt needs torch; run: pip install torch"):
            Ranking.read(files[form], "abc", 12)


@pytest.mark.parametrize("listed", [[], [0.5], [3, 3], [9], [-1], [[0]]])
def test_an_order_that_is_damaged_is_refused(tmp_path, listed):
    np.savez(tmp_path / "r.npz", counts=np.zeros(4, int), tokenizer="a", corpora=["a"], listed=np.array(listed))
    with pytest.raises(UserError, match=r"r\.npz is damaged \(its order names no ids\)"):
        Ranking.load(tmp_path / "r.npz")
