"""What is said when memory runs out in a step."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from noisefit.errors import LocalError, is_out_of_memory
from noisefit.resuming import list_checkpoints


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
