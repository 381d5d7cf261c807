"""A whole checkpoint folder with a toy model: weights, tokenizer, ranking and a draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from frspec_jax.checkpoint import Checkpoint, write_draft, write_model
from frspec_jax.config import ModelConfig
from frspec_jax.files import new_folder
from frspec_jax.vocabulary import Ranking, tokenizer_hash
from tests.support import toy

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB_SIZE = len(SPECIAL) + 256 + 13


def tokenizer(flavour: str = "") -> PreTrainedTokenizerFast:
    """Bytes, a few words, and three control tokens; another flavour has other words."""
    words = [flavour + w for w in ("Ġthe", "Ġof", "he", "th", "in", "an", "er", "on", "re", "at", "nd", "st", "es")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate([*SPECIAL, *alphabet, *words])}
    merges = [("h", "e"), ("t", "h"), ("i", "n"), ("a", "n")] if not flavour else []
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=SPECIAL[2], pad_token=SPECIAL[0], chat_template=TEMPLATE
    )


def checkpoint_folder(
    path: Path, *, seed: int = 0, draft: bool = True, ranking: bool = True, layers: int = 2, **changes: Any
) -> Checkpoint:
    """Write a checkpoint to `path`, and open it; changes: of the target's config."""
    cfg: ModelConfig = toy.config(vocab_size=VOCAB_SIZE, max_context=1024, num_layers=layers, **changes)
    params = toy.target(cfg, seed)
    with new_folder(path) as folder:
        write_model(folder, cfg, params)
        tokenizer().save_pretrained(str(folder))
    checkpoint = Checkpoint.open(path)
    if draft:
        shape, draft_params = toy.draft(cfg, seed + 1)
        with new_folder(path / "drafts" / "eagle") as folder:
            write_draft(folder, shape, draft_params, checkpoint.fingerprint, {"source": "toy"})
    if ranking:
        counts = np.random.default_rng(seed).integers(0, 1000, VOCAB_SIZE)
        Ranking(counts, tokenizer_hash(checkpoint.tokenizer), ("toy.txt",)).save(path / "ranking.npz")
    return checkpoint
