"""Search for the fastest draft setting, one figure at a time: what `eval tune` varies, and in which order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from frspec_jax import tuned
from frspec_jax.config import TreeConfig

PASSES = 3  # over all figures at most; two are enough unless they depend on one another strongly


@dataclasses.dataclass(frozen=True)
class Choice:
    """A setting: V', and the tree's shape."""

    draft_vocab: int
    size: int
    depth: int
    top_k: int

    @property
    def tree(self) -> TreeConfig:
        """The tree; a size that depth and top-k cannot fill is cut to what they can."""
        most = self.top_k + (self.depth - 1) * self.top_k**2 + 1
        return TreeConfig(min(self.size, most), self.depth, self.top_k)

    @property
    def setting(self) -> tuned.Setting:
        """The setting as it is kept."""
        return tuned.Setting(self.draft_vocab, self.tree)


@dataclasses.dataclass(frozen=True)
class Point:
    """What a setting was measured to do."""

    choice: Choice
    accepted_length: float  # tokens a round, the bonus token counted
    round_ms: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return 1e3 * self.accepted_length / self.round_ms


def climb(
    start: Choice, space: dict[str, list[int]], measured: Callable[[Choice], Point], done: Callable[[], None]
) -> tuple[Choice, list[Point]]:
    """Vary one figure at a time and keep the fastest, until a whole pass changes nothing.

    Returns the best setting, and every point that was measured, each setting once.
    """
    known: dict[tuned.Setting, Point] = {}

    def look(choice: Choice) -> Point:
        if choice.setting not in known:  # two sizes may be cut to the same tree
            known[choice.setting] = measured(choice)
        return dataclasses.replace(known[choice.setting], choice=choice)

    best = start
    for _ in range(PASSES):
        before = best
        for name, values in space.items():
            candidates = [best, *(dataclasses.replace(best, **{name: value}) for value in values)]
            points = []
            for candidate in candidates:
                points.append(look(candidate))
                done()
            best = max(points, key=lambda point: point.rate).choice
        if best == before:
            break
    return best, list(known.values())
