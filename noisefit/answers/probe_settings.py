"""The settings of `python -m noisefit.probe`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from noisefit.answers.settings import AnswerSettings, DrawSettings
from noisefit.base.command_line import HelpFormatter, OneLineParser, add_switches, add_token, without_token
from noisefit.base.errors import InputError
from noisefit.base.settings import add_flags, check_fields, setting
from noisefit.inputs.columns import parse_columns
from noisefit.inputs.templates import check_date


@dataclass(frozen=True, kw_only=True)
class ProbeFileSettings:
    """What goes in and what comes out."""

    model: str = setting(help="the base model: a folder, or a name on the hub (required)", is_path=True)
    train_data: str = setting(
        help="CSV, JSON Lines or Parquet with columns prompt and response (required)", is_path=True
    )
    columns: list[str] | None = setting(
        None, "what its columns are called, as in training: prompt=question response=answer; --output has our names",
        metavar="NAME=COLUMN",
    )  # fmt: skip
    output: str = setting(help="CSV for the rows with their scores (required)", is_path=True)
    overwrite_output: bool = setting(False, "replace a file that is already there")
    picture: str | None = setting(None, "PNG for the histogram; default: beside --output", is_path=True)
    model_revision: str | None = setting(
        None, "branch, tag or commit of a model on the hub; default: main", metavar="REV"
    )
    trust_remote_code: bool = setting(
        False, "run code that comes with the model: only for authors whom you trust with this machine"
    )


@dataclass(frozen=True, kw_only=True)
class ProbeNoiseSettings:
    """With noise."""

    noise_passes: int = setting(
        0,
        "noisy passes over each row, for how its score stands noise; each costs a forward pass over the data; 0: none",
        low=0,
        high=100,
    )
    noise_std: float = setting(0.2, "standard deviation of the noise, a share of each token's size", low=0, high=1e6)
    noise_layers: list[int] = setting([0, 1, 2], "the layers that get it, from 0", low=0, high=10**4, metavar="N")


@dataclass(frozen=True, kw_only=True)
class ProbeSampleSettings:
    """With sampled answers."""

    samples: int = setting(
        0,
        "answers drawn to each prompt, of which the share that is right counts; the dearest probe: each "
        "is a generation; 0: none",
        low=0,
        high=1000,
    )
    max_new_tokens: int = setting(50, "tokens an answer at the most", low=1, high=10**6)
    temperature: float = setting(0.5, "divides the logits", low=0, high=1e6, open_low=True)
    top_p: float = setting(0.9, "the likeliest tokens of this sum remain", low=0, high=1, open_low=True)
    top_k: int = setting(40, "so many of the likeliest tokens remain; 0: all", low=0, high=10**9)
    seed: int = setting(42, "determines noise and samples", low=0, high=10**18)


@dataclass(frozen=True, kw_only=True)
class ProbeModelSettings:
    """The model."""

    batch_size: int = setting(0, "rows at a time on each device; 0: found by trying", low=0, high=10**9)
    max_length: int = setting(1024, "tokens a row; the rest of a longer one is cut", low=2)
    dtype: str = setting(
        "auto", "of the weights; auto: bfloat16 on a GPU, else float32",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    quantization: str = setting(
        "none",
        "load the model in 8 or 4 bits, where it does not fit otherwise; slower",
        choices=("none", "8bit", "4bit"),
    )
    attn_implementation: str | None = setting(
        None, "attention of the model: eager, sdpa, flash_attention_2, ...; default: its own"
    )
    chat_template: str | None = setting(
        None, "prompt format: chatml, alpaca, plain or a Jinja file; default: the tokenizer's own, else chatml",
        metavar="NAME|FILE", is_path=True,
    )  # fmt: skip
    prompt_date: str | None = setting(
        None, "date and time for a chat template that asks for today's, as 2026-01-31T12:00:00; default: now"
    )


GROUPS: dict[str, type] = {
    "what goes in and what comes out": ProbeFileSettings,
    "with noise": ProbeNoiseSettings,
    "with sampled answers": ProbeSampleSettings,
    "the model": ProbeModelSettings,
}


class _AsAnswers(AnswerSettings):
    base_flag = "--model"


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(ProbeModelSettings, ProbeSampleSettings, ProbeNoiseSettings, ProbeFileSettings):
    """All settings of a probe, checked.

    Raises:
        InputError: a value is out of its range, or a required one is missing.
    """

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("model", "train_data", "output"):
            if not getattr(self, name):
                raise InputError(f"--{name} is required; see --help")
        parse_columns(self.columns)
        if self.prompt_date is not None:
            check_date(self.prompt_date)

    @property
    def sampling(self) -> DrawSettings:
        """How answers are drawn: as `generate.py` does."""
        return DrawSettings(
            rounds=max(self.samples, 1), max_new_tokens=self.max_new_tokens, temperature=self.temperature,
            top_p=self.top_p, top_k=self.top_k, seed=self.seed,
        )  # fmt: skip

    @property
    def answers(self) -> AnswerSettings:
        """The same model as `generate.py` has it."""
        return _AsAnswers(
            model_id=self.model, input_csv=self.train_data, dtype=self.dtype, quantization=self.quantization,
            attn_implementation=self.attn_implementation, trust_remote_code=self.trust_remote_code,
            chat_template=self.chat_template, model_revision=self.model_revision,
        )  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """All flags, grouped."""
    parser = OneLineParser(
        prog="python -m noisefit.probe",
        usage="accelerate launch -m noisefit.probe --model MODEL --train_data FILE --output FILE [options]",
        description="What a model knows of a file's answers, before it is trained on them.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add_flags(parser, GROUPS)
    add_switches(parser)
    add_token(parser.add_argument_group("the hub"))
    return parser


def parse_arguments(argv: Sequence[str]) -> ProbeSettings:
    """The command line's flags.

    Raises:
        InputError: an unknown flag, a value out of range, or a required flag that is missing.
    """
    given = without_token(vars(build_parser().parse_args(argv)))
    return ProbeSettings(**{"model": "", "train_data": "", "output": ""} | given)
