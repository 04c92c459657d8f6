"""How probable the model finds an answer: `log p`, summed over its tokens, from the logits that they were drawn from.

It is the model's own distribution: what temperature, penalties and top-p make of it is not asked. To read it where the
tokens are drawn costs a pass over the logits, where a pass of its own would cost as much as the answers. But the last
bits of float32 logits depend on the batch, and a rounded number can flip at a border of its grid for any difference. So
an answer that is nearer to a border than its error can be is passed through the model again, alone, without cache and
padding: one computation, whatever the batch. Away from the borders no such error matters.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor

from noisefit.base.precision import as_float64

DECIMALS = 3
FEWEST, MOST = 3, 5  # significant digits
# Twice the error of a float32 logit, as a share of one plus the largest. What it bounds was measured over batch sizes,
# with and without a cache: a sum's error was at most a quarter of it (docs/answers.md).
LOGIT_ERROR = 20 * torch.finfo(torch.float32).eps


def round_log_p(value: float) -> float:
    """To `DECIMALS` decimals, but for `FEWEST` significant digits at the least and `MOST` at the most.

    Zero has no sign, and what is not finite stays as it is.
    """
    if value == 0 or not math.isfinite(value):
        return value + 0.0
    ahead = 1 + math.floor(math.log10(abs(value)))  # digits before the point; negative where zeros follow it
    return round(value, min(max(DECIMALS, FEWEST - ahead), MOST - ahead)) + 0.0


def is_near_border(value: float, error: float) -> bool:
    """Whether a value with this error could be rounded to another number."""
    return round_log_p(value - error) != round_log_p(value + error)


def token_log_p(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`log softmax(logits)` at one token a row, and its error where the logits are float32.

    The largest logit is left out of the sum of exponentials: for `p` near 1 its rounding would be all of `log p`. An
    error of the logits of `d` at the most moves `log p` by `2 d (1 - p)` at the most.

    Args:
        logits: `[N, V]`, float32 or wider; minus infinity is a token that the model rules out.
        tokens: `[N]`, int64.

    Returns:
        Each `[N]`, float64; on the CPU where the device has none.
    """
    largest, at = logits.max(dim=-1, keepdim=True)
    others = (logits - largest).exp_().scatter_(-1, at, 0.0).sum(dim=-1, keepdim=True)
    below = as_float64(logits.gather(-1, tokens.unsqueeze(-1)) - largest)
    log_p = below - as_float64(others).log1p()
    error = -log_p.expm1() * LOGIT_ERROR * (1 + as_float64(largest).abs())
    return log_p.squeeze(-1), error.squeeze(-1)


class LogPOfDrawn:
    """Two processors around those by which a token is drawn: the first keeps the model's own logits, the last finds
    there the token that greedy search is about to take.

    Attributes:
        of_tokens: for each step what `token_log_p` says of each row; of one that has ended it means nothing.
    """

    def __init__(self) -> None:
        self.of_tokens: list[tuple[Tensor, Tensor]] = []
        self.first, self.last = KeepLogits(), ReadDrawn(self)


class KeepLogits(LogitsProcessor):
    """Keeps the logits of a step as the model gives them."""

    logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[rows, V]`: the scores as they are."""
        self.logits = scores
        return scores


class ReadDrawn(LogitsProcessor):
    """Finds the token that is left the likeliest in the logits that were kept."""

    def __init__(self, owner: LogPOfDrawn):
        self.owner = owner

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[rows, V]`: the scores as they are."""
        kept, self.owner.first.logits = self.owner.first.logits, None
        assert kept is not None
        self.owner.of_tokens.append(token_log_p(kept, scores.argmax(dim=-1)))
        return scores


def accepted_inputs(model: Any) -> set[str]:
    """The names of what a model's `forward` takes; of one with an adapter beside it, of the model below, which gets
    whatever the adapter's own takes no notice of."""
    below = model.get_base_model() if isinstance(model, PeftModel) else model
    return set(inspect.signature(below.forward).parameters)


def input_device(model: Any) -> torch.device:
    """Where a model's inputs belong: of one that is sharded, the first device that computes.

    Weights that are on a CPU or a disk between their uses are computed with on that device, too.
    """
    places = (getattr(model, "hf_device_map", None) or {}).values()
    if not places:
        return next(model.parameters()).device
    place = next((place for place in places if str(place) not in ("cpu", "disk")), "cpu")
    return torch.device(place)


def answer_logits(model: Any, prompt: list[int], answer: list[int], copies: int = 1) -> Tensor:
    """The logits that each token of an answer is drawn from, all in one pass over prompt and answer, without a cache.

    Args:
        model: a causal language model, with or without an adapter.
        prompt: its tokens.
        answer: its tokens, at least one.
        copies: rows of the pass, all alike.

    Returns:
        `[copies, len(answer), V]`, float32 or wider.
    """
    ids = torch.tensor([prompt + answer], device=input_device(model)).expand(copies, -1)
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    if "logits_to_keep" in accepted_inputs(model):
        inputs["logits_to_keep"] = len(answer) + 1
    logits: Tensor = model(**inputs).logits[:, -len(answer) - 1 : -1]
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def answer_log_p(model: Any, prompt: list[int], answer: list[int]) -> float:
    """`log p` of an answer to a prompt, by a pass for it alone: a function of the two and the model."""
    [logits] = answer_logits(model, prompt, answer)
    log_p, _ = token_log_p(logits, torch.tensor(answer, device=logits.device))
    return float(log_p.sum())
