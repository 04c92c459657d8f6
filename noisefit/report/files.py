"""JSON files of a run that people may have edited, or that a run is writing right now."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from noisefit.base.errors import InputError
from noisefit.base.files import check_regular
from noisefit.base.schema import checked

T = TypeVar("T")


def parse(text: bytes) -> Any:
    """What JSON says, without NaN and the infinities, and without halves of surrogate pairs, which cannot be drawn."""
    value = json.loads(text, parse_constant=lambda name: None)
    return json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))


def read_lines(path: Path, shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, as `checked` gives them; none where there is no such file.

    Raises:
        InputError: a line is no such object. The last may be torn: a run is writing it right now.
    """
    rows = (read_bytes(path) or b"").split(b"\n")
    found = []
    for number, text in enumerate(rows, 1):
        if text.strip():
            where = f"{path}: line {number}"
            try:
                found.append(checked(parse(text), shape, where))
            except (ValueError, RecursionError):
                if number < len(rows):
                    raise InputError(f"{where}: not JSON") from None
    return found


def ends_torn(path: Path) -> bool:
    """Whether the last line of a JSON Lines file is none that can be read: a run is writing it, or was killed there."""
    last = (read_bytes(path) or b"").rpartition(b"\n")[2]
    try:
        if last.strip():
            parse(last)
    except (ValueError, RecursionError):
        return True
    return False


def read_object(path: Path, shape: Mapping[str, Any]) -> dict[str, Any] | None:
    """The object of a JSON file, as `checked` gives it; whole for an empty shape, `None` where there is no such file.

    Raises:
        InputError: it has no such object.
    """
    text = read_bytes(path)
    if text is None:
        return None
    try:
        content = parse(text)
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON") from None
    return content | checked(content, shape, str(path))


def or_noted(read: Callable[[], T], lost: str, notes: list[str]) -> T | None:
    """What `read` reads; where that cannot be used `None`, and a sentence in `notes` on why and on what is lost by it.

    For what a page can do without: one broken record is no reason to show nothing.
    """
    try:
        return read()
    except InputError as error:
        notes.append(f"{error}; the page does not show {lost}.")
        return None


def read_bytes(path: Path) -> bytes | None:
    check_regular(path)
    try:
        return path.read_bytes() if path.exists() else None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
