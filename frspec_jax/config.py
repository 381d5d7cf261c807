"""Static descriptions of models, drafts, trees and sampling: frozen, validated, hashable.

Everything here may be a static argument of a jitted function. What varies from one request to the
next (lengths, seeds, token ids) lives in arrays instead, see `state.DecodeState`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from frspec_jax.errors import UserError
from frspec_jax.schema import Entries, checked

TREE_LIMIT = 256  # nodes; ancestor sets are int32 words, eight of them at this size
CONTEXT_SLOTS = 512  # for ids of the text, as users get them: a text seldom has more that V' lacks (docs/vocabulary.md)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    `linear` divides every frequency by `factor`. `llama3` divides only the slow ones and blends in
    between (Llama 3.1). `yarn` blends by the number of rotations within the original context and
    multiplies the rotated vectors by `attention_factor` (arXiv 2309.00071). `factors` divides each
    frequency by a number of its own (GGUF stores Llama 3.1's scaling so).
    """

    kind: Literal["none", "linear", "llama3", "yarn", "factors"] = "none"
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()  # [head_dim / 2]

    @classmethod
    def from_hf(cls, rope: Mapping[str, Any] | Entries | None, context: int) -> RopeScaling:
        """Read the `rope_scaling` (or, since transformers 5, `rope_parameters`) of a config.json.

        Raises:
          UserError: another kind than those that are known, or an entry of a wrong type.
        """
        entries = rope if isinstance(rope, Entries) else Entries(rope or {}, "config.json, rope_scaling")
        kind = entries.data.get("rope_type", entries.data.get("type", "default"))
        if kind in ("default", None):
            return cls()
        if kind not in ("linear", "llama3", "yarn"):
            raise UserError(
                f"config.json asks for rope scaling of type {kind!r}; linear, llama3 and yarn are supported"
            )
        factor = entries.number("factor", 1.0)
        original = entries.whole("original_max_position_embeddings", context)
        if kind == "linear":
            return cls("linear", factor)
        if kind == "llama3":
            return cls(
                "llama3", factor, original, entries.number("low_freq_factor"), entries.number("high_freq_factor")
            )
        if entries.data.get("factor") is None:
            factor = context / original
        return cls(
            "yarn",
            factor,
            original,
            beta_fast=entries.number("beta_fast", 32.0),
            beta_slow=entries.number("beta_slow", 1.0),
            attention_factor=_yarn_attention_factor(entries, factor),
            truncate=entries.flag("truncate", True),
        )


def _yarn_attention_factor(rope: Entries, factor: float) -> float:
    """YaRN's temperature on the rotated vectors, with DeepSeek's `mscale` variant of it."""
    if rope.data.get("attention_factor") is not None:
        return rope.number("attention_factor")

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.data.get("mscale") and rope.data.get("mscale_all_dim"):
        return mscale(rope.number("mscale")) / mscale(rope.number("mscale_all_dim"))
    return mscale(1.0)


def check_layer(config: Any, *others: str, file: str = "config.json") -> None:
    """See that the sizes of a decoder layer can be those of one, and that other entries are at least 1.

    file: what a refusal calls the place.

    Raises:
      UserError: one of them is less, the KV heads cannot share the query heads, or a head is no pairs.
    """
    for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", *others):
        if getattr(config, name) < 1:
            raise UserError(f"{file}: {name} is {getattr(config, name)}, and must be at least 1")
    if config.rms_norm_eps < 0:
        raise UserError(f"{file}: rms_norm_eps is {config.rms_norm_eps}, and must be at least 0")
    if getattr(config, "rope_theta", 1.0) <= 0:
        raise UserError(f"{file}: rope_theta is {config.rope_theta}, and must be above 0")
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"{file}: {config.num_heads} query heads cannot be shared by {config.num_kv_heads} KV heads")
    if config.head_dim % 2:
        raise UserError(f"{file}: head_dim {config.head_dim} is odd; rotary embedding needs pairs")


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What sets a layer of a model apart from its others."""

    window: int = 0  # tokens that each token sees, itself among them; 0: all before it
    rotary: Literal["global", "local", "none"] = "global"  # by `rope_theta`, by `local_rope_theta`, or not at all


USUAL_LAYER = LayerKind()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A target of Llama's kind. What the fields from `activation` on say is what sets families apart (`families`)."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    max_context: int
    tied_head: bool
    attention_bias: bool = False  # bias on Q, K and V (Qwen2; Llama with attention_bias)
    output_bias: bool = False  # bias on the attention's output (Llama with attention_bias)
    mlp_bias: bool = False
    activation: Literal["silu", "gelu"] = "silu"  # of the gate; gelu: approximated by tanh
    norms: Literal["before", "around"] = "before"  # attention and MLP norm what they read, or what they add too
    norm_offset: float = 0.0  # added to the weight of every norm (Gemma: 1)
    head_norms: bool = False  # each head's queries and keys are normed before they are rotated
    embedding_scale: float = 1.0  # of what the first layer reads
    query_scale: float = 0.0  # of scores; 0: 1 / sqrt(head_dim)
    attention_cap: float = 0.0  # scores are kept within it by tanh; 0: none
    logits_cap: float = 0.0  # so are logits
    windows: tuple[int, ...] = ()  # by layer, see `LayerKind.window`; (): none has one
    local_rope_theta: float = 0.0  # of layers with a window, which then have no rope scaling; 0: as the others
    unrotated: tuple[int, ...] = ()  # numbers of the layers without rotary embedding

    def __post_init__(self) -> None:
        check_layer(self, "vocab_size", "num_layers", "max_context")
        if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise UserError(f"config.json: windows must be {self.num_layers} numbers from 0 on, one for each layer")
        for name in ("query_scale", "attention_cap", "logits_cap", "local_rope_theta"):
            if getattr(self, name) < 0:
                raise UserError(f"config.json: {name} is {getattr(self, name)}, and must be at least 0")

    @property
    def queries_per_kv(self) -> int:
        return self.num_heads // self.num_kv_heads

    def kind(self, layer: int) -> LayerKind:
        """What sets the layer of this number apart."""
        window = self.windows[layer] if self.windows else 0
        if layer in self.unrotated:
            return LayerKind(window, "none")
        return LayerKind(window, "local" if window and self.local_rope_theta else "global")

    def plain_layer(self, **changes: Any) -> ModelConfig:
        """A layer of Llama's kind as a model of one layer, which shares this one's embedding and its global rotation.

        changes: fields that it has of its own.
        """
        usual = {f.name: f.default for f in dataclasses.fields(self) if f.default is not dataclasses.MISSING}
        usual |= {"num_layers": 1, "embedding_scale": self.embedding_scale}
        return dataclasses.replace(self, **{**usual, **changes})

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Any, file: str = "config.json") -> ModelConfig:
        """Out of what `to_json` gave. Raises UserError: an entry is missing, or of a wrong type."""
        return checked(cls, data, file)


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """The static shape of a draft tree.

    size: N, nodes including the root. depth: D, levels below the root (EAGLE's own flag counts one
    less). top_k: K, beams a level and children a node. `TreeConfig(1, 0, 1)` is vanilla decoding.
    """

    size: int
    depth: int
    top_k: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= TREE_LIMIT:
            raise UserError(f"--tree-size {self.size} is out of range: 1 to {TREE_LIMIT} nodes, the root counted")
        if self.depth < 0 or self.top_k < 1:
            raise UserError(f"--depth {self.depth} and --draft-top-k {self.top_k}: give at least 0 and 1")
        if (self.size == 1) != (self.depth == 0):
            raise UserError("--tree-size 1 goes with --depth 0 (vanilla decoding), and neither goes alone")
        if self.size - 1 > self.candidates:
            raise UserError(
                f"--tree-size {self.size} asks for more nodes than --depth {self.depth} and "
                f"--draft-top-k {self.top_k} can propose ({self.candidates} and the root); lower it"
            )

    @property
    def candidates(self) -> int:
        """Nodes proposed before the re-rank: K + (D - 1) K²."""
        return self.top_k + (self.depth - 1) * self.top_k**2 if self.depth else 0

    @property
    def words(self) -> int:
        """int32 words that hold one bit a node."""
        return -(-self.size // 32)

    @property
    def draft_rows(self) -> int:
        """K/V rows that drafting writes beyond the committed ones: (D - 1) K."""
        return max(0, self.depth - 1) * self.top_k


VANILLA = TreeConfig(size=1, depth=0, top_k=1)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p, then min-p: the order of transformers' warpers.

    temperature 0 is greedy decoding; top_k 0, top_p 1 and min_p 0 switch their filter off. min_p keeps the tokens
    that are at least so many times as probable as the best one. typical is lossy: see `sampling.typical`; 0 keeps
    the text exactly the target's.

    Before all of them stand, in this order, the penalties and the bias: repetition_penalty divides a positive logit of
    every token that stands in the prompt or the answer so far, and multiplies a negative one (transformers' rule, 1 is
    off); presence_penalty is taken off once for a token of the answer so far, and frequency_penalty for each time that
    it stands there (OpenAI's, 0 is off); logit_bias is added to the logits of single ids. They change what is
    greedy too.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    typical: float = 0.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id and what is added to its logit

    def __post_init__(self) -> None:
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"--repetition-penalty {self.repetition_penalty} must be a positive number; 1 is off")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)} must be a finite number; 0 is off")
        for token, bias in self.logit_bias:
            if token < 0 or not math.isfinite(bias):
                raise UserError(f"--logit-bias {token}:{bias} must be a token id and a finite number")
        if not 0 <= self.typical < 1:
            raise UserError(f"--lossy-typical {self.typical} must be 0 (off: exact) or a share below 1, such as 0.09")
        if self.typical and self.temperature == 0:
            raise UserError("--lossy-typical needs --temperature above 0; greedy decoding accepts the best token alone")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"--temperature {self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UserError(f"--top-k {self.top_k} must be 0 (off) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p} must be above 0 and at most 1 (off)")
        if not 0 <= self.min_p < 1:
            raise UserError(f"--min-p {self.min_p} must be 0 (off) or a share below 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def adjusts(self) -> bool:
        """Whether a penalty or a bias changes the logits."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.logit_bias)
