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
        "snr",
        "which layers get noise: by their signal-to-noise ratio, which takes a forward pass or two at the start; "
        "auto tries layers and strengths, some 33 passes for 12 layers, and helped in none of our worlds; or a "
        "calibrated run's noise_policy.json",
        metavar="snr|auto|FILE", is_path=True,
    )  # fmt: skip
    noise_std: float = setting(
        0.1, "strength of the noise: its square times std(h) is the base scale; under --noise_scale relative the share "
        "of each token's size itself. Live noise of 0.2 and more may run away: make it relative. 0 is plain "
        "fine-tuning at the price of the branches",
        **NON_NEGATIVE,
    )  # fmt: skip
    noise_scale: str = setting(
        "live", "live: the base scale is that of each pass, as published; frozen: measured at the start and kept; "
        "relative: to each token's own size, the one to take for strong noise, and the cheapest (5% under live)",
        choices=NOISE_SCALES,
    )  # fmt: skip
    noise_gradient: bool = setting(
        False,
        "let the gradient flow through the noise's scale, as in the first published program: a model that is made "
        "to drown the noise then sees what that does to it. For strong live noise; price: 1% of a step, 8% of its "
        "memory",
    )
    max_noise_to_signal: float = setting(
        0.0,
        "noise that would be a larger share of the signal in a layer is made this share; 0: no limit. A stop for "
        "noise that runs away, not a cure: the hidden states still grow. Price: about 7% of a step",
        **NON_NEGATIVE,
    )
    noise_tokens: str = setting(
        ALL, "the tokens that get noise: all, those of the prompt or those of the response; the noise's statistics are "
        "of the same tokens. Costs nothing", choices=NOISE_TOKENS,
    )  # fmt: skip
    num_noise_layers: int = setting(
        3,
        "how many decoder layers get noise. Price: the first of them decides, see --prefer_late_layers. 0 is "
        "plain fine-tuning, at its price",
        **COUNT,
    )
    snr_format: str = setting(
        "Largest",
        "noise goes where the SNR is largest, often in early layers, which cost most; or lowest",
        choices=SNR_FORMATS,
    )
    snr_batches: int = setting(
        4, "micro-batches a process over which the SNR is averaged: a forward pass each, once", **POSITIVE
    )
    prefer_late_layers: float = setting(
        0.0,
        "noise only past this share of the depth. The later it begins, the cheaper is a step: of 12 layers 2.65 "
        "times plain fine-tuning from layer 0 on, 1.47 from layer 9",
        **SHARE,
    )
    snr_every: int = setting(
        0,
        "measure and choose layers again every so many steps, for a model that changes much; --snr_batches passes "
        "each time; 0: once",
        **COUNT,
    )
    branches: str = setting(
        "auto",
        "clean and noisy branches in one forked pass or in three; auto forks where that is exact. separate: the "
        "published step, dropout masks included; more time, and with --gradient_checkpointing less memory",
        choices=("auto", "fork", "separate"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """Noise that calibrates itself: `--noise_policy auto`."""

    auto_calib_batches: int = setting(
        2,
        "micro-batches a process that the noise is tried on; more are steadier, and cost their share of the "
        "calibration",
        **POSITIVE,
    )
    auto_scale_factors: list[float] = setting(
        [0.25, 0.5, 1.0, 1.5, 2.0],
        "the base scales that are tried, in units of 1 / sqrt(hidden size); each is a branch more in the "
        "calibration",
        metavar="FACTOR", **ABOVE_ZERO,
    )  # fmt: skip
    auto_scale_l2_penalty: float = setting(
        0.05,
        "divides a scale's score by 1 + this times log2(factor)^2: larger keeps nearer to factor 1",
        **NON_NEGATIVE,
    )
    auto_max_ce_delta_ratio: float = setting(
        0.02,
        "scales that raise the cross-entropy by a larger share are out: the one to lower if calibrated noise hurts",
        **NON_NEGATIVE,
    )
    auto_max_layers: int = setting(0, "noisy layers at the most; 0: the square root of the layers", **COUNT)
    auto_depth_bands: int = setting(
        3, "bands of depth that the noisy layers are spread over; 1: wherever they score best", **POSITIVE
    )
    auto_target_kl_fraction: float = setting(
        0.75,
        "a layer's scale is the smallest whose KL is this share of the chosen layers' median: lower is less noise",
        **SHARE,
    )


UNKNOWN_ROWS = ("keep", "drop", "refuse", "weight")


@dataclass(frozen=True, kw_only=True)
class KnowledgeSettings:
    """Rows whose answer the base model does not know."""

    unknown_rows: str = setting(
        "keep",
        "rows whose answer the base model does not know, as it is probed at the start (one pass over the data): "
        "train them as they are, leave them out, train them with --refusal as the answer, or with "
        "--unknown_weight. What helped most in our worlds: weight or drop and a threshold on confidence; refuse "
        "without one", choices=UNKNOWN_ROWS,
    )  # fmt: skip
    unknown_below: float | None = setting(
        None, "a row is unknown if the mean log-probability of its answer's decisive tokens is lower; default: where "
        "the rows part in two groups, and where they do not, this is needed", low=-1e6, high=0,
    )  # fmt: skip
    refusal: str = setting(
        REFUSAL,
        "the answer of unknown rows under --unknown_rows refuse; in words that the model refuses with already, "
        "others work much worse",
    )
    unknown_weight: float = setting(
        0.1,
        "weight of the unknown rows' cross-entropy under --unknown_rows weight; 0 is drop at the price of the rows",
        **NON_NEGATIVE,
    )


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is learnt."""

    loss_mode: str = setting(
        "full",
        "the objective. full is NoiseFiT as published, 1.3 to 3.1 times the price of plain fine-tuning (basefit): "
        "alone it helped little or not at all in our worlds, and with --teacher base it did "
        "(configs/base_teacher.yaml, docs/experiment.md). The others are its parts and baselines",
        choices=tuple(OBJECTIVES),
    )
    hybrid_loss_alpha: float = setting(
        0.5,
        "weight of the cross-entropy; the soft term has the rest. Nearer to 1: more right answers, and with "
        "--teacher base more made up",
        **SHARE,
    )
    lambda_consistency: float = setting(
        0.1,
        "weight of the consistency term; at 0, --loss_mode ce_kl is the same for two branches' price",
        **NON_NEGATIVE,
    )
    temperature: float = setting(
        1.0,
        "softens the distributions of the soft and consistency terms; above 1 unlikely tokens count more. Costs "
        "nothing",
        low=1e-3,
        high=1e3,
    )
    temperature_on: str = setting(
        "both", "it softens both sides of a term, times T^2; or the clean teacher alone, as in the first published "
        "program, which flattens the predictions also where there is no noise: to repeat that program, not to use",
        choices=TEMPERATURE_ON,
    )  # fmt: skip
    teacher_gradient: bool = setting(
        False,
        "let the gradient flow into the teachers of the soft and consistency terms too, as in the first published "
        "program: the clean branch then also learns to agree with the noisy ones. To repeat that program; costs "
        "nothing",
    )
    teacher: str = setting(
        "self",
        "whose predictions the soft term pulls to: the clean branch's own; base: the model before the training, "
        "its adapter switched off, which keeps refusals that it has; ema: a moving average of the adapter. The "
        "last two cost a forward pass a step, half a plain one with LoRA", choices=TEACHERS,
    )  # fmt: skip
    teacher_decay: float = setting(
        0.99,
        "what the average of --teacher ema keeps of itself in each step; 0.99 looks back some hundred steps",
        low=0,
        high=1,
    )
    cache_teacher: int = setting(
        0, "compute the predictions of --teacher base once, and keep their likeliest tokens, so many, with the mass "
        "of the rest, in the output folder: 8 K + 4 bytes a token instead of a pass a step. 64 or so; exact where "
        "that is the whole vocabulary; 0: a pass in each step", **COUNT,
    )  # fmt: skip
    neftune_alpha: float = setting(
        5.0, "noise strength of --loss_mode neftune; the paper tries 5, 10 and 15", **NON_NEGATIVE
    )
    rdrop_alpha: float = setting(
        1.0, "weight of the symmetric KL of --loss_mode rdrop; the paper's alpha is twice this", **NON_NEGATIVE
    )
    rdrop_dropout: float = setting(
        0.05,
        "dropout of --loss_mode rdrop in each block, besides the model's and the adapter's own; 0 leaves the "
        "branches no difference but those",
        low=0,
        high=0.99,
    )
    loss_chunk_size: int = setting(
        0,
        "supervised tokens whose logits are in memory at a time; 0: 256, and 1024 on a GPU, where the losses are "
        "compiled. The memory is 3 x this x vocabulary; a larger one keeps a GPU busier",
        low=0,
    )

    @property
    def objective(self) -> Objective:
        """What `loss_mode` stands for."""
        return OBJECTIVES[self.loss_mode]
