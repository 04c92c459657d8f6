"""What a run's output folder records of its noise: the policy's file, and the noise made of it again."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from noisefit.base.errors import InputError, in_a_line
from noisefit.base.files import read_text
from noisefit.base.schema import AMOUNT, COUNT, INDEX, TEXT, Maybe, checked, require
from noisefit.method.noise import TokenScaledNoise
from noisefit.method.objectives import OBJECTIVES, Objective
from noisefit.method.policy import ALL, BY_SNR, CALIBRATED, FROZEN, LIVE, NOISE_SCALES, NoisePolicy, make_noise

CONFIG, SNR, POLICY = "noisefit_config.json", "layer_snr.json", "noise_policy.json"
CELL = dict.fromkeys(("factor", "scale", "kl", "ce_change", "score"), AMOUNT)
TRIED = ({"layer": INDEX, "best_score": AMOUNT, "grid": [CELL]},)  # what a calibration measured
# Of the policy's file, which may have been written by hand: 'selected' and 'scales' alone are needed.
FILE_SHAPE = {"selected": [INDEX], "scales": [AMOUNT], "snr": (AMOUNT,), "num_layers": Maybe(COUNT),
              "model": Maybe(TEXT), "layers": TRIED, "settings": Maybe({"noise_scale": Maybe(TEXT)})}  # fmt: skip
SNR_SHAPE = {"snr": [AMOUNT], "selected": [INDEX], "base_stds": (AMOUNT,)}
# Of a run's settings, those that its noise goes by. A run of an earlier version lacks the later ones.
CONFIG_SHAPE = {"loss_mode": TEXT, "noise_policy": TEXT, "noise_std": AMOUNT, "neftune_alpha": AMOUNT,
                "noise_scale": Maybe(TEXT), "max_noise_to_signal": Maybe(AMOUNT),
                "noise_tokens": Maybe(TEXT)}  # fmt: skip


@dataclass(frozen=True)
class RecordedNoise:
    """The noise of a run, as its output folder has it.

    Attributes:
        objective: of the run; the others are its settings of these names.
        policy: of the run, as it was at its end.
    """

    objective: Objective
    policy: NoisePolicy
    noise_std: float
    neftune_alpha: float
    noise_scale: str = LIVE
    max_noise_to_signal: float = 0.0
    noise_gradient: bool = False  # there is none where nothing is learnt
    noise_tokens: str = ALL

    def make(self) -> dict[int, TokenScaledNoise]:
        """The noise of each layer, see `noisefit.method.policy.make_noise`."""
        return make_noise(self, self.policy)

    @property
    def identity(self) -> str:
        """By which it is told from another run's noise, the same in every process: an objective's functions are not."""
        return repr([(field.name, getattr(self, field.name)) for field in fields(self) if field.name != "objective"]
                    + [self.objective.noise])  # fmt: skip


def read_noise(folder: Path, num_layers: int) -> RecordedNoise:
    """The noise that a run trained with.

    Args:
        folder: its `--output_model`.
        num_layers: of its model.

    Raises:
        InputError: a record is missing, was edited to what none can be, is of another model, or the run had no noise.
    """
    where = str(folder / CONFIG)
    config = checked(_object(folder / CONFIG), CONFIG_SHAPE, where)
    mode = config["loss_mode"]
    require(mode in OBJECTIVES, where, f"loss_mode is {mode[:40]!r}, none of {', '.join(OBJECTIVES)}")
    objective, scale = OBJECTIVES[mode], config["noise_scale"] or LIVE
    require(scale in NOISE_SCALES, where, f"noise_scale is {scale[:40]!r}, none of {', '.join(NOISE_SCALES)}")
    tokens = config["noise_tokens"] or ALL
    knows = tokens == ALL or objective.noise != "layers"
    require(knows, where, f"its run had noise at the tokens of the {tokens[:40]} alone, and --noise_passes has it at "
                          "all; leave out --noise_passes")  # fmt: skip
    policy = NoisePolicy()
    if objective.noise == "layers":
        policy = _recorded_policy(folder, num_layers, config["noise_policy"] != "snr", scale)
    recorded = RecordedNoise(
        objective, policy, config["noise_std"], config["neftune_alpha"], scale, config["max_noise_to_signal"] or 0.0
    )
    strength = {"none": [], "embedding": [config["neftune_alpha"]], "layers": policy.base_stds}[objective.noise]
    if policy.kind == BY_SNR and policy.layers:
        strength = [config["noise_std"]]
    require(any(strength), str(folder), f"its run (--loss_mode {mode}) had no noise, so there is none to answer under; "
                                        "leave out --noise_passes")  # fmt: skip
    return recorded


def _recorded_policy(folder: Path, num_layers: int, by_file: bool, noise_scale: str) -> NoisePolicy:
    if by_file:
        _object(folder / POLICY)  # for the line where it is missing
        return read_policy(str(folder / POLICY), num_layers, str(folder / POLICY))
    where = str(folder / SNR)
    found = checked(_object(folder / SNR), SNR_SHAPE, where)
    layers, snr, stds = found["selected"], found["snr"], found["base_stds"]
    if noise_scale != FROZEN:
        policy = NoisePolicy(BY_SNR, layers, snr=snr)
    else:
        require(len(stds) == num_layers, where, f"there are {len(stds)} base_stds to {num_layers} layers")
        inside = all(layer < num_layers for layer in layers)  # else `check_values` says so
        chosen = [stds[layer] for layer in layers] if inside else [0.0] * len(layers)
        policy = NoisePolicy(FROZEN, layers, chosen, snr, start_stds=stds)
    check_values(policy, where, num_layers)
    return policy


def _object(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such file, and --noise_passes needs this record of the adapter's run")
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {in_a_line(error)}") from None


def read_policy(name: str, num_layers: int | None = None, where: str | None = None) -> NoisePolicy:
    """The policy of a file that a calibrated run left, or of one by hand with `selected` and `scales`.

    Args:
        name: the value of `--noise_policy`.
        num_layers: of the model that it is for, where that is to be checked.
        where: stands before what is wrong; default: that flag and its value.

    Raises:
        InputError: no such file, or not a policy for such a model.
    """
    flag = where or f"--noise_policy {name}"
    if not os.path.isfile(name):
        raise InputError(f"{flag}: expected snr, auto, or a {POLICY} that a run left")
    try:
        content = json.loads(read_text(Path(name)))
    except (ValueError, RecursionError, InputError) as error:
        raise InputError(f"{flag}: cannot be read: {in_a_line(error)}") from None
    found = checked(content, FILE_SHAPE, flag)
    made_for = found["num_layers"] if found["num_layers"] is not None else num_layers
    require(num_layers in (None, made_for), flag, f"it is for a model of {made_for} layers, this one has {num_layers}")
    policy = NoisePolicy(CALIBRATED, found["selected"], found["scales"], found["snr"], content)
    check_values(policy, flag, num_layers)
    return policy


def check_values(policy: NoisePolicy, where: str, num_layers: int | None) -> None:
    """Raise `InputError` where a policy has what none of a model of so many layers has."""
    most = math.inf if num_layers is None else num_layers
    layers, snr, stds = policy.layers, policy.snr, policy.base_stds
    require(sorted(set(layers)) == layers, where, "the layers are not in ascending order")
    require(max(layers, default=0) < most, where, f"there is no layer {max(layers, default=0)} in a model of {most}")
    require(not snr or num_layers in (None, len(snr)), where, f"snr is not that of {most} layers")
    wanted = 0 if policy.kind == BY_SNR else len(layers)
    require(len(stds) == wanted, where, f"there are {len(stds)} scales to {wanted} layers")
    frozen = most if policy.kind == FROZEN else 0
    require(len(policy.start_stds) == frozen, where, f"start_stds are not those of {frozen} layers")
    kept = [policy.start_stds[layer] for layer in layers] if frozen else stds
    require(stds == kept, where, "base_stds are not the start_stds of its layers")
    for entry in checked((policy.calibration or {}).get("layers"), TRIED, where):
        require(entry["layer"] < most, where, "a measured layer is not of the model")
        require(bool(entry["grid"]), where, "a measured layer has no grid")
