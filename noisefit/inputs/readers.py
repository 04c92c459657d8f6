"""Readers of tables: the records of a CSV, JSON Lines or Parquet file one after another, none of them kept."""

from __future__ import annotations

import csv
import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from noisefit.base.errors import InputError, notice

READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
Needed = str | tuple[tuple[str, ...], ...]
"""A column that a file must have, or several ways, each some columns, of which it must have those of one."""

UNDECODABLE = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is not UTF-8


def stream_records(
    path: str | os.PathLike[str], columns: Iterable[Needed], others: bool = True
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a table, see `noisefit.inputs.tables.read_records`, each read when it is asked for.

    Raises:
        InputError: when it comes to what is wrong; that no record of a JSON Lines file has a column, at its end.
    """
    path, columns = Path(path), tuple(columns)
    try:
        kind = _kind_of(path)
        if kind == "csv":
            yield from enumerate(_read_csv(path, columns), start=1)
        elif kind == "jsonl":
            yield from _read_json_lines(path, columns)
        else:
            yield from enumerate(_read_parquet(path, columns, others), start=1)
    except (ValueError, OSError, RecursionError) as error:  # a damaged block, no permission
        raise InputError(f"{path}: not readable: {error}") from None


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


def _require_columns(path: Path, found: Iterable[str], columns: tuple[Needed, ...]) -> list[str]:
    """The columns of the file that are needed, or may be."""
    found, wanted = list(found), list[str]()
    for column in found:
        if found.count(column) > 1:
            raise InputError(f"{path}: column {column!r} appears {found.count(column)} times, expected once")
    for needed in columns:
        ways = ((needed,),) if isinstance(needed, str) else needed
        wanted += [column for way in ways for column in way if column in found]
        if not any(set(way) <= set(found) for way in ways):
            column = next(column for column in ways[0] if column not in found)
            close = difflib.get_close_matches(column, [f.strip().lower() for f in found], n=1)
            nearest = next((f for f in found if close and f.strip().lower() == close[0]), None)
            hint = f"; rename {nearest!r}?" if nearest is not None else ""
            other = f"; or give {' or '.join(' and '.join(way) for way in ways[1:])}" if ways[1:] else ""
            raise InputError(f"{path}: no column {column!r}; columns found: {', '.join(found) or 'none'}{hint}{other}")
    return list(dict.fromkeys(wanted))


def _read_csv(path: Path, columns: tuple[Needed, ...]) -> Iterator[dict[str, Any]]:
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


def _read_json_lines(path: Path, columns: tuple[Needed, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    found: dict[str, None] = {}
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
            found |= dict.fromkeys(record)
            yield number, record
    _require_columns(path, found, columns)


def _read_parquet(path: Path, columns: tuple[Needed, ...], others: bool) -> Iterator[dict[str, Any]]:
    """Rows as Arrow has them: what the file says about a column (an image, say, at this address) is not followed."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            needed = _require_columns(path, file.schema_arrow.names, columns)
            carried = [field.name for field in file.schema_arrow if others and not _holds_bytes(field.type)]
            left_out = [name for name in file.schema_arrow.names if others and name not in {*needed, *carried}]
            if left_out:
                notice(f"{path}: left out, as they hold bytes: {', '.join(left_out)}")
            wanted = list(dict.fromkeys([*needed, *carried]))
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
