"""How much memory a run takes, and what is said when it runs out in a step."""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil  # accelerate needs it, so it is there
import torch
from torch import Tensor

from noisefit.errors import LocalError, is_out_of_memory
from noisefit.resuming import list_checkpoints


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in GiB: the device's, or on a CPU the process's own."""
    if device.type != "cpu":
        most = getattr(torch.get_device_module(device), "max_memory_allocated", None)
        return most(device) / 2**30 if most is not None else math.nan  # Apple's has none
    try:
        import resource  # not on Windows
    except ImportError:
        return float(psutil.Process().memory_info().rss) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


@contextmanager
def naming_out_of_memory(args: Namespace, step: int, batch: Mapping[str, Tensor]) -> Iterator[None]:
    """Turn memory that runs out into one line that says with what batch, and what would help.

    Args:
        args: the run's settings.
        step: the number of the step that is being taken.
        batch: the micro-batch, as `collate` made it.

    Raises:
        LocalError: as said.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        rows, length = batch["input_ids"].shape
        helps = [] if args.gradient_checkpointing else ["--gradient_checkpointing"]
        if args.batch_size > 1:
            parts = 2 if args.batch_size % 2 == 0 else args.batch_size  # so that a step keeps its rows
            accumulation = args.gradient_accumulation_steps * parts
            helps.append(f"--batch_size {args.batch_size // parts} --gradient_accumulation_steps {accumulation}")
        if args.loss_chunk_size > 64:
            helps.append(f"--loss_chunk_size {args.loss_chunk_size // 4}")
        helps.append("a shorter --max_length")
        before = list_checkpoints(Path(args.output_model))  # not opened, for which there may be no memory
        resume = f"; --resume_from_checkpoint latest goes on from {before[-1].name}" if before else ""
        raise LocalError(
            f"step {step}: out of memory with {rows} rows of {length} tokens in a micro-batch, "
            f"{len(batch['target_tokens'])} of them supervised; any of these helps: {', '.join(helps)}{resume}"
        ) from None
