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
from noisefit.method.top_k import TopK


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over tokens of `-log softmax(logits)[target]`, times the token's weight where there are weights.

    Args:
        logits: `[N, V]`; low-precision input is computed in float32.
        targets: `[N]`, int64, the token that each row predicts.
        weights: `[N]`; `None` for 1 each.

    Returns:
        A scalar tensor; 0, still tied to `logits`, where `N` is 0.
    """
    if weights is None:
        return F.cross_entropy(at_least_float32(logits), targets, reduction="sum")
    return (F.cross_entropy(at_least_float32(logits), targets, reduction="none") * weights).sum()


TEMPERATURE_ON = ("both", "teacher")


def soft_target_loss(
    clean: Tensor | TopK, noisy: Tensor, temperature: float, temperature_on: str = "both",
    teacher_gradient: bool = False,
) -> Tensor:  # fmt: skip
    """Sum over tokens of `T^2 * KL(sg softmax(clean / T) || softmax(noisy / T))`, `sg` the stop-gradient.

    Args:
        clean, noisy: `[N, V]` logits. No gradient flows into `clean`, which may be predictions that were kept, softened
            by `T` already.
        temperature: `T`; the factor `T^2` keeps gradients comparable over temperatures.
        temperature_on: `teacher`: `KL(softmax(clean / T) || softmax(noisy))`, without `T^2`, as in the first published
            program (and in `kl_only` of the second).
        teacher_gradient: let the gradient flow into `clean` too, as there.

    Returns:
        A scalar tensor.
    """
    if isinstance(clean, TopK):
        t = 1.0 if temperature_on == "teacher" else temperature
        return t**2 * clean.divergence(noisy, t)
    if temperature_on == "teacher":
        return _kl_divergence(clean, noisy, (temperature, 1.0), teacher_gradient)
    return temperature**2 * _kl_divergence(clean, noisy, (temperature, temperature), teacher_gradient)


def consistency_loss(
    noisy_1: Tensor, noisy_2: Tensor, temperature: float, temperature_on: str = "both", teacher_gradient: bool = False
) -> Tensor:
    """Sum over tokens of `T^2 * KL(sg softmax(noisy_2 / T) || softmax(noisy_1 / T))`.

    Args:
        noisy_1, noisy_2: `[N, V]` logits. No gradient flows into `noisy_2`.
        temperature: `T`.
        temperature_on: `teacher`: without any, as in the first published program: the clean teacher alone has one.
        teacher_gradient: let the gradient flow into `noisy_2` too, as there.

    Returns:
        A scalar tensor.
    """
    t = 1.0 if temperature_on == "teacher" else temperature
    return t**2 * _kl_divergence(noisy_2, noisy_1, (t, t), teacher_gradient)


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


def _kl_divergence(target: Tensor, predicted: Tensor, temperatures: tuple[float, float], both: bool) -> Tensor:
    """`KL(softmax(target / T1) || softmax(predicted / T2))`, summed; a gradient into `target` where `both` is true."""
    if predicted is target and temperatures[0] == temperatures[1]:
        return at_least_float32(predicted).new_zeros(())  # without noise the branches are one, and so is the gradient
    divergence: Tensor = _KLDivergence.apply(target if both else target.detach(), predicted, *temperatures)
    return divergence


class _KLDivergence(torch.autograd.Function):
    """`KL(p || q)`, summed over tokens, with `p = softmax(target / T1)` and `q = softmax(predicted / T2)`.

    Its gradients have closed forms, formed here and now: `(q - p) / T2` for the predicted logits, and for the target's
    `p * (log p - log q - KL(p || q)) / T1`. So one `[N, V]` each is kept for backward, where autograd would keep two
    and go over them again.
    """

    @staticmethod
    def forward(ctx: Any, target: Tensor, predicted: Tensor, t_target: float, t_predicted: float) -> Tensor:
        log_p, log_q = _log_softmax(target, t_target), _log_softmax(predicted, t_predicted)
        p = log_p.exp()
        ratio = log_p.sub_(log_q)
        terms = p * ratio if ctx.needs_input_grad[0] else ratio.mul_(p)  # in place where the ratio is not needed again
        divergence = terms.sum()
        saved: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[0]:
            saved[0] = terms.sub_(p * terms.sum(dim=-1, keepdim=True))
        if ctx.needs_input_grad[1]:
            saved[1] = log_q.exp_().sub_(p)
        ctx.save_for_backward(*saved)
        ctx.inputs = (target.dtype, t_target), (predicted.dtype, t_predicted)
        return divergence

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        if torch.is_grad_enabled():  # create_graph=True: autograd would take the saved tensors for constants
            raise NotImplementedError("the soft and consistency losses have no second derivative")
        target, predicted = (
            None if saved is None else (saved * (grad / temperature)).to(dtype)
            for saved, (dtype, temperature) in zip(ctx.saved_tensors, ctx.inputs, strict=True)
        )
        return target, predicted, None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = at_least_float32(logits)
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)
