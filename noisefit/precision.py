"""Statistics and losses are computed in float32 or wider, whatever the model's dtype."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator
from torch import Tensor


def keep_float32_when_sharded(accelerator: Accelerator) -> None:
    """FSDP in mixed precision: compute in 16 bits, but add up in float32. To be called before `prepare`.

    Left to itself, accelerate has FSDP also reduce the gradients in 16 bits, and round what leaves the model to
    them: here that is the sums of the losses, which would keep three digits.
    """
    if accelerator.is_fsdp2 and (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
        exact = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        accelerator.state.fsdp_plugin.mixed_precision_policy = exact


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` itself where it is float32 or float64, else its float32 copy."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
