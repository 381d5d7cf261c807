"""What training is for, measured while it lasts: tokens a round on a few prompts that are never trained on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from frspec_jax.checkpoint import Checkpoint
from frspec_jax.defaults import defaults
from frspec_jax.drafters.base import DraftParams, DraftSpec, Target
from frspec_jax.drafting import Drafting
from frspec_jax.generator import Generator
from frspec_jax.hosts import first_process
from frspec_jax.llama import LlamaParams
from frspec_jax.method import Method
from frspec_jax.request import Request
from frspec_jax.runtime import Runtime
from frspec_jax.state import Weights
from pallas_kernels.dispatch import AUTO
from train.batches import Packing

PROMPTS, LONGEST, TOKENS = 8, 200, 48  # prompts, tokens of each at most, and tokens of each answer
TEXT = 32  # tokens of a text without turns that serve as a prompt


def held_out_prompts(packing: Packing) -> list[np.ndarray]:
    """The prompts [T] int32 of the first held-out sequences, up to where their first answer begins."""
    found: list[np.ndarray] = []
    for tokens, answer in packing.held_out_sequences():
        begin = int(np.argmax(answer)) or TEXT
        if 0 < begin <= min(LONGEST, len(tokens) - 1):
            found.append(np.asarray(tokens[:begin], np.int32))
        if len(found) == PROMPTS:
            break
    return found


class Probe:
    """The accepted length of a draft in the making: greedy, the device's default tree, over the full vocabulary."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: DraftSpec,
        target: LlamaParams,
        prompts: list[np.ndarray],
        finished: Callable[[Any], Any],
    ) -> None:
        self._checkpoint, self._spec, self._prompts, self._finished = checkpoint, spec, prompts, finished
        self._target = _on_one_device(target)

    def accepted_length(self, params: DraftParams) -> float | None:
        """Tokens a round, the bonus token counted, pooled over all prompts; None from all processes but the first."""
        if not first_process() or not self._prompts:
            return None
        draft = self._finished(_on_one_device(params))
        known = self._spec.vocabulary(draft)
        ids = np.arange(self._checkpoint.config.vocab_size, dtype=np.int32) if known is None else known
        target = Target(self._checkpoint.config, self._target)
        drafter, weights = self._spec.assemble(target, draft, ids, kernels=AUTO)
        dtype = self._target.embedding.dtype
        best = defaults(dtype)
        drafting = Drafting(drafter, self._spec.fit(best.tree), Method(self._spec.kind), len(ids))
        runtime = Runtime(dtype, LONGEST + TOKENS, best.chunks)
        model = Generator(self._checkpoint, drafting, Weights(self._target, weights), runtime)
        results = [model.generate_ids(prompt, Request(TOKENS)) for prompt in self._prompts]
        rounds = sum(result.rounds for result in results)
        return round(sum(len(result.tokens) - 1 for result in results) / max(1, rounds), 4)


def _on_one_device(tree: Any) -> Any:
    """This process' first copy of arrays that every device has."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)
