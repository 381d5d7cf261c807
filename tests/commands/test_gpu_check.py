"""`make gpu-check`: the script is sound, as far as a machine without a GPU can show it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from eval.__main__ import main as evaluate
from pallas_kernels import bench

TINY = ["stages", "tiny"]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"
spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
assert spec and spec.loader
gpu_check = importlib.util.module_from_spec(spec)
sys.modules["gpu_check"] = gpu_check  # where its dataclass looks itself up
spec.loader.exec_module(gpu_check)


def test_a_dry_run_does_every_step(tmp_path):
    # The script gives its steps XLA's flags, so JAX itself is told that programs need not be fast.
    env = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, SCRIPT, "--dry", "--out", tmp_path]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    report = (tmp_path / "report.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    assert report.count("| passed |") == 3
    kernels = json.loads((tmp_path / "kernels.json").read_text())
    assert kernels["interpreted"] and len(kernels["cases"]) == 5
    assert all(case["wrong"] == [] and case["pallas_us"] > 0 for case in kernels["cases"])
    rounds = json.loads((tmp_path / "tiny-auto.json").read_text())
    assert [row["name"] for row in rounds["rows"]] == ["vanilla", "EAGLE-2"]
    stages = {stage["stage"]: stage["us"] for stage in rounds["rows"][1]["stages"]}
    assert {"extend", "level: layer", "level: head, top-k", "verify: layers", "accept, compact"} < set(stages)
    assert min(stages.values()) > 0 and rounds["random_weights"] is True
    assert (tmp_path / "tiny-auto" / "stages.png").stat().st_size > 5000


def test_a_failing_step_is_reported_and_a_slow_one_stopped(tmp_path):
    failing = gpu_check.run(gpu_check.Step("a", 60, ["-c", "raise SystemExit(3)"]), 60, tmp_path / "a.log")
    assert failing["outcome"] == "failed (exit status 3)"
    slow = gpu_check.run(gpu_check.Step("b", 6, ["-c", "import time; time.sleep(60)"]), 60, tmp_path / "b.log")
    assert slow["outcome"] == "stopped after 6 s" and slow["seconds"] < 30
    late = gpu_check.run(gpu_check.Step("c", 60, ["-c", ""]), 3, tmp_path / "c.log")
    assert late["outcome"] == "no time left"


def test_the_report_holds_rounds_against_the_aims(tmp_path):
    def row(name, round_us, times_floor, head_us):
        stages = [
            {"stage": "verify: layers", "us": 110.0, "floor_us": 100.0},
            {"stage": "verify: head", "us": 12.0, "floor_us": 10.0},
            {"stage": "level: layer", "us": 10.0, "floor_us": 8.0},
            {"stage": "level: head, top-k", "us": head_us, "floor_us": 2.0},
        ]
        return {"name": name, "round_us": round_us, "times_floor": times_floor, "stages": stages}

    assert "not measured" in gpu_check.targets(tmp_path)[0]
    rows = [
        row("vanilla", 5000.0, 1.05, 0.0),
        row("EAGLE-2", 8800.0, 1.3, 20.0),
        row("FR-Spec 32,768", 8000.0, 1.2, 6.0),
    ]
    (tmp_path / "llama3-8b-auto.json").write_text(json.dumps({"rows": rows}))
    found = [line.split(" | ")[1:] for line in gpu_check.targets(tmp_path)]
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
    ("main", "argv", "said"),
    [
        (bench.main, [], "no GPU is in sight"),
        (bench.main, ["--dry", "--calls", "0"], "--calls 0 and --context 1024: give at least 1"),
        (bench.main, ["--dry", "--json", "/proc/no/file"], "--json /proc/no/file cannot be written"),
        (evaluate, ["speed", "--shapes", "tiny"], "run: python -m eval stages MODEL"),
        (evaluate, [*TINY, "--rounds", "0"], "--rounds 0 and --context 512: give at least 1"),
        (evaluate, [*TINY, "--context", "64", "0"], "--rounds 20 and --context 0: give at least 1"),
        (evaluate, [*TINY, "--out", "/proc/no"], "--out /proc/no cannot be written"),
        (evaluate, [*TINY, "--draft-vocab", "8192"], "--draft-vocab 8192: tiny has 500 tokens; give fewer, or full"),
    ],
)
def test_what_makes_no_sense_is_refused(main, argv, said, monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")  # a GPU is what one of the commands asks for
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err.replace("\n", " ") and "Traceback" not in err


def test_a_folder_that_cannot_be_made_is_refused():
    """As a user starts the script: no traceback."""
    done = subprocess.run([sys.executable, SCRIPT, "--dry", "--out", "/proc/no"], capture_output=True, text=True)
    assert done.returncode == 2 and "--out /proc/no cannot be made" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
