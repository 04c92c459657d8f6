"""Statistics and losses are computed in float32 or wider, whatever the model's dtype, and over real tokens; and what is
added to numbers of 16 bits arrives there."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from noisefit.base.compiling import fused
from noisefit.base.errors import is_out_of_memory

EPS = 1e-6  # of the published program: what keeps its quotients finite
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # the low bits of a float32 that the dtype has no place for


def keep_float32_when_sharded(accelerator: Accelerator) -> None:
    """FSDP in mixed precision: compute in 16 bits, but add up in float32. To be called before `prepare`.

    Left to itself, accelerate has FSDP also reduce the gradients in 16 bits, and round what leaves the model to
    them: here that is the sums of the losses, which would keep three digits.
    """
    if accelerator.is_fsdp2 and (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
        exact = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
        accelerator.state.fsdp_plugin.mixed_precision_policy = exact


def set_precision(accelerator: Accelerator) -> str | None:
    """What a training computes with, beyond what accelerate does of itself. To be called before `prepare`.

    Products of float32 are TF32's on CUDA, as in most trainings: with 10 bits of each factor, summed up in float32.

    Returns:
        A line where the launch could be faster.
    """
    keep_float32_when_sharded(accelerator)
    if accelerator.device.type != "cuda":
        return None
    _set_tf32(True)
    if accelerator.mixed_precision != "no":
        return None
    return ("the launch has no mixed precision: everything is float32, which takes twice the memory of 16 bits, and "
            "more time; give accelerate launch --mixed_precision bf16 (fp16 where the GPU has no bf16)")  # fmt: skip


@contextmanager
def keeping_tf32() -> Iterator[None]:
    """Whatever is set within it, whether products of float32 are TF32's is afterwards as it was before."""
    before = _has_tf32()
    try:
        yield
    finally:
        _set_tf32(before)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Within it products of float32 are exact ones, for what is compared or promised to the last digits."""
    with keeping_tf32():
        _set_tf32(False)
        yield


def _has_tf32() -> bool:
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def _set_tf32(on: bool) -> None:
    if on != _has_tf32():
        # The one setter that newer and older names of the setting agree on; to mix them is an error in torch.
        torch.set_float32_matmul_precision("high" if on else "highest")


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` itself where it is float32 or float64, else its float32 copy."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def as_float64(tensor: Tensor) -> Tensor:
    """A float64 copy: on the tensor's own device, or on the CPU where that device has no float64 (Apple's MPS)."""
    return tensor.double() if has_float64(tensor.device) else tensor.cpu().double()


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64. Tried, as no list of those that do not would be whole."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
        return True
    except (TypeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return False


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


def row_lengths(mask: Tensor) -> Tensor:
    """How many real tokens the row of each token has.

    Args:
        mask: `[B, L]` int64, 0 at padding, else the same number throughout a row: 1, or its own where rows are packed.

    Returns:
        `[B, L]` int64; at padding that of all padding.
    """
    counts = mask.new_zeros(len(mask), mask.shape[1] + 1).scatter_add_(1, mask, torch.ones_like(mask))
    return counts.gather(1, mask)


@fused
def mean_magnitude(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `|values|` over real tokens, `[B, L, H]` to a scalar tensor, float32 or wider."""
    # First over each token, so that the mask has a number a token to go over.
    return masked_mean(at_least_float32(values).abs().mean(dim=-1), mask)


@fused
def mean_change(before: Tensor, after: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `|after - before|` over real tokens, `[B, L, H]` to a scalar tensor, float32 or wider."""
    return mean_magnitude(at_least_float32(after) - at_least_float32(before), mask)


@fused
def root_mean_square(values: Tensor, mask: Tensor | None) -> Tensor:
    """Over real tokens, `[B, L, H]` to a scalar tensor, float32 or wider."""
    squares = at_least_float32(values).norm(dim=-1).square() / values.shape[-1]
    return masked_mean(squares, mask).sqrt()


def add_noise(hidden_states: Tensor, noise: Tensor) -> Tensor:
    """`hidden_states + noise`, in the dtype of the former; of 16 bits, rounded so that the noise arrives.

    Most elements of a bfloat16 tensor round noise of a thousandth of their size away. So the sum is formed in float32
    and rounded up or down by chance, each as likely as it is near (stochastic rounding). On average an element moves by
    its noise, and as it starts on the dtype's own grid, by `|noise|` in size: the mean of both arrives exactly. The
    spread is wider, by that of the rounding: noise far under a step of the grid arrives as a few whole steps. The
    chance is a hash of the noise and of the element's place: no further random numbers are drawn, and the same noise in
    the same place always arrives the same way. (In float16 none of this holds below its normal numbers, 6e-5.)

    Args:
        hidden_states: `[B, L, H]`.
        noise: `[B, L, H]`, of that dtype or float32. The gradient is that of a sum.
    """
    if hidden_states.dtype not in DROPPED_BITS:
        return hidden_states + noise
    total: Tensor = _StochasticSum.apply(hidden_states, noise)
    return total


@fused
def _stochastic_sum(hidden_states: Tensor, noise: Tensor) -> Tensor:
    bits = DROPPED_BITS[hidden_states.dtype]
    noise = noise.float()
    total = hidden_states.float() + noise
    # Fibonacci hashing: a product's high bits depend on all bits of its factors.
    chance = torch.arange(noise.numel(), dtype=torch.int32, device=noise.device).view_as(noise)
    chance.add_(noise.view(torch.int32)).mul_(-1640531527)
    chance.bitwise_right_shift_(32 - bits).bitwise_and_((1 << bits) - 1)
    rounded = chance.add_(total.view(torch.int32)).bitwise_and_(-(1 << bits)).view(torch.float32)
    # A NaN's bits may overflow. (On a CPU, isnan costs as much as all of the above.)
    return torch.where(total == total, rounded, total).to(hidden_states.dtype)


class _StochasticSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, noise: Tensor) -> Tensor:
        ctx.noise_dtype = noise.dtype
        return _stochastic_sum(hidden_states, noise)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        return grad, grad.to(ctx.noise_dtype) if ctx.needs_input_grad[1] else None
