"""The three losses, each the sum over tokens: the caller divides by the supervised tokens of the whole step.

NoiseFiT (arXiv 2504.03302), section 3: cross-entropy on the clean logits, a soft-target term from the clean to a
noisy branch, a consistency term from noisy branch 2 to noisy branch 1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from noisefit.precision import at_least_float32


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


def _kl_divergence(target: Tensor, predicted: Tensor, temperature: float) -> Tensor:
    log_target = F.log_softmax(at_least_float32(target.detach()) / temperature, dim=-1)
    log_predicted = F.log_softmax(at_least_float32(predicted) / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_predicted, log_target, reduction="sum", log_target=True)
