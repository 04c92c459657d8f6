"""Ending a run on all its processes."""

from __future__ import annotations

import os
import time

import torch
from accelerate import Accelerator
from torch import Tensor

from noisefit.errors import InputError

QUIET_SECONDS = 0.5


def check_processes(accelerator: Accelerator) -> None:
    """Raise `InputError` where a launch started several processes that do not know of each other.

    On a machine without GPUs a launch for GPUs does, and each of them would write to the same folder.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise InputError(
            f"the launch started {started} processes, but each is alone: on a CPU, set ACCELERATE_USE_CPU=true in "
            "the environment of accelerate launch"
        )


def on_any_process(accelerator: Accelerator, *conditions: bool | Tensor) -> list[bool]:
    """Which of the conditions hold on at least one process: what all must agree on. All processes call it.

    It is one small reduction, and the one time in a step that a GPU is waited for.
    """
    device = accelerator.device
    votes = torch.stack([torch.as_tensor(c, device=device).float() for c in conditions])
    return [count > 0 for count in accelerator.reduce(votes, "sum").tolist()]


def finish(accelerator: Accelerator) -> None:
    """End the run. All processes call it, as their last act.

    gloo's own thread lets go of a collective a moment after the collective is done, and needs Python's lock for it. A
    process that frees its process group within that moment holds the lock while it waits for that thread: it hung so
    at the end of about one in six runs of two CPU processes. Sleeping gives the lock away.
    """
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        time.sleep(QUIET_SECONDS)
    accelerator.end_training()
