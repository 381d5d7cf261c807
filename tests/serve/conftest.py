"""The servers that tests share, one of each a session."""

import pytest

pytest.importorskip("starlette", reason="the server's packages are not there: pip install -e '.[serve,test]'")
pytest.importorskip("openai", reason="OpenAI's client is not there: pip install -e '.[serve,test]'")

from frspec_jax.config import TreeConfig
from frspec_jax.drafting import Draft
from frspec_jax.serve.served import Settings
from tests.support.server import serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks the real model's server waits half a minute for its programs: such tests are sweeps."""
    for item in items:
        if "smol" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.sweep)


TREE = Draft(tree=TreeConfig(4, 2, 2), pace="fixed")


@pytest.fixture(scope="session")
def toy_server(toy_folder):
    """Random weights, four slots, a queue of eight, a context of 512."""
    settings = Settings(names=("toy", "toy-too"), slots=4, queue=8, body_bytes=2**18, choices=12)
    with serving(toy_folder, settings, draft=TREE, context=512, dtype="float32") as server:
        yield server


@pytest.fixture(scope="session")
def smol_server(real_checkpoint):
    """The real model that `make demo` brings, in one slot: of each further one more would be compiled."""
    settings = Settings(names=("smollm2",), slots=1, queue=16, compare=False)
    with serving(real_checkpoint, settings, draft=TREE, context=512, chunk=64, dtype="float32") as server:
        yield server


@pytest.fixture
def toy(toy_server):
    """The toy's server, idle before and after."""
    toy_server.idle()
    yield toy_server
    toy_server.batch.before_step = None
    toy_server.idle()


@pytest.fixture
def smol(smol_server):
    """The real model's server, idle before and after."""
    smol_server.idle()
    yield smol_server
    smol_server.idle()
