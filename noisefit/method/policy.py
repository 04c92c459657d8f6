"""The noise policy of a run: which layers get noise, and how strong it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from noisefit.fork.hooks import EMBEDDING
from noisefit.method.noise import EmbeddingNoise, TokenScaledNoise

BY_SNR, CALIBRATED, FROZEN = "snr", "calibrated", "frozen"
KINDS = (BY_SNR, CALIBRATED, FROZEN)
LIVE, RELATIVE = "live", "relative"
NOISE_SCALES = (LIVE, FROZEN, RELATIVE)  # of --noise_scale
ALL, PROMPT, RESPONSE = NOISE_TOKENS = ("all", "prompt", "response")  # of --noise_tokens

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


def as_asked(settings: Any, kind: NoiseKind) -> NoiseKind:
    """Makes noise of this kind as a run's settings have it, besides its strength."""
    relative = {"relative": True} if settings.noise_scale == RELATIVE else {}

    def make(**strength: float) -> TokenScaledNoise:
        noise = kind(**strength, **relative)
        noise.gradient, noise.max_to_signal = settings.noise_gradient, settings.max_noise_to_signal
        noise.masked = settings.noise_tokens != ALL
        return noise

    return make


def make_noise(settings: Any, policy: NoisePolicy, kind: NoiseKind = TokenScaledNoise) -> dict[int, TokenScaledNoise]:
    """The noise of each layer of the policy; on the embedding where the objective wants it there.

    Args:
        settings: of a run: its `objective`, `neftune_alpha`, `noise_std`, `noise_scale`, `noise_gradient`,
            `max_noise_to_signal` and `noise_tokens`.
        policy: of the run.
        kind: of the noise.
    """
    if settings.objective.noise == "embedding":
        return {EMBEDDING: EmbeddingNoise(settings.neftune_alpha)}
    return policy.noise(as_asked(settings, kind), settings.noise_std)
