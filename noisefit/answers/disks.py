"""The processes of a launch and their disks: what one cannot do ends all of them, and each disk has one that owns what
is written there.

A launch may be of machines that share a disk, or of ones that each have their own. Which it is, is found by looking:
the main process writes a file, and whoever does not see it is on another disk.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from noisefit.base.errors import InputError, in_a_line, is_out_of_memory
from noisefit.base.files import alone_in, writing
from noisefit.base.meeting import apart

T = TypeVar("T")
MARK = ".noisefit_launch-"
OUR_MARK = re.compile(rf"{re.escape(MARK)}[0-9a-f]{{32}}")


def gathered(value: T) -> list[T]:
    """Every process's value, by the process's number. All processes call it.

    Raises:
        InputError: another process ended before.
    """
    from accelerate.utils import gather_object  # here, as it imports torch, which takes seconds

    try:
        found: list[T] = gather_object([value])
    except RuntimeError as error:  # gloo says that a peer is gone; with NCCL the launcher ends those that wait
        if is_out_of_memory(error):
            raise
        raise InputError("another process of the launch ended before its work was done; its own line says why "
                         f"({in_a_line(error)})") from None  # fmt: skip
    return found


def agreed(record: dict[str, Any]) -> dict[str, Any]:
    """The main process's record of what determines the answers. All processes call it.

    Raises:
        InputError: another process's differs: it has other flags, or other files on its disk.
    """
    decided: dict[str, Any] = gathered(record)[0]
    with apart("comparing settings"):
        if differing := sorted(name for name in record if record[name] != decided[name]):
            raise InputError(f"it has another {', '.join(differing)} than process 0, so its answers would not be of "
                             "one run with the others; give all the same flags and files")  # fmt: skip
    return decided


@contextmanager
def first_on_its_disk(folder: Path) -> Iterator[bool]:
    """Keep a folder to this launch, on each disk that its processes have. All processes enter it.

    The first process on each disk makes the folder there and locks it; of these the main process is one.

    Yields:
        Whether this process is the first on its disk.

    Raises:
        InputError: another launch writes there, or it cannot be made on one of the disks.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    index = PartialState().process_index
    name = f"{MARK}{uuid.uuid4().hex}"
    owner: int | None = None  # of the folder that this process sees
    with ExitStack() as stack:
        while None in (owners := gathered(owner)):
            first = owners.index(None)
            with apart(f"locking {folder}"):
                if first == index:
                    stack.enter_context(alone_in(folder))
                    owner = first
                    stack.callback(_remove_marks, folder)
                    _remove_marks(folder)  # of one that was killed; none but us has the folder
                    with writing(folder):
                        (folder / name).touch()
            [token] = broadcast_object_list([name], from_process=first)
            if owner is None and _sees(folder, token):
                owner = first
            gathered(owner)  # all have looked
            if first == index:
                _remove_marks(folder)
        yield owner == index


def _remove_marks(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if OUR_MARK.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _sees(folder: Path, name: str) -> bool:
    with suppress(OSError):
        os.listdir(folder.parent)  # a network filesystem looks anew at what is listed, not at what it remembers
        return name in os.listdir(folder)
    return False
