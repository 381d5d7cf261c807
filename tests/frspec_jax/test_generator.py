"""The driver of a text, and what a model checks in Python's words."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from frspec_jax import api, engine, prefill
from frspec_jax.api import NO_DRAFT, Draft, Request
from frspec_jax.config import VANILLA, Sampling, TreeConfig
from frspec_jax.errors import UserError
from frspec_jax.vocabulary import control_ids
from tests.support.folders import VOCAB_SIZE

PROMPT = np.arange(1, 30, dtype=np.int32)
TREE = TreeConfig(6, 2, 3)


@pytest.fixture(scope="module")
def checkpoint(toy_folder):
    return toy_folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return api.load(checkpoint, Draft(tree=TREE))


def same_text(a, b) -> bool:
    return (a.tokens, a.text, a.rounds, a.accepted_histogram) == (b.tokens, b.text, b.rounds, b.accepted_histogram)


# Driving -----------------------------------------------------------------------------------------


def test_a_text_round_by_round_is_the_text_at_once(model):
    request = Request(40, Sampling(1.2), seed=3)
    whole = model.generate_ids(PROMPT, request)
    with model.begin(PROMPT, request) as text:
        assert text.emitted == 1 and text.result().finish_reason is None
        seen = [text.tokens]
        while not text.finished:
            text.advance(1)
            seen.append(text.tokens)
        assert same_text(text.result(), whole)
    assert len(seen) == whole.rounds + 1
    assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(seen))


def buffers(model) -> set[int]:
    return {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(model._caches)}


def test_caches_come_back(model):
    """After an error, and after a stream that is dropped: the next text is written into the same memory."""
    whole = model.generate_ids(PROMPT, Request(12))
    ours = buffers(model)
    with pytest.raises(RuntimeError), model.begin(PROMPT, Request(12)) as text:
        text.advance(2)
        raise RuntimeError
    assert buffers(model) == ours
    stream = iter(model.stream("hello", Request(24)))
    next(stream)
    stream.close()
    assert buffers(model) == ours
    assert same_text(model.generate_ids(PROMPT, Request(12)), whole)


def test_an_error_within_a_round_spoils_the_text_alone(model, monkeypatch):
    whole = model.generate_ids(PROMPT, Request(12))

    def fails(plan, weights, state, rounds):
        for leaf in jax.tree.leaves(state):
            leaf.delete()  # as donation does
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine, "run", fails)
        with pytest.raises(KeyboardInterrupt):
            model.generate_ids(PROMPT, Request(12))
    assert same_text(model.generate_ids(PROMPT, Request(12)), whole)


def test_threads_share_a_model(model):
    requests = [Request(20 + n, Sampling(0.5 + 0.1 * n), seed=n) for n in range(6)]
    alone = [model.generate_ids(PROMPT[n:], request) for n, request in enumerate(requests)]
    found: dict[int, list] = {n: [] for n in range(6)}

    def work(n):
        for _ in range(4):
            found[n].append(model.generate_ids(PROMPT[n:], requests[n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(results) == 4 for results in found.values())
    assert all(same_text(result, alone[n]) for n, results in found.items() for result in results)


def test_a_warm_model_compiles_nothing_for_its_first_prompts(checkpoint):
    """What `warm_up` compiles is what prompts run: caches are bound to the device from the first one on."""
    model = api.load(checkpoint, Draft(tree=TreeConfig(5, 2, 2)), chunk=64)
    before = prefill.run._cache_size(), engine.run._cache_size()
    model.warm_up()
    assert (prefill.run._cache_size(), engine.run._cache_size()) == (before[0] + 1, before[1] + 1)
    for length in (1, 20, 100):
        model.generate_ids(np.arange(1, 1 + length), Request(5))
    assert (prefill.run._cache_size(), engine.run._cache_size()) == (before[0] + 1, before[1] + 1)


# What is checked ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([], "at least one token id"),
        ([1.0, 2.0], "at least one token id"),
        ([[1, 2]], "at least one token id"),
        ([1, -1], "hold -1"),
        ([1, VOCAB_SIZE], f"hold {VOCAB_SIZE}, and the model's token ids are 0 to {VOCAB_SIZE - 1}"),
        (["a"], "at least one token id"),
    ],
)
def test_ids_that_are_none_are_refused(model, ids, said):
    with pytest.raises(UserError, match=said):
        model.generate_ids(ids)


@pytest.mark.parametrize("chunk", [100, 0, -1, 3, 512, 10**6])
def test_a_chunk_divides_the_block_of_a_cache(checkpoint, chunk):
    """Another one would be padded beyond the capacity, and overwrite what stands there."""
    with pytest.raises(UserError, match=f"chunk {chunk} must divide 256"):
        api.load(checkpoint, NO_DRAFT, chunk=chunk)


@pytest.mark.parametrize("seed", [2**63 - 1, -(2**63), 2**40, -1, np.int64(2**33)])
def test_seeds_of_64_bits(model, seed):
    request = Request(12, Sampling(1.5), seed=seed)
    near = Request(12, Sampling(1.5), seed=int(seed) - 1 if seed > 0 else int(seed) + 1)
    tokens = model.generate_ids(PROMPT, request).tokens
    assert tokens == model.generate_ids(PROMPT, request).tokens != model.generate_ids(PROMPT, near).tokens


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 1.5, "1", None, True])
def test_seeds_that_are_none_are_refused(seed):
    with pytest.raises(UserError, match="seed"):
        Request(seed=seed)


@pytest.mark.sweep
def test_the_context_is_prompt_and_answer_whatever_drafts(checkpoint):
    """A prompt near its end: a large tree leaves as much room as vanilla decoding."""
    request = Request(100, Sampling(1.0), seed=4)
    prompt = np.arange(239) % 200 + 3
    models = [NO_DRAFT, Draft(tree=TREE), Draft(tree=TreeConfig(60, 6, 10))]
    results = [api.load(checkpoint, draft, context=256).generate_ids(prompt, request) for draft in models]
    assert {tuple(result.tokens) for result in results} == {tuple(results[0].tokens)}
    assert results[0].finish_reason == "stop" or len(results[0].tokens) == 17
    tiny = api.load(checkpoint, Draft(tree=TREE), context=10)
    assert len(tiny.generate_ids(PROMPT[:7], Request(50)).tokens) <= 3
    with pytest.raises(UserError, match="context 10 leaves room for at most 9"):
        tiny.generate_ids(PROMPT[:10])


@pytest.mark.parametrize(
    ("draft", "how", "said"),
    [
        ("none", {"dtype": "int8"}, "dtype int8 must be one of float32, bfloat16"),
        (Draft(vocab="a third"), {}, r"Draft\.vocab 'a third' must be a number of tokens, full, or a share"),
        (Draft("none", vocab=100), {}, r'Draft\.vocab 100 needs a draft, and draft "none" asks for none'),
        (Draft("none", copying=True, pace="fixed"), {}, r"Draft\.copying on with a fixed pace needs a draft"),
        (Draft(ranking="/nope.npz", vocab="full"), {}, r"/nope\.npz"),
        ("none", {"context": 0}, "context 0 is out of range"),
    ],
)
def test_errors_name_pythons_arguments(checkpoint, draft, how, said):
    with pytest.raises(UserError, match=said) as refused:
        api.load(checkpoint, draft, **how)
    assert "--" not in str(refused.value)


def test_what_may_be_given_in_several_forms(checkpoint):
    vocab = [api.load(checkpoint, Draft(vocab=v)).draft_vocab for v in ("1/4", VOCAB_SIZE // 4, str(VOCAB_SIZE // 4))]
    assert len(set(vocab)) == 1
    ranking = str(checkpoint.path / "ranking.npz")
    assert api.load(checkpoint, Draft(vocab="1/4", ranking=ranking)).draft_vocab == vocab[0]
    assert api.load(checkpoint, "eagle").drafting.folder == checkpoint.path / "drafts" / "eagle"
    assert api.load(checkpoint, dtype="bfloat16").dtype_name == "bfloat16"
    assert api.load(checkpoint, Draft(tree=VANILLA)).draft_vocab is None


def test_a_token_map_is_a_ranking(checkpoint, model, tmp_path):
    """Sliced at any V' up to its length, which is V' where none is asked for and the map is shorter than a quarter."""
    file, ids = tmp_path / "freq_40.json", np.random.default_rng(0).permutation(VOCAB_SIZE)[:40].tolist()
    file.write_text(json.dumps(ids))
    control = set(control_ids(checkpoint.tokenizer, checkpoint.stop_ids, VOCAB_SIZE))
    expected = model.generate_ids(PROMPT, Request(16)).tokens
    for vocab, size in ((None, 40), (20, 20), (40, 40)):
        mapped = api.load(checkpoint, Draft(vocab=vocab, ranking=file, tree=TREE))
        assert mapped.draft_vocab == size and mapped.generate_ids(PROMPT, Request(16)).tokens == expected
        best = [number for number in ids if number not in control][: size - len(control)]
        assert set(mapped.weights.draft.head.ids.tolist()) == control | set(best)
    with pytest.raises(
        UserError, match=r"Draft\.vocab 41 is larger than the token map freq_40\.json, which names 40 ids"
    ):
        api.load(checkpoint, Draft(vocab=41, ranking=file))
    assert api.load(checkpoint, Draft(vocab="full", ranking=file)).draft_vocab == VOCAB_SIZE
    file.write_text(json.dumps([*ids, VOCAB_SIZE]))
    with pytest.raises(
        UserError, match=rf"freq_40\.json names the id {VOCAB_SIZE}, outside the checkpoint's vocabulary"
    ):
        api.load(checkpoint, Draft(vocab=20, ranking=file))


def test_spaces_are_a_prompt_where_there_is_no_template(model):
    assert len(model.encode("  ", Request(raw=True))) > 0
    with pytest.raises(UserError, match="the prompt is empty"):
        model.encode("", Request(raw=True))
    with pytest.raises(UserError, match="the prompt is empty"):
        model.encode("  ")


@pytest.mark.parametrize(
    "template", ["{{ nobody.knows.this }}", "{% if %}", "", "{{ raise_exception('only one turn') }}"]
)
def test_a_template_that_says_nothing_is_one_sentence(checkpoint, monkeypatch, template):
    model = api.load(checkpoint, NO_DRAFT)
    monkeypatch.setattr(checkpoint.tokenizer, "chat_template", template or "{# nothing #}")
    with pytest.raises(UserError, match=r"the chat template of .* chat_template\.jinja, or use raw") as refused:
        model.encode("hi")
    assert "\n" not in str(refused.value)


@pytest.mark.sweep
def test_64_bits_as_jaxs_default_change_nothing(checkpoint, model, tmp_path):
    expected = model.generate_ids(PROMPT, Request(16, Sampling(1.0), seed=5)).tokens
    code = (
        "import json, sys, numpy as np\n"
        "from frspec_jax import api, config\n"
        "model = api.load(sys.argv[1], api.Draft(tree=config.TreeConfig(6, 2, 3)), dtype='float32')\n"
        "request = api.Request(16, config.Sampling(1.0), seed=5)\n"
        "print(json.dumps(model.generate_ids(np.arange(1, 30), request).tokens))\n"
    )
    env = {**os.environ, "JAX_ENABLE_X64": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, checkpoint.path],
        cwd=Path(__file__).parents[2],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
    with jax.enable_x64(True):
        assert model.generate_ids(PROMPT, Request(16, Sampling(1.0), seed=5)).tokens == expected
        assert jnp.arange(2).dtype == jnp.int64, "the setting did not hold, so this test would prove nothing"


def test_an_unfinished_draft_is_none(checkpoint):
    """What a killed writer leaves has a leading dot."""
    left = checkpoint.path / "drafts" / ".other.part-1"
    left.mkdir()
    try:
        (left / "config.json").write_text("{}")
        assert checkpoint.draft_folder(None).name == "eagle"
    finally:
        (left / "config.json").unlink()
        left.rmdir()
