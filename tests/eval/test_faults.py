"""What users of `python -m eval` got wrong, and what befell them: one sentence each, and nothing lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.table import Table

from eval.__main__ import main
from eval.commands import tune
from eval.runs import records
from eval.show import plots, tables
from eval.show.tallies import Run
from frspec_jax import TreeConfig, api, tuned
from frspec_jax.commands import results_console
from frspec_jax.errors import UserError
from frspec_jax.vocabulary import Ranking
from tests.eval.test_report import LINES, MANIFEST, answer, line, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ckpt(toy_folder):
    return toy_folder.path


@pytest.fixture
def copy(ckpt, tmp_path):
    return shutil.copytree(ckpt, tmp_path / "copy")


def refused(capsys, *argv) -> str:
    """The one sentence by which a command refuses (stderr may hold a progress bar besides)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(arg) for arg in argv])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and "Traceback" not in err
    (said,) = [said for said in err.splitlines() if said.startswith("error: ")]
    return said


# Flags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["accept", "demo", "loops", "speed", "tune"])
def test_one_token_is_no_decoding(command, ckpt, tmp_path, capsys):
    out = ("--out", tmp_path / "out") if command == "loops" else ()
    said = refused(capsys, command, "--ckpt", ckpt, "--max-new-tokens", "1", *out)
    assert said == "error: --max-new-tokens 1: the first is the prompt's; give at least 2"


@pytest.mark.parametrize("command", ["run", "quality"])
@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_out_is_no_folder(command, text, ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, command, "--ckpt", ckpt, "--out", text, "--data", tmp_path)
    assert said == "error: --out is empty; name a folder"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["accept", "run"])
def test_a_ranking_is_read_even_where_the_vocabulary_is_full(command, ckpt, tmp_path, capsys):
    out = ("--out", tmp_path / "run") if command == "run" else ()
    argv = (command, "--ckpt", ckpt, "--draft-vocab", "full", *out, "--ranking")
    assert "--ranking /nope is no file" in refused(capsys, *argv, "/nope")
    (tmp_path / "text.npz").write_text("no archive")
    assert "text.npz is no ranking or is damaged" in refused(capsys, *argv, tmp_path / "text.npz")
    Ranking(np.arange(9), "another", ()).save(tmp_path / "other.npz")
    assert "other.npz was counted with a vocabulary of 9 ids" in refused(capsys, *argv, tmp_path / "other.npz")
    assert not (tmp_path / "run").exists()


def test_only_a_fixed_pace_is_replayed(ckpt, capsys):
    said = refused(capsys, "accept", "--ckpt", ckpt, "--replay", "--pace", "both")
    assert said == "error: --replay grows the same tree in every round, and --pace both does not; drop one"


@pytest.mark.parametrize("slots", ["many", "8,", "-1"])
def test_slots_are_numbers(slots, ckpt, capsys):
    said = refused(capsys, "accept", "--ckpt", ckpt, f"--context-slots={slots}")
    assert said == f"error: --context-slots {slots} must be whole numbers from 0 (none), such as 0,256,512"


@pytest.mark.parametrize("flags", [["--shapes"], ["--shapes", "tiny"], ["--random-weights", "--shapes", "tiny"]])
def test_speed_names_the_command_that_shapes_became(flags, capsys):
    assert refused(capsys, "speed", *flags).endswith("run: python -m eval stages MODEL")


@pytest.mark.parametrize("command", [["speed"], ["tune"], ["stages", "tiny"]])
def test_a_device_that_is_not_there(command, ckpt):
    where = [] if command[0] == "stages" else ["--ckpt", str(ckpt)]
    env = {**os.environ, "JAX_PLATFORMS": "nosuchdevice", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "eval", *command, *where], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: JAX_PLATFORMS=nosuchdevice names a device that is not there" in done.stderr


# Names --------------------------------------------------------------------------------------------


def test_brackets_in_a_table_are_brackets(capsys):
    table = Table("[mine]", title="[bold]title[/bold]")
    table.add_row("[red]row")
    table.add_row("[/] closes nothing")
    results_console().print(table)
    said = capsys.readouterr().out
    assert all(text in said for text in ("[mine]", "[bold]title[/bold]", "[red]row", "[/] closes nothing"))


def test_a_draft_in_brackets_is_shown_by_its_name(copy, tmp_path, capsys):
    shutil.copytree(copy / "drafts" / "eagle", copy / "drafts" / "[mine]")
    main(
        [
            "accept",
            "--ckpt",
            str(copy),
            "--draft",
            "eagle,[mine]",
            "--draft-vocab",
            "full",
            "--questions",
            "1",
            "--max-new-tokens",
            "4",
        ]
    )
    assert "EAGLE-2 [[mine]]" in capsys.readouterr().out


def test_a_name_is_no_mathematics_and_parts_no_cells(tmp_path):
    drawn, (axis,) = plots.figure()
    plots.bars(axis, [r"$\nonsense$", "US$ and A$"], [1, 2])
    plots.save(drawn, tmp_path, "names")
    assert r"$\nonsense$" in (tmp_path / "names.svg").read_text()
    written = tables.Table("t", "", "", ("a|b", "c"), [("d", "e|f")]).markdown()
    assert r"| a\|b | c |" in written and r"| d | e\|f |" in written


# Reports ------------------------------------------------------------------------------------------


def single(task, number):
    """A question whose answers are a stop id each."""
    drafts = answer(1, 0, 0.0, histogram=[0, 0, 0], covered=1)
    return line(task, number, [{"vanilla": answer(1, 0, 0.0, tokens=[2]), "EAGLE-2": drafts, "FR-Spec 16": drafts}])


def test_a_task_of_single_tokens_has_no_figures(tmp_path, capsys):
    run = Run.read(write(tmp_path / "run", MANIFEST, [*LINES, single("MT", 1), single("MT", 2)]))
    assert run.tasks == Run.read(write(tmp_path / "without", MANIFEST, LINES)).tasks
    assert run.whole("EAGLE-2").answers == len([turn for row in LINES for turn in row["turns"]]) + 2
    main(["report", str(tmp_path / "run")])
    assert "nan" not in (tmp_path / "run" / "report" / "report.md").read_text()
    only = write(tmp_path / "only", MANIFEST, [single("MT", 1)])
    assert "holds no answer longer than one token" in refused(capsys, "report", only)


# Tuning -------------------------------------------------------------------------------------------

SMALL = (
    "--questions",
    "1",
    "--max-new-tokens",
    "4",
    "--draft-vocab",
    "full",
    "--tree-size",
    "4",
    "--depth",
    "2",
    "--draft-top-k",
    "2",
)


def paced(monkeypatch, speed_up):
    """Make what was measured last, side by side, come to this speed-up over vanilla."""

    def measured(self, choices):
        row = {"tokens_per_second": 10 * speed_up, "speed_up": speed_up, "accepted_length": 1.5, "round_ms": 1.0}
        still = {"tokens_per_second": 10.0, "speed_up": 1.0, "accepted_length": 1.0, "round_ms": 1.0}
        return {"vanilla": still, **{name: dict(row) for name in choices}}

    monkeypatch.setattr(tune.Bench, "side_by_side", measured)


@pytest.mark.sweep
def test_where_no_setting_pays_vanilla_is_what_users_get(copy, monkeypatch, capsys):
    paced(monkeypatch, 0.976)
    main(["tune", "--ckpt", str(copy), *SMALL])
    said = capsys.readouterr().out
    assert "No setting beats vanilla decoding" in said and "has it: load" not in said
    assert tuned.read(copy / "drafts" / "eagle", jnp.float32) == tuned.NO_TREE
    model = api.load(copy, api.Draft(pace="fixed"))
    assert model.tree.size == 1 and model.draft_vocab is None
    assert api.load(copy).drafting.pace is not None  # whose rounds rest by themselves where drafting does not pay
    assert (
        api.load(copy, api.Draft(vocab="full", pace="fixed")).tree.size > 1
    )  # who asks for a part of a draft gets one
    assert api.load(copy, api.Draft(tree=TreeConfig(4, 2, 2))).tree == TreeConfig(4, 2, 2)
    paced(monkeypatch, 1.5)  # and tuned again, on a better day
    main(["tune", "--ckpt", str(copy), *SMALL])
    assert "has it: load" in capsys.readouterr().out
    assert api.load(copy, api.Draft(pace="fixed")).tree.size > 1


OTHER = {"draft_vocab": 8, "tree": {"size": 4, "depth": 2, "top_k": 2}}


@pytest.mark.sweep
@pytest.mark.parametrize("damage", ["{", "", "[]", "entry"])
def test_a_damaged_file_of_settings_is_replaced(copy, damage, monkeypatch, capsys):
    paced(monkeypatch, 1.5)
    file = copy / "drafts" / "eagle" / "tuned.json"
    devices = {"another machine; float32": OTHER, tuned.key(jnp.float32): {"draft_vocab": "many"}}
    file.write_text(json.dumps({"format": tuned.FORMAT, "devices": devices}) if damage == "entry" else damage)
    with pytest.raises(UserError, match="damaged"):
        api.load(copy)
    refused(capsys, "tune", "--ckpt", copy, *SMALL, "--tree-size", "x")
    with pytest.raises(UserError, match="damaged"):  # a command that did nothing has taken nothing away
        api.load(copy)
    main(["tune", "--ckpt", str(copy), *SMALL])
    said = capsys.readouterr()
    assert "note: " in said.err and "this run replaces it" in said.err and "error" not in said.err
    assert tuned.read(file.parent, jnp.float32) is not None
    kept = json.loads(file.read_text())["devices"]
    assert kept.get("another machine; float32") == (OTHER if damage == "entry" else None)


# Full disks and two writers -----------------------------------------------------------------------


@contextmanager
def room(size: int) -> Iterator[None]:
    """Let no file grow beyond a size: what a full disk does, as far as one file is concerned."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handled = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handled)


def record(number):
    return {"question": f"QA/{number}", "repeat": 0, "turns": ["x" * 100]}


def test_a_run_on_a_full_disk_says_so_and_resumes_with_room(tmp_path):
    with (
        pytest.raises(UserError, match=r"records\.jsonl cannot be written: .*; make room") as told,
        records.opened(tmp_path / "run", {"kind": "run"}) as kept,
        room(250),
    ):
        for number in range(4):
            kept.append(record(number))
    assert told.value.__context__ is None or told.value.__suppress_context__
    assert records.read_records(tmp_path / "run") == [record(0)]
    with records.opened(tmp_path / "run", {"kind": "run"}) as kept:
        assert kept.lines == [record(0)]
        kept.append(record(1))
    assert records.read_records(tmp_path / "run") == [record(0), record(1)]


def test_a_manifest_is_whole_or_not_there(tmp_path):
    configuration = {"kind": "run", "long": "x" * 500}
    with (
        pytest.raises(UserError, match="cannot be written"),
        room(100),
        records.opened(tmp_path / "run", configuration),
    ):
        pass
    assert not (tmp_path / "run").exists()  # nothing is left
    with records.opened(tmp_path / "run", configuration) as kept:  # with room the same command begins
        kept.append(record(0))
    assert records.read_manifest(tmp_path / "run")["long"] == "x" * 500


def test_the_second_writer_is_told_who_the_first_is_and_a_dead_one_holds_nothing(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from eval.runs import records\n"
        "with records.opened(Path(sys.argv[1]), {'kind': 'run'}) as kept:\n"
        "    kept.append({'question': 'QA/1', 'repeat': 0}); print('held', flush=True); time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with (
            pytest.raises(UserError, match=rf"is being written by process {holder.pid}\b"),
            records.opened(tmp_path / "run", {"kind": "run"}),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with records.opened(tmp_path / "run", {"kind": "run"}) as kept:
        assert [one["question"] for one in kept.lines] == ["QA/1"]
