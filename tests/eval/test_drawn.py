"""The commands that draw the paper's figures: token frequency, draft trees, and loops."""

from __future__ import annotations

import json

import numpy as np
import pytest

from eval.__main__ import main
from eval.commands import demo, frequency, loops
from eval.commands.draft_tree import PLAIN, grown, heights
from frspec_jax import Request, TreeConfig, api
from frspec_jax.errors import UserError
from frspec_jax.vocabulary import Ranking
from tests.support.folders import VOCAB_SIZE


@pytest.fixture(scope="module")
def ckpt(toy_folder):
    return toy_folder.path


def evaluate(*argv):
    main([str(arg) for arg in argv])


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        evaluate(*argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and len(captured.err.strip().splitlines()) == 1
    return captured.err


# Figure 2 -----------------------------------------------------------------------------------------


def test_shares_of_the_vocabulary():
    ranking = Ranking(np.array([5, 0, 90, 3, 2, 0, 0, 0]), "t", ("c",))
    assert frequency.cumulative(ranking).tolist() == [0.9, 0.95, 0.98, 1, 1, 1, 1, 1]
    assert [frequency.needed(ranking, share) for share in (0.75, 0.90, 0.95, 0.99)] == [1, 1, 2, 4]
    found = frequency.facts("x", ranking)
    assert found["last_three_quarters"] == pytest.approx(0.05) and found["never_seen"] == 0.5
    assert found["share_of_vocabulary_for"] == {"75%": 0.125, "90%": 0.125, "95%": 0.25, "99%": 0.5}


def test_frequency_draws_rankings_and_checkpoints(ckpt, tmp_path, capsys):
    Ranking(np.arange(50), "other", ("c",)).save(tmp_path / "other.npz")
    evaluate("frequency", ckpt, tmp_path / "other.npz", "--out", tmp_path / "o", "--json", tmp_path / "f.json")
    rows = json.loads((tmp_path / "f.json").read_text())["rankings"]
    assert [(row["name"], row["vocabulary"]) for row in rows] == [("toy", VOCAB_SIZE), ("other", 50)]
    assert (tmp_path / "o" / "token_frequency.svg").is_file()
    assert "other" in capsys.readouterr().out
    assert "two rankings are called toy" in refused(capsys, "frequency", ckpt, ckpt, "--out", tmp_path / "p")
    assert "is no file" in refused(capsys, "frequency", tmp_path / "x.npz", "--out", tmp_path / "p")
    Ranking(np.zeros(9, int), "t", ("c",)).save(tmp_path / "empty.npz")
    assert "counts no token" in refused(capsys, "frequency", tmp_path / "empty.npz", "--out", tmp_path / "p")
    assert "is a token map, which has no counts" in refused(capsys, "frequency", "f.pt", "--out", tmp_path / "p")
    assert not (tmp_path / "p").exists()


# Figures 3 and 4 ----------------------------------------------------------------------------------


def test_a_tree_stands_with_parents_amid_their_children():
    places = heights(np.array([0, 0, 0, 1, 1, 2]))
    assert places.tolist() == [1.25, 0.5, 2.0, 0.0, 1.0, 2.0]


@pytest.mark.sweep
def test_what_is_drawn_is_what_is_decoded(ckpt):
    """The accepted path and the bonus are the target's own next tokens; the mask is the tree's."""
    vanilla = api.load(ckpt, "none")
    model = api.load(ckpt, api.Draft(vocab="full", tree=TreeConfig(120, 3, 10)), target=vanilla.weights.target)
    text = vanilla.encode("the end")
    longest = 0
    for _ in range(60):
        one = grown(model, text)
        path = sorted(one.accepted, key=lambda node: one.depth[node])
        expected = vanilla.generate_ids(text, Request(len(path) + 1)).tokens
        assert [int(one.ids[node]) for node in path] == expected[: len(path)]
        assert one.bonus == vanilla.checkpoint.tokenizer.decode([expected[len(path)]])
        for node in range(120):
            above = {node} | ({int(one.parent[node])} if node else set())
            seen = set(np.flatnonzero(one.mask[node]).tolist())
            assert above <= seen and len(seen) == one.depth[node] + 1
        longest = max(longest, len(path))
        if longest > 1:
            break
        text = np.append(text, np.int32(expected[0]))
    assert longest > 1  # somewhere a draft was right, or the test above says little


@pytest.mark.sweep
def test_the_tree_command(ckpt, tmp_path, capsys):
    evaluate("draft-tree", "--ckpt", ckpt, "--prompt", "the end", "--after", "3", "--out", tmp_path)
    out = capsys.readouterr().out
    assert out.count("accepted") == 2 and f"V' = {VOCAB_SIZE}" in out and f"V' = {VOCAB_SIZE // 4}" in out
    assert (tmp_path / "draft_tree.png").stat().st_size > 20000 and PLAIN in (tmp_path / "draft_tree.svg").read_text()
    for flags, words in (
        (("--after", "-1"), "--after -1"),
        (("--tree-size", "99"), "--tree-size 99"),
        (("--draft-vocab", "few"), "--draft-vocab 'few' must be a number of tokens, full, or a share"),
        (("--prompt", " "), "empty"),
        (("--out", ckpt / "config.json" / "x"), "--out"),
    ):
        assert words in refused(capsys, "draft-tree", "--ckpt", ckpt, "--out", tmp_path / "x", *flags)
    assert not (tmp_path / "x").exists()


# Figure 5 -----------------------------------------------------------------------------------------


def test_every_drive_emits_the_same_tokens(ckpt):
    model = api.load(ckpt, api.Draft(pace="fixed"))
    prompt = model.encode("what is it")
    results = [loops.timed(model, drive, prompt, Request(20)) for drive in loops.DRIVES]
    assert all(tokens == results[0][0] and rounds == results[0][1] for tokens, rounds, _ in results)
    assert results[0][0] == model.generate_ids(prompt, Request(20)).tokens and results[0][1] > 0


@pytest.mark.sweep
def test_a_drive_that_is_wrong_is_noticed(ckpt, monkeypatch):
    model = api.load(ckpt)
    monkeypatch.setitem(loops.DRIVES, "a call a round", lambda text: None)
    with pytest.raises(RuntimeError, match="different tokens"):
        loops.compare({"m": model}, [model.encode("what is it")], Request(8))
    with pytest.raises(UserError, match="one token"):
        loops.compare({"m": model}, [model.encode("what is it")], Request(1))


def test_the_loops_command(ckpt, tmp_path, capsys):
    flags = ("--draft-vocab", "1/4", "--questions", "1", "--max-new-tokens", "8")
    evaluate("loops", "--ckpt", ckpt, *flags, "--out", tmp_path, "--json", tmp_path / "f.json")
    rows = json.loads((tmp_path / "f.json").read_text())["methods"]
    assert [row["name"] for row in rows] == ["vanilla", "FR-Spec 68"]
    assert all(set(row["round_ms"]) == set(loops.DRIVES) and min(row["round_ms"].values()) > 0 for row in rows)
    assert (tmp_path / "loops.png").is_file() and "compiled loop" in capsys.readouterr().out


# Paces --------------------------------------------------------------------------------------------


@pytest.mark.sweep
def test_pace_shows_what_each_round_did(ckpt, tmp_path, capsys):
    """Every token of the answer once, whatever it came from, and no more of them drafted or copied than verified."""
    prompt = "what is what is what is it"
    evaluate(
        "pace",
        "--ckpt",
        ckpt,
        "--prompt",
        prompt,
        "--max-new-tokens",
        24,
        "--out",
        tmp_path,
        "--json",
        tmp_path / "p.json",
    )
    found = json.loads((tmp_path / "p.json").read_text())
    model = api.load(ckpt, "none")
    answer = model.generate(prompt, Request(24))
    assert found["tokens"] == len(answer.tokens) - 1 == sum(found["tokens_by_origin"].values())
    assert sum(one["tokens"] for one in found["by_round"]) == found["tokens"]
    assert all(1 <= one["tokens"] <= one["nodes"] for one in found["by_round"])
    assert (tmp_path / "pace.png").is_file() and (tmp_path / "pace.svg").is_file()
    assert f"{found['rounds']} rounds" in capsys.readouterr().out
    said = refused(capsys, "pace", "--ckpt", ckpt, "--prompt", prompt, "--max-new-tokens", 1)
    assert "give at least 2" in said
    said = refused(capsys, "pace", "--ckpt", ckpt, "--prompt", prompt, "--draft", "none")
    assert "holds no draft to watch" in said


@pytest.mark.sweep
def test_the_demo_compares_four_ways(ckpt, tmp_path, capsys):
    evaluate("demo", "--ckpt", ckpt, "--max-new-tokens", 8, "--json", tmp_path / "demo.json")
    out = " ".join(capsys.readouterr().out.split())  # as wide as the terminal of whoever runs this
    rows = json.loads((tmp_path / "demo.json").read_text())["methods"]
    assert [row["name"] for row in rows] == ["vanilla", "EAGLE-2", "FR-Spec 68", "FR-Spec 68 + 204 slots, auto"]
    assert all(row["identical_to_vanilla"] for row in rows)
    assert "FR-Spec as it comes is" in out and "with the same text" in out and "█" in out
    assert all(prompt in out for prompt in demo.PROMPTS.values())
    assert (tmp_path / "demo.png").is_file()
