"""`python -m eval report`: what is made of records, and that the paper's figures stand where they belong."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest

from eval.__main__ import main
from eval.data.questions import TASKS
from eval.show import plots, tables, tallies
from eval.show.tallies import Run, acceptance_by_depth, speed_ups, tally
from frspec_jax.errors import UserError
from frspec_jax.locks import folder_lock


def answer(emitted, rounds, seconds, **more):
    return {"emitted": emitted, "first": 1, "rounds": rounds, "prefill_seconds": 0.5, "decode_seconds": seconds, **more}


def line(task, number, turns, repeat=0):
    return {
        "question": f"{task}/{number}",
        "task": task,
        "repeat": repeat,
        "turns": [{"prompt_tokens": 4, "methods": methods} for methods in turns],
    }


def methods(tokens, seconds, histogram, covered, **more):
    """Vanilla at 10 tokens/s, and a draft that takes `seconds`."""
    mine = {"histogram": histogram, "covered": covered, **more}
    return {
        "vanilla": answer(tokens, tokens - 1, (tokens - 1) / 10, tokens=[1] * tokens),
        "EAGLE-2": answer(tokens, sum(histogram), seconds, **(mine | {"covered": tokens})),
        "FR-Spec 16": answer(tokens, sum(histogram), seconds / 2, **mine),
    }


LINES = [
    line("QA", 1, [methods(7, 0.5, [0, 0, 2], 6)]),
    line("QA", 2, [methods(5, 0.5, [2, 1, 0], 5)]),
    line("Conv", 81, [methods(4, 0.2, [0, 0, 1], 4), methods(3, 0.1, [2, 0, 0], 0, parted={"at": 1, "gap": 2e-4})]),
    line("Code", 0, [methods(3, 0.1, [0, 1, 0], 3, parted={"at": 2, "gap": 0.5})]),
]
TREE = {"size": 8, "depth": 2, "top_k": 4}
MANIFEST = {
    "format": "frspec-jax run 1",
    "kind": "run",
    "checkpoint": {"name": "toy", "fingerprint": "f", "vocabulary": 64},
    "methods": {
        "vanilla": {"kind": "vanilla", "draft_vocab": None, "tree": {"size": 1, "depth": 0, "top_k": 1}, "weights": ""},
        "EAGLE-2": {"kind": "eagle", "draft_vocab": 64, "tree": TREE, "weights": ""},
        "FR-Spec 16": {"kind": "eagle+fr", "draft_vocab": 16, "tree": TREE, "weights": ""},
    },
    "rankings": {"ranking": {"corpora": ["a.txt"], "tokens": 1000, "digest": ""}},
    "dtype": "float32",
    "--max-new-tokens": 8,
    "--temperature": 0.0,
    "--seed": 0,
    "--repeats": 1,
    "machine": "a machine",
    "versions": {"jax": "0"},
    "questions": {"asked": 5, "too long": 1, "tasks": {"QA": 2, "Conv": 1, "Code": 2}, "digest": ""},
}


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "run", MANIFEST, LINES)


def write(folder, manifest, lines):
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def report(*argv):
    main(["report", *map(str, argv)])


def test_lengths_and_rates_are_pooled():
    whole = tally(LINES, "FR-Spec 16")
    assert whole.accepted_length == pytest.approx((6 + 4 + 3 + 2 + 2) / (2 + 3 + 1 + 2 + 1))
    assert whole.decode_rate == pytest.approx(17 / 0.7)
    assert whole.whole_rate == pytest.approx(22 / (0.7 + 5 * 0.5))
    assert whole.coverage == pytest.approx(18 / 22)
    assert whole.identity(1e-3) == (3, 1, 1)
    assert whole.identity(1.0) == (3, 2, 0)
    assert whole.histogram.tolist() == [4, 2, 3]
    assert tally(LINES, "vanilla").accepted_length == 1


def test_acceptance_by_depth():
    assert acceptance_by_depth(np.array([4, 2, 3])) == pytest.approx([5 / 9, 3 / 5])
    assert acceptance_by_depth(np.array([4, 0, 0])) == [0, 0]


def test_speed_ups_and_their_intervals(folder):
    run = Run.read(folder)
    found = speed_ups(run.tallies["FR-Spec 16"], run.tallies["vanilla"])
    qa = found["QA"]
    assert qa.value == pytest.approx((10 / 0.5) / 10)
    # Two questions at 24 and 16 tokens/s: the interval spans what resampling them can give.
    assert (qa.low, qa.high) == pytest.approx((1.6, 2.4))
    assert found["Code"].low == found["Code"].high == found["Code"].value and str(found["Code"]) == "4.00"
    mean = np.mean([run.tallies["FR-Spec 16"][task].decode_rate for task in run.tasks])
    assert found["Average"].value == pytest.approx(mean / 10)
    same = speed_ups(run.tallies["vanilla"], run.tallies["vanilla"])
    assert all((x.value, x.low, x.high) == pytest.approx((1, 1, 1)) for x in same.values())


def test_repeats(tmp_path):
    again = [line("QA", 1, [methods(7, 1.0, [0, 0, 2], 6)], repeat=1)]
    run = Run.read(write(tmp_path / "run", MANIFEST | {"--repeats": 2}, LINES + again))
    assert run.rates_by_repeat("EAGLE-2") == pytest.approx([6 / 0.5, 6 / 1.0])
    assert run.tallies["EAGLE-2"]["QA"].decode_rate == pytest.approx(16 / 2.0)


def cells(folder, name):
    with (folder / "report" / "run" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_report_holds_ours_and_the_papers(folder, capsys):
    report(folder)
    assert "report.md" in capsys.readouterr().out
    out = folder / "report"
    page = (out / "report.md").read_text()
    for name in ("accepted_length_by_vocabulary", "run-tokens_per_second", "run-acceptance_by_depth"):
        assert f"({name}.png)" in page
        assert (out / f"{name}.png").stat().st_size > 5000 and "</svg>" in (out / f"{name}.svg").read_text()
    assert "4 of 5 answered" in page and "1 too long for the context" in page
    rows = cells(folder, "accepted_length")
    ours = next(row for row in rows if row["Configuration"] == "FR-Spec 16")
    assert (ours["QA"], ours["Conv"], ours["Code"], ours["MT"]) == ("2.00", "1.67", "2.00", tables.NOTHING)
    assert ours["% of full"] == "100.0%"
    # 16 of 64 is a quarter: the paper's quarter, 32k of 128k, follows it directly.
    following = rows[rows.index(ours) + 1]
    assert following["Configuration"] == "+FR 32k (ShareGPT)" and following["Average"] == "3.57"
    assert following["% of full"] == "91.8%" and following["Code"] == "3.62"
    # The mean of 10 (QA), 16.67 (Conv) and 20 tokens/s (Code), over vanilla's 10.
    speeds = cells(folder, "decoding_speed")
    assert [row["× vanilla"] for row in speeds if row["Model"] == "ours: toy"] == ["1.00×", "1.56×", "3.11×"]
    medusa = next(row for row in speeds if row["Method"] == "Medusa +FR 32k")
    assert (medusa["Average"], medusa["× vanilla"]) == ("156.39", "1.76×")
    identity = cells(folder, "identity")
    assert [identity[1][key] for key in ("identical", "parted at a near-tie", "different")] == ["3", "1", "1"]
    assert cells(folder, "coverage")[1]["Conv"] == "57.1%"
    assert cells(folder, "acceptance_by_depth")[1]["depth 2"] == "60.0%"


def test_the_same_records_give_the_same_files(folder, tmp_path):
    report(folder, "--out", tmp_path / "a")
    report(folder, "--out", tmp_path / "b")
    for file in (tmp_path / "a").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes(), file


def test_several_runs_and_a_temperature(folder, tmp_path):
    warm = write(tmp_path / "warm", MANIFEST | {"--temperature": 1.0, "--seed": 5}, LINES)
    report(folder, warm, "--out", tmp_path / "both", "--tie", "1")
    page = (tmp_path / "both" / "report.md").read_text()
    assert "## run" in page and "## warm" in page and "temperature 1, seed 5" in page
    warm_rows = (tmp_path / "both" / "warm" / "decoding_speed.csv").read_text()
    assert "Table 3" in warm_rows and "Table 2" not in warm_rows and "212.08" in warm_rows
    assert "4,2,0" not in warm_rows and ",3,2,0" in (tmp_path / "both" / "warm" / "identity.csv").read_text()


def test_a_peer_has_a_row(tmp_path):
    lines = json.loads(json.dumps(LINES))
    for row in lines:
        for turn in row["turns"]:
            turn["methods"]["transformers"] = turn["methods"]["vanilla"]
    run = Run.read(write(tmp_path / "run", MANIFEST | {"--peer": "x"}, lines))
    table = tables.decoding_speed(run)
    assert table.rows[0][0] == "transformers" and table.rows[0][-1] == "1.00×"
    assert run.drafting == ["EAGLE-2", "FR-Spec 16"]


def test_a_run_that_is_not_finished(tmp_path):
    folder = write(tmp_path / "run", MANIFEST, LINES[:1])
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"question": "Conv/81", "ta')
    report(folder)
    assert cells(folder, "accepted_length")[0]["QA"] == "3.00"


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        report(*argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and len(captured.err.strip().splitlines()) == 1
    return captured.err


def test_refusals(folder, tmp_path, capsys):
    assert "no manifest.json" in refused(capsys, tmp_path)
    empty = write(tmp_path / "empty", MANIFEST, [])
    assert "no answered question yet" in refused(capsys, empty)
    assert "no run of python -m eval run" in refused(
        capsys, write(tmp_path / "q", MANIFEST | {"kind": "quality"}, LINES)
    )
    other = tmp_path / "other"
    other.mkdir()
    shutil.copytree(folder, other / "run")
    assert "two runs are called run" in refused(capsys, folder, other / "run")
    (tmp_path / "file").write_text("")
    assert "--out" in refused(capsys, folder, "--out", tmp_path / "file" / "x")


def test_two_do_not_write_one_report(folder, capsys):
    report(folder)
    before = {file: file.read_bytes() for file in (folder / "report").rglob("*.*")}
    capsys.readouterr()
    with folder_lock(folder / "report"):
        assert "is being written by" in refused(capsys, folder, "--tie", "5")
        assert {file: file.read_bytes() for file in before} == before
    report(folder, "--tie", "5")
    assert {file: file.read_bytes() for file in before} != before


# The paper's figures ------------------------------------------------------------------------------


def test_the_papers_figures_agree_with_their_averages():
    """A digit that was copied wrongly would part a row from the average that the paper prints."""
    found = tables.paper()["tables"]
    assert [table["table"] for table in found] == [1, 2, 3, 5, 6, 7, 8]
    for table in found:
        for row in table["rows"]:
            assert list(row["values"]) == list(TASKS)
            tolerance = 0.02 if table["measure"] == "accepted_length" else 0.02 * row["average"]
            assert np.mean([*row["values"].values()]) == pytest.approx(row["average"], abs=tolerance), (table, row)
            if "percent" in row:
                full = table["rows"][0]["average"]
                assert 100 * row["average"] / full == pytest.approx(row["percent"], abs=0.35)


@pytest.mark.parametrize(
    ("size", "vocabulary", "share"),
    [
        (65536, 128256, 2),
        (65536, 151936, 2),
        (8192, 128256, 16),
        (8192, 151936, 16),
        (12288, 49152, 4),
        (128256, 128256, 1),
    ],
)
def test_shares(size, vocabulary, share):
    assert tables.share_of(size / vocabulary) == share


def test_copying_has_a_full_vocabulary_of_its_own(tmp_path):
    """A cropped vocabulary that copies is held against the whole one that copies."""
    copies = {"EAGLE-2 + copying": "EAGLE-2", "FR-Spec 16 + copying": "FR-Spec 16"}
    facts = MANIFEST["methods"]
    more = {new: facts[old] | {"kind": facts[old]["kind"] + "+copying"} for new, old in copies.items()}
    lines = [
        json.loads(
            json.dumps(record), object_hook=lambda x: x | {new: x[old] for new, old in copies.items() if old in x}
        )
        for record in LINES
    ]
    run = Run.read(write(tmp_path / "run", MANIFEST | {"methods": facts | more}, lines))
    rows = [row for row in tables.accepted_length(run).rows if row[1].startswith(tables.OURS)]
    assert [row[0] for row in rows] == ["EAGLE-2", "FR-Spec 16", *copies]
    assert [row[-1] for row in rows[:2]] == [row[-1] for row in rows[2:]] and rows[2][-1] == "100.0%"
    ours = tables.our_rows(run, run.drafting, lambda part: part.accepted_length)
    assert sorted(tables.curves(ours)) == [f"{tables.OURS}: toy EAGLE-2", f"{tables.OURS}: toy EAGLE-2 + copying"]


def test_curves_start_with_the_full_vocabulary():
    found = tables.curves(tables.paper_rows("accepted_length", 0))
    line = found["paper, Table 7: Llama-3.2-1B EAGLE-2 (SlimPajama)"]
    assert [row.average for row in line] == [2.81, 2.77, 2.69, 2.60, 2.49]
    assert len(found) == 6


def test_a_plot_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"out .* cannot be written"):
        plots.save(plots.figure()[0], tmp_path / "file", "x")
    assert tallies.NEAR_TIE["float32"] < tallies.NEAR_TIE["bfloat16"]
