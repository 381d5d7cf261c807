"""How fast a run is: tokens a second, and what share of the device's own product rate its products reach."""

from __future__ import annotations

import time

from train.devices import product_rate


class Speed:
    """Counts the steps between two reports.

    Args:
      tokens, flops: of a step, over all devices; the operations of its matrix products.
      compute: the dtype of the products. devices: how many share a step.
    """

    def __init__(self, tokens: int, flops: float, compute: str, devices: int) -> None:
        self._tokens, self._flops = tokens, flops
        self._peak = product_rate(compute) * devices
        self.restart()

    def restart(self) -> None:
        """Leave out what has passed since the last report: evaluations, compilation."""
        self._mark, self._steps = time.perf_counter(), 0

    def count(self) -> None:
        self._steps += 1

    @property
    def steps_per_second(self) -> float:
        """Steps a second since the last report."""
        return self._steps / (time.perf_counter() - self._mark)

    def figures(self) -> dict[str, float]:
        """Tokens a second, and the share of the rate of one large matrix product (model FLOP utilisation)."""
        rate = self.steps_per_second
        return {
            "tokens_per_second": round(rate * self._tokens),
            "utilisation": round(rate * self._flops / self._peak, 3),
        }

    @property
    def short(self) -> str:
        """Tokens a second, for a line of progress that has little room."""
        return f"{self.figures()['tokens_per_second']:,} tokens/s"
