"""Fixtures shared by the tests."""

import os
from pathlib import Path

import pytest

from frspec_jax.checkpoint import Checkpoint

ROOT = Path(__file__).parent.parent
MATERIAL = ROOT / "material" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    """A real model as a GGUF file: FRSPEC_GGUF, or the demo's under material/; skips where there is none."""
    path = Path(os.environ.get("FRSPEC_GGUF") or MATERIAL)
    if not path.is_file():
        pytest.skip(f"no model at {path}; `make demo` brings one, and FRSPEC_GGUF names another")
    return path


@pytest.fixture(scope="session")
def real_checkpoint() -> Checkpoint:
    """The demo's checkpoint folder, with the draft and the ranking that ship; `make demo` and `make test` make it."""
    folder = ROOT / "checkpoints" / "smollm2"
    if not (folder / "drafts" / "eagle").is_dir():
        pytest.skip("checkpoints/smollm2 is not there; `make test` makes it")
    return Checkpoint.open(folder)
