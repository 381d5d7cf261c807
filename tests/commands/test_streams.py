"""What comes in and goes out: text that is none, closed streams, full disks, interruptions, names in brackets."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval.__main__ import COMMANDS
from frspec_jax import api
from frspec_jax.commands import dispatch, results_console
from frspec_jax.errors import UserError, in_python
from frspec_jax.vocabulary import Ranking

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ckpt(toy_folder):
    return toy_folder.path


def generate(ckpt, *flags, shell="", **how):
    """`python -m frspec_jax.generate`, with redirections as a shell writes them; what drafts is of no account."""
    command = [sys.executable, "-m", "frspec_jax.generate", "--ckpt", str(ckpt), "--draft", "none"]
    command += ["--max-new-tokens", "12", *flags]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    return subprocess.run(command, cwd=ROOT, capture_output=True, **how)


def one_sentence(done, *words):
    err = done.stderr.decode()
    (line,) = [line for line in err.splitlines() if line.strip()]
    assert done.returncode == 2 and line.startswith("error: ") and all(word in line for word in words), err


def test_input_that_is_no_text(ckpt):
    one_sentence(generate(ckpt, input=b"caf\xe9"), "standard input is not UTF-8")
    one_sentence(generate(ckpt, b"--prompt", b"caf\xe9"), "--prompt is not UTF-8")
    one_sentence(generate(ckpt, "--prompt", "caf\udce9"), "--prompt is not UTF-8")
    one_sentence(generate(ckpt, shell="<&-"), "standard input is closed")


@pytest.mark.sweep
def test_output_that_cannot_be_written(ckpt):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    one_sentence(generate(ckpt, "--prompt", "hi", shell=">/dev/full"), "cannot be written", "No space left")
    one_sentence(generate(ckpt, "--prompt", "hi", "--json", shell=">/dev/full"), "cannot be written")


@pytest.mark.sweep
def test_a_reader_that_goes_away_is_no_error(ckpt):
    done = generate(ckpt, "--prompt", "hi", shell="| true")
    assert done.returncode == 0 and b"Traceback" not in done.stderr


@pytest.mark.sweep
def test_characters_that_the_terminal_lacks_are_escaped(ckpt):
    """The toy's text is of many bytes that are no character."""
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = generate(ckpt, "--prompt", "wörd ✓", "--temperature", "2", "--max-new-tokens", "40", env=env)
    assert done.returncode == 0 and b"\\ufffd" in done.stdout, done.stderr


def test_a_platform_that_is_not_there(ckpt):
    env = {**os.environ, "JAX_PLATFORMS": "cuda"}
    one_sentence(generate(ckpt, "--prompt", "hi", env=env), "JAX_PLATFORMS=cuda", "not there")


@pytest.mark.sweep
def test_ctrl_c_while_weights_are_read(ckpt):
    """At some moment of loading, whichever: never that the checkpoint is damaged."""
    for wait in (1.0, 1.6, 2.2):
        command = [
            sys.executable,
            "-m",
            "frspec_jax.generate",
            "--ckpt",
            str(ckpt),
            "--prompt",
            "hi",
            "--max-new-tokens",
            "900",
            "--context",
            "1000",
        ]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
        assert b"damaged" not in err
        assert process.returncode in (130, 0, 1, -signal.SIGINT), err  # 1, -2: before main() began, or after it ended


def test_brackets_in_names_are_no_markup(capsys):
    from rich.table import Table

    table = Table("[mine]", title="[bold]a draft[/bold]")
    table.add_row("EAGLE-2 [/mine], which is long enough for the title")
    results_console().print(table)
    out = capsys.readouterr().out
    assert "[mine]" in out and "[bold]a draft[/bold]" in out and "EAGLE-2 [/mine]" in out


def evaluated(*argv):
    dispatch("eval", "", COMMANDS, [str(a) for a in argv], home="eval.commands")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("speed", "--max-new-tokens", "1"), "--max-new-tokens 1: the first is the prompt's; give at least 2"),
        (("run", "--out", ""), "--out is empty; name a folder"),
        (("run", "--out", "{tmp}/run", "--ranking", "/nope", "--draft-vocab", "full"), "--ranking /nope is no file"),
        (("accept", "--ranking", "/nope", "--draft-vocab", "full"), "--ranking /nope is no file"),
    ],
)
def test_evaluations_refuse_what_they_cannot_measure(ckpt, tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        evaluated(argv[0], "--ckpt", ckpt, *(a.format(tmp=tmp_path) for a in argv[1:]))
    captured = capsys.readouterr()
    assert stop.value.code == 2 and words in captured.err and captured.out == "" and not list(tmp_path.iterdir())


def test_a_sentence_has_flags_on_the_command_line_and_arguments_in_python():
    error = UserError("--draft-vocab 5 is larger than --max-new-tokens; run: python -m train rank X --ckpt C")
    assert str(error) == "Draft.vocab 5 is larger than max_new_tokens; run: python -m train rank X --ckpt C"
    assert error.on_the_command_line.startswith("--draft-vocab 5")
    assert in_python("a - b -- c, a--b and --x") == "a - b -- c, a--b and x"


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("--ckpt '/a --depth b' is no folder; give --depth", "ckpt '/a --depth b' is no folder; give Draft.depth"),
        ('--ckpt "/it\'s --depth" and --depth', 'ckpt "/it\'s --depth" and Draft.depth'),
        ("the draft's --depth is the target's --depth", "the draft's Draft.depth is the target's Draft.depth"),
        ("the drafts' --depth, all the others' too", "the drafts' Draft.depth, all the others' too"),
        ("'python -m --x' is not --x; run: python -m a 'b' --x", "'python -m --x' is not x; run: python -m a 'b' --x"),
    ],
)
def test_what_is_quoted_in_a_sentence_stays_as_it_is(said, heard):
    assert in_python(said) == heard.replace("Draft.depth", "TreeConfig.depth")


@pytest.mark.parametrize("name", ["my --depth folder", "it's --depth", 'say "--depth" now', "plain--depth"])
def test_errors_in_python_quote_paths_with_spaces_and_leave_them_alone(name, tmp_path):
    """And so a command that is to be typed can be: a shell reads the path as one."""
    path = tmp_path / name
    for ask in (lambda: api.load(path), lambda: Ranking.load(path), lambda: Ranking.read(path / "a --b.pt", "t", 5)):
        with pytest.raises(UserError) as refused:
            ask()
        assert any(word.startswith(str(path)) for word in shlex.split(str(refused.value).split(";")[0]))
        assert "TreeConfig" not in str(refused.value)
    (path / "config.json").parent.mkdir()
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UserError, match="run: python -m convert hf ") as refused:
        api.load(path)
    command = shlex.split(str(refused.value).partition("run: ")[2])
    assert command == ["python", "-m", "convert", "hf", str(path), "--out", f"{name}-jax"]
