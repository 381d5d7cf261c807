"""`python -m convert gguf FILE --out CKPT`: a model in llama.cpp's GGUF format.

Weights of any quantisation that the gguf package reads are dequantised. The tokenizer and the chat
template come out of the same file (gguf_tokenizer.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from convert.gguf_names import ARCHITECTURES, FREQUENCY_FACTORS, PAIRS_NEIGHBOURS, hf_name, unpermute
from convert.gguf_tokenizer import save_tokenizer
from convert.progress import tensor_progress
from convert.weights import DTYPES, fill, model_parts, tensor_count
from frspec_jax.checkpoint import write_model
from frspec_jax.config import ModelConfig, RopeScaling
from frspec_jax.errors import UserError
from frspec_jax.families import BY_NAME, query_scale, unrotated_each, windows_of
from frspec_jax.files import new_folder
from frspec_jax.shapes import model_shapes

# Models whose scores are divided by the square root of H / heads, by their layers; of the others, by that of head_dim.
SCALED_BY_HIDDEN = {"gemma2": 46, "gemma3": 62}


class GgufFile:
    """An opened GGUF file: its metadata, and its tensors under Hugging Face's names."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.label = str(path)
        if not path.is_file():
            raise UserError(f"{path} is no file; give a .gguf file")
        try:
            reader = gguf.GGUFReader(path)
        except Exception as error:  # the package raises many kinds for a file that is cut short or none of its own
            raise UserError(f"{path} cannot be read as GGUF ({error}); download it again") from None
        self._meta = reader.fields
        self.architecture = self.get("general.architecture")
        self._refuse_unsupported()
        self._tensors = {hf_name(t.name, self.architecture): t for t in reader.tensors}

    def _refuse_unsupported(self) -> None:
        """Refuse what would otherwise be converted to something else than the model."""
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise UserError(f"{self.label} holds a model of architecture {self.architecture!r}; {known} are supported")
        if (parts := self.get("split.count", 1)) > 1:
            raise UserError(
                f"{self.label} is one of {parts} parts; join them first: llama-gguf-split --merge FIRST_PART OUT.gguf"
            )
        if (experts := self.get("{arch}.expert_count", 0)) > 0:
            raise UserError(f"{self.label} holds a mixture of {experts} experts; dense models are supported")

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value; `{arch}` in the key stands for the architecture."""
        key = key.replace("{arch}", str(self.architecture)) if "{arch}" in key else key
        value = self._meta[key].contents() if key in self._meta else default
        # Numbers are stored as float32: take 1e-05 for 9.999999747378752e-06, as a config.json has it.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def names(self) -> Iterable[str]:
        return self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self._tensors[name].shape))

    def read(self, name: str) -> np.ndarray:
        from gguf.quants import dequantize

        tensor = self._tensors[name]
        try:
            array = dequantize(tensor.data, tensor.tensor_type).reshape(self.shape(name))
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(
                f"{self.label}: quantisation {kind} of {name} is not supported; give a file of Q8_0 or F16"
            ) from None
        if (offset := BY_NAME[self.architecture].norm_offset) and name.endswith("norm.weight"):
            array = array - offset  # llama.cpp stores 1 + w
        if self.architecture in PAIRS_NEIGHBOURS and re.search(r"self_attn\.[qk]_proj", name):
            heads = "head_count" if "q_proj" in name else "head_count_kv"
            array = unpermute(array, int(self.get(f"{{arch}}.attention.{heads}")))
        return array

    def config(self) -> ModelConfig:
        """The model's configuration, out of the metadata and the tensors that are there."""
        try:
            return self._config()
        except KeyError as missing:
            raise UserError(f"{self.label}: the metadata entry {missing} is missing") from None

    def _config(self) -> ModelConfig:
        def need(key: str) -> Any:
            value = self.get("{arch}." + key)
            if value is None:
                raise KeyError(f"{self.architecture}.{key}")
            return value

        heads, hidden, context = need("attention.head_count"), need("embedding_length"), need("context_length")
        kv_heads = self.get("{arch}.attention.head_count_kv") or heads
        if isinstance(heads, list) or isinstance(kv_heads, list):
            raise UserError(f"{self.label}: the number of heads varies from layer to layer, which is not supported")
        head_dim = self.get("{arch}.attention.key_length") or hidden // heads
        if (rotated := self.get("{arch}.rope.dimension_count") or head_dim) != head_dim:
            raise UserError(
                f"{self.label}: {rotated} of {head_dim} dimensions a head are rotated; only whole heads are supported"
            )
        names, layers, family = set(self.names()), need("block_count"), BY_NAME[self.architecture]
        scalar = hidden / heads if SCALED_BY_HIDDEN.get(family.name) == layers else head_dim
        windows = self._windows(layers)
        local = self.get("{arch}.rope.freq_base_swa") or family.local_rope_theta
        return ModelConfig(
            architecture=self.architecture,
            vocab_size=self.shape("model.embed_tokens.weight")[0],
            hidden_size=hidden,
            intermediate_size=need("feed_forward_length"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=need("attention.layer_norm_rms_epsilon"),
            rope_theta=self.get("{arch}.rope.freq_base") or 10000.0,
            rope_scaling=self._rope_scaling(context),
            max_context=context,
            tied_head="lm_head.weight" not in names,
            attention_bias="model.layers.0.self_attn.q_proj.bias" in names,
            output_bias="model.layers.0.self_attn.o_proj.bias" in names,
            mlp_bias="model.layers.0.mlp.down_proj.bias" in names,
            **family.arithmetic(hidden),
            query_scale=query_scale(scalar, head_dim),
            attention_cap=self._cap("attn_logit_softcapping"),
            logits_cap=self._cap("final_logit_softcapping"),
            windows=windows,
            local_rope_theta=local if windows else 0.0,
            unrotated=unrotated_each(layers) if family.name == "smollm3" else (),
        )

    def _cap(self, key: str) -> float:
        """A soft cap; where the file is silent, the one that the family's models have."""
        return float(self.get("{arch}." + key) or BY_NAME[self.architecture].defaults.get(key) or 0.0)

    def _windows(self, layers: int) -> tuple[int, ...]:
        window = self.get("{arch}.attention.sliding_window")
        family = BY_NAME[self.architecture]
        if not window or not family.window_of_all:
            return ()
        pattern = self.get("{arch}.attention.sliding_window_pattern") or family.window_every
        if isinstance(pattern, list):
            return tuple(window if windowed else 0 for windowed in pattern)
        return windows_of(window, layers, pattern)

    def _rope_scaling(self, context: int) -> RopeScaling:
        if FREQUENCY_FACTORS in self._tensors:
            return RopeScaling("factors", factors=tuple(map(float, self.read(FREQUENCY_FACTORS))))
        # As llama.cpp reads them: no type means linear, and old files say `scale_linear`.
        kind = self.get("{arch}.rope.scaling.type", "linear")
        factor = self.get("{arch}.rope.scaling.factor") or self.get("{arch}.rope.scale_linear")
        if kind == "none" or not factor:
            return RopeScaling()
        settings = {
            "rope_type": kind,
            "factor": factor,
            "original_max_position_embeddings": self.get("{arch}.rope.scaling.original_context_length"),
            "beta_fast": self.get("{arch}.rope.scaling.yarn_beta_fast"),
            "beta_slow": self.get("{arch}.rope.scaling.yarn_beta_slow"),
        }
        scaling = RopeScaling.from_hf({k: v for k, v in settings.items() if v is not None}, context)
        weight = self.get("{arch}.rope.scaling.yarn_attn_factor") or self.get("{arch}.rope.scaling.attn_factor") or 1.0
        if kind == "yarn":  # llama.cpp's factor comes on top of YaRN's own
            scaling = dataclasses.replace(scaling, attention_factor=scaling.attention_factor * float(weight))
        return scaling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="FILE", help="the .gguf file")
    parser.add_argument("--out", type=Path, required=True, metavar="CKPT", help="the checkpoint folder to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of the stored weights (default: float32)"
    )


def run(args: argparse.Namespace) -> None:
    file = GgufFile(args.source)
    config = file.config()
    shapes, parts = model_shapes(config), model_parts(config)
    with new_folder(args.out) as folder:
        save_tokenizer(folder, file)
        with tensor_progress(tensor_count(shapes, parts)) as progress:
            params = fill(shapes, parts, file, DTYPES[args.dtype], ignore=FREQUENCY_FACTORS.__eq__, progress=progress)
        write_model(folder, config, params)
        (folder / "source.json").write_text(json.dumps({"format": "gguf", "file": args.source.name}) + "\n")
    print(f"wrote {args.out}: {file.architecture}, {config.num_layers} layers, vocabulary {config.vocab_size:,}")
