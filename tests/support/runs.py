"""What the tests of training runs share: a corpus, and `python -m train` run in process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from frspec_jax.checkpoint import Checkpoint
from train.__main__ import main


def chats(file: Path) -> Path:
    """42 short conversations, of which the 30th, the 38th and the 41st are held out."""
    rng = np.random.default_rng(0)
    with open(file, "w") as out:
        for number in range(42):
            said = "".join(rng.choice(list("thean in"), 12))
            turns = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": said}]
            out.write(json.dumps({"messages": turns}) + "\n")
    return file


def drafted(ckpt: Checkpoint, name: str) -> tuple[Any, Any]:
    """The config and the weights of a draft that a run has left."""
    return ckpt.draft(ckpt.draft_folder(name))


def same(a: Any, b: Any) -> bool:
    """Whether two pytrees of arrays are equal, bit for bit."""
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def refusal(capsys: pytest.CaptureFixture[str], argv: list[Any]) -> str:
    """The one sentence by which `python -m train ARGV` refuses (stderr may hold a progress bar besides)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line
