"""What the ledger compiles: a round, a vanilla step, a chunk of a prompt, a round of a batch, a step of training."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.mesh import AbstractDevice  # no public name yet
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, SingleDeviceSharding

from benchmarks.train_step import random_batch
from frspec_jax import batched, defaults, engine, kv_cache
from frspec_jax.config import VANILLA, ModelConfig, TreeConfig
from frspec_jax.drafters.base import Vanilla
from frspec_jax.drafters.eagle import EagleConfig
from frspec_jax.mesh_parts import divided, state_on, weights_on
from frspec_jax.pace_tables import DEFAULT, tables_of
from frspec_jax.plan import EXACT, Plan
from frspec_jax.prefill import Chunk, prefill_chunk
from frspec_jax.presets import config_of, eagle_of, family_of, random_weights, state_at
from frspec_jax.sampling import Rule
from frspec_jax.sharding import AXIS, WHOLE, on_devices
from pallas_kernels.device import H100, compiling_for
from pallas_kernels.dispatch import Kernels
from pallas_kernels.models import SHAPES
from pallas_kernels.tree_attention import attention_rows
from train.optimiser import new_state, seed_words
from train.recipe import Recipe, initial_params, train_step

CORES = 132  # multiprocessors of an H100
DTYPE = jnp.bfloat16
ANSWER = 160  # tokens that the caches have room for after the context
KERNELS = {
    "auto": Kernels(),
    "xla": Kernels.all("xla"),
    "attention": Kernels("pallas", "xla", "xla"),
    "attention and head": Kernels("pallas", "pallas", "xla"),
    "all": Kernels.all("pallas"),
    "mosaic": Kernels.all("mosaic"),  # all too, attention in Mosaic GPU
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A program by what a reader would ask for."""

    what: str = "round"  # of `TRACED`; "paced" is a round that chooses what it drafts and verifies
    model: str = "llama3-8b"  # of `SHAPES`
    layers: int = 0  # 0: all of the model's
    draft_vocab: int = 32_768  # 0: the model's own
    kernels: str = "auto"  # of `KERNELS`
    context: int = 1024
    tree: tuple[int, int, int] = (60, 6, 10)  # size, depth, top-k
    rule: Rule = "greedy"
    texts: int = 16  # of a batch
    split_k: bool = False  # whether XLA may split a product over its inputs, which takes a second launch to add up
    slots: int = 0  # of the draft, for ids of the text beside V'
    devices: int = 1  # over which the target is divided; the ledger is that of one of them

    @property
    def name(self) -> str:
        """What tells it from the other cases."""
        said = [self.model] + ([f"{self.layers} layers"] if self.layers else [])
        if self.what == "batch":
            said.append(f"{self.texts} texts")
        if self.what in ("round", "paced", "batch"):
            said.append(f"V' {self.draft_vocab:,}" if self.draft_vocab else "full vocabulary")
            said += [f"{self.slots} slots"] * bool(self.slots)
        if self.what != "train":
            said.append(f"kernels {self.kernels}")
        if self.devices > 1:
            said.append(f"{self.devices} devices")
        if self.context != Case.context:
            said.append(f"context {self.context:,}")
        said += ["products split over K"] * self.split_k + [self.rule] * (self.rule != "greedy")
        return f"{self.what}: {', '.join(said)}"


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function with its arguments as shapes, which on several devices say where their parts stand."""

    function: Any
    arguments: tuple[Any, ...]
    donated: int | tuple[int, ...]  # the argument that it may overwrite
    loop: int | None = None  # which of its loops of rounds is looked at; None: all that it runs
    mesh: Mesh | None = None  # of several devices


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What XLA made of a case."""

    text: str  # optimised HLO
    temporaries: int  # bytes of a device
    held: int  # bytes of a device: the arguments, weights and caches among them
    loop: int | None


def compiled(case: Case, options: dict[str, Any]) -> Compiled:
    """Compile a case for an H100.

    Autotuning is off, since it needs the device. XLA's first choice without it splits many products of few rows over K;
    whether the device's would, no one knows, so a product is one launch unless the case says otherwise.
    """
    return compiled_program(lambda: TRACED[case.what](case), options, case.split_k)


def compiled_program(make: Callable[[], Traced], options: dict[str, Any], split_k: bool = False) -> Compiled:
    """The same for what `make` gives: it is called, and what it names is traced, for an H100."""
    alone = SingleDeviceSharding(h100s(1)[0])

    def abstract(tree: Any) -> Any:
        def shaped(a: Any) -> jax.ShapeDtypeStruct:
            placed = a.sharding if isinstance(a, jax.ShapeDtypeStruct) else None
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed or alone)

        return jax.tree.map(shaped, tree)

    # Pallas asks which GPU it compiles for: an abstract mesh tells it.
    told = AbstractDevice(H100.kind, CORES, "gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=told)
    with compiling_for(H100):
        with jax.sharding.use_abstract_mesh(mesh):
            this = make()
        here = mesh if this.mesh is None else this.mesh.abstract_mesh.update(abstract_device=told)
        with jax.sharding.use_abstract_mesh(here):
            jitted = jax.jit(this.function, donate_argnums=this.donated)
            lowered = jitted.trace(*map(abstract, this.arguments)).lower(lowering_platforms=("cuda",))
    products = {} if split_k else {"xla_gpu_experimental_force_split_k": 1}
    done = lowered.compile(compiler_options=EXACT | products | {"xla_gpu_autotune_level": 0} | options)
    memory = done.memory_analysis()
    return Compiled(done.as_text(), memory.temp_size_in_bytes, memory.argument_size_in_bytes, this.loop)


@functools.cache
def h100s(count: int) -> Any:
    """So many H100s of one host, to compile for."""
    config = (Path(__file__).parent / "h100.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", target_config=config, topology=f"1x1x{count}").devices


def _config(case: Case) -> ModelConfig:
    shape = dataclasses.replace(SHAPES[case.model], layers=case.layers or SHAPES[case.model].layers)
    return config_of(shape, family_of(case.model))


def _plan(case: Case) -> tuple[Plan, Any, Any]:
    """The plan, and the shapes of weights and state."""
    config, kernels, drafts = _config(case), KERNELS[case.kernels], case.what != "vanilla"
    vocabulary = case.draft_vocab or config.vocab_size if drafts else None
    made = functools.partial(random_weights, config, vocabulary, DTYPE, slots=bool(case.slots))
    weights = jax.eval_shape(made, jax.random.key(0))
    mesh = Mesh(np.array(h100s(case.devices)), (AXIS,)) if case.devices > 1 else None
    on_mesh = dataclasses.replace(kernels, axis=AXIS if mesh else None)
    drafter = divided(eagle_of(config, kernels, case.slots), weights.draft, case.devices) if drafts else Vanilla()
    tree = TreeConfig(*case.tree) if drafts else VANILLA
    plan = Plan(config, drafter, tree, (2,), case.rule, on_mesh, mesh=mesh)
    if case.what == "paced":
        plan = dataclasses.replace(plan, pace=defaults.GPU_PACE, tree=defaults.DEFAULTS["gpu"].paced)
        tables = tables_of(defaults.GPU_PACE, plan.tree, DEFAULT)
        shaped = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tables)
        weights = dataclasses.replace(weights, pace=shaped)
    capacity = kv_cache.rounded_capacity(case.context + ANSWER + plan.margin)
    state = jax.eval_shape(functools.partial(state_at, plan, capacity=capacity, dtype=DTYPE), jnp.int32(case.context))
    return plan, weights, state


def _rounds(case: Case) -> Traced:
    plan, weights, state = _plan(case)
    sizes = attention_rows(state.caches.capacity, plan.kernels.attention)
    loop = sum(case.context + plan.margin > rows for rows in sizes[:-1])
    rounds: Any = np.int32(0)
    if plan.mesh is not None:
        weights = _placed(plan.mesh, weights, weights_on(plan, weights))
        state = _placed(plan.mesh, state, state_on(plan, state.caches))
        rounds = _placed(plan.mesh, rounds, WHOLE)
    return Traced(functools.partial(engine.rounds_on_mesh, plan), (weights, state, rounds), 1, loop, plan.mesh)


def _placed(mesh: Mesh, arrays: Any, specs: Any) -> Any:
    """The shapes of arrays, with where their parts stand."""
    return jax.tree.map(
        lambda a, there: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=there), arrays, on_devices(mesh, arrays, specs)
    )


def _batch(case: Case) -> Traced:
    """A round of several texts, of which each may have settings of its own, over the whole of the usual tree."""
    plan, weights, state = _plan(case)
    plan = dataclasses.replace(plan, rule="mixed", adjusts=True, logprobs=True, keeps=False)
    capacity, pool = state.caches.capacity, case.texts + 1
    state = jax.eval_shape(lambda: batched.new_state(plan, weights, capacity, pool, DTYPE))
    return Traced(functools.partial(batched.decode_slots, plan), (weights, state, np.zeros(case.texts, np.int32)), 1)


def _prefill(case: Case) -> Traced:
    plan, weights, state = _plan(case)
    size = defaults.defaults().chunks.short
    chunk = Chunk(np.zeros(size + 1, np.int32), np.int32(0), np.int32(size), np.bool_(True))
    function = functools.partial(prefill_chunk, plan)
    return Traced(function, (weights, state.caches, chunk, state.asked), 1)


def _training(case: Case) -> Traced:
    config, recipe = _config(case), Recipe(compute="bfloat16")
    draft = EagleConfig.like(config)
    state = jax.eval_shape(lambda key: new_state(initial_params(key, draft, config), recipe), jax.random.key(0))
    head = jax.ShapeDtypeStruct((config.vocab_size, config.hidden_size), jnp.float32)
    ranked = jax.ShapeDtypeStruct((config.vocab_size,), jnp.int32)
    batch = jax.eval_shape(lambda: random_batch(config, rows=4, row=512))
    step = train_step.__wrapped__  # type: ignore[attr-defined]

    def function(state: Any, *arrays: Any) -> Any:
        head, ranked, seed, batch = arrays
        return step(state, draft.layer_of(config), recipe, head, head, ranked, seed, batch)

    return Traced(function, (state, head, ranked, seed_words(0), batch), 0)


TRACED = {
    "round": _rounds,
    "paced": _rounds,
    "vanilla": _rounds,
    "batch": _batch,
    "prefill": _prefill,
    "train": _training,
}

OURS = ("rotary_append", "tree_attention", "best_children", "subvocab_head", "fused_linear", "compact")


def ours(kernel: str) -> bool:
    """Whether a kernel of this name is one of Pallas's."""
    return kernel.startswith(OURS)
