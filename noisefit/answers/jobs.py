"""What is to be answered, what an answer is, and how both are put into batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Job:
    """A prompt and the rounds in which it is to be answered."""

    index: int  # of the prompt in the file
    prompt: str
    input_ids: list[int]
    rounds: tuple[int, ...]
    occurrence: int = 0  # how often the same prompt stood in the file before


class Answer(NamedTuple):
    """What the CSV says of an answer; the noisy figures are `None` where they are not asked for.

    Attributes:
        text: cut at the end of the turn, stripped.
        logprob: natural logarithm of its probability under the model's own distribution, summed over its tokens.
        tokens: how many these are; the one that ended it is counted, where it was generated.
        noise_logprob_mean: of the same sum, over passes with noise.
        noise_logprob_spread: its standard deviation over these passes, which divides by their number.
    """

    text: str
    logprob: float
    tokens: int
    noise_logprob_mean: float | None = None
    noise_logprob_spread: float | None = None


Answered = tuple[int, int, Answer]
"""`(index of the prompt, round, answer)`."""


@dataclass(frozen=True)
class Abstention:
    """When an answer is replaced by a refusal: where its confidence, `exp(logprob)`, is under `below`."""

    below: float
    refusal: str

    def replaces(self, answer: Answer) -> bool:
        """Whether it does so with this answer. It goes by the figure in the CSV, so that all can be checked there."""
        return not math.exp(answer.logprob) >= self.below


def plan_batches(jobs: Iterable[Job], batch_size: int) -> list[list[Job]]:
    """Jobs as batches of at most `batch_size` answers, prompts of similar length together, the longest first.

    A job of more rounds than that is cut.
    """
    pieces = []
    for job in sorted(jobs, key=lambda job: (-len(job.input_ids), job.index)):
        for start in range(0, len(job.rounds), batch_size):
            pieces.append(replace(job, rounds=job.rounds[start : start + batch_size]))
    batches: list[list[Job]] = []
    size = batch_size
    for piece in pieces:
        size += len(piece.rounds)
        if size > batch_size:
            batches.append([])
            size = len(piece.rounds)
        batches[-1].append(piece)
    return batches


def left_pad(rows: Sequence[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask`, `[rows, longest]` int64, padded on the left."""
    import torch  # here, as it takes seconds, and the score's programs need none of it

    longest = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
