"""`make gpu-check`: the script is sound, as far as a machine without a GPU can show it."""

from __future__ import annotations

import json
import lzma
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from benchmarks.gpu_check import archive, layout, prompts, report, runner
from benchmarks.gpu_check.__main__ import steps
from eval.commands import stages as by_stage
from pallas_kernels import bench
from pallas_kernels.fused_linear import cases as products

ROOT = Path(__file__).parents[2]
TINY = ["-m", "eval", "stages", "tiny"]
CHECK = ["-m", "benchmarks.gpu_check"]


# Whole parts -------------------------------------------------------------------------------------


def dry(part: str, out: Path) -> dict:
    """What a dry run of a part finds; each of its steps has to pass."""
    command = [sys.executable, *CHECK, part, "--dry", "--out", out]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    data = json.loads((out / f"{part}.json").read_text())
    outcomes = {step["step"]: step["outcome"] for step in data["steps"]}
    assert done.returncode == 0, done.stdout + done.stderr
    assert outcomes == dict.fromkeys((step.name for step in steps(part, dry=True)), "passed")
    assert data["command"] == f"python -m benchmarks.gpu_check {part} --dry" and data["date"]
    assert data["machine"].startswith("CPU") and "jax" in data["versions"]
    assert (out / "report.md").read_text().count("| passed |") == len(outcomes)
    return data["figures"]


@pytest.mark.sweep
def test_a_dry_run_of_part_1_does_every_step(tmp_path):
    found = dry("part1", tmp_path)
    assert found["bandwidth"]["gb_per_second"] > 0
    operations = ("tree_attention", "subvocab_head", "fused_linear", "rotary_append", "compaction", "best_children")
    assert {name.split(",")[0] for name in found["kernels"]} == set(operations)
    assert all(check["right"] for check in found["kernels"].values())
    assert [(row["equal"], row["of"]) for row in found["exactness"].values()] == [(3, 3)]
    for step in ("rounds", "more rounds", "4 layers", "4 layers, loops as graphs"):
        (row,) = found[step].values()
        assert row["us"] > 0 and row["floor_us"] > 0 and row["bytes"] > 0
    (profile,) = found["profile"].values()
    assert 0 < len(profile["kernels"]) <= 60 and profile["kernels"][0]["us"] >= profile["kernels"][-1]["us"]
    swept = {"tree_attention", "fused_linear"}
    assert {name.split(":")[0] for name in found["sweep"]} == swept
    assert all(case["wrong"] == [] and case["pallas_us"] > 0 for case in found["sweep"].values())
    assert {path.stem for path in (tmp_path / "kernels").rglob("*.json")} == swept
    figures = found["stages"]["stages"]
    rows = figures["rows"]
    assert [row["name"] for row in rows] == ["vanilla", "EAGLE-2"]
    stages = {stage["stage"]: stage["us"] for stage in rows[1]["stages"]}
    assert {"extend", "level: layer", "level: head, top-k", "verify: layers", "accept, compact"} < set(stages)
    assert min(stages.values()) > 0 and figures["random_weights"] is True
    by_stage.plot(figures, tmp_path)
    assert (tmp_path / "stages.png").stat().st_size > 5000


@pytest.mark.sweep
def test_a_dry_run_of_part_2_trains_a_draft_that_changes_no_token(tmp_path):
    found = dry("part2", tmp_path)
    assert found["answers"]["answer_tokens"] > 500
    assert found["draft"]["held_out"]["step"] == 4 and found["draft"]["speed"]["seconds_a_step"] > 0
    ways = found["real model"]
    assert set(ways) == {"float32, vanilla", "float32, FR-Spec, all kernels"}
    assert all(row["same_as_vanilla"] == row["answers"] == 2 and row["tokens_per_second"] > 0 for row in ways.values())
    assert {path.name for path in (tmp_path / "draft").iterdir()} == {"config.json", "model.safetensors"}
    assert (tmp_path / "ranking.npz").exists()


def test_the_bench_alone_writes_what_it_finds(tmp_path, monkeypatch):
    """`python -m pallas_kernels.bench --dry`, of one of its cases."""
    monkeypatch.setattr(bench, "cases", lambda *_: [products.timed("tiny", 10, "down", "float32")])
    bench.main(["--dry", "--json", str(tmp_path / "kernels.json")])
    found = json.loads((tmp_path / "kernels.json").read_text())
    (case,) = found["cases"]
    assert found["interpreted"] and case["wrong"] == [] and case["pallas_us"] > 0 and case["xla_us"] > 0


# Steps and their limits --------------------------------------------------------------------------


def says(session):
    session.tell("number", 1)


def fails(session):
    session.tell("number", 2)
    raise ValueError("no\ngood")


def ends(session):
    os._exit(3)


def sleeps(session):
    session.tell("number", 3)
    time.sleep(60)


@pytest.mark.sweep
def test_a_failing_step_is_reported_and_a_slow_one_stopped(tmp_path, monkeypatch):
    """What was told before stays, the next step runs all the same, and there is always a whole file."""
    monkeypatch.setattr(runner, "LEAST", 0.5)
    record = runner.Record(tmp_path / "part.json", "command")
    listed = [
        runner.Step(step.__name__, limit, f"{__name__}:{step.__name__}")
        for step, limit in ((says, 60), (fails, 60), (sleeps, 2), (ends, 60))
    ]
    given = {"out": tmp_path, "archive": tmp_path, "work": tmp_path, "dry": True}
    runner.run(listed, 120, given, record)
    runner.run([runner.Step("late", 60, "none:none")], 0.1, given, record)
    data = json.loads((tmp_path / "part.json").read_text())
    assert [step["outcome"] for step in data["steps"]] == [
        "passed",
        "failed (ValueError: no good)",
        "stopped, out of time",
        "failed (the process ended with status 3)",
        "no time left",
    ]
    assert [found.get("number") for found in data["figures"].values()] == [1, 2, 3]
    assert "ValueError" in data["figures"]["fails"]["error"]


def test_every_step_is_there_and_has_the_flags_that_are_for_a_gpu():
    for part in ("part1", "part2"):
        for dry in (False, True):
            for step in steps(part, dry):
                module, _, name = step.run.partition(":")
                text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
                assert f"\ndef {name}(session: Session) -> None:" in text
                assert not (dry and step.xla_flags)
    assert sum(bool(step.xla_flags) for step in steps("part1", dry=False)) == 1


# What is gathered --------------------------------------------------------------------------------


def test_the_halves_of_the_model_are_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(layout.tempfile, "gettempdir", lambda: str(tmp_path / "kept"))
    (tmp_path / "kept").mkdir()
    folder = tmp_path / "archive"
    for name, half in zip(layout.HALVES, (b"first ", b"second"), strict=True):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(half)
    assert layout.joined_model(folder, tmp_path, tmp_path / "model").read_bytes() == b"first second"
    layout.keep(folder)
    (folder / layout.HALVES[0]).unlink()
    assert layout.joined_model(folder, tmp_path, tmp_path / "model").read_bytes() == b"first second"
    (folder / layout.HALVES[1]).unlink()
    with pytest.raises(FileNotFoundError, match="make gpu-archive"):
        layout.joined_model(folder, tmp_path, tmp_path / "model")


def test_the_archive_says_what_it_holds_and_how_big_it_is(tmp_path, monkeypatch, capsys):
    """The registry is left alone; the code is whatever git has."""
    commands = []

    def run(command):
        commands.append(command)
        for part in command:
            if part.startswith("--output="):
                Path(part.removeprefix("--output=")).write_bytes(b"code")

    monkeypatch.setattr(archive, "_run", run)
    monkeypatch.setattr(prompts, "_of_docstrings", lambda rng: iter(()))
    model = tmp_path / "model.gguf"
    model.write_bytes(bytes(range(101)))
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": [{"role": "user", "content": "How do kites stay up?"}]}) + "\n")
    out = tmp_path / "archive"
    archive.gather(out, model, [chats])
    assert b"".join((out / half).read_bytes() for half in layout.HALVES) == model.read_bytes()
    with lzma.open(out / layout.PROMPTS, "rt") as file:
        texts = [json.loads(line)["prompt"] for line in file]
    assert "How do kites stay up?" in texts and len(texts) == len(set(texts)) > 500
    assert all(subprocess.run(["bash", "-n", out / part / "run.sh"]).returncode == 0 for part in ("part1", "part2"))
    assert ":!assets" in commands[0] and commands[-1][-1].startswith("gguf==")
    assert archive.show(out)
    said = capsys.readouterr().out
    assert "part1, all of it" in said and "part2/prompts.jsonl.xz" in said and f"{len(texts):,} prompts" in said
    monkeypatch.setattr(archive, "LIMIT", 100)
    assert not archive.show(out)


def test_prompts_are_asked_of_what_python_brings(monkeypatch):
    monkeypatch.setattr(prompts.sysconfig, "get_path", lambda name: str(Path(json.__file__).parent))  # a part of it
    texts = prompts.made([])
    assert any("JSON" in text for text in texts) and len(texts) > 500 and all(8 <= len(text) <= 1200 for text in texts)
    assert texts == prompts.made([]) and texts != prompts.made([], seed=1)


# The report --------------------------------------------------------------------------------------


def test_the_report_holds_rounds_against_the_aims():
    def row(name, round_us, times_floor, head_us):
        stages = [
            {"stage": "verify: layers", "us": 110.0, "floor_us": 100.0},
            {"stage": "verify: head", "us": 12.0, "floor_us": 10.0},
            {"stage": "level: layer", "us": 10.0, "floor_us": 8.0},
            {"stage": "level: head, top-k", "us": head_us, "floor_us": 2.0},
        ]
        return {"name": name, "round_us": round_us, "times_floor": times_floor, "stages": stages}

    assert "not measured" in report.targets(None)[0]
    rows = [
        row("vanilla", 5000.0, 1.05, 0.0),
        row("EAGLE-2", 8800.0, 1.3, 20.0),
        row("FR-Spec 32,768", 8000.0, 1.2, 6.0),
    ]
    found = [line.split(" | ")[1:] for line in report.targets({"rows": rows})[2:]]
    figures = [(float(value), line.split(": ")[-1].strip(" |")) for value, line in found]
    assert figures == [
        (1.109, "reached"),
        (1.6, "missed"),
        (1.2, "reached"),
        (8.0, "missed"),
        (1.05, "reached"),
        (1.1, "missed"),
    ]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-m", "pallas_kernels.bench"], "no GPU is in sight"),
        (["-m", "pallas_kernels.bench", "--dry", "--calls", "0"], "--calls 0 and --context 1024: give at least 1"),
        (["-m", "pallas_kernels.bench", "--dry", "--json", "/proc/no/file"], "--json /proc/no/file cannot be written"),
        (["-m", "eval", "speed", "--shapes", "tiny"], "run: python -m eval stages MODEL"),
        ([*TINY, "--rounds", "0"], "--rounds 0 and --context 512: give at least 1"),
        ([*TINY, "--context", "64", "0"], "--rounds 20 and --context 0: give at least 1"),
        ([*TINY, "--out", "/proc/no"], "--out /proc/no cannot be written"),
        ([*TINY, "--draft-vocab", "8192"], "--draft-vocab 8192: tiny has 500 tokens; give fewer, or full"),
        ([*CHECK, "part1", "--dry", "--out", "/proc/no"], "--out /proc/no cannot be made"),
        ([*CHECK, "part3"], "invalid choice: 'part3'"),
        (["-m", "benchmarks.gpu_check.archive", "--model", "no.gguf"], "--model no.gguf is no file; make gpu-archive"),
    ],
)
@pytest.mark.filterwarnings("ignore:.* found in sys.modules")
def test_what_makes_no_sense_is_refused(argv, said, monkeypatch, capsys):
    """As `python -m` runs these modules, but in this process: starting eleven takes longer than what they say."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")  # a GPU is what one of the commands asks for
    monkeypatch.setattr(sys, "argv", argv[1:])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(argv[1], run_name="__main__")
    captured = capsys.readouterr()
    assert stop.value.code == 2 and said in captured.err.replace("\n", " ") and "Traceback" not in captured.err
