"""transformers (PyTorch) on the same weights: the peer that outputs and speeds are held against."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from frspec_jax.errors import UserError

LOOKUP_TOKENS = 10  # drafts a round of prompt lookup, as transformers' own examples


@dataclasses.dataclass(frozen=True)
class PeerResult:
    """An answer of the peer, and how it came about."""

    tokens: list[int]  # the stop id included, where one ended the answer
    first: int  # tokens that came with the prefill: 1, or more where that pass verified drafts too
    rounds: int  # passes after the prefill
    prefill_seconds: float  # until the first tokens were there
    decode_seconds: float


def check(path: Path) -> None:
    """Refuse what cannot be loaded, before anything is written or loaded.

    Raises:
      UserError: a package or the model is not there.
    """
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--peer needs {name}; run: pip install {name}")
    if not path.exists():
        raise UserError(f"--peer {path} is no file or folder; give the model in Hugging Face's or GGUF format")


class Peer:
    """A model of transformers, greedy, batch 1.

    Args:
      path: a Hugging Face folder, or a .gguf file (then accelerate is needed too).
      dtype: of weights and products, by name.
    """

    def __init__(self, path: Path, stop_ids: tuple[int, ...], dtype: str = "float32") -> None:
        check(path)
        os.environ.setdefault("TQDM_DISABLE", "1")  # transformers' bars would run into ours
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        where: dict[str, Any] = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = path.parent if where else path
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **where)
        except (ValueError, ImportError, OSError) as error:
            raise UserError(f"--peer {path} cannot be loaded by transformers: {str(error).splitlines()[0]}") from None
        self._torch, self._model, self._stop_ids = torch, model.eval(), list(stop_ids)

    def generate(self, prompt: np.ndarray, max_new_tokens: int) -> tuple[list[int], float]:
        """The greedy answer's tokens, and seconds for the whole call."""
        result = self.answer(prompt, max_new_tokens)
        return result.tokens, result.prefill_seconds + result.decode_seconds

    def answer(self, prompt: np.ndarray, max_new_tokens: int, lookup: bool = False) -> PeerResult:
        """The greedy answer to a prompt [T].

        lookup: assisted by prompt lookup, which drafts what followed the same words in the text so far.
        """
        ids = self._torch.tensor(prompt[None].astype(np.int64))
        assisted = {"prompt_lookup_num_tokens": LOOKUP_TOKENS} if lookup else {}
        clock = _Clock()
        with self._torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self._stop_ids,
                pad_token_id=self._stop_ids[0],
                temperature=None,
                top_p=None,
                top_k=None,
                streamer=clock,
                **assisted,
            )
        end = time.perf_counter()
        first = clock.times[0] if clock.times else end
        return PeerResult(
            tokens=out[0, len(prompt) :].tolist(),
            first=clock.counts[0] if clock.counts else 0,
            rounds=max(0, len(clock.times) - 1),
            prefill_seconds=first - clock.begin,
            decode_seconds=end - first,
        )

    def decode_rate(self, prompt: np.ndarray, max_new_tokens: int) -> float:
        """Tokens a second of decoding; the first token is the prefill's."""
        result = self.answer(prompt, max_new_tokens)
        return (len(result.tokens) - result.first) / max(result.decode_seconds, 1e-9)

    def gap(self, text: list[int]) -> float:
        """How far apart the two best logits after a text are: where they tie, so may the outputs part."""
        with self._torch.inference_mode():
            scores = self._model(self._torch.tensor([text])).logits[0, -1]
        best = scores.topk(2).values
        return float(best[0] - best[1])


class _Clock:
    """What `generate` calls a streamer: told of the prompt, then of each round's tokens; it notes when."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.times: list[float] = []
        self.counts: list[int] = []
        self._prompt = True

    def put(self, tokens: Any) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.perf_counter())
        self.counts.append(tokens.numel())

    def end(self) -> None:
        """Nothing is held back."""
