"""The settings of answering: names and defaults of the published program, but for the repetition penalty."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from noisefit.answers.repeating import Repeated
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
from noisefit.base.refusal import REFUSAL
from noisefit.base.settings import add_flags, check_fields, fields_of, names_of, not_default, setting
from noisefit.inputs.columns import parse_columns

# In the settings that are recorded beside answers, and no flags.
VERSION, ABOUT = "noisefit_version", "about"
NOT_REPEATED = ("overwrite_output",)


@dataclass(frozen=True, kw_only=True)
class AnswerFileSettings:
    """What goes in and what comes out."""

    model_path: str | None = setting(
        None, "the adapter's folder; without it the base model answers alone, for comparison", is_path=True
    )
    model_id: str | None = setting(
        None, "the base model: a folder, or a name on the hub; default: the one that the adapter records", is_path=True
    )
    model_revision: str | None = setting(
        None, "branch, tag or commit of a base model on the hub; default: the one that the adapter records, else main",
        metavar="REV",
    )  # fmt: skip
    input_csv: str = setting(help="CSV, JSON Lines or Parquet with a column prompt (required)", is_path=True)
    columns: list[str] | None = setting(
        None, "what its columns are called, as in training: prompt=question response=answer; answers have our names",
        metavar="NAME=COLUMN",
    )  # fmt: skip
    output_csv: str | None = setting(
        None, "where the answers go, .csv or .jsonl; default: the adapter's folder name and _answers.csv", is_path=True
    )
    overwrite_output: bool = setting(False, "replace answers that are already there")
    trust_remote_code: bool = setting(
        False, "run code that comes with the base model: only for authors whom you trust with this machine"
    )


@dataclass(frozen=True, kw_only=True)
class DrawSettings:
    """How answers are drawn."""

    rounds: int = setting(
        5,
        "answers to each prompt; time grows with it, and what rounds disagree on (semantic entropy) needs five or so",
        low=1,
        high=10**6,
    )
    max_new_tokens: int = setting(
        50, "tokens an answer at the most; answers that end earlier cost what they have", low=1, high=10**6
    )
    temperature: float = setting(
        0.5,
        "divides the logits: lower is surer of itself, higher is more varied; the likeliest token alone: --greedy",
        low=0,
        high=1e6,
    )
    top_p: float = setting(0.9, "the likeliest tokens of this sum remain; 1: all", low=0, high=1, open_low=True)
    top_k: int = setting(40, "so many of the likeliest tokens remain; 0: all", low=0, high=10**9)
    repetition_penalty: float = setting(
        1.0,
        "of repeated tokens; 1: none. 1.1 or so for a small model that repeats itself; it also hits what "
        "an answer takes from its prompt",
        low=0,
        high=1e6,
        open_low=True,
    )
    greedy: bool = setting(False, "always the likeliest token; all rounds are then the same, so one is computed")
    seed: int = setting(
        42, "with prompt, round and position it determines every token, on any number of processes", low=0, high=10**18
    )


@dataclass(frozen=True, kw_only=True)
class ConfidenceSettings:
    """How sure the model is of its answers, and what becomes of those that it is not sure of."""

    noise_passes: int = setting(
        0, 
        "passes over each answer with noise as in the adapter's training: the mean and the spread of its "
        "logprob under that, for a confidence by noise; each costs a forward pass over the answer; 0: "
        "none", low=0, high=10**6,
    )  # fmt: skip
    abstain_below: float | None = setting(
        None, 
        "answers whose confidence, exp(logprob), is lower are replaced by the refusal; noisefit.threshold "
        "finds the number; default: none is",
        low=0, high=1,
    )  # fmt: skip
    refusal: str = setting(REFUSAL, "what --abstain_below answers instead")


@dataclass(frozen=True, kw_only=True)
class AnswerModelSettings:
    """The model."""

    batch_size: int = setting(
        0,
        "answers at a time on each device; 0: found by trying. Memory and speed grow with it; answers do "
        "not depend on it",
        low=0,
        high=10**9,
    )
    no_merge: bool = setting(
        False, "keep the adapter beside the weights instead of adding it to them; in 16, 8 and 4 bits and with "
        "--device_map it always stays there",
    )  # fmt: skip
    device_map: str | None = setting(
        None, "one process, and the model split over the machine's GPUs as accelerate does it: auto, balanced, "
        "balanced_low_0 or sequential; default: a whole model on each process's device",
        choices=("auto", "balanced", "balanced_low_0", "sequential"),
    )  # fmt: skip
    static_cache: bool = setting(
        False, "keys and values in a cache of fixed size, with which transformers compiles the model on a GPU; rounds "
        "then do not share their prompt's pass",
    )  # fmt: skip
    engine: str = setting(
        "transformers", "what generates; vllm is faster, and promises less: the same answers for a seed on the same "
        "machine and versions at best (needs: pip install vllm)", choices=("transformers", "vllm"),
    )  # fmt: skip
    tensor_parallel: int = setting(1, "GPUs that --engine vllm splits the model over", low=1, high=1024)
    dtype: str = setting(
        "auto", 
        "of the weights; auto: bfloat16 on a GPU, else float32. float32 gives the same answers for any "
        "batch size, at twice the memory",
        choices=("auto", "float32", "bfloat16", "float16"),
    )  # fmt: skip
    quantization: str = setting(
        "none",
        "load the base model in 8 or 4 bits, where it does not fit otherwise; slower, and answers differ",
        choices=("none", "8bit", "4bit"),
    )
    attn_implementation: str | None = setting(
        None, "attention of the model: eager, sdpa, flash_attention_2, ...; default: its own"
    )
    chat_template: str | None = setting(
        None, "prompt format: chatml, alpaca, plain or a Jinja file; default: the one saved with the adapter",
        metavar="NAME|FILE", is_path=True,
    )  # fmt: skip
    prompt_date: str | None = setting(
        None, "date and time for a chat template that asks for today's, as 2026-01-31T12:00:00; default: now"
    )


GROUPS: dict[str, type] = {
    "what goes in and what comes out": AnswerFileSettings,
    "how answers are drawn": DrawSettings,
    "how sure it is": ConfidenceSettings,
    "the model": AnswerModelSettings,
}
# The ten that `--help` shows with what they do; the others it names.
FIRST = ("model_path", "model_id", "input_csv", "output_csv", "rounds", "max_new_tokens", "temperature", "greedy",
         "seed", "abstain_below")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AnswerSettings(AnswerModelSettings, ConfidenceSettings, DrawSettings, AnswerFileSettings):
    """All settings of answering, checked.

    Raises:
        InputError: a value is out of its range, neither adapter nor base model is given, or flags do not go together.
    """

    base_flag: ClassVar[str] = "--model_id"  # by which errors name the base model
    repeats: Repeated | None = field(default=None, repr=False, compare=False)  # no flag: the answers drawn again

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.model_path and not self.model_id:
            raise InputError("give --model_path, an adapter's folder, or --model_id, a base model to answer alone")
        if not self.input_csv:
            raise InputError("--input_csv is required: a file with a column prompt; see --help")
        parse_columns(self.columns)
        if self.device_map and self.noise_passes:
            raise InputError("--noise_passes does not go with --device_map; leave one of them out")
        if self.device_map and self.static_cache:
            raise InputError("--static_cache does not go with --device_map; leave one of them out")
        self._check_engine()
        if self.temperature == 0:
            raise InputError("--temperature: 0 would divide by zero; for the likeliest token use --greedy")
        if self.noise_passes and not self.model_path:
            raise InputError("--noise_passes: a base model alone was trained with no noise; give --model_path")
        if not self.refusal.strip():
            raise InputError("--refusal: it is empty; expected the text of an answer")
        if self.abstain_below is None and "refusal" in not_default(self):
            raise InputError("--refusal says what --abstain_below answers; give a threshold there, or leave it out")
        if self.prompt_date is not None:
            from noisefit.inputs.templates import check_date  # here, as it takes a second to import

            check_date(self.prompt_date)

    def record(self) -> dict[str, Any]:
        """All flags by name, in the order of `--help`: they repeat the answers when given as `--config`."""
        found = asdict(self)
        names = [field.name for cls in GROUPS.values() for field in fields_of(cls)]
        return {name: found[name] for name in names if name not in NOT_REPEATED}

    def changed_since(self, input_sha256: str, model_fingerprint: str) -> str | None:
        """A line that says what is not as it was for the answers that are drawn again; `None` where all is."""
        of_model = {"model_path", "model_id", "model_revision", *names_of(AnswerModelSettings)}
        return None if self.repeats is None else self.repeats.changes(input_sha256, model_fingerprint, of_model)

    def _check_engine(self) -> None:
        if self.engine != "vllm":
            if self.tensor_parallel != 1:
                raise InputError("--tensor_parallel is for --engine vllm; for transformers' there is --device_map")
            return
        without = (
            "noise_passes",
            "device_map",
            "quantization",
            "attn_implementation",
            "no_merge",
            "batch_size",
            "static_cache",
        )
        if given := [name for name in without if name in not_default(self)]:
            raise InputError(f"--{given[0]} does not go with --engine vllm; leave one of them out")


def build_parser() -> argparse.ArgumentParser:
    """All flags, grouped."""
    parser = OneLineParser(
        prog="generate.py",
        usage="accelerate launch generate.py --model_path ADAPTER --input_csv FILE [options]",
        description="Answer the prompts of a file several times each, with an adapter or with a base model alone.",
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
        help="any of these flags from a YAML file, or the .settings.json beside answers; the command line wins",
    )  # fmt: skip
    add_token(where_from)
    add_help(parser, FIRST)
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> AnswerSettings:
    """Flags of the command line over those of `--config` over the defaults.

    Raises:
        InputError: an unknown flag, a value out of range, or neither adapter nor base model.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    given = parse_flags(parser, argv, (VERSION, ABOUT), {"train_data": "a training, for train_loop.py"})
    of_command_line = vars(parser.parse_args(argv))
    repeats = Repeated.by(of_command_line.pop("config", None), ABOUT, of_command_line)
    return AnswerSettings(**{"input_csv": ""} | without_token(dict(given)), repeats=repeats)
