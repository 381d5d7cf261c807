"""The steps of a run, and what happens every so many of them: a line of metrics, an evaluation, a checkpoint."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from jax import Array
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from frspec_jax.checkpoint import Checkpoint
from frspec_jax.errors import UserError
from train import devices
from train.batches import Batch, Packing
from train.corpus import Tally
from train.features import FeatureStore
from train.folder import Run
from train.optimiser import Metrics
from train.probe import Probe
from train.settings import RunSettings
from train.speed import Speed
from train.task import Task

REPORT_EVERY = 10  # steps between two lines of metrics
AHEAD = 2  # steps that the device has been given before the host waits for the loss of one: it is never without work


@dataclasses.dataclass(frozen=True)
class Every:
    """Something to do every `steps` steps (0: never), and after the run's last step if `last` says so."""

    steps: int
    action: Callable[[TrainState], None]
    last: bool = False

    def due(self, step: int, end: int) -> bool:
        """Whether it is to be done after a step; end: the run's last."""
        return bool(self.steps) and (step % self.steps == 0 or (self.last and step == end))


@dataclasses.dataclass(frozen=True)
class Opened:
    """A run that can go on: its folder is open, and what it trains on stands on the devices."""

    settings: RunSettings[Any]
    checkpoint: Checkpoint
    stores: list[FeatureStore]
    packing: Packing
    mesh: Mesh
    task: Task
    folder: Run
    held_out: list[Batch]  # what an evaluation reads
    ranked: Array  # [V] int32, all ids by frequency
    probe: Probe | None  # measures the accepted length; None where nobody asks for it
    console: Console
    state: TrainState  # new, or that of the last checkpoint
    tally: Tally  # what was left out of the corpora


class Loop:
    """Takes the steps of an opened run, from its state to the recipe's last."""

    def __init__(self, opened: Opened) -> None:
        settings, task, self._opened = opened.settings, opened.task, opened
        self._task, self._folder = task, opened.folder
        tokens = settings.rows * settings.row
        self._speed = Speed(tokens, task.flops * tokens, task.recipe.compute, opened.mesh.size)
        self._progress = Progress(*columns(), console=opened.console)
        self._bar = self._progress.add_task("training", total=task.recipe.steps, shown="")
        self._flying: collections.deque[tuple[int, Metrics]] = collections.deque()  # steps whose loss nobody has seen
        self._record = -1.0  # of the evaluations so far
        self._told = False  # how long the run will take
        self._every = (
            Every(settings.eval_every, self._evaluate, last=True),
            Every(settings.accept_every if opened.probe else 0, self._measure),
            Every(settings.save_every, self._save),
        )

    def run(self) -> TrainState:
        """Steps until the recipe's last; Ctrl-C saves what is done before it leaves.

        Raises:
          UserError: the loss or the weights are no numbers any more, or the disk refuses.
        """
        state, end = self._opened.state, self._task.recipe.steps
        first = int(state.step)
        batches = self._opened.packing.training(first, devices.share(self._opened.settings.rows))
        scores = [_score(row["held_out"]) for row in self._folder.rows(first) if "held_out" in row]
        self._record = max(scores, default=-1.0)
        self._speed.restart()
        self._progress.update(self._bar, completed=first)
        with self._progress:
            try:
                for step in range(first + 1, end + 1):
                    batch = devices.spread(next(batches), self._opened.mesh)
                    state, metrics = self._task.step(state, self._opened.ranked, batch)
                    self._flying.append((step, metrics))
                    self._land(AHEAD)
                    for every in self._every:
                        if every.due(step, end):
                            self._land()
                            every.action(state)
                    self._progress.update(self._bar, completed=step)
                self._land()
            except KeyboardInterrupt:
                # A step takes its state's memory over; if it was broken off, the checkpoint before it must do.
                if not any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, Array)):
                    with contextlib.suppress(UserError):
                        self._save(state)
                raise
        return state

    def _land(self, flying: int = 0) -> None:
        """Look at the losses of the steps that were given to the device, in their order, but for the last `flying`.

        Raises:
          UserError: one is no number; nothing has been kept since, for whatever keeps weights lands all steps first.
        """
        while len(self._flying) > flying:
            step, metrics = self._flying[0]
            loss = float(metrics["loss"])
            if not math.isfinite(loss):  # and stays at the head, so that nobody can go on from here
                raise self._diverged(step, f"the loss is {loss}")
            self._flying.popleft()
            self._speed.count()
            if step % REPORT_EVERY == 0 or step == self._task.recipe.steps:
                self._report(step, metrics)

    def _report(self, step: int, metrics: Metrics) -> None:
        shown = {key: round(float(value), 4) for key, value in metrics.items()}
        self._folder.log({"step": step, **self._speed.figures(), **shown})
        text = f"loss {shown['loss']:.3f}  top-1 {shown['top1_0']:.0%}  {self._speed.short}"
        self._progress.update(self._bar, shown=text)
        if not self._told and (left := self._task.recipe.steps - step) > 0:
            self._told = True
            seconds = left / self._speed.steps_per_second
            said = f"{left:,} steps are left, about {duration(seconds)} at this speed; --steps sets how many there are"
            self._progress.console.print(said, highlight=False)
        self._speed.restart()

    def _evaluate(self, state: TrainState) -> None:
        self._check(state)
        found, step = self._task.held_out(state, self._opened.held_out), int(state.step)
        self._folder.log({"step": step, "held_out": found})
        self._progress.console.print(
            f"step {step}: held-out top-1 by {self._task.parts} {percents(found['top1'])}, "
            f"top-3 {percents(found['top3'])}",
            highlight=False,
        )
        if _score(found) >= self._record:  # of equals the later, which has seen more
            self._record = _score(found)
            self._folder.save_best(state)
        self._speed.restart()

    def _measure(self, state: TrainState) -> None:
        assert self._opened.probe is not None, "or it is never due"
        length, step = self._opened.probe.accepted_length(state.params["draft"]), int(state.step)
        if length is not None:
            self._folder.log({"step": step, "accepted_length": length})
            self._progress.console.print(f"step {step}: accepted length {length:.3f}, bonus counted")
            self._folder.draw()
        self._speed.restart()

    def _save(self, state: TrainState) -> None:
        self._check(state)
        self._folder.save(state)

    def _check(self, state: TrainState) -> None:
        """Refuse weights that are no numbers before they are kept: the loss shows them a step too late."""
        self._land()
        if not bool(_all_finite(state.params)):
            raise self._diverged(int(state.step), "a weight is no finite number")

    def _diverged(self, step: int, what: str) -> UserError:
        return UserError(
            f"step {step}: {what}; train again with a lower --lr than {self._task.recipe.lr:g} and "
            f"another --work, for what {self._folder.folder} holds stays as it was saved"
        )


def columns() -> tuple[ProgressColumn, ...]:
    """The line of progress, so short that step, loss and the time left stand side by side in 80 columns."""
    return (
        TextColumn("step"),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
        BarColumn(6),
    )


def percents(shares: Sequence[float]) -> str:
    """Shares for people: "53, 47, 45 %"."""
    return ", ".join(f"{100 * share:.0f}" for share in shares) + " %"


def duration(seconds: float) -> str:
    """A time for people, to two figures: "40 s", "12 min", "1 h 50 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


@jax.jit
def _all_finite(params: Any) -> Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def _score(held_out: dict[str, list[float]]) -> float:
    """What the best weights are best by: top-1 agreement, averaged over parts."""
    return float(np.mean(held_out["top1"]))
