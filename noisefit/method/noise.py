"""Gaussian noise: how strong it is at each element of a hidden state, and drawing it.

Formulas: NoiseFiT (arXiv 2504.03302), section 3, "adaptive noise injection"; the constants are those of the
published program.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from noisefit.base.compiling import fused
from noisefit.base.precision import EPS, at_least_float32, masked_mean, mean_magnitude, row_lengths

BETA = 0.1  # how fast the noise fades for elements far from their token's median
MAX_TOKEN_FACTOR = 5.0


@torch.no_grad()
@fused
def snr_base_std(hidden: Tensor, noise_std: float, mask: Tensor | None = None) -> Tensor:
    """Base scale `s` of policy `snr`: `noise_std^2 * std(h)`, over the elements of all real tokens, without gradient.

    The square is the published program's: `--noise_std 0.1` injects the same noise here as there.

    Args:
        hidden: `[B, L, H]`, a decoder block's output.
        noise_std: the value of `--noise_std`.
        mask: `[B, L]`, non-zero at real tokens; `None` where all are real.

    Returns:
        A scalar tensor, float32 or wider.
    """
    hidden = at_least_float32(hidden)
    if mask is None:
        std = hidden.std()
    else:
        squares = masked_mean((hidden - masked_mean(hidden, mask)) ** 2, mask)
        count = mask.bool().sum() * hidden.shape[-1]
        std = (squares * count / (count - 1)).sqrt()
    return noise_std**2 * std


def lower_median(values: Tensor) -> Tensor:
    """The lower median over the last dimension, as `torch.median` gives it, where no value is NaN.

    Args:
        values: `[..., H]`, float32 or wider.

    Returns:
        `[..., 1]`, the dtype and device of `values`. A gradient goes to the element that is the median.
    """
    elsewhere = torch.compiler.is_compiling() or values.device.type != "cpu"
    if elsewhere or (values.requires_grad and torch.is_grad_enabled()):
        return values.median(dim=-1, keepdim=True).values
    # On a CPU torch's selection costs several times as much, as it also tracks where the median stood.
    middle = (values.shape[-1] - 1) // 2
    parted = np.partition(values.detach().numpy(), middle, axis=-1)
    return torch.from_numpy(parted[..., middle : middle + 1].copy())  # a view would keep all of `parted` alive


def _variance(h: Tensor) -> Tensor:
    """Of the elements of each token, `[B, L, H]` to `[B, L]`."""
    if h.device.type != "cpu":
        return h.var(dim=-1)
    # On a CPU torch.var goes element by element; two passes are as exact, and several times as fast.
    return (h - h.mean(dim=-1, keepdim=True)).square().sum(dim=-1) / (h.shape[-1] - 1)


@fused
def noise_scale(
    hidden: Tensor, base_std: float | Tensor, mask: Tensor | None = None, gradient: bool = False
) -> Tensor:  # fmt: skip
    """Standard deviation of the noise at each element: `sigma = s * mad * w * f`.

    Per token: `f = min(5, exp(v / (mean(v) + eps)))` with `v = var_H(h)` and the mean over real tokens;
    `m = median_H(h)`; `mad = median_H(|h - m|)`, at least `eps * ||h||_2`; per element
    `w = exp(-beta * |h - m| / (mad + eps))`. Both medians are the lower one, as `torch.median` gives it.

    Args:
        hidden: `[B, L, H]`, a decoder block's output. Low-precision input is computed in float32.
        base_std: the base scale `s`, see `snr_base_std`.
        mask: `[B, L]`, non-zero at real tokens; `None` where all are real.
        gradient: whether one flows through `mad`, `w` and `f`, as in the first published program.

    Returns:
        `[B, L, H]`, the dtype and device of `hidden`.
    """
    h = at_least_float32(hidden if gradient else hidden.detach())
    variance = _variance(h)
    token_factor = (variance / (masked_mean(variance, mask) + EPS)).exp().clamp(max=MAX_TOKEN_FACTOR)
    distance = (h - lower_median(h)).abs()
    floor = EPS * h.norm(dim=-1, keepdim=True)
    mad = torch.maximum(lower_median(distance), floor)
    weight = (distance * (-BETA / (mad + EPS))).exp()
    return (weight * (mad * token_factor.unsqueeze(-1) * base_std)).to(hidden.dtype)


def relative_scale(h: Tensor, noise_std: float | Tensor) -> Tensor:
    """`noise_std` times the token's own root mean square, the same in every element of it.

    Args:
        h: `[B, L, H]`, float32 or wider.
        noise_std: the noise's standard deviation as a share of the token's.

    Returns:
        `[B, L, H]`, the dtype and device of `h`; with gradient if it has one, 0 where a token is all zeros.
    """
    return (h.norm(dim=-1, keepdim=True) * (noise_std / math.sqrt(h.shape[-1]))).expand_as(h)


class TokenScaledNoise:
    """The method's noise in one layer: Gaussian, of standard deviation `noise_scale`, or relative to each token.

    It is all that SNR, calibration, training and metrics know of the noise. Another distribution is another class: one
    that inherits from this and says how it is drawn (`draw`) and how large a draw is on average (`mean_of_unit`). One
    that overrides `scale` uses `base_std` where that is given, in place of `noise_std`: a calibration tries several,
    and relies on noise that grows in proportion to it. `strength` multiplies it as well.

    Args:
        noise_std: the value of `--noise_std`: for a base scale of `snr_base_std`, or as `relative_scale` has it.
        base_std: a base scale that was measured, which takes its place.
        relative: whether the scale is `relative_scale`, and not `noise_scale`.

    Attributes:
        strength: multiplies every draw; a loop that is edited may change it from step to step.
        gradient: whether the scale's gradient flows into the hidden states; the base scale has none.
        max_to_signal: `mean(|noise|)` is at most this share of `mean(|hidden states|)`; 0: no limit.
        masked: whether there is none where the mask is 0; it need not be told of padding, which nothing looks at.
    """

    mean_of_unit = math.sqrt(2 / math.pi)  # of |x| for x from N(0, 1): so no noise needs to be drawn to measure it

    def __init__(self, noise_std: float = 0.0, base_std: float | None = None, relative: bool = False):
        self.noise_std, self.base_std, self.relative = noise_std, base_std, relative
        self.strength, self.gradient, self.max_to_signal, self.masked = 1.0, False, 0.0, False

    def scale(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """How large the noise is at each element: shape and device of `hidden_states`, float32 or wider.

        Args:
            hidden_states: `[B, L, H]`, a decoder block's output.
            mask: `[B, L]`, non-zero at real tokens; `None` where all are real.
        """
        h = at_least_float32(hidden_states if self.gradient else hidden_states.detach())
        if self.relative:
            sigma = relative_scale(h, (self.noise_std if self.base_std is None else self.base_std) * self.strength)
        else:
            base_std = snr_base_std(h, self.noise_std, mask) if self.base_std is None else self.base_std
            sigma = noise_scale(h, base_std * self.strength, mask, self.gradient)
        return sigma * mask.bool().unsqueeze(-1) if self.masked and mask is not None else sigma

    def draw(self, scale: Tensor) -> Tensor:
        """Noise of this scale, `[B, L, H]`, another one at each call.

        It comes from the device's default generator, which activation checkpointing restores when it runs a layer
        again; a private `torch.Generator` it does not, and a gradient that passes through the second draw would be
        silently wrong.
        """
        return torch.randn_like(scale) * scale

    def mean_size(self, scale: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of `|noise|` over real tokens and all draws, in closed form; a scalar, float32 or wider."""
        return masked_mean(at_least_float32(scale), mask) * self.mean_of_unit

    def capped(self, scale: Tensor, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """The scale, made smaller by one factor, without gradient, where `max_to_signal` asks for that."""
        return scale * self.limit(scale, hidden_states, mask).clamp(max=1) if self.max_to_signal else scale

    @torch.no_grad()
    def limit(self, scale: Tensor, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """By how much a scale may be multiplied before `max_to_signal` is reached; a scalar, without gradient."""
        size = self.mean_size(scale, mask)
        most = self.max_to_signal * mean_magnitude(hidden_states, mask)
        return most / size.clamp(min=torch.finfo(size.dtype).tiny)


class EmbeddingNoise(TokenScaledNoise):
    """NEFTune (arXiv 2310.05914, algorithm 1): uniform noise on the token embeddings, `U(-1, 1) * alpha / sqrt(L * H)`.

    `L` is the row's real tokens, so that a row's noise does not depend on how far its batch pads it. Padded tokens get
    none.

    Args:
        alpha: the value of `--neftune_alpha`.
    """

    mean_of_unit = 0.5  # of |U(-1, 1)|

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    def scale(self, hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """The largest noise at each element of the embeddings, float32 or wider."""
        token = at_least_float32(hidden_states[..., 0].detach())
        mask = torch.ones_like(token, dtype=torch.long) if mask is None else mask.long()
        lengths = row_lengths(mask).to(token.dtype)
        largest = self.alpha * self.strength / (lengths * hidden_states.shape[-1]).sqrt() * mask.bool()
        return largest.unsqueeze(-1).expand_as(hidden_states)

    def draw(self, scale: Tensor) -> Tensor:
        """Uniform noise up to this scale, to either side."""
        return (2 * torch.rand_like(scale) - 1) * scale
