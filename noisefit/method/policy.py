"""The noise policy of a run: which layers get noise, and how strong it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from noisefit.method.noise import TokenScaledNoise

BY_SNR, CALIBRATED, FROZEN = "snr", "calibrated", "frozen"
KINDS = (BY_SNR, CALIBRATED, FROZEN)
LIVE, RELATIVE = "live", "relative"
NOISE_SCALES = (LIVE, FROZEN, RELATIVE)  # of --noise_scale

NoiseKind = Callable[..., TokenScaledNoise]
"""Makes the noise of a layer: `TokenScaledNoise`, or a class that inherits from it."""


@dataclass(frozen=True)
class NoisePolicy:
    """Which layers get noise, and how strong.

    Attributes:
        kind: how the strength is known: `snr`, from the hidden states of each pass; `calibrated`, a base scale for each
            layer that a calibration or a file gave; `frozen`, one that was measured at the start as `snr` has it.
        layers: ascending.
        base_stds: the base scale of each of these layers; empty for `snr`.
        snr: of every layer; empty where a file gave the policy and does not say.
        calibration: what a calibration measured, for `noise_policy.json`.
        start_stds: of a frozen policy, the base scale of every layer as it was at the start of the run.
    """

    kind: str = BY_SNR
    layers: list[int] = field(default_factory=list)
    base_stds: list[float] = field(default_factory=list)
    snr: list[float] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    start_stds: list[float] = field(default_factory=list)

    def noise(self, kind: NoiseKind, noise_std: float) -> dict[int, TokenScaledNoise]:
        """The noise of each layer.

        Args:
            kind: of the noise.
            noise_std: its strength where the policy goes by the hidden states.
        """
        if self.kind == BY_SNR:
            return {layer: kind(noise_std=noise_std) for layer in self.layers}
        return {layer: kind(base_std=std) for layer, std in zip(self.layers, self.base_stds, strict=True)}
