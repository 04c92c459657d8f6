"""Where a training step waits for the device: the place in the code of every wait, as often as a step has it."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_parts.material import ROOT, Row, scratch, train
from gpu_parts.training import flags

# The file of a wait that is known of, and what it is for.
EXPECTED = {
    "noisefit/run/processes.py": "whether the step's numbers are finite, once a step",
    "noisefit/run/metrics.py": "a line of metrics",
    "noisefit/inputs/batches.py": "the batch goes to the device",
    "transformers/masking_utils.py": "transformers looks for padding",
    "torch/amp/grad_scaler.py": "whether fp16's gradients are finite",
    "torch/optim/": "AdamW's counters, which are on the CPU: no wait of a GPU",
}
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2")

BETWEEN = ("gpu_parts/syncs.py", "torch/_dynamo/", "torch/_compile", "_python_dispatch", "warnings.py")

Place = tuple[str, str]
"""The innermost line of ours, and the innermost of all."""


def syncs(device: str, size: str) -> Iterator[Row]:
    """Two trainings of which one has two steps more: what it has more of is a step's."""
    precision = "bf16" if device == "cuda" else "no"
    with scratch() as folder:
        settings = flags(folder, size) | {"save_steps": 0, "logging_steps": 100}
        counts = []
        for steps in (2, 4):
            with waits(device) as found:
                train(device, precision, **settings | {"max_steps": steps, "output_model": str(folder / f"{steps}")})
            counts.append(found)
    short, long = counts
    yield {"text": "A step of two micro-batches; what waits in preparing, logging and saving is not counted."}
    for place, count in sorted(long.items()):
        if more := count - short[place]:
            yield as_row(place, more / 2)


def as_row(place: Place, times: float) -> Row:
    known = next((why for file, why in EXPECTED.items() if any(file in where for where in place)), None)
    ours, innermost = place
    return {"line of ours": ours, "where it waits": innermost, "times a step": times, "expected": known or "**no**"}


@contextmanager
def waits(device: str) -> Iterator[Counter[Place]]:
    """Counts the waits within by their place: as the driver tells them, or on a CPU the operations that would wait."""
    found: Counter[Place] = Counter()
    if device != "cuda":
        with _Operations(found):
            yield found
        return
    with warnings.catch_warnings():
        show = warnings.showwarning

        def note(message: Warning | str, *args: Any, **kwargs: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                found[place_of(_stack())] += 1
            else:
                show(message, *args, **kwargs)

        warnings.showwarning = note
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation.*")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[Place]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.overloadpacket.__name__ in WAITING:
            self.found[place_of(_stack())] += 1
        return function(*args, **(kwargs or {}))


def _stack() -> list[traceback.FrameSummary]:
    """The frames of whoever calls, outermost first, without their lines of code, which would have to be read."""
    return list(traceback.StackSummary.extract(traceback.walk_stack(None), lookup_lines=False))[::-1]


def place_of(stack: list[traceback.FrameSummary]) -> Place:
    """By the frames of a call. (What backward waits for is told at the line that calls it.)"""
    ours = [frame for frame in stack if in_project(frame.filename)]
    frames = [frame for frame in stack if not any(name in frame.filename for name in BETWEEN)]
    return _named(ours[-1]) if ours else "none", _named(frames[-1])


def in_project(filename: str) -> bool:
    return filename.startswith((f"{ROOT}/noisefit/", f"{ROOT}/train_loop.py"))


def _named(frame: traceback.FrameSummary) -> str:
    name = frame.filename.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
    return f"{name}:{frame.lineno} {frame.name}"
