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
import multiprocessing.connection
import socket
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection
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
DTYPE = jnp.bfloat16


def config(model: str, layers: int) -> ModelConfig:
    """The model's sizes, with so many layers."""
    return config_of(dataclasses.replace(SHAPES[model], layers=layers), family_of(model))


def held() -> int:
    """Bytes of this process's own memory: pages of files are left out, which the system takes back when it likes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def load(told: Connection, folder: Path, cfg: ModelConfig, address: str, devices: int, process: int) -> None:
    """One of so many processes: the first tells what it needs to load its part, in bytes, and the others stand by."""
    jax.distributed.initialize(address, devices, process)
    mesh = sharding.mesh_of(devices)
    if process:
        told.recv()  # never comes: it is killed when the first is done
    jnp.zeros(8).block_until_ready()
    before, most, over = held(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.01):
            most = max(most, held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    params = Checkpoint(folder, cfg, "").params(DTYPE, mesh)
    jax.block_until_ready(params)
    over.set()
    watcher.join()
    part = sum(shard.data.nbytes for array in jax.tree.leaves(params) for shard in array.addressable_shards)
    told.send({"part": part, "after": held() - before, "most": max(most, held()) - before})


def measured(folder: Path, cfg: ModelConfig, devices: int) -> dict[str, int]:
    """What it tells, of a checkpoint of zeros of these sizes."""
    save_params(folder / "params", jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), model_shapes(cfg, DTYPE)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    anew = multiprocessing.get_context("spawn")
    mine, told = anew.Pipe()
    given = (told, folder, cfg, address, devices)
    processes = [anew.Process(target=load, args=(*given, number), daemon=True) for number in range(devices)]
    for process in processes:
        process.start()
    multiprocessing.connection.wait([mine, processes[0].sentinel])
    found: dict[str, int] | None = mine.recv() if mine.poll() else None
    for process in reversed(processes):  # as they are: each would wait for all others to end
        process.kill()
        process.join()
    if found is None:
        raise UserError("the first process ended before it had loaded its part; what it printed says why")
    return found


def part_of(cfg: ModelConfig, devices: int) -> int:
    """Bytes of a device's part of a whole model."""
    split = sharding.Split(cfg, devices)

    def share(path: Sequence[Any], weight: jax.ShapeDtypeStruct) -> int:
        size, spec = weight.size * weight.dtype.itemsize, sharding.PARTITION.get(path[-1].name)
        if spec is None:
            return size
        mine = sum(end - start for start, end in split.pieces(path[-1].name, 0))
        return size // weight.shape[spec.index(sharding.AXIS)] * mine

    shapes = model_shapes(dataclasses.replace(cfg, tied_head=False), DTYPE)  # a device has rows of the head apart
    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(share, shapes)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama3-70b", metavar="NAME", help="default: llama3-70b")
    parser.add_argument("--layers", type=int, metavar="L", help="of its layers (default: 4, or all of fewer)")
    parser.add_argument("--tensor-parallel", type=int, default=8, metavar="N", help="devices (default: 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    model, devices, most = args.model, args.tensor_parallel, SHAPES[args.model].layers
    layers = min(4, most) if args.layers is None else args.layers
    if not 1 <= layers <= most:
        raise UserError(f"--layers {layers}: {model} has {most}; give 1 to {most}")
    if devices < 2:
        raise UserError(f"--tensor-parallel {devices} divides nothing; give at least 2")
    whole = part_of(config(model, most), devices)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(Path(folder), config(model, layers), devices)
    beyond = found["most"] - found["part"]
    figures: dict[str, Any] = {
        "model": model,
        "layers": layers,
        "devices": devices,
        "bytes": found,
        "of_the_part": round(found["most"] / found["part"], 3),
        "whole_model": {"part": whole, "of_the_part, if what is on top stays": round((whole + beyond) / whole, 3)},
    }
    table = Table("GiB, of one process", f"{layers} layers", "all layers")
    table.add_row("its part of the weights", f"{found['part'] / GIB:.2f}", f"{whole / GIB:.2f}")
    table.add_row("the most that it held", f"{found['most'] / GIB:.2f}", f"{(whole + beyond) / GIB:.2f}, extrapolated")
    table.add_row("of its part", f"{figures['of_the_part']:.2f}", f"{(whole + beyond) / whole:.2f}, extrapolated")
    Console().print(table)
    provenance.save(args.json, figures)


if __name__ == "__main__":
    with reported():
        main()
