"""What users say to a model, in the forms in which such data is published: for generate, train and eval alike.

A record is one of

    {"messages": [{"role": "user", "content": TEXT}, ...]}         chat APIs; a content may come in parts,
                                                                   [{"type": "text", "text": TEXT}, ...]
    {"conversations": [{"from": "human", "value": TEXT}, ...]}     ShareGPT
    {"prompt": TEXT, "completion": TEXT}                           the completion may be missing, or be called
                                                                   "response"; a prompt may be a list of messages
    {"instruction": TEXT, "input": TEXT, "output": TEXT}           Alpaca; input and output may be missing or empty

Files are UTF-8, with or without a byte order mark; lines end as they do on Unix or on Windows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frspec_jax import json_lines
from frspec_jax.errors import UserError, quoted

ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard"), "assistant"),  # all of them occur in ShareGPT
}
CONVERSATIONS = (("conversations", "from", "value"), ("messages", "role", "content"))  # (list, its role, its text)
KEYS = ("conversations", "messages", "prompt", "completion", "response", "instruction", "input", "output")
FORMS = '"messages", "conversations", "prompt" or "instruction"'

Prompt = str | list[dict[str, Any]]  # text, or messages with "role" and "content": as `api.Prompt`
Turns = list[tuple[str, str]]  # (role, text): a role is system, user or assistant, or one that a chat template knows


class NoPrompt(ValueError):
    """What is wrong with a record, to follow its file and line: `mend` says what helps."""


def turns_of(row: Any, *, any_role: bool = False) -> Turns | None:
    """The turns of a record; None where it is of none of the forms.

    any_role: other roles than `ROLES` of messages pass as they are, for a chat template that knows them (tool).

    Raises:
      NoPrompt: a turn has no known speaker, or says something else than text.
    """
    if not isinstance(row, Mapping):
        return None
    for key, role, text in CONVERSATIONS:
        if isinstance(row.get(key), list):
            return [_turn(turn, role, text, any_role and key == "messages") for turn in row[key]]
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        turns = [_turn(turn, "role", "content", any_role) for turn in prompt]
        return turns + _answer(row, "completion", "response")
    if isinstance(prompt, str):
        return [("user", clean(prompt)), *_answer(row, "completion", "response")]
    if isinstance(row.get("instruction"), str):
        about = row.get("input")
        asked = row["instruction"] + (f"\n\n{about}" if isinstance(about, str) and about.strip() else "")
        return [("user", clean(asked)), *_answer(row, "output")]
    return None


def _turn(turn: Any, role: str, text: str, any_role: bool) -> tuple[str, str]:
    name, said = (turn.get(role), turn.get(text)) if isinstance(turn, Mapping) else (None, None)
    if not isinstance(name, str) or (name not in ROLES and not any_role):
        raise NoPrompt(f"speaker {name!r} is not known; {', '.join(ROLES)} are")
    parts = said if isinstance(said, list) else [said or ""]
    # Chat APIs give what is said either as text or as a list of {"type": "text", "text": ...}.
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(part, str) for part in texts):
        raise NoPrompt(f'"{text}" of the {name} is not text; leave out images and the like')
    return ROLES.get(name, name), clean("".join(texts))


def _answer(row: Mapping[str, Any], *keys: str) -> Turns:
    return next(([("assistant", clean(row[key]))] for key in keys if isinstance(row.get(key), str) and row[key]), [])


def prompt_of(row: Any) -> Prompt:
    """What a model is to answer: text, or messages with "role" and "content".

    An answer at the record's end is left out. A text under "prompt" goes before the other forms, of which a data set
    may hold the whole conversation besides.

    Raises:
      NoPrompt: the record is of none of the forms, or nothing is asked in it.
    """
    if isinstance(row, Mapping) and isinstance(row.get("prompt"), str):
        return clean(row["prompt"])
    turns = turns_of(row, any_role=True)
    if turns is None:
        raise NoPrompt(f'give {FORMS} (of messages each with "role" and "content")')
    while turns and turns[-1][0] == "assistant":
        turns.pop()
    if not turns or not turns[-1][1].strip():
        raise NoPrompt(f"nothing is asked at its end; give {FORMS} that ends with what the user says")
    given = next((row[key] for key in ("conversations", "messages", "prompt") if isinstance(row.get(key), list)), None)
    if given is None:
        return turns[-1][1]
    # What else a message holds (the name of a tool, calls of it) is the template's business.
    return [
        {**{key: value for key, value in turn.items() if key not in ("from", "value")}, "role": role, "content": text}
        for (role, text), turn in zip(turns, given, strict=False)
    ]


def clean(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# Files -------------------------------------------------------------------------------------------


def read_text(file: Path, what: str) -> str:
    r"""The text of a UTF-8 file, without a byte order mark, lines ended by "\n" alone; what: its flag, for refusals.

    Raises:
      UserError: the file cannot be read, or is no UTF-8 text.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text; convert it first"
        raise UserError(f"{what} {quoted(file)} cannot be read: {reason}") from None


def parsed(text: str | bytes) -> Any:
    """One JSON value.

    Raises:
      NoPrompt: the text is no JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoPrompt(f"not JSON ({error})") from None


def read_prompts(file: Path, what: str = "--prompt-file") -> list[Prompt]:
    """The prompts of a file: one a line of JSON Lines (.jsonl), or the whole text of any other file.

    what: the flag that named it, for refusals.

    Raises:
      UserError: the file cannot be read, holds no prompt, or a line is of none of the forms above.
    """
    text = read_text(file, what)
    if file.suffix != ".jsonl":
        return [text]
    found: list[Prompt] = []
    for number, line in json_lines.numbered(text):
        try:
            found.append(prompt_of(parsed(line)))
        except NoPrompt as error:
            raise UserError(f"{what} {quoted(file)}, line {number}: {error}") from None
    if not found:
        raise UserError(f"{what} {quoted(file)} holds no prompt")
    return found
