"""The objectives of `--loss_mode`: which branches each one runs, and how its losses are weighted.

This is all that tells them apart. Another one is another line of `OBJECTIVES`; `chunk_losses` in train_loop.py forms
the losses that it names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from noisefit.fork.branches import CLEAN, DROPOUT, NOISY, Branch, check_branches

PLACES = ("layers", "embedding")

Weight = Callable[[Any], float]
"""From a run's settings to the weight of a loss."""


@dataclass(frozen=True)
class Objective:
    """What one `--loss_mode` runs.

    Attributes:
        branches: of every micro-batch, as few as its losses need.
        losses: the name of each loss that it has to its weight, made of the run's settings.
        reads: the settings, besides those of the noise, that change it.
        noise: where noisy branches get theirs: in the `layers` that the noise policy chooses, or in the `embedding`;
            `none` where there are no such branches.

    Raises:
        ValueError: it has no branch, no loss, or its noise is in no known place.
    """

    branches: tuple[Branch, ...]
    losses: Mapping[str, Weight]
    reads: tuple[str, ...] = ()
    noise: str = "layers"

    def __post_init__(self) -> None:
        check_branches(self.branches)
        if not self.branches or not self.losses:
            raise ValueError("an objective has at least one branch and one loss")
        if NOISY not in self.branches:
            object.__setattr__(self, "noise", "none")
        elif self.noise not in PLACES:
            raise ValueError(f"noise is in {self.noise!r}, expected one of {', '.join(PLACES)}")

    def weights(self, settings: Any) -> Weights:
        """The weight of each loss."""
        return Weights({name: weight(settings) for name, weight in self.losses.items()})


class Weights(dict[str, float]):
    """The name of each loss of an objective to its weight.

    Raises:
        LookupError: a loss that was formed has no weight.
    """

    def __missing__(self, name: str) -> float:
        raise LookupError(f"the loss {name!r} has no weight; the objective, a line of noisefit/method/objectives.py, "
                          f"has weights for {', '.join(self)}")  # fmt: skip

    def unused(self, losses: Mapping[str, Any]) -> str | None:
        """A line that names the weights to which no loss was formed; `None` where there are none."""
        idle = [name for name in self if name not in losses]
        if not idle:
            return None
        return f"chunk_losses forms no loss called {', '.join(idle)}, to which the objective gives weight"


def one(settings: Any) -> float:
    """The weight of a loss that stands alone."""
    return 1.0


TERMS = ("temperature", "temperature_on", "teacher_gradient")  # of the soft and the consistency term
OTHER_TEACHER = ("teacher", "teacher_decay", "cache_teacher")
SOFT = (*TERMS, *OTHER_TEACHER)  # what the soft term goes by
ALPHA: dict[str, Weight] = {"ce": lambda s: s.hybrid_loss_alpha, "soft": lambda s: 1 - s.hybrid_loss_alpha}

OBJECTIVES = {
    # NoiseFiT (arXiv 2504.03302), section 3, and its parts.
    "full": Objective((CLEAN, NOISY, NOISY), ALPHA | {"consistency": lambda s: s.lambda_consistency},
                      ("hybrid_loss_alpha", "lambda_consistency", *SOFT)),
    "ce_kl": Objective((CLEAN, NOISY), ALPHA, ("hybrid_loss_alpha", *SOFT)),
    "kl_only": Objective((CLEAN, NOISY), {"soft": one}, SOFT),
    "ce_noisy": Objective((NOISY,), {"ce": one}),
    "consistency_only": Objective((NOISY, NOISY), {"consistency": one}, TERMS),
    # The soft term without noise, from another teacher: learning without forgetting (arXiv 1606.09282).
    "ce_teacher": Objective((CLEAN,), ALPHA, ("hybrid_loss_alpha", "temperature", "temperature_on", *OTHER_TEACHER)),
    # What it is compared with: plain fine-tuning, NEFTune (arXiv 2310.05914), R-Drop (arXiv 2106.14448).
    "basefit": Objective((CLEAN,), {"ce": one}),
    "neftune": Objective((NOISY,), {"ce": one}, ("neftune_alpha",), noise="embedding"),
    "rdrop": Objective((DROPOUT, DROPOUT), {"ce": one, "rdrop": lambda s: s.rdrop_alpha},
                       ("rdrop_alpha", "rdrop_dropout", "temperature")),
}  # fmt: skip

LOSSES = tuple(dict.fromkeys(name for objective in OBJECTIVES.values() for name in objective.losses))
