"""`python -m frspec_jax.doctor`: what is installed and found on this machine, each line with what would mend it.

Exit status 0 where text can be generated here, 1 where something has to be mended first.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from frspec_jax import __version__, entry
from frspec_jax.commands import Parser
from frspec_jax.doctor_checkpoints import checkpoints
from frspec_jax.errors import quoted, reported
from frspec_jax.finding import BAD, GOOD, NOTE, Finding

OPTIONAL = {  # an extra, a module that it brings, and what it is for
    "serve": ("uvicorn", "the server"),
    "torch": ("torch", "reading .bin and .pt weights, and comparing with transformers"),
}
ROOM = 2 << 30  # bytes: the demo's model, its checkpoint and what is compiled


def arguments() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m frspec_jax.doctor",
        description="Say what is installed and found here, and what would mend what is not.",
    )
    parser.add_argument(
        "--ckpt",
        action="append",
        type=Path,
        metavar="CKPT",
        help="look at this checkpoint folder; may be given again (default: those here and in checkpoints/)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line of findings")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    with reported():
        bad = False
        for finding in findings(args.ckpt):
            bad = bad or finding.state == BAD
            print(json.dumps(dataclasses.asdict(finding)) if args.json else finding, flush=True)
    sys.exit(1 if bad else 0)


def findings(ckpts: list[Path] | None = None) -> Iterator[Finding]:
    """Everything that is looked at, in the order in which a new user meets it.

    A fault in one check is its own finding, and the others go on.
    """
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        versions,
        extras,
        devices,
        kernels,
        cache,
        disk,
        lambda: checkpoints(ckpts),
    )
    for check in checks:
        try:
            yield from check()
        except Exception as error:  # whatever is broken here is what the user wants to know
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            yield Finding(BAD, getattr(check, "__name__", "check"), f"{type(error).__name__}: {reason}", REINSTALL)


REINSTALL = "install again: pip install --force-reinstall frspec-jax, or make demo in the repository"


# What is installed -------------------------------------------------------------------------------


def versions() -> Iterator[Finding]:
    """Python, ours, and what we depend on, held against what pyproject.toml asks for."""
    where = "a wheel" if entry.installed() else f"the repository {quoted(entry.root())}"
    yield Finding(GOOD, "frspec-jax", f"{__version__}, from {where}; Python {platform.python_version()}")
    for requirement in required():
        name, least, below = requirement
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(BAD, name, "not installed", f"pip install '{name}>={least}'")
            continue
        wanted = f">={least}" + (f",<{below}" if below else "")
        if numbers(version) < numbers(least) or (below and numbers(version) >= numbers(below)):
            yield Finding(BAD, name, f"{version}, and {wanted} is needed", f"pip install '{name}{wanted}'")
        elif name in ("jax", "flax", "transformers"):
            yield Finding(GOOD, name, version)


def required() -> list[tuple[str, str, str]]:
    """What the installed distribution needs: name, least version, and the version that is too new, or ""."""
    try:
        lines = importlib.metadata.requires("frspec-jax") or []
    except importlib.metadata.PackageNotFoundError:
        lines = ["jax>=0.10.2,<0.13", "flax>=0.12.8", "transformers>=5.17"]
    found = []
    for line in lines:
        name = re.match(r"[\w.-]+", line)
        if name and "extra ==" not in line:
            least, below = (re.search(sign + r"\s*([\d.]+)", line) for sign in (">=", "<(?!=)"))
            found.append((name[0], least[1] if least else "0", below[1] if below else ""))
    return found


def numbers(version: str) -> tuple[int, ...]:
    """A version's leading numbers, to compare by: (0, 10, 2)."""
    found = re.match(r"[\d.]*", version)
    return tuple(int(part) for part in (found[0] if found else "").split(".") if part)


def extras() -> Iterator[Finding]:
    """What is not needed to generate."""
    for extra, (module, what) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(NOTE, extra, f"{module} is not installed; only {what} needs it", entry.install(extra))
        else:
            yield Finding(GOOD, extra, f"{module} {importlib.metadata.version(module)}, for {what}")


# The machine -------------------------------------------------------------------------------------


def devices() -> Iterator[Finding]:
    """What JAX computes on, and what suits it."""
    import jax

    from frspec_jax.defaults import defaults, has_amx

    platforms = os.environ.get("JAX_PLATFORMS")
    try:
        found = jax.devices()
    except (RuntimeError, AssertionError):
        yield Finding(BAD, "device", f"JAX_PLATFORMS={platforms} names a device that is not there", "unset it")
        return
    kind, count = found[0].device_kind, len(found)
    suits = f"{defaults().dtype.__name__} suits it"
    if found[0].platform == "cpu":
        from frspec_jax.tuned import machine

        units = "with AMX" if has_amx() else "without AMX"
        yield Finding(GOOD, "device", f"{machine()}, {units}; {suits}")
        if shutil.which("nvidia-smi") and platforms in (None, ""):
            yield Finding(
                BAD,
                "gpu",
                "this machine has an NVIDIA driver, and JAX does not see a GPU",
                f"{entry.install('cuda12')}, or cuda13",
            )
    else:
        yield Finding(GOOD, "device", f"{count} x {kind}; {suits}")
    if count > 1 and found[0].platform == "cpu":
        yield Finding(
            NOTE, "device", f"XLA_FLAGS makes {count} devices of one CPU", "unset XLA_FLAGS, unless you mean it"
        )


def kernels() -> Iterator[Finding]:
    """Which of our kernels run here, and whether anybody measured them on this device."""
    import jax

    from pallas_kernels import measured

    if jax.default_backend() != "gpu":
        yield Finding(
            GOOD, "kernels", f"XLA's own operations on {jax.default_backend()}; Pallas kernels need a CUDA GPU"
        )
        return
    kind = jax.devices()[0].device_kind
    folders = [folder for folder in (measured.own_folder(), measured.PACKAGED) if folder is not None]
    tables = sorted(
        {path.stem for folder in folders for path in measured.table_path(folder, kind, "x").parent.glob("*.json")}
    )
    if tables:
        yield Finding(GOOD, "kernels", f"Pallas; measured on {kind}: {', '.join(tables)}")
    else:
        yield Finding(NOTE, "kernels", f"Pallas; none measured on {kind}, so auto means XLA", measured.TUNE)


def cache() -> Iterator[Finding]:
    """Where compiled programs are kept, and how much there is."""
    from pallas_kernels.measured import CACHE_VARIABLE, cache_folder

    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = Path(given) if given else cache_folder()
    if folder is None:
        yield Finding(
            NOTE,
            "compile cache",
            f"off ({CACHE_VARIABLE}=off): each start compiles again, for minutes",
            f"unset {CACHE_VARIABLE}",
        )
        return
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        yield Finding(
            BAD, "compile cache", f"{quoted(folder)} cannot be written", f"{CACHE_VARIABLE}=FOLDER names another"
        )
        return
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files) / 1e6
    yield Finding(GOOD, "compile cache", f"{quoted(folder)}: {len(files):,} files, {size:,.0f} MB")


def disk() -> Iterator[Finding]:
    """Whether there is room here."""
    free = shutil.disk_usage(Path()).free
    said = f"{free / 1e9:,.1f} GB free here"
    yield (
        Finding(GOOD, "disk", said)
        if free > ROOM
        else Finding(BAD, "disk", said, f"make room: the demo needs {ROOM / 1e9:.0f} GB")
    )


if __name__ == "__main__":
    main()
