"""What a run trains: the task of a kind of draft, and the draft that it starts from or fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.training.train_state import TrainState

from frspec_jax.checkpoint import Checkpoint
from frspec_jax.drafters.base import DraftParams, DraftSpec, Params, Spec
from frspec_jax.errors import UserError
from train.batches import Batch
from train.optimiser import Metrics, Optimisation


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, and how."""

    spec: DraftSpec
    params: DraftParams  # to start from
    recipe: Optimisation
    # One step of the optimiser, given all ids by frequency [V] int32 and a batch. Its metrics have a loss and a top1_0.
    step: Callable[[TrainState, jax.Array, Batch], tuple[TrainState, Metrics]]
    # Hits among the best and the best three, and pairs counted, [parts, 3]: of the target's best token, on a batch;
    # of weights as `finished` makes them.
    agreement: Callable[[Any, Batch], jax.Array]
    parts: str  # what the rows of `agreement` are: "self-fed step", or "head"
    flops: float  # floating-point operations a token of a step's products
    finished: Callable[[Any], Any] = lambda params: params  # the draft's weights, of those that were trained

    def held_out(self, state: TrainState, batches: list[Batch]) -> dict[str, list[float]]:
        """Top-1 and top-3 agreement with the target on held-out pairs, over the full vocabulary, by part.

        The last parts are left out where answers or rows are so short that none of their pairs counts.
        """
        params = self.recipe.cast(self.finished(state.params["draft"]))
        sums = np.sum([self.agreement(params, self.recipe.cast_batch(batch)) for batch in batches], axis=0)
        sums = sums[: int((sums[:, 2] > 0).sum())]  # a later part counts no more pairs than an earlier one
        return {
            "top1": (sums[:, 0] / sums[:, 2]).round(4).tolist(),
            "top3": (sums[:, 1] / sums[:, 2]).round(4).tolist(),
        }


def starting_draft(
    name: str | None, checkpoint: Checkpoint, spec_class: type[Spec], params_class: type[Params]
) -> tuple[Spec, Params] | None:
    """The draft that --start-from names, its description and its weights; None where no name is given.

    Raises:
      UserError: there is none of that name, or it is of another kind.
    """
    if name is None:
        return None
    folder = checkpoint.draft_folder(name, "--start-from")
    assert folder is not None, "only no name at all finds no folder"
    kind, wanted = checkpoint.draft_spec(folder).kind, spec_class.kind
    if kind != wanted:
        raise UserError(f"--start-from {name} is a draft of kind {kind}; give one of kind {wanted}")
    spec, params = checkpoint.draft(folder)
    assert isinstance(spec, spec_class) and isinstance(params, params_class)
    return spec, params


def draft_to_fit(
    checkpoint: Checkpoint, name: str | None, spec_class: type[Spec], params_class: type[Params], otherwise: str
) -> tuple[Path, Spec, Params]:
    """The draft that --draft names, or the default one: its folder, its description and its weights.

    Raises:
      UserError: there is none, or it is of another class; `otherwise` says why not, and what to give.
    """
    folder = checkpoint.draft_folder(name)
    if folder is None:
        raise UserError(f"{checkpoint.path} holds no draft; name one with --draft")
    spec, params = checkpoint.draft(folder)
    if not isinstance(spec, spec_class):
        raise UserError(f"--draft {folder.name} is a draft of kind {spec.kind}, {otherwise}")
    assert isinstance(params, params_class)
    return folder, spec, params
