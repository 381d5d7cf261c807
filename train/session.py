"""A training run, whatever it trains: its flags, its folder, its steps, and the draft that it leaves.

The run lives in WORK: Orbax checkpoints from which the same command resumes bit for bit, and a line of
metrics each evaluation. When the steps are done, the draft is written to CKPT/drafts/NAME.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from frspec_jax.checkpoint import Checkpoint, new_folder, write_draft
from frspec_jax.drafters.base import DraftSpec
from frspec_jax.errors import UserError
from frspec_jax.llama import LlamaParams
from train.batches import HELD_OUT, Batch, Packing
from train.features import FeatureStore, Taps, open_corpora
from train.optimiser import Optimisation, new_state

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, and how."""

    spec: DraftSpec
    params: Any  # to start from
    recipe: Optimisation
    # One step of the optimiser, given all ids by frequency [V] int32 and a batch. Its metrics have a loss and a top1_0.
    step: Callable[[TrainState, jax.Array, Batch], tuple[TrainState, Metrics]]
    # Hits among the best and the best three, and pairs counted, [parts, 3]: of the target's best token, on a batch.
    agreement: Callable[[Any, Batch], jax.Array]
    parts: str  # what the rows of `agreement` are: "self-fed step", or "head"
    finished: Callable[[Any], Any] = lambda params: params  # the draft's weights, of those that were trained

    def held_out(self, state: TrainState, batches: list[Batch]) -> dict[str, list[float]]:
        """Top-1 and top-3 agreement with the target on held-out pairs, over the full vocabulary, by part."""
        sums = np.sum([self.agreement(state.params["draft"], batch) for batch in batches], axis=0)
        return {
            "top1": (sums[:, 0] / sums[:, 2]).round(4).tolist(),
            "top3": (sums[:, 1] / sums[:, 2]).round(4).tolist(),
        }


# Flags -------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, kind: str, presets: Mapping[str, Optimisation]) -> None:
    """The flags of a run, and one for each field of its recipe."""
    parser.add_argument(
        "corpus", nargs="+", type=Path, help="feature stores, or text or conversation files and folders"
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder of the target")
    parser.add_argument("--name", default=kind, help=f"the draft's name under CKPT/drafts (default: {kind})")
    parser.add_argument("--work", type=Path, help="folder of the run (default: CKPT/training/NAME)")
    parser.add_argument("--start-from", metavar="NAME", help="a draft (name or folder) whose weights to start from")
    if len(presets) > 1:
        parser.add_argument(
            "--preset", choices=presets, default="default", help="recipe to start from; flags below change it"
        )
    parser.add_argument("--rows", type=int, default=8, help="packed rows a batch (default: 8)")
    parser.add_argument("--row", type=int, default=512, help="tokens a row; longer sequences are cut (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, data order and noise (default: 0)")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between evaluations (default: 100)")
    parser.add_argument("--eval-batches", type=int, default=1, help="held-out batches an evaluation reads (default: 1)")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: 50)")
    recipe = parser.add_argument_group("recipe", "defaults are the preset's" if len(presets) > 1 else None)
    for field in dataclasses.fields(presets["default"]):
        flag, default = f"--{field.name.replace('_', '-')}", getattr(presets["default"], field.name)
        recipe.add_argument(
            flag, type=type(default), metavar=type(default).__name__.upper(), help=f"default preset: {default}"
        )


def recipe_of(args: argparse.Namespace, presets: Mapping[str, Any]) -> Any:
    """The preset, with every flag that was given in its place."""
    preset = presets[getattr(args, "preset", "default")]
    names = (field.name for field in dataclasses.fields(preset))
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(preset, **given)


def starting_draft(args: argparse.Namespace, checkpoint: Checkpoint, kind: str) -> tuple[Any, Any] | None:
    """The draft that --start-from names, or None."""
    if args.start_from is None:
        return None
    folder = checkpoint.draft_folder(args.start_from)
    assert folder is not None, "only no name at all finds no folder"
    spec = checkpoint.draft_spec(folder)
    if spec.kind != kind:
        raise UserError(f"--start-from {args.start_from} is a draft of kind {spec.kind}; give one of kind {kind}")
    return checkpoint.draft(folder)


# The folder --------------------------------------------------------------------------------------


class Run:
    """A training run's folder: settings, checkpoints, and metrics."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        file = folder / "settings.json"
        if file.exists():
            before = json.loads(file.read_text())
            changed = [k for k in settings if before.get(k) != settings[k]]
            if changed:
                raise UserError(
                    f"--work {folder} holds a run with another {changed[0]}; "
                    "resume it as it was, or name another folder"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(settings, indent=2) + "\n")
        options = ocp.CheckpointManagerOptions(max_to_keep=2)
        self._manager = ocp.CheckpointManager((folder / "checkpoints").resolve(), options=options)

    def restore(self, state: TrainState) -> TrainState:
        """The newest whole checkpoint, or `state` where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return state
        saved = self._manager.restore(step, args=ocp.args.StandardRestore(_arrays(state)))
        return state.replace(step=saved["step"], params=saved["params"], opt_state=saved["opt_state"])

    def save(self, state: TrainState) -> None:
        """Write a checkpoint in the background; an unfinished one is never restored."""
        self._manager.save(int(state.step), args=ocp.args.StandardSave(_arrays(state)))

    def log(self, row: dict[str, Any]) -> None:
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()


def _arrays(state: TrainState) -> dict[str, Any]:
    return {"step": jnp.asarray(state.step), "params": state.params, "opt_state": state.opt_state}


# The run -----------------------------------------------------------------------------------------


def train(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    recipe: Optimisation,
    task_of: Callable[[LlamaParams], Task],
    taps: Taps = (),
    **more_settings: Any,
) -> None:
    """Train a draft and write it, or go on with a run that was interrupted.

    Args:
      task_of: makes the task, given the target's weights. taps: what a batch's features hold besides the final one.
      more_settings: what else a resumed run must not change.
    """
    out = args.ckpt / "drafts" / args.name
    if out.exists():
        raise UserError(f"--name {args.name}: {out} exists already; remove it or choose another name")
    work = args.work or args.ckpt / "training" / args.name
    target = checkpoint.params()
    stores = open_corpora(args.corpus, checkpoint, target, work / "features", taps)
    sequences = [len(store) for store in stores]
    settings = {key: getattr(args, key) for key in ("rows", "row", "seed", "start_from")}
    settings |= {"recipe": dataclasses.asdict(recipe), "target": checkpoint.fingerprint, "sequences": sequences}
    run = Run(work, settings | more_settings)
    task = task_of(target)
    packing = Packing(tuple(stores), args.rows, args.row, args.seed)
    held_out = packing.held_out(args.eval_batches)
    if not held_out:
        raise UserError(f"{len(stores)} corpora hold too few sequences; one in {HELD_OUT} is held out for evaluation")
    state = run.restore(new_state(task.params, recipe))
    first = int(state.step)
    # On the device for good, as the target's weights are: otherwise the second step would compile anew.
    state = jax.device_put(state, jax.devices()[0])
    tokens = sum(int(store.lengths.sum()) for store in stores)
    note = f"; resumed at step {first}" if first else ""
    console = Console(stderr=True)
    console.print(
        f"{tokens:,} tokens in {sum(sequences):,} sequences, {packing.steps_per_epoch:,} steps an epoch{note}"
    )
    ranked = jnp.asarray(by_frequency(stores, checkpoint.config.vocab_size))
    state = _loop(args, task, run, state, ranked, packing, held_out, console)
    found = task.held_out(state, packing.held_out(4 * args.eval_batches))
    run.close()
    about = {"recipe": dataclasses.asdict(recipe), "rows": args.rows, "row": args.row, "seed": args.seed,
             "tokens": tokens, "held_out": {"step": int(state.step), **found}}  # fmt: skip
    with new_folder(out, "--name") as folder:
        write_draft(folder, task.spec, task.finished(state.params["draft"]), checkpoint.fingerprint, about)
    print(f"wrote {out}: top-1 {found['top1'][0]:.1%}, top-3 {found['top3'][0]:.1%} on held-out answers")


def by_frequency(stores: list[FeatureStore], vocab_size: int) -> np.ndarray:
    """All ids by how often the answers hold them: the loss looks at the first of them."""
    counts = sum(np.bincount(s.tokens[np.asarray(s.answer) == 1], minlength=vocab_size) for s in stores)
    return np.argsort(-np.asarray(counts), kind="stable").astype(np.int32)


def _loop(
    args: argparse.Namespace,
    task: Task,
    run: Run,
    state: TrainState,
    ranked: jax.Array,
    packing: Packing,
    held_out: list[Batch],
    console: Console,
) -> TrainState:
    """Steps until the recipe's last; Ctrl-C saves what is done before it leaves."""
    columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    steps, batches = task.recipe.steps, packing.training(int(state.step))
    mark, done = time.perf_counter(), 0
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=steps, completed=int(state.step), shown="")
        try:
            while int(state.step) < steps:
                state, metrics = task.step(state, ranked, next(batches))
                step, done = int(state.step), done + 1
                if step % 10 == 0 or step == steps:
                    rate = done * args.rows * args.row / (time.perf_counter() - mark)
                    mark, done = time.perf_counter(), 0
                    shown = {k: round(float(v), 4) for k, v in metrics.items()}
                    run.log({"step": step, "tokens_per_second": round(rate), **shown})
                    text = f"loss {shown['loss']:.3f}  top-1 {shown['top1_0']:.1%}  {rate:,.0f} tokens/s"
                    progress.update(bar, shown=text)
                if step % args.eval_every == 0:
                    found = task.held_out(state, held_out)
                    run.log({"step": step, "held_out": found})
                    progress.console.print(
                        f"step {step}: held-out top-1 by {task.parts} {found['top1']}, top-3 {found['top3']}"
                    )
                    mark, done = time.perf_counter(), 0
                if step % args.save_every == 0:
                    run.save(state)
                progress.update(bar, completed=step)
        except KeyboardInterrupt:
            run.save(state)
            run.close()
            raise
    return state
