"""The flags of `train_loop.py`: names and defaults of the published program, values checked, YAML accepted."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from noisefit.errors import InputError
from noisefit.snr import SNR_FORMATS

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


BOOLEAN = argparse.BooleanOptionalAction


class OneLineParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage, and name the flag that was meant."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            message += _nearest(message.split()[2].partition("=")[0], self)
        raise InputError(message.removeprefix("argument "))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not those that say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def number(
    kind: Callable[[str], Any], low: float, high: float = math.inf, *, open_low: bool = False, also: tuple = ()
) -> Callable[[str], Any]:
    """A converter of flag values to finite numbers from `low` to `high`.

    Args:
        kind: `int` or `float`.
        low, high: the range, both ends included.
        open_low: `low` itself is refused.
        also: further values that are accepted.
    """
    what = "a whole number" if kind is int else "a number"
    span = f"{'above' if open_low else 'at least'} {low:g}"
    if high != math.inf:
        span = f"above {low:g} and up to {high:g}" if open_low else f"from {low:g} to {high:g}"
    expected = " or ".join([f"{what} {span}", *map(str, also)])

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        in_range = math.isfinite(value) and low <= value <= high and not (open_low and value == low)
        if not in_range and value not in also:
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return convert


def build_parser() -> argparse.ArgumentParser:
    """All flags, grouped by what they touch, each with what it does to the method."""
    parser = OneLineParser(
        prog="train_loop.py",
        usage="accelerate launch train_loop.py --model MODEL --train_data FILE [options]",
        description="Fine-tune a causal language model with NoiseFiT (arXiv 2504.03302). Start it with `accelerate "
        "launch`, which sets devices, processes and mixed precision.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    # Bounds far beyond any use, within which nothing overflows.
    count, positive, share = number(int, 0, 10**9), number(int, 1, 10**9), number(float, 0, 1)
    non_negative, above_zero = number(float, 0, 1e6), number(float, 0, 1e6, open_low=True)

    group = parser.add_argument_group("what goes in and what comes out")
    add = group.add_argument
    add("--model", help="the base model: a folder in the Hugging Face format, or a name on the hub (required)")
    add("--train_data", help="CSV, JSON Lines or Parquet with columns prompt and response (required)")
    add("--output_model", default="output_model", help="folder for the adapter, its tokenizer and the run's records")
    add("--overwrite_output", action=BOOLEAN, default=False, help="replace an adapter that is already there")
    add("--eval_data", help="a file like --train_data; its cross-entropy, without noise, is measured in training")
    add("--config", metavar="FILE", help="any of these flags from a YAML file; a flag on the command line wins")
    add("--hf_token", help="token for the hub; safer in the environment as HF_TOKEN. It is never written anywhere")
    add("--trust_remote_code", action=BOOLEAN, default=False, help="run code that comes with the base model")

    group = parser.add_argument_group("the method: noise and loss")
    add = group.add_argument
    add("--noise_std", type=non_negative, default=0.1, help="noise strength; its square times std(h) is the base scale")
    add("--num_noise_layers", type=count, default=3, help="how many decoder layers get noise; 0 is plain fine-tuning")
    add("--snr_format", choices=SNR_FORMATS, default="Largest", help="noise goes where the SNR is largest, or lowest")
    add("--snr_batches", type=positive, default=4, help="micro-batches a process over which the SNR is averaged")
    add("--snr_every", type=count, default=0, help="measure and choose layers again every so many steps; 0: once")
    add("--hybrid_loss_alpha", type=share, default=0.5, help="weight of the cross-entropy; the soft term has the rest")
    add("--lambda_consistency", type=non_negative, default=0.1, help="weight of the consistency term")
    add(
        "--temperature",
        type=number(float, 1e-3, 1e3),
        default=1.0,
        help="softens the distributions of the soft and consistency terms",
    )
    add("--loss_on", choices=("response", "all"), default="response", help="supervise the answer, or the prompt too")
    add("--branches", choices=("auto", "fork", "separate"), default="auto",
        help="clean and noisy branches in one forked pass or in three; auto forks where that is exact")  # fmt: skip
    add("--loss_chunk_size", type=positive, default=256, help="supervised tokens whose logits are in memory at a time")

    group = parser.add_argument_group("the steps")
    add = group.add_argument
    add("--batch_size", type=positive, default=4, help="rows a micro-batch, on each device")
    add("--gradient_accumulation_steps", type=positive, default=4, help="micro-batches an optimizer step")
    add("--epochs", type=positive, default=5, help="passes over the data")
    add("--max_steps", type=number(int, 1, also=(-1,)), default=1000,
        help="optimizer steps; training ends at this or --epochs, whichever comes first; -1 for no limit")  # fmt: skip
    add("--learning_rate", type=above_zero, default=5e-5, help="highest learning rate of the schedule")
    add("--lr_scheduler_type", choices=SCHEDULES, default="cosine", help="how the learning rate falls")
    add("--warmup_ratio", type=share, default=0.0, help="share of the steps in which the learning rate rises")
    add("--weight_decay", type=non_negative, default=0.0, help="weight decay of AdamW")
    add("--max_grad_norm", type=non_negative, default=1.0, help="gradients are scaled down to this norm; 0: never")
    add("--max_bad_steps", type=positive, default=10,
        help="a step whose loss or gradient is not finite is skipped; so many in a row end the run")  # fmt: skip
    add("--seed", type=count, default=42, help="determines adapter, order of the rows, dropout and noise")

    group = parser.add_argument_group("the model")
    add = group.add_argument
    add("--lora_r", type=positive, default=8, help="rank of the LoRA adapter")
    add("--lora_alpha", type=above_zero, default=16, help="the adapter is scaled by lora_alpha / lora_r")
    add("--lora_dropout", type=number(float, 0, 0.99), default=0.05,
        help="dropout before the adapter; up to the first noisy layer a fork's branches share its mask")  # fmt: skip
    add("--target_modules", nargs="+", metavar="NAME",
        help="modules that get an adapter, or all-linear; default: PEFT's own choice for the architecture")  # fmt: skip
    add("--full_finetune", action=BOOLEAN, default=False, help="train all weights, without an adapter")
    add("--max_length", type=number(int, 2), default=1024, help="tokens a row; the rest of a longer one is cut")
    add("--chat_template", metavar="NAME|FILE",
        help="prompt format: chatml, alpaca or a Jinja file; default: the tokenizer's own, else chatml")  # fmt: skip
    add("--gradient_checkpointing", action=BOOLEAN, default=False, help="less memory, about a third more computing")
    add("--attn_implementation", help="attention of the model: eager, sdpa, flash_attention_2, ...; default: its own")
    add("--quantization", choices=("none", "8bit", "4bit"), default="none",
        help="load the frozen base model in 8 or 4 bits (needs: pip install bitsandbytes)")  # fmt: skip

    group = parser.add_argument_group("kills")
    add = group.add_argument
    add("--save_steps", type=count, default=100, help="a checkpoint every so many steps and after the last; 0: none")
    add("--save_total_limit", type=count, default=2, help="so many checkpoints are kept, the last ones; 0: all")
    add("--resume_from_checkpoint", metavar="PATH|latest|auto",
        help="go on from a checkpoint; latest: of --output_model; auto: that, or afresh where none is")  # fmt: skip

    group = parser.add_argument_group("records")
    add = group.add_argument
    add("--logging_steps", type=positive, default=5, help="a line of metrics every so many steps")
    add("--eval_steps", type=count, default=0, help="evaluate every so many steps; 0: after each epoch")
    add(
        "--report_to",
        choices=("none", "wandb", "tensorboard"),
        default="none",
        help="where metrics go besides metrics.jsonl",
    )
    add("--run_name", help="name of the run there; default: the output folder's")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags of the command line over those of `--config` over the defaults.

    The token leaves `sys.argv` for the environment, as trackers record the command line.

    Raises:
        InputError: an unknown flag, a value out of range, or a required flag that is missing.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.config is not None:
        from_file = flags_from_yaml(Path(args.config), parser)
        try:
            parser.parse_args(from_file)
        except InputError as error:
            raise InputError(f"{args.config}: {error}") from None
        args = parser.parse_args(from_file + argv)  # of a flag given twice the last one counts
    for flag in ("model", "train_data"):
        if not getattr(args, flag):
            raise InputError(f"--{flag} is required; see --help")
    if args.target_modules:
        names = [name for part in args.target_modules for name in part.split(",") if name]
        args.target_modules = names[0] if names == ["all-linear"] else names
    if args.quantization != "none" and args.full_finetune:
        raise InputError("--full_finetune cannot train quantized weights; leave out --quantization")
    if args.hf_token:
        hide_token(args.hf_token)
    del args.hf_token
    return args


def flags_from_yaml(path: Path, parser: argparse.ArgumentParser) -> list[str]:
    """A YAML mapping of flag names to values, as words of a command line.

    Raises:
        InputError: the file cannot be read, is not a mapping, or names an unknown flag.
    """
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise InputError(f"--config {path}: not YAML: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"--config {path}: expected lines such as 'epochs: 3'")
    words = []
    for name, value in settings.items():
        if f"--{name}" not in parser._option_string_actions or name in ("config", "help"):
            raise InputError(f"--config {path}: no flag is called {name!r}{_nearest(f'--{name}', parser)}")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            words.extend([f"--{name}", *map(str, value)])
        elif value is not None:  # an empty value leaves the default
            words.append(f"--{name}={value}")
    return words


def hide_token(token: str) -> None:
    """Move the token to the environment, where huggingface_hub looks for it, and out of the recorded command line."""
    os.environ["HF_TOKEN"] = token
    sys.argv = [word.replace(token, "***") for word in sys.argv]


def _nearest(flag: str, parser: argparse.ArgumentParser) -> str:
    close = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
    return f"; did you mean {close[0]}?" if close else "; see --help"
