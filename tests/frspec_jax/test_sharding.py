"""A target divided over several devices says what one device says.

Sums over devices add up in another order than on one, so float32 rounds their last bits differently: a token can only
differ where the target's two best lie closer together than that. These targets' do not, in any of these texts.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from frspec_jax.config import ModelConfig
from frspec_jax.drafters.base import DraftParams
from frspec_jax.drafters.eagle import EagleConfig
from frspec_jax.errors import UserError
from frspec_jax.mesh_parts import draft_on
from frspec_jax.presets import model_config
from frspec_jax.sharding import PARTITION, Split, mesh_of, meshes_of, pays
from tests.support import toy

ROOT = Path(__file__).parents[2]
CFG = toy.config(num_heads=8, num_kv_heads=2, vocab_size=30)


def run(*command: str, devices: int = 8, **how) -> subprocess.Popen:
    """A process that sees so many devices."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def said(process: subprocess.Popen) -> str:
    out, error = process.communicate(timeout=1200)
    assert process.returncode == 0, error[-2000:]
    return out


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_parts_of_a_weight_are_all_of_it(count):
    """Each row of a stored weight is on one device, or, of KV heads that several share, on each of those."""
    split = Split(CFG, count)
    sizes = {"qkv": 8 * (8 + 2 * 2), "gate_up": 2 * CFG.intermediate_size, "output": 64, "down": CFG.intermediate_size}
    for name, size in sizes.items():
        rows = [row for device in range(count) for a, b in split.pieces(name, device) for row in range(a, b)]
        assert set(rows) == set(range(size))
        if name != "qkv" or count <= CFG.num_kv_heads:
            assert len(rows) == size
    for device in range(count):
        queries, keys, values = split.pieces("qkv", device)
        first_query, first_key = queries[0] // CFG.head_dim, keys[0] // CFG.head_dim - CFG.num_heads
        assert first_query // CFG.queries_per_kv == first_key, "a device's queries read its own keys"
        assert values[0] - keys[0] == CFG.num_kv_heads * CFG.head_dim
    stored = np.arange(CFG.vocab_size * 3).reshape(-1, 3)
    parts = np.concatenate([split.part("lm_head", stored, device) for device in range(count)])
    assert parts.shape[0] == split.vocabulary >= CFG.vocab_size and not parts[CFG.vocab_size :].any()
    assert np.array_equal(parts[: CFG.vocab_size], stored)
    assert set(PARTITION) == set(sizes) | {"qkv_bias", "gate_up_bias", "lm_head"}


@pytest.mark.parametrize(
    ("changes", "count"), [({"num_heads": 6, "num_kv_heads": 3}, 2), ({"intermediate_size": 50}, 4)]
)
def test_what_cannot_be_divided_is_refused(changes, count):
    with pytest.raises(UserError, match=rf"tensor.parallel {count}: the target's \d+ heads, "):
        Split(toy.config(**changes), count)
    with pytest.raises(UserError, match=r"tensor.parallel 99: JAX found \d+ devices?; give 1"):
        mesh_of(99)


@pytest.mark.parametrize(("replicas", "devices"), [(99, 1), (2, 99), (0, 1), (2, 0)])
def test_replicas_that_do_not_fit_are_refused(replicas, devices):
    with pytest.raises(
        UserError, match=rf"data.parallel {replicas} with .* {devices} takes \d+ devices, and JAX found"
    ):
        meshes_of(replicas, devices)


def eagle_of(name: str, dtype) -> tuple[DraftParams, ModelConfig]:
    """The shapes of a published model's EAGLE draft, and its layer as a model of one."""
    cfg = model_config(name)
    draft = EagleConfig.like(cfg)
    return draft.shapes(cfg, dtype), draft.layer_of(cfg)


def test_a_draft_is_divided_where_that_spares_enough_bytes():
    for name in ("llama3-8b", "llama3-70b"):
        assert [pays(*eagle_of(name, jnp.bfloat16), count) for count in (1, 2, 4, 8)] == [False, True, True, True]
    assert not any(pays(*eagle_of("qwen2.5-0.5b", jnp.bfloat16), count) for count in (1, 2))
    # 116 MiB in bfloat16, of which two devices spare each other half.
    assert [pays(*eagle_of("llama3.2-1b", jnp.bfloat16), count) for count in (2, 4)] == [False, True]
    assert pays(*eagle_of("llama3.2-1b", jnp.float32), 2)
    assert not pays(*eagle_of("qwen2-7b", jnp.bfloat16), 8), "28 heads are not divided by 8"


def test_on_one_device_a_draft_stays_as_it_is():
    weights, drafter = toy.weights(CFG)
    same = draft_on(None, drafter, weights.draft)
    assert same[0] is drafter and same[1] is weights.draft


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("names", "least"),
    [(["eagle3 divided, with slots"], 1), (["replicas"], 2), ([], 20)],
    ids=["one draft", "replicas", "all"],
)
def test_text_on_two_four_and_eight_devices_is_that_of_one(names, least):
    """EAGLE-2 and EAGLE-3 whole and divided, with a fixed tree, a pace and slots; Medusa, copying, vanilla; batches."""
    found = json.loads(said(run("tests.support.sharded", *names)).splitlines()[-1])
    assert len(found) >= least and all(found.values()), [name for name, same in found.items() if not same]


@pytest.mark.sweep
def test_two_processes_are_one_run(toy_folder, tmp_path):
    """Two of four devices each: the first prints what one device says, the second nothing."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    asked = ["frspec_jax.generate", "--ckpt", str(toy_folder.path), "--prompt", "the end", "--json"]
    asked += ["--dtype", "float32", "--max-new-tokens", "24", "--pace", "fixed", "--context", "512"]
    alone = json.loads(said(run(*asked, devices=1)))
    together = ["--coordinator", address, "--processes", "2", "--tensor-parallel", "4"]
    both = [run(*asked, *together, "--process", str(number), devices=2) for number in range(2)]
    # What joins CPUs says so on standard output, by itself, several threads at a time: an answer is a line of JSON.
    first, second = ([line for line in said(one).splitlines() if line.startswith("{")] for one in both)
    assert len(first) == 1 and second == []
    assert json.loads(first[0])["tokens"] == alone["tokens"] and len(alone["tokens"]) > 5


def test_one_device_is_the_code_without_a_mesh():
    assert mesh_of(1) is None
