"""What a user, rather than a programmer, is meant to read: one line each."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class InputError(Exception):
    """Bad input. The message is one line: what is wrong where, what was expected, what to do."""


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn an `InputError` into one line on stderr and exit status 2, printed by one process of the launch."""
    try:
        yield
    except InputError as error:
        notice(f"{program}: error: {' '.join(str(error).split())}")
        sys.exit(2)


def notice(*lines: str | None) -> None:
    """Lines for the user on stderr, printed by one process of the launch; `None` prints nothing."""
    if int(os.environ.get("RANK", "0")) == 0:
        for line in lines:
            if line is not None:
                print(line, file=sys.stderr, flush=True)
