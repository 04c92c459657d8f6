"""The objectives of `--loss_mode`: which branches each one runs, and how its losses are weighted.

This is all that tells them apart. Another one is another line of `OBJECTIVES`; `chunk_losses` in train_loop.py forms
the losses that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from noisefit.fork.branches import CLEAN, DROPOUT, NOISY, Branch

Weight = Callable[[Any], float]
"""From a run's settings to the weight of a loss."""


@dataclass(frozen=True)
class Objective:
    """What one `--loss_mode` runs.

    Attributes:
        branches: of every micro-batch, as few as its losses need.
        losses: the name of each loss that it has to its weight, made of the run's settings.
        reads: the settings, besides those of the noise, that change it.
        noise: where noisy branches get theirs: in the `layers` that the noise policy chooses, in the `embedding`, or
            in neither.
    """

    branches: tuple[Branch, ...]
    losses: Mapping[str, Weight]
    reads: tuple[str, ...] = ()
    noise: str = "layers"

    def weights(self, settings: Any) -> Weights:
        """The weight of each loss."""
        return Weights({name: weight(settings) for name, weight in self.losses.items()})


class Weights(dict[str, float]):
    """Name to weight. A name that is none says which are."""

    def __missing__(self, name: str) -> float:
        raise KeyError(f"no loss of the objective is called {name!r}, it has: {', '.join(self)}")


def one(settings: Any) -> float:
    """The weight of a loss that stands alone."""
    return 1.0


ALPHA: dict[str, Weight] = {"ce": lambda s: s.hybrid_loss_alpha, "soft": lambda s: 1 - s.hybrid_loss_alpha}

OBJECTIVES = {
    # NoiseFiT (arXiv 2504.03302), section 3, and its parts.
    "full": Objective((CLEAN, NOISY, NOISY), ALPHA | {"consistency": lambda s: s.lambda_consistency},
                      ("hybrid_loss_alpha", "lambda_consistency", "temperature")),
    "ce_kl": Objective((CLEAN, NOISY), ALPHA, ("hybrid_loss_alpha", "temperature")),
    "kl_only": Objective((CLEAN, NOISY), {"soft": one}, ("temperature",)),
    "ce_noisy": Objective((NOISY,), {"ce": one}),
    "consistency_only": Objective((NOISY, NOISY), {"consistency": one}, ("temperature",)),
    # What it is compared with: plain fine-tuning, NEFTune (arXiv 2310.05914), R-Drop (arXiv 2106.14448).
    "basefit": Objective((CLEAN,), {"ce": one}, noise="none"),
    "neftune": Objective((NOISY,), {"ce": one}, ("neftune_alpha",), noise="embedding"),
    "rdrop": Objective((DROPOUT, DROPOUT), {"ce": one, "rdrop": lambda s: s.rdrop_alpha},
                       ("rdrop_alpha", "rdrop_dropout", "temperature"), noise="none"),
}  # fmt: skip

LOSSES = tuple(dict.fromkeys(name for objective in OBJECTIVES.values() for name in objective.losses))
