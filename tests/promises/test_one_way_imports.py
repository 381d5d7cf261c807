"""The house plan: imports run one way, without circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What each package may import of ours, besides itself.
BELOW = {
    "pallas_kernels": set(),
    "frspec_jax": {"pallas_kernels"},
    "convert": {"frspec_jax", "pallas_kernels"},
    "train": {"frspec_jax", "pallas_kernels"},
    "eval": {"frspec_jax", "pallas_kernels"},
}
# The rooms of eval/, and what each may import of the others.
ROOMS = {
    "commands": {"show", "methods", "runs", "data", "sandbox"},
    "show": {"methods", "runs", "data"},
    "methods": {"runs", "data"},
    "runs": {"data"},
    "data": set(),
    "sandbox": set(),
}


def modules(package: str) -> dict[str, Path]:
    """The modules of a package by their dotted names."""
    files = (ROOT / package).rglob("*.py")
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too, but for what only a type checker reads."""
    tree = ast.parse(file.read_text("utf-8"))
    unread = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", BELOW)
def test_a_package_imports_what_stands_below_it(package):
    for name, file in modules(package).items():
        ours = {module.partition(".")[0] for module in imported(file)} & set(BELOW)
        assert ours <= BELOW[package] | {package}, f"{name} imports {sorted(ours)}"


def test_the_rooms_of_eval_stand_in_order():
    seen = set()
    for name, file in modules("eval").items():
        room = name.split(".")[1] if name.count(".") > 1 else None
        for module in imported(file):
            if room and module.startswith("eval.") and (other := module.split(".")[1]) != room:
                assert other in ROOMS[room], f"{name} imports {module}"
                seen.add((room, other))
    assert ("commands", "methods") in seen, "no import was found, so this test would prove nothing"


def test_nothing_below_the_server_imports_it():
    server = "frspec_jax.serve"
    inside = [name for name in modules("frspec_jax") if name.startswith(server)]
    assert len(inside) > 5
    for package in BELOW:
        for name, file in modules(package).items():
            if name not in inside:
                assert not any(module.startswith(server) for module in imported(file)), f"{name} imports the server"


@pytest.mark.parametrize("package", BELOW)
def test_no_circle(package):
    known = modules(package)
    graph = {}
    for name, file in known.items():
        # `from a.b import c` names a module a.b.c, or something in a.b.
        found = (module if module in known else module.rpartition(".")[0] for module in imported(file))
        graph[name] = {module for module in found if module in known and module != name}
    done: set[str] = set()

    def follow(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                follow(other, (*path, name))
            done.add(name)

    for name in graph:
        follow(name, ())


@pytest.mark.parametrize(
    "command",
    ["frspec_jax.generate --help", "frspec_jax.serve --help", "eval --help", "train --help", "convert --help"],
)
def test_help_needs_no_jax(command):
    code = (
        "import runpy, sys\n"
        f"module, *sys.argv[1:] = {command.split()!r}\n"
        "try:\n    runpy.run_module(module, run_name='__main__')\nexcept SystemExit:\n    pass\n"
        "assert 'jax' not in sys.modules, 'jax was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
