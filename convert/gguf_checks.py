"""What lies in a GGUF file that is no model of this machine's: told before anything is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from frspec_jax.errors import UserError, quoted


def check_is_model(path: Path, reader: Any) -> None:
    """Refuse a file that holds no whole model, or numbers of another byte order.

    reader: a `gguf.GGUFReader` of it.

    Raises:
      UserError: what the file is, and what to give instead.
    """
    if reader.byte_order == "S":
        raise UserError(
            f"{quoted(path)} is a GGUF file of the other byte order (big-endian here); turn it round first: "
            f"gguf-convert-endian {quoted(path)} little"
        )
    fields = reader.fields
    kind = fields["general.type"].contents() if "general.type" in fields else "model"
    if kind == "adapter":
        raise UserError(
            f"{quoted(path)} is a LoRA adapter, which changes a model and is none; merge it into its model first "
            "(llama-export-lora), and give that file"
        )
    if kind != "model":
        raise UserError(f"{quoted(path)} is a GGUF file of type {kind!r}; give the model's own file")
    if not reader.tensors:
        raise UserError(f"{quoted(path)} holds a vocabulary alone, and no weights; give the model's own file")
