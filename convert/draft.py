"""`python -m convert draft FOLDER --target CKPT`: a published draft of any form, which is looked at and told.

EAGLE, EAGLE-2 and HASS (`convert eagle`), EAGLE-3 and 3.1 (`convert eagle3`) and Medusa heads (`convert medusa`), as
their own projects, vLLM, speculators, SGLang, SpecForge, AngelSlim and NVIDIA's exporters write them.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from convert import importing
from convert.folder import WEIGHT_FILES, TensorFolder
from convert.hf import model_folder
from convert.kinds import HEAD_FILES, SPECULATORS_KIND, TITLES, draft_kind, has_medusa_heads
from convert.published import check_speculators
from frspec_jax.errors import UserError, quoted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    importing.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    kind = kind_of(args.source)
    args.name = args.name or kind
    print(f"{quoted(args.source)} is {TITLES[kind]}")
    importlib.import_module(f"convert.{kind}").run(args)


def kind_of(path: Path) -> str:
    """Which command reads a folder: "eagle", "eagle3" or "medusa".

    Raises:
      UserError: it is no folder of a draft, or holds one of a kind that cannot be read.
    """
    source = TensorFolder(model_folder(path), (*HEAD_FILES, *WEIGHT_FILES))
    kind = draft_kind(source)
    if kind is None and has_medusa_heads(source.names()):  # a whole model of Medusa-2
        kind = "medusa"
    if kind is not None:
        return kind
    if SPECULATORS_KIND in source.config:
        check_speculators(source)
    says = source.config.get("architectures")
    what = f" (its config.json says {', '.join(map(str, says))})" if isinstance(says, list) and says else ""
    raise UserError(
        f"{source.label} holds no draft that is known{what}; EAGLE, EAGLE-2, HASS, EAGLE-3, EAGLE-3.1 and Medusa heads "
        "can be converted, and a model with: python -m convert hf"
    )
