"""The losses, each the sum over tokens: the caller divides by the supervised tokens of the whole step.

NoiseFiT (arXiv 2504.03302), section 3: cross-entropy on the clean logits, a soft-target term from the clean to a
noisy branch, a consistency term from noisy branch 2 to noisy branch 1. R-Drop (arXiv 2106.14448): a symmetric KL
between two dropout branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from noisefit.base.precision import at_least_float32


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of `-log softmax(logits)[target]`.

    Args:
        logits: `[N, V]`; low-precision input is computed in float32.
        targets: `[N]`, int64, the token that each row predicts.

    Returns:
        A scalar tensor; 0, still tied to `logits`, where `N` is 0.
    """
    return F.cross_entropy(at_least_float32(logits), targets, reduction="sum")


def soft_target_loss(clean: Tensor, noisy: Tensor, temperature: float) -> Tensor:
    """Sum over tokens of `T^2 * KL(sg softmax(clean / T) || softmax(noisy / T))`, `sg` the stop-gradient.

    Args:
        clean, noisy: `[N, V]` logits. No gradient flows into `clean`.
        temperature: `T`; the factor `T^2` keeps gradients comparable over temperatures.

    Returns:
        A scalar tensor.
    """
    return _kl_divergence(clean, noisy, temperature)


def consistency_loss(noisy_1: Tensor, noisy_2: Tensor, temperature: float) -> Tensor:
    """Sum over tokens of `T^2 * KL(sg softmax(noisy_2 / T) || softmax(noisy_1 / T))`.

    Args:
        noisy_1, noisy_2: `[N, V]` logits. No gradient flows into `noisy_2`.
        temperature: `T`.

    Returns:
        A scalar tensor.
    """
    return _kl_divergence(noisy_2, noisy_1, temperature)


def symmetric_kl(logits_1: Tensor, logits_2: Tensor, temperature: float) -> Tensor:
    """Sum over tokens of `T^2 * 1/2 * [KL(p1 || p2) + KL(p2 || p1)]` with `p = softmax(logits / T)`: R-Drop's loss.

    Args:
        logits_1, logits_2: `[N, V]`. The gradient flows into both, through both sides of each divergence.
        temperature: `T`, 1 in the paper.

    Returns:
        A scalar tensor.
    """
    log_p1, log_p2 = (_log_softmax(logits, temperature) for logits in (logits_1, logits_2))
    # The two divergences in one sum: p1 * (log p1 - log p2) + p2 * (log p2 - log p1).
    return temperature**2 * 0.5 * ((log_p1.exp() - log_p2.exp()) * (log_p1 - log_p2)).sum()


def mean_over_branches(losses: Iterable[Tensor]) -> Tensor:
    """The mean of the same loss on several branches, each a scalar."""
    return torch.stack(list(losses)).mean()


def add_losses(sums: dict[str, Tensor], losses: Mapping[str, Tensor]) -> None:
    """Add losses to the sums of before, by name, in place and without gradient."""
    for name, value in losses.items():
        sums[name] = sums[name] + value.detach() if name in sums else value.detach()


def _kl_divergence(target: Tensor, predicted: Tensor, temperature: float) -> Tensor:
    if predicted is target:  # without noise the branches are one: zero, and so is the gradient
        return at_least_float32(predicted).new_zeros(())
    return _KLDivergence.apply(target.detach(), predicted, temperature)


class _KLDivergence(torch.autograd.Function):
    """`T^2 * KL(softmax(target / T) || softmax(predicted / T))`, summed over tokens.

    Its gradient has a closed form, `T * (softmax(predicted / T) - softmax(target / T))`, and is formed here and now.
    So one `[N, V]` is kept for backward, where autograd would keep two and go over them again.
    """

    @staticmethod
    def forward(ctx: Any, target: Tensor, predicted: Tensor, temperature: float) -> Tensor:
        log_target, log_predicted = (_log_softmax(logits, temperature) for logits in (target, predicted))
        target = log_target.exp()
        divergence = log_target.sub_(log_predicted).mul_(target).sum()
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(log_predicted.exp_().sub_(target))
            ctx.temperature, ctx.dtype = temperature, predicted.dtype
        return temperature**2 * divergence

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        if torch.is_grad_enabled():  # create_graph=True: autograd would take the saved difference for a constant
            raise NotImplementedError("the soft and consistency losses have no second derivative")
        [difference] = ctx.saved_tensors
        return None, (difference * (grad * ctx.temperature)).to(ctx.dtype), None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = at_least_float32(logits)
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
