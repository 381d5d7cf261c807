"""Families of models: what published config.json files come to, and the text of any of them against transformers'."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.weights import fill, model_parts
from frspec_jax.config import LayerKind, RopeScaling
from frspec_jax.errors import UserError
from frspec_jax.families import BY_NAME, FAMILIES, read_config
from frspec_jax.shapes import model_shapes
from tests.support.tiny_hf import model_of, ours_of, theirs

# What the files on the Hub say; entries that say what the family's default is are left out there, and here.
QWEN3_06B = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
MISTRAL_7B_V01 = {
    "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "vocab_size": 32000,
}  # fmt: skip
NEMO = MISTRAL_7B_V01 | {"head_dim": 128, "hidden_size": 5120, "num_hidden_layers": 40, "sliding_window": None}
GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152},
}  # fmt: skip
GEMMA3_27B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "text_config": {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
        "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
}  # fmt: skip
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
    "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "vocab_size": 256000,
}  # fmt: skip
SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"], "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536, "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 5000000.0, "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip
PUBLISHED = {
    "qwen3": QWEN3_06B, "mistral": MISTRAL_7B_V01, "nemo": NEMO, "gemma3": GEMMA3_4B, "gemma3-27b": GEMMA3_27B,
    "gemma2": GEMMA2_2B, "smollm3": SMOLLM3_3B,
}  # fmt: skip


def test_what_published_files_come_to():
    read = {name: read_config(hf) for name, hf in PUBLISHED.items()}
    qwen, mistral, gemma, largest = read["qwen3"], read["mistral"], read["gemma3"], read["gemma3-27b"]
    assert qwen.head_norms and qwen.tied_head and not qwen.attention_bias and qwen.windows == ()
    assert mistral.windows == (4096,) * 32 and mistral.head_dim == 128 and not mistral.tied_head
    assert read["nemo"].windows == () and read["nemo"].head_dim * read["nemo"].num_heads != read["nemo"].hidden_size
    assert [gemma.kind(layer) for layer in (0, 4, 5)] == [*(LayerKind(1024, "local"),) * 2, LayerKind()]
    assert gemma.windows.count(0) == 34 // 6 and (gemma.vocab_size, gemma.num_heads, gemma.head_dim) == (262208, 8, 256)
    assert (
        gemma.rope_theta == 1e6 and gemma.local_rope_theta == 1e4 and gemma.rope_scaling == RopeScaling("linear", 8.0)
    )
    assert gemma.norms == "around" and gemma.norm_offset == 1 and gemma.activation == "gelu" and gemma.tied_head
    assert gemma.query_scale == 0 and largest.query_scale == pytest.approx(168**-0.5)
    assert read["gemma2"].windows[:3] == (4096, 0, 4096) and read["gemma2"].local_rope_theta == 0
    assert (read["gemma2"].attention_cap, read["gemma2"].logits_cap, gemma.attention_cap) == (50.0, 30.0, 0.0)
    assert read["smollm3"].unrotated == tuple(range(3, 36, 4)) and read["smollm3"].kind(3) == LayerKind(0, "none")


@pytest.mark.parametrize(
    ("hf", "changes", "said"),
    [
        (QWEN3_06B, {"architectures": ["Qwen3MoeForCausalLM"]}, "is not supported; supported are LlamaForCausalLM"),
        (
            GEMMA2_2B,
            {"hidden_activation": "gelu"},
            "hidden_activation 'gelu' is not supported; gemma2 has gelu_pytorch_tanh",
        ),
        (MISTRAL_7B_V01, {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; mistral has silu"),
        (MISTRAL_7B_V01, {"sliding_window": -1}, "sliding_window is -1, and must be a whole number of at least 1"),
        (GEMMA2_2B, {"layer_types": ["full_attention"]}, "must be a list of 26 times sliding_attention or"),
        (SMOLLM3_3B, {"no_rope_layers": [2] * 36}, "must be a list of 36 times 0 or 1"),
        (GEMMA2_2B, {"use_bidirectional_attention": True}, "is no language model"),
    ],
)
def test_what_is_not_supported_is_one_sentence(hf, changes, said):
    with pytest.raises(UserError, match=r"config\.json") as refused:
        read_config(hf | changes)
    assert said in str(refused.value)


KINDS = ("sliding_attention", "full_attention")


@st.composite
def models(draw):
    """A family, and a shape of it."""
    family = draw(st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Gemma2", "Gemma3"]))
    layers = draw(st.integers(1, 3))
    window = draw(st.integers(1, 30))
    heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    changes = {
        "num_hidden_layers": layers, "hidden_size": 24, "intermediate_size": draw(st.sampled_from([20, 40])),
        "num_key_value_heads": heads, "num_attention_heads": heads * group, "head_dim": draw(st.sampled_from([8, 12])),
        "tie_word_embeddings": draw(st.booleans()), "pad_token_id": 0,
    }  # fmt: skip
    if family in ("Llama", "Qwen3", "SmolLM3", "Gemma3"):
        changes["attention_bias"] = draw(st.booleans()) and family != "Gemma3"
    if family in ("Qwen2", "SmolLM3"):  # whose heads share H
        del changes["head_dim"]
    if family == "SmolLM3":
        changes["no_rope_layers"] = draw(st.lists(st.integers(0, 1), min_size=layers, max_size=layers))
    if family == "Mistral":
        changes["sliding_window"] = draw(st.sampled_from([None, window]))
    if family == "Qwen2":
        changes |= {"use_sliding_window": True, "sliding_window": window, "max_window_layers": draw(st.integers(0, 3))}
    if family.startswith("Gemma"):
        kinds = draw(st.lists(st.sampled_from(KINDS), min_size=layers, max_size=layers))
        changes |= {"sliding_window": window, "layer_types": kinds, "query_pre_attn_scalar": draw(st.integers(4, 20))}
    return family, changes, draw(st.integers(0, 99))


class InMemory:
    """A model of transformers as `fill` reads one."""

    label = "a model in memory"

    def __init__(self, model):
        self.tensors = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}

    def names(self):
        return self.tensors

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name):
        return self.tensors[name]


@pytest.mark.sweep
@settings(max_examples=12, deadline=None)
@given(models())
def test_any_shape_of_any_family_is_what_transformers_has(drawn):
    family, changes, seed = drawn
    model = model_of(family, seed=seed, **changes)
    config = read_config(model.config.to_dict() | {"architectures": [type(model).__name__]})
    params = fill(model_shapes(config), model_parts(config), InMemory(model), np.float32)
    tokens = np.random.default_rng(seed).integers(3, 160, 40)
    _, mine = ours_of(config, params, tokens, chunks=(23, 17))
    _, exact = theirs(model.double(), tokens)
    _, single = theirs(model.float(), tokens)
    size = np.abs(exact).max()
    # In float64 transformers says how much of a difference is rounding: ours may have no more than its own.
    assert np.abs(mine - exact).max() < max(2e-5 * size, 3 * np.abs(single - exact).max())
    clear = np.sort(exact)[:, -1] - np.sort(exact)[:, -2] > 1e-4 * size
    assert clear.any() and np.array_equal(mine.argmax(-1)[clear], exact.argmax(-1)[clear])


def test_every_family_is_found_by_its_names():
    assert {family.name for family in FAMILIES} == set(BY_NAME)
