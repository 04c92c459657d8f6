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
from noisefit.base.help import add_help
from noisefit.base.settings import add_flags, check_fields, fields_of, words_of
from noisefit.inputs.lora import check_lora
from noisefit.inputs.models import ModelSettings
from noisefit.inputs.prompts import PromptSettings
from noisefit.inputs.templates import check_date
from noisefit.run.contradictions import check_evaluation, check_hub, check_objective
from noisefit.run.data_settings import DataSettings, check_data
from noisefit.run.method_settings import CalibrationSettings, KnowledgeSettings, LossSettings, NoiseSettings
from noisefit.run.optimizers import optimizer_words
from noisefit.run.run_settings import (
    EvaluationSettings,
    FileSettings,
    HubSettings,
    KillSettings,
    RecordSettings,
    StepSettings,
)

GROUPS: dict[str, type] = {
    "what goes in and what comes out": FileSettings,
    "the rows": DataSettings,
    "the method: the loss": LossSettings,
    "the method: the noise": NoiseSettings,
    "the method: noise that calibrates itself": CalibrationSettings,
    "rows that the model does not know": KnowledgeSettings,
    "the steps": StepSettings,
    "the model": ModelSettings,
    "the prompts": PromptSettings,
    "kills": KillSettings,
    "what is looked at while it trains": EvaluationSettings,
    "records": RecordSettings,
    "the hub": HubSettings,
}
# The ten that `--help` shows with what they do; the others it names.
FIRST = ("model", "train_data", "eval_data", "output_model", "loss_mode", "unknown_rows", "noise_std", "epochs",
         "learning_rate", "batch_size")  # fmt: skip
# Of one run alone: a repetition of it has its own.
NOT_REPEATED = ("resume_from_checkpoint", "overwrite_output", "push_to_hub", "hub_private")
PASSED_OVER = ("noisefit_version", "best")  # what noisefit_config.json says besides


@dataclass(frozen=True, kw_only=True)
class Settings(
    HubSettings, RecordSettings, EvaluationSettings, KillSettings, PromptSettings, ModelSettings, StepSettings,
    KnowledgeSettings, CalibrationSettings, NoiseSettings, LossSettings, DataSettings, FileSettings,
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
            if not all(words_of(getattr(self, name))):
                raise InputError(f"--{name} is required; see --help")
        if self.quantization != "none" and self.full_finetune:
            raise InputError("--full_finetune cannot train quantized weights; leave out --quantization")
        if self.unknown_rows == "refuse" and not self.refusal.strip():
            raise InputError("--refusal is empty; give the answer that unknown rows are to get")
        if self.prompt_date is not None:
            check_date(self.prompt_date)
        check_data(self)
        check_objective(self)
        check_evaluation(self)
        check_hub(self)
        object.__setattr__(self, "lora", check_lora(self))
        object.__setattr__(self, "optim_args", optimizer_words(self.optim_args))

    def record(self) -> dict[str, Any]:
        """What defines the run, by name, in the order of `--help`: it repeats the run when given as `--config`."""
        found = asdict(self)
        return {field.name: found[field.name] for cls in GROUPS.values() for field in fields_of(cls)
                if field.name not in NOT_REPEATED}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """All flags, grouped by what they touch, each with what it does to the method."""
    parser = OneLineParser(
        prog="train_loop.py",
        usage="accelerate launch train_loop.py --model MODEL --train_data DATA [options]",
        description="Fine-tune a causal language model with NoiseFiT (arXiv 2504.03302). Start it with `accelerate "
        "launch`, which sets devices, processes and mixed precision.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    add_flags(parser, GROUPS)
    add_switches(parser)
    where_from = parser.add_argument_group("where flags come from")
    where_from.add_argument(
        "--config", type=a_path, metavar="FILE",
        help="any of these flags from a YAML file, or a run's noisefit_config.json; the command line wins",
    )  # fmt: skip
    add_token(where_from)
    add_help(parser, FIRST)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """Flags of the command line over those of `--config` over the defaults.

    The token leaves `sys.argv` for the environment, as trackers record the command line.

    Raises:
        InputError: an unknown flag, a value out of range, a required flag that is missing, or flags that contradict
            each other.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    of_answers = {"input_csv": "answers, for generate.py"}
    given = without_token(dict(parse_flags(build_parser(), argv, PASSED_OVER, of_answers)))
    return Settings(**{"model": "", "train_data": ""} | given)
