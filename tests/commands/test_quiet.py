"""What is nobody's business stays unsaid: no advice of transformers', no rows or names twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from eval.data.questions import TASKS
from eval.show.tables import coverage

ROOT = Path(__file__).parents[2]
# Where PyTorch is not to be found, transformers says so at each import, unless it is told not to.
WITHOUT_TORCH = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] == "torch" else real(name, *more)
sys.modules["torch"] = None
from frspec_jax.checkpoint import Checkpoint
print(Checkpoint.open(sys.argv[1]).tokenizer("the end").input_ids)
"""


def test_nobody_is_told_that_pytorch_is_missing(toy_folder):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(toy_folder.path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("["), done.stderr
    assert "PyTorch" not in done.stderr and not done.stderr.strip()


def test_a_coverage_table_says_each_thing_once():
    """With copying, without, and at both paces the same text is covered alike: one row a sub-vocabulary."""
    names = {"EAGLE-2": 1000, "EAGLE-2 + copying": 1000, "FR-Spec 250": 250, "FR-Spec 250 + copying": 250}
    shares = {1000: 1.0, 250: 0.9}
    run = SimpleNamespace(
        model="toy",
        vocabulary=1000,
        drafting=list(names),
        methods={name: {"draft_vocab": size, "kind": "eagle"} for name, size in names.items()},
        tallies={name: {TASKS[0]: SimpleNamespace(coverage=shares[size])} for name, size in names.items()},
    )
    assert [row[:2] for row in coverage(run).rows] == [("EAGLE-2", "1,000"), ("FR-Spec 250", "250")]
    run.tallies["FR-Spec 250 + copying"][TASKS[0]].coverage = 0.8  # another text
    assert len(coverage(run).rows) == 3
