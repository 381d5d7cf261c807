"""Messages and texts to token ids, in which what a user writes is text: no control token comes out of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from frspec_jax.checkpoint import Checkpoint
from frspec_jax.serve.faults import ApiError, wrong

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
Messages = list[dict[str, Any]]


class Encoder:
    """Encodes what clients send.

    trusting: control tokens within a text are control tokens, as they are to `generate`.
    """

    def __init__(self, checkpoint: Checkpoint, trusting: bool = False) -> None:
        self._tokenizer, self._vocab_size = checkpoint.tokenizer, checkpoint.config.vocab_size
        whole = self._tokenizer.backend_tokenizer.to_str()
        # Copies: the checkpoint's own may be set otherwise by whoever else uses it, even in midst of a call.
        self._controls, self._plain = Tokenizer.from_str(whole), Tokenizer.from_str(whole)
        for one in (self._controls, self._plain):
            one.no_padding()
            one.no_truncation()
        self._plain.encode_special_tokens = True
        self._trusting = trusting
        special = {token.content: n for n, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special
        names = sorted(map(re.escape, special), key=len, reverse=True)
        self._pattern = re.compile("|".join(names)) if names else None

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self._tokenizer.chat_template)

    def text(self, prompt: str) -> np.ndarray:
        """A text to go on with [T]; an empty one is the start token alone, where the model has one."""
        if not prompt:
            start = self._tokenizer.bos_token_id
            if start is None:
                raise wrong("prompt", "'prompt' is empty, and this model has no start token; give some text")
            return np.asarray([start], np.int32)
        return _ids((self._controls if self._trusting else self._plain).encode(prompt).ids)

    def given(self, ids: list[int], param: str) -> np.ndarray:
        """Token ids as they are [T]."""
        if not all(0 <= one < self._vocab_size for one in ids):
            raise wrong(param, f"'{param}' must hold token ids from 0 to {self._vocab_size - 1}")
        return np.asarray(ids, np.int32)

    def chat(self, messages: list[Any]) -> np.ndarray:
        """Messages through the chat template [T]."""
        if not self.chats:
            raise ApiError(400, "this model has no chat template; use /v1/completions")
        turns = [_message(message, f"messages[{n}]") for n, message in enumerate(messages)]
        if self._trusting or self._pattern is None or not self._pattern.search(_all_text(turns)):
            return _ids(self._controls.encode(self._rendered(turns), add_special_tokens=False).ids)
        # Control tokens that users have written pass the template as marks that stand in no text.
        said = _all_text(turns)
        mark = next(chr(0xE000 + n) for n in range(6400) if chr(0xE000 + n) not in said)
        names = list(self._special)
        hidden = _mapped(turns, lambda text: self._pattern.sub(lambda m: f"{mark}{names.index(m[0])}{mark}", text))
        rendered = self._rendered(hidden)
        ids: list[int] = []
        at = 0
        for found in [*self._pattern.finditer(rendered), None]:
            plain = rendered[at : found.start() if found else None]
            plain = re.sub(f"{mark}(\\d+){mark}", lambda m: names[int(m[1])], plain)
            ids += self._plain.encode(plain, add_special_tokens=False).ids if plain else []
            if found:
                ids.append(self._special[found[0]])
                at = found.end()
        return _ids(ids)

    def _rendered(self, turns: Messages) -> str:
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything: it is a program
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise wrong("messages", f"the model's chat template refuses these messages: {reason}") from None
        if not text:
            raise wrong("messages", "the model's chat template makes nothing of these messages")
        return text


def _ids(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)


def _message(message: Any, at: str) -> dict[str, Any]:
    """One message as a template takes it: a known role, and a text.

    Parts of a text are joined as they are, with nothing between them. What else stands in it (name, tool_calls,
    tool_call_id) is the template's business.
    """
    if not isinstance(message, Mapping):
        raise wrong(at, f"'{at}' must be an object with 'role' and 'content'")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{at}.role", f"'{at}.role' must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    if isinstance(content, list):
        content = "".join(_part(part, f"{at}.content[{n}]") for n, part in enumerate(content))
    if not isinstance(content, str):
        raise wrong(f"{at}.content", f"'{at}.content' must be a text, or a list of parts of type 'text'")
    return {**{str(key): value for key, value in message.items()}, "role": ROLES[role], "content": content}


def _part(part: Any, at: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") not in ("text", "refusal"):
        raise wrong(at, f"'{at}' must be a part of type 'text': this model reads nothing else")
    text = part.get(part["type"])
    if not isinstance(text, str):
        raise wrong(f"{at}.text", f"'{at}.text' must be a text")
    return text


def _mapped(value: Any, change: Any) -> Any:
    """The same value with every text in it changed, names of fields too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(one, change) for one in value]
    if isinstance(value, Mapping):
        return {change(str(key)): _mapped(one, change) for key, one in value.items()}
    return value


def _all_text(value: Any) -> str:
    """Every text in it, joined."""
    texts: list[str] = []

    def noted(text: str) -> str:
        texts.append(text)
        return text

    _mapped(value, noted)
    return "\n".join(texts)
