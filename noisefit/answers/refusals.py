"""Answers that refuse."""

from noisefit.base.refusal import REFUSAL

__all__ = ["REFUSAL"]
