"""Conversations as they stand in files: `messages`, ShareGPT's `conversations`, and what they must be to be used."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from noisefit.base.errors import InputError
from noisefit.inputs.readers import is_unicode

CHATS = ("messages", "conversations")  # the columns, the first of those that a row has
ROLES = {"system": "system", "user": "user", "human": "user"} | dict.fromkeys(
    ("assistant", "gpt", "chatgpt", "model"), "assistant"
)
EXPECTED = "a list of {role, content}, or of ShareGPT's {from, value}, in a CSV as JSON"


# What the turns, and the rows, of other trainers have, and what would be wrong without a word if it were passed over.
TOOLS = ("tools", "functions")  # columns
REFUSED = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")
TRAINED = ("train", "training", "weight")  # of an assistant's turn; false or 0: not to be supervised


class Message(NamedTuple):
    """A turn of a conversation; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


def read_chat(
    where: str, record: Mapping[str, Any], unused: dict[str, None] | None = None
) -> tuple[Message, ...] | None:  # fmt: skip
    """The conversation of a record; `None` where it has none, or prompt and response, which go before it.

    Contents are stripped of white space at both ends, as the cells of a prompt and a response are; those that are
    missing are empty.

    Args:
        where: file and row, for the line.
        record: its cells by column.
        unused: gets the names of what turns say beside role and content, which is not used.

    Raises:
        InputError: the conversation has tools, thoughts apart from its contents, or answers that are not to be
            supervised; the cell is no list of turns; a turn has a role that is not known, or a content that is no text;
            an assistant's turn does not stand behind a user's; or the last one is a system prompt.
    """
    if all(record.get(column) not in (None, "") for column in ("prompt", "response")):
        return None
    column = next((name for name in CHATS if record.get(name) not in (None, "")), None)
    if column is None:
        return None
    if tools := next((name for name in TOOLS if _says_something(record.get(name))), None):
        raise InputError(f"{where} has {tools}, which are not supported; leave such rows out, or the column")
    turns, where = record[column], f"{where}: {column}"
    if isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            raise InputError(f"{where} is {turns[:40]!r}, expected {EXPECTED}") from None
        if not is_unicode(turns):
            raise InputError(f"{where} holds half of a surrogate pair (\\ud800 or so), which is no text")
    if not isinstance(turns, list):
        raise InputError(f"{where} is {type(turns).__name__}, expected {EXPECTED}")
    if not turns:
        raise InputError(f"{where} is an empty list, expected {EXPECTED}")
    messages: list[Message] = []
    for number, turn in enumerate(turns, start=1):
        message = _message(f"{where}: turn {number}", turn, {} if unused is None else unused)
        if message.role == "assistant" and (not messages or messages[-1].role != "user"):
            before = f"after a turn of {messages[-1].role}" if messages else "at the beginning"
            raise InputError(f"{where}: turn {number} is the assistant's, {before}; expected one of the user before it")
        messages.append(message)
    if messages[-1].role == "system":
        raise InputError(f"{where}: its last turn is a system prompt; expected one of the user or the assistant")
    return tuple(messages)


def _message(where: str, turn: Any, unused: dict[str, None]) -> Message:
    if not isinstance(turn, dict):
        raise InputError(f"{where} is {type(turn).__name__}, expected {{role, content}}")
    names = ("role", "content") if turn.get("role") is not None or turn.get("from") is None else ("from", "value")
    role, content = (turn.get(name) for name in names)
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise InputError(f"{where}: its {names[0]} is {str(role)[:40]!r}, expected one of {known}")
    if refused := next((name for name in REFUSED if _says_something(turn.get(name))), None):
        instead = "" if refused in REFUSED[:2] else f", or put it into {names[1]} as the chat template writes it"
        raise InputError(f"{where} has {refused}, which is not supported; leave such rows out{instead}")
    others = {name: value for name, value in turn.items() if name not in names and _says_something(value)}
    if ROLES[role] == "assistant":
        for name in filter(others.__contains__, TRAINED):
            if others.pop(name) != 1:  # which true is too
                raise InputError(f"{where}: its {name} is {turn[name]!r}, but all answers are supervised alike; leave "
                                 "such rows out, or cut them before it")  # fmt: skip
    unused |= dict.fromkeys(others)
    if content is not None and not isinstance(content, str):
        raise InputError(f"{where}: its {names[1]} is {type(content).__name__}, expected text")
    return Message(ROLES[role], (content or "").strip())


def _says_something(value: Any) -> bool:
    return value not in (None, "", "[]", "{}", "null") and value != [] and value != {}


def up_to_last(role: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """A conversation without what stands behind the last turn of a role; none where there is no such turn."""
    last = max((i for i, message in enumerate(messages) if message.role == role), default=-1)
    return tuple(messages[: last + 1])


def is_whole(messages: Sequence[Message]) -> bool:
    """Whether each turn says something; a system prompt need not."""
    return all(message.content or message.role == "system" for message in messages)


def transcript(messages: Sequence[Message]) -> str:
    """A conversation as one text, from which it can be told: lines of a turn but its first are indented."""
    indented = [f"{role}: {content}".replace("\n", "\n  ") for role, content in messages]
    return "\n".join(indented)
