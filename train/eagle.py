"""`python -m train eagle CORPUS... --ckpt CKPT --name eagle`: train an EAGLE-2 draft for a target.

CORPUS is a feature store that `train answers` has made, or text or conversations, whose features the
target then computes into a store of its own (WORK/features). The run lives in WORK: Orbax
checkpoints from which the same command resumes bit for bit, and a line of metrics each evaluation.
When the steps are done, the draft is written to CKPT/drafts/NAME.
"""

from __future__ import annotations

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from frspec_jax.checkpoint import Checkpoint
from frspec_jax.drafters.eagle import EagleConfig
from frspec_jax.llama import LlamaParams
from train import session
from train.batches import Packing
from train.recipe import PRESETS, Recipe, agreement, initial_params, train_step
from train.session import Task
from train.start import ONE, Units, fitted, folded, unfolded

PASSES = 5  # self-fed steps that an evaluation looks at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_arguments(parser, EagleConfig.kind, PRESETS)


def run(args: argparse.Namespace) -> None:
    checkpoint = Checkpoint.open(args.ckpt)
    recipe: Recipe = session.recipe_of(args, PRESETS)
    found = session.starting_draft(args, checkpoint, EagleConfig.kind)

    def task_of(target: LlamaParams, packing: Packing) -> Task:
        table = np.asarray(target.embedding, np.float32)
        units = Units.measured(packing, table) if recipe.units == "measured" else ONE
        if found is None:
            draft = EagleConfig.like(checkpoint.config)
            params = initial_params(jax.random.key(args.seed), draft, checkpoint.config)
            if recipe.start == "fitted":
                params = fitted(params, packing, table, units)
        else:
            draft, params = found[0].copies(False), unfolded(found[1], units)  # how it copies is fitted afterwards
        layer, seed = draft.layer_of(checkpoint.config), jnp.int32(args.seed)
        embedding, head = target.embedding, target.head
        return Task(
            spec=draft,
            params=params,
            recipe=recipe,
            step=lambda state, ranked, batch: train_step(
                state, layer, recipe, embedding, head, ranked, seed, batch, units
            ),
            agreement=lambda params, batch: agreement(params, layer, embedding, head, batch, PASSES),
            parts="self-fed step",
            flops=recipe.flops(params, head, passes=recipe.unroll, outputs=recipe.unroll),
            finished=lambda params: folded(params, units),
        )

    session.train(args, checkpoint, recipe, task_of)
