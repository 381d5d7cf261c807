"""The families of models that can be targets: a row each, of what sets it apart from Llama.

A family is no class of its own. Reading a config.json or a GGUF file ends in a `ModelConfig`, whose fields say what its
layers do; those that follow from the family alone stand here. A further family is a row of `FAMILIES`, the names of its
tensors (`convert/weights.py`, and in GGUF `convert/gguf_names.py`), and its members in tests/frspec_jax/test_llama.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from frspec_jax.config import ModelConfig, RopeScaling
from frspec_jax.errors import UserError
from frspec_jax.schema import Entries


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets a family apart from Llama, whose values the defaults are."""

    name: str  # in our config.json, and as `general.architecture` of a GGUF file
    classes: tuple[str, ...]  # what Hugging Face calls its models
    attention_bias: Literal["as told", "qkv", "none"] = "as told"  # on Q, K and V always; on all four if told; never
    head_norms: bool = False
    activation: Literal["silu", "gelu"] = "silu"
    norms: Literal["before", "around"] = "before"
    norm_offset: float = 0.0
    scaled_embedding: bool = False  # by the square root of H
    local_rope_theta: float = 0.0
    window_every: int = 0  # all layers but each of this number have the window, where nothing else is said; 0: all
    window_of_all: bool = False  # `sliding_window` alone says that layers have one
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # entries that a config.json may leave out

    def arithmetic(self, hidden: int) -> dict[str, Any]:
        """The fields of `ModelConfig` that follow from the family, and from H."""
        return {
            "head_norms": self.head_norms,
            "activation": self.activation,
            "norms": self.norms,
            "norm_offset": self.norm_offset,
            "embedding_scale": math.sqrt(hidden) if self.scaled_embedding else 1.0,
        }


GEMMA: dict[str, Any] = {
    "activation": "gelu",
    "norms": "around",
    "norm_offset": 1.0,
    "scaled_embedding": True,
    "window_of_all": True,
}
GEMMA_DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
FAMILIES = (
    Family("llama", ("LlamaForCausalLM",)),
    Family(
        "mistral",
        ("MistralForCausalLM",),
        "none",
        window_of_all=True,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    Family("qwen2", ("Qwen2ForCausalLM",), "qkv"),
    Family("qwen3", ("Qwen3ForCausalLM",), head_norms=True, defaults={"head_dim": 128}),
    Family("smollm3", ("SmolLM3ForCausalLM",), defaults={"tie_word_embeddings": True, "rope_theta": 2e6}),
    Family(
        "gemma2",
        ("Gemma2ForCausalLM",),
        **GEMMA,
        window_every=2,
        defaults=GEMMA_DEFAULTS
        | {
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    Family(
        "gemma3",
        ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        **GEMMA,
        head_norms=True,
        local_rope_theta=1e4,
        window_every=6,
        defaults=GEMMA_DEFAULTS | {"vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6},
    ),
)
BY_CLASS = {name: family for family in FAMILIES for name in family.classes}
BY_NAME = {family.name: family for family in FAMILIES}


def read_config(hf: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """What a Hugging Face config.json says of a model; of a multimodal one, of its text half.

    Raises:
      UserError: an architecture, an activation or a rope scaling that is not supported, or an entry that is missing or
        of a wrong type.
    """
    family = _family(hf, source)
    text = hf.get("text_config")
    data = {**family.defaults, **(text if isinstance(text, Mapping) else hf)}
    entries = Entries(data, source)
    wanted = {"silu": "silu", "gelu": "gelu_pytorch_tanh"}[family.activation]  # in Hugging Face's words
    entry = "hidden_activation" if family.activation == "gelu" else "hidden_act"  # Gemma's hidden_act is not read
    if (activation := data.get(entry) or wanted) != wanted:
        raise UserError(f"{source}: {entry} {activation!r} is not supported; {family.name} has {wanted}")
    if data.get("use_bidirectional_attention"):
        raise UserError(f"{source}: use_bidirectional_attention is set; such a model is no language model")
    heads, hidden = entries.whole("num_attention_heads"), entries.whole("hidden_size")
    layers, context = entries.whole("num_hidden_layers"), entries.whole("max_position_embeddings", 2048)
    head_dim = entries.whole("head_dim", max(1, hidden // heads))
    windows = _windows(entries, family, layers)
    bias = family.attention_bias != "none" and entries.flag("attention_bias")
    return ModelConfig(
        architecture=family.name,
        vocab_size=entries.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=entries.whole("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=entries.whole("num_key_value_heads", heads),
        head_dim=head_dim,
        rms_norm_eps=entries.number("rms_norm_eps", 1e-6),
        **_rotary(entries, family, context, any(windows)),
        max_context=context,
        tied_head=entries.flag("tie_word_embeddings"),
        attention_bias=family.attention_bias == "qkv" or bias,
        output_bias=family.attention_bias == "as told" and bias,
        mlp_bias=entries.flag("mlp_bias"),
        **family.arithmetic(hidden),
        query_scale=query_scale(entries.number("query_pre_attn_scalar", head_dim), head_dim),
        attention_cap=entries.number("attn_logit_softcapping") if data.get("attn_logit_softcapping") else 0.0,
        logits_cap=entries.number("final_logit_softcapping") if data.get("final_logit_softcapping") else 0.0,
        windows=windows,
        unrotated=_unrotated(entries, family, layers),
    )


def _family(hf: Mapping[str, Any], source: str) -> Family:
    names = hf.get("architectures") or []
    known = [name for name in names if isinstance(name, str) and name in BY_CLASS] if isinstance(names, list) else []
    if not known:
        raise UserError(
            f"{source}: architecture {names or hf.get('model_type')!r} is not supported; "
            f"supported are {', '.join(BY_CLASS)}"
        )
    return BY_CLASS[known[0]]


def query_scale(scalar: float, head_dim: int) -> float:
    """`ModelConfig.query_scale` of scores that are divided by the square root of a number."""
    return 0.0 if scalar == head_dim else 1 / math.sqrt(scalar)


def windows_of(window: int, layers: int, every: int) -> tuple[int, ...]:
    """The windows of layers of which all have one, or all but each `every`-th; every: 0 for all."""
    return tuple(0 if every and (layer + 1) % every == 0 else window for layer in range(layers))


def _windows(entries: Entries, family: Family, layers: int) -> tuple[int, ...]:
    """`ModelConfig.windows`: layer by layer where the file says so, else by the family's rule."""
    data = entries.data
    on = family.window_of_all or entries.flag("use_sliding_window")
    if not on or data.get("sliding_window") is None:
        return ()
    window, kinds = entries.whole("sliding_window"), data.get("layer_types")
    if kinds is not None:
        known = {"sliding_attention": window, "full_attention": 0}
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
            raise entries.wrong("layer_types", f"a list of {layers} times sliding_attention or full_attention")
        windows = tuple(known[kind] for kind in kinds)
    elif family.window_of_all:
        every = entries.whole("sliding_window_pattern", family.window_every) if family.window_every else 0
        windows = windows_of(window, layers, every)
    else:
        first = entries.whole("max_window_layers", layers, least=0)
        windows = tuple(window if layer >= first else 0 for layer in range(layers))
    return windows if any(windows) else ()


def _rotary(entries: Entries, family: Family, context: int, windowed: bool) -> dict[str, Any]:
    """The rotary fields of `ModelConfig`: one embedding, or with windows perhaps a global and a local one."""
    rope = entries.inner("rope_parameters", "rope_scaling")
    theta = entries.number("rope_theta", 10000.0)
    local = entries.number("rope_local_base_freq", family.local_rope_theta) if family.local_rope_theta else 0.0
    if "full_attention" in rope.data:
        if windowed and family.local_rope_theta:
            of_window = rope.inner("sliding_attention")
            if of_window.data.get("rope_type", "default") != "default":
                raise of_window.wrong("rope_type", "default: layers with a window have no rope scaling")
            local = of_window.number("rope_theta", local)
        rope = rope.inner("full_attention")
    return {
        "rope_theta": rope.number("rope_theta", theta),
        "rope_scaling": RopeScaling.from_hf(rope, context),
        "local_rope_theta": local if windowed else 0.0,
    }


def _unrotated(entries: Entries, family: Family, layers: int) -> tuple[int, ...]:
    """The layers without rotary embedding: of SmolLM3 each fourth, or those that the file names by 0."""
    if family.name != "smollm3":
        return ()
    rotated, every = entries.data.get("no_rope_layers"), entries.whole("no_rope_layer_interval", 4)
    if rotated is None:
        return unrotated_each(layers, every)
    if not isinstance(rotated, list) or len(rotated) != layers or any(one not in (0, 1) for one in rotated):
        raise entries.wrong("no_rope_layers", f"a list of {layers} times 0 or 1")
    return tuple(layer for layer, one in enumerate(rotated) if not one)


def unrotated_each(layers: int, every: int = 4) -> tuple[int, ...]:
    """Each `every`-th layer."""
    return tuple(range(every - 1, layers, every))
