"""A line before the first step where a micro-batch may not fit: how much it keeps, and what would make it less."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend
from torch import nn

from noisefit.base.compiling import are_compiled
from noisefit.base.random_state import random_state, restore_random_state
from noisefit.fork.hooks import INPUT
from noisefit.inputs.batches import epoch_order, row_lengths
from noisefit.method.policy import NoisePolicy, make_noise
from noisefit.run.footprint import Footprint, Way, measure
from noisefit.run.memory import free_memory
from noisefit.run.method_settings import POLICIES
from noisefit.run.noise_policy import first_eligible
from noisefit.run.optimizers import bytes_kept
from noisefit.run.preparation import Prepared
from noisefit.run.settings import Settings

GIB = 2**30
LARGE = 0.5  # share of the free memory from which on the line is given
HELPS = 0.8  # what leaves more than this of it is no help


def memory_needed(
    prepared: Prepared, model: nn.Module, policy: NoisePolicy, strategy: str, packing: bool = False
) -> str | None:  # fmt: skip
    """The line, or `None` where a micro-batch is small beside the memory that is free. All processes call it.

    The random generators are left as they were.

    Args:
        prepared: of the run.
        model: the prepared `BranchedModel`, not in the midst of a step.
        policy, strategy: as they were chosen.
        packing: whether rows are packed.
    """
    settings, accelerator = prepared.settings, prepared.accelerator
    dynamo = accelerator.state.dynamo_plugin
    if dynamo is not None and dynamo.backend != DynamoBackend.NO:
        return None  # it would compile for each of the lengths that are tried
    lengths = row_lengths(prepared.examples)
    longest = int(lengths.argmax())
    noise, state = make_noise(settings, policy), random_state(accelerator.device)
    with accelerator.no_sync(model):
        ids = torch.tensor(prepared.examples[longest].input_ids, device=accelerator.device)
        footprint = measure(model, ids, len(ids), noise, settings.objective.branches, packing)
    restore_random_state(state, accelerator.device)
    trained = [getattr(p, "_local_tensor", p) for p in model.parameters() if p.requires_grad]
    update = int((1 + bytes_kept(settings)) * sum(part.nbytes for part in trained))

    def largest(batch_size: int) -> tuple[int, int]:
        if not packing:
            return batch_size, int(lengths[longest])
        return 1, packed_tokens(lengths, settings.seed, prepared.rows_per_step, batch_size, accelerator.num_processes)

    logit_bytes = 4 if accelerator.mixed_precision == "no" else 2
    if not are_compiled(accelerator.device.type):
        logit_bytes = 0
    free = free_memory(accelerator.device)
    return told(settings, footprint, tuple(noise), strategy, largest, update, free, logit_bytes)


def packed_tokens(lengths: np.ndarray, seed: int, rows_per_step: int, batch_size: int, num_processes: int) -> int:
    """About as many tokens as the largest packed micro-batch of an epoch has: `cut_step` gives a step's micro-batches
    nearly equally many, and none is shorter than its longest row.

    Args:
        lengths: of all rows, `[rows]`.
        seed: of the run.
        rows_per_step: over all micro-batches and processes.
        batch_size, num_processes: of the run.
    """
    order = epoch_order(len(lengths), seed, epoch=0).numpy()
    of_steps = np.add.reduceat(lengths[order].astype(np.int64), range(0, len(order), rows_per_step))
    parts = math.ceil(min(rows_per_step, len(lengths)) / (batch_size * num_processes)) * num_processes
    return max(math.ceil(of_steps.max() / parts), int(lengths.max()))


def told(
    settings: Settings, footprint: Footprint, noisy: Sequence[int], strategy: str,
    largest: Callable[[int], tuple[int, int]], update: float, free: float, logit_bytes: int = 0,
) -> str | None:  # fmt: skip
    """The line for a model of this footprint.

    Args:
        settings: of the run.
        footprint: of its model.
        noisy: the layers with noise.
        strategy: as it was chosen.
        largest: the largest micro-batch of a `--batch_size`, rows and tokens of each; a packed one is one row.
        update: bytes of the gradients and of the optimizer's state.
        free: GiB; NaN where not known.
        logit_bytes: see `Way`.
    """
    way = Way(settings.objective.branches, tuple(noisy), strategy, settings.gradient_checkpointing,
              settings.loss_chunk_size, logit_bytes)  # fmt: skip
    rows, length = largest(settings.batch_size)
    needed = footprint.peak(way, rows, length)
    if not needed + update > LARGE * free * GIB:  # nor where that is not known
        return None
    helps = [
        (flag, footprint.peak(other, *largest(batch_size)))
        for flag, other, batch_size in _others(settings, footprint, way)
    ]
    lower = [(flag, _gib(less)) for flag, less in helps if less < HELPS * needed]
    how = ", ".join(f"{flag} {'' if i else 'makes it '}{less}" for i, (flag, less) in enumerate(lower))
    besides = f", and gradients and optimizer {_gib(update)}" if update > 0.05 * needed else ""
    return (
        f"a micro-batch of {rows} x {length} tokens takes about {_gib(needed)} GiB over the weights{besides}, of "
        f"{_gib(free * GIB)} GiB free" + (f"; {how}" if how else "")
    )


def _others(settings: Settings, footprint: Footprint, way: Way) -> Iterator[tuple[str, Way, int]]:
    """Flags that may make it less, with the way and the batch size that they give, each alone."""
    rows, layers = settings.batch_size, len(footprint.blocks)
    if not way.checkpointing:
        yield "--gradient_checkpointing", replace(way, checkpointing=True), rows
    elif way.strategy == "fork" and way.count > 1:
        yield "--branches separate", replace(way, strategy="separate"), rows
    late = first_eligible(0.5, layers)
    if settings.noise_policy in POLICIES and way.noisy and INPUT < way.noisy[0] < late and way.strategy == "fork":
        moved = tuple(late + i for i in range(min(len(way.noisy), layers - late)))
        if way.noisy[0] >= 0 and moved:
            yield "--prefer_late_layers 0.5", replace(way, noisy=moved), rows
    if smaller := smaller_batch(settings):
        yield smaller[0], way, smaller[1]
    if way.loss_chunk_size > 64:
        chunk = way.loss_chunk_size // 4
        yield f"--loss_chunk_size {chunk}", replace(way, loss_chunk_size=chunk), rows


def smaller_batch(settings: Any) -> tuple[str, int] | None:
    """The flags of the same step in smaller micro-batches, and their rows; `None` where they have one row."""
    if settings.batch_size == 1:
        return None
    parts = 2 if settings.batch_size % 2 == 0 else settings.batch_size  # so that a step keeps its rows
    rows, accumulation = settings.batch_size // parts, settings.gradient_accumulation_steps * parts
    return f"--batch_size {rows} --gradient_accumulation_steps {accumulation}", rows


def _gib(size: float) -> str:
    """Bytes in GiB, to two digits or the nearest one."""
    gib = size / GIB
    return f"{gib:.0f}" if gib >= 9.5 else f"{gib:.{max(1, 1 - math.floor(math.log10(max(gib, 1e-9))))}f}"
