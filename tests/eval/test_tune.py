"""`python -m eval tune`: the search, what it writes, and that load and generate take their defaults from there."""

from __future__ import annotations

import argparse
import json
import shutil

import jax.numpy as jnp
import pytest

from eval.__main__ import main
from eval.commands.tune import Bench, point, space_of
from eval.methods.search import Choice, Point, climb
from frspec_jax import TreeConfig, api, defaults, generate, tuned
from frspec_jax.api import Result
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.errors import UserError
from tests.support.folders import VOCAB_SIZE
from train.__main__ import main as train

SPACE = {"draft_vocab": [64, 32, 16, 8], "size": [4, 8, 16], "depth": [2, 3, 4], "top_k": [2, 4]}

FIXED = api.Draft(pace="fixed")


@pytest.fixture(scope="module")
def ckpt(toy_folder):
    return toy_folder.path


@pytest.fixture
def copy(ckpt, tmp_path):
    return shutil.copytree(ckpt, tmp_path / "copy")


def tune(*argv):
    main(["tune", *map(str, argv)])


# The search ---------------------------------------------------------------------------------------


def model_of_cost(choice: Choice) -> Point:
    """A device on which heads and nodes cost time, and a draft that deep trees help: the best is 16, 8, 3, 4."""
    gain = {2: 0.7, 3: 1.5, 4: 1.55}[choice.depth] + {2: 0.0, 4: 0.3}[choice.top_k]
    gain += {64: 0.5, 32: 0.49, 16: 0.45, 8: 0.1}[choice.draft_vocab] + {4: 0.0, 8: 0.3, 16: 0.35}.get(choice.size, 0.2)
    return Point(choice, 1 + gain, 5 + choice.depth * (1 + choice.draft_vocab / 16) + 0.2 * choice.size)


def test_the_search_finds_the_best_and_measures_nothing_twice():
    asked = []

    def measured(choice):
        asked.append(choice.setting)
        return model_of_cost(choice)

    best, points = climb(Choice(64, 4, 2, 2), SPACE, measured, lambda: None)
    every = [
        Choice(v, n, d, k)
        for v in SPACE["draft_vocab"]
        for n in SPACE["size"]
        for d in SPACE["depth"]
        for k in SPACE["top_k"]
    ]
    assert model_of_cost(best).rate == max(model_of_cost(choice).rate for choice in every)
    assert len(asked) == len(set(asked)) == len(points) < len(every)


def test_a_size_that_cannot_be_filled_is_cut():
    choice = Choice(64, 60, 2, 2)
    assert choice.tree == TreeConfig(7, 2, 2) and choice.setting == Choice(64, 7, 2, 2).setting


def test_a_point_pools_tokens_and_takes_the_median_time():
    def result(tokens, rounds, seconds):
        return Result("", [0] * tokens, 1, "stop", "eagle", 8, rounds, None, [], 1.0, seconds)

    found = point(None, [result(5, 2, 0.02), result(3, 2, 0.04), result(4, 1, 0.9), result(1, 0, 0.0)])
    assert found.accepted_length == 9 / 5 and found.round_ms == pytest.approx(20)
    assert found.rate == pytest.approx(90)
    with pytest.raises(UserError, match="one token"):
        point(None, [result(1, 0, 0.0)])


# What is kept -------------------------------------------------------------------------------------


def test_settings_are_kept_by_device_and_dtype(tmp_path, monkeypatch):
    setting = tuned.Setting(16, TreeConfig(6, 2, 3))
    assert tuned.read(tmp_path, jnp.float32) is None
    tuned.write(tmp_path, jnp.float32, setting, {"speed_up": 1.5})
    assert tuned.read(tmp_path, jnp.float32) == setting
    assert tuned.read(tmp_path, jnp.bfloat16) is None
    monkeypatch.setattr(tuned, "machine", lambda: "another machine")
    assert tuned.read(tmp_path, jnp.float32) is None
    other = tuned.Setting(8, TreeConfig(60, 6, 10))
    tuned.write(tmp_path, jnp.float32, other, {})
    assert tuned.read(tmp_path, jnp.float32) == other
    monkeypatch.undo()
    assert tuned.read(tmp_path, jnp.float32) == setting
    assert [p.name for p in tmp_path.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}', '{"format": "frspec-jax tuned 1"}'])
def test_a_damaged_file_is_one_sentence(copy, capsys, content):
    (copy / "drafts" / "eagle" / "tuned.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        generate.main(["--ckpt", str(copy), "--prompt", "hi"])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and len(captured.err.strip().splitlines()) == 1
    assert "tuned.json is damaged" in captured.err and "python -m eval tune" in captured.err


def test_a_damaged_entry(copy):
    folder = copy / "drafts" / "eagle"
    tuned.write(folder, jnp.float32, tuned.Setting(16, TreeConfig(6, 2, 3)), {})
    data = json.loads((folder / "tuned.json").read_text())
    del data["devices"][tuned.key(jnp.float32)]["tree"]["depth"]
    (folder / "tuned.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="damaged"):
        api.load(copy)


def test_load_and_generate_take_it_and_flags_win(copy, capsys):
    tuned.write(copy / "drafts" / "eagle", jnp.float32, tuned.Setting(32, TreeConfig(6, 2, 3)), {})
    model = api.load(copy, FIXED)
    assert (model.draft_vocab, model.tree) == (32, TreeConfig(6, 2, 3))
    assert api.load(copy).draft_vocab == 32  # with a pace too, whose rounds choose by themselves
    assert api.load(copy, api.Draft(vocab=64)).draft_vocab == 64
    assert api.load(copy, api.Draft(tree=TreeConfig(4, 3, 2))).tree == TreeConfig(4, 3, 2)
    assert api.load(copy, "none").draft_vocab is None

    def answered(*flags):
        generate.main(["--ckpt", str(copy), "--json", "--max-new-tokens", "8", "--prompt", "hi", *flags])
        return json.loads(capsys.readouterr().out)

    usual = answered("--pace", "fixed")
    assert usual["draft_vocab"] == 32 and len(usual["accepted_histogram"]) == 3  # depth 2
    assert len(answered("--depth", "4")["accepted_histogram"]) == 5
    assert answered("--draft-vocab", "full")["draft_vocab"] == VOCAB_SIZE
    assert answered("--draft", "none")["tokens"] == usual["tokens"]


def test_without_a_ranking_the_vocabulary_stays_full(copy):
    tuned.write(copy / "drafts" / "eagle", jnp.float32, tuned.Setting(32, TreeConfig(6, 2, 3)), {})
    (copy / "ranking.npz").unlink()
    model = api.load(copy, FIXED)
    assert (model.draft_vocab, model.tree.size) == (VOCAB_SIZE, 6)


def test_a_token_map_bounds_what_is_tried_and_what_was_tuned(copy):
    """Where the checkpoint's ranking is an order of 20 ids, no more are cropped to; a setting from before is cut."""
    (file := copy.parent / "freq_20.json").write_text(json.dumps(list(range(40, 60))))
    train(["rank", "--merge", str(file), "--ckpt", str(copy), "--force"])
    flags = argparse.Namespace(draft_vocab="full,1/4,16", tree_size="4", depth="2", draft_top_k="2")
    assert space_of(flags, Checkpoint.open(copy))["draft_vocab"] == [VOCAB_SIZE, 20, 16]
    tuned.write(copy / "drafts" / "eagle", jnp.float32, tuned.Setting(32, TreeConfig(6, 2, 3)), {})
    assert api.load(copy).draft_vocab == 20
    with pytest.raises(UserError, match=r"Draft\.vocab 32 is larger than the token map freq_20\.json"):
        api.load(copy, api.Draft(vocab=32))


# The command --------------------------------------------------------------------------------------

SMALL = (
    "--questions",
    "2",
    "--max-new-tokens",
    "8",
    "--draft-vocab",
    "full,1/4",
    "--tree-size",
    "4,6",
    "--depth",
    "2",
    "--draft-top-k",
    "2",
)


@pytest.fixture
def as_if(monkeypatch):
    """Makes the best setting as much faster than vanilla as is said: what a toy's draft brings hangs on the machine."""

    def speed_up(factor):
        measured = Bench.side_by_side

        def side_by_side(self, choices):
            rivals = measured(self, choices)
            rate = round(factor * rivals["vanilla"]["tokens_per_second"], 2)
            rivals["best"] |= {"tokens_per_second": rate, "speed_up": factor}
            rivals["before"] |= {"tokens_per_second": round(rate / 2, 2), "speed_up": factor / 2}
            return rivals

        monkeypatch.setattr(Bench, "side_by_side", side_by_side)

    return speed_up


def test_the_command_writes_setting_plots_and_figures(copy, tmp_path, capsys, as_if):
    as_if(1.25)
    tune("--ckpt", copy, *SMALL, "--json", tmp_path / "figures.json")
    folder = copy / "drafts" / "eagle"
    setting = tuned.read(folder, jnp.float32)
    figures = json.loads((tmp_path / "figures.json").read_text())
    measured = {(p["draft_vocab"], p["size"]) for p in figures["points"]}
    size = defaults.defaults().tree.size  # from the default tree on
    assert {(VOCAB_SIZE // 4, size), (VOCAB_SIZE, size)} <= measured
    assert setting is not None and setting.draft_vocab in (VOCAB_SIZE, VOCAB_SIZE // 4)
    best = figures["side_by_side"]["best"]
    assert best["tokens_per_second"] >= figures["side_by_side"]["before"]["tokens_per_second"]
    assert best["speed_up"] == pytest.approx(
        best["tokens_per_second"] / figures["side_by_side"]["vanilla"]["tokens_per_second"], abs=0.01
    )
    entry = json.loads((folder / "tuned.json").read_text())["devices"][tuned.key(jnp.float32)]
    assert entry["speed_up"] == best["speed_up"] and "jax" in entry["versions"]
    for name in ("tuned-sweeps", "tuned-trade-off"):
        assert (folder / f"{name}.png").stat().st_size > 5000
    assert "tuned.json has it" in capsys.readouterr().out
    assert api.load(copy, FIXED).tree == setting.tree


def test_where_no_tree_pays_vanilla_is_what_users_get(copy, capsys, as_if):
    """And whoever asks for a part of a draft still gets one."""
    as_if(0.976)
    tune("--ckpt", copy, *SMALL)
    out = capsys.readouterr().out
    assert "No setting beats vanilla decoding" in out and "has it: load and generate use it" not in out
    assert tuned.read(copy / "drafts" / "eagle", jnp.float32) == tuned.NO_TREE
    model = api.load(copy, FIXED)
    assert model.draft_vocab is None and model.drafting.method.name == "vanilla"
    assert api.load(copy, api.Draft(vocab=64, pace="fixed")).tree == defaults.defaults().tree
    assert api.load(copy, api.Draft(tree=TreeConfig(6, 2, 3))).draft_vocab == VOCAB_SIZE // 4
    asked = ["--ckpt", str(copy), "--json", "--max-new-tokens", "4", "--prompt", "hi", "--pace"]
    generate.main([*asked, "fixed"])
    assert json.loads(capsys.readouterr().out)["method"] == "vanilla"
    generate.main([*asked, "auto"])
    assert json.loads(capsys.readouterr().out)["method"].endswith("+auto")
    as_if(1.5)
    tune("--ckpt", copy, *SMALL)  # another measurement starts from the device's default tree
    assert api.load(copy, FIXED).draft_vocab is not None


@pytest.mark.sweep(quick=["{"])
@pytest.mark.parametrize("content", ["{", '{"format": "other"}', '{"format": "frspec-jax tuned 1", "devices": 3}'])
def test_a_damaged_file_is_replaced(copy, capsys, as_if, content):
    as_if(1.25)
    (copy / "drafts" / "eagle" / "tuned.json").write_text(content)
    tune("--ckpt", copy, *SMALL)
    assert "tuned.json is damaged" in capsys.readouterr().err
    assert tuned.read(copy / "drafts" / "eagle", jnp.float32) is not None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tree-size", "4,x"), "--tree-size 4,x"),
        (("--depth", "0"), "--depth 0"),
        (("--draft-vocab", "1/0"), "--draft-vocab '1/0'"),
        (("--draft", "absent"), "--draft absent"),
        (("--questions", "0"), "--questions 0"),
        (("--out", "/dev/null/x"), "--out /dev/null/x"),
    ],
)
def test_refusals(copy, capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        tune("--ckpt", copy, *SMALL, *flags)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and words in captured.err
    assert not (copy / "drafts" / "eagle" / "tuned.json").exists()


def test_a_checkpoint_without_a_draft(copy, capsys):
    shutil.rmtree(copy / "drafts")
    with pytest.raises(SystemExit):
        tune("--ckpt", copy)
    assert "no draft to tune" in capsys.readouterr().err
