"""The settings of the method: the noise, which layers get it, and what is learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from noisefit.base.refusal import REFUSAL
from noisefit.base.settings import setting
from noisefit.method.losses import TEMPERATURE_ON
from noisefit.method.objectives import OBJECTIVES, Objective
from noisefit.method.policy import ALL, NOISE_SCALES, NOISE_TOKENS
from noisefit.method.snr import SNR_FORMATS
from noisefit.method.teacher import TEACHERS

POLICIES = ("snr", "auto")  # what --noise_policy may be besides a file
# Bounds far beyond any use, within which nothing overflows.
COUNT: dict[str, Any] = dict(low=0, high=10**9)
POSITIVE: dict[str, Any] = dict(low=1, high=10**9)
NON_NEGATIVE: dict[str, Any] = dict(low=0, high=1e6)
ABOVE_ZERO: dict[str, Any] = dict(low=0, high=1e6, open_low=True)
SHARE: dict[str, Any] = dict(low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class NoiseSettings:
    """The noise, and which layers get it."""

    noise_policy: str = setting(
        "snr", "noisy layers by their SNR, calibrated, or as in the noise_policy.json of a calibrated run",
        metavar="snr|auto|FILE", is_path=True,
    )  # fmt: skip
    noise_std: float = setting(
        0.1, "noise strength; its square times std(h) is the base scale; under --noise_scale relative the share itself",
        **NON_NEGATIVE,
    )  # fmt: skip
    noise_scale: str = setting(
        "live", "the base scale is that of each pass, as published; frozen: measured at the start and kept; or noise "
        "that is relative to each token's own size", choices=NOISE_SCALES,
    )  # fmt: skip
    noise_gradient: bool = setting(
        False,
        "let the gradient flow through the noise's scale, as in the first published program: a model that is "
        "made to drown the noise then sees what that does to it; costs a few percent of a step",
    )
    max_noise_to_signal: float = setting(
        0.0,
        "noise that would be a larger share of the signal in a layer is made this share; 0: no limit",
        **NON_NEGATIVE,
    )
    noise_tokens: str = setting(
        ALL, "the tokens that get noise: all, those of the prompt or those of the response; the noise's statistics are "
        "of the same tokens", choices=NOISE_TOKENS,
    )  # fmt: skip
    num_noise_layers: int = setting(3, "how many decoder layers get noise; 0 is plain fine-tuning", **COUNT)
    snr_format: str = setting("Largest", "noise goes where the SNR is largest, or lowest", choices=SNR_FORMATS)
    snr_batches: int = setting(4, "micro-batches a process over which the SNR is averaged", **POSITIVE)
    prefer_late_layers: float = setting(
        0.0, "noise only past this share of the depth; the later it begins, the cheaper is a step", **SHARE
    )
    snr_every: int = setting(0, "measure and choose layers again every so many steps; 0: once", **COUNT)
    branches: str = setting(
        "auto", "clean and noisy branches in one forked pass or in three; auto forks where that is exact",
        choices=("auto", "fork", "separate"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """Noise that calibrates itself: `--noise_policy auto`."""

    auto_calib_batches: int = setting(2, "micro-batches a process that the noise is tried on", **POSITIVE)
    auto_scale_factors: list[float] = setting(
        [0.25, 0.5, 1.0, 1.5, 2.0], "the base scales that are tried, in units of 1 / sqrt(hidden size)",
        metavar="FACTOR", **ABOVE_ZERO,
    )  # fmt: skip
    auto_scale_l2_penalty: float = setting(
        0.05, "divides a scale's score by 1 + this times log2(factor)^2", **NON_NEGATIVE
    )
    auto_max_ce_delta_ratio: float = setting(
        0.02, "scales that raise the cross-entropy by a larger share are out", **NON_NEGATIVE
    )
    auto_max_layers: int = setting(0, "noisy layers at the most; 0: the square root of the layers", **COUNT)
    auto_depth_bands: int = setting(3, "bands of depth that the noisy layers are spread over", **POSITIVE)
    auto_target_kl_fraction: float = setting(
        0.75, "a layer's scale is the smallest whose KL is this share of the chosen layers' median", **SHARE
    )


UNKNOWN_ROWS = ("keep", "drop", "refuse", "weight")


@dataclass(frozen=True, kw_only=True)
class KnowledgeSettings:
    """Rows whose answer the base model does not know."""

    unknown_rows: str = setting(
        "keep", "rows whose answer the base model does not know, as it is probed at the start: train them as they are, "
        "leave them out, train them with --refusal as the answer, or with --unknown_weight", choices=UNKNOWN_ROWS,
    )  # fmt: skip
    unknown_below: float | None = setting(
        None, "a row is unknown if the mean log-probability of its answer's decisive tokens is lower; default: where "
        "the rows part in two groups", low=-1e6, high=0,
    )  # fmt: skip
    refusal: str = setting(REFUSAL, "the answer of unknown rows under --unknown_rows refuse")
    unknown_weight: float = setting(
        0.1, "weight of the unknown rows' cross-entropy under --unknown_rows weight", **NON_NEGATIVE
    )


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is learnt."""

    loss_mode: str = setting("full", "the objective: NoiseFiT, a part of it, or a baseline", choices=tuple(OBJECTIVES))
    hybrid_loss_alpha: float = setting(0.5, "weight of the cross-entropy; the soft term has the rest", **SHARE)
    lambda_consistency: float = setting(0.1, "weight of the consistency term", **NON_NEGATIVE)
    temperature: float = setting(1.0, "softens the distributions of the soft and consistency terms", low=1e-3, high=1e3)
    temperature_on: str = setting(
        "both", "it softens both sides of a term, times T^2; or the clean teacher alone, as in the first published "
        "program, which flattens the predictions also where there is no noise", choices=TEMPERATURE_ON,
    )  # fmt: skip
    teacher_gradient: bool = setting(
        False,
        "let the gradient flow into the teachers of the soft and consistency terms too, as in the first published "
        "program: the clean branch then also learns to agree with the noisy ones",
    )
    teacher: str = setting(
        "self", "whose predictions the soft term pulls to: the clean branch's own; base: those of the model before the "
        "training, its adapter switched off; ema: those of a moving average of the adapter", choices=TEACHERS,
    )  # fmt: skip
    teacher_decay: float = setting(
        0.99, "what the average of --teacher ema keeps of itself in each step", low=0, high=1
    )
    cache_teacher: int = setting(
        0, "compute the predictions of --teacher base once, and keep their likeliest tokens, so many, with the mass of "
        "the rest in the output folder; exact where that is the whole vocabulary; 0: a pass in each step", **COUNT,
    )  # fmt: skip
    neftune_alpha: float = setting(5.0, "noise strength of --loss_mode neftune", **NON_NEGATIVE)
    rdrop_alpha: float = setting(1.0, "weight of the symmetric KL of --loss_mode rdrop", **NON_NEGATIVE)
    rdrop_dropout: float = setting(
        0.05, "dropout of --loss_mode rdrop in each block, besides the model's and the adapter's own", low=0, high=0.99
    )
    loss_chunk_size: int = setting(
        256, "supervised tokens whose logits are in memory at a time; 1024 is faster on a GPU", **POSITIVE
    )

    @property
    def objective(self) -> Objective:
        """What `loss_mode` stands for."""
        return OBJECTIVES[self.loss_mode]
