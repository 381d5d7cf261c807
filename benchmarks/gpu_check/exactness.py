"""That drafting changes no token: in float32, greedy and sampled, whatever kernels run."""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.gpu_check.programs import every_kernel
from benchmarks.gpu_check.runner import Session
from frspec_jax.config import Sampling, TreeConfig
from pallas_kernels.dispatch import Kernels
from tests.support import toy

PROMPTS = (3, 9, 40)  # tokens
IDS = np.array([5, 1, 9, 3, 11, 0, 7, 20, 21, 2, 4])  # of the draft's head


def exactness(session: Session) -> None:
    """The toy model's tokens by drafting, against vanilla decoding by XLA's products and attention alone."""
    config = toy.config(num_layers=1 if session.dry else 2)
    tree = TreeConfig(4, 2, 2) if session.dry else TreeConfig(60, 6, 10)
    ways = {"all": every_kernel(session)} | ({} if session.dry else {"xla": Kernels.all("xla")})
    weights, eagle = toy.weights(config, IDS)
    different = []
    for rule, settings in (("greedy", Sampling()), ("sampled", Sampling(1.0))):
        vanilla = dataclasses.replace(toy.vanilla_plan(config, settings), kernels=Kernels.all("xla"))
        for name, kernels in ways.items():
            plan = toy.plan(config, dataclasses.replace(eagle, kernels=kernels), tree, settings)
            plan = dataclasses.replace(plan, kernels=kernels)
            equal, accepted = 0, 0
            for length in PROMPTS:
                prompt = np.arange(length) % config.vocab_size
                expected, _ = toy.decode(vanilla, weights, prompt, 24, settings, seed=length)
                tokens, state = toy.decode(plan, weights, prompt, 24, settings, seed=length)
                equal += tokens == expected
                accepted += len(tokens) - 1 - int(state.rounds)
            session.tell(f"{rule}, {name}", {"equal": equal, "of": len(PROMPTS), "drafts_accepted": accepted})
            different += [f"{rule}, {name}"] * (equal < len(PROMPTS))
    if different:
        raise RuntimeError(f"drafting changed tokens: {'; '.join(different)}")
