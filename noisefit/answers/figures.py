"""What outcomes and confidences add up to, with intervals from a bootstrap over prompts, and paired comparisons.

Each figure is computed for many weightings of the prompts at once: all once is the figure itself, draws with
replacement are its bootstrap, and two files' prompts exchanged by chance are the permutation test of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from noisefit.answers.outcomes import NOT_ATTEMPTED, RIGHT, WRONG, Assessed

RATES = ("right_rate", "wrong_rate", "not_attempted_rate", "attempted_rate", "right_given_attempted")
COVERAGES = (10, 30, 50, 80, 100)  # percent
CONFIDENCE_FIGURES = ("auroc", "brier", "ece", "aurc", *(f"wrong_at_{percent}" for percent in COVERAGES))
ENTROPY_FIGURES = ("semantic_entropy", "semantic_entropy_auroc")
BINS = 10
RESAMPLES = 2_000
BATCH = 2_000_000  # weighted answers in memory at a time


def with_intervals(assessed: Sequence[Assessed], seed: int = 0) -> dict[str, Any]:
    """Every figure, and its 95% percentile interval from a bootstrap over prompts under `<figure>_ci`.

    `RATES` always; `CONFIDENCE_FIGURES` where all answers have a log-probability, `ENTROPY_FIGURES` where all prompts
    have an entropy. `None` where a figure is not defined: an AUROC without right answers, or without wrong ones. Draws
    in which it is not are left out of its interval.
    """
    once = figures(assessed, np.ones((1, len(assessed)), int))
    draws = _in_batches(assessed, resampled(len(assessed), seed))
    found: dict[str, Any] = {}
    for name, [value] in (once | _by_scikit_learn(assessed)).items():
        known = draws[name][~np.isnan(draws[name])]
        found[name] = None if math.isnan(value) else float(value)
        found[f"{name}_ci"] = None if math.isnan(value) else [float(end) for end in np.percentile(known, (2.5, 97.5))]
    return found


def differences(first: Sequence[Assessed], second: Sequence[Assessed], seed: int = 0) -> dict[str, dict[str, Any]]:
    """How much each figure of the second is larger than that of the first, over the same prompts.

    Returns:
        By figure, of those that both have: `difference`, its 95% interval `difference_ci` from a bootstrap over
        prompts, and `p_value`, two-sided, from exchanging the two files' answers to a prompt by chance. `None` where
        one of the two is not defined.
    """
    places = {item.prompt.prompt: place for place, item in enumerate(first)}
    both = [*first, *sorted(second, key=lambda item: places[item.prompt.prompt])]
    counts, count = resampled(len(first), seed), len(first)
    none = np.zeros_like(counts)
    drawn = _difference(both, np.hstack([counts, none]), np.hstack([none, counts]))
    exchanged = np.random.default_rng(seed).integers(0, 2, (RESAMPLES, count))
    exchanged[0] = 0
    swapped = _difference(both, np.hstack([1 - exchanged, exchanged]), np.hstack([exchanged, 1 - exchanged]))
    found: dict[str, dict[str, Any]] = {}
    for name, values in swapped.items():
        value, chance, known = values[0], values[1:], drawn[name][~np.isnan(drawn[name])]
        if math.isnan(value):
            found[name] = {"difference": None, "difference_ci": None, "p_value": None}
            continue
        chance = chance[~np.isnan(chance)]
        as_large = np.sum(np.abs(chance) >= abs(value) - 1e-12)
        found[name] = {
            "difference": float(value),
            "difference_ci": [float(end) for end in np.percentile(known, (2.5, 97.5))],
            "p_value": float((1 + as_large) / (1 + len(chance))),
        }
    return found


def figures(assessed: Sequence[Assessed], counts: np.ndarray) -> dict[str, np.ndarray]:
    """Every figure, for each way to count the prompts.

    Args:
        assessed: P prompts.
        counts: `[R, P]`, how often each prompt counts, at least one of a row more than zero.

    Returns:
        By name `[R]`, not a number where the figure is not defined. Rates are means over prompts; what looks at
        confidences takes all attempted answers together.
    """
    total = counts.sum(1)
    shares = {kind: np.array([item.outcomes.count(kind) / len(item.outcomes) for item in assessed])
              for kind in (RIGHT, WRONG, NOT_ATTEMPTED)}  # fmt: skip
    right, wrong, none = (counts @ shares[kind] / total for kind in (RIGHT, WRONG, NOT_ATTEMPTED))
    found = {"right_rate": right, "wrong_rate": wrong, "not_attempted_rate": none, "attempted_rate": right + wrong}
    found["right_given_attempted"] = _ratio(right, right + wrong)
    rows, is_wrong = attempted(assessed)
    if (confidence := confidences(assessed)) is not None:
        order = np.argsort(-confidence, kind="stable")  # once for all of them
        found |= _confidence_figures(confidence[order], is_wrong[order], counts[:, rows[order]])
    if all(item.entropy is not None for item in assessed):
        entropy = np.array([item.entropy for item in assessed], float)
        found["semantic_entropy"] = counts @ entropy / total
        found["semantic_entropy_auroc"] = auroc(-entropy[rows], is_wrong, counts[:, rows])
    return found


def attempted(assessed: Sequence[Assessed]) -> tuple[np.ndarray, np.ndarray]:
    """Of each attempted answer the index of its prompt, and whether it is wrong; `[N]` both."""
    found = [(row, o == WRONG) for row, item in enumerate(assessed) for o in item.outcomes if o != NOT_ATTEMPTED]
    return np.array([row for row, _ in found], int), np.array([wrong for _, wrong in found], bool)


def confidences(assessed: Sequence[Assessed]) -> np.ndarray | None:
    """`exp(logprob)` of each attempted answer, `[N]`; `None` where some prompt has no log-probabilities."""
    if not all(item.prompt.logprobs is not None for item in assessed):
        return None
    pairs = [pair for item in assessed for pair in zip(item.outcomes, item.prompt.logprobs or (), strict=True)]
    return np.exp(np.array([logprob for o, logprob in pairs if o != NOT_ATTEMPTED], float))


def auroc(score: np.ndarray, wrong: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """How often a right answer has a higher score than a wrong one, a tie being half.

    Args:
        score, wrong: `[N]`.
        weights: `[R, N]`.

    Returns:
        `[R]`, not a number where all weight is on one class.
    """
    all_weight, of_wrong, _ = _blocks(score, wrong, weights)
    of_right = all_weight - of_wrong
    lower = of_wrong.sum(1, keepdims=True) - of_wrong.cumsum(1)
    return _ratio((of_right * (lower + of_wrong / 2)).sum(1), of_right.sum(1) * of_wrong.sum(1))


def risk_at(confidence: np.ndarray, wrong: np.ndarray, weights: np.ndarray, percents: Sequence[int]) -> np.ndarray:
    """The wrong share of the most confident answers, so many percent of all, rounded up to whole answers.

    Where some of equally confident answers are kept, so many of them count as wrong as on average over their orders.

    Args:
        confidence, wrong: `[N]`.
        weights: `[R, N]`, whole numbers.
        percents: each in 1 to 100.

    Returns:
        `[len(percents), R]`, not a number where there is no weight.
    """
    all_weight, of_wrong, _ = _blocks(confidence, wrong, weights)
    if not all_weight.shape[1]:
        return np.full((len(percents), len(weights)), np.nan)
    end, wrong_end = all_weight.cumsum(1), of_wrong.cumsum(1)
    kept = -(-np.array(percents)[:, None] * end[:, -1] // 100)
    # The block in which the last answer kept is: all before it count whole. Searched, as whole answers are too many.
    last = np.array([np.searchsorted(end[row], kept[:, row]) for row in range(len(end))]).T
    all_last, of_last, end_last, wrong_last = (
        np.take_along_axis(values, last.T, 1).T for values in (all_weight, of_wrong, end, wrong_end)
    )
    share = (kept - (end_last - all_last)) / np.maximum(all_last, 1)
    return _ratio(wrong_last - of_last + share * of_last, kept)


def _confidence_figures(confidence: np.ndarray, wrong: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    total = weights.sum(1)
    surplus = confidence - ~wrong
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)[:, None] == np.arange(BINS)
    found = {
        "auroc": auroc(confidence, wrong, weights),
        "brier": _ratio(weights @ surplus**2, total),
        "ece": _ratio(np.abs(weights @ (bins * surplus[:, None])).sum(1), total),
        "aurc": _aurc(confidence, wrong, weights),
    }
    risks = risk_at(confidence, wrong, weights, COVERAGES)
    return found | {f"wrong_at_{percent}": risk for percent, risk in zip(COVERAGES, risks, strict=True)}


def _aurc(confidence: np.ndarray, wrong: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The mean over k = 1 to n of the wrong share of the k most confident (Geifman et al., arXiv 1805.08206)."""
    all_weight, of_wrong, _ = _blocks(confidence, wrong, weights)
    end = all_weight.cumsum(1)
    start, wrong_before = end - all_weight, of_wrong.cumsum(1) - of_wrong
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, max(int(end.max(initial=0)), 1) + 1))])
    # Within a block of equal confidence the k-th answer finds wrong_before + (k - start) * share wrong, on average.
    share = of_wrong / np.maximum(all_weight, 1)
    risks = of_wrong + (wrong_before - share * start) * (harmonic[end] - harmonic[start])
    return _ratio(risks.sum(1), all_weight.sum(1))


def _blocks(score: np.ndarray, wrong: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Answers of equal score together, the highest first: their weight, that of the wrong ones, and the scores."""
    if not len(score):
        return np.zeros((len(weights), 0), int), np.zeros((len(weights), 0), int), score
    if (np.diff(score) < 0).all():  # in order, and all differ
        return weights, weights * wrong, score
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=np.inf))
    ordered = weights[:, order]
    if len(starts) == len(order):  # all scores differ, as they do of most answers
        return ordered, ordered * wrong[order], score[order]
    of_wrong = np.add.reduceat(ordered * wrong[order], starts, axis=1)
    return np.add.reduceat(ordered, starts, axis=1), of_wrong, score[order][starts]


def _by_scikit_learn(assessed: Sequence[Assessed]) -> dict[str, list[float]]:
    """The figures themselves that scikit-learn has; their resampled values come from the sums above, for speed."""
    confidence, (rows, wrong) = confidences(assessed), attempted(assessed)
    both = len(set(wrong.tolist())) == 2
    if not both or (confidence is None and any(item.entropy is None for item in assessed)):
        return {}
    from sklearn.metrics import brier_score_loss, roc_auc_score  # here, as it takes a second

    found = {}
    if confidence is not None:
        found["auroc"] = [float(roc_auc_score(~wrong, confidence))]
        found["brier"] = [float(brier_score_loss(~wrong, np.minimum(confidence, 1)))]
    if all(item.entropy is not None for item in assessed):
        found["semantic_entropy_auroc"] = [float(roc_auc_score(wrong, [assessed[row].entropy for row in rows]))]
    return found


def _difference(both: Sequence[Assessed], first: np.ndarray, second: np.ndarray) -> dict[str, np.ndarray]:
    of_first, of_second = _in_batches(both, first), _in_batches(both, second)
    return {name: of_second[name] - of_first[name] for name in of_first}


def resampled(prompts: int, seed: int) -> np.ndarray:
    """How often each prompt counts in each of `RESAMPLES` bootstrap samples, `[RESAMPLES, prompts]`."""
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)


def _in_batches(assessed: Sequence[Assessed], counts: np.ndarray) -> dict[str, np.ndarray]:
    answers = sum(len(item.outcomes) for item in assessed)
    parts = [figures(assessed, rows) for rows in np.array_split(counts, len(counts) * answers // BATCH + 1)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Not a number where `below` is zero."""
    return np.where(below > 0, above / np.where(below > 0, below, 1), np.nan)
