"""SIGTERM and SIGINT, as schedulers and people send them: the step is finished, a checkpoint written, the run ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from noisefit.base.errors import on_main_process

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ORPHANED = signal.SIGUSR1  # sent by the system when `accelerate launch` dies
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h
_LAUNCHERS = {b"accelerate", b"accelerate-launch", b"accelerate.commands.launch"}


def end_with_launcher() -> None:
    """Have a run that is still loading end with `accelerate launch`: a launcher of one process tells nobody."""
    if _launched():
        _end_with_parent(signal.SIGTERM)


class StopSignals:
    """While it is entered, a first SIGTERM or SIGINT is noted in `received`, and a second one ends the process at once.

    `accelerate launch` with one process passes no signal on: it dies, and the run would train on without it. So the
    system is asked for a signal when the launcher dies. That one counts as a first signal and never as a second, as it
    follows a Ctrl-C or a scheduler's signal to all processes of a job.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._when: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow it
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            if _launched():
                self._before[ORPHANED] = signal.signal(ORPHANED, self._note)
                _end_with_parent(ORPHANED)
        return self

    def __exit__(self, *error: object) -> None:
        if ORPHANED in self._before:
            _end_with_parent(signal.SIGTERM)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._when is None
        if first:  # no call since the line before: in one, Python would handle the next signal, as another first one
            self._when = now
            self.received = signal.Signals(number).name
            if on_main_process():
                # Not print: the signal may have come in the midst of one, which is an error.
                what = "the launcher ended" if number == ORPHANED else self.received
                os.write(2, f"\n{what}: ending after this step; a second one ends at once\n".encode())
        elif number != ORPHANED and not self._is_the_same(now):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _is_the_same(self, now: float) -> bool:
        """A scheduler that signals every process of a job reaches this one twice: the launcher of several processes
        passes the signal on."""
        return "TORCHELASTIC_RUN_ID" in os.environ and self._when is not None and now - self._when < 1


def _launched() -> bool:
    """Whether the parent is `accelerate launch`. Linux alone tells, and can be asked for a signal."""
    if sys.platform != "linux":
        return False
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(word.rpartition(b"/")[2] in _LAUNCHERS for word in words)


def _end_with_parent(number: signal.Signals) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
