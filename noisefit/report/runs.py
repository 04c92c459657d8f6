"""What training runs left in their output folders, read for pictures of them."""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noisefit.base.errors import InputError
from noisefit.base.schema import EACH, INDEX, MEASURE, NUMBER
from noisefit.report.files import ends_torn, or_noted, read_bytes, read_lines, read_object
from noisefit.report.records import RowsRecord, Sample, read_rows_record, read_samples

LONGEST = 40  # letters of a run's name in the picture

# What the files hold, for `checked`. Other keys are passed over.
METRICS = "epoch loss ce_loss soft_loss consistency_loss rdrop_loss learning_rate grad_norm target_tokens"
METRICS += " tokens_per_second noise_to_signal peak_memory_gib skipped_steps token_accuracy entropy"
BY_LAYER = {"layer_noise_to_signal": {EACH: MEASURE}, "hidden_rms": (MEASURE,)}  # the latter of the former's layers
LINE = {"step": NUMBER} | dict.fromkeys(METRICS.split(), MEASURE) | BY_LAYER
# Of an evaluation: the key, and the panel that it is drawn in.
EVALUATED = {"eval_token_accuracy": "token_accuracy", "eval_entropy": "entropy", "right_rate": "right_rate",
             "wrong_rate": "wrong_rate"}  # fmt: skip
EVALUATION = {"step": NUMBER, "eval_ce_loss": MEASURE} | dict.fromkeys(EVALUATED, MEASURE)
SNR = {"snr": [MEASURE], "selected": [INDEX]}
GRID = [{"scale": MEASURE, "kl": MEASURE, "score": MEASURE}]
MEASURED = {"layer": INDEX, "scale": MEASURE, "best_score": MEASURE, "grid": GRID}
POLICY = SNR | {"scales": (MEASURE,), "layers": (MEASURED,)}


@dataclass(frozen=True)
class Layer:
    """A decoder layer: whether it gets noise, its signal-to-noise ratio, and what an automatic policy found: its best
    score, and the scale that it was given, else that of its best score, with the KL there. NaN is not known."""

    chosen: bool
    snr: float
    score: float = math.nan
    scale: float = math.nan
    kl: float = math.nan


@dataclass(frozen=True)
class Run:
    """What the files of an output folder say; a number that is null or not finite there is NaN here.

    Attributes:
        name: what tells it from the other runs.
        steps: of the logged lines.
        metrics: from a key of metrics.jsonl to its value in each line, for those that have a value in some line.
        noise: from a noisy layer ("embedding" for that) to its noise to signal in each line.
        sizes: the same of the size of its hidden states.
        evaluation: steps and cross-entropies.
        layers: by index; empty where no file tells.
        settings: by name; empty where they were not recorded.
        evaluated: by panel what else was measured at the steps of `evaluation`.
        samples: answers that the run drew while it trained, in the order of the file.
        rows: which rows it has, and which it left out; `None` where that was not recorded.
        not_shown: what its files do not say, or not whole: sentences.
    """

    name: str
    steps: list[float]
    metrics: dict[str, list[float]]
    noise: dict[str, list[float]]
    sizes: dict[str, list[float]]
    evaluation: tuple[list[float], list[float]]
    layers: dict[int, Layer]
    settings: dict[str, Any]
    evaluated: dict[str, list[float]]
    samples: list[Sample]
    rows: RowsRecord | None
    not_shown: list[str]

    def evaluations(self, key: str) -> list[float]:
        """What was measured of a panel's quantity at the steps of `evaluation`; empty where nothing was."""
        return self.evaluation[1] if key == "ce_loss" else self.evaluated.get(key, [])


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in the order given, each folder once.

    Raises:
        InputError: a folder is none, holds no logged step, or a file with its numbers cannot be used.
    """
    for folder in folders:
        if not os.path.isdir(folder):
            is_file = "a file, expected the output folder of a run; a file of answers goes behind --answers"
            what = is_file if os.path.exists(folder) else "no such folder"
            raise InputError(f"{folder}: {what}")
    different = {os.path.realpath(folder): Path(folder) for folder in reversed(folders)}
    paths = list(reversed(different.values()))
    return [read_run(path, name) for path, name in zip(paths, short_names(paths), strict=True)]


def short_names(folders: Sequence[Path], keep_last: bool = False) -> list[str]:
    """Of each path the last parts that tell it from the others, without those that all of them end with, but for the
    last where that is to be kept."""
    ends = [Path(os.path.abspath(folder)).parts for folder in folders]
    for kept in range(max(map(len, ends), default=0), 0, -1):
        cut = [end[-kept:] for end in ends]
        ends = cut if len(set(cut)) == len(set(ends)) else ends
    while not keep_last and len(ends) > 1 and all(len(end) > 1 for end in ends) and len({end[-1] for end in ends}) == 1:
        ends = [end[:-1] for end in ends]
    names = [readable("/".join(end)) for end in ends]
    half = LONGEST // 2
    names = [name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}" for name in names]
    return names if len(set(names)) == len(names) else [f"{i}: {name}" for i, name in enumerate(names, 1)]


def readable(text: str) -> str:
    """Text with question marks for line ends and for bytes that are no letters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def read_run(folder: Path, name: str) -> Run:
    """What the files of a folder say.

    Raises:
        InputError: as `read_runs`.
    """
    content = read_bytes(folder / "metrics.jsonl")
    if content is None:
        raise InputError(f"{folder}: it has no metrics.jsonl, so it is not the output folder of a run")
    losses = [name.decode() for name in re.findall(rb'"(\w+_loss)"', content)]  # an edited loop may have others
    shape = LINE | dict.fromkeys(losses, MEASURE)
    lines = read_lines(folder / "metrics.jsonl", shape)
    if not lines:
        raise InputError(f"{folder / 'metrics.jsonl'}: no step was logged yet")
    evaluations = read_lines(folder / "eval_metrics.jsonl", EVALUATION)
    layers = read_layers(folder)
    samples, unreadable = read_samples(folder / "samples.jsonl")
    settings = or_noted(lambda: read_object(folder / "noisefit_config.json", {}), "its settings", unreadable)
    rows = or_noted(lambda: read_rows_record(folder / "rows.json"), "which rows were left out", unreadable)
    of_layers = [line.pop("layer_noise_to_signal") for line in lines]
    rms = [
        dict(zip(values, line.pop("hidden_rms"), strict=False)) for values, line in zip(of_layers, lines, strict=True)
    ]
    metrics = {key: [line[key] for line in lines] for key in shape if key in lines[0]}
    metrics["hidden_rms"] = [statistics.fmean(values.values()) if values else math.nan for values in rms]
    if not any(value > 0 for value in metrics["noise_to_signal"]):
        del metrics["noise_to_signal"]  # a run without noise has zeros
    noisy = sorted({key for values in of_layers for key in values}, key=lambda key: (key.isdecimal(), len(key), key))
    noise, sizes = (
        {layer: [values.get(layer, math.nan) for values in measured] for layer in noisy}
        for measured in (of_layers, rms)
    )
    return Run(
        name=name,
        steps=metrics.pop("step"),
        metrics={key: values for key, values in metrics.items() if not all(map(math.isnan, values))},
        noise={key: values for key, values in noise.items() if not all(map(math.isnan, values))},
        sizes={key: values for key, values in sizes.items() if not all(map(math.isnan, values))},
        evaluation=([line["step"] for line in evaluations], [line["eval_ce_loss"] for line in evaluations]),
        layers=layers,
        settings=settings or {},
        evaluated={
            panel: values
            for key, panel in EVALUATED.items()
            if not all(map(math.isnan, values := [line[key] for line in evaluations]))
        },
        samples=samples,
        rows=rows,
        not_shown=[*_not_there(folder, layers), *unreadable],
    )


# What a page lacks without a file, and why it may not be there.
OPTIONAL = {
    "noisefit_config.json": "its settings",
    "layer_snr.json": "its layers",
    "eval_metrics.jsonl": "an evaluation (the run has no rows for one, or did not come to it yet)",
    "samples.jsonl": "samples (--sample_steps of train_loop.py has a run draw them)",
    "rows.json": "which rows were left out (the run is older than this record; it said so on its screen)",
}


def _not_there(folder: Path, layers: Mapping[int, Layer]) -> list[str]:
    lines = [f"There is no {name}: the page does not show {what}." for name, what in OPTIONAL.items()
             if not (folder / name).exists() and not (name == "layer_snr.json" and layers)]  # fmt: skip
    torn = [name for name in ("metrics.jsonl", "eval_metrics.jsonl", "samples.jsonl") if ends_torn(folder / name)]
    return lines + [
        f"The last line of {name} is not whole: the run is writing it, or was stopped there." for name in torn
    ]


def read_layers(folder: Path) -> dict[int, Layer]:
    """The layers from `layer_snr.json` and `noise_policy.json`, of which the latter has the last word.

    Raises:
        InputError: as `read_runs`.
    """
    layers: dict[int, Layer] = {}
    for path, shape in ((folder / "layer_snr.json", SNR), (folder / "noise_policy.json", POLICY)):
        content = read_object(path, shape)
        if content is None:
            continue
        snr, chosen = content["snr"], content["selected"]
        measured = {entry["layer"]: entry for entry in content.get("layers", [])}
        named = sorted({*chosen, *measured})
        if snr and named and named[-1] >= len(snr):
            raise InputError(f"{path}: snr has {len(snr)} layers, and none of index {named[-1]}")
        scales = dict(zip(chosen, content.get("scales", []), strict=False))
        for i in range(len(snr)) or named:  # a policy that was written by hand may lack the SNR
            layers[i] = Layer(i in chosen, snr[i] if snr else math.nan, *_own_point(measured.get(i), scales.get(i)))
    return layers


def _own_point(entry: Mapping[str, Any] | None, given: float | None) -> tuple[float, float, float]:
    """Best score, scale and KL of a layer: scale and KL as it was given, else those of the best score."""
    if entry is None:
        return math.nan, math.nan if given is None else given, math.nan
    best = entry["best_score"]
    key, wanted = ("score", best) if given is None else ("scale", given)
    there = [(point["scale"], point["kl"]) for point in entry["grid"] if math.isclose(point[key], wanted)]
    return best, *(there[0] if there else (math.nan if given is None else given, math.nan))
