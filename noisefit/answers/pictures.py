"""The picture of risk and coverage: how many of the most confident answers are wrong, by how many are kept."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from noisefit.answers.figures import attempted, confidences, resampled, risk_at
from noisefit.answers.outcomes import Assessed
from noisefit.base.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERCENTS = range(1, 101)
DRAWS = 500  # of the band, which is for the eye
# Okabe and Ito's without yellow; further files repeat them, dashed.
COLOURS = "#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000".split()


def curve(assessed: Sequence[Assessed], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The wrong share at each percent of the attempted answers, and its 95% band; `[100]` and `[2, 100]`."""
    confidence, (rows, wrong) = confidences(assessed), attempted(assessed)
    assert confidence is not None
    once = risk_at(confidence, wrong, np.ones((1, len(rows)), int), PERCENTS)[:, 0]
    drawn = risk_at(confidence, wrong, resampled(len(assessed), seed)[:DRAWS, rows], PERCENTS)
    return once, np.nanpercentile(drawn, (2.5, 97.5), axis=1)


def draw(files: Mapping[str, Sequence[Assessed]], size: tuple[float, float] = (7, 4.6)) -> Figure:
    """The curve of each file, with its 95% band.

    Args:
        files: by name; all with confidences.
        size: width and height in inches.

    Returns:
        The figure. A line has the file's name as its gid, its band `<name>: band`.

    Raises:
        InputError: no answer of a file is an attempt, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise InputError("--picture needs matplotlib, which is not installed: pip install matplotlib") from None

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.add_subplot()
    highest = 0.0
    for index, (name, assessed) in enumerate(files.items()):
        if not len(attempted(assessed)[0]):
            raise InputError(f"--picture: {name}: no answer is an attempt, so there is no curve")
        risk, (low, high) = curve(assessed)
        colour, style = COLOURS[index % len(COLOURS)], "-" if index < len(COLOURS) else "--"
        axes.fill_between(PERCENTS, low, high, color=colour, alpha=0.15, linewidth=0, gid=f"{name}: band")
        axes.plot(PERCENTS, risk, style, color=colour, linewidth=1.8, gid=name, label=name.replace("$", r"\$"))
        highest = max(highest, float(np.nanmax(high)), float(risk.max()))
    axes.set_title("Risk and coverage, with 95% bands over prompts", fontsize=min(12, 2.4 * size[0]))
    axes.set_xlabel("attempted answers kept, the most confident first")
    axes.set_ylabel("wrong among those kept")
    axes.xaxis.set_major_formatter(PercentFormatter(100))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlim(0, 100)
    axes.set_ylim(0, min(math.ceil(highest * 10 + 0.2) / 10, 1.02) if highest else 0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, loc="best")
    return figure


def picture_of(files: Mapping[str, Sequence[Assessed]]) -> bytes:
    """`draw` as a PNG."""
    made = io.BytesIO()
    draw(files).savefig(made, format="png", metadata={"Software": "noisefit.score"})
    return made.getvalue()
