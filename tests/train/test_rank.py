"""`python -m train rank`: counts are the tokenizer's, whatever the file, and mistakes cost one sentence."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from frspec_jax.checkpoint import FORMAT, Checkpoint
from frspec_jax.vocabulary import Ranking, control_ids, sub_vocabulary, tokenizer_hash
from tests.support import toy
from tests.support.corpora import write
from tests.train.test_corpus import chats, texts
from train import rank
from train.__main__ import main
from train.corpus import COMPRESSIONS, FORMATS, Tally
from train.features import FeatureWriter
from train.rank import Counting, count_files

VOCAB = 400
ROOT = Path(__file__).parents[2]
PROSE = "the quick brown fox jumps over a lazy dog while naïve résumé 日本語 \U0001f600 def return x1 ( ) :"
WORDS = PROSE.split()
BOTH = ("user", "assistant")


def sentences(count: int, seed: int = 0) -> list[str]:
    choose = random.Random(seed)
    return [" ".join(choose.choices(WORDS, k=choose.randint(1, 12))) + ".\n" for _ in range(count)]


def make_checkpoint(folder: Path, text: list[str], vocab_size: int = VOCAB) -> Path:
    """A checkpoint folder without weights: a small byte-level BPE tokenizer with chat tokens, and a config."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(text, trainer)
    start = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    tokenizer.post_processor = start  # as Llama's: counts must leave it out
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>")
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    config = {"format": FORMAT, "fingerprint": "0", **toy.config(vocab_size).to_json()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ckpt"), sentences(200))


def by_hand(ckpt: Path, said: list[str]) -> np.ndarray:
    """Counts [V] the plain way: one text after the other in this process."""
    tokenizer = Tokenizer.from_file(str(ckpt / "tokenizer.json"))
    found = Counter(number for text in said for number in tokenizer.encode(text, add_special_tokens=False).ids)
    return np.array([found[number] for number in range(VOCAB)])


def counted(ckpt: Path, *files: Path, roles=BOTH, processes=2, limit=None, vocab_size=VOCAB) -> list[np.ndarray]:
    how = Counting(ckpt / "tokenizer.json", vocab_size, roles, processes, limit)
    return list(count_files(list(files), how, Tally()))


def command(*args: object) -> None:
    main(["rank", *map(str, args)])


def refusal(capfd: pytest.CaptureFixture[str], *args: object) -> str:
    """The one sentence by which `python -m train rank ARGS` refuses (stderr may hold the progress bar besides)."""
    with pytest.raises(SystemExit) as stopped:
        command(*args)
    err = capfd.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


# Counting ----------------------------------------------------------------------------------------


def test_every_format_and_compression_gives_equal_counts(tmp_path, ckpt):
    said = sentences(60, seed=1)
    files = [write(tmp_path, texts(said), kind, compression) for kind in FORMATS for compression in COMPRESSIONS]
    expected = by_hand(ckpt, said)
    found = counted(ckpt, *files)
    assert len(found) == 16
    for file, counts in zip(files, found, strict=True):
        whole = by_hand(ckpt, ["".join(said)]) if ".txt" in file.name else expected
        assert counts.dtype == np.int64 and counts.tolist() == whole.tolist(), file.name


def test_counts_do_not_depend_on_processes_or_batches(tmp_path, ckpt, monkeypatch):
    said = sentences(3000, seed=2)
    file, expected = write(tmp_path, texts(said), ".jsonl"), by_hand(ckpt, said)
    for processes, batch in ((1, rank.BATCH), (3, rank.BATCH), (1, 5000), (3, 20000)):
        monkeypatch.setattr(rank, "BATCH", batch)
        (counts,) = counted(ckpt, file, processes=processes)
        assert counts.tolist() == expected.tolist()


def test_batches_are_of_bounded_size_and_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rank, "BATCH", 1000)
    said = ["".join(sentences(300, seed=3)), *sentences(100, seed=4)]
    file = write(tmp_path, texts(said), ".jsonl")
    positions, batches = zip(*rank._batches(file, BOTH, Tally()), strict=True)
    assert "".join(text for batch in batches for text in batch) == "".join(said)
    longest = max(len(line) for text in said for line in text.splitlines(keepends=True))
    assert max(sum(map(len, batch)) for batch in batches) < 2 * 1000 + longest
    assert all(text.endswith("\n") for batch in batches for text in batch)
    assert list(positions) == sorted(positions) and positions[-1] == file.stat().st_size


@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_only_the_roles_asked_for_count(tmp_path, ckpt, key):
    file = write(tmp_path, chats(key), ".jsonl")
    said = {
        ("assistant",): [text for n in range(40) for text in (f"Answer {n}.", "ok")],
        ("user",): [f"Question {n}?" for n in range(40)],
        ("system",): ["Be brief."] * 40,
    }
    for roles, spoken in said.items():
        assert counted(ckpt, file, roles=roles)[0].tolist() == by_hand(ckpt, spoken).tolist()


def test_a_limit_stops_soon_after(tmp_path, ckpt, monkeypatch):
    monkeypatch.setattr(rank, "BATCH", 2000)
    file = write(tmp_path, texts(sentences(2000)), ".jsonl")  # some 15,000 tokens
    first, second = counted(ckpt, file, file, limit=1500)
    assert 1500 <= first.sum() < 1500 + 2000  # a token is a character at least
    assert first.tolist() == second.tolist()  # of each file, and whatever the processes' pace


def test_a_tokenizer_that_truncates_or_pads_still_counts_everything(tmp_path, ckpt):
    said = sentences(20, seed=5)
    tokenizer = Tokenizer.from_file(str(ckpt / "tokenizer.json"))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (counts,) = counted(tmp_path, write(tmp_path, texts(said), ".jsonl"))
    assert counts.tolist() == by_hand(ckpt, said).tolist()


def test_workers_need_no_jax():
    code = "import sys, train.rank; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# The command -------------------------------------------------------------------------------------


@pytest.mark.sweep
def test_the_command_as_a_user_types_it(tmp_path, ckpt):
    folder = tmp_path / "corpora"
    folder.mkdir()
    said, spoken, other = sentences(300, seed=6), sentences(80, seed=7), sentences(50, seed=8)
    write(folder, texts(said), ".jsonl", ".xz", stem="a")
    talk = [{"from": "human", "value": "the fox?"}, {"from": "gpt", "value": " ".join(spoken)}]
    write(folder, [{"conversations": talk}], ".json", ".zst", stem="b{x}[red]")  # no format string, no markup
    (folder / "notes.md").write_text("left out")
    held_out = write(tmp_path, texts(other), ".parquet", stem="held[red]")
    out = tmp_path / "ranking.npz"
    flags = ["--out", out, "--roles", "assistant", "--processes", "2", "--evaluate", held_out]
    done = subprocess.run(
        [sys.executable, "-m", "train", "rank", folder, "--ckpt", ckpt, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = by_hand(ckpt, [*said, " ".join(spoken)])
    ranking = Ranking.load(out)
    assert ranking.counts.tolist() == expected.tolist()
    assert ranking.corpora == ("a.jsonl.xz", "b{x}[red].json.zst")
    checkpoint = Checkpoint.open(ckpt)
    assert ranking.tokenizer == tokenizer_hash(checkpoint.tokenizer)
    assert f"{expected.sum():,} tokens, {np.count_nonzero(expected)} of {VOCAB} ids seen" in done.stdout
    always, unseen = control_ids(checkpoint.tokenizer, checkpoint.stop_ids, VOCAB), by_hand(ckpt, other)
    assert always == (0, 1, 2)
    for share in (16, 8, 4, 2):
        ids = sub_vocabulary(ranking, VOCAB // share, VOCAB, always)
        cells = (expected[ids].sum() / expected.sum(), unseen[ids].sum() / unseen.sum())
        row = rf"\b{VOCAB // share} │ +1/{share} │ +{cells[0]:.2%} │ +{cells[1]:.2%} │"
        assert re.search(row, done.stdout), (row, done.stdout)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["corpora", "held[red].parquet", "ranking.npz"]
    assert "held[red]" in done.stdout and "b{x}[red].json.zst" in done.stderr


def test_the_ranking_goes_to_the_checkpoint_and_is_replaced_only_with_force(tmp_path, ckpt, capfd):
    own = shutil.copytree(ckpt, tmp_path / "ckpt")
    (tmp_path / "a.txt").write_text("the quick fox")
    (tmp_path / "b.txt").write_text("over a dog")
    command(tmp_path / "a.txt", "--ckpt", own)
    before = (own / "ranking.npz").read_bytes()
    assert "exists already; replace it with --force" in refusal(capfd, tmp_path / "b.txt", "--ckpt", own)
    assert (own / "ranking.npz").read_bytes() == before
    command(tmp_path / "b.txt", "--ckpt", own, "--force")
    assert Ranking.load(own / "ranking.npz").corpora == ("b.txt",)


def test_merging_equals_counting_together(tmp_path, ckpt, capfd):
    files = [write(tmp_path, texts(sentences(50, seed)), ".jsonl", stem=name) for seed, name in enumerate("abc")]
    for file in files:
        command(file, "--ckpt", ckpt, "--out", file.with_suffix(".npz"))
    command(*files, "--ckpt", ckpt, "--out", tmp_path / "all.npz")
    together = Ranking.load(tmp_path / "all.npz")
    a, b, c = (file.with_suffix(".npz") for file in files)
    command("--merge", a, b, c, "--ckpt", ckpt, "--out", tmp_path / "merged.npz")
    command(files[2], "--merge", a, b, "--ckpt", ckpt, "--out", tmp_path / "both.npz")
    for name in ("merged.npz", "both.npz"):
        assert Ranking.load(tmp_path / name).counts.tolist() == together.counts.tolist()
        assert Ranking.load(tmp_path / name).corpora == together.corpora == ("a.jsonl", "b.jsonl", "c.jsonl")


def test_a_token_map_is_a_ranking_and_counts_order_the_rest(tmp_path, ckpt, capfd):
    order = list(range(VOCAB - 1, VOCAB - 41, -1))
    (tmp_path / "freq_40.txt").write_text("\n".join(map(str, order)))
    held_out = write(tmp_path, texts(sentences(20, 5)), ".jsonl", stem="held")
    flags = ("--ckpt", ckpt, "--out", tmp_path / "map.npz", "--evaluate", held_out)
    command("--merge", tmp_path / "freq_40.txt", *flags)
    said = capfd.readouterr().out
    assert "an order of 40 ids" in said and "counted text" not in said and "held.jsonl" in said
    made = Ranking.load(tmp_path / "map.npz")
    assert (made.tokens, made.reach, made.order[:40].tolist()) == (0, 40, order)
    corpus = write(tmp_path, texts(sentences(50, 1)), ".jsonl", stem="a")
    command(corpus, "--ckpt", ckpt, "--out", tmp_path / "a.npz")
    command(corpus, "--merge", tmp_path / "map.npz", "--ckpt", ckpt, "--out", tmp_path / "both.npz")
    counted, both = Ranking.load(tmp_path / "a.npz"), Ranking.load(tmp_path / "both.npz")
    assert np.array_equal(both.counts, counted.counts) and both.reach == VOCAB
    assert both.order.tolist() == [*order, *(i for i in counted.order.tolist() if i not in order)]
    assert f"an order of 40 ids, before {counted.tokens:,} tokens" in capfd.readouterr().out
    (tmp_path / "freq_40.txt").write_text(str(VOCAB))
    out = ("--ckpt", ckpt, "--out", tmp_path / "no.npz")
    assert f"freq_40.txt names the id {VOCAB}, outside" in refusal(capfd, "--merge", tmp_path / "freq_40.txt", *out)
    assert not (tmp_path / "no.npz").exists()


def test_mistakes_cost_one_sentence_and_leave_nothing(tmp_path, ckpt, capfd):
    good, empty, bad = (tmp_path / name for name in ("good.txt", "empty.txt", "bad.jsonl"))
    good.write_text("the quick fox")
    empty.write_text("")
    bad.write_text('{"text": "a"}\n{\n')
    out = ("--ckpt", ckpt, "--out", tmp_path / "out.npz")
    other = tmp_path / "other.npz"
    Ranking(np.ones(VOCAB, np.int64), "another", ("x",)).save(other)
    cases = [
        ((), "name a CORPUS to count"),
        ((good, "--roles", "assistant,ghost"), "--roles ghost: choose among system, user and assistant"),
        ((good, "--limit-tokens", 0), "--limit-tokens 0 must be at least 1"),
        ((good, "--processes", -1), "--processes -1 must be at least 1"),
        ((tmp_path / "absent.txt",), "absent.txt is no file or folder"),
        ((good, "--evaluate", tmp_path / "absent.txt"), "absent.txt is no file or folder"),
        ((bad,), "bad.jsonl, line 2: not JSON"),
        ((good, "--evaluate", bad), "bad.jsonl, line 2: not JSON"),
        ((empty,), "the corpus holds nothing to count: read 0 records"),
        ((good, "--evaluate", empty), "--evaluate empty.txt holds nothing to count: read 0 records"),
        (("--merge", tmp_path / "absent.npz"), "absent.npz is no file"),
        (("--merge", good), "good.txt is no ranking or is damaged"),
        (("--merge", other), "other.npz was counted with another tokenizer than the checkpoint's"),
    ]
    for args, said in cases:
        assert said in refusal(capfd, *args, *out), args
        assert not (tmp_path / "out.npz").exists()
    assert "does not exist; make it first" in refusal(capfd, good, "--ckpt", ckpt, "--out", tmp_path / "no" / "r.npz")
    assert "--ckpt" in refusal(capfd, good, "--ckpt", tmp_path / "absent")
    said = refusal(capfd, good, "--ckpt", ckpt, "--out", tmp_path / "freq.json")
    assert "would be no token map but a ranking with counts, an .npz file; name one" in said
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.jsonl", "empty.txt", "good.txt", "other.npz"]


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path, capfd):
    small = make_checkpoint(tmp_path / "small", sentences(200), vocab_size=20)
    (tmp_path / "a.txt").write_text("the quick fox")
    said = refusal(capfd, tmp_path / "a.txt", "--ckpt", small)
    assert "nothing to count: read 1 record; left out 1: they hold tokens that the model has no embedding for" in said
    assert not (small / "ranking.npz").exists()


def test_a_worker_that_dies_ends_the_count(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("the quick fox")
    with pytest.raises(rank.UserError, match=r"a worker process died.*processes"):
        counted(tmp_path, tmp_path / "a.txt")  # there is no tokenizer.json to open


@pytest.mark.parametrize("args", [["rank"], ["rank", "--ckpt"], ["rank", "--ckpt", "x", "--processes", "two"], ["no"]])
def test_argparse_refuses_with_status_2(args, capfd):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2 and "usage: python -m train" in capfd.readouterr().err


def test_the_targets_own_answers_count(tmp_path, ckpt):
    """Of a store, what was answered; and it adds to corpora and rankings as they do."""
    checkpoint = Checkpoint.open(ckpt)
    writer = FeatureWriter(tmp_path / "answers", checkpoint)
    tokens, answer = np.array([5, 6, 7, 7, 9], np.int32), np.array([0, 0, 1, 1, 1], np.uint8)
    writer.append(0, tokens, answer, np.zeros((5, checkpoint.config.hidden_size)))
    writer.close()
    command(tmp_path / "answers", "--ckpt", ckpt, "--out", tmp_path / "own.npz")
    own = Ranking.load(tmp_path / "own.npz")
    assert own.corpora == ("answers",) and {i: n for i, n in enumerate(own.counts) if n} == {7: 2, 9: 1}
    command(tmp_path / "answers", "--ckpt", ckpt, "--merge", tmp_path / "own.npz", "--out", tmp_path / "twice.npz")
    assert np.array_equal(Ranking.load(tmp_path / "twice.npz").counts, 2 * own.counts)
