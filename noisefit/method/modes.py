"""Where log-probabilities part in two: what a model knows, and what it does not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

FEWEST = 20  # values, under which nothing is said
EVIDENCE = 10.0  # by so much the BIC of two components has to be smaller: "very strong" (Kass and Raftery, 1995)
DEPTH = 0.8  # the valley is at most this share of the lower peak
SMALLEST = 0.02  # share of a component: fewer values are outliers
GRID = 2000
MOST = 5000  # values that the fit is made of; of more, so many quantiles
STARTS = (0.1, 0.5, 0.9)  # the share of the values in the first component, to begin with


@dataclass(frozen=True)
class Parting:
    """How values part.

    Attributes:
        threshold: between the two modes; `None` where there is one.
        why: where there is none, what the test found, in a few words.
    """

    threshold: float | None
    why: str = ""


def part(log_probabilities: np.ndarray) -> Parting:
    """Find where log-probabilities part in two modes, if they do.

    The surprise `-log p` is spread over decades above and bounded by 0 below; its square root is close to symmetric in
    each of the two groups. Of these roots a normal distribution and a mixture of two, each with its own spread, are
    fitted by maximum likelihood. There are two modes if the BIC of the two is smaller by `EVIDENCE`, each has
    `SMALLEST` of the values, and their density has a valley of at most `DEPTH` of the lower of its peaks. The
    threshold is Otsu's on the roots: the cut that leaves the least variance within the two sides. It does not follow
    the shape of a single narrow group, as the valley does.

    Args:
        log_probabilities: `[N]`, finite, at most 0.
    """
    x = np.sort(np.sqrt(-np.minimum(np.asarray(log_probabilities, dtype=float), 0.0)))
    if len(x) < FEWEST:
        return Parting(None, f"{len(x)} rows are too few to tell")
    if len(x) > MOST:
        x = x[np.linspace(0, len(x) - 1, MOST).round().astype(int)]
    if x[-1] - x[0] < 1e-6:
        return Parting(None, "all rows are known as well as each other")
    # Values that are all the same, to their last digit, would be a component without a spread.
    floor = max(1e-2 * float(x.std()), 1e-6)
    one = _log_likelihood(x, np.ones(1), x.mean(keepdims=True), np.maximum(x.std(keepdims=True), floor))
    fits = [_fit(x, share, floor) for share in STARTS]
    two, weights, means, stds = max(fits, key=lambda fit: fit[0])
    gain = 2 * (two - one) - 3 * math.log(len(x))  # of the three parameters that two have more
    if gain < EVIDENCE:
        return Parting(None, f"two groups explain them no better than one (BIC {gain:+.1f}, needed {EVIDENCE:g})")
    if weights.min() < SMALLEST:
        return Parting(None, f"one of two groups would have {weights.min():.1%} of the rows")
    grid = np.linspace(x[0], x[-1], GRID)
    density = np.exp(_densities(grid, weights, means, stds)).sum(axis=0)
    low, high = sorted(np.searchsorted(grid, means).clip(0, GRID - 1))
    valley = low + int(density[low : high + 1].argmin())
    share = float(density[valley] / min(density[: valley + 1].max(), density[valley:].max()))
    if share > DEPTH:
        return Parting(None, f"between two groups there is no valley (density {share:.0%} of the lower peak)")
    return Parting(-(otsu(x) ** 2))


def otsu(x: np.ndarray) -> float:
    """The cut between two sorted values at which the variance between the two sides is largest (Otsu, 1979)."""
    count = np.arange(1, len(x))
    below = np.cumsum(x)[:-1]
    between = count * (len(x) - count) * (below / count - (x.sum() - below) / (len(x) - count)) ** 2
    best = int(between.argmax())
    return float((x[best] + x[best + 1]) / 2)


def _densities(x: np.ndarray, weights: np.ndarray, means: np.ndarray, stds: np.ndarray) -> np.ndarray:
    """The logarithm of each component's weighted density, `[components, N]`."""
    z = (x - means[:, None]) / stds[:, None]
    logs: np.ndarray = np.log(weights)[:, None] - np.log(stds)[:, None] - 0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    return logs


def _log_likelihood(x: np.ndarray, weights: np.ndarray, means: np.ndarray, stds: np.ndarray) -> float:
    return float(logsumexp(_densities(x, weights, means, stds), axis=0).sum())


def _fit(x: np.ndarray, share: float, floor: float) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
    """Expectation maximization of two normals from the split of sorted values at `share`."""
    cut = min(max(round(share * len(x)), 2), len(x) - 2)
    member = np.stack([np.arange(len(x)) < cut, np.arange(len(x)) >= cut]).astype(float)
    before = -math.inf
    for _ in range(300):
        sizes = member.sum(axis=1) + 1e-12
        weights, means = sizes / sizes.sum(), member @ x / sizes
        stds = np.sqrt((member * (x - means[:, None]) ** 2).sum(axis=1) / sizes).clip(min=floor)
        logs = _densities(x, weights, means, stds)
        whole = logsumexp(logs, axis=0)
        likelihood = float(whole.sum())
        if likelihood - before < 1e-6 * len(x):
            break
        before = likelihood
        member = np.exp(logs - whole)
    return likelihood, weights, means, stds
