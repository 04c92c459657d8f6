"""Reading question-answer files: CSV, JSON Lines or Parquet, columns `prompt` and `response`."""

from __future__ import annotations

import csv
import difflib
import glob
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noisefit.errors import InputError, notice

COLUMNS = ("prompt", "response")
READERS = {".csv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
ROWS_NAMED = 5  # of the rows that are skipped
UNDECODABLE = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is not UTF-8


@dataclass(frozen=True)
class Row:
    """One question and its answer; `number` counts a file's rows from 1, the header of a CSV not counted."""

    number: int
    prompt: str
    response: str


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
    return _complete_rows(path, read_records(path, columns), columns)


def _complete_rows(
    path: str | os.PathLike[str], records: Iterable[tuple[int, dict[str, Any]]], columns: tuple[str, ...]
) -> tuple[list[Row], list[int]]:
    rows, skipped = [], []
    for number, record in records:
        cells = {column: text_cell(path, number, column, record.get(column)) for column in columns}
        if all(cells.values()):
            rows.append(Row(number, cells["prompt"], cells.get("response", "")))
        else:
            skipped.append(number)
    if not rows:
        why = f"all {len(skipped)} rows have an empty or missing cell" if skipped else "it has no rows"
        raise InputError(f"{path}: no question to use: {why}; expected text in columns {' and '.join(columns)}")
    return rows, skipped


def read_prompts(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], list[Row], list[int]]:
    """Read a file of questions that are to be answered; other columns go along.

    Returns:
        The records with a prompt, the same as rows, and the numbers of those skipped for want of one.

    Raises:
        InputError: as `read_rows`; or a column is already called as one of the answers'.
    """
    records = dict(read_records(path, ("prompt",)))
    rows, skipped = _complete_rows(path, records.items(), ("prompt",))
    taken = [name for name in ("generated_response", "round") if any(name in record for record in records.values())]
    if taken:
        raise InputError(f"{path}: it has a column {taken[0]!r} already, which is one of the answers'; rename it")
    return [records[row.number] for row in rows], rows, skipped


def read_records(path: str | os.PathLike[str], columns: Iterable[str]) -> list[tuple[int, dict[str, Any]]]:
    """Read a table whole.

    Args:
        path: `.csv`, `.jsonl` (or `.json` with one object a line) or `.parquet`. Text is UTF-8, with or without a
            byte-order mark. The cells of a CSV are text, whatever they look like.
        columns: the columns that the file must have; others may be there.

    Returns:
        Each row's number, counted from 1 without the header of a CSV, and its cells by column.

    Raises:
        InputError: the file is missing, empty, of no known kind, not UTF-8, without one of `columns`, or malformed.
    """
    path, columns = Path(path), tuple(columns)
    try:
        kind = _kind_of(path)
        if kind == "csv":
            return list(enumerate(_read_csv(path, columns), start=1))
        if kind == "jsonl":
            return _read_json_lines(path, columns)
        return list(enumerate(_read_parquet(path, columns), start=1))
    except (ValueError, OSError, RecursionError) as error:  # an unclosed quote, a damaged block, no permission
        raise InputError(f"{path}: not readable: {error}") from None


def load_rows(path: str | None) -> list[Row]:
    """`read_rows`, with a line about skipped rows; no rows where `path` is `None`."""
    if path is None:
        return []
    rows, skipped = read_rows(path)
    if skipped:
        notice(describe_skipped(path, skipped, "with an empty or missing cell"))
    return rows


def describe_skipped(path: str | os.PathLike[str], skipped: list[int], why: str) -> str:
    """One line that counts the skipped rows and names the first of them."""
    named = ", ".join(map(str, skipped[:ROWS_NAMED])) + (", ..." if len(skipped) > ROWS_NAMED else "")
    return f"{path}: skipped {len(skipped)} row{'s' if len(skipped) > 1 else ''} {why} (row {named})"


def _kind_of(path: Path) -> str:
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a file; expected a .csv, .jsonl or .parquet file")
    kind = READERS.get(path.suffix.lower())
    if kind is None:
        raise InputError(f"{path}: file name ends in {path.suffix!r}, expected .csv, .jsonl or .parquet")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    return kind


def text_cell(path: str | os.PathLike[str], number: int, column: str, value: Any) -> str:
    """A cell's text, stripped; empty where it is missing. Raises `InputError` where it is not text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{path}: row {number}: {column} is {type(value).__name__}, expected text")
    return value.strip()


def _require_columns(path: Path, found: Iterable[str], columns: tuple[str, ...]) -> None:
    found = list(found)
    for column in found:
        if found.count(column) > 1:
            raise InputError(f"{path}: column {column!r} appears {found.count(column)} times, expected once")
    for column in columns:
        if column not in found:
            close = difflib.get_close_matches(column, [f.strip().lower() for f in found], n=1)
            nearest = next((f for f in found if close and f.strip().lower() == close[0]), None)
            hint = f"; rename {nearest!r}?" if nearest is not None else ""
            raise InputError(f"{path}: no column {column!r}; columns found: {', '.join(found) or 'none'}{hint}")


def _read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    header = _check_csv(path, columns)
    import datasets

    # Every column as text and no value read as missing: "007", "1.50" and "None" are answers like any other.
    features = datasets.Features({name: datasets.Value("string") for name in header})
    return _stream("csv", path, features=features, names=header, header=0, keep_default_na=False, encoding="utf-8-sig")


def _check_csv(path: Path, columns: tuple[str, ...]) -> list[str]:
    """The header; raises where a row is not UTF-8 or has another number of cells, which pandas would cut or shift."""
    csv.field_size_limit(sys.maxsize)
    # Undecodable bytes become lone surrogates, so that the row they stand in can be named.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        header: list[str] = []
        try:
            for number, cells in enumerate((row for row in reader if row), start=0):
                where = f"row {number} (line {reader.line_num})" if number else "the header"
                if any(map(UNDECODABLE.search, cells)):
                    raise InputError(f"{path}: {where} is not UTF-8 text; save the file as UTF-8")
                if number == 0:
                    # As pandas calls a column without a name, which is what it writes for an index.
                    header = [name or f"Unnamed: {i}" for i, name in enumerate(cells)]
                    _require_columns(path, header, columns)
                elif len(cells) != len(header):
                    raise InputError(
                        f"{path}: {where} has {len(cells)} cells, expected {len(header)} as in the header; "
                        'put cells that hold commas in "double quotes"'
                    )
        except csv.Error as error:
            raise InputError(f"{path}: line {reader.line_num} is not CSV: {error}") from None
    if not header:
        raise InputError(f"{path}: the file is empty")
    return header


def _read_json_lines(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                raise InputError(f"{path}: row {number} is not UTF-8 text; save the file as UTF-8") from None
    # As lines and not with the "json" reader, which refuses a byte-order mark, and any file in which a column that
    # we ignore is a number here and text there.
    records = []
    texts = (line["text"] for line in _stream("text", path, encoding="utf-8-sig"))
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: row {number} is not JSON ({error}); expected one object a line") from None
        if not _is_unicode(record):
            raise InputError(f"{path}: row {number} holds half of a surrogate pair (\\ud800 or so), which is no text")
        if not isinstance(record, dict):
            raise InputError(f"{path}: row {number} is a JSON {type(record).__name__}, expected an object")
        records.append((number, record))
    _require_columns(path, dict.fromkeys(key for _, record in records for key in record), columns)
    return records


def _read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    try:
        found = pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file: {error}") from None
    _require_columns(path, found, columns)
    return _stream("parquet", path)


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _stream(reader: str, path: Path, **options: Any) -> Iterator[dict[str, Any]]:
    """Rows through `datasets`, streamed: nothing goes to its cache, so no stale copy of an edited file comes back."""
    import datasets

    pattern = glob.escape(str(path.resolve()))  # data_files is read as a glob pattern
    return iter(datasets.load_dataset(reader, data_files=pattern, split="train", streaming=True, **options))
