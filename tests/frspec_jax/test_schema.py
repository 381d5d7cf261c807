"""Whatever stands in a JSON file: a configuration, or one sentence with the file and the key."""

from __future__ import annotations

import json

import pytest

from frspec_jax import drafters
from frspec_jax.checkpoint import Checkpoint, write_draft
from frspec_jax.config import ModelConfig
from frspec_jax.errors import UserError
from frspec_jax.families import read_config
from tests.support import toy
from tests.support.folders import checkpoint_folder
from tests.support.tiny_hf import edit_json

WRONG = [None, "text", "", [], [1], [[1]], [{}], {}, {"a": 1}, True, -1, 0, 1.5, float("nan"), float("inf"), 10**40]
HF = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 160, "hidden_size": 48, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "rms_norm_eps": 1e-5,
    "rope_theta": 1e4, "max_position_embeddings": 256, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False, "hidden_act": "silu",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64},
}  # fmt: skip


def refused_or_read(read, data, key) -> int:
    """1 where `read` refuses `data`, by a sentence that names the key; any other error fails the test."""
    try:
        read(data)
    except UserError as error:
        assert key in str(error) and "\n" not in str(error), error
        return 1
    return 0


def spoilt(data):
    """The data with each entry replaced by each wrong thing, and the entry's name; inner objects too."""
    for key, value in data.items():
        for wrong in WRONG:
            if wrong != value:
                yield {**data, key: wrong}, key
        if isinstance(value, dict):
            for inner, name in spoilt(value):
                yield {**data, key: inner}, name


def test_a_hugging_face_config_of_wrong_entries_is_one_sentence():
    read_config(HF)
    names = {"architectures": "architecture", "rope_type": "rope"}
    refused = [refused_or_read(read_config, data, names.get(key, key)) for data, key in spoilt(HF)]
    assert sum(refused) > 150


def test_our_own_config_of_wrong_entries_is_one_sentence():
    data = toy.config().to_json()
    assert ModelConfig.from_json(data) == toy.config()
    refused = [refused_or_read(ModelConfig.from_json, wrong, key) for wrong, key in spoilt(data)]
    assert sum(refused) > 200


@pytest.mark.parametrize("kind", ["eagle", "eagle3", "medusa"])
def test_a_drafts_config_of_wrong_entries_is_one_sentence(kind):
    spec, _ = toy.DRAFTS[kind](toy.config())
    data = {"kind": kind, **json.loads(json.dumps(spec.to_json()))}
    assert drafters.spec_of(data, "config.json") == spec
    refused = [
        refused_or_read(lambda d: drafters.spec_of(d, "config.json"), wrong, "config.json") for wrong, _ in spoilt(data)
    ]
    assert sum(refused) > 30


@pytest.mark.parametrize("whole", ["null", "[]", '"text"', "3", "{", "", "[" * 10_000])
def test_files_that_hold_something_else_are_one_sentence(tmp_path, whole):
    checkpoint = checkpoint_folder(tmp_path / "toy", ranking=False)
    draft = checkpoint.path / "drafts" / "eagle"
    (draft / "config.json").write_text(whole)
    with pytest.raises(UserError, match=r"config\.json"):
        checkpoint.draft_spec(draft)
    (checkpoint.path / "generation_config.json").write_text(whole)
    with pytest.raises(UserError, match=r"generation_config\.json"):
        _ = Checkpoint.open(checkpoint.path).stop_ids
    (checkpoint.path / "config.json").write_text(whole)
    with pytest.raises(UserError, match=r"config\.json"):
        Checkpoint.open(checkpoint.path)


@pytest.mark.parametrize("ids", ["text", 1.5, -1, 10**9, [1, None], [[2]], {"a": 1}])
def test_ends_that_are_no_token_ids_are_one_sentence(tmp_path, ids):
    checkpoint = checkpoint_folder(tmp_path / "toy", draft=False, ranking=False)
    file = checkpoint.path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [2, 5]}))
    assert {2, 5} <= set(Checkpoint.open(checkpoint.path).stop_ids)
    edit_json(file, eos_token_id=ids)
    with pytest.raises(UserError, match="eos_token_id"):
        _ = Checkpoint.open(checkpoint.path).stop_ids


SIZES = {
    "num_heads": [0, -1, 3],  # 3 cannot share 2 KV heads
    "num_kv_heads": [0, -2, 3],
    "head_dim": [0, -8, 7],
    "intermediate_size": [0],
    "draft_vocab_size": [0, -1],
    "rms_norm_eps": [-1e-5],
    "rope_theta": [0.0, -1e4],
    "taps": [[], [-1, 0, 1], [0, 1, 99]],
}


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_drafts_sizes_and_taps_are_looked_at_when_it_is_opened(kind, tmp_path):
    """By `draft_spec`, before any of its weights are read, and by a sentence that names the file and the entry."""
    checkpoint = checkpoint_folder(tmp_path / "toy", draft=False, ranking=False)
    spec, params = toy.DRAFTS[kind](checkpoint.config)
    (folder := checkpoint.path / "drafts" / kind).mkdir(parents=True)
    write_draft(folder, spec, params, checkpoint.fingerprint, {})
    assert checkpoint.draft_spec(folder) == spec
    whole = (folder / "config.json").read_text()
    for key, values in SIZES.items():
        for wrong in values if key in json.loads(whole) else []:
            (folder / "config.json").write_text(whole)
            edit_json(folder / "config.json", **{key: wrong})
            with pytest.raises(UserError) as refused:
                checkpoint.draft(folder)
            said = str(refused.value)
            assert said.startswith(f"{folder}/config.json is damaged") and "convert the draft again" in said
            assert key in said or "query heads cannot be shared" in said
