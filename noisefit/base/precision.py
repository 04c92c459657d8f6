"""Statistics and losses are computed in float32 or wider, whatever the model's dtype, and over real tokens."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator
from torch import Tensor

EPS = 1e-6  # of the published program: what keeps its quotients finite


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


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens.

    Args:
        values: `[B, L]` or `[B, L, H]`, floating point.
        mask: `[B, L]`, non-zero at real tokens; `None` where all are real.

    Returns:
        A scalar tensor of the dtype of `values`.
    """
    if mask is None:
        return values.mean()
    real = mask.bool().view(*mask.shape, *[1] * (values.dim() - 2))
    elements_per_token = values[0, 0].numel()
    # torch.where and not a product: a NaN at a padded position must not reach the sum.
    return torch.where(real, values, 0).sum() / (real.sum() * elements_per_token)


def mean_magnitude(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `|values|` over real tokens, `[B, L, H]` to a scalar tensor, float32 or wider."""
    return masked_mean(at_least_float32(values).abs(), mask)
