"""Writing to disk so that a kill or a full disk leaves what was there before, or all of the new."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from noisefit.errors import LocalError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def writing(path: Path, advice: str = "") -> Iterator[None]:
    """Turn a full disk, a folder that is read-only now and the like into one line that names `path`.

    Raises:
        LocalError: as said; `advice` ends the line.
    """
    try:
        yield
    except Exception as error:
        # safetensors and tokenizers have exceptions of their own for these, whose text says "(os error 28)".
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not isinstance(error, OSError) and number is None:
            raise
        reason = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or error
        raise LocalError(f"{path}: cannot be written: {reason}{advice}") from None


@contextmanager
def alone_in(folder: Path, wanted: bool = True) -> Iterator[None]:
    """Make a folder and keep it to this process, so that two runs do not mix what they write there.

    Args:
        folder: made where it does not exist.
        wanted: whether this process is the one that writes there; the others do nothing here.

    Raises:
        LocalError: another process has it, or it cannot be made.
    """
    if not wanted:
        yield
        return
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it at a kill
            except BlockingIOError:
                raise LocalError(
                    f"{folder}: another run is writing there; wait for its end, or choose another"
                ) from None
            except OSError:
                pass  # some network filesystems have no such locks
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Any) -> None:
    """Write JSON to `path`, whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise


def append_json_line(path: Path, content: Mapping[str, Any]) -> None:
    """Add a line to a JSON Lines file, whole or not at all."""
    with writing(path), path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        line = (json.dumps(content) + "\n").encode()
        try:
            if file.write(line) < len(line):  # a disk that fills up takes a part first
                file.write(line)  # and then says why
        except OSError:
            file.truncate(end)
            raise


def sync_folder(folder: Path) -> None:
    """Have the files of `folder`, and its own list of them, reach the disk, lest a power cut leave them empty."""
    for path in (*folder.iterdir(), folder):
        if path.is_file() or path == folder:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                # Some network filesystems have no such thing for a folder.
                with suppress(OSError) if path == folder else nullcontext():
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
