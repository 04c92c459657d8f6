"""Reading and writing so that nobody's file is lost: whole or not at all, one process a folder, no name taken over."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from noisefit.base.errors import InputError, LocalError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SAMPLE = 2**20  # bytes at either end of a file, where all of it would take long


def check_regular(path: Path, where: str = "") -> None:
    """Raise `InputError` where reading `path` would wait for somebody or never end: a pipe, a device; or a folder.

    Args:
        path: it need not exist.
        where: stands before the path in the line.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # not there, or not to be looked at: whoever opens it says so
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise InputError(f"{where}{path}: {what}, expected a file")


def read_text(path: Path, where: str = "") -> str:
    """The text of a file that a user named, UTF-8 with or without a byte-order mark.

    Raises:
        InputError: it is no file, cannot be read, or is not UTF-8.
    """
    check_regular(path, where)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{where}{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{where}{path}: not UTF-8 text") from None


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

    A folder that is still empty at the end, and was made here, goes again.

    Args:
        folder: made where it does not exist.
        wanted: whether this process is the one that writes there; the others do nothing here.

    Raises:
        LocalError: another process has it, or it cannot be made.
    """
    if not wanted:
        yield
        return
    made: list[Path] = []
    try:
        descriptor = _lock(folder, made)
        try:
            yield
        finally:
            _remove_empty(made)
            os.close(descriptor)  # the lock goes last: who gets it next finds what is there now
    finally:
        _remove_empty(made)


def _lock(folder: Path, made: list[Path]) -> int:
    """A descriptor of the folder, which holds its lock; the folders that were made for it are added to `made`."""
    while True:
        with writing(folder):
            missing = [parent for parent in (folder, *folder.parents) if not os.path.lexists(parent)]
            folder.mkdir(parents=True, exist_ok=True)
            made.extend(parent for parent in missing if parent not in made)
            try:
                descriptor = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:  # another run that had made it was refused
                continue
        try:
            if fcntl is None:
                return descriptor
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it at a kill
            except BlockingIOError:
                made.clear()  # whoever has it needs them
                raise LocalError(
                    f"{folder}: another run is writing there; wait for its end, or choose another"
                ) from None
            except OSError:
                return descriptor  # some network filesystems have no such locks
            with suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # it was removed before the lock was had: again


def free_lock(folder: Path) -> int | None:
    """A descriptor that holds a folder's lock; `None` where another process has it, or there are no such locks."""
    if fcntl is None:
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _remove_empty(folders: list[Path]) -> None:
    while folders:
        with suppress(OSError):
            folders.pop(0).rmdir()


@contextmanager
def replacing(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """A file to be written, which takes the place of `path` at the end: whole or not at all.

    Args:
        path: what is to be written.
        scratch: a folder on the same disk for the file until then; by default beside `path`, under a name that nobody
            has.

    Yields:
        The path to write to.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", suffix=".tmp", dir=scratch or path.parent)
    os.close(descriptor)
    beside = Path(name)
    try:
        give_usual_mode(beside)
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any, scratch: Path | None = None) -> None:
    """Write JSON to `path`, whole or not at all; `scratch` as for `replacing`."""
    with writing(path), replacing(path, scratch) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def append_json_line(path: Path, content: Mapping[str, Any]) -> None:
    """Add a line to a JSON Lines file, whole or not at all."""
    append_whole(path, (json.dumps(content) + "\n").encode())


def append_whole(path: Path, content: bytes) -> None:
    """Add bytes to a file, all of them or none.

    Raises:
        LocalError: the file cannot be written.
    """
    with writing(path), path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            written = file.write(content)
            while written < len(content):  # a disk that fills up takes a part first
                written += file.write(content[written:])  # and then says why
        except OSError:
            file.truncate(end)
            raise


def give_usual_mode(path: Path) -> None:
    """The permissions of any new file: temporary files, and safetensors', are for their owner's eyes alone."""
    path.chmod(0o666 & ~_UMASK)


def sync_file(path: Path) -> None:
    """Have a file's content reach the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


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


def files_in(folder: Path) -> list[str]:
    """The paths of all files in a folder and its folders, relative to it; also of links and the like."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in found)


def ends_of(path: Path) -> bytes:
    """The first and the last megabyte of a file, by which another one of its size is told from it."""
    with path.open("rb") as file:
        start = file.read(SAMPLE)
        file.seek(max(path.stat().st_size - SAMPLE, 0))
        return start + file.read(SAMPLE)


def fingerprint(path: Path) -> list[int | str]:
    """A file's size, and the SHA-256 of its two ends."""
    return [path.stat().st_size, hashlib.sha256(ends_of(path)).hexdigest()]


def _read_umask() -> int:
    mask = os.umask(0)  # it cannot be read without being set
    os.umask(mask)
    return mask


_UMASK = _read_umask()  # here, where no other thread makes a file meanwhile
