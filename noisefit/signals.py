"""SIGTERM and SIGINT, as schedulers and people send them: the step is finished, a checkpoint written, the run ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from noisefit.errors import on_main_process

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


class StopSignals:
    """While it is entered, a first SIGTERM or SIGINT is noted in `received`, and a second one ends the process at once.

    It also asks the system for a SIGTERM when `accelerate launch` dies: with one process the launcher passes no signal
    on, and the run would train on without it.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python does not allow it
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
            _end_with_launcher(signal.SIGTERM)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            _end_with_launcher(None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        if on_main_process():
            # Not print: the signal may have come in the midst of one, which is an error.
            os.write(2, f"\n{self.received}: ending after this step; a second one ends at once\n".encode())


def _end_with_launcher(number: signal.Signals | None) -> None:
    """Have the system send this process a signal when its parent ends; `None`: no longer. Linux has that."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:  # which every accelerate launch sets
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0 if number is None else int(number))
