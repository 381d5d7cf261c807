"""A training run, whatever it trains: its flags, its folder, its steps, and the draft that it leaves.

The run lives in WORK: Orbax checkpoints from which the same command resumes bit for bit, and a line of
metrics each evaluation. When the steps are done, the draft is written to CKPT/drafts/NAME.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from frspec_jax.checkpoint import Checkpoint, write_draft
from frspec_jax.drafters.base import DraftSpec, Spec
from frspec_jax.errors import UserError
from frspec_jax.files import new_folder
from frspec_jax.llama import LlamaParams
from frspec_jax.vocabulary import Ranking, tokenizer_hash
from train import answers, curves, devices
from train.batches import HELD_OUT, Batch, Packing
from train.corpus import corpus_files
from train.features import FeatureStore, Taps, open_corpora, stored_taps
from train.optimiser import Optimisation, new_state
from train.probe import Probe, held_out_prompts
from train.rank import answer_counts
from train.speed import Speed

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained, and how."""

    spec: DraftSpec
    params: Any  # to start from
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
        """Top-1 and top-3 agreement with the target on held-out pairs, over the full vocabulary, by part."""
        params = self.recipe.cast(self.finished(state.params["draft"]))
        sums = np.sum([self.agreement(params, self.recipe.cast_batch(batch)) for batch in batches], axis=0)
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
    parser.add_argument(
        "--own-answers", type=int, metavar="N",
        help="let the target answer the prompts of these conversations first, N tokens or so, into WORK/answers, and "
        "train on that; counts the checkpoint's ranking too, where it has none",
    )  # fmt: skip
    parser.add_argument("--name", default=kind, help=f"the draft's name under CKPT/drafts (default: {kind})")
    parser.add_argument("--work", type=Path, help="folder of the run (default: CKPT/training/NAME)")
    parser.add_argument("--start-from", metavar="NAME", help="a draft (name or folder) whose weights to start from")
    if len(presets) > 1:
        parser.add_argument(
            "--preset", choices=presets, default="default", help="recipe to start from; flags below change it"
        )
    parser.add_argument("--rows", type=int, default=8, help="packed rows a batch (default: 8)")
    parser.add_argument("--row", type=int, default=512, help="tokens a row; longer sequences are cut (default: 512)")
    parser.add_argument(
        "--loss-on", choices=("all", "answers"), default="answers",
        help="pairs that the loss counts: those of answers, or of prompts too (default: answers)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, data order and noise (default: 0)")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between evaluations (default: 100)")
    parser.add_argument("--eval-batches", type=int, default=1, help="held-out batches an evaluation reads (default: 1)")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: 50)")
    parser.add_argument(
        "--accept-every", type=int, default=500, metavar="N",
        help="steps between measurements of the accepted length, on held-out prompts; 0: never (default: 500)",
    )  # fmt: skip
    parser.add_argument(
        "--keep", choices=("best", "last"), default="best",
        help="which weights become the draft: the best by held-out agreement, or the last (default: best)",
    )  # fmt: skip
    recipe = parser.add_argument_group("recipe", "defaults are the preset's" if len(presets) > 1 else None)
    hints = typing.get_type_hints(type(presets["default"]))
    for field in dataclasses.fields(presets["default"]):
        flag, default = f"--{field.name.replace('_', '-')}", getattr(presets["default"], field.name)
        choices = typing.get_args(hints[field.name])  # of a Literal; nothing of other types
        what = {"choices": choices} if choices else {"type": type(default), "metavar": type(default).__name__.upper()}
        recipe.add_argument(flag, help=f"default: {default}", **what)
    devices.add_arguments(parser)


def recipe_of(args: argparse.Namespace, presets: Mapping[str, Any]) -> Any:
    """The preset, with every flag that was given in its place; several hosts are joined before JAX is used.

    Raises:
      UserError: figures that make no sense, by their flags.
    """
    devices.join(args)
    for flag in ("rows", "row", "eval_every", "eval_batches", "save_every", "accumulate"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} {value} must be at least 1")
    if args.accept_every < 0:
        raise UserError(f"--accept-every {args.accept_every} must be 0 (never) or a number of steps")
    preset = presets[getattr(args, "preset", "default")]
    names = (field.name for field in dataclasses.fields(preset))
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(preset, **given)


def starting_draft(args: argparse.Namespace, checkpoint: Checkpoint, kind: str) -> tuple[Any, Any] | None:
    """The draft that --start-from names, or None."""
    if args.start_from is None:
        return None
    folder = checkpoint.draft_folder(args.start_from, "--start-from")
    assert folder is not None, "only no name at all finds no folder"
    spec = checkpoint.draft_spec(folder)
    if spec.kind != kind:
        raise UserError(f"--start-from {args.start_from} is a draft of kind {spec.kind}; give one of kind {kind}")
    return checkpoint.draft(folder)


def draft_to_fit(
    checkpoint: Checkpoint, name: str | None, spec_class: type[Spec], otherwise: str
) -> tuple[Path, Spec, Any]:
    """The draft that --draft names, or the only one: its folder, its description and its weights.

    Raises:
      UserError: there is none, or it is of another class; `otherwise` says why not, and what to give.
    """
    folder = checkpoint.draft_folder(name)
    if folder is None:
        raise UserError(f"{checkpoint.path} holds no draft; name one with --draft")
    spec, params = checkpoint.draft(folder)
    if not isinstance(spec, spec_class):
        raise UserError(f"--draft {folder.name} is a draft of kind {spec.kind}, {otherwise}")
    return folder, spec, params


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
        self._last = self._manager("checkpoints", 2)
        self._best = self._manager("best", 1)

    def _manager(self, name: str, keep: int) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        return ocp.CheckpointManager((self.folder / name).resolve(), options=options)

    def restore(self, state: TrainState) -> TrainState:
        """The newest whole checkpoint, or `state` where there is none; placed as `state` is."""
        step = self._last.latest_step()
        if step is None:
            return state
        saved = self._last.restore(step, args=ocp.args.StandardRestore(_arrays(state)))
        return state.replace(step=saved["step"], params=saved["params"], opt_state=saved["opt_state"])

    def save(self, state: TrainState) -> None:
        """Write a checkpoint in the background; an unfinished one is never restored."""
        self._best.wait_until_finished()  # whoever resumes from here relies on the best up to here
        self._last.save(int(state.step), args=ocp.args.StandardSave(_arrays(state)))

    def save_best(self, state: TrainState) -> None:
        """Keep these weights as the best so far, likewise; a resumed run comes by the same ones again."""
        if int(state.step) not in self._best.all_steps():
            # One write at a time: Orbax numbers the signals between hosts by a counter that all managers share, so
            # that a write begun beside another can leave a host waiting for a number that never comes.
            self._last.wait_until_finished()
            self._best.save(int(state.step), args=ocp.args.StandardSave({"params": state.params}), force=True)

    def best(self, state: TrainState) -> tuple[Any, int]:
        """The best weights and their step, or those of `state` where no evaluation was made."""
        self._best.wait_until_finished()
        step = self._best.latest_step()
        if step is None:
            return state.params, int(state.step)
        saved = self._best.restore(step, args=ocp.args.StandardRestore({"params": state.params}))
        return saved["params"], step

    def rows(self, until: int) -> list[dict[str, Any]]:
        """The metrics up to a step."""
        there = (self.folder / "metrics.jsonl").exists()
        return [row for row in (curves.read(self.folder) if there else []) if row["step"] <= until]

    def log(self, row: dict[str, Any]) -> None:
        if devices.first_process():
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def draw(self) -> None:
        """The curves of what was logged, as WORK/curves.png."""
        if devices.first_process():
            curves.draw([self.folder], self.folder / "curves.png")

    def close(self) -> None:
        for manager in (self._last, self._best):
            manager.wait_until_finished()
            manager.close()


def _arrays(state: TrainState) -> dict[str, Any]:
    return {"step": jnp.asarray(state.step), "params": state.params, "opt_state": state.opt_state}


# The run -----------------------------------------------------------------------------------------


def train(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    recipe: Optimisation,
    task_of: Callable[[LlamaParams, Packing], Task],
    taps: Taps = (),
    **more_settings: Any,
) -> None:
    """Train a draft and write it, or go on with a run that was interrupted.

    Args:
      task_of: makes the task, given the target's weights and what it will train on.
      taps: what a batch's features hold besides the final one.
      more_settings: what else a resumed run must not change.
    """
    out = args.ckpt / "drafts" / args.name
    if out.exists():
        raise UserError(f"--name {args.name}: {out} exists already; remove it or choose another name")
    work = args.work or args.ckpt / "training" / args.name
    corpora = args.corpus if args.own_answers is None else [own_answers(args, work / "answers")]
    target = checkpoint.params()
    stores = open_corpora(corpora, checkpoint, recipe.cast(target), work / "features", args.row, taps)
    sequences = [len(store) for store in stores]
    settings = {key: getattr(args, key) for key in ("rows", "row", "seed", "loss_on", "start_from", "own_answers")}
    settings |= {"recipe": dataclasses.asdict(recipe), "target": checkpoint.fingerprint, "sequences": sequences}
    mesh = devices.mesh_for(args.rows, recipe.accumulate)
    run = Run(work, settings | more_settings)
    target = devices.everywhere(target, mesh)
    packing = Packing(tuple(stores), args.rows, args.row, args.seed, args.loss_on == "all")
    held_out = [devices.spread(batch, mesh) for batch in packing.held_out(args.eval_batches, devices.share(args.rows))]
    if not held_out:
        raise UserError(f"{len(stores)} corpora hold too few sequences; one in {HELD_OUT} is held out for evaluation")
    task = task_of(target, packing)
    # On the devices for good, as the target's weights are: otherwise the second step would compile anew.
    state = run.restore(devices.everywhere(new_state(task.params, recipe), mesh))
    tokens = sum(int(store.lengths.sum()) for store in stores)
    note = f"; resumed at step {int(state.step)}" if int(state.step) else ""
    console = Console(stderr=True, quiet=not devices.first_process())
    console.print(
        f"{tokens:,} tokens in {sum(sequences):,} sequences, {packing.steps_per_epoch:,} steps an epoch, "
        f"{mesh.size} {'device' if mesh.size == 1 else 'devices'}{note}"
    )
    ranked = devices.everywhere(by_frequency(stores, checkpoint.config.vocab_size), mesh)
    probe = None
    if args.accept_every:
        probe = Probe(checkpoint, task.spec, target, held_out_prompts(packing), task.finished)
    loop = Loop(args, task, run, mesh, packing, held_out, probe, console)
    state = loop.run(state, ranked)
    params, step = run.best(state) if args.keep == "best" else (state.params, int(state.step))
    more = packing.held_out(4 * args.eval_batches, devices.share(args.rows))
    found = task.held_out(state.replace(params=params), [devices.spread(batch, mesh) for batch in more])
    lengths = [row["accepted_length"] for row in run.rows(step) if "accepted_length" in row]
    weights = task.finished(params["draft"])  # on all hosts, whose arrays these are
    run.draw()
    run.close()
    if not devices.first_process():
        return
    about = {"recipe": dataclasses.asdict(recipe), "rows": args.rows, "row": args.row, "seed": args.seed,
             "loss_on": args.loss_on, "tokens": tokens, "held_out": {"step": step, **found}}  # fmt: skip
    if lengths:
        about["accepted_length"] = lengths[-1]
    if args.own_answers is not None:  # before the draft: where that stands, the command has no more to do
        rank_answers(args, stores, checkpoint)
    with new_folder(out, "--name") as folder:
        write_draft(folder, task.spec, weights, checkpoint.fingerprint, about)
    print(f"wrote {out}: top-1 {found['top1'][0]:.1%}, top-3 {found['top3'][0]:.1%} on held-out answers")


def own_answers(args: argparse.Namespace, store: Path) -> Path:
    """The store of the target's answers to the corpora's prompts, made, gone on with, or whole already."""
    if args.own_answers < 1:
        raise UserError(f"--own-answers {args.own_answers} must be at least 1")
    if jax.process_count() > 1:
        raise UserError("--own-answers works on one host; make the store with python -m train answers, and name that")
    if stored := next((path for path in args.corpus if stored_taps(path) is not None), None):
        raise UserError(f"--own-answers takes conversations, and {stored} is a store of answers; leave the flag out")
    if next(answers.first_turns(corpus_files(args.corpus)), None) is None:
        raise UserError(f"--own-answers {args.own_answers}: the corpora hold no prompt of a user; give conversations")
    if (store.parent / "settings.json").exists():  # training has begun, and more answers would make it another run
        return store
    parser = argparse.ArgumentParser()
    answers.add_arguments(parser)
    flags = ["--ckpt", str(args.ckpt), "--out", str(store), "--limit-tokens", str(args.own_answers)]
    store.parent.mkdir(parents=True, exist_ok=True)
    answers.run(parser.parse_args([*map(str, args.corpus), *flags]))
    return store


def rank_answers(args: argparse.Namespace, stores: list[FeatureStore], checkpoint: Checkpoint) -> None:
    """Count the checkpoint's ranking from the answers, where it has none."""
    file, vocab_size = args.ckpt / "ranking.npz", checkpoint.config.vocab_size
    if file.exists():
        return
    counts = np.sum([answer_counts(store, vocab_size) for store in stores], axis=0)
    names = tuple(path.name for path in args.corpus)
    ranking = Ranking(counts, tokenizer_hash(checkpoint.tokenizer), tuple(f"answers to {name}" for name in names))
    ranking.save(file)
    print(f"wrote {file}: {ranking.tokens:,} tokens of the answers; python -m train rank counts larger corpora")


def by_frequency(stores: list[FeatureStore], vocab_size: int) -> np.ndarray:
    """All ids by how often the answers hold them: the loss looks at the first of them."""
    counts = np.sum([answer_counts(store, vocab_size) for store in stores], axis=0)
    return np.argsort(-counts, kind="stable").astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Loop:
    """The steps of a run, with what happens every so many of them."""

    args: argparse.Namespace
    task: Task
    folder: Run
    mesh: Mesh
    packing: Packing
    held_out: list[Batch]
    probe: Probe | None
    console: Console

    def run(self, state: TrainState, ranked: jax.Array) -> TrainState:
        """Steps until the recipe's last; Ctrl-C saves what is done before it leaves."""
        args, task, steps = self.args, self.task, self.task.recipe.steps
        columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
                   TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
        batches = self.packing.training(int(state.step), devices.share(args.rows))
        record = max((_score(row["held_out"]) for row in self.folder.rows(int(state.step)) if "held_out" in row),
                     default=-1.0)  # fmt: skip
        speed = Speed(args.rows * args.row, task.flops * args.rows * args.row, task.recipe.compute, self.mesh.size)
        with Progress(*columns, console=self.console) as progress:
            bar = progress.add_task("training", total=steps, completed=int(state.step), shown="")
            try:
                while int(state.step) < steps:
                    state, metrics = task.step(state, ranked, devices.spread(next(batches), self.mesh))
                    step = int(state.step)
                    speed.count()
                    if step % 10 == 0 or step == steps:
                        shown = {k: round(float(v), 4) for k, v in metrics.items()}
                        self.folder.log({"step": step, **speed.figures(), **shown})
                        text = f"loss {shown['loss']:.3f}  top-1 {shown['top1_0']:.1%}  {speed}"
                        progress.update(bar, shown=text)
                        speed.restart()
                    if step % args.eval_every == 0 or step == steps:
                        found = task.held_out(state, self.held_out)
                        self.folder.log({"step": step, "held_out": found})
                        progress.console.print(
                            f"step {step}: held-out top-1 by {task.parts} {found['top1']}, top-3 {found['top3']}"
                        )
                        if _score(found) >= record:  # of equals the later, which has seen more
                            record = _score(found)
                            self.folder.save_best(state)
                        speed.restart()
                    if self.probe and step % args.accept_every == 0:
                        length = self.probe.accepted_length(state.params["draft"])
                        if length is not None:
                            self.folder.log({"step": step, "accepted_length": length})
                            progress.console.print(f"step {step}: accepted length {length:.3f}, bonus counted")
                            self.folder.draw()
                        speed.restart()
                    if step % args.save_every == 0:
                        self.folder.save(state)
                    progress.update(bar, completed=step)
            except KeyboardInterrupt:
                self.folder.save(state)
                self.folder.close()
                raise
        return state


def _score(held_out: dict[str, list[float]]) -> float:
    """What the best weights are best by: top-1 agreement, averaged over parts."""
    return float(np.mean(held_out["top1"]))
