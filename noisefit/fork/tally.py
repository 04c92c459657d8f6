"""How well tokens are predicted, counted beside the losses and from the same logits."""

from __future__ import annotations

import torch
from torch import Tensor

from noisefit.base.precision import at_least_float32

ROWS_AT_ONCE = 32  # so many are looked at in float32 at a time: far less memory than the chunk that they are of
NOTHING = -1e4  # a logit so far below the largest has no probability; minus infinity times none would be NaN


class TokenTally:
    """Sums over the supervised tokens of passes through `BranchedModel.forward`, which adds to them.

    Args:
        device: of the logits.

    Attributes:
        sums: `[2]` float32, of this process: how many tokens were the likeliest ones, and the entropies in nats.
    """

    def __init__(self, device: torch.device | str):
        self.sums = torch.zeros(2, device=device)

    def add(self, counted: Tensor) -> None:
        """Add what `hits_and_entropy` counted."""
        self.sums += counted


@torch.no_grad()
def hits_and_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """How many targets have the largest logit, the first one of equals; and the sum of `-sum p log p`.

    Args:
        logits: `[N, V]`, which are not changed; low precision is computed in float32.
        targets: `[N]`, int64.

    Returns:
        `[2]`, float32 or wider, without gradient.
    """
    found = torch.zeros(2, dtype=at_least_float32(logits[:0]).dtype, device=logits.device)
    for part, wanted in zip(logits.split(ROWS_AT_ONCE), targets.split(ROWS_AT_ONCE), strict=True):
        largest, at = part.max(dim=-1, keepdim=True)
        below = (at_least_float32(part) - largest).clamp_(min=NOTHING)
        share = below.exp()
        total = share.sum(dim=-1)
        found[0] += (at.squeeze(-1) == wanted).sum()
        found[1] += (total.log() - below.mul_(share).sum(dim=-1) / total).sum()
    return found
