"""How the engines that read drafts want them: tensors and config.json of each format.

What differs between them is small and silent: a bias that one adds and another ignores, a config entry
that one takes for the fusing layer and another for attention. Each function here says which, and why.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from convert.draft import FC_BIAS_KEY, TARGET_KEY
from convert.eagle3 import OUR_TAPS_KEY, TAPS_KEY, TRAINED_EMBEDDING_KEY, eagle3_parts, tap_norm_tensors
from convert.medusa import CHOICES_KEY, medusa_parts
from convert.weights import draft_parts, spread
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.config import RopeScaling
from frspec_jax.drafters.eagle import EagleConfig, EagleParams
from frspec_jax.drafters.eagle3 import AS_PUBLISHED, Eagle3Config, Eagle3Params, default_taps
from frspec_jax.drafters.medusa import MedusaConfig, MedusaParams
from frspec_jax.errors import UserError
from frspec_jax.vocabulary import maps_of

Published = tuple[dict[str, np.ndarray], dict[str, Any]]  # tensors by name, and config.json
FAMILY = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


def eagle(spec: EagleConfig, params: EagleParams, target: Checkpoint, dtype: Any) -> Published:
    """EAGLE-2 as SafeAILab published it (`cnets1.py`); FR-Spec and CPM.cu read it too."""
    family = "qwen2" if target.config.architecture == "qwen2" else "llama"  # whose layer the draft's one is
    config = _llama_config(spec, target, FAMILY[family], family)
    config |= {"bias": spec.fc_bias, "qkv_bias": spec.attention_bias}
    return spread(params, draft_parts(spec.layer_of(target.config)), dtype), config


def eagle_sglang(spec: EagleConfig, params: EagleParams, target: Checkpoint, dtype: Any) -> Published:
    """EAGLE-2 for SGLang: the same tensors, and always a bias of the fusing layer.

    SGLang's fusing layer has one whatever config.json says, and its values would be chance without this tensor.
    Whether attention has biases it decides by the architecture, and `bias` in config.json it takes for attention's.
    """
    tensors, _ = eagle(spec, params, target, dtype)
    tensors.setdefault("fc.bias", np.zeros(spec.hidden_size, dtype))
    family = "qwen2" if spec.attention_bias else "llama"
    config = _llama_config(spec, target, FAMILY[family] + "Eagle", family) | _rope(target.config.rope_scaling)
    return tensors, config | {FC_BIAS_KEY: spec.fc_bias}


def eagle_vllm(spec: EagleConfig, params: EagleParams, target: Checkpoint, dtype: Any) -> Published:
    """EAGLE-2 for vLLM: the same tensors; its fusing layer has no bias, and would drop one without a word.

    Raises:
      UserError: the draft has such a bias.
    """
    if spec.fc_bias and np.asarray(params.fc_bias).any():
        raise UserError("--format vllm: the draft's fc has a bias, which vLLM leaves out; use --format sglang or eagle")
    tensors, _ = eagle(spec, params, target, dtype)
    tensors.pop("fc.bias", None)
    config = _llama_config(spec, target, "EagleLlamaForCausalLM", "llama") | _rope(target.config.rope_scaling)
    # `bias` would give attention biases, of its output too; `qkv_bias` gives those that there are.
    return tensors, config | {"attention_bias": False, "qkv_bias": spec.attention_bias}


def eagle3(spec: Eagle3Config, params: Eagle3Params, target: Checkpoint, dtype: Any) -> Published:
    """EAGLE-3 as SafeAILab published it (`cnets.py`), with its maps.

    Raises:
      UserError: the draft reads or norms otherwise than that code does.
    """
    if not _as_published(spec, target):
        raise UserError(
            "--format: the draft norms in other places, reads other layers or has an embedding of its own, which "
            "vLLM alone reads; use --format vllm"
        )
    return _eagle3(spec, params, target, dtype)


def _as_published(spec: Eagle3Config, target: Checkpoint) -> bool:
    taps = default_taps(target.config.num_layers)
    return (spec.norms, spec.taps, spec.own_embedding) == (AS_PUBLISHED, taps, False)


def _eagle3(spec: Eagle3Config, params: Eagle3Params, target: Checkpoint, dtype: Any) -> Published:
    """The layout that all formats of EAGLE-3 share."""
    config = _llama_config(spec, target, "LlamaForCausalLMEagle3", "llama")
    config |= {"draft_vocab_size": spec.draft_vocab_size, "rope_theta": spec.rope_theta, **_rope(spec.rope_scaling)}
    config |= {"bias": spec.fc_bias, "attention_bias": spec.attention_bias}
    d2t, t2d = maps_of(np.asarray(params.ids), target.config.vocab_size)
    bare = dataclasses.replace(params, ids=None)
    return spread(bare, eagle3_parts(spec, target.config), dtype) | {"d2t": d2t, "t2d": t2d}, config


def eagle3_sglang(spec: Eagle3Config, params: Eagle3Params, target: Checkpoint, dtype: Any) -> Published:
    """EAGLE-3 for SGLang: the published layout.

    Raises:
      UserError: the draft has biases, or reads or norms otherwise than published.
    """
    _refuse_biases(spec)
    return eagle3(spec, params, target, dtype)


def eagle3_vllm(spec: Eagle3Config, params: Eagle3Params, target: Checkpoint, dtype: Any) -> Published:
    """EAGLE-3 for vLLM: the published layout, and where the draft norms, in the words of vLLM's own trainers.

    Raises:
      UserError: the draft has biases.
    """
    _refuse_biases(spec)
    tensors, config = _eagle3(spec, params, target, dtype)
    if _as_published(spec, target):
        return tensors, config
    config |= {
        "norm_before_residual": spec.norms.residual,
        "norm_before_fc": spec.norms.taps == "joined",
        "fc_norm": spec.norms.taps == "each",
        "norm_output": spec.norms.output,
        TRAINED_EMBEDDING_KEY: spec.own_embedding,
        TAPS_KEY: list(spec.taps),
        OUR_TAPS_KEY: list(spec.taps),  # in a config.json of this form others number them otherwise
    }
    return tensors | tap_norm_tensors(spec, dtype), config


def _refuse_biases(spec: Eagle3Config) -> None:
    """SGLang's and vLLM's decoder layers take `bias` for a bias of attention, and one of the two would leave it out."""
    if spec.fc_bias or spec.attention_bias:
        raise UserError("--format: the draft has biases, which SGLang and vLLM read differently; use --format eagle")


def medusa(spec: MedusaConfig, params: MedusaParams, target: Checkpoint, dtype: Any) -> Published:
    """Medusa heads as FasterDecoding published them, of the layout that fits; our tree stands beside."""
    config = {
        "medusa_num_heads": spec.num_heads,
        "medusa_num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "vocab_size": target.config.vocab_size,
        CHOICES_KEY: [list(path) for path in spec.choices],
        TARGET_KEY: target.fingerprint,
    }
    return spread(params, medusa_parts(spec, target), dtype), config


# What each format makes of each kind of draft.
LAYOUTS: dict[str, dict[str, Any]] = {
    "eagle": {"eagle": eagle, "sglang": eagle_sglang, "vllm": eagle_vllm},
    "eagle3": {"eagle": eagle3, "sglang": eagle3_sglang, "vllm": eagle3_vllm},
    "medusa": {"medusa": medusa},
}


def _llama_config(spec: Any, target: Checkpoint, architecture: str, model_type: str) -> dict[str, Any]:
    """The entries that a draft of one Llama layer has in every engine."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "num_hidden_layers": 1,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_theta": target.config.rope_theta,
        "vocab_size": target.config.vocab_size,
        "max_position_embeddings": target.config.max_context,
        "tie_word_embeddings": False,
        TARGET_KEY: target.fingerprint,
    }


def _rope(scaling: RopeScaling) -> dict[str, Any]:
    """A rotary scaling in Hugging Face's words: these engines read it out of the draft's config.json.

    Raises:
      UserError: it has no such words.
    """
    common = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "none":
        return {}
    if scaling.kind == "linear":
        return {"rope_scaling": common}
    common["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        ends = {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        return {"rope_scaling": common | ends}
    if scaling.kind == "yarn":
        return {
            "rope_scaling": common
            | {
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.attention_factor,
                "truncate": scaling.truncate,
            }
        }
    raise UserError(
        "--ckpt: the target's rotary scaling is a list of factors, as GGUF files store it, which config.json cannot "
        "say; convert the target from its Hugging Face folder"
    )
