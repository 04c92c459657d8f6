"""What a user, rather than a programmer, is meant to read: one line each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Bad input. The message is one line: what is wrong where, what was expected, what to do."""


class LocalError(InputError):
    """What can happen to one process alone (its device is full, say), so that it has to say so itself."""


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn an `InputError` into one line on stderr and exit status 2, printed once however many processes have it."""
    try:
        yield
    except InputError as error:
        line = f"{program}: error: {' '.join(str(error).split())}"
        if isinstance(error, LocalError):
            print(line, file=sys.stderr, flush=True)
        else:
            notice(line)
        sys.exit(2)


def notice(*lines: str | None) -> None:
    """Lines for the user on stderr, printed by one process of the launch; `None` prints nothing."""
    if int(os.environ.get("RANK", "0")) == 0:
        for line in lines:
            if line is not None:
                print(line, file=sys.stderr, flush=True)
