"""Readers of tables: the records of a CSV, JSON Lines or Parquet file one after another, none of them kept."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from noisefit.base.errors import InputError, notice
from noisefit.inputs.columns import Needed, renamed, require_columns

READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # of text alone: the others are so inside
FIRST_ROWS = 100  # of a JSON Lines file, whose columns are those that its rows have
UNDECODABLE = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte that is not UTF-8


def stream_records(
    path: str | os.PathLike[str],
    columns: Iterable[Needed],
    others: bool = True,
    renames: Mapping[str, str] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a table, see `noisefit.inputs.tables.read_records`, each read when it is asked for.

    Args:
        path: of the file.
        columns: that it must have.
        others: whether its other columns are wanted too.
        renames: which column of the file is to be called `prompt`, `response` and so on, by these names, see
            `noisefit.inputs.columns.renamed`; `None` where nobody could have said so.

    Raises:
        InputError: when it comes to what is wrong; that no record of a JSON Lines file has a column, at its end.
    """
    path, columns = Path(path), tuple(columns)
    try:
        kind = _kind_of(path)
        records: Iterable[tuple[int, dict[str, Any]]]
        if kind == "csv":
            records = enumerate(_read_csv(path, columns, renames), start=1)
        elif kind == "jsonl":
            records = _read_json_lines(path, columns, renames)
        else:
            records = enumerate(_read_arrow(path, kind, columns, others, renames), start=1)
        for number, record in records:
            yield number, renamed(record, renames) if renames else record
    except (
        ValueError,
        OSError,
        RecursionError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
    ) as error:  # no permission, damage
        raise InputError(f"{path}: not readable: {error}") from None


def column_names(path: str | os.PathLike[str]) -> list[str]:
    """The columns of a table; of JSON Lines those of its first rows. Raises `InputError` as `stream_records`."""
    if READERS.get(suffix_of(Path(path))) in ("parquet", "arrow"):
        with _arrow_table(Path(path), _kind_of(Path(path))) as (_, schema):
            return [*schema.names]
    records = itertools.islice(stream_records(path, ()), FIRST_ROWS)
    return list(dict.fromkeys(name for _, record in records for name in record))


def _kind_of(path: Path) -> str:
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a file; expected a .csv, .jsonl or .parquet file")
    kind = READERS.get(suffix_of(path))
    if kind is None or (path.suffix.lower() in COMPRESSED and kind not in ("csv", "jsonl")):
        raise InputError(f"{path}: file name ends in {path.suffix!r}, expected .csv, .jsonl or .parquet")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    return kind


def suffix_of(path: Path) -> str:
    """The end of a file's name that says what is in it; of a compressed one, what would be without that."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in COMPRESSED else suffix


def _open(path: Path) -> IO[bytes]:
    return COMPRESSED.get(path.suffix.lower(), open)(path, "rb")  # type: ignore[operator]


def _read_csv(path: Path, columns: Sequence[Needed], renames: Mapping[str, str] | None) -> Iterator[dict[str, Any]]:
    """Rows as Python's own `csv` module reads them. Blank lines are no rows."""
    csv.field_size_limit(sys.maxsize)
    delimiter, name = ("\t", "tabs") if suffix_of(path) == ".tsv" else (",", "commas")
    # Undecodable bytes become lone surrogates, so that the row they stand in can be named.
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
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
                    require_columns(path, header, columns, renames)
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


def _read_json_lines(
    path: Path, columns: Sequence[Needed], renames: Mapping[str, str] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """One object a line; or, in a file `.json`, one list of objects, which is read whole."""
    found: dict[str, None] = {}
    with _open(path) as file:  # as bytes: a line ends at \n alone, whatever else Unicode calls a line's end
        start = file.read(100).removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")
        file.seek(0)
        is_list = start[:1] == b"[" and suffix_of(path) == ".json"
        for number, record in _json_list(path, file.read()) if is_list else _json_lines(path, file):
            if not is_unicode(record):
                raise InputError(
                    f"{path}: row {number} holds half of a surrogate pair (\\ud800 or so), which is no text"
                )
            if not isinstance(record, dict):
                raise InputError(f"{path}: row {number} is a JSON {type(record).__name__}, expected an object")
            found |= dict.fromkeys(record)
            yield number, record
    require_columns(path, found, columns, renames)


def _json_lines(path: Path, file: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip(" \t\r\n"):  # what JSON calls white space
                continue
            yield number, json.loads(text)
        except UnicodeDecodeError:
            raise InputError(f"{path}: row {number} is not UTF-8 text; save the file as UTF-8") from None
        except RecursionError:
            raise InputError(f"{path}: row {number} is nested too deeply; expected one object a line") from None
        except ValueError as error:  # no JSON, or a number of thousands of digits
            raise InputError(f"{path}: row {number} is not JSON ({error}); expected one object a line") from None


def _json_list(path: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line} is not UTF-8 text; save the file as UTF-8") from None
    except RecursionError:
        raise InputError(f"{path}: it is nested too deeply; expected a list of objects") from None
    except ValueError as error:  # with line and column
        raise InputError(f"{path}: not JSON ({error}); expected a list of objects, or one object a line") from None
    yield from enumerate(records, start=1)


def _read_arrow(
    path: Path, kind: str, columns: Sequence[Needed], others: bool, renames: Mapping[str, str] | None
) -> Iterator[dict[str, Any]]:
    """Rows as Arrow has them: what the file says about a column (an image, say, at this address) is not followed."""
    with _arrow_table(path, kind) as (file, schema):
        wanted = wanted_columns(path, schema, columns, others, renames)
        batches = file.iter_batches(columns=wanted) if kind == "parquet" else _batches(file)
        for batch in batches:
            yield from batch.select(wanted).to_pylist()


@contextmanager
def _arrow_table(path: Path, kind: str) -> Iterator[tuple[Any, Any]]:
    """A Parquet or Arrow file, and its schema. Raises `InputError` where it cannot be read, also within."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) if kind == "parquet" else _arrow_file(path) as file:
            yield file, file.schema_arrow if kind == "parquet" else file.schema
    except (pyarrow.ArrowException, OSError, ValueError, ArithmeticError, NotImplementedError) as error:
        name = "a Parquet" if kind == "parquet" else "an Arrow"
        raise InputError(f"{path}: not {name} file that can be read: {error}") from None


def _arrow_file(path: Path) -> Any:
    """An Arrow file in either of its two formats."""
    import pyarrow

    with path.open("rb") as file:
        is_file = file.read(6) == b"ARROW1"
    return pyarrow.ipc.open_file(path) if is_file else pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))


def _batches(file: Any) -> Iterator[Any]:
    if hasattr(file, "num_record_batches"):
        yield from map(file.get_batch, range(file.num_record_batches))
    else:
        yield from file


def wanted_columns(
    where: object, schema: Any, columns: Iterable[Needed], others: bool, renames: Mapping[str, str] | None
) -> list[str]:
    """The columns of an Arrow schema that are read, as they are called there. Raises `InputError` as
    `require_columns`."""
    needed = require_columns(where, schema.names, columns, renames)
    carried = [field.name for field in schema if others and not _holds_bytes(field.type)]
    left_out = [name for name in schema.names if others and name not in {*needed, *carried}]
    if left_out:
        notice(f"{where}: left out, as they hold bytes: {', '.join(left_out)}")
    return list(dict.fromkeys([*needed, *carried]))


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
