"""The score's table of single prompts: the verdict on each, the words that decided, and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from noisefit.answers.outcomes import NOT_ATTEMPTED, OUTCOMES, RIGHT, Assessed, calls_for_refusal
from noisefit.answers.refusals import after_refusal
from noisefit.answers.scoring import holds, score_prompt, truths

MIXED = "mixed"
REFUSAL_WANTED = "a refusal"


def row_of(item: Assessed, more: Sequence[str] = ()) -> dict[str, Any]:
    """A prompt's row.

    Returns:
        `verdict`, the outcome of all rounds, or `mixed`; `outcomes`, each round's. `decisive`, what had to be held: of
        several true answers one list each, of a question that is to be refused a refusal. `found` and `missing`, a
        list a round: what each answer has of the true one that fits it best. Then the figures: means over the rounds;
        `confidence` their mean, where there are log-probabilities. Lists are JSON.
    """
    prompt, outcomes = item.prompt, item.outcomes
    alternatives = truths(prompt)
    if calls_for_refusal(prompt, more):
        alternatives = [[REFUSAL_WANTED]]
        found = [[REFUSAL_WANTED] if o == RIGHT else [] for o in outcomes]
        missing = [[] if o == RIGHT else [REFUSAL_WANTED] for o in outcomes]
    else:
        pairs = [_found_and_missing(answer, alternatives, more) for answer in prompt.answers]
        found, missing = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    shares = {kind: float(np.mean([o == kind for o in outcomes])) for kind in OUTCOMES}
    attempts = 1 - shares[NOT_ATTEMPTED]
    row: dict[str, Any] = {
        "prompt": prompt.prompt,
        "response": prompt.reference,
        "verdict": outcomes[0] if len(set(outcomes)) == 1 else MIXED,
        "outcomes": outcomes,
        "decisive": alternatives if len(alternatives) > 1 else alternatives[0],
        "found": found,
        "missing": missing,
        "answers": prompt.answers,
    }
    row |= {f"{kind}_rate": share for kind, share in shares.items()}
    row |= {"attempted_rate": attempts, "right_given_attempted": shares[RIGHT] / attempts if attempts else ""}
    row |= score_prompt(prompt)
    if prompt.logprobs is not None:
        row["confidence"] = float(np.mean(np.exp(prompt.logprobs)))
    if item.entropy is not None:
        row["semantic_entropy"] = item.entropy
    return row


def _found_and_missing(
    answer: str, alternatives: Sequence[Sequence[str]], more: Sequence[str]
) -> tuple[list[str], list[str]]:
    left = after_refusal(answer, more)
    text = answer if left is None else left
    held = [[part for part in parts if holds(text, [part])] for parts in alternatives]
    best = max(range(len(held)), key=lambda i: len(held[i]) / len(alternatives[i]))
    return held[best], [part for part in alternatives[best] if part not in held[best]]
