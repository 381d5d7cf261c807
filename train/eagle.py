"""`python -m train eagle CORPUS... --ckpt CKPT --name eagle`: train an EAGLE-2 draft for a target.

CORPUS is a feature store that `train answers` has made, or text or conversations, whose features the
target then computes into a store of its own (WORK/features). The run lives in WORK: Orbax
checkpoints from which the same command resumes bit for bit, and a line of metrics each evaluation.
When the steps are done, the draft is written to CKPT/drafts/NAME.
"""

from __future__ import annotations

import argparse

import numpy as np

from frspec_jax.checkpoint import Checkpoint
from frspec_jax.drafters.eagle import EagleConfig, EagleParams
from frspec_jax.llama import LlamaParams
from train import session
from train.batches import Packing
from train.optimiser import key_of, seed_words
from train.recipe import PRESETS, Recipe, agreement, initial_params, train_step
from train.settings import add_arguments as add_run_arguments
from train.settings import settings_of
from train.start import ONE, Units, fitted, folded, unfolded
from train.task import Task, starting_draft

PASSES = 5  # self-fed steps that an evaluation looks at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, EagleConfig.kind, PRESETS)


def run(args: argparse.Namespace) -> None:
    checkpoint = Checkpoint.open(args.ckpt)
    settings = settings_of(args, PRESETS)
    found = starting_draft(settings.start_from, checkpoint, EagleConfig, EagleParams)

    def task_of(target: LlamaParams, packing: Packing) -> Task:
        return new_task(settings.recipe, checkpoint, settings.seed, target, packing, found)

    session.train(settings, checkpoint, task_of)


def new_task(
    recipe: Recipe,
    checkpoint: Checkpoint,
    seed: int,
    target: LlamaParams,
    packing: Packing,
    found: tuple[EagleConfig, EagleParams] | None = None,
) -> Task:
    """What is trained: a new draft, or `found`, a draft's description and weights."""
    words = seed_words(seed)
    table = np.asarray(target.embedding, np.float32) * np.float32(checkpoint.config.embedding_scale)
    units = Units.measured(packing, table) if recipe.units == "measured" else ONE
    if found is None:
        draft = EagleConfig.like(checkpoint.config)
        params = initial_params(key_of(words), draft, checkpoint.config)
        if recipe.start == "fitted":
            params = fitted(params, packing, table, units)
    else:
        draft, params = found[0].copies(False), unfolded(found[1], units)  # how it copies is fitted afterwards
    layer = draft.layer_of(checkpoint.config)
    embedding, head = target.embedding, target.head
    return Task(
        spec=draft,
        params=params,
        recipe=recipe,
        step=lambda state, ranked, batch: train_step(
            state, layer, recipe, embedding, head, ranked, words, batch, units
        ),
        agreement=lambda params, batch: agreement(params, layer, embedding, head, batch, PASSES),
        parts="self-fed step",
        flops=recipe.flops(params, head, passes=recipe.unroll, outputs=recipe.unroll),
        finished=lambda params: folded(params, units),
    )
