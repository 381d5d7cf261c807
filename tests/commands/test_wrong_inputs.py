"""Wrong and damaged prompts, corpora, maps and drafts, given to whole commands: one sentence, nothing written."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.__main__ import main as convert
from eval.__main__ import main as evaluate
from frspec_jax import generate as generation
from tests.convert.test_gguf_checks import adapter
from tests.convert.test_gguf_checks import write as write_gguf
from tests.support.corpora import write, zstd
from tests.support.drafts import (
    edit_pickle,
    published_eagle,
    published_eagle3,
    published_medusa,
    published_speculators,
)
from tests.support.tiny_hf import edit_json
from train.__main__ import main as train

CHAT = {"messages": [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "in"}]}
IMAGE = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}
IDS = np.arange(3, 160, 4)


class Runs:
    def __reduce__(self):
        return (print, ("this must not run",))


def lines(file: Path, *rows: object) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def data(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def edited(folder: Path, name: str, **entries: object) -> Path:
    edit_json(folder / name, **entries)
    return folder


def gguf_file(file: Path) -> Path:
    return write_gguf(file, adapter)


def pointer(folder: Path) -> Path:
    """What a clone leaves where Git LFS is missing."""
    (folder / "pytorch_model.bin").unlink()
    data(folder / "model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return folder


def infinite(source: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    return folder


def changed_eagle3(folder: Path, target: object, **tensors: torch.Tensor) -> Path:
    edit_pickle(published_eagle3(folder, target, IDS), **tensors)
    return folder


def asking(file: Path, *more: object) -> tuple:
    return generation.main, "--ckpt", "TOY", "--prompt-file", file, "--max-new-tokens", 2, *more


def ranked(file: Path, vocab: int = 40) -> tuple:
    return generation.main, "--ckpt", "TOY", "--prompt", "hi", "--draft-vocab", vocab, "--ranking", file


def counting(*more: object) -> tuple:
    return train, "rank", *more, "--ckpt", "TOY", "--out", "OUT/r.npz", "--processes", 1


def answering(file: Path) -> tuple:
    return train, "answers", file, "--ckpt", "TOY", "--out", "OUT/store"


def training(file: Path) -> tuple:
    return train, "eagle", file, "--ckpt", "TOY", "--name", "new", "--work", "OUT/work", "--row", 32, "--steps", 1


def measuring(file: Path) -> tuple:
    return evaluate, "run", "--ckpt", "TOY", "--draft", "eagle", "--data", file, "--out", "OUT/run"


def taking(folder: Path, command: str = "draft") -> tuple:
    return convert, command, folder, "--target", "DEEP"


# By name: what makes the input in a folder, of the commands above; and what is said. TOY, DEEP and OUT stand for
# checkpoints of a model and for a folder that is not there yet.
CASES = {
    "an image": (
        lambda f, c: asking(lines(f / "a.jsonl", CHAT, IMAGE)),
        'a.jsonl, line 2: "content" of the user',
    ),
    "UTF-16": (
        lambda f, c: asking(data(f / "a.jsonl", '{"prompt": "a"}'.encode("utf-16"))),
        "the file is UTF-16",
    ),
    "a cut line": (lambda f, c: asking(data(f / "a.jsonl", b'{"prompt": "a"}\n{"pro')), "line 2: not JSON"),
    "no array": (lambda f, c: asking(data(f / "a.json", b'{"prompt": "a"}')), "a.json is not a JSON array of records"),
    "no Parquet": (
        lambda f, c: asking(data(f / "a.parquet", b"PAR1 no")),
        "a.parquet is no Parquet file",
    ),
    "a cut archive": (
        lambda f, c: asking(data(f / "a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 99)[:-9])),
        "a.jsonl.gz cannot be read",
    ),
    "a prompt too long": (
        lambda f, c: asking(lines(f / "a.jsonl", {"prompt": "a"}, {"prompt": "the " * 200}), "--context", 64),
        "a.jsonl, line 2: the prompt has",
    ),
    "no prompts": (lambda f, c: asking(data(f / "a.jsonl", b"\n")), "a.jsonl holds no prompt"),
    "a map of another model": (
        lambda f, c: ranked(data(f / "freq.json", json.dumps([1, 2, 99_999]).encode())),
        "names the id 99999, outside the checkpoint's vocabulary",
    ),
    "a map that runs code": (lambda f, c: ranked(data(f / "freq.pt", pickle.dumps([Runs()]))), "could run anything"),
    "a map without an order": (lambda f, c: ranked(_saved(f / "d2t.npy", np.zeros(60, int))), "in no order; say 60"),
    "a map that is short": (lambda f, c: ranked(data(f / "freq.txt", b"1 2 3")), "larger than the token map freq.txt"),
    "a map of fractions": (
        lambda f, c: counting("--merge", _saved(f / "freq.npy", np.ones(4))),
        "it holds no list of whole numbers",
    ),
    "a record of no form": (lambda f, c: counting(lines(f / "a.jsonl", {"body": "x"})), 'a.jsonl, line 1: no "text"'),
    "a table without a column": (lambda f, c: counting(write(f, [{"body": "x"}], ".parquet")), "has no column"),
    "nothing to count": (
        lambda f, c: counting(lines(f / "a.jsonl", {"messages": [{"role": "ghost", "content": "x"}]})),
        "nothing to count: read 1 record; left out 1: speaker 'ghost' is not known",
    ),
    "Latin-1": (
        lambda f, c: answering(data(f / "a.jsonl", b'{"prompt": "caf\xe9"}')),
        "line 1: not UTF-8 text",
    ),
    "a cut corpus": (
        lambda f, c: answering(data(f / "a.jsonl.zst", zstd(json.dumps(CHAT).encode() * 999)[:-40])),
        "a.jsonl.zst cannot be read",
    ),
    "no answer left": (
        lambda f, c: training(lines(f / "a.jsonl", {"prompt": "the end " * 600, "completion": "in"})),
        "nothing to train on: read 1 record; left out 1: their answers lie behind the first 512 tokens",
    ),
    "tools in a question": (
        lambda f, c: measuring(lines(f / "a.jsonl", {"prompt": "a", "tools": [{}]})),
        "a.jsonl, line 1: no question of Spec-Bench's or HumanEval's format, nor a prompt (tools cannot be measured",
    ),
    "questions by no name": (lambda f, c: measuring(data(f / "a.txt", b"a")), "a.txt holds no records by its name"),
    "a model for a draft": (
        lambda f, c: taking(c["source"]),
        "holds no draft that is known",
    ),
    "a kind of draft that is not read": (
        lambda f, c: taking(published_speculators(f / "d", c["deep"], IDS, speculators_model_type="peagle")),
        "speculators_model_type is 'peagle'",
    ),
    "a map that was never filled in": (
        lambda f, c: taking(changed_eagle3(f / "d", c["deep"], d2t=torch.zeros(40, dtype=torch.int64))),
        "d2t is all zeros, as it is before a map is filled in",
    ),
    "a pointer for a file": (
        lambda f, c: taking(pointer(published_eagle(f / "d", c["deep"], False))),
        "it is a Git LFS pointer, not the file itself; run: git lfs pull",
    ),
    "a draft for another target": (
        lambda f, c: taking(published_medusa(f / "d", c["toy"], own=True)),
        "they belong to another target",
    ),
    "the wrong command": (
        lambda f, c: taking(published_eagle3(f / "d", c["deep"], IDS), "medusa"),
        "is an EAGLE-3 draft; run: python -m convert eagle3 ",
    ),
    "a draft of text": (
        lambda f, c: taking(edited(published_eagle(f / "d", c["deep"], False), "config.json", hidden_size="wide")),
        "hidden_size is 'wide', and must be a whole number",
    ),
    "an adapter for a model": (
        lambda f, c: (convert, "gguf", gguf_file(f / "a.gguf"), "--out", "OUT"),
        "is a LoRA adapter",
    ),
    "a weight that is no number": (
        lambda f, c: (convert, "hf", infinite(c["source"], f / "hf"), "--out", "OUT"),
        "model.norm.weight holds values that are no finite numbers",
    ),
    "a map of no vocabulary": (
        lambda f, c: (convert, "export", "--ckpt", "TOY", "--map", "json", "--out", "OUT"),
        "say how many with --draft-vocab",
    ),
    "a verifier for nobody": (
        lambda f, c: (convert, "export", "--ckpt", "TOY", "--verifier", "x", "--out", "OUT"),
        "--verifier stands in drafts of --format speculators alone",
    ),
}


def _saved(file: Path, array: np.ndarray) -> Path:
    np.save(file, array)
    return file


def seen(*folders: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def models(toy_folder, deep_target, tiny_source):
    return {"toy": toy_folder, "deep": deep_target, "source": tiny_source}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_one_sentence_and_leaves_nothing(case, models, tmp_path, capfd):
    make, said = CASES[case]
    out, given = tmp_path / "out", tmp_path / "given"
    given.mkdir()
    main, *argv = make(given, models)
    stands = {"TOY": models["toy"].path, "DEEP": models["deep"].path, "OUT": out}
    texts = [str(stands.get(arg, arg)) if isinstance(arg, str) else str(arg) for arg in argv]
    texts = [str(out / text[4:]) if text.startswith("OUT/") else text for text in texts]
    before = seen(given, models["toy"].path, models["deep"].path)
    if case in ("a record of no form", "a map of fractions", "a table without a column", "nothing to count"):
        out.mkdir()
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(texts)
    printed, err = capfd.readouterr()
    assert stopped.value.code == 2 and "Traceback" not in err and "this must not run" not in printed
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert said in line
    assert seen(given, models["toy"].path, models["deep"].path) == before
    assert not [path for path in out.rglob("*") if path.is_file()]
