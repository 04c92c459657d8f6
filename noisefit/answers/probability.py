"""How probable the model finds an answer: `log p`, summed over its tokens, from the logits that they were drawn from.

It is the model's own distribution: what temperature, penalties and top-p make of it is not asked. To read it where the
tokens are drawn costs a pass over the logits, where a pass of its own would cost as much as the answers. But the last
bits of float32 logits depend on the batch, and a rounded number can flip at a border of its grid for any difference. So
an answer within `TOLERANCE` of a border is passed through the model again, alone and without a cache or padding, which
is one computation whatever the batch; and away from borders no difference within the tolerance matters.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

DIGITS = 4  # significant ones at the least; and never fewer than three decimals
# Of the sum, in float32. A logit's error moves `log p` by at most twice that error times `1 - p`, which is less than
# `-log p`: so a sum's relative error is bounded by twice the largest error of a logit, however small the sum.
TOLERANCE = 1e-5


def round_log_p(value: float) -> float:
    """To `DIGITS` significant digits, and to three decimals where these are more; never to a negative zero."""
    if value == 0 or not math.isfinite(value):
        return value + 0.0
    return round(value, DIGITS - 1 + max(0, -math.floor(math.log10(abs(value))))) + 0.0


def is_near_border(value: float, tolerance: float = TOLERANCE) -> bool:
    """Whether a value that differs by this share at the most could be rounded to another number."""
    return round_log_p(value * (1 - tolerance)) != round_log_p(value * (1 + tolerance))


def token_log_p(logits: Tensor, tokens: Tensor) -> Tensor:
    """`log softmax(logits)` at one token a row.

    The largest logit is left out of the sum of exponentials: for `p` near 1 its rounding would be all of `log p`.

    Args:
        logits: `[N, V]`, float32 or wider; minus infinity is a token that the model rules out.
        tokens: `[N]`, int64.

    Returns:
        `[N]`, float64.
    """
    largest, at = logits.max(dim=-1, keepdim=True)
    others = (logits - largest).exp_().scatter_(-1, at, 0.0).sum(dim=-1, keepdim=True)
    below = (logits.gather(-1, tokens.unsqueeze(-1)) - largest).double()
    return (below - others.double().log1p()).squeeze(-1)


class LogPOfDrawn:
    """Two processors around those by which a token is drawn: the first keeps the model's own logits, the last finds
    there the token that greedy search is about to take.

    Attributes:
        of_tokens: for each step `[rows]`, float64; of a row that has ended they mean nothing.
    """

    def __init__(self) -> None:
        self.of_tokens: list[Tensor] = []
        self.first, self.last = _Keep(), _Read(self)


class _Keep(LogitsProcessor):
    logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits = scores
        return scores


class _Read(LogitsProcessor):
    def __init__(self, owner: LogPOfDrawn):
        self.owner = owner

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        kept, self.owner.first.logits = self.owner.first.logits, None
        assert kept is not None
        self.owner.of_tokens.append(token_log_p(kept, scores.argmax(dim=-1)))
        return scores


def answer_logits(model: Any, prompt: list[int], answer: list[int], copies: int = 1) -> Tensor:
    """The logits that each token of an answer is drawn from, all in one pass without a cache.

    Args:
        model: a causal language model, with or without an adapter.
        prompt: its tokens.
        answer: its tokens, at least one.
        copies: rows of the pass, all alike.

    Returns:
        `[copies, len(answer), V]`, float32 or wider.
    """
    ids = torch.tensor([prompt + answer[:-1]], device=next(model.parameters()).device).expand(copies, -1)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = len(answer)
    logits: Tensor = model(**inputs).logits[:, -len(answer) :]
    return logits if logits.dtype == torch.float64 else logits.float()


def answer_log_p(model: Any, prompt: list[int], answer: list[int]) -> float:
    """`log p` of an answer to a prompt, by a pass for it alone: a function of the two and the model."""
    [logits] = answer_logits(model, prompt, answer)
    return float(token_log_p(logits, torch.tensor(answer, device=logits.device)).sum())
