"""How the conversations of corpora begin: what a target is asked where it is to answer itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from frspec_jax.checkpoint import Checkpoint
from train.conversations import forms
from train.corpus import NO_EMBEDDING, Tally, read_corpus


@dataclasses.dataclass(frozen=True)
class FirstPrompt:
    """How a conversation begins: what the user says first, with the system message and the tools before it."""

    messages: tuple[dict[str, Any], ...]  # the last one is the user's
    tools: list[Any] | None
    where: str  # its place in the corpus

    @property
    def text(self) -> str:
        """What the user says."""
        return self.messages[-1]["content"]


def first_prompts(files: Iterable[Path], tally: Tally) -> Iterator[FirstPrompt]:
    """How each conversation begins, once each, in the files' order."""
    seen: set[str] = set()
    for file in files:
        for record in read_corpus(file, tally=tally):
            messages = record.messages()
            first = next((n for n, message in enumerate(messages) if message["role"] == "user"), None)
            text = "" if first is None else messages[first]["content"].strip()
            if first is None or not text:
                tally.leave_out("no user asks anything in them", record.where)
                continue
            before = [message for message in messages[:first] if message["role"] in ("system", "developer")]
            asked = (*before, {**messages[first], "content": text})
            key = json.dumps([asked, record.tools], sort_keys=True, default=str) if before or record.tools else text
            if key in seen:
                tally.leave_out("they begin as an earlier one", record.where)
                continue
            seen.add(key)
            yield FirstPrompt(asked, record.tools, record.where)


def prompt_ids(prompt: FirstPrompt, checkpoint: Checkpoint, tally: Tally) -> list[int]:
    """A prompt as token ids; none, and counted, where the chat template or the model cannot take it.

    Of a target without a template what the user says is gone on with, as in `Generator.encode`.
    """
    tokenizer = checkpoint.tokenizer
    for messages, how in forms(list(prompt.messages)):
        try:
            ids = (
                tokenizer.apply_chat_template(
                    messages, tools=prompt.tools, add_generation_prompt=True, return_dict=False
                )
                if tokenizer.chat_template
                else tokenizer(prompt.text).input_ids
            )
        except Exception as error:  # a template may raise anything: it is a program
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            continue
        if how:
            tally.mend(how, prompt.where)
        if ids and max(ids) >= checkpoint.config.vocab_size:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            tally.leave_out(NO_EMBEDDING.format(token), prompt.where)
            return []
        return list(ids)
    tally.leave_out(f"the chat template refuses them ({reason})", prompt.where)
    return []
