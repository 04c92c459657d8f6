"""A threshold on confidence by conformal risk control (Angelopoulos et al., arXiv 2208.02814).

The loss of a prompt at a threshold is the share of its rounds that are answered, with a confidence above it, and wrong.
It lies in 0 to 1 and never grows with the threshold. The threshold is the smallest at which the losses of the n
prompts, and 1 for the one that is to come, add up to `(n + 1) x target` at most. If the next prompt and these are
exchangeable, then the probability that it is answered and wrong is at most the target: on average over such sets of
prompts, not for each set of them. Of the wrong share among what is answered it promises nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from noisefit.answers.figures import attempted, confidences
from noisefit.answers.outcomes import Assessed

DIGITS = 17  # in which every float differs from the next


def threshold_for(assessed: Sequence[Assessed], target: float) -> float | None:
    """The least confidence at which an answer is to be given.

    Args:
        assessed: prompts with log-probabilities.
        target: the share of prompts that may be answered and wrong, in 0 to 1.

    Returns:
        0 where all may be answered; `None` where no threshold keeps the target and lets an answer of these through.
        Otherwise the shortest decimal number that lets through what is more confident than conformal risk control asks
        for; it may be somewhat above, where losses are only smaller.
    """
    confidence = confidences(assessed)
    assert confidence is not None
    rows, wrong = attempted(assessed)
    shares = 1 / np.array([len(item.outcomes) for item in assessed], float)
    allowed = (len(assessed) + 1) * target - 1 + 1e-9  # losses add up inexactly
    if allowed < 0:
        return None
    order = np.argsort(-confidence[wrong], kind="stable")
    levels, losses = confidence[wrong][order], np.cumsum(shares[rows[wrong]][order])
    if not len(levels) or losses[-1] <= allowed:
        return 0.0
    # The first wrong answer that may not be given, and with it all that are no more confident.
    barred = float(levels[np.searchsorted(losses, allowed, side="right")])
    above = confidence[confidence > barred]
    return shortest_between(barred, float(above.min())) if len(above) else None


def shortest_between(low: float, high: float) -> float:
    """The decimal number of fewest digits that is above `low` and at most `high`, both in 0 to 1."""
    for digits in range(1, DIGITS):
        number = math.ceil(low * 10**digits) / 10**digits
        number = number if number > low else (math.ceil(low * 10**digits) + 1) / 10**digits
        if low < number <= high:
            return number
    return high
