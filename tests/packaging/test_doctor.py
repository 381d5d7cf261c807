"""`frspec doctor`: each line says how something stands, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import json
import shutil

import pytest

from frspec_jax import __version__, doctor
from frspec_jax.finding import BAD, GOOD, NOTE


def lines(capsys, *argv, status=0):
    with pytest.raises(SystemExit) as ended:
        doctor.main([str(word) for word in argv])
    assert ended.value.code == status
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_machine_on_which_all_is_well(toy_folder, capsys):
    found = lines(capsys, "--ckpt", toy_folder.path, "--json")
    assert found[0]["found"].startswith(__version__)
    assert {"jax", "device", "kernels", "compile cache", "disk", "checkpoint", "  draft", "  ranking"} <= {
        line["what"] for line in found
    }
    assert all(line["mend"] for line in found if line["state"] != GOOD)
    (draft,) = [line for line in found if line["what"] == "  draft"]
    assert draft["state"] == NOTE and draft["mend"].startswith("python -m eval tune --ckpt")


def test_text_is_for_people(toy_folder, capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--ckpt", str(toy_folder.path)])
    out = capsys.readouterr().out
    assert "ok   jax " in out and "-> python -m eval tune" in out


def test_what_is_broken_is_named_with_its_mend(toy_folder, tmp_path, capsys):
    copy = shutil.copytree(toy_folder.path, tmp_path / "copy")
    (copy / "ranking.npz").write_bytes(b"no ranking")
    (copy / "drafts" / "eagle" / "config.json").write_text("{}")
    bad = [line for line in lines(capsys, "--ckpt", copy, "--json", status=1) if line["state"] == BAD]
    assert [line["what"] for line in bad] == ["  draft", "  ranking"]
    (missing,) = [line for line in lines(capsys, "--ckpt", tmp_path / "x", "--json", status=1) if line["state"] == BAD]
    assert "is no folder" in missing["found"]


def test_a_bare_checkpoint_is_told_what_it_could_have(toy_folder, tmp_path, capsys):
    bare = shutil.copytree(toy_folder.path, tmp_path / "bare", ignore=shutil.ignore_patterns("drafts", "ranking.npz"))
    mends = [line["mend"] for line in lines(capsys, "--ckpt", bare, "--json") if line["what"].startswith("  ")]
    assert [mend.split()[:4] for mend in mends] == [
        ["python", "-m", "train", "eagle"],
        ["python", "-m", "train", "rank"],
    ]


def test_versions_are_held_against_what_we_ask_for(monkeypatch):
    monkeypatch.setattr(doctor, "required", lambda: [("jax", "99.0", ""), ("numpy", "0", "1.0"), ("no-such", "1", "")])
    said = {finding.what: finding for finding in doctor.versions()}
    assert said["jax"].state == BAD and said["jax"].mend == "pip install 'jax>=99.0'"
    assert said["numpy"].mend == "pip install 'numpy>=0,<1.0'"
    assert said["no-such"].found == "not installed"


def test_requirements_are_read_as_pip_reads_them(monkeypatch):
    asked = ["jax<0.13,>=0.10.2", "numpy>=2.0", "torch>=2.7; extra == 'torch'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked)
    assert doctor.required() == [("jax", "0.10.2", "0.13"), ("numpy", "2.0", "")]


def test_a_cache_that_is_off_or_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("FRSPEC_JAX_CACHE", "off")
    assert [finding.state for finding in doctor.cache()] == [NOTE]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FRSPEC_JAX_CACHE", str(tmp_path / "file" / "cache"))
    assert [finding.state for finding in doctor.cache()] == [BAD]


def test_a_check_that_fails_does_not_end_the_others(monkeypatch):
    def broken():
        raise ImportError("jaxlib is not there")

    monkeypatch.setattr(doctor, "devices", broken)
    found = list(doctor.findings([]))
    assert any(finding.state == BAD and "jaxlib is not there" in finding.found for finding in found)
    assert any(finding.what == "compile cache" for finding in found)
