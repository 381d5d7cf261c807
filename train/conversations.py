"""A conversation as a target reads it: token ids, and which of them an answer is made of.

The chat template turns messages into one text; the text is tokenised once, and a token belongs to an answer if any of
its characters do. So nothing depends on where a tokenizer puts its borders: an answer that begins with spaces melts
with what stands before it, and is trained on all the same.

Which characters are an answer's is asked of the template: what a conversation's text has, with the answer, beyond the
prompt that inference would give for it. Most templates only ever add to what they have said. Where one rewrites it (a
thought is cut once the next question is asked, a header counts the messages), each answer becomes a sequence of its
own, behind the very prompt that inference would give.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from frspec_jax.errors import UserError
from train.corpus import NO_EMBEDDING, Record, Tally

Text = tuple[np.ndarray, np.ndarray]  # tokens [L] int32, and [L] uint8: 1 where the token is an answer's
Messages = list[dict[str, Any]]
MARK = "\ue000\ue001\ue000"  # in no text: what a template puts behind it is what it ends an answer with


@dataclasses.dataclass(frozen=True)
class Span:
    """A text, of which the characters `start` to the end are an answer, and those before the prompt for it."""

    text: str
    start: int


class Reader:
    """Turns records into sequences of tokens; counts what it leaves out.

    Args:
      vocab_size: V of the target, for which no token may have a higher id. tally: where that is counted.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, tally: Tally) -> None:
        self._tokenizer, self._vocab_size, self.tally = tokenizer, vocab_size, tally

    def sequences(self, record: Record) -> list[Text]:
        """The sequences of a record, each with at least one token of an answer (all of a plain text).

        Raises:
          UserError: the record is a conversation, and the target has no chat template.
        """
        if record.text is not None:
            ids = np.asarray(self._tokenizer(record.text).input_ids, np.int32)
            found = [(ids, np.ones(len(ids), np.uint8))]
        else:
            found = [self._tokenised(text, spans) for text, spans in self._said(record)]
            found = [(tokens, answer) for tokens, answer in found if answer.any()]
            if not found:
                return []  # the reason is counted
        if any(tokens.size and tokens.max() >= self._vocab_size for tokens, _ in found):
            wrong = next(int(tokens.max()) for tokens, _ in found if tokens.max() >= self._vocab_size)
            token = self._tokenizer.convert_ids_to_tokens(wrong)
            self.tally.leave_out(NO_EMBEDDING.format(token), record.where)
            return []
        return found

    def _said(self, record: Record) -> list[tuple[str, list[tuple[int, int]]]]:
        """The texts of a conversation, each with the spans of its answers in characters; counts one that has none."""
        if not self._tokenizer.chat_template:
            raise UserError(
                f"{record.where} is a conversation, and the target has no chat template; add a chat_template.jinja to "
                "its checkpoint folder, or give plain text"
            )
        reason = ""
        for messages, how in forms(record.messages()):
            try:
                texts = joined(self._spans(messages, record.tools))
            except Exception as error:  # a template may raise anything: it is a program
                reason = reason or (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                continue
            if how and texts:
                self.tally.mend(how, record.where)
            if not texts:
                self.tally.leave_out("nothing in them is an answer to train on", record.where)
            return texts
        self.tally.leave_out(f"the chat template refuses them ({reason})", record.where)
        return []

    def _spans(self, messages: Messages, tools: list[Any] | None) -> Iterator[Span]:
        """Each answer that counts, with the prompt for it; one of weight 0, as chat APIs have it, is prompt alone."""
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index == 0 or message.get("weight") == 0:
                continue
            before = messages[:index]
            prompt = self._rendered(before, tools, True)
            whole = self._rendered([*before, message], tools, False)
            if whole.startswith(prompt):
                yield Span(whole, len(prompt))
                continue
            base = self._rendered(before, tools, False)
            said, opened = message["content"], prompt[_common(prompt, whole) :]
            if opened.strip() and said.lstrip().startswith(opened.strip()):
                # The prompt opens what the answer begins with (a thought), and the template would show it without.
                text = prompt.rstrip() + said.lstrip()[len(opened.strip()) :] + self._closing(before, message, tools)
                yield Span(text, len(prompt) if text.startswith(prompt) else len(prompt.rstrip()))
            elif whole.startswith(base):
                yield Span(whole, max(len(base), _common(prompt, whole)))
            else:  # adding an answer has changed what stands before it
                yield Span(prompt + said + self._closing(before, message, tools), len(prompt))

    def _closing(self, before: Messages, message: dict[str, Any], tools: list[Any] | None) -> str:
        """What the template ends an answer with."""
        text = self._rendered([*before, {**message, "content": MARK}], tools, False)
        return text.rpartition(MARK)[2] if MARK in text else ""

    def _rendered(self, messages: Messages, tools: list[Any] | None, prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)

    def _tokenised(self, text: str, spans: list[tuple[int, int]]) -> Text:
        """The tokens of a text; those of an answer have a character in one of the spans."""
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        first, behind = np.asarray(found.offset_mapping, np.int64).reshape(-1, 2).T
        answer = np.zeros(len(first), bool)
        for start, end in spans:
            answer |= (behind > start) & (first < end) & (first < behind)
        return np.asarray(found.input_ids, np.int32), answer.astype(np.uint8)


def joined(spans: Iterator[Span]) -> list[tuple[str, list[tuple[int, int]]]]:
    """Answers whose text goes on with the text before them, as one text with several spans (first, behind the last)."""
    texts: list[tuple[str, list[tuple[int, int]]]] = []
    for span in spans:
        here = (span.start, len(span.text))
        if texts and span.text.startswith(texts[-1][0]) and span.start >= len(texts[-1][0]):
            texts[-1] = (span.text, [*texts[-1][1], here])
        else:
            texts.append((span.text, [here]))
    return texts


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    both = min(len(a), len(b))
    return next((at for at in range(both) if a[at] != b[at]), both)


def forms(messages: Messages) -> Iterator[tuple[Messages, str]]:
    """The messages as they are; and, for a template that refuses them, as the strictest ones want them.

    Such templates let a user and an assistant alternate, the user first; some know no system message, whose text then
    goes before the first question.
    """
    yield messages, ""
    while messages and messages[0]["role"] == "assistant":
        messages = messages[1:]
    turns = _alternating(messages)
    yield turns, "an answer to nothing was dropped, or turns of one speaker joined, for the chat template"
    if len(turns) > 1 and turns[0]["role"] in ("system", "developer"):
        asked = {**turns[1], "content": f"{turns[0]['content']}\n\n{turns[1]['content']}"}
        yield [asked, *turns[2:]], "the system message was put before the first question, for the chat template"


def _alternating(messages: Messages) -> Messages:
    """Turns of one speaker in a row as one, and no answer right behind a system message."""
    turns: Messages = []
    for message in messages:
        if message["role"] == "assistant" and turns and turns[-1]["role"] in ("system", "developer"):
            continue
        if turns and turns[-1]["role"] == message["role"]:
            turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n\n{message['content']}"}
        else:
            turns.append(dict(message))
    return turns
