"""Fixtures shared by the tests."""

import os
from pathlib import Path

import pytest

MATERIAL = Path(__file__).parent.parent / "material" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    """A real model as a GGUF file: FRSPEC_GGUF, or the demo's under material/; skips where there is none."""
    path = Path(os.environ.get("FRSPEC_GGUF") or MATERIAL)
    if not path.is_file():
        pytest.skip(f"no model at {path}; `make demo` brings one, and FRSPEC_GGUF names another")
    return path
