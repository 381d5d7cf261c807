"""V' as a share, 1/4, is taken wherever a command takes a number of tokens."""

from __future__ import annotations

import pytest

from convert.__main__ import main as convert
from docs.tools import commands
from eval.__main__ import main as evaluate
from frspec_jax.drafting import vocab_of
from frspec_jax.errors import UserError


def test_no_flag_wants_a_whole_number():
    """argparse makes none of them a number: each is read by `vocab_of`, which takes shares."""
    flags = [
        (name, action)
        for name, parser in commands.parsers()
        for action in parser._actions
        if "--draft-vocab" in action.option_strings
    ]
    assert len(flags) > 10
    assert not [name for name, action in flags if action.type is not None]
    assert vocab_of("1/4", 272) == 68 and vocab_of(68, 272) == vocab_of("68", 272) == 68


def test_a_ranking_is_exported_at_a_share(toy_folder, tmp_path):
    pytest.importorskip("torch", reason="torch is not there: pip install -e '.[test]'")
    out = tmp_path / "out"
    convert(["export", "--ckpt", str(toy_folder.path), "--draft", "none", "--draft-vocab", "1/4", "--out", str(out)])
    assert (out / "freq_68.pt").is_file()


def test_a_share_that_is_none_is_refused(toy_folder, tmp_path, capsys):
    with pytest.raises(UserError, match=r"Draft.vocab '1/x' must be"):
        vocab_of("1/x", 272)
    with pytest.raises(SystemExit):
        evaluate(["draft-tree", "--ckpt", str(toy_folder.path), "--draft-vocab", "1/x", "--out", str(tmp_path)])
    assert "--draft-vocab '1/x' must be a number of tokens, full, or a share such as 1/4" in capsys.readouterr().err
