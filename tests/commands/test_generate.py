"""The command line and the Python API, on a toy model: same text whatever drafts, streamed or not."""

from __future__ import annotations

import dataclasses
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

import frspec_jax
from frspec_jax import Request, Sampling, TreeConfig, api, defaults, generate
from tests import conftest
from tests.support.corpora import write
from tests.support.folders import VOCAB_SIZE, checkpoint_folder

KEYS = {
    "text", "tokens", "prompt_tokens", "finish_reason", "method", "draft_vocab", "rounds", "accepted_length",
    "accepted_histogram", "prefill_seconds", "decode_seconds", "context_slots",
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(toy_folder):
    return toy_folder


def answers(capsys, checkpoint, *flags) -> list[dict]:
    generate.main(["--ckpt", str(checkpoint.path), "--json", "--max-new-tokens", "24", *map(str, flags)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


FIXED, QUARTER = ("--pace", "fixed"), VOCAB_SIZE // 4
SLOTS = f"slots{VOCAB_SIZE - QUARTER}"  # as many as there are ids outside V'
SAMPLED = ("--temperature", "1", "--seed", "4", "--top-k", "40", "--top-p", "0.9")
# What is asked to draft: the method, and the size of its vocabulary.
DRAFTS = {
    ("--draft", "none"): ("vanilla", None),
    ("--draft-vocab", "full", *FIXED): ("eagle", VOCAB_SIZE),
    ("--copying", "on", *FIXED): ("eagle+fr+copying", QUARTER),
    (): (f"eagle+fr+{SLOTS}+copying+auto", QUARTER),
}
OTHERS = {
    ("--draft-vocab", "32", *FIXED): ("eagle+fr", 32),
    FIXED: ("eagle+fr", QUARTER),
    ("--tree-size", "1"): ("vanilla", None),
    ("--copying", "off"): (f"eagle+fr+{SLOTS}+auto", QUARTER),
    ("--draft", "none", "--copying", "on"): ("vanilla+copying+auto", None),
}


# How tokens are drawn and what proposes them meet in the target's choice alone: a few drafts show that flags of both go
# together, and tests/promises has every pair.
@pytest.mark.sweep
@pytest.mark.parametrize(("drafts", "sampled"), [({**DRAFTS, **OTHERS}, ()), (DRAFTS, SAMPLED)], ids=["all", "drawn"])
def test_the_draft_changes_nothing(checkpoint, capsys, drafts, sampled):
    found = {}
    for flags in drafts:
        (found[flags],) = answers(capsys, checkpoint, "--prompt", "the end", *flags, *sampled)
    assert all(set(answer) == KEYS for answer in found.values())
    assert len({tuple(answer["tokens"]) for answer in found.values()}) == 1
    assert {flags: (answer["method"], answer["draft_vocab"]) for flags, answer in found.items()} == drafts
    for answer in found.values():
        assert answer["rounds"] == sum(answer["accepted_histogram"])
        lengths = sum(n * (i + 1) for i, n in enumerate(answer["accepted_histogram"]))
        assert lengths == len(answer["tokens"]) - 1
        assert answer["finish_reason"] == ("stop" if answer["tokens"][-1] in checkpoint.stop_ids else "length")


def test_text_and_figures_go_to_different_streams(checkpoint, capsys):
    generate.main(["--ckpt", str(checkpoint.path), "--prompt", "hello", "--max-new-tokens", "9"])
    captured = capsys.readouterr()
    (answer,) = answers(capsys, checkpoint, "--prompt", "hello")
    assert answer["text"].startswith(captured.out.rstrip("\n")[:4])
    assert "tokens/s" in captured.err and "with bonus" in captured.err


@pytest.mark.sweep
def test_the_id_of_a_record_goes_to_its_answer(checkpoint, capsys, tmp_path):
    """In a batch and one by one, out of a compressed list as out of lines."""
    rows = [{"id": "q1", "prompt": "the end"}, {"prompt": "the cat"}, {"id": 7, "instruction": "the", "input": "hat"}]
    rows[2]["tools"] = [{"name": "sum"}]  # of which the toy's template makes nothing
    found = []
    for kind, compression, slots in ((".json", ".gz", 3), (".jsonl", "", 1)):
        file = write(tmp_path, rows, kind, compression)
        found.append(answers(capsys, checkpoint, "--prompt-file", file, "--draft", "none", "--slots", slots))
    assert [[answer.get("id") for answer in one] for one in found] == [["q1", None, 7]] * 2
    assert ["id" in answer for answer in found[0]] == [True, False, True]
    assert [answer["tokens"] for answer in found[0]] == [answer["tokens"] for answer in found[1]]


@pytest.mark.sweep
def test_prompt_files_and_standard_input(checkpoint, capsys, tmp_path, monkeypatch):
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "hello"}]
    file.write_text(json.dumps({"prompt": "hello"}) + "\n\n" + json.dumps({"messages": messages}) + "\n")
    first, second = answers(capsys, checkpoint, "--prompt-file", file)
    assert first["tokens"] == second["tokens"]
    file.write_text('{"prompt": "hello\u2028there\x85"}\n', "utf-8")  # no line ends inside a string
    assert len(answers(capsys, checkpoint, "--prompt-file", file)) == 1
    text = tmp_path / "prompt.txt"
    text.write_text("hello")
    assert answers(capsys, checkpoint, "--prompt-file", text)[0]["tokens"] == first["tokens"]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert answers(capsys, checkpoint)[0]["tokens"] == first["tokens"]


def test_the_chat_template_and_raw_text(checkpoint):
    model = api.load(checkpoint)
    decode = checkpoint.tokenizer.decode
    assert decode(model.encode("hi")) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert decode(model.encode("hi", Request(raw=True))) == "hi"
    assert decode(model.encode("hi", Request(system="s"))).startswith("<|im_start|>system\ns<|im_end|>")


def test_streamed_pieces_are_the_text(checkpoint):
    """Random tokens make broken UTF-8 too: what is held back must come out whole, or as the replacement it is."""
    model = frspec_jax.load(checkpoint.path, frspec_jax.Draft(tree=TreeConfig(6, 2, 3)))
    for seed in range(8):
        request = Request(max_new_tokens=40, sampling=Sampling(1.5), seed=seed)
        whole = model.generate("wörd ✓", request)
        stream = model.stream("wörd ✓", request)
        assert "".join(stream) == whole.text
        assert stream.result is not None
        timeless = {"prefill_seconds": 0.0, "decode_seconds": 0.0}
        assert dataclasses.replace(stream.result, **timeless) == dataclasses.replace(whole, **timeless)


def test_a_stream_that_is_left_alone_spoils_nothing(checkpoint):
    model = api.load(checkpoint)
    whole = model.generate("hello", Request(24))
    next(iter(model.stream("hello", Request(24))))
    assert model.generate("hello", Request(24)).tokens == whole.tokens


@pytest.mark.sweep
def test_an_answer_that_fills_the_context_is_cut(checkpoint):
    model = api.load(checkpoint, "none", context=256)
    prompt = np.full(250, 40, np.int32)
    result = model.generate_ids(prompt, Request(100))
    assert len(result.tokens) <= 6 and result.finish_reason in ("length", "stop")
    request = Request(100, Sampling(1.0))
    roomy = api.load(checkpoint, "none", context=512).generate_ids(prompt, request).tokens
    assert model.generate_ids(prompt, request).tokens == roomy[:6]


@pytest.mark.sweep
def test_models_of_one_draft_share_a_reading(checkpoint):
    """What V' keeps matters only once a draft proposes, so a prompt is read once; each answers as it would alone."""
    prompt, request = np.arange(1, 40, dtype=np.int32), Request(12)
    whole = api.load(checkpoint, api.Draft(vocab="full"))
    cropped = api.load(checkpoint, api.Draft(vocab=68, context_slots=0), target=whole.weights.target)
    vanilla = api.load(checkpoint, "none", target=whole.weights.target)
    assert whole.reads_as(request) == cropped.reads_as(request) != vanilla.reads_as(request)
    other = api.load(checkpoint, api.Draft(vocab="full"))  # with weights of its own
    assert whole.reads_as(request) != other.reads_as(request)
    with whole.begin(prompt, request) as text:
        reading = text.reading()
    for model in (cropped, whole):
        alone, after = model.generate_ids(prompt, request), model.generate_ids(reading)
        assert (after.tokens, after.rounds, after.draft_vocab) == (alone.tokens, alone.rounds, alone.draft_vocab)
        assert after.prefill_seconds == reading.seconds and after.prompt_tokens == len(prompt)


@pytest.mark.sweep
def test_bfloat16_runs(checkpoint):
    model = api.load(checkpoint, dtype=jnp.bfloat16)
    assert model.weights.target.embedding.dtype == jnp.bfloat16
    assert len(model.generate("hello", Request(12)).tokens) >= 1


def test_the_dtype_suits_the_cpu(checkpoint, monkeypatch, tmp_path):
    """bfloat16 where a CPU multiplies it in hardware, unless another is asked for; then the tree is another too."""
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx512f amx_bf16 amx_tile\n")
    assert conftest.has_amx(tmp_path / "cpuinfo") and not conftest.has_amx(tmp_path / "none")
    for amx, dtype in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(defaults, "has_amx", lambda amx=amx: amx)
        model = api.load(checkpoint)
        best = defaults.defaults(dtype)
        assert model.dtype_name == dtype and (model.tree, model.drafting.pace) == (best.paced, best.pace)
        fixed = api.Draft(pace="fixed")
        assert api.load(checkpoint, fixed).tree == best.tree
        assert api.load(checkpoint, fixed, dtype=jnp.float32).tree == defaults.DEFAULTS["cpu"].tree


@pytest.mark.sweep
def test_several_prompts_are_answered_together_and_in_their_order(checkpoint, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    texts = ["the end", "in the", "an other one of these", "he"]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    sampled = ("--temperature", "0.9", "--seed", "3", "--presence-penalty", "0.4")
    together, one_by_one = (
        answers(capsys, checkpoint, "--prompt-file", file, *sampled, "--slots", slots) for slots in (3, 1)
    )
    assert [answer["tokens"] for answer in together] == [answer["tokens"] for answer in one_by_one]
    assert [answer["text"] for answer in together] == [answer["text"] for answer in one_by_one]
    model = api.load(checkpoint)
    request = Request(24, Sampling(0.9, presence_penalty=0.4), seed=3)
    assert [answer.tokens for answer in model.generate(texts, request)] == [answer["tokens"] for answer in together]
    assert model.generate([], request) == []


@pytest.mark.sweep
def test_an_answer_ends_before_a_stop_text(checkpoint, capsys):
    """Alone, streamed and in a batch: the token that completes it is the last, and nothing of it is in the text."""
    model = api.load(checkpoint)
    whole = model.generate("the end", Request(24))
    middle = whole.text[len(whole.text) // 2 :][:2]
    expected = whole.text[: whole.text.index(middle)]
    request = Request(24, stop=("no such text", middle), logprobs=1)
    alone, (first, second) = model.generate("the end", request), model.generate(["the end", "the end"], request)
    stream = model.stream("the end", request)
    assert "".join(stream) == expected
    for answer in (alone, first, second, stream.result):
        assert (answer.text, answer.finish_reason) == (expected, "stop")
        assert answer.tokens == whole.tokens[: len(answer.tokens)] == alone.tokens
        assert len(answer.logprobs) == len(answer.tokens)
    (said,) = answers(capsys, checkpoint, "--prompt", "the end", "--stop", middle, "--logprobs", "1")
    assert (said["text"], said["finish_reason"]) == (expected, "stop")
    np.testing.assert_allclose([one["logprob"] for one in said["logprobs"]], [one.logprob for one in alone.logprobs])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--logprobs", "2"], "--logprobs goes with --json; add it, or drop the flag"),
        (["--json", "--logprobs", "21"], "--logprobs 21 must be 0 to 20 of the likeliest tokens"),
        (["--logit-bias", "x"], "--logit-bias x must be a token id and a number, such as 28:-100"),
        (["--logit-bias", f"{VOCAB_SIZE}:1"], f"--logit-bias {VOCAB_SIZE}:1: the model's token ids are 0 to"),
        (["--stop", ""], "must be texts that are not empty"),
        (["--slots", "0"], "--slots 0 must be at least 1"),
        (["--repetition-penalty", "0"], "--repetition-penalty 0.0 must be a positive number; 1 is off"),
    ],
)
def test_what_is_no_request_is_one_sentence(checkpoint, capsys, flags, sentence):
    with pytest.raises(SystemExit) as ended:
        generate.main(["--ckpt", str(checkpoint.path), "--prompt", "hello", *flags])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and sentence in line


@pytest.mark.sweep
def test_what_a_record_is_called_by_stays_with_its_answer(checkpoint, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    rows = [{"id": "a/1", "prompt": "the end"}, {"prompt": "in the"}, {"question_id": 7, "prompt": "he"}]
    file.write_text("\n\n".join(map(json.dumps, rows)))
    for slots in (1, 2):
        said = answers(capsys, checkpoint, "--prompt-file", file, "--slots", slots)
        assert [answer.get("id", answer.get("question_id")) for answer in said] == ["a/1", None, 7]


def test_several_answers_are_told_apart(checkpoint, capsys, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "the end"}\n{"prompt": "in the"}\n')
    flags = ["--ckpt", str(checkpoint.path), "--prompt-file", str(file), "--max-new-tokens", "6"]
    for more in ([], ["--slots", "1"]):
        generate.main([*flags, *more])
        lines = capsys.readouterr().out.split("\n")
        assert lines[0] == "--- answer 1 of 2 ---" and "--- answer 2 of 2 ---" in lines


@pytest.mark.sweep
def test_what_is_off_is_said_once(tmp_path, capsys):
    bare = checkpoint_folder(tmp_path / "bare", draft=False, ranking=False)
    generate.main(["--ckpt", str(bare.path), "--prompt", "the", "--max-new-tokens", "2"])
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert "has no draft, so FR-Spec is off; train one: python -m train eagle" in note
    whole = checkpoint_folder(tmp_path / "whole", ranking=False)
    generate.main(["--ckpt", str(whole.path), "--prompt", "the", "--max-new-tokens", "2"])
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert "has no ranking, so the draft uses the whole vocabulary; count one: python -m train rank" in note
    generate.main(["--ckpt", str(whole.path), "--prompt", "the", "--max-new-tokens", "2", "--draft-vocab", "full"])
    assert "note: " not in capsys.readouterr().err
