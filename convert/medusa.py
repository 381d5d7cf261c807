"""`python -m convert medusa FOLDER --target CKPT --name medusa`: published Medusa heads.

The format of FasterDecoding/Medusa: a config.json, and medusa_lm_head.pt or .safetensors. Both layouts
that it has had can be read: heads with an LM head each (`{i}.{j}.linear.*` and `{i}.{layers}.weight`), and
the older ones that share the target's (`{i}.{j}.linear.*` alone). What the tensors say counts.

Other trainers put names before these: `medusa_head.{i}.{j}...` (a whole Medusa-2 model, whose other tensors are the
target's and stay there), and `medusa_heads.{i}.medusa_layers.{j}...` with `medusa_heads.{i}.lm_head` (NVIDIA's).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from convert import importing
from convert.folder import WEIGHT_FILES, TensorFolder
from convert.hf import model_folder
from convert.kinds import HEAD_FILES, MEDUSA_HEAD, TITLES, draft_kind
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.drafters.medusa import MedusaConfig, as_choices, published_choices
from frspec_jax.errors import UserError

TARGETS = "target:"  # before the name of a tensor that is no head's
CHOICES_KEY = "medusa_choices"  # the tree, where config.json has one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    importing.add_arguments(parser, MedusaConfig.kind)


def run(args: argparse.Namespace) -> None:
    target = importing.open_target(args)
    source = open_heads(args.source)
    spec = read_draft_config(source, target)
    importing.import_draft(args, source, target, spec, medusa_parts(spec, target), ignore=_is_targets)


def _is_targets(name: str) -> bool:
    return name.startswith(TARGETS)


def open_heads(path: Path) -> TensorFolder:
    """A folder of Medusa heads, its tensors under FasterDecoding's names; those of a target beside them marked so."""
    source = TensorFolder(model_folder(path), (*HEAD_FILES, *WEIGHT_FILES))
    if (kind := draft_kind(source)) not in (None, MedusaConfig.kind):
        raise UserError(
            f"{source.label} is {TITLES[str(kind)]}; run: python -m convert {kind} {source.label} --target CKPT"
        )
    names = {name: MEDUSA_HEAD.search(name) for name in source.names()}
    if not any(names.values()):
        return source
    blocks = [int(found[1]) for m in names.values() if m and (found := re.match(r"(\d+)\.linear\.", m[2]))]
    last = 1 + max(blocks, default=-1)  # the LM head stands behind the residual blocks

    def name_of(name: str) -> str:
        found = names[name]
        return f"{found[1]}.{found[2].replace('lm_head.', f'{last}.')}" if found else TARGETS + name

    return source.renamed(name_of)


def read_draft_config(source: TensorFolder, target: Checkpoint) -> MedusaConfig:
    """Heads, residual blocks and LM heads out of the tensors' names, and the tree out of config.json, if it is there.

    Raises:
      UserError: these are no Medusa heads, or heads for another target.
    """
    names, file = set(source.names()), f"{source.label}/config.json"
    blocks = {(int(m[1]), int(m[2])) for name in names if (m := re.fullmatch(r"(\d+)\.(\d+)\.linear\.weight", name))}
    if not blocks:
        raise UserError(f"{source.label} holds no 0.0.linear.weight, so it holds no Medusa heads; name one that does")
    heads, layers = 1 + max(i for i, _ in blocks), 1 + max(j for _, j in blocks)
    for key, found in (("medusa_num_heads", heads), ("medusa_num_layers", layers)):
        if source.config.get(key, found) != found:
            print(f"note: {file} says {key} {source.config[key]}; the tensors are of {found}", file=sys.stderr)
    hidden, wanted = source.shape("0.0.linear.weight")[0], target.config
    own = f"0.{layers}.weight" in names
    vocabulary = source.shape(f"0.{layers}.weight")[0] if own else wanted.vocab_size
    if (hidden, vocabulary) != (wanted.hidden_size, wanted.vocab_size):
        raise UserError(
            f"{source.label}: heads for a hidden size of {hidden} and a vocabulary of {vocabulary}, but those of "
            f"--target {target.path} are {wanted.hidden_size} and {wanted.vocab_size}; they belong to another target"
        )
    try:
        stated = source.config.get(CHOICES_KEY)
        choices = published_choices(heads) if stated is None else as_choices(stated)
        return MedusaConfig(hidden, heads, layers, own, choices)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {CHOICES_KEY} is no tree of this draft ({error})") from None


def medusa_parts(spec: MedusaConfig, target: Checkpoint) -> dict[str, Any]:
    """The tensors of published Medusa heads, in the structure of `MedusaParams`."""
    hidden, vocabulary = spec.hidden_size, target.config.vocab_size

    def head(i: int) -> dict[str, Any]:
        blocks = tuple(
            {part: ((f"{i}.{j}.linear.{part}", hidden),) for part in ("weight", "bias")} for j in range(spec.num_layers)
        )
        return {"blocks": blocks, "lm_head": ((f"{i}.{spec.num_layers}.weight", vocabulary),)}

    return {"heads": tuple(head(i) for i in range(spec.num_heads))}
