"""How true answers are: each is compared with its reference, and the shares are averaged over prompts.

The references are sentences ("The capital of Portugal is Lisbon."). What decides is the part that the question does not
already say: `decisive_parts`.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

METRICS = ("hallucination_rate", "contains_truth", "exact_match", "token_f1", "self_consistency")
RESAMPLES = 10_000
BATCH = 2_000_000  # resampled values in memory at a time

# Words that carry no fact by themselves.
EMPTY_WORDS = frozenset(
    """a an the is are was were be been being do does did has have had in on at by to from for with as or its it this
    that there which who whom whose what when where why how began begin begun started occurred happened took
    place""".split()
)
NAMING_WORDS = frozenset({"is", "are", "was", "were", "by"})  # a name is likely to follow
JOINING_WORDS = frozenset({"of", "and"})  # these hold a name together, as in "Gateway of India"


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


def words(text: str) -> list[str]:
    """The words that the decisive-part rule compares: lower case, without accents, punctuation or a possessive `'s`.

    A number keeps its sign and its decimals, and loses the commas between thousands; `C++` and `C#` keep their signs.
    Chinese and Japanese are written without spaces: each of their characters is a word.
    """
    plain = re.sub(f"[{_ACCENTS}]", "", unicodedata.normalize("NFKD", text.lower().replace("\u2212", "-")))
    found = _WORD.findall(re.sub(r"['’]s\b", "", unicodedata.normalize("NFC", plain)))
    return [word.replace(",", "").removeprefix("+") for word in found]


_ACCENTS = "\u0300-\u036f"  # of Latin, Greek and Cyrillic letters; elsewhere marks are vowels, or other consonants
_MARKS = "".join(letter for letter in map(chr, range(0x0370, 0xFE00)) if unicodedata.category(letter).startswith("M"))
_ALONE = "\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff"  # kana and Han characters
_WORD = re.compile(
    rf"[{_ALONE}]|(?:(?<![\w.,])[-+<>≤≥])?\d+(?:,\d{{3}})*(?:\.\d+)*(?!\.?\w)"
    rf"|(?:(?![{_ALONE}])[\w{_MARKS}])+(?:[+#]+(?![\w+#]))?"
)


def decisive_parts(prompt: str, reference: str) -> list[str]:
    """What an answer must hold to be true: the runs of words of the reference that the question does not already say.

    The reference is cut at words that carry no fact (is, in, by, ...) and at words of the question, in this form or
    with another ending ("founded" says "founder" too); what stands together stays together. "The capital of Portugal is
    Lisbon." to "What is the capital of Portugal?" leaves "lisbon". Behind `is`, `was` or `by` a name keeps the words
    that it shares with the question ("Panama City"). To a question for a time only the parts with a number count.
    Where no word is left, its symbols decide (+, €, an emoji), those that the question does not already have; and where
    there are none either, the whole reference.
    """
    said = {_stem(word) for word in words(prompt)}
    segments: list[list[str]] = [[]]
    keeps_names = [False]
    for word in words(reference):
        if word in EMPTY_WORDS:
            segments.append([])
            keeps_names.append(word in NAMING_WORDS)
        else:
            segments[-1].append(word)
    runs: list[list[str]] = []
    for segment, keeps_name in zip(segments, keeps_names, strict=True):
        is_said = [_stem(word) in said or word in JOINING_WORDS for word in segment]
        if keeps_name and not all(is_said):
            runs.append(segment)
            continue
        runs.append([])
        for word in segment:
            if _stem(word) in said:
                runs.append([])
            else:
                runs[-1].append(word)
    parts = [part for run in runs if (part := " ".join(_without_joining_ends(run)))]
    if re.match(r"when\b|(in )?(what|which) year\b", " ".join(words(prompt))):
        parts = [part for part in parts if re.search(r"\d", part)] or parts
    asked = symbols(prompt)
    parts = parts or [symbol for symbol in symbols(reference) if symbol not in asked]
    return parts or [" ".join(words(reference)) or _as_it_stands(reference)]


def symbols(text: str) -> list[str]:
    """The signs that stand together in a text, without the punctuation around them: `+`, `€`, an emoji."""
    runs = re.findall(r"[^\w\s]+", _as_it_stands(text))
    kept = [run.strip(_AROUND) for run in runs]
    return [run for run in kept if any(unicodedata.category(sign).startswith("S") for sign in run)]


def holds(answer: str, parts: Sequence[str]) -> bool:
    """Whether every part stands in the answer: words as whole words, symbols as they are."""
    text = f" {' '.join(words(answer))} "
    return all(f" {part} " in text if words(part) else _has_symbol(answer, part) for part in parts)


def _has_symbol(answer: str, part: str) -> bool:
    text = _as_it_stands(answer)
    return part in (*symbols(text), *text.split(), text) and text != ""


def _as_it_stands(text: str) -> str:
    # Without the sign that asks for a coloured picture: it is the same emoji.
    return unicodedata.normalize("NFC", text.replace("\ufe0f", "")).strip()


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
    unanswerable: bool = False  # the file has a column `answer`, and it is empty here: only a refusal is right
    logprobs: tuple[float, ...] | None = None  # of the answers, in nats


def truths(prompt: Prompt) -> list[list[str]]:
    """What an answer may hold to be true: the parts of one of these. An alias counts whole, but for its article."""
    truth = " ".join(words(prompt.truth or "")) or _as_it_stands(prompt.truth or "")
    parts = [truth] if truth else decisive_parts(prompt.question or prompt.prompt, prompt.reference)
    return [parts, *([alias] for text in prompt.aliases if (alias := _without_article(text)))]


def _without_article(text: str) -> str:
    found = words(text)
    return " ".join(found[1:] if len(found) > 1 and found[0] in ("a", "an", "the") else found) or _as_it_stands(text)


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
    test = stats.permutation_test(
        (units,), np.sum, permutation_type="samples", vectorized=True, n_resamples=RESAMPLES - 1,
        batch=BATCH // len(units) + 1, rng=np.random.default_rng(seed),
    )  # fmt: skip
    return {"difference": float(values.mean()), "difference_ci": interval, "p_value": float(test.pvalue)}


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """The 95% percentile bootstrap interval of a mean; of a single value, that value."""
    if len(values) == 1:
        return [float(values[0])] * 2
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


def _without_joining_ends(words: list[str]) -> list[str]:
    while words and words[0] in JOINING_WORDS:
        words = words[1:]
    while words and words[-1] in JOINING_WORDS:
        words = words[:-1]
    return words


def _stem(word: str) -> str:
    """A word without a common ending, if enough of it is left to tell it from others."""
    for ending in ("ing", "ed", "er", "or", "es", "s"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word.removesuffix(ending)
    return word


_AROUND = "".join(sign for sign in string.punctuation if not unicodedata.category(sign).startswith("S")) + "‘’“”–—…"
_PUNCTUATION = frozenset(string.punctuation + "‘’“”–—…")
