"""What a training run says to somebody who has never started one: what is to come, how long, what to type next."""

from __future__ import annotations

import argparse
import io
import shlex

import pytest
from rich.console import Console
from rich.progress import Progress

import convert.__main__
import train.__main__
from docs.tools import commands
from tests.support.folders import checkpoint_folder
from tests.support.runs import refusal
from train import eagle, eagle3, medusa
from train.__main__ import main
from train.answers import AnswerSettings, make_store
from train.features import FeatureStore
from train.folder import _difference
from train.loop import columns, duration, percents
from train.session import plan_of
from train.settings import HELPS, RunSettings, settings_of

SMALL = ("--rows", 2, "--row", 16, "--steps", 12, "--eval-every", 6, "--warmup", 40, "--loss-vocab", 64)


@pytest.fixture
def ckpt(tmp_path):
    return checkpoint_folder(tmp_path / "toy", draft=False, ranking=False)


@pytest.mark.parametrize("module", [eagle, eagle3, medusa])
def test_every_figure_of_a_recipe_is_explained(module):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    for name in vars(module.PRESETS["default"]):
        (action,) = [action for action in parser._actions if action.dest == name]
        assert action.help.startswith(HELPS[name]) and "default: " in action.help


def settings(*flags) -> RunSettings:
    parser = argparse.ArgumentParser()
    eagle.add_arguments(parser)
    return settings_of(parser.parse_args(["corpus.txt", "--ckpt", "CKPT", *map(str, flags)]), eagle.PRESETS)


def test_what_is_to_come_is_said_at_the_start():
    (line,) = plan_of(settings(), steps_per_epoch=500, done=0)
    assert line == "2,000 steps of 4,096 tokens are to come: 8.2 M tokens, 4 times through the data"
    _, note = plan_of(settings("--steps", 30), steps_per_epoch=500, done=0)
    assert note.startswith("note: --warmup 100 is as long as the run or longer (--steps 30)")
    assert "lower --warmup" in note


def test_times_and_shares_are_for_people():
    assert [duration(x) for x in (12.3, 700, 6600)] == ["12 s", "12 min", "1 h 50 min"]
    assert percents([0.5312, 0.4]) == "53, 40 %"


def test_a_run_says_step_loss_and_time_left(ckpt, corpus, capsys):
    main([str(x) for x in ("eagle", corpus, "--ckpt", ckpt.path, "--name", "mine", *SMALL, "--accept-every", 0)])
    out, err = capsys.readouterr()
    assert "12 steps of 32 tokens are to come" in err and "note: --warmup 40 is as long as the run" in err
    assert "2 steps are left, about" in err and "; --steps sets how many there are" in err
    assert "held-out top-1 by self-fed step" in err and "[0." not in err
    assert f"next: python -m frspec_jax.generate --ckpt {ckpt.path}" in err
    assert "wrote" in out


def test_the_line_of_progress_fits_80_columns():
    """The columns of `Loop`, with the longest figures that are usual."""
    console = Console(width=80, file=io.StringIO())
    progress = Progress(*columns(), console=console)
    text = "loss 12.345  top-1 100%  12,345 tokens/s"
    progress.add_task("training", total=800_000, completed=123_456, shown=text)
    with console.capture() as shown:
        console.print(progress.get_renderable())
    (line,) = shown.get().rstrip("\n").splitlines()
    assert "123456/800000" in line and text in line and "-:--:--" in line


@pytest.mark.parametrize("flags", [("--steps", -3), ("--warmup", -1), ("--lr", -0.1)])
def test_negative_figures_are_refused(ckpt, corpus, capsys, flags):
    message = refusal(capsys, ["eagle", corpus, "--ckpt", ckpt.path, *flags])
    assert f"{flags[0]} {flags[1]} must be at least" in message


def test_another_recipe_is_named_by_its_flag():
    recipe = {"steps": 2000, "lr": 6e-4}
    assert _difference("recipe", recipe, {"steps": 30, "lr": 6e-4}) == "recipe (--steps 2000)"
    assert _difference("rows", 8, 4) == "rows (8)"


@pytest.mark.parametrize("limit", [200, 450])
def test_answers_stop_where_they_were_asked_to(ckpt, tmp_path, limit):
    """However many slots there are, the store ends within one answer of the limit; it used to end slots beyond."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{n} in the end"}}\n' for n in range(120)))
    asked = AnswerSettings(
        (prompts,), tmp_path / "store", max_new_tokens=24, capacity=128, slots=32, limit_tokens=limit
    )
    make_store(asked, ckpt)
    lengths = FeatureStore(tmp_path / "store", ckpt).lengths
    assert limit <= lengths.sum() < limit + lengths.max()


def test_what_to_type_next_can_be_typed():
    """Each command that a command ends with parses."""
    parsers = dict(commands.parsers())
    asked = [
        (train.__main__, {"command": "answers", "ckpt": "CKPT", "out": "STORE"}),
        (train.__main__, {"command": "rank", "ckpt": "CKPT", "out": None}),
        (train.__main__, {"command": "eagle", "ckpt": "a b", "name": "mine"}),
        (train.__main__, {"command": "copying", "ckpt": "CKPT"}),
        (convert.__main__, {"command": "hf", "out": "CKPT"}),
        (convert.__main__, {"command": "eagle", "target": "CKPT", "name": "eagle"}),
    ]
    for module, said in asked:
        lines = module.following(argparse.Namespace(**said))
        assert lines
        for line in lines:
            words = shlex.split(line.partition("  (")[0])[2:]
            name = words[0].removeprefix("frspec_jax.")
            name, rest = (name, words[1:]) if name in parsers else (" ".join(words[:2]), words[2:])
            parsers[name].parse_args(rest)
    assert train.__main__.following(argparse.Namespace(command="curves")) == []
    assert convert.__main__.following(argparse.Namespace(command="export")) == []
