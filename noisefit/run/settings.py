"""The settings of a training: names and defaults of the published program, from a command line, a file or a program.

Each group is a class of its own, and `Settings` is all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from noisefit.base.command_line import (
    HelpFormatter,
    OneLineParser,
    a_path,
    add_switches,
    add_token,
    parse_flags,
    without_token,
)
from noisefit.base.errors import InputError
from noisefit.base.settings import add_flags, check_fields, fields_of, not_default, setting
from noisefit.fork.branches import DROPOUT, NOISY
from noisefit.inputs.models import ModelSettings
from noisefit.inputs.prompts import PromptSettings
from noisefit.inputs.templates import check_date
from noisefit.method.objectives import OBJECTIVES
from noisefit.method.policy import ALL
from noisefit.method.teacher import BASE, EMA, SELF
from noisefit.run.method_settings import (
    ABOVE_ZERO,
    COUNT,
    NON_NEGATIVE,
    POLICIES,
    POSITIVE,
    SHARE,
    CalibrationSettings,
    KnowledgeSettings,
    LossSettings,
    NoiseSettings,
)

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
class StepSettings:
    """The steps."""

    batch_size: int = setting(4, "rows a micro-batch, on each device", **POSITIVE)
    gradient_accumulation_steps: int = setting(4, "micro-batches an optimizer step", **POSITIVE)
    packing: bool = setting(
        False, "no padding: rows one behind the other; for mixed lengths, with --attn_implementation flash_attention_2"
    )
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
    "rows that the model does not know": KnowledgeSettings,
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
    RecordSettings, KillSettings, PromptSettings, ModelSettings, StepSettings, KnowledgeSettings, CalibrationSettings,
    NoiseSettings, LossSettings, FileSettings,
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
        if self.unknown_rows == "refuse" and not self.refusal.strip():
            raise InputError("--refusal is empty; give the answer that unknown rows are to get")
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
    where_from = parser.add_argument_group("where flags come from")
    where_from.add_argument(
        "--config", type=a_path, metavar="FILE",
        help="any of these flags from a YAML file, or a run's noisefit_config.json; the command line wins",
    )  # fmt: skip
    add_token(where_from)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """Flags of the command line over those of `--config` over the defaults.

    The token leaves `sys.argv` for the environment, as trackers record the command line.

    Raises:
        InputError: an unknown flag, a value out of range, a required flag that is missing, or flags that contradict
            each other.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    given = without_token(dict(parse_flags(build_parser(), argv, passed_over=("noisefit_version",))))
    return Settings(**{"model": "", "train_data": ""} | given)


def check_objective(settings: Settings) -> None:
    """Refuse settings of the objective that contradict each other.

    Raises:
        InputError: as said.
    """
    objective, policy, given = settings.objective, settings.noise_policy, not_default(settings)
    _check_teacher(settings)
    if policy != "snr":
        chosen = "auto finds layers and their number by trying" if policy == "auto" else "the file says which layers"
        for flag in ("snr_format", "num_noise_layers"):
            if flag in given:
                raise InputError(f"--{flag} goes with --noise_policy snr alone: {chosen}; leave one of them out")
        if policy not in POLICIES and settings.snr_every:
            raise InputError("--snr_every measures the layers again, which --noise_policy FILE fixes; leave one out")
    if settings.noise_tokens != ALL and settings.loss_on == "all" and objective.noise == "layers":
        raise InputError(f"--noise_tokens {settings.noise_tokens}: under --loss_on all a row is one text, without a "
                         "prompt and a response; leave one of them out")  # fmt: skip
    noiseless = [flag for flag in ("noise_std", "num_noise_layers") if policy == "snr" and not getattr(settings, flag)]
    softened = _is_softened(settings) and settings.teacher == SELF
    if objective.noise == "layers" and noiseless and softened and "soft" in objective.losses:
        raise InputError(
            f"--temperature_on teacher with --temperature {settings.temperature:g} is a loss without noise, too, but "
            f"--{noiseless[0]} 0 asks for plain fine-tuning; leave one of them out"
        )
    if objective.noise == "layers" and "ce" not in objective.losses and noiseless:
        raise InputError(f"--{noiseless[0]} 0 leaves --loss_mode {settings.loss_mode} nothing to learn; give it noise")


def _check_teacher(settings: Settings) -> None:
    objective, flag = settings.objective, f"--teacher {settings.teacher}"
    if settings.cache_teacher and settings.teacher != BASE:
        raise InputError(f"--cache_teacher keeps predictions that do not change, and those of {flag} do; give "
                         "--teacher base, or leave it out")  # fmt: skip
    if settings.teacher == SELF:
        if "soft" in objective.losses and NOISY not in objective.branches:
            raise InputError(f"--loss_mode {settings.loss_mode} has nobody to learn from under --teacher self: without "
                             "noise its predictions are the teacher's; give --teacher base or ema")  # fmt: skip
        return
    if "soft" not in objective.losses:
        having = ", ".join(name for name, other in OBJECTIVES.items() if "soft" in other.losses)
        raise InputError(f"{flag} is the teacher of the soft term, which --loss_mode {settings.loss_mode} does not "
                         f"have; leave one of them out ({having} have it)")  # fmt: skip
    if settings.full_finetune:
        what = "the model with its adapter off" if settings.teacher == BASE else "an average of the adapter"
        raise InputError(f"{flag} is {what}, and --full_finetune trains without one; leave one of them out")


def _is_softened(settings: Settings) -> bool:
    return settings.temperature_on == "teacher" and settings.temperature != 1


def without_effect(settings: Settings) -> str | None:
    """A line that names the settings which are not at their default and change nothing; `None` where there are none."""
    objective, policy = settings.objective, settings.noise_policy
    layers, measured = objective.noise == "layers", policy in POLICIES
    used = dict.fromkeys(("noise_policy", "num_noise_layers", "snr_format", "snr_every"), layers)
    used |= {field.name: layers and policy == "auto" for field in fields_of(CalibrationSettings)}
    used |= dict.fromkeys((name for o in OBJECTIVES.values() for name in o.reads), False)
    used |= dict.fromkeys(objective.reads, True)
    if "temperature_on" in objective.reads:
        used["temperature_on"] = settings.temperature != 1
        used["temperature"] = settings.temperature_on == "both" or "soft" in objective.losses
    if settings.teacher != SELF:  # no gradient flows there: the consistency term alone has one then
        used["teacher_gradient"] &= "consistency" in objective.losses
    noisy = layers and (policy != "snr" or bool(settings.num_noise_layers and settings.noise_std))
    used |= {
        "noise_std": layers and policy == "snr",
        # A calibrated base scale is a number, so it is frozen as it is.
        "noise_scale": noisy and (policy == "snr" or settings.noise_scale == "relative"),
        "noise_gradient": noisy,
        "max_noise_to_signal": noisy,
        "noise_tokens": noisy,
        "prefer_late_layers": layers and measured,
        "unknown_below": settings.unknown_rows != "keep",
        "refusal": settings.unknown_rows == "refuse",
        "unknown_weight": settings.unknown_rows == "weight",
        "snr_batches": not layers or measured,
        "branches": len(objective.branches) > 1,
        "teacher_decay": settings.teacher == EMA,
        "rdrop_dropout": DROPOUT in objective.branches,
    }
    changed = not_default(settings)
    idle = [f"--{name}" for name in settings.record() if name in changed and not used.get(name, True)]
    if not idle:
        return None
    how = {"--loss_mode": settings.loss_mode, "--noise_policy": policy, "--unknown_rows": settings.unknown_rows}
    if not {"--unknown_below", "--refusal", "--unknown_weight"} & {*idle}:
        del how["--unknown_rows"]
    return f"without effect under {', '.join(f'{flag} {value}' for flag, value in how.items())}: {', '.join(idle)}"
