"""The noise policy of a run: which layers get noise, and how strong it is. Its values, and the file it is given in."""

from __future__ import annotations

import json
import math
import os
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noisefit.errors import InputError, notice
from noisefit.files import read_text
from noisefit.objectives import OBJECTIVES

POLICIES = ("snr", "auto")
LARGEST = sys.float_info.max  # a whole number in JSON has no bound, and beyond this one no float


@dataclass(frozen=True)
class NoisePolicy:
    """Which layers get noise, and how strong.

    Attributes:
        layers: ascending.
        base_stds: the base scale `s` of each; `None`: `noise_std^2 * std(h)`, see `snr_base_std`.
        snr: of every layer; empty where a file gave the policy and does not say.
        calibration: what `auto` measured, for `noise_policy.json`.
    """

    layers: list[int] = field(default_factory=list)
    base_stds: list[float] | None = None
    snr: list[float] = field(default_factory=list)
    calibration: dict[str, Any] | None = None


def check_policy(args: Namespace, num_layers: int) -> None:
    """Check what the settings ask for against the model's number of layers, before the model is loaded.

    Raises:
        InputError: more noisy layers than there are to choose from, or a policy file that is none of this model.
    """
    if not OBJECTIVES[args.loss_mode].needs_policy:
        return
    if args.noise_policy not in POLICIES:
        policy = read_policy(args.noise_policy, num_layers)
        if not any(policy.base_stds or ()) and "ce" not in OBJECTIVES[args.loss_mode].weights(args):
            raise InputError(f"--noise_policy {args.noise_policy}: it has no noise, without which --loss_mode "
                             f"{args.loss_mode} has nothing to learn")  # fmt: skip
        found = policy.calibration or {}
        if found.get("model", args.model) != args.model:
            notice(f"--noise_policy {args.noise_policy} was calibrated for {found['model']}")
        return
    eligible = num_layers - first_eligible(args, num_layers)
    if args.noise_policy == "snr" and args.num_noise_layers > eligible:
        past = f", of which {eligible} are past --prefer_late_layers {args.prefer_late_layers:g}"
        past = past if eligible < num_layers else ""
        raise InputError(f"--num_noise_layers {args.num_noise_layers}: {args.model} has {num_layers} layers{past}")
    if not eligible:
        raise InputError(f"--prefer_late_layers {args.prefer_late_layers:g} leaves none of {num_layers} layers")


def first_eligible(args: Namespace, num_layers: int) -> int:
    """The first layer past `--prefer_late_layers` of the depth."""
    return math.ceil(round(args.prefer_late_layers * num_layers, 6))


def read_policy(name: str, num_layers: int | None = None) -> NoisePolicy:
    """The policy of a file that a calibrated run left, or of one by hand with `selected` and `scales`.

    Args:
        name: the value of `--noise_policy`.
        num_layers: of the model that it is for, where that is to be checked.

    Raises:
        InputError: no such file, or not a policy for such a model.
    """
    flag, path = f"--noise_policy {name}", Path(name)
    if not os.path.isfile(path):
        raise InputError(f"{flag}: expected snr, auto, or a noise_policy.json that a run left")
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError, InputError) as error:
        raise InputError(f"{flag}: cannot be read: {' '.join(str(error).split())[:200]}") from None
    try:
        policy = NoisePolicy(content["selected"], content["scales"], content.get("snr", []), content)
        if policy.base_stds is None:
            raise ValueError("there are no scales")
        made_for = content.get("num_layers", num_layers)
        if made_for != num_layers is not None:
            raise InputError(f"{flag}: it is for a model of {made_for} layers, this one has {num_layers}")
        check_values(policy, num_layers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{flag}: not a noise policy with 'selected' layers and their 'scales': {what}") from None
    return policy


def check_values(policy: NoisePolicy, num_layers: int | None = None) -> None:
    """Raise `ValueError` or `TypeError` where a policy from a file has what none has.

    Args:
        policy: the values as they were read.
        num_layers: of its model, where that is known.
    """

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(what)

    def are_numbers(values: Any, kinds: tuple[type, ...]) -> bool:
        return isinstance(values, list) and all(type(v) in kinds and 0 <= v <= LARGEST for v in values)

    layers, most = policy.layers, math.inf if num_layers is None else num_layers
    require(are_numbers(layers, (int,)), "the layers are not a list of numbers from 0")
    require(sorted(set(layers)) == layers, "the layers are not in ascending order")
    require(max(layers, default=0) < most, f"there is no layer {max(layers, default=0)} in a model of {most}")
    require(are_numbers(policy.snr, (int, float)), "snr is not a list of numbers")
    require(not policy.snr or num_layers is None or len(policy.snr) == num_layers, f"snr is not that of {most} layers")
    if policy.base_stds is not None:
        require(are_numbers(policy.base_stds, (int, float)), "the scales are not a list of numbers from 0")
        require(
            len(policy.base_stds) == len(layers), f"there are {len(policy.base_stds)} scales to {len(layers)} layers"
        )
    require(policy.calibration is None or isinstance(policy.calibration, dict), "the calibration is no object")
    for entry in (policy.calibration or {}).get("layers", []):
        grid = entry["grid"]
        require(are_numbers([entry["layer"]], (int,)) and entry["layer"] < most, "a measured layer is not of the model")
        require(isinstance(grid, list) and bool(grid), "a measured layer has no grid")
        require(are_numbers([entry["best_score"]], (int, float)), "a measured layer has no best_score")
        for cell in grid:
            numbers = [cell[name] for name in ("factor", "scale", "kl", "ce_change", "score")]
            require(are_numbers(numbers, (int, float)), f"the grid of layer {entry['layer']} is not of numbers")


def as_file(policy: NoisePolicy, version: str) -> dict[str, Any]:
    """The content of `noise_policy.json`."""
    chosen = {"selected": policy.layers, "scales": policy.base_stds, "snr": policy.snr}
    return {"noisefit_version": version} | (policy.calibration or {}) | chosen
