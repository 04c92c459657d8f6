"""What a probe found, in a few lines and a picture."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from noisefit.base.errors import InputError, notice
from noisefit.base.files import check_regular, replacing, writing
from noisefit.inputs.probing import CHAT, NOISY, SAMPLED, TEXT
from noisefit.method.modes import part

BINS = 60


def check_picture(picture: str | None, output: Path, overwrite: bool) -> Path:
    """Where the histogram goes. Raises `InputError` where it cannot go there."""
    path = Path(picture) if picture is not None else output.with_suffix(".png")
    if path.suffix.lower() != ".png":
        raise InputError(f"--picture {path}: expected a name that ends in .png")
    check_regular(path, "--picture ")
    if path.exists() and not overwrite:
        raise InputError(f"--picture {path} exists; choose another name, or give --overwrite_output")
    if not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise InputError(f"--picture {path}: no folder {path.parent} that can be written")
    return path


def summary(path: str, cells: Sequence[Mapping[str, str]]) -> tuple[list[str], np.ndarray, float | None]:
    """Lines about the scores, the values of `knowledge_chat`, and the threshold that is suggested, if any."""
    lines = []
    for name in (CHAT, TEXT, *NOISY, SAMPLED):
        values = np.array([float(own[name]) for own in cells if own.get(name)])
        if len(values):
            low, middle, high = np.percentile(values, [10, 50, 90])
            lines.append(f"  {name:<24}median {middle:>8.3f}   10% to 90%: {low:.3f} to {high:.3f}")
    values = np.array([float(own[CHAT]) for own in cells if own.get(CHAT)])
    parting = part(values)
    if parting.threshold is None:
        last = f"  warning: {CHAT} has one mode ({parting.why}), so no threshold is suggested"
    else:
        below = int((values < parting.threshold).sum())
        last = f"  suggested: --unknown_below {parting.threshold:.4f}, below which are {below} of {len(values)} rows"
    return [f"{path}: {len(values)} rows probed", *lines, last], values, parting.threshold


def draw_histogram(path: Path, values: np.ndarray, threshold: float | None) -> bool:
    """Draw `knowledge_chat` as a PNG; whether matplotlib is there to do it."""
    if importlib.util.find_spec("matplotlib") is None:
        notice("no picture: matplotlib is not installed; pip install matplotlib")
        return False
    if not len(values):
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(values, bins=BINS, color="#0072B2")
    if threshold is not None:
        axes.axvline(threshold, color="#D55E00", label=f"suggested threshold {threshold:.3g}")
        axes.legend()
    axes.set(xlabel=f"{CHAT}: mean log-probability of the decisive tokens, nats", ylabel="rows",
             title="What the model knows of the rows")  # fmt: skip
    with writing(path), replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=120)
    return True
