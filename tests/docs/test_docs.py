"""What README and docs say is true: links resolve, commands have the flags that they name, Python compiles and runs."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import logging
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.tools import commands
from frspec_jax import api
from frspec_jax.__main__ import main as frspec

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "results/**/*.md", "assets/*/*.md", "examples/*.md")
    for path in ROOT.glob(pattern)
)
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
MODULES = {  # `python -m X` of the repository, and the command behind `frspec`
    "frspec_jax.generate": "generate",
    "frspec_jax.serve": "serve",
    "frspec_jax.doctor": "doctor",
    **{name: name for name in commands.FOLDERS},
}
# What other programs' commands begin with: nothing is known of their flags here.
OTHERS = ("curl", "docker", "haproxy", "vllm", "python -m sglang", "source", "bash", "pip install dist")


@pytest.fixture(scope="module")
def parsers():
    return dict(commands.parsers())


def text(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def blocks(name: str) -> Iterator[tuple[str, str]]:
    """The language and text of each fenced block; indented ones too."""
    yield from FENCE.findall(text(name))


def typed(name: str) -> list[str]:
    """The lines of a page's blocks that a user types, continued lines joined and comments taken off."""
    found = []
    for language, block in blocks(name):
        if language in ("", "sh", "bash", "shell"):
            joined = re.sub(r"\\\n\s*", " ", block)
            lines = (re.split(r"\s#\s|^#", line)[0].strip() for line in joined.splitlines())
            found += [line for line in lines if re.match(r"(frspec|python|make|pip|[A-Z_]+=\S+ )", line)]
    return found


# README -----------------------------------------------------------------------------------------


def test_the_readme_is_two_screens():
    assert len(text("README.md").split()) <= 900


def test_the_readme_says_what_a_newcomer_asks():
    said = text("README.md")
    for asked in ("make demo", "make test", "frspec generate", "import frspec_jax", "## What it is for, and what not"):
        assert asked in said
    assert said.count("![") == 1


# Links ------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The names under which a page's headings are linked to."""
    plain = FENCE.sub("", page.read_text("utf-8"))
    found = set()
    for heading in re.findall(r"^#+ (.+)$", plain, re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", words).replace(" ", "-"))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name):
    page = ROOT / name
    for target in LINK.findall(FENCE.sub("", text(name))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        generated = there == ROOT / "docs" / "commands.md"
        assert generated or there.exists(), f"{name}: {target} is not there"
        assert there.is_relative_to(ROOT), f"{name}: {target} leaves the repository"
        if anchor and there.suffix == ".md" and not generated:
            assert anchor in anchors(there), f"{name}: {target} has no such heading"


# Commands ---------------------------------------------------------------------------------------


def command_of(words: list[str]) -> tuple[str, list[str]] | None:
    """A command of ours, as `commands.parsers` names it, and its arguments; None for anything else."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[:1] == ["frspec"]:
        words = words[1:]
    elif words[:2] == ["python", "-m"] and len(words) > 2 and words[2] in MODULES:
        words = [MODULES[words[2]], *words[3:]]
    else:
        return None
    deep = words and words[0] in commands.FOLDERS
    return (" ".join(words[:2]), words[2:]) if deep else (words[0] if words else "", words[1:])


def flags_of(parser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


def check(line: str, parsers) -> None:
    """Parse a line with the parser of its command; one that leaves something out ("...") need only name real flags."""
    words = shlex.split(line.split("&&")[0].rstrip(" &"))
    known = command_of(words)
    if known is None:
        other(line, words)
        return
    name, arguments = known
    if name in parsers and arguments == ["--help"]:
        return
    if name.split()[-1] == "--help" or name == "--version":
        return
    assert name in parsers, f"there is no command {name}"
    parser = parsers[name]
    if any("..." in word for word in arguments) or "[" in line:
        wrong = {word for word in arguments if word.startswith("--")} - flags_of(parser)
        assert not wrong, f"{name} has no flag {wrong}"
        return
    error = io.StringIO()
    try:
        with contextlib.redirect_stderr(error):
            parser.parse_args(arguments)
    except SystemExit:
        pytest.fail(f"{line}\n{error.getvalue()}")


def other(line: str, words: list[str]) -> None:
    """Of a command that is not one of ours: that the target, extra, script or module which it names is there."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", text("Makefile"), re.M)
        assert all(word in targets or "=" in word or "[" in word for word in words[1:]), line
    elif words[0] == "pip" and "install" in words:
        extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
        for found in re.findall(r"(?:frspec-jax|\.)\[([\w,]+)\]", line):
            assert set(found.split(",")) <= set(extras), line
    elif words[:2] == ["python", "-m"]:
        if words[2] not in ("pytest", "sglang.launch_server", "build"):
            assert importlib.util.find_spec(words[2]) is not None, line
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), line


@pytest.mark.parametrize("name", NAMES)
def test_commands_have_the_flags_that_pages_name(name, parsers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some flags look whether their file can be written
    for line in typed(name):
        if not line.startswith(OTHERS):
            check(line, parsers)


@pytest.mark.parametrize("name", NAMES)
def test_commands_within_sentences_too(name, parsers):
    for span in re.findall(r"`((?:frspec|python -m) [^`]+)`", FENCE.sub("", text(name))):
        known = command_of(span.replace("\n", " ").split())
        if known is None or span.startswith(OTHERS):
            continue
        command, arguments = known
        family = command.split()[0]
        if family.strip(".") in ("", "COMMAND", "...") or command in commands.FOLDERS or "|" in command:
            continue
        if command.split()[-1] in ("...", "COMMAND", "--help"):
            continue
        assert command in parsers, f"{name}: {span}"
        flags = {word.rstrip(",;.") for word in arguments if word.startswith("--")} - {"--help"}
        assert not flags - flags_of(parsers[command]), f"{name}: {span}"


def test_flags_within_sentences_are_somebodys(parsers):
    """A flag that a page mentions by itself belongs to one of our commands, or to a program that the page is about."""
    every = set().union(*map(flags_of, parsers.values()))
    for name in (
        "README.md",
        "docs/start.md",
        "docs/training.md",
        "docs/prompts.md",
        "docs/your-model.md",
        "docs/gpu.md",
    ):
        for flag in re.findall(r"`(--[a-z][\w-]+)", FENCE.sub("", text(name))):
            assert flag in every or flag in ("--xla_force_host_platform_device_count", "--help"), f"{name}: {flag}"


def test_the_page_of_commands_is_whole(parsers):
    page = commands.page()
    for name, parser in parsers.items():
        assert f"## frspec {name}\n" in page
        shown = [a for a in parser._actions if a.help != "==SUPPRESS==" and a.option_strings[:1] != ["-h"]]
        for action in shown:
            for flag in action.option_strings:
                assert flag in page, f"{name} {flag}"
    assert "python -m train" not in page.partition("## ")[2]


# Running ----------------------------------------------------------------------------------------


@pytest.fixture
def desk(toy_folder, tmp_path, monkeypatch):
    """A folder in which the pages' names are there: CKPT, checkpoints/smollm2, prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "checkpoints").mkdir()
    for name in ("CKPT", "checkpoints/smollm2"):
        shutil.copytree(toy_folder.path, tmp_path / name)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the end"}\n{"prompt": "in the"}\n')
    (tmp_path / "question.txt").write_text("the end")
    (tmp_path / "CORPUS").mkdir()
    (tmp_path / "CORPUS" / "text.txt").write_text("the end of the start\n" * 9)
    return tmp_path


def cheap(name: str) -> list[str]:
    """A page's commands that take seconds on a toy: answers, the doctor, a ranking."""
    return [line for line in typed(name) if re.match(r"frspec (generate|doctor|train rank CORPUS)", line)]


@pytest.mark.parametrize("name", ["README.md", "docs/start.md", "docs/your-model.md", "docs/prompts.md"])
def test_cheap_commands_run(name, desk, capsys):
    lines = cheap(name)
    assert lines, "nothing was found to run"
    for line in dict.fromkeys(lines):
        words = shlex.split(line)[1:]
        if words[0] == "generate":
            words += ["--max-new-tokens", "4", "--draft", "none"]  # what drafts is tested elsewhere
        if words[:2] == ["train", "rank"]:
            words += ["--force", "--processes", "1"]
        with contextlib.suppress(SystemExit):  # the doctor ends with a status
            frspec(words)
        captured = capsys.readouterr()
        assert captured.out.strip() and "error" not in captured.err, f"{line}\n{captured.err}"


def python_blocks() -> list[tuple[str, str]]:
    return [(name, block) for name in NAMES for language, block in blocks(name) if language == "python"]


@pytest.mark.parametrize(("name", "block"), python_blocks())
def test_python_compiles(name, block):
    tree = ast.parse(block, name)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("frspec_jax"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, one.name) for one in node.names), ast.unparse(node)


@pytest.mark.parametrize("name", ["README.md", "docs/start.md", "docs/api.md"])
def test_python_runs(name, desk, capsys, monkeypatch):
    """The short blocks, as they stand, on the toy, without a draft: one that drafts is compiled for the examples."""
    load = api.load
    monkeypatch.setattr(api, "load", lambda ckpt, draft=None, **more: load(ckpt, "none", **more))
    for page, block in python_blocks():
        if page == name:
            exec(compile(block, name, "exec"), {})
    assert capsys.readouterr().out.strip()


# The site ---------------------------------------------------------------------------------------


def test_the_site_builds_without_a_warning(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs", reason="what builds the site is not there: pip install -e '.[docs]'")
    pytest.importorskip(
        "mkdocstrings_handlers.python", reason="what builds the site is not there: pip install -e '.[docs]'"
    )
    pytest.importorskip("material", reason="what builds the site is not there: pip install -e '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    seen: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert not seen, "\n".join(seen)
    for page in ("index", "start/index", "commands/index", "api/index", "results/index", "how-it-works/index"):
        assert (tmp_path / "site" / f"{page}.html").stat().st_size > 3000
    assert "frspec_jax.generator.Generator" in (tmp_path / "site" / "api" / "index.html").read_text()
