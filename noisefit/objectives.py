"""The objectives of `--loss_mode`: which branches each one runs, and how its losses are weighted.

This is all that tells them apart. Another one is another line of `OBJECTIVES`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

CLEAN = "clean"  # the model as it is
NOISY = "noisy"  # with noise of its own
DROPOUT = "dropout"  # with dropout of its own

LOSSES = ("ce", "soft", "consistency", "rdrop")  # `chunk_losses` in train_loop.py forms them


@dataclass(frozen=True)
class Objective:
    """What one `--loss_mode` runs.

    Attributes:
        branches: of every micro-batch, as few as its losses need.
        weights: from the run's settings to the weight of each loss that it has; the others are not formed.
        noise: where noisy branches get theirs: in the `layers` that the noise policy chooses, or in the `embedding`.
    """

    branches: tuple[str, ...]
    weights: Callable[[Namespace], dict[str, float]]
    noise: str = "layers"

    @property
    def needs_policy(self) -> bool:
        """Whether layers are to be chosen."""
        return NOISY in self.branches and self.noise == "layers"


OBJECTIVES = {
    # NoiseFiT (arXiv 2504.03302), section 3, and its parts.
    "full": Objective((CLEAN, NOISY, NOISY), lambda a: {"ce": a.hybrid_loss_alpha, "soft": 1 - a.hybrid_loss_alpha,
                                                        "consistency": a.lambda_consistency}),
    "ce_kl": Objective((CLEAN, NOISY), lambda a: {"ce": a.hybrid_loss_alpha, "soft": 1 - a.hybrid_loss_alpha}),
    "kl_only": Objective((CLEAN, NOISY), lambda a: {"soft": 1.0}),
    "ce_noisy": Objective((NOISY,), lambda a: {"ce": 1.0}),
    "consistency_only": Objective((NOISY, NOISY), lambda a: {"consistency": 1.0}),
    # What it is compared with: plain fine-tuning, NEFTune (arXiv 2310.05914), R-Drop (arXiv 2106.14448).
    "basefit": Objective((CLEAN,), lambda a: {"ce": 1.0}),
    "neftune": Objective((NOISY,), lambda a: {"ce": 1.0}, noise="embedding"),
    "rdrop": Objective((DROPOUT, DROPOUT), lambda a: {"ce": 1.0, "rdrop": a.rdrop_alpha}),
}  # fmt: skip
