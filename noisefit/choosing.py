"""Choosing the layers that get noise at the start of a run, and saying what was chosen and what it costs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from noisefit import calibration
from noisefit.hooks import EMBEDDING
from noisefit.noise import EmbeddingNoise, TokenScaledNoise
from noisefit.objectives import OBJECTIVES
from noisefit.policy import POLICIES, NoisePolicy, first_eligible, read_policy
from noisefit.random_state import random_state, restore_random_state
from noisefit.snr import average_snr, negligible_noise, select_layers
from noisefit.startup import choose_strategy
from noisefit.tracking import progress_bar

SETTINGS = (
    "auto_calib_batches", "auto_scale_factors", "auto_scale_l2_penalty", "auto_max_ce_delta_ratio",
    "auto_max_layers", "auto_depth_bands", "auto_target_kl_fraction", "prefer_late_layers", "seed",
)  # fmt: skip


def choose_policy(
    args: Namespace, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], accelerator: Accelerator
) -> NoisePolicy:
    """What `--noise_policy` asks for. All processes call it, and get the same.

    A calibration leaves the random generators as they were: with its file given back, a run is the same run.

    Args:
        args: the run's settings.
        model: the prepared `BranchedModel`.
        batches: a few of the training, as many on each process.
        accelerator: of the run.

    Raises:
        InputError: the model overflows, or `--branches fork` is not possible.
    """
    if args.noise_policy not in POLICIES and OBJECTIVES[args.loss_mode].needs_policy:
        return read_policy(args.noise_policy)
    snr = average_snr(model, batches[: args.snr_batches], args.noise_std)
    first = first_eligible(args, len(snr))
    if not OBJECTIVES[args.loss_mode].needs_policy:
        return NoisePolicy(snr=snr.tolist())
    if args.noise_policy == "snr":
        layers = select_layers(snr, args.num_noise_layers, args.snr_format, first)
        return NoisePolicy(layers, snr=snr.tolist())
    batches, layers = batches[: args.auto_calib_batches], list(range(first, len(snr)))
    strategy, _ = choose_strategy(model, batches[0], layers[:1], args.branches)
    state = random_state(accelerator.device)
    with progress_bar(accelerator, len(batches) * len(layers), "calibrating the noise", "layer") as progress:
        found = calibration.measure(model, batches, layers, args.auto_scale_factors, strategy, progress.update)
    restore_random_state(state, accelerator.device)
    choice = calibration.choose(found, len(snr), args)
    about = {"model": args.model, "num_layers": len(snr), "settings": {name: vars(args)[name] for name in SETTINGS}}
    return NoisePolicy(choice.layers, choice.scales, snr.tolist(), about | calibration.record(found, choice))


def make_noise(args: Namespace, policy: NoisePolicy) -> dict[int, TokenScaledNoise | EmbeddingNoise]:
    """The noise of each layer of the policy; on the embedding where the objective wants it there."""
    if OBJECTIVES[args.loss_mode].noise == "embedding":
        return {EMBEDDING: EmbeddingNoise(args.neftune_alpha)}
    base_stds: Sequence[float | None] = policy.base_stds or [None] * len(policy.layers)
    pairs = zip(policy.layers, base_stds, strict=True)
    return {layer: TokenScaledNoise(args.noise_std, base_std) for layer, base_std in pairs}


def expected_cost(args: Namespace, policy: NoisePolicy, num_layers: int, strategy: str) -> float:
    """A step's cost as a ratio to plain fine-tuning's, counting layers: `p + b (1 - p)` for the fork of `b` branches,
    with `p` the share of the layers up to the first noisy one."""
    count = len(OBJECTIVES[args.loss_mode].branches)
    if not OBJECTIVES[args.loss_mode].needs_policy:
        return count
    if not policy.layers:
        return 1
    share = (policy.layers[0] + 1) / num_layers if strategy == "fork" else 0
    return share + count * (1 - share)


def describe(args: Namespace, policy: NoisePolicy, num_layers: int, strategy: str) -> list[str]:
    """What the run's start says of its branches and noise: a table of the layers, and the cost of a step."""
    objective, lines = OBJECTIVES[args.loss_mode], []
    if objective.needs_policy:
        rows = _rows(policy, num_layers)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append(f"noise in layers: {', '.join(map(str, policy.layers)) or 'none'}")
    elif objective.noise == "embedding":
        lines.append(f"noise on the embeddings, alpha {args.neftune_alpha:g}")
    elif args.loss_mode == "rdrop":
        lines.append(f"dropout {args.rdrop_dropout:g} in every block, besides the model's and the adapter's own")
    how = f" ({strategy})" if len(objective.branches) > 1 else ""
    cost = expected_cost(args, policy, num_layers, strategy)
    lines.append(
        f"branches: {', '.join(objective.branches)}{how}; counting layers, a step costs {cost:.2f} times plain "
        "fine-tuning"
    )
    if policy.base_stds is None and policy.layers:
        lines.append(negligible_noise(torch.tensor(policy.snr), policy.layers) or "")
    return [line for line in lines if line]


def _rows(policy: NoisePolicy, num_layers: int) -> list[list[str]]:
    """The table of the layers, its head first."""
    chosen = ["yes" if layer in policy.layers else "" for layer in range(num_layers)]
    if policy.base_stds is None:
        return [["layer", "SNR", "noise"]] + [
            [str(layer), f"{policy.snr[layer]:.4g}", chosen[layer]] for layer in range(num_layers)
        ]
    scales = dict(zip(policy.layers, policy.base_stds, strict=True))
    tried = {entry["layer"]: entry for entry in (policy.calibration or {}).get("layers", ())}
    rows = [["layer", "score", "KL", "scale", "noise"]]
    for layer in range(num_layers):
        scale, score, kl = scales.get(layer), "", ""
        if entry := tried.get(layer):
            # At the chosen scale, or where there is none at the best one.
            column = "scale" if scale is not None else "score"
            wanted = scale if scale is not None else entry["best_score"]
            at = min(entry["grid"], key=lambda cell: abs(cell[column] - wanted))
            score, kl = f"{at['score']:.3g}", f"{at['kl']:.3g}"
        rows.append([str(layer), score, kl, "" if scale is None else f"{scale:.3g}", chosen[layer]])
    return rows
