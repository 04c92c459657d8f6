"""The noise policy that a run asks for: its file, choosing layers at the start, and saying what was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from noisefit.base.errors import InputError, notice
from noisefit.base.random_state import random_state, restore_random_state
from noisefit.base.schema import AMOUNT, INDEX, OBJECT, TEXT, Maybe, checked, require
from noisefit.fork.exactness import choose_strategy
from noisefit.inputs.noise_records import check_values, read_policy
from noisefit.method import calibration
from noisefit.method.noise import TokenScaledNoise
from noisefit.method.policy import (
    BY_SNR,
    CALIBRATED,
    FROZEN,
    KINDS,
    NOISE_SCALES,
    RELATIVE,
    NoiseKind,
    NoisePolicy,
    as_asked,
)
from noisefit.method.snr import average_base_std, average_snr, negligible_noise, select_layers
from noisefit.method.teacher import BASE, EMA
from noisefit.run.method_settings import POLICIES
from noisefit.run.processes import progress_bar
from noisefit.run.settings import Settings

# Of a policy in a checkpoint.
POLICY_SHAPE = {"kind": TEXT, "layers": [INDEX], "base_stds": [AMOUNT], "snr": [AMOUNT], "calibration": Maybe(OBJECT),
                "start_stds": (AMOUNT,)}  # fmt: skip
ALIKE = 1.05  # times the smallest SNR, up to which the largest says nothing of the layers
# Settings that a calibration goes by, besides its own.
RECORDED = ("noise_scale", "noise_tokens", "prefer_late_layers", "seed")


def check_policy(settings: Settings, num_layers: int) -> None:
    """Check what the settings ask for against the model's number of layers, before the model is loaded.

    Raises:
        InputError: more noisy layers than there are to choose from, or a policy file that is none of this model.
    """
    objective, wanted = settings.objective, settings.noise_policy
    if objective.noise != "layers":
        return
    if wanted not in POLICIES:
        policy = read_policy(wanted, num_layers)
        if not any(policy.base_stds) and "ce" not in objective.losses:
            raise InputError(f"--noise_policy {wanted}: it has no noise, without which --loss_mode "
                             f"{settings.loss_mode} has nothing to learn")  # fmt: skip
        made_for = (policy.calibration or {}).get("model", settings.model)
        if made_for != settings.model:
            notice(f"--noise_policy {wanted} was calibrated for {made_for}")
        scaled = ((policy.calibration or {}).get("settings") or {}).get("noise_scale") or settings.noise_scale
        require(scaled in NOISE_SCALES, f"--noise_policy {wanted}", f"its noise_scale is none of {NOISE_SCALES}")
        if (scaled == RELATIVE) != (settings.noise_scale == RELATIVE):
            raise InputError(f"--noise_policy {wanted} was calibrated with --noise_scale {scaled}, and its scales mean "
                             f"something else under {settings.noise_scale}; give --noise_scale {scaled}")  # fmt: skip
        return
    past = settings.prefer_late_layers
    eligible = num_layers - first_eligible(past, num_layers)
    if wanted == "snr" and settings.num_noise_layers > eligible:
        late = f", of which {eligible} are past --prefer_late_layers {past:g}" if eligible < num_layers else ""
        raise InputError(
            f"--num_noise_layers {settings.num_noise_layers}: {settings.model} has {num_layers} layers{late}"
        )
    if not eligible:
        raise InputError(f"--prefer_late_layers {past:g} leaves none of {num_layers} layers")


def first_eligible(share: float, num_layers: int) -> int:
    """The first layer past this share of the depth."""
    return math.ceil(round(share * num_layers, 6))


def policy_from(value: Any, where: str, num_layers: int, run: Mapping[str, Any]) -> NoisePolicy:
    """The policy that a checkpoint holds.

    Args:
        value: as it stands there.
        where: the file, for the line.
        num_layers: of the model.
        run: the settings of the run, by name.

    Raises:
        InputError: it is none for a model of so many layers, or none of such a run.
    """
    policy = NoisePolicy(**checked(value, POLICY_SHAPE, where))
    require(policy.kind in KINDS, where, f"kind is none of {', '.join(KINDS)}")
    check_values(policy, where, num_layers)
    measured = FROZEN if run.get("noise_scale") == FROZEN else BY_SNR
    kinds = {"snr": measured}.get(str(run.get("noise_policy")), CALIBRATED)
    told = "noise_policy" in run and bool(policy.layers)
    require(not told or policy.kind == kinds, where, f"kind is {policy.kind}, that of the run is {kinds}")
    return policy


def as_file(policy: NoisePolicy, version: str) -> dict[str, Any]:
    """The content of `noise_policy.json`."""
    chosen = {"selected": policy.layers, "scales": policy.base_stds, "snr": policy.snr}
    return {"noisefit_version": version} | (policy.calibration or {}) | chosen


def choose_policy(
    settings: Settings, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], accelerator: Accelerator,
    kind: NoiseKind = TokenScaledNoise, before: NoisePolicy | None = None,
) -> NoisePolicy:  # fmt: skip
    """What `--noise_policy` asks for. All processes call it, and get the same.

    A calibration leaves the random generators as they were: with its file given back, a run is the same run.

    Args:
        settings: of the run.
        model: the prepared `BranchedModel`.
        batches: a few of the training, as many on each process.
        accelerator: of the run.
        kind: of the noise.
        before: the policy that this one takes the place of; a base scale that is frozen stays as it was.

    Raises:
        InputError: the model overflows, `--branches fork` is not possible, or no noise that is tried does anything.
    """
    layered, wanted, kind = settings.objective.noise == "layers", settings.noise_policy, as_asked(settings, kind)
    if wanted not in POLICIES and layered:
        return read_policy(wanted)
    stds, measured_on = [], batches[: settings.snr_batches]
    if layered and wanted == "snr" and settings.noise_scale == FROZEN:
        stds = list(before.start_stds) if before is not None else []
        stds = stds or average_base_std(model, measured_on, settings.noise_std).tolist()
    snr = average_snr(model, measured_on, settings.noise_std, kind, stds)
    first = first_eligible(settings.prefer_late_layers, len(snr))
    if not layered:
        return NoisePolicy(snr=snr.tolist())
    if wanted == "snr":
        layers = select_layers(snr, settings.num_noise_layers, settings.snr_format, first)
        if not stds:
            return NoisePolicy(BY_SNR, layers, snr=snr.tolist())
        return NoisePolicy(FROZEN, layers, [stds[layer] for layer in layers], snr.tolist(), start_stds=stds)
    batches, layers = batches[: settings.auto_calib_batches], list(range(first, len(snr)))
    strategy, _ = choose_strategy(model, batches[0], layers[:1], settings.branches)
    state = random_state(accelerator.device)
    with progress_bar(accelerator, len(batches) * len(layers), "calibrating the noise", "layer") as progress:
        factors = settings.auto_scale_factors
        found = calibration.measure(model, batches, layers, factors, strategy, progress.update, kind)
    restore_random_state(state, accelerator.device)
    choice = calibration.choose(found, len(snr), rules_of(settings))
    by = {name: value for name, value in settings.record().items() if name.startswith("auto_") or name in RECORDED}
    about = {"model": settings.model, "num_layers": len(snr), "settings": by}
    measured: dict[str, Any] = about | calibration.record(found, choice)
    if not any(cell["kl"] for entry in measured["layers"] for cell in entry["grid"]):
        raise InputError("--noise_policy auto: noise of no scale changes a prediction; raise --auto_scale_factors")
    return NoisePolicy(CALIBRATED, choice.layers, choice.scales, snr.tolist(), measured)


def rules_of(settings: Settings) -> calibration.Rules:
    """By what a calibration chooses."""
    return calibration.Rules(
        settings.auto_scale_l2_penalty,
        settings.auto_max_ce_delta_ratio,
        settings.auto_depth_bands,
        settings.auto_max_layers,
        settings.auto_target_kl_fraction,
    )


def expected_cost(settings: Settings, policy: NoisePolicy, num_layers: int, strategy: str) -> float:
    """A step's cost as a ratio to plain fine-tuning's, counting layers: `p + b (1 - p)` for the fork of `b` branches,
    with `p` the share of the layers up to the first noisy one."""
    count = len(settings.objective.branches)
    if settings.objective.noise != "layers":
        return count
    if not policy.layers:
        return 1
    share = (policy.layers[0] + 1) / num_layers if strategy == "fork" else 0
    return share + count * (1 - share)


def describe(settings: Settings, policy: NoisePolicy, num_layers: int, strategy: str) -> list[str]:
    """What the run's start says of its branches and noise: a table of the layers, and the cost of a step."""
    objective, lines = settings.objective, []
    if objective.noise == "layers":
        rows = _rows(policy, num_layers)
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        how = " (relative to each token's size)" if settings.noise_scale == RELATIVE and policy.layers else ""
        how = " (its base scale is kept as it is now)" if policy.kind == FROZEN and policy.layers else how
        lines.append(f"noise in layers: {', '.join(map(str, policy.layers)) or 'none'}{how}")
        if (
            policy.kind != CALIBRATED
            and 0 < len(policy.layers) < num_layers
            and max(policy.snr) < ALIKE * min(policy.snr)
        ):
            lines.append("the layers' SNR are nearly the same, so which of them are chosen is nearly chance; "
                         "--prefer_late_layers chooses by depth")  # fmt: skip
    elif objective.noise == "embedding":
        lines.append(f"noise on the embeddings, alpha {settings.neftune_alpha:g}")
    if "rdrop_dropout" in objective.reads:
        share = settings.rdrop_dropout
        lines.append(f"dropout {share:g} in every block, besides the model's and the adapter's own")
    how = f" ({strategy})" if len(objective.branches) > 1 else ""
    cost = expected_cost(settings, policy, num_layers, strategy)
    more = {BASE: ", and a forward pass of the base model more", EMA: ", and a forward pass of the average more"}
    taught = "" if settings.cache_teacher else more.get(settings.teacher, "")
    lines.append(
        f"branches: {', '.join(kind.value for kind in objective.branches)}{how}; counting layers, a step costs "
        f"{cost:.2f} times plain fine-tuning{taught}"
    )
    if policy.kind != CALIBRATED and policy.layers:
        grows = "to which it is in proportion" if settings.noise_scale == RELATIVE else "whose square it grows with"
        lines.append(negligible_noise(torch.tensor(policy.snr), policy.layers, grows) or "")
    return [line for line in lines if line]


def _rows(policy: NoisePolicy, num_layers: int) -> list[list[str]]:
    """The table of the layers, its head first."""
    chosen = ["yes" if layer in policy.layers else "" for layer in range(num_layers)]
    if policy.kind != CALIBRATED:
        stds = policy.start_stds
        head = ["layer", "SNR", *(["scale"] if stds else []), "noise"]
        return [head] + [
            [str(i), f"{policy.snr[i]:.4g}", *([f"{stds[i]:.3g}"] if stds else []), chosen[i]]
            for i in range(num_layers)
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
