"""Sampling whose randomness is a function of what is answered, not of how the work was cut.

Gumbel-max: the token with the largest `log p + g`, `g` standard Gumbel noise, is a draw from `p` exactly (Gumbel 1954;
Maddison et al., arXiv 1411.0030). The noise is a hash of seed, prompt, round, position and token, so an answer is the
same on any number of processes and in any batch.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from transformers import LogitsProcessor, RepetitionPenaltyLogitsProcessor, TopPLogitsWarper

from noisefit.base.errors import LocalError
from noisefit.base.precision import as_float64

# Odd constants of the finalizers of SplitMix64 (Steele et al., OOPSLA 2014), as signed 64-bit integers.
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
# Tokens among which top-p is looked for first: it rarely leaves more, and to sort a whole vocabulary takes long.
LIKELIEST = 512
# Of sums of probabilities. A CPU adds them up in double; CUDA's scan of 256,000 makes about 260 roundings of 6e-8.
MARGIN = 3e-5
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def answer_key(seed: int, prompt: str, round_number: int, occurrence: int = 0) -> int:
    """A signed 64-bit key of one answer: a hash of the seed, the prompt's text and the round.

    `occurrence` counts the same prompt's earlier rows in the file, which are to get answers of their own.
    """
    digest = hashlib.sha256(f"{seed}\0{round_number}\0{occurrence}\0{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def gumbel_noise(keys: Tensor, position: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, a function of its arguments alone.

    Args:
        keys: int64, from `answer_key`, broadcastable to `tokens`.
        position: of the token in the answer, from 0.
        tokens: int64, vocabulary indices.

    Returns:
        float64, the shape of `tokens`.
    """
    bits = _mix(_mix(keys + _to_signed((position + 1) * _GOLDEN)) + tokens * _GOLDEN)
    uniform = (_shift(bits, 11).double() + 0.5) * 2.0**-53  # inside (0, 1), never an end
    return -torch.log(-torch.log(uniform))


class CheckFinite(LogitsProcessor):
    """Stops where the model's logits are no numbers. It stands before all others, which would hide it."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[rows, V]`: the scores as they are. Minus infinity is a token that the model rules out; not all may be."""
        bad = scores.isnan() | (scores == torch.inf)
        if bad.any() or (scores == -torch.inf).all(dim=-1).any():
            raise LocalError(
                "the model's logits are not finite numbers; look for NaN in the weights of model and adapter, or try "
                "--dtype float32"
            )
        return scores


class GumbelSampling(LogitsProcessor):
    """Draws a token from the logits that the warpers before it left finite, and leaves that token alone finite: greedy
    search then takes it.

    Args:
        keys: `[rows]`, int64, one `answer_key` a row.
        prompt_length: columns of `input_ids` before the answer, padding included.
        top_p: a warper that is run on the finite logits alone. It sorts, and of a whole vocabulary that takes longer
            than a small model's pass; the result is the same.
    """

    def __init__(self, keys: Tensor, prompt_length: int, top_p: TopPLogitsWarper | None = None):
        self.keys = keys
        self.prompt_length = prompt_length
        self.top_p = top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[rows, V]`: 0 for the drawn token, minus infinity for the others."""
        finite = torch.isfinite(scores).sum(dim=-1)
        if not finite.all():
            raise LocalError("the model's logits are not finite numbers once divided by --temperature; raise it")
        width, position = int(finite.max()), input_ids.shape[1] - self.prompt_length
        if self.top_p is None or width <= LIKELIEST:
            drawn = self._draw(input_ids, scores, width, position, self.keys)
        else:
            values, tokens, is_found = nucleus(scores, float(self.top_p.top_p), LIKELIEST)
            drawn = draw(values, tokens, position, self.keys)
            if not is_found.all():  # the others sort the whole vocabulary
                rows = ~is_found
                drawn[rows] = self._draw(input_ids[rows], scores[rows], width, position, self.keys[rows])
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)

    def _draw(self, input_ids: Tensor, scores: Tensor, width: int, position: int, keys: Tensor) -> Tensor:
        if self.top_p is None and width == scores.shape[1]:  # nothing to be left out, so nothing to be sorted
            return draw(scores, torch.arange(width, device=scores.device).expand_as(scores), position, keys)
        values, tokens = scores.topk(width) if width < scores.shape[1] else scores.sort(descending=True)
        if self.top_p is not None:
            values = self.top_p(input_ids, values)
        return draw(values, tokens, position, keys)


def draw(values: Tensor, tokens: Tensor, position: int, keys: Tensor) -> Tensor:
    """`[rows, 1]`: of each row's tokens, whose logits are `values`, the one that is drawn."""
    values = as_float64(values)
    place = values.device  # the CPU where the device has no float64
    noisy = values + gumbel_noise(keys.to(place).unsqueeze(-1), position, tokens.to(place))
    return tokens.gather(-1, noisy.argmax(dim=-1, keepdim=True).to(tokens.device))


def nucleus(scores: Tensor, top_p: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """What transformers' top-p leaves of the `count` likeliest tokens, where it leaves none of the others.

    A token stays while those before it are less likely than `top_p` together. transformers sums the probabilities in
    float32, from the least likely on. So a sum within `MARGIN` of `top_p`, and a border between equal logits, where its
    sort decides, are left to it.

    Args:
        scores: `[rows, V]`, float32.
        top_p: in (0, 1).
        count: less than V.

    Returns:
        Logits and tokens, each `[rows, count]`, minus infinity for those that go; and `[rows]`, whether it could be
        told.
    """
    values, tokens = scores.topk(count)
    p = (values - scores.logsumexp(dim=-1, keepdim=True)).exp()
    before = p.cumsum(dim=-1) - p
    stays = before < top_p
    is_tie = (values[:, 1:] == values[:, :-1]) & (stays[:, 1:] != stays[:, :-1])
    is_close = (before[:, 1:] - top_p).abs() <= MARGIN
    is_found = ~(stays[:, -1] | is_tie.any(dim=-1) | is_close.any(dim=-1))
    return values.masked_fill(~stays, -torch.inf), tokens, is_found


class RepetitionPenalty(RepetitionPenaltyLogitsProcessor):
    """transformers' repetition penalty, blind to the padding: its token would be penalized in padded rows alone, and
    an answer would depend on its neighbours in the batch.

    Args:
        penalty: as transformers has it.
        attention_mask: `[rows, prompt_length]`, of the left-padded prompts.
    """

    def __init__(self, penalty: float, attention_mask: Tensor):
        super().__init__(penalty)
        self.is_padding = attention_mask == 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`[rows, V]`: the scores, those of tokens that stand in prompt or answer made smaller."""
        prompt_length = self.is_padding.shape[1]
        last = input_ids[:, prompt_length - 1 : prompt_length]  # never padding, as it stands on the left
        prompt = torch.where(self.is_padding, last, input_ids[:, :prompt_length])
        return super().__call__(torch.cat([prompt, input_ids[:, prompt_length:]], dim=1), scores)


def _to_signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _shift(bits: Tensor, by: int) -> Tensor:
    """Logical shift to the right: torch's own keeps the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finalizer; multiplication wraps around, as int64 does on every device."""
    bits = (bits ^ _shift(bits, 30)) * _MIX_1
    bits = (bits ^ _shift(bits, 27)) * _MIX_2
    return bits ^ _shift(bits, 31)
