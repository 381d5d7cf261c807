"""transformers (PyTorch) on the same weights: the peer that outputs and speeds are held against."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from frspec_jax.errors import UserError


class Peer:
    """A model of transformers, float32, greedy, batch 1.

    Args:
      path: a Hugging Face folder, or a .gguf file (then accelerate is needed too).
    """

    def __init__(self, path: Path, stop_ids: tuple[int, ...]) -> None:
        os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars would run into ours
        try:
            import torch
            import transformers
        except ImportError as missing:
            raise UserError(f"--peer needs {missing.name}: pip install 'frspec-jax[torch]'") from None
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if not path.exists():
            raise UserError(f"--peer {path} is no file or folder; give the model in Hugging Face's or GGUF format")
        where: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = path.parent if where else path
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
        except (ValueError, ImportError, OSError) as error:
            raise UserError(f"--peer {path} cannot be loaded by transformers: {str(error).splitlines()[0]}") from None
        self._torch, self._model, self._stop_ids = torch, model.eval(), list(stop_ids)

    def generate(self, prompt: np.ndarray, max_new_tokens: int) -> tuple[list[int], float]:
        """The greedy answer's tokens, and seconds for the whole call."""
        ids = self._torch.tensor(prompt[None].astype(np.int64))
        start = time.perf_counter()
        with self._torch.inference_mode():
            out = self._model.generate(
                ids, attention_mask=self._torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                eos_token_id=self._stop_ids, pad_token_id=self._stop_ids[0], temperature=None, top_p=None, top_k=None,
            )  # fmt: skip
        return out[0, len(prompt) :].tolist(), time.perf_counter() - start

    def decode_rate(self, prompt: np.ndarray, max_new_tokens: int) -> float:
        """Tokens a second of decoding: the time of a whole answer less that of its first token."""
        _, first = self.generate(prompt, 1)
        tokens, whole = self.generate(prompt, max_new_tokens)
        return (len(tokens) - 1) / max(whole - first, 1e-9)

    def gap(self, text: list[int]) -> float:
        """How far apart the two best logits after a text are: where they tie, so may the outputs part."""
        with self._torch.inference_mode():
            scores = self._model(self._torch.tensor([text])).logits[0, -1]
        best = scores.topk(2).values
        return float(best[0] - best[1])
