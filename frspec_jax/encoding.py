"""Prompts to token ids, as a checkpoint's tokenizer and chat template have them, and whether they can be answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from frspec_jax.checkpoint import Checkpoint
from frspec_jax.errors import UserError
from frspec_jax.request import Prompt, Request


def encoded(checkpoint: Checkpoint, prompt: Prompt, request: Request, tools: list[Any] | None = None) -> np.ndarray:
    """A prompt as token ids [T] int32: through the chat template, unless the request or the model is raw.

    tools: functions that the model may call, for the template to describe.

    Raises:
      UserError: the prompt is empty, or the template cannot say it.
    """
    tokenizer = checkpoint.tokenizer
    text = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
    raw = request.raw or not tokenizer.chat_template
    if not (text if raw else text.strip()):
        raise UserError("the prompt is empty; give some text")
    if raw:
        if request.system is not None:
            raise UserError("--system needs a chat template; the model has none, or --raw switches it off")
        return np.asarray(tokenizer(text).input_ids, np.int32)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if request.system is not None:
        messages = [{"role": "system", "content": request.system}, *messages]
    return _templated(checkpoint, messages, tools)


def _templated(checkpoint: Checkpoint, messages: list[Any], tools: list[Any] | None) -> np.ndarray:
    """Messages through the chat template, which may be broken, or refuse them in words of its own."""
    try:
        ids = checkpoint.tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # a template may raise anything: it is a program
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the chat template of {checkpoint.path} cannot say these messages ({reason[:200]}); "
            "mend chat_template.jinja, or use --raw"
        ) from None
    if not ids:
        raise UserError(
            f"the chat template of {checkpoint.path} makes nothing of these messages; "
            "mend chat_template.jinja, or use --raw"
        )
    return np.asarray(ids, np.int32)


def room_after(checkpoint: Checkpoint, ids: Sequence[int] | np.ndarray, context: int) -> int:
    """How many tokens a context of so many leaves for an answer to a prompt of ids [T].

    Raises:
      UserError: they are no token ids, or leave no room.
    """
    vocab_size = checkpoint.config.vocab_size
    given = np.asarray(ids)
    if given.ndim != 1 or not given.size or not np.issubdtype(given.dtype, np.integer):
        raise UserError(f"ids must be a list of at least one token id, and are {str(ids)[:60]}")
    if given.min() < 0 or given.max() >= vocab_size:
        wrong = int(given[(given < 0) | (given >= vocab_size)][0])
        token = checkpoint.tokenizer.convert_ids_to_tokens(wrong) if wrong >= 0 else None
        if token is not None:  # the tokenizer knows more than the model
            raise UserError(
                f"the prompt holds the token {token!r}, whose id {wrong} the model has no embedding for (its ids "
                f"are 0 to {vocab_size - 1}); leave it out"
            )
        raise UserError(f"ids hold {wrong}, and the model's token ids are 0 to {vocab_size - 1}")
    if len(given) >= context:
        raise UserError(
            f"the prompt has {len(given)} tokens, and --context {context} leaves room for at most {context - 1} "
            "and an answer; shorten it or raise --context"
        )
    return context - len(given)
