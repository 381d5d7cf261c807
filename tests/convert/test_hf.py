"""Conversion from Hugging Face folders, and every way in which it refuses."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from convert import hf
from convert.__main__ import main
from convert.importing import target_embedding
from frspec_jax.checkpoint import Checkpoint
from frspec_jax.stored_weights import save_params
from tests.support.tiny_hf import converted, edit_json, model_of, refusal, same, save


def to_pickles(source: Path, out: Path, shards: int = 1) -> Path:
    """The folder `source` (one safetensors file) as pytorch_model.bin, in one file or in shards."""
    shutil.copytree(source, out)
    tensors = {name: torch.from_numpy(value) for name, value in load_file(out / "model.safetensors").items()}
    (out / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, out / "pytorch_model.bin")
        return out
    names, places = sorted(tensors), {}
    for shard in range(shards):
        file = f"pytorch_model-{shard}.bin"
        torch.save({name: tensors[name] for name in names[shard::shards]}, out / file)
        places |= dict.fromkeys(names[shard::shards], file)
    (out / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return save(model_of(), tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(scope="module")
def target(source, tmp_path_factory) -> Checkpoint:
    return converted("hf", source, tmp_path_factory.mktemp("target") / "ckpt")


@pytest.fixture
def copy(source, tmp_path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "copy"))


def edit_tensors(file: Path, drop: tuple[str, ...] = (), **changes) -> None:
    """Rewrite a safetensors file; in `changes`, `__` stands for a dot."""
    tensors = {name: value for name, value in load_file(file).items() if name not in drop}
    tensors |= {name.replace("__", "."): value for name, value in changes.items()}
    file.unlink()  # the tensors may be mapped from it
    save_file(tensors, file)


def test_every_way_of_storing_gives_the_same_weights(source, target, tmp_path):
    sharded = save(model_of(), tmp_path / "sharded", max_shard_size="40KB")
    assert (sharded / "model.safetensors.index.json").is_file() and not (sharded / "model.safetensors").exists()
    folders = [sharded, to_pickles(source, tmp_path / "bin"), to_pickles(source, tmp_path / "bins", shards=3)]
    for folder in folders:
        assert same(converted("hf", folder, tmp_path / f"{folder.name}-ckpt").params(), target.params()), folder


def stored_dtype(checkpoint: Checkpoint) -> str:
    return target_embedding(checkpoint).dtype.name


@pytest.mark.parametrize("storage", ["safetensors", "bin"])
@pytest.mark.parametrize(("stored", "kept"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")])
def test_auto_dtype_loses_nothing(stored, kept, storage, tmp_path):
    model = model_of().to(getattr(torch, stored))
    folder = save(model, tmp_path / "hf")
    if storage == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    checkpoint = converted("hf", folder, tmp_path / "ckpt")
    assert stored_dtype(checkpoint) == kept
    embedding = model.get_input_embeddings().weight.detach().float().numpy()
    np.testing.assert_array_equal(np.asarray(checkpoint.params().embedding), embedding)


def test_dtype_flag(source, target, tmp_path):
    checkpoint = converted("hf", source, tmp_path / "ckpt", "--dtype", "bfloat16")
    assert stored_dtype(checkpoint) == "bfloat16"
    rounded = np.asarray(target.params().embedding).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(checkpoint.params(ml_dtypes.bfloat16).embedding), rounded)


def test_tokenizer_and_ends_come_along(copy, tmp_path):
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 7], "temperature": 0.6}')
    checkpoint = converted("hf", copy, tmp_path / "ckpt")
    assert checkpoint.tokenizer.encode("hello world") == [3, 4]
    assert (checkpoint.path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert checkpoint.stop_ids == (2, 7)


def test_ends_without_a_generation_config(copy, tmp_path):
    (copy / "generation_config.json").unlink()
    edit_json(copy / "config.json", eos_token_id=[2, 9])
    assert converted("hf", copy, tmp_path / "ckpt").stop_ids == (2, 9)


def test_a_tokenizer_larger_than_the_model_is_noted(copy, tmp_path, capsys):
    data = json.loads((copy / "tokenizer.json").read_text())
    data["model"]["vocab"]["beyond"] = 160
    (copy / "tokenizer.json").write_text(json.dumps(data))
    converted("hf", copy, tmp_path / "ckpt")
    assert "note: the tokenizer knows ids up to 160, the model only those below 160" in capsys.readouterr().err


def test_leftovers_are_passed_over(target, copy, tmp_path):
    inv_freq = np.ones(6, np.float32)
    edit_tensors(copy / "model.safetensors", model__layers__0__self_attn__rotary_emb__inv_freq=inv_freq)
    assert same(converted("hf", copy, tmp_path / "ckpt").params(), target.params())


def test_head_of_a_tied_model(tmp_path, capsys):
    folder = save(model_of(tie_word_embeddings=True), tmp_path / "tied")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].copy()
    edit_tensors(folder / "model.safetensors", lm_head__weight=embedding)
    assert converted("hf", folder, tmp_path / "ckpt").params().lm_head is None
    edit_tensors(folder / "model.safetensors", lm_head__weight=embedding + 1)
    assert "lm_head.weight differs" in refusal(capsys, "hf", folder, "--out", tmp_path / "ckpt2")
    assert not (tmp_path / "ckpt2").exists()


def test_every_wrong_tensor_is_named_at_once(copy, tmp_path, capsys):
    edit_tensors(
        copy / "model.safetensors",
        drop=("model.norm.weight",),
        model__layers__1__mlp__down_proj__weight=np.zeros((3, 4), np.float32),
        model__extra=np.zeros(2, np.float32),
    )
    sentence = refusal(capsys, "hf", copy, "--out", tmp_path / "ckpt")
    assert "model.norm.weight is missing" in sentence
    assert "model.layers.1.mlp.down_proj.weight has shape [3, 4] where the config asks for [48, 80]" in sentence
    assert "model.extra is unexpected" in sentence
    assert not (tmp_path / "ckpt").exists()


def _cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _cut_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1000)}, folder / "pytorch_model.bin")
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[:1000])


def _lose_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    index = {"weight_map": {"model.norm.weight": "part-1.safetensors", "lm_head.weight": "part-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


BROKEN = {
    "cut short": (_cut, "model.safetensors cannot be read as safetensors"),
    "cut pickle": (_cut_pickle, "pytorch_model.bin cannot be read as weights of torch"),
    "git lfs": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is a Git LFS pointer, not the file itself; run: git lfs pull",
    ),
    "lost shard": (_lose_shard, "1 are missing (part-2.safetensors)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "damaged config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be read"),
    "bad slow tokenizer": (
        lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer.model").write_text("no model")),
        "tokenizer.model cannot be read as SentencePiece",
    ),
    "architecture": (_config(architectures=["GPT2LMHeadModel"]), "['GPT2LMHeadModel'] is not supported"),
    "entry": (lambda f: (f / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}'), "is missing"),
    "rope": (_config(rope_parameters={"rope_type": "longrope"}), "rope scaling of type 'longrope'"),
    "quantised": (_config(quantization_config={"quant_method": "awq"}), "quantised weights (awq)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_folders_are_refused(fault, copy, tmp_path, capsys):
    breaks, sentence = BROKEN[fault]
    breaks(copy)
    assert sentence in refusal(capsys, "hf", copy, "--out", tmp_path / "new" / "ckpt")
    assert not list((tmp_path / "new").glob("*")), "something was left behind"


def test_sources_of_another_kind_are_refused(source, target, tmp_path, capsys):
    out = ("--out", tmp_path / "ckpt")
    assert "hf download some/model" in refusal(capsys, "hf", "some/model", *out)
    assert "python -m convert gguf m.gguf" in refusal(capsys, "hf", "m.gguf", *out)
    assert "give it to --ckpt as it is" in refusal(capsys, "hf", target.path, *out)
    assert "exists already" in refusal(capsys, "hf", source, "--out", tmp_path)
    assert not (tmp_path / "ckpt").exists()


def test_pickles_without_torch(source, tmp_path, capsys, monkeypatch):
    folder = to_pickles(source, tmp_path / "bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch" in refusal(capsys, "hf", folder, "--out", tmp_path / "ckpt")


def test_unsafe_pickles_are_not_run(copy, tmp_path, capsys):
    (copy / "model.safetensors").unlink()
    torch.save({"a": Path("/")}, copy / "pytorch_model.bin")  # an object of a class, as an attack would be
    assert "cannot be read as weights" in refusal(capsys, "hf", copy, "--out", tmp_path / "ckpt")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("disk full")])
def test_an_interrupted_conversion_leaves_nothing(stop, source, tmp_path, capsys, monkeypatch):
    real = hf.write_model

    def write_then_stop(*args):
        real(*args)
        raise stop

    monkeypatch.setattr(hf, "write_model", write_then_stop)
    with pytest.raises(SystemExit) as stopped:
        main(["hf", str(source), "--out", str(tmp_path / "new" / "ckpt")])
    assert stopped.value.code == (130 if stop is KeyboardInterrupt else 2)
    assert not list((tmp_path / "new").iterdir())


def test_help_names_the_formats_without_loading_jax():
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "convert", "--help"], capture_output=True, text=True, check=True
    )
    assert all(name in shown.stdout for name in ("hf", "gguf", "eagle"))
    assert re.search(r"\|\s+argparse$", shown.stderr, re.M) and not re.search(r"\|\s+jax$", shown.stderr, re.M)


def test_the_text_half_of_a_multimodal_model(tmp_path, capsys):
    """Both ways in which tensors are called there; what is left out is named."""
    model = model_of("Gemma3", head_dim=16, sliding_window=24)
    alone = converted("hf", save(model, tmp_path / "text"), tmp_path / "alone")
    text = json.loads((tmp_path / "text" / "config.json").read_text())
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    beside = {"vision_tower.patch.weight": np.ones(3, np.float32), "multi_modal_projector.x": np.ones(2, np.float32)}
    for number, prefix in enumerate(("language_model.model.", "model.language_model.")):
        folder = shutil.copytree(tmp_path / "text", tmp_path / f"whole{number}")
        (folder / "config.json").write_text(json.dumps(whole))
        (folder / "model.safetensors").unlink()
        renamed = {prefix + name.removeprefix("model."): value for name, value in tensors.items()}
        save_file(renamed | beside, folder / "model.safetensors")
        checkpoint = converted("hf", folder, tmp_path / f"ckpt{number}")
        assert checkpoint.config == alone.config and same(checkpoint.params(), alone.params())
        assert "not the text half: multi_modal_projector, vision_tower" in capsys.readouterr().out


def test_a_folder_of_the_hubs_cache(source, target, tmp_path, capsys):
    """models--OWNER--NAME: blobs, and snapshots of links to them."""
    cache = tmp_path / "models--someone--tiny"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123abc"
    shutil.copytree(source, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    for name, folder in (("by-link", snapshot), ("one", cache)):
        assert same(converted("hf", folder, tmp_path / name).params(), target.params())
    (cache / "snapshots" / "4567def").mkdir()
    assert "holds 2 snapshots of a model; give one of them" in refusal(capsys, "hf", cache, "--out", tmp_path / "two")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    assert same(converted("hf", cache, tmp_path / "by-ref").params(), target.params())


def test_a_checkpoint_of_before_a_weight_had_all_its_fields(target, tmp_path):
    """It knows nothing of norms of heads, and its model has none."""
    old = Path(shutil.copytree(target.path, tmp_path / "old"))
    shutil.rmtree(old / "params")

    def fields(value):
        if isinstance(value, tuple):
            return [fields(one) for one in value]
        if not dataclasses.is_dataclass(value):
            return value
        named = {field.name: fields(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {name: one for name, one in named.items() if not name.endswith(("query_norm", "key_norm", "out_norm"))}

    save_params(old / "params", fields(target.params()))
    assert same(Checkpoint.open(old).params(), target.params())
