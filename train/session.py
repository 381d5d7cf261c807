"""A training run, whatever it trains: opened, looped over, and written as a draft.

The run lives in WORK: Orbax checkpoints from which the same command resumes bit for bit, and a line of
metrics each evaluation. When the steps are done, the draft is written to CKPT/drafts/NAME.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from rich.console import Console

from frspec_jax.checkpoint import Checkpoint, write_draft
from frspec_jax.entry import spelled
from frspec_jax.errors import UserError
from frspec_jax.files import check_writable, new_folder
from frspec_jax.hosts import first_process
from frspec_jax.llama import LlamaParams
from frspec_jax.locks import folder_lock, name_lock
from frspec_jax.vocabulary import Ranking, tokenizer_hash
from train import answers, devices
from train.batches import HELD_OUT, Packing
from train.corpus import Tally, corpus_files
from train.features import FeatureStore, Taps, open_corpora, stored_taps
from train.first_prompts import first_prompts
from train.folder import Run
from train.loop import Loop, Opened
from train.optimiser import new_state
from train.probe import Probe, held_out_prompts
from train.rank import answer_counts
from train.settings import RunSettings
from train.task import Task

PATIENCE = 3600.0  # seconds that a finished run waits for whoever writes to the checkpoint before it does


def train(
    settings: RunSettings[Any],
    checkpoint: Checkpoint,
    task_of: Callable[[LlamaParams, Packing], Task],
    taps: Taps = (),
    **unchanging: Any,
) -> None:
    """Train a draft and write it, or go on with a run that was interrupted.

    Args:
      task_of: makes the task, given the target's weights and what it will train on.
      taps: what a batch's features hold besides the final one.
      unchanging: what else a resumed run must not change.

    Raises:
      UserError: there is such a draft already, another process is at this run, or it is no longer the run that it was;
        the corpora are too few; the disk is full; the loss is no number any more.
    """
    if settings.out.exists():
        raise UserError(f"--name {settings.name}: {settings.out} exists already; remove it or choose another name")
    with contextlib.ExitStack() as held:
        if first_process():  # which writes for all
            held.enter_context(folder_lock(settings.work, f"--work {settings.work}"))
            check_writable(settings.out, f"--ckpt {settings.ckpt}: its folder drafts")
            held.enter_context(name_lock(settings.out, f"--name {settings.name}: {settings.out}"))
        opened = open_run(settings, checkpoint, task_of, taps, unchanging, held)
        write(opened, Loop(opened).run())
        if first_process():
            opened.tally.tell()


def open_run(
    settings: RunSettings[Any],
    checkpoint: Checkpoint,
    task_of: Callable[[LlamaParams, Packing], Task],
    taps: Taps,
    unchanging: dict[str, Any],
    held: contextlib.ExitStack,
) -> Opened:
    """Bring a run to where it can take its next step; `held` closes its folder in the end."""
    corpora, recipe = list(settings.corpora), settings.recipe
    if settings.own_answers is not None:
        corpora = [own_answers(settings, checkpoint)]
    target = checkpoint.params()
    tally, work = Tally(), settings.work / "features"
    stores = open_corpora(corpora, checkpoint, recipe.cast(target), work, settings.row, taps, tally=tally)
    sequences = [len(store) for store in stores]
    mesh = devices.mesh_for(settings.rows, recipe.accumulate)
    same = settings.resumed() | {"target": checkpoint.fingerprint, "sequences": sequences}
    folder = held.enter_context(Run(settings.work, same | unchanging))
    target = devices.everywhere(target, mesh)
    packing = Packing(tuple(stores), settings.rows, settings.row, settings.seed, settings.loss_on == "all")
    share = devices.share(settings.rows)
    held_out = [devices.spread(batch, mesh) for batch in packing.held_out(settings.eval_batches, share)]
    if not held_out:
        raise UserError(f"{len(stores)} corpora hold too few sequences; one in {HELD_OUT} is held out for evaluation")
    if not any(bool(jnp.any(batch.mask)) for batch in held_out):
        raise UserError(
            "the held-out sequences hold no answer to measure on; give more of them, or raise --row or --eval-batches"
        )
    task = task_of(target, packing)
    # On the devices for good, as the target's weights are: otherwise the second step would compile anew.
    state = folder.restore(devices.everywhere(new_state(task.params, recipe), mesh))
    console = Console(stderr=True, quiet=not first_process())
    resumed = f"; resumed at step {int(state.step)}" if int(state.step) else ""
    console.print(
        f"{_tokens(stores):,} tokens in {sum(sequences):,} sequences, {packing.steps_per_epoch:,} steps an epoch, "
        f"{mesh.size} {'device' if mesh.size == 1 else 'devices'}{resumed}"
    )
    for line in plan_of(settings, packing.steps_per_epoch, int(state.step)):
        console.print(line, highlight=False)
    ranked = devices.everywhere(by_frequency(stores, checkpoint.config.vocab_size), mesh)
    probe = None
    if settings.accept_every:
        probe = Probe(checkpoint, task.spec, target, held_out_prompts(packing), task.finished)
    return Opened(
        settings, checkpoint, stores, packing, mesh, task, folder, held_out, ranked, probe, console, state, tally
    )


def write(opened: Opened, state: TrainState) -> None:
    """Write the draft that a finished run has made: its best weights, or its last; and the ranking of own answers."""
    settings, task, folder = opened.settings, opened.task, opened.folder
    params, step = folder.best(state) if settings.keep == "best" else (state.params, int(state.step))
    more = opened.packing.held_out(4 * settings.eval_batches, devices.share(settings.rows))
    found = task.held_out(state.replace(params=params), [devices.spread(batch, opened.mesh) for batch in more])
    lengths = [row["accepted_length"] for row in folder.rows(step) if "accepted_length" in row]
    weights = task.finished(params["draft"])  # on all hosts, whose arrays these are
    folder.draw()
    folder.close()
    if not first_process():
        return
    about = {
        "recipe": dataclasses.asdict(settings.recipe),
        **{key: getattr(settings, key) for key in ("rows", "row", "seed", "loss_on")},
        "tokens": _tokens(opened.stores),
        "held_out": {"step": step, **found},
    }
    if lengths:
        about["accepted_length"] = lengths[-1]
    with folder_lock(settings.ckpt, f"--ckpt {settings.ckpt}", patience=PATIENCE):
        if settings.own_answers is not None:  # before the draft: where that stands, the command has no more to do
            rank_answers(settings, opened.stores, opened.checkpoint)
        with new_folder(settings.out, "--name") as part:
            write_draft(part, task.spec, weights, opened.checkpoint.fingerprint, about)
    print(f"wrote {settings.out}: top-1 {found['top1'][0]:.1%}, top-3 {found['top3'][0]:.1%} on held-out answers")


def plan_of(settings: RunSettings[Any], steps_per_epoch: int, done: int) -> list[str]:
    """What a run is about to do, for people, and what in it is probably not meant."""
    recipe, tokens = settings.recipe, settings.rows * settings.row
    left = recipe.steps - done
    lines = [
        f"{left:,} steps of {tokens:,} tokens are to come: {left * tokens / 1e6:.2g} M tokens, "
        f"{left / max(1, steps_per_epoch):.2g} times through the data"
    ]
    if recipe.warmup >= recipe.steps:
        lines.append(
            f"note: --warmup {recipe.warmup} is as long as the run or longer (--steps {recipe.steps}), "
            f"so the learning rate never gets to --lr {recipe.lr:g}; lower --warmup"
        )
    return lines


def own_answers(settings: RunSettings[Any], checkpoint: Checkpoint) -> Path:
    """The store of the target's answers to the corpora's prompts, made, gone on with, or whole already."""
    store, limit = settings.work / "answers", settings.own_answers
    if jax.process_count() > 1:
        raise UserError("--own-answers works on one host; make the store with python -m train answers, and name that")
    if stored := next((path for path in settings.corpora if stored_taps(path) is not None), None):
        raise UserError(f"--own-answers takes conversations, and {stored} is a store of answers; leave the flag out")
    if next(first_prompts(corpus_files(settings.corpora), Tally()), None) is None:
        raise UserError(f"--own-answers {limit}: the corpora hold no prompt of a user; give conversations")
    if not (settings.work / "settings.json").exists():  # once training has begun, more answers would be another run
        answers.make_store(answers.AnswerSettings(settings.corpora, store, limit_tokens=limit), checkpoint)
    return store


def rank_answers(settings: RunSettings[Any], stores: Sequence[FeatureStore], checkpoint: Checkpoint) -> None:
    """Count the checkpoint's ranking from the answers, where it has none."""
    file, vocab_size = settings.ckpt / "ranking.npz", checkpoint.config.vocab_size
    if file.exists():
        return
    counts = np.sum([answer_counts(store, vocab_size) for store in stores], axis=0)
    names = tuple(path.name for path in settings.corpora)
    ranking = Ranking(counts, tokenizer_hash(checkpoint.tokenizer), tuple(f"answers to {name}" for name in names))
    ranking.save(file)
    counted = f"wrote {file}: {ranking.tokens:,} tokens of the answers; python -m train rank counts larger corpora"
    print(spelled(counted))


def by_frequency(stores: Sequence[FeatureStore], vocab_size: int) -> np.ndarray:
    """All ids [V] int32 by how often the answers hold them: the loss looks at the first of them."""
    counts = np.sum([answer_counts(store, vocab_size) for store in stores], axis=0)
    return np.argsort(-counts, kind="stable").astype(np.int32)


def _tokens(stores: Sequence[FeatureStore]) -> int:
    return sum(int(store.lengths.sum()) for store in stores)
