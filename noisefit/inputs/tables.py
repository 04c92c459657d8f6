"""Reading files of questions and answers, and of conversations: CSV, JSON Lines or Parquet."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from noisefit.base.errors import InputError, notice
from noisefit.inputs.columns import Needed
from noisefit.inputs.conversations import CHATS, TOOLS, Message, is_whole, read_chat, transcript, up_to_last
from noisefit.inputs.sources import stream_records

COLUMNS = ("prompt", "response")
MAY_HAVE: Needed = ((), *((name,) for name in TOOLS))  # read where it is there, to be refused
ANY_ROWS: tuple[Needed, ...] = ((COLUMNS, *((chat,) for chat in CHATS)), MAY_HAVE)  # what a file to train on has
ANY_PROMPTS: tuple[Needed, ...] = ((COLUMNS[:1], *((chat,) for chat in CHATS)), MAY_HAVE)  # and one to be answered
BEFORE_ABSTAINING = "answer_before_abstaining"  # where `--abstain_below` may have replaced an answer
ANSWER_COLUMNS = ("generated_response", "round", "logprob", "tokens", "noise_logprob_mean", "noise_logprob_spread",
                  BEFORE_ABSTAINING)  # fmt: skip
ROWS_NAMED = 5  # of the rows that are skipped


@dataclass(frozen=True)
class Row:
    """A question and its answer, with the turns before them where they end a conversation.

    Attributes:
        number: counts a file's rows from 1, the header of a CSV not counted.
        prompt, response: the last turn of the user, and of the assistant.
        weight: of its cross-entropy in training.
        history: the turns before these two.
    """

    number: int
    prompt: str
    response: str
    weight: float = 1.0
    history: tuple[Message, ...] = ()

    @property
    def answers(self) -> list[tuple[tuple[Message, ...], str, str]]:
        """Each answer of the conversation, in its order, behind what it answers: `(history, prompt, response)`."""
        turns = self.history
        earlier = [(turns[: i - 1], turns[i - 1].content, turn.content)
                   for i, turn in enumerate(turns) if turn.role == "assistant"]  # fmt: skip
        return [*earlier, (turns, self.prompt, self.response)]

    @property
    def asked(self) -> str:
        """What is asked, as one text by which it is known: the prompt, or the conversation up to it."""
        return transcript([*self.history, Message("user", self.prompt)]) if self.history else self.prompt


def read_rows(path: str | os.PathLike[str], columns: tuple[str, ...] = COLUMNS) -> tuple[list[Row], list[int]]:
    """Read a file of questions and answers, or of conversations.

    Args:
        path: see `read_records`.
        columns: those that are needed, where the file has no conversations; cells are stripped of white space at both
            ends.

    Returns:
        The complete rows, in order, and the numbers of those skipped for an empty or missing cell.

    Raises:
        InputError: as `read_records` and `trained_row`; or no complete row is left.
    """
    skipped: list[int] = []
    return list(stream_rows(path, skipped, columns)), skipped


def stream_rows(path: str | os.PathLike[str], skipped: list[int], columns: tuple[str, ...] = COLUMNS) -> Iterator[Row]:
    """`read_rows`, each row read when it is asked for; the numbers of those that are skipped are added to `skipped`."""
    asking = "response" not in columns
    records = stream_records(path, ANY_PROMPTS if asking else ANY_ROWS, others=asking)
    return _complete_rows(path, records, asked_row if asking else trained_row, skipped)


def trained_row(
    path: str | os.PathLike[str], number: int, record: Mapping[str, Any], unused: dict[str, None] | None = None
) -> Row | None:  # fmt: skip
    """A record as it is trained on: up to its last answer, as behind that nothing is supervised. `None` where a turn or
    a cell is empty.

    Raises:
        InputError: a cell that is not text, a conversation without an answer, or as `read_chat`.
    """
    chat = read_chat(f"{path}: row {number}", record, unused)
    if chat is None:
        prompt, response = (text_cell(path, number, column, record.get(column)) for column in COLUMNS)
        return Row(number, prompt, response) if prompt and response else None
    messages = up_to_last("assistant", chat)
    if not messages:
        raise InputError(f"{path}: row {number}: no turn of the conversation is the assistant's, so nothing is "
                         "to be learnt; remove the row")  # fmt: skip
    if not is_whole(messages):
        return None
    return Row(number, messages[-2].content, messages[-1].content, history=messages[:-2])


def asked_row(
    path: str | os.PathLike[str], number: int, record: Mapping[str, Any], unused: dict[str, None] | None = None,
    strip: bool = True,
) -> Row | None:  # fmt: skip
    """A record as it is asked: up to the last turn of the user, behind which `response` is that of the conversation, if
    it has one. `None` where a turn or the prompt is empty.

    Raises:
        InputError: a prompt that is not text, a conversation without a turn of the user, or as `read_chat`.
    """
    chat = read_chat(f"{path}: row {number}", record, unused)
    if chat is None:
        prompt = text_cell(path, number, "prompt", record.get("prompt"))
        return Row(number, prompt if strip else record["prompt"], "") if prompt else None
    messages = up_to_last("user", chat)
    if not messages:
        raise InputError(f"{path}: row {number}: no turn of the conversation is the user's, so nothing is asked; "
                         "remove the row")  # fmt: skip
    behind = chat[len(messages) :]
    if not is_whole(messages):
        return None
    return Row(number, messages[-1].content, behind[0].content if behind else "", history=messages[:-1])


def _complete_rows(
    path: str | os.PathLike[str], records: Iterable[tuple[int, dict[str, Any]]],
    as_row: Callable[..., Row | None], skipped: list[int],
) -> Iterator[Row]:  # fmt: skip
    empty, unused = True, dict[str, None]()
    for number, record in records:
        row = as_row(path, number, record, unused)
        if row is not None:
            yield row
            empty = False
        else:
            skipped.append(number)
    if unused:
        notice(f"{path}: of turns role and content alone are used; what they say beside is not: {', '.join(unused)}")
    if empty:
        why = f"all {len(skipped)} rows have an empty or missing cell" if skipped else "it has no rows"
        columns = COLUMNS if as_row is trained_row else COLUMNS[:1]
        raise InputError(f"{path}: no question to use: {why}; expected text in columns {' and '.join(columns)}")


def read_prompts(path: str | os.PathLike[str], strip: bool = True) -> tuple[list[dict[str, Any]], list[Row], list[int]]:
    """Read a file of questions that are to be answered; other columns go along.

    Args:
        path: see `read_records`.
        strip: whether the rows' prompts are without the white space at both ends; the records keep it. The turns of a
            conversation always are.

    Returns:
        The records with a prompt, the same as rows, see `asked_row`, and the numbers of those skipped for want of one.

    Raises:
        InputError: as `read_rows`; or a column is already called as one of the answers'.
    """
    records = dict(read_records(path, ANY_PROMPTS))
    skipped: list[int] = []
    rows = list(_complete_rows(path, records.items(), partial(asked_row, strip=strip), skipped))
    taken = [name for name in ANSWER_COLUMNS if any(name in record for record in records.values())]
    if taken:
        raise InputError(f"{path}: it has a column {taken[0]!r} already, which is one of the answers'; rename it")
    return [records[row.number] for row in rows], rows, skipped


def read_records(
    path: str | os.PathLike[str], columns: Iterable[Needed], others: bool = True
) -> list[tuple[int, dict[str, Any]]]:
    """Read a table whole.

    Args:
        path: `.csv` (or `.tsv`, with tabs for its commas), `.jsonl` (or `.json` with one object a line) or `.parquet`.
            Text is UTF-8, with or without a byte-order mark. The cells of a CSV are text, whatever they look like.
        columns: the columns that the file must have; of several ways to name some, those of one.
        others: whether its other columns are wanted too. Those of a Parquet file that hold bytes are left out.

    Returns:
        Each row's number, counted from 1 without the header of a CSV, and its cells by column.

    Raises:
        InputError: the file is missing, empty, of no known kind, not UTF-8, without one of `columns`, or malformed.
    """
    return list(stream_records(path, columns, others))


def load_rows(path: str | os.PathLike[str] | None) -> list[Row]:
    """`read_rows`, with a line about skipped rows; no rows where `path` is `None`."""
    if path is None:
        return []
    rows, skipped = read_rows(path)
    tell_of_skipped(path, skipped)
    return rows


def tell_of_skipped(path: str | os.PathLike[str], skipped: Sequence[int] | SomeRows) -> None:
    """A line about rows that are skipped, if any."""
    if SomeRows.of(skipped).number:
        notice(describe_skipped(path, skipped, "with an empty or missing cell"))


class SomeRows(NamedTuple):
    """How many rows, and the numbers of the first of them: all that a line says of rows, however many they are."""

    number: int
    first: list[int]

    @classmethod
    def of(cls, numbers: Sequence[int] | SomeRows) -> SomeRows:
        return numbers if isinstance(numbers, SomeRows) else cls(len(numbers), list(numbers[:ROWS_NAMED]))


def describe_skipped(path: object, skipped: Sequence[int] | SomeRows, why: str) -> str:
    """One line that counts the skipped rows and names the first of them."""
    number, _ = SomeRows.of(skipped)
    return f"{path}: skipped {number} row{'s' if number > 1 else ''} {why} ({name_rows(skipped)})"


def name_rows(numbers: Sequence[int] | SomeRows) -> str:
    """The first of several rows."""
    number, first = SomeRows.of(numbers)
    return "row " + ", ".join(map(str, first)) + (", ..." if number > ROWS_NAMED else "")


def text_cell(path: str | os.PathLike[str], number: int, column: str, value: Any) -> str:
    """A cell's text, stripped; empty where it is missing. Raises `InputError` where it is not text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{path}: row {number}: {column} is {type(value).__name__}, expected text")
    return value.strip()


def csv_cells(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's cells as a CSV can hold them, and give them back: a list or an object is JSON there."""
    nested = {name: value for name, value in record.items() if isinstance(value, list | dict | tuple)}
    as_json = {name: json.dumps(value, ensure_ascii=False, default=str) for name, value in nested.items()}
    return {**record, **as_json}


def csv_writer(file: Any, columns: Iterable[str]) -> csv.DictWriter:
    """Every cell is quoted: Python before 3.13 leaves a lone carriage return bare, and readers cut there."""
    return csv.DictWriter(file, list(columns), lineterminator="\n", quoting=csv.QUOTE_ALL)


def as_csv(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Records as a CSV in UTF-8; a column that some lack is empty there."""
    rows, text = [csv_cells(record) for record in records], io.StringIO(newline="")
    writer = csv_writer(text, dict.fromkeys(name for row in rows for name in row))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
