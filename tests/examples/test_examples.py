"""Every example runs, as a user runs it, on a checkpoint of random weights; and the notebook does."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import shutil
import sys
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
# What each one says, at least.
SAYS = {
    "stream": ["rounds of the large model", "tokens/s", "[eagle+fr"],
    "sample": ["without a draft: the same tokens"],
    "batch": ["as alone"],
    "compare_vocabularies": ["V' =     272", "V' =      68", "V' =      17", "wrote vocabularies.png"],
    "train_a_draft": ["wrote", "[eagle+fr"],
}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    matplotlib.use("Agg")
    return tmp_path


def test_every_script_is_known_here_and_in_the_readme():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    readme = (EXAMPLES / "README.md").read_text()
    assert scripts == set(SAYS) and all(f"examples/{name}.py" in readme for name in scripts)
    assert all(len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 45 for name in scripts)


@pytest.mark.sweep(quick=["batch", "stream", "compare_vocabularies"])
@pytest.mark.parametrize("name", SAYS)
def test_an_example(name, toy_folder, desk, monkeypatch):
    ckpt, more = toy_folder.path, []
    if name == "train_a_draft":  # which adds a draft to the folder
        ckpt, more = shutil.copytree(ckpt, desk / "ckpt"), ["12000", "4"]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(ckpt), *more])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = out.getvalue()
    assert all(words in said for words in SAYS[name]) and "NOT as alone" not in said and "ANOTHER TEXT" not in said, (
        said
    )
    if name == "compare_vocabularies":
        assert (desk / "vocabularies.png").stat().st_size > 5000


def test_the_notebook(toy_folder, desk, monkeypatch):
    """Its cells in order; the assertion in the last one holds what was drawn against what a round emits."""
    (desk / "checkpoints").mkdir()
    (desk / "checkpoints" / "smollm2").symlink_to(toy_folder.path)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    book = json.loads((EXAMPLES / "draw_a_tree.ipynb").read_text())
    space: dict[str, object] = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for cell in book["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), "draw_a_tree.ipynb", "exec"), space)
    assert "this round brought:" in out.getvalue() and "accepted" in out.getvalue()
    pictures = [
        output for cell in book["cells"] for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1  # the notebook is committed with what it draws
