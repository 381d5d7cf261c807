"""Which published tensors fill which of our parameters, and the one function that fills them.

Our weights lie [out, in] as the published ones do, so that a parameter is one tensor, or the rows of
several (Q, K and V; gate and up). Names are those of Hugging Face's checkpoints; other formats
translate theirs (see gguf.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from frspec_jax.config import ModelConfig
from frspec_jax.errors import UserError

Parts = tuple[tuple[str, int], ...]  # (tensor's name, its rows), in the order in which the rows are stacked
PROBLEMS_SHOWN = 40  # of a model that fits nowhere every tensor is wrong, and there may be hundreds
DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


class TensorSource(Protocol):
    """A checkpoint that is being read: tensors by name, each one loaded when it is asked for."""

    label: str  # how an error message calls it

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray: ...


def layer_parts(config: ModelConfig, prefix: str) -> dict[str, Parts]:
    """The tensors of one decoder layer, by field of `LayerParams`."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    fields: dict[str, Parts] = {
        "attention_norm": (("input_layernorm.weight", hidden),),
        "output": (("self_attn.o_proj.weight", hidden),),
        "output_bias": (("self_attn.o_proj.bias", hidden),),
        "mlp_norm": (("post_attention_layernorm.weight", hidden),),
        "query_norm": (("self_attn.q_norm.weight", config.head_dim),),
        "key_norm": (("self_attn.k_norm.weight", config.head_dim),),
        "down": (("mlp.down_proj.weight", hidden),),
        "down_bias": (("mlp.down_proj.bias", hidden),),
    }
    if config.norms == "around":
        fields["attention_out_norm"] = fields["mlp_norm"]
        fields["mlp_norm"] = (("pre_feedforward_layernorm.weight", hidden),)
    fields.setdefault("attention_out_norm", ())
    fields["mlp_out_norm"] = (("post_feedforward_layernorm.weight", hidden),)
    for suffix, end in (("", "weight"), ("_bias", "bias")):
        fields["qkv" + suffix] = tuple((f"self_attn.{x}_proj.{end}", q if x == "q" else kv) for x in "qkv")
        fields["gate_up" + suffix] = tuple((f"mlp.{x}_proj.{end}", inner) for x in ("gate", "up"))
    return {field: tuple((prefix + name, rows) for name, rows in parts) for field, parts in fields.items()}


def model_parts(config: ModelConfig) -> dict[str, Any]:
    """The tensors of a target, in the structure of `LlamaParams`."""
    return {
        "embedding": (("model.embed_tokens.weight", config.vocab_size),),
        "layers": tuple(layer_parts(config, f"model.layers.{i}.") for i in range(config.num_layers)),
        "final_norm": (("model.norm.weight", config.hidden_size),),
        "lm_head": (("lm_head.weight", config.vocab_size),),
    }


def draft_parts(layer: ModelConfig) -> dict[str, Any]:
    """The tensors of a published EAGLE draft, in the structure of `EagleParams`."""
    hidden = layer.hidden_size
    return {
        "fc": (("fc.weight", hidden),),
        "fc_bias": (("fc.bias", hidden),),
        "layer": layer_parts(layer, "layers.0."),
    }


def fill(
    shapes: Any,
    parts: dict[str, Any],
    source: TensorSource,
    dtype: Any,
    ignore: Callable[[str], bool] = lambda name: False,
    progress: Callable[[int], None] = lambda tensors: None,
) -> Any:
    """Read the parameters of `shapes` (a pytree dataclass of `ShapeDtypeStruct`s) out of a source.

    Args:
      parts: the tensors of each field, nested as `shapes` is. dtype: of the result.
      ignore: tells names that may be left over. progress: called after each parameter.

    Raises:
      UserError: naming every tensor that is missing, unexpected or of another shape.
    """
    available, used, problems = set(source.names()), set(), []
    for name, wanted in _expected(shapes, parts):
        used.add(name)
        if name not in available:
            problems.append(f"{name} is missing")
        elif tuple(source.shape(name)) != wanted:
            problems.append(f"{name} has shape {list(source.shape(name))} where the config asks for {list(wanted)}")
    problems += [f"{name} is unexpected" for name in sorted(available - used) if not ignore(name)]
    if problems:
        rest = len(problems) - PROBLEMS_SHOWN
        more = f"; and {rest} more like these" if rest > 0 else ""
        raise UserError(f"{source.label} does not fit its config: {'; '.join(problems[:PROBLEMS_SHOWN])}{more}")

    def read(wanted: Any, rows: Any) -> Any:
        if wanted is None:
            return None
        if isinstance(wanted, tuple):
            return tuple(read(w, r) for w, r in zip(wanted, rows, strict=True))
        if dataclasses.is_dataclass(wanted) and not _is_leaf(wanted):
            kind: Any = type(wanted)
            return kind(**{f.name: read(getattr(wanted, f.name), rows[f.name]) for f in _fields(wanted)})
        tensors = [source.read(name).astype(dtype, copy=False) for name, _ in rows]
        progress(len(tensors))
        return tensors[0] if len(tensors) == 1 else np.concatenate(tensors)

    return read(shapes, parts)


def _is_leaf(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _fields(value: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(value)


def _expected(shapes: Any, parts: Any) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Every tensor that the parameters need, with its shape."""
    if shapes is None:
        return
    if isinstance(shapes, tuple):
        for shape, part in zip(shapes, parts, strict=True):
            yield from _expected(shape, part)
    elif _is_leaf(shapes):
        for name, rows in parts:
            yield name, (rows, *shapes.shape[1:])
    else:
        for field in _fields(shapes):
            yield from _expected(getattr(shapes, field.name), parts[field.name])


def tensor_count(shapes: Any, parts: Any) -> int:
    """How many tensors `fill` will read: the total of its progress."""
    return sum(1 for _ in _expected(shapes, parts))


def spread(params: Any, parts: Any, dtype: Any) -> dict[str, np.ndarray]:
    """The published tensors, by name, of a pytree of parameters: `fill`, the other way round."""
    if params is None:
        return {}
    if isinstance(params, tuple):
        return {k: v for p, part in zip(params, parts, strict=True) for k, v in spread(p, part, dtype).items()}
    if not _is_leaf(params):
        fields = _fields(params)
        return {k: v for f in fields for k, v in spread(getattr(params, f.name), parts[f.name], dtype).items()}
    rows = np.asarray(params).astype(dtype)
    ends = np.cumsum([count for _, count in parts])[:-1]
    pieces = zip(parts, np.split(rows, ends), strict=True)
    return {name: np.ascontiguousarray(piece) for (name, _), piece in pieces}
