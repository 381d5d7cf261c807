"""What a training run is asked for: the flags, and the settings that they become, checked."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from frspec_jax import hosts
from frspec_jax.checkpoint import check_draft_name
from frspec_jax.errors import UserError
from train.optimiser import Optimisation

Recipe = TypeVar("Recipe", bound=Optimisation)

# What each figure of a recipe is, for --help.
HELPS = {
    "steps": "optimiser steps, a batch each",
    "lr": "learning rate at its highest",
    "warmup": "steps until the learning rate is there",
    "decay": "how the learning rate falls to zero after that",
    "optimizer": "muon: orthogonalised momentum for matrices, AdamW for the rest; adamw: AdamW for all",
    "weight_decay": "of matrices, a step, as a share of the learning rate",
    "clip": "gradients are scaled down to this norm",
    "accumulate": "parts of a batch whose gradients are taken one after the other, to save memory",
    "compute": "of products; weights and optimiser stay float32",
    "remat": "heads: compute logits again for the gradient instead of keeping them, to save memory",
    "loss_vocab": "the loss is taken over this many of the most frequent tokens; 0: over all",
    "loss_random": "and over this many others, drawn anew each step",
    "feature_weight": "weight of the loss on predicted features",
    "ce_weight": "weight of the loss on predicted tokens",
    "unroll": "passes: the first reads what the target did, each further one what the draft itself said",
    "unroll_decay": "weight of each further pass, as a factor",
    "noise": "uniform noise on the features of the first pass, plus or minus this much",
    "start": "first weights of a new draft: fitted by least squares, or random",
    "units": "that weights are trained in: measured on features and embeddings, or one",
    "heads": "how many tokens ahead are guessed, a head each",
    "layers": "residual blocks a head",
    "head_decay": "weight of each further head, as a factor",
}
AT_LEAST = {"rows": 1, "row": 2, "eval_every": 1, "eval_batches": 1, "save_every": 1, "own_answers": 1}


@dataclasses.dataclass(frozen=True)
class RunSettings(Generic[Recipe]):
    """A run, whatever it trains. A resumed one must be asked for the same, but for where it lies and when it looks.

    Raises:
      UserError: a figure that makes no sense, by its flag.
    """

    ckpt: Path  # the target's checkpoint folder
    corpora: tuple[Path, ...]  # feature stores, or text or conversations
    name: str  # of the draft, under CKPT/drafts
    recipe: Recipe
    work: Path  # folder of the run
    own_answers: int | None = None  # tokens of the target's own answers to train on, to the prompts of `corpora`
    start_from: str | None = None  # a draft, by name or folder
    rows: int = 8  # packed rows a batch
    row: int = 512  # tokens a row
    loss_on: Literal["all", "answers"] = "answers"
    seed: int = 0
    eval_every: int = 100  # steps
    eval_batches: int = 1  # held-out batches that an evaluation reads
    save_every: int = 50  # steps
    accept_every: int = 500  # steps; 0: the accepted length is never measured
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        check_draft_name(self.name)
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                why = ", a token and what follows it" if name == "row" else ""
                raise UserError(f"--{name.replace('_', '-')} {value} must be at least {least}{why}")
        if self.accept_every < 0:
            raise UserError(f"--accept-every {self.accept_every} must be 0 (never) or a number of steps")
        if not -(2**63) <= self.seed < 2**64:
            raise UserError(f"--seed {self.seed} must be a number of 64 bits")

    @property
    def out(self) -> Path:
        """The folder of the draft that the run leaves."""
        return self.ckpt / "drafts" / self.name

    def resumed(self) -> dict[str, Any]:
        """What a resumed run must not change, as JSON."""
        same = ("rows", "row", "seed", "loss_on", "start_from", "own_answers")
        return {key: getattr(self, key) for key in same} | {"recipe": dataclasses.asdict(self.recipe)}


def add_arguments(parser: argparse.ArgumentParser, kind: str, presets: Mapping[str, Optimisation]) -> None:
    """The flags of a run, and one for each field of its recipe."""
    parser.add_argument(
        "corpus", nargs="+", type=Path, help="feature stores, or text or conversation files and folders"
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint folder of the target")
    parser.add_argument(
        "--own-answers",
        type=int,
        metavar="N",
        help="let the target answer the prompts of these conversations first, N tokens, into WORK/answers, and "
        "train on that; counts the checkpoint's ranking too, where it has none",
    )
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
        "--loss-on",
        choices=("all", "answers"),
        default="answers",
        help="pairs that the loss counts: those of answers, or of prompts too (default: answers)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, data order and noise (default: 0)")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between evaluations (default: 100)")
    parser.add_argument("--eval-batches", type=int, default=1, help="held-out batches an evaluation reads (default: 1)")
    parser.add_argument("--save-every", type=int, default=50, help="steps between checkpoints (default: 50)")
    parser.add_argument(
        "--accept-every",
        type=int,
        default=500,
        metavar="N",
        help="steps between measurements of the accepted length, on held-out prompts; 0: never (default: 500)",
    )
    parser.add_argument(
        "--keep",
        choices=("best", "last"),
        default="best",
        help="which weights become the draft: the best by held-out agreement, or the last (default: best)",
    )
    recipe = parser.add_argument_group("recipe", "defaults are the preset's" if len(presets) > 1 else None)
    hints = typing.get_type_hints(type(presets["default"]))
    for field in dataclasses.fields(presets["default"]):
        flag, default = f"--{field.name.replace('_', '-')}", getattr(presets["default"], field.name)
        choices = typing.get_args(hints[field.name])  # of a Literal; nothing of other types
        what = {"choices": choices} if choices else {"type": type(default), "metavar": type(default).__name__.upper()}
        recipe.add_argument(flag, help=f"{HELPS[field.name]} (default: {default})", **what)
    hosts.add_host_flags(
        parser, "the same command on each, which must see the same files; all devices of a host are always used"
    )


def settings_of(args: argparse.Namespace, presets: Mapping[str, Recipe]) -> RunSettings[Recipe]:
    """The settings that the flags ask for; several hosts, if any, are joined, which must come before JAX is used.

    The recipe is the preset, with every flag that was given in its place.

    Raises:
      UserError: figures that make no sense, by their flags.
    """
    hosts.join(args)
    flags = vars(args)
    preset = presets[flags.get("preset", "default")]
    given = {field.name: flags[field.name] for field in dataclasses.fields(preset)}
    recipe = dataclasses.replace(preset, **{name: value for name, value in given.items() if value is not None})
    own = {"corpora", "recipe", "work"}
    plain = {field.name: flags[field.name] for field in dataclasses.fields(RunSettings) if field.name not in own}
    work = args.work or args.ckpt / "training" / args.name
    return RunSettings(corpora=tuple(args.corpus), recipe=recipe, work=work, **plain)
