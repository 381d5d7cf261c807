"""How much memory a process needs to load its device's part of a target that several devices divide.

    JAX_PLATFORMS=cpu python -m benchmarks.load_memory --layers 4 --json benchmarks/cpu2-load-memory.json

A checkpoint with the widths of Llama 3 70B is made (of zeros: it takes no room on the disk), and as many processes as
there are to be devices join, as on several hosts. The first loads its part and watches its own memory: what it holds
at the end, and the most that it held on the way. On a CPU the "device" is this memory too, so its part counts in full.
What comes on top of the part does not grow with the number of layers, and so neither in the whole model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from eval.runs import provenance
from frspec_jax import sharding
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import ModelConfig
from frspec_jax.errors import UserError, reported
from frspec_jax.presets import config_of, family_of
from frspec_jax.shapes import model_shapes
from frspec_jax.stored_weights import save_params
from pallas_kernels.models import SHAPES

GIB = 2**30
PORT = 9911
DTYPE = jnp.bfloat16


def config(model: str, layers: int) -> ModelConfig:
    """The model's sizes, with so many layers."""
    return config_of(dataclasses.replace(SHAPES[model], layers=layers), family_of(model))


def held() -> int:
    """Bytes of this process's own memory: pages of files are left out, which the system takes back when it likes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def loaded(folder: Path, model: str, layers: int, devices: int, process: int) -> dict[str, int] | None:
    """What the first of these processes needs to load its part, in bytes; the others only stand by."""
    jax.distributed.initialize(f"127.0.0.1:{PORT}", devices, process)
    mesh = sharding.mesh_of(devices)
    if process:
        sys.stdin.read()  # until the first has ended
        return None
    jnp.zeros(8).block_until_ready()
    before, most, over = held(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = max(most, held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    params = Checkpoint(folder, config(model, layers), "").params(DTYPE, mesh)
    jax.block_until_ready(params)
    over.set()
    watcher.join()
    part = sum(shard.data.nbytes for array in jax.tree.leaves(params) for shard in array.addressable_shards)
    return {"part": part, "after": held() - before, "most": max(most, held()) - before}


def measured(folder: Path, model: str, layers: int, devices: int) -> dict[str, int]:
    """The same of processes of their own."""
    shapes = model_shapes(config(model, layers), DTYPE)
    save_params(folder / "params", jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))
    command = [sys.executable, "-m", "benchmarks.load_memory", "--model", model, "--layers", str(layers)]
    command += ["--devices", str(devices), "--folder", str(folder), "--process"]
    processes = [
        subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(devices)
    ]
    assert processes[0].stdout is not None
    said = processes[0].stdout.readline()
    for process in reversed(processes):  # as they are: each would wait for all others to end
        process.kill()
        process.wait()
    if not said:
        raise UserError("the first process ended before it had loaded its part; what it printed says why")
    found: dict[str, int] = json.loads(said)
    return found


def part_of(model: str, devices: int) -> int:
    """Bytes of a device's part of the whole model."""
    whole = model_shapes(config(model, SHAPES[model].layers), DTYPE)

    def share(weight: jax.ShapeDtypeStruct, spec: Any) -> int:
        return weight.size * weight.dtype.itemsize // (1 if spec == sharding.WHOLE else devices)

    return sum(jax.tree.leaves(jax.tree.map(share, whole, sharding.weight_specs(whole))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama3-70b", metavar="NAME", help="default: llama3-70b")
    parser.add_argument("--layers", type=int, default=4, metavar="L", help="of its layers (default: 4)")
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process is not None:
        print(json.dumps(loaded(args.folder, args.model, args.layers, args.devices, args.process)), flush=True)
        return
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), args.model, args.layers, args.devices)
    whole = part_of(args.model, args.devices)
    beyond = found["most"] - found["part"]
    figures: dict[str, Any] = {
        "model": args.model,
        "layers": args.layers,
        "devices": args.devices,
        "bytes": found,
        "of_the_part": round(found["most"] / found["part"], 3),
        "whole_model": {"part": whole, "of_the_part, if what is on top stays": round((whole + beyond) / whole, 3)},
        "seconds": round(time.perf_counter() - begun, 1),
    }
    table = Table("GiB, of one process", f"{args.layers} layers", "all layers")
    table.add_row("its part of the weights", f"{found['part'] / GIB:.2f}", f"{whole / GIB:.2f}")
    table.add_row("the most that it held", f"{found['most'] / GIB:.2f}", f"{(whole + beyond) / GIB:.2f}, extrapolated")
    table.add_row("of its part", f"{figures['of_the_part']:.2f}", f"{(whole + beyond) / whole:.2f}, extrapolated")
    Console().print(table)
    provenance.save(args.json, figures)


if __name__ == "__main__":
    with reported():
        main()
