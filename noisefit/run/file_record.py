"""The record `noisefit_files.json` of an output folder: what runs wrote there, and how it was then."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from noisefit.base.errors import InputError
from noisefit.base.files import check_regular, fingerprint, write_json

RECORD = "noisefit_files.json"
ABOUT = "what runs of the NoiseFiT trainer wrote in this folder; they replace and remove nothing else"

Entry = list[Any] | dict[str, Any] | None
"""Of a file its size and digest as it was written, `None` while it is not final; of a folder those of all files in it,
by their path there."""


def read_record(path: Path) -> dict[str, Entry]:
    """The entries by name, of a folder's ending in `/`; none where there is no record.

    Raises:
        InputError: what is there is no such record.
    """
    check_regular(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        entries: dict[str, Entry] = record["files"]
        if record["about"] != ABOUT or not all(_is_entry(*item) for item in entries.items()):
            raise ValueError("it is another list")
        return entries
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(
            f"{path}: a run keeps its list of what it wrote there, and this is none; move it away, or choose another "
            "folder"
        ) from None


def write_record(path: Path, entries: Mapping[str, Entry], scratch: Path) -> None:
    """Write it whole, by way of the folder `scratch`."""
    write_json(path, {"about": ABOUT, "files": dict(entries)}, scratch)


def is_on_its_way(scratch: Path) -> bool:
    """Whether it is a folder with nothing in it but a record that was on its way through it when the run was killed."""
    is_folder = scratch.is_dir() and not scratch.is_symlink()
    return is_folder and all(fnmatchcase(path.name, f".{RECORD}.*.tmp") for path in scratch.iterdir())


def _is_entry(name: str, entry: Any) -> bool:
    plain = name.removesuffix("/")
    is_name = plain == os.path.basename(plain) and plain not in ("", ".", "..")
    if name.endswith("/") and isinstance(entry, dict):
        return is_name and all(_is_entry(step, entry[path]) for path in entry for step in path.split("/"))
    is_list = isinstance(entry, list) and all(isinstance(value, (int, str)) for value in entry)
    return is_name and (entry is None or (is_list and not name.endswith("/")))


def is_as_written(path: Path, written: Any) -> bool:
    """Whether a file is there as its entry has it; of one that is not final, whether it is there."""
    try:
        return path.is_file() if written is None else fingerprint(path) == written
    except OSError:
        return False
