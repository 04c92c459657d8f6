"""Reading question-answer files: CSV, JSON Lines or Parquet, columns `prompt` and `response`."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from noisefit.base.errors import InputError, notice
from noisefit.inputs.sources import stream_records

COLUMNS = ("prompt", "response")
BEFORE_ABSTAINING = "answer_before_abstaining"  # where `--abstain_below` may have replaced an answer
ANSWER_COLUMNS = ("generated_response", "round", "logprob", "tokens", "noise_logprob_mean", "noise_logprob_spread",
                  BEFORE_ABSTAINING)  # fmt: skip
ROWS_NAMED = 5  # of the rows that are skipped


@dataclass(frozen=True)
class Row:
    """One question and its answer; `number` counts a file's rows from 1, the header of a CSV not counted.

    `weight` is that of its cross-entropy in training.
    """

    number: int
    prompt: str
    response: str
    weight: float = 1.0


def read_rows(path: str | os.PathLike[str], columns: tuple[str, ...] = COLUMNS) -> tuple[list[Row], list[int]]:
    """Read a file of questions and answers.

    Args:
        path: see `read_records`.
        columns: those that are needed; cells are stripped of white space at both ends.

    Returns:
        The complete rows, in order, and the numbers of those skipped for an empty or missing cell.

    Raises:
        InputError: as `read_records`; a cell that is not text; or no complete row is left.
    """
    skipped: list[int] = []
    return list(stream_rows(path, skipped, columns)), skipped


def stream_rows(path: str | os.PathLike[str], skipped: list[int], columns: tuple[str, ...] = COLUMNS) -> Iterator[Row]:
    """`read_rows`, each row read when it is asked for; the numbers of those that are skipped are added to `skipped`."""
    return _complete_rows(path, stream_records(path, columns, others=False), columns, skipped)


def _complete_rows(
    path: str | os.PathLike[str], records: Iterable[tuple[int, dict[str, Any]]], columns: tuple[str, ...],
    skipped: list[int], strip: bool = True,
) -> Iterator[Row]:  # fmt: skip
    empty = True
    for number, record in records:
        cells = {column: text_cell(path, number, column, record.get(column)) for column in columns}
        if all(cells.values()):
            yield Row(number, cells["prompt"] if strip else record["prompt"], cells.get("response", ""))
            empty = False
        else:
            skipped.append(number)
    if empty:
        why = f"all {len(skipped)} rows have an empty or missing cell" if skipped else "it has no rows"
        raise InputError(f"{path}: no question to use: {why}; expected text in columns {' and '.join(columns)}")


def read_prompts(path: str | os.PathLike[str], strip: bool = True) -> tuple[list[dict[str, Any]], list[Row], list[int]]:
    """Read a file of questions that are to be answered; other columns go along.

    Args:
        path: see `read_records`.
        strip: whether the rows' prompts are without the white space at both ends; the records keep it.

    Returns:
        The records with a prompt, the same as rows, and the numbers of those skipped for want of one.

    Raises:
        InputError: as `read_rows`; or a column is already called as one of the answers'.
    """
    records = dict(read_records(path, ("prompt",)))
    skipped: list[int] = []
    rows = list(_complete_rows(path, records.items(), ("prompt",), skipped, strip))
    taken = [name for name in ANSWER_COLUMNS if any(name in record for record in records.values())]
    if taken:
        raise InputError(f"{path}: it has a column {taken[0]!r} already, which is one of the answers'; rename it")
    return [records[row.number] for row in rows], rows, skipped


def read_records(
    path: str | os.PathLike[str], columns: Iterable[str], others: bool = True
) -> list[tuple[int, dict[str, Any]]]:
    """Read a table whole.

    Args:
        path: `.csv` (or `.tsv`, with tabs for its commas), `.jsonl` (or `.json` with one object a line) or `.parquet`.
            Text is UTF-8, with or without a byte-order mark. The cells of a CSV are text, whatever they look like.
        columns: the columns that the file must have.
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
