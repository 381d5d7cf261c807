"""`python -m eval run`: what a record holds, and that a run killed at any moment ends with the same records."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from eval.__main__ import main
from eval.data.questions import Question, alternated, digest, of_tasks, read_questions
from eval.methods import contest, side_by_side
from eval.methods.contest import Contest, parting
from eval.methods.peers import PeerResult
from frspec_jax import Request, api, defaults
from frspec_jax.api import Generator
from frspec_jax.errors import UserError
from frspec_jax.vocabulary import Ranking, tokenizer_hash
from tests.support.folders import VOCAB_SIZE, checkpoint_folder

METHODS = ["vanilla", "EAGLE-2", "FR-Spec 68"]


@pytest.fixture(scope="module")
def ckpt(toy_folder):
    return toy_folder.path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Both question sets as they are published: folders, names, gzip."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "spec_bench").mkdir()
    (folder / "humaneval").mkdir()
    rows = [
        {"question_id": 81, "category": "writing", "turns": ["a poem", "once more"], "reference": []},
        {"question_id": 82, "category": "stem", "turns": ["what is heat", "and light"]},
        {"question_id": 161, "category": "translation", "turns": ["der Zug"]},
        {"question_id": 321, "category": "qa", "turns": ["who was it"]},
    ]
    (folder / "spec_bench" / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = {"task_id": "HumanEval/0", "prompt": "def one():\n", "entry_point": "one", "test": "", "x": 1}
    (folder / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(code).encode()))
    return folder


def command(ckpt, data, out, *flags):
    return [
        "run",
        "--ckpt",
        ckpt,
        "--data",
        data,
        "--out",
        out,
        "--max-new-tokens",
        "12",
        "--draft-vocab",
        "full,1/4",
        *flags,
    ]


def evaluate(*argv):
    main([str(arg) for arg in argv])


def timeless(folder):
    """The records without what a clock says."""

    def strip(value):
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if not k.endswith("_seconds")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return strip([json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()])


@pytest.fixture(scope="module")
def whole(ckpt, data, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    evaluate(*command(ckpt, data, out))
    return out


def test_the_records_hold_every_question_method_and_turn(whole, ckpt):
    found = timeless(whole)
    assert [row["question"] for row in found] == ["Conv/81", "MT/161", "QA/321", "Code/0", "Conv/82"]
    assert [len(row["turns"]) for row in found] == [2, 1, 1, 1, 2]
    model = api.load(ckpt, api.Draft(vocab=VOCAB_SIZE // 4))
    ids = set(side_by_side.draft_ids(model).tolist())
    for row in found:
        for turn in row["turns"]:
            assert list(turn["methods"]) == METHODS
            vanilla = turn["methods"]["vanilla"]
            assert vanilla["emitted"] == len(vanilla["tokens"]) and vanilla["rounds"] == vanilla["emitted"] - 1
            for name in METHODS[1:]:
                figures = turn["methods"][name]
                tokens = figures.get("tokens", vanilla["tokens"])
                assert sum(n * (i + 1) for i, n in enumerate(figures["histogram"])) == figures["emitted"] - 1
                assert figures["rounds"] == sum(figures["histogram"])
                full = name == "EAGLE-2"
                assert figures["covered"] == (len(tokens) if full else sum(token in ids for token in tokens))


def test_the_second_turn_sees_the_first_answer(whole, ckpt):
    model = api.load(ckpt, "none")
    first, second = timeless(whole)[0]["turns"]
    tokens = first["methods"]["vanilla"]["tokens"]
    answer = model.checkpoint.tokenizer.decode(tokens, skip_special_tokens=True)
    talk = [
        {"role": "user", "content": "a poem"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "once more"},
    ]
    result = model.generate(talk, Request(12))
    assert second["prompt_tokens"] == result.prompt_tokens
    assert second["methods"]["vanilla"]["tokens"] == result.tokens


def test_the_manifest_says_what_was_measured(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    cropped = manifest["methods"]["FR-Spec 68"]
    assert (cropped["kind"], cropped["draft_vocab"]) == ("eagle+fr", 68)
    assert cropped["tree"] == dataclasses.asdict(defaults.defaults().tree)
    assert manifest["rankings"]["ranking"]["corpora"] == ["toy.txt"]
    assert manifest["questions"]["tasks"] == {"Conv": 2, "MT": 1, "QA": 1, "Code": 1}
    assert manifest["--max-new-tokens"] == 12 and "jax" in manifest["versions"] and manifest["machine"]


@pytest.mark.parametrize("seed", range(3))
def test_interrupted_between_any_two_answers(ckpt, data, whole, tmp_path, monkeypatch, seed):
    """Three answers a turn and seven turns: interrupted somewhere, over and over, until a run gets through."""
    rng, out, honest = random.Random(seed), tmp_path / "run", Generator.generate_ids
    for _ in range(30):
        left = rng.randrange(4, 24)

        def fragile(self, *args):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return honest(self, *args)

        monkeypatch.setattr(Generator, "generate_ids", fragile)
        try:
            evaluate(*command(ckpt, data, out))
            break
        except SystemExit as stop:
            assert stop.code == 130
    assert timeless(out) == timeless(whole)


def test_cut_off_at_any_byte(ckpt, data, whole, tmp_path):
    content = (whole / "records.jsonl").read_bytes()
    rng = random.Random(5)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in [0, ends[0] - 1, ends[1], ends[2] + 1, *(rng.randrange(len(content)) for _ in range(3))]:
        out = tmp_path / str(size)
        shutil.copytree(whole, out)
        (out / "records.jsonl").write_bytes(content[:size])
        evaluate(*command(ckpt, data, out))
        assert timeless(out) == timeless(whole)
        assert (out / "records.jsonl").read_bytes().startswith(content[: max([0, *(e for e in ends if e <= size)])])


@pytest.mark.sweep
def test_killed_outright(ckpt, data, whole, tmp_path):
    out = tmp_path / "run"
    argv = [sys.executable, "-m", "eval", *map(str, command(ckpt, data, out)), "--dtype", "float32"]
    process = subprocess.Popen(argv, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    file = out / "records.jsonl"
    until = time.monotonic() + 120
    while process.poll() is None and not (file.exists() and file.stat().st_size) and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    evaluate(*command(ckpt, data, out))
    assert timeless(out) == timeless(whole)


def test_a_finished_run_answers_nothing_again(ckpt, data, whole, tmp_path, monkeypatch):
    out = shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(Generator, "begin", None)
    evaluate(*command(ckpt, data, out))
    assert (out / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()


def test_repeats_and_rankings(ckpt, data, tmp_path):
    checkpoint = api.load(ckpt, "none").checkpoint
    files = []
    for number, name in enumerate(("talk", "books")):
        counts = np.random.default_rng(number).integers(0, 99, VOCAB_SIZE)
        files.append(tmp_path / f"{name}.npz")
        Ranking(counts, tokenizer_hash(checkpoint.tokenizer), (name,)).save(files[-1])
    files.append(tmp_path / "freq_100.txt")  # a token map
    files[-1].write_text(" ".join(map(str, range(100, 200))))
    flags = ("--repeats", "2", "--tasks", "QA", "--ranking", *files)
    evaluate(*command(ckpt, data, tmp_path / "run", *flags))
    first, second = timeless(tmp_path / "run")
    assert (first["repeat"], second["repeat"]) == (0, 1) and first["turns"] == second["turns"]
    names = list(first["turns"][0]["methods"])
    assert names == ["vanilla", "EAGLE-2", "FR-Spec 68 (talk)", "FR-Spec 68 (books)", "FR-Spec 68 (freq_100)"]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["rankings"]["books"]["corpora"] == ["books"]
    assert manifest["rankings"]["freq_100"]["listed"] == 100


def test_sampling_is_vanillas_seed_for_seed(ckpt, data, tmp_path):
    evaluate(*command(ckpt, data, tmp_path / "run", "--temperature", "1", "--seed", "3"))
    for row in timeless(tmp_path / "run"):
        for turn in row["turns"]:
            assert all("parted" not in figures for figures in turn["methods"].values())


class FakePeer:
    """Answers as vanilla does, but for a last token of its own."""

    def __init__(self, model, last):
        self.model, self.last = model, last

    def answer(self, prompt, max_new_tokens, lookup=False):
        tokens = self.model.generate_ids(prompt, Request(max_new_tokens)).tokens
        tokens = [*tokens[:-1], self.last] if lookup else tokens
        return PeerResult(tokens, 1, len(tokens) - 1, 0.1, 0.2)


def test_answers_are_held_against_vanilla(ckpt):
    vanilla = api.load(ckpt, "none")
    question = Question(1, "QA", ("who was it",))
    honest = vanilla.generate("who was it", Request(8)).tokens
    other = (honest[-1] + 1) % VOCAB_SIZE
    (turn,) = Contest({"vanilla": vanilla}, FakePeer(vanilla, other), Request(8)).ask(question, 0)
    same, different = turn["methods"]["transformers"], turn["methods"]["transformers, prompt lookup"]
    assert "tokens" not in same and "parted" not in same and same["emitted"] == len(honest)
    assert different["tokens"] == [*honest[:-1], other]
    assert different["parted"]["at"] == len(honest) - 1
    # The gap is that of the target's own two best next tokens there.
    text = np.concatenate([vanilla.encode("who was it"), honest[:-1]]).astype(np.int32)
    scores = np.sort(reference_logits(vanilla, text))
    assert different["parted"]["gap"] == pytest.approx(scores[-1] - scores[-2], abs=1e-3)
    assert parting([1, 2], [1, 2, 3]) == 2 and parting([1, 2], [1, 2]) == 2 and parting([3], [4]) == 0


def reference_logits(model, ids):
    import jax
    import jax.numpy as jnp

    from frspec_jax import kv_cache, llama
    from frspec_jax.placement import Placement

    config = model.checkpoint.config
    cache = kv_cache.empty(config, 256, jnp.float32)
    where = Placement.chain(jnp.int32(0), len(ids))
    features, _ = jax.jit(llama.forward, static_argnums=1)(model.weights.target, config, ids, where, cache)
    return np.asarray(llama.logits(model.weights.target, config, features))[-1]


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        evaluate(*argv)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max-new-tokens", "16"), "--max-new-tokens 12, and this command has 16"),
        (("--tree-size", "5"), f"methods EAGLE-2 tree size {defaults.defaults().tree.size}, and this command has 5"),
        (("--seed", "1"), "--seed 0"),
        (("--questions", "3"), "questions asked 5, and this command has 3"),
        (("--draft-vocab", "full"), "methods FR-Spec 68"),
    ],
)
def test_another_configuration_is_refused(ckpt, data, whole, capsys, flags, words):
    before = (whole / "records.jsonl").read_bytes()
    message = refused(capsys, *command(ckpt, data, whole), *flags)
    assert words in message and "name another folder" in message
    assert (whole / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--repeats", "0"), "--repeats 0"),
        (("--questions", "0"), "--questions 0"),
        (("--tasks", "Poetry"), "--tasks Poetry"),
        (("--temperature", "1", "--peer", "x"), "--peer answers greedily"),
        (("--peer", "absent"), "--peer absent is no file"),
        (("--tree-size", "1"), "--tree-size 1"),
        (("--draft-vocab", "half"), "--draft-vocab 'half'"),
        (("--ranking", "absent.npz"), "absent.npz is no file"),
        (("--draft-vocab", "2"), "--draft-vocab 2 is too small"),
    ],
)
def test_bad_flags_leave_nothing(ckpt, data, tmp_path, capsys, flags, words):
    out = tmp_path / "run"
    assert words in refused(capsys, *command(ckpt, data, out), *flags)
    assert not out.exists()


def test_bad_data(ckpt, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "holds neither" in refused(capsys, *command(ckpt, tmp_path / "empty", tmp_path / "run"))
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b"{}" * 99)[:20])
    assert "torn.jsonl.gz cannot be read" in refused(capsys, *command(ckpt, tmp_path / "torn.jsonl.gz", tmp_path / "r"))
    (tmp_path / "none.jsonl").write_text("")
    assert "holds no question" in refused(capsys, *command(ckpt, tmp_path / "none.jsonl", tmp_path / "r"))


def test_warm_up_is_not_recorded(ckpt, data, tmp_path, monkeypatch):
    calls = []
    honest = contest.Contest._answers
    monkeypatch.setattr(contest.Contest, "_answers", lambda self, *a: (calls.append(a[2]), honest(self, *a))[1])
    evaluate(*command(ckpt, data, tmp_path / "run", "--tasks", "QA"))
    assert calls == [contest.WARM_UP_TOKENS, 12]
    assert len(timeless(tmp_path / "run")) == 1


def test_every_kind_of_draft_has_its_names(data, tmp_path):
    """EAGLE-2 and Medusa heads in one run, each whole and cropped, and each with what it may propose."""
    from tests.support.drafts import imported, published_medusa

    checkpoint = checkpoint_folder(tmp_path / "toy")
    imported(published_medusa(tmp_path / "published", checkpoint, own=True), checkpoint, "heads", command="medusa")
    flags = ("--draft", "eagle,heads", "--tasks", "QA", "--max-new-tokens", "8")
    evaluate(*command(checkpoint.path, data, tmp_path / "run", *flags))
    (record,) = timeless(tmp_path / "run")
    names = ["vanilla", "EAGLE-2", "FR-Spec 68", "Medusa", "Medusa + FR 68"]
    assert list(record["turns"][0]["methods"]) == names
    facts = json.loads((tmp_path / "run" / "manifest.json").read_text())["methods"]
    assert [facts[name]["kind"] for name in names] == ["vanilla", "eagle", "eagle+fr", "medusa", "medusa+fr"]
    assert len({facts[name]["weights"] for name in names}) == 5
    assert all("parted" not in figures for figures in record["turns"][0]["methods"].values())


def test_questions(data):
    questions = read_questions(data)
    assert [q.key for q in questions] == ["Conv/81", "Conv/82", "MT/161", "QA/321", "Code/0"]
    assert "def one():" in questions[-1].turns[0]
    assert [q.key for q in alternated(questions)] == ["Conv/81", "MT/161", "QA/321", "Code/0", "Conv/82"]
    assert {q.task for q in of_tasks(questions, "QA,MT")} == {"QA", "MT"}
    assert digest(questions) != digest(questions[:-1])
    with pytest.raises(UserError, match="tasks Maths"):
        of_tasks(questions, "QA,Maths")


def test_only_a_newline_ends_a_line(tmp_path):
    """Text taken from web pages holds other separators, which JSON leaves as they are."""
    file = tmp_path / "question.jsonl"
    file.write_text('{"question_id": 1, "category": "qa", "turns": ["one\u2028two\x85three"]}\r\n\n', "utf-8")
    assert [q.turns for q in read_questions(file)] == [("one\u2028two\x85three",)]
