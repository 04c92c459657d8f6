"""Token-scaled Gaussian noise: how strong it is at each element of a hidden state, and drawing it.

Formulas: NoiseFiT (arXiv 2504.03302), section 3, "adaptive noise injection"; the constants are those of the
published program.
"""

from __future__ import annotations

import math
import weakref

import numpy as np
import torch
from torch import Tensor

from noisefit.precision import at_least_float32

EPS = 1e-6
BETA = 0.1  # how fast the noise fades for elements far from their token's median
MAX_TOKEN_FACTOR = 5.0


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens.

    Args:
        values: `[B, L]` or `[B, L, H]`, floating point.
        mask: `[B, L]`, non-zero at real tokens; `None` where all are real.

    Returns:
        A scalar tensor of the dtype of `values`.
    """
    if mask is None:
        return values.mean()
    real = mask.bool().view(*mask.shape, *[1] * (values.dim() - 2))
    elements_per_token = values[0, 0].numel()
    # torch.where and not a product: a NaN at a padded position must not reach the sum.
    return torch.where(real, values, 0).sum() / (real.sum() * elements_per_token)


def snr_base_std(hidden: Tensor, noise_std: float, mask: Tensor | None = None) -> Tensor:
    """Base scale `s` of policy `snr`: `noise_std^2 * std(h)`, over the elements of all real tokens.

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
        `[..., 1]`, the dtype and device of `values`, without gradient.
    """
    if values.device.type != "cpu":
        return values.detach().median(dim=-1, keepdim=True).values
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


@torch.no_grad()
def noise_scale(hidden: Tensor, base_std: float | Tensor, mask: Tensor | None = None) -> Tensor:
    """Standard deviation of the noise at each element: `sigma = s * mad * w * f`.

    Per token: `f = min(5, exp(v / (mean(v) + eps)))` with `v = var_H(h)` and the mean over real tokens;
    `m = median_H(h)`; `mad = median_H(|h - m|)`, at least `eps * ||h||_2`; per element
    `w = exp(-beta * |h - m| / (mad + eps))`. Both medians are the lower one, as `torch.median` gives it.

    Args:
        hidden: `[B, L, H]`, a decoder block's output. Low-precision input is computed in float32.
        base_std: the base scale `s`, see `snr_base_std`.
        mask: `[B, L]`, non-zero at real tokens; `None` where all are real.

    Returns:
        `[B, L, H]`, the dtype and device of `hidden`, without gradient.
    """
    h = at_least_float32(hidden)
    variance = _variance(h)
    token_factor = (variance / (masked_mean(variance, mask) + EPS)).exp().clamp(max=MAX_TOKEN_FACTOR)
    distance = (h - lower_median(h)).abs()
    floor = EPS * h.norm(dim=-1, keepdim=True)
    mad = torch.maximum(lower_median(distance), floor)
    weight = (distance * (-BETA / (mad + EPS))).exp()
    return (weight * (mad * token_factor.unsqueeze(-1) * base_std)).to(hidden.dtype)


def noise_to_signal(hidden: Tensor, sigma: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean magnitudes of noise and signal over real tokens.

    For noise drawn from `N(0, sigma^2)` the mean of `|noise|` has a closed form, `sigma * sqrt(2 / pi)`, so no
    noise needs to be drawn.

    Args:
        hidden, sigma: `[B, L, H]`.
        mask: `[B, L]`, non-zero at real tokens; `None` where all are real.

    Returns:
        Two scalar tensors, float32 or wider: `mean(|noise|)` and `mean(|h|)`.
    """
    noise = masked_mean(at_least_float32(sigma), mask) * math.sqrt(2 / math.pi)
    signal = masked_mean(at_least_float32(hidden).abs(), mask)
    return noise, signal


class RecordedNoise:
    """A running record of how strong the noise was."""

    def __init__(self) -> None:
        self._ratios: list[Tensor] = []

    def pop_noise_to_signal(self) -> Tensor:
        """Mean of `mean(|noise|) / mean(|h|)` over the calls since the last pop; a scalar, NaN if none."""
        ratios, self._ratios = self._ratios, []
        return torch.stack(ratios).mean() if ratios else torch.tensor(math.nan)


class TokenScaledNoise(RecordedNoise):
    """The noise of one layer, and a running record of how strong it was.

    Args:
        noise_std: the value of `--noise_std`, for a base scale of `snr_base_std`.
        base_std: a calibrated base scale, which takes its place.
    """

    def __init__(self, noise_std: float, base_std: float | None = None):
        super().__init__()
        self.noise_std, self.base_std = noise_std, base_std
        self._of_branch_1: tuple[weakref.ref[Tensor], Tensor, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, hidden: Tensor, branch: int, mask: Tensor | None = None) -> Tensor:
        """Draw noise for `hidden`, `[B, L, H]`; the result has its shape, dtype and device.

        `mask` is `[B, L]`, non-zero at real tokens; `None` where all are real. Branch 2 gets the scale of branch 1 if
        it comes right after it with the very same tensor (and so the same mask), as at the fork. But each call draws
        afresh. The draw comes from the device's default generator, which activation checkpointing
        restores when it runs a layer again; a private `torch.Generator` it does not, and a gradient that passes
        through the second draw would be silently wrong.
        """
        known, self._of_branch_1 = self._of_branch_1, None
        if branch == 2 and known is not None and known[0]() is hidden:
            _, sigma, ratio = known  # where the fork is, both branches start from one tensor
        else:
            base_std = snr_base_std(hidden, self.noise_std, mask) if self.base_std is None else self.base_std
            sigma = noise_scale(hidden, base_std, mask)
            noise, signal = noise_to_signal(hidden, sigma, mask)
            ratio = noise / (signal + EPS)  # stays on the device: `.item()` here would stall a GPU
        if branch == 1:
            self._of_branch_1 = weakref.ref(hidden), sigma, ratio
        self._ratios.append(ratio)
        return torch.randn_like(hidden) * sigma


class EmbeddingNoise(RecordedNoise):
    """NEFTune (arXiv 2310.05914, algorithm 1): uniform noise on the token embeddings, `U(-1, 1) * alpha / sqrt(L * H)`.

    `L` is the row's real tokens, so that a row's noise does not depend on how far its batch pads it.

    Args:
        alpha: the value of `--neftune_alpha`.
    """

    def __init__(self, alpha: float):
        super().__init__()
        self.alpha = alpha

    @torch.no_grad()
    def __call__(self, hidden: Tensor, branch: int, mask: Tensor | None = None) -> Tensor:
        """Draw noise for the embeddings `hidden`, `[B, L, H]`, as `TokenScaledNoise` does; zero at padded tokens."""
        mask = torch.ones_like(hidden[..., 0]) if mask is None else mask.bool().to(hidden.dtype)
        lengths = at_least_float32(mask).sum(dim=1)
        largest = self.alpha / (lengths * hidden.shape[-1]).sqrt()  # [B]
        limit = largest.view(-1, 1, 1) * mask.unsqueeze(-1)
        # The mean of |U(-1, 1)| is 1/2.
        noise, signal = (
            masked_mean(limit.expand_as(hidden), mask) / 2,
            masked_mean(at_least_float32(hidden).abs(), mask),
        )
        self._ratios.append(noise / (signal + EPS))
        return ((2 * torch.rand_like(hidden) - 1) * limit).to(hidden.dtype)
