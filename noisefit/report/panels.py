"""What a report draws over the steps or the layers: a panel a quantity."""

from __future__ import annotations

from collections.abc import Sequence

from noisefit.report.runs import Run

NATS = "nats a token"
PANELS = {  # key: title, unit
    "loss": ("Loss, weighted sum of its terms", NATS),
    "ce_loss": ("Cross-entropy", NATS),
    "soft_loss": ("Soft loss, noisy against clean", NATS),
    "consistency_loss": ("Consistency loss, noisy against noisy", NATS),
    "rdrop_loss": ("R-Drop loss", NATS),
    "token_accuracy": ("Token accuracy", "share of supervised tokens"),
    "entropy": ("Entropy of the predictions", NATS),
    "right_rate": ("Right answers, evaluation", "share of prompts"),
    "wrong_rate": ("Wrong answers, evaluation", "share of prompts"),
    "snr": ("Signal to noise by layer", "SNR"),
    "kl": ("KL by layer, at chosen or best scale", NATS),
    "noise_to_signal": ("Noise to signal", "mean |noise| / mean |h|"),
    "hidden_rms": ("Size of the hidden states that get noise", "root mean square"),
    "tokens_per_second": ("Throughput", "tokens/s"),
    "peak_memory_gib": ("Peak memory", "GiB"),
}


def panels_of(runs: Sequence[Run]) -> dict[str, tuple[str, str]]:
    """`PANELS`, and one for each further loss that some run has, as an edited loop may."""
    others = sorted({key for run in runs for key in run.metrics if key.endswith("_loss")} - PANELS.keys())
    losses = {key: PANELS[key] for key in PANELS if key.endswith("loss")}
    return losses | {key: (f"{key.removesuffix('_loss').capitalize()} loss", NATS) for key in others} | PANELS
