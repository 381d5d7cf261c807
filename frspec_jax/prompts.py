"""What users say to a model, in the forms in which such data is published: for generate, train and eval alike.

A record is one of

    {"messages": [{"role": "user", "content": TEXT}, ...]}         chat APIs; a content may come in parts,
                                                                   [{"type": "text", "text": TEXT}, ...]
    {"conversations": [{"from": "human", "value": TEXT}, ...]}     ShareGPT
    {"prompt": TEXT, "completion": TEXT}                           the completion may be missing, or be called
                                                                   "response"; a prompt may be a list of messages
    {"instruction": TEXT, "input": TEXT, "output": TEXT}           Alpaca; input and output may be missing or empty

and may hold besides "id", which goes to the output, "system" (or "system_prompt"), which becomes the first message, and
"tools", which the chat template is given. The files are those of `frspec_jax.records`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from frspec_jax import records
from frspec_jax.errors import UserError
from frspec_jax.records import Columns, Row

ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    # All of them occur in ShareGPT; a call of a function is what the model says.
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool_response"), "tool"),
}
TEMPLATES_OWN = ("developer", "function", "ipython", "tool")  # a chat template may know them; they stand as they are
CONVERSATIONS = (("conversations", "from", "value"), ("messages", "role", "content"))  # (list, its role, its text)
SYSTEM = ("system", "system_prompt")
KEYS = ("conversations", "messages", "prompt", "completion", "response", "instruction", "input", "output")
FORMS = '"messages", "conversations", "prompt" or "instruction"'
IDS = ("id", "question_id", "task_id")  # what a record is called by, in published question sets too
BESIDE = (*IDS, *SYSTEM, "tools")

Message = Mapping[str, Any]  # with "role" and "content", and what else a chat template may look at


class NoPrompt(ValueError):
    """What is wrong with a record, to follow its file and line, and the mend."""


class UnknownSpeaker(NoPrompt):
    """Somebody speaks of whom neither we nor the usual chat templates know: of a corpus, that record is left out."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One prompt of a file."""

    prompt: str | list[dict[str, Any]]  # text, or messages: as `request.Prompt`
    id: Any = None  # the record's own, if it has one
    where: str = ""  # its place in the file
    tools: list[Any] | None = None  # for the chat template


def messages_of(row: Any, *, any_role: bool = False) -> list[dict[str, Any]] | None:
    """The messages of a record, each with "role", "content" (text) and whatever else stands in it; None: of no form.

    any_role: other roles than the known ones pass as they are, for a chat template that knows them.

    Raises:
      NoPrompt: a turn has no speaker, or says something else than text. UnknownSpeaker: one that is not known.
    """
    if not isinstance(row, Mapping):
        return None
    listed = _of_list(row, any_role)
    found = _of_texts(row) if listed is None else listed
    system = next((row[key] for key in SYSTEM if isinstance(row.get(key), str) and row[key].strip()), None)
    if found and system is not None and found[0]["role"] != "system":
        found.insert(0, {"role": "system", "content": clean(system)})
    return found


def _of_list(row: Mapping[str, Any], any_role: bool) -> list[dict[str, Any]] | None:
    for key, role, text in CONVERSATIONS:
        if isinstance(row.get(key), list):
            return [_message(turn, role, text, any_role) for turn in row[key]]
    if isinstance(row.get("prompt"), list):
        return [
            *(_message(turn, "role", "content", any_role) for turn in row["prompt"]),
            *_answer(row, "completion", "response"),
        ]
    return None


def _of_texts(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    if isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": clean(row["prompt"])}, *_answer(row, "completion", "response")]
    if isinstance(row.get("instruction"), str):
        about = row.get("input")
        asked = row["instruction"] + (f"\n\n{about}" if isinstance(about, str) and about.strip() else "")
        return [{"role": "user", "content": clean(asked)}, *_answer(row, "output")]
    return None


def _message(turn: Any, role: str, text: str, any_role: bool) -> dict[str, Any]:
    name, said = (turn.get(role), turn.get(text)) if isinstance(turn, Mapping) else (None, None)
    if not isinstance(name, str):
        raise NoPrompt(f'a turn has no speaker; give each a "{role}"')
    known = name if name in TEMPLATES_OWN else ROLES.get(name.lower())
    if known is None and not any_role:
        raise UnknownSpeaker(f"speaker {name!r} is not known; {', '.join((*ROLES, *TEMPLATES_OWN))} are")
    parts = said if isinstance(said, list) else [said or ""]
    # Chat APIs give what is said either as text or as a list of {"type": "text", "text": ...}.
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(part, str) for part in texts):
        other = next((part for part, one in zip(parts, texts, strict=True) if not isinstance(one, str)), None)
        kind = other.get("type") if isinstance(other, Mapping) else None
        has = f' has a part of type "{kind}"' if isinstance(kind, str) else " is not text"
        raise NoPrompt(
            f'"{text}" of the {name}{has}, and a model of text reads text alone; leave out images and the like'
        )
    more = {key: value for key, value in turn.items() if key not in (role, text)}
    return {**more, "role": known or name, "content": clean("".join(texts))}


def _answer(row: Mapping[str, Any], *keys: str) -> list[dict[str, Any]]:
    said = next((row[key] for key in keys if isinstance(row.get(key), str) and row[key]), None)
    return [] if said is None else [{"role": "assistant", "content": clean(said)}]


def tools_of(row: Any) -> list[Any] | None:
    """The tools that a record offers the model, for the chat template; some data sets have them as a text of JSON.

    Raises:
      NoPrompt: they are no list.
    """
    tools = row.get("tools") if isinstance(row, Mapping) else None
    if isinstance(tools, str):
        tools = parsed(tools) if tools.strip() else None
    if tools is not None and not isinstance(tools, list):
        raise NoPrompt('"tools" is no list; give one of the functions, or leave it out')
    return tools or None


def prompt_of(row: Any) -> str | list[dict[str, Any]]:
    """What a model is to answer: text, or messages with "role" and "content".

    An answer at the record's end is left out. A text under "prompt" goes before the other forms, of which a data set
    may hold the whole conversation besides.

    Raises:
      NoPrompt: the record is of none of the forms, or nothing is asked in it.
    """
    if isinstance(row, Mapping) and isinstance(row.get("prompt"), str):
        row = {key: value for key, value in row.items() if key not in ("messages", "conversations")}
    found = messages_of(row, any_role=True)
    if found is None:
        raise NoPrompt(f'give {FORMS} (of messages each with "role" and "content")')
    if len(found) > 1 or not isinstance(row.get("prompt"), str):  # a prompt alone is an empty one's own business
        while found and found[-1]["role"] == "assistant":
            found.pop()
        if not found or not found[-1]["content"].strip():
            raise NoPrompt(f"nothing is asked at its end; give {FORMS} that ends with what the user says")
    in_a_list = any(isinstance(row.get(key), list) for key in ("conversations", "messages", "prompt"))
    return found if in_a_list or len(found) > 1 else found[0]["content"]


def clean(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def parsed(text: str) -> Any:
    """One JSON value.

    Raises:
      NoPrompt: the text is no JSON.
    """
    import json

    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NoPrompt(f"not JSON ({error})") from None


# Files -------------------------------------------------------------------------------------------


def read_records(
    path: Path, what: str = "", read: records.Told | None = None, also: Sequence[str] = ()
) -> Iterator[Row]:
    """The records of a file, of Parquet those columns that can count; see `records.read_rows`.

    also: further keys that count, for refusals too ("text").
    """
    forms = "".join(f'"{key}", ' for key in also) + FORMS
    return records.read_rows(path, what, read, Columns((*also, *KEYS), BESIDE, forms))


def read_prompts(file: Path, what: str = "--prompt-file") -> list[Asked]:
    """The prompts of a file of records, or the whole text of any other file as one; see `records`.

    what: the flag that named it, for refusals.

    Raises:
      UserError: the file cannot be read, holds no prompt, or a record is of none of the forms above.
    """
    if records.kind_of(file) not in records.RECORDS:
        return [Asked(records.read_text(file, what))]
    found: list[Asked] = []
    for row in read_records(file, what):
        try:
            known = row.value if isinstance(row.value, Mapping) else {}
            own = next((known[name] for name in IDS if known.get(name) is not None), None)
            found.append(Asked(prompt_of(row.value), own, row.where, tools_of(row.value)))
        except NoPrompt as error:
            raise UserError(f"{records.named(file, what)}, {row.where}: {error}") from None
    if not found:
        raise UserError(f"{records.named(file, what)} holds no prompt")
    return found
