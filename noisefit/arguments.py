"""The flags of `train_loop.py`: names and defaults of the published program, values checked, YAML accepted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from noisefit.command_line import (
    BOOLEAN,
    HelpFormatter,
    OneLineParser,
    a_path,
    flags_from_yaml,
    hide_token,
    number,
    numbers,
)
from noisefit.errors import InputError, notice
from noisefit.objectives import DROPOUT, OBJECTIVES
from noisefit.policy import POLICIES
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
    add(
        "--model",
        type=a_path,
        help="the base model: a folder in the Hugging Face format, or a name on the hub (required)",
    )
    add("--train_data", type=a_path, help="CSV, JSON Lines or Parquet with columns prompt and response (required)")
    add(
        "--output_model",
        type=a_path,
        default="output_model",
        help="folder for the adapter, its tokenizer and the run's records",
    )
    add("--overwrite_output", action=BOOLEAN, default=False, help="replace an adapter that is already there")
    add(
        "--eval_data",
        type=a_path,
        help="a file like --train_data; its cross-entropy, without noise, is measured in training",
    )
    add(
        "--config",
        type=a_path,
        metavar="FILE",
        help="any of these flags from a YAML file; a flag on the command line wins",
    )
    add("--hf_token", help="token for the hub; safer in the environment as HF_TOKEN. It is never written anywhere")
    add("--trust_remote_code", action=BOOLEAN, default=False, help="run code that comes with the base model")

    group = parser.add_argument_group("the method: noise and loss")
    add = group.add_argument
    add("--loss_mode", choices=OBJECTIVES, default="full", help="the objective: NoiseFiT, a part of it, or a baseline")
    add("--noise_policy", type=a_path, metavar="snr|auto|FILE", default="snr",
        help="noisy layers by their SNR, calibrated, or as in the noise_policy.json of a calibrated run")  # fmt: skip
    add("--noise_std", type=non_negative, default=0.1, help="noise strength; its square times std(h) is the base scale")
    add("--num_noise_layers", type=count, default=3, help="how many decoder layers get noise; 0 is plain fine-tuning")
    add("--snr_format", choices=SNR_FORMATS, default="Largest", help="noise goes where the SNR is largest, or lowest")
    add("--snr_batches", type=positive, default=4, help="micro-batches a process over which the SNR is averaged")
    add("--prefer_late_layers", metavar="FRACTION", type=share, default=0.0,
        help="noise only past this share of the depth; the later it begins, the cheaper is a step")  # fmt: skip
    add("--snr_every", type=count, default=0, help="measure and choose layers again every so many steps; 0: once")
    add("--hybrid_loss_alpha", type=share, default=0.5, help="weight of the cross-entropy; the soft term has the rest")
    add("--lambda_consistency", type=non_negative, default=0.1, help="weight of the consistency term")
    add(
        "--temperature",
        type=number(float, 1e-3, 1e3),
        default=1.0,
        help="softens the distributions of the soft and consistency terms",
    )
    add("--neftune_alpha", type=non_negative, default=5.0, help="noise strength of --loss_mode neftune")
    add("--rdrop_alpha", type=non_negative, default=1.0, help="weight of the symmetric KL of --loss_mode rdrop")
    add("--rdrop_dropout", type=number(float, 0, 0.99), default=0.05,
        help="dropout of --loss_mode rdrop in each block, besides the model's and the adapter's own")  # fmt: skip
    add("--loss_on", choices=("response", "all"), default="response", help="supervise the answer, or the prompt too")
    add("--branches", choices=("auto", "fork", "separate"), default="auto",
        help="clean and noisy branches in one forked pass or in three; auto forks where that is exact")  # fmt: skip
    add("--loss_chunk_size", type=positive, default=256, help="supervised tokens whose logits are in memory at a time")

    group = parser.add_argument_group("the method: noise that calibrates itself")
    add = group.add_argument
    add("--auto_calib_batches", type=positive, default=2, help="micro-batches a process that the noise is tried on")
    add("--auto_scale_factors", type=numbers(above_zero), nargs="+", default=[0.25, 0.5, 1.0, 1.5, 2.0],
        metavar="FACTOR", help="the base scales that are tried, in units of 1 / sqrt(hidden size)")  # fmt: skip
    add("--auto_scale_l2_penalty", type=non_negative, default=0.05,
        help="divides a scale's score by 1 + this times log2(factor)^2")  # fmt: skip
    add("--auto_max_ce_delta_ratio", type=non_negative, default=0.02,
        help="scales that raise the cross-entropy by a larger share are out")  # fmt: skip
    add("--auto_max_layers", type=count, default=0, help="noisy layers at the most; 0: the square root of the layers")
    add("--auto_depth_bands", type=positive, default=3, help="bands of depth that the noisy layers are spread over")
    add("--auto_target_kl_fraction", type=share, default=0.75,
        help="a layer's scale is the smallest whose KL is this share of the chosen layers' median")  # fmt: skip

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
    add("--lora_r", type=number(int, 1, 2**16), default=8, help="rank of the LoRA adapter")
    add("--lora_alpha", type=above_zero, default=16, help="the adapter is scaled by lora_alpha / lora_r")
    add("--lora_dropout", type=number(float, 0, 0.99), default=0.05,
        help="dropout before the adapter; up to the first noisy layer a fork's branches share its mask")  # fmt: skip
    add("--target_modules", nargs="+", metavar="NAME",
        help="modules that get an adapter, or all-linear; default: PEFT's own choice for the architecture")  # fmt: skip
    add("--full_finetune", action=BOOLEAN, default=False, help="train all weights, without an adapter")
    add("--max_length", type=number(int, 2), default=1024, help="tokens a row; the rest of a longer one is cut")
    add("--chat_template", type=a_path, metavar="NAME|FILE",
        help="prompt format: chatml, alpaca or a Jinja file; default: the tokenizer's own, else chatml")  # fmt: skip
    add("--gradient_checkpointing", action=BOOLEAN, default=False, help="less memory, about a third more computing")
    add("--attn_implementation", help="attention of the model: eager, sdpa, flash_attention_2, ...; default: its own")
    add("--quantization", choices=("none", "8bit", "4bit"), default="none",
        help="load the frozen base model in 8 or 4 bits (needs: pip install bitsandbytes)")  # fmt: skip

    group = parser.add_argument_group("kills")
    add = group.add_argument
    add("--save_steps", type=count, default=100, help="a checkpoint every so many steps and after the last; 0: none")
    add("--save_total_limit", type=count, default=2, help="so many checkpoints are kept, the last ones; 0: all")
    add("--resume_from_checkpoint", type=a_path, metavar="PATH|latest|auto",
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
        InputError: an unknown flag, a value out of range, a required flag that is missing, or flags that contradict
            each other.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, from_file = build_parser(), []
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
    factors = args.auto_scale_factors
    if isinstance(factors[0], list):
        factors = [factor for part in factors for factor in part]
    if not factors:
        raise InputError("--auto_scale_factors: expected at least one factor")
    args.auto_scale_factors = sorted(set(factors))
    check_objective(args, _given(from_file + argv))
    if args.quantization != "none" and args.full_finetune:
        raise InputError("--full_finetune cannot train quantized weights; leave out --quantization")
    if args.hf_token:
        hide_token(args.hf_token)
    del args.hf_token
    return args


def check_objective(args: argparse.Namespace, given: set[str]) -> None:
    """Refuse settings of the objective that contradict each other, and name those that change nothing.

    Args:
        args: the run's settings.
        given: the names of those that are not left at their default.

    Raises:
        InputError: as said.
    """
    objective, policy = OBJECTIVES[args.loss_mode], args.noise_policy
    if policy != "snr":
        chosen = "auto finds layers and their number by trying" if policy == "auto" else "the file says which layers"
        for flag in ("snr_format", "num_noise_layers"):
            if flag in given:
                raise InputError(f"--{flag} goes with --noise_policy snr alone: {chosen}; leave one of them out")
        if policy not in POLICIES and args.snr_every:
            raise InputError("--snr_every measures the layers again, which --noise_policy FILE fixes; leave one out")
    noiseless = [flag for flag in ("noise_std", "num_noise_layers") if policy == "snr" and not getattr(args, flag)]
    weights = objective.weights(args)
    if objective.needs_policy and "ce" not in weights and noiseless:
        raise InputError(f"--{noiseless[0]} 0 leaves --loss_mode {args.loss_mode} nothing to learn; give it noise")

    def is_read(name: str) -> bool:
        return objective.weights(argparse.Namespace(**vars(args) | {name: -1.0})) != weights

    layers, auto = objective.needs_policy, objective.needs_policy and policy == "auto"
    used = {
        "noise_policy": layers, "num_noise_layers": layers, "snr_format": layers, "snr_every": layers,
        "noise_std": layers and policy == "snr", "prefer_late_layers": layers and policy in POLICIES,
        "snr_batches": not layers or policy in POLICIES,
        "temperature": weights.keys() != {"ce"}, "branches": len(objective.branches) > 1,
        "neftune_alpha": objective.noise == "embedding", "rdrop_dropout": DROPOUT in objective.branches,
        **{name: is_read(name) for name in ("hybrid_loss_alpha", "lambda_consistency", "rdrop_alpha")},
        **{name: auto for name in vars(args) if name.startswith("auto_")},
    }  # fmt: skip
    if idle := [f"--{name}" for name, is_used in used.items() if name in given and not is_used]:
        notice(f"without effect under --loss_mode {args.loss_mode}, --noise_policy {policy}: {', '.join(idle)}")


def _given(words: Sequence[str]) -> set[str]:
    """The names of the flags among the words of a command line."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(words)))
