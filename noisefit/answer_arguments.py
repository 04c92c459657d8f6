"""The flags of `generate.py`: names and defaults of the published program."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from noisefit.command_line import BOOLEAN, HelpFormatter, OneLineParser, a_path, hide_token, number
from noisefit.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    """All flags, grouped."""
    parser = OneLineParser(
        prog="generate.py",
        usage="accelerate launch generate.py --model_path ADAPTER --input_csv FILE [options]",
        description="Answer the prompts of a file several times each, with an adapter or with a base model alone.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    positive = number(int, 1)

    add = parser.add_argument_group("what goes in and what comes out").add_argument
    add(
        "--model_path",
        type=a_path,
        help="the adapter's folder; without it the base model answers alone, for comparison",
    )
    add(
        "--model_id",
        type=a_path,
        help="the base model: a folder, or a name on the hub; default: the one that the adapter records",
    )
    add(
        "--input_csv",
        type=a_path,
        default="test_ground_truth.csv",
        help="CSV, JSON Lines or Parquet with a column prompt",
    )
    add("--output_csv", type=a_path, help="where the answers go; default: the adapter's folder name and _answers.csv")
    add("--overwrite_output", action=BOOLEAN, default=False, help="replace answers that are already there")
    add("--hf_token", help="token for the hub; safer in the environment as HF_TOKEN. It is never written anywhere")
    add("--trust_remote_code", action=BOOLEAN, default=False, help="run code that comes with the base model")

    add = parser.add_argument_group("how answers are drawn").add_argument
    add("--rounds", type=positive, default=5, help="answers to each prompt")
    add("--max_new_tokens", type=positive, default=50, help="tokens an answer at the most")
    add("--temperature", type=_temperature, default=0.5, help="divides the logits")
    add("--top_p", type=number(float, 0, 1, open_low=True), default=0.9, help="the likeliest tokens of this sum remain")
    add("--top_k", type=number(int, 0), default=40, help="so many of the likeliest tokens remain; 0: all")
    add("--repetition_penalty", type=number(float, 0, open_low=True), default=1.2, help="of repeated tokens; 1: none")
    add("--greedy", action=BOOLEAN, default=False, help="always the likeliest token; all rounds are then the same")
    add("--seed", type=number(int, 0), default=42, help="with prompt, round and position it determines every token")

    add = parser.add_argument_group("the model").add_argument
    add("--batch_size", type=number(int, 0), default=0, help="answers at a time on each device; 0: found by trying")
    add("--no_merge", action="store_true", help="keep the adapter beside the weights instead of adding it to them")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
        help="of the weights; auto: bfloat16 on a GPU, else float32")  # fmt: skip
    add("--quantization", choices=("none", "8bit", "4bit"), default="none", help="load the base model in 8 or 4 bits")
    add("--attn_implementation", help="attention of the model: eager, sdpa, flash_attention_2, ...; default: its own")
    add(
        "--chat_template",
        type=a_path,
        metavar="NAME|FILE",
        help="prompt format; default: the one saved with the adapter",
    )
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's flags.

    Raises:
        InputError: an unknown flag, a value out of range, or neither adapter nor base model.
    """
    args = build_parser().parse_args(argv)
    if not args.model_path and not args.model_id:
        raise InputError("give --model_path, an adapter's folder, or --model_id, a base model to answer alone")
    if args.hf_token:
        hide_token(args.hf_token)
    del args.hf_token
    return args


def _temperature(text: str) -> float:
    value = number(float, 0)(text)
    if value == 0:
        raise argparse.ArgumentTypeError("0 would divide by zero; for the likeliest token use --greedy")
    return value
