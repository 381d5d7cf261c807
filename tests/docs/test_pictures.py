"""Pictures: each that is committed opens and shows something; reports' name model and machine, and can be read."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from eval.show import plots
from eval.show.tables import OURS, Row, Table

ROOT = Path(__file__).parents[2]
PNGS = sorted(path for place in ("docs", "results", "assets") for path in (ROOT / place).rglob("*.png"))


@pytest.mark.parametrize("path", PNGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_picture_opens_and_shows_something(path):
    with Image.open(path) as opened:
        shades = np.asarray(opened.convert("L"))
    assert min(shades.shape) >= 200 and (shades < 200).mean() > 0.005, "hardly anything is drawn"
    # Something stands in each quarter of its width: no panel is empty.
    assert all((part < 200).any() for part in np.array_split(shades, 4, axis=1))
    svg = path.with_suffix(".svg")
    if svg.is_file():
        ElementTree.parse(svg)


def row(name: str, kind: str, size: float, corpus: str, average: float) -> Row:
    return Row(name, f"{OURS}: toy", kind, size, corpus, {}, average)


ROWS = [
    row("EAGLE-2", "eagle", 1.0, "", 3.0),
    *(
        row(f"FR-Spec {n} ({corpus})", "eagle+fr", n / 1000, corpus, 3 - 0.1 * number)
        for n in (500, 250, 125, 62)
        for number, corpus in enumerate(("talk", "books"))
    ),
]
TITLE = "toy on some CPU, float32"


def test_nine_methods_are_nine_lines():
    drawn = plots.depths(TITLE, [(one, [0.5, 0.4]) for one in ROWS])
    (axis,) = drawn.axes
    styles = {(str(line.get_color()), line.get_marker(), line.get_linestyle()) for line in axis.lines}
    assert len(styles) == len(ROWS) == len(axis.lines) and axis.get_title(loc="left") == TITLE
    assert len(drawn.legends[0].get_texts()) == len(ROWS)


def test_ours_stand_out_among_the_papers():
    drawn = plots.kept(TITLE, {"ours (talk)": ROWS[::2], "ours (books)": [ROWS[0], *ROWS[1::2]]})
    assert TITLE in drawn.get_suptitle()
    for axis in drawn.axes:
        ours = [line for line in axis.lines if line.get_color() != plots.PAPER]
        assert len(ours) == 2 and all(line.get_linewidth() > 2 for line in ours) and len(axis.lines) > 6
    assert drawn.legends[0].get_texts()[0].get_text() == "ours (talk)"


def test_bars_have_the_colour_of_their_method():
    names = ["vanilla", "transformers", "EAGLE-2", "FR-Spec 250", "Medusa + FR 250"]
    drawn = plots.rates(TITLE, names, [1.0, 0.9, 1.2, 1.5, 1.4], ([0] * 5, [0] * 5), 1.0)
    (axis,) = drawn.axes
    assert [plots.hue(name) for name in names] == [plots.PLAIN, plots.PLAIN, plots.OTHER, plots.OURS, plots.OURS]
    assert axis.get_title(loc="left") == TITLE
    assert [label.get_fontweight() for label in axis.get_yticklabels()] == ["normal"] * 3 + ["bold"] * 2


def test_our_rows_are_bold_beside_the_papers():
    table = Table("x", "X", "", ("Method", "Model", "Average"), [("FR", f"{OURS}: toy", "1.5"), ("FR", "paper", "2.0")])
    assert "| **FR** | **ours: toy** | **1.5** |\n| FR | paper | 2.0 |" in table.markdown()
    assert "*" not in table.csv()
    alone = Table("x", "X", "", ("Method", "Model"), [("FR", f"{OURS}: toy")])
    assert "**" not in alone.markdown()
