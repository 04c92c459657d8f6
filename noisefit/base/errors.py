"""What a user, rather than a programmer, is meant to read: one line each."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

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

    The exit status is 2 for an `InputError`, for what the system refuses (a file, a disk) and for memory that ran out,
    75 for `Stopped`, and for a SIGINT that nothing else took that of a process which the signal ended.
    """
    stderr = sys.stderr
    try:
        _steady_streams()
        _check_ranks()
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # here, where a full disk behind it is still told
    except Stopped as stopped:
        notice(str(stopped))
        sys.exit(STOPPED)
    except InputError as error:
        if not on_main_process() and not isinstance(error, LocalError):
            # Where all have the error, the main process says it and the launcher ends the others within this time.
            time.sleep(SECONDS_ALONE)
        _say(f"{program}: error: {_one_line(error)}")
        sys.exit(2)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        _say(f"{program}: error: {_one_line(f'{where}{error.strerror or error}')}")
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
    finally:
        sys.stderr = stderr
        for stream in (sys.stdout, stderr):
            _drop_unwritten(stream)


def _drop_unwritten(stream: TextIO | None) -> None:
    """Let go of what a stream could not write: Python would try again as it ends, and make that the exit status."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError):
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), cast(TextIO, stream).fileno())


def notice(*lines: str | None) -> None:
    """Lines for the user on stderr, printed by one process of the launch; `None` prints nothing."""
    if on_main_process():
        for line in lines:
            if line is not None:
                _say(line)


def on_main_process() -> bool:
    """Whether this process is the one of its launch that speaks."""
    return os.environ.get("RANK", "0").strip() in ("", "0")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of a device or of the machine."""
    from accelerate.utils.memory import should_reduce_batch_size  # here, as it imports torch: seconds

    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def in_a_line(error: BaseException, most: int = 200) -> str:
    """What an error says, in one line of so many letters; its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def _check_ranks() -> None:
    """Raise `InputError` where the variables by which a launch numbers its processes hold something else."""
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        text = os.environ.get(name)
        if text is not None and not (text.isascii() and text.isdecimal() and len(text) < 10):
            raise InputError(f"the environment has {name}={text!r}, expected a number, as `accelerate launch` sets it; "
                             f"unset {name}")  # fmt: skip
        numbers[name] = None if text is None else int(text)
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        number, count = numbers[rank], numbers[size]
        if number is not None and count is not None and number >= count:
            raise InputError(f"the environment has {rank}={number} and {size}={count}: there is no such process; start "
                             "the program with `accelerate launch`")  # fmt: skip


class _Steady:
    """A stream whose disk may be full or whose reader may be gone: what cannot be written there is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _steady_streams() -> None:
    """What we say must not end what we do: a training goes on though nobody hears it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed; the next file that is opened would get this number, and what others write to it
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:  # it was closed before Python came to it
        sys.stderr = io.StringIO()
    sys.stderr = cast(TextIO, _Steady(sys.stderr))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # letters that it has no bytes for


def _one_line(error: BaseException | str) -> str:
    """Its text without line ends, nor what would move a terminal's cursor: parts of it may come from a file."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(error).split()))


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)  # above a progress bar rather than into it
    sys.stderr.flush()
