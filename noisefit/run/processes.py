"""The processes of a launch: starting them, what they agree on, their progress, their end."""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from accelerate.utils.fsdp_utils import disable_fsdp_ram_efficient_loading
from torch import Tensor, nn
from tqdm import tqdm

from noisefit.base.errors import InputError, in_a_line, is_out_of_memory

# For a collective, in which processes wait for no more than each other's computing; NCCL's own 10 minutes are less than
# a calibration of unequal rows may take.
PATIENCE = timedelta(hours=2)
QUIET_SECONDS = 0.5


def start_accelerator(patience: timedelta = PATIENCE, **options: Any) -> Accelerator:
    """The launch's `Accelerator`. What it cannot have is a line: fp8 or DeepSpeed that is not installed, a device that
    cannot do the mixed precision, a process group that does not come together.

    Args:
        patience: how long a process waits in a collective for the others.
        options: for `Accelerator`.

    Raises:
        InputError: as said.
    """
    try:
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=patience)], **options)
    except Exception as error:  # of accelerate, torch, and whatever integration the launch asks for
        if is_out_of_memory(error):
            raise
        reason = in_a_line(error, 300)
        raise InputError(f"the launch cannot be what it asks for: {reason}; see `accelerate launch --help`") from None
    if accelerator.distributed_type == DistributedType.FSDP:
        # Else transformers has zeros for weights on all processes but one a node (5.17), where `noisefit.run.sharding`
        # does not see to it, or reads them on all (5.23).
        disable_fsdp_ram_efficient_loading()
    return accelerator


def check_processes(accelerator: Accelerator, quantization: str = "none") -> None:
    """Refuse a launch whose processes would not do together what is asked for.

    Args:
        accelerator: of the run.
        quantization: the value of `--quantization`.

    Raises:
        InputError: the processes do not know of each other, as those of a launch for GPUs on a machine without, and
            would write to the same folder; or they shard the model in a way that is not supported.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise InputError(
            f"the launch started {started} processes, but each is alone: on a CPU, set ACCELERATE_USE_CPU=true in "
            "the environment of accelerate launch"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise InputError("the launch asks for FSDP 1; set fsdp_version: 2 in its configuration")
        if accelerator.state.fsdp_plugin.activation_checkpointing:
            # It computes a block again without knowing of which branches.
            raise InputError(
                "the launch asks for fsdp_activation_checkpointing; set it to false, and give --gradient_checkpointing"
            )
        if quantization != "none":
            raise InputError(f"--quantization {quantization} does not go with FSDP; leave one of them out")
    elif accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(f"the launch asks for {accelerator.distributed_type.value}; use DDP or FSDP")


def reduction(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager:
    """Within it, backward reduces a micro-batch's gradients over the processes as the way of sharding wants it.

    DDP reduces once a step, with the last micro-batch. FSDP2 does so with each: in its `no_sync` every process would
    keep the whole gradients of all weights until then, 280 GB for 70B parameters in float32. The sums are the same.
    An adapter's gradients are small either way, and so is their traffic beside that of the frozen weights, which are
    gathered for each micro-batch.

    Args:
        accelerator: of the run.
        model: the prepared `BranchedModel`.
        last: whether it is the step's last micro-batch.
    """
    return nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(model)


def on_any_process(accelerator: Accelerator, *conditions: bool | Tensor) -> list[bool]:
    """Which of the conditions hold on at least one process: what all must agree on. All processes call it.

    It is one small reduction, and the one time in a step that a GPU is waited for.
    """
    device = accelerator.device
    votes = torch.stack([torch.as_tensor(c, device=device).float() for c in conditions])
    return [count > 0 for count in accelerator.reduce(votes, "sum").tolist()]


def progress_bar(accelerator: Accelerator, total: int, what: str, unit: str, initial: int = 0) -> tqdm:
    """A bar on the main process; in a log file, which keeps every update, a rarely updated one."""
    interval = 0.1 if sys.stderr.isatty() else 20
    main = accelerator.is_main_process
    return tqdm(total=total, initial=initial, desc=what, unit=unit, mininterval=interval, disable=not main)


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
