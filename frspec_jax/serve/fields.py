"""The fields of requests, checked: what OpenAI's API has, and what local servers add."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from frspec_jax.serve.faults import ApiError, unsupported, wrong

log = logging.getLogger(__name__)
MOST_STOPS = 16  # OpenAI takes 4, and evaluation harnesses send more

# Names that would change the text if they were followed: refused, so that nobody believes that they were.
UNSUPPORTED = (
    *("audio", "web_search_options", "reasoning_effort", "verbosity", "prediction", "functions", "function_call"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "grammar", "json_schema"),
    *("min_tokens", "ignore_eos", "stop_token_ids", "bad_words", "use_beam_search", "length_penalty", "typical_p"),
    *("repeat_penalty", "mirostat", "dry_multiplier", "xtc_probability", "top_n_sigma", "chat_template"),
    *("chat_template_kwargs", "continue_final_message", "truncate_prompt_tokens", "prompt_logprobs", "suffix"),
)
# Values of such names that ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "ignore_eos": (False,),
    "use_beam_search": (False,),
    "continue_final_message": (False,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "typical_p": (1,),
    "length_penalty": (1,),
    "repeat_penalty": (1,),
    "function_call": ("none", "auto"),
}

Finite = Annotated[float, Field(allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Limit = Annotated[int, Field(ge=1)]


class StreamOptions(BaseModel):
    """What a stream is to hold besides the text."""

    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool | None = None


class Fields(BaseModel):
    """What chats and completions share. null is as absent."""

    model_config = ConfigDict(extra="allow", strict=True)
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Limit | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None  # 0 and -1: off
    min_p: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    stop: Any = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    logit_bias: dict[str, Finite] | None = None
    # Ours: the page's. They change no text.
    speculative: bool | None = None  # false: decoded without drafts, for comparison
    origins: bool | None = None  # say of each token whether it is the target's own, drafted or copied

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def choices(self) -> int:
        return self.n or 1

    def check(self) -> None:
        """What one field says of another. Raises ApiError."""
        if self.stream_options is not None and not self.streams:
            raise wrong("stream_options", "'stream_options' is only allowed when 'stream' is true")
        for name, value in (self.model_extra or {}).items():
            if name in UNSUPPORTED and value is not None and value not in NOTHING.get(name, ((), {}, "", [])):
                raise unsupported(name)

    @property
    def unknown(self) -> list[str]:
        """Names that nothing here knows, and that are passed over."""
        return sorted(set(self.model_extra or {}) - set(UNSUPPORTED))

    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        if self.stop is None:
            return ()
        texts = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise wrong("stop", "'stop' must be a text or a list of texts")
        if not all(texts):
            raise wrong("stop", "'stop' holds an empty text, which would end every answer; leave it out")
        if len(texts) > MOST_STOPS:
            raise wrong("stop", f"'stop' holds {len(texts)} texts; at most {MOST_STOPS} are taken")
        return tuple(dict.fromkeys(texts))

    def biases(self, vocab_size: int) -> tuple[tuple[int, float], ...]:
        """Token ids, and what is added to their logits."""
        found = {}
        for key, bias in (self.logit_bias or {}).items():
            param = f"logit_bias.{key[:20]}"
            if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) < vocab_size):
                raise wrong(param, f"the keys of 'logit_bias' must be token ids from 0 to {vocab_size - 1}")
            if not -100 <= bias <= 100:
                raise wrong(param, "the values of 'logit_bias' must be from -100 to 100")
            found[int(key)] = float(bias)
        return tuple(sorted(found.items()))


class ChatFields(Fields):
    """POST /v1/chat/completions."""

    messages: list[Any] = Field(min_length=1)
    max_completion_tokens: Limit | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    response_format: Any = None
    modalities: list[str] | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs", "'top_logprobs' needs 'logprobs' to be true")
        if self.tool_choice not in (None, "auto", "none"):
            raise unsupported("tool_choice", "other than 'auto' and 'none' is not supported: no call is forced here")
        kind = self.response_format.get("type") if isinstance(self.response_format, Mapping) else self.response_format
        if kind not in (None, "text"):
            raise unsupported("response_format", "other than {'type': 'text'} is not supported: no format is enforced")
        if self.modalities not in (None, ["text"]):
            raise unsupported("modalities", "other than ['text'] is not supported")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise wrong("max_tokens", "'max_tokens' and 'max_completion_tokens' differ; give one of them")

    @property
    def limit(self) -> int | None:
        """Tokens at most; None: to the context's end."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top(self) -> int | None:
        """Likeliest tokens to show beside each; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionFields(Fields):
    """POST /v1/completions."""

    prompt: Any = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: int | None = None

    def check(self) -> None:
        super().check()
        if self.echo and self.logprobs is not None:
            raise wrong("echo", "'echo' with 'logprobs' is not supported: prompts have no log-probabilities here")
        if self.best_of not in (None, self.choices):
            raise unsupported("best_of", "other than 'n' is not supported")

    @property
    def limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def top(self) -> int | None:
        return self.logprobs


Kind = TypeVar("Kind", ChatFields, CompletionFields)


def read(kind: type[Kind], body: bytes) -> Kind:
    """The fields of a request's body.

    Raises:
      ApiError: it is no JSON object, or a field is missing, wrong or not supported.
    """
    try:
        data = json.loads(body)
        _check_texts(data, "")
    except ApiError:
        raise
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON") from None
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        fields = kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = named(first["loc"])
        if first["type"] == "missing":
            raise wrong(param, f"you must provide '{param}'", "missing_required_parameter") from None
        raise wrong(param, f"'{param}': {first['msg'][0].lower()}{first['msg'][1:]}") from None
    fields.check()
    return fields


def named(loc: tuple[int | str, ...]) -> str:
    """A field's place in words, as "messages[0].role"."""
    out = ""
    for part in loc:
        out += f"[{part}]" if isinstance(part, int) else f"{'.' if out else ''}{part[:40]}"
    return out


def _check_texts(value: Any, at: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can hold and UTF-8 cannot: they would break tokenizer and reply."""
    if isinstance(value, str):
        if not _whole(value):
            raise wrong(at, f"'{at}' holds half a surrogate pair, which is no character")
    elif isinstance(value, list):
        for n, one in enumerate(value):
            _check_texts(one, f"{at}[{n}]")
    elif isinstance(value, dict):
        for key, one in value.items():
            if not _whole(key):
                raise wrong(at, "a name holds half a surrogate pair, which is no character")
            _check_texts(one, f"{at}.{key[:40]}" if at else key[:40])


def _whole(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)
