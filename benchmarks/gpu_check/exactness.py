"""That drafting changes no token: in float32, greedy and sampled, whatever kernels run."""

from __future__ import annotations

import concurrent.futures
import dataclasses

import numpy as np

from benchmarks.gpu_check.programs import every_kernel
from benchmarks.gpu_check.runner import Session
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.plan import Plan
from pallas_kernels.dispatch import Kernels
from tests.support import toy

RULES = {"greedy": Sampling(), "sampled": Sampling(1.0)}
WORKERS = 6
PROMPTS = (3, 9, 40)  # tokens
IDS = np.array([5, 1, 9, 3, 11, 0, 7, 20, 21, 2, 4])  # of the draft's head


def exactness(session: Session) -> None:
    """The toy model's tokens by drafting, against vanilla decoding by XLA's products and attention alone."""
    config = toy.config(num_layers=1 if session.dry else 2)
    tree = TreeConfig(3, 1, 2) if session.dry else TreeConfig(60, 6, 10)
    ways = {"all": every_kernel(session)} | ({} if session.dry else {"xla": Kernels.all("xla")})
    weights, eagle = toy.weights(config, IDS)
    plans = {}
    rules = list(RULES)[1:] if session.dry else list(RULES)
    for rule in rules:
        settings = RULES[rule]
        vanilla = toy.vanilla_plan(config, settings)
        plans[rule, "vanilla"] = dataclasses.replace(vanilla, kernels=Kernels.all("xla"))
        for name, kernels in ways.items():
            plan = toy.plan(config, dataclasses.replace(eagle, kernels=kernels), tree, settings)
            plans[rule, name] = dataclasses.replace(plan, kernels=kernels)

    def decoded(rule: str, plan: Plan) -> list[tuple[list[int], int]]:
        """Tokens and rounds of each prompt."""
        found = []
        for length in PROMPTS:
            prompt = np.arange(length) % config.vocab_size
            tokens, state = toy.decode(plan, weights, prompt, 24, RULES[rule], seed=length)
            found.append((tokens, int(state.rounds)))
        return found

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:  # compiling is what takes the time
        waiting = {key: pool.submit(decoded, key[0], plan) for key, plan in plans.items()}
    different = []
    for (rule, name), future in waiting.items():
        if name == "vanilla":
            continue
        found, expected = future.result(), waiting[rule, "vanilla"].result()
        equal = sum(mine[0] == theirs[0] for mine, theirs in zip(found, expected, strict=True))
        accepted = sum(len(tokens) - 1 - rounds for tokens, rounds in found)
        session.tell(f"{rule}, {name}", {"equal": equal, "of": len(PROMPTS), "drafts_accepted": accepted})
        different += [f"{rule}, {name}"] * (equal < len(PROMPTS))
    if different:
        raise RuntimeError(f"drafting changed tokens: {'; '.join(different)}")
