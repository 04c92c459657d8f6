"""How true answers are: each is compared with its reference, and the shares are averaged over prompts.

The references are sentences ("The capital of Portugal is Lisbon."). What decides is the part that the question does not
already say: `decisive_parts`, of `noisefit/method/decisive.py`.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from noisefit.method.decisive import decisive_parts, holds, named_part, symbols, words

__all__ = ["decisive_parts", "holds", "symbols", "words"]  # they were defined here

METRICS = ("hallucination_rate", "contains_truth", "exact_match", "token_f1", "self_consistency")
RESAMPLES = 10_000
BATCH = 2_000_000  # resampled values in memory at a time


def normalize(text: str) -> str:
    """The usual SQuAD normalisation (Rajpurkar et al., arXiv 1606.05250): lower case, no punctuation, no articles.

    Text without a word, such as `+`, is compared as it stands.
    """
    if not re.search(r"\w", text):
        return " ".join(text.split())
    plain = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the normalised words, 0 to 1."""
    got, wanted = normalize(answer).split(), normalize(reference).split()
    if not got or not wanted:
        return float(got == wanted)
    common = sum((Counter(got) & Counter(wanted)).values())
    return 2 * common / (len(got) + len(wanted))


@dataclass(frozen=True)
class Prompt:
    """One question with its reference and the answers of all rounds."""

    prompt: str
    reference: str
    answers: tuple[str, ...]
    truth: str | None = None  # the decisive part, where the file names it in a column `answer`
    group: str = ""
    question: str = ""  # where the prompt says more: a passage that holds the answer, say
    aliases: tuple[str, ...] = ()  # other true answers
    unanswerable: bool = False  # the column `answer` is there and empty, and no list of answers: a refusal is right
    logprobs: tuple[float, ...] | None = None  # of the answers, in nats


def truths(prompt: Prompt) -> list[list[str]]:
    """What an answer may hold to be true: the parts of one of these. An alias counts whole, but for its article."""
    truth = named_part(prompt.truth or "")
    parts = [truth] if truth else decisive_parts(prompt.question or prompt.prompt, prompt.reference)
    return [parts, *([alias] for text in prompt.aliases if (alias := _without_article(text)))]


def _without_article(text: str) -> str:
    found = words(text)
    return " ".join(found[1:]) if len(found) > 1 and found[0] in ("a", "an", "the") else named_part(text)


def score_prompt(prompt: Prompt) -> dict[str, float]:
    """Each of `METRICS` for one prompt, averaged over its rounds.

    Of several true answers the one that fits an answer best counts. Self-consistency is the share of pairs of rounds
    whose normalised answers are the same; 1 for a single round.
    """
    alternatives = truths(prompt)
    answers = [normalize(answer) for answer in prompt.answers]
    pairs = [a == b for a, b in combinations(answers, 2)]
    true = float(np.mean([any(holds(answer, parts) for parts in alternatives) for answer in prompt.answers]))
    references = (prompt.reference, *prompt.aliases)
    same = {normalize(text) for text in references}
    return {
        "hallucination_rate": 1 - true,
        "contains_truth": true,
        "exact_match": float(np.mean([answer in same for answer in answers])),
        "token_f1": float(np.mean([max(token_f1(a, text) for text in references) for a in prompt.answers])),
        "self_consistency": float(np.mean(pairs)) if pairs else 1.0,
    }


def summarize(prompts: Sequence[Prompt], seed: int = 0) -> dict[str, float | list[float]]:
    """Means over prompts, each with a 95% bootstrap interval over prompts under `<metric>_ci`."""
    scores = [score_prompt(prompt) for prompt in prompts]
    summary: dict[str, float | list[float]] = {}
    for metric in METRICS:
        values = np.array([score[metric] for score in scores])
        summary[metric] = float(values.mean())
        summary[f"{metric}_ci"] = bootstrap_interval(values, seed)
    return summary | {"prompts": len(prompts), "answers": sum(len(prompt.answers) for prompt in prompts)}


def compare(first: Sequence[Prompt], second: Sequence[Prompt], seed: int = 0) -> dict[str, float | list[float]]:
    """The difference in hallucination rate, second minus first, over the same prompts.

    Returns:
        `difference`, its 95% interval `difference_ci` from a bootstrap over prompts, and `p_value`, two-sided, of the
        sign-flip permutation test over prompts: how often differences of random sign are as large. Unlike a p-value
        read off the bootstrap it is valid for a few prompts too.
    """
    rate = {prompt.prompt: score_prompt(prompt)["hallucination_rate"] for prompt in first}
    values = np.array([score_prompt(prompt)["hallucination_rate"] - rate[prompt.prompt] for prompt in second])
    interval = bootstrap_interval(values, seed)
    if len(values) == 1:
        return {"difference": float(values[0]), "difference_ci": interval, "p_value": 1.0}
    units = np.rint(values * 1e9)  # whole numbers add up exactly, so ties are ties
    from scipy import stats  # here, as it takes a second

    test = stats.permutation_test(
        (units,), np.sum, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES - 1,
        batch=BATCH // len(units) + 1, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return {"difference": float(values.mean()), "difference_ci": interval, "p_value": float(test.pvalue)}


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """The 95% percentile bootstrap interval of a mean; of a single value, that value."""
    if len(values) == 1:
        return [float(values[0])] * 2
    from scipy import stats  # here, as it takes a second

    found = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", batch=BATCH // len(values) + 1,
        rng=np.random.default_rng(seed),
    )  # fmt: skip
    return [float(end) for end in found.confidence_interval]


def group_by(prompts: Sequence[Prompt]) -> Mapping[str, list[Prompt]]:
    """Prompts by their group, groups in order of first appearance."""
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(prompt.group, []).append(prompt)
    return groups


_PUNCTUATION = frozenset(string.punctuation + "‘’“”–—…")
