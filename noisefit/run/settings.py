"""The settings of a training: names and defaults of the published program, from a command line, a file or a program.

Each group is a class of its own, and `Settings` is all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from noisefit.base.command_line import HelpFormatter, OneLineParser, a_path, add_switches, hide_token, parse_flags
from noisefit.base.errors import InputError
from noisefit.base.settings import add_flags, check_fields, fields_of, not_default, setting
from noisefit.fork.branches import DROPOUT
from noisefit.inputs.models import ModelSettings
from noisefit.inputs.prompts import PromptSettings
from noisefit.inputs.templates import check_date
from noisefit.method.objectives import OBJECTIVES, Objective
from noisefit.method.snr import SNR_FORMATS

POLICIES = ("snr", "auto")  # what --noise_policy may be besides a file
# Schedules that need no further numbers.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
# Bounds far beyond any use, within which nothing overflows.
COUNT: dict[str, Any] = dict(low=0, high=10**9)
POSITIVE: dict[str, Any] = dict(low=1, high=10**9)
NON_NEGATIVE: dict[str, Any] = dict(low=0, high=1e6)
ABOVE_ZERO: dict[str, Any] = dict(low=0, high=1e6, open_low=True)
SHARE: dict[str, Any] = dict(low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class FileSettings:
    """What goes in and what comes out."""

    model: str = setting(
        help="the base model: a folder in the Hugging Face format, or a name on the hub (required)", is_path=True
    )
    train_data: str = setting(
        help="CSV, JSON Lines or Parquet with columns prompt and response (required)", is_path=True
    )
    output_model: str = setting(
        "output_model", "folder for the adapter, its tokenizer and the run's records", is_path=True
    )
    overwrite_output: bool = setting(False, "replace an adapter that is already there")
    eval_data: str | None = setting(
        None, "a file like --train_data; its cross-entropy, without noise, is measured in training", is_path=True
    )
    trust_remote_code: bool = setting(False, "run code that comes with the base model")


@dataclass(frozen=True, kw_only=True)
class NoiseSettings:
    """The noise, and which layers get it."""

    noise_policy: str = setting(
        "snr", "noisy layers by their SNR, calibrated, or as in the noise_policy.json of a calibrated run",
        metavar="snr|auto|FILE", is_path=True,
    )  # fmt: skip
    noise_std: float = setting(0.1, "noise strength; its square times std(h) is the base scale", **NON_NEGATIVE)
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


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is learnt."""

    loss_mode: str = setting("full", "the objective: NoiseFiT, a part of it, or a baseline", choices=tuple(OBJECTIVES))
    hybrid_loss_alpha: float = setting(0.5, "weight of the cross-entropy; the soft term has the rest", **SHARE)
    lambda_consistency: float = setting(0.1, "weight of the consistency term", **NON_NEGATIVE)
    temperature: float = setting(1.0, "softens the distributions of the soft and consistency terms", low=1e-3, high=1e3)
    neftune_alpha: float = setting(5.0, "noise strength of --loss_mode neftune", **NON_NEGATIVE)
    rdrop_alpha: float = setting(1.0, "weight of the symmetric KL of --loss_mode rdrop", **NON_NEGATIVE)
    rdrop_dropout: float = setting(
        0.05, "dropout of --loss_mode rdrop in each block, besides the model's and the adapter's own", low=0, high=0.99
    )
    loss_chunk_size: int = setting(256, "supervised tokens whose logits are in memory at a time", **POSITIVE)

    @property
    def objective(self) -> Objective:
        """What `loss_mode` stands for."""
        return OBJECTIVES[self.loss_mode]


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """The steps."""

    batch_size: int = setting(4, "rows a micro-batch, on each device", **POSITIVE)
    gradient_accumulation_steps: int = setting(4, "micro-batches an optimizer step", **POSITIVE)
    epochs: int = setting(5, "passes over the data", **POSITIVE)
    max_steps: int = setting(
        -1, "optimizer steps; training ends at this or --epochs, whichever comes first; -1 for no limit", low=1,
        also=(-1,),
    )  # fmt: skip
    learning_rate: float = setting(5e-5, "highest learning rate of the schedule", **ABOVE_ZERO)
    lr_scheduler_type: str = setting("cosine", "how the learning rate falls", choices=SCHEDULES)
    warmup_ratio: float = setting(0.0, "share of the steps in which the learning rate rises", **SHARE)
    weight_decay: float = setting(0.0, "weight decay of AdamW", **NON_NEGATIVE)
    max_grad_norm: float = setting(1.0, "gradients are scaled down to this norm; 0: never", **NON_NEGATIVE)
    max_bad_steps: int = setting(
        10, "a step whose loss or gradient is not finite is skipped; so many in a row end the run", **POSITIVE
    )
    seed: int = setting(42, "determines adapter, order of the rows, dropout and noise", **COUNT)


@dataclass(frozen=True, kw_only=True)
class KillSettings:
    """Kills."""

    save_steps: int = setting(100, "a checkpoint every so many steps and after the last; 0: none", **COUNT)
    save_total_limit: int = setting(2, "so many checkpoints are kept, the last ones; 0: all", **COUNT)
    resume_from_checkpoint: str | None = setting(
        None, "go on from a checkpoint; latest: of --output_model; auto: that, or afresh where none is",
        metavar="PATH|latest|auto", is_path=True,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RecordSettings:
    """Records."""

    logging_steps: int = setting(5, "a line of metrics every so many steps", **POSITIVE)
    eval_steps: int = setting(0, "evaluate every so many steps; 0: after each epoch", **COUNT)
    report_to: str = setting("none", "where metrics go besides metrics.jsonl", choices=("none", "wandb", "tensorboard"))
    run_name: str | None = setting(None, "name of the run there; default: the output folder's")


GROUPS: dict[str, type] = {
    "what goes in and what comes out": FileSettings,
    "the method: the loss": LossSettings,
    "the method: the noise": NoiseSettings,
    "the method: noise that calibrates itself": CalibrationSettings,
    "the steps": StepSettings,
    "the model": ModelSettings,
    "the prompts": PromptSettings,
    "kills": KillSettings,
    "records": RecordSettings,
}
# Of one run alone: a repetition of it has its own.
NOT_REPEATED = ("resume_from_checkpoint", "overwrite_output")


@dataclass(frozen=True, kw_only=True)
class Settings(
    RecordSettings, KillSettings, PromptSettings, ModelSettings, StepSettings, CalibrationSettings, NoiseSettings,
    LossSettings, FileSettings,
):  # fmt: skip
    """All settings of a training, checked: each value, and those that contradict each other.

        Settings(model="Qwen/Qwen2.5-0.5B", train_data="questions.csv", noise_std=0.2)

    Raises:
        InputError: a value is out of its range, or settings contradict each other; the line names the flags.
    """

    def __post_init__(self) -> None:
        check_fields(self)
        object.__setattr__(self, "auto_scale_factors", sorted(set(self.auto_scale_factors)))
        for name in ("model", "train_data"):
            if not getattr(self, name):
                raise InputError(f"--{name} is required; see --help")
        if self.quantization != "none" and self.full_finetune:
            raise InputError("--full_finetune cannot train quantized weights; leave out --quantization")
        if self.prompt_date is not None:
            check_date(self.prompt_date)
        check_objective(self)

    def record(self) -> dict[str, Any]:
        """What defines the run, by name, in the order of `--help`: it repeats the run when given as `--config`."""
        found = asdict(self)
        return {field.name: found[field.name] for cls in GROUPS.values() for field in fields_of(cls)
                if field.name not in NOT_REPEATED}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """All flags, grouped by what they touch, each with what it does to the method."""
    parser = OneLineParser(
        prog="train_loop.py",
        usage="accelerate launch train_loop.py --model MODEL --train_data FILE [options]",
        description="Fine-tune a causal language model with NoiseFiT (arXiv 2504.03302). Start it with `accelerate "
        "launch`, which sets devices, processes and mixed precision.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add_flags(parser, GROUPS)
    add_switches(parser)
    add = parser.add_argument_group("where flags come from").add_argument
    add("--config", type=a_path, metavar="FILE",
        help="any of these flags from a YAML file, or a run's noisefit_config.json; the command line wins")  # fmt: skip
    add("--hf_token", help="token for the hub; safer in the environment as HF_TOKEN. It is never written anywhere")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """Flags of the command line over those of `--config` over the defaults.

    The token leaves `sys.argv` for the environment, as trackers record the command line.

    Raises:
        InputError: an unknown flag, a value out of range, a required flag that is missing, or flags that contradict
            each other.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    given = dict(parse_flags(build_parser(), argv, passed_over=("noisefit_version",)))
    if token := given.pop("hf_token", None):
        hide_token(token)
    return Settings(**{"model": "", "train_data": ""} | given)


def check_objective(settings: Settings) -> None:
    """Refuse settings of the objective that contradict each other.

    Raises:
        InputError: as said.
    """
    objective, policy, given = settings.objective, settings.noise_policy, not_default(settings)
    if policy != "snr":
        chosen = "auto finds layers and their number by trying" if policy == "auto" else "the file says which layers"
        for flag in ("snr_format", "num_noise_layers"):
            if flag in given:
                raise InputError(f"--{flag} goes with --noise_policy snr alone: {chosen}; leave one of them out")
        if policy not in POLICIES and settings.snr_every:
            raise InputError("--snr_every measures the layers again, which --noise_policy FILE fixes; leave one out")
    noiseless = [flag for flag in ("noise_std", "num_noise_layers") if policy == "snr" and not getattr(settings, flag)]
    if objective.noise == "layers" and "ce" not in objective.losses and noiseless:
        raise InputError(f"--{noiseless[0]} 0 leaves --loss_mode {settings.loss_mode} nothing to learn; give it noise")


def without_effect(settings: Settings) -> str | None:
    """A line that names the settings which are not at their default and change nothing; `None` where there are none."""
    objective, policy = settings.objective, settings.noise_policy
    layers, measured = objective.noise == "layers", policy in POLICIES
    used = dict.fromkeys(("noise_policy", "num_noise_layers", "snr_format", "snr_every"), layers)
    used |= {field.name: layers and policy == "auto" for field in fields_of(CalibrationSettings)}
    used |= dict.fromkeys((name for o in OBJECTIVES.values() for name in o.reads), False)
    used |= dict.fromkeys(objective.reads, True)
    used |= {
        "noise_std": layers and policy == "snr",
        "prefer_late_layers": layers and measured,
        "snr_batches": not layers or measured,
        "branches": len(objective.branches) > 1,
        "rdrop_dropout": DROPOUT in objective.branches,
    }
    changed = not_default(settings)
    idle = [f"--{name}" for name in settings.record() if name in changed and not used.get(name, True)]
    if not idle:
        return None
    return f"without effect under --loss_mode {settings.loss_mode}, --noise_policy {policy}: {', '.join(idle)}"
