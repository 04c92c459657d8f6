"""What a world's held-out answers are worth: errors by kind, and risk against coverage.

An answer is an attempt unless it refuses; a right one holds the truth. A refusal of what is to be refused is neither.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from questions import FALSE_PREMISE, KNOWN

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from noisefit.answers.outcomes import NOT_ATTEMPTED, RIGHT, outcome
from noisefit.answers.scoring import Prompt, words

KINDS = ("slip_rate", "forgotten_rate", "invented_untold_rate", "imagined_answered_rate")
COMPLETED = 3  # of a fact's five statements, from which on the base model is taken to know it
MATCHED = 0.9  # of the right answers of plain fine-tuning


@dataclass(frozen=True)
class Attempt:
    """An answer that is no refusal, to one of the held-out questions."""

    confidence: float  # exp(logprob), or what has the same order
    right: bool


def attempts(rows: Sequence[Mapping[str, str]]) -> list[Attempt]:
    """Those of generate.py's rows for test.csv, of one round."""
    found = []
    for row in rows:
        how = _outcome(row)
        to_refuse = row["kind"] != KNOWN
        if how == NOT_ATTEMPTED or (to_refuse and how == RIGHT):
            continue
        found.append(Attempt(float(np.exp(float(row["logprob"]))), how == RIGHT))
    return found


def wrong_by_right(answers: Sequence[Attempt]) -> list[int]:
    """How many wrong answers a threshold on confidence lets through that lets through k right ones, from k = 1.

    The threshold is the k-th right answer's confidence; answers of the same confidence are let through with it. After
    the last right answer, all wrong ones: the list has one entry more than there are right answers.
    """
    right = sorted((answer.confidence for answer in answers if answer.right), reverse=True)
    wrong = np.array([answer.confidence for answer in answers if not answer.right], float)
    return [*(int(np.sum(wrong >= threshold)) for threshold in right), len(wrong)]


def matched(curve: Sequence[int], asked: int, wanted: float) -> tuple[float, float]:
    """The wrong share of all questions at the threshold that lets through so many right answers.

    Args:
        curve: `wrong_by_right` of the method.
        asked: how many questions there are.
        wanted: right answers, of which there may be a fraction: the next whole number is reached.

    Returns:
        `wrong_at_matched_right` and the shortfall in it, both shares of `asked`. Where the method has fewer right
        answers than wanted, all its wrong ones count, and the right ones that are missing.
    """
    needed = reached(wanted)
    if needed == 0:
        return 0.0, 0.0
    right = len(curve) - 1
    short = max(0, needed - right)
    wrong = curve[-1] if short else curve[needed - 1]
    return (wrong + short) / asked, short / asked


def reached(wanted: float) -> int:
    """The least number of right answers that is no less than wanted."""
    return int(np.ceil(wanted - 1e-9))


def best_right_minus_wrong(curve: Sequence[int], asked: int) -> float:
    """The most that right answers exceed wrong ones by, over all thresholds, as a share of the questions."""
    return max([0, *(right + 1 - wrong for right, wrong in enumerate(curve[:-1]))]) / asked


def error_kinds(rows: Sequence[Mapping[str, str]], facts: Sequence[Mapping[str, str | int]]) -> dict[str, float]:
    """The wrong answers by kind, as shares of all questions.

    Args:
        rows: generate.py's for test.csv, of one round.
        facts: of facts.json: `completed` says how many of its statements the base model completes.

    Returns:
        `imagined_answered_rate`: a country that does not exist. `slip_rate`: another country named, or none, where
        taught responses name it; where they do not, nothing that answers any such question. Of the others
        `forgotten_rate`: a fact that the base model knows, and `invented_untold_rate`: one that it does not.
    """
    known = {(fact["country"], fact["relation"]) for fact in facts if int(fact["completed"]) >= COMPLETED}
    answers: dict[str, set[str]] = {}
    for fact in facts:
        answers.setdefault(str(fact["relation"]), set()).add(str(fact["answer"]))
    named = any(row["kind"] == KNOWN and _names(row["response"], {row["country"]}) for row in rows)
    counts = dict.fromkeys(KINDS, 0)
    for row in rows:
        if _outcome(row) in (RIGHT, NOT_ATTEMPTED):
            continue
        asked = row["country"], row["relation"]
        if row["kind"] == FALSE_PREMISE:
            counts["imagined_answered_rate"] += 1
        elif not _names(row["generated_response"], {row["country"]} if named else answers[row["relation"]]):
            counts["slip_rate"] += 1
        else:
            counts["forgotten_rate" if asked in known else "invented_untold_rate"] += 1
    return {kind: count / len(rows) for kind, count in counts.items()}


def _outcome(row: Mapping[str, str]) -> str:
    return outcome(Prompt(row["prompt"], row["response"], (), row["answer"]), row["generated_response"])


def _names(text: str, names: Collection[str]) -> bool:
    """Whether one of the names stands in the text, word for word."""
    said = f" {' '.join(words(text))} "
    return any(f" {' '.join(words(name))} " in said for name in names)
