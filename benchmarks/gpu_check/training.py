"""An EAGLE-2 draft, trained on the model's own answers for as long as the time allows."""

from __future__ import annotations

import dataclasses
import queue
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax.training.train_state import TrainState

from benchmarks.gpu_check.material import Amounts, amounts_of, checkpoint_of
from benchmarks.gpu_check.runner import Session
from convert.__main__ import main as convert
from frspec_jax.checkpoint import write_draft
from frspec_jax.files import new_folder
from train.batches import Batch, Packing
from train.eagle import new_task
from train.features import FeatureStore
from train.optimiser import new_state
from train.recipe import Recipe
from train.session import by_frequency
from train.task import Task

NAME = "own"
WRITING = 20.0  # seconds kept for the last evaluation and for writing
SLACK = 1.05  # a step may take so much longer than those that were timed


def draft(session: Session) -> None:
    """Train, and put the draft into the checkpoint and, as others read it, into OUT/draft."""
    amounts, checkpoint = amounts_of(session), checkpoint_of(session)
    store = FeatureStore(session.work / "store", checkpoint)
    packing = Packing((store,), amounts.rows, amounts.row, seed=0, prompts=True)
    held_out = [jax.device_put(batch) for batch in packing.held_out(4)]
    if not held_out:
        raise RuntimeError("the store holds too few answers to hold some out")
    target = checkpoint.params()
    compute = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    recipe = Recipe(
        steps=min(1000, amounts.most_steps),
        lr=1.5e-3,
        warmup=min(100, amounts.most_steps // 2),
        unroll=1 if session.dry else 3,
        loss_vocab=amounts.loss_vocab,
        loss_random=amounts.loss_random,
        compute=compute,
    )
    ranked = jax.device_put(by_frequency([store], checkpoint.config.vocab_size))
    task = new_task(recipe, checkpoint, 0, target, packing)
    state = new_state(task.params, recipe)
    batches = _ahead(packing.training(0))
    state = _steps(task, state, ranked, batches, 2)  # compiled
    session.tell("start", task.held_out(state, held_out))
    begun = time.perf_counter()
    state = _steps(task, state, ranked, batches, amounts.timed_steps)
    seconds = (time.perf_counter() - begun) / amounts.timed_steps
    fitting = int((session.left - WRITING - 30) / (SLACK * seconds))  # the new schedule is compiled anew
    recipe = dataclasses.replace(recipe, steps=max(2, min(fitting, amounts.most_steps)))
    tokens = amounts.rows * amounts.row
    session.tell("speed", {"seconds_a_step": seconds, "tokens_a_step": tokens, "steps": recipe.steps})
    so_far = task.spec, task.finished(state.params["draft"])
    task = new_task(recipe, checkpoint, 0, target, packing, so_far)
    state = new_state(task.params, recipe)
    state = _trained(session, task, state, ranked, batches, held_out, amounts)
    found = task.held_out(state, held_out)
    session.tell("held_out", {"step": int(state.step), **found})
    about = {
        "recipe": dataclasses.asdict(recipe),
        "rows": amounts.rows,
        "row": amounts.row,
        "tokens": int(store.lengths.sum()),
        "held_out": {"step": int(state.step), **found},
    }
    with new_folder(checkpoint.path / "drafts" / NAME) as folder:
        write_draft(folder, task.spec, task.finished(state.params["draft"]), checkpoint.fingerprint, about)
    shutil.rmtree(session.out / "draft", ignore_errors=True)
    convert(["export", "--ckpt", str(checkpoint.path), "--draft", NAME, "--out", str(session.out / "draft")])


def _trained(
    session: Session,
    task: Task,
    state: TrainState,
    ranked: Any,
    batches: Iterator[Batch],
    held_out: list[Batch],
    amounts: Amounts,
) -> TrainState:
    """All steps of the recipe, or as many as the time allows; told as they go."""
    lot = max(1, task.recipe.steps // amounts.evaluations)
    while int(state.step) < task.recipe.steps and session.left > WRITING:
        state = _steps(task, state, ranked, batches, min(lot, task.recipe.steps - int(state.step)))
        session.tell(f"step {int(state.step)}", task.held_out(state, held_out))
    return state


def _steps(task: Task, state: TrainState, ranked: Any, batches: Iterator[Batch], count: int) -> TrainState:
    metrics: dict[str, Any] = {}
    for _ in range(count):
        state, metrics = task.step(state, ranked, next(batches))
    if not np.isfinite(float(metrics["loss"])):  # this waits for the device, too
        raise RuntimeError(f"the loss is {metrics['loss']}")
    return state


def _ahead(batches: Iterator[Batch], most: int = 8) -> Iterator[Batch]:
    """The same batches, made and sent to the device while it works on others."""
    waiting: queue.Queue[Batch] = queue.Queue(most)

    def feed() -> None:
        for batch in batches:
            waiting.put(jax.device_put(batch))

    threading.Thread(target=feed, daemon=True).start()
    while True:
        yield waiting.get()
