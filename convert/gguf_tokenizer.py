"""Build a fast tokenizer from the fields of a GGUF file, and save it as Hugging Face's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from frspec_jax.errors import UserError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # llama.cpp's token types; there are more
END_OF_TURN = {"<|endoftext|>", "<end_of_turn>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "</s>"}

# How llama.cpp's pre-tokenizer kinds split text, as the regular expressions of the models' own tokenizers.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


class Metadata(Protocol):
    """What is needed of convert.gguf.GgufFile."""

    label: str

    def get(self, key: str, default: Any = None) -> Any: ...


def save_tokenizer(folder: Path, file: Metadata) -> None:
    """Write tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json."""
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = file.get("tokenizer.ggml.tokens") or []
    if not tokens:
        raise UserError(f"{file.label} holds no tokenizer; convert the Hugging Face folder of the model instead")
    kind = file.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kind not in builders:
        raise UserError(f"{file.label}: tokenizer kind {kind!r} is not supported; gpt2 and llama are")
    types = token_types(file, len(tokens))
    tokenizer = builders[kind](file, tokens)
    for wanted, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        of_kind = [t for t, k in zip(tokens, types, strict=True) if k == wanted]
        add([AddedToken(t, special=wanted == CONTROL, normalized=False) for t in of_kind])
    bos = file.get("tokenizer.ggml.bos_token_id")
    by_default = kind == "llama" or file.get("tokenizer.ggml.pre") in LLAMA3_NAMES  # as llama.cpp has it
    if bos is not None and file.get("tokenizer.ggml.add_bos_token", by_default):
        name = tokens[bos]
        tokenizer.post_processor = processors.Sequence(
            [*([tokenizer.post_processor] if tokenizer.post_processor else []), _prepend(name, bos)]
        )

    def token(key: str) -> str | None:
        number = file.get(f"tokenizer.ggml.{key}_token_id")
        return None if number is None else tokens[number]

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = file.get("tokenizer.chat_template")
    fast.save_pretrained(str(folder))
    ends = {n for n, (t, k) in enumerate(zip(tokens, types, strict=True)) if k == CONTROL and t in END_OF_TURN}
    ends |= {n for key in ("eos", "eot", "eom") if (n := file.get(f"tokenizer.ggml.{key}_token_id")) is not None}
    generation = {"bos_token_id": bos, "eos_token_id": sorted(ends)}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def token_types(file: Metadata, tokens: int) -> list[int]:
    """llama.cpp's kind of each token; a file that is silent about it has normal ones only."""
    types: list[int] = file.get("tokenizer.ggml.token_type") or [NORMAL] * tokens
    if len(types) != tokens:
        raise UserError(f"{file.label}: the tokenizer has {tokens} tokens but {len(types)} token types")
    return types


def _prepend(name: str, number: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[(name, number)]
    )


def _byte_level(file: Metadata, tokens: list[str]) -> Tokenizer:
    """Byte-level BPE (GPT-2's kind), with the model's own way of splitting text first."""
    merges = [tuple(line.split(" ")) for line in file.get("tokenizer.ggml.merges") or []]
    # Files of before May 2024 leave it out. Qwen2 has one way only; guessing others would split text wrongly.
    kind = file.get("tokenizer.ggml.pre") or ("qwen2" if file.get("general.architecture") == "qwen2" else "unnamed")
    tokenizer = Tokenizer(
        models.BPE(
            vocab={t: n for n, t in enumerate(tokens)},
            merges=merges,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=kind in LLAMA3_NAMES,
        )
    )
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    by_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    llama3 = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), by_regex])
    splits = {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), by_regex]),
        **dict.fromkeys(LLAMA3_NAMES, llama3),
    }
    if kind not in splits:
        raise UserError(
            f"{file.label}: pre-tokenizer {kind!r} is not supported ({', '.join(splits)} are); "
            "convert the Hugging Face folder of the model instead"
        )
    tokenizer.pre_tokenizer = splits[kind]
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _sentence_piece(file: Metadata, tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE (Llama 2's kind): pieces with scores, of which the merges follow."""
    scores = file.get("tokenizer.ggml.scores") or []
    if len(scores) != len(tokens):
        raise UserError(f"{file.label}: the tokenizer has {len(tokens)} tokens but {len(scores)} scores")
    vocab = {t: n for n, t in enumerate(tokens)}
    merges = []
    for piece, score, kind in zip(tokens, scores, token_types(file, len(tokens)), strict=True):
        if kind != NORMAL:  # SentencePiece never puts "</s>" or "<0x0A>" together out of text
            continue
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        merges += [(-score, vocab[a], vocab[b], (a, b)) for a, b in halves]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[pair for *_, pair in sorted(merges)],
            unk_token=tokens[file.get("tokenizer.ggml.unknown_token_id", 0)],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(file.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tail = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    return tokenizer
