"""What is static in a program that decodes: a plan; another one is another compiled program."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from frspec_jax.config import ModelConfig, TreeConfig
from frspec_jax.drafters.base import Drafter
from frspec_jax.pace import Pace
from frspec_jax.sampling import Rule
from frspec_jax.sharding import AXIS
from pallas_kernels.dispatch import AUTO, Kernels

# XLA may otherwise leave out the rounding of a sum to bfloat16 and back, in one program and not in another, and
# a tree's pass and a single token's would part. In float32 this changes nothing. (JAX takes such options at the
# outermost jit alone: a program of one's own is built from `decode_rounds`.)
EXACT = {"xla_allow_excess_precision": False}


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static: the same plan is the same compiled program, whatever the prompt and the request's figures."""

    config: ModelConfig
    drafter: Drafter
    tree: TreeConfig
    stop_ids: tuple[int, ...] = ()
    rule: Rule = "greedy"
    kernels: Kernels = AUTO  # the target's; a drafter carries its own
    pace: Pace | None = None  # how rounds may differ; None: each verifies the whole tree that the drafter proposes
    adjusts: bool = False  # whether penalties and biases are looked at
    logprobs: bool = False  # whether log-probabilities of what is emitted are kept
    keeps: bool = True  # whether the state keeps the whole answer, and not only what the last round emitted
    mesh: Mesh | None = None  # over whose devices the target is divided (`sharding`); None: one device has all of it

    def __post_init__(self) -> None:
        assert self.kernels.axis == (None if self.mesh is None else AXIS), "the target's layers go by the mesh"

    @property
    def reads_text(self) -> bool:
        """Whether something looks at the text so far."""
        return self.drafter.reads_text or (self.pace is not None and self.pace.lookup)

    def within(self, rows: int) -> Plan:
        """The same for as long as a text fits `rows` rows of the caches."""
        kernels = dataclasses.replace(self.kernels, rows=rows)
        return dataclasses.replace(self, kernels=kernels, drafter=self.drafter.within(rows))

    @property
    def only_best(self) -> bool:
        """Whether nothing is asked of the target's logits but which is the largest."""
        return self.rule == "greedy" and not self.adjusts and not self.logprobs

    def stops(self, tokens: Array) -> Array:
        """Which of some tokens end a text."""
        # Where no id does, one that is none: XLA of JAX 0.11 crashes over an empty constant on a mesh.
        return jnp.isin(tokens, jnp.array(self.stop_ids or (-1,), jnp.int32))

    @property
    def margin(self) -> int:
        """Cache rows that a round may write beyond the committed ones."""
        growth = self.tree if self.pace is None else self.pace.growth
        return max(self.tree.size, growth.draft_rows, self.tree.depth + 1)
