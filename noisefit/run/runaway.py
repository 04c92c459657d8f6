"""Noise that runs away: a model drowns it by growing its hidden states, and the noise grows faster than they do."""

from __future__ import annotations

from collections.abc import Mapping

from noisefit.method.policy import LIVE
from noisefit.run.settings import Settings

GROWN = 3.0  # times the noise to signal of the layer's first step


def describe_runaway(
    settings: Settings, step: int, ratios: Mapping[str, float | None], start: Mapping[str, float]
) -> str | None:
    """What to say where noise to signal has grown too far; `None` where it has not, or there is none in the layers.

    Args:
        settings: of the run.
        step: optimizer steps taken.
        ratios: noise to signal since the line before, by layer; `None` where it is no number.
        start: the same of the first step in which the layer had noise.
    """
    if settings.objective.noise != "layers":
        return None
    grown = [(ratio / start[layer], layer) for layer, ratio in ratios.items() if ratio and start.get(layer, 0) > 0]
    if not grown or max(grown)[0] <= GROWN:
        return None
    factor, layer = max(grown)
    by_snr = settings.noise_policy == "snr"
    follows = by_snr and settings.noise_scale == LIVE
    why = ", as its base scale grows with the hidden states" if follows else ""
    helps = ["--noise_scale relative or frozen"] if follows else []
    helps += [] if settings.noise_gradient else ["--noise_gradient"]
    helps += [] if settings.max_noise_to_signal else ["--max_noise_to_signal"]
    helps += ["a lower --noise_std or --learning_rate" if by_snr else "a lower --learning_rate"]
    return (
        f"step {step}: the noise runs away: in layer {layer} it is {ratios[layer]:.3g} of the signal, {factor:.1f} "
        f"times its start{why}; what helps: {', '.join(helps)}"
    )
