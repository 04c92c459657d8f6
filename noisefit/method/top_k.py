"""Predictions kept as the likeliest tokens and the mass of all others, and the divergence from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from noisefit.base.precision import at_least_float32

LEAST = -100.0  # of a logarithm of the rest's mass, which may be 0


class TopK(NamedTuple):
    """Of `N` predictions the `K` likeliest tokens.

    Attributes:
        tokens: `[N, K]`, int32.
        log_probs: `[N, K + 1]`, float32: the logarithms of their probabilities, and of the mass of all other tokens.
    """

    tokens: Tensor
    log_probs: Tensor

    @classmethod
    def of(cls, logits: Tensor, k: int, temperature: float) -> TopK:
        """That of `softmax(logits / T)`, logits `[N, V]`; all tokens where `k` is the vocabulary or more."""
        log_p = F.log_softmax(at_least_float32(logits) / temperature, dim=-1)
        kept, tokens = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
        # Summed over the others, as 1 minus the sum of the likeliest would lose a small rest's digits.
        rest = log_p.exp().scatter_(-1, tokens, 0).sum(dim=-1, keepdim=True).log().clamp(min=LEAST)
        return cls(tokens.int(), torch.cat([kept, rest], dim=-1).float())

    @classmethod
    def none(cls, k: int) -> TopK:
        """Of no prediction."""
        return cls(torch.zeros(0, k, dtype=torch.int32), torch.zeros(0, k + 1))

    @classmethod
    def joined(cls, parts: Sequence[TopK]) -> TopK:
        """Those of several rows, one after another."""
        return cls(torch.cat([part.tokens for part in parts]), torch.cat([part.log_probs for part in parts]))

    def split(self, sizes: Sequence[int]) -> list[TopK]:
        """Parts of so many predictions."""
        parts = zip(self.tokens.split(list(sizes)), self.log_probs.split(list(sizes)), strict=True)
        return [TopK(*part) for part in parts]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TopK:
        """On this device."""
        return TopK(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))

    def divergence(self, predicted: Tensor, temperature: float) -> Tensor:
        """`KL(p || softmax(predicted / T))` over the kept tokens and one bucket of all others, summed over predictions.

        It is the divergence of all tokens from a `p` whose rest is spread as `predicted` spreads its own: nothing is
        said of how likely the others are among each other. With all tokens kept it is the divergence itself.

        Args:
            predicted: `[N, V]` logits.
            temperature: `T`.
        """
        divergence: Tensor = _Divergence.apply(predicted, self.tokens, self.log_probs, temperature)
        return divergence


class _Divergence(torch.autograd.Function):
    """Its gradient has a closed form, `(q - p) / T`, formed here and now: one `[N, V]` is kept for backward."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, tokens: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
        tokens, log_probs = tokens.long(), log_probs.to(at_least_float32(predicted).dtype)
        log_q = F.log_softmax(at_least_float32(predicted) / temperature, dim=-1)
        log_kept = log_q.gather(-1, tokens)
        q = log_q.exp_()
        kept, p = log_kept.exp(), log_probs.exp()
        rest = q.scatter_(-1, tokens, 0).sum(dim=-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
        p = torch.where(log_probs > LEAST, p, 0)  # a rest of no mass has no part
        terms = p * (log_probs - torch.cat([log_kept, rest.log()], dim=-1))
        gradient = q.mul_(1 - p[:, -1:] / rest).scatter_(-1, tokens, kept - p[:, :-1])
        ctx.save_for_backward(gradient)
        ctx.input = predicted.dtype, temperature
        return terms.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        [gradient] = ctx.saved_tensors
        dtype, temperature = ctx.input
        return (gradient * (grad / temperature)).to(dtype), None, None, None
