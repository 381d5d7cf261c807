"""A user's mistakes: one sentence that names the flag or file, exit status 2, nothing on standard output."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from frspec_jax import generate
from frspec_jax.vocabulary import Ranking, tokenizer_hash
from tests.support.folders import VOCAB_SIZE, checkpoint_folder, tokenizer


@pytest.fixture(scope="module")
def ckpt(toy_folder):
    return toy_folder.path


def copy(ckpt, tmp_path):
    return shutil.copytree(ckpt, tmp_path / "copy")


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        generate.main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


HI = ("--prompt", "hi")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--temperature", "-1"), "--temperature -1.0"),
        (("--top-k", "-1"), "--top-k -1"),
        (("--top-p", "0"), "--top-p 0.0"),
        (("--max-new-tokens", "0"), "--max-new-tokens 0"),
        (("--draft-vocab", str(VOCAB_SIZE + 1)), f"--draft-vocab {VOCAB_SIZE + 1} is larger than the vocabulary"),
        (("--draft-vocab", "many"), "--draft-vocab many"),
        (("--draft-vocab", "2"), "--draft-vocab 2 is too small"),
        (("--draft-vocab", "0"), "--draft-vocab 0"),
        (("--tree-size", "300", "--draft-top-k", "20"), "--tree-size 300 is out of range"),
        (("--tree-size", "60", "--depth", "2", "--draft-top-k", "2"), "--tree-size 60 asks for more nodes"),
        (("--tree-size", "0"), "--tree-size 0"),
        (("--depth", "-1"), "--depth -1"),
        (("--depth", "0", "--tree-size", "8"), "--tree-size 1 goes with --depth 0"),
        (("--context", "0"), "--context 0"),
        (("--context", "5000"), "--context 5000"),
        (("--draft", "absent"), "--draft absent"),
        (("--draft", "none", "--draft-vocab", "32"), "--draft-vocab 32 needs a draft"),
        (("--context-slots", "-1"), "--context-slots -1 must be a whole number from 0"),
        (("--draft", "none", "--context-slots", "8"), "--context-slots 8 needs a draft"),
        (("--draft", "none", "--copying", "on", "--pace", "fixed"), "--copying on with a fixed pace needs a draft"),
        (("--raw", "--system", "be kind"), "--system"),
    ],
)
def test_flags(ckpt, capsys, flags, words):
    assert words in refused(capsys, "--ckpt", ckpt, *HI, *flags)


def test_prompts(ckpt, capsys, tmp_path):
    assert "empty" in refused(capsys, "--ckpt", ckpt, "--prompt", " \n")
    assert "--context 200" in refused(capsys, "--ckpt", ckpt, "--context", "200", "--prompt", "word " * 200)
    assert "cannot be read" in refused(capsys, "--ckpt", ckpt, "--prompt-file", tmp_path / "absent.txt")
    file = tmp_path / "prompts.jsonl"
    for line, words in (
        ("{", "not JSON"),
        ('{"text": 1}', '"prompt"'),
        ('{"messages": [{"role": "user"}]}', '"messages"'),
    ):
        file.write_text('{"prompt": "hi"}\n' + line + "\n")
        message = refused(capsys, "--ckpt", ckpt, "--prompt-file", file)
        assert "line 2" in message and words in message
    file.write_text("\n")
    assert "holds no prompt" in refused(capsys, "--ckpt", ckpt, "--prompt-file", file)
    # A prompt that does not fit is refused before the others are answered.
    file.write_text('{"prompt": "hi"}\n' + json.dumps({"prompt": "word " * 400}) + "\n")
    assert "--context" in refused(capsys, "--ckpt", ckpt, "--context", "256", "--prompt-file", file)


def test_checkpoints_that_are_none(ckpt, capsys, tmp_path):
    assert "is no folder" in refused(capsys, "--ckpt", tmp_path / "absent", *HI)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(capsys, "--ckpt", tmp_path / "empty", *HI)
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    assert f"python -m convert gguf {gguf}" in refused(capsys, "--ckpt", gguf, *HI)
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert f"python -m convert hf {hf}" in refused(capsys, "--ckpt", hf, *HI)


def test_damaged_checkpoints(ckpt, capsys, tmp_path):
    broken = copy(ckpt, tmp_path)
    (broken / "config.json").write_text('{"format": "frspec-jax 1"')
    assert "cannot be read" in refused(capsys, "--ckpt", broken, *HI)
    shutil.copy(ckpt / "config.json", broken / "config.json")
    for file in sorted((broken / "params").rglob("*"), reverse=True):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:100])
    assert "damaged or incomplete" in refused(capsys, "--ckpt", broken, *HI)
    shutil.rmtree(broken / "params")
    assert "damaged or incomplete" in refused(capsys, "--ckpt", broken, *HI)


def test_a_damaged_tokenizer(ckpt, capsys, tmp_path):
    broken = copy(ckpt, tmp_path)
    (broken / "tokenizer.json").write_text((ckpt / "tokenizer.json").read_text()[:200])
    assert "tokenizer.json is damaged" in refused(capsys, "--ckpt", broken, *HI)
    (broken / "tokenizer.json").unlink()
    assert "no tokenizer.json" in refused(capsys, "--ckpt", broken, *HI)


def test_a_ranking_of_another_tokenizer(ckpt, capsys, tmp_path):
    other = copy(ckpt, tmp_path)
    Ranking(np.ones(VOCAB_SIZE, np.int64), tokenizer_hash(tokenizer("x")), ("t",)).save(other / "ranking.npz")
    assert "another tokenizer" in refused(capsys, "--ckpt", other, *HI)
    (other / "ranking.npz").write_bytes((ckpt / "ranking.npz").read_bytes()[:50])
    assert "damaged" in refused(capsys, "--ckpt", other, *HI)
    (other / "ranking.npz").unlink()
    assert "python -m train rank" in refused(capsys, "--ckpt", other, "--draft-vocab", "64", *HI)


def test_a_draft_of_another_target(ckpt, capsys, tmp_path):
    other = checkpoint_folder(tmp_path / "other", seed=7).path
    message = refused(capsys, "--ckpt", ckpt, "--draft", other / "drafts" / "eagle", *HI)
    assert "another target" in message


def test_several_drafts_of_which_none_is_the_first_must_be_told_apart(ckpt, capsys, tmp_path):
    both = copy(ckpt, tmp_path)
    (both / "drafts" / "eagle").rename(both / "drafts" / "one")
    shutil.copytree(both / "drafts" / "one", both / "drafts" / "second")
    assert "holds the drafts one, second; choose one with --draft" in refused(capsys, "--ckpt", both, *HI)
    assert "(" in (told := refused(capsys, "--ckpt", both, "--draft", "x", *HI)) and "one, second" in told


def test_the_command_itself(ckpt):
    """As a user types it: no traceback, and status 2."""
    done = subprocess.run(
        [sys.executable, "-m", "frspec_jax.generate", "--ckpt", str(ckpt), "--prompt", "hi", "--temperature", "-2"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --temperature -2.0") and len(done.stderr.splitlines()) == 1
