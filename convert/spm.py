"""Read a SentencePiece `tokenizer.model` (Llama 2's kind) in the terms of a GGUF file.

Folders of before 2023 may hold no tokenizer.json. transformers would build one, but whether texts then
get the leading space that the model was trained with depends on what tokenizer_config.json says; the
tokenizer of gguf_tokenizer.py gives SentencePiece's own ids (tests/convert/test_gguf.py).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from convert.folder import read_json
from convert.gguf_tokenizer import CONTROL
from frspec_jax.errors import UserError

BPE = 2  # SentencePiece's model_type


class SentencePieceFile:
    """A folder's tokenizer.model, under the keys of GGUF (`gguf_tokenizer.Metadata`).

    Raises:
      UserError: the file is no SentencePiece BPE model, or normalises text, or sentencepiece is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.label = str(folder / "tokenizer.model")
        try:
            protocol: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
        except ImportError:
            raise UserError(
                f"{folder} holds no tokenizer.json, only tokenizer.model; add the former, "
                "or run: pip install sentencepiece protobuf"
            ) from None
        model = protocol.ModelProto()
        try:
            model.ParseFromString((folder / "tokenizer.model").read_bytes())
        except Exception as error:  # protobuf's DecodeError
            raise UserError(f"{self.label} cannot be read as SentencePiece ({error}); add a tokenizer.json") from None
        spec = model.normalizer_spec
        if model.trainer_spec.model_type != BPE or spec.precompiled_charsmap or spec.remove_extra_whitespaces:
            raise UserError(
                f"{self.label} is no plain BPE model (it normalises text, or is of another kind); add a tokenizer.json"
            )
        pieces = [(p.piece, p.score, p.type) for p in model.pieces]
        pieces += [(text, 0.0, CONTROL) for text in _added_tokens(folder, len(pieces))]
        config = read_json(folder, "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        trainer = model.trainer_spec
        ids = {"unknown": trainer.unk_id, "bos": trainer.bos_id, "eos": trainer.eos_id, "padding": trainer.pad_id}
        self._values: dict[str, Any] = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [text for text, _, _ in pieces],
            "tokenizer.ggml.scores": [score for _, score, _ in pieces],
            "tokenizer.ggml.token_type": [kind for _, _, kind in pieces],
            "tokenizer.ggml.add_space_prefix": spec.add_dummy_prefix,
            "tokenizer.ggml.add_bos_token": bool(config.get("add_bos_token", True)),
            "tokenizer.chat_template": config.get("chat_template"),
            **{f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number >= 0},
        }

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(key, default)


def _added_tokens(folder: Path, first: int) -> list[str]:
    """Tokens of added_tokens.json, which follow those of the model."""
    if not (folder / "added_tokens.json").is_file():
        return []
    added = {number: text for text, number in read_json(folder, "added_tokens.json").items() if number >= first}
    if sorted(added) != list(range(first, first + len(added))):
        raise UserError(f"{folder / 'added_tokens.json'} leaves gaps after id {first}; add a tokenizer.json")
    return [added[number] for number in sorted(added)]
