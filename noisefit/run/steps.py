"""What becomes of an optimizer step: taken, skipped where its numbers are none, or ended where memory runs out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from noisefit.base.compiling import failure_of_compiler
from noisefit.base.errors import InputError, LocalError, is_out_of_memory, notice
from noisefit.run.checkpoint_files import list_checkpoints
from noisefit.run.memory_needed import smaller_batch
from noisefit.run.optimizers import build_optimizer
from noisefit.run.settings import Settings


def make_optimizer(settings: Settings, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of `--optim` over what of the model is trained.

    Args:
        settings: of the run.
        model: before it is prepared.
        device: that the run computes on.
    """
    return build_optimizer(settings, [parameter for parameter in model.parameters() if parameter.requires_grad], device)


def take_step(optimizer: Any, schedule: LRScheduler, step: int, bad: bool, bad_steps: int, most: int) -> int:
    """Take the optimizer's step and the schedule's, or neither where the step's loss or gradient is not finite.

    A bad step touches no weight: without gradients no optimizer of `--optim` changes anything, not even by weight
    decay. Its `step` is still called, as fp16's scaler lowers its scale there. The learning rate waits, and a line says
    so.

    Args:
        optimizer: as `Accelerator.prepare` gave it.
        schedule: of the learning rate, not prepared.
        step: its number.
        bad: the same on all processes.
        bad_steps: how many in a row came before it.
        most: the value of `--max_bad_steps`.

    Returns:
        How many in a row there are now.

    Raises:
        InputError: they are as many as `--max_bad_steps`.
    """
    if bad:
        optimizer.zero_grad()
    optimizer.step()
    optimizer.zero_grad()
    if not bad:
        schedule.step()
        return 0
    bad_steps += 1
    what = f"step {step}: the loss or its gradient is not a finite number"
    if bad_steps >= most:
        raise InputError(
            f"{what}, {bad_steps} steps in a row (--max_bad_steps); lower --learning_rate or --noise_std, use bf16 "
            "instead of fp16, or look at the rows of these steps. No weight was touched by them"
        )
    notice(f"{what}; the step is skipped ({bad_steps} in a row, the run ends at {most})")
    return bad_steps


@contextmanager
def naming_failures(settings: Settings, step: int, batch: Mapping[str, Any]) -> Iterator[None]:
    """Turn memory that runs out, and what compiling has made and fails, into one line that says what would help.

    Args:
        settings: of the run.
        step: the number of the step that is being taken.
        batch: the micro-batch, as `collate` made it.

    Raises:
        LocalError: as said.
    """
    try:
        yield
    except Exception as error:  # of memory, or of what compiling has made; any other goes on its way
        compiling = failure_of_compiler(error, batch["input_ids"].device.type)
        if compiling is None and not is_out_of_memory(error):
            raise
        before = list_checkpoints(Path(settings.output_model))  # not opened, for which there may be no memory
        resume = f"; --resume_from_checkpoint latest goes on from {before[-1].name}" if before else ""
        if compiling is not None:
            raise LocalError(f"step {step}: {compiling}{resume}") from None
        rows, length = batch["input_ids"].shape
        shape = f"{rows} rows of {length} tokens"
        if packing := batch.get("packing"):
            shape = f"{len(packing.borders) - 1} rows, packed into {length} tokens,"
        helps = [] if settings.gradient_checkpointing else ["--gradient_checkpointing"]
        if smaller := smaller_batch(settings):
            helps.append(smaller[0])
        if settings.loss_chunk_size > 64:
            helps.append(f"--loss_chunk_size {settings.loss_chunk_size // 4}")
        helps.append("a shorter --max_length")
        raise LocalError(
            f"step {step}: out of memory with {shape} in a micro-batch, "
            f"{len(batch['target_tokens'])} of them supervised; any of these helps: {', '.join(helps)}{resume}"
        ) from None
