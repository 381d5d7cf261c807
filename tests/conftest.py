"""Fixtures shared by the tests."""

import atexit
import fnmatch
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Most of the suite's time is XLA's compiler. What one test has compiled, or measured of a round's costs, serves the
# other worker and the commands that tests start, through folders for this run of the suite alone: they are gone with
# the process that made them, and nothing of a toy's is kept among what the user has measured.
for folder in ("JAX_COMPILATION_CACHE_DIR", "FRSPEC_JAX_CACHE"):
    if folder not in os.environ:
        os.environ[folder] = tempfile.mkdtemp(prefix="frspec-jax-tests-")
        atexit.register(shutil.rmtree, os.environ[folder], ignore_errors=True)
        # What asks the run to end is taken as Ctrl-C, which leaves time to clear up.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
for threshold in ("MIN_COMPILE_TIME_SECS", "MIN_ENTRY_SIZE_BYTES"):  # small programs are kept too
    os.environ.setdefault(f"JAX_PERSISTENT_CACHE_{threshold}", "0")

# PyTorch would start a thread a core in each of the workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest
from hypothesis import settings

from frspec_jax import defaults
from frspec_jax.checkpoint import Checkpoint
from tests.support.folders import checkpoint_folder
from tests.support.runs import chats

# A busy machine is no fault of an example.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# Tests mean float32 unless they name a dtype: the default of a CPU with AMX would make them depend on the machine.
has_amx = defaults.has_amx
HAS_AMX = has_amx()
defaults.has_amx = lambda: False

ROOT = Path(__file__).parent.parent
MATERIAL = ROOT / "material" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The real model's tests go first, and so to one worker, which alone loads it and compiles for it.

    Of a test that is marked `sweep(quick=[...])` the cases whose ids match one of these patterns are no sweeps.
    """
    items.sort(key=lambda item: "material" not in item.keywords)
    unmatched: set[tuple[str, str]] = set()
    matched: set[tuple[str, str]] = set()
    for item in items:
        marker = item.get_closest_marker("sweep")
        if marker is None or "quick" not in marker.kwargs:
            continue
        name, case = item.nodeid.split("[")[0], item.callspec.id  # type: ignore[attr-defined]
        hits = {pattern for pattern in marker.kwargs["quick"] if fnmatch.fnmatchcase(case, pattern)}
        matched |= {(name, pattern) for pattern in hits}
        unmatched |= {(name, pattern) for pattern in marker.kwargs["quick"]}
        if hits:
            item.own_markers = [mine for mine in item.own_markers if mine.name != "sweep"]
    unmatched -= matched
    if unmatched and not any("::" in asked for asked in config.args):
        raise pytest.UsageError(f"no case is named like this: {sorted(unmatched)}; mend the mark `sweep` there")


def memory_maps() -> int:
    """How many memory maps this process has; 0 where the system does not say."""
    try:
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return 0


@pytest.fixture(autouse=True)
def room_for_programs() -> Iterator[None]:
    """Forgets compiled programs before their memory maps run out.

    Linux gives a process 65,530 of them; a program takes a hundred, and where none are left XLA's compiler ends in a
    segmentation fault.
    """
    yield
    if memory_maps() > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short conversations to train on."""
    return chats(tmp_path_factory.mktemp("corpus") / "chats.jsonl")


@pytest.fixture(scope="session")
def gguf_path() -> Path:
    """A real model as a GGUF file: FRSPEC_GGUF, or the demo's under material/; skips where there is none."""
    path = Path(os.environ.get("FRSPEC_GGUF") or MATERIAL)
    if not path.is_file():
        pytest.skip(f"no model at {path}; `make demo` brings one, and FRSPEC_GGUF names another")
    return path


@pytest.fixture(scope="session")
def real_checkpoint() -> Checkpoint:
    """The demo's checkpoint folder, with the draft and the ranking that ship; `make demo` and `make test` make it."""
    folder = ROOT / "checkpoints" / "smollm2"
    if not (folder / "drafts" / "eagle").is_dir():
        pytest.skip("checkpoints/smollm2 is not there; `make test` makes it")
    return Checkpoint.open(folder)


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model in Hugging Face's format."""
    from tests.support.tiny_hf import model_of, save

    return save(model_of(), tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="session")
def tiny_target(tiny_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same, converted. Not to be written to."""
    from tests.support.tiny_hf import converted

    return converted("hf", tiny_source, tmp_path_factory.mktemp("target") / "ckpt")


@pytest.fixture
def tiny_ckpt(tiny_target: Checkpoint, tmp_path: Path) -> Checkpoint:
    """A copy of it for drafts to be written into."""
    return Checkpoint.open(shutil.copytree(tiny_target.path, tmp_path / "ckpt"))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A checkpoint of random weights with an EAGLE-2 draft and a ranking, for reading only."""
    return checkpoint_folder(tmp_path_factory.mktemp("folder") / "toy")


@pytest.fixture
def toy_copy(toy_folder: Checkpoint, tmp_path: Path) -> Checkpoint:
    """A copy of it, to write to."""
    return Checkpoint.open(shutil.copytree(toy_folder.path, tmp_path / "toy"))


@pytest.fixture(scope="session")
def deep_target(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A target of six layers, so that EAGLE-3's taps (2, 3 and 3) are layers of it. Not to be written to."""
    from tests.support.tiny_hf import converted, model_of, save

    folder = tmp_path_factory.mktemp("deep")
    return converted("hf", save(model_of(num_hidden_layers=6), folder / "hf"), folder / "ckpt")


@pytest.fixture
def deep_ckpt(deep_target: Checkpoint, tmp_path: Path) -> Checkpoint:
    """A copy of it for drafts to be written into."""
    return Checkpoint.open(shutil.copytree(deep_target.path, tmp_path / "deep"))
