"""Where a pace's tables come from: odds from the draft's folder, costs from a measurement on this device.

DRAFT/pace.json holds the odds (`python -m train pace` writes it). What a round costs is measured when a model is warmed
up where nobody has yet, in some seconds, and kept in the cache folder: CACHE/pace/NAME.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from frspec_jax import engine, files, prefill, tuned
from frspec_jax.config import Sampling, TreeConfig
from frspec_jax.errors import UserError, quoted
from frspec_jax.kv_cache import rounded_capacity
from frspec_jax.lookup import LONGEST
from frspec_jax.pace import BELIEVED, GRID, Costs, Odds, Pace, PaceTables, Pulse
from frspec_jax.plan import Plan
from frspec_jax.prefill import Chunks
from frspec_jax.state import RUNNING, Asked, Caches, DecodeState, Weights
from pallas_kernels import device
from pallas_kernels.measured import cache_folder

FILE = "pace.json"
FORMAT = "frspec-jax pace 1"
WRITE = "python -m train pace"

# Of a draft that has none of its own: it is believed, and chains go on as in SmolLM2-135M-Instruct's own answers to 150
# conversations (assets/smollm2-135m/pace.json).
AS_SAID = [float(x) for x in GRID]
FOLLOWED = [
    [0.00, 0.00, 0.00, 0.00, 0.00, 0.00, 0.00],
    [0.20, 0.53, 0.66, 0.74, 0.76, 0.74, 0.76],
    [0.49, 0.65, 0.73, 0.79, 0.80, 0.81, 0.86],
    [0.65, 0.73, 0.78, 0.80, 0.81, 0.86, 0.86],
    [0.72, 0.78, 0.80, 0.82, 0.86, 0.87, 0.86],
    [0.78, 0.81, 0.83, 0.87, 0.91, 0.87, 0.89],
    [0.90, 0.92, 0.93, 0.93, 0.94, 0.95, 0.95],
]


# Odds --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Odds as a file has them: any number of levels and of a chain's tokens, of which the last stand for all further.

    beam: by level, at each probability of `pace.GRID`. chain: by the match's length (0 to `LONGEST`), for each token.
    about: what they were counted in, for the reader.
    """

    beam: list[list[float]]
    chain: list[list[float]]
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        fits = (
            len(self.beam) > 0
            and all(len(row) == len(GRID) for row in self.beam)
            and len(self.chain) == LONGEST + 1
            and all(len(row) == len(self.chain[0]) > 0 for row in self.chain)
        )
        if not fits:
            raise ValueError("its tables are of other sizes")
        values = np.asarray([*np.ravel(self.beam), *np.ravel(self.chain)], float)
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("a chance is not between 0 and 1")

    def odds(self, levels: int, tokens: int) -> Odds:
        """The arrays for so many levels, and chains of so many tokens."""
        beam = [self.beam[min(level, len(self.beam) - 1)] for level in range(levels)]
        chain = [[row[min(place, len(row) - 1)] for place in range(tokens)] for row in self.chain]
        return Odds.of(beam, chain)


DEFAULT = Fitted([AS_SAID], FOLLOWED)


def read_odds(folder: Path | None) -> Fitted:
    """The odds of a draft's folder; where it has none, those of `DEFAULT`.

    Raises:
      UserError: the file is damaged.
    """
    if folder is None:
        return DEFAULT
    file = folder / FILE
    try:
        data = json.loads(file.read_text("utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"it does not say format {FORMAT!r}")
        return Fitted(data["beam"], data["chain"], dict(data.get("about", {})))
    except FileNotFoundError:
        return DEFAULT
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{quoted(file)} is damaged ({error}); delete it, or write it anew with {WRITE}") from None


def write_odds(folder: Path, fitted: Fitted) -> Path:
    """Put odds into a draft's folder. An interruption leaves the old file."""
    file = folder / FILE
    files.write_json(file, {"format": FORMAT, **dataclasses.asdict(fitted)})
    return file


# Costs -------------------------------------------------------------------------------------------

ROUNDS, REPEATS = 4, 5  # of one kind in a row, and how often: the best of the repeats counts
ROUND = 2  # one more whenever a round's program has become quicker: what was measured before is measured anew
NEVER, VANILLA_MS, FREE = 1e12, 1e6, 1e-9  # a table in which one choice alone pays


def forced(pace: Pace, size: int, levels: int) -> Costs:
    """Costs under which rounds verify `pace.sizes[size]` nodes and draft `levels` levels, whatever the odds."""
    verify = [NEVER] * len(pace.sizes)
    verify[0], verify[size] = (1.0, 1.0) if size == 0 else (VANILLA_MS, 1.0)
    draft = [FREE * level if level <= levels else NEVER * level for level in range(pace.growth.depth + 1)]
    return Costs.of(verify, draft)


def measured(plan: Plan, weights: Weights, state: DecodeState) -> tuple[Costs, Caches]:
    """What rounds cost on this device: those of a plan itself, each made to do one thing by `forced` costs.

    state: donated, of a text with room for every round. Returns the costs, and its caches.
    """

    def timed(costs: Costs) -> float:
        nonlocal state
        mine = with_costs(weights, costs)
        state = jax.block_until_ready(begun_anew(state))
        before, begun = int(state.rounds), time.perf_counter()
        state = jax.block_until_ready(engine.run(plan, mine, state, np.int32(ROUNDS)))
        return 1e3 * (time.perf_counter() - begun) / max(1, int(state.rounds) - before)

    assert plan.pace is not None
    costs = costs_by(timed, plan.pace, drafts=bool(plan.drafter.by_level(plan.pace.growth)))
    return costs, state.caches


def with_costs(weights: Weights, costs: Costs) -> Weights:
    """The same weights, and decisions by other costs."""
    assert weights.pace is not None
    return dataclasses.replace(weights, pace=dataclasses.replace(weights.pace, costs=costs))


def costs_by(timed: Callable[[Costs], float], pace: Pace, *, drafts: bool, repeats: int = REPEATS) -> Costs:
    """Costs as `timed` finds them: the milliseconds of a round under costs that force it to do one thing.

    drafts: whether something can be drafted at all.
    """
    top, deepest = len(pace.sizes) - 1, pace.growth.depth
    kinds = [(size, 0) for size in range(top + 1)]
    kinds += [(top, level) for level in {1, deepest}] if drafts else []
    best = dict.fromkeys(kinds, np.inf)
    for _ in range(repeats):
        for kind in kinds:
            best[kind] = min(best[kind], timed(forced(pace, *kind)))
    # A pass over more nodes takes no less time, and a level takes some, whatever noise says; all further ones as much.
    verify = np.maximum.accumulate([best[size, 0] for size in range(top + 1)])
    first, last = (max(FREE, best.get((top, level), 0.0) - verify[top]) for level in (1, deepest))
    each = max(FREE, (last - first) / max(1, deepest - 1))
    return Costs.of(verify.tolist(), [0.0, *(first + level * each for level in range(deepest))])


@jax.jit
def _restarted(length: Array, pulse: Pulse) -> tuple[Array, Pulse]:
    """A length and a pulse as at the beginning: with an eager drafter, which costs alone hold back."""
    still = jax.tree.map(lambda x: x * 0, pulse)
    return length * 0 + START, dataclasses.replace(still, gain=still.gain + 1.0, believed=still.believed + BELIEVED)


START = 64  # tokens of the text that costs are measured in


def begun_anew(state: DecodeState) -> DecodeState:
    """The state with all of its room before it again, whether a text, or those of a batch, had ended or not.

    Nothing is penalised in it: what an earlier request asked for would be part of what is measured.
    """
    length, pulse = _restarted(state.length, state.pulse)
    zero = state.emitted * 0
    accepted = dataclasses.replace(state.accepted, count=zero + 1)
    penalties = state.penalties
    if penalties is not None:
        penalties = dataclasses.replace(penalties, active=penalties.active & False)
    return dataclasses.replace(
        state,
        length=length,
        pulse=pulse,
        trust=jax.tree.map(lambda x: x * 0, state.trust),
        emitted=zero + 1,
        finished=zero + RUNNING,
        accepted=accepted,
        penalties=penalties,
    )


def measuring_state(plan: Plan, weights: Weights, caches: Caches, chunks: Chunks) -> DecodeState:
    """A text to measure costs in: caches are donated."""
    prompt = np.arange(START, dtype=np.int32) % plan.config.vocab_size
    asked = Asked.of(Sampling(), seed=0, limit=caches.capacity)
    return prefill.start(plan, weights, caches, prompt, asked, chunks=chunks)


def room_to_measure(pace: Pace, tree: TreeConfig) -> int:
    """Cache rows that measuring needs."""
    return rounded_capacity(START + (ROUNDS + 1) * (tree.depth + 1) + max(pace.growth.draft_rows, tree.size))


def name_of(plan: Plan, dtype: Any, vocab: int | None, texts: int | None = None) -> str:
    """What measured costs are kept under: everything that they depend on, the device first.

    texts: in a batch; None: for a text by itself.
    """
    facts: tuple[Any, ...] = (ROUND, tuned.key(dtype), device.current(), vocab)
    facts = (*facts, plan.config, plan.drafter, plan.tree, plan.pace, plan.kernels)
    facts = facts if texts is None else (*facts, texts)
    facts = facts if plan.mesh is None else (*facts, plan.mesh.devices.size)
    return hashlib.sha256(repr((*facts, jax.__version__)).encode()).hexdigest()[:20]


def kept_costs(name: str, pace: Pace) -> Costs | None:
    """Costs that were measured before under a name; None where they were not, or nothing is kept."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        data = json.loads((folder / "pace" / f"{name}.json").read_text("utf-8"))
        costs = Costs.of(data["verify_ms"], data["draft_ms"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # measured again
    fits = costs.verify.shape == (len(pace.sizes),) and costs.draft.shape == (pace.growth.depth + 1,)
    return costs if fits and np.isfinite(costs.verify).all() and np.isfinite(costs.draft).all() else None


def keep_costs(name: str, pace: Pace, costs: Costs) -> None:
    """Keep costs for the next run; where they cannot be, they are measured again."""
    folder = cache_folder()
    if folder is None:
        return
    about = {"machine": tuned.machine(), "nodes": list(pace.sizes), "jax": jax.__version__}
    rounded = {"verify_ms": np.asarray(costs.verify), "draft_ms": np.asarray(costs.draft)}
    try:
        (folder / "pace").mkdir(parents=True, exist_ok=True)
        lists = {key: [round(float(ms), 4) for ms in row] for key, row in rounded.items()}
        files.write_json(folder / "pace" / f"{name}.json", about | lists)
    except (OSError, UserError):
        pass


def guessed(pace: Pace) -> Costs:
    """Costs until some are measured, for a device to which bytes are all: more nodes cost next to nothing."""
    verify = [1.0 + 0.02 * size for size in pace.sizes]
    return Costs.of(verify, [0.0, *(0.05 + 0.04 * level for level in range(pace.growth.depth))])


def tables_of(pace: Pace, tree: TreeConfig, odds: Fitted) -> PaceTables:
    """Tables to begin with."""
    return PaceTables(guessed(pace), odds.odds(pace.growth.depth, tree.depth))
