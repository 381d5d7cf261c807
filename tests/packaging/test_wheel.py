"""The wheel: what is in it, and that its commands run where a user's own train.py and eval.py lie."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

import frspec_jax

ROOT = Path(__file__).parents[2]
FOLDERS = ("frspec_jax", "pallas_kernels", "convert", "train", "eval")
BUNDLED = "frspec_jax.bundled."
OWN = 'raise SystemExit("a user\'s own script ran")\n'


def packages() -> set[str]:
    """Every package of the repository, as the wheel names it."""
    found = set()
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("__init__.py"):
            name = ".".join(file.parent.relative_to(ROOT).parts)
            found.add(name if folder in FOLDERS[:2] else BUNDLED + name)
    return found


def test_pyproject_names_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = settings["packages"]
    assert set(listed) == packages(), "add the new folder to [tool.setuptools] packages in pyproject.toml"
    assert len(listed) == len(set(listed))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from what a wheel is made of, in a folder of its own: nothing is left in the repository."""
    pytest.importorskip("setuptools", minversion="77", reason="the wheel is built by setuptools 77 or newer")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source / file)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = out.glob("*.whl")
    return file


def test_what_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"frspec_jax", "pallas_kernels"}
    for wanted in (
        "frspec_jax/py.typed",
        "pallas_kernels/py.typed",
        "frspec_jax/serve/static/index.html",
        "frspec_jax/bundled/eval/data/paper.json",
        "frspec_jax/bundled/eval/data/sample.jsonl",
        "frspec_jax/bundled/train/__main__.py",
        "pallas_kernels/tables/README.md",
    ):
        assert wanted in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert f"Version: {frspec_jax.__version__}\n" in metadata and "License-Expression: Apache-2.0" in metadata


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of `frspec` and `python` in a new environment with the wheel, and the packages that it needs.

    Those are this environment's: a line in a .pth file names its folder, and the .pth files in there, by which the
    repository itself may be installed, are not read.
    """
    folder = tmp_path_factory.mktemp("env")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", scheme))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    scripts = Path(sysconfig.get_path("scripts", "venv", scheme))
    frspec = scripts / "frspec"  # as pip writes what [project.scripts] names
    frspec.write_text(
        f"#!{scripts / 'python'}\nimport sys\nfrom frspec_jax.__main__ import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    frspec.chmod(0o755)
    return scripts


@pytest.fixture
def desk(tmp_path) -> Path:
    """A folder with scripts of a user's own, of the names that our folders have."""
    for name in ("train", "eval", "convert"):
        (tmp_path / f"{name}.py").write_text(OWN)
    return tmp_path


def ran(command, desk) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([str(part) for part in command], cwd=desk, capture_output=True, text=True, env=environment)


@pytest.mark.sweep
def test_commands_run_beside_a_users_own_train_and_eval(installed, desk, toy_folder):
    frspec, ckpt = installed / "frspec", toy_folder.path
    assert ran([frspec, "--version"], desk).stdout == f"frspec-jax {frspec_jax.__version__}\n"

    doctor = ran([frspec, "doctor", "--ckpt", ckpt], desk)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "from a wheel" in doctor.stdout and "-> frspec eval tune" in doctor.stdout

    said = ran([frspec, "generate", "--ckpt", ckpt, "--prompt", "the end", "--max-new-tokens", "4"], desk)
    assert said.returncode == 0 and said.stdout.strip() and "eagle+fr" in said.stderr, said.stderr

    (desk / "text.txt").write_text("the end of the start\n" * 9)
    ranked = ran([frspec, "train", "rank", "text.txt", "--ckpt", ckpt, "--out", "r.npz", "--processes", "1"], desk)
    assert ranked.returncode == 0 and (desk / "r.npz").is_file(), ranked.stderr
    for command in ("convert", "eval"):
        helped = ran([frspec, command, "--help"], desk)
        assert helped.stdout.startswith(f"usage: frspec {command} ") and "python -m" not in helped.stdout


def test_a_users_own_scripts_stay_theirs(installed, desk):
    for name in ("train", "eval", "convert"):
        for command in ([f"{name}.py"], ["-m", name], ["-c", f"import frspec_jax.entry, {name}"]):
            assert "a user's own script ran" in ran([installed / "python", *command], desk).stderr


@pytest.mark.sweep
def test_refusals_name_the_command_that_a_wheel_has(installed, desk):
    refused = ran([installed / "frspec", "generate", "--ckpt", "x.gguf", "--prompt", "hi"], desk)
    assert refused.returncode == 2 and "run: frspec convert gguf x.gguf --out x" in refused.stderr
    code = "import frspec_jax\ntry: frspec_jax.load('x.gguf')\nexcept frspec_jax.UserError as error: print(error)"
    assert "run: frspec convert gguf x.gguf --out x" in ran([installed / "python", "-c", code], desk).stdout
