"""Reading question-answer files: CSV, JSON Lines or Parquet, columns `prompt` and `response`."""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noisefit.base.errors import InputError, notice

COLUMNS = ("prompt", "response")
READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
BEFORE_ABSTAINING = "answer_before_abstaining"  # where `--abstain_below` may have replaced an answer
ANSWER_COLUMNS = ("generated_response", "round", "logprob", "tokens", "noise_logprob_mean", "noise_logprob_spread",
                  BEFORE_ABSTAINING)  # fmt: skip
ROWS_NAMED = 5  # of the rows that are skipped
UNDECODABLE = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is not UTF-8


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
    return _complete_rows(path, read_records(path, columns, others=False), columns)


def _complete_rows(
    path: str | os.PathLike[str], records: Iterable[tuple[int, dict[str, Any]]], columns: tuple[str, ...],
    strip: bool = True,
) -> tuple[list[Row], list[int]]:  # fmt: skip
    rows, skipped = [], []
    for number, record in records:
        cells = {column: text_cell(path, number, column, record.get(column)) for column in columns}
        if all(cells.values()):
            rows.append(Row(number, cells["prompt"] if strip else record["prompt"], cells.get("response", "")))
        else:
            skipped.append(number)
    if not rows:
        why = f"all {len(skipped)} rows have an empty or missing cell" if skipped else "it has no rows"
        raise InputError(f"{path}: no question to use: {why}; expected text in columns {' and '.join(columns)}")
    return rows, skipped


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
    rows, skipped = _complete_rows(path, records.items(), ("prompt",), strip)
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
    path, columns = Path(path), tuple(columns)
    try:
        kind = _kind_of(path)
        if kind == "csv":
            return list(enumerate(_read_csv(path, columns), start=1))
        if kind == "jsonl":
            return _read_json_lines(path, columns)
        return list(enumerate(_read_parquet(path, columns, others), start=1))
    except (ValueError, OSError, RecursionError) as error:  # a damaged block, no permission
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
    return f"{path}: skipped {len(skipped)} row{'s' if len(skipped) > 1 else ''} {why} ({name_rows(skipped)})"


def name_rows(numbers: list[int]) -> str:
    """The first of several rows."""
    return "row " + ", ".join(map(str, numbers[:ROWS_NAMED])) + (", ..." if len(numbers) > ROWS_NAMED else "")


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
    """Rows as Python's own `csv` module reads them. Blank lines are no rows."""
    csv.field_size_limit(sys.maxsize)
    delimiter, name = ("\t", "tabs") if path.suffix.lower() == ".tsv" else (",", "commas")
    # Undecodable bytes become lone surrogates, so that the row they stand in can be named.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        # Strict: a quote that is never closed, or that ends before its cell does, is an error.
        reader = csv.reader(file, strict=True, delimiter=delimiter)
        header: list[str] = []
        last_line = 0
        try:
            for number, cells in enumerate(row for row in reader if row):
                last_line = reader.line_num
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
                        f'put cells that hold {name} in "double quotes"'
                    )
                else:
                    yield dict(zip(header, cells, strict=True))
        except csv.Error as error:
            what = "a quote in it is never closed" if "unexpected end" in str(error) else error
            raise InputError(f"{path}: the row on line {last_line + 1} is not CSV: {what}") from None
    if not header:
        raise InputError(f"{path}: the file is empty")


def _read_json_lines(path: Path, columns: tuple[str, ...]) -> list[tuple[int, dict[str, Any]]]:
    records = []
    with path.open("rb") as file:  # as bytes: a line ends at \n alone, whatever else Unicode calls a line's end
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if not text.strip(" \t\r\n"):  # what JSON calls white space
                    continue
                record = json.loads(text)
            except UnicodeDecodeError:
                raise InputError(f"{path}: row {number} is not UTF-8 text; save the file as UTF-8") from None
            except RecursionError:
                raise InputError(f"{path}: row {number} is nested too deeply; expected one object a line") from None
            except ValueError as error:  # no JSON, or a number of thousands of digits
                raise InputError(f"{path}: row {number} is not JSON ({error}); expected one object a line") from None
            if not is_unicode(record):
                raise InputError(
                    f"{path}: row {number} holds half of a surrogate pair (\\ud800 or so), which is no text"
                )
            if not isinstance(record, dict):
                raise InputError(f"{path}: row {number} is a JSON {type(record).__name__}, expected an object")
            records.append((number, record))
    _require_columns(path, dict.fromkeys(key for _, record in records for key in record), columns)
    return records


def _read_parquet(path: Path, columns: tuple[str, ...], others: bool) -> Iterator[dict[str, Any]]:
    """Rows as Arrow has them: what the file says about a column (an image, say, at this address) is not followed."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _require_columns(path, file.schema_arrow.names, columns)
            carried = [field.name for field in file.schema_arrow if others and not _holds_bytes(field.type)]
            left_out = [name for name in file.schema_arrow.names if others and name not in {*columns, *carried}]
            if left_out:
                notice(f"{path}: left out, as they hold bytes: {', '.join(left_out)}")
            wanted = list(dict.fromkeys([*columns, *carried]))
            for batch in file.iter_batches(columns=wanted):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError, NotImplementedError) as error:
        raise InputError(f"{path}: not a Parquet file that can be read: {error}") from None


def _holds_bytes(kind: Any) -> bool:
    """Whether a column of this Arrow type has bytes in its cells, at any depth: an image, a sound."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        return _holds_bytes(kind.storage_type)
    if pyarrow.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    if kind.num_fields:
        return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields))
    return bool(pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) or
                pyarrow.types.is_fixed_size_binary(kind) or pyarrow.types.is_binary_view(kind))  # fmt: skip


def is_unicode(value: Any) -> bool:
    """Whether the texts in a value of JSON are text: half of a surrogate pair is none."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


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
