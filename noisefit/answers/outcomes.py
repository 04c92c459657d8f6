"""The three outcomes of an answer, right, wrong and not attempted (as in SimpleQA, Wei et al., arXiv 2411.04368)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from noisefit.answers.refusals import after_refusal, is_refusal, says_something
from noisefit.answers.scoring import Prompt, holds, truths

RIGHT, WRONG, NOT_ATTEMPTED = "right", "wrong", "not_attempted"
OUTCOMES = (RIGHT, WRONG, NOT_ATTEMPTED)


@dataclass(frozen=True)
class Assessed:
    """A prompt with the outcome of each of its answers and, where asked for, their semantic entropy in nats."""

    prompt: Prompt
    outcomes: tuple[str, ...]
    entropy: float | None = None


def calls_for_refusal(prompt: Prompt, more: Sequence[str] = ()) -> bool:
    """Whether a question is to be refused: its column `answer` is empty, or its reference or answer is a refusal."""
    return prompt.unanswerable or is_refusal(prompt.truth or prompt.reference, more)


def outcome(prompt: Prompt, answer: str, more: Sequence[str] = ()) -> str:
    """`RIGHT`, `WRONG` or `NOT_ATTEMPTED`.

    A question that is to be refused is answered right by a refusal and wrong by whatever else says something. To the
    others a refusal is no attempt; an answer that follows a refusal is one, and is judged by what it says beside that.
    An empty answer is none.

    Args:
        prompt: the question; its own answers do not matter here.
        answer: the answer.
        more: further phrases that refuse.
    """
    if not answer.strip():
        return NOT_ATTEMPTED
    left = after_refusal(answer, more)
    if calls_for_refusal(prompt, more):
        refused = left is not None and not says_something(left, prompt.question or prompt.prompt)
        return RIGHT if refused else WRONG
    if any(holds(answer if left is None else left, parts) for parts in truths(prompt)):
        return RIGHT
    if left is not None and not says_something(left, prompt.question or prompt.prompt):
        return NOT_ATTEMPTED
    return WRONG


def assess(prompts: Sequence[Prompt], more: Sequence[str] = ()) -> list[Assessed]:
    """Each prompt with the outcomes of its answers."""
    return [Assessed(prompt, tuple(outcome(prompt, answer, more) for answer in prompt.answers)) for prompt in prompts]
