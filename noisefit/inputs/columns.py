"""The columns of a table: which there must be, and how they are called. `--columns prompt=question response=answer`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from noisefit.base.errors import InputError

Needed = str | tuple[tuple[str, ...], ...]
"""A column that a file must have, or several ways, each some columns, of which it must have those of one."""

KNOWN = (
    "prompt",
    "response",
    "messages",
    "conversations",
    "question",
    "answer",
)  # by these names the trainer and its probe look
# Where a column lies in data sets that were not made for this program.
LIKELY = {
    "prompt": ("question", "instruction", "query", "problem", "input", "user", "text"),
    "response": ("completion", "output", "answer", "solution", "target", "assistant", "chosen", "text"),
    "messages": ("conversations", "conversation", "chat", "dialog", "dialogue", "turns"),
}


def parse_columns(words: Sequence[str] | None) -> dict[str, str]:
    """`--columns`: the name of a column in the file by the name that the trainer has for it.

    Raises:
        InputError: not such words, or a name is given twice.
    """
    found: dict[str, str] = {}
    for word in words or ():
        name, equals, given = word.partition("=")
        if not equals or not given or name not in KNOWN:
            raise InputError(f"--columns {word}: expected NAME=COLUMN, as in prompt=question response=answer, with one "
                             f"of {', '.join(KNOWN)} for NAME")  # fmt: skip
        if name in found or given in found.values():
            raise InputError(f"--columns {word}: {name if name in found else given!r} is given twice; leave one out")
        found[name] = given
    return found


def renamed(record: Mapping[str, Any], renames: Mapping[str, str]) -> dict[str, Any]:
    """A record with columns under the names that the trainer knows.

    A column that a rename names is moved there, in the place of one that has the name already. Where the record lacks
    it, nothing is renamed: a mixture has files of several shapes.
    """
    moved = {given: name for name, given in renames.items() if given in record}
    return {moved.get(name, name): value for name, value in record.items()
            if name in moved or name not in moved.values()}  # fmt: skip


def require_columns(
    where: object, found: Iterable[str], columns: Iterable[Needed], renames: Mapping[str, str] | None = None
) -> list[str]:
    """The columns of a file that are needed, or may be, as they are called there.

    Args:
        where: the file, for the line.
        found: its columns.
        columns: as the trainer calls them.
        renames: as for `renamed`; `None` where there is no flag to advise.

    Raises:
        InputError: one of `columns` is not among those that were found, or one was found twice.
    """
    found, wanted, renames_of = list(found), list[str](), renames or {}
    for column in found:
        if found.count(column) > 1:
            raise InputError(f"{where}: column {column!r} appears {found.count(column)} times, expected once")
    moved = {given: name for name, given in renames_of.items() if given in found}
    there = renamed(dict.fromkeys(found), renames_of)
    for needed in columns:
        ways = ((needed,),) if isinstance(needed, str) else needed
        wanted += [column for way in ways for column in way if column in there]
        if any(there.keys() >= set(way) for way in ways):
            continue
        lacking = [column for column in ways[0] if column not in there]
        likely = {column: _likely(column, found, by_meaning=renames is not None) for column in lacking}
        hint = f"; rename {likely[lacking[0]]!r}?" if renames is None and likely[lacking[0]] is not None else ""
        for way in ways if renames is not None else ():
            advice = [f"{column}={_likely(column, found)}" for column in way if column not in there]
            if not any(word.endswith("=None") for word in advice):
                hint = f"; did you mean --columns {' '.join(advice)}?"
                break
        named = renames_of.get(lacking[0], lacking[0])
        instead = f" (--columns {lacking[0]}={named}), and no {lacking[0]!r}" if named != lacking[0] else ""
        other = f"; or give {' or '.join(' and '.join(way) for way in ways[1:])}" if ways[1:] and not hint else ""
        raise InputError(
            f"{where}: no column {named!r}{instead}; columns found: {', '.join(found) or 'none'}{hint}{other}"
        )
    back = {name: given for given, name in moved.items()}
    return list(dict.fromkeys(back.get(name, name) for name in wanted))


def check_renames(renames: Mapping[str, str], found: Mapping[str, Sequence[str]]) -> None:
    """Refuse a name that no file has, beside files that have ours: its column would be left aside in silence.

    Args:
        renames: see `parse_columns`.
        found: the columns of each file, by its name.

    Raises:
        InputError: as said. Where ours is in no file either, whoever reads it says so.
    """
    for name, given in renames.items():
        having = [where for where, columns in found.items() if name in columns]
        if having and not any(given in columns for columns in found.values()):
            there = list(dict.fromkeys(column for columns in found.values() for column in columns))
            close = difflib.get_close_matches(given, there, n=1)
            hint = f"; did you mean {name}={close[0]}?" if close else ""
            raise InputError(f"--columns {name}={given}: no column {given!r}, and {having[0]} has one called {name!r}; "
                             f"columns found: {', '.join(there)}{hint}")  # fmt: skip


def _likely(column: str, found: Sequence[str], by_meaning: bool = True) -> str | None:
    """Which of the columns that were found may be meant by one that was not."""
    plain = {name.strip().lower(): name for name in reversed(found)}
    close = difflib.get_close_matches(column, plain, n=1)
    meant = [name for name in LIKELY.get(column, ()) if name in plain] if by_meaning else []
    return plain[(close + meant)[0]] if close or meant else None
