"""Decode loops of a published model's sizes, with random weights: compiled ahead, run, and held against their floor."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.gpu_check.runner import Session
from eval.methods.floor import bytes_read
from frspec_jax import engine, kv_cache
from frspec_jax.config import VANILLA, ModelConfig, TreeConfig
from frspec_jax.drafters.base import NO_WEIGHTS, Vanilla
from frspec_jax.plan import EXACT, Plan
from frspec_jax.presets import config_of, eagle_of, random_weights, state_at
from frspec_jax.state import RUNNING, DecodeState, Weights
from frspec_jax.vocabulary import crop
from pallas_kernels import timing
from pallas_kernels.dispatch import Implementation, Kernels
from pallas_kernels.models import SHAPES, Shape

WORKERS = 5  # programs that are compiled side by side
TIMING = 15.0  # seconds of a step that are kept for timing them


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured at which size."""

    model: str  # of `SHAPES`
    shape: Shape
    context: int
    rounds: int  # of a measurement
    tree: TreeConfig
    draft_vocab: int
    dtype: Any
    kernel: Implementation  # what a Pallas kernel runs as
    megabytes: int  # that are read to measure the bandwidth


REAL = Sizes("llama3-8b", SHAPES["llama3-8b"], 1024, 20, TreeConfig(60, 6, 10), 32_768, jnp.bfloat16, "pallas", 2048)
DRY = Sizes(
    "tiny",
    dataclasses.replace(SHAPES["tiny"], layers=1),
    100,
    2,
    TreeConfig(4, 2, 2),
    256,
    jnp.float32,
    "interpret",
    16,
)


def sizes_of(session: Session) -> Sizes:
    return DRY if session.dry else REAL


def every_kernel(session: Session) -> Kernels:
    """All operations by kernels. A dry run interprets the head's alone: all of a round's take a minute to compile.

    (That each of them runs interpreted, the steps that look at one at a time show.)
    """
    return Kernels("xla", "interpret", "xla") if session.dry else Kernels.all("pallas")


def bandwidth_of(session: Session) -> float:
    """Bytes a second, measured once a process."""
    if "bandwidth" not in session.held:
        session.held["bandwidth"] = timing.bandwidth(sizes_of(session).megabytes)
    return session.held["bandwidth"]


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to decode."""

    name: str
    kernels: Kernels
    vocab: int | None  # V'; None: nothing drafts
    int8: bool = False  # the draft's head
    options: tuple[tuple[str, Any], ...] = tuple(EXACT.items())  # XLA's


class Program:
    """A loop of rounds from one state, which a call of `run` begins anew."""

    def __init__(self, variant: Variant, sizes: Sizes, config: ModelConfig, weights: Weights) -> None:
        self.variant, self._sizes = variant, sizes
        plan = Plan(config, eagle_of(config, variant.kernels), sizes.tree, kernels=variant.kernels)
        if variant.vocab is None:
            plan = dataclasses.replace(plan, drafter=Vanilla(), tree=VANILLA)
            self._weights = dataclasses.replace(weights, draft=NO_WEIGHTS)
        else:
            head = crop(weights.target.head, np.arange(variant.vocab), variant.int8)
            self._weights = dataclasses.replace(weights, draft=dataclasses.replace(weights.draft, head=head))
        self._plan = plan
        capacity = kv_cache.rounded_capacity(sizes.context + sizes.rounds * (plan.tree.depth + 1) + plan.margin)
        start = functools.partial(state_at, plan, capacity=capacity, dtype=sizes.dtype)
        self._state = jax.jit(start)(jnp.int32(sizes.context))
        self.seconds = 0.0  # that tracing and compiling took

    @property
    def bytes(self) -> int:
        """That a round must read."""
        return bytes_read(self._plan, self._weights, self._sizes.context)

    def compile(self) -> None:
        begun = time.perf_counter()

        def loop(held: Weights, state: DecodeState, rounds: Array) -> DecodeState:
            again = {"length": self._sizes.context, "emitted": 1, "finished": RUNNING, "rounds": 0}
            state = dataclasses.replace(state, **{name: jnp.int32(value) for name, value in again.items()})
            return engine.decode_rounds(self._plan, held, state, rounds)

        lowered = jax.jit(loop, donate_argnums=1).lower(self._weights, self._state, jnp.int32(1))
        self._compiled = lowered.compile(compiler_options=dict(self.variant.options))
        self.seconds = time.perf_counter() - begun

    def run(self, rounds: int) -> None:
        self._state = self._compiled(self._weights, self._state, jnp.int32(rounds))
        jax.block_until_ready(self._state)

    def microseconds(self, repeats: int = 5) -> float:
        """Of a round: the median of some loops."""
        self.run(self._sizes.rounds)
        times = []
        for _ in range(repeats):
            begun = time.perf_counter()
            self.run(self._sizes.rounds)
            times.append(time.perf_counter() - begun)
        return 1e6 * statistics.median(times) / self._sizes.rounds


def weights_of(config: ModelConfig, sizes: Sizes) -> Weights:
    """Random weights, with a draft whose head keeps the whole vocabulary."""
    made = jax.jit(functools.partial(random_weights, config, config.vocab_size, sizes.dtype))(jax.random.key(0))
    return jax.block_until_ready(made)


def model_of(session: Session, layers: int | None = None) -> tuple[ModelConfig, Weights]:
    """The model with so many of its layers (None: all); the last one asked for is kept for the next step."""
    sizes = sizes_of(session)
    shape = dataclasses.replace(sizes.shape, layers=min(layers or sizes.shape.layers, sizes.shape.layers))
    if session.held.get("shape") != shape:
        session.held.pop("weights", None)
        session.held["programs"] = {}
        config = config_of(shape)
        session.held |= {"shape": shape, "weights": (config, weights_of(config, sizes))}
    return session.held["weights"]


def measure(session: Session, variants: list[Variant], layers: int | None = None) -> None:
    """Compile variants side by side, then time one after the other, and tell each as it comes.

    What is not compiled in time is told so, and the others are timed all the same.
    """
    sizes, speed = sizes_of(session), bandwidth_of(session)
    config, weights = model_of(session, layers)
    programs = [Program(variant, sizes, config, weights) for variant in variants]
    pool = concurrent.futures.ThreadPoolExecutor(WORKERS)
    waiting = {pool.submit(program.compile): program for program in programs}
    concurrent.futures.wait(waiting, timeout=max(1.0, session.left - TIMING))
    pool.shutdown(wait=False, cancel_futures=True)
    for future, program in waiting.items():
        name = program.variant.name
        if not future.done() or future.cancelled():
            session.tell(name, {"failed": "not compiled in time"})
            continue
        try:
            future.result()
            session.tell(name, _timed(program, speed))
        except Exception as error:  # too little memory, say: the other variants fit
            session.tell(name, {"failed": str(error)[-600:]})
        else:
            session.held["programs"][name] = program


def _timed(program: Program, speed: float) -> dict[str, Any]:
    microseconds, floor = program.microseconds(), 1e6 * program.bytes / speed
    return {
        "us": round(microseconds, 1),
        "floor_us": round(floor, 1),
        "times_floor": round(microseconds / floor, 3),
        "bytes": program.bytes,
        "compile_seconds": round(program.seconds, 1),
    }
