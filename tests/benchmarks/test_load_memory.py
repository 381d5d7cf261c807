"""What a process holds while it loads its part of a divided target: the command on a toy, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.load_memory", "--model", "tiny", *flags]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.sweep
def test_a_process_holds_its_part(tmp_path):
    """Of all of the toy's layers: what was loaded is what the arithmetic says of the whole model."""
    file = tmp_path / "figures.json"
    done = run("--layers", "2", "--tensor-parallel", "2", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["bytes"]["part"] == found["whole_model"]["part"] > 0
    assert "its part of the weights" in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--layers", "0"), "--layers 0: tiny has 2; give 1 to 2"),
        (("--tensor-parallel", "1"), "--tensor-parallel 1 divides nothing; give at least 2"),
        (("--tensor-parallel", "3"), "--tensor-parallel 3: the target's 4 heads"),
    ],
)
def test_what_makes_no_sense_is_refused(flags, said, tmp_path):
    file = tmp_path / "figures.json"
    done = run(*flags, "--json", str(file))
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not file.exists()
