"""Processes of a launch that work apart from each other, as with files, and meet again."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

from noisefit.base.errors import InputError

PATIENCE = timedelta(hours=24)  # for another process's disk: a download, a checkpoint of hundreds of GB
POLL_SECONDS = 0.05

_meetings = itertools.count()


@contextmanager
def apart(what: str) -> Iterator[bool]:
    """Work that the processes do apart and that may take long; at its end each waits for all. All processes enter it,
    one `apart` at a time, with no collective in it.

    They wait at the launch's store: a process that waits in a collective keeps its GPU busy, and ends at the group's
    time-out. An error that ends one of them here ends all of them, with its line. Of a process that ends elsewhere, the
    launcher of its machine tells the others there; on other machines they wait until `PATIENCE`, but for the one that
    holds the store.

    Args:
        what: is done, for the line.

    Yields:
        Whether this is the main process.

    Raises:
        InputError: another process had an error, holds the store and is gone, or takes longer than `PATIENCE`.
    """
    from accelerate import PartialState  # here, as it imports torch: seconds, also where only files are looked at

    state = PartialState()
    if state.num_processes == 1:
        yield True
        return
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    # Named by its number, which is the same on all: they enter the same ones in the same order.
    store, name = _get_default_store(), f"noisefit/{next(_meetings)}"
    over = f"{name}/over"
    try:
        yield state.is_main_process
    except BaseException as error:
        line = _line_for_others(error, what, state.process_index)
        with suppress(dist.DistError):  # the store may be gone, and the error is what matters
            store.set(over, line)
        time.sleep(6 * POLL_SECONDS)  # for the others to read it, as the store may end with this process
        if isinstance(error, InputError):
            raise type(error)(line) from error  # one line, whoever says it
        raise
    try:
        if store.add(f"{name}/done", 1) == state.num_processes:
            store.set(over, "")
        end = time.monotonic() + PATIENCE.total_seconds()
        while not store.check([over]):
            # Not `store.wait`, in which no signal is heard.
            time.sleep(POLL_SECONDS)
            if time.monotonic() > end:
                raise InputError(f"{what}: another process is not done after {PATIENCE}")
        problem = store.get(over).decode()
    except dist.DistError:
        raise InputError(f"{what}: the process that holds the launch together is gone") from None
    if problem:
        raise InputError(problem)


def _line_for_others(error: BaseException, what: str, rank: int) -> str:
    who = f"process {rank}, on {platform.node()}: " if rank else ""
    if isinstance(error, InputError):
        return f"{who}{error}"
    told = f"{type(error).__name__} {' '.join(str(error).split())[:300]}".strip()
    if isinstance(error, OSError) and error.strerror:
        told = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return f"{who}{what}: {told}"
