"""What a user, rather than a programmer, is meant to read: one line each."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_ALONE = 3
STOPPED = 75  # the status of a run that was asked to stop and can be resumed; EX_TEMPFAIL of sysexits.h


class InputError(Exception):
    """Bad input. The message is one line: what is wrong where, what was expected, what to do."""


class LocalError(InputError):
    """What can happen to one process alone (its device is full, say), so that it has to say so itself."""


class Stopped(Exception):
    """The run was asked to stop, and did. The message is one line: where it stands and how to resume it."""


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn errors that a user can mend into one line on stderr, said once however many processes have it.

    The exit status is 2 for an `InputError` or for memory that ran out, 75 for `Stopped`, and for a SIGINT that nothing
    else took that of a process which the signal ended.
    """
    try:
        yield
    except Stopped as stopped:
        notice(str(stopped))
        sys.exit(STOPPED)
    except InputError as error:
        if not on_main_process() and not isinstance(error, LocalError):
            # Where all have the error, the main process says it and the launcher ends the others within this time.
            time.sleep(SECONDS_ALONE)
        _say(f"{program}: error: {_one_line(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        notice(f"{program}: interrupted")
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # so that the shell or script around it sees an interruption
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _say(f"{program}: error: out of memory: {_one_line(error)[:200]}")
        sys.exit(2)


def notice(*lines: str | None) -> None:
    """Lines for the user on stderr, printed by one process of the launch; `None` prints nothing."""
    if on_main_process():
        for line in lines:
            if line is not None:
                _say(line)


def on_main_process() -> bool:
    """Whether this process is the one of its launch that speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of the machine."""
    from accelerate.utils.memory import should_reduce_batch_size  # here, as it imports torch: seconds

    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def _one_line(error: BaseException) -> str:
    """Its text without line ends, nor what would move a terminal's cursor: parts of it may come from a file."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(error).split()))


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above a progress bar rather than into it
    sys.stderr.flush()
