"""Statistics and losses are computed in float32 or wider, whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """`tensor` itself where it is float32 or float64, else its float32 copy."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
